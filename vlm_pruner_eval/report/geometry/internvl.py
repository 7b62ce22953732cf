"""InternVL: tiles of a stretched image, each a layout of its own, and a thumbnail."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.geometry.boxes import Layout, Medium, Picture, even_boxes, expect_tokens, frame_of, whole_box


def internvl(geometry: Mapping[str, Any], medium: Medium, layouts: list[Layout]) -> tuple[int, list[Picture]]:
    """Tiles of a stretched image in row-major order, then a thumbnail where there are several; every tile is a layout of its own."""
    n_tokens, rows, cols, _ = layouts[0]
    expect_tokens(layouts[0], rows * cols, "a tile")
    if medium.is_video:
        _expect_layouts(layouts, medium.n_frames, f"a video of {medium.n_frames} frames")
        each = even_boxes(medium, rows, cols)
        moved = [{t * n_tokens + i: box for i, box in each.items()} for t in range(medium.n_frames)]
        return medium.n_frames, [frame_of(medium, t, boxes) for t, boxes in enumerate(moved)]
    down, across = tile_arrangement((medium.height, medium.width), geometry["tile"], geometry["min_tiles"], geometry["max_tiles"])
    n_tiles = down * across + (down * across > 1)
    _expect_layouts(layouts, n_tiles, f"an image of {medium.width} x {medium.height} pixels")
    fine = even_boxes(medium, down * rows, across * cols)
    tiles = {}
    for cell, box in fine.items():
        row, col = divmod(cell, across * cols)
        tile = row // rows * across + col // cols
        tiles[tile * n_tokens + row % rows * cols + col % cols] = box
    if n_tiles == 1:
        return 1, [("", 0, whole_box(medium), tiles)]
    thumbnail = {(n_tiles - 1) * n_tokens + i: box for i, box in even_boxes(medium, rows, cols).items()}
    return n_tiles, [("tiles", 0, whole_box(medium), tiles), ("thumbnail", 0, whole_box(medium), thumbnail)]


def tile_arrangement(size: tuple[int, int], tile: int, least: int, most: int) -> tuple[int, int]:
    """(rows, cols) of InternVL's tiles for an image of `size` (height, width): the closest shape, larger ones for larger images.

    Paper: arXiv 2404.16821 (dynamic high resolution), with the tie rule of its processor.
    """
    shapes = [(rows, cols) for cols in range(1, most + 1) for rows in range(1, most + 1) if least <= rows * cols <= most]
    best, best_gap = (1, 1), math.inf
    for rows, cols in sorted(shapes, key=math.prod):
        gap = abs(size[1] / size[0] - cols / rows)
        if gap < best_gap or (gap == best_gap and size[0] * size[1] > 0.5 * tile**2 * rows * cols):
            best, best_gap = (rows, cols), gap
    return best


def _expect_layouts(layouts: list[Layout], n: int, what: str) -> None:
    alike = sum(tuple(layout) == tuple(layouts[0]) for layout in layouts[:n])
    if alike != n:
        raise ConfigError(f"geometry: {what} makes {n} tiles, but the record has {alike} that fit; the image was changed before.")
