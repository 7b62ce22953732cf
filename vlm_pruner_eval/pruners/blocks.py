"""Sums over rows and columns of a large matrix, block by block: no second copy of it, and on a CPU the block stays in the cache.

Every row (column) is summed by the same operations in the same order as without blocks, so the answers are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK_BYTES = 2**20  # a usual second-level cache


def row_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of the rows [n, D] of a matrix [N, D], at least one row each; on other devices than a CPU, where launches count, one."""
    if matrix.device.type != "cpu":
        return (matrix,)
    blocks: tuple[Tensor, ...] = matrix.split(max(1, BLOCK_BYTES // max(1, matrix.shape[1] * matrix.element_size())))
    return blocks


def column_blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Views of the columns [N, n] of a matrix [N, D]; on other devices than a CPU one.

    A block is a multiple of 64 columns, the last one longer by what is left: vector registers are then filled as in one sweep
    over all columns, and the few columns behind the last full register are summed in the same order too.
    """
    n_columns = matrix.shape[1]
    width = max(1, BLOCK_BYTES // max(1, len(matrix) * matrix.element_size()) // 64) * 64
    if matrix.device.type != "cpu" or n_columns < 2 * width:
        return (matrix,)
    count = n_columns // width
    blocks: tuple[Tensor, ...] = matrix.split([width] * (count - 1) + [n_columns - width * (count - 1)], dim=1)
    return blocks


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts [n] of a vector [N] as one; a single part as it is, which spares a GPU a copy."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def l1_norms(rows: Tensor) -> Tensor:
    """L1 norms [N] of rows [N, D]."""
    return joined([block.abs().sum(-1) for block in row_blocks(rows)])


def squared_distances(rows: Tensor, point: Tensor) -> Tensor:
    """Squared Euclidean distances [N] of rows [N, D] to a point [1, D], from their differences: nothing cancels."""
    return joined([(block - point).square_().sum(-1) for block in row_blocks(rows)])


def variances(rows: Tensor) -> Tensor:
    """Biased variances [D] of the columns of rows [N, D], in two passes, so that a large mean does not cancel."""
    blocks = column_blocks(rows)
    means = rows.mean(0).split([block.shape[1] for block in blocks])
    return joined([(block - mean).square_().mean(0) for block, mean in zip(blocks, means, strict=True)])
