"""Lets a method merge patches inside the vision tower, image by image; the model is given a feature for every patch again.

The model counts one placeholder for each patch, so patches that became one token all get its feature; the method's first stage, in
front of decoder layer 0, keeps one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.vlms.parts.layout import Layout
from vlm_pruner_eval.vlms.parts.towers import Entered, GridTower

BEHIND = 1  # layer in front of which patches are merged


class TowerMerging:
    """Runs a tower on the images of a batch one by one, because each becomes another number of tokens.

    Attributes
    ----------
    groups : list of Tensor [views, N] int64
        Of each image, the token that every patch became.
    """

    def __init__(self, tower: GridTower, pruner: Pruner, entered: Callable[[], Entered]):
        self._tower, self._pruner, self._entered = tower, pruner, entered
        self._layouts: Sequence[Layout] = ()
        self._now: Tensor | None = None
        self.groups: list[Tensor] = []
        self.entered: list[dict[int, Any]] = []
        self.handles = [tower.blocks[BEHIND].register_forward_pre_hook(self._merge, with_kwargs=True)]

    def begin(self, layouts: Sequence[Layout]) -> None:
        """Images of these layouts are going to be encoded."""
        self._layouts = layouts
        self.groups = []
        self.entered = []

    def run(self, original: Callable[..., Any], pixel_values: Tensor, *args: object, **kwargs: object) -> Any:
        """In place of the tower's forward: its outputs, with a row for every patch."""
        parts = []
        for pixels in pixel_values.split([self._tower.n_views(layout) for layout in self._layouts]):
            output = original(pixels, *args, **kwargs)
            parts.append(self._spread(output))
            self.groups.append(self._now)
            self.entered.append(dict(self._entered()))
        return _joined(parts)

    def _merge(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        states = args[0] if args else kwargs["hidden_states"]
        self._now = self._pruner.inside_tower(states, (self._tower.side, self._tower.side))
        merged = self._pruner.merged_inside(states, self._now)
        return ((merged, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": merged})

    def _spread(self, output: Any) -> Any:
        """The tower's output, in which hidden states of merged tokens [views, 1 + M, C] become [views, 1 + N, C] again."""
        hidden = tuple(None if states is None else self._spread_states(states) for states in output.hidden_states)
        return dataclasses.replace(output, last_hidden_state=self._spread_states(output.last_hidden_state), hidden_states=hidden)

    def _spread_states(self, states: Tensor) -> Tensor:
        n_patches = self._now.shape[1]
        if states.shape[1] == 1 + n_patches:
            return states
        index = torch.cat([torch.zeros_like(self._now[:, :1]), self._now + 1], 1)
        return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def _joined(parts: Sequence[Any]) -> Any:
    first = parts[0]
    layers = zip(*(part.hidden_states for part in parts), strict=True)
    hidden = tuple(None if states[0] is None else torch.cat(states) for states in layers)
    last = torch.cat([part.last_hidden_state for part in parts])
    pooled = getattr(first, "pooler_output", None)
    changes = {} if pooled is None else {"pooler_output": torch.cat([part.pooler_output for part in parts])}
    return dataclasses.replace(first, last_hidden_state=last, hidden_states=hidden, **changes)
