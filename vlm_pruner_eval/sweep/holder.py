"""Who holds a lock, and whether that process still lives.

On one machine the kernel says so. Of a process on another one nothing is that certain: it counts as gone when it has not touched
its lock for ten minutes.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import socket
import tempfile
import uuid
from dataclasses import dataclass, fields
from pathlib import Path

from vlm_pruner_eval.sweep.files import TEMPORARY
from vlm_pruner_eval.sweep.processes import is_running, machine_id, start_of

SILENT_S = 600.0  # of a process on another machine
# Of one on a host of this name that was booted at another time: it went with the reboot, or hosts share a name and it lives. Its
# touches come every 20 s and are seen up to a minute late.
REBOOTED_S = 120.0
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes
    ----------
    host, pid
        The process.
    started
        When it was started, in the terms of its machine: a later process may be given the same pid.
    machine
        Tells hosts of the same name, boots of a host, and containers apart.
    since
        When it took the lock, by its own clock, for people.
    what
        What it does, for people.
    token
        Its own name of this lock.
    """

    host: str
    pid: int
    started: str
    machine: str
    since: str
    what: str
    token: str

    @classmethod
    def here(cls, what: str) -> Holder:
        """The process that asks."""
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        return cls(socket.gethostname(), os.getpid(), start_of(os.getpid()), machine_id(), now, what, uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host} ({self.what}, since {self.since})" if self.pid else "a process unknown"


UNKNOWN = Holder("unknown", 0, "", "", "", "", "")


def read_holder(path: Path) -> Holder | None:
    """Who holds a lock or, of one that was left behind, held it; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Holder(**{field.name: found[field.name] for field in fields(Holder)})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return UNKNOWN  # half written, by a crash or in this moment


def living(path: Path) -> Holder | None:
    """Who holds a lock, unless that process is known to be gone."""
    holder, limit = read_holder(path), SILENT_S
    if holder is None:
        return None
    if holder.machine == machine_id():
        return holder if is_running(holder.pid, holder.started) else None
    if holder.host == socket.gethostname():
        limit = REBOOTED_S
    try:
        return holder if _silent_s(path) <= limit else None
    except FileNotFoundError:
        return None  # given back in this moment
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        return holder  # only someone who can't write there, and so only looks, has to believe it


def _silent_s(path: Path) -> float:
    """Seconds since a file was touched, by the clock that touches files in its folder: clocks of hosts differ."""
    handle, probe = tempfile.mkstemp(dir=path.parent, prefix=".clock.", suffix=TEMPORARY)
    os.close(handle)
    try:
        return os.stat(probe).st_mtime - path.stat().st_mtime
    finally:
        os.unlink(probe)
