"""Aggregations of a task that may fail: one costs the score of its task, not the answers and scores of the run's other tasks."""

from __future__ import annotations

import inspect
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vlm_pruner_eval.durable import stopped
from vlm_pruner_eval.redact import of_error, without_secrets
from vlm_pruner_eval.sweep.metrics.clusters import pair_key


class Aggregation:
    """A task's aggregation of one metric, with what happened when lmms-eval called it.

    Attributes
    ----------
    call
        The task's own.
    left_out
        Indices of items that it was called without, as half of their pair was not asked (an odd limit).
    problem, trace
        What it raised, as a sentence and as a traceback; None if it answered.
    """

    def __init__(self, call: Callable):
        self.call = call
        self.left_out: frozenset[int] = frozenset()
        self.problem: str | None = None
        self.trace: str | None = None
        self.__signature__ = inspect.signature(call)  # lmms-eval looks for `args` there

    @classmethod
    def of(cls, call: Callable) -> Aggregation:
        """The same, or a guarded one."""
        return call if isinstance(call, cls) else cls(call)

    def __call__(self, items: list[Any], **more: Any) -> Any:
        """Answer as the task does; without torn pairs where it refuses them; NaN where it fails.

        Raises
        ------
        ImportError
            A package is missing, which no other run would have.
        StoppedError
            The disk is full.
        """
        try:
            return self.call(items, **more)
        except Exception as error:
            torn = _torn(items)
            if torn and len(torn) < len(items):
                self.left_out = torn
                return self._again([item for index, item in enumerate(items) if index not in torn], **more)
            return self._failed(error)

    def _again(self, items: list[Any], **more: Any) -> Any:
        try:
            return self.call(items, **more)
        except Exception as error:
            self.left_out = frozenset()
            return self._failed(error)

    def _failed(self, error: Exception) -> float:
        if full := stopped(error):
            raise full from error
        if isinstance(error, ImportError):
            raise error
        self.problem = of_error(error)
        self.trace = without_secrets("".join(traceback.format_exception(error)))
        return math.nan


def guard(tasks: Mapping[str, Any]) -> None:
    """Let the aggregations of loaded lmms-eval tasks fail one by one."""
    for task in tasks.values():
        guarded = {metric: Aggregation(call) for metric, call in task.aggregation().items()}
        task.aggregation = lambda guarded=guarded: guarded


def failures(task: str, task_object: Any) -> Iterator[tuple[str, str]]:
    """Of a guarded task: a sentence and the traceback for each aggregation that failed."""
    for metric, call in task_object.aggregation().items():
        if call.problem is not None:
            yield f"{task}: its aggregation of {metric} failed, so there is no such score ({call.problem}).", call.trace


def _torn(items: list[Any]) -> frozenset[int]:
    """Indices of the items that are alone, where others of the task are in pairs."""
    keys = [pair_key(item) if isinstance(item, Mapping) else None for item in items]
    times = Counter(keys)
    if None in times or max(times.values(), default=1) == 1:
        return frozenset()
    return frozenset(index for index, key in enumerate(keys) if times[key] == 1)
