"""Base of the methods that compare each visual token with the question in the space of a CLIP text tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_pruner_eval.pruners.at_embeddings import EmbeddingPruner
from vlm_pruner_eval.redact import short
from vlm_pruner_eval.types import VisualTokens

STAND_IN = "llm"
LLAVA_TOWER = "openai/clip-vit-large-patch14-336"
_CLIP = "question.clip"
_EMBEDDINGS = "question.embeddings"


@dataclass(frozen=True, kw_only=True)
class QuestionPruner(EmbeddingPruner):
    """A method that reads image and question embeddings of one space; the views of an image are looked at jointly.

    Parameters
    ----------
    text_tower
        Path or hub name of the CLIP checkpoint that the model's vision tower was taken from, which holds the text side and both
        projections. "llm": an adapted stand-in for models without one; projected tokens and the language model's own input
        embeddings of the text are compared instead.
    """

    joint_views: ClassVar[bool] = True
    reads_whole_prompt: ClassVar[bool] = False  # by the text tower, cut behind one row; else the question without its closing sentence

    scope: str = "per_view"
    text_tower: str | None = None

    def __post_init__(self) -> None:
        if self.text_tower == STAND_IN:  # read by this instance only
            object.__setattr__(self, "needs", self.needs - {_CLIP} | {_EMBEDDINGS})
        super().__post_init__()

    def problems(self) -> list[str]:
        """The base's, and: the text side has to be named."""
        found = super().problems()
        if self.text_tower is None:
            found.append(
                "text_tower: got None, expected the path or hub name of the CLIP checkpoint that the model's vision tower comes from, "
                f"since the model itself holds no text tower; for LLaVA-1.5 pass text_tower={LLAVA_TOWER}. text_tower={STAND_IN} is "
                "the adapted stand-in, in the language model's own embeddings, for models without such a checkpoint."
            )
        elif not isinstance(self.text_tower, str) or not self.text_tower.strip():
            found.append(f"text_tower: got {short(self.text_tower)}, expected a path, a hub name, or {STAND_IN!r}.")
        return found

    def compared(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """Embeddings of the visual tokens [V, E] and of the question [M, E]."""
        question = tokens.question
        if self.text_tower == STAND_IN:
            return question.image_embeddings, question.text_embeddings
        return question.clip_image, question.clip_text


def mean_products(image: Tensor, text: Tensor) -> Tensor:
    """Mean over the rows of `text` [M, E] of their products with each row of `image` [V, E]: Tensor [V]; zeros if there is no text."""
    if len(text) == 0:
        return image.new_zeros(len(image))
    return (image @ text.T).mean(1)


def views_together(tokens: Sequence[VisualTokens]) -> list[slice]:
    """Runs of neighbours that are views of the same image; tokens without an image's name are an image of their own."""
    starts = [i for i, given in enumerate(tokens) if i == 0 or given.image is None or given.image != tokens[i - 1].image]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True)]
