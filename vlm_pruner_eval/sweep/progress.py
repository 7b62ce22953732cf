"""Live progress of a sweep: a bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class SweepProgress:
    """Reports the runs of a sweep as they pass; use as a context manager.

    Parameters
    ----------
    console
        Where to write; a bar is drawn only if it is a terminal.
    total
        Runs of the sweep.
    """

    def __init__(self, console: Console, total: int):
        self._console, self._total, self._done = console, total, 0
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("runs"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> SweepProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def start(self, key: str) -> None:
        """A run begins."""
        self._since, self._answers = time.monotonic(), 0
        if self._bar:
            self._bar.update(self._task, description=escape(key))
        else:
            self._line(f"{key}: started")

    def answered(self, count: int) -> None:
        """So many more answers of the run."""
        self._answers += count

    def end(self, key: str, outcome: str) -> None:
        """A run ended, or was skipped."""
        self._done += 1
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        self._line(f"{key}: {outcome}")

    def finished(self, key: str, outcome: str) -> None:
        """A run ended; says how long it took."""
        self.end(key, f"{outcome} in {time.monotonic() - self._since:.0f} s")

    def _line(self, text: str) -> None:
        self._console.print(f"[{self._done}/{self._total}] {text}", markup=False, highlight=False, soft_wrap=True)


def quieten() -> None:
    """Keep warnings, drop the progress bars and notices that lmms-eval and its libraries print for every run."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
