"""WHERE the visual tokens are: one file per model family, registered by being in this folder."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING

from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.vlms.family import Family, FamilySpec, unknown_family

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Family", "FamilySpec", "by_model_id", "families", "family_named", "family_of"]


@functools.cache
def by_model_id() -> dict[str, Family]:
    """Known families by their id in lmms-eval, sorted; imports neither torch nor transformers."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Family) and cls.__module__ == module.__name__ and "spec" in vars(cls):
                found[cls.spec.model_id] = cls()
    return dict(sorted(found.items()))


@functools.cache
def families() -> dict[str, Family]:
    """Known families by Hugging Face ``model_type``."""
    return {model_type: family for family in by_model_id().values() for model_type in family.spec.model_types}


def family_named(model_id: str) -> Family:
    """Return the family of an id of lmms-eval.

    Raises
    ------
    ConfigError
        An unknown id.
    """
    if model_id not in by_model_id():
        raise ConfigError(f"model: got {model_id!r}, which is unknown; {closest(model_id, by_model_id())}")
    return by_model_id()[model_id]


def family_of(model: nn.Module) -> Family:
    """Return the family of a loaded Hugging Face model.

    Raises
    ------
    ConfigError
        A model type that is not known, or a variant of it that can't be pruned.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    family = families().get(model_type)
    if family is None:
        raise unknown_family(model_type, frozenset(families()))
    if problem := family.refuse(config):
        raise ConfigError(f"model: {problem}")
    return family
