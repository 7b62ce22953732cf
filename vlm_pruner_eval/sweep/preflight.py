"""Looks at a results directory before a sweep begins there: whose it is, and which finished runs the present grid would not use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.store.folder import Store, Unit
from vlm_pruner_eval.store.schema import FINISHED, RunHead, UnitRecord
from vlm_pruner_eval.sweep import identity
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import Run
from vlm_pruner_eval.sweep.units import Status, WorkUnit

_MOST_NAMES = 4


def refuse_other_sweep(store: Store, config: SweepConfig) -> None:
    """Refuse a directory that holds a sweep of another name: its grid and its report would be overwritten.

    Raises
    ------
    ConfigError
        With both names.
    """
    try:
        name = store.read_grid().name
    except ConfigError:  # nothing is there, or nothing that can be read; then there is no report to lose
        return
    if name != config.name:
        raise ConfigError(
            f"output: {str(store.root)!r} holds the sweep {name!r}, got {config.name!r}, whose report would overwrite the other's; choose "
            f"another folder with --output, or write name: {name} into the file to go on with that sweep."
        )


def chosen_again(runs: Sequence[Run], method: str | None) -> set[str]:
    """Return the ids of the runs of a method, which is given by its name, label or the key of a run; none for None.

    Raises
    ------
    ConfigError
        The grid has no such method.
    """
    if method is None:
        return set()
    found = {run.run_id for run in runs if method in (run.method, run.label, run.key)}
    if not found:
        raise ConfigError(f"--rerun: got {method!r}, which the sweep does not have; {closest(method, {run.method for run in runs})}")
    return found


def notices(store: Store, runs: Sequence[Run], units: Sequence[WorkUnit], status: Status) -> list[str]:
    """Return a sentence for every way in which finished units of the directory differ from those of the grid that are left.

    They stay on the disk, and a sweep file with the old setting brings them back.
    """
    left = [unit for unit in units if status[unit] != FINISHED]
    runs_left = {unit.run.run_id: unit.run for unit in left}.values()
    others = sorted(store.other_runs(run.run_id for run in runs), key=lambda found: _made(found[1]), reverse=True)
    groups: dict[tuple[str, ...], list[tuple[Run, RunHead, str]]] = {}
    for head, records in others:
        run = next((run for run in runs_left if run.key == head.run.key or _is_same_row(run, head)), None)
        if run is not None and records:
            names = tuple(identity.differences(run.config, head.config))
            groups.setdefault(names, []).append((run, head, _made(records)))
    return [_sentence(names, found) for names, found in groups.items()] + list(_edited_tasks(store, left))


def _edited_tasks(store: Store, left: Sequence[WorkUnit]) -> Iterator[str]:
    """A sentence for each task whose files were edited since it was answered."""
    found: dict[str, list[str]] = {}
    for unit in left:
        siblings = [path.parent for path in store.run_dir(unit.run.run_id).glob("*/record.json") if path.parent.name != unit.folder]
        records = (Unit(folder).read() for folder in siblings)
        if any(record is not None and record.task == unit.task and record.status == FINISHED for record in records):
            found.setdefault(unit.task, []).append(unit.run.key)
    for task, keys in found.items():
        yield f"Finished before with other files of {task}, which were edited since: {_listed(keys)}. Answered anew; the old answers stay."


def _made(records: Sequence[UnitRecord]) -> str:
    return max((record.provenance.time for record in records), default="")


def _is_same_row(run: Run, head: RunHead) -> bool:
    return all(getattr(run, name) == getattr(head.run, name) for name in ("method", "pruning_rate", "seed"))


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:_MOST_NAMES]) + (f" and {len(keys) - _MOST_NAMES} more" if len(keys) > _MOST_NAMES else "")


def _sentence(names: Sequence[str], found: Sequence[tuple[Run, RunHead, str]]) -> str:
    """Return what changed, and what follows."""
    run, head, made = found[0]
    what = "; ".join(_change(name, run, head.config) for name in names)
    keys = _listed([each.key for each, _, _ in found])
    return f"Finished before ({made}) with other settings: {keys}. {what[:1].upper()}{what[1:]}. Answered anew; the old runs stay."


def _change(name: str, run: Run, there: dict[str, Any]) -> str:
    if name == "sources.method":
        return f"the source of {run.method} was edited since"
    if name == "results_version":
        return f"results version: {there.get('results_version')} there, {identity.RESULTS_VERSION} now"
    before, now = (_value(config, name) for config in (there, run.config))
    return f"{name}: {before} there, {now} now"


def _value(config: dict[str, Any], name: str) -> str:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return json.dumps(config, ensure_ascii=False)
