"""GPUs that torch can use, and attention backends that transformers can."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator

from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding
from vlm_pruner_eval.shown import of_error

GB = 1e9
_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.used,memory.total", "--format=csv,noheader")
_PATIENCE_S = 20


def devices() -> Iterator[Finding]:
    """The driver's GPUs, and those that torch can use."""
    gpus, problem = _driver()
    if gpus:
        yield Finding("driver", OK, "; ".join(gpus))
    elif problem:
        yield Finding("driver", WARN, f"nvidia-smi is there, but {problem}", "If this machine has a GPU, see to its driver.")
    import torch

    if not torch.cuda.is_available():
        yield _no_gpu(bool(gpus), torch.__version__, torch.version.cuda)
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        capability = f"compute capability {about.major}.{about.minor}"
        yield Finding(f"cuda:{index}", OK, f"{about.name}, {about.total_memory / GB:.0f} GB, {capability}, {built}")


def _driver() -> tuple[list[str], str]:
    """A line per GPU from nvidia-smi; or why it gives none ("" where it is not installed)."""
    if shutil.which(_QUERY[0]) is None:
        return [], ""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"can't be run ({of_error(error)})"
    if done.returncode != 0:
        return [], f"ends with code {done.returncode}: {(done.stdout + done.stderr).strip()}"
    gpus = [line.rsplit(", ", 3) for line in done.stdout.splitlines() if line.count(", ") >= 3]
    return [f"{name}, driver {driver}, {used} of {whole} in use" for name, driver, used, whole in gpus], "lists no GPU"


def _no_gpu(has_driver: bool, version: str, cuda: str | None) -> Finding:
    built = f"torch {version}, built for " + (f"CUDA {cuda}" if cuda else "no CUDA")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if has_driver and hidden is not None and hidden.split(",")[0].strip() in ("", "-1"):
        return Finding("GPU", WARN, f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "Unset CUDA_VISIBLE_DEVICES to use it.")
    if has_driver and not cuda:
        fix = "Install a build with CUDA, as pytorch.org/get-started says for this system: torch and torchvision together."
        return Finding("GPU", FAIL, f"the driver has one, but {built}", fix)
    if has_driver:
        fix = f"Update the driver to one that can do CUDA {cuda}, or install torch for an older CUDA; see CUDA_VISIBLE_DEVICES, too."
        return Finding("GPU", FAIL, f"the driver has one, but torch can't use it ({built})", fix)
    fix = "Checkpoints of 7B parameters need a GPU; the embedded benchmark does not."
    return Finding("GPU", WARN, f"none ({built}, {os.cpu_count()} CPU cores)", fix)


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
    if importlib.util.find_spec("flash_attn") is None:
        return
    fix = "Use attn_implementation sdpa, or install a flash-attn that matches torch and the GPU."
    try:
        importlib.import_module("flash_attn")
    except Exception as error:  # built for another torch: symbols that do not exist, libraries that can't be loaded
        yield Finding("flash_attn", WARN, f"can't be imported ({of_error(error)})", fix)
        return
    if not is_flash_attn_2_available():
        yield Finding("flash_attn", WARN, "is installed, but transformers can't use it", fix)
