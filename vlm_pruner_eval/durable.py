"""Folders whose entries survive a power cut, and disks that are full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from vlm_pruner_eval.errors import StoppedError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def sync_folder(folder: Path) -> None:
    """Write a folder's entries through to the disk: `fsync` of a file does not promise that its name is there after a power cut."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder with those above it, each written through to the disk; it may be there already."""
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def is_disk_full(error: BaseException | None) -> bool:
    """Tell if an exception, or one that it was raised from or during, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def stopped(error: BaseException) -> StoppedError | None:
    """What a full disk means to a sweep; None where `error` comes from something else."""
    if not is_disk_full(error):
        return None
    return StoppedError(f"The disk is full ({error}). Nothing that was answered is lost: make room, then run the same command again.")
