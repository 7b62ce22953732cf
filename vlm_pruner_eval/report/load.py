"""Read a results directory, and refuse to put into one table what can't be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.store import FAILED, FINISHED, Store

NOT_RUN = "not run"


@dataclass(frozen=True)
class RunResult:
    """One run of the grid, with its record if there is one."""

    key: str
    run_id: str
    label: str
    method: str
    pruning_rate: str | float | None
    seed: int | None
    status: str
    record: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        """Whether its numbers may be used."""
        return self.status == FINISHED


@dataclass(frozen=True)
class Results:
    """A sweep as it stands on disk: the grid, the runs in grid order, and remarks for the reader."""

    store: Store
    name: str
    config: dict[str, Any]
    runs: tuple[RunResult, ...]
    notes: tuple[str, ...]

    @property
    def records(self) -> list[dict[str, Any]]:
        """Records of the finished runs."""
        return [run.record for run in self.runs if run.finished]

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order of the first finished run (most groups are spelled out there), else as configured."""
        return list(self.records[0]["tasks"]) if self.records else list(self.config["tasks"])


def load_results(root: Path | str) -> Results:
    """Read a results directory.

    Raises
    ------
    ConfigError
        No sweep there, or records that do not belong in one table: another model section, protocol, code version, tasks,
        limit, or number of documents.
    """
    store = Store(Path(root))
    grid = store.read_grid()
    runs = tuple(_result(store, line) for line in grid["runs"])
    problems = [*_mixtures(runs), *_document_counts(runs)]
    if problems:
        raise ConfigError(problems)
    known = {run.run_id for run in runs}
    others = sorted(path.parent.name for path in store.root.glob("runs/*/run.json") if path.parent.name not in known)
    notes = [f"{len(others)} older runs in this folder do not belong to the present grid and are left out."] if others else []
    processors = sorted({run.record["provenance"]["processor"] for run in runs if run.finished})
    if len(processors) > 1:
        notes.append(f"Runs come from different processors ({'; '.join(processors)}): their times can't be compared.")
    notes += _unscored(runs)
    return Results(store, grid["name"], grid["config"], runs, tuple(notes))


def _result(store: Store, line: dict[str, Any]) -> RunResult:
    record = store.read(line["run_id"])
    status = NOT_RUN if record is None else record["status"]
    if status not in (FINISHED, FAILED, NOT_RUN):
        raise ConfigError(
            f"{line['run_id']}: run.json has status {status!r}, expected {FINISHED} or {FAILED}; delete it and run the sweep again."
        )
    return RunResult(
        **{key: line[key] for key in ("key", "run_id", "label", "method", "pruning_rate", "seed")}, status=status, record=record
    )


def _mixtures(runs: tuple[RunResult, ...]) -> Iterator[str]:
    """Settings that have to be equal over a table, and are not."""
    finished = [run for run in runs if run.finished]
    if not finished:
        return
    first = finished[0]
    for run in finished[1:]:
        for name, value in _settings(run).items():
            expected = _settings(first)[name]
            if value != expected:
                yield (
                    f"{run.key}: has {name} {_text(value)}, but {first.key} has {_text(expected)}; "
                    "runs that differ in it do not belong in one table: report them from separate folders."
                )


def _settings(run: RunResult) -> dict[str, Any]:
    config = run.record["config"]
    shared = {f"model.{name}": value for name, value in config["model"].items()}
    return shared | {name: config[name] for name in ("tasks", "limit", "seed", "code")}


def _document_counts(runs: tuple[RunResult, ...]) -> Iterator[str]:
    seen: dict[str, tuple[int, str]] = {}
    for run in runs:
        for task, scores in run.record["tasks"].items() if run.finished else ():
            n = scores["main"]["n"] if scores["main"] else None
            first = seen.setdefault(task, (n, run.key))
            if n != first[0]:
                yield f"{run.key}: {task} has {n} documents, but {first[1]} has {first[0]}; run one of them again, or report them apart."


def _unscored(runs: tuple[RunResult, ...]) -> Iterator[str]:
    """A remark for each task that can't be scored here."""
    for task, scores in next((run.record["tasks"] for run in runs if run.finished), {}).items():
        if "note" in scores:
            yield f"{task} is {scores['note']}; without its score, rows have no relative average."


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
