"""Python modules that the tasks of a sweep name: imported before a model is loaded, as what one of them lacks would fail every run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from vlm_pruner_eval.redact import of_error

# Distributions whose name is not that of the package that they bring.
_DISTRIBUTIONS = {"cv2": "opencv-python-headless", "skimage": "scikit-image", "sklearn": "scikit-learn", "PIL": "Pillow", "yaml": "PyYAML"}
_WHEELS = {"decord": "there are wheels of it for Linux on x86-64 only; elsewhere leave the task out"}


def module_problems(tasks: Sequence[str], task_manager: Any) -> Iterator[str]:
    """A sentence for each task, members of groups included, whose functions can't be imported here.

    Parameters
    ----------
    tasks
        Names that lmms-eval knows.
    task_manager
        Its task index.
    """
    from lmms_eval.utils import load_yaml_config

    for name, path, _ in single_tasks(tasks, task_manager):
        if path is None:
            continue
        try:
            with contextlib.redirect_stdout(sys.stderr):
                load_yaml_config(path, mode="full")
        except Exception as error:  # whatever the modules of a task raise while they are imported; it is told, and stops the sweep
            yield f"tasks: {name} can't be loaded, as {_reason(error)}"


def single_tasks(tasks: Sequence[str], task_manager: Any) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Name, file and content of each task, groups and tags taken apart; None for the file of one that stands in a group's."""
    from lmms_eval.utils import load_yaml_config

    names = list(tasks)
    seen = set()
    while names:
        name = names.pop(0)
        if not isinstance(name, str) or name in seen:
            continue
        seen.add(name)
        entry = task_manager.task_index.get(name, {})
        path = entry.get("yaml_path", -1)
        raw = load_yaml_config(path, mode="simple") if path != -1 else entry
        members = raw.get("task")
        if isinstance(members, list):
            names += members
        else:
            yield name, None if path == -1 else path, raw


def _reason(error: BaseException) -> str:
    """The package that is missing and how to install it, or what was raised."""
    missing = _missing(error)
    if missing is None:
        return f"its functions raise {of_error(error)}; mend that, or leave the task out."
    note = f" ({_WHEELS[missing]})" if missing in _WHEELS else ""
    return f"it needs the package {missing}, which is not installed: `pip install {_DISTRIBUTIONS.get(missing, missing)}`{note}."


def _missing(error: BaseException | None) -> str | None:
    """Top-level package that an import did not find, behind lmms-eval's own exception."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition(".")[0]
        error = error.__cause__ or error.__context__
    return None
