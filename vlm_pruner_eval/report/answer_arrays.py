"""Answers and scores of a run by document, in arrays: a table of the paper has two million of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

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
