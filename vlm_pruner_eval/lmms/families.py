"""One thin class per model family: its id on lmms-eval's command line, and what it takes."""

from __future__ import annotations

from vlm_pruner_eval.lmms.prompts import Defaults
from vlm_pruner_eval.lmms.protocols import LLAVA_NEXT_PAPER, LLAVA_NEXT_TWO_TILES, LLAVA_PAPER, QWEN2_VL_PAPER, with_paper
from vlm_pruner_eval.lmms.resolve import PIXEL_SETTINGS, VIDEO_SETTINGS
from vlm_pruner_eval.lmms.wrapper import PrunedModel

NO_SCRIPT = "the script behind the paper's numbers of this family was not released, so its prompt and image handling are not known"


class VlmPrunerLlava(PrunedModel):
    """LLaVA-1.5 (arXiv 2310.03744) in its Hugging Face layout, and MiniVLM."""

    model_id = "vlmpruner_llava"
    model_types = frozenset({"llava"})
    protocols = with_paper(LLAVA_PAPER)


class VlmPrunerLlavaNext(PrunedModel):
    """LLaVA-NeXT (LLaVA-1.6) in its Hugging Face layout: a base view and tiles of every image."""

    model_id = "vlmpruner_llava_next"
    model_types = frozenset({"llava_next"})
    protocols = with_paper(LLAVA_NEXT_PAPER) | {"paper_two_tiles": LLAVA_NEXT_TWO_TILES}


class VlmPrunerLlavaOnevision(PrunedModel):
    """LLaVA-OneVision (arXiv 2408.03326) in its Hugging Face layout: tiles of a single image, base views of several, pooled videos."""

    model_id = "vlmpruner_llava_onevision"
    model_types = frozenset({"llava_onevision"})
    kinds = ("image", "video")
    takes = VIDEO_SETTINGS


class VlmPrunerLlavaVideo(PrunedModel):
    """LLaVA-Video (arXiv 2410.02713), whose checkpoints are in the layout of the authors' own code.

    64 frames, as the authors' own example has it; lmms-eval's llava_vid takes 20 unless told. Their sentence with the times of
    the frames (`add_time_instruction` of llava_vid, off there by default) is not put before the question: whether the pruning
    paper's numbers were made with it is not known.
    """

    model_id = "vlmpruner_llava_video"
    model_types = frozenset({"llava_video"})
    kinds = ("image", "video")
    takes = VIDEO_SETTINGS
    default_frames = 64
    why_no_paper = NO_SCRIPT


class VlmPrunerQwen2VL(PrunedModel):
    """Qwen2-VL (arXiv 2409.12191)."""

    model_id = "vlmpruner_qwen2_vl"
    model_types = frozenset({"qwen2_vl"})
    defaults = Defaults(new_tokens=128, stops_at_blank_line=True)
    kinds = ("image", "video")
    takes = VIDEO_SETTINGS | PIXEL_SETTINGS
    protocols = with_paper(QWEN2_VL_PAPER)


class VlmPrunerQwen25VL(PrunedModel):
    """Qwen2.5-VL (arXiv 2502.13923)."""

    model_id = "vlmpruner_qwen2_5_vl"
    model_types = frozenset({"qwen2_5_vl"})
    defaults = Defaults(new_tokens=128)
    kinds = ("image", "video")
    takes = VIDEO_SETTINGS | PIXEL_SETTINGS


class VlmPrunerQwen3VL(PrunedModel):
    """Qwen3-VL, dense; its mixture-of-experts checkpoints are of another model type."""

    model_id = "vlmpruner_qwen3_vl"
    model_types = frozenset({"qwen3_vl"})
    defaults = Defaults(new_tokens=128)
    kinds = ("image", "video")
    takes = VIDEO_SETTINGS | PIXEL_SETTINGS
    why_no_paper = NO_SCRIPT


class VlmPrunerInternVL(PrunedModel):
    """InternVL (arXiv 2504.10479) in its Hugging Face layout; every tile, and every frame of a video, is a budget of its own."""

    model_id = "vlmpruner_internvl"
    model_types = frozenset({"internvl"})
    kinds = ("image", "video")
    takes = VIDEO_SETTINGS
