"""What a sweep needs of its machine: the hub, and room on disks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding

GB = 1e9
LITTLE_CACHE_GB, LITTLE_OUTPUT_GB = 40, 2
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
TRUE = {"1", "ON", "YES", "TRUE"}
LOGIN = "Log in by `hf auth login`, or set HF_TOKEN."
_PROBE_BYTES = 1_000_000


def offline_switches() -> list[str]:
    """Environment variables that are set and forbid downloads."""
    return [name for name in OFFLINE if os.environ.get(name, "").upper() in TRUE]


def hub() -> Iterator[Finding]:
    """Token and offline switches; the token itself is never shown."""
    from huggingface_hub import constants, get_token

    if offline := offline_switches():
        fix = f"Unset {', '.join(offline)} to download, or put checkpoints and data sets into the cache before."
        yield Finding("hub", WARN, f"nothing is downloaded: {', '.join(offline)} set", fix)
    else:
        yield Finding("hub", OK, f"downloads are allowed, from {urlsplit(constants.ENDPOINT).hostname}")  # without name and password
    if get_token():
        yield Finding("hub token", OK, "there")
    else:
        yield Finding("hub token", WARN, "none; gated checkpoints and most of lmms-eval's data sets ask for one", LOGIN)


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
