"""Qwen2-VL (arXiv 2409.12191): dynamic grids of merged patches under multi-dimensional rotary positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from vlm_pruner_eval.budget import parse_rate
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.vlms.family import HF, Family, FamilySpec, FeatureCall, Layout, PromptProtocol
from vlm_pruner_eval.vlms.parts.boxes import Medium, Picture, Shape, even_boxes, expect_tokens, frame_of, whole_box

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, ProcessorMixin

    from vlm_pruner_eval.pruners.base import Pruner
    from vlm_pruner_eval.types import Stage
    from vlm_pruner_eval.vlms.parts.towers import Tower

WITHOUT_CLS = "no CLS token, and several patches make one token: means over the attention that they receive stand in"

PIXELS = 1003520  # 1280 merged tokens of 28 x 28 pixels, whatever the size of an image; the checkpoint's own template


class QwenVL(Family):
    """Base of all Qwen-VL families: tokens of ``grid_thw`` after the spatial merge, frame by frame, row-major."""

    def layouts(self, core: nn.Module, kind: str, call: FeatureCall) -> list[Layout]:
        """One grid per image, frames x grid per video."""
        merge = core.config.vision_config.spatial_merge_size
        grids = call.get(f"{kind}_grid_thw")
        if grids is None:  # Qwen3-VL encodes videos through get_image_features
            grids = call["image_grid_thw"]
        return [Layout.of_frames(h // merge, w // merge, t) for t, h, w in grids.tolist()]

    def tower(self, core: nn.Module) -> Tower | None:
        """A tower without a CLS token, 2 x 2 of whose patches make one token; states are taken behind the merger."""
        from vlm_pruner_eval.vlms.parts.towers import SequenceTower

        vision = core.config.vision_config
        size = getattr(vision, "window_size", None)
        window = None if size is None else size // vision.patch_size // vision.spatial_merge_size
        return SequenceTower(core.visual.blocks, adapted=WITHOUT_CLS, merge=vision.spatial_merge_size, window=window)

    def geometry(self, config: PretrainedConfig, processor: ProcessorMixin, protocol: PromptProtocol) -> dict[str, Any]:
        """``temporal_patch``: frames of a video in one token."""
        return {"temporal_patch": config.vision_config.temporal_patch_size}

    def pictures(self, geometry: Mapping[str, Any], medium: Medium, layouts: Sequence[Shape]) -> tuple[int, list[Picture]]:
        """The image stretched to whole tokens; a token of a video holds several frames."""
        _, rows, cols, frames = layouts[0]
        expect_tokens(layouts[0], frames * rows * cols, "its grid")
        boxes = even_boxes(medium, rows, cols)
        if not medium.is_video:
            expect_tokens(layouts[0], rows * cols, "an image")
            return 1, [("", 0, whole_box(medium), boxes)]
        step = geometry["temporal_patch"]
        if frames != math.ceil(medium.n_frames / step):
            raise ConfigError(f"geometry: the record has {frames} x {step} frames, but the video {medium.n_frames}.")
        moved = [{t * rows * cols + i: box for i, box in boxes.items()} for t in range(frames)]
        return 1, [frame_of(medium, t * step, of_frame) for t, of_frame in enumerate(moved)]


class Qwen2VL(QwenVL):
    """Qwen2-VL, with what the release of VLM-Pruner does on it: int() count, the grid before the merge, first image only."""

    spec: ClassVar[FamilySpec] = FamilySpec(
        model_id="vlmpruner_qwen2_vl",
        model_types=frozenset({"qwen2_vl"}),
        stock_prompt="qwen2_vl",
        media=("image", "video"),
        bounds_pixels=True,
        new_tokens=128,
        stops_at_blank_line=True,
        protocols={"hf": HF, "paper": PromptProtocol(fixes={"min_pixels": PIXELS, "max_pixels": PIXELS})},
        mrope=True,
    )

    def keep(self, pruner: Pruner, stage: Stage, n_visual: int, scope: int) -> int:
        """``int(V (1 - rate))`` of the first image and all of the others under official_quirks."""
        if not pruner.official_quirks or stage.share == 0:
            return super().keep(pruner, stage, n_visual, scope)
        return n_visual if scope else int(n_visual * (1 - parse_rate(pruner.pruning_rate)))

    def release_layout(self, layout: Layout) -> Layout:
        """Positions on the grid of patches before the 2 x 2 merge, twice as wide and high as the tokens' own."""
        import torch

        rows, cols = layout.grid[0] * 2, layout.grid[1] * 2
        cell = torch.arange(layout.n_tokens)
        return Layout(torch.stack([torch.zeros_like(cell), cell // cols, cell % cols], -1), (rows, cols))
