"""One unit through lmms-eval: its tasks loaded afresh, and the loaded model's answers scored."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.metrics import aggregations, scores
from vlm_pruner_eval.sweep.read_once import Held, read_once


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


def evaluate(model: Any, config: SweepConfig, entry: str, task_manager: Any, folder: Path, data_sets: Held) -> Evaluated:
    """Evaluate a model as it is configured on one entry of the sweep file; tasks that write files write them into `folder`.

    Tasks are loaded afresh for every unit, because some of them keep state between evaluations in their module (OCRBench adds
    each run's points to the last run's); not so their data sets, see `read_once`.
    """
    with contextlib.redirect_stdout(sys.stderr):  # tasks print tables and notices, and a sweep's stdout is for programs
        with read_once(data_sets):
            tasks = _leaves(task_manager.load_task_or_group([entry], "chat"))
        aggregations.guard(tasks)
        results = _simple_evaluate(model, config, task_manager, tasks, folder)
        logged = {name: results["samples"][name] for name in tasks}
        images: dict[str, dict[Any, Sequence[str]]] = {name: {} for name in tasks}
        for answer in model.answers:
            images[answer.task][answer.doc_id] = answer.images
        scored = {name: scores.score_task(name, results["results"][name], logged[name], task, images[name]) for name, task in tasks.items()}
    failed = {problem: trace for name, task in tasks.items() for problem, trace in aggregations.failures(name, task)}
    return Evaluated(scored, _by_benchmark(scored, entry), logged, failed)


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


def _by_benchmark(scored: dict[str, scores.Scored], name: str) -> dict[str, scores.Scored]:
    """Fold a group that is one benchmark into one score, so that its tasks don't outweigh the others; other groups are spelled out."""
    return {name: scores.score_group(scored)} if name in scores.BENCHMARK_GROUPS else scored


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
