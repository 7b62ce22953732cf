"""Evaluate visual-token pruning in vision-language models: one command, honest and comparable numbers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers, which don't see what `__getattr__` loads
    from vlm_pruner_eval.budget import keep_count as keep_count
    from vlm_pruner_eval.errors import ConfigError as ConfigError
    from vlm_pruner_eval.errors import PruningError as PruningError
    from vlm_pruner_eval.hook import prune as prune
    from vlm_pruner_eval.ledger import Ledger as Ledger
    from vlm_pruner_eval.ledger import SampleRecord as SampleRecord
    from vlm_pruner_eval.pruners import Pruner as Pruner
    from vlm_pruner_eval.pruners import get_pruner as get_pruner
    from vlm_pruner_eval.pruners import list_pruners as list_pruners
    from vlm_pruner_eval.types import QuestionTokens as QuestionTokens
    from vlm_pruner_eval.types import Selection as Selection
    from vlm_pruner_eval.types import Stage as Stage
    from vlm_pruner_eval.types import TextTokens as TextTokens
    from vlm_pruner_eval.types import VisionTokens as VisionTokens
    from vlm_pruner_eval.types import VisualTokens as VisualTokens

__version__ = "0.1.0"

_PUBLIC = {
    "get_pruner": "pruners",
    "list_pruners": "pruners",
    "Pruner": "pruners",
    "prune": "hook",
    "keep_count": "budget",
    "VisualTokens": "types",
    "TextTokens": "types",
    "VisionTokens": "types",
    "QuestionTokens": "types",
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
