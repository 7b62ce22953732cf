"""The lmms-eval side: entry point, one model class, a thin subclass per family.

This file stays light: lmms-eval imports it (through the entry point) at every start, whichever model is asked for.
"""

from __future__ import annotations

import importlib

_PUBLIC = {"Answer": "log", "PrunedModel": "model", "load": "families"}

__all__ = ["Answer", "PrunedModel", "load"]


def __getattr__(name: str) -> object:
    """Load public names on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
