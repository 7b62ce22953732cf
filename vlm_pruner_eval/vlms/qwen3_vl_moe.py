"""Qwen3-VL (arXiv 2511.21631) with a mixture of experts: the layouts and DeepStack of the dense model, other feed-forward layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vlm_pruner_eval.vlms.family import NO_SCRIPT, FamilySpec
from vlm_pruner_eval.vlms.qwen3_vl import Qwen3VL

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Qwen3VLMoe(Qwen3VL):
    """``Qwen3VLMoeForConditionalGeneration``: every decoder layer attends to all tokens, and a router sends each token to its experts.

    A token is routed by its own state alone, so that others may leave the sequence. Sums over a batch are rounded in another order than
    those over a row, as in a dense model; where two experts are within that rounding of each other, a token may change experts with it.
    In the published configurations `intermediate_size`, which FLOPs are counted from, is the width of a token's experts together.
    """

    spec: ClassVar[FamilySpec] = FamilySpec(
        model_id="vlmpruner_qwen3_vl_moe",
        model_types=frozenset({"qwen3_vl_moe"}),
        stock_prompt="qwen3_vl",
        media=("image", "video"),
        bounds_pixels=True,
        new_tokens=128,
        why_no_paper=NO_SCRIPT,
        mrope=True,
    )

    def refuse(self, config: PretrainedConfig) -> str | None:
        """Refuse a configuration that adds the loss of unbalanced experts, which takes the routes of all layers to be equally long."""
        if getattr(config.text_config, "output_router_logits", False):
            return (
                "got output_router_logits=True in the text configuration, expected False: the loss that balances experts can't be taken "
                "over layers of different lengths. Set it to False; routing and answers stay as they are."
            )
        return None
