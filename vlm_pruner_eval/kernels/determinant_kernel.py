"""Greedy maximum of a determinant: each step takes the token that adds the most volume to those chosen."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_pruner_eval.kernels import launching_on


def largest_determinant(
    similarity: Tensor, relevance: Tensor, counts: Tensor, noise: float, columns: int, *, rounding: float
) -> tuple[Tensor, Tensor]:
    """Choose `counts[b, 1]` of the first `counts[b, 0]` tokens of each image, greedily by the determinant of ``diag(r) S diag(r)``.

    Schur complements of S are in float64, and compared in float32 after they are multiplied with the squares of r.

    Parameters
    ----------
    similarity : Tensor [B, V, V] float32
        S, cosines between the tokens of an image.
    relevance : Tensor [B, V] float32
        r, above 0.
    counts : Tensor [B, 2] int64
        Tokens of each image, and how many to choose.
    noise
        A best token whose Schur complement is this or less ends the greedy choice; what is missing comes by descending relevance.
    columns
        R, the most to choose of any image.
    rounding
        A token's cosine to itself that is as near to 1 is 1.

    Returns
    -------
    Tensor [B, R] int64, and Tensor [B] int64: how many were chosen greedily.

    Paper: arXiv 1709.05135, algorithm 1; arXiv 2506.10967, section 3.
    """
    n_images, width = similarity.shape[:2]
    device = similarity.device
    order = torch.zeros(n_images, columns, dtype=torch.int64, device=device)
    clear = torch.zeros(n_images, dtype=torch.int64, device=device)
    factor = torch.empty(n_images, columns, width, dtype=torch.float64, device=device)  # rows of the Cholesky factor
    share = torch.tensor([noise], dtype=torch.float64).to(device, non_blocking=True)
    lanes = triton.next_power_of_2(width)
    sizes = {"LANES": lanes, "ROWS": min(8, max(1, 8192 // lanes)), "ROUNDING": rounding}
    launch = {"num_warps": min(16, max(4, lanes // 128)), "enable_fp_fusion": False}
    with launching_on(device):
        _determinant[(n_images,)](similarity, relevance, counts, share, factor, order, clear, width, columns, **sizes, **launch)
    return order, clear


@triton.jit(do_not_specialize=["width", "columns"])
def _determinant(
    similarity,
    relevance,
    counts,
    share,
    factor,
    order,
    clear,
    width,
    columns,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    # the image of this program
    image = tl.program_id(0).to(tl.int64)
    similarity += image * width * width
    relevance += image * width
    factor += image * columns * width
    order += image * columns
    n_visual = tl.load(counts + 2 * image)
    keep = tl.load(counts + 2 * image + 1)
    limit = tl.load(share)
    lane = tl.arange(0, LANES)
    here = lane < n_visual
    open_ = here
    by_relevance = tl.load(relevance + lane, mask=here, other=0.0)
    weight = by_relevance.to(tl.float64) * by_relevance.to(tl.float64)
    own = tl.load(similarity + lane * (width + 1), mask=here, other=0.0)
    left = tl.where(tl.abs(own - 1.0) <= ROUNDING, 1.0, own).to(tl.float64)  # Schur complements
    chosen = 0
    going = chosen < keep
    # greedily
    while going:
        token = _first_best((left * weight).to(tl.float32), open_)
        best = tl.sum(tl.where(lane == token, left, 0.0), 0)
        if best <= limit:
            going = False
        else:
            row = tl.load(similarity + token * width + lane, mask=here, other=0.0).to(tl.float64)
            row = (row - _explained(factor, token, chosen, width, lane, here, LANES, ROWS)) / tl.sqrt(best)
            tl.store(factor + chosen * width + lane, row, mask=here)
            tl.debug_barrier()
            left -= row * row
            open_ = open_ & (lane != token)
            tl.store(order + chosen, token)
            chosen += 1
            going = chosen < keep
    tl.store(clear + image, chosen)
    # the rest by relevance
    for i in range(chosen, keep):
        token = _first_best(by_relevance, open_)
        open_ = open_ & (lane != token)
        tl.store(order + i, token)


@triton.jit
def _first_best(values, open_):
    """The first of the largest values among open tokens; NaN, which can't be compared, counts as the largest."""
    values = tl.where(values == values, values, float("inf"))  # noqa: PLR0124
    return tl.argmax(tl.where(open_, values, float("-inf")), 0).to(tl.int64)


@triton.jit
def _explained(factor, token, chosen, width, lane, here, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Products of the factor's rows so far with the column of `token`, summed over the rows: [LANES]."""
    found = tl.zeros((LANES,), tl.float64)
    slot = tl.arange(0, ROWS)
    for start in range(0, chosen, ROWS):
        there = start + slot < chosen
        at = (start + slot).to(tl.int64) * width
        column = tl.load(factor + at + token, mask=there, other=0.0)
        rows = tl.load(factor + at[:, None] + lane[None, :], mask=there[:, None] & here[None, :], other=0.0)
        found += tl.sum(rows * column[:, None], 0)
    return found
