"""Layout of the tokens of an image or video, and its place in a prompt."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Tokens of one image or video, in prompt order.

    Attributes
    ----------
    coords : Tensor [n, 3]
        (image or frame, row, col) of each token; row = col = -1 for newline tokens.
    grid : (rows, cols)
        Sets the diagonal of spatial distances.
    tiles : (rows, cols) or None
        Tiles that the tower saw beside a base view: frame 0 is the base view, frame 1 their grid. None: each frame is one view.
    """

    coords: Tensor
    grid: tuple[int, int]
    tiles: tuple[int, int] | None = None

    @classmethod
    def of_frames(cls, rows: int, cols: int, frames: int = 1) -> Layout:
        """Lay out an image, or the frames of a video one after the other, row-major."""
        import torch

        from vlm_pruner_eval.types import row_major

        frame = row_major(rows, cols)
        return cls(torch.cat([frame + torch.tensor([t, 0, 0]) for t in range(frames)]), (rows, cols))

    @property
    def n_tokens(self) -> int:
        """Tokens that the image takes up in the prompt."""
        return len(self.coords)

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """(n_tokens, rows, cols, frames): rows and columns of tokens in the last frame (tiles are finer than the base view)."""
        cells = self.coords[self.coords[:, 1] >= 0].float().round(decimals=2)  # packing may interpolate, and so round, coordinates
        last = cells[cells[:, 0] == cells[:, 0].max()]
        return self.n_tokens, len(last[:, 1].unique()), len(last[:, 2].unique()), len(cells[:, 0].unique())


@dataclass(frozen=True)
class Part:
    """Tokens of one image or video that are in a scope.

    Attributes
    ----------
    kind, number
        Its number among the images or videos of the batch.
    view
        Its first view, by the order of the vision tower.
    tokens : Tensor [n] or None
        Numbers of the tokens in the image; None: all of them.
    """

    kind: str
    number: int
    view: int = 0
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Scope:
    """One image or video of one row: its layout, and where its tokens are.

    Attributes
    ----------
    positions : Tensor [n]
        Ascending positions in the row of input_ids as passed; need not be contiguous.
    parts
        Images that the tokens belong to: one, but of a scope over all images of a row.
    """

    positions: Tensor
    layout: Layout
    parts: tuple[Part, ...] = ()
