"""One thin class per model family: its id on lmms-eval's command line, and the checkpoints that it takes."""

from __future__ import annotations

from vlm_pruner_eval.lmms.wrapper import PrunedModel


class VlmPrunerLlava(PrunedModel):
    """LLaVA-1.5 (arXiv 2310.03744) in its Hugging Face layout, and MiniVLM."""

    model_id = "vlmpruner_llava"
    model_types = frozenset({"llava"})
