"""Which process is which: whether one that once was there still runs, on this machine."""

from __future__ import annotations

import functools
import os
import socket
import uuid
from pathlib import Path

import psutil

_PROC = Path("/proc")
_HIDDEN = "hidden"


@functools.cache
def _has_proc() -> bool:
    return (_PROC / "self" / "stat").exists()


@functools.cache
def machine_id() -> str:
    """The same for all processes that see each other by pid: one boot of one machine, and there one container."""
    if _has_proc():
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    return f"{socket.gethostname()} {uuid.getnode():x}"


def start_of(pid: int) -> str:
    """When a process was started, "" if there is none (any more), "hidden" if only that can be said: text to be compared, not read.

    Where there is /proc, in ticks since boot: seconds since 1970, as psutil has them, move when the clock is set.
    """
    if not _has_proc():
        try:
            process = psutil.Process(pid)
            return "" if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
        except psutil.NoSuchProcess:
            return ""
    try:
        state, *facts = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except PermissionError:
        return _HIDDEN
    except (FileNotFoundError, ProcessLookupError):  # or another user's, on a machine that shows each user their own
        return _HIDDEN if psutil.pid_exists(pid) and not (_PROC / str(pid)).exists() else ""
    return "" if state in (b"Z", b"X") else facts[18].decode()  # a zombie only waits for its parent


def is_running(pid: int, started: str) -> bool:
    """Whether the process that had this pid and this start still runs."""
    found = start_of(pid)
    return found == _HIDDEN or (found != "" and found == started)
