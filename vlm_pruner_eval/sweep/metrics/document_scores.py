"""The score of every document under a metric: as the task's items hold it, or as the task's own aggregation gives it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlm_pruner_eval.sweep.metrics.counts import compared, held_score, is_number, shares
from vlm_pruner_eval.sweep.metrics.resampling import silently, takes_args
from vlm_pruner_eval.sweep.turns import has_turns, turn_scores

_ROUNDED = 1e-5  # aggregations round to five digits at most
_PATIENCE_S = 30.0  # for asking about all items one by one


def document_scores(items: Sequence[Any], value: float, aggregate: Callable | None = None) -> list[float | None]:
    """Per item a score in [0, 1], or None where the task gives it no number.

    In this order: the number that the items hold; the answers parsed by the task against the right ones, or each item alone
    through the task's aggregation, where their mean (or mean over categories) is the metric; parsed letters, yes and no against the
    right ones, where the metric is no mean (F1). A whole answer, free text or a box counts only where the metric confirms it.

    Parameters
    ----------
    items
        Of one metric.
    value
        Of the metric.
    aggregate
        To be asked about single items; None if that is not wanted.
    """
    if all(held_score(item) is not None for item in items) or all(map(is_number, items)):
        return [held_score(item) for item in items]
    if has_turns(items):
        scores = turn_scores(items)
        return scores if _is_metric(items, scores, value) else [None] * len(items)
    loose = [compared(item) for item in items]
    if None not in loose and _is_metric(items, loose, value):
        return loose
    alone = None if aggregate is None or takes_args(aggregate) else _alone(aggregate, items, value)
    if alone is not None and _is_metric(items, alone, value):
        return alone
    return [held_score(item) if (score := compared(item, strict=True)) is None else score for item in items]


def _is_metric(items: Sequence[Any], scores: Sequence[float | None], value: float) -> bool:
    """Tell if a metric is the mean of these scores, of their percentages, or of their means by category."""
    totals = (form.value(form.columns.sum(0)) for form in shares(items, scores))
    return any(math.isclose(total, value, rel_tol=_ROUNDED, abs_tol=_ROUNDED / max(1, len(items))) for total in totals)


def _alone(aggregate: Callable, items: Sequence[Any], value: float) -> list[float] | None:
    """The aggregation's answers to single items, as shares.

    None of one that can't be asked about single items, takes too long, or answers otherwise when asked again.
    """
    try:
        if not math.isclose(silently(aggregate, list(items)), value, rel_tol=1e-9, abs_tol=1e-12):
            return None
        started = time.perf_counter()
        answers = [silently(aggregate, [items[0]])]
        if (time.perf_counter() - started) * len(items) > _PATIENCE_S:
            return None
        answers = np.array(answers + [silently(aggregate, [item]) for item in items[1:]])
    except Exception:  # whatever it needs of the others: such a metric is not one of single items, and nothing is lost by having asked
        return None
    scale = 1.0 if answers.max(initial=0.0) <= 1.0 else 100.0
    shared = answers / scale
    return shared.tolist() if np.isfinite(shared).all() and (shared >= 0).all() and (shared <= 1).all() else None
