"""Evaluate visual-token pruning in vision-language models: one command, honest and comparable numbers."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "get_pruner": "pruners",
    "list_pruners": "pruners",
    "Pruner": "pruners",
    "prune": "hook",
    "keep_count": "budget",
    "VisualTokens": "types",
    "TextTokens": "types",
    "Selection": "types",
    "Stage": "types",
    "Ledger": "ledger",
    "SampleRecord": "ledger",
    "run_sweep": "sweep.runner",
    "load_results": "sweep.frames",
    "ConfigError": "errors",
    "PruningError": "errors",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> object:
    """Load public names on first use: lmms-eval imports this package at start-up and must not pay for torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
