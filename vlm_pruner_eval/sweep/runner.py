"""Runs a sweep: one loaded model, one lmms-eval evaluation per run of the grid, finished runs skipped, half ones continued."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.lmms.journal import Source
from vlm_pruner_eval.sweep import provenance, scores
from vlm_pruner_eval.sweep.config import ModelSection, SweepConfig
from vlm_pruner_eval.sweep.grid import Run, expand
from vlm_pruner_eval.sweep.hub_code import hub_code_problems
from vlm_pruner_eval.sweep.images import ImageStore, Keeper
from vlm_pruner_eval.sweep.progress import SweepProgress
from vlm_pruner_eval.sweep.session import Session
from vlm_pruner_eval.sweep.store import FAILED, FINISHED, Store

Loader = Callable[..., Any]  # vlm_pruner_eval.lmms.wrapper.load, or a stand-in of the same interface


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to: runs of the grid, how many were finished before, how many are failed now."""

    runs: int
    skipped: int
    failed: int


def run_sweep(
    config: SweepConfig,
    output: Path,
    *,
    retry_failed: bool = False,
    console: Console | None = None,
    load: Loader | None = None,
    task_manager: Any = None,
) -> Outcome:
    """Run every run of the grid that is neither finished nor failed, from its last whole batch on.

    Parameters
    ----------
    config
        A validated sweep file.
    output
        Results directory; created when the first run starts, not before everything that can be checked has been.
    retry_failed
        Run those that failed, and only those.
    console
        Progress goes there; default: standard error.
    load, task_manager
        Replace the loader of models and lmms-eval's task index, for programs that bring their own.

    Raises
    ------
    ConfigError
        Anything wrong with the request: methods, tasks, checkpoint, output directory. Nothing has been written then.
    StoppedError
        The disk is full.
    """
    console = console or Console(stderr=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"got WORLD_SIZE={os.environ['WORLD_SIZE']}, but a sweep runs in one process; start it without torchrun.")
    runs, store = expand(config), Store(output)
    store.check_writable()
    checkpoint = provenance.checkpoint_files(config.model.pretrained, config.model.revision)
    status = {run.run_id: store.status(run.run_id, checkpoint) for run in runs}
    todo = [run for run in runs if status[run.run_id] == (FAILED if retry_failed else None)]
    if not todo:
        store.begin(config.name, config.model_dump(), [run.line() for run in runs])
        return _outcome(runs, status, status, console)
    with open_session(config, store, todo, console=console, load=load, task_manager=task_manager) as session:
        store.begin(config.name, config.model_dump(), [run.line() for run in runs])
        if retry_failed:
            _forget_failures(session, todo)
        _run_all(session, runs, {run.run_id for run in todo}, status, console)
    after = {run.run_id: store.status(run.run_id, session.checkpoint) for run in runs}
    return _outcome(runs, status, after, console)


def _outcome(runs: Sequence[Run], before: dict[str, str | None], after: dict[str, str | None], console: Console) -> Outcome:
    """Counts, and a line where something is left to do."""
    skipped = sum(status == FINISHED for status in before.values())
    failed = sum(status == FAILED for status in after.values())
    if skipped == len(runs):
        console.print(f"All {len(runs)} runs are finished already.", highlight=False)
    if failed:
        console.print(f"{failed} of {len(runs)} runs failed; --retry-failed repeats only those.", highlight=False)
    if left := sum(status is None for status in after.values()):
        console.print(f"{left} of {len(runs)} runs are left; without --retry-failed they are run.", highlight=False)
    return Outcome(len(runs), skipped, failed)


@contextmanager
def open_session(
    config: SweepConfig, store: Store, todo: Sequence[Run], *, console: Console, load: Loader | None = None, task_manager: Any = None
) -> Iterator[Session]:
    """Everything that runs need, checked before anything is written: tasks, the loaded model, methods.

    Raises
    ------
    ConfigError
        Unknown tasks, a checkpoint that can't be loaded, methods that it can't run.
    """
    task_manager = check_tasks(config, task_manager)
    for task in unscorable(config, task_manager):
        console.print(f"{task} is {scores.NOT_SCORABLE}; without its score, rows have no relative average.", highlight=False)
    model = _load_model(config.model, load)
    _check_layers(config.model, model)
    check_methods(model, todo)
    model.on_prompt = Keeper(ImageStore(store.root), config.gallery) if config.gallery else None
    files = provenance.checkpoint_files(config.model.pretrained, config.model.revision)
    session = Session(config, store, model, task_manager, files)
    with ExitStack() as stack:
        sources = _shared_sources(session, todo, stack, console) if config.share_prefix and len(todo) > 1 else None
        yield Session(config, store, model, task_manager, files, sources=sources)


def _shared_sources(session: Session, todo: Sequence[Run], stack: ExitStack, console: Console) -> dict[str, Source]:
    """Answers computed for all of `todo` together."""
    from vlm_pruner_eval.lmms.shared import Configuration, SharedRuns

    console.print(
        f"{len(todo)} runs share images, vision tower and the layers before their first cuts, so their times are not reported; the first "
        "run that is started answers for all. Sampled answers and log-likelihoods are not shared.",
        highlight=False,
    )
    chosen = {run.run_id: Configuration(run.method, run.pruning_rate, run.params) for run in todo}
    journals = {run.run_id: stack.enter_context(session.journal(run)) for run in todo}
    shared = SharedRuns(session.model, chosen, journals)
    return {run.run_id: shared.source(run.run_id) for run in todo}


def _forget_failures(session: Session, todo: Iterable[Run]) -> None:
    """A run with samples that failed begins anew; of one that failed behind its answers, these are used again."""
    for run in todo:
        journal = session.journal(run)
        if journal.has_failures():
            journal.delete()
        session.store.forget(run.run_id)


def check_tasks(config: SweepConfig, task_manager: Any = None) -> Any:
    """lmms-eval's task index, after checking that it knows every task of the sweep.

    Raises
    ------
    ConfigError
        Unknown task names, each with the closest known one.
    """
    if task_manager is None:
        import lmms_eval.models  # noqa: F401  # loads the plugins, which add the packaged tasks to every index
        from lmms_eval.tasks import TaskManager

        task_manager = TaskManager(verbosity="WARNING", model_name=config.model.id)
    known, problems = task_manager.all_tasks, []
    for task in config.tasks:
        if task not in known:
            close = difflib.get_close_matches(task, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}? " if close else ""
            problems.append(f"tasks: got {task!r}, which lmms-eval does not know; {hint}`lmms-eval tasks list` shows all names.")
    problems += hub_code_problems([task for task in config.tasks if task in known], task_manager)
    if problems:
        raise ConfigError(problems)
    return task_manager


def unscorable(config: SweepConfig, task_manager: Any) -> list[str]:
    """Tasks of the sweep, members of groups included, that only write a file for someone else to score."""
    from lmms_eval.utils import load_yaml_config

    found, names = [], list(config.tasks)
    while names:
        name = names.pop(0)
        entry = task_manager.task_index.get(name, {}) if isinstance(name, str) else {}
        path = entry.get("yaml_path", -1)
        raw = load_yaml_config(path, mode="simple") if path != -1 else entry
        if isinstance(raw.get("task"), list):
            names += raw["task"]
        elif scores.is_submission([line["metric"] for line in raw.get("metric_list", [])]):
            found.append(name)
    return found


def _load_model(section: ModelSection, load: Loader | None) -> Any:
    if load is None:
        from vlm_pruner_eval.lmms.wrapper import load
    args = section.model_dump(exclude={"id", "visual_tokens", "layers"}, exclude_none=True)
    model = load(section.id, **args)
    model.keep_loaded, model.exit_on_failure = True, False
    return model


def _check_layers(section: ModelSection, model: Any) -> None:
    """A wrong number of layers in the file would give iso-compute rows another budget than they claim."""
    if section.layers is not None and (actual := model.describe()["layers"]) != section.layers:
        raise ConfigError(f"model.layers: got {section.layers}, but {section.pretrained} has {actual} decoder layers; write {actual}.")


def check_methods(model: Any, runs: Iterable[Run]) -> None:
    """Let the loaded model refuse what it can't do (a layer it does not have) before anything is written.

    Raises
    ------
    ConfigError
        With the problems of all runs.
    """
    problems: list[str] = []
    for run in runs:
        try:
            model.configure(method=run.method, pruning_rate=run.pruning_rate, **run.params)
        except ConfigError as error:
            problems += [f"{run.key}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)


def _run_all(session: Session, runs: list[Run], todo: set[str], status: dict[str, str | None], console: Console) -> None:
    with SweepProgress(console, len(runs), todo=len(todo), shared=session.sources is not None) as progress:
        session.model.on_requests, session.model.on_answers = progress.asked, progress.answered
        for run in runs:
            if run.run_id not in todo:
                progress.end(
                    run.key, {FINISHED: "finished before, skipped", FAILED: "failed before, skipped"}.get(status[run.run_id], "left")
                )
                continue
            progress.start(run.key)
            problem = session.run(run)
            progress.finished(run.key, "finished" if problem is None else f"FAILED: {problem}")
