"""The tasks of a sweep file, and whether their data sets are on this machine or can be downloaded."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding
from vlm_pruner_eval.doctor.surroundings import LOGIN, checkpoint_cache, data_cache, offline_switches
from vlm_pruner_eval.doctor.task_sources import loads_of
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.config import SweepConfig

_NO_DATA = {".md", ".py", ".gitattributes", ".yaml"}


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub, as a task file asks for it.

    Attributes
    ----------
    path
        Its id on the hub.
    part
        The configuration of the data set, or None for its default one.
    token
        Whether the task asks for a hub token; `datasets` then refuses to download without one, even what is public.
    videos
        The folder that its videos are unpacked into, or None.
    """

    path: str
    part: str | None = None
    token: bool = False
    videos: str | None = None

    @property
    def shown(self) -> str:
        """Id and configuration."""
        return self.path if self.part is None else f"{self.path} ({self.part})"


def tasks(config: SweepConfig) -> Iterator[Finding]:
    """Whether lmms-eval knows the tasks, and whether their data are here."""
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
        try:
            wanted = sorted(set(data_sets(task, manager)), key=str)
        except ConfigError as error:
            yield Finding(f"task {task}", FAIL, str(error), "Name its tasks one by one in the file.")
            continue
        yield _data(f"task {task}", wanted)


def data_sets(member: str | dict[str, Any], manager: Any) -> Iterator[DataSet]:
    """Hub data sets of a task, or of the members of a group, with those that its functions load.

    Parameters
    ----------
    member
        The name of a task, group or tag that lmms-eval knows; or, as groups may hold them, the mapping of a group or task within.
    manager
        lmms-eval's ``TaskManager``.

    Raises
    ------
    ConfigError
        A group holds a name that lmms-eval does not know.
    """
    from lmms_eval.utils import load_yaml_config

    entry = member if isinstance(member, dict) else manager.task_index.get(member)
    if entry is None:
        raise ConfigError(f"it is a group that holds {member}, which lmms-eval does not know")
    path = entry.get("yaml_path", -1)
    raw = load_yaml_config(path, mode="simple") if path != -1 else entry
    inside = raw.get("task")
    if isinstance(inside, list):
        for each in inside:
            yield from data_sets(each, manager)
    elif "dataset_path" not in raw and inside in manager.task_index and inside != member:
        yield from data_sets(inside, manager)
    elif _is_of_hub(raw.get("dataset_path")):
        more = raw.get("dataset_kwargs") or {}
        videos = more.get("cache_dir") if more.get("video") else None
        yield DataSet(raw["dataset_path"], raw.get("dataset_name"), more.get("token") is True, videos)
    if path != -1 and not isinstance(inside, list):
        yield from _loaded_besides(path)


def _loaded_besides(path: str) -> Iterator[DataSet]:
    """Data sets of the hub that the functions of a task file load themselves (the pictures of GQA)."""
    from lmms_eval.utils import load_yaml_config

    for found in loads_of(load_yaml_config(path, mode="full")):
        if _is_of_hub(found["path"]):
            yield DataSet(found["path"], found["name"], found["token"])


def _is_of_hub(path: object) -> bool:
    """Whether it is an id of the hub: no folder, and no reader of files such as parquet."""
    if not isinstance(path, str) or Path(path).exists():
        return False
    return "/" in path or importlib.util.find_spec(f"datasets.packaged_modules.{path}") is None


def _data(name: str, wanted: list[DataSet]) -> Finding:
    """One finding for all data sets of a task: what stops it goes before what is only slow."""
    from huggingface_hub import get_token

    absent = [data for data in wanted if not is_prepared(data)]
    if not absent:
        return Finding(name, OK, f"data: {_names(wanted) or 'within the task'}")
    if switches := offline_switches():
        fix = f"Unset {', '.join(switches)}, or run the task once where the hub can be reached, with the same HF_HOME."
        return Finding(name, FAIL, f"not prepared: {_names(absent)}, and nothing is downloaded", fix)
    if not get_token() and (asking := [data for data in absent if data.token]):
        return Finding(name, FAIL, f"not here, and downloaded with a hub token only: {_names(asking)}", LOGIN)
    if missing := [data for data in absent if not is_downloaded(data)]:
        fix = "It is downloaded when the sweep begins; see that it fits, and that the hub can be reached."
        return Finding(name, WARN, f"not in the cache: {_names(missing)}", fix)
    fix = "It is prepared when the sweep begins, for which the hub must be reached."
    return Finding(name, WARN, f"downloaded, not prepared: {_names(absent)}", fix)


def _names(found: Iterable[DataSet]) -> str:
    return ", ".join(data.shown for data in found)


def is_prepared(data: DataSet) -> bool:
    """Whether `datasets` made its tables, and lmms-eval unpacked its videos: then neither network nor token is needed."""
    from datasets.naming import camelcase_to_snakecase

    owner, _, name = data.path.rpartition("/")
    folder = data_cache() / (f"{owner}___" * bool(owner) + camelcase_to_snakecase(name))
    tables = [file.relative_to(folder).parts for file in folder.rglob("*.arrow") if file.is_file()]
    parts = [parts[0] for parts in tables if not any(part.endswith(".incomplete") for part in parts)]
    has_tables = any(data.part in (None, part) or part.startswith(f"{data.part}-") for part in parts)
    return has_tables and (data.videos is None or _has_files(_video_folder(data.videos)))


def is_downloaded(data: DataSet) -> bool:
    """Whether files of it are in the hub's cache, beyond its card."""
    files = (checkpoint_cache() / f"datasets--{data.path.replace('/', '--')}" / "snapshots").rglob("*")
    return any(file.is_file() and file.suffix not in _NO_DATA and file.name not in _NO_DATA for file in files)


def _video_folder(cache_dir: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / Path(os.path.expandvars(cache_dir)).expanduser()


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
