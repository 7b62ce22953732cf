"""`--executor ray`: the worker loop as tasks of a Ray cluster, over a folder that every node sees."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from vlm_pruner_eval.errors import ConfigError, StoppedError
from vlm_pruner_eval.store.files import TEMPORARY
from vlm_pruner_eval.sweep import config as sweep_config
from vlm_pruner_eval.sweep.opening import open_session
from vlm_pruner_eval.sweep.work import Work, work_here, work_of
from vlm_pruner_eval.sweep.workers import MOST_DEATHS, Watch, sweep_file

_MOST_ON_A_NODE = 4  # workers without a GPU, unless more are asked for: every one holds the model in memory
_LOOK_S, _CONNECT_S = 1.0, 5.0
_OBJECTS_BYTES = 80_000_000  # results are files


def work_on_ray(work: Work, address: str | None, processes: int | None, opener: Any = open_session) -> None:
    """Make the units by workers of a Ray cluster; one that dies is started again, on another node if need be.

    Parameters
    ----------
    address
        Of a running cluster ("auto", host:port); None: that of the environment, or a cluster of this machine for the time being.
    processes
        Workers; None: one a GPU, or one for every two cores, at most 4 a node, if there is no GPU.
    opener
        In place of `open_session`: a function of a module that every node has.

    Raises
    ------
    ConfigError
        No Ray, no cluster, a node that does not see the folder, or what a worker says of the request.
    StoppedError
        Nothing can go on.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    ray = _import_ray(is_own=address is None)
    told = {"sweep": sweep_file(work.config), "root": str(work.store.root.absolute()), "folder": os.getcwd()}
    told |= {"todo": [unit.path for unit in work.todo], "command": work.command}
    seen = partial(tempfile.NamedTemporaryFile, dir=work.store.root, prefix=".seen-by-workers.", suffix=TEMPORARY)
    with _connected(ray, address, processes), seen() as known:  # the file by which a worker knows the folder when it sees it
        wants, places = _resources(ray, work.config.model.device)
        remote = ray.remote(**wants, max_retries=MOST_DEATHS)(_work)
        left = [remote.remote(told | {"seen": known.name}, opener) for _ in range(min(processes or places, len(work.todo)))]
        watch = Watch(work)
        while left:
            ended, left = ray.wait(left, timeout=_LOOK_S)
            watch.look(now=True)
            for task in ended:
                _result(ray, task)


def _work(told: Mapping[str, Any], opener: Any) -> None:
    """One worker: what `sweep` does in a process of its own."""
    from vlm_pruner_eval.sweep.progress import quieten

    root = Path(told["root"])
    if not (root / Path(told["seen"]).name).is_file():
        raise ConfigError(
            f"output: {told['root']!r} is not seen from the node {os.uname().nodename}; Ray workers write into it, so give a folder on a "
            "disk that every node shares."
        )
    quieten()
    os.chdir(told["folder"] if Path(told["folder"]).is_dir() else root)
    config = sweep_config.validate(told["sweep"])
    work_here(work_of(config, root, Console(stderr=True), todo=set(told["todo"]), command=told["command"]), opener)


def _result(ray: ModuleType, task: Any) -> None:
    try:
        ray.get(task)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, (ConfigError, StoppedError)) else None
        raise cause or StoppedError(f"A Ray worker can't go on: {error}") from error
    except ray.exceptions.RayError as error:  # its node died once too often
        lost = f"A Ray worker was lost {MOST_DEATHS + 1} times ({type(error).__name__}); give the same command again."
        raise StoppedError(lost) from error


def _resources(ray: ModuleType, device: str | None) -> tuple[dict[str, int], int]:
    """What a worker asks of the cluster, and how many of them it has places for."""
    if device is not None and device.startswith("cuda:"):
        raise ConfigError(f"model.device: got {device!r}, but Ray gives every worker a GPU of its own; write cuda, or leave it out.")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if device != "cpu" and gpus:
        return {"num_gpus": 1}, gpus
    return {"num_cpus": 1}, max(1, sum(min(int(node.get("CPU", 0)) // 2, _MOST_ON_A_NODE) for node in nodes))


def _import_ray(*, is_own: bool) -> ModuleType:
    """The module; a cluster of this process answers to nobody else. Ray reads its settings as it is imported."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if is_own and not any(name.startswith("RAY_AUTH_") for name in os.environ):
        settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
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
    """A connection to the cluster, or a cluster of this machine for the time being."""
    if ray.is_initialized():
        yield
        return
    silent: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:  # "local": Ray would look for a cluster of anyone on this machine
        silent |= {"num_cpus": max(os.cpu_count() or 1, processes or 1), "include_dashboard": False, "object_store_memory": _OBJECTS_BYTES}
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address not in (None, "auto"):  # Ray would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        ray.init(address=address or "local", **silent)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        where = "on this machine" if address is None else f"at {address!r} (start one by `ray start --head`)"
        raise ConfigError(f"--executor ray: no cluster {where} can be joined ({error}).") from None
    # what Ray has turned on: an end at once on SIGTERM, and dozens of lines about every death on standard output
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)
    ray._private.worker._worker_logs_enabled = False
    try:
        yield
    finally:
        ray.shutdown()
