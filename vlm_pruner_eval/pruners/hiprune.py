"""HiPrune: keep what a middle layer of the vision tower looks at, the neighbours of that, and what a deep layer looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.pruners.at_embeddings import EmbeddingPruner
from vlm_pruner_eval.pruners.tower_scores import descending
from vlm_pruner_eval.types import Selection, VisualTokens

ANCHOR_AND_NEIGHBOURS = 5


@dataclass(frozen=True, kw_only=True)
class HiPrune(EmbeddingPruner):
    """Anchors and their four neighbours by a middle layer, the rest by a deep layer; no text is looked at.

    The score of a patch is the attention that it receives, averaged over heads and all query rows. Neighbours are the patches before
    and behind in the sequence, so at a border one of another row, and those of the rows above and below, moved onto the first and the
    last patch where there is none. Quirk of the release (Danielement321/HiPrune 6e83a12), counted in both modes and brought back by
    `official_quirks`: "anchor_twice" (1 is subtracted from deep scores of anchors and neighbours, and where scores are larger than
    that, as in its port to Qwen2.5-VL, one is chosen a second time and fewer tokens are kept).

    Parameters
    ----------
    alpha
        Share of the R patches that are anchors and neighbours, in [0, 1]: ``round(R * alpha / 5)`` anchors.
    object_layer, deep_layer
        Layers of the vision tower, 0-based, or counted from the end by negative numbers. In Qwen2.5-VL the authors take 15 and -1.

    Paper: arXiv 2508.00553, section 4.
    """

    name: ClassVar[str] = "hiprune"
    needs: ClassVar[frozenset[str]] = frozenset({"vision.received_attention"})
    quirks_change_count: ClassVar[bool] = True
    checks_late: ClassVar[bool] = True

    scope: str = "per_view"
    alpha: float = 0.1
    object_layer: int = 8
    deep_layer: int = -2

    def problems(self) -> list[str]:
        """The base's, and the range of the share."""
        found = super().problems()
        if not 0 <= self.alpha <= 1:
            found.append(f"alpha: got {self.alpha}, expected a share of the kept patches in [0, 1].")
        return found

    def tower_layers(self) -> tuple[int, ...]:
        """The middle and the deep layer."""
        return (self.object_layer, self.deep_layer)

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Local indices [R] of each view, chosen by the host from what one copy brings."""
        layers = (self.object_layer, self.deep_layer)
        read = [part for given in tokens for part in (*(given.vision.received_attention[layer] for layer in layers), given.coords)]
        arrived = tokens[0].on_host(*read)
        shallow, deep, coords = (arrived[i::3] for i in range(3))
        return [self._chosen_here(*one) for one in zip(shallow, deep, coords, keeps, strict=True)]

    def _chosen_here(self, shallow: Tensor, deep: Tensor, coords: Tensor, keep: int) -> Selection:
        """Anchors, their neighbours, and the rest, each by descending deep score."""
        anchors = descending(shallow)[: round(keep * self.alpha / ANCHOR_AND_NEIGHBOURS)]
        kind = kinds(anchors, len(deep), width_of(coords))
        ranked = descending(deep)
        order = ranked[kind[ranked].sort(stable=True).indices[:keep]]
        # those that the release chooses twice: its set is what comes first here, less one for each of them
        is_first = kind < 2
        lowered = descending(torch.where(is_first, deep - 1, deep))
        is_best = torch.arange(len(deep), device=deep.device) < keep - is_first.sum()
        n_again = int((is_first[lowered] & is_best).sum())
        kept = order[: keep - n_again] if self.official_quirks else order
        return Selection(kept, quirks=frozenset({"anchor_twice"} if n_again else ()))


def width_of(coords: Tensor) -> Tensor:
    """Tokens [] in a row of a grid with coordinates [V, 3], which may have lost columns at its sides; newline tokens are not looked at."""
    cols = coords[:, 2].round().long()
    last = cols.amax()
    return last + 1 - torch.where(cols < 0, last, cols).amin()


def kinds(anchors: Tensor, n_visual: int, width: Tensor) -> Tensor:
    """Kinds [V] of the patches: 0 for anchors, 1 for their neighbours, 2 for the rest.

    Paper: arXiv 2508.00553, section 4 (anchor, buffer and register tokens).
    """
    one = torch.ones_like(width)
    steps = torch.stack([-one, one, -width, width])
    near = (anchors[:, None] + steps).clamp(0, n_visual - 1).flatten()
    return torch.full((n_visual,), 2, device=anchors.device).index_fill_(0, near, 1).index_fill_(0, anchors, 0)
