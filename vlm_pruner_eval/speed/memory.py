"""The most memory that a call takes beyond what was there before, and what is free: on a CPU and on a GPU."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

HOW = {
    "cpu": "running sum of torch's CPU allocations and frees during one call, from torch.profiler(profile_memory=True); "
    "buffers that BLAS libraries take for themselves are not in it",
    "cuda": "torch.cuda.max_memory_allocated over one call, less what was allocated before it",
}


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes at the highest point of the call, its answer included; the call is made once before, unmeasured."""
    call()
    return _peak_on_gpu(call, device) if device.type == "cuda" else _peak_on_cpu(call)


def _peak_on_gpu(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if _is_cpu_memory(event))
    if not changes:
        raise RuntimeError("torch.profiler recorded no allocation on the CPU; this build of torch can't measure memory, use another.")
    return highest(change for _, change in changes)


def _is_cpu_memory(event: dict) -> bool:
    return event.get("name") == "[memory]" and event["args"]["Device Type"] == 0


def highest(changes: Iterable[int]) -> int:
    """The highest running sum, at least 0."""
    total = top = 0
    for change in changes:
        total += change
        top = max(top, total)
    return top


def free_bytes(device: torch.device) -> int:
    """Bytes that can be had on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = next(line for line in meminfo.read_text(encoding="utf-8").splitlines() if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024
