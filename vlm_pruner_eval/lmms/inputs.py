"""From prompts to tensors: one call of the checkpoint's processor, in the form that all supported versions take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import BatchFeature, ProcessorMixin

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.hf_compat import TAKES_FRAME_RATES, set_pixel_bounds
from vlm_pruner_eval.lmms.prompts import Prompt
from vlm_pruner_eval.lmms.settings import Settings
from vlm_pruner_eval.lmms.videos import Video

if TYPE_CHECKING:
    from vlm_pruner_eval.lmms.downsampling import Plan


@dataclass(frozen=True)
class Prepared:
    """A batch of prompts ready for the model.

    Attributes
    ----------
    inputs
        What ``model.generate`` takes, on the CPU until it is asked; it leaves these tensors as they are, so that several methods may
        read them.
    plans
        How small each prompt's images were made before the model; empty where they were left alone.
    n_prompt, n_visual
        Tokens of each prompt without padding, and those of them that are visual.
    n_positions
        Positions that each prompt takes: with multi-dimensional ones, an image takes as many as its longer side has tokens.
    """

    prompts: list[Prompt]
    sample_ids: list[str]
    inputs: BatchFeature
    plans: list[Plan]
    n_prompt: list[int]
    n_visual: list[int]
    n_positions: list[int]

    @property
    def told(self) -> dict[str, list[str]]:
        """Arguments of `prune` that tell methods of each prompt: its name, and its question."""
        return {"sample_ids": self.sample_ids, "questions": [prompt.asked for prompt in self.prompts]}

    def repeated(self, times: int) -> Prepared:
        """The same prompts again and again, as `repeated` has their tensors."""
        lists = ("prompts", "sample_ids", "plans", "n_prompt", "n_visual", "n_positions")
        return dataclasses.replace(self, **{name: getattr(self, name) * times for name in lists})


def bound_pixels(processor: ProcessorMixin, settings: Settings) -> None:
    """Set the bounds on the size of images and of frames that were asked for, on a processor of Qwen's kind.

    Raises
    ------
    ConfigError
        A lower bound above the upper one, where one of them is the checkpoint's.
    """
    if settings.min_pixels is None and settings.max_pixels is None:
        return
    for part in (processor.image_processor, processor.video_processor):
        if _is_qwen3(part):
            continue  # see `_videos`
        least, most = _bounds(part, settings)
        if least > most:
            raise ConfigError(
                f"min_pixels and max_pixels: got {settings.min_pixels} and {settings.max_pixels}, which beside the checkpoint's own bounds "
                f"are {least} and {most}; give both, the smaller one as min_pixels."
            )
        set_pixel_bounds(part, least, most)


def _bounds(part: object, settings: Settings, n_frames: int = 1) -> tuple[int, int]:
    least, most, own = settings.min_pixels, settings.max_pixels, part.size
    return own["shortest_edge"] if least is None else least * n_frames, own["longest_edge"] if most is None else most * n_frames


def _is_qwen3(part: object) -> bool:
    """Tell if this is Qwen3-VL's video processor, whose bounds are for all frames of a video together, not for each."""
    return type(part).__name__.startswith("Qwen3VLVideo")


def build_inputs(processor: ProcessorMixin, batch: Sequence[Prompt], settings: Settings) -> BatchFeature:
    """Tokens and pixels of one batch of prompts, padded on the left, on the CPU as the processor makes them.

    Raises
    ------
    ValueError
        A video that can't be decoded, or videos whose frame counts the family can't hold in one batch.
    """
    for prompt in batch:
        _check_placeholders(prompt, processor)
    # a list per prompt: LLaVA-OneVision cuts a prompt's only image into tiles, and leaves several images whole
    images = [prompt.images for prompt in batch if prompt.images]
    videos = [video for prompt in batch for video in prompt.videos]
    return processor(
        text=[_unframed(prompt.text, processor) if prompt.videos else prompt.text for prompt in batch],
        images=images or None,
        **(_videos(processor, videos, settings) if videos else {}),
        padding=True,
        return_tensors="pt",
    )


def _check_placeholders(prompt: Prompt, processor: ProcessorMixin) -> None:
    """Raise a ValueError if the text has other placeholders than there are images and videos, as one in a question makes it."""
    for kind, media in (("image", prompt.images), ("video", prompt.videos)):
        token = getattr(processor, f"{kind}_token", None)
        n_found = prompt.text.count(token) if token else len(media)
        if n_found != len(media):
            raise ValueError(
                f"{prompt.request.sample_id}: got {n_found} placeholders {token} for {len(media)} {kind}(s), expected one for each; if the "
                "question's own text has the placeholder in it, take it out of the document."
            )


def move_inputs(inputs: BatchFeature, device: torch.device, dtype: torch.dtype) -> BatchFeature:
    """Put a batch on the device, in place: what is there already is left as it is.

    Parameters
    ----------
    dtype
        Of pixels; grids, sizes and times keep theirs.
    """
    inputs = inputs.to(device)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            inputs[name] = inputs[name].to(dtype)
    return inputs


def _unframed(text: str, processor: ProcessorMixin) -> str:
    """Qwen3-VL's processor frames every timed picture of a video itself; newer versions leave the template's frame around all."""
    if not _is_qwen3(processor.video_processor):
        return text
    return text.replace(f"{processor.vision_start_token}{processor.video_token}{processor.vision_end_token}", processor.video_token)


def _videos(processor: ProcessorMixin, videos: Sequence[Video], settings: Settings) -> dict[str, object]:
    part = processor.video_processor
    patch = getattr(part, "temporal_patch_size", None)
    if patch is not None:  # Qwen3-VL's processor can't fill up a lone frame, as it does an odd one
        videos = [video if video.n_frames > 1 else dataclasses.replace(video, indices=video.indices * patch) for video in videos]
    counts = sorted({video.n_frames for video in videos})
    is_bounded = _is_qwen3(part) and (settings.min_pixels, settings.max_pixels) != (None, None)
    if len(counts) > 1 and (patch is None or is_bounded):
        raise ValueError(
            f"got videos of {counts[0]} and {counts[-1]} frames in one prompt, expected equally many in each for this model"
            + (" with min_pixels or max_pixels" if is_bounded else "")
            + f"; max_frames_num={counts[0]} makes them equal."
        )
    arguments = {"do_sample_frames": False, "video_metadata": [video.metadata() for video in videos]}
    if hasattr(part, "cap_pixels_per_frame"):
        part.cap_pixels_per_frame = False  # its default changes between releases of transformers
    if is_bounded:
        least, most = _bounds(part, settings, counts[0])
        arguments["size"] = {"shortest_edge": least, "longest_edge": most}
    if TAKES_FRAME_RATES and "second_per_grid_ts" in processor.model_input_names:
        arguments["fps"] = [video.sampled_fps for video in videos]
    return {"videos": [video.frames() for video in videos], "videos_kwargs": arguments}
