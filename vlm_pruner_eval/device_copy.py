"""Copies from a device to the CPU: many tensors at once, since each copy synchronises."""

from __future__ import annotations

import torch
from torch import Tensor


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Copy tensors to the CPU, all by one copy, to the bit.

    Tensors that are there already are returned as they are. The others come without a gradient.
    """
    away = [tensor for tensor in tensors if tensor.device.type != "cpu"]
    if not away:
        return [*tensors]
    words = [_words(tensor).to(away[0].device, non_blocking=True) for tensor in away]
    packed = torch.cat(words).cpu().split([len(part) for part in words])
    arrived = (_unpacked(part, tensor) for part, tensor in zip(packed, away, strict=True))
    return [tensor if tensor.device.type == "cpu" else next(arrived) for tensor in tensors]


def _words(tensor: Tensor) -> Tensor:
    """The bits of a tensor: [n] int32. Numbers of less than 32 bits are widened, which changes none of them."""
    flat = tensor.detach().reshape(-1).contiguous()
    if len(flat) == 1:  # which is contiguous whatever its stride is, and may not be viewed as other numbers if that is not 1
        flat = flat.as_strided((1,), (1,))
    return flat.to(_carried(tensor.dtype)).view(torch.int32)


def _unpacked(words: Tensor, like: Tensor) -> Tensor:
    carried = _carried(like.dtype)
    # numbers of 64 bits have to begin at an even word of their storage
    return (words if carried.itemsize == 4 else words.clone()).view(carried).view(like.shape).to(like.dtype)


def _carried(dtype: torch.dtype) -> torch.dtype:
    """The type in which numbers of `dtype` travel."""
    if dtype.itemsize >= 4:
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.int32
