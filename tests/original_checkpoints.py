"""Tiny random checkpoints in the format of LLaVA's authors: config.json, names of tensors and folders as they are published."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from vlm_pruner_eval.lmms.checkpoint import Checkpoint, load_checkpoint
from vlm_pruner_eval.lmms.settings import Settings

TILE, PATCH = 70, 14  # 5 x 5 patches, pooled to 3 x 3
HIDDEN, VISION = 32, 16
LLAMA_WORDS = ("<unk>", "<s>", "</s>", "<pad>")
QWEN_WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_ROWS = 280  # more rows than words, as in Qwen's own tables
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_cache": True,
}
# of the keys of liuhaotian/llava-v1.5-7b's config.json
LLAVA = TEXT | {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "image_aspect_ratio": "pad",
    "mm_hidden_size": VISION,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "torch_dtype": "float16",
}
# of the keys of lmms-lab/LLaVA-Video-7B-Qwen2's config.json; its text_config and vision_config describe nothing that is in it
LLAVA_VIDEO = TEXT | {
    "architectures": ["LlavaQwenForCausalLM"],
    "model_type": "llava",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "add_faster_video": False,
    "image_aspect_ratio": "anyres_max_9",
    "image_grid_pinpoints": "(1x1),...,(2x2)",
    "image_token_index": 151646,
    "max_window_layers": 4,
    "mm_hidden_size": VISION,
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": 2,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "text_config": {"model_type": "llama"},
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": {"hidden_size": 1024, "image_size": 336, "model_type": "clip_vision_model", "num_hidden_layers": 24},
    "vocab_size": QWEN_ROWS,
}


@dataclass(frozen=True)
class Parts:
    """The modules of which an original checkpoint is made. `newline` [D], or None."""

    raw: dict[str, object]
    language: nn.Module
    tower: nn.Module
    projector: nn.Module
    newline: Tensor | None
    tokenizer: transformers.PreTrainedTokenizerFast


def _tokenizer(words: tuple[str, ...], *, begin: str | None, end: str, pad: str) -> transformers.PreTrainedTokenizerFast:
    """One token per byte, and no token for an image or a video."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*words, *alphabet])}, [], unk_token=words[0]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(word, special=True) for word in words])
    if begin:
        core.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, words.index(begin))])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token=begin, eos_token=end, pad_token=pad)


def _enlarge(module: nn.Module, seed: int) -> None:
    """Random weights so large that a wrong layer, order or newline shows in the answers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() >= 2:
                fan_in = 1 if "embed_tokens" in name else weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.6 / fan_in**0.5)
            elif "norm" not in name or "bias" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def _projector() -> nn.Module:
    projector = nn.Sequential(nn.Linear(VISION, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
    _enlarge(projector, 3)
    return projector.eval()


def _text(raw: Mapping) -> dict[str, object]:
    return {name: raw[name] for name in (*TEXT, "bos_token_id", "eos_token_id", "vocab_size", "rope_theta") if name in raw}


def _dual(model_class: type, config_class: type) -> nn.Module:
    """A CLIP or SigLIP with both towers, as the hub ids that originals name hold it."""
    sides = {"intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": VISION}
    vision = sides | {"image_size": TILE, "patch_size": PATCH}
    text = sides | {"num_hidden_layers": 1, "vocab_size": 50, "max_position_embeddings": 8}
    model = model_class(config_class(text_config=text, vision_config=vision)).eval()
    _enlarge(model, 2)
    return model


def llava_parts() -> tuple[Parts, nn.Module]:
    """Parts of a LLaVA-1.5, and the whole CLIP that its tower is from."""
    clip = _dual(transformers.CLIPModel, transformers.CLIPConfig)
    tokenizer = _tokenizer(LLAMA_WORDS, begin="<s>", end="</s>", pad="<unk>")
    raw = LLAVA | {"vocab_size": len(tokenizer)}
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_text(raw))).eval()
    _enlarge(language, 1)
    return Parts(raw, language, clip.vision_model, _projector(), None, tokenizer), clip


def llava_video_parts(**changed: object) -> tuple[Parts, nn.Module]:
    """Parts of a LLaVA-Video, and the whole SigLIP that its tower is from."""
    siglip = _dual(transformers.SiglipModel, transformers.SiglipConfig)
    raw = LLAVA_VIDEO | changed
    language = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_text(raw))).eval()
    _enlarge(language, 1)
    newline = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(4))
    tokenizer = _tokenizer(QWEN_WORDS, begin=None, end="<|im_end|>", pad="<|endoftext|>")
    return Parts(raw, language, siglip.vision_model, _projector(), newline, tokenizer), siglip


def tensors_of(parts: Parts, *, with_tower: bool) -> dict[str, Tensor]:
    """All tensors under their original names."""
    found = {name: weight.clone() for name, weight in parts.language.state_dict().items()}
    if parts.raw["tie_word_embeddings"]:
        del found["lm_head.weight"]
    found |= {f"model.mm_projector.{name}": weight for name, weight in parts.projector.state_dict().items()}
    if parts.newline is not None:
        found["model.image_newline"] = parts.newline
    if with_tower:
        inner = {name.removeprefix("vision_model."): weight for name, weight in parts.tower.state_dict().items()}
        dropped = ("head.", "encoder.layers.2.") if parts.newline is not None else ()
        found |= {f"model.vision_tower.vision_tower.vision_model.{name}": x for name, x in inner.items() if not name.startswith(dropped)}
    return found


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], *, as_bin: bool = False) -> None:
    """Two shards and their index."""
    stem, end = ("pytorch_model", "bin") if as_bin else ("model", "safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"{stem}-{i:05d}-of-00002.{end}"
        weight_map |= dict.fromkeys(part, shard)
        content = {name: tensors[name].contiguous() for name in part}
        torch.save(content, folder / shard) if as_bin else save_file(content, folder / shard, metadata={"format": "pt"})
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_original(folder: Path, parts: Parts, whole_tower: nn.Module, *, with_tower: bool = True, as_bin: bool = False) -> Path:
    """A checkpoint at folder/checkpoint that names the tower at folder/tower."""
    tower, checkpoint = folder / "tower", folder / "checkpoint"
    whole_tower.save_pretrained(tower)
    size = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    transformers.CLIPImageProcessor(**size).save_pretrained(tower)
    parts.tokenizer.save_pretrained(checkpoint)
    (checkpoint / "config.json").write_text(json.dumps(parts.raw | {"mm_vision_tower": str(tower)}))
    eos = {"eos_token_id": parts.raw["eos_token_id"], "bos_token_id": parts.raw["bos_token_id"], "do_sample": True, "top_p": 0.8}
    (checkpoint / "generation_config.json").write_text(json.dumps(eos))
    write_tensors(checkpoint, tensors_of(parts, with_tower=with_tower), as_bin=as_bin)
    return checkpoint


def edit_config(checkpoint: Path, **changed: object) -> None:
    """Change keys of a config.json."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


@functools.cache
def parts_of(model_type: str) -> tuple[Parts, nn.Module]:
    """The parts of `published` checkpoints; leave them as they are."""
    return llava_parts() if model_type == "llava" else llava_video_parts()


@functools.cache
def published(model_type: str) -> Path:
    """A checkpoint on disk, written once, removed when Python ends."""
    folder = tempfile.mkdtemp(prefix=f"original_{model_type}_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_original(Path(folder), *parts_of(model_type))


def copy_of(model_type: str, folder: Path) -> Path:
    """A copy of a published checkpoint, to be changed; its tower stays where it is."""
    return Path(shutil.copytree(published(model_type), folder / "checkpoint"))


def loaded(folder: Path, model_type: str, **settings: object) -> Checkpoint:
    """Load a checkpoint as the wrapper of `model_type` does."""
    return load_checkpoint(Settings(pretrained=str(folder), **settings), torch.device("cpu"), {model_type}, f"vlmpruner_{model_type}")
