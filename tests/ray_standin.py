"""The stand-in model in workers of a Ray cluster; how it behaves is in their environment, see `standin_main`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from standin_main import Subprocess, tasks_folder
from sweep_standin import task_manager

from vlm_pruner_eval.sweep.opening import open_session
from vlm_pruner_eval.sweep.session import Session

HERE = Path(__file__).parent


def standin_session(*args: Any, **options: Any) -> Session:
    """As `open_session`, with the stand-in. Says into STANDIN_LOG's folder which process it is in."""
    if folder := os.environ.get("STANDIN_WORKERS"):
        (Path(folder) / str(os.getpid())).touch()
    model = Subprocess(size=int(os.environ.get("STANDIN_SIZE", "3")))
    return open_session(*args, **options, load=lambda *_, **__: model, task_manager=task_manager(tasks_folder()))


def environment() -> dict[str, str]:
    """What a node of the cluster needs to import the package and this file."""
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


sys.path.insert(0, str(HERE))
