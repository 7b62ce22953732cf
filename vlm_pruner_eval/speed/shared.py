"""How much time a sweep saves when its runs share what precedes their first cuts: the same grid both ways, in one process."""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.config import SweepConfig

_TIMES = ("prefill_ms", "decode_ms", "peak_bytes")  # of a sample; all else must be equal


def bench_shared(
    config: SweepConfig, rounds: int = 3, *, task_manager: Any = None, progress: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run a grid in both ways, in turns, with one loaded model, and compare what they wrote.

    Both ways start from an empty folder and do everything that a sweep does: loading tasks, scoring, resampling, writing.

    Parameters
    ----------
    task_manager
        Replaces lmms-eval's task index.
    progress
        Told of every sweep as it ends.

    Returns
    -------
    dict
        `rounds`: of each, wall and processor seconds of both ways; `ratio` and `cpu_ratio`: shared over separate, the median of the
        rounds' ratios; `different`: samples and scores of runs that are not the same in both ways, in all rounds; `failed`: runs.

    Raises
    ------
    ConfigError
        What the sweep refuses, and fewer than one round.
    """
    if rounds < 1:
        raise ConfigError(f"--rounds: got {rounds}, expected 1 or more.")
    import torch

    from vlm_pruner_eval.speed.machine import machine
    from vlm_pruner_eval.sweep.opening import check_tasks

    task_manager, load = check_tasks(config, task_manager), _once()
    _warm_up(config, load, task_manager)
    model, found, compared = load(), [], []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            ways = ("separate", "shared") if number % 2 == 0 else ("shared", "separate")
            timed = {way: _timed(config, Path(folder) / way, way, load, task_manager) for way in ways}
            compared.append(_compared(config, Path(folder) / "separate", Path(folder) / "shared"))
        found.append(timed)
        progress(f"round {number + 1}: separate {timed['separate']['wall_s']:.0f} s, shared {timed['shared']['wall_s']:.0f} s")
    return {
        "benchmark": "shared",
        **machine(model.dtype, [torch.device(model.device)]),
        "config": config.name,
        "limit": config.limit,
        "batch_size": config.model.batch_size,
        "runs": compared[0]["runs"],
        "samples": compared[0]["samples"],
        "ratio": statistics.median(timed["shared"]["wall_s"] / timed["separate"]["wall_s"] for timed in found),
        "cpu_ratio": statistics.median(timed["shared"]["cpu_s"] / timed["separate"]["cpu_s"] for timed in found),
        "different": sum(one["different"] for one in compared),
        "failed": sum(timed[way]["failed"] for timed in found for way in timed),
        "rounds": found,
    }


def _once() -> Callable[..., Any]:
    """A loader that hands the same model out every time: loading is no part of what is compared."""
    loaded: list[Any] = []

    def load(*args: object, **kwargs: object) -> Any:
        from vlm_pruner_eval.lmms.wrapper import load as load_model

        if not loaded:
            loaded.append(load_model(*args, **kwargs))
        return loaded[0]

    return load


def _warm_up(config: SweepConfig, load: Callable[..., Any], task_manager: Any) -> None:
    """Two runs of one question, so that neither way pays for what happens once in a process."""
    short = config.model_copy(update={"limit": 1, "methods": config.methods[:1], "pruning_rates": config.rates[:1], "keep_tokens": None})
    with tempfile.TemporaryDirectory() as folder:
        _timed(short, Path(folder), "shared", load, task_manager)


def _timed(config: SweepConfig, output: Path, way: str, load: Callable[..., Any], task_manager: Any) -> dict[str, float]:
    from rich.console import Console

    from vlm_pruner_eval.sweep.runner import run_sweep

    asked = config.model_copy(update={"share_prefix": way == "shared"})
    wall, cpu = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(sys.stderr):
        outcome = run_sweep(asked, output, console=Console(file=io.StringIO()), load=load, task_manager=task_manager)
    return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "failed": outcome.failed}


def _compared(config: SweepConfig, separate: Path, shared: Path) -> dict[str, int]:
    """Runs, samples, and how many of these differ in anything but times; a run whose scores differ counts as one more."""
    from vlm_pruner_eval.sweep.grid import expand
    from vlm_pruner_eval.sweep.store import Store

    counts = {"runs": 0, "samples": 0, "different": 0}
    for run in expand(config):
        stores = Store(separate), Store(shared)
        pairs = [list(map(_without_times, store.each_sample(run.run_id))) for store in stores]
        scores = [store.read(run.run_id)["tasks"] for store in stores]
        counts["runs"] += 1
        counts["samples"] += len(pairs[0])
        counts["different"] += abs(len(pairs[0]) - len(pairs[1])) + sum(one != other for one, other in zip(*pairs, strict=False))
        counts["different"] += scores[0] != scores[1]
    return counts


def _without_times(sample: dict[str, Any]) -> dict[str, Any]:
    record = sample["record"] and {name: value for name, value in sample["record"].items() if name != "selection_ms"}
    return {name: value for name, value in sample.items() if name not in _TIMES} | {"record": record}
