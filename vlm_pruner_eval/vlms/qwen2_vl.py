"""Qwen2-VL (arXiv 2409.12191): dynamic grids of merged patches under multi-dimensional rotary positions."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from vlm_pruner_eval.budget import parse_rate
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.types import Stage, row_major
from vlm_pruner_eval.vlms.base import Family, FeatureCall, Layout


class QwenVL(Family):
    """What all Qwen-VL families share: tokens of ``grid_thw`` after the spatial merge, frame by frame, row-major."""

    mrope: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("image", "video")

    def layouts(self, core: nn.Module, kind: str, call: FeatureCall) -> list[Layout]:
        """One grid per image, frames x grid per video."""
        merge = core.config.vision_config.spatial_merge_size
        grids = call.get(f"{kind}_grid_thw")
        if grids is None:  # Qwen3-VL encodes videos through get_image_features
            grids = call["image_grid_thw"]
        return [self._grid(t, h // merge, w // merge) for t, h, w in grids.tolist()]

    def _grid(self, frames: int, rows: int, cols: int) -> Layout:
        frame = row_major(rows, cols)
        return Layout(torch.cat([frame + torch.tensor([t, 0, 0]) for t in range(frames)]), (rows, cols))


class Qwen2VL(QwenVL):
    """Qwen2-VL, with what the release of VLM-Pruner does on it: int() count, the grid before the merge, first image only."""

    model_types: ClassVar[frozenset[str]] = frozenset({"qwen2_vl"})

    def keep(self, pruner: Pruner, stage: Stage, n_visual: int, scope: int) -> int:
        """``int(V (1 - rate))`` of the first image and all of the others under official_quirks."""
        if not pruner.official_quirks or stage.share == 0:
            return super().keep(pruner, stage, n_visual, scope)
        return n_visual if scope else int(n_visual * (1 - parse_rate(pruner.pruning_rate)))

    def release_layout(self, layout: Layout) -> Layout:
        """Positions on the grid of patches before the 2 x 2 merge, twice as wide and high as the tokens' own."""
        rows, cols = layout.grid[0] * 2, layout.grid[1] * 2
        cell = torch.arange(layout.n_tokens)
        return Layout(torch.stack([torch.zeros_like(cell), cell // cols, cell % cols], -1), (rows, cols))
