"""Hooks on decoder layers: one where a cut begins, and on the layers behind it only if these need what the model does not hand on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, N_LAYERS, generate, prompts
from toy_pruners import TwoStages

from vlm_pruner_eval import get_pruner, prune

ONE = [[5, "i0", 7, 8]]
PADDED = [[5, "i0", 7, 8], [3, 4, 6, "i0", 9, 9]]


@contextmanager
def watched(model: torch.nn.Module) -> Iterator[list[tuple[int, int, int, tuple[int, ...]]]]:
    """Of every call of a layer: its number, its hooks, its new tokens, and the shape of what it is given as cosines."""
    calls: list[tuple[int, int, int, tuple[int, ...]]] = []
    layers = model.model.language_model.layers
    before = [layer.forward for layer in layers]

    def forward(i: int, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        calls.append((i, len(layers[i]._forward_pre_hooks), hidden.shape[1], tuple(kwargs["position_embeddings"][0].shape)))
        return before[i](*args, **kwargs)

    for i, layer in enumerate(layers):
        layer.forward = lambda *args, i=i, **kwargs: forward(i, *args, **kwargs)
    try:
        yield calls
    finally:
        for layer in layers:
            del layer.forward


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_without_padding_only_the_layer_of_the_cut_is_hooked(tiny_model, family: str) -> None:
    model, inputs = tiny_model(family), prompts(family, ONE)
    n = inputs["input_ids"].shape[1]
    with watched(model) as calls, prune(model, get_pruner("uniform", pruning_rate="1/2")) as ledger, torch.no_grad():
        generate(model, inputs, 3)
    left = n - ledger.records[0].n_visual + ledger.records[0].n_kept
    assert left < n
    assert [hooks for _, hooks, _, _ in calls] == [int(i == 2) for i, *_ in calls]
    prefill, decoding = calls[:N_LAYERS], calls[N_LAYERS:]
    assert [(tokens, shape[-2]) for _, _, tokens, shape in prefill] == [(n, n)] * 2 + [(left, left)] * (N_LAYERS - 2)
    assert [tokens for _, _, tokens, _ in decoding] == [1] * 2 * N_LAYERS


def test_with_padding_the_layers_behind_the_cut_are_hooked_while_a_forward_runs(tiny_model) -> None:
    model, inputs = tiny_model("llava"), prompts("llava", PADDED)
    layers = model.model.language_model.layers
    with watched(model) as calls, prune(model, get_pruner("uniform", pruning_rate="1/2")), torch.no_grad():
        generate(model, inputs, 2)
        assert [len(layer._forward_pre_hooks) for layer in layers] == [int(i == 2) for i in range(N_LAYERS)]
    assert [hooks for i, hooks, _, _ in calls if i >= 2] == [1] * 2 * (N_LAYERS - 2)


def test_a_second_cut_is_made_of_the_whole_positions(tiny_model) -> None:
    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    with watched(model) as calls, prune(model, TwoStages(pruning_rate="1/2")) as ledger, torch.no_grad():
        generate(model, inputs, 2)
    assert [shape[-2] for _, _, _, shape in calls[:N_LAYERS]] == ledger.records[0].kv_lengths


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_own_tensors_are_given_back(tiny_model, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    text, held = model.model.language_model, []
    rotary = text.rotary_emb.forward

    def noted(*args: Any, **kwargs: Any) -> Any:
        found = rotary(*args, **kwargs)
        held.extend((tensor, tensor.clone()) for tensor in found)
        return found

    monkeypatch.setattr(text.rotary_emb, "forward", noted)
    if fails:
        monkeypatch.setattr(text.layers[-1], "forward", lambda *args, **kwargs: {}[1])
    with torch.no_grad():
        try:
            with prune(model, get_pruner("uniform", pruning_rate="1/2")):
                generate(model, inputs, 2)
        except KeyError:
            assert fails
    assert held
    assert all(torch.equal(tensor, before) for tensor, before in held)
