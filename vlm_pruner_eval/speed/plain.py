"""The yardstick, and plain tensor formulations of the baselines' rules, to compare speed with; the same answers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from vlm_pruner_eval.types import VisualTokens


def broadcast_cosine(features: Tensor) -> Tensor:
    """Cosines [V, V] of rows [V, C] by a broadcast over [V, V, C]: what the authors' release executes once per image.

    Paper: arXiv 2512.02700, as released (Casey-bit/VLMPruner 556a914).
    """
    return cosine_similarity(features[:, None], features[None], dim=-1)


def fastv(tokens: VisualTokens, keep: int) -> Tensor:
    """FastV by a full sort: local indices [R] in order of selection."""
    return tokens.attention.argsort(descending=True, stable=True)[:keep]


def divprune(tokens: VisualTokens, keep: int) -> Tensor:
    """DivPrune by a full distance matrix and a running minimum: local indices [R] in order of selection."""
    unit = normalize(tokens.hidden_states, dim=-1)
    distance = 1 - unit @ unit.T
    order = [distance.topk(2, dim=1, largest=False).values[:, 1].argmax()]
    nearest = distance[order[0]]
    while len(order) < keep:
        nearest = nearest.index_fill(0, order[-1], -torch.inf)
        order.append(nearest.argmax())
        nearest = torch.minimum(nearest, distance[order[-1]])
    return torch.stack(order)


def dart(tokens: VisualTokens, keep: int) -> Tensor:
    """DART with its default pivots by one product and a sort per pivot: local indices [R] in order of selection."""
    image = tokens.keys.abs().sum((1, 2)).argsort(descending=True, stable=True)[:4]
    text = tokens.text.keys.abs().sum((1, 2)).argsort(descending=True, stable=True)[:4]
    pivots = torch.cat([tokens.normed_hidden_states[image], tokens.text.normed_hidden_states[text]])
    cosine = normalize(pivots, dim=-1) @ normalize(tokens.normed_hidden_states, dim=-1).T
    order = image
    for turn, row in enumerate(cosine):
        missing = keep - len(order)
        amount = missing if turn == len(cosine) - 1 else min(keep // len(cosine), missing)
        order = torch.cat([order, row.index_fill(0, order, torch.inf).argsort(stable=True)[:amount]])
    return order


PLAIN: dict[str, Callable[[VisualTokens, int], Tensor]] = {"fastv": fastv, "divprune": divprune, "dart": dart}
