"""Images made smaller before the model (method=downsample), and the proof that they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image
from transformers import ProcessorMixin

from vlm_pruner_eval.budget import parse_rate
from vlm_pruner_eval.errors import ConfigError, PruningError
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.lmms.prompts import Prompt
from vlm_pruner_eval.pruners import Pruner
from vlm_pruner_eval.pruners.downsample import smaller_grid
from vlm_pruner_eval.pruners.none import NoPruning


@dataclass(frozen=True)
class Plan:
    """Visual tokens of one prompt: at full size, the most that were asked for, and of the images as they are sent."""

    n_full: int
    n_asked: int
    n_sent: int


def hooked(pruner: Pruner, processor: ProcessorMixin, model_id: str) -> Pruner:
    """What is left for the hook to do: the method itself, or nothing where it makes images smaller.

    Raises
    ------
    ConfigError
        A family whose images make the same tokens, or tiles, whatever their size.
    """
    if not pruner.before_model:
        return pruner
    if not hasattr(processor.image_processor, "merge_size"):
        raise ConfigError(
            f"method: got {pruner.name} for {model_id}, whose images make whole views or tiles of tokens, so that their size can't set "
            "the count; expected a family of dynamic resolution (vlmpruner_qwen2_vl, vlmpruner_qwen2_5_vl, vlmpruner_qwen3_vl). "
            "method=pool makes an image coarser on any family."
        )
    return NoPruning()


@contextmanager
def sized(batch: Sequence[Prompt], processor: ProcessorMixin, pruner: Pruner) -> Iterator[tuple[list[Prompt], list[Plan]]]:
    """The prompts with their images as the method wants them, and how small these are: no plans where it leaves them alone.

    While the context is open, the processor does not make small images larger again.

    Raises
    ------
    ValueError
        A prompt with videos that should be made smaller.
    """
    if not pruner.before_model or parse_rate(pruner.pruning_rate) == 0:
        yield list(batch), []
        return
    made = [_smaller(prompt, processor, pruner) for prompt in batch]
    part = processor.image_processor
    before = {name: getattr(part, name) for name in ("size", "min_pixels") if getattr(part, name, None) is not None}
    one_token = (part.patch_size * part.merge_size) ** 2
    part.size = {"shortest_edge": one_token, "longest_edge": part.size["longest_edge"]}
    if "min_pixels" in before:  # kept twice by some versions of transformers
        part.min_pixels = one_token
    try:
        yield [prompt for prompt, _ in made], [plan for _, plan in made]
    finally:
        for name, value in before.items():
            setattr(part, name, value)


def _smaller(prompt: Prompt, processor: ProcessorMixin, pruner: Pruner) -> tuple[Prompt, Plan]:
    """Each image resized to at most the tokens that the rate leaves of it, straight from its own pixels."""
    if prompt.videos:
        raise ValueError(
            f"got {len(prompt.videos)} video(s) with method={pruner.name}, expected images only; method=pool makes videos coarser."
        )
    part, images, total = processor.image_processor, [], Plan(0, 0, 0)
    side = part.patch_size * part.merge_size  # pixels of a token
    for image in prompt.images:
        n_full = part.get_number_of_image_patches(image.height, image.width, {}) // part.merge_size**2
        n_asked = pruner.default_keep(n_full)
        if n_asked < n_full:
            rows, cols = smaller_grid(image.height, image.width, n_asked)
        else:  # too few tokens for the rate to remove one
            _, *patches = part(images=[image], return_tensors="pt")["image_grid_thw"][0].tolist()
            rows, cols = (n // part.merge_size for n in patches)
        images.append(image.resize((cols * side, rows * side), Image.Resampling(part.resample)))
        total = Plan(total.n_full + n_full, total.n_asked + n_asked, total.n_sent + rows * cols)
    return dataclasses.replace(prompt, images=images), total


def as_planned(records: Sequence[SampleRecord], plans: Sequence[Plan], sample_ids: Sequence[str]) -> list[SampleRecord]:
    """The records with what was asked for and the tokens at full size, after holding what the hook counted against the plans.

    Without plans the records as they are.

    Raises
    ------
    PruningError
        The model saw another number of tokens than the resized images make, or images did not get smaller.
    """
    copies, found = len(records) // max(1, len(plans)), []
    if not plans:
        return list(records)
    for i, record in enumerate(records):
        plan, sample_id = plans[i // copies], sample_ids[i // copies]
        if record.n_visual != plan.n_sent or plan.n_sent > plan.n_asked or (plan.n_sent == plan.n_full) != (plan.n_asked == plan.n_full):
            raise PruningError(
                f"{sample_id}: the model saw {record.n_visual} visual tokens, expected {plan.n_sent}: at most {plan.n_asked} of the "
                f"{plan.n_full} that the images make at full size; something else changed their size."
            )
        found.append(dataclasses.replace(record, n_asked=plan.n_asked, n_full=plan.n_full))
    return found
