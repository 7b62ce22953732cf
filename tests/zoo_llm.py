"""Golden files of the methods that cut inside the language model: their inputs through the public methods."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_pruner_eval import Stage, VisualTokens, get_pruner
from vlm_pruner_eval.types import QuestionTokens

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
