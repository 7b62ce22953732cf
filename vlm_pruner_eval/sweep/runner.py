"""Runs a sweep: what is left of its grid goes to the worker loop, in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.store.claims import holder_of
from vlm_pruner_eval.store.schema import FAILED, FINISHED
from vlm_pruner_eval.sweep import config as sweep_config
from vlm_pruner_eval.sweep import preflight
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import expand, grid_of, method_problems
from vlm_pruner_eval.sweep.opening import Loader
from vlm_pruner_eval.sweep.status import HALF_DONE, read_status
from vlm_pruner_eval.sweep.units import folders_of, run_status, status_of, units_of
from vlm_pruner_eval.sweep.work import Work, work_here, work_of
from vlm_pruner_eval.sweep.workers import read_todo, visible_gpus, work_in_processes

EXECUTORS = ("local", "ray")


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to: runs of the grid, how many were finished before, how many are failed now, how many are not made yet."""

    runs: int
    skipped: int
    failed: int
    left: int = 0
    held: int = 0  # units that other processes work on


def run_sweep(
    config: SweepConfig | Path | str | Mapping[str, Any],
    output: Path | str | None = None,
    *,
    retry_failed: bool = False,
    rerun: str | None = None,
    executor: str = "local",
    processes: int | None = None,
    address: str | None = None,
    console: Console | None = None,
    load: Loader | None = None,
    task_manager: Any = None,
) -> Outcome:
    """Make every unit of the grid that is neither finished nor failed, from its last whole batch on: the command `sweep` as a function.

    Any number of processes may run the same sweep over one folder at the same time: each takes units that no other one holds.

    Parameters
    ----------
    config
        A sweep file: its path, its content as a mapping, or what `config.load` made of it.
    output
        Results directory, by default the file's; nothing stays there of a sweep that is refused.
    retry_failed
        Make units that failed, and only those.
    rerun
        A method (name or label) or a run (key) to answer anew, besides what is left.
    executor
        "local": this machine, one process per visible GPU, or this process if there is one GPU or none; "ray": a Ray cluster.
    processes
        So many, whatever GPUs there are.
    address
        Of a Ray cluster that runs ("auto", host:port).
    console
        Progress goes there; default: standard error.
    load, task_manager
        Replace the loader of models and lmms-eval's task index, for programs that bring their own.

    Raises
    ------
    ConfigError
        Anything wrong with the request: methods, tasks, checkpoint, results directory.
    StoppedError
        Nothing can go on, for example because the disk is full.
    """
    if not isinstance(config, SweepConfig):
        config = sweep_config.validate(dict(config)) if isinstance(config, Mapping) else sweep_config.load(config, check=method_problems)
    _check_options(executor, processes, address, has_own_model=load is not None or task_manager is not None)
    root = Path(output or config.output or Path("output") / config.name)
    work = work_of(
        config, root, console or Console(stderr=True), load=load, task_manager=task_manager, retry_failed=retry_failed, rerun=rerun
    )
    for notice in preflight.notices(work.store, work.runs, work.units, work.status):
        work.say(notice)
    with _told_when_stopped(work), _undone_if_refused(root):
        _make(work, executor, processes, address)
    return _outcome(work)


def run_as_child(config: SweepConfig, output: Path, todo: Path) -> None:
    """Be one of the processes that a sweep has started itself: make the units that a file names.

    Raises
    ------
    ConfigError, StoppedError
        See `run_sweep`, and `read_todo`.
    """
    units, command = read_todo(todo, units_of(config, expand(config)))
    work_here(work_of(config, output, Console(stderr=True), todo={unit.path for unit in units}, command=command))


def _make(work: Work, executor: str, processes: int | None, address: str | None) -> None:
    """Let the units be made; if there are none, only the grid is written."""
    if not work.todo:
        work.store.begin(grid_of(work.config, work.runs, folders_of(work.units)))
        return
    if executor == "ray":
        from vlm_pruner_eval.sweep.on_ray import work_on_ray

        with work.begun():
            work_on_ray(work, address, processes)
        return
    own_model = work.load is not None or work.task_manager is not None
    gpus = [] if own_model or work.config.model.device is not None else visible_gpus()
    count = min(processes or max(1, len(gpus)), len(work.todo))
    if count == 1:
        work_here(work)
        return
    with work.begun():
        work_in_processes(work, [gpus[index % len(gpus)] if gpus else None for index in range(count)])


def _check_options(executor: str, processes: int | None, address: str | None, *, has_own_model: bool) -> None:
    """Refuse options that exclude each other."""
    from vlm_pruner_eval.errors import closest

    if executor not in EXECUTORS:
        raise ConfigError(f"--executor: got {executor!r}, which is unknown; {closest(executor, EXECUTORS)}")
    if address is not None and executor != "ray":
        raise ConfigError("--address: got it without --executor ray, which alone has a meaning for it; leave it out.")
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes: got {processes}, expected 1 or more.")
    if has_own_model and (executor == "ray" or (processes or 1) > 1):
        raise ConfigError("processes: a loader or a task index of your own can't be given to other processes; leave processes and ray out.")


@contextmanager
def _told_when_stopped(work: Work) -> Iterator[None]:
    """Say what is kept when Ctrl-C or SIGTERM stops the sweep."""
    try:
        yield
    except KeyboardInterrupt:
        work.say(_stopped(work.store.root))
        raise


@contextmanager
def _undone_if_refused(root: Path) -> Iterator[None]:
    """Let nothing stay of a sweep that its workers refuse: the grid is written before they begin."""
    was_there = root.exists()
    had_grid = (root / "sweep.json").exists()
    try:
        yield
    except ConfigError:
        if not had_grid and not (root / "runs").exists():
            shutil.rmtree(root / "logs", ignore_errors=True)
            (root / "sweep.json").unlink(missing_ok=True)
            if not was_there and root.exists() and not any(root.iterdir()):
                root.rmdir()
        raise


def _stopped(root: Path) -> str:
    try:
        found = read_status(root)
    except ConfigError:  # the grid was not written yet
        return "Stopped before the first run; nothing is lost, the same command begins again."
    parts = [f"{found.counts[FINISHED]} of {len(found.runs)} runs finished"]
    begun = [run for run in found.runs if run.state == HALF_DONE]
    if len(begun) == 1:
        parts.append(f"{begun[0].answers} of {begun[0].expected or '?'} answers of {begun[0].key} kept")
    elif begun:
        parts.append(f"{sum(run.answers for run in begun)} answers of {len(begun)} runs kept")
    return f"Stopped. {', '.join(parts)}; the same command goes on."


def _outcome(work: Work) -> Outcome:
    """Counts, and a line if something is left to do."""
    after = status_of(work.store, work.units, work.config.limit, work.checkpoint)
    states = [run_status(after, run) for run in work.runs]
    made = {unit.run.run_id for unit in work.todo}
    skipped = sum(run_status(work.status, run) == FINISHED and run.run_id not in made for run in work.runs)
    failed = states.count(FAILED)
    left = states.count(None)
    if skipped == len(work.runs):
        work.say(f"All {len(work.runs)} runs are finished already.")
    if failed:
        work.say(f"{failed} of {len(work.runs)} runs failed; --retry-failed repeats only what failed.")
    if left:
        work.say(
            f"{left} of {len(work.runs)} runs are left; other processes work on them, or this command makes them when it is given again."
        )
    held = sum(state is None and holder_of(unit.stored(work.store).folder) is not None for unit, state in after.items())
    return Outcome(len(work.runs), skipped, failed, left, held)
