"""Flips between two runs: documents with another answer, and McNemar's test on right and wrong."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlm_pruner_eval.report.answer_arrays import Answers
from vlm_pruner_eval.report.stats.paired import mcnemar


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
