"""Tensors of several images as one, for kernels: shorter images have zeros behind their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MOST_BYTES = 2**31  # of the cosines [B, V, V] of images that are worked on together


def padded(parts: Sequence[Tensor]) -> Tensor:
    """Tensors [V_b, ...] as one [B, V, ...]."""
    alike = len({len(part) for part in parts}) == 1
    return torch.stack([*parts]) if alike else pad_sequence([*parts], batch_first=True)


def products(parts: Sequence[Tensor]) -> Tensor:
    """Products [B, V, V] of the rows of each of `parts` [V_b, D], made one by one, so that they don't depend on the batch."""
    longest = max(map(len, parts))
    if all(len(part) == longest for part in parts):
        return torch.stack([part @ part.T for part in parts])
    found = parts[0].new_zeros(len(parts), longest, longest)
    for square, part in zip(found, parts, strict=True):
        square[: len(part), : len(part)] = part @ part.T
    return found


def sent(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers [B, n] of the images of a batch as a tensor on a device, without synchronising."""
    return torch.tensor([*rows], dtype=dtype).to(device, non_blocking=True)


def groups(counts: Sequence[int]) -> Iterator[slice]:
    """Parts of a batch of images of so many tokens each, in order, whose cosines fit in MOST_BYTES; one image at least."""
    begin, longest = 0, 0
    for i, count in enumerate(counts):
        longest = max(longest, count)
        if i > begin and 4 * longest**2 * (i + 1 - begin) > MOST_BYTES:
            yield slice(begin, i)
            begin, longest = i, count
    yield slice(begin, len(counts))
