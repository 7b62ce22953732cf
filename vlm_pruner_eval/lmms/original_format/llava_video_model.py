"""LLaVA-Video's model (arXiv 2410.02713), made from transformers' LLaVA-OneVision, which has no newline behind every row of a frame."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
    LlavaOnevisionPreTrainedModel,
    LlavaOnevisionProcessor,
)
from transformers.processing_utils import ProcessingKwargs

from vlm_pruner_eval.hf_compat import HAS_VIDEO_PLACEHOLDERS
from vlm_pruner_eval.vlms.llava_video import pooled_side


class LlavaVideoConfig(LlavaOnevisionConfig):
    """The configuration of LLaVA-OneVision, under a model type of its own.

    ``mm_spatial_pool_mode`` is the one of the checkpoint's config.json, out of `POOL_MODES`.
    """

    model_type = "llava_video"
    mm_spatial_pool_mode: str = "bilinear"


POOL_MODES = ("bilinear", "average")


class LlavaVideoModel(LlavaOnevisionModel):
    """LLaVA-OneVision without language-model head, whose videos have a newline token behind every row.

    Paper: arXiv 2410.02713, with the release's ``mm_newline_position: grid``.
    """

    config_class = LlavaVideoConfig

    def apply_pooling(self, image_features: Tensor) -> Tensor:
        """Pool frames as OneVision does, or by averages of 2 x 2 patches, then close every row with the newline embedding.

        Parameters
        ----------
        image_features : Tensor [frames, side * side, D]

        Returns
        -------
        Tensor [frames, rows * (rows + 1), D]
            With rows = `pooled_side`.
        """
        side = pooled_side(self.config)
        if self.config.mm_spatial_pool_mode == "average":
            frames = image_features.unflatten(1, (math.isqrt(image_features.shape[1]), -1)).permute(0, 3, 1, 2)
            rows = nn.functional.avg_pool2d(frames, 2).permute(0, 2, 3, 1)  # a last odd row or column is left out
        else:
            rows = super().apply_pooling(image_features).unflatten(1, (side, side))
        newline = self.image_newline.to(rows).expand(len(rows), side, 1, -1)
        return torch.cat([rows, newline], 2).flatten(1, 2)

    @functools.wraps(LlavaOnevisionModel.get_video_features)  # its parameters differ between versions of transformers
    def get_video_features(self, *args: object, **kwargs: object) -> object:
        """Features of all frames, less one newline: OneVision closes a video with a newline, which is here the last row's own.

        Some versions of transformers do so inside this method, others in its caller: one newline too many either way.
        """
        output = super().get_video_features(*args, **kwargs)
        if isinstance(output, Tensor):
            return output[:, :-1]
        output.pooler_output = output.pooler_output[:, :-1]
        return output


class LlavaVideoForConditionalGeneration(LlavaOnevisionForConditionalGeneration):
    """LLaVA-Video with its language-model head."""

    config_class = LlavaVideoConfig

    def __init__(self, config: LlavaVideoConfig):
        LlavaOnevisionPreTrainedModel.__init__(self, config)  # not the parent's, which would make OneVision's model
        self.model = LlavaVideoModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()


class LlavaVideoProcessor(LlavaOnevisionProcessor):
    """The processor of LLaVA-OneVision, with as many placeholders for a video as the model makes of it.

    `frame_side`, the tokens along one side of a frame (`pooled_side`), is set by whoever makes one.
    """

    frame_side: int

    def _video_placeholders(self, n_frames: int) -> str:
        return self.video_token * (n_frames * self.frame_side * (self.frame_side + 1))

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs: object) -> str:
        """Placeholders of one video; called by LLaVA-OneVision's processor."""
        return self._video_placeholders(len(video_inputs["pixel_values_videos"][video_idx]))

    if not HAS_VIDEO_PLACEHOLDERS:  # counted in the middle of a method of its parent

        def __call__(
            self, images: object = None, text: str | list[str] | None = None, audio: None = None, videos: object = None, **kwargs: object
        ) -> BatchFeature:
            """Write out the placeholders of videos, and leave the rest to LLaVA-OneVision."""
            if videos is None:
                return super().__call__(images=images, text=text, **kwargs)
            settings = self._merge_kwargs(ProcessingKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
            encoded = self.video_processor(videos, **settings["videos_kwargs"])
            lengths = iter([len(video) for video in encoded["pixel_values_videos"]])
            texts = []
            for sample in [text] if isinstance(text, str) else text:
                first, *rest = sample.split(self.video_token)
                texts.append(first + "".join(self._video_placeholders(next(lengths)) + part for part in rest))
            return BatchFeature({**super().__call__(images=images, text=texts, **kwargs), **encoded})
