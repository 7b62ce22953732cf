"""Files that a reader never sees half of."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from vlm_pruner_eval.durable import make_folder, sync_folder

TEMPORARY = ".tmp"  # behind the eight random characters of a file that is being written
_ABANDONED_S = 3600.0  # nobody takes an hour to write a file


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: a crash leaves the old file or the new one, never a part.

    What a crash does leave beside it is a file with a random name, see `remove_leftovers`.
    """
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    with ExitStack() as undo:
        undo.callback(os.unlink, name)
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
        undo.pop_all()
    sync_folder(path.parent)


def remove_leftovers(folder: Path, *, like: Path | None = None) -> None:
    """Remove what crashes left of `write_atomic`, and of locks that were being taken, in a folder.

    All of it, where no other process can be writing there; else give a file that has just been written: what is an hour older than
    that is removed, by the clock of the disk, which is the same for all machines that write there.
    """
    latest = None if like is None else like.stat().st_mtime - _ABANDONED_S
    for path in folder.glob(f".*.????????{TEMPORARY}"):
        try:
            if latest is None or path.stat().st_mtime < latest:
                path.unlink()
        except FileNotFoundError:
            continue  # another process was faster
