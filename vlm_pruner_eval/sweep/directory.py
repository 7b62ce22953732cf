"""Who may write into a results directory: one sweep, or shards of one that claim its runs one by one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.lmms.plan import WHOLE, Part
from vlm_pruner_eval.sweep.holder import Holder, living, read_holder
from vlm_pruner_eval.sweep.lock import SUFFIX, Lock
from vlm_pruner_eval.sweep.processes import machine_id

_SWEEP, _SHARDS, _RUN = f"sweep{SUFFIX}", f"shard.*{SUFFIX}", f"run{SUFFIX}"


@contextmanager
def hold(root: Path, shard: Part | None = None, *, is_child: bool = False) -> Iterator[Lock]:
    """Hold a results directory, as a sweep or as one of its shards.

    A process takes its own lock before it looks for those that exclude it, so that of two which start together at least one is refused.

    Parameters
    ----------
    root
        The directory; made with the lock, and removed again if nothing is put there.
    shard
        Several may hold a directory together, each once; None: the sweep, which holds it alone.
    is_child
        Whether this process is a shard that the sweep which holds the directory has started.

    Raises
    ------
    ConfigError
        Another process holds it, with who that is.
    """
    lock = Lock(root / (_SWEEP if shard is None else shard_lock(shard)), "a sweep" if shard is None else f"shard {shard}")
    if holder := lock.acquire():
        raise _refused(root, holder)
    try:
        for path in sorted(root.glob(_SHARDS)) if shard is None else [root / _SWEEP]:
            if (holder := living(path)) and not (is_child and _is_parent(holder)):
                raise _refused(root, holder)
        if is_child and not is_held_by_parent(root):
            raise ConfigError("--todo: is given by a sweep to the processes that it starts itself; leave it out.")
        yield lock
    finally:
        lock.release()


def refuse_held(root: Path) -> None:
    """Refuse a directory that another process holds, without taking it.

    Raises
    ------
    ConfigError
        With who that is.
    """
    for path in (root / _SWEEP, *sorted(root.glob(_SHARDS))):
        if holder := living(path):
            raise _refused(root, holder)


def is_held_by_parent(root: Path) -> bool:
    """Whether the process that started this one holds a directory as a sweep."""
    holder = living(root / _SWEEP)
    return holder is not None and _is_parent(holder)


def shard_lock(shard: Part) -> str:
    """Name of a shard's lock."""
    return f"shard.{shard.index + 1}of{shard.count}{SUFFIX}"


def claim(run_dir: Path, who: str, part: Part = WHOLE) -> Lock:
    """The lock that makes one run, or a part of its answers, a process's own; not taken yet."""
    return Lock(run_dir / f"run{part.suffix}{SUFFIX}", who)


def claimed_by(run_dir: Path) -> Holder | None:
    """The living process that makes a run."""
    return living(run_dir / _RUN)


def last_claim(run_dir: Path) -> Holder | None:
    """The process that makes a run or, if it died over it, made it."""
    return read_holder(run_dir / _RUN)


def _is_parent(holder: Holder) -> bool:
    return holder.pid == os.getppid() and holder.machine == machine_id()


def _refused(root: Path, holder: Holder) -> ConfigError:
    elsewhere = "" if holder.machine == machine_id() else " (one that died counts for 10 minutes after its last sign of life)"
    return ConfigError(
        f"output: {str(root)!r} is in use by {holder}; wait until it has ended, or stop it{elsewhere}, or choose another folder."
    )
