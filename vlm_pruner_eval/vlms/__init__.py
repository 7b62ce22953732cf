"""WHERE the visual tokens are: one file per model family, registered by being in this folder."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil

from torch import nn

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.vlms.base import Family, unknown_family

__all__ = ["Family", "families", "family_of"]


@functools.cache
def families() -> dict[str, Family]:
    """Known families by Hugging Face ``model_type``."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for _, cls in inspect.getmembers(module, inspect.isclass):
            if issubclass(cls, Family) and cls.__module__ == module.__name__:
                found |= dict.fromkeys(cls.model_types, cls())
    return found


def family_of(model: nn.Module) -> Family:
    """The family of a loaded Hugging Face model.

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
