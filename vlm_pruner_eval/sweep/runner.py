"""Runs a grid in one process: the model is loaded once, every run is an ordinary lmms-eval evaluation, records go to the store."""

from __future__ import annotations

import argparse
import difflib
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep import documents, provenance, records, scores
from vlm_pruner_eval.sweep.config import ModelSection, SweepConfig
from vlm_pruner_eval.sweep.grid import Run, expand
from vlm_pruner_eval.sweep.images import ImageStore, Keeper
from vlm_pruner_eval.sweep.progress import SweepProgress
from vlm_pruner_eval.sweep.store import FAILED, FINISHED, Store

Loader = Callable[..., Any]  # vlm_pruner_eval.lmms.wrapper.load, or a stand-in of the same interface


@dataclass(frozen=True)
class Outcome:
    """What a sweep did: runs of the grid, how many were finished before, how many failed now."""

    runs: int
    skipped: int
    failed: int


def run_sweep(
    config: SweepConfig, output: Path, *, console: Console | None = None, load: Loader | None = None, task_manager: Any = None
) -> Outcome:
    """Run every run of the grid that is not finished yet.

    Parameters
    ----------
    config
        A validated sweep file.
    output
        Results directory; created when the first run starts, not before everything that can be checked has been.
    console
        Progress goes there; default: standard error.
    load, task_manager
        Replace the loader of models and lmms-eval's task index, for programs that bring their own.

    Raises
    ------
    ConfigError
        Anything wrong with the request: methods, tasks, checkpoint, output directory. Nothing has been written then.
    """
    console = console or Console(stderr=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"got WORLD_SIZE={os.environ['WORLD_SIZE']}, but a sweep runs in one process; start it without torchrun.")
    runs, store = expand(config), Store(output)
    store.check_writable()
    checkpoint = provenance.checkpoint_files(config.model.pretrained, config.model.revision)
    todo = [run for run in runs if not store.is_finished(run.run_id, checkpoint)]
    if not todo:
        store.begin(config.name, config.model_dump(), map(_grid_line, runs))
        console.print(f"All {len(runs)} runs are finished already.", highlight=False)
        return Outcome(len(runs), skipped=len(runs), failed=0)
    task_manager = check_tasks(config, task_manager)
    for task in unscorable(config, task_manager):
        console.print(f"{task} is {scores.NOT_SCORABLE}; without its score, rows have no relative average.", highlight=False)
    model = _load_model(config.model, load)
    _check_layers(config.model, model)
    check_methods(model, todo)
    model.on_prompt = Keeper(ImageStore(output), config.gallery) if config.gallery else None
    store.begin(config.name, config.model_dump(), map(_grid_line, runs))
    with _sharing(config, model, todo, console) as shared:
        files = provenance.checkpoint_files(config.model.pretrained, config.model.revision)
        sweep = _Sweep(config, store, model, task_manager, files, shared)
        failed = _run_all(sweep, runs, {run.run_id for run in todo}, console)
    return Outcome(len(runs), skipped=len(runs) - len(todo), failed=failed)


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


@dataclass(frozen=True)
class _Sweep:
    config: SweepConfig
    store: Store
    model: Any
    task_manager: Any
    checkpoint: dict[str, Any]
    shared: Any = None  # lmms.shared.SharedRuns, where runs share what precedes their cuts


def _grid_line(run: Run) -> dict[str, Any]:
    """What the report needs to know of a run that may not have happened."""
    fields = ("key", "run_id", "label", "method", "pruning_rate", "seed", "changed", "asked_rate", "iso_layer")
    return {name: getattr(run, name) for name in fields} | {"parameters": run.config["parameters"]}


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


@contextmanager
def _sharing(config: SweepConfig, model: Any, todo: Sequence[Run], console: Console) -> Iterator[Any]:
    """Answers computed for all of `todo` together, or None where the file does not ask for it or nothing can be shared."""
    if not config.share_prefix or len(todo) < 2:
        yield None
        return
    from vlm_pruner_eval.lmms.shared import Configuration, SharedRuns

    console.print(
        f"{len(todo)} runs share images, vision tower and the layers before their first cuts, so their times are not reported; the first "
        "run that is started answers for all. Sampled answers and log-likelihoods are not shared.",
        highlight=False,
    )
    with SharedRuns(model, {run.run_id: Configuration(run.method, run.pruning_rate, run.params) for run in todo}) as shared:
        yield shared


def _run_all(sweep: _Sweep, runs: list[Run], todo: set[str], console: Console) -> int:
    failed = 0
    with SweepProgress(console, len(runs)) as progress:
        for run in runs:
            if run.run_id not in todo:
                progress.end(run.key, "finished before, skipped")
                continue
            progress.start(run.key)
            problem = _run_one(sweep, run)
            failed += problem is not None
            progress.finished(run.key, "finished" if problem is None else f"FAILED: {problem}")
    return failed


def _run_one(sweep: _Sweep, run: Run) -> str | None:
    """Evaluate and record one run; returns what went wrong, in one sentence, or None."""
    started, problem, trace, evaluated = time.time(), None, None, {}
    sweep.model.configure(method=run.method, pruning_rate=run.pruning_rate, **run.params)
    if sweep.shared is not None:
        sweep.model.source = sweep.shared.source(run.run_id)
    try:
        evaluated = _evaluate(sweep, run)
    except (Exception, SystemExit) as error:  # whatever a task or a model raises costs one run, not the sweep: it is recorded below
        problem, trace = f"{type(error).__name__}: {error}".strip(), traceback.format_exc()
    scored = evaluated.get("scored", {})
    samples = _samples(sweep.model.answers, evaluated.get("logged", {}), scored)
    failed = records.failures(samples)
    if failed:
        first = failed[0]
        problem = f"{len(failed)} of {len(samples)} samples failed (first: {first['task']}, document {first['doc_id']}: {first['error']})"
    elif problem is None:
        problem = " ".join(records.missing_answers(samples, evaluated["logged"])) or None
    benchmarks = evaluated.get("benchmarks", {})
    is_shared = sweep.shared is not None and run.run_id in sweep.shared.replayed
    times = records.summarise_times(samples) | {"total_s": time.time() - started}
    memory = records.summarise_memory(samples, sweep.model.describe())
    record = {
        "run_id": run.run_id,
        "status": FINISHED if problem is None else FAILED,
        "problem": problem,
        "traceback": trace,
        **_grid_line(run),
        "config": run.config,
        "tasks": {task: result.record for task, result in benchmarks.items()},
        "documents": documents.fingerprints(evaluated.get("logged", {})),
        "tokens": records.summarise_tokens(samples),
        "times": records.without_times(times) if is_shared else times,
        "memory": memory | {"peak_bytes": None} if is_shared else memory,
        "shared_prefix": is_shared,
        "kept_digest": records.run_digest(samples),
        "n_answers": len(samples),
        "failures": failed[:50],
        "provenance": provenance.collect(sweep.model.describe(), sweep.checkpoint),
    }
    sweep.store.write_run(record, samples, {task: result.draws for task, result in benchmarks.items() if result.draws is not None})
    return problem


def _evaluate(sweep: _Sweep, run: Run) -> dict[str, Any]:
    """One lmms-eval evaluation: scores by task and by benchmark, and logged samples by task.

    Tasks are loaded afresh for every run, because some of them keep state between evaluations in their module (OCRBench adds
    each run's points to the last run's).
    """
    from lmms_eval.evaluator import simple_evaluate

    tasks: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    for name in sweep.config.tasks:  # one by one: lmms-eval reverses the order of a list
        leaves = _leaves(sweep.task_manager.load_task_or_group([name], "chat"))
        tasks |= leaves
        groups[name] = list(leaves)
    seed = sweep.config.seed
    # Aggregations that write submission files read output_path from here; without it they write into the current folder.
    cli_args = argparse.Namespace(output_path=str(sweep.store.run_dir(run.run_id)), process_with_media=False, reasoning_tags=None)
    with _no_bars():
        results = simple_evaluate(
            model=sweep.model,
            tasks=list(tasks.values()),
            task_manager=sweep.task_manager,
            limit=sweep.config.limit,
            batch_size=sweep.config.model.batch_size,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            cli_args=cli_args,
            datetime_str=time.strftime("%Y%m%d_%H%M%S"),
        )
    logged = {name: results["samples"][name] for name in tasks}
    images: dict[str, dict[Any, Sequence[str]]] = {name: {} for name in tasks}
    for answer in sweep.model.answers:
        images[answer.task][answer.doc_id] = answer.images
    scored = {name: scores.score_task(name, results["results"][name], logged[name], task, images[name]) for name, task in tasks.items()}
    return {"scored": scored, "benchmarks": _by_benchmark(scored, groups), "logged": logged}


def _by_benchmark(scored: dict[str, scores.Scored], groups: dict[str, list[str]]) -> dict[str, scores.Scored]:
    """Groups that are one benchmark become one score, so that their many tasks don't outweigh the others; other groups are spelled out."""
    folded: dict[str, scores.Scored] = {}
    for name, members in groups.items():
        of_members = {member: scored[member] for member in members}
        folded |= {name: scores.score_group(of_members)} if name in scores.BENCHMARK_GROUPS else of_members
    return folded


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hold back the bars that lmms-eval draws whatever TQDM_DISABLE says: they would tear the sweep's own progress apart."""
    from lmms_eval import evaluator

    original = evaluator.tqdm
    evaluator.tqdm = lambda *args, **kwargs: original(*args, **kwargs | {"disable": True})
    try:
        yield
    finally:
        evaluator.tqdm = original


def _leaves(loaded: dict[Any, Any]) -> dict[str, Any]:
    """Tasks by name out of lmms-eval's nested groups."""
    tasks: dict[str, Any] = {}
    for name, value in loaded.items():
        if isinstance(value, dict):
            tasks |= _leaves(value)
        else:
            tasks[str(name)] = value[1] if isinstance(value, tuple) else value
    return tasks


def _samples(answers: Iterable[Any], logged: dict[str, list[dict[str, Any]]], scored: dict[str, scores.Scored]) -> list[dict[str, Any]]:
    """One mapping per answer (or choice that was scored), with the document's target, metric items and score where the run got so far."""
    rows = {(task, row["doc_id"]): row for task, listed in logged.items() for row in listed}
    samples = []
    for answer in answers:
        sample = answer.as_json()
        row = rows.get((sample["task"], sample["doc_id"]))
        if row is not None:
            sample |= {"target": row["target"], "metrics": _items(row)}
        if sample["task"] in scored:
            sample["score"] = scored[sample["task"]].documents.get(sample["doc_id"])
        samples.append(sample)
    return sorted(samples, key=lambda sample: (sample["task"], sample["doc_id"], sample.get("choice") or 0))


def _items(row: dict[str, Any]) -> dict[str, Any]:
    """The metric items of a logged sample: what is left after lmms-eval's own keys."""
    own = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input_media", "submission"}
    return {key: value for key, value in row.items() if key not in own}
