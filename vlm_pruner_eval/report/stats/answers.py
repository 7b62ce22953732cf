"""Answers and scores of a run by document, in arrays: a table of the paper has two million of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlm_pruner_eval.report.stats.paired import mcnemar
from vlm_pruner_eval.store.folder import DocumentScore

RIGHT = 0.5  # a document counts as right from this score on; most scores are 0 or 1


class TaskAnswers(NamedTuple):
    """Documents of one task, ascending.

    Attributes
    ----------
    doc_ids
        [n] int64.
    answers
        [n] int64: equal for equal answers (of one process).
    scores
        [n] float64 in [0, 1]; NaN if the task gives a document none.
    """

    doc_ids: np.ndarray
    answers: np.ndarray
    scores: np.ndarray


Answers = dict[str, TaskAnswers]  # by task


def answers_of(scores: Iterable[DocumentScore]) -> Answers:
    """Collect what a run answered."""
    grouped: dict[str, list[tuple[int, int, float]]] = {}
    for one in scores:
        value = np.nan if one.score is None else one.score
        grouped.setdefault(one.task, []).append((one.doc_id, hash(one.answer), value))
    found = {}
    for task, rows in grouped.items():
        doc_ids, answers, values = zip(*sorted(rows), strict=True)
        found[task] = TaskAnswers(np.array(doc_ids, np.int64), np.array(answers, np.int64), np.array(values, np.float64))
    return found


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
    shared = [task for task in tasks if task in theirs]
    if not shared or any(task not in ours or not np.array_equal(ours[task].doc_ids, theirs[task].doc_ids) for task in shared):
        return None
    answers, scores = (
        [np.concatenate([getattr(side[task], name) for task in shared]) for side in (ours, theirs)] for name in ("answers", "scores")
    )
    rate = float(np.mean(answers[0] != answers[1]))
    counted = ~(np.isnan(scores[0]) & np.isnan(scores[1]))
    mine, other = (side[counted] for side in scores)
    if not counted.any() or not (np.isin(mine, (0, 1)).all() and np.isin(other, (0, 1)).all()):
        return Flips(rate, None)
    return Flips(rate, mcnemar(mine, other))
