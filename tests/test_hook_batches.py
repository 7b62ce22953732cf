"""Batches, beams, padding, outputs: pruning must not depend on how prompts are run together."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import transformers
from test_hook_exact import CLOSE, MIXED, ONE, distance
from tiny_models import FAMILIES, IMAGE, N_LAYERS, build, generate, masked_recompute, prompts, scopes_of, step_logits, views_from
from toy_pruners import IN_MODEL, KeyNorm, StateNorm, Stride

from vlm_pruner_eval import PruningError, prune
from vlm_pruner_eval.hf_compat import cache_of
from vlm_pruner_eval.pruners import get_pruner
from vlm_pruner_eval.types import Selection

# before 5.18 transformers repeats images one by one under beams, wrongly when a row has several; Qwen's classes do it rightly themselves
SEVERAL_UNDER_BEAMS = hasattr(transformers.GenerationMixin, "_expand_multimodal_outputs")


def plain_positions(family: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Positions that count attended tokens, where the model does not compute multi-dimensional ones itself."""
    return {} if FAMILIES[family].mrope else {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def rate_for(name: str) -> object:
    return 0 if name == "none" else "2/3"


@pytest.mark.parametrize("name", IN_MODEL)
def test_every_method_gives_the_same_in_a_batch_and_alone(tiny_model, family, name):
    """Also the table over every method x every family: it keeps what was asked, in every layer, and decodes."""
    model, pruner = tiny_model(family), get_pruner(name, pruning_rate=rate_for(name))
    ids = [f"task/test/{i}" for i in range(len(MIXED))]
    with prune(model, pruner, sample_ids=ids) as ledger:
        batch = generate(model, prompts(family, MIXED))
    together = ledger.records
    for i, sample in enumerate(MIXED):
        with prune(model, pruner, sample_ids=[ids[i]]) as ledger:
            alone = generate(model, prompts(family, [sample]))
        (record,) = ledger.records
        padding = batch.sequences.shape[1] - alone.sequences.shape[1]
        assert [p - padding for p in together[i].kept_positions] == record.kept_positions
        assert together[i].order == record.order
        assert together[i].kv_lengths == record.kv_lengths
        assert distance(step_logits(batch)[i], step_logits(alone)[0]) < CLOSE
        assert torch.equal(batch.sequences[i, -6:], alone.sequences[0, -6:])
        scopes = scopes_of(family, sample)
        expected = sum(map(pruner.default_keep, scopes))
        assert (record.n_images, record.n_visual) == (len(scopes), sum(scopes))
        assert record.n_kept == record.n_asked == expected
        text = len(prompts(family, [sample])["input_ids"][0]) - record.n_visual
        cut_at = record.layer if record.layer is not None else N_LAYERS
        assert record.kv_lengths == [text + record.n_visual] * cut_at + [text + expected] * (N_LAYERS - cut_at)


def test_records_say_what_was_kept(tiny_model, family):
    inputs = prompts(family, MIXED)
    with prune(tiny_model(family), KeyNorm(pruning_rate="2/3"), sample_ids=["a", "b", "c"]) as ledger:
        generate(tiny_model(family), inputs)
    for b, record in enumerate(ledger.records):
        visual = (inputs["input_ids"][b] == IMAGE).nonzero()[:, 0]
        assert (record.row, record.sample_id, record.n_visual) == (b, "abc"[b], len(visual))
        assert sorted(visual[record.order].tolist()) == record.kept_positions
        assert len(record.kept_positions) == record.n_kept
        assert (record.selection_ms > 0) == bool(record.n_visual)
        assert record.layer_averaged == pytest.approx((2 * record.n_visual + 3 * record.n_kept) / 5)
        assert record.as_json()["n_kept"] == record.n_kept


@pytest.mark.parametrize("rows", [[[4, "i0", 7], [3, "i0", 12], [9]], MIXED], ids=["one image a row", "several images"])
@pytest.mark.parametrize("kind", ["beams", "samples"])
def test_beams_and_returned_sequences(tiny_model, family, rows, kind):
    """With a rule that does not depend on numbers, cached decoding equals decoding without a cache."""
    model, inputs = tiny_model(family), prompts(family, rows)
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    kwargs = beams if kind == "beams" else {"do_sample": True, "num_return_sequences": 3}
    if rows is MIXED and not SEVERAL_UNDER_BEAMS and not FAMILIES[family].mrope:
        with pytest.raises(PruningError, match="repeats the images of a batch one by one"), prune(model, Stride(pruning_rate="2/3")):
            generate(model, inputs, 5, **kwargs)
        return
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        with prune(model, Stride(pruning_rate="2/3"), sample_ids=["a", "b", "c"]) as ledger:
            outputs.append(generate(model, inputs, 5, use_cache=use_cache, **kwargs))
        first = ledger.records[:9]
        assert [record.sample_id for record in first] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
        kept = [sum(map(Stride(pruning_rate="2/3").default_keep, scopes_of(family, row))) for row in rows for _ in range(3)]
        assert [record.n_kept for record in first] == kept
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    if kind == "beams":
        assert distance(outputs[0].sequences_scores, outputs[1].sequences_scores) < 1e-4


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
    slow = masked_recompute(model, inputs, views)
    seen = views[N_LAYERS - 1].seen
    assert distance(with_positions[seen], slow[seen]) < CLOSE


def test_gradients_flow_through_the_cut(family):
    model, inputs = build(family), prompts(family, ONE)
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100
    with prune(model, KeyNorm(pruning_rate="2/3")):
        model(**inputs, labels=labels).loss.backward()
    layers = model.model.language_model.layers
    assert all(float(layers[i].mlp.down_proj.weight.grad.abs().max()) > 0 for i in range(N_LAYERS))


@pytest.mark.parametrize("layer", [0, 2])
def test_unread_records_do_not_hold_on_to_the_cache(tiny_model, family, layer):
    """A long loop in one context must not keep every prompt's KV cache until someone reads the ledger."""
    model, inputs = tiny_model(family), prompts(family, ONE)
    with prune(model, StateNorm(pruning_rate="2/3", layer=layer)) as ledger, torch.no_grad():
        kept = weakref.ref(cache_of(model(**inputs, use_cache=True)))
        gc.collect()
        assert kept() is None
    assert [record.n_kept for record in ledger.records] == [record.n_asked for record in ledger.records] != []


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


def test_without_a_cache_the_forward_is_the_same(tiny_model, family):
    model, inputs = tiny_model(family), prompts(family, MIXED)
    with prune(model, get_pruner("fastv", pruning_rate="2/3")) as ledger, torch.no_grad():
        a, b = (model(**inputs, use_cache=use_cache).logits for use_cache in (False, True))
    assert torch.equal(a, b)
    assert [r.kv_lengths for r in ledger.records[:3]] == [r.kv_lengths for r in ledger.records[3:]]


class _See(StateNorm):
    """Hands everything it is given to `seen`, on the class so that the method itself stays frozen."""

    needs = frozenset({"keys", "attention", "normed_hidden_states", "positions", "text"})
    seen: list = []  # noqa: RUF012

    def choose(self, tokens, keep):
        self.seen.append(tokens)
        return torch.arange(keep)


@pytest.fixture
def see():
    _See.seen.clear()
    return _See(pruning_rate=0.5), _See.seen


def rows_of(family: str) -> list[int]:
    """The row of every scope of MIXED."""
    return [b for b, sample in enumerate(MIXED) for _ in scopes_of(family, sample)]


def test_keys_are_those_of_the_cache(tiny_model, family, see):
    model, inputs = tiny_model(family), prompts(family, MIXED)
    pruner, seen = see
    with prune(model, pruner), torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
    keys = cache.layers[1].keys
    for row, tokens in zip(rows_of(family), seen, strict=True):
        padding = int((inputs["attention_mask"][row] == 0).sum())
        assert torch.equal(tokens.keys, keys[row, :, tokens.positions + padding].transpose(0, 1))
        assert torch.equal(tokens.text.keys, keys[row, :, tokens.text.positions + padding].transpose(0, 1))


def test_attention_is_the_last_row_that_eager_attention_computes(tiny_model, family, see):
    inputs = prompts(family, MIXED)
    pruner, seen = see
    with prune(tiny_model(family), pruner), torch.no_grad():
        tiny_model(family)(**inputs)
    with torch.no_grad():
        weights = tiny_model(family, "eager")(**inputs, output_attentions=True).attentions[1]
    for row, tokens in zip(rows_of(family), seen, strict=True):
        padding = int((inputs["attention_mask"][row] == 0).sum())
        assert distance(tokens.attention, weights[row, :, -1].mean(0)[tokens.positions + padding]) < 1e-6


def test_the_text_after_the_image_and_the_final_norm(tiny_model, see):
    model, inputs = tiny_model("llava"), prompts("llava", MIXED)
    pruner, seen = see
    with prune(model, pruner), torch.no_grad():
        model(**inputs)
    first, second, third = seen
    assert first.text.positions.tolist() == list(range(20, 27))
    assert second.text.positions.tolist() == [19, 20, *range(37, 49)]
    assert third.text.positions.tolist() == list(range(37, 49))
    for tokens in seen:
        normed = model.model.language_model.norm.forward(tokens.hidden_states)
        assert torch.equal(tokens.normed_hidden_states, normed)
        assert tokens.text.normed_hidden_states.shape == (len(tokens.text.positions), 64)


def test_fields_that_are_not_needed_are_not_computed(tiny_model):
    class Nothing(_See):
        needs = frozenset()
        seen: list = []  # noqa: RUF012

    with prune(tiny_model("llava"), Nothing(pruning_rate=0.5)), torch.no_grad():
        tiny_model("llava")(**prompts("llava", ONE))
    (tokens,) = Nothing.seen
    assert tokens.keys is None
    assert tokens.attention is None
    assert tokens.normed_hidden_states is None
    assert tokens.text is None
    assert (tokens.grid, tokens.coords[5].tolist()) == ((4, 4), [0, 1, 1])


def test_fastv_picks_the_same_under_sdpa_and_eager(tiny_model, family):
    inputs, kept = prompts(family, MIXED), []
    for attention in ("sdpa", "eager"):
        with prune(tiny_model(family, attention), get_pruner("fastv", pruning_rate="2/3")) as ledger:
            generate(tiny_model(family, attention), inputs, 1)
        kept.append([record.kept_positions for record in ledger.records])
    assert kept[0] == kept[1]


def test_hidden_states_and_attentions_can_be_asked_for(family):
    model, inputs = build(family, "eager"), prompts(family, ONE)
    length = inputs["input_ids"].shape[1]
    with prune(model, KeyNorm(pruning_rate="2/3")), torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
    (n_visual,) = scopes_of(family, ONE[0])
    short = length - n_visual + KeyNorm(pruning_rate="2/3").default_keep(n_visual)
    assert [tuple(a.shape[2:]) for a in out.attentions] == [(length, length)] * 2 + [(short, short)] * 3
    assert [states.shape[1] for states in out.hidden_states[:3]] == [length] * 3
    assert out.logits.shape[1] == length


def test_layer_average_budget(tiny_model):
    """Rate 0.25 on average over 5 layers, two of which see all 16 tokens: (2 * 16 + 3 * 9) / 5 is nearest to 12."""
    with prune(tiny_model("llava"), KeyNorm(pruning_rate=0.25, budget="layer_average")) as ledger:
        generate(tiny_model("llava"), prompts("llava", ONE), 1)
    (record,) = ledger.records
    assert record.n_kept == 9
    assert abs(record.layer_averaged - 12) < 0.5


def test_one_budget_over_all_images_of_a_prompt(tiny_model, family, see):
    """scope=per_sample: one choice per prompt, among tokens whose frames are numbered through; the cut is as exact as ever."""
    model, inputs, (_, seen) = tiny_model(family), prompts(family, MIXED), see
    with prune(model, type(see[0])(pruning_rate="2/3", scope="per_sample")) as ledger:
        out = generate(model, inputs, 3)
    length = inputs["input_ids"].shape[1]
    slow = masked_recompute(model, inputs, views_from(ledger.records, inputs), out.sequences[:, length:])
    assert distance(step_logits(out), slow[:, length - 1 : length + 2]) < CLOSE
    for record, sample in zip(ledger.records, MIXED, strict=True):
        scopes = scopes_of(family, sample)
        assert (record.scope, record.n_images) == ("per_sample", len(scopes))
        assert record.n_kept == record.n_asked == Stride(pruning_rate="2/3").default_keep(sum(scopes))
    first, second = seen
    assert second.n_visual == sum(scopes_of(family, MIXED[1]))
    frames = [set(tokens.coords[tokens.coords[:, 1] >= 0][:, 0].tolist()) for tokens in (first, second)]
    assert frames[1] == set(range(len(frames[1])))
    assert len(frames[1]) > len(frames[0]), "the second image's frames follow the first's"


def test_a_selection_may_be_returned_whole(tiny_model):
    class Whole(StateNorm):
        def choose(self, tokens, keep):
            return Selection(torch.arange(keep).flip(0), quirks=frozenset({"told"}))

    with prune(tiny_model("llava"), Whole(pruning_rate="2/3")) as ledger:
        generate(tiny_model("llava"), prompts("llava", ONE), 1)
    assert ledger.records[0].order == [4, 3, 2, 1, 0]
    assert ledger.records[0].quirks == {"told"}
