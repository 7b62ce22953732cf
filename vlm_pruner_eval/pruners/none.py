"""None: the plain model, under the same name space as the methods it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.budget import Rate
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.types import Stage, VisualTokens


@dataclass(frozen=True, kw_only=True)
class NoPruning(Pruner):
    """Removes nothing and makes no cut: the model runs as it is.

    `pruning_rate` is accepted and has no effect here, so that library code can pass one rate to every method; the command
    line refuses ``method=none`` with a rate above 0, since the run would be labelled with a rate that did not happen.
    """

    name: ClassVar[str] = "none"
    checks_late: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"pruning_rate", "layer", "positions", "selection_dtype", "budget", "scope", "official_quirks"}
    )

    pruning_rate: Rate = 0

    def stages(self, n_layers: int) -> tuple[Stage, ...]:
        """No cut."""
        return ()

    def default_keep(self, n_visual: int) -> int:
        """All of them."""
        return n_visual

    def _count(self, tokens: VisualTokens, keep: int | None) -> int:
        """All of them, whatever `keep` says."""
        return tokens.n_visual

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        """All local indices."""
        return torch.arange(tokens.n_visual)
