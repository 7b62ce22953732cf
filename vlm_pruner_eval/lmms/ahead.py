"""What is made before the model asks for it: prompts by a few threads, and the tensors of the next batch by one more.

Only making things leaves the caller's thread. What is planned, told to others, answered and recorded stays in it, in the order
of the plan, so that answers, failures and what a crash leaves are those of a run without threads.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from threading import Event
from typing import Any, Generic, TypeVar

import torch

from vlm_pruner_eval.lmms.inputs import Prepared
from vlm_pruner_eval.lmms.prompts import Prompt, Request
from vlm_pruner_eval.store.answers import Batch

THREADS = "vlm_pruner_eval"  # the threads' names begin so

T = TypeVar("T")
Turn = AbstractContextManager[None]
Made = list[tuple[Any, "Job[Prompt]"]]  # with what each is made of
Plan = Callable[[Any, Made], Iterator["Step"]]


def default_workers(device: torch.device) -> int:
    """How many threads make prompts where nothing is asked for: on a CPU none, as they would take its cores from the model."""
    return 0 if device.type == "cpu" else 2


class Job(Generic[T]):
    """Something to be made by another thread, or, where none was set on it, by the one that takes it."""

    def __init__(self, make: Callable[[], T]):
        self._make = make
        self._future: Future[T] | None = None

    def begin(self, pool: ThreadPoolExecutor | None) -> Job[T]:
        """Have it made, unless that has begun already; without a pool it is left until it is taken."""
        if pool is not None and self._future is None:
            self._future = pool.submit(self._make)
        return self

    @property
    def is_ready(self) -> bool:
        """Tell if taking it neither waits nor raises what should stop the run, such as a KeyboardInterrupt."""
        if self._future is None or not self._future.done():
            return False
        error = self._future.exception()
        return error is None or isinstance(error, Exception)

    def take(self) -> T:
        """What was made, or whatever error making it raised; neither is kept here, as it may be large."""
        future, self._future = self._future, None
        return self._make() if future is None else future.result()


@dataclass
class Step:
    """What comes next in a run.

    Attributes
    ----------
    answer
        Called in the caller's thread when the step's turn has come.
    prepared
        What `answer` takes, made while the step before is answered; None where nothing is left to be made, as of a request that failed.
    """

    answer: Callable[[], Iterable[tuple[Request, Any]]]
    prepared: Job[Prepared] | None = None


class Ahead:
    """The threads of one run; use as a context manager, behind which none of them is left.

    Parameters
    ----------
    n_workers
        Threads that make prompts; 0: no thread at all, everything is made where it is needed.
    """

    def __init__(self, n_workers: int):
        self._makers = ThreadPoolExecutor(n_workers, f"{THREADS} prompts") if n_workers else None
        self._preparer = ThreadPoolExecutor(1, f"{THREADS} tensors") if n_workers else None
        self._last_turn = Event()
        self._last_turn.set()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        pools = [pool for pool in (self._makers, self._preparer) if pool is not None]
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown()

    def batches(self, windows: Iterable[tuple[Any, Sequence[Any]]], make: Callable[[Any, Turn], Prompt], plan: Plan) -> Iterator[Batch]:
        """Requests with their answers, batch by batch.

        While a window is answered, the prompts of the next one are made; while a batch is answered, the tensors of the next one.
        In memory are thus the images of two windows, and of the last batch of the one before.

        Parameters
        ----------
        windows
            Anything that `plan` wants to know, and the requests that are planned together, in a form that `make` takes.
        make
            Makes one's prompt, in any thread. It enters the context that it is given to run the task's own code, which may keep
            state or draw random numbers: one thread at a time does so, in the order of the requests.
        plan
            The steps of a window. It takes all prompts before it gives the first step that has something to be prepared.
        """
        steps, waiting = _Steps(windows, functools.partial(self._start, make), plan), deque[Step]()
        while (step := waiting.popleft() if waiting else steps.take()) is not None:
            if step.prepared is not None:
                step.prepared.begin(self._preparer)
                while not any(item.prepared for item in waiting) and (following := steps.take(wait=False)) is not None:
                    waiting.append(following)
                for item in waiting:
                    if item.prepared is not None:
                        item.prepared.begin(self._preparer)
            yield list(step.answer())

    def _start(self, make: Callable[[Any, Turn], Prompt], item: object) -> Job[Prompt]:
        make = functools.partial(make, item)
        if self._makers is None:
            return Job(functools.partial(make, nullcontext()))
        before, self._last_turn = self._last_turn, Event()
        return Job(functools.partial(_make_in_turn, make, before, self._last_turn)).begin(self._makers)


def _make_in_turn(make: Callable[[Turn], T], before: Event, passed: Event) -> T:
    """The pool begins jobs in order, and none that has begun is cancelled, so whatever this waits for is being made."""
    try:
        return make(_turn(before, passed))
    finally:  # also of what failed before its turn
        before.wait()
        passed.set()


@contextmanager
def _turn(before: Event, passed: Event) -> Iterator[None]:
    before.wait()
    try:
        yield
    finally:
        passed.set()


class _Steps:
    """The steps of all windows; prompts of the next window are begun before those of a window are waited for."""

    def __init__(self, windows: Iterable[tuple[Any, Sequence[Any]]], start: Callable[[Any], Job[Prompt]], plan: Plan):
        self._windows, self._start, self._plan = iter(windows), start, plan
        self._steps: Iterator[Step] = iter(())
        self._coming = self._begin()

    def _begin(self) -> tuple[Any, Made] | None:
        for about, items in self._windows:
            return about, [(item, self._start(item)) for item in items]
        return None

    def take(self, *, wait: bool = True) -> Step | None:
        """The next step; None behind the last one, or where the prompts of the next window would have to be waited for."""
        step = next(self._steps, None)
        while step is None and self._coming is not None and (wait or all(job.is_ready for _, job in self._coming[1])):
            about, made = self._coming
            self._coming = self._begin()
            self._steps = self._plan(about, made)
            step = next(self._steps, None)
        return step
