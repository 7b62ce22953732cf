"""CDPruner: the subset of tokens of largest determinant, conditioned on how relevant each one is to the question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval import kernels
from vlm_pruner_eval.pruners.base import unit_rows
from vlm_pruner_eval.pruners.by_question import QuestionPruner, mean_products, views_together
from vlm_pruner_eval.pruners.determinant import NOISE, ROUNDING, Cosines, by_steps, cosines_in, cosines_of, greedy_steps
from vlm_pruner_eval.pruners.padding import groups, padded, products, sent
from vlm_pruner_eval.types import Selection, VisualTokens

OnHost = Callable[..., list[Tensor]]
Choice = tuple[Tensor, int]

_OFFSET = 1e-6  # of the scaled relevances, as published
_ALIKE = 1e-12  # relevances no further apart are equal


@dataclass(frozen=True, kw_only=True)
class CDPruner(QuestionPruner):
    """Greedy maximum of the determinant of ``diag(r) S diag(r)``: S cosines of the projected tokens, r relevance to the question.

    The relevance is the negative cosine to the question, as released, averaged over the question's rows, and scaled to the range
    over all views of an image. Quirks of the release (Theia-4869/CDPruner 9541616), counted in both modes: "constant_relevance"
    (all relevances of an image are equal, and the release divides by zero; by default they all count as 1) and "noise" (fewer
    independent tokens than asked, so that rounding noise decides in the release; by default the rest is filled by relevance).
    `official_quirks` brings both back, and with them a token chosen twice is one token less.

    Paper: arXiv 2506.10967, section 3 (conditional DPP).
    """

    name: ClassVar[str] = "cdpruner"
    needs: ClassVar[frozenset[str]] = frozenset({"question.clip"})
    quirks_change_count: ClassVar[bool] = True
    checks_late: ClassVar[bool] = True

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Local indices [R] by descending gain, for the views of one image or of several."""
        features = [unit_rows(given.hidden_states).float() for given in tokens]
        scaled = [pair for part in views_together(tokens) for pair in self._scaled(tokens[part])]
        relevance = [values for values, _ in scaled]
        # the choice; the host waits for the device once
        by = by_kernel if kernels.usable(features[0].device, max(map(len, features))) else by_host
        chosen, alike = by(features, relevance, keeps, [flag for _, flag in scaled], tokens[0].on_host)
        # what the release would have done
        answers = []
        for i, ((order, clear), flag) in enumerate(zip(chosen, alike, strict=True)):
            fired = {"noise": clear < keeps[i], "constant_relevance": bool(flag)}
            quirks = frozenset(name for name, has in fired.items() if has)
            if quirks and self.official_quirks:
                divided = relevance[i] / 0 if fired["constant_relevance"] else relevance[i]
                answers.append(Selection(as_released(features[i], divided, keeps[i]), quirks=quirks))
            else:
                answers.append(Selection(order, quirks=quirks))
        return answers

    def _scaled(self, views: Sequence[VisualTokens]) -> list[tuple[Tensor, Tensor]]:
        """Relevances [V] of each view of one image, above 0, and if they are all equal: Tensor [] bool."""
        raw = []
        for given in views:
            image, text = self.compared(given)
            raw.append(-mean_products(unit_rows(image), unit_rows(text)).float())
        lowest, highest = torch.cat(raw).aminmax()
        spread = highest - lowest
        alike = spread <= _ALIKE
        return [(torch.where(alike, 1.0, (values - lowest + _OFFSET) / spread), alike) for values in raw]


def by_host(
    features: Sequence[Tensor], relevance: Sequence[Tensor], keeps: Sequence[int], flags: Sequence[Tensor], on_host: OnHost
) -> tuple[list[Choice], list[Tensor]]:
    """Orders [R] and how many of each no noise has chosen, by the loop on the CPU; and the flags there.

    What comes from another device is the cosines, which are smaller than the features.
    """
    is_here = features[0].device.type == "cpu"
    compared = on_host(*(features if is_here else [rows @ rows.T for rows in features]), *relevance, *flags)
    n = len(features)
    cosines = [cosines_of(rows) if is_here else cosines_in(rows) for rows in compared[:n]]
    return [by_steps(*one) for one in zip(cosines, compared[n : 2 * n], keeps, strict=True)], compared[2 * n :]


def by_kernel(
    features: Sequence[Tensor], relevance: Sequence[Tensor], keeps: Sequence[int], flags: Sequence[Tensor], on_host: OnHost
) -> tuple[list[Choice], list[Tensor]]:
    """Return what `by_host` does, for several views at once on a GPU."""
    from vlm_pruner_eval.kernels.determinant_kernel import largest_determinant

    orders: list[Tensor] = []
    clear: list[Tensor] = []
    for part in groups([*map(len, features)]):
        counts = sent([*zip(map(len, features[part]), keeps[part], strict=True)], torch.int64, features[0].device)
        order, many = largest_determinant(
            products(features[part]), padded(relevance[part]), counts, NOISE, max(keeps[part]), rounding=ROUNDING
        )
        orders += order
        clear += many
    arrived = on_host(*orders, *clear, *flags)
    n = len(features)
    chosen = [(order[:keep], int(many)) for order, many, keep in zip(arrived[:n], arrived[n : 2 * n], keeps, strict=True)]
    return chosen, arrived[2 * n :]


def as_released(features: Tensor, relevance: Tensor, keep: int) -> Tensor:
    """The choice where rounding noise decides it, and NaN: each token once, so that there may be fewer than `keep`."""
    kernel = (relevance[:, None] * (features @ features.T) * relevance).cpu()
    order, _ = greedy_steps(Cosines(lambda tokens: kernel[tokens], kernel.diagonal()), torch.ones(len(kernel), dtype=torch.float64), keep)
    return order.new_tensor([*dict.fromkeys(order.tolist())])
