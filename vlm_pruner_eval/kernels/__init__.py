"""Greedy choices on a GPU: one Triton program per image, all images of a batch in one launch, no synchronisation inside.

The plain loop of each method in `pruners` is the reference: a kernel returns its order, token for token, ties included, and is used
only where `usable` says so. A further kernel is a file here with a `triton.jit` function and the function that launches it:

- inputs are contiguous tensors [B, V, ...] on one device. Images may have fewer tokens than V and keep different numbers of them:
  `counts` [B, n] int64 on the device holds each image's own; what lies behind is padding, of any finite value;
- outputs are `order` [B, R] int64, local indices in the order of selection, zeros behind an image's own count, and one tensor
  [B, ...] of all else that the caller wants to know. Both stay on the device: the caller copies them with whatever else it copies;
- of equal scores the lowest index wins. NaN and infinity in the input may lead to any order, never to an endless loop or an index
  out of range: the tokens' check arrives only with the answer;
- products and sums that are compared must round as those of the plain loop: launch with `enable_fp_fusion=False`, take `tl.sqrt_rn`,
  and pass numbers that Python holds in 64 bits as a float64 tensor, since a float argument becomes float32;
- launch in `launching_on(device)`.
"""

from __future__ import annotations

import functools
import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch

MOST_TOKENS = 8192  # of an image: a program holds a few numbers of every token in registers


def usable(device: torch.device, n_visual: int = 1) -> bool:
    """Return True if kernels run on `device` for images of `n_visual` tokens; otherwise the plain loops are used."""
    return device.type == "cuda" and n_visual <= MOST_TOKENS and _has_triton()


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Context in which Triton launches on the device of the tensors, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
