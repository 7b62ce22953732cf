"""DivPrune: keep the subset of image embeddings whose members lie as far apart as possible (greedy max-min diversity)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.pruners.base import Pruner, unit_rows
from vlm_pruner_eval.types import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class DivPrune(Pruner):
    """Greedy max-min diversity on the embeddings after the projector, before the language model; no text is looked at.

    Distance is 1 - cosine. Quirk of the release (vbdi/divprune 799e2d9), counted in both modes and repeated in neither:
    "repeats" (fewer distinct tokens than asked, so one token is chosen over and over). `official_quirks` computes in the
    model's dtype as the release does, which in half precision changes a fifth of the choice or more.

    Parameters
    ----------
    positions
        "auto" (default): contiguous as released, except under mRoPE, where kept tokens keep their position rows.

    Paper: arXiv 2503.02175 (CVPR 2025), algorithm 1.
    """

    name: ClassVar[str] = "divprune"
    fixed_layer: ClassVar[int | None] = 0
    checks_late: ClassVar[bool] = True

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

    def _dtype(self, given: torch.dtype) -> torch.dtype:
        return given if self.official_quirks else super()._dtype(given)

    def choose(self, tokens: VisualTokens, keep: int) -> Selection:
        """First the token whose nearest other one is farthest, then always the one farthest from those chosen."""
        unit = unit_rows(tokens.hidden_states)
        distance = (unit @ unit.T).neg_().add_(1)
        del unit
        # the second smallest of a row: the smallest is the token itself
        nearest = distance.topk(min(2, len(distance)), dim=1, largest=False).values[:, -1]
        picked = []
        for step in range(keep):  # indices stay on the device: no wait per step on a GPU
            best = nearest.argmax(0, keepdim=True)
            picked.append(best)
            row = distance.index_select(0, best).squeeze(0)
            nearest = torch.minimum(nearest, row) if step else row
            nearest.index_fill_(0, best, -math.inf)  # a minimum never lifts it again
        order = torch.cat(picked) if picked else torch.zeros(0, dtype=torch.int64, device=distance.device)
        order, repeats = tokens.on_host(order, would_repeat(distance, order))
        return Selection(order, quirks=frozenset({"repeats"} if repeats else ()))


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
