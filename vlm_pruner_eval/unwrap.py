"""The Hugging Face model inside what other libraries put around it: adapters, compilers, data parallelism, trainers.

Hooks sit on the model itself, so they act whether it is called directly or through its wrapper.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from vlm_pruner_eval.errors import ConfigError


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile(module)`` stands for; any other module is returned as it is."""
    while isinstance(inner := module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
        module = inner
    return module


def unwrapped(model: object) -> nn.Module:
    """Return the one Hugging Face model that `model` is or holds.

    Raises
    ------
    ConfigError
        Not a module, or a module that holds no Hugging Face model, or several beside each other.
    """
    found = _outermost(model) if isinstance(model, nn.Module) else []
    if len(found) == 1:
        return found[0]
    holds = f"holds {len(found)} ({', '.join(sorted({type(part).__name__ for part in found}))})" if found else "holds none"
    raise ConfigError(
        f"model: got {type(model).__name__}, expected a Hugging Face model or a wrapper with one inside it; this one {holds}. "
        "Pass the model that from_pretrained returned (of an adapter: merge_and_unload() or get_base_model())."
    )


def _outermost(module: nn.Module) -> list[nn.Module]:
    """Return the Hugging Face models of a tree of modules that are not part of another one."""
    if isinstance(module, PreTrainedModel):
        return [module]
    found = {id(part): part for child in module.children() for part in _outermost(child)}
    return list(found.values())
