"""Tiny random checkpoints on disk, with processor and chat template, as a user would download them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import tiny_models
import torch
from original_checkpoints import llava_video_parts, write_original
from tiny_processors import TEMPLATE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

N_IMAGE_TOKENS = 16  # (56 / 14)^2
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte: nothing to train, and every text can be written."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=["<image>"], **names)


def write_tiny_llava(folder: Path, *, max_positions: int = 256, n_layers: int = 4, seed: int = 0) -> Path:
    """A LLaVA of random weights with 16 image tokens per image, whose answers depend on the image."""
    tokenizer = _tokenizer()
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14, projection_dim=16
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=SPECIAL.index("<image>"), image_seq_length=N_IMAGE_TOKENS)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                weight.mul_(12 if "projector" in name or "embed_tokens" in name else 6)
    model.generation_config.update(eos_token_id=2, pad_token_id=3, bos_token_id=1)
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_tiny_llama(folder: Path) -> Path:
    """A language model without eyes: not a checkpoint that a LLaVA wrapper may take."""
    tokenizer = _tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


PROCESSORS = {name: tiny.processor for name, tiny in tiny_models.FAMILIES.items() if tiny.processor}


def write_tiny(family: str, folder: Path) -> Path:
    """The tiny model of a family, with the family's own processor class and a chat template in its style."""
    model, processor = tiny_models.build(family), PROCESSORS[family]()
    ends = processor.tokenizer.eos_token = tiny_models.FAMILIES[family].ends
    model.generation_config.update(eos_token_id=processor.tokenizer.convert_tokens_to_ids(ends))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@functools.cache
def checkpoint(family: str) -> str:
    """The folder of a family's tiny checkpoint, written once, removed when Python ends."""
    folder = tempfile.mkdtemp(prefix=f"tiny_{family}_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if family == "llava":
        return str(write_tiny_llava(Path(folder)))
    if family == "llava_video":  # exists in the authors' layout only
        return str(write_original(Path(folder), *llava_video_parts()))
    return str(write_tiny(family, Path(folder)))
