"""Qwen2.5-VL (arXiv 2502.13923): the grids of Qwen2-VL."""

from __future__ import annotations

from typing import ClassVar

from vlm_pruner_eval.vlms.family import FamilySpec
from vlm_pruner_eval.vlms.qwen2_vl import QwenVL


class Qwen25VL(QwenVL):
    """``Qwen2_5_VLForConditionalGeneration``; window attention is in its vision tower only."""

    spec: ClassVar[FamilySpec] = FamilySpec(
        model_id="vlmpruner_qwen2_5_vl",
        model_types=frozenset({"qwen2_5_vl"}),
        stock_prompt="qwen2_5_vl",
        media=("image", "video"),
        bounds_pixels=True,
        new_tokens=128,
        mrope=True,
    )
