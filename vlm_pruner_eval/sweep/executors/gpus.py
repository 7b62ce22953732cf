"""The GPUs of this process, and how one of them is given to another."""

from __future__ import annotations

import os

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """Their names in the terms of CUDA_VISIBLE_DEVICES.

    torch asks the driver's library for their number, which does not begin to use CUDA in this process: it would hold memory on a GPU.
    """
    import torch

    given = os.environ.get(_VISIBLE)
    count = torch.cuda.device_count()
    return [name.strip() for name in given.split(",")][:count] if given else [str(index) for index in range(count)]


def only(gpu: str | None) -> dict[str, str]:
    """Environment variables of a process that is to see one GPU, or what this one sees (None)."""
    return {} if gpu is None else {_VISIBLE: gpu}
