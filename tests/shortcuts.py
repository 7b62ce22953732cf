"""What costs seconds in every sweep, done once a process: the self-test, lmms-eval's tasks and their index; and blank figures."""

from __future__ import annotations

import functools
import importlib
import io
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmms_eval.models  # loads the plugins
import lmms_eval.tasks
import pytest
from PIL import Image

from vlm_pruner_eval import selftest
from vlm_pruner_eval.report.figures.report_figures import WORDS
from vlm_pruner_eval.store.files import write_atomic
from vlm_pruner_eval.sweep import identity, opening
from vlm_pruner_eval.sweep.config import SweepConfig


def take(patch: pytest.MonkeyPatch) -> None:
    """Let sweeps of this process, and of its forks, take the shortcuts."""
    patch.setattr(opening, "selftest", SimpleNamespace(run=lambda: _test(selftest.run)))
    patch.setattr(opening, "check_tasks", functools.partial(_check_tasks, opening.check_tasks))
    patch.setattr(importlib.import_module("vlm_pruner_eval.report.build"), "draw_all", _blank_figures)
    patch.setattr(identity, "_definitions", functools.partial(_definitions, identity._definitions))


@functools.cache
def _test(run: Callable[[], None]) -> None:
    run()


def _check_tasks(check: Callable[..., Any], config: SweepConfig, task_manager: Any = None) -> Any:
    if task_manager is None and config.include_path is None:
        task_manager = index_for(config.model.id)
    return check(config, task_manager)


def _definitions(read: Callable[..., dict[str, list[Path]]], folders: Iterable[Path]) -> dict[str, list[Path]]:
    """The tasks that files define; those of lmms-eval itself, which are thousands, are read once."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        of_folder = _packaged(read, folder) if folder == Path(lmms_eval.tasks.__file__).parent else read([folder])
        for name, files in of_folder.items():
            found.setdefault(name, []).extend(files)
    return found


@functools.cache
def _packaged(read: Callable[..., dict[str, list[Path]]], folder: Path) -> dict[str, list[Path]]:
    return read([folder])


def index_for(model: str) -> Any:
    """lmms-eval's whole index, packaged tasks included, as a model sees it."""
    return _index(lmms_eval.tasks.TaskManager, model)


@functools.cache
def _index(make: Callable[..., Any], model: str) -> Any:
    return make(verbosity="WARNING", model_name=model)


def _blank_figures(rows: object, results: object, folder: Path, comparisons: object) -> dict[str, list[Path]]:
    """Write empty pictures; tests of figures call `draw_all` itself."""
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, format="png")
    contents = {"png": png.getvalue(), "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'}
    paths = {name: [folder / f"{name}.{suffix}" for suffix in contents] for name in WORDS}
    for path in itertools.chain(*paths.values()):
        write_atomic(path, contents[path.suffix[1:]])
    return paths
