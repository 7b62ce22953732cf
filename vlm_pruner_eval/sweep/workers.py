"""Several processes on this machine, each running the worker loop over the same folder, and the one that watches them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlm_pruner_eval.errors import ConfigError, StoppedError
from vlm_pruner_eval.exit_codes import BAD_INPUT
from vlm_pruner_eval.store.claims import Claim, holders, process_words
from vlm_pruner_eval.store.files import write_atomic
from vlm_pruner_eval.store.schema import FAILED, UnitRecord
from vlm_pruner_eval.sweep import provenance
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.metrics.score_line import title
from vlm_pruner_eval.sweep.units import WorkUnit
from vlm_pruner_eval.sweep.work import Work

COMMAND = (sys.executable, "-m", "vlm_pruner_eval")
STOPPED = 3  # exit code of a process that can't go on for a reason that is not its own, such as a full disk
MOST_DEATHS = 3  # over the same unit, or before the first one
_POLL_S, _LOOK_S, _PATIENCE_S = 0.2, 1.0, 20.0
_SAYS = "vlm-pruner-eval: "
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """Names of the GPUs of this process, in the terms of CUDA_VISIBLE_DEVICES.

    torch asks the driver's library for their number, which does not begin to use CUDA in this process: it would hold memory on a GPU.
    """
    import torch

    given = os.environ.get(_VISIBLE)
    count = torch.cuda.device_count()
    return [name.strip() for name in given.split(",")][:count] if given else [str(index) for index in range(count)]


def sweep_file(config: SweepConfig) -> dict[str, Any]:
    """A validated configuration in the form of a sweep file."""
    raw = config.model_dump(mode="json", exclude_none=True)
    return raw | {"methods": [{**method.pop("parameters"), **method} for method in raw["methods"]]}


# ---- what the processes are told
def write_todo(work: Work, folder: Path) -> None:
    """Write the sweep file as it is understood (the user may edit theirs meanwhile), and the units to be made."""
    write_atomic(folder / "sweep.yaml", yaml.safe_dump(sweep_file(work.config), sort_keys=False, allow_unicode=True))
    told = {"command": provenance.command_line(), "units": [unit.path for unit in work.todo]}
    write_atomic(folder / "todo.json", json.dumps(told, indent=1) + "\n")


def read_todo(path: Path, units: Sequence[WorkUnit]) -> tuple[list[WorkUnit], str]:
    """The units that a process of a sweep is to make, and the command of the sweep.

    Raises
    ------
    ConfigError
        The file can't be read, or was written by other code: its units are not those of the grid.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        paths, command = set(told["units"]), str(told["command"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        problem = f"--todo: {str(path)!r} can't be read ({error}); it is given by a sweep to its own processes, leave it out."
        raise ConfigError(problem) from error
    if unknown := paths - {unit.path for unit in units}:
        raise ConfigError(f"--todo: {min(unknown)!r} is no part of the grid; the package was changed while the sweep ran, start it again.")
    return [unit for unit in units if unit.path in paths], command


def end_with_parent() -> None:
    """End this process when its standard input ends, which its parent holds open: also a parent that is killed takes it along."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(STOPPED)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()


# ---- processes
@dataclass
class Worker:
    """One of the processes, and those that come after it; `deaths` in a row without having claimed a unit."""

    number: int
    log: Path
    command: list[str]
    environment: Mapping[str, str]
    deaths: int = 0
    begun_at: int = 0  # where the output of the present process begins in the log
    process: subprocess.Popen | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start the process, in a session of its own: Ctrl-C reaches this one alone, which then ends it."""
        with self.log.open("ab") as file:
            self.begun_at = file.tell()
            streams = {"stdin": subprocess.PIPE, "stdout": file, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(self.command, env=self.environment, start_new_session=True, **streams)

    def output(self) -> list[str]:
        """Lines that the present process has printed."""
        with self.log.open("rb") as file:
            file.seek(self.begun_at)
            return file.read().decode(errors="replace").splitlines()

    def sentences(self) -> list[str]:
        """What its command line said about its end."""
        return [line.removeprefix(_SAYS) for line in self.output() if line.startswith(_SAYS)]


def work_in_processes(work: Work, gpus: Sequence[str | None], command: Sequence[str] | None = None) -> None:
    """Make the units by as many processes as `gpus`, each with one of them, or with what this process sees (None).

    A process that dies is replaced, and its unit goes on from its log; a unit over which `MOST_DEATHS` processes died has failed.

    Raises
    ------
    ConfigError, StoppedError
        What a process said of its end.
    """
    folder = work.store.logs
    write_todo(work, folder)
    told = ["--output", str(work.store.root), "--todo", str(folder / "todo.json")]
    argv = [*(command or COMMAND), "sweep", str(folder / "sweep.yaml"), *told]
    threads = max(1, len(os.sched_getaffinity(0)) // len(gpus)) if hasattr(os, "sched_getaffinity") else 1
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    workers = [
        Worker(number, folder / f"worker-{number}.log", argv, environment | ({} if gpu is None else {_VISIBLE: gpu}))
        for number, gpu in enumerate(gpus, start=1)
    ]
    work.say(f"{len(workers)} processes; their output is in {folder}")
    with _ended_at_last(workers):
        for worker in workers:
            worker.start()
        _Supervisor(work, workers).run()


@dataclass
class _Supervisor:
    """Restarts workers until all units are done, and shows the units as they are recorded."""

    work: Work
    workers: list[Worker]
    _deaths: Counter = field(default_factory=Counter)

    def run(self) -> None:
        """Return when every process has ended by itself."""
        watch = Watch(self.work)
        while running := [worker for worker in self.workers if worker.process is not None]:
            for worker in running:
                if worker.process.poll() is not None:
                    self._ended(worker, worker.process.returncode)
            watch.look()
            time.sleep(_POLL_S)
        watch.look(now=True)
        if left := [unit for unit in self.work.todo if not self.work.is_made(unit)]:
            last = next((line for line in reversed(self.workers[0].output()) if line.strip()), "(nothing)")
            raise StoppedError(
                f"{len(left)} units are left (first: {left[0].name}), as processes ended {MOST_DEATHS} times before they had begun one. "
                f"The end of {self.workers[0].log} is: {last}"
            )

    def _ended(self, worker: Worker, code: int) -> None:
        worker.process.stdin.close()
        if code == 0:
            worker.process = None
        elif code == BAD_INPUT:
            raise ConfigError(worker.sentences() or [f"a process ended with exit code 2; {worker.log} says why."])
        elif code == STOPPED:
            raise StoppedError(" ".join(worker.sentences()) or f"a process can't go on; {worker.log} says why.")
        else:
            self._died(worker, code)

    def _died(self, worker: Worker, code: int) -> None:
        """Start another process, unless the unit of the dead one is to blame, or none gets as far as a unit."""
        units = self._units_of(worker)
        worker.deaths = 0 if units else worker.deaths + 1
        during = f"during {', '.join(unit.name for unit in units)}" if units else "before it had begun a unit"
        self.work.say(f"Process {worker.number} {_how(code)} {during}; see {worker.log}")
        for unit in units:
            self._deaths[unit.path] += 1
            if self._deaths[unit.path] >= MOST_DEATHS:
                self._give_up(unit, f"the last one {_how(code)}, see {worker.log}", together=len(units) > 1)
        if worker.deaths >= MOST_DEATHS:
            worker.process = None
        else:
            worker.start()

    def _units_of(self, worker: Worker) -> list[WorkUnit]:
        """Units that a dead process had claimed and not recorded; another one may be at them already."""
        who = f"{process_words(worker.process.pid)},"
        found = {unit: holders(unit.stored(self.work.store).folder) for unit in self.work.todo}
        return [unit for unit, held in found.items() if any(line.startswith(who) for line in held) and not self.work.is_made(unit)]

    def _give_up(self, unit: WorkUnit, how: str, *, together: bool) -> None:
        """Record a unit as failed, unless another process has taken it up in the meantime. Its answers stay."""
        others = " (together with others, as share_prefix asks; without it they are told apart)" if together else ""
        with Claim(unit.stored(self.work.store).folder) as claim:
            if not claim.acquire():
                return
            problem = f"{MOST_DEATHS} processes died while they made this{others}; {how}."
            made = provenance.collect({}, self.work.checkpoint, None, self.work.command)
            record = UnitRecord(task=unit.task, limit=self.work.config.limit, status=FAILED, problem=problem, provenance=made)
            self.work.store.write_head(unit.run.head)
            unit.stored(self.work.store).write(record, [], {})


class Watch:
    """Says of units that other processes make when they are recorded."""

    def __init__(self, work: Work, say: Callable[[str], None] | None = None):
        self._work = work
        self._say = say or work.say
        self._open = list(work.todo)
        self._looked = 0.0

    def look(self, *, now: bool = False) -> None:
        """Look at the folder, at most once a second."""
        if not now and time.monotonic() - self._looked < _LOOK_S:
            return
        self._looked = time.monotonic()
        for unit in [unit for unit in self._open if self._work.is_made(unit)]:
            self._open.remove(unit)
            done = len(self._work.units) - len(self._open)
            self._say(f"[{done}/{len(self._work.units)}] {title(unit.run)}, {unit.task}: {self._work.outcome(unit, None)}")


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


@contextmanager
def _ended_at_last(workers: Sequence[Worker]) -> Iterator[None]:
    """End processes that still run when the context ends: asked first, so that they give back what they hold."""
    try:
        yield
    finally:
        running = [worker.process for worker in workers if worker.process is not None and worker.process.poll() is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _PATIENCE_S
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
