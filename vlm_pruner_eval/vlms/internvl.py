"""InternVL (HF format, arXiv 2504.10479): tiles of one size, pixel-shuffled; how tiles make up an image is not among the inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.vlms.family import Family, FamilySpec, FeatureCall, Layout, PromptProtocol
from vlm_pruner_eval.vlms.parts.boxes import Medium, Picture, Shape, even_boxes, expect_tokens, frame_of, whole_box

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, ProcessorMixin

    from vlm_pruner_eval.vlms.parts.towers import Tower

MEANS = "several patches make one token: means over the values"


class InternVL(Family):
    """``InternVLForConditionalGeneration``: every tile, and every frame of a video, is a budget scope of its own."""

    spec: ClassVar[FamilySpec] = FamilySpec(
        model_id="vlmpruner_internvl",
        model_types=frozenset({"internvl"}),
        stock_prompt="internvl_hf",
        media=("image", "video"),
    )
    kinds = ("image",)  # frames of a video are encoded and written as tiles

    def layouts(self, core: nn.Module, kind: str, call: FeatureCall) -> list[Layout]:
        """One grid of (image_size / patch_size * downsample_ratio)^2 per tile."""
        vision = core.config.vision_config
        side = int(vision.image_size[0] // vision.patch_size[0] * core.config.downsample_ratio)
        return [Layout.of_frames(side, side)] * len(call["pixel_values"])

    def tower(self, core: nn.Module) -> Tower | None:
        """InternViT, 2 x 2 of whose patches make one token; states are taken behind the projector."""
        from vlm_pruner_eval import hf_compat
        from vlm_pruner_eval.vlms.parts.towers import GridTower

        vision = core.config.vision_config
        side = vision.image_size[0] // vision.patch_size[0]
        return GridTower(hf_compat.tower_blocks(core), adapted=f"{MEANS} of patches stand in for those of a patch", side=side)

    def geometry(self, config: PretrainedConfig, processor: ProcessorMixin, protocol: PromptProtocol) -> dict[str, Any]:
        """``tile`` in pixels, ``min_tiles`` and ``max_tiles``."""
        images = processor.image_processor
        return {"tile": config.vision_config.image_size[0], "min_tiles": images.min_patches, "max_tiles": images.max_patches}

    def pictures(self, geometry: Mapping[str, Any], medium: Medium, layouts: Sequence[Shape]) -> tuple[int, list[Picture]]:
        """Tiles of a stretched image in row-major order, then a thumbnail if there are several; every tile is a layout of its own."""
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


def _expect_layouts(layouts: Sequence[Shape], n: int, what: str) -> None:
    alike = sum(tuple(layout) == tuple(layouts[0]) for layout in layouts[:n])
    if alike != n:
        raise ConfigError(f"geometry: {what} makes {n} tiles, but the record has {alike} that fit; the image was changed before.")
