"""What one sweep file needs: its checkpoint, tasks and data sets, looked up without downloading anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding
from vlm_pruner_eval.sweep.config import SweepConfig

WEIGHTS = (".safetensors", ".bin")


def model_id(config: SweepConfig) -> Iterator[Finding]:
    """The model id of the file."""
    from vlm_pruner_eval.errors import closest
    from vlm_pruner_eval.lmms.plugin import MODELS

    if config.model.id in MODELS:
        yield Finding("model id", OK, config.model.id)
    else:
        yield Finding("model id", FAIL, f"{config.model.id} is unknown", f"Mend model.id; {closest(config.model.id, MODELS)}")


def checkpoint(config: SweepConfig) -> Iterator[Finding]:
    """Whether the checkpoint is on this machine, whole."""
    name, revision = config.model.pretrained, config.model.revision
    folder = _folder(name, revision)
    if folder is None:
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            yield Finding(
                "checkpoint", WARN, f"{name} is not in the cache", "It will be downloaded when the sweep begins; see that it fits."
            )
        else:
            yield Finding("checkpoint", FAIL, f"{name} is no folder and no hub id", "Mend model.pretrained.")
        return
    names = {file.name for file in folder.iterdir()}
    weights = [file for file in folder.iterdir() if file.suffix in WEIGHTS]
    missing = [what for what, there in (("config.json", "config.json" in names), ("weights", weights)) if not there]
    if missing:
        yield Finding("checkpoint", FAIL, f"{folder} lacks {' and '.join(missing)}", "Download it again, or mend model.pretrained.")
    elif all(file.suffix == ".bin" for file in weights) and not config.model.allow_bin:
        fix = "Use a checkpoint with safetensors, or set allow_bin: true in the model section."
        yield Finding("checkpoint", FAIL, f"{folder} has weights in .bin files only", fix)
    else:
        size = sum(file.stat().st_size for file in weights) / 1e9
        yield Finding("checkpoint", OK, f"{folder}, {size:.1f} GB of weights")


def _folder(name: str, revision: str | None) -> Path | None:
    if name == "minivlm":
        from vlm_pruner_eval.bench import minivlm_path

        return minivlm_path()
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def tasks(config: SweepConfig) -> Iterator[Finding]:
    """Whether lmms-eval knows the tasks, and whether their data are here."""
    from vlm_pruner_eval.errors import ConfigError
    from vlm_pruner_eval.sweep.opening import check_tasks, unscorable

    try:
        manager = check_tasks(config)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("tasks", FAIL, problem, "Mend tasks in the file.")
        return
    for task in unscorable(config, manager):
        yield Finding(f"task {task}", WARN, "is scored elsewhere, from a file that is written here", "Leave it out, or submit the file.")
    for task in config.tasks:
        yield from _data(task, manager)


def _data(task: str, manager: Any) -> Iterator[Finding]:
    paths = sorted(set(_data_sets(task, manager)))
    missing = [path for path in paths if not _is_here(path)]
    if missing:
        fix = "It will be downloaded when the sweep begins; see that it fits, and that the hub can be reached."
        yield Finding(f"task {task}", WARN, f"not in the cache: {', '.join(missing)}", fix)
    else:
        yield Finding(f"task {task}", OK, f"data: {', '.join(paths) or 'within the task'}")


def _data_sets(name: str, manager: Any) -> Iterator[str]:
    """Hub data sets of a task, or of the members of a group."""
    from lmms_eval.utils import load_yaml_config

    entry = manager.task_index.get(name, {})
    path = entry.get("yaml_path", -1)
    raw = load_yaml_config(path, mode="simple") if path != -1 else entry
    members = raw.get("task")
    if isinstance(members, list):
        for member in members:
            if isinstance(member, str):
                yield from _data_sets(member, manager)
    elif isinstance(raw.get("dataset_path"), str) and "/" in raw["dataset_path"]:
        yield raw["dataset_path"]


def _is_here(path: str) -> bool:
    """Whether a data set was prepared in its cache, or its files were downloaded."""
    from datasets import config
    from huggingface_hub import constants

    prepared = Path(config.HF_DATASETS_CACHE) / path.replace("/", "___").lower()
    downloaded = Path(constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}" / "snapshots"
    return Path(path).exists() or any(folder.is_dir() and any(folder.iterdir()) for folder in (prepared, downloaded))
