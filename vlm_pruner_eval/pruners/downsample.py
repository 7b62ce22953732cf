"""Downsample: the image made smaller before the model, the control that asks why one should prune at all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NoReturn

from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.types import Stage, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Downsample(Pruner):
    """Every image is resized so that it makes at most R = keep_count(V, rate) visual tokens, and as near to R as its shape allows.

    For families of dynamic resolution, whose visual tokens follow the size of the image (Qwen-VL). Nothing is cut inside the
    model, so `prune` refuses this method: lmms-eval and sweeps run it. A record's n_visual and n_kept are the tokens of the
    smaller image, n_asked is R, and n_full is V.
    """

    name: ClassVar[str] = "downsample"
    fixed_layer: ClassVar[int | None] = 0
    before_model: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"layer", "positions", "selection_dtype", "budget", "scope", "official_quirks"})

    layer: int = 0

    def position_choices(self) -> tuple[str, ...]:
        """The first only: there is no gap to close."""
        return ("original",)

    def problems(self) -> list[str]:
        """The base's, and a budget over several images, which would leave open how much each of them shrinks."""
        found = super().problems()
        if self.scope == "per_sample":
            found.append("scope: got per_sample, expected per_image: every image is made smaller on its own.")
        return found

    def stages(self, n_layers: int) -> tuple[Stage, ...]:
        """No cut."""
        return ()

    def select(self, tokens: VisualTokens, keep: int | None = None) -> NoReturn:
        """Refused: there is no choice among tokens."""
        raise PruningError(
            f"{self._where(tokens)}: got {tokens.n_visual} visual tokens to choose from, but this method makes images smaller before the "
            "model; use it through lmms-eval or a sweep, or take another method."
        )


def smaller_grid(height: int, width: int, n_tokens: int) -> tuple[int, int]:
    """Rows and columns of at most `n_tokens` tokens for an image of `height` x `width` pixels.

    Of the grids next to the one that keeps the image's proportions exactly (each side rounded down or up), the one with the most
    tokens; of several, the one that distorts least, or is wider. A very long image is one row or column.
    """
    rows = min(max(1.0, math.sqrt(n_tokens * height / width)), float(n_tokens))
    cols = n_tokens / rows
    near = {(r, c) for r in (math.floor(rows), math.ceil(rows)) for c in (math.floor(cols), math.ceil(cols))}
    fitting = sorted((r, c) for r, c in near if r * c <= n_tokens)

    def distortion(r: int, c: int) -> float:
        sides = r * width, c * height  # equal where the proportions are kept
        return max(sides) / min(sides)

    return max(fitting, key=lambda grid: (grid[0] * grid[1], -distortion(*grid)))
