"""Blind: no visual token at all, the text-only floor that a method's accuracy is measured from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.budget import Rate
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.types import Stage, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Blind(Pruner):
    """Removes every visual token, whatever `pruning_rate` says: the rate is accepted, so that grids need no exception.

    Parameters
    ----------
    layer
        0 (default): no layer sees the image. A larger K lets the layers before it see all of it.
    """

    name: ClassVar[str] = "blind"
    checks_late: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"pruning_rate", "selection_dtype", "budget", "scope", "official_quirks"})

    pruning_rate: Rate = 0
    layer: int = 0

    def stages(self, n_layers: int) -> tuple[Stage, ...]:
        """One cut at `layer` that keeps nothing."""
        return (Stage(self.layer, 0.0),)

    def keep_at(self, stage: Stage, n_visual: int) -> int:
        """Always 0."""
        return 0

    def default_keep(self, n_visual: int) -> int:
        """Always 0."""
        return 0

    def _count(self, tokens: VisualTokens, keep: int | None) -> int:
        """Always 0, whatever `keep` says."""
        return 0

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        """No index."""
        return torch.empty(0, dtype=torch.int64)
