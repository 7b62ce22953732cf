"""LLaVA-1.5: one square grid for the whole image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_pruner_eval.report.geometry.boxes import Fit, Layout, Medium, Picture, box_around, edges, expect_tokens, grid_boxes


def llava(geometry: Mapping[str, Any], medium: Medium, layouts: list[Layout]) -> tuple[int, list[Picture]]:
    """One square grid of an image that is padded, resized, cropped, or all of it; a CLS token may stand before it."""
    n_tokens, rows, cols, _ = layouts[0]
    patch, size, crop = geometry["patch"], geometry["resize"], geometry["crop"]
    is_cls = n_tokens == rows * cols + 1
    expect_tokens(layouts[0], rows * cols + is_cls, "an image of LLaVA")
    width, height, border = medium.width, medium.height, (0, 0)
    if geometry["pad"]:
        width = height = max(medium.width, medium.height)
        border = (width - medium.width) // 2, (height - medium.height) // 2
    target = (width, height)
    if size is not None and "shortest_edge" in size:
        short = size["shortest_edge"]
        target = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    elif size is not None:
        target = size["width"], size["height"]
    cut = (0, 0) if crop is None else (int((target[0] - crop[1]) / 2), int((target[1] - crop[0]) / 2))
    scale = target[0] / width, target[1] / height
    fit = Fit(scale, (border[0] * scale[0] - cut[0], border[1] * scale[1] - cut[1]))
    along = {"patch": patch, "tile": 0, "side": max(rows, cols)}
    boxes = {i + is_cls: box for i, box in grid_boxes(fit, edges(rows, **along), edges(cols, **along), cols).items()}
    return 1, [("", 0, box_around(medium, boxes), boxes)]
