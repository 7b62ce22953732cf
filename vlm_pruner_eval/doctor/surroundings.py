"""What a sweep needs of its machine: devices, attention kernels, the hub, disks."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding

GB = 1e9
LITTLE_CACHE_GB, LITTLE_OUTPUT_GB = 40, 2
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
TRUE = {"1", "ON", "YES", "TRUE"}


def devices() -> Iterator[Finding]:
    """GPUs that torch can use."""
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            found = (
                f"{about.name}, {about.total_memory / GB:.0f} GB, compute capability {about.major}.{about.minor}, CUDA {torch.version.cuda}"
            )
            yield Finding(f"cuda:{index}", OK, found)
        return
    built = f"torch {torch.__version__}, built for " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA")
    has_driver = shutil.which("nvidia-smi") is not None
    if has_driver and not torch.version.cuda:
        yield Finding(
            "GPU", FAIL, f"a driver is there, but {built}", "Install a CUDA build: pip install --force-reinstall torch torchvision."
        )
    elif has_driver:
        fix = "See what nvidia-smi says: the driver may be older than this CUDA, or CUDA_VISIBLE_DEVICES hides all GPUs."
        yield Finding("GPU", FAIL, f"a driver is there, but torch can't use it ({built})", fix)
    else:
        fix = "Checkpoints of 7B parameters need a GPU; the embedded benchmark does not."
        yield Finding("GPU", WARN, f"none ({built}, {os.cpu_count()} CPU cores)", fix)


def attention() -> Iterator[Finding]:
    """Attention backends that transformers offers here; every method works with each."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    kernels = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
    }
    enabled = ", ".join(name for name, is_on in kernels.items() if is_on)
    yield Finding("attention", OK, f"eager; sdpa (kernels: {enabled})" + ("; flash_attention_2" if is_flash_attn_2_available() else ""))
    if importlib.util.find_spec("flash_attn") is not None and not is_flash_attn_2_available():
        fix = "Use attn_implementation=sdpa, or install a flash-attn that matches torch and the GPU."
        yield Finding("flash_attn", WARN, "is installed, but transformers can't use it", fix)


def hub() -> Iterator[Finding]:
    """Token and offline switches; the token itself is never shown."""
    from huggingface_hub import constants, get_token

    offline = [name for name in OFFLINE if os.environ.get(name, "").upper() in TRUE]
    if offline:
        fix = f"Unset {', '.join(offline)} to download, or put checkpoints and data sets into the cache before."
        yield Finding("hub", WARN, f"nothing is downloaded: {', '.join(offline)} set", fix)
    else:
        yield Finding("hub", OK, f"downloads are allowed, from {constants.ENDPOINT}")
    if get_token():
        yield Finding("hub token", OK, "there")
    else:
        fix = "For gated checkpoints and lmms-eval's private data sets: `hf auth login`, or set HF_TOKEN."
        yield Finding("hub token", WARN, "none", fix)


def caches() -> Iterator[Finding]:
    """Folders for checkpoints and data sets: can they be written, and how much fits."""
    from datasets import config as datasets_config
    from huggingface_hub import constants

    for name, folder in (("checkpoint cache", Path(constants.HF_HUB_CACHE)), ("data set cache", Path(datasets_config.HF_DATASETS_CACHE))):
        variable = "HF_HUB_CACHE" if name == "checkpoint cache" else "HF_DATASETS_CACHE"
        yield from _room(name, folder, LITTLE_CACHE_GB, f"Free some, or set {variable} to a folder on a larger disk.")


def output(folder: Path) -> Iterator[Finding]:
    """The results directory."""
    yield from _room("results", folder, LITTLE_OUTPUT_GB, "Free some, or choose another folder with --output.")


def _room(name: str, folder: Path, little_gb: float, fix: str) -> Iterator[Finding]:
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free / GB
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        yield Finding(name, FAIL, f"{folder} can't be written ({error.strerror})", "Change its permissions, or choose another folder.")
        return
    if free < little_gb:
        yield Finding(name, WARN, f"{folder}, {free:.1f} GB free", fix)
    else:
        yield Finding(name, OK, f"{folder}, {free:.0f} GB free")
