"""Golden files of the methods of the vision tower: inputs to the public methods, answers to what the files call their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zoo_order import NEXT_VIEWS, SIDE, next_order, next_scope

from vlm_pruner_eval import Selection, VisualTokens, get_pruner
from vlm_pruner_eval.types import VisionTokens
from vlm_pruner_eval.vlms.parts.image_views import views_of

Arrays = dict[str, np.ndarray]
RATE = 0.5  # not used: the files say how many to keep
SQUARE = 5  # views of an image of 2 x 2 tiles


def as_is(states: Tensor) -> Tensor:
    return states


def view_tokens(vision: VisionTokens, number: int, *, states: Tensor | None = None, **more: Any) -> VisualTokens:
    """Tokens of one view of the image that all views belong to; `states` after the projector are those before it by default."""
    hidden = vision.states if states is None else states
    grid = more.pop("grid", (SIDE, SIDE) if len(hidden) == SIDE**2 else (1, len(hidden)))
    return VisualTokens(hidden, grid=grid, vision=vision, image="the image", sample_id=f"view {number}", **more)


def answers(method: str, views: list[VisualTokens], keep: int, **parameters: Any) -> list[Selection]:
    """Answers by default, or as the release gives them if it does something wrong on these views."""
    by_default = get_pruner(method, pruning_rate=RATE, **parameters).select_batch(views, [keep] * len(views))
    if not any(one.quirks for one in by_default):
        return by_default
    return get_pruner(method, pruning_rate=RATE, official_quirks=True, **parameters).select_batch(views, [keep] * len(views))


def stacked(parts: list[Tensor]) -> np.ndarray:
    return torch.stack(parts).numpy()


def with_prompt_order(found: Arrays, meta: Mapping[str, Any]) -> Arrays:
    """The same, and the order in a prompt of LLaVA-NeXT if the file has one."""
    if meta.get("views") == NEXT_VIEWS:
        found["llm_order"] = next_order(torch.from_numpy(found["keep"])).numpy()
    return found


def by_cls(method: str, arrays: Arrays, keep: int, **parameters: Any) -> list[Selection]:
    """Answers of a method that reads the CLS row and, if the file has them, the states before the projector."""
    attention = torch.from_numpy(arrays["cls_attention"])
    states = torch.from_numpy(arrays["features"]) if "features" in arrays else torch.zeros(len(attention), attention.shape[2], 1)
    pairs = zip(states, attention, strict=True)
    views = [view_tokens(VisionTokens(states=of, cls_attention={-2: row}), i) for i, (of, row) in enumerate(pairs)]
    return answers(method, views, keep, **parameters)


def fastervlm(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    found = by_cls("fastervlm", arrays, meta["tokens_per_view"])
    return with_prompt_order({"keep": stacked([one.keep for one in found])}, meta)


def vispruner(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    keep, ratio = meta["tokens_per_view"], meta["important_ratio"]
    found = by_cls("vispruner", arrays, keep, important_ratio=ratio)
    important, diverse = torch.stack([one.order for one in found]).split([int(keep * ratio), keep - int(keep * ratio)], 1)
    kept = stacked([one.keep for one in found])
    return with_prompt_order({"keep": kept, "important": important.numpy(), "diverse": diverse.numpy()}, meta)


def scope(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    combined = {"multi": "multiply"}.get(meta["combined"], meta["combined"])
    found = by_cls("scope", arrays, meta["tokens_per_view"], alpha=meta["alpha"], combined=combined)
    return with_prompt_order({"greedy_order": stacked([one.order for one in found]), "keep": stacked([one.keep for one in found])}, meta)


def prumerge(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    """Rows of the release; which patch a row is, is read off an answer on states that are one-hot: it adds less than 1 of the others."""
    method = {"prumerge": "prumerge", "prumerge+": "prumerge_plus"}[meta["variant"]]
    query, keys, features = (torch.from_numpy(arrays[key]) for key in ("query_cls", "keys", "features"))
    keep = 1 if meta["adaptive"] else int(meta["N"] * meta["reduction_ratio"])

    def rows(states: Callable[[int], Tensor]) -> Tensor:
        views = []
        for i in range(len(keys)):
            tower = {"cls_query": {-1: query[i, None]}, "cls_key": {-1: keys[i, :1]}, "keys": {-1: keys[i, 1:, None]}}
            views.append(view_tokens(VisionTokens(states=states(i), project=as_is, **tower), i))
        return torch.stack([one.hidden_states for one in answers(method, views, keep, fixed=not meta["adaptive"])])

    patches = rows(lambda i: torch.eye(features.shape[1])).argmax(2)[:, :-1]
    return {"order": patches.numpy(), "output_states": rows(lambda i: features[i]).numpy()}


def hiprune(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    shallow, deep = (torch.from_numpy(arrays[f"attention_{layer}_layer"]) for layer in ("object", "deep"))
    states = torch.zeros(meta["N"], 1)
    if meta["family"] == "qwen2_5_vl":
        tokens = view_tokens(VisionTokens(received_attention={15: shallow, -1: deep}), 0, states=states, grid=tuple(meta["grid"]))
        (found,) = answers("hiprune", [tokens], meta["tokens_asked"], alpha=meta["alpha"], object_layer=15, deep_layer=-1)
        return {"keep": found.keep.numpy()}
    layer = meta["object_layer"] - 1  # the release counts from 1
    received = [attention.mean((1, 2))[:, 1:] for attention in (shallow, deep)]
    towers = [VisionTokens(received_attention={layer: first, -2: last}) for first, last in zip(*received, strict=True)]
    views = [view_tokens(tower, i, states=states) for i, tower in enumerate(towers)]
    several = answers("hiprune", views, meta["tokens_per_view"], alpha=meta["alpha"], object_layer=layer)
    return with_prompt_order({"keep": stacked([one.keep for one in several])}, meta)


def holov(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    """Rows in the order of the sequence; -1 is a row of zeros."""
    names = torch.from_numpy(arrays["input_sequence"]) if "input_sequence" in arrays else torch.arange(meta["N"])
    features = torch.from_numpy(arrays["projected_features"]).flatten(0, 1)[names]
    attention = torch.from_numpy(arrays["cls_attention"]).transpose(0, 1).flatten(1)[:, names]
    tokens = view_tokens(VisionTokens(cls_attention={-2: attention}), 0, states=features)
    (found,) = answers("holov", [tokens], meta["tokens"], crops=meta["crops"])
    is_zero = (found.hidden_states == 0).all(1)
    assert torch.equal(found.hidden_states[~is_zero], features[found.order[~is_zero]])
    return {"order": names[found.order].masked_fill(is_zero, -1)[None].numpy()}


def zip_share(dominant: int, contextual: int) -> Fraction:
    return Fraction(contextual, dominant + contextual)


def visionzip(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    """Rows before the projector; index 0 is the CLS token, patches count from 1."""
    dominant, dtype = meta["dominant_arg"], torch.float16 if meta["compute_dtype"] == "f16" else torch.float32
    attention, states, keys = (torch.from_numpy(arrays[key]).to(dtype) for key in ("cls_attention", "hidden_states", "metric"))
    tower = {"cls_attention": {-2: attention[:, 1:]}, "keys": {-2: keys[0, 1:, None]}}
    vision = VisionTokens(states=states[0, 1:], cls_state=states[0, 0], project=as_is, **tower)
    tokens = view_tokens(vision, 0, positions=torch.arange(meta["N"]))
    share = zip_share(dominant, meta["contextual"])
    (found,) = answers("visionzip", [tokens], dominant + meta["contextual"], contextual_share=share, selection_dtype="model")
    patches = torch.cat([torch.zeros(1, dtype=torch.int64), found.order[1:dominant] + 1])
    rows = found.hidden_states.numpy()
    return {"all_indices": patches.numpy(), "dominant_sorted": patches.sort().values.numpy(), "output_tokens": rows}


def visionzip_next(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    """Order of rows named view * rows + row; states are these names, and patches that join a contextual row add nothing."""
    dominant, contextual, n_views = meta["dominant"], meta["contextual"], meta["views"]
    width, height = meta["image_size"]
    tiles = (2, 2) if n_views == SQUARE else (n_views - 1, 1) if height > width else (1, n_views - 1)
    prompt = views_of(next_scope(tiles), side=SIDE)
    patches = torch.from_numpy(arrays["all_indices"])[:, 1:].sort(1).values - 1
    views = []
    for i, kept in enumerate(patches):
        rest = torch.tensor(sorted({*range(meta["N"])} - {*kept.tolist()}))
        targets = rest[:: len(rest) // contextual][:contextual]
        names = torch.zeros(meta["N"], 1)
        names[torch.cat([kept, targets]), 0] = torch.arange(1.0, dominant + contextual) + i * (dominant + contextual)
        attention = torch.zeros(1, meta["N"]).index_fill_(1, kept, 1)
        tower = {"cls_attention": {-2: attention}, "keys": {-2: torch.ones(meta["N"], 1, 4)}}
        vision = VisionTokens(states=names, cls_state=torch.tensor([float(i * (dominant + contextual))]), project=as_is, **tower)
        views.append(view_tokens(vision, i, positions=prompt[i].positions))
    found = answers("visionzip", views, dominant + contextual, contextual_share=zip_share(dominant, contextual))
    at = torch.cat([view.positions[one.keep] for view, one in zip(prompt, found, strict=True)])
    rows = torch.cat([one.hidden_states[:, 0] for one in found])
    return {"llm_order": rows[at.argsort()].round().long().numpy()}
