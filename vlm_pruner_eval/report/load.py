"""Read a results directory, and refuse to put into one table what can't be compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.documents import Documents, document_problems, read_documents
from vlm_pruner_eval.report.shape import grid_problems, record_problem
from vlm_pruner_eval.sweep.grid import budget_mixtures
from vlm_pruner_eval.sweep.store import FAILED, FINISHED, Store

NOT_RUN = "not run"
SAMPLES_MISSING = "not run: samples missing"


@dataclass(frozen=True)
class RunResult:
    """One run of the grid, with its record if there is one.

    Attributes
    ----------
    params
        Every parameter of the method, defaults included; empty for a run of an older version that has not happened.
    changed
        Those that differ from the method's defaults; None where an older version wrote the grid and did not say.
    asked_rate
        The rate of the sweep file under which the run is listed: `pruning_rate`, but for iso-compute rows.
    iso_layer
        Of an iso-compute row: the layer of the methods that it matches in compute.
    """

    key: str
    run_id: str
    label: str
    method: str
    pruning_rate: str | float | None
    seed: int | None
    status: str
    record: dict[str, Any] | None
    params: dict[str, Any] = field(default_factory=dict)
    changed: dict[str, Any] | None = None
    asked_rate: str | float | None = None
    iso_layer: int | None = None

    @property
    def finished(self) -> bool:
        """Whether its numbers may be used: it is finished, or failed for tasks that could not be scored only."""
        return self.status == FINISHED or _is_partly_scored(self.status, self.record)

    @property
    def scores(self) -> dict[str, float | None]:
        """Of a run with a record: by task the score, None where the task can't be scored here."""
        return {task: held["main"]["value"] if held["main"] else None for task, held in self.record["tasks"].items()}


@dataclass(frozen=True)
class Results:
    """A sweep as it stands on disk: the grid, the runs in grid order, remarks for the reader, and the split of every task."""

    store: Store
    name: str
    config: dict[str, Any]
    runs: tuple[RunResult, ...]
    notes: tuple[str, ...]
    splits: dict[str, str] = field(default_factory=dict)

    @property
    def records(self) -> list[dict[str, Any]]:
        """Records of the finished runs."""
        return [run.record for run in self.runs if run.finished]

    @property
    def not_run(self) -> list[str]:
        """Keys of the runs that did not happen yet."""
        return [run.key for run in self.runs if run.status == NOT_RUN]

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order of the first finished run (most groups are spelled out there), else as configured."""
        return list(self.records[0]["tasks"]) if self.records else list(self.config["tasks"])


def load_results(root: Path | str) -> Results:
    """Read a results directory.

    Raises
    ------
    ConfigError
        No sweep there, two runs with the same id, or records that do not belong in one table: another model section, protocol,
        meaning of the budget, code version, tasks, limit, other documents or another revision of them, answers that are missing.
    """
    store = Store(Path(root))
    grid = store.read_grid()
    if problems := list(grid_problems(grid)):
        raise ConfigError([f"{store.root}: {problem}" for problem in problems])
    if problems := [*_same_ids(store, grid["runs"])]:
        raise ConfigError(problems)
    runs = tuple(_result(store, line) for line in grid["runs"])
    documents = {run.key: read_documents(store, run.run_id) for run in runs if run.finished}
    problems = [
        *_mixtures(runs),
        *_document_counts(runs),
        *budget_mixtures((run.key, run.method, run.params) for run in runs if run.params),
    ]
    problems += document_problems({run.key: run.record for run in runs if run.finished}, documents)
    if problems:
        raise ConfigError(problems)
    known = {run.run_id for run in runs}
    others = sorted(path.parent.name for path in store.root.glob("runs/*/run.json") if path.parent.name not in known)
    notes = [f"{len(others)} older runs in this folder do not belong to the present grid and are left out."] if others else []
    if lost := [run.key for run in runs if run.status == SAMPLES_MISSING]:
        notes.append(f"The answers (samples.jsonl) of {', '.join(lost)} are missing, so nothing of them is shown; run the sweep again.")
    processors = sorted({run.record["provenance"]["processor"] for run in runs if run.finished})
    if len(processors) > 1:
        notes.append(f"Runs come from different processors ({'; '.join(processors)}): their times can't be compared.")
    if shared := [run.key for run in runs if run.finished and run.record.get("shared_prefix")]:
        notes.append(
            f"{len(shared)} of {len(runs)} runs shared what precedes their first cuts (share_prefix), so they have no times of their own; "
            "a sweep into another folder without share_prefix measures them."
        )
    notes += _unscored(runs)
    return Results(store, grid["name"], grid["config"], runs, tuple(notes), _splits(documents))


def _same_ids(store: Store, lines: list[dict[str, Any]]) -> Iterator[str]:
    """Runs that claim to be the same one: of two different answers nobody could say which is meant."""
    for name in ("run_id", "key"):
        for value, times in Counter(line[name] for line in lines).items():
            if times > 1:
                yield f"sweep.json: lists {times} runs with the {name} {value!r}, expected each once; run the sweep again to rewrite it."
    for path in sorted(store.root.glob("runs/*/run.json")):
        try:
            claimed = json.loads(path.read_text(encoding="utf-8"))["run_id"]
        except (ValueError, TypeError, KeyError):  # no record of this package: it counts as not run
            continue
        if claimed != path.parent.name:
            yield f"runs/{path.parent.name}: holds the record of {claimed!r}: two runs with the same id; delete the copy, or move it away."


def _splits(documents: dict[str, Documents]) -> dict[str, str]:
    first = next(iter(documents.values()), None)
    return dict(first.splits) if first else {}


def _result(store: Store, line: dict[str, Any]) -> RunResult:
    record = store.read(line["run_id"])
    status = NOT_RUN if record is None else record.get("status")
    if status not in (FINISHED, FAILED, NOT_RUN):
        raise ConfigError(
            f"{line['run_id']}: run.json has status {status!r}, expected {FINISHED} or {FAILED}; delete it and run the sweep again."
        )
    is_shown = status == FINISHED or _is_partly_scored(status, record)
    if is_shown and (problem := record_problem(line["run_id"], record)):
        raise ConfigError(problem)
    if is_shown and not (store.run_dir(line["run_id"]) / "samples.jsonl").is_file():
        status, record = SAMPLES_MISSING, None  # scores that no answer stands behind are not shown
    return RunResult(
        **{key: line[key] for key in ("key", "run_id", "label", "method", "pruning_rate", "seed")},
        status=status,
        record=record,
        params=line["parameters"] if "parameters" in line else record["config"]["parameters"] if record else {},
        changed=line.get("changed"),
        asked_rate=line.get("asked_rate", line["pruning_rate"]),
        iso_layer=line.get("iso_layer"),
    )


def _is_partly_scored(status: str, record: dict[str, Any] | None) -> bool:
    """Whether all was answered, and some tasks have scores while the aggregation of others failed."""
    return status == FAILED and bool((record or {}).get("unscored"))


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
    shared |= {"sources.tasks": config.get("sources", {}).get("tasks", {})}
    return shared | {name: config.get(name) for name in ("tasks", "limit", "seed", "results_version")}


def _document_counts(runs: tuple[RunResult, ...]) -> Iterator[str]:
    seen: dict[str, tuple[int, str]] = {}
    for run in runs:
        for task, scores in run.record["tasks"].items() if run.finished else ():
            if scores["main"] is None:
                continue
            n = scores["main"]["n"]
            first = seen.setdefault(task, (n, run.key))
            if n != first[0]:
                yield f"{run.key}: {task} has {n} documents, but {first[1]} has {first[0]}; run one of them again, or report them apart."


def _unscored(runs: tuple[RunResult, ...]) -> Iterator[str]:
    """A remark for each task that can't be scored here, or whose scores leave documents out."""
    said: dict[str, None] = {}
    for run in runs:
        for task, scores in run.record["tasks"].items() if run.finished else ():
            if "note" in scores and run.status == FINISHED:  # else it is told as the run's problem
                said[f"{task} is {scores['note']}; without its score, rows have no relative average."] = None
            if "remark" in scores:
                said[f"{task}: {scores['remark']}."] = None
    yield from said


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
