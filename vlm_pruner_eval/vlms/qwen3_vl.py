"""Qwen3-VL: the grids of Qwen2-VL, and DeepStack: visual features are added again after the first layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from vlm_pruner_eval.vlms.family import NO_SCRIPT, FamilySpec, InstancePatch, SeenTokens
from vlm_pruner_eval.vlms.qwen2_vl import QwenVL

if TYPE_CHECKING:
    from torch import Tensor, nn


class Qwen3VL(QwenVL):
    """``Qwen3VLForConditionalGeneration``, dense: a cut among the DeepStack layers takes the features of the kept tokens along.

    Mixture-of-experts checkpoints are of another model type.
    """

    spec: ClassVar[FamilySpec] = FamilySpec(
        model_id="vlmpruner_qwen3_vl",
        model_types=frozenset({"qwen3_vl"}),
        stock_prompt="qwen3_vl",
        media=("image", "video"),
        bounds_pixels=True,
        new_tokens=128,
        why_no_paper=NO_SCRIPT,
        mrope=True,
    )

    def patches(self, core: nn.Module) -> list[InstancePatch]:
        """The method of the language model that adds the features."""
        return [(core.language_model, "_deepstack_process", add_to_kept)]


def add_to_kept(original: Callable[..., Any], cut: SeenTokens | None, hidden: Tensor, visual: Tensor, features: Tensor) -> Tensor:
    """Add DeepStack features [n_visual, D] to the visual tokens that `hidden` [B, L', D] still holds.

    Parameters
    ----------
    visual : Tensor [B, L] bool
        The visual tokens of the whole prompt; `features` come in their order.
    """
    if cut is None:
        return original(hidden, visual, features)
    index, valid = cut.on(visual.device)
    row_of = (visual.flatten().cumsum(0) - 1).view_as(visual).gather(1, index)
    kept = visual.gather(1, index) & valid
    return original(hidden, kept, features[row_of[kept].to(features.device)])
