"""Live progress of a sweep: bars on a terminal, plain lines everywhere else; speed and time left are measured, or said to be unknown."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

EVERY_S = 30.0  # between the plain lines of a long unit
_ENOUGH_S = 2.0  # of measured answering; the first batches of a model are slower than all others
_MOST_NAMES = 2  # of units that are answered together, in a line


class SweepProgress:
    """Reports the units of a sweep as they pass; use as a context manager.

    Parameters
    ----------
    console
        Where to write; bars are drawn only if it is a terminal.
    total
        Units of the sweep.
    left
        By task, those that are not made yet.
    clock
        Seconds, ever rising; another one for tests.
    """

    def __init__(self, console: Console, total: int, left: dict[str, int], *, clock: Callable[[], float] = time.monotonic):
        self._console = console
        self._clock = clock
        self._total = total
        self._left = dict(left)
        self._passed = self._failed = 0
        self._name = ""
        self._since = self._said = clock()
        self._took: dict[str, list[float]] = {}  # by task, seconds of the units that were made here
        self._together = 1  # units that share their answers
        self._reset()
        self._bars: Progress | None = None
        if console.is_terminal:
            name = TextColumn("{task.description}", markup=False)  # of a unit, whose label is the user's
            self._bars = Progress(SpinnerColumn(), name, BarColumn(24), _Facts(), TimeElapsedColumn(), console=console, transient=True)
            self._sweep_bar = self._bars.add_task("sweep", total=total, facts=self._sweep_facts)
            self._unit_bar = self._bars.add_task("starting", total=None, facts=self._unit_facts)

    def __enter__(self) -> SweepProgress:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars:
            self._bars.stop()

    # ---- units
    def share(self, names: Sequence[str]) -> None:
        """Say that the next units are answered together: the first of them computes the answers of all."""
        self._together = len(names)
        which = f": {'; '.join(names)}" if len(names) <= _MOST_NAMES else ""
        self._line(f"answering {len(names)} runs together{which}")

    def start(self, name: str) -> None:
        """Begin a unit."""
        self._name = name
        self._since = self._said = self._clock()
        self._reset()
        if self._bars:
            self._bars.reset(self._unit_bar, description=name)

    def end(self, name: str, task: str, outcome: str, *, is_made: bool = True) -> None:
        """Count a unit that was made or skipped; an outcome that begins with "failed" counts as a failure."""
        self._passed += 1
        self._failed += outcome.lower().startswith("failed")
        if is_made:
            self._took.setdefault(task, []).append(self.took_s)
        self._left[task] = max(0, self._left.get(task, 0) - is_made)
        self._reset()
        if self._bars:
            self._bars.update(self._sweep_bar, completed=self._passed)
        self._line(f"{name}: {outcome}")

    @property
    def took_s(self) -> float:
        """Seconds since the unit began."""
        return self._clock() - self._since

    # ---- questions of the unit
    def asked(self, count: int) -> None:
        """Count questions; those that were answered only in part are asked again, with smaller batches."""
        if self._done < self._asked:
            self._asked = self._before
        self._before = self._asked
        self._done = self._before
        self._asked += count
        self._last = self._clock()
        self._show()

    def answered(self, count: int, is_new: bool = True) -> None:
        """Count answers; replayed ones do not enter the speed."""
        now = self._clock()
        if is_new:
            self._new += count
            self._new_s += now - self._last
        self._last = now
        self._done = min(self._asked, self._done + count)  # those of a shared group come a second time, from each unit's own log
        if not is_new:
            self._found += count
        elif self._found:
            self._line(f"{self._name}: goes on behind {self._found} of {self._asked}")
            self._found = 0
        self._show()

    def _reset(self) -> None:
        self._asked = self._before = self._done = 0
        self._new = self._found = 0  # answers: computed here, and left by an earlier process until it is said
        self._new_s = 0.0
        self._last = self._clock()

    def _show(self) -> None:
        if self._bars:
            self._bars.update(self._unit_bar, completed=self._done, total=self._asked)
        elif self._clock() - self._said >= EVERY_S:
            self._said = self._clock()
            name = self._name if self._together == 1 else f"{self._together} runs together"
            self._line(f"{name}: {self._unit_facts()}; {self._time_left()}")

    # ---- words
    @property
    def rate(self) -> float | None:
        """Questions per second of the unit; None if nothing was measured yet."""
        return self._new / self._new_s if self._new and self._new_s >= _ENOUGH_S else None

    def _unit_facts(self) -> str:
        questions = f"{self._done} of {self._asked} questions" if self._asked else "preparing"
        return questions if self.rate is None else f"{questions}, {self.rate:.3g} per second"

    def _sweep_facts(self) -> str:
        return f"{self._passed} of {self._total} done, {self._failed} failed, {self._time_left()}"

    def left_s(self) -> float | None:
        """Seconds until the last unit ends: of each task what its units took here, else the mean of all; None if nothing is known."""
        known = [took for took_s in self._took.values() for took in took_s]
        if not known:
            return None
        mean = statistics.fmean(known)
        whole = sum(count * statistics.fmean(self._took.get(task, [mean])) for task, count in self._left.items())
        return max(0.0, whole - (self.took_s if self._asked else 0.0))

    def _time_left(self) -> str:
        left_s = self.left_s()
        return "time left unknown" if left_s is None else f"about {duration(left_s)} left"

    def _line(self, text: str) -> None:
        self._console.print(f"[{self._passed}/{self._total}] {text}", markup=False, highlight=False, soft_wrap=True)


class _Facts(ProgressColumn):
    """Words that are true when they are drawn, which is more often than something happens."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        return Text(task.fields["facts"]())


def duration(seconds: float) -> str:
    """A time in words, to two units: 45 s, 12 min 30 s, 3 h 20 min, 2 d 4 h."""
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def quieten() -> None:
    """Keep warnings, drop the progress bars and notices that lmms-eval and its libraries print for every run."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
