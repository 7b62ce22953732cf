"""Base of the methods that act before the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.pruners.base import Pruner


@dataclass(frozen=True, kw_only=True)
class EmbeddingPruner(Pruner):
    """A method that chooses among the embeddings after the projector, in front of decoder layer 0.

    Parameters
    ----------
    positions
        "auto" (default): contiguous as released, except under mRoPE, where kept tokens keep their position rows.
    """

    fixed_layer: ClassVar[int | None] = 0

    layer: int = 0
    positions: str = "auto"

    def position_choices(self) -> tuple[str, ...]:
        """The base's and "auto"."""
        return ("auto", *super().position_choices())

    def position_policy(self, mrope: bool) -> str:
        """What is given, where "auto" means contiguous, and original under mRoPE."""
        if self.positions != "auto":
            return self.positions
        return "original" if mrope else "contiguous"


def spare(taken: Tensor, n_visual: int, count: int) -> Tensor:
    """Places [count] for rows that are no tokens of the image: the lowest numbers below `n_visual` that are not in `taken` [k]."""
    is_free = torch.ones(n_visual, dtype=torch.bool, device=taken.device)
    is_free[taken] = False
    return is_free.nonzero()[:count, 0]
