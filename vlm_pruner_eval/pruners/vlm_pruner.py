"""VLM-Pruner: pivots by key distance, growth from near to far by the BSS criterion, discarded tokens merged by similarity.

Paper: arXiv 2512.02700. Facts about the authors' release (Casey-bit/VLMPruner 556a914) are measured, see `official_quirks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.pruners.aggregation import plan_merge
from vlm_pruner_eval.pruners.base import Pruner, unit_rows
from vlm_pruner_eval.pruners.blocks import l1_norms, squared_distances, variances
from vlm_pruner_eval.pruners.bss import BssScores, Growth
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

    def choose(self, tokens: VisualTokens, keep: int) -> Selection:
        """Pivots, then passes of the BSS criterion, then the merge; `keep` = V still gives the order of selection.

        The growth is a chain of small steps, each of which decides the next, so it runs on the host whatever the device is:
        the cosines are fetched once, and that is the only time the host waits for the device.
        """
        states = tokens.hidden_states
        pivots, repeated = farthest_points(tokens.keys.flatten(1), self.pivots)
        features = unit_rows(most_variable(states, self.channels))
        similarity, coords, start, repeated = tokens.on_host((features @ features.T).float(), tokens.coords, pivots, repeated)
        start = start if self.official_quirks else start[:keep]
        growth = Growth(
            threshold=float(self.threshold),
            step=float(self.threshold_step),
            block=self.token_batch,
            stop_on_stall=self.official_quirks,
        )
        order, stalled = growth.order(BssScores(similarity, coords, tokens.grid, float(self.spatial_weight)), start, keep)
        merged, cancelled, amplification = None, False, None
        if self.merge:
            plan = plan_merge(similarity, order, self_weight=float(self.self_weight), plain_sum=self.official_quirks)
            del similarity  # before the new states are made: both at once would be the peak of memory
            merged, cancelled, amplification = plan.apply(states.float()), plan.cancelled, plan.amplification
        fired = {
            "stall": stalled,
            "fewer_than_pivots": keep < self.pivots,
            "repeated_pivots": bool(repeated) or self.pivots > tokens.n_visual,
            "negative_weight_sum": cancelled,
        }
        return Selection(order, merged, frozenset(quirk for quirk, did in fired.items() if did), amplification)


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
