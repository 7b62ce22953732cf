"""A pytest plugin that adds one family to the project: its file in toy_vlms/, and this entry for tiny_models.py."""

from __future__ import annotations

from pathlib import Path

import tiny_models
import transformers
from tiny_models import CLIP, IMAGE_IDS, TEXT, TinyFamily
from tiny_processors import llava_processor

from vlm_pruner_eval import vlms

vlms.__path__.append(str(Path(__file__).parent / "toy_vlms"))


def _config() -> object:
    text = dict(TEXT, model_type="llama")
    layers = [-2, -2, -2, -2, 1]
    return transformers.VipLlavaConfig(vision_config=dict(CLIP), text_config=text, vision_feature_layers=layers, **IMAGE_IDS)


tiny_models.FAMILIES["vipllava"] = TinyFamily(
    "VipLlavaForConditionalGeneration", _config, lambda kind, k: [16], tiny_models.llava_features, llava_processor, "</s>"
)
