"""`bench shared`: time that a sweep saves when its runs share a prefix: one grid in both ways, in one process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.store.answers import Answer
from vlm_pruner_eval.sweep.config import SweepConfig


def bench_shared(config: SweepConfig, rounds: int = 3, *, task_manager: Any = None) -> dict[str, Any]:
    """Run a grid in both ways, in turns, with one loaded model, and compare what they wrote.

    Both ways start from an empty folder and do all that a sweep does: loading tasks, scoring, resampling, writing.

    Parameters
    ----------
    task_manager
        Replaces lmms-eval's task index.

    Returns
    -------
    dict
        `rounds`: of each, wall and processor seconds of both ways; `ratio` and `cpu_ratio`: shared over separate, the
        median of the rounds' ratios; `different`: samples and scores of runs that are not the same in both ways, in all
        rounds; `failed`: runs.

    Raises
    ------
    ConfigError
        A refusal of the sweep, and fewer than one round.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds: got {rounds}, expected 1 or more.")
    import torch

    from vlm_pruner_eval.speed.measuring import machine, tell
    from vlm_pruner_eval.sweep.opening import check_tasks

    models, load = loaded_once()
    run = functools.partial(_run, config, load=load, task_manager=check_tasks(config, task_manager))
    with tempfile.TemporaryDirectory() as folder:
        # two runs of one question, so that neither way pays for what happens once in a process
        few = {"limit": 1, "methods": config.methods[:1], "pruning_rates": config.rates[:1], "keep_tokens": None}
        run(Path(folder), share_prefix=True, **few)
    timed = []
    compared = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            ways = {"separate": False, "shared": True}
            order = [*ways] if number % 2 == 0 else [*reversed(ways)]
            timed.append({way: run(Path(folder) / way, share_prefix=ways[way]) for way in order})
            compared.append(_compare(config, *(Path(folder) / way for way in ways)))
        seconds = ", ".join(f"{way} {timed[-1][way]['wall_s']:.0f} s" for way in ways)
        tell(f"round {number + 1}: {seconds}")
    return {
        "benchmark": "shared",
        **machine(models[0].dtype, [torch.device(models[0].device)]),
        "config": config.name,
        "limit": config.limit,
        "batch_size": config.model.batch_size,
        "runs": compared[0]["runs"],
        "samples": compared[0]["samples"],
        "ratio": statistics.median(each["shared"]["wall_s"] / each["separate"]["wall_s"] for each in timed),
        "cpu_ratio": statistics.median(each["shared"]["cpu_s"] / each["separate"]["cpu_s"] for each in timed),
        "different": sum(counts["different"] for counts in compared),
        "failed": sum(each[way]["failed"] for each in timed for way in each),
        "rounds": timed,
    }


def loaded_once() -> tuple[list[Any], Callable[..., Any]]:
    """Return a loader that hands the same model out every time, as loading is no part of a comparison, and the list that holds it."""
    from vlm_pruner_eval.lmms.families import load as load_model

    models: list[Any] = []

    def load(*args: object, **kwargs: object) -> Any:
        if not models:
            models.append(load_model(*args, **kwargs))
        return models[0]

    return models, load


def _run(
    config: SweepConfig,
    output: Path,
    *,
    load: Callable[..., Any],
    task_manager: Any,
    **changes: object,
) -> dict[str, float]:
    """Wall and processor seconds of one sweep, and its failed runs."""
    from rich.console import Console

    from vlm_pruner_eval.sweep.runner import run_sweep

    wall = time.perf_counter()
    cpu = time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        silent = Console(file=io.StringIO())
        asked = config.model_copy(update=changes)
        outcome = run_sweep(asked, output, console=silent, load=load, task_manager=task_manager)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "failed": outcome.failed}


def _compare(config: SweepConfig, separate: Path, shared: Path) -> dict[str, int]:
    """Count runs, samples, and those that differ in more than times; a unit whose scores differ counts as one more."""
    from vlm_pruner_eval.store.folder import Store
    from vlm_pruner_eval.sweep.grid import expand
    from vlm_pruner_eval.sweep.units import units_of

    runs = expand(config)
    counts = {"runs": len(runs), "samples": 0, "different": 0}
    stores = (Store(separate), Store(shared))
    for unit in units_of(config, runs):
        stored = [unit.stored(store) for store in stores]
        one, other = ({(answer.task, answer.doc_id, answer.choice): _alone(answer) for answer in each.answers()} for each in stored)
        counts["samples"] += len(one)
        counts["different"] += sum(one.get(key) != other.get(key) for key in one.keys() | other.keys())
        counts["different"] += stored[0].read().scores != stored[1].read().scores
    return counts


def _alone(answer: Answer) -> Answer:
    """An answer without times and batch size, which differ as runs decode together."""
    return dataclasses.replace(answer.untimed(), batch_size=None)
