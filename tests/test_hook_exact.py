"""Cutting the sequence equals hiding the dropped tokens from the layers behind the cut, computed the slow way.

The hook is one for all families; families differ in their layouts and in what they patch. So every layer is tried where layers
differ (DeepStack, and once without it), the others at the embeddings and behind two layers, and other kernels once.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers
from fake_flash import NAME as FAKE_FLASH
from thinning import only
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

from vlm_pruner_eval import hf_compat, layer_arguments, prune
from vlm_pruner_eval.hf_compat import cache_of, with_cache
from vlm_pruner_eval.pruners import get_pruner

ONE = [[4, "i0", 7]]
MIXED = [[4, "i0", 7], [3, "i1", 2, "i2", 12], [9]]
MEDIA = [[4, "i0", 7], [3, "v1", 12], [5, "i1", 2, "v1", 6, "i2", 3], [9]]
ROWS = {name: MEDIA if tiny.videos else MIXED for name, tiny in FAMILIES.items()}  # a batch of all that a family takes
CLOSE = 2e-4
EVERY_LAYER = ("llava", "qwen3_vl")
CUTS = [
    *((name, layer, "sdpa") for name in sorted(FAMILIES) for layer in (range(N_LAYERS) if name in EVERY_LAYER else (0, 2))),
    *((name, 2, "eager") for name in EVERY_LAYER),
]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def compare(model, inputs, pruner, n=6, views=views_from):
    """Greedy decoding under `pruner` and the slow recomputation of its logits; returns (output, records, distance)."""
    length = inputs["input_ids"].shape[1]
    with prune(model, pruner) as ledger:
        output = generate(model, inputs, n)
    records = ledger.records
    slow = masked_recompute(model, inputs, views(records, inputs), output.sequences[:, length:])
    return output, records, distance(step_logits(output), slow[:, length - 1 : length - 1 + n])


@pytest.mark.parametrize(("family", "layer", "attention"), only(CUTS, [cut for cut in CUTS if cut[0] == "qwen3_vl" or cut[1] != 0]))
def test_cached_decoding_equals_masked_recompute_and_rows_alone(tiny_model, family, layer, attention):
    """Images, videos, both and none in one left-padded batch; a row alone takes the path without a mask."""
    model, rows, pruner = tiny_model(family, attention), ROWS[family], StateNorm(pruning_rate="2/3", layer=layer)
    inputs = prompts(family, rows)
    output, records, apart = compare(model, inputs, pruner)
    assert apart < CLOSE
    assert distance(step_logits(output)[:, :1], step_logits(generate(model, inputs, 1))) > 1e-2, "pruning changed nothing"
    assert len({record.n_kept for record in records}) > 2, "the rows must end at different lengths"
    cache, new = cache_of(output), 5  # the last token was never fed back
    widest = max(record.kv_lengths[-1] for record in records)
    expected = [inputs["input_ids"].shape[1] + new] * layer + [widest + new] * (N_LAYERS - layer)
    assert [cache_layer.keys.shape[2] for cache_layer in cache.layers] == expected
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + new
    for i, row in enumerate(rows):
        with prune(model, pruner) as ledger:
            alone = generate(model, prompts(family, [row]))
        (record,) = ledger.records
        padding = output.sequences.shape[1] - alone.sequences.shape[1]
        assert [p - padding for p in records[i].kept_positions] == record.kept_positions
        assert records[i].kv_lengths == record.kv_lengths
        assert (record.n_images, record.n_visual) == (len(scopes_of(family, row)), sum(scopes_of(family, row)))
        assert record.n_kept == record.n_asked == sum(map(pruner.default_keep, scopes_of(family, row)))
        assert distance(step_logits(output)[i], step_logits(alone)[0]) < CLOSE
        assert torch.equal(output.sequences[i, -6:], alone.sequences[0, -6:])


# ---- nothing to prune, all to prune
@pytest.mark.parametrize("method", only(["none", "vlmpruner", "fastv"], ["none", "vlmpruner"]))
@pytest.mark.parametrize("family", only(["llava", "qwen3_vl"], ["qwen3_vl"]))
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


@pytest.mark.parametrize("what", only(["rate 0", "text only", "rate 0 eager"], ["rate 0", "text only"]))
def test_nothing_to_drop_is_bit_equal(tiny_model, family, what):
    model = tiny_model(family, "eager" if "eager" in what else "sdpa")
    samples, rate = ([[9], [14]], "2/3") if what == "text only" else (ROWS[family], 0)
    inputs = prompts(family, samples)
    plain = generate(model, inputs, 3)
    with torch.no_grad():
        logits = model(**inputs).logits
        with prune(model, KeyNorm(pruning_rate=rate)):
            hooked, hooked_logits = generate(model, inputs, 3), model(**inputs).logits
    assert torch.equal(logits, hooked_logits)
    assert torch.equal(plain.sequences, hooked.sequences)
    assert torch.equal(step_logits(plain), step_logits(hooked))


def test_blind_drops_every_visual_token(tiny_model, family):
    model, inputs = tiny_model(family), prompts(family, ROWS[family])
    _, records, apart = compare(model, inputs, get_pruner("blind", pruning_rate=0.5), 3)
    assert apart < CLOSE
    assert [(record.n_visual, record.n_kept) for record in records] == [(sum(scopes_of(family, row)), 0) for row in ROWS[family]]


# ---- merged states, renumbered positions, two stages
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
    assert compare(model, inputs, KeyNorm(pruning_rate="2/3", merge=True), 3, views)[2] < CLOSE


def renumbered(seen: torch.Tensor, n: int) -> View:
    """A view whose positions count what is seen, and the `n` tokens behind it."""
    all_seen = torch.cat([seen, seen.new_ones(len(seen), n)], 1)
    return View(seen, positions=(all_seen.long().cumsum(-1) - 1).clamp(min=0))


@pytest.mark.parametrize("family", sorted(name for name, tiny in FAMILIES.items() if not tiny.mrope))
@pytest.mark.parametrize("layer", [0, 2])
def test_contiguous_positions_are_renumbered_and_decoding_goes_on_from_them(tiny_model, family, layer):
    n = 4

    def views(records, inputs):
        view = renumbered(seen_after(inputs, [record.kept_positions for record in records]), n)
        return dict.fromkeys(range(layer, N_LAYERS), view)

    model, inputs = tiny_model(family), prompts(family, MIXED)
    output, _, apart = compare(model, inputs, StateNorm(pruning_rate="2/3", layer=layer, positions="contiguous"), n, views)
    assert apart < CLOSE
    with prune(model, StateNorm(pruning_rate="2/3", layer=layer)):
        assert distance(step_logits(generate(model, inputs, n)), step_logits(output)) > 1e-2


def two_stage_kept(inputs, step):
    """What TwoStages keeps of 16-token images, by hand: every second token, then every second of those."""
    rows = [(ids == 100).nonzero()[:, 0].tolist() for ids in inputs["input_ids"]]
    return [[p for first in range(0, len(visual), 16) for p in visual[first : first + 16 : step]] for visual in rows]


@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("samples", [ONE, MIXED], ids=["one", "mixed batch"])
def test_two_stages(tiny_model, samples, positions):
    def views(records, inputs):
        half, quarter = (seen_after(inputs, two_stage_kept(inputs, step)) for step in (2, 4))
        half, quarter = (renumbered(seen, 4) if positions == "contiguous" else View(seen) for seen in (half, quarter))
        return {1: half, 2: half, 3: quarter, 4: quarter}

    model, inputs = tiny_model("llava"), prompts("llava", samples)
    _, records, apart = compare(model, inputs, TwoStages(pruning_rate=0.75, positions=positions), 4, views)
    assert apart < CLOSE
    for record, kept in zip(records, two_stage_kept(inputs, 4), strict=True):
        n = record.n_visual
        assert record.kept_positions == kept
        assert record.visual_lengths == [n, n // 2, n // 2, n // 4, n // 4]


# ---- decoding by hand, later turns, caches
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_decoding_loop_written_by_hand(tiny_model, family, layer, with_mask):
    model, inputs = tiny_model(family), prompts(family, ONE)
    length, n = inputs["input_ids"].shape[1], 4
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


def plain_positions(family, inputs):
    """Positions that count attended tokens, where the model does not compute multi-dimensional ones itself."""
    return {} if FAMILIES[family].mrope else {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def all_positions(model, inputs, turns):
    """Position ids of a left-padded batch and of the text `turns` [B, n] behind it, [B, L + n] or [3, B, L + n]."""
    ids = torch.cat([inputs["input_ids"], turns], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(turns)], 1)
    if not hasattr(model.model, "get_rope_index"):
        return (mask.cumsum(1) - 1).clamp(min=0)
    known = {name: value for name, value in inputs.items() if name.endswith("grid_thw")} | {"attention_mask": mask}
    if "mm_token_type_ids" in inputs:
        known["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(turns)], 1)
    return model.model.get_rope_index(ids, **known)[0]


@pytest.mark.parametrize("layer", [0, 2])
def test_text_in_later_turns_continues_a_pruned_cache_of_a_batch(tiny_model, family, layer):
    """Two turns of text behind prompts of different lengths, one of them without an image."""
    model, rows = tiny_model(family), ROWS[family]
    inputs = prompts(family, rows)
    turns = torch.randint(5, 95, (len(rows), 7), generator=torch.Generator().manual_seed(1))
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(turns)], 1)
    length, found, positions = inputs["input_ids"].shape[1], [], all_positions(model, inputs, turns)
    with prune(model, StateNorm(pruning_rate="2/3", layer=layer)) as ledger, torch.no_grad():
        cache = cache_of(model(**inputs, **plain_positions(family, inputs), use_cache=True))
        for first, last in ((length, length + 4), (length + 4, length + 7)):
            later = {"position_ids": positions[..., first:last], "attention_mask": mask[:, :last]}
            found.append(model(input_ids=turns[:, first - length : last - length], **with_cache(model.forward, cache), **later).logits)
    assert len(ledger.records) == len(rows), "a later turn is no prefill"
    slow = masked_recompute(model, inputs, views_from(ledger.records, inputs), turns)[:, -7:]
    assert distance(torch.cat(found, 1), slow) < CLOSE


def one_more(model, inputs, cache, after=0):
    """Logits of token 7 behind a cache that holds a prompt and `after` tokens."""
    mask = torch.ones(1, inputs["input_ids"].shape[1] + after + 1, dtype=torch.long)
    positions = next_positions(model, inputs, after=after)
    return model(input_ids=torch.tensor([[7]]), attention_mask=mask, **with_cache(model.forward, cache), **positions).logits[:, -1]


def test_prompts_may_be_interleaved_on_their_own_caches(tiny_model, family):
    model, both = tiny_model(family), [prompts(family, [sample]) for sample in MIXED[:2]]
    with prune(model, KeyNorm(pruning_rate="2/3")) as ledger, torch.no_grad():
        caches = [cache_of(model(**inputs, use_cache=True)) for inputs in both]
        steps = [one_more(model, inputs, cache) for cache, inputs in zip(caches, both, strict=True)]
    for inputs, record, step in zip(both, ledger.records, steps, strict=True):
        slow = masked_recompute(model, inputs, views_from([record], inputs), torch.tensor([[7]]))[:, -1]
        assert distance(step, slow) < CLOSE


# ---- masks, positions, kernels, number types
def test_one_prompt_keeps_the_mask_free_path_and_its_positions(tiny_model, family):
    """No mask behind the cut, and kept tokens keep their positions: decoding goes on from the original length."""
    model, inputs, masks, seen = tiny_model(family), prompts(family, ONE), [], []
    text = model.model.language_model

    def note(module, args, kwargs):
        seen.append(kwargs.get("position_ids", args[-1]).clone())

    with contextlib.ExitStack() as handles:
        handles.callback(text.rotary_emb.register_forward_pre_hook(note, with_kwargs=True).remove)
        generate(model, inputs, 3)
        for layer in text.layers[2:]:
            spy = layer.self_attn.register_forward_pre_hook(lambda m, a, kw: masks.append(kw["attention_mask"]), with_kwargs=True)
            handles.callback(spy.remove)
        with prune(model, KeyNorm(pruning_rate="2/3")):
            generate(model, inputs, 3)
    assert masks == [None] * 3 * (N_LAYERS - 2)
    assert len(seen) == 6
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))


@pytest.mark.parametrize("rows", ["one", "batch"])
def test_flash_attentions_rules(tiny_model, family, rows):
    if family.startswith("qwen3_vl") and int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this transformers version hands flash attention positions of Qwen3-VL that it misreads, pruned or not")
    model, inputs, found = tiny_model(family), prompts(family, ONE if rows == "one" else ROWS[family]), []
    config = model.model.language_model.config
    try:
        for attention in ("sdpa", FAKE_FLASH):
            config._attn_implementation = attention
            with prune(model, KeyNorm(pruning_rate="2/3")):
                found.append(step_logits(generate(model, inputs, 3)))
    finally:
        config._attn_implementation = "sdpa"
    assert distance(*found) < CLOSE


HALVES = [*((name, torch.bfloat16) for name in sorted(FAMILIES)), ("llava", torch.float16), ("qwen3_vl", torch.float16)]


@pytest.mark.parametrize(("family", "dtype"), HALVES)
def test_half_precision(tiny_model, family, dtype):
    model, rows = tiny_model(family, "sdpa", dtype), ROWS[family]
    inputs = prompts(family, rows, dtype)
    plain = step_logits(generate(model, inputs, 2))
    tolerance = 0.05 * float(plain.float().abs().max())
    with prune(model, KeyNorm(pruning_rate=0)):
        assert torch.equal(step_logits(generate(model, inputs, 2)), plain)
    output, _, apart = compare(model, inputs, Stride(pruning_rate="2/3"), 2)
    assert bool(step_logits(output).isfinite().all())
    assert apart < tolerance
    with prune(model, Stride(pruning_rate="2/3")):
        for i, row in enumerate(rows):
            alone = step_logits(generate(model, prompts(family, [row], dtype), 1))
            assert distance(step_logits(output)[i, :1], alone[0]) < tolerance


# ---- negative controls
@pytest.mark.parametrize("mistake", ["renumbered positions", "unmasked fillers", "stale decoding mask"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_vl"])
def test_these_tests_would_notice(tiny_model, monkeypatch, family, mistake):
    """Three plausible mistakes of the hook move the logits of a batch far beyond the tolerance."""
    if mistake == "renumbered positions":
        monkeypatch.setattr(layer_arguments, "take", lambda x, index: x[..., : index.shape[1], :].expand(*x.shape[:-3], len(index), -1, -1))
    else:
        right = hf_compat.causal_mask

        def wrong(config, hidden, mask, view):
            if mistake == "unmasked fillers":
                return right(config, hidden, None, view)
            return right(config, hidden, mask if view.length == 0 else mask.flip(1), view)

        monkeypatch.setattr(hf_compat, "causal_mask", wrong)
    assert compare(tiny_model(family), prompts(family, ROWS[family]), KeyNorm(pruning_rate="2/3"))[2] > 1e-2
