"""One run through lmms-eval: its tasks loaded afresh, the loaded model's answers scored, and one sample for every answer."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_pruner_eval.sweep import aggregations, scores
from vlm_pruner_eval.sweep.config import SweepConfig


@dataclass(frozen=True)
class Evaluated:
    """Scores by task and by benchmark, and lmms-eval's logged samples by task.

    Attributes
    ----------
    unscored
        Of tasks whose aggregation failed: a sentence each, with the traceback.
    """

    scored: dict[str, scores.Scored] = field(default_factory=dict)
    benchmarks: dict[str, scores.Scored] = field(default_factory=dict)
    logged: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    unscored: dict[str, str] = field(default_factory=dict)


def evaluate(model: Any, config: SweepConfig, task_manager: Any, folder: Path) -> Evaluated:
    """One lmms-eval evaluation of a model as it is configured; tasks that write files write them into `folder`.

    Tasks are loaded afresh for every run, because some of them keep state between evaluations in their module (OCRBench adds
    each run's points to the last run's).
    """
    with contextlib.redirect_stdout(sys.stderr):  # tasks print tables and notices, and a sweep's stdout is for programs
        tasks, groups = _load_tasks(config, task_manager)
        aggregations.guard(tasks)
        results = _simple_evaluate(model, config, task_manager, tasks, folder)
        logged = {name: results["samples"][name] for name in tasks}
        images: dict[str, dict[Any, Sequence[str]]] = {name: {} for name in tasks}
        for answer in model.answers:
            images[answer.task][answer.doc_id] = answer.images
        scored = {name: scores.score_task(name, results["results"][name], logged[name], task, images[name]) for name, task in tasks.items()}
    failed = {problem: trace for name, task in tasks.items() for problem, trace in aggregations.failures(name, task)}
    return Evaluated(scored, _by_benchmark(scored, groups), logged, failed)


def answer_only(model: Any, config: SweepConfig, task_manager: Any, folder: Path) -> Evaluated:
    """The same up to the last answer: of several processes that answer a run together, only one scores it."""
    with contextlib.redirect_stdout(sys.stderr):  # as in `evaluate`
        tasks, _ = _load_tasks(config, task_manager)
        with _until_answered(model):
            _simple_evaluate(model, config, task_manager, tasks, folder)
    return Evaluated()


class _Answered(Exception):
    """All requests have their answers."""


@contextmanager
def _until_answered(model: Any) -> Iterator[None]:
    """Leave an evaluation where lmms-eval calls `clean`, which it does between the last answer and the first score."""

    def leave() -> None:
        raise _Answered

    model.clean = leave  # hides the method of its class
    try:
        yield
    except _Answered:
        return
    finally:
        del model.clean
    raise RuntimeError("lmms-eval scored answers without calling clean() first, as versions 0.7 do; expected such a version.")


def _load_tasks(config: SweepConfig, task_manager: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Tasks by name, and the names that every entry of the sweep file stands for."""
    tasks: dict[str, Any] = {}
    groups: dict[str, list[str]] = {}
    for name in config.tasks:  # one by one: lmms-eval reverses the order of a list
        leaves = _leaves(task_manager.load_task_or_group([name], "chat"))
        tasks |= leaves
        groups[name] = list(leaves)
    return tasks, groups


def _simple_evaluate(model: Any, config: SweepConfig, task_manager: Any, tasks: dict[str, Any], folder: Path) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate

    seed = config.seed
    # Aggregations that write submission files read output_path from here; without it they write into the current folder.
    cli_args = argparse.Namespace(output_path=str(folder), process_with_media=False, reasoning_tags=None)
    with _no_bars():
        return simple_evaluate(
            model=model,
            tasks=list(tasks.values()),
            task_manager=task_manager,
            limit=config.limit,
            batch_size=config.model.batch_size,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            cli_args=cli_args,
            datetime_str=time.strftime("%Y%m%d_%H%M%S"),
        )


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


def samples_of(answers: Iterable[Any], evaluated: Evaluated) -> list[dict[str, Any]]:
    """One mapping per answer (or choice that was scored), with the document's target, metric items and score where the run got so far."""
    scored = evaluated.scored
    rows = {(task, row["doc_id"]): row for task, listed in evaluated.logged.items() for row in listed}
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
