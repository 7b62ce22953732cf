"""VLM-Pruner's growth by the BSS criterion, as `pruners.bss.Growth` does it for one image."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_pruner_eval.kernels import launching_on

_LAST = tl.constexpr(2**63 - 1)  # key of what is no candidate


def grow(
    similarity: Tensor, coords: Tensor, start: Tensor, counts: Tensor, rules: Tensor, columns: int, *, block: int, stop: bool
) -> tuple[Tensor, Tensor]:
    """Grow the choice of every image until as many are chosen as asked.

    Parameters
    ----------
    similarity : Tensor [B, V, V] float32
        Cosines between the tokens of an image.
    coords : Tensor [B, 3, V] float32
        Image or frame, row and column of each token; tokens without a distance to others are a frame of their own each.
    start : Tensor [B, P] int64
        Tokens chosen from the start.
    counts : Tensor [B, 3] int64
        Tokens of each image, how many to choose, how many of `start` are its own.
    rules : Tensor [B, 3] float64
        First threshold, step of the threshold, weight of a distance of one cell.
    columns
        R, the most that any image can come to.
    block
        Candidates scored together.
    stop
        Stop at a pass that adds nothing.

    Returns
    -------
    Tensor [B, R] int64, and Tensor [B, 3] float64: how many are chosen; 1 if a pass added nothing; the best score if it is not
    finite, so that the growth came to an end before its time, otherwise 0.

    Paper: arXiv 2512.02700 (BSS criterion, passes).
    """
    n_images, width = similarity.shape[:2]
    device = similarity.device
    order = torch.zeros(n_images, columns, dtype=torch.int64, device=device)
    order[:, : start.shape[1]] = start[:, :columns]
    found = torch.zeros(n_images, 3, dtype=torch.float64, device=device)
    # what the threads of a program tell each other
    ranked = torch.empty(n_images, width, dtype=torch.int32, device=device)
    running = torch.empty(n_images, 2, width, dtype=torch.float32, device=device)
    lanes, block = triton.next_power_of_2(width), min(block, width)
    sizes = {"LANES": lanes, "BLOCK": triton.next_power_of_2(block)}
    launch = {"num_warps": min(16, max(4, lanes // 128)), "enable_fp_fusion": False}
    with launching_on(device):
        _grow[(n_images,)](
            similarity, coords, counts, rules, order, found, ranked, running, width, columns, block, STOP=stop, **sizes, **launch
        )
    return order, found


@triton.jit(do_not_specialize=["width", "columns", "block"])
def _grow(
    similarity,
    coords,
    counts,
    rules,
    order,
    found,
    ranked,
    running,
    width,
    columns,
    block,
    STOP: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # the image of this program
    image = tl.program_id(0).to(tl.int64)
    similarity += image * width * width
    coords += image * 3 * width
    order += image * columns
    ranked += image * width
    running += image * 2 * width
    n_visual = tl.load(counts + 3 * image)
    keep = tl.load(counts + 3 * image + 1)
    chosen = tl.load(counts + 3 * image + 2)
    threshold = tl.load(rules + 3 * image)
    step = tl.load(rules + 3 * image + 1)
    per_cell = tl.load(rules + 3 * image + 2).to(tl.float32)
    # the tokens chosen from the start
    lane = tl.arange(0, LANES)
    here = lane < n_visual
    cosine = tl.full((LANES,), float("-inf"), tl.float32)
    squared = tl.full((LANES,), float("inf"), tl.float32)
    open_ = here
    cosine, squared, open_ = _add(similarity, coords, order, 0, chosen, width, lane, here, cosine, squared, open_)
    # pass by pass
    stalled = 0
    failed = 0.0
    going = 1
    while (chosen < keep) & (going == 1):
        keys = tl.where(open_, _keys(_scores(cosine, squared, per_cell), lane), _LAST)
        left = n_visual - chosen
        tl.store(ranked + lane, tl.sort(keys).to(tl.int32), mask=lane < left)  # the low half of a key is the token
        tl.store(running + lane, cosine, mask=here)
        tl.store(running + width + lane, squared, mask=here)
        tl.debug_barrier()
        before = chosen
        cosine, squared, open_, chosen = _walk(
            similarity,
            coords,
            order,
            ranked,
            running,
            width,
            block,
            lane,
            here,
            cosine,
            squared,
            open_,
            chosen,
            keep,
            left,
            per_cell,
            threshold.to(tl.float32),
            BLOCK,
        )
        # the threshold of the next pass
        if chosen > before:
            threshold += step
        else:
            stalled = 1
            lowest = _lowest(keys)
            if STOP:
                going = 0
            elif tl.abs(lowest) < float("inf"):
                threshold = _loosened(threshold, step, lowest)
            else:
                failed = lowest
                going = 0
        tl.debug_barrier()
    tl.store(found + 3 * image, chosen.to(tl.float64))
    tl.store(found + 3 * image + 1, stalled.to(tl.float64))
    tl.store(found + 3 * image + 2, failed.to(tl.float64))


@triton.jit
def _walk(
    similarity,
    coords,
    order,
    ranked,
    running,
    width,
    block,
    lane,
    here,
    cosine,
    squared,
    open_,
    chosen,
    keep,
    left,
    per_cell,
    limit,
    BLOCK: tl.constexpr,
):
    """Walk the ranked candidates in blocks, each scored against the tokens chosen so far, until `keep` are chosen."""
    slot = tl.arange(0, BLOCK)
    before = chosen
    at = 0
    walking = 1
    while (at < left) & (walking == 1):
        # the candidates of the block that join
        there = (slot < block) & (at + slot < left)
        token = tl.load(ranked + at + slot, mask=there, other=0)
        near = tl.load(running + token, mask=there, other=0.0)
        apart = tl.load(running + width + token, mask=there, other=0.0)
        score = _scores(near, apart, per_cell)
        joins = there & (score < limit)
        many = tl.sum(joins.to(tl.int32), 0)
        place = tl.cumsum(joins.to(tl.int32), 0) - 1
        room = (keep - chosen).to(tl.int32)
        if many > room:  # the best of the block, best first
            best = tl.sort(tl.where(there, _keys(score, slot), _LAST)).to(tl.int32)
            many = room
            place = slot
            joins = slot < room
            token = tl.load(ranked + at + best, mask=joins, other=0)
        if many > 0:
            tl.store(order + chosen + place, token.to(tl.int64), mask=joins)
            tl.debug_barrier()
            cosine, squared, open_ = _add(similarity, coords, order, chosen, chosen + many, width, lane, here, cosine, squared, open_)
            tl.store(running + lane, cosine, mask=here)
            tl.store(running + width + lane, squared, mask=here)
            tl.debug_barrier()
            chosen += many
        at += block
        if (chosen == keep) | (chosen == before):  # a first block that adds nothing ends the pass
            walking = 0
    return cosine, squared, open_, chosen


@triton.jit
def _add(similarity, coords, order, begin, end, width, lane, here, cosine, squared, open_):
    """Take the tokens order[begin:end] into the running maxima of cosines and minima of squared distances."""
    frame = tl.load(coords + lane, mask=here, other=0.0)
    row = tl.load(coords + width + lane, mask=here, other=0.0)
    col = tl.load(coords + 2 * width + lane, mask=here, other=0.0)
    for i in range(begin, end):
        token = tl.load(order + i)
        cosine = tl.maximum(cosine, tl.load(similarity + token * width + lane, mask=here, other=float("-inf")))
        down = row - tl.load(coords + width + token)
        across = col - tl.load(coords + 2 * width + token)
        squared = tl.where(frame == tl.load(coords + token), tl.minimum(squared, down * down + across * across), squared)
        open_ = open_ & (lane != token)
    return cosine, squared, open_


@triton.jit
def _scores(cosine, squared, per_cell):
    distance = tl.where(squared == float("inf"), 0.0, tl.sqrt_rn(squared))  # nothing chosen in this frame: a factor of 1
    return (distance * per_cell + 1.0) * cosine


@triton.jit
def _keys(scores, places):
    """Whole numbers of 64 bits in the order of the scores, the lower place first among equal ones, NaN last."""
    bits = scores.to(tl.int32, bitcast=True)
    bits = tl.where(scores == 0, 0, bits)  # -0 as 0
    bits = tl.where(scores == scores, bits, 0x7FC00000)  # noqa: PLR0124
    return (_mirrored(bits).to(tl.int64) << 32) | places.to(tl.int64)


@triton.jit
def _lowest(keys):
    """The score of the first key."""
    return _mirrored((tl.min(keys, 0) >> 32).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _mirrored(bits):
    """The bits of a float32 as a whole number that is the larger the larger the number is, and back."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _loosened(threshold, step, lowest):
    """The first threshold of the ladder above the lowest score, see `pruners.bss`."""
    rungs = (lowest.to(tl.float64) - threshold) / step
    rung = tl.where(rungs < 4503599627370496.0, threshold + step * (tl.floor(rungs) + 1.0), lowest.to(tl.float64))
    bits = lowest.to(tl.int32, bitcast=True)
    bits = tl.where(lowest == 0, 1, tl.where(bits < 0, bits - 1, bits + 1))  # the next float32
    above = bits.to(tl.float32, bitcast=True).to(tl.float64)
    return tl.where(above > rung, above, rung)
