"""Names that differ between versions of transformers, found by looking at signatures and fields, never at version numbers.

No other file knows them. What can't be found is a sentence that names the tested versions, not a guess.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlavaOnevisionProcessor, __version__, modeling_rope_utils
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen2_5_vl import processing_qwen2_5_vl

from vlm_pruner_eval.errors import ConfigError, PruningError
from vlm_pruner_eval.versions import tested_range

# Newest first: the older names are warned about where the newer one exists.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value")

# True where generate() repeats images one by one under beams and returned sequences (a, a, b, b), so that rows with several images
# (a, b), (a, b) get each other's; families that repeat their images themselves are right everywhere.
REPEATS_IMAGES_SINGLY = not hasattr(GenerationMixin, "_expand_multimodal_outputs")

# True where Qwen2.5-VL's processor is told the frames per second of a video, and does not read them in its metadata.
TAKES_FRAME_RATES = hasattr(processing_qwen2_5_vl, "Qwen2_5_VLVideosProcessorKwargs")

# True where configurations hold rope_parameters, and not rope_scaling and rope_theta.
HAS_ROPE_PARAMETERS = hasattr(modeling_rope_utils, "RopeParameters")

# True where LLaVA-OneVision's processor asks a method for the placeholders of each video.
HAS_VIDEO_PLACEHOLDERS = hasattr(LlavaOnevisionProcessor, "replace_video_token")


class MaskedCache(Protocol):
    """Part of a cache that `create_causal_mask` asks about."""

    length: int


def unknown(where: str | int, found: object) -> PruningError:
    """Return the error for a model that calls its parts in a way that no tested version does.

    Parameters
    ----------
    where
        The part, or the number of a decoder layer.
    """
    part = f"decoder layer {where}" if isinstance(where, int) else where
    return PruningError(
        f"prune: {part}: got {found}, which no tested version does; transformers {__version__} is installed, tested are "
        f"{tested_range('transformers')}. Install a tested version."
    )


def decoder(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the model inside the head, and its language model with `layers`, `norm` and `rotary_emb`.

    Raises
    ------
    ConfigError
        The model is not put together like that.
    """
    core = getattr(model, "model", model)
    text = getattr(core, "language_model", None)
    missing = [name for name in ("layers", "norm", "rotary_emb") if not hasattr(text, name)]
    if missing:
        raise ConfigError(
            f"model: got {type(model).__name__} whose language model has no {', '.join(missing)}, expected a Hugging Face VLM as "
            f"transformers {tested_range('transformers')} builds it (installed: {__version__})."
        )
    return core, text


def tower_blocks(core: nn.Module) -> nn.ModuleList:
    """Return the layers of a CLIP, SigLIP or InternVL vision tower.

    Raises
    ------
    ConfigError
        The tower is not put together like those.
    """
    tower = getattr(core, "vision_tower", None)
    encoder = getattr(getattr(tower, "vision_model", tower), "encoder", None)
    blocks = getattr(encoder, "layers", None) or getattr(encoder, "layer", None)
    if blocks is None:
        raise ConfigError(
            f"model: got a vision tower {type(tower).__name__} without a list of layers, expected one as transformers "
            f"{tested_range('transformers')} builds it (installed: {__version__})."
        )
    return blocks


def repeated_singly(pixels: Tensor, per_row: Sequence[int], input_ids: Tensor) -> bool:
    """Return True if rows with several images were given each other's, see `REPEATS_IMAGES_SINGLY`.

    Parameters
    ----------
    pixels : Tensor [n_images, ...]
        Of all rows, as the vision tower was given them.
    per_row
        Images of each row.
    input_ids : Tensor [B, L]
        Repeated rows are equal and stand beside each other.
    """
    first = 0
    for b, count in enumerate(per_row[:-1]):
        if count > 1 and torch.equal(input_ids[b], input_ids[b + 1]) and torch.equal(pixels[first], pixels[first + 1]):
            same = torch.equal(pixels[first : first + count], pixels[first + count : first + 2 * count])
            if not same:  # else all of these images are one, and their order is no matter
                return True
        first += count
    return False


# ---- arguments of a call that a hook sees
def argument(kwargs: Mapping[str, Any], name: str, where: str | int) -> Any:
    """Return a keyword argument that every tested version passes.

    Raises
    ------
    PruningError
        It is not there.
    """
    if name not in kwargs:
        raise unknown(where, f"the arguments {', '.join(sorted(kwargs)) or '(none)'} without {name}")
    return kwargs[name]


def hidden_argument(args: tuple, kwargs: Mapping[str, Any], where: str | int) -> Tensor:
    """Return the hidden states [B, L, D] that a decoder layer is called with."""
    return args[0] if args else argument(kwargs, "hidden_states", where)


def with_hidden(hidden: Tensor, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Return the arguments of a decoder layer with other states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def cache_argument(kwargs: Mapping[str, Any], where: str | int) -> Any:
    """Return the cache that the language model or a layer of it is called with; None if it is called without one.

    Raises
    ------
    PruningError
        No argument has a known name.
    """
    for name in CACHE_NAMES:
        if name in kwargs:
            return kwargs[name]
    strange = [name for name, value in kwargs.items() if isinstance(value, Cache)]
    names = ", ".join(CACHE_NAMES)
    if strange:
        raise unknown(where, f"the cache as {strange[0]!r} (known names: {names})")
    raise unknown(where, f"the arguments {', '.join(sorted(kwargs)) or '(none)'} without a cache (known names: {names})")


def with_cache(function: Callable, cache: object) -> dict[str, object]:
    """Return `cache` as the keyword argument that a model's forward takes it by."""
    parameters = _parameters(getattr(function, "__func__", function))
    name = next((name for name in CACHE_NAMES if name in parameters), None)
    if name is None:
        raise unknown(f"{getattr(function, '__qualname__', function)}", f"the parameters {', '.join(parameters)} without a cache")
    return {name: cache}


def cache_of(output: object) -> Any:
    """Return the cache in the output of a model or of generate(); None where there is none."""
    for name in CACHE_NAMES:
        if (cache := getattr(output, name, None)) is not None:
            return cache
    return None


def is_static(cache: object) -> bool:
    """Return True for a cache that allots its room beforehand, in any layer: static, and what is made of it."""
    layers = getattr(cache, "layers", None) or ()
    return bool(getattr(cache, "is_compileable", False)) or any(getattr(layer, "is_compileable", False) for layer in layers)


@functools.cache
def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


# ---- masks and positions
def causal_mask(config: object, hidden: Tensor, mask: Tensor | None, cache: MaskedCache) -> Tensor | None:
    """Return Hugging Face's own causal mask for `hidden` [B, n, D] behind `cache`, given a 2-D mask [B, past + n] or None."""
    parameters = _parameters(create_causal_mask)
    embeds = "inputs_embeds" if "inputs_embeds" in parameters else "input_embeds"
    kwargs = {"config": config, "attention_mask": mask, "position_ids": None, embeds: hidden, **with_cache(create_causal_mask, cache)}
    required = "cache_position" in parameters and parameters["cache_position"].default is inspect.Parameter.empty
    if required:
        kwargs["cache_position"] = torch.arange(cache.length, cache.length + hidden.shape[1], device=hidden.device)
    return create_causal_mask(**kwargs)


def query_length(query: int | Tensor) -> int:
    """Return the number of new tokens that a mask is made for, which some versions say and others give the positions of."""
    return query if isinstance(query, int) else query.shape[0]


def has_foreign_rotary(attention: nn.Module) -> bool:
    """Return True if another library replaced the rotary function of the attention's file; it may write to its inputs."""
    module = sys.modules[type(attention).__module__]
    return getattr(module, "apply_rotary_pos_emb", rotate).__module__ != module.__name__


def rotate(attention: nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the rotary function of the attention's own file to queries and keys [B, H, L, d].

    Where `cos` and `sin` still hold three rows of multi-dimensional positions, the function of Qwen2-VL merges them.
    """
    module = sys.modules[type(attention).__module__]
    if has_foreign_rotary(attention):
        q = q.clone()
        k = k.clone()
    multimodal = getattr(module, "apply_multimodal_rotary_pos_emb", None)
    if multimodal is not None and cos.dim() == 4:
        rope = getattr(attention, "rope_scaling", None) or attention.config.rope_parameters
        return multimodal(q, k, cos, sin, rope["mrope_section"])
    return module.apply_rotary_pos_emb(q, k, cos, sin)


def has_multidimensional_positions(config: object) -> bool:
    """Return True if a token's rotary position has parts for time, height and width, so that an image takes few positions."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in ("rope_parameters", "rope_scaling")]
    return any(isinstance(rope, Mapping) and "mrope_section" in rope for rope in found)


def count_positions(core: nn.Module, inputs: Mapping[str, Any]) -> list[int]:
    """Return the rotary positions that each prompt of a batch takes: of multi-dimensional ones, the largest and one.

    Parameters
    ----------
    core
        With ``get_rope_index``.
    inputs
        As the processor makes them: input_ids and attention_mask [B, L], grids of images and videos.
    """
    attended = inputs["attention_mask"].bool()
    if not any(name.endswith("_grid_thw") for name in inputs):
        return attended.sum(1).tolist()  # text takes one each
    accepted = _parameters(type(core).get_rope_index)
    positions, _ = core.get_rope_index(**{name: value for name, value in inputs.items() if name in accepted})
    return (positions.masked_fill(~attended, 0).amax((0, 2)) + 1).tolist()


# ---- configurations and processors
def token_id(config: object, kind: str) -> int | None:
    """Return the placeholder token of images or videos in input_ids."""
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def video_pixels(call: Mapping[str, object]) -> Tensor:
    """Return the pixels that ``get_video_features`` of LLaVA-OneVision is called with."""
    return call["pixel_values_videos" if "pixel_values_videos" in call else "pixel_values"]


def set_pixel_bounds(part: object, least: int, most: int) -> None:
    """Set the pixels that Qwen's image or video processor lets a picture have; some versions keep the bounds twice."""
    part.size = {"shortest_edge": least, "longest_edge": most}
    for name, value in (("min_pixels", least), ("max_pixels", most)):
        if getattr(part, name, None) is not None:
            setattr(part, name, value)
