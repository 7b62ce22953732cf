"""Arguments of the decoder layers behind a cut: a model hands the same masks and positions to all its layers, those of the whole prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm_pruner_eval.cut import Cut, LayerLength, take


class LayerArguments:
    """Masks and positions of the layers behind a cut, and the tensors through which all of them can be told at once.

    A model gives each layer the same objects, so replacing the data of these tells every later layer, without a hook on it. Where
    they need a mask that the model has not made, there is no such object.
    """

    def __init__(self, text: nn.Module):
        self._text = text
        self._before: list[tuple[Tensor, Tensor]] = []

    def behind(
        self, cut: Cut, i: int, hidden: Tensor, kwargs: dict, cache: Any, *, is_prefill: bool, prompt_mask: Tensor | None
    ) -> dict[str, Any]:
        """Return what layer `i` must be told instead of what the model tells it.

        Parameters
        ----------
        hidden : Tensor [B, n_new, D]
            Input of the layer, already cut.
        prompt_mask : Tensor [B, L + generated] or None
            The model's own 2-D mask.
        """
        view = LayerLength(None, i) if is_prefill else LayerLength(cache, i)
        # no mask of the model's own: nothing is masked, and a cut without fillers changes nothing of that
        is_plain = cut.full and kwargs["attention_mask"] is None
        found: dict[str, Any] = {
            "position_ids": None,  # read by flash attention only, which at batch 1 would take gaps for packed sequences
            "attention_mask": None if is_plain else cut.mask(self._text, hidden, view, prompt_mask),
            "cache_position": torch.arange(view.length, view.length + hidden.shape[1], device=hidden.device),
        }
        if cut.contiguous:
            positions = cut.position_ids(view.length, hidden.shape[1])
            found["position_embeddings"] = self._text.rotary_emb(hidden, positions.to(hidden.device, non_blocking=True))
        elif is_prefill:
            found["position_embeddings"] = tuple(take(x, cut.on(x.device)[0]) for x in kwargs["position_embeddings"])
        return found

    def hand_on(self, found: dict[str, Any], kwargs: dict, cache: object) -> bool:
        """Tell all later layers through the model's own tensors; returns False if that can't be.

        It can't if they need a mask, if only hooks would see how long their inputs are (no cache), if the forward may be run again for
        its gradient, or if these are no plain tensors.
        """
        has_mask = kwargs["attention_mask"] is not None or found["attention_mask"] is not None
        if has_mask or cache is None or torch.is_grad_enabled():
            return False
        told = list(zip(kwargs["position_embeddings"], found.get("position_embeddings", ()), strict=False))
        if isinstance(kwargs.get("cache_position"), Tensor):
            told.append((kwargs["cache_position"], found["cache_position"]))
        ids, n_new = kwargs.get("position_ids"), len(found["cache_position"])
        if isinstance(ids, Tensor) and ids.shape[-1] != n_new:  # without gaps, see `behind`
            told.append((ids, torch.arange(n_new, device=ids.device).expand(*ids.shape[:-1], n_new)))
        if any(type(tensor) is not Tensor for tensor, _ in told):  # a subclass may keep its data elsewhere
            return False
        for tensor, data in told:
            self._replace(tensor, data)
        return True

    def _replace(self, tensor: Tensor, data: Tensor) -> None:
        self._before.append((tensor, tensor.data))
        tensor.data = data

    def give_back(self) -> None:
        """Let the model's tensors be what they were."""
        while self._before:
            tensor, data = self._before.pop()
            tensor.data = data
