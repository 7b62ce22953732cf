"""Needs of a sweep on its machine: a GPU, attention backends, the hub, and room on disks."""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding
from vlm_pruner_eval.redact import of_error, sentence

GB = 1e9
LITTLE_CACHE_GB, LITTLE_OUTPUT_GB = 40, 2
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
LOGIN = "Log in by `hf auth login`, or set HF_TOKEN."
HUB_TIMEOUT_S = 2.0
_PROBE_BYTES = 1_000_000
_QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.used,memory.total", "--format=csv,noheader")
_DRIVER_TIMEOUT_S = 20


# ---- devices
def devices() -> Iterator[Finding]:
    """Yield the driver's GPUs, and those that torch can use."""
    gpus, problem = _driver()
    if gpus:
        yield Finding("driver", OK, "; ".join(gpus))
    elif problem:
        fix = "If this machine has a GPU, see to its driver."
        yield Finding("driver", WARN, f"nvidia-smi is there, but {problem}", fix)
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
    """Return a line per GPU from nvidia-smi; or the reason why it gives none ("" if it is not installed)."""
    if shutil.which(_QUERY[0]) is None:
        return [], ""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_DRIVER_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"can't be run ({of_error(error)})"
    if done.returncode != 0:
        return [], f"ends with code {done.returncode}: {(done.stdout + done.stderr).strip()}"
    lines = [line.rsplit(", ", 3) for line in done.stdout.splitlines() if line.count(", ") >= 3]
    gpus = [f"{name}, driver {driver}, {used} of {whole} in use" for name, driver, used, whole in lines]
    return gpus, "lists no GPU"


def _no_gpu(has_driver: bool, version: str, cuda: str | None) -> Finding:
    built = f"torch {version}, built for " + (f"CUDA {cuda}" if cuda else "no CUDA")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not has_driver:
        fix = "Checkpoints of 7B parameters need a GPU; the embedded benchmark does not."
        return Finding("GPU", WARN, f"none ({built}, {os.cpu_count()} CPU cores)", fix)
    if hidden is not None and hidden.split(",")[0].strip() in ("", "-1"):
        found = f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}"
        return Finding("GPU", WARN, found, "Unset CUDA_VISIBLE_DEVICES to use it.")
    fix = "Install a build with CUDA, as pytorch.org/get-started says for this system: torch and torchvision together."
    if cuda:
        fix = f"Update the driver to one that can do CUDA {cuda}, or install torch for an older CUDA."
    return Finding("GPU", FAIL, f"the driver has one, but torch can't use it ({built})", fix)


# ---- the hub
def offline_switches() -> list[str]:
    """Environment variables that are set and forbid downloads."""
    return [name for name in OFFLINE if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}]


def hub() -> Iterator[Finding]:
    """Token, offline switches, and the hub's answer; the token itself is never shown."""
    from huggingface_hub import constants, get_token

    if offline := offline_switches():
        fix = f"Unset {', '.join(offline)} to download, or put checkpoints and data sets into the cache before."
        yield Finding("hub", WARN, f"nothing is downloaded: {', '.join(offline)} set", fix)
    else:
        yield _reached(constants.ENDPOINT)
    if get_token():
        yield Finding("hub token", OK, "there")
    else:
        yield Finding("hub token", WARN, "none; gated checkpoints and most of lmms-eval's data sets ask for one", LOGIN)


def _reached(endpoint: str) -> Finding:
    """Ask the hub for the head of its front page: an answer of any kind shows that it can be reached."""
    parts = urlsplit(endpoint)
    url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # without name and password
    answered: list[str] = []
    asking = threading.Thread(target=lambda: answered.append(_head(url)), daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_S)  # the look-up of a name has no time-out of its own
    problem = answered[0] if answered else "no answer"
    if not problem:
        return Finding("hub", OK, f"{parts.hostname} answers, and downloads are allowed")
    fix = "Connect, or set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 if all files are in the cache."
    return Finding("hub", WARN, f"{parts.hostname} can't be reached within {HUB_TIMEOUT_S:.0f} s ({problem})", fix)


def _head(url: str) -> str:
    """Reason why a server did not answer; empty if it did."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return sentence(str(error))


# ---- disks
def checkpoint_cache() -> Path:
    """Folder of the hub's checkpoints."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def data_cache() -> Path:
    """Folder in which lmms-eval has data sets prepared: a variable of its own goes before the one of `datasets`."""
    from datasets import config

    own = os.path.expandvars(os.environ.get("LMMS_EVAL_DATASETS_CACHE", "").strip())
    return Path(own or config.HF_DATASETS_CACHE).expanduser()


def caches() -> Iterator[Finding]:
    """Folders for checkpoints and data sets."""
    other = "set {} (or HF_HOME, for both caches) to another folder"
    yield _room("checkpoint cache", checkpoint_cache(), LITTLE_CACHE_GB, other.format("HF_HUB_CACHE"))
    yield _room("data set cache", data_cache(), LITTLE_CACHE_GB, other.format("HF_DATASETS_CACHE"))


def output(folder: Path) -> Iterator[Finding]:
    """The results directory."""
    yield _room("results", folder, LITTLE_OUTPUT_GB, "choose another folder with --output")


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that need not exist yet."""
    return shutil.disk_usage(_nearest(folder)).free


def _nearest(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def _room(name: str, folder: Path, little_gb: float, otherwise: str) -> Finding:
    """Test by writing: permissions don't tell of quotas, full disks and read-only mounts."""
    try:
        free_gb = free_bytes(folder) / GB
        with tempfile.TemporaryFile(dir=_nearest(folder)) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return Finding(name, FAIL, f"{folder} can't be written ({error.strerror})", f"Mend that, or {otherwise}.")
    if free_gb < little_gb:
        fix = f"Free some, or {otherwise}: {little_gb:g} GB are no luxury."
        return Finding(name, WARN, f"{folder}, {free_gb:.1f} GB free", fix)
    return Finding(name, OK, f"{folder}, {free_gb:.0f} GB free")
