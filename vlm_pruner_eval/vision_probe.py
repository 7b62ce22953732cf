"""Reads of a vision tower what methods look at: inputs of named layers, and the states that the projector takes.

Hooks only hold on to tensors that the tower makes anyway; attention and keys are computed for the methods that ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlm_pruner_eval.budget import parse_rate
from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.pruners.base import Pruner
from vlm_pruner_eval.tower_merging import TowerMerging
from vlm_pruner_eval.types import VisionTokens
from vlm_pruner_eval.vlms.parts.layout import Layout, Part
from vlm_pruner_eval.vlms.parts.towers import Entered, GridTower, Tower, projecting


def vision_probe_for(tower: Tower | None, pruners: Sequence[Pruner]) -> VisionProbe | None:
    """The probe that methods need, together; None if no one looks at the tower."""
    looking = [pruner for pruner in pruners if looks_at_vision(pruner.needs)]
    if tower is None or not looking:
        return None
    needs = frozenset().union(*(pruner.needs for pruner in looking))
    layers = [layer for pruner in looking for layer in pruner.tower_layers()]
    inside = [pruner for pruner in looking if pruner.acts_in_tower and parse_rate(pruner.pruning_rate) != 0]
    return VisionProbe(tower, needs, layers, inside[0] if inside else None)


def adaptation(pruner: Pruner, tower: Tower | None) -> str | None:
    """Say how a method is adapted to a model: with stand-ins for what it was published with; None if it is as published."""
    reasons = []
    if getattr(pruner, "text_tower", None) == "llm":
        reasons.append("the language model's own embeddings stand in for those of a text tower")
    if tower is not None and tower.adapted and looks_at_vision(pruner.needs):
        reasons.append(tower.adapted)
    return "; ".join(reasons) or None


def looks_at_vision(needs: Iterable[str]) -> bool:
    """Tell if a method that reads these fields looks at the vision tower."""
    return bool(_vision_fields(needs))


def _vision_fields(needs: Iterable[str]) -> set[str]:
    """Attributes of `VisionTokens` that are to be read; the embeddings of CLIP's own projection are made from states."""
    fields = {need.partition(".")[2] for need in needs if need.startswith("vision.")}
    return fields | {"states"} if "question.clip" in needs else fields


@dataclass
class Encoded:
    """What was seen of one call of the tower.

    Attributes
    ----------
    entered
        Layer -> what it was called with.
    states : Tensor [views, n, C] or None
        Input of the projector.
    cls_states : Tensor [views, C] or None
        CLS tokens behind the layer that the projector reads.
    merged
        Of a method that acts inside the tower, for each image: what layers were called with, and the token that each patch became.
    """

    entered: dict[int, tuple[Tensor, Mapping[str, Any]]] = field(default_factory=dict)
    states: Tensor | None = None
    cls_states: Tensor | None = None
    merged: list[tuple[Entered, Tensor]] = field(default_factory=list)


class VisionProbe:
    """Holds what methods need of the images of the present batch.

    Parameters
    ----------
    needs
        Fields of `VisionTokens`, as methods name them: "vision.keys".
    layers
        As methods name them, see `Tower.number`.
    inside
        The method that acts inside the tower, if there is one.
    """

    def __init__(self, tower: Tower, needs: Iterable[str], layers: Iterable[int], inside: Pruner | None = None):
        self.tower = tower
        self._needs = _vision_fields({*needs})
        self._layers = sorted(set(layers))
        self._now = Encoded()
        self._shown: Encoded | None = None
        self._known: dict[str, tuple[Encoded, Sequence[Layout]]] = {}
        self._aligned: dict[tuple[object, ...], Any] = {}
        self.handles: list[RemovableHandle] = []
        self.merging = None
        if inside is not None:
            assert isinstance(tower, GridTower)
            self.merging = TowerMerging(tower, inside, lambda: self._now.entered)
            self.handles += self.merging.handles
        for number in {tower.number(layer) for layer in self._layers}:
            self.handles.append(tower.blocks[number].register_forward_pre_hook(self._enter(number), with_kwargs=True))
        if "states" in self._needs and tower.projector is not None:
            self.handles.append(tower.projector.register_forward_pre_hook(self._project))
            if isinstance(tower, GridTower) and tower.has_cls:
                self.handles.append(tower.blocks[tower.number(-2)].register_forward_hook(self._leave))

    # ---- while the tower runs
    def begin(self, layouts: Sequence[Layout] = ()) -> None:
        """Images of these layouts are going to be encoded."""
        self._now = Encoded()
        self._shown = None
        if self.merging is not None:
            self.merging.begin(layouts)

    def show(self, encoded: Encoded) -> None:
        """Take what another probe saw of these images, in place of a forward that is left out."""
        self._shown = encoded

    def end(self, kind: str, layouts: Sequence[Layout]) -> Encoded:
        """Images or videos have been encoded; `layouts` are theirs, in order."""
        encoded = self._shown or self._now
        if self.merging is not None:
            encoded.merged = list(zip(self.merging.entered, self.merging.groups, strict=True))
        self._known[kind] = encoded, layouts
        self._aligned.clear()
        return encoded

    def forget(self) -> None:
        """Let go of the tensors."""
        self._known.clear()
        self._aligned.clear()
        self.begin()

    # ---- for methods
    def tokens(self, parts: Sequence[Part], hidden: Tensor) -> VisionTokens:
        """What the tower knows of the tokens of a scope.

        Parameters
        ----------
        hidden : Tensor [V, D]
            Their projected states, which stand in where the tower's own can't be told apart.
        """
        found: dict[str, Any] = {}
        for name in sorted(self._needs - {"states", "cls_query"}):
            axis = int(name == "cls_attention")
            found[name] = {layer: self._joined(name, layer, parts, axis) for layer in self._layers}
        if "cls_query" in self._needs:
            rows = {layer: self._cls_rows(parts[0], layer) for layer in self._layers}
            found["cls_query"] = {layer: query for layer, (query, _) in rows.items()}
            found["cls_key"] = {layer: key for layer, (_, key) in rows.items()}
        if "states" in self._needs:
            found |= self._states(parts, hidden)
        if self.merging is not None:
            found["groups"] = self._joined("groups", None, parts, 0)
            found["views"] = self._joined("views", None, parts, 0)
        return VisionTokens(**found)

    def _states(self, parts: Sequence[Part], hidden: Tensor) -> dict[str, Any]:
        if self.tower.projector is None:
            return {"states": hidden, "project": lambda states: states}
        encoded, _ = self._of(parts[0])
        first = None if encoded.cls_states is None else encoded.cls_states[self._view(parts[0])]
        states = self._joined("aligned_states", None, parts, 0)
        return {"states": states, "cls_state": first, "project": projecting(self.tower.projector)}

    def _joined(self, name: str, layer: int | None, parts: Sequence[Part], axis: int) -> Tensor:
        """Values of all tokens of a scope, which stand along `axis`."""
        values = []
        for part in parts:
            of_image = self._of_images(name, layer, part.kind)[self._number(part)]
            chosen = of_image if part.tokens is None else of_image.index_select(axis, part.tokens.to(of_image.device, non_blocking=True))
            values.append(chosen)
        return values[0] if len(values) == 1 else torch.cat(values, axis)

    def _of_images(self, name: str, layer: int | None, kind: str) -> list[Tensor]:
        """Values of all images of a kind, aligned once."""
        key = (name, layer, kind)
        if key not in self._aligned:
            encoded, layouts = self._known[kind]
            if encoded.merged:
                self._aligned[key] = self._of_merged(name, layer, encoded, layouts)
                return self._aligned[key]
            read: Callable[..., list[Tensor]] = getattr(self.tower, name)
            given = (encoded.states,) if layer is None else (encoded.entered, self.tower.number(layer))
            self._aligned[key] = read(*given, layouts)
        return self._aligned[key]

    def _of_merged(self, name: str, layer: int | None, encoded: Encoded, layouts: Sequence[Layout]) -> list[Tensor]:
        """Values of images whose patches were merged: each patch has that of the token that it became."""
        tower = self.tower
        assert isinstance(tower, GridTower)
        if name == "groups":
            return [tower.aligned_groups(groups, layout) for (_, groups), layout in zip(encoded.merged, layouts, strict=True)]
        if name == "views":
            pairs = zip(encoded.merged, layouts, strict=True)
            return [tower.views(layout).to(groups.device, non_blocking=True) for (_, groups), layout in pairs]
        assert name == "cls_attention" and layer is not None
        images = zip(encoded.merged, layouts, strict=True)
        return [tower.cls_attention(entered, tower.number(layer), [layout], groups)[0] for (entered, groups), layout in images]

    def _cls_rows(self, part: Part, layer: int) -> tuple[Tensor, Tensor]:
        if not isinstance(self.tower, GridTower) or not self.tower.has_cls:
            raise PruningError("prune: got a vision tower without a CLS token, expected one whose query the method can read.")
        key = ("cls_rows", layer, part.kind)
        if key not in self._aligned:
            self._aligned[key] = self.tower.cls_rows(self._of(part)[0].entered, self.tower.number(layer))
        queries, keys = self._aligned[key]
        return queries[self._view(part)], keys[self._view(part)]

    def _of(self, part: Part) -> tuple[Encoded, Sequence[Layout]]:
        if part.kind not in self._known:
            raise PruningError(f"prune: the {part.kind}s of this prompt were not encoded in this context, expected them to be.")
        return self._known[part.kind]

    def _number(self, part: Part) -> int:
        """Number of a part's image among those that were encoded, which repeated prompts share."""
        return part.number % len(self._of(part)[1])

    def _view(self, part: Part) -> int:
        """Number of a part's first view among all that were encoded."""
        layouts = self._of(part)[1]
        assert isinstance(self.tower, GridTower)
        return sum(self.tower.n_views(layout) for layout in layouts[: self._number(part)]) + part.view

    # ---- hooks
    def _enter(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called = {name: kwargs[name] for name in ("position_embeddings", "cu_seqlens") if name in kwargs}
            self._now.entered[number] = (args[0] if args else kwargs["hidden_states"]), called

        return hook

    def _project(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._now.states = args[0]

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._now.cls_states = (output[0] if isinstance(output, tuple) else output)[:, 0]
