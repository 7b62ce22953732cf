"""Views of one image: the base view and each tile of LLaVA-NeXT and its like, each frame of a video."""

from __future__ import annotations

import torch

from vlm_pruner_eval.vlms.parts.layout import Layout, Scope


def views_of(scope: Scope, *, side: int | None) -> list[Scope]:
    """Split the tokens of an image or video into its views, each a grid of its own; newline tokens are in none of them.

    Parameters
    ----------
    side
        Tokens along a tile: frame 1 is a grid of tiles, which the tower saw one by one, row-major. None: each frame is one view.
    """
    frames, rows, cols = scope.layout.coords.round().long().unbind(-1)  # packing may interpolate, and so round, coordinates
    is_cell = rows >= 0
    tile = torch.zeros_like(frames)
    if side is not None:
        is_tile = is_cell & (frames > 0)
        across = int(cols[is_tile].max()) // side + 1 if bool(is_tile.any()) else 1
        tile = torch.where(is_tile, rows // side * across + cols // side, tile)
        rows = torch.where(is_tile, rows % side, rows)
        cols = torch.where(is_tile, cols % side, cols)
    # numbers of views in the order of the tower
    number = frames * (int(tile.max()) + 1) + tile
    found = []
    for view in number[is_cell].unique().tolist():
        own = is_cell & (number == view)
        coords = torch.stack([torch.zeros_like(rows[own]), rows[own], cols[own]], -1)
        grid = (side, side) if side is not None else scope.layout.grid
        found.append(Scope(scope.positions[own], Layout(coords, grid)))
    return found
