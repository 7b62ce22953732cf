"""Methods with their parameters, read out of the source files: to list them takes no import of torch, which takes seconds."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

_FOLDER = Path(__file__).parent / "pruners"
_BASE = "Pruner"
_GROUP = "vlm_pruner_eval.pruners"

Parameters = dict[str, object]


def method_table() -> dict[str, Parameters]:
    """Method -> its parameters that have an effect, with their defaults; None for one that has to be given.

    Methods of other packages are imported, as their files may be anywhere.
    """
    found = dict(built_in_methods())
    for point in entry_points(group=_GROUP):
        from vlm_pruner_eval.pruners import settings_of

        found[point.name] = settings_of(point.name)
    return dict(sorted(found.items()))


@functools.cache
def built_in_methods() -> dict[str, Parameters]:
    """The same of the methods in this package."""
    return {name: parameters for name, parameters, _ in _built_in()}


@functools.cache
def descriptions() -> dict[str, str]:
    """Method of this package -> the first sentence about it."""
    return {name: about for name, _, about in _built_in()}


def _built_in() -> Iterator[tuple[str, Parameters, str]]:
    """Name, parameters and first sentence of each method."""
    nodes = {node.name: node for path in _FOLDER.glob("*.py") for node in _classes(path)}
    for node in nodes.values():
        line = [*_lineage(node, nodes)]
        constants = {name: value for one in line for name, value in _constants(one).items()}
        if line[0].name == _BASE and constants.get("name"):
            known = {name: value for one in line for name, value in _fields(one).items()}
            parameters = {name: value for name, value in known.items() if name not in constants.get("without_effect", ())}
            yield str(constants["name"]), parameters, (ast.get_docstring(node) or "").partition("\n")[0]


def _lineage(node: ast.ClassDef, nodes: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """A class behind its bases, as far as these are in the folder."""
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in nodes:
            yield from _lineage(nodes[base.id], nodes)
    yield node


def _classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]


def _fields(node: ast.ClassDef) -> Parameters:
    """Fields of a dataclass with their defaults, which are literals."""
    own = [line for line in _annotated(node) if not _is_constant(line)]
    return {line.target.id: None if line.value is None else ast.literal_eval(line.value) for line in own}


def _constants(node: ast.ClassDef) -> dict[str, object]:
    """Class variables that are text or a frozenset of text."""
    found = {}
    for line in filter(_is_constant, _annotated(node)):
        value = line.value.args[0] if isinstance(line.value, ast.Call) and line.value.args else line.value
        if isinstance(value, (ast.Constant, ast.Set)):
            found[line.target.id] = ast.literal_eval(value)
    return found


def _annotated(node: ast.ClassDef) -> list[ast.AnnAssign]:
    return [line for line in node.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)]


def _is_constant(line: ast.AnnAssign) -> bool:
    return ast.unparse(line.annotation).startswith("ClassVar")
