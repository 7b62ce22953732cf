"""What every run answered, document by document: enough to count flips, without the kept positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlm_pruner_eval.report.stats.paired import mcnemar
from vlm_pruner_eval.sweep.store import Store

RIGHT = 0.5  # a document counts as right from this score on; most scores are 0 or 1


@dataclass(frozen=True)
class DocumentAnswer:
    """The answer to one document, and its score in [0, 1]; None where the task gives none, or an older version did not record it."""

    answer: str | int
    score: float | None


Answers = dict[str, dict[int, DocumentAnswer]]  # by task and document


def read_answers(store: Store, run_id: str) -> Answers:
    """The answers of a run."""
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for sample in store.each_sample(run_id, positions=False):
        kept = {name: sample.get(name) for name in ("answer", "choice", "loglikelihood", "n_new_tokens", "score")}
        grouped.setdefault((sample["task"], sample["doc_id"]), []).append(kept)
    answers: Answers = {}
    for (task, doc_id), samples in grouped.items():
        answers.setdefault(task, {})[doc_id] = DocumentAnswer(document_answer(samples), samples[0]["score"])
    return answers


def document_answer(samples: list[dict[str, Any]]) -> str | int:
    """What was answered to one document: the text, or, of choices that were scored, the likeliest one by mean over its tokens."""
    if samples[0].get("choice") is None:
        return samples[0]["answer"]
    return max(samples, key=lambda sample: sample["loglikelihood"] / (sample["n_new_tokens"] or 1))["choice"]


@dataclass(frozen=True)
class Flips:
    """One run against another on one benchmark.

    Attributes
    ----------
    rate
        Share of documents with another answer.
    mcnemar_p
        None unless every document that the task counts scored 0 or 1 in both (further turns of MMBench's questions are not counted).
    """

    rate: float
    mcnemar_p: float | None


def flips(ours: Answers, theirs: Answers, tasks: list[str]) -> Flips | None:
    """Compare two runs on the documents of `tasks`; None when they did not answer the same documents, or none at all."""
    keys = [(task, doc_id) for task in tasks for doc_id in theirs.get(task, {})]
    if not keys or any(ours.get(task, {}).keys() != theirs.get(task, {}).keys() for task in tasks):
        return None
    pairs = [(ours[task][doc_id], theirs[task][doc_id]) for task, doc_id in keys]
    rate = sum(mine.answer != other.answer for mine, other in pairs) / len(pairs)
    counted = [pair for pair in pairs if any(answer.score is not None for answer in pair)]
    if not counted or not all(answer.score in (0, 1) for pair in counted for answer in pair):
        return Flips(rate, None)
    return Flips(rate, mcnemar([mine.score for mine, _ in counted], [other.score for _, other in counted]))
