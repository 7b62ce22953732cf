"""Calls of the vision tower inside a pruning context: layouts of what it encodes, and what methods look at."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

from torch import nn

from vlm_pruner_eval import hf_compat
from vlm_pruner_eval.vision_probe import VisionProbe
from vlm_pruner_eval.vlms.family import Family, Layout

REPEATED = "_vlm_pruner_eval_repeated"  # while prompts are read several times, see `prefix`: how often, and the call of the vision tower


class Encoding:
    """Images and videos of the present batch.

    Parameters
    ----------
    check
        Called before each call of the tower; raises if the forward is not to go on.

    Attributes
    ----------
    layouts
        By kind, of every image or video, in order.
    pixels
        By kind, as the tower was given them, where this version of transformers repeats images wrongly.
    """

    def __init__(self, family: Family, core: nn.Module, vision: VisionProbe | None, *, check: Callable[[], None]):
        self._family, self._core, self._vision, self._check = family, core, vision, check
        self._is_running = False
        self.layouts: dict[str, list[Layout]] = {}
        self.pixels: dict[str, object] = {}

    def run(self, kind: str, original: Callable, *args: object, **kwargs: object) -> object:
        """Encode as the model does, and note what was encoded."""
        self._check()
        if self._is_running:  # Qwen3-VL's get_video_features calls get_image_features, which has seen the images already
            return original(*args, **kwargs)
        # what is encoded
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        call: Mapping = bound | bound.get("kwargs", {})
        repeats, once = self._core.__dict__.get(REPEATED, (1, lambda kind, call: call))
        layouts = self._family.layouts(self._core, kind, once(kind, call))
        self.layouts[kind] = layouts * repeats
        if hf_compat.REPEATS_IMAGES_SINGLY:
            self.pixels[kind] = call.get(f"pixel_values_{kind}s", call.get("pixel_values"))
        # the tower
        if self._vision is not None:
            self._vision.begin(layouts)
        self._is_running = True
        try:
            features = original(*args, **kwargs)
        finally:
            self._is_running = False
        if self._vision is not None:
            self._vision.end(kind, layouts)
        return features

    def forget(self) -> None:
        """Let go of what belongs to a prompt that has been read."""
        self.layouts.clear()
        if self._vision is not None:
            self._vision.forget()
