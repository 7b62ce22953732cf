"""Similarity-weighted aggregation (SWA): which kept token receives each discarded one, with what weight, and the weighted sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from vlm_pruner_eval.pruners.blocks import row_blocks

ILL_CONDITIONED = 1e-3  # a sum of weights at or below this share of the sum of their absolute values is cancellation
SMALLEST_WEIGHT_SUM = 1e-8


@dataclass(frozen=True)
class Merge:
    """New states as weighted sums of the old: row r is the sum of coefficient * state over the tokens of bag r.

    Attributes
    ----------
    tokens : Tensor [V] int64
        All tokens, bag by bag; a bag is one kept token and the discarded ones that it receives. Bags are in ascending order
        of the kept tokens.
    starts : Tensor [R] int64
        Where each bag starts in `tokens`.
    coefficients : Tensor [V] float32
        Coefficients of `tokens`.
    cancelled
        Whether weights cancelled out somewhere.
    amplification
        The largest sum of absolute coefficients of a bag: no number of a new state is larger than the largest of the old times this.
    """

    tokens: Tensor
    starts: Tensor
    coefficients: Tensor
    cancelled: bool
    amplification: float

    def apply(self, states: Tensor) -> Tensor:
        """New states [R, D] of float32 states [V, D], on their device; no wait for the device."""
        if len(self.starts) == 0:
            return states[:0]
        tokens, starts, coefficients = (part.to(states.device, non_blocking=True) for part in (self.tokens, self.starts, self.coefficients))
        return embedding_bag(tokens, states, starts, mode="sum", per_sample_weights=coefficients)


def plan_merge(similarity: Tensor, order: Tensor, *, self_weight: float, plain_sum: bool) -> Merge:
    """Give every discarded token to the most similar kept one.

    Parameters
    ----------
    similarity : Tensor [V, V]
        Cosines between the tokens, in the memory of the host.
    order : Tensor [R]
        Kept tokens in selection order, in the memory of the host.
    self_weight
        beta, the share of its own state that a kept token retains.
    plain_sum
        Normalise by the signed sum of the weights even where they cancel out, as the release does; otherwise negative
        cosines weigh 0 there.

    Returns
    -------
    Merge
        A token whose weights do not sum to more than 0 is unchanged.

    Paper: arXiv 2512.02700 (similarity-weighted aggregation).
    """
    n_kept = len(order)
    if n_kept == 0:
        nothing = torch.zeros(0, dtype=torch.int64)
        return Merge(nothing, nothing, torch.zeros(0), False, 0.0)
    weight, receiver = _most_similar(similarity, order)
    bag = order.argsort().argsort()[receiver]
    weight, bag[order] = weight.double(), order.argsort().argsort()
    weight[order] = 0
    total, magnitude = (torch.bincount(bag, values, minlength=n_kept) for values in (weight, weight.abs()))
    cancelled = (magnitude > 0) & (total <= ILL_CONDITIONED * magnitude)
    if not plain_sum:
        weight = torch.where(cancelled[bag], weight.clamp(min=0), weight)
        total = torch.bincount(bag, weight, minlength=n_kept)
    receives = total > 0
    share = (1 - self_weight) / total.clamp(min=SMALLEST_WEIGHT_SUM)
    coefficients = torch.where(receives, share, 0.0)[bag] * weight
    coefficients[order] = torch.where(receives, self_weight, 1.0).double()[bag[order]]
    tokens = bag.sort(stable=True).indices
    sizes = torch.bincount(bag, minlength=n_kept)
    amplification = torch.bincount(bag, coefficients.abs(), minlength=n_kept).max().item()
    return Merge(tokens, sizes.cumsum(0) - sizes, coefficients[tokens].float(), bool(cancelled.any()), amplification)


def _most_similar(similarity: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """For every token [V] the largest cosine to a kept one, and the place in `order` of the first that has it."""
    parts = [block.index_select(1, order).max(dim=1) for block in row_blocks(similarity)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
