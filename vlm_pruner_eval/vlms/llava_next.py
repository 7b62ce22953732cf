"""LLaVA-NeXT (LLaVA-1.6): a base view, then a grid of tiles with one newline token per row; both are views of one image."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.vlms.family import HF, FamilySpec, FeatureCall, Layout, PromptProtocol
from vlm_pruner_eval.vlms.parts import vicuna
from vlm_pruner_eval.vlms.parts.anyres import Anyres, anyres_layout

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, ProcessorMixin

RELEASE_STRIP = 24  # columns that the release of VLM-Pruner takes for granted
TILES = 3  # of the paper's protocol: with the base view 4 x 576 = 2304 tokens


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


def _prepare(n_tiles: int, config: PretrainedConfig, processor: ProcessorMixin) -> None:
    at_most_tiles(n_tiles, config, processor)
    vicuna.check_split(config, processor)


def _paper(n_tiles: int) -> PromptProtocol:
    prepare = functools.partial(_prepare, n_tiles)
    return PromptProtocol(render=vicuna.render, prepare=prepare, new_tokens=vicuna.NEW_TOKENS)


class LlavaNext(Anyres):
    """``LlavaNextForConditionalGeneration``: frame 0 is the base view, frame 1 the unpadded grid of tiles."""

    spec: ClassVar[FamilySpec] = FamilySpec(
        model_id="vlmpruner_llava_next",
        model_types=frozenset({"llava_next"}),
        stock_prompt="llava_hf",
        tiled=True,
        protocols={"hf": HF, "paper": _paper(TILES), "paper_two_tiles": _paper(TILES - 1)},
    )

    def layouts(self, core: nn.Module, kind: str, call: FeatureCall) -> list[Layout]:
        """Coordinates packed by the model's own function, so that they can't drift from the features."""
        from vlm_pruner_eval.device_copy import to_host

        strategy = call.get("vision_feature_select_strategy") or core.config.vision_feature_select_strategy
        return [anyres_layout(core, size, vision_feature_select_strategy=strategy) for size in to_host(*call["image_sizes"])]

    def release_layout(self, layout: Layout) -> Layout:
        """Every tile and newline token on one strip of 24 columns, as the release has it."""
        import torch

        cell = torch.arange(layout.n_tokens)
        strip = torch.stack([torch.zeros_like(cell), cell // RELEASE_STRIP, cell % RELEASE_STRIP], -1)
        return Layout(strip, (RELEASE_STRIP, RELEASE_STRIP))
