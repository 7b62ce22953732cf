"""Tasks of a sweep file, and their data sets on this machine or on the hub."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding
from vlm_pruner_eval.doctor.surroundings import LOGIN, data_cache, offline_switches
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.config import SweepConfig


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
        True if the task asks for a hub token; `datasets` then refuses to download without one, even what is public.
    videos
        The folder that its videos are unpacked into, or None.
    """

    path: str
    part: str | None = None
    token: bool = False
    videos: str | None = None

    def __str__(self) -> str:
        return self.path if self.part is None else f"{self.path} ({self.part})"


def tasks(config: SweepConfig) -> Iterator[Finding]:
    """Look for the tasks in lmms-eval, and for their data here."""
    from vlm_pruner_eval.sweep.opening import check_tasks, unscorable

    try:
        manager = check_tasks(config)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("tasks", FAIL, problem, "Mend tasks in the file.")
        return
    for task in unscorable(config, manager):
        found = "is scored elsewhere, from a file that is written here"
        yield Finding(f"task {task}", WARN, found, "Leave it out, or submit the file.")
    for task in config.tasks:
        try:
            wanted = sorted(set(data_sets(task, manager)), key=repr)
        except ConfigError as error:
            yield Finding(f"task {task}", FAIL, str(error), "Name its tasks one by one in the file.")
            continue
        yield _data(f"task {task}", wanted)


# ---- from a task to its data sets
def data_sets(member: str | dict[str, Any], manager: Any) -> Iterator[DataSet]:
    """Yield hub data sets of a task, or of the members of a group, with those that its functions load.

    Parameters
    ----------
    member
        The name of a task, group or tag that lmms-eval knows; or the mapping of a group or task within a group.
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
        return
    if "dataset_path" not in raw and inside in manager.task_index and inside != member:
        yield from data_sets(inside, manager)
    elif _is_of_hub(raw.get("dataset_path")):
        more = raw.get("dataset_kwargs") or {}
        videos = more.get("cache_dir") if more.get("video") else None
        yield DataSet(raw["dataset_path"], raw.get("dataset_name"), more.get("token") is True, videos)
    if path != -1:
        yield from _loaded_besides(path)


def _is_of_hub(path: object) -> bool:
    """True for an id of the hub: no folder, and no reader of files such as parquet."""
    if not isinstance(path, str) or Path(path).exists():
        return False
    return "/" in path or importlib.util.find_spec(f"datasets.packaged_modules.{path}") is None


def _loaded_besides(path: str) -> Iterator[DataSet]:
    """Data sets that functions load in the file of a task's functions (the pictures of GQA), read from its source."""
    from lmms_eval.utils import load_yaml_config

    values = [inspect.unwrap(value) for value in load_yaml_config(path, mode="full").values() if callable(value)]
    files = {Path(value.__code__.co_filename) for value in values if inspect.isfunction(value)}
    for file in sorted(files):
        source = ast.parse(file.read_text(encoding="utf-8"))
        functions = [node for node in source.body if isinstance(node, ast.FunctionDef)]
        for call in (node for function in functions for node in ast.walk(function)):
            if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] == "load_dataset":
                yield from _read(call)


def _read(call: ast.Call) -> Iterator[DataSet]:
    """The data set of a call of ``load_dataset`` that names it as plain text."""
    given = dict(zip(("path", "name"), call.args, strict=False)) | {word.arg: word.value for word in call.keywords}
    plain = {name: value.value for name, value in given.items() if isinstance(value, ast.Constant)}
    if _is_of_hub(plain.get("path")) and ("name" in plain or "name" not in given):
        yield DataSet(plain["path"], plain.get("name"), plain.get("token") is True)


# ---- data sets on this machine
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
    fix = "It is downloaded and prepared when the sweep begins; see that it fits, and that the hub can be reached."
    return Finding(name, WARN, f"not prepared: {_names(absent)}", fix)


def _names(found: Iterable[DataSet]) -> str:
    return ", ".join(map(str, found))


def is_prepared(data: DataSet) -> bool:
    """Check that `datasets` made its tables and lmms-eval unpacked its videos, which needs no network and no token."""
    from datasets.naming import camelcase_to_snakecase
    from huggingface_hub import constants

    owner, _, name = data.path.rpartition("/")
    folder = data_cache() / (f"{owner}___" * bool(owner) + camelcase_to_snakecase(name))
    tables = [file.relative_to(folder).parts for file in folder.rglob("*.arrow") if file.is_file()]
    parts = [parts[0] for parts in tables if not any(part.endswith(".incomplete") for part in parts)]
    has_tables = any(data.part in (None, part) or part.startswith(f"{data.part}-") for part in parts)
    if data.videos is None:
        return has_tables
    unpacked = Path(constants.HF_HOME) / Path(os.path.expandvars(data.videos)).expanduser()
    return has_tables and unpacked.is_dir() and any(unpacked.iterdir())
