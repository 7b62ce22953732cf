"""Golden files of the methods that cut inside the language model: their inputs through the public methods."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zoo_order import NEXT_VIEWS, next_order

from vlm_pruner_eval import Stage, VisualTokens, get_pruner
from vlm_pruner_eval.pruners.vscan import local_choice
from vlm_pruner_eval.types import QuestionTokens, VisionTokens

Arrays = dict[str, np.ndarray]
N_PATCHES = 576
RELEASED_LAYERS = [2, 6, 15]  # behind which SparseVLM cuts


def tensors(arrays: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


# ---- PDrop
def pdrop(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    given, start, n_visual = tensors(arrays), meta["image_start"], meta["n_image_current"]
    states = given["features"][0]
    attention = last_row(states, given, meta)[start : start + n_visual]
    method = get_pruner("pdrop", pruning_rate=0.5, schedule="published")
    stage = Stage(8 * (meta["stage"] + 1), meta["ratios"][meta["stage"] + 1])
    keep = method.keep_at(stage, meta["n_image_original"])
    tokens = VisualTokens(
        states[start : start + n_visual],
        grid=(1, n_visual),
        own_attention=attention,
        n_original=meta["n_image_original"],
        stage=meta["stage"],
    )
    kept = method.select(tokens, keep).keep + start
    text = torch.arange(start), torch.arange(start + n_visual, meta["L"])
    return {"kept_image_sorted": kept.numpy(), "keep_indexs": torch.cat([text[0], kept, text[1]]).numpy()}


def last_row(states: Tensor, given: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Tensor:
    """Head-mean attention [L] of the last token, by a layer's own norm and projections on its input [L, d]."""
    normed = states * (states.square().mean(-1, keepdim=True) + meta["rms_eps"]).rsqrt() * given["input_layernorm"]
    queries, keys = (rotated(normed @ given[name].T, meta["heads"], meta["rope_base"]) for name in ("Wq", "Wk"))
    scores = queries[:, -1:] @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
    return scores.softmax(-1)[:, 0].mean(0)


def rotated(projected: Tensor, heads: int, base: float) -> Tensor:
    """Rotary embedding of rows [L, d] at positions 0 .. L-1, by head: [heads, L, d / heads]."""
    rows = projected.view(len(projected), heads, -1).transpose(0, 1)
    half = rows.shape[-1] // 2
    frequencies = base ** -(torch.arange(half) / half)
    angles = torch.arange(rows.shape[1])[:, None] * frequencies
    first, second = rows[..., :half], rows[..., half:]
    turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
    return torch.cat(turned, -1)


# ---- SparseVLM
def sparsevlm(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    given, start, n_visual = tensors(arrays), meta["image_start"], meta["N"]
    attention = given["attn_text_rows"].mean(0)[:, start : start + n_visual]
    embeddings, states = given["embeds"][0], given["layer_output"][0]
    tokens = VisualTokens(
        states[start : start + n_visual],
        grid=(1, n_visual),
        text_attention=lambda rows: attention if rows is None else attention[rows],
        question=QuestionTokens(image_embeddings=embeddings[start : start + n_visual], text_embeddings=embeddings[start + n_visual :]),
    )
    number = RELEASED_LAYERS.index(meta["layer_idx"])
    params = {"pruning_rate": 1 - Fraction(meta["budget"], N_PATCHES)}
    method = get_pruner("sparsevlm", **params)
    asked = min(n_visual, method.keep_at(method.stages(32)[number], N_PATCHES))
    selection = method.select(tokens, asked)
    if selection.quirks:
        selection = get_pruner("sparsevlm", **params, official_quirks=True).select(tokens, asked)
    is_merged = torch.isin(selection.order, selection.merged)
    return {
        "text_rater_idx": tokens.memory["raters"].numpy(),
        "relation_vis_text": method.scores(tokens).numpy(),
        "kept_visual": (selection.order[~is_merged].sort().values + start).numpy(),
        "merged_tokens": selection.hidden_states[len(selection.order) - len(selection.merged) :].numpy(),
    }


# ---- VScan
def vscan(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    given = tensors(arrays)
    if meta["family"] != "llava":
        views = [(given["image_embeds"], given["attention_local"][None], given["attention_global"][None])]
        grid, keep = tuple(meta["grid"]), int(meta["ratio"] * meta["N"])
    else:
        views = [*zip(given["projected_features"], given["cls_attention_layer5"], given["cls_attention_layer_minus2"], strict=True)]
        grid, keep = (24, 24), meta["tokens_asked"]
    tokens = [
        VisualTokens(states, grid=grid, vision=VisionTokens(cls_attention={5: local, -2: far}), image="image")
        for states, local, far in views
    ]
    method = get_pruner("vscan", pruning_rate=0.5)
    selections = method.select_batch(tokens, [keep] * len(tokens))
    if any(selection.quirks for selection in selections):
        method = get_pruner("vscan", pruning_rate=0.5, official_quirks=True)
        selections = method.select_batch(tokens, [keep] * len(tokens))
    local = torch.stack([local_choice(view.vision.cls_attention[5].mean(0), view.coords, view.grid, keep) for view in tokens])
    kept = torch.stack([selection.keep for selection in selections])
    states = torch.stack([selection.hidden_states for selection in selections])
    if meta["family"] != "llava":
        return {"local_order": local[0].int().numpy(), "keep": kept[0].numpy(), "merged_states": states[0].numpy()}
    found = {"local": local.numpy(), "keep": kept.numpy(), "merged_states": states.numpy()}
    return found | ({"llm_order": unpadded_order(kept, meta["note"]).numpy()} if meta["views"] == NEXT_VIEWS else {})


def unpadded_order(keep: Tensor, note: str) -> Tensor:
    """Order of LLaVA-NeXT's kept patches as view * 576 + patch, of an image whose size the note says: no padding, -2 behind each row."""
    width, height = map(int, re.search(r"(\d+)x(\d+)", note).groups())
    order, side = next_order(keep), 48
    base, tiles = order[order < N_PATCHES], order[order >= N_PATCHES]
    view, patch = tiles // N_PATCHES - 1, tiles % N_PATCHES
    row, col = view // 2 * 24 + patch // 24, view % 2 * 24 + patch % 24
    top = max(0, (side - int(height * side / width)) // 2)
    left = max(0, (side - int(width * side / height)) // 2)
    inside = (col >= left) & (col < side - left)
    rows = [torch.cat([tiles[inside & (row == r)], torch.tensor([-2])]) for r in range(top, side - top)]
    return torch.cat([base, *rows])


# ---- MustDrop
def mustdrop(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    return (dropped_inside if meta["stage"] == "llm" else merged_inside)(tensors(arrays), meta)


def merged_inside(given: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Arrays:
    method = get_pruner("mustdrop", pruning_rate="2/3", window_threshold=meta["threshold"])
    states = given["layer0_states"]
    groups = method.inside_tower(states, (24, 24))
    merged = method.merged_inside(states, groups)
    key_sets = []
    for view, heads in zip(merged, given["cls_attention"], strict=True):
        n_tokens = len(view) - 1
        tokens = VisualTokens(
            view[1:],
            grid=(1, n_tokens),
            vision=VisionTokens(cls_attention={-1: heads[:, 1:]}),
            text_attention=lambda rows, n=n_tokens: torch.zeros(1, n),
        )
        method.select(tokens, n_tokens - 1)
        key_sets.append(tokens.memory["key_set"])
    return {"group_of_patch": groups.numpy(), "merged_states": merged.numpy(), "key_set": torch.stack(key_sets).numpy()}


def dropped_inside(given: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Arrays:
    method = get_pruner("mustdrop", pruning_rate="2/3", thresholds=f"{meta['global_thr']:.6f}/{meta['individual_thr']:.6f}")
    n_visual, key_set = given["attention_0"].shape[-1], given["key_set"]
    if key_set.dim() == 2:  # view after view
        key_set = (key_set + n_visual // len(key_set) * torch.arange(len(key_set))[:, None]).flatten()
    memory, found = {"key_set": key_set}, {}
    alive = torch.arange(n_visual)
    stages = method.stages(32)
    for s, layer in enumerate(meta["layers"]):
        assert stages[s + 1].layer == layer + 1  # behind that in front of the model
        attention = given[f"attention_{s}"].mean(0)
        tokens = VisualTokens(
            torch.zeros(len(alive), 1),
            grid=(1, len(alive)),
            text_attention=lambda rows, attention=attention: attention,
            vision=VisionTokens(cls_attention={-1: torch.zeros(1, len(alive))}),  # not looked at, as the key set is known
            ids=alive,
            n_original=n_visual,
            stage=s + 1,
            memory=memory,
        )
        keep = method.select(tokens, 0).keep
        alive = alive[keep]
        key = torch.isin(alive, memory["key_set"]).nonzero()[:, 0]
        found |= {f"keep_{s}": keep.numpy(), f"alive_{s}": alive.numpy(), f"key_after_{s}": key.numpy()}
    start, n_text = meta["image_start"], meta["text_tokens"]
    final = torch.cat([torch.arange(start), alive + start, torch.arange(n_text) + start + n_visual])
    short = method.cached_as_last(32)
    lengths = [start + n_visual + n_text if layer < short.start else len(final) for layer in range(32)]
    return found | {"cache_lengths_after": np.array(lengths), "cache_layer2_index": final.numpy()}
