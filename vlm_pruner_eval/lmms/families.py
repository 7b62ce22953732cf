"""One thin class per model family: its id on lmms-eval's command line, and the checkpoints that it takes."""

from __future__ import annotations

from vlm_pruner_eval.lmms.wrapper import PrunedModel


class VlmPrunerLlava(PrunedModel):
    """LLaVA-1.5 (arXiv 2310.03744) in its Hugging Face layout, and MiniVLM."""

    model_id = "vlmpruner_llava"
    model_types = frozenset({"llava"})
    protocols = ("hf", "paper")


class VlmPrunerLlavaNext(PrunedModel):
    """LLaVA-NeXT (LLaVA-1.6) in its Hugging Face layout: a base view and tiles of every image."""

    model_id = "vlmpruner_llava_next"
    model_types = frozenset({"llava_next"})


class VlmPrunerLlavaOnevision(PrunedModel):
    """LLaVA-OneVision (arXiv 2408.03326) in its Hugging Face layout: tiles of a single image, base views of several."""

    model_id = "vlmpruner_llava_onevision"
    model_types = frozenset({"llava_onevision"})


class VlmPrunerQwen2VL(PrunedModel):
    """Qwen2-VL (arXiv 2409.12191)."""

    model_id = "vlmpruner_qwen2_vl"
    model_types = frozenset({"qwen2_vl"})


class VlmPrunerQwen25VL(PrunedModel):
    """Qwen2.5-VL (arXiv 2502.13923)."""

    model_id = "vlmpruner_qwen2_5_vl"
    model_types = frozenset({"qwen2_5_vl"})


class VlmPrunerQwen3VL(PrunedModel):
    """Qwen3-VL, dense; its mixture-of-experts checkpoints are of another model type."""

    model_id = "vlmpruner_qwen3_vl"
    model_types = frozenset({"qwen3_vl"})


class VlmPrunerInternVL(PrunedModel):
    """InternVL (arXiv 2504.10479) in its Hugging Face layout; every tile is a budget of its own."""

    model_id = "vlmpruner_internvl"
    model_types = frozenset({"internvl"})
