"""Prompt and image handling of LLaVA-1.5 and LLaVA-NeXT around Vicuna, as their papers' numbers were made with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_pruner_eval.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PretrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

# The conversation template "vicuna_v1" that LLaVA-1.5 was evaluated with (arXiv 2310.03744): "user" throughout; "human" is in the
# older template llava_v1. With it, 35 tokens of Llama's tokenizer stand before the image, begin token included, where the release
# of FastV (arXiv 2403.06764) has its image start, too.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
NEW_TOKENS = 128  # of LLaVA's scripts for short answers
_PROBE = ("USER: ", "\nWhat?")  # text before and behind an image


def vicuna_v1(messages: Sequence[dict[str, Any]], image_token: str) -> str:
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


def _text_of(parts: Sequence[dict[str, Any]], image_token: str) -> str:
    """Images first, as LLaVA's evaluation scripts have them, then the text."""
    unknown = {part["type"] for part in parts} - {"image", "text"}
    if unknown:
        raise ValueError(f"protocol=paper: got a part of type {sorted(unknown)[0]!r}, expected image or text.")
    n_images = [part["type"] for part in parts].count("image")
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return f"{image_token}\n" * n_images + "\n".join(texts).strip()


def render(messages: Sequence[dict[str, Any]], processor: ProcessorMixin) -> str:
    """Render a chat in "vicuna_v1" with the processor's own placeholder."""
    return vicuna_v1(messages, processor.image_token)


def splits_like_llava(tokenizer: PreTrainedTokenizerBase, image_token: str) -> bool:
    """Tell if text around an image becomes the tokens of LLaVA, which cuts a prompt at its images and tokenizes the pieces apart."""
    before, behind = (tokenizer(piece).input_ids for piece in _PROBE)
    if behind[:1] == [tokenizer.bos_token_id]:
        behind = behind[1:]
    found: list[int] = tokenizer(image_token.join(_PROBE)).input_ids
    return found == [*before, tokenizer.convert_tokens_to_ids(image_token), *behind]


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


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """Pad an RGB image to a square with the processor's mean colour, the image in the middle (LLaVA's ``image_aspect_ratio: pad``).

    Parameters
    ----------
    mean
        Mean of each channel in [0, 1], as in the image processor's ``image_mean``.
    """
    from PIL import Image

    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def padded(image: Image.Image, processor: ProcessorMixin) -> Image.Image:
    """Pad an image to a square with the checkpoint's own mean colour."""
    return pad_to_square(image, processor.image_processor.image_mean)
