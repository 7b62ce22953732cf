"""Processes on this machine that make the runs of a sweep as its shards, watched by the one that holds the directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from vlm_pruner_eval.errors import ConfigError, StoppedError
from vlm_pruner_eval.exit_codes import BAD_INPUT
from vlm_pruner_eval.lmms.plan import Part
from vlm_pruner_eval.sweep.directory import claim, last_claim
from vlm_pruner_eval.sweep.executors.allotment import STOPPED, Allotment
from vlm_pruner_eval.sweep.executors.base import Work
from vlm_pruner_eval.sweep.executors.gpus import only
from vlm_pruner_eval.sweep.executors.watch import Watch
from vlm_pruner_eval.sweep.grid import Run
from vlm_pruner_eval.sweep.processes import machine_id
from vlm_pruner_eval.sweep.session import record_lost

COMMAND = (sys.executable, "-m", "vlm_pruner_eval")
MOST_DEATHS = 3  # in the same run, or before the first one
_POLL_S, _PATIENCE_S = 0.2, 20.0
_SAYS = "vlm-pruner-eval: "


@dataclass
class Worker:
    """One of the processes, and those that come after it.

    Attributes
    ----------
    deaths
        In a row, without having claimed a run.
    begun_at
        Where the output of the present process begins in the log.
    """

    part: Part
    log: Path
    command: list[str]
    environment: dict[str, str]
    deaths: int = 0
    begun_at: int = 0
    process: subprocess.Popen | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start the process; it ends when its standard input does, so also when this process is killed."""
        with self.log.open("ab") as file:
            self.begun_at = file.tell()
            self.process = self._popen(file)

    def _popen(self, log: IO[bytes]) -> subprocess.Popen:
        # in a session of its own, so that Ctrl-C reaches this process alone, which then ends it
        streams = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT}
        return subprocess.Popen(self.command, env=self.environment, start_new_session=True, **streams)

    def output(self) -> str:
        """What the present process has printed."""
        with self.log.open("rb") as file:
            file.seek(self.begun_at)
            return file.read().decode(errors="replace")

    def last_line(self) -> str:
        """The last line that says something: of a traceback, the exception."""
        return next((line.strip() for line in reversed(self.output().splitlines()) if line.strip()), "(nothing)")

    def sentences(self) -> list[str]:
        """What its command line said about its end."""
        return [line.removeprefix(_SAYS) for line in self.output().splitlines() if line.startswith(_SAYS)]


class Workers:
    """As many processes as `gpus`, each with one of them, or with what this process sees (None).

    A process that dies is replaced, and its run goes on from its journal; a run in which `MOST_DEATHS` processes died has failed.
    """

    def __init__(self, gpus: Sequence[str | None], command: Sequence[str]):
        self._gpus, self._command = gpus, command

    def run(self, work: Work) -> None:
        """Make every run of `work.todo`.

        Raises
        ------
        ConfigError, StoppedError
            What a process said of its end.
        """
        allotment = Allotment.write(work)
        workers = [self._worker(work, allotment, index) for index in range(len(self._gpus))]
        work.console.print(
            f"{len(workers)} processes; their output is in {allotment.folder}", highlight=False, markup=False, soft_wrap=True
        )
        try:
            for worker in workers:
                worker.start()
            with Watch(work) as watch:
                _Shift(work, workers, watch).last()
        finally:
            _end(workers)
            allotment.remove_unless_begun(work.store)

    def _worker(self, work: Work, allotment: Allotment, index: int) -> Worker:
        part = Part(index, len(self._gpus))
        options = ["--output", str(work.store.root), "--shard", str(part), "--todo", str(allotment.todo)]
        threads = max(1, len(os.sched_getaffinity(0)) // part.count) if hasattr(os, "sched_getaffinity") else 1
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | only(self._gpus[index])
        log = allotment.folder / f"shard-{index + 1}-of-{part.count}.log"
        return Worker(part, log, [*self._command, "sweep", str(allotment.sweep), *options], environment)


@dataclass
class _Shift:
    """The time in which the processes work."""

    work: Work
    workers: list[Worker]
    watch: Watch
    _deaths: Counter = field(default_factory=Counter)  # by run id

    def last(self) -> None:
        """Until every process has ended by itself."""
        while running := [worker for worker in self.workers if worker.process is not None]:
            for worker in running:
                if worker.process.poll() is not None:
                    self._ended(worker, worker.process.returncode)
            self.watch.look()
            self.work.check()
            time.sleep(_POLL_S)
        if left := [run for run in self.work.todo if not self.work.is_made(run)]:
            raise StoppedError(
                f"{len(left)} runs are left (first: {left[0].key}), as processes ended {MOST_DEATHS} times before they had begun a run. "
                f"The end of {self.workers[0].log} is: {self.workers[0].last_line()}"
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
        """Start another process, unless the run of the dead one is to blame, or none gets as far as a run."""
        runs, how = self._runs_of(worker), _how(code)
        worker.deaths = 0 if runs else worker.deaths + 1
        during = f"during {', '.join(run.key for run in runs)}" if runs else "before it had begun a run"
        self.work.console.print(f"Process {worker.part} {how} {during}; see {worker.log}", highlight=False, markup=False, soft_wrap=True)
        for run in runs:
            self._deaths[run.run_id] += 1
            if self._deaths[run.run_id] >= MOST_DEATHS:
                self._give_up(worker, run, how, together=len(runs) > 1)
        if worker.deaths >= MOST_DEATHS:
            worker.process = None
        else:
            worker.start()

    def _runs_of(self, worker: Worker) -> list[Run]:
        """What a dead process had claimed and not recorded."""
        claims = [(run, last_claim(self.work.store.run_dir(run.run_id))) for run in self.work.todo]
        own = [run for run, holder in claims if holder is not None and holder.pid == worker.process.pid and holder.machine == machine_id()]
        return [run for run in own if not self.work.is_made(run)]

    def _give_up(self, worker: Worker, run: Run, how: str, *, together: bool) -> None:
        """Record a run as failed, unless another process has taken it up in the meantime."""
        others = " (together with others, as share_prefix asks; without it they are told apart)" if together else ""
        lock = claim(self.work.store.run_dir(run.run_id), worker.part)
        if lock.acquire() is not None:
            return
        try:
            problem = f"{MOST_DEATHS} processes died while they made this run{others}; the last one {how}, see {worker.log}."
            record_lost(self.work.config, self.work.store, run, problem)
        finally:
            lock.release()


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def _end(workers: Sequence[Worker]) -> None:
    """End processes that still run: asked first, so that they give back what they hold."""
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
