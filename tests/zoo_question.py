"""Golden files of the methods that read the question, answered by the product."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from zoo_adapter import Arrays
from zoo_order import NEXT_VIEWS, next_order

from vlm_pruner_eval import VisualTokens, get_pruner
from vlm_pruner_eval.clip_text import segments
from vlm_pruner_eval.types import QuestionTokens, VisionTokens

TOWER = "a CLIP checkpoint"  # named only: its answers are in the files


def cdpruner(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    if "lengths" in meta:
        return text_segments(arrays, meta)
    keep = meta["tokens_per_view"]
    features, image, text = (torch.from_numpy(arrays[name]) for name in ("projected_features", "clip_image_embeds", "clip_text_embeds"))
    views = [one_view(states, meta, clip_image=embeds, clip_text=text) for states, embeds in zip(features, image, strict=True)]
    pruner = get_pruner("cdpruner", pruning_rate=1 - keep / meta["N"], text_tower=TOWER)
    chosen = pruner.select_batch(views)
    kept = torch.stack([one.keep for one in chosen])
    found = {"greedy_order": torch.stack([one.order for one in chosen]), "keep": kept}
    if meta["views"] == NEXT_VIEWS:
        found["llm_order"] = next_order(kept)
    return {name: value.numpy() for name, value in found.items()}


def text_segments(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    found = {}
    for length in meta["lengths"]:
        ids, mask = segments(torch.from_numpy(arrays[f"ids_{length}"]))
        found |= {f"segment_ids_{length}": ids.numpy(), f"segment_mask_{length}": mask.numpy()}
    return found


def trim(arrays: Arrays, meta: Mapping[str, Any]) -> Arrays:
    features, text = (torch.from_numpy(arrays[name]) for name in ("features", "clip_text_embeds"))
    weight, bias = (torch.from_numpy(arrays[f"post_layernorm_{name}"]) for name in ("weight", "bias"))
    image = layer_norm(features, features.shape[-1:], weight, bias, meta["layernorm_eps"])
    image = image @ torch.from_numpy(arrays["visual_projection_weight"]).T
    texts = text[:, None].expand(len(features), -1, -1)  # a row for each view, or one for all
    views = [one_view(*parts[:1], meta, clip_image=parts[1], clip_text=parts[2]) for parts in zip(features, image, texts, strict=True)]
    adaptive = meta["k"] == -1
    rate = Fraction(1, 2) if adaptive else 1 - Fraction(meta["k"])
    pruner = get_pruner("trim", pruning_rate=rate, adaptive=adaptive, official_quirks=True, text_tower=TOWER)
    chosen = pruner.select_batch(views)
    kept = [one.order[~torch.isin(one.order, one.merged)].sort().values for one in chosen]
    means = [one.hidden_states[-1] for one in chosen]
    return {"keep": torch.stack(kept).numpy(), "mean_of_dropped": torch.stack(means).numpy().astype(np.float16)}


def one_view(states: Tensor, meta: Mapping[str, Any], **question: Tensor) -> VisualTokens:
    """One view of the file's image; projected and unprojected states are the same here."""
    return VisualTokens(
        states,
        grid=(1, meta["N"]),
        vision=VisionTokens(states=states, project=lambda rows: rows),
        question=QuestionTokens(**question),
        image="the image",
    )
