"""`vlm-pruner-eval sweep status DIR`: how far a sweep is, read from its files while it runs or after it stopped. Needs no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.lmms.lines import read_entries
from vlm_pruner_eval.sweep.score_line import score_line
from vlm_pruner_eval.sweep.speed import duration
from vlm_pruner_eval.sweep.store import FAILED, FINISHED, Store

RUNNING, HALF_DONE, DAMAGED, NOT_BEGUN = "running", "half done", "damaged", "not begun"
STATES = (FINISHED, FAILED, RUNNING, HALF_DONE, DAMAGED, NOT_BEGUN)
_SHORT = 100  # characters of a problem

Holders = Callable[[Path], Any]
"""Who holds a directory, something that str() makes words of, or None (`lock.holder_of`)."""


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
    """All runs of a sweep, and who holds its directory ("process 12 on host node7"), if anyone does."""

    name: str
    runs: Sequence[RunStatus]
    held_by: str | None

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
            "held_by": self.held_by,
        }


def read_status(directory: Path, holder_of: Holders) -> SweepStatus:
    """How far the sweep in `directory` is.

    Raises
    ------
    ConfigError
        The directory holds no sweep, or its grid can't be read.
    """
    store, holder = Store(directory), holder_of(directory)
    grid = store.read_grid()
    try:
        name, lines, is_shared = grid["name"], [(line["key"], line["run_id"]) for line in grid["runs"]], grid["config"]["share_prefix"]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{directory / 'sweep.json'}: is not the grid of a sweep ({error!r}); run the sweep again to rewrite it."
        ) from error
    runs = _with_expected([_read_run(store, key, run_id, holder_of, holder is not None) for key, run_id in lines])
    if holder is not None and not any(run.state == RUNNING for run in runs):  # shards claim their runs, a sweep does not
        runs = _with_running(store, runs, is_shared)
    return SweepStatus(name, runs, None if holder is None else str(holder))


def _read_run(store: Store, key: str, run_id: str, holder_of: Holders, is_held: bool) -> RunStatus:
    folder = store.run_dir(run_id)
    done, asked, damage = 0, None, None
    try:
        with suppress(FileNotFoundError):  # it was recorded in this moment, and its journal removed
            done, asked = _journaled(folder)
    except ConfigError as error:
        damage = str(error)
    record, state = store.read(run_id), store.status(run_id)  # after the journal, which goes when the record is there
    if state != FINISHED and folder.is_dir() and holder_of(folder) is not None:
        return RunStatus(key, run_id, RUNNING, done, asked)
    if state == FAILED and is_held and _written(folder, "journal*.jsonl") > _written(folder, "run.json"):
        return RunStatus(key, run_id, HALF_DONE, done, asked)  # it is tried again; the record stays until it is replaced
    if state is not None:
        answers = record["n_answers"] or done
        if state == FAILED:
            return RunStatus(key, run_id, state, answers, None, record["problem"])
        seconds = None if record.get("shared_prefix") else record["times"].get("answers_s")
        return RunStatus(key, run_id, state, answers, answers, record["problem"], score_line(record, None), seconds)
    if record is not None or (folder / "run.json").exists():
        damage = "its record can't be read or its samples.jsonl is missing; the same command runs it again."
    if damage is not None:
        return RunStatus(key, run_id, DAMAGED, done, asked, damage)
    return RunStatus(key, run_id, HALF_DONE if done else NOT_BEGUN, done, asked)


def _journaled(folder: Path) -> tuple[int, int | None]:
    """Answers in the journals of all parts of a run, and how many requests it has as far as it asked them."""
    done: set[tuple[str, int]] = set()
    asked: dict[str, int] = {}
    for path in folder.glob("journal*.jsonl"):
        for _, entry in read_entries(path, answers=False):
            done.update((entry["call"], index) for index in entry.get("requests", ()))
            if "count" in entry:
                asked[entry["call"]] = entry["count"]
    return len(done), sum(asked.values()) if asked else None


def _with_expected(runs: Sequence[RunStatus]) -> list[RunStatus]:
    """All runs of a sweep are asked the same: what a finished one answered, else what the furthest one asked."""
    known = [run.expected for run in runs if run.state == FINISHED] or [run.expected for run in runs if run.expected is not None]
    return [replace(run, expected=max(known)) if known else run for run in runs]


def _with_running(store: Store, runs: Sequence[RunStatus], is_shared: bool) -> list[RunStatus]:
    """Of a directory that a process holds: the run whose journal was written last goes on; where runs share answers, all of them do."""
    begun = [run.run_id for run in runs if run.state == HALF_DONE]
    if not is_shared and begun:
        begun = [max(begun, key=lambda run_id: _written(store.run_dir(run_id), "journal*.jsonl"))]
    return [replace(run, state=RUNNING) if run.run_id in begun else run for run in runs]


def _written(folder: Path, pattern: str) -> float:
    """When one of these files was last written; 0.0 where there is none (any more)."""
    times = [0.0]
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):  # it has just been removed or replaced
            times.append(path.stat().st_mtime)
    return max(times)


def print_status(console: Console, status: SweepStatus) -> None:
    """Print a table of the runs."""
    table = Table("run", "state", "answers", "scores or problem", box=None, pad_edge=False)
    for run in status.runs:
        answers = f"{run.answers} of {'?' if run.expected is None else run.expected}" if run.state != NOT_BEGUN else ""
        table.add_row(escape(run.key), run.state, answers, escape(_short(run.problem or run.scores)))
    console.print(table)
    counts = ", ".join(f"{count} {state}" for state, count in status.counts.items() if count)
    held = f"held by {status.held_by}" if status.held_by else "no process holds it"
    left = "" if not status.seconds_left else f" About {duration(status.seconds_left)} left in one process."
    console.print(f"\n{status.name}: {len(status.runs)} runs: {counts}; {held}.{left}", markup=False, highlight=False, soft_wrap=True)


def _short(text: str) -> str:
    """A long problem's beginning, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHORT else f"{line[: _SHORT - 1].rstrip()}…"
