"""Parts of a unit's record, computed from its answers: kept tokens, times, costs, failures, scores by document."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vlm_pruner_eval.cost import DecoderShape, kv_bytes, literature_flops, prefill_flops
from vlm_pruner_eval.store.answers import Answer
from vlm_pruner_eval.store.folder import DocumentScore
from vlm_pruner_eval.store.schema import plain
from vlm_pruner_eval.store.summaries import Failure, Median, Memory, Spread, Times, Tokens

_MOST_FAILURES = 50  # in a record; the log holds all


def answer_digest(answer: str) -> str:
    """SHA-256 of an answer's text."""
    return hashlib.sha256(answer.encode()).hexdigest()


def kept_digest(answers: Iterable[Answer]) -> str:
    """SHA-256 over the kept sets of all documents, sorted by task and document."""
    entries = sorted((answer.task, answer.doc_id, answer.record.digest if answer.record else "") for answer in answers)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def summarise_tokens(answers: Sequence[Answer]) -> Tokens:
    """Count visual tokens over the samples that had images."""
    records = [answer.record for answer in _prefills(answers) if answer.record.n_visual > 0]
    quirks = Counter(quirk for record in records for quirk in record.quirks)
    return Tokens(
        samples_with_images=len(records),
        n_visual=Spread.of(record.n_visual for record in records),
        asked=Spread.of(record.n_asked for record in records),
        kept=Spread.of(record.n_kept for record in records),
        layer_averaged=Spread.of(record.layer_averaged for record in records),
        layers=sorted({record.layer for record in records if record.layer is not None}),
        quirks=dict(sorted(quirks.items())),
    )


def is_untimed(answers: Iterable[Answer]) -> bool:
    """Tell if any answer was computed together with other runs', so that its time is unknown."""
    return any(answer.prefill_ms is None and answer.error is None for answer in answers)


def summarise_times(answers: Sequence[Answer], total_s: float, answers_s: float) -> Times:
    """Medians in milliseconds, and seconds; of answers that shared work with others only their batches are their own."""
    sizes = sorted({answer.batch_size for answer in answers if answer.batch_size})
    if is_untimed(answers):
        return Times(batch_sizes=sizes)
    prefills = _prefills(answers)
    rates = [1000.0 * answer.batch_size / answer.decode_ms for answer in answers if answer.batch_size and answer.decode_ms]
    return Times(
        prefill_ms=_median([answer.prefill_ms for answer in prefills]),
        decode_ms=_median([answer.decode_ms for answer in answers]),
        selection_ms=_median([answer.record.selection_ms for answer in prefills]),
        decoded_tokens_per_s=_median(rates),
        batch_sizes=sizes,
        total_s=total_s,
        answers_s=answers_s,
    )


def summarise_memory(answers: Sequence[Answer], model: Mapping[str, Any]) -> Memory:
    """Compute what the prompts with images cost the language model.

    Parameters
    ----------
    model
        ``PrunedModel.describe()``: `shape` (a `DecoderShape` by field) and `dtype` are read.
    """
    records = [answer.record for answer in _prefills(answers) if answer.record.n_visual > 0]
    peaks = [] if is_untimed(answers) else [answer.peak_bytes for answer in answers if answer.peak_bytes is not None]
    measured = Spread.of(record.kv_bytes for record in records if record.kv_bytes is not None)
    found = {"kv_bytes_measured": measured, "peak_bytes": max(peaks, default=None)}
    if model.get("shape") is None:
        return Memory(**found)
    shape = DecoderShape(**model["shape"])
    bytes_per_value = 4 if model["dtype"] == "float32" else 2

    @functools.cache  # most prompts of a task have few lengths between them
    def costs(lengths: tuple) -> tuple[float, float, float]:
        of_layers = [length for length, times in lengths for _ in range(times)]
        return prefill_flops(shape, of_layers, logits=1), literature_flops(shape, of_layers), kv_bytes(shape, of_layers, bytes_per_value)

    each = [costs(record.lengths) for record in records]
    names = ("flops", "literature_flops", "kv_bytes_counted")
    return Memory(**found, **{name: Spread.of(cost[place] for cost in each) for place, name in enumerate(names)})


def _prefills(answers: Iterable[Answer]) -> list[Answer]:
    """One answer per prompt that was read: all choices of a document carry the record of the one prefill that they share."""
    known = (answer for answer in answers if answer.record is not None)
    return list({(answer.task, answer.doc_id, answer.prefill_ms): answer for answer in known}.values())


def failures(answers: Iterable[Answer]) -> list[Failure]:
    """Answers that carry an error; the first ones."""
    failed = [answer for answer in answers if answer.error]
    return [Failure(task=answer.task, doc_id=answer.doc_id, error=answer.error) for answer in failed[:_MOST_FAILURES]]


def missing_answers(answers: Iterable[Answer], logged: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Documents that were scored but of which an answer (or a choice) is missing or there twice: a sentence each task."""
    answered: dict[tuple[str, Any], Counter] = {}
    for answer in answers:
        answered.setdefault((answer.task, answer.doc_id), Counter())[answer.choice] += 1
    problems = []
    for task, rows in logged.items():
        documents = {row["doc_id"]: len(row["resps"]) for row in rows}  # one response per request of the document
        wrong = sorted(doc for doc, n in documents.items() if list(answered.get((task, doc), {}).values()) != [1] * n)
        if wrong:
            problems.append(f"{task}: {len(wrong)} of {len(documents)} documents have no answer of their own (first: document {wrong[0]}).")
    return problems


# ---- scores by document
def document_scores(
    answers: Iterable[Answer], logged: Mapping[str, Sequence[Mapping[str, Any]]], scored: Mapping[str, Any]
) -> Iterator[DocumentScore]:
    """One line for each document, in the order of tasks and documents.

    Parameters
    ----------
    logged
        By task, lmms-eval's logged samples.
    scored
        By task, see `scores.Scored`.
    """
    of_documents: dict[tuple[str, int], list[Answer]] = {}
    for answer in answers:
        of_documents.setdefault((answer.task, answer.doc_id), []).append(answer)
    rows = {(task, row["doc_id"]): row for task, listed in logged.items() for row in listed}
    for (task, doc_id), own in sorted(of_documents.items()):
        row = rows.get((task, doc_id), {})
        score = scored[task].documents.get(doc_id) if task in scored else None
        yield DocumentScore(
            task=task,
            doc_id=doc_id,
            answer=document_answer(own),
            score=plain(score),
            target=plain(row.get("target")),
            items=plain(_items(row)),
            images=list(own[0].images),
        )


def document_answer(answers: Sequence[Answer]) -> str | int:
    """What was answered to one document: the text, or, of choices that were scored, the likeliest one by mean over its tokens."""
    if answers[0].choice is None:
        return answers[0].answer
    known = [answer for answer in answers if answer.loglikelihood is not None]
    if not known:
        return answers[0].answer
    return max(known, key=lambda answer: answer.loglikelihood / (answer.n_new_tokens or 1)).choice


def _items(row: Mapping[str, Any]) -> dict[str, Any]:
    """The metric items of a logged sample: what is left after lmms-eval's own keys."""
    own = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input_media", "submission"}
    return {key: value for key, value in row.items() if key not in own}


def _median(values: Sequence[float | None]) -> Median | None:
    from vlm_pruner_eval.timing import median_iqr  # torch

    known = [value for value in values if value is not None]
    if not known:
        return None
    median, iqr = median_iqr(known)
    return Median(median=median, iqr=iqr, n=len(known))
