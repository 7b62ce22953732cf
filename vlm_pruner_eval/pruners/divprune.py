"""DivPrune: keep the subset of image embeddings whose members lie as far apart as possible (greedy max-min diversity)."""

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
from vlm_pruner_eval.pruners.padding import groups, products, sent
from vlm_pruner_eval.types import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class DivPrune(EmbeddingPruner):
    """Greedy max-min diversity on the embeddings after the projector, before the language model; no text is looked at.

    Distance is 1 - cosine. Quirk of the release (vbdi/divprune 799e2d9), counted in both modes and repeated in neither:
    "repeats" (fewer distinct tokens than asked, so one token is chosen over and over). `official_quirks` computes in the
    model's dtype as the release does, which in half precision changes a fifth of the choice or more.

    Paper: arXiv 2503.02175 (CVPR 2025), algorithm 1.
    """

    name: ClassVar[str] = "divprune"
    checks_late: ClassVar[bool] = True

    def _dtype(self, given: torch.dtype) -> torch.dtype:
        return given if self.official_quirks else super()._dtype(given)

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """First the token whose nearest other one is farthest, then always the one farthest from those chosen."""
        states = [given.hidden_states for given in tokens]
        if kernels.usable(states[0].device, max(map(len, states))):
            found = [pair for part in groups([*map(len, states)]) for pair in by_kernel(states[part], keeps[part])]
        else:
            found = [by_steps(*one) for one in zip(states, keeps, strict=True)]
        arrived = tokens[0].on_host(*(tensor for pair in found for tensor in pair))
        pairs = zip(arrived[::2], arrived[1::2], strict=True)
        return [Selection(order, quirks=frozenset({"repeats"} if repeats else ())) for order, repeats in pairs]


def by_steps(states: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Greedy max-min choice [keep] among states [V, D], and if a choice without a memory would have repeated a token: Tensor []."""
    unit = unit_rows(states)
    distance = (unit @ unit.T).neg_().add_(1)
    del unit
    nearest = second_smallest(distance)
    picked = []
    for step in range(keep):  # indices stay on the device: no wait per step on a GPU
        best = nearest.argmax(0, keepdim=True)
        picked.append(best)
        row = distance.index_select(0, best).squeeze(0)
        nearest = torch.minimum(nearest, row) if step else row
        nearest.index_fill_(0, best, -math.inf)  # a minimum never lifts it again
    order = torch.cat(picked) if picked else torch.zeros(0, dtype=torch.int64, device=distance.device)
    return order, would_repeat(distance, order)


def by_kernel(states: Sequence[Tensor], keeps: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return what `by_steps` does, for several images at once on a GPU."""
    from vlm_pruner_eval.kernels.max_min_kernel import max_min

    counts = sent([*zip(map(len, states), keeps, strict=True)], torch.int64, states[0].device)
    distance = products([unit_rows(one) for one in states]).neg_().add_(1).float()
    outside = torch.arange(distance.shape[1], device=distance.device) >= counts[:, :1]
    nearest = second_smallest(distance.masked_fill_(outside[:, None], math.inf)).masked_fill_(outside, -math.inf)
    order, repeats = max_min(distance, nearest.argmax(1), counts, max(keeps))
    return [(one[:keep], repeated) for one, keep, repeated in zip(order, keeps, repeats, strict=True)]


def second_smallest(distance: Tensor) -> Tensor:
    """Of each row [V] of distances [..., V, V] the second smallest: the smallest is that of the token to itself."""
    return distance.topk(min(2, distance.shape[-1]), largest=False).values[..., -1]


def would_repeat(distance: Tensor, order: Tensor) -> Tensor:
    """Tell if the greedy choice without a memory of what is chosen would have taken a token again at some step: Tensor [] bool.

    Parameters
    ----------
    distance : Tensor [V, V]
        Distances between the tokens, to themselves included: a chosen token stays a candidate at that distance.
    order : Tensor [R]
        The choice that takes every token once.

    Paper: arXiv 2503.02175, algorithm 1 as released.
    """
    nearest = distance.index_select(0, order).index_select(1, order).cummin(0).values[:-1]  # row s: after s + 1 choices
    taken = nearest.diagonal(offset=1)[:, None]  # what step s + 1 took
    wins = (nearest > taken) | ((nearest == taken) & (order < order[1:, None]))
    return wins.tril().any()
