"""Claims of units: one lock of the kernel each, which goes when its holder ends, however it ends."""

from __future__ import annotations

import datetime
import os
import socket
import tempfile
import warnings
from pathlib import Path

from filelock import FileLock, Timeout

from vlm_pruner_eval.durable import is_disk_full, make_folder
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.store.files import TEMPORARY

LOCK, HOLDER = ".lock", ".holder"
_PATIENCE_S, _POLL_S = 0.1, 0.02  # a look at the lock by somebody else takes less


class UnitLock(FileLock):
    """A lock of its own for every object: lmms-eval makes all `FileLock` of a path in a process one and the same."""


class Claim:
    """The right to work on one unit; use as a context manager, or release it.

    Parameters
    ----------
    folder
        Of the unit; made when the claim is taken.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = UnitLock(folder / LOCK)

    def acquire(self) -> bool:
        """Take the claim; False if another process holds it."""
        make_folder(self.folder)
        try:
            self._lock.acquire(timeout=_PATIENCE_S, poll_interval=_POLL_S)
        except Timeout:
            return False
        (self.folder / HOLDER).write_text("\n".join([_whoami(), *holders(self.folder)]), encoding="utf-8")
        return True

    def release(self) -> None:
        """Give the claim back; nothing happens if it is not held."""
        if self._lock.is_locked:
            (self.folder / HOLDER).unlink(missing_ok=True)
            self._lock.release()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def holder_of(folder: Path) -> str | None:
    """Who works on a unit, in words; None if nobody does."""
    if not (folder / LOCK).is_file():
        return None
    lock = UnitLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return next(iter(holders(folder)), "a process that has just begun")
    except OSError:  # a folder that may only be read: nothing can be said
        return None
    lock.release()
    return None


def holders(folder: Path) -> list[str]:
    """Who works on a unit, or did and died over it; behind it those that died over it before."""
    try:
        return (folder / HOLDER).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []


def process_words(pid: int) -> str:
    """The beginning of what a holder of this machine says of itself."""
    return f"process {pid} on host {socket.gethostname()}"


def check_locks(root: Path) -> None:
    """Refuse a file system on which two processes could hold the same claim.

    Raises
    ------
    ConfigError
        Locks don't work in the folder, or the nearest one above it that is there.
    """
    nearest = root.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    handle, name = tempfile.mkstemp(dir=nearest, prefix=".lock-probe.", suffix=TEMPORARY)
    os.close(handle)
    try:
        problem = _lock_problem(name)
    finally:
        os.unlink(name)
    if problem is not None:
        raise ConfigError(
            f"output: {str(root)!r} is on a file system without working file locks ({problem}), so two processes could answer the same "
            "questions and write the same files; choose a folder on another disk with --output."
        )


def _lock_problem(name: str) -> str | None:
    """Take a lock twice: the second one must be refused."""
    first, second = UnitLock(name), UnitLock(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a lock that is none, see filelock's SoftFileLock
            first.acquire(timeout=0)
            try:
                second.acquire(timeout=0)
            except Timeout:
                return None
            return "a lock that is held can be taken again"
    except (OSError, NotImplementedError, Warning) as error:
        if is_disk_full(error):
            raise
        return str(error)
    finally:
        second.release(force=True)
        first.release(force=True)


def _whoami() -> str:
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"{process_words(os.getpid())}, since {now}"
