"""SparseVLM: text tokens that the image is about rate the visual ones at three depths; a part of the dropped is recycled as clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vlm_pruner_eval.budget import keep_share, parse_rate
from vlm_pruner_eval.pruners.in_stages import PUBLISHED_TOKENS, StagedPruner, numbers_in, scaled_layers
from vlm_pruner_eval.pruners.token_groups import group_sums
from vlm_pruner_eval.redact import short
from vlm_pruner_eval.types import Selection, Stage, VisualTokens

DEPTHS = (Fraction(3, 32), Fraction(7, 32), Fraction(16, 32))  # behind layers 2, 6 and 15 of 32
# tokens kept of 576 at each stage, by the number after which the authors call the list
PUBLISHED = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
RECYCLED = 0.3  # share of the dropped tokens that clusters are made of
PER_CLUSTER = 10  # recycled tokens for each cluster, the first one aside
COUNT_FLOOR = 1e-6  # added to a cluster's size before it divides
NOISE = 1e-6  # of densities, in the release


class Recycled(NamedTuple):
    """An image's answer before the host knows it: the order [R], of which the first `n_best` are tokens, rows, and if noise decided."""

    order: Tensor
    n_best: int
    rows: Tensor
    by_noise: Tensor


@dataclass(frozen=True, kw_only=True)
class SparseVLM(StagedPruner):
    """The top tokens by attention of the raters, then clusters of the best dropped ones behind them (version 1 of the method).

    The k tokens of a stage are followed by c clusters, int(m / 10) + 1 of the m = int(0.3 * dropped) + 1 recycled tokens, so k + c are
    left: the method decides its count. Quirks of the release (Gumpest/SparseVLMs 26a5f48), counted in both modes and brought back by
    `official_quirks`: "noise" (random numbers that break ties between densities decide on a cluster; here of a generator with seed 0)
    and "no_raters" (texts that all attend equally leave no rater, and the first tokens are kept; otherwise all texts rate then).

    Parameters
    ----------
    schedule
        "published": the authors' list for the rate, 2/3, 7/9, 5/6 or 8/9 (192, 128, 96 or 64 of 576 tokens, on average over layers
        by their names), in shares of the image's tokens. Or tokens kept at the three stages whatever the rate is, such as
        "300/200/110": whole numbers are out of 576, numbers with a point are shares.
    budget
        Without effect.

    Paper: arXiv 2410.04417 (ICML 2025), sections 3.2 (raters) to 3.4 (recycling).
    """

    name: ClassVar[str] = "sparsevlm"
    needs: ClassVar[frozenset[str]] = frozenset({"text_attention", "question.embeddings"})
    without_effect: ClassVar[frozenset[str]] = frozenset({"layer", "budget"})
    checks_late: ClassVar[bool] = True

    schedule: str = "published"

    def problems(self) -> list[str]:
        """The base's, a rate without a list, and a schedule that is none."""
        found = super().problems()
        if self.schedule == "published":
            if self._nominal() not in {*PUBLISHED, PUBLISHED_TOKENS}:
                found.append(
                    f"pruning_rate: got {short(self.pruning_rate)}, expected 2/3, 7/9, 5/6 or 8/9, for which the authors published the "
                    "tokens to keep at each stage, or 0; for another budget state the stages, such as schedule=300/200/110."
                )
        elif (shares := _shares_in(self.schedule)) is None or list(shares) != sorted(shares, reverse=True):
            found.append(
                f"schedule: got {short(self.schedule)}, expected published, or {len(DEPTHS)} descending numbers such as 300/200/110 (out "
                f"of {PUBLISHED_TOKENS} tokens) or 0.5/0.35/0.2 (shares up to 1)."
            )
        return found

    def decides_count(self) -> bool:
        """Always: clusters come on top of the tokens asked for."""
        return True

    def needs_now(self, stage: int, memory: Mapping[str, Any]) -> frozenset[str]:
        """Embeddings only as long as the raters are not known."""
        return self.needs - {"question.embeddings"} if "raters" in memory else self.needs

    def stages(self, n_layers: int) -> tuple[Stage, ...]:
        """The three cuts; fewer in a model of fewer than four layers."""
        layers = scaled_layers(DEPTHS, n_layers)
        shares = _shares_in(self.schedule)
        if shares is None:
            nominal = self._nominal()
            counts = PUBLISHED.get(nominal, (nominal,) * len(DEPTHS))
            shares = tuple(Fraction(count, PUBLISHED_TOKENS) for count in counts)
        return tuple(Stage(layer, share) for layer, share in zip(layers, shares[-len(layers) :], strict=True))

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Tokens by descending score, then places of the clusters: the highest numbers that no kept token has."""
        some = [keep < given.n_visual or self.official_quirks for given, keep in zip(tokens, keeps, strict=True)]
        find_raters([given for given, is_cut in zip(tokens, some, strict=True) if is_cut])
        cut = [self._recycled(*one) for one, is_cut in zip(zip(tokens, keeps, strict=True), some, strict=True) if is_cut]
        arrived = iter(tokens[0].on_host(*(one.by_noise for one in cut), *(one.order for one in cut)))
        noisy = [bool(next(arrived)) for _ in cut]
        known = zip(cut, noisy, arrived, strict=True)
        return [self._answer(given, *next(known)) if is_cut else keep_all(given) for given, is_cut in zip(tokens, some, strict=True)]

    def _recycled(self, tokens: VisualTokens, keep: int) -> Recycled:
        """Choose and merge for one image, without waiting for the device."""
        n_visual, states = tokens.n_visual, tokens.hidden_states
        ranked = self.scores(tokens).sort(descending=True, stable=True).indices
        best = ranked[: min(keep, n_visual - 1)]
        dropped = ranked[len(best) :]
        # clusters of the best that were dropped
        recycled = states[dropped[: int(RECYCLED * len(dropped)) + 1]]
        n_clusters = len(recycled) // PER_CLUSTER + 1
        released = clusters(recycled, n_clusters, noise=_noise(len(recycled)).to(states.device, non_blocking=True))
        plain = clusters(recycled, n_clusters)
        sums, sizes = group_sums(recycled, released if self.official_quirks else plain, n_clusters)
        # kept ones in their order, and the clusters behind them
        places = dropped.sort().values[len(dropped) - n_clusters :]
        kept = best.sort().values
        rows = torch.cat([states[kept], sums / (sizes + COUNT_FLOOR)])
        if not tokens.contiguous:
            rows = rows[torch.cat([kept, places]).argsort()]
        return Recycled(torch.cat([best, places]), len(best), rows, (released != plain).any())

    def _answer(self, tokens: VisualTokens, cut: Recycled, by_noise: bool, order: Tensor) -> Selection:
        fired = {"noise": by_noise, "no_raters": len(tokens.memory["raters"]) == 0}
        quirks = frozenset(quirk for quirk, did in fired.items() if did)
        return Selection(order, cut.rows, quirks, amplification=1.0, merged=order[cut.n_best :])

    def scores(self, tokens: VisualTokens) -> Tensor:
        """Mean attention [V] that tokens receive from the raters in `tokens.memory`.

        Paper: arXiv 2410.04417, section 3.2.
        """
        chosen = tokens.memory["raters"]
        if not len(chosen) and self.official_quirks:
            return tokens.hidden_states.new_zeros(tokens.n_visual)
        attention = tokens.text_attention(chosen if len(chosen) else None).to(tokens.hidden_states)
        return attention.sum(0) / max(1, len(attention))

    def _nominal(self) -> int:
        """Tokens out of 576 that the rate leaves."""
        return keep_share(PUBLISHED_TOKENS, 1 - parse_rate(self.pruning_rate))


def keep_all(tokens: VisualTokens) -> Selection:
    """Return the answer that drops nothing."""
    return Selection(torch.arange(tokens.n_visual))


def find_raters(images: Sequence[VisualTokens]) -> None:
    """Leave the raters [r] of each image in its memory, where there are none yet: at its first stage."""
    new = [given for given in images if "raters" not in given.memory]
    if not new:
        return
    found = [are_raters(given.question.image_embeddings, given.question.text_embeddings) for given in new]
    for given, is_rater in zip(new, new[0].on_host(*found), strict=True):
        given.memory["raters"] = is_rater.nonzero()[:, 0].to(given.hidden_states.device, non_blocking=True)


def are_raters(image: Tensor, text: Tensor) -> Tensor:
    """Tell of the text tokens [t, D] if the image's tokens [V, D] are closer to them than to the average one: Tensor [t] bool.

    Paper: arXiv 2410.04417, section 3.2 (relevant text tokens).
    """
    relevance = (image @ text.T).softmax(-1).mean(0)
    return relevance > relevance.mean()


def clusters(states: Tensor, count: int, noise: Tensor | None = None) -> Tensor:
    """Clusters [m], numbered from 0 in descending order of how much their centres stand out, of states [m, D].

    A centre is denser than its surroundings and far from whatever is denser: density is ``exp(-d)`` of the mean squared distance d to
    the `count` nearest states, itself included, distances are divided by ``sqrt(D)``. All others belong to the nearest centre.

    Parameters
    ----------
    count
        Clusters, at most m.
    noise : Tensor [m] or None
        Added to the densities; without it, of states that are equally dense (as two nearest neighbours of each other are, if two
        clusters are asked for) the first counts as denser, so that they don't both become centres.

    Paper: arXiv 2410.04417, section 3.4 (density peaks of k nearest neighbours).
    """
    points = states.float()[None]
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")[0] / states.shape[1] ** 0.5
    density = (-distances.topk(count, largest=False).values.square().mean(-1)).exp()
    if noise is None:
        index = torch.arange(len(states), device=states.device)
        denser = (density > density[:, None]) | ((density == density[:, None]) & (index < index[:, None]))  # [i, j]: j than i
    else:
        density = density + noise
        denser = density > density[:, None]
    isolation = distances.masked_fill(~denser, torch.inf).amin(-1)
    isolation = torch.where(denser.any(-1), isolation, distances.max())
    centres = (density * isolation).sort(descending=True, stable=True).indices[:count]
    nearest = distances[:, centres].argmin(-1)
    return nearest.scatter(0, centres, torch.arange(count, device=states.device))


def _noise(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0)) * NOISE


def _shares_in(schedule: str) -> tuple[Fraction, ...] | None:
    """Shares of the three stages that a schedule states; None if it states none."""
    numbers = numbers_in(schedule)
    if numbers is None or len(numbers) != len(DEPTHS):
        return None
    texts = schedule.split("/")
    shares = [number if "." in text else number / PUBLISHED_TOKENS for number, text in zip(numbers, texts, strict=True)]
    return tuple(shares) if all(0 < share <= 1 for share in shares) else None
