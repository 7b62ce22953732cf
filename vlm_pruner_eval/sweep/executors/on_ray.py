"""`--executor ray`: runs made by workers of a Ray cluster, each of which loads the model once.

The driver hands out runs, and shares of them where there are more workers than runs. What a worker answers is in the journals of the
results directory, so when it dies, another one goes on behind its last batch. A worker that does not see the directory works in
a folder of its own and sends the files of a finished run back; when that one dies, the run begins anew.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from vlm_pruner_eval.errors import ConfigError, StoppedError
from vlm_pruner_eval.lmms.plan import WHOLE, Part
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.directory import claim
from vlm_pruner_eval.sweep.executors.base import Work
from vlm_pruner_eval.sweep.files import write_atomic
from vlm_pruner_eval.sweep.grid import Run, expand
from vlm_pruner_eval.sweep.opening import open_session
from vlm_pruner_eval.sweep.progress import SweepProgress, quieten
from vlm_pruner_eval.sweep.session import Session, record_lost
from vlm_pruner_eval.sweep.store import FAILED, Store

MOST_DEATHS = 3  # of workers at one run, and at starting
_CLAIM_S, _LOOK_S = 1.0, 5.0
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DEDUP_LOGS": "1"}

Opener = Callable[..., Session]  # `opening.open_session`, or a stand-in of the same interface


class Worker:
    """One process of the cluster, with the model loaded; an actor of Ray.

    Parameters
    ----------
    config
        The sweep file's content.
    root, token
        The results directory as the driver names it, and a file that the driver has put there.
    todo
        Ids of the runs that may be asked for.
    opener
        Loads the model.
    """

    def __init__(self, config: SweepConfig, root: str, token: str, todo: list[str], opener: Opener):
        self._asked = config, Path(root), token, todo, opener

    def ready(self) -> dict[str, Any]:
        """Load the model; says where this worker is, and whether it works in the driver's directory.

        Not done when the worker is made: what is raised there reaches the driver as text only.
        """
        quieten()
        config, root, token, todo, opener = self._asked
        self._sees_results = (root / token).is_file()
        self._root = root if self._sees_results else Path(tempfile.mkdtemp(prefix="vlm-pruner-eval-"))
        self._runs = {run.run_id: run for run in expand(config)}
        self._session = opener(config, Store(self._root), [self._runs[run_id] for run_id in todo], console=Console(quiet=True))
        return {"host": socket.gethostname(), "pid": os.getpid(), "sees_results": self._sees_results}

    def answer_share(self, run_id: str, index: int, count: int) -> str | None:
        """Answer one share of a run into its journal; what goes wrong is met again, and recorded, by who makes the whole run."""
        part = Part(index, count)
        with self._claimed(run_id, part):
            return self._session.answer_share(self._runs[run_id], part)

    def make(self, run_id: str, retry: bool) -> dict[str, Any]:
        """Make one run; returns its problem, and its files where the driver can't read them here."""
        run = self._runs[run_id]
        with self._claimed(run_id, WHOLE):
            if retry:
                self._session.begin_again(run)
            problem = self._session.run(run)
        return {"problem": problem, "files": None if self._sees_results else self._files(run_id)}

    @contextmanager
    def _claimed(self, run_id: str, part: Part) -> Iterator[None]:
        """Wait for the worker that had this before: Ray may take it for dead while it still writes."""
        lock = claim(self._session.store.run_dir(run_id), "a Ray worker", part)
        while lock.acquire() is not None:
            time.sleep(_CLAIM_S)
        try:
            yield
        finally:
            lock.release()

    def _files(self, run_id: str) -> dict[str, bytes]:
        """What the driver is to write, the record last: it is what makes the run exist."""
        names = [path for path in self._session.store.run_dir(run_id).iterdir() if path.is_file() and not path.name.startswith(".")]
        pictures = [path for path in (self._root / "images").glob("*.jpg") if path.is_file()]
        found = sorted([*names, *pictures], key=lambda path: path.name == "run.json")
        return {str(path.relative_to(self._root)): path.read_bytes() for path in found}


@dataclass(frozen=True)
class Task:
    """A run to be made, or a share of its answers."""

    run: Run
    part: Part | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.run.key if self.part is None else f"{self.run.key}, share {self.part}"


@dataclass(frozen=True)
class RayExecutor:
    """Makes the runs of a sweep on a Ray cluster.

    Parameters
    ----------
    address
        Of a running cluster ("auto", host:port); None: a cluster of this machine alone is started, and ended afterwards.
    processes
        Workers at a time; None: one a GPU, or on a cluster without GPUs one for every two processor cores.
    parts
        Shares into which the answers of every run are split; None: 1, or as many as keep all workers busy where runs are few.
    opener
        In place of `open_session`, for programs that bring their own models.
    """

    address: str | None = None
    processes: int | None = None
    parts: int | None = None
    opener: Opener = open_session

    def run(self, work: Work) -> None:
        """Make every run of `work.todo`."""
        ray = _import_ray()
        token = f".seen-by-workers-{uuid.uuid4().hex}"
        with _connected(ray, self.address, self.processes):
            has_gpus = ray.cluster_resources().get("GPU", 0) >= 1 and work.config.model.device in (None, "cuda")
            n_workers = self.processes or max(1, int(ray.cluster_resources()["GPU"] if has_gpus else ray.cluster_resources()["CPU"] // 2))
            parts = self.parts or max(1, n_workers // len(work.todo))
            options = {"num_gpus": 1} if has_gpus else {"num_cpus": 1}
            arguments = (work.config, str(work.store.root.absolute()), token, [run.run_id for run in work.todo], self.opener)
            actor = ray.remote(**options, max_restarts=0)(Worker)
            crew = Crew(ray, work, lambda: actor.remote(*arguments), min(n_workers, parts * len(work.todo)), parts)
            try:
                write_atomic(work.store.root / token, "")
                crew.run()
            finally:
                (work.store.root / token).unlink(missing_ok=True)


@dataclass
class Crew:
    """The workers, and what each of them is at."""

    ray: ModuleType
    work: Work
    hire: Callable[[], Any]
    size: int
    parts: int
    queue: deque[Task] = field(default_factory=deque)
    idle: list[Any] = field(default_factory=list)
    busy: dict[Any, tuple[Any, Task | None]] = field(default_factory=dict)  # by the reference to a result; no task: it starts
    deaths: Counter = field(default_factory=Counter)
    left: Counter = field(default_factory=Counter)  # shares of a run that are not answered yet
    since: dict[str, float] = field(default_factory=dict)
    is_begun: bool = False

    def run(self) -> None:
        """Until nothing is left to do."""
        for run in self.work.todo:
            self._enqueue(run)
        todo = {run.run_id for run in self.work.todo}
        with SweepProgress(self.work.console, len(self.work.runs), todo=len(todo)) as self.progress:
            for run in (run for run in self.work.runs if run.run_id not in todo):
                self.work.skip(self.progress, run)
            for _ in range(self.size):
                self._hire()
            while self.queue or any(task is not None for _, task in self.busy.values()):
                self.work.check()
                self._hand_out()
                done, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=_LOOK_S)
                for reference in done:
                    self._take(reference)

    def _enqueue(self, run: Run) -> None:
        if self.parts == 1:
            self.queue.append(Task(run))
            return
        self.left[run.run_id] = self.parts
        self.queue.extend(Task(run, part) for part in Part(0, self.parts).all())

    def _hire(self) -> None:
        worker = self.hire()
        self.busy[worker.ready.remote()] = worker, None

    def _hand_out(self) -> None:
        while self.idle and self.queue:
            worker, task = self.idle.pop(), self.queue.popleft()
            self.since.setdefault(task.run.run_id, time.monotonic())
            if task.part is None:
                retry = self.work.status.get(task.run.run_id) == FAILED and not self.deaths[task.run.run_id]
                reference = worker.make.remote(task.run.run_id, retry)
            else:
                reference = worker.answer_share.remote(task.run.run_id, task.part.index, task.part.count)
            self.busy[reference] = worker, task

    def _take(self, reference: Any) -> None:
        worker, task = self.busy.pop(reference)
        exceptions = self.ray.exceptions
        try:
            result = self.ray.get(reference)
        except (exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.ObjectLostError) as error:
            self._lost(worker, task, error)
            return
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, (ConfigError, StoppedError)):
                raise error.cause from None
            raise StoppedError(f"A Ray worker could not go on: {error.cause}") from error
        if task is None:
            self._began(result)
        else:
            self._finished(task, result)
        self.idle.append(worker)

    def _began(self, about: dict[str, Any]) -> None:
        if not self.is_begun:
            self.work.begin()
            self.is_begun = True
        if not about["sees_results"]:
            self.work.console.print(
                f"{about['host']} does not see {self.work.store.root}: its runs come back when they are finished.", highlight=False
            )
            if self.parts > 1:
                raise ConfigError("--parts: shares of a run need a results directory that all workers see; leave --parts out.")

    def _finished(self, task: Task, result: Any) -> None:
        run_id = task.run.run_id
        if task.part is not None:
            self.left[run_id] -= 1
            if not self.left[run_id]:
                self.queue.appendleft(Task(task.run))  # whose answers are all there: it is scored and recorded
            return
        for name, content in (result["files"] or {}).items():
            write_atomic(self.work.store.root / name, content)
        seconds, problem = time.monotonic() - self.since[run_id], result["problem"]
        self.progress.end(task.run.key, ("finished" if problem is None else f"FAILED: {problem}") + f" in {seconds:.0f} s")

    def _lost(self, worker: Any, task: Task | None, error: Exception) -> None:
        """A worker died: its task goes to another one, unless it kills them all."""
        reason = " ".join(str(error).split())[:300]
        key = None if task is None else task.run.run_id
        self.deaths[key] += 1
        if task is None and self.deaths[key] >= MOST_DEATHS and not self.is_begun:
            raise StoppedError(f"{MOST_DEATHS} Ray workers died while they started, the last one so: {reason}")
        if task is not None and self.deaths[key] < MOST_DEATHS:
            self.work.console.print(f"{task.name}: its worker died, another one goes on.", highlight=False, markup=False)
            self.queue.appendleft(task)
        elif task is not None:
            self._give_up(task, f"{MOST_DEATHS} workers died at this run, the last one so: {reason}")
        self._hire()

    def _give_up(self, task: Task, sentence: str) -> None:
        record_lost(self.work.config, self.work.store, task.run, sentence)
        self.queue = deque(other for other in self.queue if other.run.run_id != task.run.run_id)
        self.left[task.run.run_id] = -1  # shares of it that are still being answered lead to nothing
        self.progress.end(task.run.key, f"FAILED: {sentence}")


def _import_ray() -> ModuleType:
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigError(f"--executor ray: Ray is not installed ({error}); pip install 'vlm-pruner-eval[cluster]'.") from None
    return ray


@contextmanager
def _connected(ray: ModuleType, address: str | None, processes: int | None) -> Iterator[None]:
    """A connection to the cluster, or a cluster of this machine for the time being.

    Raises
    ------
    ConfigError
        There is no cluster at the address.
    """
    if ray.is_initialized():
        yield
        return
    try:
        if address is None:
            cores = max(os.cpu_count() or 1, processes or 1)
            ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        else:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--address: got {address!r}, where no Ray cluster answers ({error}); start one by `ray start --head`.") from None
    try:
        yield
    finally:
        ray.shutdown()
