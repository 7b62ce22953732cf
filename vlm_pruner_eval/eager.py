"""Compiled code runs eagerly while a model is pruned: what was traced before the hooks came would leave them out.

Source: torch.compiler.set_stance. The stance is the process's, so contexts that overlap share one change of it.
"""

from __future__ import annotations

import threading
import warnings

import torch
from torch import nn

from vlm_pruner_eval.errors import ConfigError

_lock = threading.Lock()
_open: list[object] = []  # the stances of the contexts that are open; the first one is in force
_HAS_STANCE = hasattr(torch.compiler, "set_stance")  # from torch 2.6 on


def compiled_parts(model: nn.Module) -> list[str]:
    """Return the names of the modules of `model` that ``torch.compile`` has changed ("" is the model itself)."""
    return [name for name, module in model.named_modules() if _is_compiled(module)]


def _is_compiled(module: nn.Module) -> bool:
    own = module.__dict__
    is_traced = any(hasattr(own.get(name), "_torchdynamo_orig_callable") for name in ("forward", "generate"))
    return is_traced or own.get("_compiled_call_impl") is not None or "_orig_mod" in own.get("_modules", {})


class EagerExecution:
    """Context in which nothing runs compiled.

    Raises
    ------
    ConfigError
        On entry: a compiled model, and a torch that can't run it eagerly (before 2.6).
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def __enter__(self) -> None:
        parts = compiled_parts(self.model)
        if parts and not _HAS_STANCE:
            raise ConfigError(
                f"model: got a model that torch.compile has changed ({_shown(parts)}), which torch {torch.__version__} would run without "
                "our hooks; install torch 2.6 or newer, or compile it after pruning."
            )
        if parts:
            warnings.warn(
                f"prune: {_shown(parts)} of this model is compiled; inside the context it runs eagerly, so don't compare its times with "
                "those of the compiled model.",
                RuntimeWarning,
                stacklevel=4,
            )
        self._force()

    def _force(self) -> None:
        if not _HAS_STANCE:
            return
        with _lock:
            _open.append(torch.compiler.set_stance("force_eager") if not _open else None)

    def __exit__(self, *error: object) -> None:
        if not _HAS_STANCE:
            return
        with _lock:
            if len(_open) == 1:
                _open[0].__exit__(None, None, None)
                _open.clear()
            else:
                _open.remove(None)


def _shown(parts: list[str]) -> str:
    return (parts[0] or "the whole") + (f" and {len(parts) - 1} more" if len(parts) > 1 else "")
