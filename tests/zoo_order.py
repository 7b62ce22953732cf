"""LLaVA-NeXT's order of kept patches, by the product's own views of an image of whole tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm_pruner_eval.vlms.parts.image_views import views_of
from vlm_pruner_eval.vlms.parts.layout import Layout, Scope

SIDE = 24
NEXT_VIEWS = 5  # a base view and 2 x 2 tiles


def next_scope(tiles: tuple[int, int] = (2, 2)) -> Scope:
    """A base view and stitched tiles, without newline tokens and padding; views are numbered row-major."""
    rows, cols = (n * SIDE for n in tiles)
    base = Layout.of_frames(SIDE, SIDE).coords
    grid = Layout.of_frames(rows, cols).coords + torch.tensor([1, 0, 0])
    coords = torch.cat([base, grid])
    return Scope(torch.arange(len(coords)), Layout(coords, (rows, cols), tiles))


def next_order(keep: Tensor, tiles: tuple[int, int] = (2, 2)) -> Tensor:
    """Order in the prompt, as view * 576 + patch, of the patches `keep` [views, T] (int64) that each view keeps."""
    views = views_of(next_scope(tiles), side=SIDE)
    places = torch.cat([view.positions[kept] for view, kept in zip(views, keep, strict=True)])
    names = torch.cat([number * SIDE**2 + kept for number, kept in enumerate(keep)])
    return names[places.argsort()]
