"""LLaVA-1.5 (arXiv 2310.03744): every image is one square grid of patches, row-major."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from vlm_pruner_eval.types import row_major
from vlm_pruner_eval.vlms.base import Family, FeatureCall, Layout


class Llava(Family):
    """``LlavaForConditionalGeneration`` with a vision tower of fixed size (CLIP, SigLIP)."""

    model_types: ClassVar[frozenset[str]] = frozenset({"llava"})

    def refuse(self, config: object) -> str | None:
        """Pixtral-style towers have images of any size, which need a layout of their own."""
        if getattr(config.vision_config, "model_type", None) == "pixtral":
            return "got a LLaVA with a Pixtral vision tower, whose images have no fixed grid; expected a CLIP or SigLIP tower."
        return None

    def layouts(self, core: nn.Module, kind: str, call: FeatureCall) -> list[Layout]:
        """One grid of (image_size / patch_size)^2 per image; a kept CLS token comes first and has no cell."""
        vision = core.config.vision_config
        side = vision.image_size // vision.patch_size
        coords = row_major(side, side)
        strategy = call.get("vision_feature_select_strategy") or core.config.vision_feature_select_strategy
        if strategy == "full" and vision.model_type == "clip_vision_model":
            coords = torch.cat([torch.tensor([[0, -1, -1]]), coords])
        return [Layout(coords, (side, side))] * len(call["pixel_values"])
