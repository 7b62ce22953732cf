"""The stand-in model in workers of a Ray cluster, and the command line with `--executor ray` that uses it.

    python tests/ray_standin.py sweep FILE --executor ray ...

How it behaves is read from the environment, see `standin_main`, and from a file `behaviour.json` in the folder of the tasks that
holds more of the same: the environment of a worker is that of its node, which is older than a test. STANDIN_WORKERS is a folder in
which every worker leaves a file with its process id as its name when it loads the model.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from standin_main import Subprocess, tasks_folder
from sweep_standin import task_manager
from vlm_pruner_eval.sweep.executors import RayExecutor

from vlm_pruner_eval import cli
from vlm_pruner_eval.report import printing
from vlm_pruner_eval.sweep import executors
from vlm_pruner_eval.sweep.opening import open_session
from vlm_pruner_eval.sweep.session import Session

HERE = Path(__file__).parent
_BEHAVIOUR = "behaviour.json"


def behave(tasks: Path, **variables: str) -> None:
    """Let workers that are started from now on behave so."""
    (tasks / _BEHAVIOUR).write_text(json.dumps(variables))


def standin_session(*args: Any, **options: Any) -> Session:
    """As `open_session`, with the stand-in."""
    file = tasks_folder() / _BEHAVIOUR
    os.environ.update(json.loads(file.read_text()) if file.exists() else {})
    if folder := os.environ.get("STANDIN_WORKERS"):
        (Path(folder) / str(os.getpid())).touch()
    model = Subprocess(size=int(os.environ.get("STANDIN_SIZE", "3")))
    return open_session(*args, **options, load=lambda *_, **__: model, task_manager=task_manager(tasks_folder()))


def environment(tasks: Path) -> dict[str, str]:
    """What a node of the cluster needs to import the package and this file."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return quiet | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "STANDIN_TASKS": str(tasks)}


def main() -> None:
    import ray_standin  # under its own name, by which workers import it

    executors.RayExecutor = functools.partial(RayExecutor, opener=ray_standin.standin_session)
    printing.write_and_print = lambda directory, out: {"md": directory / "report.md"}
    cli.main()


if __name__ == "__main__":
    main()
