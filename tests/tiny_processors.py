"""Processors of the tiny models: each family's own class, a tokenizer with one token per character, a chat template in its style."""

from __future__ import annotations

from collections.abc import Callable

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

VOCAB, IMAGE, VIDEO, VISION_START, VISION_END, PAD = 120, 100, 101, 102, 103, 0
PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168]]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

WORDS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # ids 0 to 3
TURN, TURN_ENDS = "<|im_start|>", "<|im_end|>"
LLAVA_MEDIA = ("<image>", "<video>", "<|vision_start|>", "<|vision_end|>")
QWEN_MEDIA = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
GLM_MEDIA = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>")
INTERNVL_MEDIA = ("<IMG_CONTEXT>", "<video>", "<img>", "</img>")
QWEN_MARKS = ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
SIDE = 56  # pixels of a tile
ASCII = [chr(code) for code in range(33, 127)]


def ascii_tokenizer(media: tuple[str, ...], **named: str) -> PreTrainedTokenizerFast:
    """One token per printable character, at the ids that are left for text; `named` become attributes."""
    # the byte-level alphabet writes a line break and a space as these letters
    tokens = [*WORDS.values(), "Ċ", "Ġ", *ASCII, *media, TURN, TURN_ENDS]
    tokens += [f"<unused{i}>" for i in range(VOCAB - len(tokens))]
    assert tokens[IMAGE] == media[0]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*WORDS.values(), *media, TURN, TURN_ENDS])
    extra = {"extra_special_tokens": named} if named else {}
    # transformers 4.x: the processors of Qwen take a tokenizer of this class only
    strict = media == QWEN_MEDIA and transformers.__version__.startswith("4.")
    return (transformers.Qwen2TokenizerFast if strict else PreTrainedTokenizerFast)(tokenizer_object=core, **WORDS, **extra)


def chatml(image: str, video: str) -> str:
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


def llava_processor() -> ProcessorMixin:
    """Images stretched to one square tile."""
    size = {"height": SIDE, "width": SIDE}
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size=size, do_center_crop=False),
        tokenizer=ascii_tokenizer(LLAVA_MEDIA),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def next_processor() -> ProcessorMixin:
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    return transformers.LlavaNextProcessor(
        image_processor=images,
        tokenizer=ascii_tokenizer(LLAVA_MEDIA),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def onevision_processor() -> ProcessorMixin:
    size = {"height": SIDE, "width": SIDE}
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer=ascii_tokenizer(LLAVA_MEDIA),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chatml("<image>", "<video>"),
    )


def qwen_processor(name: str, video_name: str, patch: int) -> Callable[[], ProcessorMixin]:
    """Return a function that makes a processor, whose images have 4 to 36 merged patches."""
    patches = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2}
    pixels = {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 36 * (2 * patch) ** 2}
    return lambda: getattr(transformers, name)(
        image_processor=transformers.Qwen2VLImageProcessor(**patches, size=pixels),
        tokenizer=ascii_tokenizer(QWEN_MEDIA),
        video_processor=getattr(transformers, video_name)(**patches, size=pixels),
        chat_template=chatml(*QWEN_MARKS),
    )


def glm_processor() -> ProcessorMixin:
    """Images of 4 to 36 merged patches; the bounds count an image as the two frames that are made of it."""
    pixels = {"shortest_edge": 2 * 4 * 28**2, "longest_edge": 2 * 36 * 28**2}
    image, video, start, end = GLM_MEDIA
    return transformers.Glm46VProcessor(
        image_processor=transformers.Glm46VImageProcessor(size=pixels),
        tokenizer=ascii_tokenizer(GLM_MEDIA),
        video_processor=transformers.Glm46VVideoProcessor(size=pixels),
        chat_template=chatml(f"{start}{image}{end}", video),
    )


def internvl_processor() -> ProcessorMixin:
    context, video, start, end = INTERNVL_MEDIA
    size = {"height": SIDE, "width": SIDE}
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=ascii_tokenizer(
            INTERNVL_MEDIA, context_image_token=context, video_token=video, start_image_token=start, end_image_token=end
        ),
        video_processor=transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=chatml(context + "\n", video + "\n"),
    )
