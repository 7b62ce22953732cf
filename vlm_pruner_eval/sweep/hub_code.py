"""Benchmarks whose task file lets the hub's copy of a dataset run code of its own: only where the user asked for that by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

from vlm_pruner_eval.sweep.task_modules import single_tasks

SWITCH = "HF_DATASETS_TRUST_REMOTE_CODE"  # the library's own
_LAST_WITH_SCRIPTS = 3  # major version of datasets; later ones can't run any


def hub_code_problems(tasks: Sequence[str], task_manager: Any) -> Iterator[str]:
    """A sentence for each task, members of groups included, that would run code from the hub unasked.

    Parameters
    ----------
    tasks
        Names that lmms-eval knows.
    task_manager
        Its task index.
    """
    if int(metadata.version("datasets").split(".")[0]) > _LAST_WITH_SCRIPTS or os.environ.get(SWITCH, "").lower() in ("1", "true", "yes"):
        return
    for name, _, raw in single_tasks(tasks, task_manager):
        if (raw.get("dataset_kwargs") or {}).get("trust_remote_code"):
            yield f"tasks: {name} runs code that comes with its dataset (trust_remote_code); set {SWITCH}=1 to allow it, or leave it out."
