"""Greedy max-min diversity: each step takes the token that is farthest from its nearest chosen one."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_pruner_eval.kernels import launching_on


def max_min(distance: Tensor, first: Tensor, counts: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Choose `counts[b, 1]` of the first `counts[b, 0]` tokens of each image.

    Parameters
    ----------
    distance : Tensor [B, V, V] float32
        Distances between the tokens of an image.
    first : Tensor [B] int64
        Token that is chosen first.
    counts : Tensor [B, 2] int64
        Tokens of each image, and how many to choose.
    columns
        R, the most to choose of any image.

    Returns
    -------
    Tensor [B, R] int64, and Tensor [B] int32: 1 if the choice without a memory of what is chosen would have taken a token again.

    Paper: arXiv 2503.02175, algorithm 1.
    """
    n_images, width = distance.shape[:2]
    order = torch.zeros(n_images, columns, dtype=torch.int64, device=distance.device)
    repeats = torch.zeros(n_images, dtype=torch.int32, device=distance.device)
    lanes = triton.next_power_of_2(width)
    launch = {"num_warps": min(16, max(4, lanes // 128)), "enable_fp_fusion": False}
    with launching_on(distance.device):
        _max_min[(n_images,)](distance, first, counts, order, repeats, width, columns, LANES=lanes, **launch)
    return order, repeats


@triton.jit(do_not_specialize=["width", "columns"])
def _max_min(distance, first, counts, order, repeats, width, columns, LANES: tl.constexpr):
    image = tl.program_id(0).to(tl.int64)
    distance += image * width * width
    order += image * columns
    n_visual = tl.load(counts + 2 * image)
    keep = tl.load(counts + 2 * image + 1)
    lane = tl.arange(0, LANES)
    here = lane < n_visual
    nearest = tl.where(here, float("inf"), float("-inf"))  # distance to the nearest chosen token; of chosen ones -inf
    bare = nearest  # the same without a memory
    repeated = 0
    token = tl.load(first + image)
    tl.store(order, token, mask=keep > 0)
    for i in range(1, keep):
        row = tl.load(distance + token * width + lane, mask=here, other=float("-inf"))
        row = tl.where(row == row, row, float("inf"))  # NaN can't be compared  # noqa: PLR0124
        bare = tl.minimum(bare, row)
        nearest = tl.where(lane == token, float("-inf"), tl.minimum(nearest, row))
        best = tl.argmax(nearest, 0)
        repeated = tl.where(tl.argmax(bare, 0) == best, repeated, 1)
        token = best.to(tl.int64)
        tl.store(order + i, token)
    tl.store(repeats + image, repeated)
