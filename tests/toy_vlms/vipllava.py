"""ViP-LLaVA (arXiv 2312.00784): a family that this project does not have, in one file, as a user would add it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from vlm_pruner_eval.vlms.family import Family, FamilySpec, FeatureCall, Layout, PromptProtocol
from vlm_pruner_eval.vlms.parts.boxes import Medium, Picture, Shape, even_boxes, expect_tokens, whole_box

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, ProcessorMixin


class VipLlava(Family):
    """``VipLlavaForConditionalGeneration``: one square grid of the image, stretched."""

    spec: ClassVar[FamilySpec] = FamilySpec(model_id="vlmpruner_vipllava", model_types=frozenset({"vipllava"}), stock_prompt="llava_hf")

    def layouts(self, core: nn.Module, kind: str, call: FeatureCall) -> list[Layout]:
        """One grid per image."""
        vision = core.config.vision_config
        side = vision.image_size // vision.patch_size
        return [Layout.of_frames(side, side)] * len(call["pixel_values"])

    def geometry(self, config: PretrainedConfig, processor: ProcessorMixin, protocol: PromptProtocol) -> dict[str, Any]:
        """``patch`` in pixels."""
        return {"patch": config.vision_config.patch_size}

    def pictures(self, geometry: Mapping[str, Any], medium: Medium, layouts: Sequence[Shape]) -> tuple[int, list[Picture]]:
        """The image in equal parts."""
        _, rows, cols, _ = layouts[0]
        expect_tokens(layouts[0], rows * cols, "an image")
        return 1, [("", 0, whole_box(medium), even_boxes(medium, rows, cols))]
