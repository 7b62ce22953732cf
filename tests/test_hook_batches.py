"""Batches, beams, padding, outputs: pruning must not depend on how prompts are run together; and what methods are shown."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers
from test_hook_exact import CLOSE, MIXED, ONE, ROWS, compare, distance, plain_positions
from thinning import only
from tiny_models import FAMILIES, IMAGE, N_LAYERS, VIDEO, build, generate, masked_recompute, prompts, scopes_of, step_logits, views_from
from toy_pruners import IN_MODEL, KeyNorm, StateNorm, Stride, made

from vlm_pruner_eval import ConfigError, PruningError, prune
from vlm_pruner_eval.hf_compat import cache_of
from vlm_pruner_eval.pruners import get_pruner
from vlm_pruner_eval.types import Selection

# before 5.18 transformers repeats images one by one under beams, wrongly when a row has several; Qwen's classes do it rightly themselves
SEVERAL_UNDER_BEAMS = hasattr(transformers.GenerationMixin, "_expand_multimodal_outputs")
SINGLY = ("glm_ocr",)  # does it itself, and wrongly


# methods that read what a family's vision tower does not have
FOR_CLIP = ("prumerge", "prumerge_plus", "mustdrop")
REFUSED = {family: FOR_CLIP for family in FAMILIES if family not in ("llava", "llava_next", "internvl")} | {"internvl": ("mustdrop",)}


@pytest.mark.parametrize("family", only(sorted(FAMILIES), ["llava", "llava_next", "qwen2_5_vl"]))
@pytest.mark.parametrize("name", IN_MODEL)
def test_every_method_gives_the_same_in_a_batch_and_alone(tiny_model, family, name):
    """The table over every method x every family: it keeps what was asked, in every layer, records it, and decodes."""
    model, rows, pruner = tiny_model(family), ROWS[family], made(name)
    if name in REFUSED.get(family, ()):
        with pytest.raises(ConfigError, match=name), prune(model, pruner):
            pass
        return
    ids, inputs = [f"task/test/{i}" for i in range(len(rows))], prompts(family, rows)
    with prune(model, pruner, sample_ids=ids) as ledger:
        batch = generate(model, inputs, 3)
    for i, (row, record) in enumerate(zip(rows, ledger.records, strict=True)):
        with prune(model, pruner, sample_ids=[ids[i]]) as alone_ledger:
            alone = generate(model, prompts(family, [row]), 3)
        (own,) = alone_ledger.records
        padding = batch.sequences.shape[1] - alone.sequences.shape[1]
        assert [p - padding for p in record.kept_positions] == own.kept_positions
        assert (record.order, record.kv_lengths, record.quirks) == (own.order, own.kv_lengths, own.quirks)
        assert distance(step_logits(batch)[i], step_logits(alone)[0]) < CLOSE
        assert torch.equal(batch.sequences[i, -3:], alone.sequences[0, -3:])
        # what the record says
        scopes = scopes_of(family, row)
        n_visual = sum(scopes)
        assert (record.row, record.sample_id, record.n_images, record.n_visual) == (i, ids[i], len(scopes), n_visual)
        assert record.n_kept == len(record.kept_positions)
        assert pruner.decides_count() or record.n_kept == record.n_asked
        stages = pruner.stages(N_LAYERS)
        if len(stages) < 2 and not pruner.decides_count() and pruner.scope != "per_view":
            assert record.n_kept == sum(map(pruner.default_keep, scopes))
        assert 0 < record.n_kept < n_visual or name in ("none", "blind") or not n_visual
        visual = torch.isin(inputs["input_ids"][i], torch.tensor([IMAGE, VIDEO])).nonzero()[:, 0]
        assert sorted(visual[record.order].tolist()) == record.kept_positions
        assert (record.selection_ms > 0) == (n_visual > 0 and name != "none")
        cut_at = record.layer if record.layer is not None else N_LAYERS
        text = len(prompts(family, [row])["input_ids"][0]) - n_visual
        assert record.kv_lengths == [text + length for length in record.visual_lengths]
        assert record.visual_lengths == sorted(record.visual_lengths, reverse=True)
        assert record.visual_lengths[:cut_at] + record.visual_lengths[-1:] == [n_visual] * cut_at + [record.n_kept]
        assert len(set(record.visual_lengths)) <= 1 + len(stages)
        assert record.layer_averaged == pytest.approx(sum(record.visual_lengths) / N_LAYERS)
        assert record.as_json()["layer_averaged"] == record.layer_averaged


@pytest.mark.parametrize("name", [name for name in IN_MODEL if name not in ("blind", "none")])
def test_rate_zero_is_the_plain_model_to_the_bit(tiny_model, name):
    model, inputs = tiny_model("llava"), prompts("llava", MIXED)
    plain = generate(model, inputs, 3)
    with prune(model, made(name, 0)) as ledger:
        found = generate(model, inputs, 3)
    assert torch.equal(step_logits(plain), step_logits(found))
    assert all(record.n_kept == record.n_visual for record in ledger.records)


@pytest.mark.parametrize("family", only(sorted(FAMILIES), ["internvl", "llava", "qwen3_vl"]))
@pytest.mark.parametrize("kind", ["beams", "samples"])
def test_beams_and_returned_sequences(tiny_model, family, kind):
    """With a rule that does not depend on numbers, cached decoding equals decoding without a cache."""
    model, rows = tiny_model(family), ROWS[family]
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    kwargs = beams if kind == "beams" else {"do_sample": True, "num_return_sequences": 3}
    if not SEVERAL_UNDER_BEAMS or family in SINGLY:
        rows = [[4, "i0", 7], [3, "i0", 12], [9]]
        if not FAMILIES[family].mrope or family in SINGLY:
            with pytest.raises(PruningError, match="repeats the images of a batch one by one"), prune(model, Stride(pruning_rate="2/3")):
                generate(model, prompts(family, MIXED), 5, **kwargs)
    inputs, outputs, ids = prompts(family, rows), [], [f"row {i}" for i in range(len(rows))]
    for use_cache in (True, False):
        torch.manual_seed(3)
        with prune(model, Stride(pruning_rate="2/3"), sample_ids=ids) as ledger:
            outputs.append(generate(model, inputs, 4, use_cache=use_cache, **kwargs))
        first = ledger.records[: 3 * len(rows)]
        assert [record.sample_id for record in first] == [name for name in ids for _ in range(3)]
        kept = [sum(map(Stride(pruning_rate="2/3").default_keep, scopes_of(family, row))) for row in rows for _ in range(3)]
        assert [record.n_kept for record in first] == kept
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    if kind == "beams":
        assert distance(outputs[0].sequences_scores, outputs[1].sequences_scores) < 1e-4


# ---- forwards without generate
def test_logits_keep_the_length_of_the_input_and_the_loss_works(tiny_model, family):
    model, inputs = tiny_model(family), prompts(family, MIXED)
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100
    with prune(model, KeyNorm(pruning_rate="2/3")) as ledger, torch.no_grad():
        out = model(**inputs, labels=labels)
        with_positions = model(**inputs, **plain_positions(family, inputs)).logits
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    assert bool(torch.isfinite(out.loss))
    views = views_from(ledger.records[3:], inputs)
    seen = views[N_LAYERS - 1].seen
    assert distance(with_positions[seen], masked_recompute(model, inputs, views)[seen]) < CLOSE


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_gradients_flow_through_the_cut(family):
    model, inputs = build(family), prompts(family, ONE)
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100
    with prune(model, KeyNorm(pruning_rate="2/3")):
        model(**inputs, labels=labels).loss.backward()
    layers = model.model.language_model.layers
    assert all(float(layers[i].mlp.down_proj.weight.grad.abs().max()) > 0 for i in range(N_LAYERS))


@pytest.mark.parametrize("layer", [0, 2])
def test_unread_records_do_not_hold_on_to_the_cache(tiny_model, layer):
    """A long loop in one context must not keep every prompt's KV cache until someone reads the ledger."""
    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    with prune(model, StateNorm(pruning_rate="2/3", layer=layer)) as ledger, torch.no_grad():
        kept = weakref.ref(cache_of(model(**inputs, use_cache=True)))
        gc.collect()
        assert kept() is None
    assert [record.n_kept for record in ledger.records] == [5]


def test_right_padding_keeps_the_same_tokens(tiny_model, family):
    model, fastv = tiny_model(family), get_pruner("fastv", pruning_rate="2/3")
    right, left = prompts(family, MIXED, pad="right"), prompts(family, MIXED)
    with prune(model, fastv) as ledger, torch.no_grad():
        logits = model(**right, **plain_positions(family, right)).logits
        model(**left)
    records = ledger.records
    assert [r.order for r in records[:3]] == [r.order for r in records[3:]]
    views = views_from(records[:3], right)
    seen = views[N_LAYERS - 1].seen
    assert distance(logits[seen], masked_recompute(model, right, views)[seen]) < CLOSE


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_without_a_cache_the_forward_is_the_same(tiny_model, family):
    model, inputs = tiny_model(family), prompts(family, MIXED)
    with prune(model, get_pruner("fastv", pruning_rate="2/3")) as ledger, torch.no_grad():
        a, b = (model(**inputs, use_cache=use_cache).logits for use_cache in (False, True))
    assert torch.equal(a, b)
    assert [r.kv_lengths for r in ledger.records[:3]] == [r.kv_lengths for r in ledger.records[3:]]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_hidden_states_and_attentions_can_be_asked_for(family):
    model, inputs = build(family, "eager"), prompts(family, ONE)
    length, (n_visual,) = inputs["input_ids"].shape[1], scopes_of(family, ONE[0])
    with prune(model, KeyNorm(pruning_rate="2/3")), torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    short = length - n_visual + KeyNorm(pruning_rate="2/3").default_keep(n_visual)
    assert [tuple(a.shape[2:]) for a in out.attentions] == [(length, length)] * 2 + [(short, short)] * 3
    assert [states.shape[1] for states in out.hidden_states[:3]] == [length] * 3
    assert out.logits.shape[1] == length


# ---- what a method is shown
class See(StateNorm):
    """Hands everything it is given to `seen`, on the class so that the method itself stays frozen."""

    needs = frozenset({"keys", "attention", "normed_hidden_states", "positions", "text"})
    seen: list = []  # noqa: RUF012

    def choose(self, tokens, keep):
        self.seen.append(tokens)
        return torch.arange(keep)


@pytest.fixture
def seen():
    See.seen.clear()
    return See.seen


def test_keys_are_those_of_the_cache_and_attention_is_eager_attentions_last_row(tiny_model, family, seen):
    model, inputs = tiny_model(family), prompts(family, MIXED)
    with prune(model, See(pruning_rate=0.5)), torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
    with torch.no_grad():
        weights = tiny_model(family, "eager")(**inputs, output_attentions=True).attentions[1]
    keys = cache.layers[1].keys
    rows = [b for b, sample in enumerate(MIXED) for _ in scopes_of(family, sample)]  # of every scope
    for row, tokens in zip(rows, seen, strict=True):
        padding = int((inputs["attention_mask"][row] == 0).sum())
        for one in (tokens, tokens.text):
            assert torch.equal(one.keys, keys[row, :, one.positions + padding].transpose(0, 1))
        assert distance(tokens.attention, weights[row, :, -1].mean(0)[tokens.positions + padding]) < 1e-6


def test_the_text_after_the_image_and_the_final_norm(tiny_model, seen):
    model, inputs = tiny_model("llava"), prompts("llava", MIXED)
    with prune(model, See(pruning_rate=0.5)), torch.no_grad():
        model(**inputs)
    expected = [[*range(20, 27)], [19, 20, *range(37, 49)], [*range(37, 49)]]
    assert [tokens.text.positions.tolist() for tokens in seen] == expected
    for tokens in seen:
        assert torch.equal(tokens.normed_hidden_states, model.model.language_model.norm.forward(tokens.hidden_states))
        assert tokens.text.normed_hidden_states.shape == (len(tokens.text.positions), 64)


def test_fields_that_are_not_needed_are_not_computed(tiny_model, seen):
    class Nothing(See):
        needs = frozenset()

    with prune(tiny_model("llava"), Nothing(pruning_rate=0.5)), torch.no_grad():
        tiny_model("llava")(**prompts("llava", ONE))
    (tokens,) = seen
    assert [tokens.keys, tokens.attention, tokens.normed_hidden_states, tokens.text] == [None] * 4
    assert (tokens.grid, tokens.coords[5].tolist()) == ((4, 4), [0, 1, 1])


# ---- budgets
def test_layer_average_budget(tiny_model):
    """Rate 0.25 on average over 5 layers, two of which see all 16 tokens: (2 * 16 + 3 * 9) / 5 is nearest to 12."""
    with prune(tiny_model("llava"), KeyNorm(pruning_rate=0.25, budget="layer_average")) as ledger:
        generate(tiny_model("llava"), prompts("llava", ONE), 1)
    (record,) = ledger.records
    assert record.n_kept == 9
    assert abs(record.layer_averaged - 12) < 0.5


def test_one_budget_over_all_images_of_a_prompt(tiny_model, family, seen):
    """scope=per_sample: one choice per prompt, among tokens whose frames are numbered through; the cut is as exact as ever."""
    rows = ROWS[family]
    _, records, apart = compare(tiny_model(family), prompts(family, rows), See(pruning_rate="2/3", scope="per_sample"), 3)
    assert apart < CLOSE
    for record, row in zip(records, rows, strict=True):
        scopes = scopes_of(family, row)
        assert (record.scope, record.n_images) == ("per_sample", len(scopes))
        assert record.n_kept == record.n_asked == Stride(pruning_rate="2/3").default_keep(sum(scopes))
    assert [tokens.n_visual for tokens in seen] == [n for row in rows if (n := sum(scopes_of(family, row)))]
    for tokens in seen:
        frames = set(tokens.coords[tokens.coords[:, 1] >= 0][:, 0].tolist())
        assert frames == set(range(len(frames)))
    several = seen[-1].coords
    assert several[:, 0].max() > seen[0].coords[:, 0].max(), "the second image's frames follow the first's"


def test_a_selection_may_be_returned_whole(tiny_model):
    class Whole(StateNorm):
        def choose(self, tokens, keep):
            return Selection(torch.arange(keep).flip(0), quirks=frozenset({"told"}))

    with prune(tiny_model("llava"), Whole(pruning_rate="2/3")) as ledger:
        generate(tiny_model("llava"), prompts("llava", ONE), 1)
    assert ledger.records[0].order == [4, 3, 2, 1, 0]
    assert ledger.records[0].quirks == {"told"}


@pytest.mark.parametrize("rows", [ONE, MIXED], ids=["alone", "beside rows that lose tokens"])
def test_new_states_count_where_no_token_is_dropped(tiny_model, rows):
    """Of a method that decides its count: what it makes of a row may not depend on the other rows of the batch."""

    class KeepsTheSmallest(StateNorm):
        def decides_count(self):
            return True

        def choose(self, tokens, keep):
            kept = torch.arange(tokens.n_visual if tokens.n_visual == len(smallest) else keep)
            return Selection(kept, tokens.hidden_states[kept] * 1.25)

    model, smallest = tiny_model("llava"), range(scopes_of("llava", ONE[0])[0])
    inputs = prompts("llava", rows)
    plain = step_logits(generate(model, inputs, 1))
    with prune(model, KeepsTheSmallest(pruning_rate="2/3", layer=2)):
        changed = step_logits(generate(model, inputs, 1))
    alone = prompts("llava", ONE)
    with prune(model, KeepsTheSmallest(pruning_rate="2/3", layer=2)) as ledger:
        own = step_logits(generate(model, alone, 1))
    assert ledger.records[0].n_kept == len(smallest)
    assert distance(plain[0], own[0]) > CLOSE, "new states change the answer"
    assert distance(changed[0], own[0]) < CLOSE
