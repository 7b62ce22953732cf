"""`--executor ray`: runs made by workers of a Ray cluster, each of which loads the model once.

The driver, which holds the results directory, hands out runs, and shares of them where there are more workers than runs. What a
worker answers is in the journals of the directory, so when it dies, another one goes on behind its last batch. A worker that does
not see the directory works in a folder of its own and sends the files of a finished run back; when that one dies, the run begins anew.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep import provenance
from vlm_pruner_eval.sweep.executors.allotment import sweep_file
from vlm_pruner_eval.sweep.executors.base import Work
from vlm_pruner_eval.sweep.executors.ray_crew import Crew
from vlm_pruner_eval.sweep.executors.ray_worker import Opener, Worker
from vlm_pruner_eval.sweep.files import write_atomic
from vlm_pruner_eval.sweep.opening import open_session

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_OBJECTS_BYTES = 200_000_000  # of a cluster that we start: only small things travel there
_CONNECT_S = 10.0
_MOST_ON_A_NODE = 4  # workers without a GPU, unless more are asked for: every one holds the model in memory


@dataclass(frozen=True)
class RayExecutor:
    """Makes the runs of a sweep on a Ray cluster.

    Parameters
    ----------
    address
        Of a running cluster ("auto", host:port); None: that of the environment (RAY_ADDRESS), or a cluster of this machine alone
        is started, and ended afterwards.
    processes
        Workers at a time; None: one a GPU, or on a cluster without GPUs one for every two processor cores, at most 4 a node.
    parts
        Shares into which the answers of every run are split; None: as many as keep all workers busy where few runs are left.
    opener
        In place of `open_session`, for programs that bring their own models: a function of a module that every node has.
    """

    address: str | None = None
    processes: int | None = None
    parts: int | None = None
    opener: Opener = open_session

    def run(self, work: Work) -> None:
        """Make every run of `work.todo`.

        Raises
        ------
        ConfigError
            No Ray, no cluster, or what a worker says of the request.
        StoppedError
            See `Crew.run`.
        """
        if work.load is not None or work.task_manager is not None:
            raise ConfigError("executor: a loader or a task index of your own can't be handed to Ray workers; give RayExecutor an opener.")
        if work.config.share_prefix and len(work.todo) > 1:
            line = "share_prefix: Ray workers make runs one by one, so each computes all of it; the answers are the same."
            work.console.print(line, highlight=False, soft_wrap=True)
        ray = _import_ray(alone=_address(self.address) is None)
        with _connected(ray, self.address, self.processes), _token(work) as token:
            wants, available = _resources(ray, work.config.model.device)
            actor = ray.remote(**wants, max_restarts=0)(Worker)
            told = _told(work, token) | {"opener": self.opener}
            size, most = self.processes or available, None if self.parts is None else self.parts * len(work.todo)
            Crew(ray, work, lambda: actor.remote(**told), size if most is None else min(size, most), self.parts).run()


def _told(work: Work, token: str) -> dict[str, Any]:
    """What every worker needs to know, in plain types."""
    return {
        "sweep": sweep_file(work.config),
        "todo": [run.run_id for run in work.todo],
        "folder": os.getcwd(),
        "root": str(work.store.root.absolute()),
        "token": token,
        "made_by": {"command": provenance.command_line()},
    }


@contextmanager
def _token(work: Work) -> Iterator[str]:
    """A file by which a worker knows the directory when it sees it."""
    name = f".seen-by-workers-{uuid.uuid4().hex}"
    write_atomic(work.store.root / name, "")
    try:
        yield name
    finally:
        (work.store.root / name).unlink(missing_ok=True)


def _resources(ray: ModuleType, device: str | None) -> tuple[dict[str, int], int]:
    """What a worker asks of the cluster, and how many of them it has places for."""
    if device is not None and device.startswith("cuda:"):
        raise ConfigError(f"model.device: got {device!r}, but Ray gives every worker a GPU of its own; write cuda, or leave it out.")
    total, nodes = ray.cluster_resources(), [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if device != "cpu" and total.get("GPU", 0) >= 1:
        return {"num_gpus": 1}, int(total["GPU"])
    return {"num_cpus": 1}, max(1, sum(min(int(node.get("CPU", 0)) // 2, _MOST_ON_A_NODE) for node in nodes))


def _address(given: str | None) -> str | None:
    return given or os.environ.get("RAY_ADDRESS") or None


def _import_ray(*, alone: bool) -> ModuleType:
    """The module; `alone`: for a cluster of this process, which then answers to nobody else. Ray reads its settings as it is imported."""
    settings = _QUIET
    if alone and not any(name.startswith("RAY_AUTH_") for name in os.environ):
        settings = settings | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if "ray" not in sys.modules:
        os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
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
    address = _address(address)
    silent = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:  # "local": Ray would look for a cluster of anyone on this machine
        cores = max(os.cpu_count() or 1, processes or 1)
        silent |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": _OBJECTS_BYTES}
    elif address != "auto":
        _check_address(address)
    try:
        with _own_signals():
            ray.init(address=address or "local", **silent)
        hush(ray)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if address is None:
            raise ConfigError(f"--executor ray: Ray can't be started on this machine ({error}).") from None
        raise _no_cluster(address, error) from None
    try:
        yield
    finally:
        ray.shutdown()


def hush(ray: ModuleType) -> None:
    """Keep what Ray says of deaths, dozens of lines that no option turns off, out of standard output; the sweep says it in one."""
    internal = getattr(ray._private, "worker", None)
    if hasattr(internal, "_worker_logs_enabled"):  # versions without it are loud
        internal._worker_logs_enabled = False


def _check_address(address: str) -> None:
    """Refuse an address where nobody listens: Ray would try again for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise ConfigError(
            f"--address: got {address!r}, expected auto, or HOST:PORT of the cluster's head; the sweep runs on one of its nodes."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"--address: got {address!r}, where no Ray cluster can be joined ({error}); start one by `ray start --head`. If it wants a "
        "token, RAY_AUTH_MODE=token is needed here, too."
    )


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what this process does on SIGTERM: Ray would end it at once, with the lock of the directory still there."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
