"""Threads that make prompts and tensors before the model asks for them.

Everything is made in the order of the requests, and what a thread raised is raised in its turn, so that answers, failures and
what a crash leaves are those of a run without threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

THREADS = "vlm_pruner_eval"  # the threads' names begin so
END = object()

T = TypeVar("T")


def default_workers(device: torch.device) -> int:
    """Return the number of threads if none is asked for: none on a CPU, as they would take its cores from the model."""
    return 0 if device.type == "cpu" else 2


class Attempt(Generic[T]):
    """The result of a call, or the error that it raised, to be taken once; neither is kept, as it may be large.

    Arguments that are attempts themselves are taken for the call.
    """

    def __init__(self, make: Callable[..., T], *args: Any):
        self._result: T | None = None
        self._error: Exception | None = None
        try:
            self._result = make(*(arg.take() if isinstance(arg, Attempt) else arg for arg in args))
        except Exception as error:  # raised by `take`
            self._error = error

    def take(self) -> T:
        """Return the result, or raise the error."""
        result, self._result = self._result, None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return result


class Prefetch:
    """Threads of one run; use as a context manager, behind which none of them is left.

    Parameters
    ----------
    n_workers
        Threads that share the calls of `attempts`; 0: no thread at all, everything is made when it is asked for.
    """

    def __init__(self, n_workers: int):
        self._pools = [ThreadPoolExecutor(n_workers, f"{THREADS} workers")] if n_workers else []

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in self._pools:  # all first: a thread of one may wait for another's
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in self._pools:
            pool.shutdown()

    def attempts(self, make: Callable[..., T], *args: Sequence[Any]) -> list[Attempt[T]]:
        """Call `make` with the first of all `args`, the second of all, and so on, in the workers; return what came of it, in order."""
        calls = (itertools.repeat(make), *args)
        return list(self._pools[0].map(Attempt, *calls) if self._pools else map(Attempt, *calls))

    def ahead(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items; while the caller uses one, a thread of its own makes the next one, and no more."""
        if not self._pools:
            yield from items
            return
        pool = ThreadPoolExecutor(1, f"{THREADS} ahead")
        self._pools.append(pool)
        coming = pool.submit(next, items, END)
        while (item := coming.result()) is not END:
            coming = pool.submit(next, items, END)
            yield item
