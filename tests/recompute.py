"""Decoding with tiny models, and pruning by its definition: full-length recomputation that hides what was dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tiny_processors import IMAGE, VIDEO, VISION_END, VISION_START
from torch import Tensor, nn

N_LAYERS = 5


def next_positions(model: nn.Module, inputs: dict[str, Tensor], n: int = 1, *, after: int = 0) -> dict[str, Tensor]:
    """The position_ids that generate() would pass for `n` more tokens, `after` steps behind a prompt of one row."""
    positions = torch.arange(n)[None] + inputs["input_ids"].shape[1] + after
    if not hasattr(model.model, "get_rope_index"):
        return {"position_ids": positions}
    grids = {name: value for name, value in inputs.items() if name.endswith("grid_thw") or name == "mm_token_type_ids"}
    delta = model.model.get_rope_index(inputs["input_ids"], **grids)[1]
    return {"position_ids": (positions + delta).expand(3, 1, n)}


def generate(model: nn.Module, inputs: dict[str, Tensor], n: int = 6, **kwargs: object) -> object:
    """Greedy decoding of exactly `n` tokens, with the logits of every step; never an image token."""
    settings = {"do_sample": False, "suppress_tokens": [IMAGE, VIDEO, VISION_START, VISION_END]} | kwargs
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=n, return_dict_in_generate=True, output_logits=True, **settings)


def step_logits(output: object) -> Tensor:
    """Logits [B, n, vocabulary] of the generated tokens."""
    return torch.stack(output.logits, 1)


@dataclass(frozen=True)
class View:
    """What one decoder layer may use in `masked_recompute`.

    `seen` [B, L] bool: positions that it may look at. `positions` [B, L + n]: position ids other than the model's own.
    `edit`: applied to its input [B, L + n, D] (merged states).
    """

    seen: Tensor
    positions: Tensor | None = None
    edit: Callable[[Tensor], Tensor] | None = None


def masked_recompute(model: nn.Module, inputs: dict[str, Tensor], views: dict[int, View], new: Tensor | None = None) -> Tensor:
    """Logits [B, L + n, vocabulary] of the same rule without cutting anything: the definition of pruning, the slow way.

    The full-length sequence runs through every layer without a cache; layer i may not look at the positions that its view
    excludes. Rows of excluded positions hold meaningless values.
    """
    x = dict(inputs)
    n_new = 0 if new is None else new.shape[1]
    if new is not None:
        x["input_ids"] = torch.cat([x["input_ids"], new], 1)
        x["attention_mask"] = torch.cat([x["attention_mask"], x["attention_mask"].new_ones(len(new), n_new)], 1)
        if "mm_token_type_ids" in x:
            x["mm_token_type_ids"] = torch.cat([x["mm_token_type_ids"], x["mm_token_type_ids"].new_zeros(len(new), n_new)], 1)
    attended = x["attention_mask"].bool()
    if not any(name.endswith("grid_thw") for name in x):  # multi-dimensional positions are the model's own business
        x["position_ids"] = (attended.long().cumsum(-1) - 1).clamp(min=0)
    causal = torch.ones(attended.shape[1], attended.shape[1]).tril().bool()
    text, dtype = model.model.language_model, next(model.parameters()).dtype

    def hook(view: View):
        visible = torch.cat([view.seen, view.seen.new_ones(len(attended), n_new)], 1) & attended
        allowed = causal[None, None] & visible[:, None, None, :]
        bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

        def apply(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden, changed = args[0], {"attention_mask": bias}
            if view.positions is not None:
                changed["position_embeddings"] = text.rotary_emb(hidden, view.positions)
            return ((view.edit(hidden) if view.edit else hidden, *args[1:]), kwargs | changed)

        return apply

    handles = [text.layers[i].register_forward_pre_hook(hook(view), with_kwargs=True) for i, view in views.items()]
    try:
        with torch.no_grad():
            return model(**x, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def seen_after(inputs: dict[str, Tensor], kept_positions: Sequence[Sequence[int]]) -> Tensor:
    """Bool [B, L]: attended text, and of the visual tokens only `kept_positions` of each row."""
    seen = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE) & (inputs["input_ids"] != VIDEO)
    for row, kept in zip(seen, kept_positions, strict=True):
        row[list(kept)] = True
    return seen


def views_from(records: Sequence[object], inputs: dict[str, Tensor]) -> dict[int, View]:
    """The views that one prefill's records describe, for methods with one stage."""
    view = View(seen_after(inputs, [record.kept_positions for record in records]))
    return dict.fromkeys(range(records[0].layer, N_LAYERS), view)
