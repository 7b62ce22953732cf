"""Live progress of a sweep: bars on a terminal, plain lines everywhere else; speed and time left are measured, or said to be unknown."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from vlm_pruner_eval.sweep.speed import Speed, duration

EVERY_S = 30.0  # between the plain lines of a long run
_MOST_NAMES = 2  # of runs that are answered together, in a line


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
    clock
        Seconds, ever rising; another one for tests.
    """

    def __init__(self, console: Console, total: int, *, todo: int | None = None, clock: Callable[[], float] = time.monotonic):
        self._console, self._total, self._clock = console, total, clock
        self._passed = self._failed = 0
        self._name, self._said = "", clock()
        self._found = 0  # answers of the run that an earlier process left, until it is said
        self._together = 0  # runs that share their answers
        self.speed = Speed(total if todo is None else todo, clock=clock)
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
    def share(self, names: Sequence[str]) -> None:
        """The next runs are answered together: the first of them computes the answers of all."""
        self._together = len(names)
        self.speed.share(len(names))
        which = f": {'; '.join(names)}" if len(names) <= _MOST_NAMES else ""
        self._line(f"answering {len(names)} runs together{which}")

    def start(self, name: str) -> None:
        """A run begins."""
        self._name, self._said = name, self._clock()
        self._found = 0
        self.speed.start()
        if self._bars:
            self._bars.reset(self._run_bar, description=name)

    def stop(self) -> float:
        """The run that was started is over; returns the seconds it took."""
        return self.speed.end()

    def end(self, name: str, outcome: str) -> None:
        """A run ended, or was skipped; an outcome that begins with "failed" counts as a failure."""
        self._passed += 1
        self._failed += outcome.lower().startswith("failed")
        if self._bars:
            self._bars.update(self._sweep_bar, completed=self._passed)
        self._line(f"{name}: {outcome}")

    # ---- questions of the run
    def asked(self, count: int) -> None:
        """So many questions are asked; those that were answered only in part are asked again, with smaller batches."""
        self.speed.asked(count)
        self._show()

    def answered(self, count: int, is_new: bool = True) -> None:
        """So many more answers of the run; those that an earlier process left are not new, and say nothing of the speed."""
        self.speed.answered(count, is_new)
        if not is_new:
            self._found += count
        elif self._found:
            self._line(f"{self._name}: goes on behind {self._found} of {self.speed.questions}")
            self._found = 0
        self._show()

    def _show(self) -> None:
        if self._bars:
            self._bars.update(self._run_bar, completed=self.speed.done, total=self.speed.questions)
        elif self._clock() - self._said >= EVERY_S:
            self._said = self._clock()
            name = f"{self._together} runs together" if self._together else self._name
            self._line(f"{name}: {self._run_facts()}; {self._left()}")

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
        if left_s is None:
            return "time left unknown"
        more = self._together and self._passed + self._together < self._total
        return f"about {duration(left_s)} left" + (" for them" if more else "")

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
