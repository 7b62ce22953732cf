"""What a sweep left, read through the store, for tests."""

from __future__ import annotations

from pathlib import Path

from vlm_pruner_eval.store.answers import Answer
from vlm_pruner_eval.store.folder import DocumentScore, Store, Unit
from vlm_pruner_eval.store.schema import RunRecord


def read_runs(output: Path) -> dict[str, RunRecord]:
    """Records by key of the run, as far as there are any."""
    store = Store(output)
    grid = store.read_grid()
    found = {line.key: store.read(line, grid.units, grid.config["limit"]) for line in grid.runs}
    return {key: record for key, record in found.items() if record is not None}


def units(output: Path, key: str) -> dict[str, Unit]:
    """Units of a run by task."""
    store = Store(output)
    grid = store.read_grid()
    (line,) = [line for line in grid.runs if line.key == key]
    return {task: store.unit(line.run_id, folder) for task, folder in grid.units.items()}


def answers(output: Path, key: str) -> list[Answer]:
    """Answers of a run in the order of tasks and documents."""
    found = [answer for unit in units(output, key).values() for answer in unit.answers()]
    return sorted(found, key=lambda answer: (answer.task, answer.doc_id, answer.choice or 0))


def scores(output: Path, key: str) -> list[DocumentScore]:
    """Scores of a run by document."""
    return [score for unit in units(output, key).values() for score in unit.each_score()]
