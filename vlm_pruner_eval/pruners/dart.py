"""DART: keep a few pivots and, for each of them, the visual tokens that duplicate it least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.pruners.base import Pruner, unit_rows
from vlm_pruner_eval.pruners.blocks import l1_norms, row_blocks
from vlm_pruner_eval.types import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class DART(Pruner):
    """Image and text pivots by key norm; every pivot in turn takes its share of the least similar remaining tokens.

    By default exactly R tokens are kept: pivots in descending order of norm, image pivots first, the last pivot's share
    cut or filled. A prompt with fewer text tokens after the image than `text_pivots` uses those there are.
    Quirks of the release (ZichenWen1/DART 5a19452), counted in both modes and brought back by `official_quirks`:
    "count" (it keeps 4 + 8 * floor(R / 8) tokens), and "set_order" (pivots are walked in the order of a CPython set of
    absolute positions, so that the length of the prompt changes the choice).

    Parameters
    ----------
    image_pivots
        Visual tokens of largest key norm, always kept, 1 or more.
    text_pivots
        Text tokens of largest key norm after the image, 0 or more.

    Paper: arXiv 2502.11494 (EMNLP 2025).
    """

    name: ClassVar[str] = "dart"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "normed_hidden_states", "positions", "text"})
    quirks_change_count: ClassVar[bool] = True
    checks_late: ClassVar[bool] = True

    image_pivots: int = 4
    text_pivots: int = 4

    def problems(self) -> list[str]:
        """The base's, and the ranges of the numbers of pivots."""
        found = super().problems()
        if self.image_pivots < 1:
            found.append(f"image_pivots: got {self.image_pivots}, expected a whole number, 1 or more.")
        if self.text_pivots < 0:
            found.append(f"text_pivots: got {self.text_pivots}, expected a whole number, 0 or more.")
        return found

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> list[Selection]:
        """Image pivots, then each pivot's least similar tokens.

        The pivots take turns on the host whatever the device is: the order of the turns may depend on where the pivots stand, and
        the device would be waited for once for that and once more for the answer.
        """
        arrived = tokens[0].on_host(*(tensor for given in tokens for tensor in self._compared(given)))
        return [self._by_turns(*one) for one in zip(arrived[::3], arrived[1::3], arrived[2::3], keeps, strict=True)]

    def _compared(self, tokens: VisualTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines [P, V] of the pivots, the image's pivots, and the positions [P] of all."""
        image = largest_keys(tokens.keys, self.image_pivots)
        states, positions = tokens.normed_hidden_states[image], tokens.positions[image]
        text = tokens.text
        if text.keys is not None and len(text.keys):
            after = largest_keys(text.keys, self.text_pivots)
            states = torch.cat([states, text.normed_hidden_states[after]])
            positions = torch.cat([positions, text.positions[after]])
        return cosines(states, tokens.normed_hidden_states), image, positions

    def _by_turns(self, cosine: Tensor, image: Tensor, positions: Tensor, keep: int) -> Selection:
        share = keep // len(positions)
        set_order = as_a_set(positions.tolist())
        released = min(cosine.shape[1], len(image) + len(positions) * share)
        fired = {"count": released != keep, "set_order": set_order != [*range(len(positions))]}
        walk, count = (set_order, released) if self.official_quirks else ([*range(len(positions))], keep)
        order = least_similar(cosine[walk], image[:count], share, count)
        return Selection(order, quirks=frozenset(quirk for quirk, did in fired.items() if did))


def largest_keys(keys: Tensor, count: int) -> Tensor:
    """Up to `count` indices of keys [N, H_kv, d] by descending L1 norm over all heads.

    Paper: arXiv 2502.11494 (pivot selection).
    """
    return l1_norms(keys.flatten(1)).sort(descending=True, stable=True).indices[:count]


def as_a_set(positions: list[int]) -> list[int]:
    """The order in which CPython walks a set of these absolute positions, as indices into the list.

    The hash of an int is its value, so the order is part of the language's implementation and not of the method.
    """
    return [positions.index(position) for position in set(positions)]


def cosines(pivots: Tensor, states: Tensor) -> Tensor:
    """Cosines [P, V] of pivots [P, D] and states [V, D]."""
    unit = unit_rows(pivots)
    return torch.cat([unit @ unit_rows(block).T for block in row_blocks(states)], dim=1)


def least_similar(cosine: Tensor, start: Tensor, share: int, count: int) -> Tensor:
    """Grow `start` to `count` tokens: each pivot in turn takes `share` of the rest, the last one all that is missing.

    Parameters
    ----------
    cosine : Tensor [P, V]
        Cosines of the pivots, image and text, in the order of their turns, and the visual tokens, both after the model's final norm.
    start : Tensor [S]
        Local indices kept from the start.
    share, count
        Tokens per pivot, and in all.

    Paper: arXiv 2502.11494 (duplication by cosine similarity to the pivots).
    """
    taken = torch.zeros(cosine.shape[1], dtype=torch.bool)
    taken[start] = True
    parts, missing = [start], count - len(start)
    for turn, row in enumerate(cosine):
        amount = missing if turn == len(cosine) - 1 else min(share, missing)
        parts.append(row.masked_fill(taken, math.inf).sort(stable=True).indices[:amount])
        taken[parts[-1]] = True
        missing -= amount
    return torch.cat(parts)
