"""A sweep under torchrun: every rank answers its part of every run, and the first one holds the directory, scores and records.

Answers are exchanged through the journals in the results directory, which all nodes share, so nothing is gathered: to lmms-eval
and accelerate every rank looks like a process of its own. What little the ranks have to say to each other goes through torchrun's
key-value store, as text.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console

from vlm_pruner_eval.errors import ConfigError, PruningError, StoppedError
from vlm_pruner_eval.lmms.plan import Part
from vlm_pruner_eval.sweep.executors.base import Work
from vlm_pruner_eval.sweep.executors.gpus import only, visible_gpus
from vlm_pruner_eval.sweep.progress import SweepProgress

_POLL_S, _PATIENCE_S = 0.05, 3600.0
_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank_of() -> Part | None:
    """Rank of this process under torchrun, None outside.

    Raises
    ------
    ConfigError
        The environment says half of it, or what no torchrun says.
    """
    if _number("WORLD_SIZE", "1") < 2:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"got WORLD_SIZE={os.environ['WORLD_SIZE']} without {' and '.join(missing)}; start by torchrun, or unset it.")
    rank, count = _number("RANK"), _number("WORLD_SIZE")
    if rank >= count:
        raise ConfigError(
            f"got RANK={rank} and WORLD_SIZE={count}, expected a rank from 0 to {count - 1}; start by torchrun, or unset both."
        )
    return Part(rank, count)


def _number(name: str, default: str = "") -> int:
    """A number of the environment."""
    text = os.environ.get(name, default)
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"got {name}={text!r}, expected a whole number; start by torchrun, or unset it.")
    return int(text)


class Ranks:
    """The ranks of one start of torchrun, as a `session.Team` and as an executor.

    Parameters
    ----------
    part
        Of this rank.
    store
        torchrun's key-value store, or one of the same interface.
    """

    def __init__(self, part: Part, store: Any):
        self.part, self._store = part, store

    @classmethod
    def join(cls, part: Part) -> Ranks:
        """Find the others."""
        import torch

        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=timedelta(seconds=_PATIENCE_S)))
        return cls(part, torch.distributed.PrefixStore("vlm_pruner_eval", store))

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that holds the directory."""
        return self.part.index == 0

    def console(self, asked: Console) -> Console:
        """Only the first rank talks."""
        return asked if self.is_first else Console(quiet=True)

    # ---- talking
    def agree(self, name: str, value: Any) -> Any:
        """What the first rank says, in plain types; the others wait for it."""
        key = f"agree/{name}"
        if self.is_first:
            self._store.set(key, json.dumps(value))
            return value
        self._wait(lambda: self._store.check([key]), f"rank 0 to tell its {name}")
        return json.loads(self._store.get(key))

    def give_up(self, run_id: str, sentence: str) -> None:
        """Say that this rank will not answer its part of a run."""
        self._store.set(f"gave up/{run_id}/{self.part.index}", sentence)

    def check(self, run_id: str) -> None:
        """Raise a PruningError if another rank gave a run up."""
        for other in self.part.all():
            key = f"gave up/{run_id}/{other.index}"
            if other != self.part and self._store.check([key]):
                raise PruningError(f"rank {other.index} could not answer its part of the run: {self._store.get(key).decode()}")

    def meet(self, name: str) -> None:
        """Wait until all ranks are here."""
        self._arrive(name)
        self._wait(lambda: self._are_there(name), f"all {self.part.count} ranks to reach {name}")

    def part_company(self) -> None:
        """The first rank goes last: the store may live in its process."""
        self._arrive("the end")
        if self.is_first:
            self._wait(lambda: self._are_there("the end"), f"all {self.part.count} ranks to reach the end")

    def _arrive(self, name: str) -> None:
        self._store.set(f"there/{name}/{self.part.index}", "")

    def _are_there(self, name: str) -> bool:
        return self._store.check([f"there/{name}/{other.index}" for other in self.part.all()])

    def _wait(self, is_over: Callable[[], bool], what: str) -> None:
        begun = time.monotonic()
        while not is_over():
            if time.monotonic() - begun > _PATIENCE_S:
                raise StoppedError(f"rank {self.part.index} waited {_PATIENCE_S / 60:.0f} minutes for {what}; run the same command again.")
            time.sleep(_POLL_S)

    # ---- working
    def run(self, work: Work) -> None:
        """Answer this rank's part of every run of `work.todo`."""
        with _as_one_process(_device(work.config.model.device)):
            session = work.open(part=self.part, team=self)
            self.meet("the first run")
            if self.is_first:
                work.begin()
                work.prepare(session, work.todo)
            self.meet("the first journal")
            with SweepProgress(work.console, len(work.todo)) as progress:
                work.make_all(session, progress)


def _device(asked: str | None) -> Mapping[str, str]:
    """Environment variables that let a rank see the GPU that is its own.

    Raises
    ------
    ConfigError
        More ranks than GPUs, or a GPU for all of them.
    """
    if asked is not None and asked != "cpu":
        raise ConfigError(f"model.device: got {asked!r} under torchrun, where every rank has its own; leave it out.")
    gpus = visible_gpus() if asked is None else []
    local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if gpus and local >= len(gpus):
        raise ConfigError(f"got LOCAL_RANK={local}, but this node shows {len(gpus)} GPUs; start at most as many ranks on it.")
    return only(gpus[local] if gpus else None)


@contextmanager
def _as_one_process(device: Mapping[str, str]) -> Iterator[None]:
    """Hide torchrun from libraries, which would make a process group and shares of their own."""
    before = dict(os.environ)
    for name in _JOB:
        os.environ.pop(name, None)
    os.environ.update(device)
    try:
        yield
    finally:
        for name in (*_JOB, *device):
            os.environ.pop(name, None)
        os.environ.update(before)
