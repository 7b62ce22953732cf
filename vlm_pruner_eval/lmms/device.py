"""Device that a model runs on."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from vlm_pruner_eval.errors import ConfigError


def pick_device(wanted: str | None, accelerator: Accelerator) -> torch.device:
    """Return the device that was asked for; None: this process's GPU, or the CPU if there is none.

    Raises
    ------
    ConfigError
        Text that names no device, a GPU where torch sees none, or another kind than the processes of this run talk on.
    """
    own = accelerator.device if accelerator.device.type == "cuda" else torch.device("cpu")
    if wanted is None:
        return own
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device: got {wanted!r}, expected cpu, cuda or cuda:0 and so on ({error}).") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: got {wanted!r}, but torch sees no GPU here; leave it out, or use cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: got {wanted!r}, but torch sees {torch.cuda.device_count()} GPUs here, counted from 0.")
    if accelerator.num_processes > 1 and device.type != own.type:
        raise ConfigError(
            f"device: got {wanted!r}, but the {accelerator.num_processes} processes of this run talk on {own.type}; leave it out."
        )
    return own if device == torch.device(own.type) else device
