"""Tiny random checkpoints on disk, with processor and chat template, as a user would download them."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import tiny_models
import torch
import transformers
from original_checkpoints import llava_video_parts, write_original
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
    ProcessorMixin,
)

N_IMAGE_TOKENS = 16  # (56 / 14)^2
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


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


# ---- the other families: models of tiny_models.py, and a tokenizer with their token ids
WORDS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # ids 0 to 3
TURN, TURN_ENDS = "<|im_start|>", "<|im_end|>"
LLAVA_MEDIA = ("<image>", "<video>", "<|vision_start|>", "<|vision_end|>")  # ids 100 to 103, as in tiny_models.py
QWEN_MEDIA = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
INTERNVL_MEDIA = ("<IMG_CONTEXT>", "<video>", "<img>", "</img>")
QWEN_MARKS = ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
SIDE = 56  # pixels of a tile
ASCII = [chr(code) for code in range(33, 127)]


def _ascii_tokenizer(media: tuple[str, ...], **named: str) -> PreTrainedTokenizerFast:
    """One token per printable character, at the ids that tiny_models.py leaves for text; `named` become attributes."""
    # the byte-level alphabet writes a line break and a space as these letters
    tokens = [*WORDS.values(), "Ċ", "Ġ", *ASCII, *media, TURN, TURN_ENDS]
    tokens += [f"<unused{i}>" for i in range(tiny_models.VOCAB - len(tokens))]
    assert tokens[tiny_models.IMAGE] == media[0]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*WORDS.values(), *media, TURN, TURN_ENDS])
    extra = {"extra_special_tokens": named} if named else {}
    # transformers 4.x: the processors of Qwen take a tokenizer of this class only
    strict = media == QWEN_MEDIA and transformers.__version__.startswith("4.")
    return (transformers.Qwen2TokenizerFast if strict else PreTrainedTokenizerFast)(tokenizer_object=core, **WORDS, **extra)


def _chatml(image: str, video: str) -> str:
    """A chat template in the style of the families with a Qwen inside; text and media in the order of the message."""
    parts = (
        f"{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}"
        "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    )
    return (
        f"{{% for message in messages %}}{TURN}{{{{ message['role'] }}}}\n"
        f"{{% for part in message['content'] %}}{parts}{{% endfor %}}{TURN_ENDS}\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{TURN}assistant\n{{% endif %}}"
    )


def _next_processor() -> ProcessorMixin:
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=tiny_models.PINPOINTS
    )
    return transformers.LlavaNextProcessor(
        image_processor=images,
        tokenizer=_ascii_tokenizer(LLAVA_MEDIA),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def _onevision_processor() -> ProcessorMixin:
    size = {"height": SIDE, "width": SIDE}
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=tiny_models.PINPOINTS),
        tokenizer=_ascii_tokenizer(LLAVA_MEDIA),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_chatml("<image>", "<video>"),
    )


def _qwen_processor(name: str, video_name: str, patch: int) -> ProcessorMixin:
    """Images of 4 to 36 merged patches."""
    patches = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    pixels = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 36 * (2 * patch) ** 2}
    return getattr(transformers, name)(
        image_processor=transformers.Qwen2VLImageProcessor(**patches, size=pixels),
        tokenizer=_ascii_tokenizer(QWEN_MEDIA),
        video_processor=getattr(transformers, video_name)(**patches, size=pixels),
        chat_template=_chatml(*QWEN_MARKS),
    )


def _internvl_processor() -> ProcessorMixin:
    context, video, start, end = INTERNVL_MEDIA
    size = {"height": SIDE, "width": SIDE}
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=_ascii_tokenizer(
            INTERNVL_MEDIA, context_image_token=context, video_token=video, start_image_token=start, end_image_token=end
        ),
        video_processor=transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=_chatml(context + "\n", video + "\n"),
    )


PROCESSORS = {
    "internvl": _internvl_processor,
    "llava_next": _next_processor,
    "llava_onevision": _onevision_processor,
    "qwen2_vl": lambda: _qwen_processor("Qwen2VLProcessor", "Qwen2VLVideoProcessor", 14),
    "qwen2_5_vl": lambda: _qwen_processor("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor", 14),
    "qwen3_vl": lambda: _qwen_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor", 16),
}


def write_tiny(family: str, folder: Path) -> Path:
    """The tiny model of a family, with the family's own processor class and a chat template in its style."""
    model, processor = tiny_models.build(family), PROCESSORS[family]()
    ends = "</s>" if family == "llava_next" else TURN_ENDS
    processor.tokenizer.eos_token = ends
    model.generation_config.update(eos_token_id=processor.tokenizer.convert_tokens_to_ids(ends))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@functools.cache
def checkpoint(family: str) -> str:
    """The folder of a family's tiny checkpoint, written once, removed when Python ends."""
    folder = tempfile.mkdtemp(prefix=f"tiny_{family}_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if family == "llava_video":  # exists in the authors' layout only
        return str(write_original(Path(folder), *llava_video_parts()))
    return str(write_tiny(family, Path(folder)))
