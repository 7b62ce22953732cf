"""A metric on resampled clusters of documents: as a form of sums where one fits, else through the task's own aggregation."""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_pruner_eval.redact import of_error
from vlm_pruner_eval.sweep.metrics.clusters import PAIR_KEYS, RESAMPLES, Clusters
from vlm_pruner_eval.sweep.metrics.counts import Form, forms

_MANY_ITEMS = 2000  # above this, only the main metric is resampled
_PATIENCE_S = 120.0  # for calling one metric's aggregation on all resamples
_CHECKS = 3  # resamples on which a form must agree with the aggregation


@dataclass(frozen=True)
class Metric:
    """One metric of one task of one run.

    Attributes
    ----------
    aggregate
        The task's own.
    value
        Its answer, of all items.
    docs, items
        Per item: its document, and the item as the task made it.
    numbers
        Per item: its score in [0, 1], or None, see `document_scores`.
    points
        Where the metric is known to be a sum of points: that sum as a form.
    is_main
        Whether it stands for the task, or might.
    """

    aggregate: Callable
    value: float
    docs: list[Any]
    items: list[Any]
    numbers: list[float | None]
    points: Form | None = None
    is_main: bool = True

    @property
    def forms(self) -> Iterator[Form]:
        """Every form of sums that gives the metric's value on all items, the likeliest first."""
        for form in forms(self.items, self.numbers) if self.points is None else [self.points]:
            if math.isclose(form.value(form.columns.sum(0)), self.value, rel_tol=1e-9, abs_tol=1e-12):
                yield form


def draw(metric: Metric, clusters: Clusters) -> tuple[np.ndarray | None, str | None]:
    """Values [RESAMPLES] of the metric on resampled clusters; or None, and a note that says why there are none."""
    if len({clusters.of[doc] for doc in metric.docs}) < 2:
        return None, "no interval: fewer than two documents, or all of them share images"
    if metric.points is not None or takes_args(metric.aggregate):
        return _by_value(metric, clusters)
    if not metric.is_main and len(metric.items) > _MANY_ITEMS:
        return None, "no interval: only the main metric of a task this large is resampled"
    try:
        return _by_asking(metric, clusters)
    except Exception as error:  # it answered once, so its score stands; the note tells what it says of other items
        return None, f"no interval: its aggregation fails on resamples ({of_error(error)})"


def _by_asking(metric: Metric, clusters: Clusters) -> tuple[np.ndarray | None, str | None]:
    """Of an aggregation that can be called again: by a form that agrees with it, else by itself."""
    again = silently(metric.aggregate, metric.items)
    if not math.isclose(again, metric.value, rel_tol=1e-9, abs_tol=1e-12):
        return None, f"no interval: the aggregation answers {again:g} when asked again"
    resamples = _Resamples(metric, clusters)
    for form in metric.forms:
        if resamples.agree_with(form):
            return _checked(resamples.sums(form))
    return _checked(resamples.values()) if resamples.seconds() < _PATIENCE_S else (None, "no interval: its aggregation takes too long")


def takes_args(aggregate: Callable) -> bool:
    """Tell if lmms-eval hands the command line to an aggregation: it writes files, keeps state or asks a judge; call it once only."""
    return "args" in inspect.signature(aggregate).parameters


def silently(aggregate: Callable, items: list[Any]) -> float:
    """The aggregation's answer; some print their table every time."""
    with contextlib.redirect_stdout(io.StringIO()):
        return float(aggregate(items))


def _by_value(metric: Metric, clusters: Clusters) -> tuple[np.ndarray | None, str | None]:
    """Of an aggregation that can't be called on resamples: the form that gives its value on all items."""
    form = next(metric.forms, None)
    if form is None:
        return None, "no interval: this task's aggregation writes files, and its items do not add up to its score"
    return _checked(_Resamples(metric, clusters).sums(form))


def _checked(draws: np.ndarray) -> tuple[np.ndarray | None, str | None]:
    return (draws, None) if np.isfinite(draws).all() else (None, "no interval: the metric is not defined on every resample")


@dataclass(frozen=True)
class _Resamples:
    """A metric on resampled clusters."""

    metric: Metric
    clusters: Clusters

    def agree_with(self, form: Form) -> bool:
        """Tell if a form gives what the aggregation answers on a few resamples."""
        weights = next(self.clusters.weights())[:_CHECKS]
        guesses = form.value(weights @ self.clusters.by_cluster(self.metric.docs, form.columns))
        return all(np.isclose(guess, self._value(row), rtol=1e-9, equal_nan=True) for guess, row in zip(guesses, weights, strict=True))

    def sums(self, form: Form) -> np.ndarray:
        """[RESAMPLES], by a form."""
        return form.value(self.clusters.sums(self.clusters.by_cluster(self.metric.docs, form.columns)))

    def seconds(self) -> float:
        """Estimate the time that `values` would take."""
        started = time.perf_counter()
        self._value(next(self.clusters.weights())[0])
        return RESAMPLES * (time.perf_counter() - started)

    def values(self) -> np.ndarray:
        """[RESAMPLES], by the aggregation."""
        return np.array([self._value(row) for block in self.clusters.weights() for row in block])

    def _value(self, weights: np.ndarray) -> float:
        times = weights.astype(int).tolist()
        pairs = zip(self.metric.items, self.metric.docs, strict=True)
        drawn = [_renamed(item, copy) for item, doc in pairs for copy in range(times[self.clusters.of[doc]])]
        return silently(self.metric.aggregate, drawn) if drawn else math.nan


def _renamed(item: Any, copy: int) -> Any:
    """A pair drawn twice must count as two pairs, so each draw gets its own id."""
    if not isinstance(item, dict):
        return item
    return item | {key: f"{item[key]}#{copy}" for key in PAIR_KEYS if key in item}
