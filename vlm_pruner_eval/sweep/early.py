"""Answers that need neither lmms-eval nor transformers, which take many seconds to import: refusals, and a sweep that is finished."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.store.claims import check_locks
from vlm_pruner_eval.store.folder import Store
from vlm_pruner_eval.store.schema import FINISHED
from vlm_pruner_eval.sweep import identity, preflight, provenance
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import expand, grid_of
from vlm_pruner_eval.sweep.units import folders_of, status_of, units_of


def refuse(config: SweepConfig, output: Path) -> None:
    """Refuse what can be refused without knowing any method (which needs torch); nothing is written.

    Raises
    ------
    ConfigError
        Tasks that no file defines, the results directory.
    """
    store = Store(output)
    store.check_writable()
    preflight.refuse_other_sweep(store, config)
    check_locks(output)
    if "lmms_eval.tasks" not in sys.modules and (problems := task_problems(config)):  # where it is there, its own index is asked
        raise ConfigError(problems)


def look(config: SweepConfig, output: Path, *, rerun: str | None = None) -> int | None:
    """Tell if there is anything to do.

    Returns
    -------
    int or None
        How many runs the grid has, if all are finished and nothing is left to do in the directory; else None.

    Raises
    ------
    ConfigError
        Methods that can't be run as written.
    """
    runs = expand(config)
    store = Store(output)
    again = preflight.chosen_again(runs, rerun)
    units = units_of(config, runs)
    if again or not store.is_of(grid_of(config, runs, folders_of(units))):
        return None
    files = provenance.checkpoint_files(config.model.pretrained, config.model.revision)
    states = status_of(store, units, config.limit, files).values()
    return len(runs) if set(states) == {FINISHED} else None


def task_problems(config: SweepConfig) -> list[str]:
    """Return a sentence for every task that no file mentions; lmms-eval's own index decides on all others."""
    outside = [task for task in config.tasks if task not in identity.own_task_names()]
    if not outside:
        return []
    if config.include_path is not None and not Path(config.include_path).is_dir():
        return [f"include_path: there is no folder at {config.include_path}, expected one with task files of your own."]
    known = identity.defined_names(config.include_path) | identity.own_task_names()
    unknown = [task for task in outside if task not in known and not identity.is_mentioned(task, config.include_path)]
    return [unknown_task(task, known) for task in unknown]


def unknown_task(task: str, known: set[str] | list[str]) -> str:
    """Return the sentence about a task that lmms-eval does not know, with the closest known one."""
    close = _closest(task, known)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"tasks: got {task!r}, which lmms-eval does not know; {hint}`lmms-eval tasks list` shows all names."


def _closest(task: str, known: set[str] | list[str]) -> list[str]:
    return difflib.get_close_matches(task, sorted(known), n=1, cutoff=0.5)
