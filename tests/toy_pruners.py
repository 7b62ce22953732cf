"""Methods that exist to test the hook: simple, content-dependent, two stages, broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval import Pruner, Selection, Stage, VisualTokens, get_pruner, list_pruners
from vlm_pruner_eval.pruners import pruner_class
from vlm_pruner_eval.pruners.uniform import Uniform

IN_MODEL = [name for name in list_pruners() if not pruner_class(name).before_model]  # what `prune` takes
PARAMETERS: dict[str, dict[str, object]] = {  # that methods can't do without, or that suit tiny images
    "cdpruner": {"text_tower": "llm"},
    "trim": {"text_tower": "llm"},
    "mustdrop": {"thresholds": "0.05/0.2", "window_threshold": -1.0},
}


def made(name: str, pruning_rate: float | str = "2/3", **params: object) -> Pruner:
    """Build a method as it can be built for every model."""
    return get_pruner(name, pruning_rate=0 if name == "none" else pruning_rate, **PARAMETERS.get(name, {}) | params)


@dataclass(frozen=True, kw_only=True)
class KeyNorm(Pruner):
    """The longest keys of layer K-1, order by length; with `merge` the kept states are scaled."""

    name: ClassVar[str] = "keynorm"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    merge: bool = False

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor | Selection:
        order = tokens.keys.norm(dim=-1).sum(1).topk(keep).indices
        return Selection(order, tokens.hidden_states[order.sort().values] * 1.25) if self.merge else order


@dataclass(frozen=True, kw_only=True)
class StateNorm(Pruner):
    """The longest hidden states; needs nothing, so it works at K = 0 too."""

    name: ClassVar[str] = "statenorm"

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        return tokens.hidden_states.norm(dim=-1).topk(keep).indices


@dataclass(frozen=True, kw_only=True)
class Stride(Pruner):
    """Evenly spaced tokens: the same set whatever the numbers are."""

    name: ClassVar[str] = "stride"

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        return torch.arange(keep) * tokens.n_visual // max(keep, 1)


@dataclass(frozen=True, kw_only=True)
class TwoStages(Stride):
    """Half of the tokens at layer 1, a quarter of the original from layer 3 on; the first of what is left."""

    name: ClassVar[str] = "twostages"
    needs: ClassVar[frozenset[str]] = frozenset({"keys", "attention"})
    shares: ClassVar[tuple[tuple[int, Fraction], ...]] = ((1, Fraction(1, 2)), (3, Fraction(1, 4)))

    def stages(self, n_layers: int) -> tuple[Stage, ...]:
        return tuple(Stage(layer, share) for layer, share in self.shares)


@dataclass(frozen=True, kw_only=True)
class Broken(Pruner):
    """Answers wrongly in the way that `fault` names."""

    name: ClassVar[str] = "broken"
    fault: str = "raises"

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        if self.fault == "all":
            return torch.arange(tokens.n_visual)
        if self.fault == "duplicates":
            return torch.zeros(keep, dtype=torch.long)
        if self.fault == "out of range":
            return torch.arange(keep) + tokens.n_visual
        if self.fault == "unsorted float":
            return torch.rand(keep)
        raise RuntimeError("this method is broken on purpose")


@dataclass(frozen=True, kw_only=True)
class NoCheck(Broken):
    """A method that replaces `select`, and with it the base class's check."""

    name: ClassVar[str] = "nocheck"

    def select(self, tokens: VisualTokens, keep: int | None = None) -> Selection:
        assert keep is not None, "the hook always says how many"
        return Selection(self.choose(tokens, keep))


@dataclass(frozen=True, kw_only=True)
class Sabotage(Uniform):
    """Fails on samples whose id holds `on`."""

    name: ClassVar[str] = "sabotage"
    on: str = ""

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        chosen = super().choose(tokens, keep)
        return chosen[:1].expand(keep) if self.on in str(tokens.sample_id) else chosen


@dataclass(frozen=True, kw_only=True)
class Typo(Pruner):
    """Reads a field that is not there."""

    name: ClassVar[str] = "typo"

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        return tokens.hidden_state.norm(dim=-1).topk(keep).indices  # type: ignore[attr-defined]
