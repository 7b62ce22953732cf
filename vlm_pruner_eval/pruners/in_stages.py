"""Base of the methods that cut in front of several decoder layers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.types import VisualTokens

PUBLISHED_DEPTH = 32  # decoder layers of the models that the papers cut
PUBLISHED_TOKENS = 576  # visual tokens of an image there
_NUMBER = re.compile(r"\d{1,9}|\d{0,9}\.\d{1,12}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class StagedPruner(Pruner):
    """A method that cuts in front of several decoder layers, whose places it knows itself: shares of the model's depth.

    `select` without `keep` takes the count of the tokens' stage in a model of 32 layers.

    Parameters
    ----------
    layer
        Not to be given: the method has layers of its own.
    positions
        "auto" (default): contiguous as released, except under mRoPE, where kept tokens keep their position rows.
    """

    without_effect: ClassVar[frozenset[str]] = frozenset({"layer"})

    layer: int = 1
    positions: str = "auto"

    def problems(self) -> list[str]:
        """The base's, and a layer that was given."""
        found = super().problems()
        (own,) = [field.default for field in dataclasses.fields(self) if field.name == "layer"]
        if self.layer != own:
            found.append(f"layer: got {self.layer}, but this method cuts in front of several layers of its own; leave it out.")
        return found

    def position_choices(self) -> tuple[str, ...]:
        """The base's and "auto"."""
        return ("auto", *super().position_choices())

    def position_policy(self, mrope: bool) -> str:
        """What is given, where "auto" means contiguous, and original under mRoPE."""
        if self.positions != "auto":
            return self.positions
        return "original" if mrope else "contiguous"

    def default_keep(self, n_visual: int) -> int:
        """Tokens that are left of `n_visual` behind the last stage in a model of 32 layers."""
        return self.keep_at(self.stages(PUBLISHED_DEPTH)[-1], n_visual)

    # ---- private
    def _count(self, tokens: VisualTokens, keep: int | None) -> int:
        if keep is None:
            stages = self.stages(PUBLISHED_DEPTH)
            stage = stages[min(tokens.stage, len(stages) - 1)]
            keep = min(tokens.n_visual, self.keep_at(stage, tokens.n_original))
        return super()._count(tokens, keep)

    def _where(self, *tokens: VisualTokens) -> str:
        stages = ", ".join(dict.fromkeys(str(given.stage) for given in tokens))
        names = ", ".join(repr(given.sample_id) for given in tokens)
        return f"method {self.name or type(self).__name__!r}, stage {stages}, sample {names}"


def scaled_layers(depths: Sequence[Fraction], n_layers: int, *, lowest: int = 1) -> list[int]:
    """Decoder layers at `depths` (shares of the model's depth, ascending): distinct, ascending, from `lowest` on.

    A model with too few layers for all of them has the last ones; one without any layer from `lowest` on gets `lowest`, which it
    does not have.
    """
    count = min(len(depths), max(1, n_layers - lowest))
    layers: list[int] = []
    for i, depth in enumerate(depths[-count:]):
        earliest = layers[-1] + 1 if layers else lowest
        latest = n_layers - (count - i)
        layers.append(max(earliest, min(round(depth * n_layers), latest)))
    return layers


def numbers_in(text: str) -> list[Fraction] | None:
    """Read numbers with slashes between them, exactly, such as "300/200/110" or "0.005/0.001"; None if `text` is something else."""
    parts = [part.strip() for part in text.split("/")]
    return [Fraction(part) for part in parts] if all(_NUMBER.fullmatch(part) for part in parts) else None
