"""Greedy coverage: each step takes the token that adds the most, by weight, to what is covered of all tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_pruner_eval.kernels import launching_on


def coverage(similarity: Tensor, weight: Tensor, counts: Tensor, most: int, *, added: bool = False) -> tuple[Tensor, Tensor]:
    """Choose `counts[b, 1]` of the first `counts[b, 0]` tokens of each image, greedily by weighted gain of coverage.

    A token's gain is ``w_j * sum_i max(0, S_ij - cover_i)``; a chosen token j lifts every cover_i, 0 at first, to S_ji. The sum is
    in float64 and rounded to float32, in which it is multiplied with the weight and compared.

    Parameters
    ----------
    similarity : Tensor [B, V, V] float32
        S, cosines between the tokens of an image.
    weight : Tensor [B, V] float32
        w, 0 or more.
    counts : Tensor [B, 2] int64
        Tokens of each image, and how many to choose.
    most
        R, the most to choose of any image.
    added
        Add the weight to the sum in place of multiplying.

    Returns
    -------
    Tensor [B, R] int64, and Tensor [B] int32: 1 if at some step no token that was left added anything.

    Paper: arXiv 2510.24214, section 3.
    """
    n_images, width = similarity.shape[:2]
    device = similarity.device
    order = torch.zeros(n_images, most, dtype=torch.int64, device=device)
    idle = torch.zeros(n_images, dtype=torch.int32, device=device)
    cover = torch.zeros(n_images, width, dtype=torch.float32, device=device)  # the threads of a program tell each other
    lanes = triton.next_power_of_2(width)
    sizes = {"LANES": lanes, "ROWS": min(8, max(1, 8192 // lanes))}
    launch = {"num_warps": min(16, max(4, lanes // 128)), "enable_fp_fusion": False}
    with launching_on(device):
        _coverage[(n_images,)](similarity, weight, counts, cover, order, idle, width, most, ADDED=added, **sizes, **launch)
    return order, idle


@triton.jit(do_not_specialize=["width", "columns"])
def _coverage(similarity, weight, counts, cover, order, idle, width, columns, ADDED: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr):
    # the image of this program
    image = tl.program_id(0).to(tl.int64)
    similarity += image * width * width
    cover += image * width
    order += image * columns
    n_visual = tl.load(counts + 2 * image)
    keep = tl.load(counts + 2 * image + 1)
    lane = tl.arange(0, LANES)
    here = lane < n_visual
    open_ = here
    weights = tl.load(weight + image * width + lane, mask=here, other=0.0)
    covered = tl.zeros((LANES,), tl.float32)
    idled = 0
    for i in range(keep):
        gain = _gains(similarity, cover, n_visual, width, lane, here, LANES, ROWS)
        gain = gain + weights if ADDED else gain * weights
        gain = tl.where(gain == gain, gain, float("inf"))  # NaN can't be compared  # noqa: PLR0124
        gain = tl.where(open_, gain, float("-inf"))
        idled = tl.where(tl.max(gain, 0) > 0, idled, 1)
        token = tl.argmax(gain, 0).to(tl.int64)
        tl.store(order + i, token)
        open_ = open_ & (lane != token)
        # what is covered now
        covered = tl.maximum(covered, tl.load(similarity + token * width + lane, mask=here, other=0.0))
        tl.debug_barrier()
        tl.store(cover + lane, covered, mask=here)
        tl.debug_barrier()
    tl.store(idle + image, idled)


@triton.jit
def _gains(similarity, cover, n_visual, width, lane, here, LANES: tl.constexpr, ROWS: tl.constexpr):
    """Sums over the rows of what each column exceeds the cover by: [LANES] float32."""
    total = tl.zeros((LANES,), tl.float64)
    slot = tl.arange(0, ROWS)
    for start in range(0, n_visual, ROWS):
        row = (start + slot).to(tl.int64)
        there = row < n_visual
        floor = tl.load(cover + row, mask=there, other=0.0)
        square = tl.load(similarity + row[:, None] * width + lane[None, :], mask=there[:, None] & here[None, :], other=0.0)
        excess = tl.where(there[:, None], square - floor[:, None], 0.0)
        total += tl.sum(tl.maximum(excess, 0.0).to(tl.float64), 0)
    return total.to(tl.float32)
