"""A tiny CLIP checkpoint with a tokenizer of one token per character."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_processors import ASCII
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = ["Ċ", "Ġ", *ASCII, START, END]  # the end token has the largest id
WIDTH, SPACE = 12, 8


def clip_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(TOKENS)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.add_special_tokens([START, END])
    ids = [(token, TOKENS.index(token)) for token in (START, END)]
    core.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=START, eos_token=END, pad_token=END, model_max_length=77)


def clip_model(end: int) -> CLIPModel:
    """A model whose configuration names `end` as the end token."""
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(TOKENS), "hidden_size": 16, "intermediate_size": 24, "eos_token_id": end, "bos_token_id": len(TOKENS) - 2}
    vision = {"hidden_size": WIDTH, "intermediate_size": 24, "image_size": 28, "patch_size": 14}
    torch.manual_seed(5)
    model = CLIPModel(CLIPConfig(text_config=text | layers, vision_config=vision | layers, projection_dim=SPACE)).eval()
    for parameter in model.parameters():  # norms and biases are not 1 and 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def clip_checkpoint(folder: Path, *, end: int = len(TOKENS) - 1) -> CLIPModel:
    """Save a checkpoint with its tokenizer to `folder`, and return its model."""
    model = clip_model(end)
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return model
