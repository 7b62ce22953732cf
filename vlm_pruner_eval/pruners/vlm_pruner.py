"""VLM-Pruner: pivots by key distance, growth from near to far by the BSS criterion, discarded tokens merged by similarity.

Paper: arXiv 2512.02700. Facts about the authors' release (Casey-bit/VLMPruner 556a914) are measured, see `official_quirks`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.pruners.base import Pruner, unit_rows
from vlm_pruner_eval.types import Selection, VisualTokens

ILL_CONDITIONED = 1e-3  # a sum of weights at or below this share of the sum of their absolute values is cancellation
SMALLEST_WEIGHT_SUM = 1e-8


@dataclass(frozen=True, kw_only=True)
class VLMPruner(Pruner):
    """Keep spatially close, mutually dissimilar tokens and fold the discarded ones into them.

    Quirks of the release, counted in `Selection.quirks` in both modes: "stall" (a pass of the growth adds nothing, the
    release stops there and keeps fewer tokens), "fewer_than_pivots" (fewer tokens asked than pivots, the release keeps
    all pivots), "repeated_pivots" (equal keys, the release keeps one token several times; never done here), and
    "negative_weight_sum" (merging weights that cancel out; the release divides by their sum). `official_quirks` brings
    back the first, the second and the last.

    Parameters
    ----------
    pivots
        Tokens chosen first, by farthest-point sampling of the keys.
    threshold, threshold_step
        A candidate joins while its score is below the threshold, which grows by the step (> 0) from pass to pass.
    token_batch
        Candidates scored together; tokens of one block do not see each other.
    channels
        Hidden channels of largest variance that cosines are taken over; all of them when there are fewer.
    spatial_weight
        Weight of the distance in the BSS score, 0 or more.
    self_weight
        Share of its own state that a kept token retains when others are merged into it, in [0, 1].
    merge
        Whether discarded tokens are merged into kept ones; False only selects.

    Paper: arXiv 2512.02700.
    """

    name: ClassVar[str] = "vlmpruner"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    quirks_change_count: ClassVar[bool] = True

    pivots: int = 4
    threshold: float = 0.8
    threshold_step: float = 0.1
    token_batch: int = 16
    channels: int = 256
    spatial_weight: float = 0.5
    self_weight: float = 0.3
    merge: bool = True

    def problems(self) -> list[str]:
        """The base's, and: counts at least 1, a step above 0 (0 would never loosen), weights in range."""
        found = super().problems()
        for field in ("pivots", "token_batch", "channels"):
            if getattr(self, field) < 1:
                found.append(f"{field}: got {getattr(self, field)}, expected a whole number, 1 or more.")
        if self.threshold_step <= 0:
            found.append(f"threshold_step: got {self.threshold_step}, expected a number above 0, or the threshold never loosens.")
        if self.spatial_weight < 0:
            found.append(f"spatial_weight: got {self.spatial_weight}, expected 0 or more.")
        if not 0 <= self.self_weight <= 1:
            found.append(f"self_weight: got {self.self_weight}, expected a share from 0 to 1.")
        return found

    def choose(self, tokens: VisualTokens, keep: int) -> Selection:
        """Pivots, then passes of the BSS criterion, then the merge; `keep` = V still gives the order of selection."""
        start, repeated = farthest_points(tokens.keys.flatten(1), self.pivots)
        if not self.official_quirks:
            start = start[:keep]
        features = unit_rows(most_variable(tokens.hidden_states, self.channels))
        similarity = (features @ features.T).float()
        order, stalled = self._grow(BssScores(similarity, tokens, float(self.spatial_weight)), start, keep)
        states, cancelled = None, False
        if self.merge:
            states, cancelled = aggregate(
                tokens.hidden_states.float(), similarity, order, self_weight=float(self.self_weight), plain_sum=self.official_quirks
            )
        fired = {
            "stall": stalled,
            "fewer_than_pivots": keep < self.pivots,
            "repeated_pivots": repeated,
            "negative_weight_sum": cancelled,
        }
        return Selection(order, states, frozenset(quirk for quirk, did in fired.items() if did))

    def _grow(self, scores: BssScores, start: Tensor, keep: int) -> tuple[Tensor, bool]:
        """Add tokens pass by pass until `keep` are chosen: their order [R], and whether a pass stalled."""
        parts, missing, stalled, threshold = [start], keep - len(start), False, float(self.threshold)
        scores.add(start)
        while missing > 0:
            candidates, lowest = scores.ranked()
            added = self._one_pass(scores, candidates, missing, threshold)
            if added:
                parts += added
                missing -= sum(map(len, added))
                threshold += float(self.threshold_step)
                continue
            stalled = True
            if self.official_quirks:
                break
            threshold = self._loosened(threshold, lowest)
        return torch.cat(parts), stalled

    def _one_pass(self, scores: BssScores, candidates: Tensor, room: int, threshold: float) -> list[Tensor]:
        """Walk the ranked candidates in blocks, each scored against the tokens chosen so far; the blocks' additions."""
        added: list[Tensor] = []
        for block in candidates.split(self.token_batch):
            score = scores.of(block)
            accepted = block[score < threshold]
            if len(accepted) > room:
                accepted = block[score.argsort(stable=True)[:room]]
            if len(accepted):
                scores.add(accepted)
                added.append(accepted)
                room -= len(accepted)
            if room == 0 or not added:  # a first block that adds nothing ends the pass
                break
        return added

    def _loosened(self, threshold: float, lowest: float) -> float:
        """The first threshold of the ladder above the `lowest` score, reached in one jump however small the step is."""
        if not math.isfinite(lowest):
            raise PruningError(f"{self.name}: the best score of a candidate is {lowest}; lower spatial_weight (got {self.spatial_weight}).")
        step = float(self.threshold_step)
        rungs = (lowest - threshold) / step
        # a step below float spacing can't be climbed: the next float32 above the score is then the first threshold
        rung = threshold + step * (math.floor(rungs) + 1) if rungs < 2**52 else lowest
        return max(rung, torch.nextafter(torch.tensor(lowest), torch.tensor(math.inf)).item())


class BssScores:
    """Scores of the candidates against the chosen tokens, kept up to date at O(V) per added token.

    score(c) = max cosine(c, chosen) * (1 + weight * min distance(c, chosen) / diagonal of the grid). The factor is one
    positive number per candidate, so a running maximum and a running minimum are all that is needed. Distances count
    within one image or frame; with no chosen token there, and for newline tokens, the factor is 1.

    Parameters
    ----------
    similarity : Tensor [V, V]
        Cosines between the tokens.
    tokens
        Their grid and coordinates.
    weight
        lambda, the weight of the distance.
    """

    def __init__(self, similarity: Tensor, tokens: VisualTokens, weight: float):
        coords = tokens.coords.to(similarity.device)
        n_visual = len(similarity)
        self._similarity = similarity
        self._cell = coords[:, 1:].float()
        newline = coords[:, 1] < 0
        alone = -1 - torch.arange(n_visual, device=similarity.device)  # a frame of its own: no distance to anything else
        self._frame = torch.where(newline, alone, coords[:, 0].long())
        self._weight = weight / math.hypot(*tokens.grid)
        self._cosine = similarity.new_full((n_visual,), -math.inf)
        self._distance = similarity.new_full((n_visual,), math.inf)
        self._chosen = torch.zeros(n_visual, dtype=torch.bool, device=similarity.device)

    def add(self, chosen: Tensor) -> None:
        """Mark local indices [A] as chosen."""
        if len(chosen) == 0:
            return
        self._chosen[chosen] = True
        self._cosine = torch.maximum(self._cosine, self._similarity[chosen].amax(0))
        distance = (self._cell[chosen, None] - self._cell).norm(dim=-1)
        apart = self._frame[chosen, None] != self._frame
        self._distance = torch.minimum(self._distance, distance.masked_fill(apart, math.inf).amin(0))

    def of(self, candidates: Tensor) -> Tensor:
        """Scores [C] of local indices [C]."""
        distance = self._distance[candidates]
        factor = torch.where(distance.isinf(), 1.0, 1 + self._weight * distance)
        return self._cosine[candidates] * factor

    def ranked(self) -> tuple[Tensor, float]:
        """All candidates not chosen yet, by ascending score, and the lowest score."""
        candidates = (~self._chosen).nonzero().flatten()
        scores, rank = self.of(candidates).sort(stable=True)
        return candidates[rank], scores[0].item()


def farthest_points(keys: Tensor, count: int) -> tuple[Tensor, bool]:
    """Up to `count` distinct local indices: the largest L1 norm first, then always the token farthest from those chosen.

    Parameters
    ----------
    keys : Tensor [V, H_kv * d]
        Keys, heads concatenated.
    count
        Pivots wanted; at most V are returned.

    Returns
    -------
    Tensor [min(count, V)] int64, and whether plain farthest-point sampling would have repeated a token.

    Paper: arXiv 2512.02700 (pivot initialisation).
    """
    chosen = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    distance = keys.new_full((len(keys),), math.inf)
    pivots, repeated = [keys.abs().sum(-1).argmax()], False
    while len(pivots) < min(count, len(keys)):
        chosen[pivots[-1]] = True
        distance = torch.minimum(distance, (keys - keys[pivots[-1]]).square().sum(-1))
        repeated = repeated or bool(chosen[distance.argmax()])
        pivots.append(distance.masked_fill(chosen, -1).argmax())
    return torch.stack(pivots), repeated or count > len(keys)


def most_variable(states: Tensor, channels: int) -> Tensor:
    """The `channels` columns of largest variance over the tokens: [V, D] to [V, min(channels, D)].

    Paper: arXiv 2512.02700 (channel selection).
    """
    if channels >= states.shape[1]:
        return states
    variance = (states - states.mean(0)).square().mean(0)  # in two passes, so that a large mean does not cancel
    picked = variance.sort(descending=True, stable=True).indices[:channels]
    return states[:, picked.sort().values]


def aggregate(states: Tensor, similarity: Tensor, order: Tensor, *, self_weight: float, plain_sum: bool) -> tuple[Tensor, bool]:
    """Similarity-weighted aggregation: every discarded token is merged into the most similar kept one.

    Parameters
    ----------
    states : Tensor [V, D]
        Full hidden states.
    similarity : Tensor [V, V]
        Cosines between the tokens.
    order : Tensor [R]
        Kept tokens in selection order.
    self_weight
        beta, the share of its own state that a kept token retains.
    plain_sum
        Normalise by the signed sum of the weights even where they cancel out, as the release does; otherwise negative
        cosines weigh 0 there.

    Returns
    -------
    Tensor [R, D] of new states in ascending order of the kept tokens, and whether weights cancelled out somewhere.
    A token whose weights do not sum to more than 0 is unchanged.

    Paper: arXiv 2512.02700 (similarity-weighted aggregation).
    """
    keep = order.sort().values
    dropped = torch.ones(len(states), dtype=torch.bool, device=states.device)
    dropped[keep] = False
    dropped = dropped.nonzero().flatten()
    own = states[keep]
    if len(dropped) == 0 or len(keep) == 0:
        return own, False
    weight, receiver = similarity[dropped][:, order].max(dim=1)
    weights = torch.zeros(len(order), len(dropped), device=states.device)
    weights[receiver, torch.arange(len(dropped), device=states.device)] = weight
    weights = weights[order.argsort()]
    magnitude = weights.abs().sum(1)
    cancelled = (magnitude > 0) & (weights.sum(1) <= ILL_CONDITIONED * magnitude)
    if not plain_sum:
        weights = torch.where(cancelled[:, None], weights.clamp(min=0), weights)
    total = weights.sum(1)
    mean = (weights / total.clamp(min=SMALLEST_WEIGHT_SUM)[:, None]) @ states[dropped]
    merged = self_weight * own + (1 - self_weight) * mean
    return torch.where((total > 0)[:, None], merged, own), bool(cancelled.any())
