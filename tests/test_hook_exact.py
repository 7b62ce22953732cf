"""Cutting the sequence equals hiding the dropped tokens from the layers behind the cut, computed the slow way."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import transformers
from fake_flash import NAME as FAKE_FLASH
from tiny_models import (
    FAMILIES,
    N_LAYERS,
    View,
    generate,
    masked_recompute,
    next_positions,
    prompts,
    scopes_of,
    seen_after,
    step_logits,
    views_from,
)
from torch.utils.flop_counter import FlopCounterMode
from toy_pruners import KeyNorm, StateNorm, Stride, TwoStages
from transformers import DynamicCache

from vlm_pruner_eval import hf_compat, prune
from vlm_pruner_eval.hf_compat import cache_of, with_cache
from vlm_pruner_eval.pruners import get_pruner

ONE = [[4, "i0", 7]]
MIXED = [[4, "i0", 7], [3, "i1", 2, "i2", 12], [9]]
CLOSE = 2e-4


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def compare(model, inputs, pruner, n=6, views=views_from, dtype_scale=None):
    """Greedy decoding under `pruner` and the slow recomputation of its logits; returns (output, records, distance)."""
    length = inputs["input_ids"].shape[1]
    with prune(model, pruner) as ledger:
        output = generate(model, inputs, n)
    records = ledger.records
    slow = masked_recompute(model, inputs, views(records, inputs), output.sequences[:, length:])
    return output, records, distance(step_logits(output), slow[:, length - 1 : length - 1 + n])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", range(N_LAYERS))
@pytest.mark.parametrize("samples", [ONE, MIXED], ids=["one", "mixed batch"])
def test_cached_decoding_equals_masked_recompute(tiny_model, family, attention, layer, samples):
    model, inputs = tiny_model(family, attention), prompts(family, samples)
    output, records, apart = compare(model, inputs, StateNorm(pruning_rate="2/3", layer=layer))
    assert apart < CLOSE
    assert distance(step_logits(output)[:, :1], step_logits(generate(model, inputs, 1))) > 1e-2, "pruning changed nothing"
    assert [record.n_kept for record in records] == [record.n_asked for record in records]
    cache, new = cache_of(output), 5  # the last token was never fed back
    widest = max(record.kv_lengths[-1] for record in records)
    expected = [inputs["input_ids"].shape[1] + new] * layer + [widest + new] * (N_LAYERS - layer)
    assert [cache_layer.keys.shape[2] for cache_layer in cache.layers] == expected
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + new


@pytest.mark.parametrize("method", ["none", "vlmpruner", "fastv"])
def test_pruning_nothing_computes_nothing_more(tiny_model, family, method):
    """No matrix product and no attention beyond the plain model's: what a hook costs at rate 0 are a few small operations."""

    def computed(*context):
        model, inputs = tiny_model(family), prompts(family, MIXED)
        with FlopCounterMode(display=False) as counter, contextlib.ExitStack() as stack:
            for entered in context:
                stack.enter_context(entered)
            generate(model, inputs, 3)
        return counter.get_flop_counts()["Global"]

    hooked = computed(prune(tiny_model(family), get_pruner(method, pruning_rate=0)))
    assert hooked == computed()
    assert sum(hooked.values()) > 1e6


@pytest.mark.parametrize("family", sorted(name for name, tiny in FAMILIES.items() if tiny.videos))
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("samples", [[[4, "v1", 6]], [[4, "i1", 3, "v0", 6]]], ids=["video", "image and video"])
def test_videos(tiny_model, family, layer, samples):
    _, records, apart = compare(tiny_model(family), prompts(family, samples), StateNorm(pruning_rate=7 / 9, layer=layer))
    assert apart < CLOSE
    pruner, scopes = StateNorm(pruning_rate=7 / 9), scopes_of(family, samples[0])
    assert (records[0].n_images, records[0].n_visual) == (len(scopes), sum(scopes))
    assert records[0].n_kept == sum(map(pruner.default_keep, scopes))


def test_merged_states_reach_the_layers_behind_the_cut(tiny_model, family):
    def views(records, inputs):
        def edit(hidden):
            hidden = hidden.clone()
            for b, record in enumerate(records):
                hidden[b, record.kept_positions] *= 1.25
            return hidden

        seen = views_from(records, inputs)
        return seen | {2: View(seen[2].seen, edit=edit)}

    model, inputs = tiny_model(family), prompts(family, MIXED)
    assert compare(model, inputs, KeyNorm(pruning_rate="2/3", merge=True), views=views)[2] < CLOSE


@pytest.mark.parametrize("family", sorted(name for name, tiny in FAMILIES.items() if not tiny.mrope))
@pytest.mark.parametrize("layer", [0, 2])
def test_contiguous_positions_are_renumbered_and_decoding_goes_on_from_them(tiny_model, family, layer):
    n = 6

    def views(records, inputs):
        seen = seen_after(inputs, [record.kept_positions for record in records])
        all_seen = torch.cat([seen, seen.new_ones(len(seen), n)], 1)
        positions = (all_seen.long().cumsum(-1) - 1).clamp(min=0)
        return {i: View(seen, positions=positions) for i in range(layer, N_LAYERS)}

    model, inputs = tiny_model(family), prompts(family, MIXED)
    contiguous = StateNorm(pruning_rate="2/3", layer=layer, positions="contiguous")
    output, _, apart = compare(model, inputs, contiguous, n, views)
    assert apart < CLOSE
    with prune(model, StateNorm(pruning_rate="2/3", layer=layer)):
        assert distance(step_logits(generate(model, inputs, n)), step_logits(output)) > 1e-2


def two_stage_kept(inputs, share):
    """What TwoStages keeps of 16-token images, by hand: every second token, then every second of those."""
    step = {0.5: 2, 0.25: 4}[share]
    kept = []
    for ids in inputs["input_ids"]:
        visual = (ids == 100).nonzero()[:, 0].tolist()
        kept.append([p for first in range(0, len(visual), 16) for p in visual[first : first + 16 : step]])
    return kept


@pytest.mark.parametrize("samples", [ONE, MIXED], ids=["one", "mixed batch"])
def test_two_stages(tiny_model, samples):
    def views(records, inputs):
        half, quarter = (View(seen_after(inputs, two_stage_kept(inputs, share))) for share in (0.5, 0.25))
        return {1: half, 2: half, 3: quarter, 4: quarter}

    model, inputs = tiny_model("llava"), prompts("llava", samples)
    _, records, apart = compare(model, inputs, TwoStages(pruning_rate=0.75), views=views)
    assert apart < CLOSE
    for record, kept in zip(records, two_stage_kept(inputs, 0.25), strict=True):
        n = record.n_visual
        assert record.kept_positions == kept
        assert record.visual_lengths == [n, n // 2, n // 2, n // 4, n // 4]


def test_two_stages_with_contiguous_positions(tiny_model):
    n = 4

    def views(records, inputs):
        found = {}
        for share, layers in ((0.5, (1, 2)), (0.25, (3, 4))):
            seen = seen_after(inputs, two_stage_kept(inputs, share))
            positions = (torch.cat([seen, seen.new_ones(len(seen), n)], 1).long().cumsum(-1) - 1).clamp(min=0)
            found |= dict.fromkeys(layers, View(seen, positions=positions))
        return found

    pruner = TwoStages(pruning_rate=0.75, positions="contiguous")
    assert compare(tiny_model("llava"), prompts("llava", MIXED), pruner, n, views)[2] < CLOSE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("samples", "rate"), [(ONE, 0), (MIXED, 0), ([[9], [14]], "2/3")], ids=["one at rate 0", "mixed batch at rate 0", "text only"]
)
def test_nothing_to_drop_is_bit_equal(tiny_model, family, attention, samples, rate):
    model, inputs = tiny_model(family, attention), prompts(family, samples)
    plain = generate(model, inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
        with prune(model, KeyNorm(pruning_rate=rate)):
            hooked, hooked_logits = generate(model, inputs), model(**inputs).logits
    assert torch.equal(logits, hooked_logits)
    assert torch.equal(plain.sequences, hooked.sequences)
    assert torch.equal(step_logits(plain), step_logits(hooked))


def test_blind_drops_every_visual_token(tiny_model, family):
    model, inputs = tiny_model(family), prompts(family, MIXED)
    _, records, apart = compare(model, inputs, get_pruner("blind", pruning_rate=0.5))
    assert apart < CLOSE
    assert [(record.n_visual, record.n_kept) for record in records] == [(sum(scopes_of(family, sample)), 0) for sample in MIXED]


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_decoding_loop_written_by_hand(tiny_model, family, layer, with_mask):
    model, inputs = tiny_model(family), prompts(family, ONE)
    length, n = inputs["input_ids"].shape[1], 5
    cache, logits, tokens, step = DynamicCache(config=model.model.language_model.config), [], [], dict(inputs)
    if not with_mask:
        if FAMILIES[family].mrope and "mm_token_type_ids" not in inputs:
            pytest.skip("this transformers version itself restarts multi-dimensional positions at 0 then")
        del step["attention_mask"]
    with prune(model, StateNorm(pruning_rate="2/3", layer=layer)) as ledger, torch.no_grad():
        for t in range(n):
            out = model(**step, **with_cache(model.forward, cache), use_cache=True)
            out.logits[..., 100:104] = -1e4
            logits.append(out.logits[:, -1])
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            step = {"input_ids": tokens[-1]}
            if with_mask:
                step |= {"attention_mask": torch.ones(1, length + t + 1, dtype=torch.long)} | next_positions(model, inputs, after=t)
    slow = masked_recompute(model, inputs, views_from(ledger.records, inputs), torch.cat(tokens, 1))
    slow[..., 100:104] = -1e4
    assert distance(torch.stack(logits, 1), slow[:, length - 1 : length - 1 + n]) < CLOSE


def test_text_in_a_second_turn_continues_a_pruned_cache(tiny_model, family):
    model, inputs, turn = tiny_model(family), prompts(family, ONE), torch.tensor([[11, 12, 13, 14]])
    length = inputs["input_ids"].shape[1]
    with prune(model, KeyNorm(pruning_rate="2/3")) as ledger, torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
        mask = torch.ones(1, length + 4, dtype=torch.long)
        logits = model(input_ids=turn, attention_mask=mask, **with_cache(model.forward, cache), **next_positions(model, inputs, 4)).logits
    assert len(ledger.records) == 1
    slow = masked_recompute(model, inputs, views_from(ledger.records, inputs), turn)[:, -4:]
    assert distance(logits, slow) < CLOSE


def test_prompts_may_be_interleaved_on_their_own_caches(tiny_model, family):
    model, both = tiny_model(family), [prompts(family, [sample]) for sample in MIXED[:2]]
    with prune(model, KeyNorm(pruning_rate="2/3")) as ledger, torch.no_grad():
        caches = [cache_of(model(**inputs, use_cache=True)) for inputs in both]
        steps = []
        for cache, inputs in zip(caches, both, strict=True):
            mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
            positions = next_positions(model, inputs)
            steps.append(
                model(input_ids=torch.tensor([[7]]), attention_mask=mask, **with_cache(model.forward, cache), **positions).logits[:, -1]
            )
    for inputs, record, step in zip(both, ledger.records, steps, strict=True):
        slow = masked_recompute(model, inputs, views_from([record], inputs), torch.tensor([[7]]))[:, -1]
        assert distance(step, slow) < CLOSE


@pytest.mark.parametrize("layer", [0, 2])
def test_a_copy_of_a_pruned_cache_decodes_on_its_own(tiny_model, family, layer):
    model, inputs = tiny_model(family), prompts(family, ONE)
    length = inputs["input_ids"].shape[1]

    def step(cache, n):
        mask, positions = torch.ones(1, n + 1, dtype=torch.long), next_positions(model, inputs, after=n - length)
        return model(input_ids=torch.tensor([[7]]), attention_mask=mask, **with_cache(model.forward, cache), **positions).logits

    with prune(model, StateNorm(pruning_rate="2/3", layer=layer)), torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
        copied = copy.deepcopy(cache)
        first = step(cache, length)
        step(cache, length + 1)
        assert torch.equal(step(copied, length), first)
    assert (copied.get_seq_length(), cache.get_seq_length()) == (length + 1, length + 2)


def test_one_prompt_keeps_the_mask_free_path(tiny_model, family):
    model, inputs, seen = tiny_model(family), prompts(family, ONE), []
    layers = model.model.language_model.layers[2:]
    handles = [
        layer.self_attn.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["attention_mask"]), with_kwargs=True) for layer in layers
    ]
    try:
        with prune(model, KeyNorm(pruning_rate="2/3")):
            generate(model, inputs, 2)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 2 * len(layers)
    assert all(mask is None for mask in seen)


def test_kept_tokens_keep_their_positions_and_decoding_goes_on_from_the_original_length(tiny_model, family):
    model, inputs = tiny_model(family), prompts(family, ONE)
    text, seen = model.model.language_model, []

    def note(module, args, kwargs):
        seen.append(kwargs.get("position_ids", args[-1]).clone())

    handle = text.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    try:
        generate(model, inputs)
        plain = list(seen)
        seen.clear()
        with prune(model, KeyNorm(pruning_rate="2/3")):
            generate(model, inputs)
    finally:
        handle.remove()
    assert len(plain) == len(seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


@pytest.mark.parametrize("samples", [ONE, MIXED], ids=["one", "mixed batch"])
def test_flash_attentions_rules(tiny_model, family, samples):
    if family == "qwen3_vl" and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this transformers version hands flash attention positions of Qwen3-VL that it misreads, pruned or not")
    model, inputs = tiny_model(family), prompts(family, samples)
    with prune(model, KeyNorm(pruning_rate="2/3")):
        reference = step_logits(generate(model, inputs))
    config = model.model.language_model.config
    config._attn_implementation = FAKE_FLASH
    try:
        with prune(model, KeyNorm(pruning_rate="2/3")):
            assert distance(step_logits(generate(model, inputs)), reference) < CLOSE
    finally:
        config._attn_implementation = "sdpa"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(tiny_model, family, dtype):
    model = tiny_model(family, "sdpa", dtype)
    inputs = prompts(family, MIXED, dtype)
    plain = step_logits(generate(model, inputs, 3))
    with prune(model, KeyNorm(pruning_rate=0)):
        assert torch.equal(step_logits(generate(model, inputs, 3)), plain)
    output, _, apart = compare(model, inputs, KeyNorm(pruning_rate="2/3"), 3)
    assert bool(step_logits(output).isfinite().all())
    assert apart < 0.05 * float(plain.float().abs().max())
    with prune(model, Stride(pruning_rate="2/3")):
        batch = step_logits(generate(model, inputs, 1))
        for i, sample in enumerate(MIXED):
            single = step_logits(generate(model, prompts(family, [sample], dtype), 1))
            assert distance(batch[i], single[0]) < 0.05 * float(plain.float().abs().max())


@pytest.mark.parametrize("mistake", ["renumbered positions", "unmasked fillers", "stale decoding mask"])
def test_these_tests_would_notice(tiny_model, monkeypatch, mistake):
    """Negative controls: three plausible mistakes of the hook move the logits far beyond the tolerance."""
    from vlm_pruner_eval import hook

    if mistake == "renumbered positions":
        monkeypatch.setattr(hook, "take", lambda x, index: x[..., : index.shape[1], :].expand(len(index), -1, -1))
    else:
        right = hf_compat.causal_mask

        def wrong(config, hidden, mask, view):
            if mistake == "unmasked fillers":
                return right(config, hidden, None, view)
            return right(config, hidden, mask if view.length == 0 else mask.flip(1), view)

        monkeypatch.setattr(hf_compat, "causal_mask", wrong)
    assert compare(tiny_model("llava"), prompts("llava", MIXED), KeyNorm(pruning_rate="2/3"))[2] > 1e-2
