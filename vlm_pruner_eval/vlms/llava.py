"""LLaVA-1.5 (arXiv 2310.03744): every image is one square grid of patches, row-major."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from vlm_pruner_eval.vlms.family import HF, Family, FamilySpec, FeatureCall, Layout, PromptProtocol
from vlm_pruner_eval.vlms.parts import vicuna
from vlm_pruner_eval.vlms.parts.boxes import Fit, Medium, Picture, Shape, box_around, edges, expect_tokens, grid_boxes
from vlm_pruner_eval.vlms.parts.clip import clip_tower

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, ProcessorMixin

    from vlm_pruner_eval.vlms.parts.towers import Tower

# image_aspect_ratio: pad
PAPER = PromptProtocol(render=vicuna.render, view=vicuna.padded, prepare=vicuna.check_split, new_tokens=vicuna.NEW_TOKENS)


class Llava(Family):
    """``LlavaForConditionalGeneration`` with a vision tower of fixed size (CLIP, SigLIP), and MiniVLM."""

    spec: ClassVar[FamilySpec] = FamilySpec(
        model_id="vlmpruner_llava",
        model_types=frozenset({"llava"}),
        stock_prompt="llava_hf",
        protocols={"hf": HF, "paper": PAPER},
    )

    def refuse(self, config: PretrainedConfig) -> str | None:
        """Pixtral-style towers have images of any size, which need a layout of their own."""
        if getattr(config.vision_config, "model_type", None) == "pixtral":
            return "got a LLaVA with a Pixtral vision tower, whose images have no fixed grid; expected a CLIP or SigLIP tower."
        return None

    def layouts(self, core: nn.Module, kind: str, call: FeatureCall) -> list[Layout]:
        """One grid of (image_size / patch_size)^2 per image; a kept CLS token comes first and has no cell."""
        import torch

        vision = core.config.vision_config
        side = vision.image_size // vision.patch_size
        layout = Layout.of_frames(side, side)
        strategy = call.get("vision_feature_select_strategy") or core.config.vision_feature_select_strategy
        if strategy == "full" and vision.model_type == "clip_vision_model":
            layout = Layout(torch.cat([torch.tensor([[0, -1, -1]]), layout.coords]), layout.grid)
        return [layout] * len(call["pixel_values"])

    def tower(self, core: nn.Module) -> Tower | None:
        """CLIP as published; SigLIP has no CLS token. None if several layers are read at a time."""
        return clip_tower(core)

    def geometry(self, config: PretrainedConfig, processor: ProcessorMixin, protocol: PromptProtocol) -> dict[str, Any]:
        """``patch``, ``resize``, ``crop`` (height, width) in pixels, None if that is not done; ``pad``, True if made square before."""
        images = processor.image_processor
        return {
            "patch": config.vision_config.patch_size,
            "resize": _size(images, "size") if images.do_resize else None,
            "crop": list(_size(images, "crop_size").values()) if getattr(images, "do_center_crop", False) else None,
            "pad": protocol.view is vicuna.padded or bool(getattr(images, "do_pad", False)),
        }

    def pictures(self, geometry: Mapping[str, Any], medium: Medium, layouts: Sequence[Shape]) -> tuple[int, list[Picture]]:
        """One square grid of an image that is padded, resized, cropped, or all of it; a CLS token may stand before it."""
        n_tokens, rows, cols, _ = layouts[0]
        patch, size, crop = geometry["patch"], geometry["resize"], geometry["crop"]
        is_cls = n_tokens == rows * cols + 1
        expect_tokens(layouts[0], rows * cols + is_cls, "an image of LLaVA")
        # padded to a square
        width, height, border = medium.width, medium.height, (0, 0)
        if geometry["pad"]:
            width = height = max(medium.width, medium.height)
            border = (width - medium.width) // 2, (height - medium.height) // 2
        # resized, then cropped
        target = (width, height)
        if size is not None and "shortest_edge" in size:
            short = size["shortest_edge"]
            target = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        elif size is not None:
            target = size["width"], size["height"]
        cut = (0, 0) if crop is None else (int((target[0] - crop[1]) / 2), int((target[1] - crop[0]) / 2))
        # one rectangle a patch
        scale = target[0] / width, target[1] / height
        fit = Fit(scale, (border[0] * scale[0] - cut[0], border[1] * scale[1] - cut[1]))
        along = {"patch": patch, "tile": 0, "side": max(rows, cols)}
        boxes = {i + is_cls: box for i, box in grid_boxes(fit, edges(rows, **along), edges(cols, **along), cols).items()}
        return 1, [("", 0, box_around(medium, boxes), boxes)]


def _size(images: object, name: str) -> dict[str, int]:
    """A size of an image processor; transformers has it as a mapping or as an object of its own."""
    found = dict(getattr(images, name))
    return {key: int(found[key]) for key in ("height", "width", "shortest_edge") if found.get(key) is not None}
