"""SHA-256 of files; of large ones it is computed once and remembered.

Size and modification time alone would not do: the same checkpoint copied to another node has another time, and the processes of one
sweep would not agree on what they run.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from loguru import logger

from vlm_pruner_eval.store.files import write_atomic

LARGE_BYTES = 64_000_000  # what is smaller is read in less time than it takes to look
_CHUNK_BYTES = 8_000_000


def cache_folder() -> Path:
    """Where hashes are remembered: in the user's cache directory, which XDG_CACHE_HOME may name."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(named) if Path(named).is_absolute() else Path.home() / ".cache"  # the standard ignores relative ones
    return home / "vlm_pruner_eval" / "sha256"


def sha256(file: Path) -> str:
    """SHA-256 of a file; that of a large one is computed anew only when its size or modification time has changed.

    Raises
    ------
    OSError
        The file can't be read.
    """
    stat = file.stat()
    if stat.st_size < LARGE_BYTES:
        return _computed(file)
    name = hashlib.sha256(f"{file.resolve()}\n{stat.st_size}\n{stat.st_mtime_ns}".encode()).hexdigest()
    entry = cache_folder() / name
    found = _remembered(entry)
    if found is None:
        logger.info(f"Computing the SHA-256 of {file} ({stat.st_size / 1e9:.1f} GB); it is remembered in {entry.parent}.")
        found = _computed(file)
        try:
            write_atomic(entry, f"{found}\n")
        except OSError as error:
            logger.warning(f"{entry}: can't be written ({error}), so {file} is hashed again by the next sweep.")
    return found


def _remembered(entry: Path) -> str | None:
    """What was written there; None where nothing was, or something else."""
    try:
        text = entry.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if re.fullmatch(r"[0-9a-f]{64}", text) else None


def _computed(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
