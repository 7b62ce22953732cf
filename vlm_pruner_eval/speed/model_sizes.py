"""Models of real sizes with random weights, made on the device: their cost can be measured without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from vlm_pruner_eval.cost import DecoderShape, kv_bytes
from vlm_pruner_eval.embedded import minivlm_path
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.hf_compat import HAS_ROPE_PARAMETERS
from vlm_pruner_eval.speed.measuring import free_bytes
from vlm_pruner_eval.vlms import family_of

_WORDS = (10, 20000)  # ids of ordinary words in every vocabulary here; a smaller vocabulary is used from 10 on


@dataclass(frozen=True)
class Geometry:
    """Sizes of one model and of its prompt with one image.

    Attributes
    ----------
    config
        Makes the Hugging Face config.
    n_visual, n_patches
        Visual tokens of the image, newline tokens included, and its patches in the vision tower.
    features
        Makes the tensors of a batch of images, as the checkpoint's processor would.
    enclosing
        Tokens in front of the image and behind it, if any.
    """

    name: str
    config: Callable[[], object]
    model_class: str
    n_visual: int
    n_patches: int
    features: Callable[[int, torch.Generator], dict[str, Tensor]]
    enclosing: tuple[int, ...] = ()

    @property
    def image(self) -> str:
        """The prompt's image in words."""
        return f"{self.n_patches} patches, {self.n_visual} visual tokens"


# ---- configs
def _sizes(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, object]:
    widths = {"hidden_size": hidden, "intermediate_size": intermediate}
    return widths | {"num_hidden_layers": layers, "num_attention_heads": heads}


def _llama(*sizes: int, vocabulary: int = 32064) -> dict[str, object]:
    text = {"model_type": "llama", "vocab_size": vocabulary, "max_position_embeddings": 4096}
    return text | _sizes(*sizes) | {"num_key_value_heads": sizes[-1]}


def _llava_100m() -> object:
    text = _llama(768, 2048, 12, 12, vocabulary=4096)
    vision = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14} | _sizes(256, 1024, 6, 4)
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=4000)


def _llava(text: dict[str, object]) -> object:
    return transformers.LlavaConfig(text_config=text)  # its vision tower is CLIP-L/14 at 336 pixels


def _llava_next() -> object:
    return transformers.LlavaNextConfig(text_config=_llama(4096, 11008, 32, 32))


def _qwen2_vl() -> object:
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = _llama(3584, 18944, 28, 28, vocabulary=152064)
    text |= {"model_type": "qwen2_vl_text", "num_key_value_heads": 4, "max_position_embeddings": 32768}
    text |= {"rope_parameters": rope} if HAS_ROPE_PARAMETERS else {"rope_scaling": rope, "rope_theta": 1e6}
    return transformers.Qwen2VLConfig(text_config=text)


# ---- images
def _square(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 336, 336, generator=generator)}


def _five_tiles(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(batch, 5, 3, 336, 336, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[672, 672]] * batch)}


def _64_x_80(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(batch * 64 * 80, 3 * 2 * 14 * 14, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 64, 80]] * batch)}


_LLAVA = ("LlavaForConditionalGeneration", 576, 577, _square)
_SIZED = (
    Geometry("mini", lambda: transformers.LlavaConfig.from_pretrained(minivlm_path()), *_LLAVA),
    Geometry("100m", _llava_100m, *_LLAVA),
    Geometry("llava-1.5-7b", lambda: _llava(_llama(4096, 11008, 32, 32)), *_LLAVA),
    Geometry("llava-1.5-13b", lambda: _llava(_llama(5120, 13824, 40, 40)), *_LLAVA),
    # a square photo of 672 pixels: the base view, 2 x 2 tiles, and a newline token behind each of 48 rows
    Geometry("llava-next-7b", _llava_next, "LlavaNextForConditionalGeneration", 576 + 48 * 49, 5 * 577, _five_tiles),
    # 896 x 1120 pixels, the 1,003,520 of the paper's protocol
    Geometry("qwen2-vl-7b", _qwen2_vl, "Qwen2VLForConditionalGeneration", 1280, 5120, _64_x_80, (151652, 151653)),
)
GEOMETRIES = {geometry.name: geometry for geometry in _SIZED}


# ---- models and prompts
def build(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Make the model with random weights where it runs; it never ends an answer by itself."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = getattr(transformers, geometry.model_class)._from_config(geometry.config(), dtype=dtype)
    model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.eval()


def prompts(geometry: Geometry, model: nn.Module, batch: int, n_text: int) -> dict[str, Tensor]:
    """Make prompts of `n_text` random words each, half of them before the image and half behind; no padding.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask`` [batch, n_visual + n_text], and the tensors of the family's images.
    """
    generator = torch.Generator().manual_seed(batch)
    image = family_of(model).token_id(model.config, "image")
    # random words around the image
    last = min(_WORDS[1], model.config.get_text_config().vocab_size)
    words = torch.randint(_WORDS[0], last, (batch, n_text - len(geometry.enclosing)), generator=generator)
    placed = torch.tensor([*geometry.enclosing[:1], *[image] * geometry.n_visual, *geometry.enclosing[1:]])
    half = words.shape[1] // 2
    ids = torch.cat([words[:, :half], placed.expand(batch, -1), words[:, half:]], dim=1)
    # tensors of the family
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **geometry.features(batch, generator)}
    code = getattr(getattr(model.model, "get_rope_index", None), "__code__", None)
    if code is not None and "mm_token_type_ids" in code.co_varnames:  # newer versions make Qwen's positions of them
        made["mm_token_type_ids"] = (ids == image).int()
    return {name: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) for name, x in made.items()}


# ---- memory
def check_memory(geometry: Geometry, device: torch.device, dtype: torch.dtype, batch: int, n_tokens: int) -> None:
    """Refuse a model that can't fit, before anything is allocated.

    Raises
    ------
    ConfigError
        With the bytes needed at least and those that are free.
    """
    needed = needed_bytes(geometry, dtype, batch, n_tokens)
    free = free_bytes(device)
    if needed > free:
        raise ConfigError(
            f"--geometry {geometry.name}: {str(dtype).removeprefix('torch.')} at batch {batch} needs at least "
            f"{needed / 1e9:.1f} GB on {device} and {free / 1e9:.1f} GB are free; use a smaller batch or geometry, or "
            "another --dtype."
        )


def needed_bytes(geometry: Geometry, dtype: torch.dtype, batch: int, n_tokens: int) -> int:
    """Bytes of weights and cache, the least that answers of `n_tokens` tokens, prompts included, can do with."""
    model = build(geometry, torch.device("meta"), dtype)
    text = model.config.get_text_config()
    cache = kv_bytes(DecoderShape.of(text), [n_tokens] * text.num_hidden_layers, dtype.itemsize)
    return sum(parameter.nbytes for parameter in model.parameters()) + batch * cache
