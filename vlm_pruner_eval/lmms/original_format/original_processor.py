"""Tokenizer, chat template and image processing of checkpoints in LLaVA's original format, as processors of transformers."""

from __future__ import annotations

from transformers import (
    AddedToken,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.lmms.original_format.llava_video_model import LlavaVideoProcessor
from vlm_pruner_eval.lmms.original_format.original_weights import Source, first_line
from vlm_pruner_eval.vlms.llava_video import pooled_side
from vlm_pruner_eval.vlms.parts.vicuna import VICUNA_SYSTEM, splits_like_llava

IMAGE, VIDEO = "<image>", "<video>"
PLACEHOLDERS = {"llava": (IMAGE,), "llava_video": (IMAGE, VIDEO)}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

_TEXTS = (
    "{%- if message['content'] is string %}{%- set text = message['content'] %}{%- else %}"
    "{%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\\n') %}{%- endif %}"
)
# conversation "vicuna_v1" of LLaVA-1.5, as `vicuna.vicuna_v1` has it: images first, each on a line of its own
VICUNA_TEMPLATE = (
    f"{{{{- {(VICUNA_SYSTEM + ' ')!r} }}}}"
    "{%- for message in messages %}" + _TEXTS + "{%- set text = text | trim %}{%- if message['content'] is not string %}"
    "{%- set n_images = message['content'] | selectattr('type', 'equalto', 'image') | list | length %}"
    "{%- set text = '<image>\\n' * n_images + text %}{%- endif %}"
    "{%- if message['role'] == 'user' %}{{- 'USER: ' + text + ' ' }}"
    "{%- elif message['role'] == 'assistant' %}{{- 'ASSISTANT: ' + text + '</s>' }}"
    "{%- else %}{{- raise_exception('got a message of role ' + message['role'] + ', expected user or assistant') }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}"
)
# conversation "qwen_1_5" of LLaVA-Video: images and videos first, each on a line of its own
CHATML_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}" + _TEXTS + "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is not string %}{%- for part in message['content'] %}"
    "{%- if part['type'] in ('image', 'video') %}{{- '<' + part['type'] + '>\\n' }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- text + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def load_tokenizer(weights: Source, text: PretrainedConfig, model_type: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with placeholder tokens for images and videos added.

    The original cuts a prompt at its images and tokenizes the pieces apart from each other; with ``legacy``, Llama's tokenizer
    begins a piece behind a special token as it begins a text, which comes to the same. That is checked here.

    Raises
    ------
    ConfigError
        A tokenizer that can't be read, or one that splits text around an image unlike the original.
    """
    if not any(weights.file(name) for name in TOKENIZER_FILES):
        raise ConfigError(f"pretrained: {weights.label} holds no tokenizer, expected {' or '.join(TOKENIZER_FILES)} beside the weights.")
    try:
        legacy = {"legacy": True} if model_type == "llava" else {}
        tokenizer = AutoTokenizer.from_pretrained(weights.place, revision=weights.revision, config=text, trust_remote_code=False, **legacy)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"pretrained: the tokenizer of {weights.label} can't be read ({first_line(error)}). "
            "A tokenizer.model needs the packages sentencepiece and protobuf in versions that go together."
        ) from error
    tokens = [AddedToken(token, special=True, normalized=False) for token in PLACEHOLDERS[model_type]]
    tokenizer.add_tokens(tokens, special_tokens=True)
    if not splits_like_llava(tokenizer, IMAGE):
        raise ConfigError(
            f"pretrained: the tokenizer of {weights.label} splits the text behind an image unlike LLaVA, which tokenizes the pieces of a "
            "prompt apart; remove tokenizer.json from the checkpoint, so that its tokenizer.model is read."
        )
    return tokenizer


def build(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, tower: str) -> ProcessorMixin:
    """The processor of a converted checkpoint.

    Parameters
    ----------
    tower
        Folder or hub id of the vision tower; LLaVA-1.5 prepares images as its preprocessor_config.json says.
    """
    return _llava(config, tokenizer, tower) if config.model_type == "llava" else _llava_video(config, tokenizer)


def _llava(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, tower: str) -> ProcessorMixin:
    try:
        images = CLIPImageProcessor.from_pretrained(tower)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"mm_vision_tower: {tower} has no image processor that can be read, expected a preprocessor_config.json beside its config.json."
        ) from error
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_TEMPLATE,
    )


def _llava_video(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """Make the processor as the original sets it in code: tiles and frames resized (bicubic, not cropped), values in [-1, 1].

    The original resizes with Pillow, some versions of transformers with torchvision, whose pixels can differ by a rounding step.
    """
    side = config.vision_config.image_size
    values = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
    processor = LlavaVideoProcessor(
        image_processor=LlavaOnevisionImageProcessor(image_grid_pinpoints=config.image_grid_pinpoints, **values),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**values),
        num_image_tokens=(side // config.vision_config.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=CHATML_TEMPLATE,
    )
    processor.frame_side = pooled_side(config)
    return processor
