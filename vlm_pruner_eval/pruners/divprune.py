"""DivPrune: keep the subset of image embeddings whose members lie as far apart as possible (greedy max-min diversity)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

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
        distance = 1 - unit @ unit.T
        order = torch.zeros(keep, dtype=torch.int64, device=distance.device)
        chosen = torch.zeros(len(distance), dtype=torch.bool, device=distance.device)
        repeats = torch.zeros(max(keep, 1), dtype=torch.bool, device=distance.device)
        # the second smallest of a row: the smallest is the token itself
        nearest = distance.topk(min(2, len(distance)), dim=1, largest=False).values[:, -1]
        for step in range(keep):  # indices stay on the device: no wait per step on a GPU
            repeats[step] = chosen[nearest.argmax().view(1)].any()
            best = nearest.masked_fill(chosen, -math.inf).argmax().view(1)
            order[step] = best
            chosen[best] = True
            row = distance[best].squeeze(0)
            nearest = row if step == 0 else torch.minimum(nearest, row)
        return Selection(order, quirks=frozenset({"repeats"} if repeats.any() else ()))
