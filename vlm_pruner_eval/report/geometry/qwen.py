"""Qwen2-VL and its successors: the image stretched to whole tokens, and tokens that hold several frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.geometry.boxes import Layout, Medium, Picture, even_boxes, expect_tokens, frame_of, whole_box


def qwen(geometry: Mapping[str, Any], medium: Medium, layouts: list[Layout]) -> tuple[int, list[Picture]]:
    """The image is stretched to whole tokens; a token of a video holds several frames."""
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
