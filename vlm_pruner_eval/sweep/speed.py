"""How fast a sweep answers, and how long it will take: from what this process measured, or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

_ENOUGH_S = 2.0  # of measured answering; the first batches of a model are slower than all others


@dataclass
class _Call:
    """Questions that were asked together, and how many of them are answered."""

    asked: int
    done: int = 0


class Speed:
    """Questions per second of the runs that this process makes, and the time that the others will take.

    Parameters
    ----------
    runs
        Those that will be started.
    clock
        Seconds, ever rising.
    """

    def __init__(self, runs: int, *, clock: Callable[[], float] = time.monotonic):
        self._runs, self._clock = runs, clock
        self._shared = False
        self._ended, self._elsewhere_s = 0, 0.0  # runs that ended, and what they took beside answering
        self._answers, self._answering_s = 0, 0.0  # of the runs that ended
        self._calls: list[_Call] | None = None  # of the run that goes on
        self._run_answers, self._run_s = 0, 0.0
        self._questions: int | None = None  # of the last run that told

    def share(self, runs: int) -> None:
        """Of the next runs the first one computes the answers of all; time left is theirs."""
        self._runs, self._shared = self._ended + runs, True
        self._answers, self._answering_s = 0, 0.0  # those of other runs say nothing of these

    def start(self) -> None:
        """A run begins."""
        self._since = self._last = self._clock()
        self._calls, self._run_answers, self._run_s = [], 0, 0.0

    def end(self) -> float:
        """The run ended; returns how many seconds it took."""
        took_s = self._clock() - self._since
        self._questions = self._per_run
        self._ended, self._elsewhere_s = self._ended + 1, self._elsewhere_s + took_s - self._run_s
        self._answers, self._answering_s = self._answers + self._run_answers, self._answering_s + self._run_s
        self._calls, self._run_answers, self._run_s = None, 0, 0.0
        return took_s

    def asked(self, count: int) -> None:
        """Questions are asked; where the last ones were left before their end, these are the same ones again."""
        if self._calls and self._calls[-1].done < self._calls[-1].asked:
            self._calls.pop()
        self._calls.append(_Call(count))
        self._last = self._clock()

    def answered(self, count: int, is_new: bool) -> None:
        """Answers came; only new ones were computed in the time since the last."""
        now = self._clock()
        if is_new:
            self._run_answers, self._run_s = self._run_answers + count, self._run_s + now - self._last
        self._last = now
        if self._calls:  # answers that are shared among runs come a second time, from each run's own journal
            call = self._calls[-1]
            call.done = min(call.asked, call.done + count)

    @property
    def done(self) -> int:
        """Questions of the run that are answered."""
        return sum(call.done for call in self._calls or ())

    @property
    def questions(self) -> int | None:
        """Questions of the run as far as they were asked; None before that."""
        return sum(call.asked for call in self._calls) if self._calls else None

    @property
    def _per_run(self) -> int | None:
        """All runs of a sweep are asked the same."""
        return self._questions if self.questions is None else self.questions

    @property
    def rate(self) -> float | None:
        """Questions per second of the run, or of all runs so far where it is too young; None while nothing was measured."""
        if self._run_s >= _ENOUGH_S and self._run_answers:
            return self._run_answers / self._run_s
        return self._overall

    @property
    def _overall(self) -> float | None:
        answers, seconds = self._answers + self._run_answers, self._answering_s + self._run_s
        return answers / seconds if answers and seconds >= (0 if self._answers else _ENOUGH_S) and seconds > 0 else None

    def left_s(self) -> float | None:
        """Seconds until the last run ends; None while that is unknown."""
        questions, is_running = self._per_run, self._calls is not None
        if questions is None:
            return None
        later = max(0, self._runs - self._ended - is_running)
        here, elsewhere = (questions - self.done if is_running else 0), (0 if self._shared else later * questions)
        seconds = self._elsewhere_s / self._ended * (later + is_running) if self._ended else 0.0
        for count, rate in ((here, self.rate), (elsewhere, self._overall)):
            if count and rate is None:
                return None
            seconds += count / rate if count else 0.0
        return seconds


def duration(seconds: float) -> str:
    """So long in words, to two units: 45 s, 12 min 30 s, 3 h 20 min, 2 d 4 h."""
    whole = round(seconds)
    for size, unit, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"
