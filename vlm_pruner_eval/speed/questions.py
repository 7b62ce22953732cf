"""Questions per second through the lmms-eval wrapper at several batch sizes, and whether the answers stay those of batch 1."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from vlm_pruner_eval.bench import GROUP, TASKS
from vlm_pruner_eval.bench.measure import MAX_NEW_TOKENS, read_questions
from vlm_pruner_eval.budget import Rate
from vlm_pruner_eval.errors import ConfigError, PruningError
from vlm_pruner_eval.speed.machine import machine

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

    from vlm_pruner_eval.lmms import PrunedModel

BATCH_SIZES = (1, 4, 8, 16)
ROUNDS = 3
GREEDY = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0, "do_sample": False}


def bench_questions(
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    method: str = "vlmpruner",
    rate: Rate | None = "8/9",
    limit: int = 8,
    device: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Answer DIGITSCENES with MiniVLM in float32, images decoded and preprocessed within the time, all batch sizes in turn.

    Parameters
    ----------
    batch_sizes
        1 must be among them: the others' answers are held against its own.
    method, rate
        What prunes meanwhile; "none" and None for the plain model.
    limit
        Questions of each of the six tasks.
    progress
        Told of every batch size as it begins.

    Returns
    -------
    dict
        `rows`, one a batch size, and `same_answers` over all; it can be written as JSON.

    Raises
    ------
    ConfigError
        Something can't be run as asked.
    PruningError
        A question could not be answered.
    """
    if 1 not in batch_sizes or min(batch_sizes) < 1 or len(set(batch_sizes)) < len(batch_sizes):
        raise ConfigError(f"--batch-sizes: got {list(batch_sizes)}, expected different whole numbers, 1 among them to compare with.")
    if limit < 1:
        raise ConfigError(f"--limit: got {limit}, expected 1 or more questions of each task.")
    from vlm_pruner_eval.lmms import load

    found = {} if device is None else {"device": device}
    model = load("vlmpruner_llava", pretrained="minivlm", dtype="float32", method=method, pruning_rate=rate, **found)
    requests = digitscenes_requests(model, limit)
    _answers(model, 1, requests[:1], method, rate)  # not counted
    times: dict[int, list[float]] = {size: [] for size in batch_sizes}
    given: dict[int, list[list[Answer]]] = {size: [] for size in batch_sizes}
    for turn in range(ROUNDS):
        for size in batch_sizes if turn % 2 == 0 else reversed(batch_sizes):
            progress(f"round {turn + 1} of {ROUNDS}: batch {size}")
            start = time.perf_counter()
            answers = _answers(model, size, requests, method, rate)
            times[size].append(time.perf_counter() - start)
            given[size].append(answers)
    rows = [row_of(size, times, given) for size in batch_sizes]
    return {
        "benchmark": "questions",
        **machine(torch.float32, [torch.device(model.device)]),
        "model": "minivlm",
        "method": method,
        "pruning_rate": None if rate is None else str(rate),
        "n_questions": len(requests),
        "rounds": ROUNDS,
        "same_answers": not any(row["answers_that_differ"] or row["kept_sets_that_differ"] for row in rows),
        "rows": rows,
    }


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one question was answered, and the visual tokens that were kept for it, ascending within the row."""

    text: str
    kept: tuple[int, ...]


def digitscenes_requests(model: PrunedModel, limit: int) -> list[Instance]:
    """The first `limit` questions of every task as lmms-eval asks them, and their documents where the wrapper looks for them."""
    from lmms_eval.api.instance import Instance

    documents = {f"{GROUP}_{task}": {"test": read_questions(task)[:limit]} for task in TASKS}
    model.task_dict = documents
    asked = [(task, index, row["question"]) for task, splits in documents.items() for index, row in enumerate(splits["test"])]
    return [
        Instance(
            "generate_until",
            (question, _messages, GREEDY, index, task, "test"),
            0,
            metadata={"task": task, "doc_id": index, "repeats": 1},
        )
        for task, index, question in asked
    ]


def _messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    from PIL import Image

    picture = Image.open(io.BytesIO(document["image"]["bytes"])).convert("RGB")
    return [{"role": "user", "content": [{"type": "image", "url": picture}, {"type": "text", "text": document["question"]}]}]


def _answers(model: PrunedModel, batch_size: int, requests: list[Instance], method: str, rate: Rate | None) -> list[Answer]:
    model.settings = dataclasses.replace(model.settings, batch_size=batch_size)
    model.configure(method, rate)
    texts = [result.text for result in model.generate_until(requests)]
    if failed := [answer for answer in model.answers if answer.error is not None]:
        raise PruningError(f"{len(failed)} of {len(requests)} questions failed at batch {batch_size}; the first: {failed[0].error}.")
    return [Answer(text, tuple(sorted(answer.record.order))) for text, answer in zip(texts, model.answers, strict=True)]


def row_of(size: int, times: dict[int, list[float]], given: dict[int, list[list[Answer]]]) -> dict[str, Any]:
    """One batch size: questions per second, the speed-up over batch 1 of the same round, and what differs from batch 1's first answers.

    Parameters
    ----------
    times
        Seconds of every round, by batch size.
    given
        Answers of every round, by batch size.
    """
    expected = given[1][0]
    rates = [len(expected) / seconds for seconds in times[size]]
    pairs = [(answer, right) for answers in given[size] for answer, right in zip(answers, expected, strict=True)]
    return {
        "batch_size": size,
        "questions_per_s": median(rates),
        "rounds_per_s": rates,
        "noise": (max(rates) - min(rates)) / median(rates),
        "speedup": median(alone / seconds for alone, seconds in zip(times[1], times[size], strict=True)),
        "answers_that_differ": sum(answer.text != right.text for answer, right in pairs),
        "kept_sets_that_differ": sum(answer.kept != right.kept for answer, right in pairs),
    }
