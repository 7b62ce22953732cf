"""The machine that a run was made on: host, processor cores, memory, GPUs with their driver. What can't be found out is None."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

_DRIVER = Path("/proc/driver/nvidia/version")  # also inside containers


def host() -> dict[str, Any]:
    """Name, cores, those of them that this process may use, and bytes of memory."""
    may_use = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"name": platform.node(), "cores": os.cpu_count(), "cores_usable": may_use, "memory_bytes": _memory_bytes()}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not POSIX, or a system without these names
        return None


def gpus(device: str) -> list[dict[str, Any]]:
    """Name, bytes of memory and compute capability of every visible GPU; empty where a run computes elsewhere.

    Asking a GPU takes memory on it, so a run on the CPU does not.
    """
    import torch

    if not device.startswith("cuda"):
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": each.name, "memory_bytes": each.total_memory, "capability": f"{each.major}.{each.minor}"} for each in properties]


def cuda() -> dict[str, Any]:
    """Versions: the CUDA and cuDNN that torch was built with (HIP on AMD), and the driver of the machine."""
    import torch

    return {
        "runtime": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "driver": driver_version(),
    }


def driver_version() -> str | None:
    """Version of the NVIDIA kernel module, for example 550.54.15; None without one."""
    try:
        text = _DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:  # no such driver, or no such file system
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)*)\s", text)
    return found[1] if found else None
