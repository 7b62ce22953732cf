"""The vision tower of the LLaVAs: CLIP or SigLIP, whose patches a projector takes to the language model one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from vlm_pruner_eval.vlms.parts.towers import GridTower

NO_CLS = "a tower without a CLS token; the attention that a token receives stands in for the attention of one"


def clip_tower(core: nn.Module, *, is_pooled: bool = False) -> GridTower | None:
    """Describe the tower of a LLaVA; None if its projector reads several layers at a time.

    Parameters
    ----------
    is_pooled
        True if tokens may be made of several patches behind the projector, so that states are taken there.
    """
    from vlm_pruner_eval import hf_compat
    from vlm_pruner_eval.vlms.parts.towers import GridTower

    config = core.config
    if not isinstance(config.vision_feature_layer, int):
        return None
    blocks = hf_compat.tower_blocks(core)
    layer = config.vision_feature_layer  # of the hidden states, which the embeddings begin: -1 is the output of the last layer
    has_cls = config.vision_config.model_type == "clip_vision_model"
    return GridTower(
        blocks,
        reads=layer if layer < 0 else layer - 1 - len(blocks),
        adapted=None if has_cls else NO_CLS,
        projector=None if is_pooled else core.multi_modal_projector,
        side=config.vision_config.image_size // config.vision_config.patch_size,
        has_cls=has_cls,
    )
