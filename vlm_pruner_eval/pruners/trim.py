"""TRIM: the tokens that a CLIP text tower sets apart for the question, and the mean of all others as one more token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.budget import parse_rate
from vlm_pruner_eval.pruners.by_question import QuestionPruner, mean_products, views_together
from vlm_pruner_eval.types import Selection, Stage, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Trim(QuestionPruner):
    """Keep the tokens of lowest product with the question, as released, and the mean of the dropped ones as the last token.

    R tokens in all: R - 1 of the image and the mean, which is made before the projector. Nothing is dropped at R = V, and there is
    no mean then. Quirks of the release (FreedomIntelligence/TRIM f5a232d), counted in both modes and never repeated: "all_kept" and
    "none_kept" (no token of the image is dropped, or none is kept, where the release raises), and "base_view_only" (this is not the
    first view of its image, and in the release only that one reaches the language model). `official_quirks` keeps
    ``int(V (1 - rate))`` tokens and the mean, truncates the adaptive share as released, which may cost one token, and rounds what
    the projector reads to float16.

    Parameters
    ----------
    adaptive
        Let the method decide the count, as the release does by default: the share, over all views of an image, of tokens whose
        score is an outlier, above the third quartile by 1.5 interquartile ranges, and the mean.

    Paper: arXiv 2409.10994, section 3.
    """

    name: ClassVar[str] = "trim"
    needs: ClassVar[frozenset[str]] = frozenset({"question.clip", "vision.states"})
    checks_late: ClassVar[bool] = True
    reads_whole_prompt: ClassVar[bool] = True

    adaptive: bool = False

    def decides_count(self) -> bool:
        """Adaptive, or one token more than asked with official_quirks."""
        return self.adaptive or self.official_quirks

    def default_keep(self, n_visual: int) -> int:
        """With official_quirks ``int(V (1 - rate))``, to which the mean is added."""
        return self._truncated(n_visual) if self.official_quirks else super().default_keep(n_visual)

    def keep_at(self, stage: Stage, n_visual: int) -> int:
        """With official_quirks ``int(V (1 - rate))``, to which the mean is added."""
        return self._truncated(n_visual) if self.official_quirks else super().keep_at(stage, n_visual)

    def _truncated(self, n_visual: int) -> int:
        """``int(V k)`` of the number k that is written as ``1 - rate``: 0.33 for 0.67, which ``1 - 0.67`` is not in floating point."""
        rate = parse_rate(self.pruning_rate)
        return int(n_visual * float(1 - (Fraction(repr(rate)) if isinstance(rate, float) else rate)))

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Tokens of the image by ascending product with the question, then the place of the mean."""
        products = [mean_products(*self.compared(given)).float() for given in tokens]
        parts = views_together(tokens)
        if self.adaptive:
            counted = tokens[0].on_host(*(outliers(products[part]) for part in parts))
            wanted = [n for part, found in zip(parts, counted, strict=True) for n in self._shared(tokens[part], int(found))]
        else:
            wanted = [self._of_image(given.n_visual, keep) for given, keep in zip(tokens, keeps, strict=True)]
        chosen = [self._with_mean(*one) for one in zip(tokens, products, wanted, strict=True)]
        # what the release would have done
        first_views = {part.start for part in parts}
        answers = []
        for i, (given, selection) in enumerate(zip(tokens, chosen, strict=True)):
            fired = {"all_kept": wanted[i] == given.n_visual, "none_kept": wanted[i] <= 0, "base_view_only": i not in first_views}
            quirks = selection.quirks | {name for name, has in fired.items() if has}
            answers.append(replace(selection, quirks=quirks))
        return answers

    def _of_image(self, n_visual: int, keep: int) -> int:
        """Tokens of the image among `keep`; -1: not even a mean."""
        return keep if self.official_quirks or keep == n_visual else keep - 1

    def _shared(self, views: Sequence[VisualTokens], n_outliers: int) -> list[int]:
        """Tokens of each view of an image that are kept if `n_outliers` of them all are outliers."""
        total = sum(given.n_visual for given in views)
        if self.official_quirks:
            return [int(given.n_visual * (n_outliers / total)) for given in views]
        return [given.n_visual * n_outliers // total for given in views]

    def _with_mean(self, tokens: VisualTokens, products: Tensor, n_kept: int) -> Selection:
        """The `n_kept` tokens of lowest product [V], and behind them in the sequence the mean of all others, if there are any."""
        order = products.sort(stable=True).indices
        if n_kept < 0 or n_kept == tokens.n_visual:
            return Selection(order[: max(n_kept, 0)])  # nothing is dropped, or nothing is asked for
        kept = order[:n_kept]
        dropped = order[n_kept:].sort().values
        states = tokens.vision.states
        mean = states.index_select(0, dropped).mean(0, keepdim=True)
        in_sequence = kept.sort().values
        if self.official_quirks:
            rounded = torch.cat([states.index_select(0, in_sequence), mean]).to(torch.float16)
            rows = tokens.vision.project(rounded.to(states.dtype))
        else:
            rows = torch.cat([tokens.hidden_states.index_select(0, in_sequence), tokens.vision.project(mean)])
        place = dropped[:1]  # any free one: rows are given to places in ascending order
        return Selection(torch.cat([kept, place]), rows, merged=place)


def outliers(products: Sequence[Tensor]) -> Tensor:
    """Tensor [] int64: in how many of the views' tokens the softmax of the negative products, over each view, is an outlier.

    Parameters
    ----------
    products : sequence of Tensor [V] float32
        Products of each view's tokens with the question.

    Paper: arXiv 2409.10994, section 3 (interquartile range).
    """
    scores = torch.cat([(-values).softmax(0) for values in products])
    first, third = torch.quantile(scores.double(), scores.new_tensor([0.25, 0.75], dtype=torch.float64))
    return (scores > third + 1.5 * (third - first)).sum()
