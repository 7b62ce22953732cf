"""WHAT to keep: one file per method. A file in this folder that defines a named Pruner is registered by being there."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from typing import Any

from vlm_pruner_eval.budget import Rate
from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.redact import short

ENTRY_POINT_GROUP = "vlm_pruner_eval.pruners"

__all__ = ["Pruner", "get_pruner", "list_pruners", "parameters", "pruner_class", "settings_of"]


@functools.cache
def _built_in() -> dict[str, type[Pruner]]:
    found = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Pruner) and cls.name and cls.__module__ == module.__name__:
                found[cls.name] = cls
    return found


def list_pruners() -> list[str]:
    """Names that `get_pruner` knows: built in, and from installed packages (entry-point group `vlm_pruner_eval.pruners`)."""
    return sorted({*_built_in(), *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def pruner_class(name: str) -> type[Pruner]:
    """The class behind a method name, an entry point, or ``package.module:Class``.

    Raises
    ------
    ConfigError
        Unknown name (with the closest), an import that fails, or a class that is not a Pruner.
    """
    if not isinstance(name, str):
        raise ConfigError(f"method: got {short(name)} ({type(name).__name__}), expected a name. {closest(name, list_pruners())}")
    if ":" in name:
        return _imported(name, name)
    if name in _built_in():
        return _built_in()[name]
    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return _imported(name, point.value)
    raise ConfigError(
        f"method: got {short(name)}, which is unknown; {closest(name, list_pruners())} Your own: method=package.module:Class."
    )


def _imported(name: str, path: str) -> type[Pruner]:
    module_name, _, attribute = path.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), attribute]):  # never a relative name, nor a path
        raise ConfigError(
            f"method: {short(name)} can't be imported: expected package.module:Class on the Python path, all of them plain names."
        )
    try:
        cls = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the user's own code runs here and may raise anything; all of it is said
        raise ConfigError(
            f"method: {name!r} can't be imported{'' if name == path else f' as {path!r}'}: {type(error).__name__}: {error}. Expected "
            "package.module:Class on the Python path; for a module in the current folder put PYTHONPATH=. before the command."
        ) from error
    if not (inspect.isclass(cls) and issubclass(cls, Pruner) and cls is not Pruner):
        raise ConfigError(f"method: {short(path)} is {short(cls)}, expected a subclass of vlm_pruner_eval.Pruner.")
    return cls


def parameters(cls: type[Pruner]) -> dict[str, object]:
    """Parameter names of a method and their defaults (`dataclasses.MISSING` for required ones)."""
    return {field.name: _default(field) for field in dataclasses.fields(cls) if field.init}


def settings_of(name: str) -> dict[str, object]:
    """Return the parameters of a method that have an effect, with their defaults in plain types; None for one that has to be given."""
    cls = pruner_class(name)
    found = {parameter: value for parameter, value in parameters(cls).items() if parameter not in cls.without_effect}
    return {parameter: _plain(value) for parameter, value in found.items()}


def _plain(value: object) -> object:
    if value is dataclasses.MISSING:
        return None
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _default(field: dataclasses.Field[Any]) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def get_pruner(name: str, *, pruning_rate: Rate, **params: object) -> Pruner:
    """Build a method by name.

    Parameters
    ----------
    name
        One of `list_pruners()`, or ``package.module:Class`` for a method of your own.
    pruning_rate
        Fraction of visual tokens removed, in [0, 1): a float or an exact fraction "2/3", "7/9", "8/9".
    params
        The method's own parameters.

    Raises
    ------
    ConfigError
        Unknown method or parameters (with the known ones and the closest match), or values out of range: all at once.
    """
    cls = pruner_class(name)
    known = parameters(cls)
    problems = [f"{name}: unknown parameter {short(param)}; {closest(param, known)}" for param in params if param not in known]
    missing = [param for param, default in known.items() if default is dataclasses.MISSING and param not in {"pruning_rate", *params}]
    if missing:  # the dataclass would answer with a TypeError of its own
        raise ConfigError([*problems, *(f"{name}: parameter {param!r} has no default; pass {param}=..." for param in missing)])
    given: dict[str, Any] = {key: value for key, value in params.items() if key in known}
    try:
        pruner = cls(pruning_rate=pruning_rate, **given)
    except ConfigError as error:
        problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return pruner
