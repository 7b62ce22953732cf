"""LLaVA-NeXT (LLaVA-1.6): a base view, then a grid of tiles with one newline token per row; both are views of one image."""

from __future__ import annotations

import sys
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlm_pruner_eval.device_copy import to_host
from vlm_pruner_eval.types import row_major
from vlm_pruner_eval.vlms.base import Family, FeatureCall, Layout

RELEASE_STRIP = 24  # columns that the release of VLM-Pruner takes for granted


class LlavaNext(Family):
    """``LlavaNextForConditionalGeneration``: frame 0 is the base view, frame 1 the unpadded grid of tiles."""

    model_types: ClassVar[frozenset[str]] = frozenset({"llava_next"})

    def layouts(self, core: nn.Module, kind: str, call: FeatureCall) -> list[Layout]:
        """Coordinates packed by the model's own function, so that they can't drift from the features."""
        strategy = call.get("vision_feature_select_strategy") or core.config.vision_feature_select_strategy
        return [anyres_layout(core, size, vision_feature_select_strategy=strategy) for size in to_host(*call["image_sizes"])]

    def release_layout(self, layout: Layout) -> Layout:
        """Every tile and newline token on one strip of 24 columns, as the release has it."""
        cell = torch.arange(layout.n_tokens)
        strip = torch.stack([torch.zeros_like(cell), cell // RELEASE_STRIP, cell % RELEASE_STRIP], -1)
        return Layout(strip, (RELEASE_STRIP, RELEASE_STRIP))


def anyres_layout(core: nn.Module, size: Tensor, *, tiled: bool = True, **pack_arguments: object) -> Layout:
    """The layout of one image of `size` (height, width), from a coordinate tensor pushed through `pack_image_features`.

    Parameters
    ----------
    size : Tensor [2]
        In the memory of the host.
    tiled
        False: the base view alone, as OneVision encodes several images.
    pack_arguments
        Further arguments of the model's `pack_image_features`.

    Returns
    -------
    Layout
        Frame 0 = base view, frame 1 = tiles; newline tokens are (-1, -1, -1); grid = the unpadded tiles (or the base view).
    """
    vision = core.config.vision_config
    side = vision.image_size // vision.patch_size
    tiles = [row_major(side, side).float()]
    if tiled:
        shape_of = sys.modules[core.pack_image_features.__module__].get_anyres_image_grid_shape
        rows, cols = shape_of(size, core.config.image_grid_pinpoints, vision.image_size)
        offsets = [torch.tensor([1.0, row * side, col * side]) for row in range(rows) for col in range(cols)]
        tiles += [row_major(side, side).float() + offset for offset in offsets]
    newline = torch.tensor([-1.0, -1.0, -1.0])
    packed, _ = core.pack_image_features([torch.stack(tiles)], size[None], image_newline=newline, **pack_arguments)
    coords = packed[0]
    finest = coords[coords[:, 0] == coords[:, 0].max()]
    spread = finest.amax(0) - finest.amin(0)
    return Layout(coords, (int(spread[1]) + 1, int(spread[2]) + 1))
