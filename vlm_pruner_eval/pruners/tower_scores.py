"""Steps that methods of the vision tower share: ranks by attention, the tokens left over, the views of one image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_pruner_eval.types import VisualTokens

PROJECTED = -2  # tower layer whose output LLaVA's projector reads
LAST = -1


def descending(scores: Tensor) -> Tensor:
    """Indices [n] of scores [n] from the largest down, equal ones from the lowest index up."""
    return scores.sort(descending=True, stable=True).indices


def cls_row(tokens: VisualTokens) -> Tensor:
    """Attention [V] of the CLS token at the layer that the projector reads, averaged over heads."""
    return tokens.vision.cls_attention[PROJECTED].mean(0)


def left_over(taken: Tensor, n_visual: int) -> Tensor:
    """Indices [V - k], ascending, that are not in the k distinct ones of `taken`; does not synchronise."""
    is_taken = torch.zeros(n_visual, dtype=torch.bool, device=taken.device).index_fill_(0, taken, True)
    return is_taken.sort(stable=True).indices[: n_visual - len(taken)]


def images_of(tokens: Sequence[VisualTokens]) -> list[slice]:
    """Runs of `tokens` that are the views of one image; tokens that name no image are an image each."""
    images = [given.image for given in tokens]
    starts = [i for i, image in enumerate(images) if i == 0 or image is None or image != images[i - 1]]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True)]
