"""Models of real sizes with random weights, made on the device: what they cost can be measured without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from vlm_pruner_eval.bench import minivlm_path
from vlm_pruner_eval.cost import DecoderShape, kv_bytes
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.hf_compat import HAS_ROPE_PARAMETERS
from vlm_pruner_eval.speed.memory import free_bytes
from vlm_pruner_eval.vlms import family_of

Features = Callable[[int, torch.Generator], dict[str, Tensor]]

_TEXT_IDS = 10, 20000  # ordinary words in every vocabulary here; a smaller vocabulary is used from 10 on
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class Geometry:
    """The sizes of one model and of its prompt with one image.

    Attributes
    ----------
    config
        Makes the Hugging Face config.
    n_visual
        Visual tokens of the image, newline tokens included.
    n_patches
        What the vision tower sees of the image.
    features
        Makes the tensors of a batch of images, as the checkpoint's processor would.
    before, after
        Tokens that enclose the image.
    """

    name: str
    model_class: str
    config: Callable[[], object]
    n_visual: int
    n_patches: int
    features: Features
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def image(self) -> str:
        """What the prompt's image is, in words."""
        return f"{self.n_patches} patches, {self.n_visual} visual tokens"


def _clip(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, object]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "projection_dim": hidden, **sizes}


def _llama(hidden: int, intermediate: int, layers: int, heads: int, vocabulary: int = 32064) -> dict[str, object]:
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {"model_type": "llama", "vocab_size": vocabulary, "num_key_value_heads": heads, "max_position_embeddings": 4096, **sizes}


def _llava(text: dict[str, object], vision: dict[str, object], image_token: int = 32000) -> Callable[[], object]:
    return lambda: transformers.LlavaConfig(
        vision_config=dict(vision), text_config=dict(text), image_token_index=image_token, image_seq_length=576, vision_feature_layer=-2
    )


def _llava_next() -> object:
    return transformers.LlavaNextConfig(
        vision_config=_clip(1024, 4096, 24, 16),
        text_config=_llama(4096, 11008, 32, 32),
        image_token_index=32000,
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-2,
    )


def _qwen2_vl() -> object:
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = _llama(3584, 18944, 28, 28, 152064) | {"model_type": "qwen2_vl_text", "num_key_value_heads": 4, "max_position_embeddings": 32768}
    by_version = {"rope_parameters": rope} if HAS_ROPE_PARAMETERS else {"rope_scaling": rope, "rope_theta": 1e6}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    ids = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653}
    return transformers.Qwen2VLConfig(text_config=text | by_version, vision_config=vision, **ids)


def _square(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 336, 336, generator=generator)}


def _five_tiles(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(batch, 5, 3, 336, 336, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[672, 672]] * batch)}


def _patches(rows: int, cols: int) -> Features:
    def features(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        pixels = torch.randn(batch * rows * cols, 3 * 2 * 14 * 14, generator=generator)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, cols]] * batch)}

    return features


def _llava_geometry(name: str, config: Callable[[], object]) -> Geometry:
    return Geometry(name, "LlavaForConditionalGeneration", config, n_visual=576, n_patches=577, features=_square)


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        _llava_geometry("mini", lambda: transformers.LlavaConfig.from_pretrained(minivlm_path())),
        _llava_geometry("100m", _llava(_llama(768, 2048, 12, 12, 4096), _clip(256, 1024, 6, 4), image_token=4000)),
        _llava_geometry("llava-1.5-7b", _llava(_llama(4096, 11008, 32, 32), _clip(1024, 4096, 24, 16))),
        _llava_geometry("llava-1.5-13b", _llava(_llama(5120, 13824, 40, 40), _clip(1024, 4096, 24, 16))),
        # a square photo of 672 pixels: the base view, 2 x 2 tiles, and a newline token behind each of 48 rows
        Geometry("llava-next-7b", "LlavaNextForConditionalGeneration", _llava_next, 576 + 48 * 49, 5 * 577, _five_tiles),
        # 896 x 1120 pixels, the 1,003,520 of the paper's protocol
        Geometry("qwen2-vl-7b", "Qwen2VLForConditionalGeneration", _qwen2_vl, 1280, 5120, _patches(64, 80), (151652,), (151653,)),
    )
}


def build(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with random weights, made where it runs; it never ends an answer by itself."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(0)
        model = getattr(transformers, geometry.model_class)._from_config(geometry.config(), dtype=dtype)
    model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.eval()


def prompts(geometry: Geometry, model: nn.Module, batch: int, n_text: int) -> dict[str, Tensor]:
    """Prompts of `n_text` random words each, half of them before the image and half behind; no padding.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask`` [batch, n_visual + n_text], and what the family's images need.
    """
    generator, config = torch.Generator().manual_seed(batch), model.config
    image = family_of(model).token_id(config, "image")
    n_words = n_text - len(geometry.before) - len(geometry.after)
    last = min(_TEXT_IDS[1], config.get_text_config().vocab_size)
    words = torch.randint(_TEXT_IDS[0], last, (batch, n_words), generator=generator)
    placed = torch.tensor([*geometry.before, *[image] * geometry.n_visual, *geometry.after]).expand(batch, -1)
    ids = torch.cat([words[:, : n_words // 2], placed, words[:, n_words // 2 :]], dim=1)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **geometry.features(batch, generator)}
    if "mm_token_type_ids" in _arguments_of_rope_index(model):
        found["mm_token_type_ids"] = (ids == image).int()
    return {name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype) for name, value in found.items()}


def _arguments_of_rope_index(model: nn.Module) -> tuple[str, ...]:
    """In newer versions, Qwen's multi-dimensional positions are computed from token types that its processor makes."""
    code = getattr(getattr(model.model, "get_rope_index", None), "__code__", None)
    return code.co_varnames if code else ()


def check_memory(geometry: Geometry, device: torch.device, dtype: torch.dtype, batch: int, n_tokens: int) -> None:
    """Refuse what can't fit, before anything is allocated.

    Raises
    ------
    ConfigError
        With what is needed at least and what is free.
    """
    needed, free = needed_bytes(geometry, dtype, batch, n_tokens), free_bytes(device)
    if needed > free:
        raise ConfigError(
            f"--geometry {geometry.name}: {str(dtype).removeprefix('torch.')} at batch {batch} needs at least {needed / 1e9:.1f} GB on "
            f"{device} and {free / 1e9:.1f} GB are free; use a smaller batch, another --dtype, or a smaller geometry."
        )


def needed_bytes(geometry: Geometry, dtype: torch.dtype, batch: int, n_tokens: int) -> int:
    """Bytes of the weights, of the cache, and of the larger of the two working sets: the vision tower's and one decoder layer's.

    Parameters
    ----------
    n_tokens
        Prompt and answer together.
    """
    model = build(geometry, torch.device("meta"), dtype)
    text, vision = model.config.get_text_config(), model.config.vision_config
    shape = DecoderShape.of(text)
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or width * vision.mlp_ratio
    depth = getattr(vision, "num_hidden_layers", None) or vision.depth
    seen = geometry.n_patches * (width * depth + 2 * int(inner))  # LLaVA's towers hand out the states of all their layers
    working = max(seen, n_tokens * (4 * shape.hidden + 3 * shape.intermediate))
    weights = sum(parameter.numel() for parameter in model.parameters())
    cache = kv_bytes(shape, [n_tokens] * text.num_hidden_layers, dtype.itemsize)
    return weights * dtype.itemsize + batch * (cache + working * dtype.itemsize)
