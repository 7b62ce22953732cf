"""Data sets that a process reads once, however many runs it scores on them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

Held = dict[tuple[str | None, ...], dict[str, Any]]


@contextmanager
def read_once(held: Held) -> Iterator[None]:
    """Let tasks of lmms-eval that are loaded again in the block have the data set that they read before, each a copy of its own.

    Reading it is most of the work of loading a task: it asks the hub, may get another revision the next time, and prepares the documents
    (GQA decodes all its images for that). Nothing else of a task is kept, so whatever state it has begins anew.

    Parameters
    ----------
    held
        By task, what reading its data set set; is added to.
    """
    from lmms_eval.api.task import ConfigurableTask

    original = ConfigurableTask.download

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None) -> None:
        key = type(task).__qualname__, task.config.task, task.DATASET_PATH, task.DATASET_NAME
        if key not in held:
            before = dict(vars(task))
            original(task, dataset_kwargs)
            held[key] = {name: value for name, value in vars(task).items() if name not in before or before[name] is not value}
        vars(task).update(copy.deepcopy(held[key]))  # the tables stay shared; tasks replace splits and set formats

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original
