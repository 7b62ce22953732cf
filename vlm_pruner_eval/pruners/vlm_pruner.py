"""VLM-Pruner: pivots by key distance, growth from near to far by the BSS criterion, discarded tokens merged by similarity.

Paper: arXiv 2512.02700. Facts about the authors' release (Casey-bit/VLMPruner 556a914) are measured, see `official_quirks`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval import kernels
from vlm_pruner_eval.pruners.aggregation import merge_batch, plan_merge
from vlm_pruner_eval.pruners.base import Pruner, unit_rows
from vlm_pruner_eval.pruners.blocks import l1_norms, squared_distances, variances
from vlm_pruner_eval.pruners.bss import BssScores, Growth, no_threshold_above, places
from vlm_pruner_eval.pruners.padding import groups, padded, products, sent
from vlm_pruner_eval.types import Selection, VisualTokens

_LOOK_AT = 16  # tokens whose distances are computed together in the search for the farthest


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
    checks_late: ClassVar[bool] = True

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

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Pivots, then passes of the BSS criterion, then the merge; `keep` = V still gives the order of selection.

        The growth is a chain of small steps, each of which decides the next. Where there are no kernels it runs on the CPU whatever
        the device is, and the cosines are fetched once for all images; kernels leave them there, and the answers are fetched.
        """
        counts = [given.n_visual for given in tokens]
        if kernels.usable(tokens[0].hidden_states.device, max(counts)):
            return self._by_kernel(tokens, keeps, [*groups(counts)])
        asked = [tensor for given in tokens for tensor in self._compared(given)]
        arrived = deque(tokens[0].on_host(*asked))
        del asked
        return [self._grown(given, keep, arrived) for given, keep in zip(tokens, keeps, strict=True)]

    def _compared(self, tokens: VisualTokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cosines [V, V], coordinates, pivots, and if plain sampling would have repeated one."""
        pivots, repeated = farthest_points(tokens.keys.flatten(1), self.pivots)
        features = self._features(tokens)
        return (features @ features.T).float(), tokens.coords, pivots, repeated

    def _features(self, tokens: VisualTokens) -> Tensor:
        return unit_rows(most_variable(tokens.hidden_states, self.channels))

    def _grown(self, tokens: VisualTokens, keep: int, arrived: deque[Tensor]) -> Selection:
        """The choice for one image; takes what `_compared` returned, on the CPU, off the front of `arrived`."""
        similarity, coords, start, repeated = (arrived.popleft() for _ in range(4))
        growth = Growth(
            threshold=float(self.threshold),
            step=float(self.threshold_step),
            block=self.token_batch,
            stop_on_stall=self.official_quirks,
        )
        start = start if self.official_quirks else start[:keep]
        order, stalled = growth.order(BssScores(similarity, coords, tokens.grid, float(self.spatial_weight)), start, keep)
        merged, cancelled, amplification = None, False, None
        if self.merge:
            plan = plan_merge(similarity, order, self_weight=float(self.self_weight), plain_sum=self.official_quirks)
            del similarity  # before the new states are made: both at once would be the peak of memory
            merged, cancelled, amplification = plan.apply(tokens.hidden_states.float()), plan.cancelled, plan.amplification
        fired = self._fired(tokens, keep, stalled=stalled, repeated=bool(repeated), cancelled=cancelled)
        return Selection(order, merged, fired, amplification)

    def _fired(self, tokens: VisualTokens, keep: int, *, stalled: bool, repeated: bool, cancelled: bool) -> frozenset[str]:
        fired = {
            "stall": stalled,
            "fewer_than_pivots": keep < self.pivots,
            "repeated_pivots": repeated or self.pivots > tokens.n_visual,
            "negative_weight_sum": cancelled,
        }
        return frozenset(quirk for quirk, did in fired.items() if did)

    def _by_kernel(self, tokens: Sequence[VisualTokens], keeps: Sequence[int], parts: Sequence[slice]) -> list[Selection]:
        """The choice for all images on their device; what is known of it then arrives by one copy."""
        launched = [self._launched(tokens[part], keeps[part]) for part in parts]
        arrived = iter(tokens[0].on_host(*(tensor for numbers, _ in launched for tensor in numbers)))
        answers = []
        for part, (numbers, merged) in zip(parts, launched, strict=True):
            told = zip(*(next(arrived) for _ in numbers), strict=True)
            for i, (order, (n, stalled, lowest), repeated, cancelled, amplification) in enumerate(told):
                if not lowest.isfinite():
                    raise no_threshold_above(lowest.item(), float(self.spatial_weight))
                flags = {"stalled": bool(stalled), "repeated": bool(repeated), "cancelled": bool(cancelled)}
                fired = self._fired(tokens[part][i], keeps[part][i], **flags)
                states, bound = (None, None) if merged is None else (merged[i, : int(n)], amplification.item())
                answers.append(Selection(order[: int(n)], states, fired, bound))
        return answers

    def _launched(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> tuple[list[Tensor], Tensor | None]:
        """Start the choice for images that fit in memory together.

        Returns
        -------
        list of Tensors
            Order [B, R], numbers [B, 3] of the growth, repeated [B], cancelled [B], amplification [B].
        Tensor [B, R, D] or None
            New states.
        """
        from vlm_pruner_eval.kernels.bss_kernel import grow

        # sizes and rules of each image
        there, lengths = tokens[0].hidden_states.device, [given.n_visual for given in tokens]
        starts = [min(self.pivots, n, n if self.official_quirks else keep) for n, keep in zip(lengths, keeps, strict=True)]
        counts = sent([*zip(lengths, keeps, starts, strict=True)], torch.int64, there)
        ladder, weight = (float(self.threshold), float(self.threshold_step)), float(self.spatial_weight)
        rules = sent([(*ladder, weight / math.hypot(*given.grid)) for given in tokens], torch.float64, there)
        # the growth
        pivots, repeated = farthest_of_batch(padded([given.keys.flatten(1) for given in tokens]), counts[:, 0], self.pivots)
        similarity = products([self._features(given) for given in tokens]).float()
        coords = padded([places(given.coords).T for given in tokens]).mT.contiguous()
        columns, block = max(*keeps, *starts), self.token_batch
        order, found = grow(similarity, coords, pivots, counts, rules, columns, block=block, stop=self.official_quirks)
        if not self.merge:
            return [order, found, repeated, repeated, repeated], None
        # the merge
        states = padded([given.hidden_states.float() for given in tokens])
        merged, cancelled, amplification = merge_batch(
            similarity,
            states,
            order,
            counts[:, 0],
            found[:, 0],
            self_weight=float(self.self_weight),
            plain_sum=self.official_quirks,
        )
        return [order, found, repeated, cancelled, amplification], merged


def farthest_points(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` distinct local indices: the largest L1 norm first, then always the token farthest from those chosen.

    Parameters
    ----------
    keys : Tensor [V, H_kv * d]
        Keys, heads concatenated.
    count
        Pivots wanted; at most V are returned.

    Returns
    -------
    Tensor [min(count, V)] int64, and Tensor [] bool: whether plain farthest-point sampling would have repeated a token.

    Paper: arXiv 2512.02700 (pivot initialisation).
    """
    chosen = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    pivots, repeated = [l1_norms(keys).argmax().view(1)], chosen.any()
    distance = squared_distances(keys, keys.index_select(0, pivots[0])) if count > 1 else keys.new_zeros(len(keys))
    while len(pivots) < min(count, len(keys)):
        chosen = chosen.index_fill(0, pivots[-1], True)
        if len(pivots) > 1:
            distance = _nearer(distance, keys, pivots[1:], chosen)
        repeated = repeated | chosen.index_select(0, distance.argmax().view(1)).any()
        pivots.append(distance.masked_fill(chosen, -1).argmax().view(1))
    return torch.cat(pivots), repeated


def farthest_of_batch(keys: Tensor, lengths: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`farthest_points` of several images at once, without synchronising.

    Parameters
    ----------
    keys : Tensor [B, V, H_kv * d]
        Keys.
    lengths : Tensor [B]
        Tokens of each image.

    Returns
    -------
    Tensor [B, min(count, V)] int64, any index behind an image's own tokens, and Tensor [B] bool.
    """
    outside = torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None]
    chosen = torch.zeros_like(outside)
    repeated = chosen.any(1)
    distance = keys.new_full(outside.shape, math.inf)
    pivots = [keys.abs().sum(-1).masked_fill(outside, -1).argmax(1, keepdim=True)]
    while len(pivots) < min(count, keys.shape[1]):
        chosen = chosen.scatter(1, pivots[-1], True)
        point = keys.gather(1, pivots[-1][:, :, None].expand(-1, 1, keys.shape[2]))
        distance = torch.minimum(distance, (keys - point).square_().sum(-1)).masked_fill_(outside, -1)
        repeated = repeated | (chosen.gather(1, distance.argmax(1, keepdim=True))[:, 0] & (len(pivots) < lengths))
        pivots.append(distance.masked_fill(chosen, -1).argmax(1, keepdim=True))
    return torch.cat(pivots, 1), repeated


def _nearer(distance: Tensor, keys: Tensor, pivots: list[Tensor], chosen: Tensor) -> Tensor:
    """Distances [V] to the nearest pivot, exact wherever one could be the largest of the tokens not chosen.

    A new pivot only makes distances smaller, so those before it are bounds, and on a CPU the tokens are looked at from the
    largest bound down until what is found is above all that is left. Looking takes waits, so a GPU computes all.
    """
    if keys.device.type != "cpu":
        return torch.minimum(distance, squared_distances(keys, keys.index_select(0, pivots[-1])))
    farthest = -1.0
    for some in distance.sort(descending=True).indices.split(_LOOK_AT):
        if distance[some[0]] < farthest:
            break
        rows = keys.index_select(0, some)
        exact = [squared_distances(rows, keys.index_select(0, pivot)) for pivot in pivots]
        distance = distance.index_copy(0, some, torch.stack([distance[some], *exact]).amin(0))
        farthest = max(farthest, distance[some].masked_fill(chosen[some], -1).amax().item())
    return distance


def most_variable(states: Tensor, channels: int) -> Tensor:
    """The `channels` columns of largest variance over the tokens: [V, D] to [V, min(channels, D)].

    Paper: arXiv 2512.02700 (channel selection).
    """
    if channels >= states.shape[1]:
        return states
    picked = variances(states).sort(descending=True, stable=True).indices[:channels]
    return states.index_select(1, picked.sort().values)
