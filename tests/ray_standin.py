"""The stand-in model in workers of a Ray cluster.

A worker's environment is that of its node, which is older than a test: how it behaves is read from a file `behaviour.json` in the
folder of the tasks, with the variables of `standin_main`, and STANDIN_WORKERS, a folder in which every worker leaves a file with its
process id as its name when it has loaded the model.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from fault_checks import Expected, Findings, Watch, age
from rich.console import Console
from standin_main import Subprocess, tasks_folder
from sweep_standin import N_VISUAL, StandIn, make_config, task_manager

from vlm_pruner_eval.sweep import on_ray
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.opening import open_session
from vlm_pruner_eval.sweep.runner import run_sweep
from vlm_pruner_eval.sweep.session import Session

HERE = Path(__file__).parent
MODEL = {"id": "vlmpruner_llava", "pretrained": "somewhere/tiny", "visual_tokens": N_VISUAL}
_BEHAVIOUR = "behaviour.json"


def behave(tasks: Path, **variables: str) -> None:
    """Let workers that begin from now on behave so."""
    (tasks / _BEHAVIOUR).write_text(json.dumps(variables))


def standin_session(*args: Any, **options: Any) -> Session:
    """As `open_session`, with the stand-in."""
    for name in [name for name in os.environ if name.startswith("STANDIN_") and name != "STANDIN_TASKS"]:
        del os.environ[name]  # a worker may have worked before
    os.environ.update(json.loads((tasks_folder() / _BEHAVIOUR).read_text()))
    model = Subprocess(size=3)
    if folder := os.environ.get("STANDIN_WORKERS"):
        (Path(folder) / str(os.getpid())).touch()
    return open_session(*args, **options | {"load": lambda *_, **__: model, "task_manager": task_manager(tasks_folder())})


def environment(tasks: Path) -> dict[str, str]:
    """Variables by which a node of the cluster can import the package and this file."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return quiet | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "STANDIN_TASKS": str(tasks)}


@contextmanager
def with_standin() -> Iterator[None]:
    """Sweeps with `--executor ray` use the stand-in."""
    with mock.patch.object(on_ray, "work_on_ray", partial(on_ray.work_on_ray, opener=standin_session)):
        yield


def config(**changes: Any) -> SweepConfig:
    """Ten units of 12 answers each."""
    methods = ["vlmpruner", {"name": "random", "seeds": [0, 1]}, "blind"]
    return make_config(**{"methods": methods, "model": {**MODEL, "batch_size": 3}} | changes)


def alone(tasks: Path, output: Path) -> Expected:
    """What one process leaves."""
    silent = Console(file=io.StringIO())
    run_sweep(config(), output, console=silent, load=lambda *_, **__: StandIn(size=3), task_manager=task_manager(tasks))
    return Expected(config(), output)


def compare(tasks: Path, output: Path, expected: Expected) -> Findings:
    """What is wrong with a sweep after all, when the next command has tidied up two hours later."""
    age(output)
    alone(tasks, output)
    watch = Watch(output, expected)
    watch.finish("at last")
    return watch.findings
