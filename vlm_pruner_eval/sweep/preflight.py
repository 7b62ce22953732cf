"""Looks at a results directory before a sweep begins there: whose it is, and which finished runs the present grid would not use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.sweep import identity
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import Run
from vlm_pruner_eval.sweep.store import FINISHED, Store

_MOST_NAMES = 4


def refuse_other_sweep(store: Store, config: SweepConfig) -> None:
    """Refuse a directory that holds a sweep of another name: its grid and its report would be overwritten.

    Raises
    ------
    ConfigError
        With both names.
    """
    try:
        name = store.read_grid().get("name")
    except (ConfigError, AttributeError):  # nothing is there, or nothing that can be read; then there is no report to lose
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


def notices(store: Store, runs: Sequence[Run], status: dict[str, str | None]) -> list[str]:
    """Return a sentence for every way in which finished runs of the directory differ from runs of the grid that are left.

    They stay on the disk, and a sweep file with the old setting brings them back.
    """
    groups: dict[tuple[str, ...], list[tuple[Run, dict[str, Any]]]] = {}
    left = [run for run in runs if status.get(run.run_id) != FINISHED]
    for record in _finished(store, {run.run_id for run in runs}):
        for run in left:
            if run.key == record["key"] or _is_same_row(run, record):
                names = tuple(identity.differences(run.config, _comparable(record["config"])))
                groups.setdefault(names, []).append((run, record))
                break
    return [_sentence(names, pairs) for names, pairs in groups.items()]


def _finished(store: Store, grid: set[str]) -> Iterator[dict[str, Any]]:
    """Finished records of the directory that are not of the grid, the newest first."""
    folder = store.root / "runs"
    found = [store.read(path.name) for path in folder.iterdir() if path.name not in grid] if folder.is_dir() else []
    whole = [record for record in found if record and record.get("status") == FINISHED and isinstance(record.get("config"), dict)]
    yield from sorted(whole, key=_made, reverse=True)


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration without the digest that records of version 0.1.0 held in place of version and sources."""
    return {"sources": {"tasks": {}}} | {name: value for name, value in config.items() if name != "code"}


def _made(record: dict[str, Any]) -> str:
    return str(record.get("provenance", {}).get("time", ""))


def _is_same_row(run: Run, record: dict[str, Any]) -> bool:
    fields = ("method", "pruning_rate", "seed")
    return all(getattr(run, name) == record.get(name) for name in fields)


def _sentence(names: Sequence[str], pairs: Sequence[tuple[Run, dict[str, Any]]]) -> str:
    """Return what changed, and what follows."""
    run, record = pairs[0]
    keys = [pair[0].key for pair in pairs]
    shown = ", ".join(keys[:_MOST_NAMES]) + (f" and {len(keys) - _MOST_NAMES} more" if len(keys) > _MOST_NAMES else "")
    what = "; ".join(_change(name, run, record) for name in names)
    return (
        f"Finished before ({_made(record)}) with other settings: {shown}. {what[:1].upper()}{what[1:]}. Answered anew; the old runs stay."
    )


def _change(name: str, run: Run, record: dict[str, Any]) -> str:
    if name == "sources.method":
        return f"the source of {run.method} was edited since"
    if name == "sources.tasks":
        before = record["config"].get("sources", {}).get("tasks", {})
        changed = sorted(task for task, digest in run.config["sources"]["tasks"].items() if before.get(task) != digest)
        return f"the files of {', '.join(changed) or 'a task'} were edited since"
    if name == "results_version":
        before = record["config"].get("results_version", "of an older release")
        return f"results version: {before} there, {identity.RESULTS_VERSION} now"
    there, now = (_value(config, name) for config in (record["config"], run.config))
    return f"{name}: {there} there, {now} now"


def _value(config: dict[str, Any], name: str) -> str:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return json.dumps(config, ensure_ascii=False)
