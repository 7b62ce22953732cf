"""Views of one image: the base view and each tile of LLaVA-NeXT and its like, each frame of a video."""

from __future__ import annotations

import torch

from vlm_pruner_eval.vlms.parts.layout import Layout, Part, Scope


def views_of(scope: Scope, *, side: int | None) -> list[Scope]:
    """Split the tokens of an image or video into its views, each a grid of its own; newline tokens are in none of them.

    Parameters
    ----------
    side
        Tokens along a tile of layouts that have tiles: their frame 1 is a grid of tiles, which the tower saw one by one, row-major.
    """
    frames, rows, cols = scope.layout.coords.round().long().unbind(-1)  # packing may interpolate, and so round, coordinates
    is_cell = rows >= 0
    number = frames
    grid = scope.layout.grid
    if scope.layout.tiles is not None and side is not None:
        tile = 1 + rows // side * scope.layout.tiles[1] + cols // side
        number = torch.where(frames > 0, tile, frames)
        rows = rows % side
        cols = cols % side
        grid = (side, side)
    found = []
    for view in number[is_cell].unique().tolist():
        own = (is_cell & (number == view)).nonzero()[:, 0]
        coords = torch.stack([torch.zeros_like(own), rows[own], cols[own]], -1)
        parts = tuple(Part(part.kind, part.number, view, own) for part in scope.parts)
        found.append(Scope(scope.positions[own], Layout(coords, grid), parts))
    return found
