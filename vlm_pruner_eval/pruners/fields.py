"""Tensors that a method reads: found by the names in `needs`, checked for their shapes, and put back in another dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.types import TextTokens, VisualTokens

PLAIN = frozenset({"keys", "attention", "normed_hidden_states", "positions", "text", "own_attention", "text_attention"})

# name in `needs` -> attributes behind it; the first one must be there
PARTS = {
    "vision.states": ("states", "cls_state"),
    "vision.cls_attention": ("cls_attention",),
    "vision.received_attention": ("received_attention",),
    "vision.keys": ("keys",),
    "vision.cls_query": ("cls_query", "cls_key"),
    "question.embeddings": ("image_embeddings", "text_embeddings"),
    "question.clip": ("clip_image", "clip_text"),
}
_TOKENS_IN = {"cls_attention": 1}  # dimension that holds the tokens, if not the first
_WITHOUT_TOKENS = frozenset({"cls_state", "cls_query", "cls_key", "text_embeddings", "clip_text"})


def read(tokens: VisualTokens, needs: Iterable[str], layers: Iterable[int], where: str) -> dict[str, Tensor]:
    """Return the floating-point tensors that a method reads, by names such as "keys", "text.keys", "vision.keys[-2]".

    Parameters
    ----------
    layers
        Layers of the vision tower that must be there, see `Pruner.tower_layers`.
    where
        How sentences about the tokens begin.

    Raises
    ------
    PruningError
        A field that is not there, or that has not one row for every token.
    """
    named = {"hidden_states": tokens.hidden_states}
    for need in sorted(needs):
        named |= dict(_plain(tokens, need, where) if need in PLAIN else _nested(tokens, need, tuple(layers), where))
    found = {name: value for name, value in named.items() if isinstance(value, Tensor) and value.is_floating_point()}
    for name, value in found.items():
        _check_rows(name, value, tokens.n_visual, where)
    return found


def replaced(tokens: VisualTokens, tensors: Mapping[str, Tensor], **changes: Any) -> VisualTokens:
    """Return `tokens` with other tensors under the names that `read` gave them, and with `changes`."""
    nested: dict[str, dict[str, Any]] = {}
    for name, value in tensors.items():
        owner, _, rest = name.partition(".")
        attribute, _, layer = rest.rstrip("]").partition("[")
        if not rest:
            changes[name] = value
        elif layer:
            nested.setdefault(owner, {}).setdefault(attribute, {})[int(layer)] = value
        else:
            nested.setdefault(owner, {})[attribute] = value
    parts = {owner: dataclasses.replace(getattr(tokens, owner), **values) for owner, values in nested.items()}
    return dataclasses.replace(tokens, **changes, **parts)


def _plain(tokens: VisualTokens, need: str, where: str) -> Iterator[tuple[str, Any]]:
    value = getattr(tokens, need)
    if value is None:
        raise PruningError(f"{where}: needs {need!r}, got None; fill VisualTokens.{need}.")
    if isinstance(value, TextTokens):
        yield from ((f"text.{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value))
    else:
        yield need, value


def _nested(tokens: VisualTokens, need: str, layers: tuple[int, ...], where: str) -> Iterator[tuple[str, Any]]:
    owner = need.partition(".")[0]
    held = getattr(tokens, owner)
    for i, attribute in enumerate(PARTS[need]):
        value = getattr(held, attribute, None)
        if isinstance(value, Mapping):
            missing = [layer for layer in layers if layer not in value] if i == 0 else []
            if missing:
                raise PruningError(f"{where}: needs {need!r} of layers {list(layers)}, got {sorted(value)}; fill VisualTokens.{need}.")
            yield from ((f"{owner}.{attribute}[{layer}]", of_layer) for layer, of_layer in value.items())
        elif value is not None:
            yield f"{owner}.{attribute}", value
        elif i == 0:
            raise PruningError(f"{where}: needs {need!r}, got None; fill VisualTokens.{owner}.{attribute}.")


def _check_rows(name: str, value: Tensor, n_visual: int, where: str) -> None:
    attribute = name.rpartition(".")[2].partition("[")[0]
    if name.startswith("text.") or attribute in _WITHOUT_TOKENS:
        return
    dimension = _TOKENS_IN.get(attribute, 0)
    if value.dim() <= dimension or value.shape[dimension] != n_visual:
        place = "rows" if dimension == 0 else "columns"
        raise PruningError(f"{where}: {name} has shape {tuple(value.shape)}, expected {n_visual} {place}.")
