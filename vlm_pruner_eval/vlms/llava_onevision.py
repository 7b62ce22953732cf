"""LLaVA-OneVision (arXiv 2408.03326): tiles like LLaVA-NeXT's, possibly shrunk; several images are base views; videos are pooled."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn

from vlm_pruner_eval.device_copy import to_host
from vlm_pruner_eval.hf_compat import video_pixels
from vlm_pruner_eval.types import row_major
from vlm_pruner_eval.vlms.base import Family, FeatureCall, Layout
from vlm_pruner_eval.vlms.llava_next import anyres_layout


class LlavaOnevision(Family):
    """``LlavaOnevisionForConditionalGeneration``; a video is one scope with a frame per frame and one closing newline token."""

    model_types: ClassVar[frozenset[str]] = frozenset({"llava_onevision"})
    kinds: ClassVar[tuple[str, ...]] = ("image", "video")

    def layouts(self, core: nn.Module, kind: str, call: FeatureCall) -> list[Layout]:
        """Images by the model's own packing; videos as frames x ceil(side / 2)^2."""
        if kind == "video":
            return self._videos(core, call)
        sizes, counts = to_host(*call["image_sizes"]), call.get("batch_num_images")
        alone = [True] * len(sizes) if counts is None else [bool(n == 1) for n in counts for _ in range(int(n))]
        ratio = call.get("vision_aspect_ratio") or getattr(core.config, "vision_aspect_ratio", "anyres_max_9")
        return [anyres_layout(core, size, tiled=tiled, vision_aspect_ratio=ratio) for size, tiled in zip(sizes, alone, strict=True)]

    def _videos(self, core: nn.Module, call: FeatureCall) -> list[Layout]:
        vision = core.config.vision_config
        side = math.ceil(vision.image_size // vision.patch_size / 2)
        pixels = video_pixels(call)
        frame = row_major(side, side)
        frames = [frame + torch.tensor([t, 0, 0]) for t in range(pixels.shape[1])]
        return [Layout(torch.cat([*frames, torch.tensor([[-1, -1, -1]])]), (side, side))] * len(pixels)
