"""Make the test split of DIGITSCENES: ``python -m vlm_pruner_eval.embedded.digitscenes.build_digitscenes --output DIR``."""

from __future__ import annotations

import argparse
import functools
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlm_pruner_eval.embedded import GROUP
from vlm_pruner_eval.embedded.digitscenes import questions
from vlm_pruner_eval.embedded.digitscenes.scenes import CELLS, Scene, lay_out, render

SEED = 20251202
N_SCENES = 300  # of a kind
KINDS = ("scene", "plate")
JPEG_QUALITY = 80
COLUMNS = ("task", "question_id", "image_id", "question", "answer", "subtype", "pair_id", "scene")

_FACTS, _PIXELS, _QUESTIONS = range(3)  # random streams


@dataclass(frozen=True)
class TaskPlan:
    """Scenes that a task asks about, its questions, and the number of items of each subtype."""

    kind: str
    offer: questions.Offer
    quotas: dict[str, int]


PLANS = {
    "exist": TaskPlan("scene", questions.offer_exist, {"present": 150, "absent": 150}),
    "attribute": TaskPlan("scene", questions.offer_attribute, {"colour": 150, "digit": 150}),
    "where": TaskPlan("scene", questions.offer_where, dict.fromkeys(CELLS, 34)),
    "read": TaskPlan("plate", questions.offer_read, {"3 digits": 150, "4 digits": 150}),
    "pairs": TaskPlan("scene", questions.offer_pairs, {"colour": 50, "position": 50, "count": 50}),
    "count": TaskPlan("scene", questions.offer_count, {"3": 75, "4": 75, "5": 75, "6": 75}),
}


def _rng(*key: int) -> np.random.RandomState:
    """A stream of its own for every key. RandomState's streams are frozen: the same on every numpy version."""
    return np.random.RandomState([SEED, *key])


@functools.cache
def make_scene(kind: str, index: int) -> Scene:
    """The facts of scene `index`: 3, 4, 5, 6 digits in turn; or a plate of 3, 4 digits in turn with 0 to 2 digits beside it."""
    rng = _rng(_FACTS, KINDS.index(kind), index)
    if kind == "plate":
        return lay_out(rng, n_objects=int(rng.randint(0, 3)), plate_length=3 + index % 2)
    return lay_out(rng, n_objects=3 + index % 4)


def make_picture(kind: str, index: int) -> np.ndarray:
    """Pixels [336, 336, 3] uint8 of scene `index`."""
    return render(make_scene(kind, index), _rng(_PIXELS, KINDS.index(kind), index))


def encode(picture: np.ndarray) -> bytes:
    """JPEG without chroma subsampling: colours stay sharp, and decoding is the same on every build of the library."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def make_questions(task: str) -> Iterator[dict[str, str | None]]:
    """Rows of one task without the image: `COLUMNS`, in the order in which they are asked."""
    plan = PLANS[task]
    rng = _rng(_QUESTIONS, [*PLANS].index(task))
    scenes = [make_scene(plan.kind, index) for index in range(N_SCENES)]
    number = 0
    for item_number, (index, item) in enumerate(questions.draw(scenes, plan.offer, plan.quotas, rng)):
        for question in (item[i] for i in rng.permutation(len(item))):
            yield {
                "task": task,
                "question_id": f"{task}-{number:03d}",
                "image_id": f"{plan.kind}-{index:03d}",
                "question": question.text,
                "answer": question.answer,
                "subtype": question.subtype,
                "pair_id": f"{task}-pair-{item_number:03d}" if len(item) == 2 else None,
                "scene": json.dumps(scenes[index].as_json()),
            }
            number += 1


def build(folder: Path) -> Path:
    """Write ``test.parquet`` with all questions and encoded images into `folder` (made if missing); about a minute.

    The images column is dictionary-encoded in a single row group: a picture that several tasks ask about is stored once.
    """
    import pyarrow as pa
    from pyarrow import parquet

    rows = [row for task in PLANS for row in make_questions(task)]
    encoded = {image_id: encode(make_picture(*_parsed(image_id))) for image_id in dict.fromkeys(row["image_id"] for row in rows)}
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in COLUMNS}
    images = [{"bytes": encoded[row["image_id"]], "path": f"{row['image_id']}.jpg"} for row in rows]
    columns["image"] = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    features = {name: {"dtype": "string", "_type": "Value"} for name in COLUMNS} | {"image": {"_type": "Image"}}
    described = {"huggingface": json.dumps({"info": {"dataset_name": GROUP, "features": features}})}
    table = pa.table(columns).replace_schema_metadata(described)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "test.parquet"
    parquet.write_table(table, path, compression="zstd", row_group_size=len(rows), dictionary_pagesize_limit=2**26)
    return path


def _parsed(image_id: str) -> tuple[str, int]:
    kind, _, index = image_id.partition("-")
    return kind, int(index)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the test split of DIGITSCENES (needs the `test` extra).")
    parser.add_argument("--output", type=Path, required=True, help="folder that receives test.parquet")
    path = build(parser.parse_args().output)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
