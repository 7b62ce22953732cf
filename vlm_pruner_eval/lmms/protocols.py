"""Whose prompt and image handling a run uses: the checkpoint's own, or those that a paper's numbers were made with.

A protocol changes scores by points, so it is part of every run's identity, and tables never mix protocols.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from transformers import ProcessorMixin

# The conversation template "vicuna_v1" that LLaVA-1.5 was trained and evaluated with (arXiv 2310.03744). With it, 35 tokens
# stand before the image, begin token included.
VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


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


def render(
    protocol: str, messages: Sequence[dict], images: Sequence[Image.Image], processor: ProcessorMixin
) -> tuple[str, list[Image.Image]]:
    """Prompt text and images of one request under a protocol.

    Parameters
    ----------
    protocol
        "hf": the checkpoint's chat template, images as they are; "paper": vicuna_v1 and square padding (LLaVA-1.5).
    """
    if protocol == "hf":
        return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), list(images)
    mean = processor.image_processor.image_mean
    return vicuna_v1(messages, processor.image_token), [pad_to_square(image, mean) for image in images]
