"""Tiny random VLMs and prompts, made from config objects: no download, a fraction of a second each."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers
from recompute import (  # noqa: F401 - for tests
    N_LAYERS,
    View,
    generate,
    masked_recompute,
    next_positions,
    seen_after,
    step_logits,
    views_from,
)
from tiny_processors import (
    IMAGE,
    PAD,
    PINPOINTS,
    TURN_ENDS,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    glm_processor,
    internvl_processor,
    next_processor,
    onevision_processor,
    qwen_processor,
)
from torch import Tensor, nn
from transformers import ProcessorMixin

from vlm_pruner_eval.lmms.original_format import llava_video_model

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
CLIP = TOWER | {"model_type": "clip_vision_model", "projection_dim": 16}
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}
IMAGE_IDS = {"image_token_id": IMAGE, "image_token_index": IMAGE}
VIDEO_IDS = {"video_token_id": VIDEO, "video_token_index": VIDEO}

SIZES = [(50, 100), (112, 80), (40, 140), (100, 100)]  # (height, width) of anyres images
GRIDS = [(1, 4, 6), (1, 8, 4), (1, 6, 6), (1, 4, 4)]  # (frames, rows, cols) in patches, before the 2 x 2 merge
VIDEO_GRIDS = [(2, 4, 4), (3, 4, 6)]

Segments = Sequence[int | str]  # a number of text tokens, "i<k>" for image k, "v<k>" for video k


@dataclass(frozen=True)
class TinyFamily:
    """A recipe for a tiny model of a family, and for a prompt. One entry in RECIPES puts it into every behaviour test.

    `scopes(kind, k)`: tokens of each budget scope that image or video k makes. `features(kind, ks, dtype)`: its tensors.
    `processor`: of its checkpoint on disk, whose answers end in the token `ends`; None if tiny_checkpoints.py writes another one.
    `framed`: how the placeholder tokens of one image or video stand in the prompt.
    """

    model_class: str
    config: Callable[[], object]
    scopes: Callable[[str, int], list[int]]
    features: Callable[[str, list[int], torch.dtype], dict[str, Tensor]]
    processor: Callable[[], ProcessorMixin] | None = None
    ends: str = TURN_ENDS
    framed: Callable[[str, int, list[int]], list[int]] = lambda kind, k, tokens: tokens
    videos: bool = False
    mrope: bool = False

    def n_visual(self, kind: str, k: int) -> int:
        """Placeholder tokens of one image or video."""
        return sum(self.scopes(kind, k))


def _random(seed: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + 7 * sum(map(ord, seed))))


# ---- LLaVA-1.5
def _llava_config() -> object:
    text = dict(TEXT, model_type="llama")
    return transformers.LlavaConfig(vision_config=dict(CLIP), text_config=text, vision_feature_layer=-2, image_seq_length=16, **IMAGE_IDS)


def llava_features(kind: str, ks: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([_random(f"i{k}", 3, 56, 56) for k in ks]).to(dtype)}


# ---- LLaVA-NeXT and LLaVA-OneVision: tiles
def _next_config() -> object:
    text = dict(TEXT, model_type="llama")
    return transformers.LlavaNextConfig(
        vision_config=dict(CLIP), text_config=text, vision_feature_layer=-2, image_grid_pinpoints=PINPOINTS, **IMAGE_IDS
    )


def _onevision_config(config_class: type = transformers.LlavaOnevisionConfig) -> object:
    return config_class(
        vision_config=dict(SIGLIP),
        text_config=dict(TEXT, model_type="qwen2"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=PINPOINTS,
        **IMAGE_IDS,
        **VIDEO_IDS,
    )


def _tiles(size: tuple[int, int]) -> tuple[int, int]:
    """(rows, cols) of tiles of the pinpoint that keeps most of the image and wastes least, restated from LLaVA-NeXT's rule."""

    def fit(pinpoint: list[int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / size[1], pinpoint[0] / size[0])
        effective = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return effective, -(pinpoint[0] * pinpoint[1] - effective)

    best = max(PINPOINTS, key=fit)
    return best[0] // 56, best[1] // 56


def _anyres_tokens(size: tuple[int, int]) -> int:
    """16 tokens of the base view, and the unpadded grid of tiles with one newline token a row."""
    rows, cols = (4 * n for n in _tiles(size))
    height, width = size
    if width / height > cols / rows:
        rows -= 2 * ((rows - int(round(height * (cols / width), 7))) // 2)
    else:
        cols -= 2 * ((cols - int(round(width * (rows / height), 7))) // 2)
    return 16 + rows * (cols + 1)


def _anyres_features(kind: str, ks: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    if kind == "v":
        return {"pixel_values_videos": torch.stack([_random(f"v{k}", k + 2, 3, 56, 56) for k in ks]).to(dtype)}
    counts = [1 + math.prod(_tiles(SIZES[k])) for k in ks]
    pixels = torch.zeros(len(ks), max(counts), 3, 56, 56)
    for row, k, n in zip(pixels, ks, counts, strict=True):
        row[:n] = _random(f"i{k}", n, 3, 56, 56)
    return {"pixel_values": pixels.to(dtype), "image_sizes": torch.tensor([SIZES[k] for k in ks])}


# ---- Qwen: grids of merged patches, multi-dimensional rotary positions
def _qwen_config(name: str, text: dict, vision: dict) -> object:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    new = int(transformers.__version__.split(".")[0]) >= 5
    rope_keys = {"rope_parameters": rope} if new else {"rope_scaling": rope, "rope_theta": 10000.0}
    vision = {"num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2} | vision
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    return getattr(transformers, name)(text_config=TEXT | text | rope_keys, vision_config=vision, **ids)


def _qwen2_config() -> object:
    return _qwen_config("Qwen2VLConfig", {}, {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "patch_size": 14})


def _qwen25_config() -> object:
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "patch_size": 14}
    windows = {"window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    return _qwen_config("Qwen2_5_VLConfig", {}, vision | windows)


def _qwen3_config() -> object:
    vision = {"depth": 4, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "patch_size": 16}
    deepstack = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
    return _qwen_config("Qwen3VLConfig", {"head_dim": 16}, vision | deepstack)


def _qwen3_moe_config() -> object:
    """Every layer routes a token to two experts of four, which together are as wide as the one feed-forward layer of the others."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
    vision = {"depth": 4, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "patch_size": 16}
    deepstack = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
    return _qwen_config("Qwen3VLMoeConfig", {"head_dim": 16} | experts, vision | deepstack)


def _glm_ocr_config() -> object:
    """The multi-dimensional part of a head is half of it, as in the published checkpoint."""
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "patch_size": 14, "image_size": 56}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return _qwen_config("GlmOcrConfig", {"head_dim": 16, "rope_parameters": rope}, vision)


def _qwen_scopes(kind: str, k: int) -> list[int]:
    return [math.prod((GRIDS if kind == "i" else VIDEO_GRIDS)[k]) // 4]


def _qwen_features(patch: int):
    def features(kind: str, ks: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
        grids, names = (
            (GRIDS, ("pixel_values", "image_grid_thw")) if kind == "i" else (VIDEO_GRIDS, ("pixel_values_videos", "video_grid_thw"))
        )
        pixels = [_random(f"{kind}{k}", math.prod(grids[k]), 3 * 2 * patch * patch) for k in ks]
        return {names[0]: torch.cat(pixels).to(dtype), names[1]: torch.tensor([grids[k] for k in ks])}

    return features


def _qwen_framed(kind: str, k: int, tokens: list[int]) -> list[int]:
    return [VISION_START, *tokens, VISION_END]


def _qwen3_framed(kind: str, k: int, tokens: list[int]) -> list[int]:
    """A video's frames are separated by their timestamps, so its tokens do not stand together."""
    if kind == "i":
        return _qwen_framed(kind, k, tokens)
    frames = VIDEO_GRIDS[k][0]
    per_frame = len(tokens) // frames
    return [token for t in range(frames) for token in (50 + t, *_qwen_framed(kind, k, tokens[:per_frame]))]


# ---- InternVL: tiles of 2 x 2 tokens
def _internvl_config() -> object:
    vision = dict(TOWER, model_type="internvl_vision", image_size=[56, 56], patch_size=[14, 14], num_hidden_layers=2)
    text = dict(TEXT, model_type="qwen2")
    return transformers.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=4, downsample_ratio=0.5
    )


def _internvl_features(kind: str, ks: list[int], dtype: torch.dtype) -> dict[str, Tensor]:
    return {"pixel_values": torch.cat([_random(f"i{k}", k + 1, 3, 56, 56) for k in ks]).to(dtype)}


RECIPES = {
    "glm_ocr": TinyFamily(
        "GlmOcrForConditionalGeneration",
        _glm_ocr_config,
        _qwen_scopes,
        _qwen_features(14),
        glm_processor,
        framed=_qwen_framed,
        mrope=True,
    ),
    "internvl": TinyFamily(
        "InternVLForConditionalGeneration",
        _internvl_config,
        lambda kind, k: [4] * (k + 1),
        _internvl_features,
        internvl_processor,
        framed=_qwen_framed,
    ),
    "llava": TinyFamily("LlavaForConditionalGeneration", _llava_config, lambda kind, k: [16], llava_features),
    "llava_next": TinyFamily(
        "LlavaNextForConditionalGeneration",
        _next_config,
        lambda kind, k: [_anyres_tokens(SIZES[k])],
        _anyres_features,
        next_processor,
        "</s>",
    ),
    "llava_onevision": TinyFamily(
        "LlavaOnevisionForConditionalGeneration",
        _onevision_config,
        lambda kind, k: [_anyres_tokens(SIZES[k]) if kind == "i" else 4 * (k + 2) + 1],
        _anyres_features,
        onevision_processor,
        videos=True,
    ),
    "llava_video": TinyFamily(
        "LlavaVideoForConditionalGeneration",
        lambda: _onevision_config(llava_video_model.LlavaVideoConfig),
        lambda kind, k: [_anyres_tokens(SIZES[k]) if kind == "i" else 2 * (2 + 1) * (k + 2)],
        _anyres_features,
        videos=True,
    ),
    "qwen2_vl": TinyFamily(
        "Qwen2VLForConditionalGeneration",
        _qwen2_config,
        _qwen_scopes,
        _qwen_features(14),
        qwen_processor("Qwen2VLProcessor", "Qwen2VLVideoProcessor", 14),
        framed=_qwen_framed,
        videos=True,
        mrope=True,
    ),
    "qwen2_5_vl": TinyFamily(
        "Qwen2_5_VLForConditionalGeneration",
        _qwen25_config,
        _qwen_scopes,
        _qwen_features(14),
        qwen_processor("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", 14),
        framed=_qwen_framed,
        videos=True,
        mrope=True,
    ),
    "qwen3_vl": TinyFamily(
        "Qwen3VLForConditionalGeneration",
        _qwen3_config,
        _qwen_scopes,
        _qwen_features(16),
        qwen_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16),
        framed=_qwen3_framed,
        videos=True,
        mrope=True,
    ),
    "qwen3_vl_moe": TinyFamily(
        "Qwen3VLMoeForConditionalGeneration",
        _qwen3_moe_config,
        _qwen_scopes,
        _qwen_features(16),
        qwen_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16),
        framed=_qwen3_framed,
        videos=True,
        mrope=True,
    ),
}


def _class_named(name: str) -> type | None:
    """A class of transformers, or the one of ours that it does not have; None of a model that is younger than it."""
    return getattr(llava_video_model, name, None) or getattr(transformers, name, None)


FAMILIES = {name: tiny for name, tiny in RECIPES.items() if _class_named(tiny.model_class)}  # that can be tested here


def build(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A tiny model whose random weights are large enough that a wrong mask or position shows in the logits."""
    tiny, generator = FAMILIES[family], torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for the parameters that are left as the model made them
        model = _class_named(tiny.model_class)._from_config(tiny.config(), attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                fan_in = parameter.shape[-1] if parameter.dim() == 2 else parameter[0].numel()
                if ".experts." in name:  # one matrix an expert, which versions of transformers hold either way round
                    fan_in = math.sqrt(fan_in)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (1.6 / math.sqrt(fan_in)))
            elif "bias" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        table = model.get_input_embeddings().weight
        table.copy_(torch.randn(table.shape, generator=generator))
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD, eos_token_id=None, bos_token_id=1)
    return model.to(dtype).eval()


def prompts(family: str, samples: Sequence[Segments], dtype: torch.dtype = torch.float32, *, pad: str = "left") -> dict[str, Tensor]:
    """A padded batch of prompts: input_ids, attention_mask, and the images' and videos' features."""
    tiny, rows, found = FAMILIES[family], [], {"i": [], "v": []}
    for sample in samples:
        generator = torch.Generator().manual_seed(sum(map(ord, str(list(sample)))))
        row: list[int] = []
        for segment in sample:
            if isinstance(segment, int):
                row += torch.randint(5, 95, (segment,), generator=generator).tolist()
            else:
                kind, k = segment[0], int(segment[1:])
                found[kind].append(k)
                row += tiny.framed(kind, k, [IMAGE if kind == "i" else VIDEO] * tiny.n_visual(kind, k))
        rows.append(row)
    ids, mask = (_padded(table, pad) for table in (rows, [[1] * len(row) for row in rows]))
    batch = {"input_ids": ids, "attention_mask": mask}
    if tiny.mrope and _wants_token_types(tiny):
        batch["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for kind, ks in found.items():
        batch |= tiny.features(kind, ks, dtype) if ks else {}
    return batch


def _padded(rows: list[list[int]], pad: str) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([[0] * (length - len(row)) + row if pad == "left" else row + [0] * (length - len(row)) for row in rows])


def _wants_token_types(tiny: TinyFamily) -> bool:
    """Some release of transformers 5 on, multi-dimensional positions are computed from token types."""
    core = getattr(transformers, tiny.model_class.replace("ForConditionalGeneration", "Model"))
    return "mm_token_type_ids" in inspect.signature(core.get_rope_index).parameters


def scopes_of(family: str, sample: Segments) -> list[int]:
    """Tokens of every budget scope of one prompt, in order."""
    return [n for segment in sample if isinstance(segment, str) for n in FAMILIES[family].scopes(segment[0], int(segment[1:]))]
