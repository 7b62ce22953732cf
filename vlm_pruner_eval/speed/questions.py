"""Questions per second through the lmms-eval wrapper by batch size and threads, and whether the answers stay those of batch 1."""

from __future__ import annotations

import dataclasses
import io
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vlm_pruner_eval.bench import GROUP, TASKS
from vlm_pruner_eval.bench.measure import MAX_NEW_TOKENS, read_questions
from vlm_pruner_eval.budget import Rate
from vlm_pruner_eval.errors import ConfigError, PruningError
from vlm_pruner_eval.speed.machine import machine

if TYPE_CHECKING:
    from datasets import Dataset
    from lmms_eval.api.instance import Instance

    from vlm_pruner_eval.lmms import PrunedModel

BATCH_SIZES = (1, 4, 8, 16)
WORKERS = (0, 2)
ROUNDS = 3
JPEG_QUALITY = 90
GREEDY = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0, "do_sample": False}


class Case(NamedTuple):
    """What is timed: a batch size, and a number of threads that make prompts ahead."""

    batch_size: int
    workers: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """What one question was answered, and the visual tokens that were kept for it, ascending within the row."""

    text: str
    kept: tuple[int, ...]
    prefill_ms: float = dataclasses.field(default=0.0, compare=False)  # of its batch


def bench_questions(
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    workers: Sequence[int] = WORKERS,
    image_size: tuple[int, int] | None = None,
    method: str = "vlmpruner",
    rate: Rate | None = "8/9",
    limit: int = 8,
    device: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Answer DIGITSCENES with MiniVLM in float32, images decoded and preprocessed within the time, all cases in turn.

    Parameters
    ----------
    batch_sizes
        1 must be among them: the others' answers are held against its own.
    workers
        Threads that make prompts ahead of the model, see `Settings.workers`; times are compared with those of the first.
    image_size
        Width and height in pixels that the pictures are enlarged to before, as JPEG, so that decoding counts; None: as they are.
    method, rate
        What prunes meanwhile; "none" and None for the plain model.
    limit
        Questions of each of the six tasks.
    progress
        Told of every case as it begins.

    Returns
    -------
    dict
        `rows`, one a case, and `same_answers` over all; it can be written as JSON.

    Raises
    ------
    ConfigError
        Something can't be run as asked.
    PruningError
        A question could not be answered.
    """
    _check(batch_sizes, workers, limit, image_size)
    from vlm_pruner_eval.lmms import load

    found = {} if device is None else {"device": device}
    model = load("vlmpruner_llava", pretrained="minivlm", dtype="float32", method=method, pruning_rate=rate, **found)
    requests = digitscenes_requests(model, limit, image_size)
    cases = [Case(*case) for case in itertools.product(batch_sizes, workers)]
    _answers(model, Case(1, workers[0]), requests[:1], method, rate)  # not counted
    times: dict[Case, list[float]] = {case: [] for case in cases}
    given: dict[Case, list[list[Answer]]] = {case: [] for case in cases}
    for turn in range(ROUNDS):
        for case in cases if turn % 2 == 0 else reversed(cases):
            progress(f"round {turn + 1} of {ROUNDS}: batch {case.batch_size}, {case.workers} workers")
            start = time.perf_counter()
            answers = _answers(model, case, requests, method, rate)
            times[case].append(time.perf_counter() - start)
            given[case].append(answers)
    rows = [row_of(case, times, given) for case in cases]
    return {
        "benchmark": "questions",
        **machine(torch.float32, [torch.device(model.device)]),
        "model": "minivlm",
        "method": method,
        "pruning_rate": None if rate is None else str(rate),
        "image_size": None if image_size is None else list(image_size),
        "n_questions": len(requests),
        "rounds": ROUNDS,
        "same_answers": not any(row["answers_that_differ"] or row["kept_sets_that_differ"] for row in rows),
        "rows": rows,
    }


def _check(batch_sizes: Sequence[int], workers: Sequence[int], limit: int, image_size: tuple[int, int] | None) -> None:
    problems = []
    if 1 not in batch_sizes or min(batch_sizes) < 1 or len(set(batch_sizes)) < len(batch_sizes):
        problems.append(f"--batch-sizes: got {list(batch_sizes)}, expected different whole numbers, 1 among them to compare with.")
    if not workers or min(workers) < 0 or len(set(workers)) < len(workers):
        problems.append(f"--workers: got {list(workers)}, expected different whole numbers, 0 or more each.")
    if limit < 1:
        problems.append(f"--limit: got {limit}, expected 1 or more questions of each task.")
    if image_size is not None and min(image_size) < 1:
        problems.append(f"--image-size: got {image_size[0]}x{image_size[1]}, expected 1 or more pixels each way.")
    if problems:
        raise ConfigError(problems)


def digitscenes_requests(model: PrunedModel, limit: int, image_size: tuple[int, int] | None = None) -> list[Instance]:
    """The first `limit` questions of every task as lmms-eval asks them, and their documents where the wrapper looks for them."""
    from lmms_eval.api.instance import Instance

    documents = {f"{GROUP}_{task}": {"test": _documents(task, limit, image_size)} for task in TASKS}
    model.task_dict = documents
    asked = [(task, i, question) for task, splits in documents.items() for i, question in enumerate(splits["test"]["question"])]
    return [
        Instance(
            "generate_until",
            (question, _messages, GREEDY, index, task, "test"),
            0,
            metadata={"task": task, "doc_id": index, "repeats": 1},
        )
        for task, index, question in asked
    ]


def _documents(task: str, limit: int, image_size: tuple[int, int] | None) -> Dataset:
    """As lmms-eval's tasks hold them: a picture is decoded when its document is looked up."""
    import datasets

    rows = read_questions(task)[:limit]
    if image_size is not None:
        rows = [row | {"image": {"bytes": _enlarged(row["image"]["bytes"], image_size), "path": None}} for row in rows]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def _enlarged(encoded: bytes, size: tuple[int, int]) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.open(io.BytesIO(encoded)).convert("RGB").resize(size).save(content, "JPEG", quality=JPEG_QUALITY)
    return content.getvalue()


def _messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    picture = document["image"].convert("RGB")
    return [{"role": "user", "content": [{"type": "image", "url": picture}, {"type": "text", "text": document["question"]}]}]


def _answers(model: PrunedModel, case: Case, requests: list[Instance], method: str, rate: Rate | None) -> list[Answer]:
    model.settings = dataclasses.replace(model.settings, batch_size=case.batch_size, workers=case.workers)
    model.configure(method, rate)
    texts = [result.text for result in model.generate_until(requests)]
    if failed := [answer for answer in model.answers if answer.error is not None]:
        raise PruningError(f"{len(failed)} of {len(requests)} questions failed at batch {case.batch_size}; the first: {failed[0].error}.")
    return [Answer(text, tuple(sorted(answer.record.order)), answer.prefill_ms) for text, answer in zip(texts, model.answers, strict=True)]


def row_of(case: Case, times: Mapping[Case, list[float]], given: Mapping[Case, list[list[Answer]]]) -> dict[str, Any]:
    """One case: questions per second, speed-ups over other cases in the same rounds, and what differs from batch 1's first answers.

    Parameters
    ----------
    times
        Seconds of every round, by case; the first case has the workers that others are compared with.
    given
        Answers of every round, by case.
    """
    first = next(iter(times)).workers
    expected = given[Case(1, first)][0]
    rates = [len(expected) / seconds for seconds in times[case]]
    pairs = [(answer, right) for answers in given[case] for answer, right in zip(answers, expected, strict=True)]
    return {
        **case._asdict(),
        "questions_per_s": median(rates),
        "rounds_per_s": rates,
        "noise": (max(rates) - min(rates)) / median(rates),
        "speedup": _speedup(times[Case(1, case.workers)], times[case]),
        "workers_speedup": _speedup(times[Case(case.batch_size, first)], times[case]),
        "prefill_ms": median(answer.prefill_ms for answers in given[case] for answer in answers),
        "answers_that_differ": sum(answer.text != right.text for answer, right in pairs),
        "kept_sets_that_differ": sum(answer.kept != right.kept for answer, right in pairs),
    }


def _speedup(before: Sequence[float], after: Sequence[float]) -> float:
    return median(one / other for one, other in zip(before, after, strict=True))
