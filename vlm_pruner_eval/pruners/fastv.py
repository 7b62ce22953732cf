"""FastV: keep the visual tokens that the last prompt token attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FastV(Pruner):
    """The top R by attention, averaged over heads, of the last prompt token at layer K-1.

    Tokens of equal attention are taken from the lowest index up. It has no parameters of its own.

    Paper: arXiv 2403.06764 (ECCV 2024), section 4: attention rank at layer K, tokens dropped once, at prefill.
    """

    name: ClassVar[str] = "fastv"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    checks_late: ClassVar[bool] = True

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        """Local indices [R] by descending attention."""
        return tokens.attention.sort(descending=True, stable=True).indices[:keep]
