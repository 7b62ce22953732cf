"""Tools of every benchmark: the machine, turns and times, the most memory of a call, and the file of the result."""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

import vlm_pruner_eval
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.provenance import command_line, processor
from vlm_pruner_eval.timing import median_iqr

T = TypeVar("T")
ROUNDS = 3  # over all cases of a benchmark
_MOST_THREADS = 1024
HOW_MEMORY = {
    "cpu": "running sum of torch's CPU allocations and frees during one call, from "
    "torch.profiler(profile_memory=True); buffers that BLAS libraries take for themselves are not in it",
    "cuda": "torch.cuda.max_memory_allocated over one call, less what was allocated before it",
}


# ---- the machine
def machine(dtype: torch.dtype, used: Sequence[torch.device]) -> dict[str, Any]:
    """Return the fields that every benchmark's JSON starts with."""
    versions = {"vlm_pruner_eval": vlm_pruner_eval.__version__, "python": platform.python_version()}
    versions |= {"torch": torch.__version__, "transformers": metadata.version("transformers")}
    return {
        "device": {str(device): processor(str(device)) for device in used},
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "command": command_line(),
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with `count` CPU threads while the context is open.

    Raises
    ------
    ConfigError
        Fewer than one, or more than any machine has.
    """
    if not 1 <= count <= _MOST_THREADS:
        raise ConfigError(f"--threads: got {count}, expected 1 to {_MOST_THREADS}.")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tell(line: str) -> None:
    """Print progress; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


# ---- times
def call_ms(call: Callable[[], object]) -> float:
    """Milliseconds of one call, until the GPU has done what it was asked."""
    start = _synchronised_ms()
    call()
    return _synchronised_ms() - start


def _synchronised_ms() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() * 1e3


def take_turns(calls: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Results of every call, made `repeats` times in turns: a slow moment of the machine meets all of them.

    Every second turn goes backwards: what follows another reading of the same tensors finds them in the cache.
    """
    results: dict[str, list[T]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in reversed(calls) if turn % 2 else calls:
            results[name].append(calls[name]())
    return results


def summary(rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Summarise times of several rounds, in milliseconds.

    Returns
    -------
    dict
        `ms`, the median of the rounds' medians; `rounds_ms`, these; `noise`, their spread as a share of it; `iqr_ms`
        and `best_ms`, the interquartile range and the least of all times.
    """
    medians = [median(times) for times in rounds]
    every = [time for times in rounds for time in times]
    middle = median(medians)
    noise = (max(medians) - min(medians)) / middle
    return {"ms": middle, "iqr_ms": median_iqr(every)[1], "best_ms": min(every), "rounds_ms": medians, "noise": noise}


# ---- memory
def free_bytes(device: torch.device) -> int:
    """Bytes that can be had on a device now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes at the highest point of a call beyond those before it, answer included; one unmeasured call comes first."""
    call()
    if device.type != "cuda":
        return max(0, *accumulate(_allocations(call)))
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _allocations(call: Callable[[], object]) -> list[int]:
    """Bytes that a call takes (positive) and gives back (negative) on the CPU, in the order of time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    if not memory:
        raise RuntimeError("torch.profiler recorded no allocation on the CPU; measure with another build of torch.")
    return [event["args"]["Bytes"] for event in sorted(memory, key=lambda event: event["ts"])]
