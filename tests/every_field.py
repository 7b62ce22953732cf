"""All tensors of made-up tokens, wherever they are held: by path, moved elsewhere, or under a method's memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from vlm_pruner_eval import VisualTokens


def tensors(value: object, path: str = "") -> dict[str, Tensor]:
    """Tensors by paths such as "keys", "text.keys" and "vision.keys[-2]"; not those behind callables."""
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, Mapping):
        parts: list[tuple[str, object]] = [(f"{path}[{key}]", part) for key, part in value.items()]
    elif is_dataclass(value):
        parts = [(f"{path}.{field.name}" if path else field.name, getattr(value, field.name)) for field in fields(value)]
    else:
        return {}
    return {name: tensor for at, part in parts if at != "memory" for name, tensor in tensors(part, at).items()}


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor changed, also those that `partial` holds; VisualTokens with an empty memory."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, partial):
        return partial(value.func, *(mapped(part, change) for part in value.args))
    if isinstance(value, Mapping):
        return {key: mapped(part, change) for key, part in value.items()}
    if not is_dataclass(value):
        return value
    found = replace(value, **{field.name: mapped(getattr(value, field.name), change) for field in fields(value)})
    return replace(found, memory={}) if isinstance(found, VisualTokens) else found


def afresh(tokens: VisualTokens) -> VisualTokens:
    """The same tokens, of which no stage has seen anything yet."""
    return replace(tokens, memory={})
