"""A run's identity beside its configuration: the version of what answers mean, and the sources that are not of this package.

An edited comment of this package loses no answer; an edited method or task of the user's own is answered anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import re
import site
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from vlm_pruner_eval.embedded import tasks_path

# Raised by hand, when an answer of any method, model or packaged task could change, or the meaning of a recorded field. Then
# `report --write-reference results/reference/ci.json` is due, too.
RESULTS_VERSION = 3

_PACKAGE = "vlm_pruner_eval"
_OWN_TASKS = (tasks_path(), Path(__file__).parent.parent / "lmms" / "tasks")
_PLUGINS = "LMMS_EVAL_PLUGINS"  # lmms-eval's own variable: packages with tasks, separated by commas
_SUFFIXES = (".py", ".yaml", ".yml", "")  # of what a task is made of; templates have none
_LARGEST = 2**20  # bytes of a file that is still source

# Names in the YAML files of tasks, which need not be parsed for them (there are thousands).
_DEFINED = re.compile(r"^(?:task|group|tag)[ \t]*:[ \t]*[\"']?([^\s\"'#\[]+)", re.MULTILINE)
_QUOTED = re.compile(r"""^["']?(?:task|group|tag)["']?[ \t]*:[ \t]*["']?([^\s"'#\[,]+)""", re.MULTILINE)
_VALUE = r"""(?:^[ \t]*|:[ \t]*|-[ \t]*|[\[,][ \t]*)["']?{}["']?[ \t]*(?:$|#|,|\])"""
_BLOCK = r"^{}[ \t]*:[ \t]*\n((?:[ \t]*-.*\n?)+)"
_TAGS, _MEMBERS = (re.compile(_BLOCK.format(key), re.MULTILINE) for key in ("tag", "task"))
_ITEM = re.compile(r"^[ \t]*-[ \t]*[\"']?([^\s\"'#:]+)[\"']?[ \t]*$", re.MULTILINE)


# ---- methods
def method_source(method: type) -> str | None:
    """Return a digest of the source of a method that is not of this package; None for one that is.

    It covers the files of the class, of its bases, and of the modules beside them that they use.
    """
    bases = [base for base in method.__mro__ if not _is_foreign_to_methods(base.__module__)]
    modules = _with_neighbours(sys.modules[base.__module__] for base in bases if base.__module__ in sys.modules)
    files = {Path(module.__file__) for module in modules if getattr(module, "__file__", None)}
    if files:
        return _digest(files)
    return _digest_of(repr([inspect.getsource(base) for base in bases])) if bases else None


def _is_foreign_to_methods(module: str) -> bool:
    """Return True for modules that no user's method is edited in: this package's, the interpreter's and torch's."""
    top = module.partition(".")[0]
    return top in (_PACKAGE, "torch") or top in sys.stdlib_module_names


def _with_neighbours(modules: Iterable[ModuleType]) -> list[ModuleType]:
    """Return modules with those that they use, directly or not, out of the same package or folder."""
    left = list(modules)
    found: dict[str, ModuleType] = {}
    while left:
        module = left.pop()
        if module.__name__ in found:
            continue
        found[module.__name__] = module
        used = {value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) for value in vars(module).values()}
        left += [sys.modules[name] for name in used if isinstance(name, str) and name in sys.modules and _are_neighbours(name, module)]
    return list(found.values())


def _are_neighbours(name: str, module: ModuleType) -> bool:
    if _is_foreign_to_methods(name):
        return False
    if name.partition(".")[0] == module.__name__.partition(".")[0]:
        return True
    files = [getattr(sys.modules[name], "__file__", None), getattr(module, "__file__", None)]
    if None in files:
        return False
    folders = {Path(file).parent for file in files}
    return len(folders) == 1 and not any(str(folder) in {*site.getsitepackages(), site.getusersitepackages()} for folder in folders)


# ---- tasks
def task_sources(names: Sequence[str], include_path: str | None = None) -> dict[str, str]:
    """Return task name -> digest of its folder, for tasks that are not of this package.

    Parameters
    ----------
    names
        Tasks, groups and tags of lmms-eval. Those that are found nowhere are left out: the sweep refuses them later.
    include_path
        A folder of the user's own with task files.
    """
    outside = [name for name in names if name not in own_task_names()]
    if not outside:
        return {}
    files = _definitions(_task_folders(include_path))
    found = {}
    for name in outside:
        folders = {file.parent for file in _files_of(name, files)}
        if folders:
            found[name] = _digest(file for folder in folders for file in folder.iterdir() if _is_source(file))
    return found


def own_task_names() -> set[str]:
    """Return the names of the tasks of this package."""
    return {file.stem for folder in _OWN_TASKS for file in folder.glob("*.yaml")}


def defined_names(include_path: str | None = None) -> set[str]:
    """Return the names of tasks, groups and tags that files define; lmms-eval's own index may know a few more, see `is_mentioned`."""
    files = [file for folder in _task_folders(include_path) for file in folder.rglob("*.y*ml")]
    return {name for file in files for name in _QUOTED.findall(_text(file))} | set(_definitions(_task_folders(include_path)))


def is_mentioned(name: str, include_path: str | None = None) -> bool:
    """Return True if any file of tasks is called by a name, or holds it as a value or an item: what is False is no task at all."""
    value = re.compile(_VALUE.format(re.escape(name)), re.MULTILINE)
    patterns = ("*yaml", "*.yml")  # templates have no dot
    files = (file for folder in _task_folders(include_path) for pattern in patterns for file in folder.rglob(pattern))
    return any(file.stem == name or value.search(_text(file)) for file in files)


def _task_folders(include_path: str | None) -> list[Path]:
    """Folders that are searched for tasks: the user's, those of plugins, lmms-eval's own."""
    found = [] if include_path is None else [Path(include_path)]
    for package in (*filter(None, os.environ.get(_PLUGINS, "").split(",")), "lmms_eval"):
        spec = importlib.util.find_spec(package.strip())
        found += [Path(place) / "tasks" for place in (spec.submodule_search_locations or () if spec else ())]
    return [folder for folder in found if folder.is_dir()]


def _definitions(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Return name -> files that define a task, group or tag of that name."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for file in folder.rglob("*.y*ml"):
            text = _text(file)
            tagged = [item for block in _TAGS.findall(text) for item in _ITEM.findall(block)]
            for name in {*_DEFINED.findall(text), *tagged}:
                found.setdefault(name, []).append(file)
    return found


def _files_of(name: str, defined: Mapping[str, Sequence[Path]]) -> set[Path]:
    """Return the files of a task, or of a group or tag and its members."""
    found: set[Path] = set()
    left = list(defined.get(name, ()))
    while left:
        file = left.pop()
        if file in found:
            continue
        found.add(file)
        members = [item for block in _MEMBERS.findall(_text(file)) for item in _ITEM.findall(block)]
        left += [path for member in members for path in defined.get(member, ())]
    return found


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if _is_source(file) else ""


def _is_source(file: Path) -> bool:
    return file.suffix in _SUFFIXES and file.is_file() and file.stat().st_size <= _LARGEST


# ---- digests
def _digest(files: Iterable[Path]) -> str:
    return _digest_of(repr([(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in sorted(files)]))


def _digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences(config: dict, other: dict) -> Iterator[str]:
    """Yield the names of the settings in which two resolved configurations differ, such as "limit" or "model.dtype"."""
    for name in sorted({*config, *other}):
        mine, theirs = config.get(name), other.get(name)
        if mine == theirs:
            continue
        if isinstance(mine, dict) and isinstance(theirs, dict):
            yield from (f"{name}.{key}" for key in sorted({*mine, *theirs}) if mine.get(key) != theirs.get(key))
        else:
            yield name
