"""Read a results directory, and refuse to put into one table what can't be compared."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.answer_arrays import Answers, answers_of
from vlm_pruner_eval.store.answers import ANSWERS, Answer, answer_lines
from vlm_pruner_eval.store.folder import DocumentScore, Store, Unit
from vlm_pruner_eval.store.schema import FINISHED, Grid, RunLine, RunRecord
from vlm_pruner_eval.sweep.grid import budget_mixtures
from vlm_pruner_eval.sweep.metrics.score_line import main_scores

NOT_RUN = "not run"
ANSWERS_MISSING = "not run: answers missing"


@dataclass(frozen=True)
class RunResult:
    """One run of the grid, with its record if every task of it has one, or its failed tasks have."""

    line: RunLine
    status: str
    record: RunRecord | None

    @property
    def finished(self) -> bool:
        """True if its numbers may be used: it is finished, or failed for tasks that could not be scored only."""
        return self.record is not None and self.record.is_usable

    @property
    def scores(self) -> dict[str, float | None]:
        """Of a run with a record: by task the score, None if the task can't be scored here."""
        return main_scores(list(self.record.units.values()))

    @property
    def key(self) -> str:
        """See `RunLine`, as of what follows."""
        return self.line.key

    @property
    def run_id(self) -> str:
        """Identity of the run, the name of its folder."""
        return self.line.run_id

    @property
    def label(self) -> str:
        """Text for tables."""
        return self.line.label

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.line.method

    @property
    def pruning_rate(self) -> str | float | None:
        """Fraction removed."""
        return self.line.pruning_rate

    @property
    def seed(self) -> int | None:
        """Seed of a method that draws random numbers."""
        return self.line.seed

    @property
    def params(self) -> dict[str, Any]:
        """Every parameter of the method, defaults included."""
        return self.line.parameters

    @property
    def changed(self) -> dict[str, Any]:
        """Parameters that differ from the method's defaults."""
        return self.line.changed

    @property
    def asked_rate(self) -> str | float | None:
        """The rate of the sweep file under which tables list the run."""
        return self.line.asked_rate

    @property
    def iso_layer(self) -> int | None:
        """Of an iso-compute row: the layer of the methods that it matches in compute."""
        return self.line.iso_layer


@dataclass(frozen=True)
class Results:
    """A sweep as it stands on disk: the grid, the runs in grid order, and remarks for the reader."""

    store: Store
    grid: Grid
    runs: tuple[RunResult, ...]
    notes: tuple[str, ...]
    _answers: dict[str, Answers] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        """Of the sweep."""
        return self.grid.name

    @property
    def config(self) -> dict[str, Any]:
        """The sweep file."""
        return self.grid.config

    @property
    def records(self) -> list[RunRecord]:
        """Records of the finished runs."""
        return [run.record for run in self.runs if run.finished]

    @property
    def not_run(self) -> list[str]:
        """Keys of the runs that did not happen yet."""
        return [run.key for run in self.runs if run.status == NOT_RUN]

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order of the first finished run (most groups are spelled out there), else as configured."""
        return list(self.records[0].scores) if self.records else list(self.config["tasks"])

    @property
    def splits(self) -> dict[str, str]:
        """The split of every task."""
        return self.records[0].splits if self.records else {}

    def units(self, run_id: str) -> list[Unit]:
        """The folders of a run's tasks."""
        return [self.store.unit(run_id, folder) for folder in self.grid.units.values()]

    def each_score(self, run_id: str) -> Iterator[DocumentScore]:
        """Scores of a run by document."""
        return itertools.chain.from_iterable(unit.each_score() for unit in self.units(run_id))

    def answers(self, run_id: str) -> Answers:
        """Answers and scores of a run in arrays; read once."""
        if run_id not in self._answers:
            self._answers[run_id] = answers_of(self.each_score(run_id))
        return self._answers[run_id]

    def each_answer(self, run_id: str, last: int | None = None) -> Iterator[Answer]:
        """Answers of a run in the order of documents, up to document `last` of each task; those beyond the present limit left out."""
        limit = self.config["limit"]
        for unit in self.units(run_id):
            known = [line for line in answer_lines(unit.folder) if limit is None or line.doc_id < limit]
            record = unit.read()
            if record is not None and record.n_answers != len(known):
                raise ConfigError(
                    f"{unit.folder / ANSWERS}: holds {len(known)} answers, expected {record.n_answers}: answers are missing; delete the "
                    "folder and run the sweep again."
                )
            found = (line.answer() for line in known if last is None or line.doc_id <= last)
            yield from sorted(found, key=lambda answer: (answer.task, answer.doc_id, answer.choice or 0))

    def read_draws(self, run_id: str) -> dict[str, np.ndarray]:
        """Task -> bootstrap replicates of its score."""
        return {task: draws for unit in self.units(run_id) for task, draws in unit.read_draws().items()}


def load_sweep(root: Path | str) -> Results:
    """Read a results directory.

    Raises
    ------
    ConfigError
        No sweep there, two runs with the same id, or records that do not belong in one table: another model section, protocol,
        meaning of the budget, results version, other documents or another revision of them, answers that are missing.
    """
    store = Store(Path(root))
    grid = store.read_grid()
    if problems := [*_same_ids(grid.runs)]:
        raise ConfigError(problems)
    runs = tuple(_result(store, grid, line) for line in grid.runs)
    problems = [
        *_mixtures(runs),
        *_other_documents(runs),
        *budget_mixtures(grid.config["model"]["id"], ((run.key, run.method, run.params) for run in runs)),
    ]
    if problems:
        raise ConfigError(problems)
    known = {run.run_id for run in runs}
    others = sorted(path.parent.name for path in store.root.glob("runs/*/run.json") if path.parent.name not in known)
    notes = [f"{len(others)} older runs in this folder do not belong to the present grid and are left out."] if others else []
    if lost := [run.key for run in runs if run.status == ANSWERS_MISSING]:
        notes.append(f"The answers (answers.jsonl) of {', '.join(lost)} are missing, so nothing of them is shown; run the sweep again.")
    processors = sorted({processor for run in runs if run.finished for processor in run.record.processors})
    if len(processors) > 1:
        notes.append(f"Runs come from different processors ({'; '.join(processors)}): their times can't be compared.")
    if shared := [run.key for run in runs if run.finished and run.record.shared_prefix]:
        notes.append(
            f"{len(shared)} of {len(runs)} runs shared what precedes their first cuts (share_prefix), so they have no times of their own; "
            "a sweep into another folder without share_prefix measures them."
        )
    notes += _unscored(runs)
    return Results(store, grid, runs, tuple(notes))


def _same_ids(lines: Sequence[RunLine]) -> Iterator[str]:
    """Runs that claim to be the same one: of two different answers nobody could say which is meant."""
    for name in ("run_id", "key"):
        for value, times in Counter(getattr(line, name) for line in lines).items():
            if times > 1:
                yield f"sweep.json: lists {times} runs with the {name} {value!r}, expected each once; run the sweep again to rewrite it."


def _result(store: Store, grid: Grid, line: RunLine) -> RunResult:
    record = store.read(line, grid.units, grid.config.get("limit"))
    if record is None or record.status is None:
        return RunResult(line, NOT_RUN, record)
    folders = {task: store.unit(line.run_id, grid.units[task]).folder for task in record.units}
    if any(unit.is_usable and not (folders[task] / ANSWERS).is_file() for task, unit in record.units.items()):
        return RunResult(line, ANSWERS_MISSING, None)  # scores that no answer stands behind are not shown
    return RunResult(line, record.status, record)


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
    config = run.record.config
    shared = {f"model.{name}": value for name, value in config["model"].items()}
    return shared | {name: config.get(name) for name in ("seed", "results_version")}


def _other_documents(runs: tuple[RunResult, ...]) -> Iterator[str]:
    """Runs whose documents are not those of the first run, or of another content: a data set that changed between runs."""
    finished = [run for run in runs if run.finished]
    for run in finished[1:]:
        first = finished[0]
        ours, theirs = run.record, first.record
        for task in sorted(ours.scores.keys() & theirs.scores.keys()):
            mine, expected = ours.scores[task], theirs.scores[task]
            if mine.main and expected.main and mine.main.n != expected.main.n:
                n = f"{mine.main.n} documents, but {first.key} has {expected.main.n}"
                yield f"{run.key}: {task} has {n}; run one of them again, or report them apart."
        changed = {task for task, digest in ours.documents.items() if theirs.documents.get(task, digest) != digest}
        clusters = {task: found.clusters.digest for task, found in theirs.scores.items() if found.clusters}
        pictures = {
            task for task, found in ours.scores.items() if found.clusters and clusters.get(task) not in (None, found.clusters.digest)
        }
        for task in sorted(changed | pictures):
            what = "documents" if task in changed else "images"
            yield (
                f"{run.key}: the {what} of {task} have another content than those of {first.key}: another revision of the data set; "
                "pin one revision and run both again."
            )


def _unscored(runs: tuple[RunResult, ...]) -> Iterator[str]:
    """A remark for each task that can't be scored here, or whose scores leave documents out."""
    said: dict[str, None] = {}
    for run in runs:
        for task, scores in run.record.scores.items() if run.finished else ():
            if scores.note is not None and run.status == FINISHED:  # else it is told as the run's problem
                said[f"{task} is {scores.note}; without its score, rows have no relative average."] = None
            if scores.remark is not None:
                said[f"{task}: {scores.remark}."] = None
    yield from said


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
