"""What a sweep needs of its machine: the hub, and room on disks."""

from __future__ import annotations

import http.client
import os
import shutil
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding
from vlm_pruner_eval.shown import sentence

GB = 1e9
LITTLE_CACHE_GB, LITTLE_OUTPUT_GB = 40, 2
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
TRUE = {"1", "ON", "YES", "TRUE"}
LOGIN = "Log in by `hf auth login`, or set HF_TOKEN."
_PROBE_BYTES = 1_000_000
HUB_TIMEOUT_S = 2.0


def offline_switches() -> list[str]:
    """Environment variables that are set and forbid downloads."""
    return [name for name in OFFLINE if os.environ.get(name, "").upper() in TRUE]


def hub() -> Iterator[Finding]:
    """Token, offline switches, and if the hub answers; the token itself is never shown."""
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
    host = parts.hostname  # without name and password
    answered: list[str] = []
    asking = threading.Thread(target=lambda: answered.append(_head(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")))
    asking.daemon = True  # looking a name up has no time-out of its own
    asking.start()
    asking.join(HUB_TIMEOUT_S)
    problem = answered[0] if answered else "no answer"
    if not problem:
        return Finding("hub", OK, f"{host} answers, and downloads are allowed")
    fix = "Connect, or set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 where all files are in the cache; else every look-up waits."
    return Finding("hub", WARN, f"{host} can't be reached within {HUB_TIMEOUT_S:.0f} s ({problem})", fix)


def _head(url: str) -> str:
    """Why a server did not answer; empty if it did."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError, http.client.HTTPException) as error:
        return sentence(str(error))


def checkpoint_cache() -> Path:
    """Where the hub's checkpoints are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def data_cache() -> Path:
    """Where lmms-eval has data sets prepared: a variable of its own goes before the one of `datasets`."""
    from datasets import config

    return Path(os.path.expandvars(os.environ.get("LMMS_EVAL_DATASETS_CACHE", "").strip()) or config.HF_DATASETS_CACHE).expanduser()


def caches() -> Iterator[Finding]:
    """Folders for checkpoints and data sets: can they be written, and how much fits."""
    for name, folder, variable in (
        ("checkpoint cache", checkpoint_cache(), "HF_HUB_CACHE"),
        ("data set cache", data_cache(), "HF_DATASETS_CACHE"),
    ):
        yield _room(name, folder, LITTLE_CACHE_GB, f"set {variable} (or HF_HOME, for both caches) to another folder")


def output(folder: Path) -> Iterator[Finding]:
    """The results directory."""
    yield _room("results", folder, LITTLE_OUTPUT_GB, "choose another folder with --output")


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that need not exist yet."""
    return shutil.disk_usage(_nearest(folder)).free


def _nearest(folder: Path) -> Path:
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    return nearest


def _room(name: str, folder: Path, little_gb: float, otherwise: str) -> Finding:
    """Whether a folder can be written, by writing: permissions don't tell of quotas, full disks and read-only mounts."""
    try:
        free_gb = free_bytes(folder) / GB
        with tempfile.TemporaryFile(dir=_nearest(folder)) as probe:
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return Finding(name, FAIL, f"{folder} can't be written ({error.strerror})", f"Mend that, or {otherwise}.")
    if free_gb < little_gb:
        return Finding(name, WARN, f"{folder}, {free_gb:.1f} GB free", f"Free some, or {otherwise}: {little_gb:g} GB are no luxury.")
    return Finding(name, OK, f"{folder}, {free_gb:.0f} GB free")
