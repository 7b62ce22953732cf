"""PDrop: a pyramid, the visual tokens that the last prompt token attends to least are dropped at three depths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from vlm_pruner_eval.budget import parse_rate
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.pruners.in_stages import StagedPruner, scaled_layers
from vlm_pruner_eval.redact import short
from vlm_pruner_eval.types import Selection, Stage, VisualTokens

DEPTHS = (Fraction(1, 4), Fraction(1, 2), Fraction(3, 4))
EARLY = Fraction(1, 16)  # of the first cut where the published one is too late for the rate: layer 2 of 32
PUBLISHED = (Fraction(1, 2), Fraction(1, 4), Fraction(1, 8))
_HALVINGS = 60  # of an interval of length 1, down to the last bit of a float


@dataclass(frozen=True, kw_only=True)
class PDrop(StagedPruner):
    """The top tokens by attention of the last prompt token at layer K on its own input, for K at 1/4, 1/2 and 3/4 of the depth.

    Each stage keeps the same ratio of what the one before left. Tokens of equal attention are taken from the lowest index up. The
    release (Cooperx521/PyramidDrop 6444f30) cuts fractions of a token off its counts, as "published" does; a small image can lose its
    last token by that, which is counted as the quirk "none_left" and brought back by `official_quirks` only.

    Parameters
    ----------
    schedule
        "budget": a schedule of our own, as its authors published none for a rate; the ratio follows from `pruning_rate` and `budget`; "published": 1/2, 1/4 and 1/8 of the tokens, whatever the rate is
        (about 270 of 576 on average; the only setting that its authors have published).
    budget
        Of schedule="budget". "layer_average" (default): ``1 - pruning_rate`` of the tokens on average over all layers; from a rate of
        3/4 on, which the first quarter of the layers would use up, the first cut is at 1/16 of the depth. "kept": that share is left
        behind the last stage.

    Paper: arXiv 2410.17247 (CVPR 2025), section 3.2: rank by the last instruction token at the end of each stage.
    """

    name: ClassVar[str] = "pdrop"
    needs: ClassVar[frozenset[str]] = frozenset({"own_attention"})
    checks_late: ClassVar[bool] = True

    schedule: str = "budget"
    budget: str = "layer_average"

    def problems(self) -> list[str]:
        """The base's, and the schedule."""
        found = super().problems()
        if self.schedule not in ("budget", "published"):
            found.append(f"schedule: got {short(self.schedule)}, expected one of budget, published.")
        return found

    def stages(self, n_layers: int) -> tuple[Stage, ...]:
        """The three cuts; fewer in a model of fewer than four layers.

        Raises
        ------
        ConfigError
            An average over layers that the rate asks for and no ratio gives.
        """
        layers = scaled_layers(DEPTHS, n_layers)
        if self._is_early(layers[0], n_layers):
            layers = scaled_layers((EARLY, *DEPTHS[1:]), n_layers)
        shares: Sequence[Fraction | float] = PUBLISHED[-len(layers) :]
        if self.schedule == "budget":
            shares = self._shares(layers, n_layers)
        return tuple(Stage(layer, share) for layer, share in zip(layers, shares, strict=True))

    def keep_at(self, stage: Stage, n_visual: int) -> int:
        """As the base; ``int(n_visual * share)`` in the published schedule, one token at least unless the release is asked for."""
        if self.schedule == "budget" or not n_visual:
            return super().keep_at(stage, n_visual)
        return max(0 if self.official_quirks else 1, int(n_visual * stage.share))

    def choose(self, tokens: VisualTokens, keep: int) -> Selection:
        """Local indices [R] by descending attention."""
        order = tokens.own_attention.sort(descending=True, stable=True).indices[:keep]
        last = PUBLISHED[min(tokens.stage, len(PUBLISHED) - 1)]
        none_left = self.schedule == "published" and int(tokens.n_original * last) == 0
        return Selection(order, quirks=frozenset({"none_left"} if none_left else ()))

    def _is_early(self, first: int, n_layers: int) -> bool:
        share = 1 - parse_rate(self.pruning_rate)
        return self.schedule == "budget" and self.budget == "layer_average" and share * n_layers <= first

    def _shares(self, layers: Sequence[int], n_layers: int) -> list[Fraction | float]:
        share = 1 - parse_rate(self.pruning_rate)
        if share == 1:
            return [share] * len(layers)
        if self.budget == "kept":
            ratio = float(share) ** (1 / len(layers))
            return [*(ratio**i for i in range(1, len(layers))), share]
        spans = [after - before for before, after in itertools.pairwise([0, *layers, n_layers])]
        if share * n_layers <= spans[0]:
            raise ConfigError(
                f"pdrop: an average share of {float(share):.4f} over {n_layers} layers can't be reached by cuts in front of layers "
                f"{', '.join(map(str, layers))}, since the layers before them see every token; lower the pruning rate below "
                f"{1 - spans[0] / n_layers:.4f}, or use budget=kept or schedule=published."
            )
        ratio = ratio_for_average(float(share), spans)
        return [ratio**i for i in range(1, len(spans))]


def ratio_for_average(share: float, spans: Sequence[int]) -> float:
    """Return the ratio x in (0, 1) at which layers that hold 1, x, x^2, ... of the tokens hold `share` of them on average.

    Parameters
    ----------
    spans
        Numbers of layers that hold as much; the first of them alone must not make the average too large.
    """
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        average = sum(span * middle**i for i, span in enumerate(spans)) / sum(spans)
        low, high = (middle, high) if average < share else (low, middle)
    return (low + high) / 2
