"""DIGITSCENES: the shipped questions are balanced, true of their scenes, held out, and what the generator makes."""

from __future__ import annotations

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from vlm_pruner_eval.embedded import TASKS, minivlm_path, questions_path
from vlm_pruner_eval.embedded.digitscenes import build_digitscenes, glyphs, photos, questions, scenes
from vlm_pruner_eval.errors import ConfigError

CELLS = ["top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"]
N_SUBTYPES = {"exist": 2, "attribute": 2, "where": 9, "read": 2, "pairs": 3, "count": 4}


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[dict]]:
    rows = parquet.read_table(questions_path(), columns=list(build_digitscenes.COLUMNS)).to_pylist()
    return {task: [row for row in rows if row["task"] == task] for task in TASKS}


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    rows = parquet.read_table(questions_path(), columns=["image_id", "image"]).to_pylist()
    return {row["image_id"]: row["image"]["bytes"] for row in rows}


def test_the_file_is_small_and_datasets_decodes_its_images():
    import datasets

    assert questions_path().stat().st_size <= 12e6
    table = parquet.read_table(questions_path())
    features = datasets.Features.from_arrow_schema(table.schema)
    assert isinstance(features["image"], datasets.Image)
    assert set(features) == {*build_digitscenes.COLUMNS, "image"}
    picture = datasets.Dataset(table.slice(0, 2))[1]["image"]
    assert isinstance(picture, Image.Image)
    assert picture.size == (336, 336)


@pytest.mark.parametrize("task", TASKS)
def test_enough_questions_and_balanced_subtypes(shipped, task):
    rows = shipped[task]
    assert len(rows) >= 300
    assert len({row["question_id"] for row in rows}) == len(rows)
    assert len({(row["image_id"], row["question"]) for row in rows}) == len(rows)
    counts = Counter(row["subtype"] for row in rows)
    assert len(counts) == N_SUBTYPES[task]
    assert len(set(counts.values())) == 1
    if task in ("exist", "pairs"):
        assert Counter(row["answer"] for row in rows) == {"yes": len(rows) // 2, "no": len(rows) // 2}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("limit", [18, 36, 100, 250])
def test_any_limit_is_a_balanced_subset(shipped, task, limit):
    counts = Counter(row["subtype"] for row in shipped[task][:limit])
    assert max(counts.values()) - min(counts.values()) <= (2 if task == "pairs" else 1)
    assert [row["image_id"] for row in shipped[task]] != sorted(row["image_id"] for row in shipped[task])


def test_pairs_are_adjacent_and_hold_a_yes_and_a_no(shipped):
    rows = shipped["pairs"]
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert one["pair_id"] == other["pair_id"]
        assert {one["answer"], other["answer"]} == {"yes", "no"}
        assert (one["image_id"], one["subtype"]) == (other["image_id"], other["subtype"])
    assert len({row["pair_id"] for row in rows}) == len(rows) // 2
    assert {row["answer"] for row in rows[::2]} == {"yes", "no"}, "the yes question must not always come first"
    assert all(row["pair_id"] is None for task in TASKS if task != "pairs" for row in shipped[task])


def only(objects: list[dict], **wanted: object) -> dict:
    """The one object with these properties; the question is ambiguous when there are more."""
    (found,) = [item for item in objects if all(item[key] == value for key, value in wanted.items())]
    return found


def told_by(scene: dict, question: str) -> str:
    """The answer by reading the scene's facts, written apart from the generator."""
    objects, yes_no = scene["objects"], {True: "yes", False: "no"}
    match question.removesuffix(" ?").split():
        case ["what", "is", "the", "number"]:
            answer = "".join(str(item["digit"]) for item in sorted(scene["plate"], key=lambda item: item["box"][0]))
        case ["how", "many", "digits", "are", "there"]:
            answer = str(len(objects))
        case ["are", "there", count, "digits"]:
            answer = yes_no[len(objects) == int(count)]
        case ["is", "there", "a", digit]:
            answer = yes_no[int(digit) in [item["digit"] for item in objects]]
        case ["what", "colour", "is", "the", digit]:
            answer = only(objects, digit=int(digit))["colour"]
        case ["what", "digit", "is", "in", "the", *cell]:
            answer = str(only(objects, cell=" ".join(cell))["digit"])
        case ["what", "digit", "is", colour]:
            answer = str(only(objects, colour=colour)["digit"])
        case ["is", "the", digit, "in", "the", *cell]:
            answer = yes_no[only(objects, digit=int(digit))["cell"] == " ".join(cell)]
        case ["is", "the", digit, colour]:
            answer = yes_no[only(objects, digit=int(digit))["colour"] == colour]
        case _:
            raise AssertionError(f"not a question of this benchmark: {question}")
    return answer


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_true_of_its_scene(shipped, task):
    for row in shipped[task]:
        assert told_by(json.loads(row["scene"]), row["question"]) == row["answer"], row["question_id"]


def test_cells_and_boxes_agree_and_nothing_overlaps(shipped):
    for row in shipped["count"] + shipped["read"]:
        scene = json.loads(row["scene"])
        for item in scene["objects"]:
            left, top, width, height = item["box"]
            assert CELLS[int((top + height / 2) / 112) * 3 + int((left + width / 2) / 112)] == item["cell"]
        covered = np.zeros((336, 336), int)
        for left, top, width, height in [item["box"] for item in scene["objects"]] + [scene["plate_box"] or (0, 0, 0, 0)]:
            covered[top : top + height, left : left + width] += 1
        assert covered.max() == 1


def test_only_held_out_drawings_appear(shipped):
    from sklearn.datasets import load_digits

    targets = load_digits().target
    for rows in shipped.values():
        for row in rows:
            scene = json.loads(row["scene"])
            for item in [*scene["objects"], *scene["plate"]]:
                assert item["source"] % 5 == 4
                assert targets[item["source"]] == item["digit"]


def test_the_training_bank_holds_the_other_drawings(monkeypatch):
    monkeypatch.setattr(glyphs, "_VARIANTS", {"train": 1, "test": 1})
    banks = {split: glyphs.glyph_bank.__wrapped__(split) for split in ("train", "test")}
    train, test = ({glyph.source for glyphs_of in bank for glyph in glyphs_of} for bank in banks.values())
    assert not train & test
    assert len(train) > 1400
    assert len(test) > 350
    with pytest.raises(ConfigError, match="expected train or test"):
        glyphs.glyph_bank("val")


def test_every_word_is_in_the_models_vocabulary(shipped):
    vocabulary = json.loads((minivlm_path() / "tokenizer.json").read_text())["model"]["vocab"]
    for rows in shipped.values():
        for row in rows:
            assert set(row["question"].split()) <= set(vocabulary)
            assert set(row["answer"] if row["answer"].isdigit() else [row["answer"]]) <= set(vocabulary)


@pytest.mark.parametrize("task", TASKS)
def test_the_generator_makes_the_shipped_questions(shipped, task):
    assert list(build_digitscenes.make_questions(task)) == shipped[task]


@pytest.mark.parametrize("image_id", ["scene-000", "scene-123", "scene-299", "plate-007", "plate-298"])
def test_the_generator_makes_the_shipped_pictures(pictures, image_id):
    kind, _, index = image_id.partition("-")
    stored = Image.open(io.BytesIO(pictures[image_id]))
    made = Image.open(io.BytesIO(build_digitscenes.encode(build_digitscenes.make_picture(kind, int(index)))))
    assert made.size == stored.size == (336, 336)
    assert mean_difference(made, stored) < 1
    another = build_digitscenes.make_picture(kind, int(index) - 1 if int(index) else 1)
    assert mean_difference(Image.fromarray(another), stored) > 10, "another scene must not pass for this one"


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    """In grey levels."""
    return float(np.abs(np.asarray(one, int) - np.asarray(other, int)).mean())


def test_build_writes_a_file_that_repeats_itself(tmp_path, monkeypatch):
    plans = {"exist": build_digitscenes.TaskPlan("scene", questions.offer_exist, {"present": 3, "absent": 3})}
    monkeypatch.setattr(build_digitscenes, "PLANS", plans)
    monkeypatch.setattr(build_digitscenes, "N_SCENES", 4)
    first, second = build_digitscenes.build(tmp_path / "a"), build_digitscenes.build(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    table = parquet.read_table(first)
    assert table.num_rows == 6
    assert json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}
    pictures = {row["bytes"] for row in table.column("image").to_pylist()}
    assert len(pictures) == 4, "six questions on four scenes: each is asked once before any is asked twice"


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ConfigError, match="do not fit side by side"):
        scenes.lay_out(np.random.RandomState(0), n_objects=60)
    few = [scenes.lay_out(np.random.RandomState(seed), n_objects=3) for seed in range(2)]
    with pytest.raises(ConfigError, match="more than 2 scenes offer"):
        questions.draw(few, questions.offer_count, {"3": 3}, np.random.RandomState(0))


def test_every_photo_is_credited():
    readme = (questions_path().parent / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    for photo in photos.PHOTOS:
        (row,) = [line for line in rows if line.startswith(f"| `{photo}`")]
        assert "CC" in row or "public domain" in row
    assert "motorcycle" not in " ".join(photos.PHOTOS)
    assert "no evidence about which method is better" in readme
