"""Methods of several stages and of single views: attention of layer K itself, rows of text, views, made-up rows."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import FAMILIES, generate, prompts, step_logits
from torch import Tensor

from vlm_pruner_eval import Pruner, PruningError, Selection, Stage, VisualTokens, hf_compat, prune
from vlm_pruner_eval.vlms import family_of

ROWS = [[4, "i0", 7], [3, "i1", 2, "i2", 12]]


@dataclass(frozen=True, kw_only=True)
class Attended(Pruner):
    """Looks at the rows of attention that later methods need; keeps the first tokens, half of them at the first of two stages."""

    name: ClassVar[str] = "attended"
    needs: ClassVar[frozenset[str]] = frozenset({"own_attention", "text_attention", "question.embeddings"})
    seen: ClassVar[list[VisualTokens]] = []
    rows: ClassVar[list[tuple[VisualTokens, Tensor, Tensor]]] = []

    def stages(self, n_layers: int) -> tuple[Stage, ...]:
        return (Stage(1, Fraction(1, 2)), Stage(3, Fraction(1, 4)))

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        self.seen.append(tokens)
        assert tokens.memory == ({} if tokens.stage == 0 else {"stage": 0})
        tokens.memory["stage"] = tokens.stage
        rows = tokens.text_attention(None)
        self.rows.append((tokens, rows, tokens.text_attention(torch.tensor([len(rows) - 1, 0]))))
        return torch.arange(keep)


@dataclass(frozen=True, kw_only=True)
class Backwards(Pruner):
    """Every second token, the last one first in the sequence, and a made-up row before them."""

    name: ClassVar[str] = "backwards"
    layer: int = 0
    positions: str = "contiguous"

    def choose(self, tokens: VisualTokens, keep: int) -> Selection:
        order = torch.arange(tokens.n_visual)[-keep:]
        rows = tokens.hidden_states[order].flip(0)
        rows[0] = tokens.hidden_states.mean(0)
        return Selection(order, rows, merged=order[:1])


@dataclass(frozen=True, kw_only=True)
class PerView(Pruner):
    """The first tokens of every view."""

    name: ClassVar[str] = "perview"
    seen: ClassVar[list[VisualTokens]] = []
    layer: int = 0
    scope: str = "per_view"

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        self.seen.append(tokens)
        return torch.arange(keep).flip(0)


def weights_of(model: Any, layer: int, run: Any) -> Tensor:
    """Attention weights [B, H, n, n] of a decoder layer in the first forward that `run` makes, as eager code computes them."""
    found: list[Tensor] = []
    attention = hf_compat.decoder(model)[1].layers[layer].self_attn
    handle = attention.register_forward_hook(lambda module, args, output: found.append(output[1]))
    run()
    handle.remove()
    return found[0]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attention_of_the_layer_itself_and_of_text_rows_is_that_of_eager_code(tiny_model, family):
    model, inputs = tiny_model(family, "eager"), prompts(family, ROWS)
    pruner = Attended(pruning_rate="3/4")
    pruner.seen.clear()
    pruner.rows.clear()
    whole = [weights_of(model, layer, lambda: generate(model, inputs, 1)) for layer in (0, 1)]
    with prune(model, pruner) as ledger:
        second = weights_of(model, 2, lambda: generate(model, inputs, 1))
    first = [tokens for tokens in pruner.seen if tokens.stage == 0]
    assert 2 * len(first) == len(pruner.seen) > 4
    embeddings = model.get_input_embeddings()
    for tokens, rows, some in pruner.rows[: len(first)]:
        b = int(tokens.image.split("/")[0])
        visual = family_of(model).is_visual(model.config, inputs["input_ids"])[b].nonzero()[:, 0]
        own = scope_places(tokens, first, visual)
        torch.testing.assert_close(tokens.own_attention, whole[1][b, :, -1, own].mean(0))
        text = [i for i in range(int(own[-1]) + 1, inputs["input_ids"].shape[1]) if i not in visual]
        torch.testing.assert_close(tokens.question.text_embeddings, embeddings(inputs["input_ids"][b, text]))
        slow = whole[0][b, :, text][:, :, own].mean(0)
        torch.testing.assert_close(rows, slow)
        torch.testing.assert_close(some, slow[[len(text) - 1, 0]])
    for tokens, rows, _ in pruner.rows[len(first) :]:
        assert torch.equal(tokens.ids, torch.arange(tokens.n_visual))
        assert tokens.n_original >= 2 * tokens.n_visual - 1
        assert rows.shape[1] == tokens.n_visual
        assert float(rows.sum(1).max()) < 1
        assert second.shape[-1] > tokens.n_visual
    assert all(record.n_kept < record.n_visual / 2 for record in ledger.records)


def scope_places(tokens: VisualTokens, all_first: list[VisualTokens], visual: Tensor) -> Tensor:
    """Places in the padded row of a scope's tokens: those of a row's scopes stand one after the other among its visual tokens."""
    row = tokens.image.split("/")[0]
    mates = [other for other in all_first if other.image.split("/")[0] == row]
    start = sum(other.n_visual for other in mates[: [other is tokens for other in mates].index(True)])
    return visual[start : start + tokens.n_visual]


def test_rows_stand_in_the_order_that_the_method_gives(tiny_model):
    """The same prompt with these very rows between its words, read by the language model alone."""
    model, inputs = tiny_model("llava", "sdpa"), prompts("llava", [[4, "i0", 7]])
    core, _ = hf_compat.decoder(model)
    with prune(model, Backwards(pruning_rate="1/2")) as ledger:
        output = generate(model, inputs, 4)
    (record,) = ledger.records
    encoded = core.get_image_features(inputs["pixel_values"])
    features = getattr(encoded, "pooler_output", encoded)[0]  # a list of images before transformers 5
    kept = features[-8:].flip(0)
    kept[0] = features.mean(0)
    ids = inputs["input_ids"][0]
    visual = family_of(model).is_visual(model.config, ids[None])[0].nonzero()[:, 0]
    words = model.get_input_embeddings()(ids)
    embeds = torch.cat([words[: visual[0]], kept, words[visual[-1] + 1 :]])[None]
    logits = []
    for token in output.sequences[0, len(ids) :]:
        logits.append(model(inputs_embeds=embeds).logits[0, -1])
        embeds = torch.cat([embeds, model.get_input_embeddings()(token)[None, None]], 1)
    torch.testing.assert_close(step_logits(output)[0], torch.stack(logits), atol=2e-4, rtol=0)
    assert record.n_merged == 1
    assert record.n_kept == 8


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "llava_video", "qwen2_vl"])
def test_every_view_has_a_budget_and_newlines_go(tiny_model, family):
    model = tiny_model(family, "sdpa")
    rows = [[4, "i0", 7], [3, "v1", 12]] if FAMILIES[family].videos else ROWS
    inputs, pruner = prompts(family, rows), PerView(pruning_rate="3/4")
    pruner.seen.clear()
    with prune(model, pruner) as ledger:
        generate(model, inputs, 1)
    assert len(pruner.seen) > len(rows)
    for b, record in enumerate(ledger.records):
        views = [tokens for tokens in pruner.seen if tokens.image.startswith(f"{b}/")]
        counts = [max(1, round(tokens.n_visual / 4)) for tokens in views]
        assert record.n_kept == record.n_asked == sum(counts)
        visual = family_of(model).is_visual(model.config, inputs["input_ids"])[b].nonzero()[:, 0]
        assert record.n_visual == len(visual) >= sum(tokens.n_visual for tokens in views)
        assert sorted(visual[record.order].tolist()) == record.kept_positions, "the order names the same tokens"
        for tokens in views:
            assert not bool((tokens.coords[:, 1:] < 0).any()), "newline tokens are in no view"
            assert len(tokens.coords[:, 0].unique()) == 1


@pytest.mark.parametrize("family", ["llava_next", "llava_video"])
def test_a_budget_a_view_that_drops_nothing_changes_nothing(tiny_model, family):
    model, inputs = tiny_model(family, "sdpa"), prompts(family, ROWS)
    plain = generate(model, inputs, 3)
    with prune(model, PerView(pruning_rate=0)) as ledger:
        found = generate(model, inputs, 3)
    assert torch.equal(plain.sequences, found.sequences)
    assert torch.equal(step_logits(plain), step_logits(found))
    assert all(record.n_kept == record.n_visual for record in ledger.records)


def test_a_field_that_nobody_named_is_not_there(tiny_model):
    @dataclass(frozen=True, kw_only=True)
    class Careless(Attended):
        name: ClassVar[str] = "careless"
        needs: ClassVar[frozenset[str]] = frozenset()

        def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
            return tokens.own_attention.topk(keep).indices

    with pytest.raises(PruningError, match="careless"), prune(tiny_model("llava", "sdpa"), Careless(pruning_rate="3/4")):
        generate(tiny_model("llava", "sdpa"), prompts("llava", ROWS), 1)
