"""Every write of a process below one folder, numbered; at a chosen one it is killed, its machine loses power, or the disk is full.

Python's audit hooks tell of files that are created, renamed and removed, before it happens; writes and fsync are wrapped.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_RANDOM = re.compile(r"\.([\w.-]+)\.[a-z0-9_]{8}\.tmp")
KILL, POWER, FULL = "kill", "power", "full"


@dataclass(frozen=True)
class Trap:
    """What happens at event number `at`, from 0, of those that `Trace` counts, or at the first one called `name`.

    `KILL`: SIGKILL before it; of a write, after half of it. `POWER`: the same, and what was not synced is lost. `FULL`: no more
    space from here on; of the first write, half fits.
    """

    at: int | None = None
    kind: str = KILL
    name: str | None = None


NO_TRAP = Trap()


class Trace:
    """Counts, writes down and traps what happens below `root`, in this process from `install` on."""

    def __init__(self, root: Path, log: Path, trap: Trap):
        self.root, self.trap = os.path.abspath(root), trap
        self.count, self.is_full, self.busy = 0, False, False
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._fsync, self._open = os.fsync, io.open
        self.synced: dict[str, int] = {}  # by file that was opened to be written, bytes that a power cut leaves
        self.undo: dict[str, list[Callable[[], None]]] = {}  # by folder, what a power cut takes back of it

    def install(self) -> None:
        sys.addaudithook(self._audit)
        os.fsync = self._synced
        io.open = builtins.open = self._opened

    # ---- events
    def event(self, name: str, path: str, half: Callable[[], None] | None = None) -> None:
        """Count one; does not return where the process is to die there, and raises where the disk is full."""
        number, self.count = self.count, self.count + 1
        label = f"{name} {self.kind_of(path)}"
        os.write(self._log, f"{label}\n".encode())
        if not self.is_full and (number == self.trap.at or label == self.trap.name):
            if half is not None:
                half()
            if self.trap.kind == FULL:
                self.is_full = True
            else:
                self._die()
        if self.is_full and name in ("open", "mkdir", "write"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def kind_of(self, path: str) -> str:
        """The path without what differs from run to run."""
        parts = list(Path(os.path.relpath(path, self.root)).parts)
        if parts[:1] == ["runs"]:
            parts[1:2] = ["RUN"] * len(parts[1:2])
            parts[2:3] = [part if "run.json" in part else "UNIT" for part in parts[2:3]]
        name = _RANDOM.sub(r"\1 (temporary)", "/".join(parts))
        return re.sub("images/[0-9a-f]{16}", "images/IMAGE", name)

    def _die(self) -> NoReturn:
        if self.trap.kind == POWER:
            self.busy = True
            for undo in self.undo.values():
                for step in reversed(undo):
                    step()
            for path, size in self.synced.items():
                if os.path.exists(path) and os.path.getsize(path) > size:
                    os.truncate(path, size)
        os.killpg(0, signal.SIGKILL)
        raise SystemError("survived SIGKILL")

    def _path(self, file: Any) -> str | None:
        """Of a path or a descriptor; None where it is not below the root."""
        try:
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(os.fsdecode(file))
        except (OSError, TypeError, ValueError):
            return None
        return path if path == self.root or path.startswith(self.root + os.sep) else None

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self.busy or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.link"):
            return
        path = self._path(args[1] if event in ("os.rename", "os.link") else args[0])
        if path is None or isinstance(args[0], int) or (event == "open" and not (isinstance(args[2], int) and args[2] & _WRITING)):
            return
        self.busy = True  # what is done here is not counted
        try:
            self.event(event.removeprefix("os."), path)
            self._remember(event, path, self._path(args[0]))
        finally:
            self.busy = False

    # ---- what a power cut leaves
    def _remember(self, event: str, path: str, source: str | None) -> None:
        later = self.undo.setdefault(os.path.dirname(path), [])
        if event == "open":
            if not os.path.exists(path):
                later.append(lambda: os.path.exists(path) and os.remove(path))
            self.synced.setdefault(path, os.path.getsize(path) if os.path.exists(path) else 0)
        elif event == "os.mkdir" and not os.path.exists(path):
            later.append(lambda: os.path.isdir(path) and os.rename(path, f"{self.root}.lost{self.count}"))
        elif event == "os.rename" and source is not None:
            content = Path(path).read_bytes() if os.path.exists(path) else None
            later.append(lambda: Path(path).write_bytes(content) if content is not None else Path(path).unlink(missing_ok=True))
            self.synced[path] = self.synced.pop(source, 0)

    def _synced(self, handle: Any) -> None:
        path = self._path(handle if isinstance(handle, int) else handle.fileno())
        if path is not None:
            self.event("fsync", path)
        self._fsync(handle)
        if isinstance(handle, int):
            self.undo.pop(os.readlink(f"/proc/self/fd/{handle}"), None)  # a folder; the root's own name is in the one above it
        if path is not None and not os.path.isdir(path):
            self.synced[path] = os.path.getsize(path)

    def note(self, name: str, number: int) -> None:
        """A remark between the events."""
        os.write(self._log, f"# {name} {number}\n".encode())

    # ---- files
    def _opened(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
        path = self._path(file)
        if path is None or not set(mode) & set("wax+") or os.path.isdir(path):
            return self._open(file, mode, buffering, *args, **kwargs)
        names = ("encoding", "errors", "newline", "closefd", "opener")
        given = dict(zip(names, args, strict=False)) | kwargs
        raw = _Traced(file, mode.replace("b", "").replace("t", ""), given.pop("closefd", True), given.pop("opener", None))
        raw.trace, raw.path = self, path
        if not buffering:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, **given)


class _Traced(io.FileIO):
    """A file whose writes are events."""

    trace: Trace
    path: str

    def write(self, data: Any) -> int:
        written = 0

        def half() -> None:
            nonlocal written
            written = io.FileIO.write(self, memoryview(data)[: len(data) // 2])

        try:
            self.trace.event("write", self.path, half)
        except OSError:
            if written:
                return written  # as a disk does it: the next write fails
            raise
        return super().write(data)
