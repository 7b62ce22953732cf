"""Everything that the runs of a sweep need, checked before the first one begins: tasks, the loaded model, methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_pruner_eval import selftest
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.lmms.run_context import RunContext
from vlm_pruner_eval.store.folder import Store
from vlm_pruner_eval.sweep import provenance
from vlm_pruner_eval.sweep.config import ModelSection, SweepConfig
from vlm_pruner_eval.sweep.early import unknown_task
from vlm_pruner_eval.sweep.grid import Run
from vlm_pruner_eval.sweep.hub_code import hub_code_problems
from vlm_pruner_eval.sweep.images import ImageStore, Keeper
from vlm_pruner_eval.sweep.metrics import scores
from vlm_pruner_eval.sweep.session import Session
from vlm_pruner_eval.sweep.task_modules import module_problems
from vlm_pruner_eval.sweep.units import WorkUnit

Loader = Callable[..., Any]  # vlm_pruner_eval.lmms.families.load, or a stand-in of the same interface


def open_session(
    config: SweepConfig,
    store: Store,
    todo: Sequence[WorkUnit],
    *,
    console: Console,
    load: Loader | None = None,
    task_manager: Any = None,
) -> Session:
    """Load the model and let it refuse what it can't do; nothing is written.

    Parameters
    ----------
    todo
        The units that may be asked of the session.

    Raises
    ------
    ConfigError
        Unknown tasks, a checkpoint that can't be loaded, methods that it can't run.
    StoppedError
        The installation fails the self-test.
    """
    if load is None:
        selftest.run()
    if task_manager is None:
        console.print("Reading lmms-eval's tasks ...", highlight=False)
    task_manager = check_tasks(config, task_manager)
    for task in unscorable(config, task_manager):
        console.print(f"{task} is {scores.NOT_SCORABLE}; without its score, rows have no relative average.", highlight=False)
    if load is None:
        check_layers(config.model)
    model = _load_model(config.model, load)
    _check_layers(config.model, model)
    check_methods(model, {unit.run.run_id: unit.run for unit in todo}.values())
    keeper = Keeper(ImageStore(store.root), config.gallery) if config.gallery else None
    files = provenance.checkpoint_files(config.model.pretrained, config.model.revision)
    return Session(config, store, model, task_manager, files, RunContext(on_prompt=keeper, keep_loaded=True), is_one_of_many=len(todo) > 1)


@contextmanager
def sharing(session: Session, units: Sequence[WorkUnit]) -> Iterator[Session]:
    """The same session, with the answers of units of one task computed together if the sweep file asks for it."""
    if not session.config.share_prefix or len(units) < 2:
        yield session
        return
    from vlm_pruner_eval.lmms.shared_runs import Configuration, SharedRuns

    by_run = {unit.run.run_id: unit for unit in units}
    chosen = {name: Configuration(unit.run.method, unit.run.pruning_rate, unit.run.params) for name, unit in by_run.items()}
    with ExitStack() as stack:
        logs = {name: stack.enter_context(session.log(unit)) for name, unit in by_run.items()}
        rows = session.config.rows_together(session.model.device.type)
        shared = SharedRuns(session.model, chosen, logs, rows)
        yield replace(session, sources={name: shared.source(name) for name in by_run}, shared=shared)


def check_tasks(config: SweepConfig, task_manager: Any = None) -> Any:
    """lmms-eval's task index, after checking that it knows every task of the sweep and can import its functions.

    Raises
    ------
    ConfigError
        Unknown task names, each with the closest known one; tasks that need a package that is not installed.
    """
    if task_manager is None:
        import lmms_eval.models  # noqa: F401  # loads the plugins, which add the packaged tasks to every index
        from lmms_eval.tasks import TaskManager

        if config.include_path is not None and not Path(config.include_path).is_dir():
            raise ConfigError(f"include_path: there is no folder at {config.include_path}, expected one with task files of your own.")
        task_manager = TaskManager(verbosity="WARNING", include_path=config.include_path, model_name=config.model.id)
    known = task_manager.all_tasks
    problems = [unknown_task(task, known) for task in config.tasks if task not in known]
    found = [task for task in config.tasks if task in known]
    problems += hub_code_problems(found, task_manager)
    problems = problems or list(module_problems(found, task_manager))  # what runs code of the hub is not imported before
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
        from vlm_pruner_eval.lmms.families import load
    args = section.model_dump(exclude={"id", "visual_tokens", "layers"}, exclude_none=True)
    model = load(section.id, **args)
    model.context = RunContext(keep_loaded=True)
    return model


def check_layers(section: ModelSection) -> None:
    """Hold the layers of the file against the checkpoint's config.json, which is read in a moment, before weights are.

    Raises
    ------
    ConfigError
        They differ, which would give iso-compute rows another budget than they claim.
    """
    if section.layers is None:
        return
    from vlm_pruner_eval.lmms.checkpoint import decoder_layers

    _refuse_layers(section, decoder_layers(section.pretrained, section.revision))


def _check_layers(section: ModelSection, model: Any) -> None:
    """The same of the loaded model, whoever loaded it."""
    if section.layers is not None:
        _refuse_layers(section, model.describe()["layers"])


def _refuse_layers(section: ModelSection, actual: int | None) -> None:
    if actual is not None and actual != section.layers:
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
