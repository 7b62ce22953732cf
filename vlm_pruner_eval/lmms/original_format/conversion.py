"""Checkpoints in the format that LLaVA's authors publish, LLaVA-1.5 and LLaVA-Video, read into transformers' own classes.

Their config.json describes the language model and names a vision tower, which lies elsewhere; their tokenizers know no token
for an image (it is index -200 there); their tensors have names of their own. Whatever a checkpoint of these families can say
that the classes here would not do is refused in a sentence.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2Config,
)

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.lmms.original_format import original_processor
from vlm_pruner_eval.lmms.original_format.llava_video_model import POOL_MODES, LlavaVideoConfig, LlavaVideoForConditionalGeneration
from vlm_pruner_eval.lmms.original_format.original_weights import Source, fill, first_line

MODEL_TYPES = {"LlavaLlamaForCausalLM": "llava", "LlavaQwenForCausalLM": "llava_video"}
TOWERS = {"llava": "clip_vision_model", "llava_video": "siglip_vision_model"}
TEXT_KEYS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "vocab_size", "tie_word_embeddings"),
    *("attention_bias", "attention_dropout", "mlp_bias", "use_sliding_window", "sliding_window", "max_window_layers"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
# what config.json may say, and what it means when it says nothing
EXPECTED: dict[str, dict[str, tuple[object, tuple]]] = {
    "llava": {
        "mm_patch_merge_type": ("flat", ("flat",)),
        "image_aspect_ratio": ("square", ("square", "pad")),
    },
    "llava_video": {
        "mm_patch_merge_type": ("flat", ("spatial_unpad",)),
        "mm_newline_position": ("one_token", ("grid",)),
        "mm_spatial_pool_mode": (None, POOL_MODES),
        "mm_spatial_pool_stride": (2, (2,)),
        "add_faster_video": (False, (False,)),
    },
}
EXPECTED_ALWAYS: dict[str, tuple[object, tuple]] = {
    "mm_projector_type": ("linear", ("mlp2x_gelu",)),
    "mm_vision_select_feature": ("patch", ("patch",)),
    "mm_use_im_start_end": (False, (False,)),
    "mm_use_im_patch_token": (False, (False,)),
    "mm_resampler_type": (None, (None,)),
    "s2": (False, (False,)),
    "quantization_config": (None, (None,)),
}


def is_original(raw: Mapping) -> bool:
    """Tell if the content of a config.json is of the original format; its ``model_type`` may well read "llava", as Hugging Face's does."""
    return "mm_vision_tower" in raw or any(name in MODEL_TYPES for name in raw.get("architectures") or ())


def model_type_of(raw: Mapping) -> str:
    """The model type that a checkpoint of the original format becomes.

    Raises
    ------
    ConfigError
        Another architecture, or a variant whose images or videos turn into tokens in another way.
    """
    names = raw.get("architectures") or ["(none)"]
    if names[0] not in MODEL_TYPES:
        raise ConfigError(
            f"pretrained: config.json is in LLaVA's original format with architecture {names[0]}, expected {' or '.join(MODEL_TYPES)}; "
            "use a checkpoint in Hugging Face layout for other models."
        )
    model_type = MODEL_TYPES[names[0]]
    problems = []
    for name, (default, known) in (EXPECTED_ALWAYS | EXPECTED[model_type]).items():
        value = raw.get(name, default)
        if value not in known and not (value is None and default in known):
            problems.append(f"pretrained: {name}: got {value!r} in config.json, expected {' or '.join(map(repr, known))} of {names[0]}.")
    ratio = raw.get("image_aspect_ratio")
    if model_type == "llava_video" and not re.fullmatch(r"anyres_max_\d+", str(ratio)):
        problems.append(f"pretrained: image_aspect_ratio: got {ratio!r} in config.json, expected anyres_max_9 or alike of {names[0]}.")
    if problems:
        raise ConfigError([*problems, "Other variants can't be read; a checkpoint in Hugging Face layout may exist under llava-hf/."])
    return model_type


def load_original(
    raw: Mapping, weights: Source, *, dtype: str, attention: str, device: torch.device
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Read configuration, tokenizer and weights of a checkpoint in the original format.

    Parameters
    ----------
    raw
        The content of config.json.
    weights
        Where the checkpoint lies.
    dtype
        "auto" is the one that config.json names.

    Raises
    ------
    ConfigError
        A variant, tower or projector that can't be read; tensors that do not fill the model exactly.
    """
    model_type = model_type_of(raw)
    tower, tower_config = find_tower(raw, weights)
    text = text_config(raw, model_type)
    tokenizer = original_processor.load_tokenizer(weights, text, model_type)
    config = convert_config(raw, model_type, tower_config, text, tokenizer)
    config._commit_hash = raw.get("_commit_hash")  # of a hub id; part of a run's record
    processor = original_processor.build(config, tokenizer, tower)
    model_class = LlavaForConditionalGeneration if model_type == "llava" else LlavaVideoForConditionalGeneration
    with init_empty_weights(include_buffers=False):  # parameters take no memory until a shard brings them
        model = model_class._from_config(config, dtype=_dtype(raw, dtype), attn_implementation=attention)
    fill(model, weights, tower, n_words=raw["vocab_size"], device=device)
    if weights.file("generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(weights.place, revision=weights.revision)
    else:
        model.generation_config = GenerationConfig(**{name: raw[name] for name in ("bos_token_id", "eos_token_id") if name in raw})
    return model, processor


def _dtype(raw: Mapping, asked: str) -> torch.dtype:
    name = raw.get("dtype", raw.get("torch_dtype")) if asked == "auto" else asked
    if not isinstance(getattr(torch, str(name), None), torch.dtype):
        raise ConfigError(f"dtype: auto takes it from config.json, which says {name!r} there; name one, e.g. dtype=float16.")
    return getattr(torch, name)


def find_tower(raw: Mapping, weights: Source) -> tuple[str, PretrainedConfig]:
    """Return the folder or hub id of ``mm_vision_tower``, and the configuration of the vision tower there.

    Raises
    ------
    ConfigError
        Nothing there, or a tower of another kind than the architecture goes with.
    """
    name = str(raw.get("mm_vision_tower"))
    path = Path(name).expanduser()
    advice = "Set mm_vision_tower in the checkpoint's config.json to a folder with the tower, or fetch that hub id once."
    if not path.is_dir() and (name.startswith((".", "~", os.sep)) or name.count("/") != 1):
        raise ConfigError(f"mm_vision_tower: there is nothing at {name}, which the checkpoint {weights.label} names. {advice}")
    source = str(path) if path.is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"mm_vision_tower: the configuration of {name} can't be read ({first_line(error)}). {advice}") from error
    config, wanted = getattr(config, "vision_config", config), TOWERS[model_type_of(raw)]
    if config.model_type != wanted:
        raise ConfigError(f"mm_vision_tower: {name} is a {config.model_type!r}, expected a {wanted} for {raw['architectures'][0]}.")
    return source, config


def text_config(raw: Mapping, model_type: str) -> PretrainedConfig:
    """The language model's configuration, whose keys stand at the top of config.json; a nested ``text_config`` there means nothing."""
    known = {name: raw[name] for name in TEXT_KEYS if raw.get(name) is not None}
    missing = [name for name in ("hidden_size", "num_hidden_layers", "vocab_size") if name not in known]
    if missing:
        raise ConfigError(f"pretrained: config.json lacks {', '.join(missing)}, expected the sizes of the language model.")
    return (LlamaConfig if model_type == "llava" else Qwen2Config)(**known)


def convert_config(
    raw: Mapping, model_type: str, tower: PretrainedConfig, text: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PretrainedConfig:
    """Configuration of the Hugging Face classes.

    The original drops SigLIP's last layer and takes what the layer before gives, without the final norm; of CLIP it takes the
    layer that ``mm_vision_select_layer`` says, without the class token.
    """
    vision = tower.to_dict()
    text.vocab_size = max(text.vocab_size, len(tokenizer))
    common = {
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids(original_processor.IMAGE),
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    if model_type == "llava":
        side = tower.image_size // tower.patch_size
        select = {"vision_feature_layer": raw.get("mm_vision_select_layer", -2), "vision_feature_select_strategy": "default"}
        return LlavaConfig(vision_config=vision, image_seq_length=side * side, **select, **common)
    vision |= {"num_hidden_layers": tower.num_hidden_layers - 1, "vision_use_head": False}
    return LlavaVideoConfig(
        vision_config=vision,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        video_token_index=tokenizer.convert_tokens_to_ids(original_processor.VIDEO),
        image_grid_pinpoints=pinpoints(raw.get("image_grid_pinpoints"), tower.image_size),
        vision_aspect_ratio=raw["image_aspect_ratio"],
        mm_spatial_pool_mode=raw["mm_spatial_pool_mode"],
        **common,
    )


def pinpoints(written: object, tile: int) -> list[list[int]]:
    """Sizes (height, width) in pixels that an image may be tiled to; the original writes them as (width, height).

    Parameters
    ----------
    written
        A list of pixel sizes, such a list as text, or "(1x1),...,(6x6)", a range in tiles.
    tile
        Pixels along a side of the vision tower's input.

    Raises
    ------
    ConfigError
        Anything else.
    """
    found = written
    if isinstance(written, str) and (pairs := [tuple(map(int, pair)) for pair in re.findall(r"\((\d+)x(\d+)\)", written)]):
        (left, low), (right, high) = pairs[0], pairs[-1]
        found = [[i * tile, j * tile] for i in range(left, right + 1) for j in range(low, high + 1)]
    elif isinstance(written, str):
        try:
            found = ast.literal_eval(written)
        except (ValueError, SyntaxError):
            found = None
    is_pairs = isinstance(found, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair) for pair in found
    )
    if not found or not is_pairs:
        raise ConfigError(
            f"pretrained: image_grid_pinpoints: got {written!r} in config.json, expected pairs of pixels, or a range like (1x1),...,(6x6)."
        )
    return [[height, width] for width, height in found]
