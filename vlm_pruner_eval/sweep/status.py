"""`vlm-pruner-eval sweep status DIR`: how far a sweep is, read from its files while it runs or after it stopped. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.store.answers import ANSWERS, count_answers
from vlm_pruner_eval.store.claims import holder_of
from vlm_pruner_eval.store.folder import Store, Unit
from vlm_pruner_eval.store.schema import FAILED, FINISHED, RunLine, UnitRecord
from vlm_pruner_eval.sweep.metrics.score_line import score_line
from vlm_pruner_eval.sweep.progress import duration

RUNNING, HALF_DONE, DAMAGED, NOT_BEGUN = "running", "half done", "damaged", "not begun"
STATES = (FINISHED, FAILED, RUNNING, HALF_DONE, DAMAGED, NOT_BEGUN)
_SHORT = 100  # characters of a problem


@dataclass(frozen=True)
class RunStatus:
    """One run of the grid.

    Attributes
    ----------
    state
        One of `STATES`.
    answers, expected
        Answers that are there, and that there will be; None where that is unknown.
    problem
        Why the run failed, or what is wrong with its files; else None.
    scores
        Of a finished run, in words.
    seconds
        That its answers took; None unless it is finished and had a time of its own.
    """

    key: str
    run_id: str
    state: str
    answers: int = 0
    expected: int | None = None
    problem: str | None = None
    scores: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class SweepStatus:
    """All runs of a sweep, and the processes that work on it ("process 12 on host node7")."""

    name: str
    runs: Sequence[RunStatus]
    held_by: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Runs by state, in the order of `STATES`."""
        found = Counter(run.state for run in self.runs)
        return {state: found[state] for state in STATES}

    @property
    def seconds_left(self) -> float | None:
        """Estimate of what one process needs for the answers that are missing, at the pace of the finished runs; None where unknown."""
        timed = [run for run in self.runs if run.seconds and run.answers]
        left = [None if run.expected is None else run.expected - run.answers for run in self.runs if run.state not in (FINISHED, FAILED)]
        if not timed or None in left:
            return None
        return sum(left) * sum(run.seconds for run in timed) / sum(run.answers for run in timed)

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        expected = [run.expected for run in self.runs]
        return {
            "name": self.name,
            "runs": len(self.runs),
            **{state.replace(" ", "_"): count for state, count in self.counts.items()},
            "answers": sum(run.answers for run in self.runs),
            "expected": None if None in expected else sum(expected),
            "seconds_left": self.seconds_left,
            "held_by": list(self.held_by),
        }


def read_status(directory: Path) -> SweepStatus:
    """How far the sweep in `directory` is.

    Raises
    ------
    ConfigError
        The directory holds no sweep, or its grid can't be read.
    """
    store = Store(directory)
    grid = store.read_grid()
    limit = grid.config.get("limit")
    held: list[str] = []
    runs = []
    for line in grid.runs:
        units = [_read_unit(store.unit(line.run_id, folder), limit, held) for folder in grid.units.values()]
        runs.append((line, units))
    expected = _expected([units for _, units in runs])
    return SweepStatus(grid.name, [_of_run(line, units, expected) for line, units in runs], tuple(dict.fromkeys(held)))


@dataclass(frozen=True)
class _UnitState:
    state: str
    answers: int = 0
    asked: int | None = None
    problem: str | None = None
    record: UnitRecord | None = None


def _read_unit(unit: Unit, limit: int | None, held: list[str]) -> _UnitState:
    """How one unit stands; `held` collects the processes at work."""
    done, asked = 0, None
    try:
        with suppress(FileNotFoundError):  # another process begins it anew in this moment
            done, asked = count_answers(unit.folder)
        record = unit.read()
    except ConfigError as error:
        return _UnitState(DAMAGED, done, asked, str(error))
    if (holder := holder_of(unit.folder)) is not None:
        held.append(holder)
        return _UnitState(RUNNING, done, asked)
    if record is not None and record.limit == limit:
        if record.n_answers and not (unit.folder / ANSWERS).is_file():
            return _UnitState(DAMAGED, 0, asked, f"its {ANSWERS} is missing; the same command runs it again.")
        asked = record.n_answers if record.status == FINISHED else asked
        return _UnitState(record.status, record.n_answers or done, asked, record.problem, record)
    return _UnitState(HALF_DONE if done else NOT_BEGUN, done, asked)


def _expected(runs: Sequence[Sequence[_UnitState]]) -> list[int | None]:
    """Requests of each task: all runs are asked the same, so what any of them asked."""
    of_tasks = zip(*runs, strict=True)
    return [max((unit.asked for unit in units if unit.asked is not None), default=None) for units in of_tasks]


def _of_run(line: RunLine, units: Sequence[_UnitState], expected: Sequence[int | None]) -> RunStatus:
    """A run by its units: the first state of this list that one of them is in, else half done."""
    states = {unit.state for unit in units}
    telling = (DAMAGED, RUNNING, FAILED)
    state = next((state for state in telling if state in states), states.pop() if len(states) == 1 else HALF_DONE)
    records = [unit.record for unit in units if unit.record is not None]
    is_timed = state == FINISHED and None not in [record.times.answers_s for record in records]
    return RunStatus(
        key=line.key,
        run_id=line.run_id,
        state=state,
        answers=sum(unit.answers for unit in units),
        expected=None if None in expected else sum(expected),
        problem=next((unit.problem for unit in units if unit.problem), None),
        scores=score_line(records, None) if state == FINISHED else "",
        seconds=sum(record.times.answers_s for record in records) if is_timed else None,
    )


def print_status(console: Console, status: SweepStatus) -> None:
    """Print a table of the runs."""
    table = Table("run", "state", "answers", "scores or problem", box=None, pad_edge=False)
    for run in status.runs:
        answers = f"{run.answers} of {'?' if run.expected is None else run.expected}" if run.state != NOT_BEGUN else ""
        table.add_row(escape(run.key), run.state, answers, escape(_short(run.problem or run.scores)))
    console.print(table)
    counts = ", ".join(f"{count} {state}" for state, count in status.counts.items() if count)
    held = f"made by {'; '.join(status.held_by)}" if status.held_by else "no process works on it"
    left = "" if not status.seconds_left else f" About {duration(status.seconds_left)} left in one process."
    console.print(f"\n{status.name}: {len(status.runs)} runs: {counts}; {held}.{left}", markup=False, highlight=False, soft_wrap=True)


def _short(text: str) -> str:
    """A long problem's beginning, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHORT else f"{line[: _SHORT - 1].rstrip()}…"
