"""Similarity-weighted aggregation (SWA): which kept token receives each discarded one, with what weight, and the weighted sums."""

from __future__ import annotations

import math
from collections.abc import Callable
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
    rank = order.argsort().argsort()
    bag, kept = rank[receiver], torch.zeros(len(weight), dtype=torch.bool)
    weight, bag[order], kept[order] = weight.double(), rank, True
    weight[order] = 0

    def summed(values: Tensor) -> Tensor:
        return torch.bincount(bag, values, minlength=n_kept)

    coefficients, cancelled, magnitude = _coefficients(weight, bag, kept, summed, self_weight=self_weight, plain_sum=plain_sum)
    tokens = bag.sort(stable=True).indices
    sizes = torch.bincount(bag, minlength=n_kept)
    return Merge(tokens, sizes.cumsum(0) - sizes, coefficients[tokens].float(), bool(cancelled.any()), magnitude.max().item())


def merge_batch(
    similarity: Tensor, states: Tensor, order: Tensor, lengths: Tensor, sizes: Tensor, *, self_weight: float, plain_sum: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge several images at once, on their device and without synchronising; parameters as of `plan_merge`.

    Parameters
    ----------
    similarity : Tensor [B, V, V]
        Cosines.
    states : Tensor [B, V, D] float32
        Old states.
    order : Tensor [B, R]
        Kept tokens in selection order.
    lengths, sizes : Tensor [B]
        Tokens of each image, and how many of `order` are its own.

    Returns
    -------
    Tensor [B, R, D], Tensor [B] bool and Tensor [B] float64
        New states in ascending order of the kept tokens, and of each image `cancelled` and `amplification` of its `Merge`.

    Paper: arXiv 2512.02700 (similarity-weighted aggregation).
    """
    (n_images, width), most = states.shape[:2], order.shape[1]
    there = order.device
    if most == 0:
        return states[:, :0], torch.zeros(n_images, dtype=torch.bool, device=there), torch.zeros(n_images, device=there).double()
    # the receiver of every token, among the kept tokens in ascending order
    slot = torch.arange(most, device=there)
    unused = slot >= sizes[:, None]
    cosines = similarity.gather(2, order[:, None].expand(-1, width, -1)).masked_fill_(unused[:, None], -math.inf)
    weight, receiver = cosines.max(2)
    own = torch.where(unused, width + slot, order)
    rank = own.argsort(1).argsort(1)
    bag = torch.cat([rank.gather(1, receiver), rank], 1).scatter(1, own, rank)[:, :width]
    kept = torch.zeros(n_images, width + most, dtype=torch.bool, device=there).scatter(1, own, True)[:, :width].flatten()
    # bags of all images in a row; what is no token of an image weighs 0, and is dealt out, since a bag is summed one by one
    lane = torch.arange(width, device=there)
    idle = (lane >= lengths[:, None]) | (sizes == 0)[:, None]
    bag = (torch.where(idle, lane % most, bag) + most * torch.arange(n_images, device=there)[:, None]).flatten()
    weight = weight.double().flatten().masked_fill(kept | idle.flatten(), 0)
    bags, tokens = bag.sort(stable=True)
    starts = torch.searchsorted(bags, torch.arange(n_images * most, device=there))

    def summed(values: Tensor) -> Tensor:
        return embedding_bag(tokens, values[:, None], starts, mode="sum")[:, 0]  # in ascending order, as bincount on a CPU

    coefficients, cancelled, magnitude = _coefficients(weight, bag, kept, summed, self_weight=self_weight, plain_sum=plain_sum)
    merged = embedding_bag(tokens, states.flatten(0, 1), starts, mode="sum", per_sample_weights=coefficients[tokens].float())
    return merged.view(n_images, most, -1), cancelled.view(n_images, most).any(1), magnitude.view(n_images, most).amax(1)


def _coefficients(
    weight: Tensor, bag: Tensor, kept: Tensor, summed: Callable[[Tensor], Tensor], *, self_weight: float, plain_sum: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [V] of tokens in `bag` [V] of `weight` [V], 0 for those `kept` [V] bool; `summed` adds numbers [V] bag by bag.

    Returns
    -------
    Tensor [V] float64, and of each bag if its weights cancel out, and the sum of its absolute coefficients.
    """
    total, magnitude = summed(weight), summed(weight.abs())
    cancelled = (magnitude > 0) & (total <= ILL_CONDITIONED * magnitude)
    if not plain_sum:
        weight = torch.where(cancelled[bag], weight.clamp(min=0), weight)
        total = summed(weight)
    receives = total > 0
    share = (1 - self_weight) / total.clamp(min=SMALLEST_WEIGHT_SUM)
    received = torch.where(receives, share, 0.0)[bag] * weight
    coefficients = torch.where(kept, torch.where(receives, self_weight, 1.0).double()[bag], received)
    return coefficients, cancelled, summed(coefficients.abs())


def _most_similar(similarity: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """For every token [V] the largest cosine to a kept one, and the place in `order` of the first that has it."""
    parts = [block.index_select(1, order).max(dim=1) for block in row_blocks(similarity)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
