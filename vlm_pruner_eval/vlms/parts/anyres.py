"""Tiled LLaVAs (NeXT, OneVision, Video): a base view, tiles in the shape that suits an image, pooled frames."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.vlms.family import Family, PromptProtocol
from vlm_pruner_eval.vlms.parts.boxes import (
    Fit,
    Medium,
    Picture,
    Shape,
    box_around,
    edges,
    expect_tokens,
    frame_of,
    grid_boxes,
    whole_box,
)
from vlm_pruner_eval.vlms.parts.clip import clip_tower
from vlm_pruner_eval.vlms.parts.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, ProcessorMixin

    from vlm_pruner_eval.vlms.parts.towers import Tower


class Anyres(Family):
    """Base of the tiled families: settings of their processors, and the place of their tokens on an image."""

    def tower(self, core: nn.Module) -> Tower | None:
        """That of LLaVA; states of SigLIP's, whose tokens may be pooled, are taken behind the projector."""
        return clip_tower(core, is_pooled=core.config.vision_config.model_type != "clip_vision_model")

    def geometry(self, config: PretrainedConfig, processor: ProcessorMixin, protocol: PromptProtocol) -> dict[str, Any]:
        """``tile``, ``patch`` and ``pinpoints`` (height, width) in pixels; ``max_tiles``, None if tiles are never shrunk."""
        ratio = getattr(config, "vision_aspect_ratio", None)  # "anyres_max_9"
        return {
            "tile": config.vision_config.image_size,
            "patch": config.vision_config.patch_size,
            "pinpoints": [list(shape) for shape in config.image_grid_pinpoints],
            "max_tiles": None if ratio is None else int(ratio.rpartition("_")[2]),
        }

    def pictures(self, geometry: Mapping[str, Any], medium: Medium, layouts: Sequence[Shape]) -> tuple[int, list[Picture]]:
        """A base view, then tiles with a newline token behind each row; or the base view alone, padded, with one newline."""
        if medium.is_video:
            return 1, _pooled_frames(geometry, medium, layouts[0])
        return 1, _views(geometry, medium, layouts[0])


def anyres_layout(core: nn.Module, size: Tensor, *, tiled: bool = True, **pack_arguments: object) -> Layout:
    """The layout of one image of `size` (height, width), from a coordinate tensor pushed through `pack_image_features`.

    Parameters
    ----------
    size : Tensor [2]
        On the CPU.
    tiled
        False: the base view alone, as OneVision encodes several images.
    pack_arguments
        Further arguments of the model's `pack_image_features`.

    Returns
    -------
    Layout
        Frame 0 = base view, frame 1 = tiles; newline tokens are (-1, -1, -1); grid = the unpadded tiles (or the base view).
    """
    import torch

    from vlm_pruner_eval.types import row_major

    vision = core.config.vision_config
    side = vision.image_size // vision.patch_size
    tiles = [row_major(side, side).float()]
    shape = None
    if tiled:
        shape_of = sys.modules[core.pack_image_features.__module__].get_anyres_image_grid_shape
        rows, cols = shape = shape_of(size, core.config.image_grid_pinpoints, vision.image_size)
        offsets = [torch.tensor([1.0, row * side, col * side]) for row in range(rows) for col in range(cols)]
        tiles += [row_major(side, side).float() + offset for offset in offsets]
    newline = torch.tensor([-1.0, -1.0, -1.0])
    packed, _ = core.pack_image_features([torch.stack(tiles)], size[None], image_newline=newline, **pack_arguments)
    coords = packed[0]
    finest = coords[coords[:, 0] == coords[:, 0].max()]
    spread = finest.amax(0) - finest.amin(0)
    return Layout(coords, (int(spread[1]) + 1, int(spread[2]) + 1), None if shape is None else (int(shape[0]), int(shape[1])))


def _views(geometry: Mapping[str, Any], medium: Medium, layout: Shape) -> list[Picture]:
    _, rows, cols, n_views = layout
    tile, patch = geometry["tile"], geometry["patch"]
    side = tile // patch
    square = edges(side, side=side, patch=patch, tile=tile)
    if n_views == 1:
        expect_tokens(layout, side * side + 1, "one of several images")
        boxes = grid_boxes(Fit.padded(medium, tile), square, square, side)
        return [("", 0, box_around(medium, boxes), boxes)]
    base = grid_boxes(Fit.stretched(medium, tile, tile), square, square, side)
    fit, (top, n_rows), (left, n_cols) = _tiled(geometry, medium)
    expected = _shrunk(geometry, n_rows, n_cols, side)
    if (rows, cols) != expected:
        expect_tokens(layout, side * side + expected[0] * (expected[1] + 1), f"an image of {medium.width} x {medium.height} pixels")
    expect_tokens(layout, side * side + rows * (cols + 1), "its grid")
    along = {"side": side, "patch": patch, "tile": tile}
    fine = grid_boxes(fit, edges(rows, **along, first=top, span=n_rows), edges(cols, **along, first=left, span=n_cols), cols + 1)
    tiles = {side * side + token: box for token, box in fine.items()}
    return [("base view", 0, whole_box(medium), base), ("tiles", 0, box_around(medium, tiles), tiles)]


def _tiled(geometry: Mapping[str, Any], medium: Medium) -> tuple[Fit, tuple[int, int], tuple[int, int]]:
    """Fit of the image on its tiles, and (first, number) of the rows and columns of patches that are not border.

    Paper: arXiv 2310.03744 (LLaVA-1.5-HD), as LLaVA-NeXT's and LLaVA-OneVision's processors do it.
    """
    tile = geometry["tile"]
    side = tile // geometry["patch"]
    height, width = best_pinpoint((medium.height, medium.width), geometry["pinpoints"])
    across, down = width / medium.width, height / medium.height
    size = (
        (width, min(math.ceil(medium.height * across), height)) if across < down else (min(math.ceil(medium.width * down), width), height)
    )
    fit = Fit((size[0] / medium.width, size[1] / medium.height), ((width - size[0]) // 2, (height - size[1]) // 2))
    rows, cols = height // tile * side, width // tile * side
    top = left = 0
    if medium.width / medium.height > cols / rows:
        top = (rows - int(round(medium.height * (cols / medium.width), 7))) // 2
    else:
        left = (cols - int(round(medium.width * (rows / medium.height), 7))) // 2
    return fit, (top, rows - 2 * top), (left, cols - 2 * left)


def best_pinpoint(size: tuple[int, int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The shape (height, width), in pixels, that keeps most of an image of `size` (height, width) and, of those, wastes least."""

    def merit(shape: Sequence[int]) -> tuple[int, int]:
        scale = min(shape[1] / size[1], shape[0] / size[0])
        used = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return used, used - shape[0] * shape[1]

    height, width = max(pinpoints, key=merit)
    return height, width


def _shrunk(geometry: Mapping[str, Any], rows: int, cols: int, side: int) -> tuple[int, int]:
    """(rows, cols) of tokens: LLaVA-OneVision shrinks more than `max_tiles` tiles' worth of patches to about that many.

    Paper: arXiv 2408.03326 (Higher AnyRes).
    """
    if geometry["max_tiles"] is None:
        return rows, cols
    ratio = math.sqrt(rows * cols / (geometry["max_tiles"] * side**2))
    return (int(rows // ratio), int(cols // ratio)) if ratio > 1.1 else (rows, cols)


def _pooled_frames(geometry: Mapping[str, Any], medium: Medium, layout: Shape) -> list[Picture]:
    """Frames that are stretched to a tile and pooled; one newline token behind the video, or one behind every row."""
    n_tokens, rows, cols, frames = layout
    tile, patch = geometry["tile"], geometry["patch"]
    stride = cols + 1 if n_tokens == frames * rows * (cols + 1) else cols
    expect_tokens(layout, frames * rows * stride + (stride == cols), f"a video of {frames} frames")
    if frames != medium.n_frames:
        raise ConfigError(f"geometry: the record has {frames} frames, but the video {medium.n_frames}.")
    side = tile // patch
    # pooled by averages, an odd last row and column of patches is in no token
    along = {"side": side, "patch": patch, "tile": tile, "span": min(side, 2 * rows)}
    boxes = grid_boxes(Fit.stretched(medium, tile, tile), edges(rows, **along), edges(cols, **along), stride)
    return [frame_of(medium, t, {t * rows * stride + i: box for i, box in boxes.items()}) for t in range(frames)]
