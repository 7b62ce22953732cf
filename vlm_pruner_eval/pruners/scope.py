"""SCOPE: greedy choice of the patches that cover most of the others, weighted by what the CLS token attends to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval import kernels
from vlm_pruner_eval.pruners.at_embeddings import EmbeddingPruner
from vlm_pruner_eval.pruners.base import unit_rows
from vlm_pruner_eval.pruners.blocks import row_blocks
from vlm_pruner_eval.pruners.padding import groups, padded, products, sent
from vlm_pruner_eval.pruners.tower_scores import PROJECTED
from vlm_pruner_eval.types import VisualTokens

_LOOK_AT = 32  # candidates that are looked at together on a CPU


@dataclass(frozen=True, kw_only=True)
class SCOPE(EmbeddingPruner):
    """Take again and again the patch by which coverage grows most; no text is looked at.

    A patch is covered as far as the largest cosine, 0 at least, between it and a chosen one, in states before the projector. The growth
    is weighted by ``w^alpha`` with the CLS attention w, summed over heads. The release (kinredon/SCOPE 6bf7306) computes in the model's
    dtype, which `selection_dtype` sets; it has no other misbehaviour in its choice.

    Parameters
    ----------
    alpha
        Exponent of the attention, 0 or more; 0 is coverage alone.
    combined
        "multiply": growth times ``w^alpha``; "add": growth plus ``w^alpha``.

    Paper: arXiv 2510.24214.
    """

    name: ClassVar[str] = "scope"
    needs: ClassVar[frozenset[str]] = frozenset({"vision.cls_attention", "vision.states"})
    checks_late: ClassVar[bool] = True

    scope: str = "per_view"
    alpha: float = 1.0
    combined: str = "multiply"

    def problems(self) -> list[str]:
        """The base's, and the ranges of the exponent and of the combination."""
        found = super().problems()
        if self.alpha < 0:
            found.append(f"alpha: got {self.alpha}, expected an exponent of 0 or more.")
        if self.combined not in ("multiply", "add"):
            found.append(f"combined: got {self.combined!r}, expected multiply or add.")
        return found

    def tower_layers(self) -> tuple[int, ...]:
        """The layer whose output the projector reads."""
        return (PROJECTED,)

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Tensor]:
        """Local indices [R] of each view in the order of the greedy choice."""
        unit = [unit_rows(given.vision.states) for given in tokens]
        weight = [given.vision.cls_attention[PROJECTED].sum(0) ** self.alpha for given in tokens]
        added = self.combined == "add"
        if kernels.usable(unit[0].device, max(map(len, unit))):
            parts = groups([*map(len, unit)])
            return [order for part in parts for order in by_kernel(unit[part], weight[part], keeps[part], added=added)]
        growths = [Growth(one @ one.T, other, added=added) for one, other in zip(unit, weight, strict=True)]
        greedily = greedy_by_bounds if unit[0].device.type == "cpu" else greedy
        return [greedily(growth, keep) for growth, keep in zip(growths, keeps, strict=True)]


def by_kernel(unit: Sequence[Tensor], weight: Sequence[Tensor], keeps: Sequence[int], *, added: bool) -> list[Tensor]:
    """Return what `greedy` returns, for several views at once on a GPU."""
    from vlm_pruner_eval.kernels.coverage_kernel import coverage

    counts = sent([*zip(map(len, unit), keeps, strict=True)], torch.int64, unit[0].device)
    order, _ = coverage(products(unit).float(), padded(weight).float(), counts, max(keeps), added=added)
    return [found[:keep] for found, keep in zip(order, keeps, strict=True)]


class Growth:
    """Weighted growth of coverage that each token would bring now.

    Parameters
    ----------
    similarity : Tensor [V, V]
        Cosines, symmetric.
    weight : Tensor [V]
        Of the tokens, 0 or more.
    added
        Add the weight to the growth in place of multiplying.
    """

    def __init__(self, similarity: Tensor, weight: Tensor, *, added: bool):
        self.similarity, self.weight, self.added = similarity, weight, added
        self.cover = torch.zeros_like(weight)

    def of_all(self) -> Tensor:
        """Growth [V] by each token."""
        blocks = row_blocks(self.similarity)
        weights = self.weight.split([len(block) for block in blocks])
        return torch.cat([self._weighted(block - self.cover, part) for block, part in zip(blocks, weights, strict=True)])

    def of(self, some: Tensor) -> Tensor:
        """Growth [n] by the tokens `some` [n]."""
        return self._weighted(self.similarity.index_select(0, some).sub_(self.cover), self.weight[some])

    def choose(self, token: Tensor) -> None:
        """Cover what the token [1] covers."""
        self.cover = torch.maximum(self.cover, self.similarity.index_select(0, token)[0])

    def _weighted(self, above: Tensor, weight: Tensor) -> Tensor:
        growth = above.clamp_(min=0).sum(1, dtype=torch.float64).to(weight.dtype)  # as exact as the kernel's, whatever the order
        return growth + weight if self.added else growth * weight


def greedy(growth: Growth, keep: int) -> Tensor:
    """Choose `keep` tokens one by one, each by the growth of all: no wait for the device.

    Paper: arXiv 2510.24214 (greedy algorithm).
    """
    picked = [torch.zeros(0, dtype=torch.int64, device=growth.weight.device)]
    chosen = torch.zeros_like(growth.weight, dtype=torch.bool)
    for _ in range(keep):
        best = growth.of_all().masked_fill_(chosen, -math.inf).argmax(0, keepdim=True)
        picked.append(best)
        chosen.index_fill_(0, best, True)
        growth.choose(best)
    return torch.cat(picked)


def greedy_by_bounds(growth: Growth, keep: int) -> Tensor:
    """Return what `greedy` returns, looking only at tokens whose growth could be the largest; on a CPU, where looking is no wait.

    Coverage never shrinks, so growth, which is summed in the same order each time, never grows, rounding included: what it was when a
    token was last looked at is a bound. Where the largest bound is that of a token looked at in this step, none is above it.
    """
    if keep == 0:
        return torch.zeros(0, dtype=torch.int64)
    bounds = growth.of_all()
    picked = [bounds.argmax(0, keepdim=True)]
    most = min(_LOOK_AT, len(bounds))
    while len(picked) < keep:
        bounds[picked[-1]] = -math.inf
        growth.choose(picked[-1])
        stale = bounds.clone()
        while stale[best := int(bounds.argmax())] != -math.inf:
            some = stale.topk(most).indices
            some = some[stale[some] != -math.inf]
            bounds[some] = growth.of(some)
            stale[some] = -math.inf
        picked.append(torch.tensor([best]))
    return torch.cat(picked)
