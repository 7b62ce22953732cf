"""Data sets that the functions of a task load besides the one that its file names, read from their source without running it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

_LOADER = "load_dataset"


def loads_of(task: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Calls of ``load_dataset`` in the functions of a task, and in functions of the same files that those call.

    Parameters
    ----------
    task
        A task file as lmms-eval reads it, functions imported.

    Yields
    ------
    dict
        `path`, `name` (None for the default configuration) and `token`, of calls that name the data set as plain text.
    """
    for value in task.values():
        if inspect.isfunction(function := inspect.unwrap(value) if callable(value) else None):
            for call in _calls(function):
                if (found := _read(call)) is not None:
                    yield found


def _calls(function: Callable) -> Iterator[ast.Call]:
    """Calls that are reached from a function within its file."""
    defined = _functions(Path(function.__code__.co_filename))
    names = [function.__name__]
    seen = set()
    while names:
        name = names.pop()
        if name in seen or name not in defined:
            continue
        seen.add(name)
        for node in ast.walk(defined[name]):
            if isinstance(node, ast.Call):
                called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                names.append(called)
                if called == _LOADER:
                    yield node


@lru_cache
def _functions(path: Path) -> dict[str, ast.AST]:
    """Functions of a source file by name; none where the source is not there."""
    if not path.is_file():
        return {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def _read(call: ast.Call) -> dict[str, Any] | None:
    given = dict(zip(("path", "name"), call.args, strict=False)) | {word.arg: word.value for word in call.keywords if word.arg}
    plain = {name: value.value for name, value in given.items() if isinstance(value, ast.Constant)}
    if not isinstance(plain.get("path"), str) or ("name" in given and "name" not in plain):
        return None
    return {"path": plain["path"], "name": plain.get("name"), "token": plain.get("token") is True}
