"""InternVL (HF format, arXiv 2504.10479): tiles of one size, pixel-shuffled; how tiles make up an image is not among the inputs."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from vlm_pruner_eval.types import row_major
from vlm_pruner_eval.vlms.base import Family, FeatureCall, Layout


class InternVL(Family):
    """``InternVLForConditionalGeneration``: every tile is a budget scope of its own."""

    model_types: ClassVar[frozenset[str]] = frozenset({"internvl"})

    def layouts(self, core: nn.Module, kind: str, call: FeatureCall) -> list[Layout]:
        """One grid of (image_size / patch_size * downsample_ratio)^2 per tile."""
        vision = core.config.vision_config
        side = int(vision.image_size[0] // vision.patch_size[0] * core.config.downsample_ratio)
        return [Layout(row_major(side, side), (side, side))] * len(call["pixel_values"])
