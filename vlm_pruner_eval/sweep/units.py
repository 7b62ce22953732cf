"""Units of work: one task of one run each; how they stand in a results directory, and which are answered together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_pruner_eval.store.folder import Store, Unit
from vlm_pruner_eval.store.schema import FAILED, FINISHED
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import UNPRUNED, Run, rate_percent, unit_folders

Status = dict["WorkUnit", str | None]


@dataclass(frozen=True)
class WorkUnit:
    """One entry of the sweep file's `tasks` under one run; `folder` is the name of its folder in the run's."""

    run: Run
    task: str
    folder: str

    def __hash__(self) -> int:
        return hash(self.path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WorkUnit) and self.path == other.path

    @property
    def path(self) -> str:
        """The folder, below that of all runs."""
        return f"{self.run.run_id}/{self.folder}"

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.run.key} {self.task}"

    def stored(self, store: Store) -> Unit:
        """The unit on disk."""
        return store.unit(self.run.run_id, self.folder)


def units_of(config: SweepConfig, runs: Sequence[Run]) -> list[WorkUnit]:
    """All units of a sweep, run by run."""
    folders = unit_folders(config)
    return [WorkUnit(run, task, folder) for run in runs for task, folder in folders.items()]


def folders_of(units: Sequence[WorkUnit]) -> dict[str, str]:
    """Task -> name of its folder, see `grid.unit_folders`."""
    return {unit.task: unit.folder for unit in units}


def status_of(store: Store, units: Sequence[WorkUnit], limit: int | None, checkpoint: Mapping[str, Any] | None = None) -> Status:
    """`FINISHED`, `FAILED` or None of every unit.

    Records of other checkpoint files than are there now do not count, nor do those of a run without its run.json.
    """
    runs = {unit.run.run_id for unit in units}
    whole = {run_id for run_id in runs if (store.run_dir(run_id) / "run.json").is_file()}
    return {unit: unit.stored(store).status(limit, checkpoint) if unit.run.run_id in whole else None for unit in units}


def run_status(status: Status, run: Run) -> str | None:
    """The status of a run: failed if a unit is, finished if all are, else None."""
    found = {state for unit, state in status.items() if unit.run.run_id == run.run_id}
    if FAILED in found:
        return FAILED
    return FINISHED if found == {FINISHED} else None


def groups(units: Sequence[WorkUnit], *, shared: bool) -> list[list[WorkUnit]]:
    """Split units into groups that are answered together; every unit is in one of them.

    Without a shared prefix every unit is a group. With one, the units of a task are. Those of the first task make two groups: the
    unpruned run and the first pruned method at the largest rate, whose scores show early if something is wrong, then the rest. If the
    unpruned run is not among `units`, or fewer than two would be left for the second group, they are one group, too.
    """
    if not shared or not units:
        return [[unit] for unit in units]
    by_task: dict[str, list[WorkUnit]] = {}
    for unit in units:
        by_task.setdefault(unit.task, []).append(unit)
    first, *others = by_task.values()
    return [*_split(first), *others]


def _split(units: list[WorkUnit]) -> list[list[WorkUnit]]:
    unpruned = [unit for unit in units if unit.run.method == UNPRUNED]
    pruned = [unit for unit in units if unit.run.pruning_rate is not None]
    if not unpruned or not pruned or len(units) < 4:
        return [units]
    first = [*unpruned, max(pruned, key=lambda unit: rate_percent(unit.run.pruning_rate))]  # of equal ones the first
    return [first, [unit for unit in units if unit not in first]]
