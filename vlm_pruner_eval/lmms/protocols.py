"""Whose prompt and image handling a run uses: the checkpoint's own, or those that a paper's numbers were made with.

A protocol changes scores by points, so it is part of every run's identity, and tables never mix protocols.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image
from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from vlm_pruner_eval.errors import ConfigError

# The conversation template "vicuna_v1" that LLaVA-1.5 was evaluated with (arXiv 2310.03744): "user" throughout; "human" is in the
# older template llava_v1. With it, 35 tokens of Llama's tokenizer stand before the image, begin token included, where the release
# of FastV (arXiv 2403.06764) has its image start, too.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QWEN2_VL_PIXELS = 1003520  # 1280 merged tokens of 28 x 28 pixels
NEXT_TILES = 3  # with the base view 4 x 576 = 2304 tokens
LLAVA_NEW_TOKENS = 128  # of LLaVA's scripts for short answers
_PROBE = ("USER: ", "\nWhat?")  # text before and behind an image


def chat_template(messages: Sequence[dict], processor: ProcessorMixin) -> str:
    """Render a chat with the checkpoint's own template."""
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _as_it_is(image: Image.Image, processor: ProcessorMixin) -> Image.Image:
    return image


def _leave(config: PretrainedConfig, processor: ProcessorMixin) -> None:
    """Change nothing."""


@dataclass(frozen=True)
class Protocol:
    """The prompt and the image handling of a run; the default is the checkpoint's own.

    Attributes
    ----------
    render : (messages, processor) -> text
        Prompt of one chat in Hugging Face form.
    view : (image, processor) -> image
        What is done to an RGB image before the checkpoint's processor has it.
    prepare : (config, processor) -> None
        What is changed, once, on a loaded checkpoint.
    fixes
        Settings that belong to the protocol, so that they can't be given beside it.
    new_tokens
        The longest answer, in tokens, where a task names none; None: the family's.
    """

    render: Callable[[Sequence[dict], ProcessorMixin], str] = chat_template
    view: Callable[[Image.Image, ProcessorMixin], Image.Image] = _as_it_is
    prepare: Callable[[PretrainedConfig, ProcessorMixin], None] = _leave
    fixes: Mapping[str, object] = field(default_factory=dict)
    new_tokens: int | None = None


# ---- prompts
def vicuna_v1(messages: Sequence[dict], image_token: str) -> str:
    """Render a chat in the template "vicuna_v1": the system sentence, "USER: ", images and question, "ASSISTANT:".

    Parameters
    ----------
    messages
        In Hugging Face form: role "user" or "assistant", content a list of parts of type "image" or "text".

    Raises
    ------
    ValueError
        A role or a part that the template has no place for.
    """
    rendered = VICUNA_SYSTEM + " "
    for message in messages:
        text = _text_of(message["content"], image_token)
        if message["role"] == "user":
            rendered += f"USER: {text} "
        elif message["role"] == "assistant":
            rendered += f"ASSISTANT: {text}</s>"
        else:
            raise ValueError(f"protocol=paper: got a message of role {message['role']!r}, expected user or assistant.")
    return rendered + "ASSISTANT:"


def _text_of(parts: Sequence[dict], image_token: str) -> str:
    """Images first, as LLaVA's evaluation scripts have them, then the text."""
    unknown = {part["type"] for part in parts} - {"image", "text"}
    if unknown:
        raise ValueError(f"protocol=paper: got a part of type {sorted(unknown)[0]!r}, expected image or text.")
    n_images = sum(part["type"] == "image" for part in parts)
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return f"{image_token}\n" * n_images + "\n".join(texts).strip()


def _vicuna(messages: Sequence[dict], processor: ProcessorMixin) -> str:
    return vicuna_v1(messages, processor.image_token)


def splits_like_llava(tokenizer: PreTrainedTokenizerBase, image_token: str) -> bool:
    """Tell if text around an image becomes the tokens of LLaVA, which cuts a prompt at its images and tokenizes the pieces apart."""
    before, behind = (tokenizer(piece).input_ids for piece in _PROBE)
    if behind[:1] == [tokenizer.bos_token_id]:
        behind = behind[1:]
    return tokenizer(image_token.join(_PROBE)).input_ids == [*before, tokenizer.convert_tokens_to_ids(image_token), *behind]


def check_split(config: PretrainedConfig, processor: ProcessorMixin) -> None:
    """Refuse a checkpoint whose tokenizer loses or adds a token behind an image.

    Raises
    ------
    ConfigError
        Text behind an image is split unlike LLaVA's. transformers 5 can save such a tokenizer.json of a Llama.
    """
    if not splits_like_llava(processor.tokenizer, processor.image_token):
        raise ConfigError(
            "protocol: got 'paper' for a checkpoint whose tokenizer splits the text behind an image unlike LLaVA, which tokenizes the "
            "pieces of a prompt apart; use the tokenizer files as published under llava-hf/, a checkpoint in the original format, or "
            "protocol=hf."
        )


# ---- images
def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Pad an RGB image to a square with the processor's mean colour, the image in the middle (LLaVA's ``image_aspect_ratio: pad``).

    Parameters
    ----------
    mean
        Mean of each channel in [0, 1], as in the image processor's ``image_mean``.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def _padded(image: Image.Image, processor: ProcessorMixin) -> Image.Image:
    return pad_to_square(image, processor.image_processor.image_mean)


def at_most_tiles(n_tiles: int, config: PretrainedConfig, processor: ProcessorMixin) -> None:
    """Leave LLaVA-NeXT the shapes of at most `n_tiles` tiles.

    Three is how we read "max pixels 1344 x 336, at most 2304 tokens": with the base view at most 4 x 576 patch tokens an image,
    newline tokens on top. Two is the reading with newline tokens among them. Model and processor each hold the list of shapes,
    and must agree on it.

    Paper: arXiv 2512.02700, experimental settings of LLaVA-NeXT.

    Raises
    ------
    ConfigError
        A language model other than Vicuna's, or a checkpoint that has no such shape.
    """
    language_model = config.get_text_config().model_type
    if language_model != "llama":
        raise ConfigError(
            f"protocol: got 'paper' for a LLaVA-NeXT around {language_model!r}, expected one around Vicuna ('llama'), whose conversation "
            "template the protocol has; use protocol=hf, or llava-v1.6-vicuna."
        )
    side = config.vision_config.image_size
    shapes = [list(shape) for shape in config.image_grid_pinpoints if (shape[0] // side) * (shape[1] // side) <= n_tiles]
    if not shapes:
        raise ConfigError(
            f"protocol: got 'paper' for a checkpoint whose image_grid_pinpoints are {config.image_grid_pinpoints}, expected one or more of "
            f"at most {n_tiles} tiles of {side} x {side} pixels; use protocol=hf."
        )
    config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = shapes


def _prepare_next(n_tiles: int, config: PretrainedConfig, processor: ProcessorMixin) -> None:
    at_most_tiles(n_tiles, config, processor)
    check_split(config, processor)


HF = Protocol()
# image_aspect_ratio: pad; arXiv 2310.03744
LLAVA_PAPER = Protocol(render=_vicuna, view=_padded, prepare=check_split, new_tokens=LLAVA_NEW_TOKENS)
LLAVA_NEXT_PAPER = Protocol(render=_vicuna, prepare=functools.partial(_prepare_next, NEXT_TILES), new_tokens=LLAVA_NEW_TOKENS)
LLAVA_NEXT_TWO_TILES = dataclasses.replace(LLAVA_NEXT_PAPER, prepare=functools.partial(_prepare_next, NEXT_TILES - 1))
# every image about 1280 tokens, whatever its size; the checkpoint's own template
QWEN2_VL_PAPER = Protocol(fixes={"min_pixels": QWEN2_VL_PIXELS, "max_pixels": QWEN2_VL_PIXELS})


def with_paper(paper: Protocol) -> dict[str, Protocol]:
    """The protocols of a family whose numbers in the paper can be made again."""
    return {"hf": HF, "paper": paper}
