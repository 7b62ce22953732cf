"""Locks that survive a crash: a small file that says who holds it, and is touched for as long as its holder lives.

On one machine, looking at a lock and replacing one that was left behind is one step (`flock` on a guard file). Between machines,
two processes that replace one in the same moment see to it by the name of the file alone, which network disks keep in order but
show late. A holder that finds its lock taken, because it or its disk stood still for so long, stops (`Lock.check`).
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from vlm_pruner_eval.durable import make_folder, stopped
from vlm_pruner_eval.errors import ConfigError, StoppedError
from vlm_pruner_eval.sweep.files import TEMPORARY
from vlm_pruner_eval.sweep.holder import UNKNOWN, Holder, living, read_holder

SUFFIX = ".lock"
BEAT_S = 20.0
_ATTEMPTS = 4
_ABANDONED_S = 3600.0  # nobody takes an hour to write a line
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
_NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF}


class Lock:
    """One lock; take it by `acquire`, give it back by `release`.

    Parameters
    ----------
    path
        The file; its folder is made when the lock is taken, and removed again if nothing else was put there.
    what
        What this process does, for others to read.
    """

    def __init__(self, path: Path, what: str = "a sweep"):
        self.path, self._what = path, what
        self._mine: Holder | None = None
        self._made: list[Path] = []
        self._ended, self._taken_by = threading.Event(), None

    def acquire(self) -> Holder | None:
        """Take the lock, also one that was left behind; returns the living holder where there is one, and has changed nothing then.

        Raises
        ------
        ConfigError
            The folder can't be written.
        StoppedError
            The disk is full.
        """
        if holder := living(self.path):
            return holder
        try:
            holder = self._take(Holder.here(self._what))
        except OSError as error:
            self._remove_folders()
            if full := stopped(error):
                raise full from error
            raise ConfigError(f"output: {str(self.path.parent)!r} can't be written ({error}); choose another folder.") from error
        if holder is not None:
            self._remove_folders()
            return holder
        threading.Thread(target=self._beat, name=f"heartbeat {self.path.name}", daemon=True).start()
        return None

    def release(self) -> None:
        """Give the lock back; a copy of this process (a fork) keeps its parent's."""
        mine, self._mine = self._mine, None
        self._ended.set()
        if mine is None or mine.pid != os.getpid():
            return
        with _guarded(self.path.parent):
            if _token(self.path) == mine.token:
                self.path.unlink(missing_ok=True)
        self._remove_folders()

    def check(self) -> None:
        """Stop a process whose lock another one has taken.

        Raises
        ------
        StoppedError
            With who has it.
        """
        if self._taken_by is not None:
            raise StoppedError(
                f"{self.path}: this process stood still for so long that {self._taken_by} took its place; it stops here, so that no two "
                "write the same files."
            )

    def _take(self, mine: Holder) -> Holder | None:
        for _ in range(_ATTEMPTS):
            self._made += _make_folders(self.path.parent)
            with suppress(FileNotFoundError):  # another process, which had made the folder, removed it in this moment
                return self._take_in_folder(mine)
        self._made += _make_folders(self.path.parent)
        return self._take_in_folder(mine)

    def _take_in_folder(self, mine: Holder) -> Holder | None:
        with _guarded(self.path.parent):
            if holder := living(self.path):
                return holder
            left_behind = _token(self.path)
            if left_behind is not None:
                _remove(self.path, left_behind)
            if not _create(self.path, json.dumps(asdict(mine)) + "\n"):  # on a network disk another one was faster
                return living(self.path) or UNKNOWN
        self._mine = mine
        return None

    def _beat(self) -> None:
        """Touch the file again and again; the file's own clock is the one that others compare with."""
        mine = self._mine
        while mine is not None and not self._ended.wait(BEAT_S):
            with suppress(OSError):  # a network disk that is away: while it is, nobody else can take the lock either
                if _token(self.path) != mine.token:
                    self._taken_by = self._taken_by or read_holder(self.path) or UNKNOWN
                    return
                os.utime(self.path)

    def _remove_folders(self) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # something was put there, or another process removed it
                folder.rmdir()
        self._made = []


def holder_of(directory: Path) -> Holder | None:
    """The living process that holds a directory (one of them, where there are several), or None. Changes nothing that stays."""
    if not directory.is_dir():
        return None
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        if holder := living(path):
            return holder
    return None


def _token(path: Path) -> str | None:
    holder = read_holder(path)
    return None if holder is None else holder.token


def _create(path: Path, content: str) -> bool:
    """Make a file with its content in one step, unless there is one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # others must be able to read who it is
        _remove_leftovers(path, before=os.stat(name).st_mtime - _ABANDONED_S)
        try:
            os.link(name, path)
            return True
        except FileExistsError:
            return os.stat(name).st_nlink == 2  # NFS says so of a link that it made, when its first answer got lost
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_plainly(path, content)
    finally:
        os.unlink(name)


def _remove_leftovers(path: Path, before: float) -> None:
    """Remove what processes that were killed in the middle of this left long ago."""
    for other in path.parent.glob(f".{path.name}.*"):
        with suppress(FileNotFoundError):
            if other.stat().st_mtime < before:
                other.unlink()


def _create_plainly(path: Path, content: str) -> bool:
    """In two steps, where the file system has no links: one who looks in between sees a holder unknown, and leaves it alone."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _remove(path: Path, token: str) -> None:
    """Remove a lock that was left behind.

    Where the guard does not reach, another process may have replaced it since it was looked at: then it is put back, and should a
    third one have come in between, its owner notices at its next heartbeat.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return
    if _token(aside) != token:
        with suppress(FileExistsError):
            os.link(aside, path)
    aside.unlink()


@contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """One process of this machine at a time (of all machines, where `flock` reaches over the network)."""
    if os.name != "posix":
        yield
        return
    import fcntl

    path = folder / ".guard"
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
            if not _is_at(handle, path):  # the one before us removed the file that we waited for
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns the new ones, the topmost first."""
    new = [one for one in (folder, *folder.parents) if not one.exists()][::-1]
    make_folder(folder)
    return new
