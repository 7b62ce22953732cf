"""FasterVLM: keep the patches that the vision tower's CLS token attends to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_pruner_eval.pruners.at_embeddings import EmbeddingPruner
from vlm_pruner_eval.pruners.tower_scores import PROJECTED, cls_row, descending
from vlm_pruner_eval.types import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FasterVLM(EmbeddingPruner):
    """The top R of each view by attention of the CLS token, averaged over heads; no text is looked at.

    It has no parameters of its own, and its release (Theia-4869/FasterVLM f5d5f12) no misbehaviour.

    Paper: arXiv 2412.01818, version 1.
    """

    name: ClassVar[str] = "fastervlm"
    needs: ClassVar[frozenset[str]] = frozenset({"vision.cls_attention"})
    checks_late: ClassVar[bool] = True

    scope: str = "per_view"

    def tower_layers(self) -> tuple[int, ...]:
        """The layer whose output the projector reads."""
        return (PROJECTED,)

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        """Local indices [R] by descending attention."""
        return descending(cls_row(tokens))[:keep]
