"""LLaVA-OneVision (arXiv 2408.03326): tiles like LLaVA-NeXT's, possibly shrunk; several images are base views; videos are pooled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from vlm_pruner_eval.vlms.family import FamilySpec, FeatureCall, Layout
from vlm_pruner_eval.vlms.parts.anyres import Anyres, anyres_layout

if TYPE_CHECKING:
    from torch import nn


class LlavaOnevision(Anyres):
    """``LlavaOnevisionForConditionalGeneration``; a video is one scope with a frame per frame and one closing newline token."""

    spec: ClassVar[FamilySpec] = FamilySpec(
        model_id="vlmpruner_llava_onevision",
        model_types=frozenset({"llava_onevision"}),
        stock_prompt="llava_hf",
        tiled=True,
        media=("image", "video"),
    )

    def layouts(self, core: nn.Module, kind: str, call: FeatureCall) -> list[Layout]:
        """Images by the model's own packing; videos as frames x ceil(side / 2)^2."""
        from vlm_pruner_eval.device_copy import to_host
        from vlm_pruner_eval.hf_compat import video_pixels

        if kind == "video":
            pixels = video_pixels(call)
            return [self.video_layout(core, pixels.shape[1])] * len(pixels)
        sizes, counts = to_host(*call["image_sizes"]), call.get("batch_num_images")
        alone = [True] * len(sizes) if counts is None else [bool(n == 1) for n in counts for _ in range(int(n))]
        ratio = call.get("vision_aspect_ratio") or getattr(core.config, "vision_aspect_ratio", "anyres_max_9")
        return [anyres_layout(core, size, tiled=tiled, vision_aspect_ratio=ratio) for size, tiled in zip(sizes, alone, strict=True)]

    def video_layout(self, core: nn.Module, n_frames: int) -> Layout:
        """Layout of a video: pooled frames, then one newline token."""
        import torch

        vision = core.config.vision_config
        side = math.ceil(vision.image_size // vision.patch_size / 2)
        frames = Layout.of_frames(side, side, n_frames)
        return Layout(torch.cat([frames.coords, torch.tensor([[-1, -1, -1]])]), frames.grid)
