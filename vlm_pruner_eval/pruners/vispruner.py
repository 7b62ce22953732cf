"""VisPruner: keep the patches of largest CLS attention, and a diverse rest from which near duplicates are removed in rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.pruners.at_embeddings import EmbeddingPruner
from vlm_pruner_eval.pruners.base import unit_rows
from vlm_pruner_eval.pruners.tower_scores import PROJECTED, cls_row, descending
from vlm_pruner_eval.types import Selection, VisualTokens

MOST_REMOVED = 8  # patches of a round


@dataclass(frozen=True, kw_only=True)
class VisPruner(EmbeddingPruner):
    """Important patches by CLS attention, then diverse ones by their states before the projector; no text is looked at.

    Quirks of the release (Theia-4869/VisPruner aefa01a), where it raises an error, so that neither mode brings them back: "odd_split"
    (a round over an odd number of patches) and "small_diverse" (a round that is to remove more patches than half of those there are).
    Here the first half of an odd number has one more, and a round removes at most that half. Rounds depend on the order that the last
    one left, so the choice is sensitive to rounding: in half precision about a quarter of it changes.

    Parameters
    ----------
    important_ratio
        Share of the R patches that are important, in [0, 1], rounded down.

    Paper: arXiv 2412.01818 (ICCV 2025), section 3.
    """

    name: ClassVar[str] = "vispruner"
    needs: ClassVar[frozenset[str]] = frozenset({"vision.cls_attention", "vision.states"})
    checks_late: ClassVar[bool] = True

    scope: str = "per_view"
    important_ratio: float = 0.5

    def problems(self) -> list[str]:
        """The base's, and the range of the ratio."""
        found = super().problems()
        if not 0 <= self.important_ratio <= 1:
            found.append(f"important_ratio: got {self.important_ratio}, expected a share of the kept patches in [0, 1].")
        return found

    def tower_layers(self) -> tuple[int, ...]:
        """The layer whose output the projector reads."""
        return (PROJECTED,)

    def choose(self, tokens: VisualTokens, keep: int) -> Selection:
        """Local indices [R]: important ones by descending attention, then the diverse ones as the last round leaves them."""
        n_important = int(keep * self.important_ratio)
        ranked = descending(cls_row(tokens))
        diverse, quirks = diverse_rest(tokens.vision.states, ranked[n_important:], keep - n_important)
        return Selection(torch.cat([ranked[:n_important], diverse]), quirks=quirks)


def diverse_rest(states: Tensor, rest: Tensor, count: int) -> tuple[Tensor, frozenset[str]]:
    """Remove near duplicates from `rest` until `count` patches are left; no wait for the device.

    Parameters
    ----------
    states : Tensor [V, C]
        States before the projector.
    rest : Tensor [r] int64
        Candidates by descending attention.

    Returns
    -------
    Tensor [count] int64 and frozenset of str
        The patches that are left, and what would have gone wrong in the release.

    Paper: arXiv 2412.01818, section 3 (duplicates removed between two halves of the remaining tokens).
    """
    quirks: set[str] = set()
    if count == 0:
        return rest[:0], frozenset()
    unit = unit_rows(states)
    cosine = unit @ unit.T
    while len(rest) > count:
        n_removed = min(MOST_REMOVED, len(rest) - count)
        quirks |= {"odd_split"} if len(rest) % 2 else set()
        quirks |= {"small_diverse"} if n_removed > len(rest) // 2 else set()
        # every second one is compared with those between, and the most similar of them go
        judged, others = rest[::2], rest[1::2]
        likeness = cosine.index_select(0, judged).index_select(1, others).amax(1)
        rest = torch.cat([judged[descending(likeness)[n_removed:]], others])
    return rest, frozenset(quirks)
