"""Sums over groups of tokens, and ranks inside them: deterministic on any device, without synchronising."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def group_sums(states: Tensor, group: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Float32 sums [count, D] of the rows of `states` [n, D] that share a number in `group` [n] int64, and how many [count, 1] they are.

    Rows are added in ascending order; a group without any has the sum 0.
    """
    numbers, rows = group.sort(stable=True)
    starts = torch.searchsorted(numbers, torch.arange(count + 1, device=group.device))
    sizes = starts.diff()[:, None]
    if not len(rows) or not count:
        return torch.zeros(count, states.shape[1], device=states.device), sizes
    return embedding_bag(rows, states.float(), starts[:-1], mode="sum"), sizes


def group_size(group: Tensor) -> Tensor:
    """Numbers [n] of tokens in the group of each token, itself included, for groups numbered in `group` [n]."""
    numbers = group.sort().values
    return torch.searchsorted(numbers, group, right=True) - torch.searchsorted(numbers, group)


def rank_in_group(values: Tensor, group: Tensor) -> Tensor:
    """Ranks [n] of `values` [n] in descending order among those with the same number in `group` [n]; equal ones by their index."""
    by_value = values.sort(descending=True, stable=True).indices
    in_turn = by_value[group[by_value].sort(stable=True).indices]  # group after group, each by descending value
    numbers = group[in_turn]
    first = torch.searchsorted(numbers, numbers)
    ranks = torch.arange(len(values), device=values.device) - first
    return torch.empty_like(ranks).scatter_(0, in_turn, ranks)
