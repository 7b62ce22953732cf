"""Caches as others hand them over and change them, and what is read off a dropped position."""

from __future__ import annotations

import contextlib
import copy
import types
from types import SimpleNamespace

import pytest
import torch
from test_hook_exact import MIXED, ONE
from test_hook_world import answer, fastv
from tiny_models import IMAGE, TEXT, generate, prompts, step_logits
from torch import Tensor, nn
from toy_pruners import Stride
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from vlm_pruner_eval import PruningError, prune
from vlm_pruner_eval.hf_compat import cache_of, count_positions, has_multidimensional_positions, with_cache
from vlm_pruner_eval.lmms.answer_checks import check_prompt_lengths
from vlm_pruner_eval.pruners import get_pruner


def step(model: nn.Module, cache: object, rows: int = 1, **more: object) -> Tensor:
    """Logits of one more token."""
    with torch.no_grad():
        return model(input_ids=torch.full((rows, 1), 7), **with_cache(model.forward, cache), **more).logits


def test_caches_from_elsewhere_are_refused(tiny_model):
    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    with torch.no_grad():
        unpruned = cache_of(model(**inputs, use_cache=True))
        with prune(model, fastv()):
            cut = cache_of(model(**inputs, use_cache=True))
            rebuilt = DynamicCache()
            for i, layer in enumerate(cut.layers):
                rebuilt.update(layer.keys, layer.values, i)
            for foreign in (unpruned, rebuilt):
                with pytest.raises(PruningError, match="filled without this context, or that lost its record"):
                    step(model, foreign)
    for cache in (cut, copy.deepcopy(cut)):
        with pytest.raises(PruningError, match="outside of a pruning context"):
            step(model, cache)
    with (
        pytest.raises(PruningError, match="cut at layer 2, but this context acts from layer 3 on"),
        prune(model, Stride(pruning_rate=0.5, layer=3)),
    ):
        step(model, cut)
    with prune(model, fastv()):
        assert bool(step(model, cut).isfinite().all())  # another context of the same method may go on


ROWS_CHANGED = {
    "batch_select_indices": (torch.tensor([2, 0]), torch.tensor([2, 0])),
    "reorder_cache": (torch.tensor([1, 2, 0]), torch.tensor([1, 2, 0])),
    "batch_repeat_interleave": (2, torch.arange(3).repeat_interleave(2)),
}


def test_rows_of_a_cache_can_be_selected_repeated_and_reordered(tiny_model):
    model, inputs = tiny_model("llava"), prompts("llava", MIXED)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    places = mask.sum(1, keepdim=True) - 1
    with prune(model, fastv()), torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
        whole = step(model, copy.deepcopy(cache), 3, attention_mask=mask, position_ids=places)
        for name, (argument, rows) in ROWS_CHANGED.items():
            changed = copy.deepcopy(cache)
            getattr(changed, name)(argument)
            found = step(model, changed, len(rows), attention_mask=mask[rows], position_ids=places[rows])
            assert torch.allclose(found, whole[rows], atol=1e-5), name


def test_new_tokens_that_are_masked_are_not_seen(tiny_model):
    model, inputs = tiny_model("llava"), prompts("llava", MIXED)
    ones, places = torch.ones(3, 1, dtype=torch.long), inputs["attention_mask"].sum(1, keepdim=True)
    with prune(model, fastv()), torch.no_grad():
        found = []
        for hidden in (False, True):
            cache, mask = cache_of(model(**inputs, use_cache=True)), inputs["attention_mask"]
            if hidden:
                mask = torch.cat([mask, ones - 1], 1)
                model(input_ids=ones * 9, attention_mask=mask, position_ids=places, **with_cache(model.forward, cache))
            found.append(step(model, cache, 3, attention_mask=torch.cat([mask, ones], 1), position_ids=places))
    assert torch.allclose(*found, atol=1e-5)


def test_a_cache_is_taken_back_to_the_end_of_its_images_and_no_further(tiny_model):
    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    with prune(model, fastv()):
        cache = cache_of(model(**inputs, use_cache=True))
        lengths = [layer.get_seq_length() for layer in cache.layers]
        first = step(model, cache)
        step(model, cache)
        cache.crop(-2)
        assert [layer.get_seq_length() for layer in cache.layers] == lengths
        assert torch.equal(step(model, cache), first)
        text = inputs["input_ids"][:, int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1 :]
        cache.crop(-1 - text.shape[1])
        assert [layer.get_seq_length() for layer in cache.layers] == [n - text.shape[1] for n in lengths]
        with torch.no_grad():
            behind = model(input_ids=text, **with_cache(model.forward, cache)).logits
            assert torch.allclose(behind, model(**inputs).logits[:, -text.shape[1] :], atol=1e-5)
        cache.crop(-text.shape[1])
        with pytest.raises(PruningError, match="expected to keep all images whole"):
            cache.crop(-1)


WAYS = {
    "looked up": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    "by an assistant": {},
    "without a cache": {"use_cache": False},
}


@pytest.mark.parametrize(
    ("method", "how"),
    [
        *(("fastv", how) for how in WAYS),
        ("dart", "by an assistant"),
        ("dart", "without a cache"),
        ("divprune", "looked up"),
        ("random", "without a cache"),
    ],
)
def test_guesses_in_the_first_forward_and_prompts_read_again_change_no_token(tiny_model, method, how):
    """Methods see the prompt and nothing behind it, whatever else the forward holds."""
    model, inputs, way = tiny_model("llava"), prompts("llava", ONE), WAYS[how]
    if how == "by an assistant":
        torch.manual_seed(0)
        way = {"assistant_model": LlamaForCausalLM(LlamaConfig(**TEXT)).eval()}
    try:
        answer(model, inputs, 12, **way)
    except ValueError as error:
        pytest.skip(f"this version of transformers hands images to the assistant: {error}")
    with prune(model, get_pruner(method, pruning_rate="2/3")) as ledger:
        plain = answer(model, inputs, 12)
        assert answer(model, inputs, 12, **way) == plain
    assert len({(record.sample_id, tuple(record.order)) for record in ledger.records}) == 1
    assert len(ledger.records) == (13 if how == "without a cache" else 2)


def test_bytes_of_a_cache_that_holds_no_plain_tensors_are_unknown(tiny_model):
    class Quantised(DynamicCache):
        """Holds its keys in another form once a prompt was read."""

        def update(self, keys: Tensor, values: Tensor, i: int, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
            whole = super().update(keys, values, i, *args, **kwargs)
            layer, n = self.layers[i], whole[0].shape[-2]
            layer.keys, layer.get_seq_length = whole[0][:, :, :0], types.MethodType(lambda self: n, layer)
            return whole

    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    with prune(model, fastv()) as ledger, torch.no_grad():
        model(**inputs, **with_cache(model.forward, Quantised()), use_cache=True)
        model(**inputs, use_cache=True)
    assert ledger.records[0].kv_bytes is None
    assert ledger.records[1].kv_bytes > 0


# ---- what is read off a dropped position
@pytest.mark.parametrize("method", ["fastv", "uniform", "divprune", "pool", "blind", "vlmpruner", "dart"])
def test_a_prompt_that_ends_with_an_image_is_refused_or_answered_from_what_is_kept(tiny_model, method):
    model, inputs = tiny_model("llava"), prompts("llava", [[8, "i0"]])
    pruner = get_pruner(method, pruning_rate=0 if method == "blind" else "2/3")
    logits = None
    with contextlib.suppress(PruningError), prune(model, pruner) as ledger, torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    if logits is None:
        with pytest.raises(PruningError, match="ends with a visual token, which was removed"), prune(model, pruner):
            answer(model, inputs)
    else:
        assert ledger.records[0].kept_positions[-1] == inputs["input_ids"].shape[1] - 1
        assert bool((logits != 0).any())


def test_a_label_right_behind_an_image_is_refused(tiny_model):
    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    labels = inputs["input_ids"].clone()
    behind = int((inputs["input_ids"][0] == IMAGE).nonzero()[-1]) + 1
    with prune(model, fastv()), torch.no_grad():
        assert bool(model(**inputs, labels=labels.index_fill(1, torch.arange(behind + 1), -100)).loss.isfinite())
    with pytest.raises(PruningError, match="set that label to -100"), prune(model, fastv()), torch.no_grad():
        model(**inputs, labels=labels.index_fill(1, torch.arange(behind), -100))


# ---- limits
@pytest.mark.parametrize(("family", "n_positions"), [("qwen2_vl", 34), ("qwen3_vl", 34), ("llava", None)])
def test_limits_are_compared_in_positions(tiny_model, family, n_positions):
    """Five images make 57 tokens, at multi-dimensional positions 0 to 33."""
    model, inputs = tiny_model(family), prompts(family, [[3, "i1", "i2", "i0", "i1", "i2", 4]])
    config = copy.deepcopy(model.config)
    assert has_multidimensional_positions(config) == (n_positions is not None)
    counted = None if n_positions is None else count_positions(model.model, inputs)
    assert counted == (None if n_positions is None else [n_positions])
    n_tokens = inputs["input_ids"].shape[1]
    limit = n_positions or n_tokens
    batch = SimpleNamespace(n_prompt=[n_tokens], n_positions=counted or [n_tokens], sample_ids=["doc"])
    config.get_text_config().max_position_embeddings = limit
    check_prompt_lengths(batch, 0, config)
    config.get_text_config().max_position_embeddings = limit - 1
    with pytest.raises(ValueError, match=f"doc: .* {n_tokens} tokens .* {limit} positions, but the model has {limit - 1}"):
        check_prompt_lengths(batch, 0, config)


def test_text_alone_without_a_cache_is_read_as_it_is(tiny_model):
    """Nothing is cut there, and only hooks on the layers behind the cut could see how long their inputs are."""
    model, inputs = tiny_model("llava", "sdpa"), prompts("llava", [[9]])
    plain = generate(model, inputs, 3, use_cache=False)
    with prune(model, get_pruner("fastv", pruning_rate="2/3")) as ledger:
        found = generate(model, inputs, 3, use_cache=False)
    assert torch.equal(step_logits(plain), step_logits(found))
    assert [record.n_visual for record in ledger.records] == [0] * 3
