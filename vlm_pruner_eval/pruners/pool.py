"""Pool: average pooling to exactly R cells, the control that a method of selection has to beat."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.types import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Pool(Pruner):
    """The mean of the tokens of each of R cells, where each frame's grid is cut into bands, and each band into runs of columns.

    Several frames (or the base view and the tiles of an image) share R in proportion to their tokens. The mean stands in place of
    the token nearest to the cell's centre, whose position it keeps. At the rates of the paper a cell holds 3 to 9 tokens; R = 64 of
    24 x 24 is pooling with a window of 3 x 3. Newline tokens have no place in a grid: they are dropped, and kept only where R is
    larger than the number of the others. Features that Qwen3-VL adds after its first layers are those of the token whose place
    the mean takes.

    Parameters
    ----------
    layer
        0 (default): the embeddings after the projector are pooled; a larger K pools the hidden states that layer K would see.
    """

    name: ClassVar[str] = "pool"
    checks_late: ClassVar[bool] = True

    layer: int = 0

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """The token nearest to the centre of each cell, and the means [R, D]."""
        coords = tokens[0].on_host(*(given.coords for given in tokens))
        return [self._pooled(*one) for one in zip(tokens, coords, keeps, strict=True)]

    def _pooled(self, tokens: VisualTokens, coords: Tensor, keep: int) -> Selection:
        states = tokens.hidden_states
        cell = cell_of(coords, keep, sample_id=tokens.sample_id)
        centre, weights = _centres(coords, cell, keep), torch.zeros(keep, len(cell), dtype=states.dtype)
        member = (cell >= 0).nonzero()[:, 0]
        weights[cell[member], member] = 1
        weights /= weights.sum(1, keepdim=True)
        order, by_position = centre.sort()
        means = weights[by_position].to(states.device, non_blocking=True) @ states
        return Selection(order, means, amplification=1.0)


def cell_of(coords: Tensor, keep: int, *, sample_id: str | None = None) -> Tensor:
    """The cell, 0 to `keep` - 1, of every token with coordinates [V, 3] = (frame, row, col); -1 for one that is dropped.

    Every cell has a token. Cells of a frame are near-equal rectangles on a full grid.

    Raises
    ------
    PruningError
        Two tokens at one place, so that there may be fewer places than cells.
    """
    cell = torch.full((len(coords),), -1)
    placed = (coords[:, 1] >= 0).nonzero()[:, 0]
    if len(coords[placed].unique(dim=0)) < len(placed):
        raise PruningError(f"pool: sample {sample_id!r} has two tokens at one place of its grid, expected one (frame, row, col) a token.")
    extra = max(0, keep - len(placed))  # more cells than places: every token is one, and newline tokens fill up
    newlines = (coords[:, 1] < 0).nonzero()[:, 0]
    cell[newlines[torch.arange(extra) * len(newlines) // max(1, extra)]] = keep - extra + torch.arange(extra)
    used = 0
    for frame, share in _shares(coords[placed, 0], keep - extra):
        own = placed[coords[placed, 0] == frame]
        cell[own] = _cells_of_frame(coords[own, 1], coords[own, 2], share) + used if share else -1
        used += share
    return cell


def _shares(frames: Tensor, keep: int) -> Iterator[tuple[int, int]]:
    """How many of `keep` cells each frame gets, in proportion to its tokens; rounding is spread over the frames."""
    names, counts = frames.unique(return_counts=True)
    ends = (2 * keep * counts.cumsum(0) + len(frames)) // (2 * max(1, len(frames)))  # halves round up
    yield from zip(names.tolist(), ends.diff(prepend=torch.zeros(1, dtype=ends.dtype)).tolist(), strict=True)


def _cells_of_frame(row: Tensor, col: Tensor, n_cells: int) -> Tensor:
    """The cell of each token: near-square ones, as many bands as that takes, more only where the columns do not suffice."""
    row, n_rows = _ranked(row)
    n_bands = round(math.sqrt(n_cells * n_rows / (int(_ranked(col)[1]))))
    n_bands = min(max(1, n_bands), n_rows, n_cells)
    while True:
        band = row * n_bands // n_rows
        columns = [_ranked(col[band == b]) for b in range(n_bands)]
        if sum(width for _, width in columns) >= n_cells:
            break
        n_bands += 1  # ends at one row a band, where every token has a column of its own
    heights = [n_rows * (b + 1) // n_bands - n_rows * b // n_bands for b in range(n_bands)]
    per_band, cell, first = _dealt(n_cells, heights, [width for _, width in columns]), torch.empty_like(row), 0
    for b, (rank, width) in enumerate(columns):
        cell[band == b] = first + rank * per_band[b] // width
        first += per_band[b]
    return cell


def _ranked(values: Tensor) -> tuple[Tensor, int]:
    """Rank of each value among the distinct ones, and how many these are."""
    distinct, rank = values.unique(return_inverse=True)
    return rank, len(distinct)


def _dealt(n_cells: int, heights: list[int], rooms: list[int]) -> list[int]:
    """Cells of each band, one after the other from the highest band on, while there is room in its columns."""
    dealt, order = [0] * len(rooms), sorted(range(len(rooms)), key=lambda b: -heights[b])
    while n_cells:
        for b in [b for b in order if dealt[b] < rooms[b]][:n_cells]:
            dealt[b] += 1
            n_cells -= 1
    return dealt


def _centres(coords: Tensor, cell: Tensor, n_cells: int) -> Tensor:
    """Of every cell the token nearest to its mean row and column, the first of several: [n_cells] int64."""
    order = (cell >= 0).nonzero()[:, 0]
    own, places = cell[order], coords[order, 1:].double()
    count = torch.bincount(own, minlength=n_cells)[:, None]
    mean = torch.zeros(n_cells, 2, dtype=torch.float64).index_add_(0, own, places) / count
    away = ((places - mean[own]) ** 2).sum(1)
    by_distance = away.sort(stable=True).indices
    by_cell = by_distance[own[by_distance].sort(stable=True).indices]  # the nearest of each cell comes first
    starts = count[:, 0].cumsum(0) - count[:, 0]
    return order[by_cell[starts]]
