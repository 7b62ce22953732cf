"""MiniVLM without pruning on DIGITSCENES, by plain ``generate``: ``python -m vlm_pruner_eval.embedded.measure``.

The reference that the lmms-eval path has to agree with; it shares with it the questions and the scoring, nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn

from vlm_pruner_eval.embedded import TASKS, minivlm_path, questions_path
from vlm_pruner_eval.embedded.tasks.digitscenes_utils import both_right, f1, normalise, process_exact_match, process_pairs, process_yes_no
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.versions import tested_range

MAX_NEW_TOKENS = 8
_COMBINE = {"f1": f1, "both_right": both_right}


def check_rope_theta(model: nn.Module) -> None:
    """Check that a model's rotary frequencies are those of the theta in its config.

    A config of transformers 5 keeps theta in ``rope_parameters``; transformers 4 reads ``rope_theta`` and takes 10000 in
    silence when it is not there. Text models with plain rotary positions only.

    Paper: arXiv 2104.09864, section 3.3 (theta_i = base ^ (-2 i / d)).

    Raises
    ------
    ConfigError
        The frequencies belong to another theta.
    """
    text = model.model.language_model
    config = text.config.to_dict()
    written = (config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta")
    frequencies = text.rotary_emb.inv_freq
    theta = float(frequencies[1].double() ** -len(frequencies))
    if written is None or abs(theta / written - 1) > 1e-3:
        raise ConfigError(
            f"rope_theta: the loaded model rotates with theta {theta:.0f}, its config says {written}; "
            "write the value both as text_config.rope_theta and in text_config.rope_parameters."
        )


def load_minivlm(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """The embedded model in evaluation mode, and its processor (left padding).

    Raises
    ------
    ConfigError
        Files are missing, or this version of transformers read the checkpoint wrongly (weights or rotary theta).
    """
    path = minivlm_path()
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if wrong := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise ConfigError(
            f"minivlm: transformers {transformers.__version__} did not match {len(wrong)} weights of the checkpoint "
            f"(first: {wrong[0]}); tested are {tested_range('transformers')}, with an unchanged checkpoint."
        )
    check_rope_theta(model)
    return model.eval(), transformers.AutoProcessor.from_pretrained(path)


def read_questions(task: str) -> list[dict[str, Any]]:
    """Rows of the shipped test split that belong to a task, in order; images still encoded.

    Raises
    ------
    ConfigError
        The task is not one of `TASKS`.
    """
    if task not in TASKS:
        raise ConfigError(f"task: got {task!r}, expected one of {', '.join(TASKS)}.")
    from pyarrow import parquet

    return parquet.read_table(questions_path(), filters=[("task", "=", task)]).to_pylist()


def generate_answers(
    model: nn.Module, processor: Any, rows: Sequence[dict[str, Any]], batch_size: int, image: bool = True
) -> Iterator[str]:
    """Greedy answers of the plain model, in order; with ``image=False`` it is asked without the picture."""
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        inputs = _inputs(processor, batch, image).to(model.device)
        with torch.inference_mode():
            sequences = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        yield from processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _inputs(processor: Any, rows: Sequence[dict[str, Any]], image: bool) -> Any:
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows] if image else None
    seen = [{"type": "image"}] if image else []
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*seen, {"type": "text", "text": row["question"]}]}], add_generation_prompt=True
        )
        for row in rows
    ]
    return processor(images=pictures, text=prompts, padding=True, return_tensors="pt")


def score(task: str, row: dict[str, Any], answer: str) -> dict[str, Any]:
    """Score one answer as the lmms-eval task does: right or wrong, 1.0 or 0.0, comes first."""
    processes = {"exist": process_yes_no, "pairs": process_pairs}
    return processes.get(task, process_exact_match)(row, [answer])


def measure(task: str, model: nn.Module, processor: Any, *, limit: int | None, batch_size: int, image: bool = True) -> dict[str, Any]:
    """Scores (fractions), number of questions, and seconds per question of the unpruned model on one task.

    `accuracy` is the share of right answers, `by_subtype` the same for each subtype; exist has `f1`, pairs `both_right`.
    """
    rows = read_questions(task)[:limit]
    started = time.perf_counter()
    answers = list(generate_answers(model, processor, rows, batch_size, image))
    seconds = time.perf_counter() - started
    records = [score(task, row, answer) for row, answer in zip(rows, answers, strict=True)]
    by_subtype: dict[str, list[float]] = {}
    for row, record in zip(rows, records, strict=True):
        by_subtype.setdefault(row["subtype"], []).append(next(iter(record.values())))
    combined = {name: combine([record[name] for record in records]) for name, combine in _COMBINE.items() if name in records[0]}
    return {
        "task": task,
        "n": len(rows),
        "accuracy": sum(map(sum, by_subtype.values())) / len(rows),
        **combined,
        "by_subtype": {name: sum(values) / len(values) for name, values in sorted(by_subtype.items())},
        "seconds_per_question": seconds / len(rows),
        "answers": [normalise(answer) for answer in answers],
    }


def main() -> None:
    """Command line: a line per task on stderr, one JSON object as the last line on stdout."""
    parser = argparse.ArgumentParser(description="Unpruned MiniVLM on DIGITSCENES by plain generate, float32.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--limit", type=int, default=None, help="questions per task; default all")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--text-only", action="store_true", help="ask without the picture: what guessing is worth")
    arguments = parser.parse_args()
    if arguments.batch_size < 1 or (arguments.limit is not None and arguments.limit < 1):
        parser.error(f"--batch-size and --limit: got {arguments.batch_size} and {arguments.limit}, expected 1 or more.")
    model, processor = load_minivlm()
    results = []
    for task in arguments.tasks:
        options = {"limit": arguments.limit, "batch_size": arguments.batch_size, "image": not arguments.text_only}
        result = measure(task, model, processor, **options)
        del result["answers"]
        results.append(result)
        line = f"{task:10s} n={result['n']:3d}  accuracy {result['accuracy']:.3f}  {result['seconds_per_question']:.3f} s/question"
        print(line, file=sys.stderr, flush=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"results": results, "batch_size": arguments.batch_size, "text_only": arguments.text_only, **versions}))


if __name__ == "__main__":
    main()
