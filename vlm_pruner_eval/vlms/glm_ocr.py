"""GLM-OCR (arXiv 2603.10910): grids of merged patches of any size under multi-dimensional rotary positions.

Of the models of 2026, this one attends to all tokens in each of its decoder layers, and counts positions without padding. The others
that were tried can't be pruned by a cut, or not in batches: Qwen3.5 has linear attention in three layers of four, whose state stands in
for the tokens that it read, and Gemma 4 sliding windows in five of six, so that nearly all layers behind a cut are none that take one.
HyperCLOVA X 32B Think has full attention, but as transformers builds it, padding moves the positions of a row, and with them what
methods read in its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.vlms.family import FamilySpec, Layout
from vlm_pruner_eval.vlms.qwen2_vl import QwenVL

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from vlm_pruner_eval.vlms.parts.layout import Scope

SINGLY = (
    "prune: under beams or returned sequences, GLM-OCR's class in transformers repeats the images of a batch one by one, so that rows "
    "with several images read each other's, pruned or not; answer with one sequence a prompt, or give each prompt one image."
)


class GlmOcr(QwenVL):
    """``GlmOcrForConditionalGeneration``: one grid an image, row-major, as Qwen-VL's.

    Images only: frames of a video stand in the prompt as images do. The bounds of its processor count every image twice, as the two
    frames that it is made, so that `min_pixels` and `max_pixels` would not be pixels of an image; those of the checkpoint hold.
    """

    spec: ClassVar[FamilySpec] = FamilySpec(
        model_id="vlmpruner_glm_ocr",
        model_types=frozenset({"glm_ocr"}),
        stock_prompt="huggingface",  # lmms-eval's wrapper of models that have none of their own
        new_tokens=4096,
        mrope=True,
    )

    def scopes(self, config: PretrainedConfig, input_ids: Tensor, layouts: Mapping[str, list[Layout]]) -> list[list[Scope]]:
        """Images of every row, as in any family.

        Raises
        ------
        PruningError
            Placeholder tokens that do not match the encoded images; repeated rows with several images, which got each other's features.
        """
        rows = super().scopes(config, input_ids, layouts)
        is_repeated = sum(map(len, rows)) > len(layouts.get("image", []))
        if is_repeated and any(len(row) > 1 for row in rows):
            raise PruningError(SINGLY)
        return rows
