"""Uniform selection: an even spread over rows and columns, the control that knows nothing of the content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.types import VisualTokens

# Multiples of a quadratic irrational leave no large gap on the circle, in rows and columns alone; 1, sqrt 2 and sqrt 3 are
# independent over the rationals, so no two cells tie. Searched over 13 constants on 7 grids at 3 rates: no row or column is
# missed and none is off by 2 tokens. The constants of the plane's R2 sequence leave rows of 24 x 24 empty at 64 tokens.
ROW_STEP, COL_STEP = 2**0.5 - 1, 3**0.5 - 1
FRAME_STEP = (5**0.5 - 1) / 2


@dataclass(frozen=True, kw_only=True)
class Uniform(Pruner):
    """The R cells that come first on a two-dimensional low-discrepancy lattice.

    A cell's rank is the fractional part of ``row * a + col * b + frame * c``, so every row and every column keeps nearly
    the same share. (A flat stride over 24 x 24 tokens hits 8 of 24 columns at 192 and at 64 tokens.) Newline tokens have no
    cell and are spread evenly along their own sequence. It has no parameters of its own.
    """

    name: ClassVar[str] = "uniform"
    checks_late: ClassVar[bool] = True

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        """As `choose_batch` for one image."""
        (chosen,) = self.choose_batch([tokens], [keep])
        return chosen

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Tensor]:
        """Local indices [R] by ascending rank on the lattice."""
        coords = tokens[0].on_host(*(given.coords for given in tokens))
        return [lattice_rank(one).sort(stable=True).indices[:keep] for one, keep in zip(coords, keeps, strict=True)]


def lattice_rank(coords: Tensor) -> Tensor:
    """Rank in [0, 1) of coordinates [V, 3] = (frame, row, col) in the memory of the host, in float64: the same whatever the device is."""
    frame, row, col = coords.double().unbind(-1)
    newline = row < 0
    along = newline.cumsum(0).double()
    return torch.where(newline, along * FRAME_STEP, row * ROW_STEP + col * COL_STEP + frame * FRAME_STEP).frac()
