"""How a sweep goes that other processes make, from their claims, journals and records."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from vlm_pruner_eval.sweep.directory import claimed_by
from vlm_pruner_eval.sweep.executors.base import Work
from vlm_pruner_eval.sweep.grid import Run
from vlm_pruner_eval.sweep.progress import SweepProgress
from vlm_pruner_eval.sweep.score_line import title
from vlm_pruner_eval.sweep.store import Store

EVERY_S, LINE_S = 1.0, 30.0
_REQUESTS = re.compile(rb'"requests": \[([\d, ]*)\]')  # of a journal's line; inside the text of an answer the quotes are escaped


@dataclass
class AnswerCounter:
    """Counts what is added to the journals of some runs; what is there when it looks first does not count."""

    store: Store
    _ends: dict[Path, int] = field(default_factory=dict)

    def new(self, runs: list[Run], *, is_first: bool = False) -> int:
        """Answers that were added to the journals of `runs` since the last call."""
        count = 0
        for run in runs:
            for path in self.store.run_dir(run.run_id).glob("journal*.jsonl"):
                count += self._read(path, is_first)
        return count

    def _read(self, path: Path, is_first: bool) -> int:
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                begin = self._ends.get(path, size if is_first else 0)
                file.seek(min(begin, size))  # it may have been begun anew
                added = file.read()
        except FileNotFoundError:  # the run was recorded in this moment
            return 0
        whole = added.rfind(b"\n") + 1
        self._ends[path] = min(begin, size) + whole
        return sum(found[1].count(b",") + 1 for found in _REQUESTS.finditer(added, 0, whole) if found[1].strip())


class Watch:
    """Shows runs as they are recorded, and twice a minute the speed; use as a context manager."""

    def __init__(self, work: Work):
        self._work, self._progress = work, SweepProgress(work.console, len(work.runs))
        self._open, self._begun = list(work.todo), dict[str, float]()
        self._counter, self._looked, self._said = AnswerCounter(work.store), 0.0, time.monotonic()
        self._answers = 0

    def __enter__(self) -> Watch:
        self._progress.__enter__()
        todo = {run.run_id for run in self._open}
        for run in self._work.runs:
            if run.run_id not in todo:
                self._work.skip(self._progress, run)
        self._counter.new(self._open, is_first=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._look_at_runs()
        self._progress.__exit__(kind, error, trace)

    def look(self) -> None:
        """Look at the directory, at most once a second."""
        now = time.monotonic()
        if now - self._looked < EVERY_S:
            return
        self._looked = now
        if not self._begun:
            self._said = now
        self._answers += self._counter.new([run for run in self._open if run.run_id in self._begun])
        self._look_at_runs()
        if now - self._said >= LINE_S:
            rate = self._answers / (now - self._said)
            line = f"{len(self._begun)} runs under way, {rate:.3g} questions per second"
            self._work.console.print(line, markup=False, highlight=False, soft_wrap=True)
            self._answers, self._said = 0, now

    def begun(self, run: Run) -> None:
        """Note that a run is begun, where that is known sooner than a claim is seen."""
        self._begun.setdefault(run.run_id, time.monotonic())

    def _look_at_runs(self) -> None:
        for run in list(self._open):
            if self._work.is_made(run):
                self._open.remove(run)
                since = self._begun.pop(run.run_id, None)
                took_s = None if since is None else time.monotonic() - since
                self._progress.end(title(run), self._work.outcome(run, took_s))
            elif run.run_id not in self._begun and claimed_by(self._work.store.run_dir(run.run_id)):
                self.begun(run)
