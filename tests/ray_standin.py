"""The stand-in model in workers of a Ray cluster, and what such a sweep must leave.

A worker's environment is that of its node, which is older than a test: how it behaves is read from a file `behaviour.json` in the
folder of the tasks, with the variables of `standin_main` and those of `_end_if_due`.
"""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from fault_checks import Expected, Findings, Watch, age
from rich.console import Console
from standin_main import Subprocess, tasks_folder
from sweep_standin import N_VISUAL, StandIn, make_config, task_manager

from vlm_pruner_eval.lmms.prompts import Request
from vlm_pruner_eval.store.answers import Batch, Done
from vlm_pruner_eval.sweep import on_ray
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.opening import open_session
from vlm_pruner_eval.sweep.runner import run_sweep
from vlm_pruner_eval.sweep.session import Session

HERE = Path(__file__).parent
MODEL = {"id": "vlmpruner_llava", "pretrained": "somewhere/tiny", "batch_size": 3, "visual_tokens": N_VISUAL}


class Worker(Subprocess):
    """Ends by itself, or with its node, when its time has come."""

    def batches_of(self, asked: Sequence[Request], done: Done) -> Iterator[Batch]:
        for batch in super().batches_of(asked, done):
            _end_if_due()
            yield batch


def _end_if_due() -> None:
    """End this process when all workers together have given STANDIN_AFTER answers, a moment (STANDIN_DELAY, s) later.

    One process does, which leaves the file STANDIN_KILLED; with STANDIN_RAYLET one of the node with that process, and the node with it.
    """
    log = Path(os.environ.get("STANDIN_LOG", ""))
    given = len(log.read_text().splitlines()) if log.is_file() else 0
    raylet = int(os.environ.get("STANDIN_RAYLET", "0"))
    is_its_node = not raylet or raylet in [process.pid for process in psutil.Process().parents()]
    if not is_its_node or given < int(os.environ.get("STANDIN_AFTER", "1000000")):
        return
    try:
        Path(os.environ["STANDIN_KILLED"]).touch(exist_ok=False)
    except FileExistsError:
        return

    def end() -> None:
        for pid in filter(None, (raylet, os.getpid())):
            os.kill(pid, signal.SIGKILL)

    threading.Timer(float(os.environ["STANDIN_DELAY"]), end).start()


def behave(tasks: Path, **variables: object) -> None:
    """Let workers that begin from now on behave so."""
    (tasks / "behaviour.json").write_text(json.dumps({name: str(value) for name, value in variables.items()}))


def standin_session(*args: Any, **options: Any) -> Session:
    """As `open_session`, with the stand-in."""
    for name in [name for name in os.environ if name.startswith("STANDIN_") and name != "STANDIN_TASKS"]:
        del os.environ[name]  # a worker may have worked before
    os.environ.update(json.loads((tasks_folder() / "behaviour.json").read_text()))
    _end_if_due()
    model = Worker(size=3)
    return open_session(*args, **options | {"load": lambda *_, **__: model, "task_manager": task_manager(tasks_folder())})


def environment(tasks: Path) -> dict[str, str]:
    """Variables by which a node of the cluster can import the package and this file."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    own = {"STANDIN_TASKS": str(tasks), "HF_DATASETS_CACHE": str(tasks.parent / "datasets")}
    return quiet | own | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def with_standin() -> Iterator[None]:
    """Sweeps with `--executor ray` use the stand-in."""
    with mock.patch.object(on_ray, "work_on_ray", partial(on_ray.work_on_ray, opener=standin_session)):
        yield


def config(**changes: Any) -> SweepConfig:
    """Ten units of 12 answers each."""
    return make_config(**{"methods": ["vlmpruner", {"name": "random", "seeds": [0, 1]}, "blind"], "model": MODEL} | changes)


def alone(tasks: Path, output: Path) -> Expected:
    """What one process leaves."""
    silent = Console(file=io.StringIO())
    run_sweep(config(), output, console=silent, load=lambda *_, **__: StandIn(size=3), task_manager=task_manager(tasks))
    return Expected(config(), output)


def compare(output: Path, expected: Expected) -> Findings:
    """What is wrong with a sweep after all, two hours later."""
    age(output)
    watch = Watch(output, expected)
    watch.finish("at last")
    return watch.findings
