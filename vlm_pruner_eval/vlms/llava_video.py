"""LLaVA-Video (arXiv 2410.02713): LLaVA-OneVision, but a newline token closes every row of every frame of a video.

Its checkpoints exist in the authors' original format only, see `lmms.original_format`, which has its model, too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from vlm_pruner_eval.vlms.family import NO_SCRIPT, FamilySpec, Layout
from vlm_pruner_eval.vlms.llava_onevision import LlavaOnevision

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig


class LlavaVideo(LlavaOnevision):
    """``LlavaVideoForConditionalGeneration``; a video is one scope, its frames one after the other, row-major.

    64 frames, as the authors' own example has it; lmms-eval's llava_vid takes 20 unless told. Their sentence with the times of
    the frames (`add_time_instruction` of llava_vid, off there by default) is not put before the question: the pruning paper
    does not say if its numbers were made with it.
    """

    spec: ClassVar[FamilySpec] = FamilySpec(
        model_id="vlmpruner_llava_video",
        model_types=frozenset({"llava_video"}),
        stock_prompt="llava_vid",
        tiled=True,
        media=("image", "video"),
        frames=64,
        why_no_paper=NO_SCRIPT,
    )

    def video_layout(self, core: nn.Module, n_frames: int) -> Layout:
        """Layout of a video: pooled frames, whose rows each end in a newline token."""
        import torch

        side = pooled_side(core.config)
        cells = Layout.of_frames(side, side, n_frames).coords.view(-1, side, 3)
        newlines = torch.full((len(cells), 1, 3), -1)
        return Layout(torch.cat([cells, newlines], 1).view(-1, 3), (side, side))


def pooled_side(config: PretrainedConfig) -> int:
    """Tokens along one side of a video frame after pooling by 2: of 27 patches, 14 by interpolation and 13 by averages."""
    patches: int = config.vision_config.image_size // config.vision_config.patch_size
    return patches // 2 if config.mm_spatial_pool_mode == "average" else math.ceil(patches / 2)
