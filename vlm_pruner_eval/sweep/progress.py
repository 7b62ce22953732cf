"""Live progress of a sweep: bars on a terminal, plain lines everywhere else; speed and time left are measured, or said to be unknown."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from vlm_pruner_eval.sweep.speed import Speed, duration

EVERY_S = 30.0  # between the plain lines of a long run


class SweepProgress:
    """Reports the runs of a sweep as they pass; use as a context manager.

    Parameters
    ----------
    console
        Where to write; bars are drawn only if it is a terminal.
    total
        Runs of the sweep.
    todo
        Those of them that will be started; default: all.
    shared
        Whether the first that is started computes the answers of all.
    clock
        Seconds, ever rising; another one for tests.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        *,
        todo: int | None = None,
        shared: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console, self._total, self._clock = console, total, clock
        self._passed = self._failed = 0
        self._key, self._said = "", clock()
        self.speed = Speed(total if todo is None else todo, shared=shared, clock=clock)
        self._bars: Progress | None = None
        if console.is_terminal:
            name = TextColumn("{task.description}", markup=False)  # of a run, whose label is the user's
            self._bars = Progress(SpinnerColumn(), name, BarColumn(24), _Facts(), TimeElapsedColumn(), console=console, transient=True)
            self._sweep_bar = self._bars.add_task("sweep", total=total, facts=self._sweep_facts)
            self._run_bar = self._bars.add_task("starting", total=None, facts=self._run_facts)

    def __enter__(self) -> SweepProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars:
            self._bars.stop()

    # ---- runs
    def start(self, key: str) -> None:
        """A run begins."""
        self._key, self._said = key, self._clock()
        self.speed.start()
        if self._bars:
            self._bars.reset(self._run_bar, description=key)
        else:
            self._line(f"{key}: started")

    def end(self, key: str, outcome: str) -> None:
        """A run ended, or was skipped; an outcome that begins with "failed" counts as a failure."""
        self._passed += 1
        self._failed += outcome.lower().startswith("failed")
        if self._bars:
            self._bars.update(self._sweep_bar, completed=self._passed)
        self._line(f"{key}: {outcome}")

    def finished(self, key: str, outcome: str) -> None:
        """A run that was started ended; says how long it took."""
        took_s = self.speed.end()
        self.end(key, f"{outcome} in {took_s:.0f} s")

    # ---- questions of the run
    def asked(self, count: int) -> None:
        """So many questions are asked; those that were answered only in part are asked again, with smaller batches."""
        self.speed.asked(count)
        self._show()

    def answered(self, count: int, is_new: bool = True) -> None:
        """So many more answers of the run; those that an earlier process left are not new, and say nothing of the speed."""
        self.speed.answered(count, is_new)
        self._show()

    def _show(self) -> None:
        if self._bars:
            self._bars.update(self._run_bar, completed=self.speed.done, total=self.speed.questions)
        elif self._clock() - self._said >= EVERY_S:
            self._said = self._clock()
            self._line(f"{self._key}: {self._run_facts()}; {self._left()}")

    # ---- words
    def _run_facts(self) -> str:
        total, rate = self.speed.questions, self.speed.rate
        questions = f"{self.speed.done} of {total} questions" if total is not None else "preparing"
        return questions if rate is None else f"{questions}, {rate:.3g} per second"

    def _sweep_facts(self) -> str:
        runs = f"{self._passed} of {self._total} runs"
        return f"{runs}, {self._failed} failed, {self._total - self._passed} left, {self._left()}"

    def _left(self) -> str:
        left_s = self.speed.left_s()
        return "time left unknown" if left_s is None else f"about {duration(left_s)} left"

    def _line(self, text: str) -> None:
        self._console.print(f"[{self._passed}/{self._total}] {text}", markup=False, highlight=False, soft_wrap=True)


class _Facts(ProgressColumn):
    """Words that are true when they are drawn, which is more often than something happens."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        return Text(task.fields["facts"]())


def quieten() -> None:
    """Keep warnings, drop the progress bars and notices that lmms-eval and its libraries print for every run."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
