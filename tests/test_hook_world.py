"""Models and caches as others hand them over: pruned rightly, or refused; never unpruned, never other tokens, never zeros."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from test_hook_exact import MIXED, ONE
from tiny_models import IMAGE, TEXT, VIDEO, VISION_END, VISION_START, build, prompts
from torch import Tensor, nn
from toy_pruners import Stride
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from vlm_pruner_eval import PruningError, prune
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.hf_compat import cache_of, with_cache
from vlm_pruner_eval.lmms.checks import check_prompt_lengths
from vlm_pruner_eval.pruners import get_pruner

NEITHER_IMAGE_NOR_END = {
    "suppress_tokens": [IMAGE, VIDEO, VISION_START, VISION_END, 2],
    "eos_token_id": 2,
}  # random weights may answer with one
COMPILED = {
    "the whole model": lambda model: model.compile(backend="eager"),
    "a forward": lambda model: setattr(text_of(model), "forward", torch.compile(text_of(model).forward, backend="eager")),
    "a layer": lambda model: text_of(model).layers[2].compile(backend="eager"),
    "a layer in a wrapper": lambda model: text_of(model).layers.__setitem__(2, torch.compile(text_of(model).layers[2], backend="eager")),
}


def text_of(model: nn.Module) -> nn.Module:
    """The language model."""
    return model.model.language_model


def fastv() -> object:
    """A method that looks at the end of the prompt."""
    return get_pruner("fastv", pruning_rate="2/3")


def answer(model: nn.Module, inputs: dict, n: int = 4, **settings: object) -> list[list[int]]:
    """Greedy new tokens."""
    ids = model.generate(**inputs, max_new_tokens=n, do_sample=False, **NEITHER_IMAGE_NOR_END, **settings)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def right() -> tuple[list[list[int]], Tensor]:
    """Tokens and logits of the pruned LLaVA, uncompiled and unwrapped."""
    model, inputs = build("llava"), prompts("llava", ONE)
    with prune(model, fastv()), torch.no_grad():
        return answer(model, inputs), model(**inputs).logits


# ---- compiled and wrapped
@pytest.mark.parametrize("part", COMPILED)
def test_what_was_compiled_and_used_before_is_pruned(right, part):
    torch.compiler.reset()
    model, inputs = build("llava"), prompts("llava", ONE)
    COMPILED[part](model)
    plain = answer(model, inputs, 1)
    with warnings.catch_warnings(record=True) as said, prune(model, fastv()) as ledger, torch.no_grad():
        warnings.simplefilter("always")
        assert answer(model, inputs) == right[0]
        assert torch.equal(model(**inputs).logits, right[1])
    assert [(record.n_asked, record.n_kept) for record in ledger.records] == [(5, 5)] * 2
    assert any("is compiled; inside the context it runs eagerly" in str(warning.message) for warning in said)
    assert answer(model, inputs, 1) == plain


def test_contexts_that_overlap_share_the_eager_stance(right):
    torch.compiler.reset()
    first, second = build("llava"), build("llava")
    text_of(second).layers[2].compile(backend="eager")
    inputs = prompts("llava", ONE)
    answer(second, inputs, 1)
    outer, inner = prune(first, fastv()), prune(second, fastv())
    with contextlib.ExitStack() as open_one:
        outer.__enter__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            open_one.enter_context(inner)
        answer(first, inputs, 1)
        outer.__exit__(None, None, None)
        assert answer(second, inputs) == right[0]


class Held(nn.Module):
    """A trainer's wrapper."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.pretrained = model

    def forward(self, **inputs: object) -> object:
        return self.pretrained(**inputs)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, Held, lambda model: torch.compile(model, backend="eager"), lambda model: Held(Held(model))]
)
def test_wrappers_are_looked_through(right, wrap: Callable):
    model, inputs = build("llava"), prompts("llava", ONE)
    wrapper = wrap(model)
    with prune(wrapper, fastv()) as ledger, torch.no_grad():
        assert torch.equal(wrapper(**inputs).logits, right[1])
        assert answer(model, inputs) == right[0]
    assert [record.n_kept for record in ledger.records] == [5, 5]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_adapters_of_peft_are_looked_through(family):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model, inputs = peft.get_peft_model(build(family), settings).eval(), prompts(family, ONE)
    kept = []
    for target in (model, model.get_base_model()):
        with prune(target, fastv()) as ledger:
            model.generate(**inputs, max_new_tokens=2)
        kept.append(ledger.records[0].kept_positions)
    assert kept[0] == kept[1] != []


@pytest.mark.parametrize(
    "wrapper", [nn.Linear(2, 2), nn.ModuleList([nn.Identity()]), "llava", torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))]
)
def test_a_wrapper_without_a_model_is_refused(wrapper):
    with pytest.raises(ConfigError, match=r"got \w+, expected a Hugging Face model or a wrapper with one inside it"):
        prune(wrapper, fastv())


def test_a_wrapper_around_two_models_is_refused():
    with pytest.raises(ConfigError, match=r"holds 2 \(LlavaForConditionalGeneration\)"):
        prune(nn.ModuleList([build("llava"), build("llava")]), fastv())


# ---- code that goes past the hooks
class Past(nn.Module):
    """A layer that is run without its hooks."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["hidden"] = layer
        self.self_attn = layer.self_attn

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.hidden.forward(*args, **kwargs)


def _replace_layer(model: nn.Module) -> None:
    model.model.language_model.layers[2] = Past(model.model.language_model.layers[2])


def _replace_language_model(model: nn.Module) -> None:
    model.model.language_model = build("llava").model.language_model


def _bypass_layers(model: nn.Module) -> None:
    text = model.model.language_model
    for layer in text.layers:
        layer.__class__ = type(
            layer.__class__.__name__, (layer.__class__,), {"__call__": lambda self, *args, **kwargs: self.forward(*args, **kwargs)}
        )


@pytest.mark.parametrize("change", [_replace_layer, _replace_language_model, _bypass_layers])
def test_a_stage_that_never_ran_can_not_pass(change: Callable):
    model, inputs = build("llava"), prompts("llava", ONE)
    with pytest.raises(PruningError, match=r"hooks were removed|could follow|never ran"), prune(model, fastv()):
        change(model)
        answer(model, inputs)


def test_a_context_in_which_the_model_ran_and_nothing_was_recorded_raises_on_exit(tiny_model):
    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    with (
        pytest.raises(PruningError, match="this context ended without a forward"),
        prune(model, fastv()),
        contextlib.suppress(PruningError),
    ):
        answer(model, inputs, cache_implementation="static")


def test_attention_that_does_not_call_its_projections_is_refused(tiny_model):
    model, inputs = build("llava"), prompts("llava", ONE)
    attention = model.model.language_model.layers[1].self_attn
    for name in ("q_proj", "k_proj"):
        projection = getattr(attention, name)
        projection.__class__ = type("Fused", (type(projection),), {"__call__": lambda self, x: self.forward(x)})
    with pytest.raises(PruningError, match="did not call its k_proj as a module"), prune(model, fastv()):
        answer(model, inputs)


def test_a_rotary_function_that_writes_to_its_input_changes_nothing(monkeypatch, right):
    from transformers.models.llama import modeling_llama

    own = modeling_llama.apply_rotary_pos_emb

    def in_place(q: Tensor, k: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        turned = own(q, k, *args, **kwargs)
        return q.copy_(turned[0]), k.copy_(turned[1])

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", in_place)
    model, inputs = build("llava"), prompts("llava", ONE)
    with prune(model, fastv()), torch.no_grad():
        assert answer(model, inputs) == right[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps, lambda model: copy.deepcopy(model.model.language_model)])
def test_a_copy_made_inside_the_context_is_refused(tiny_model, copied: Callable):
    model = tiny_model("llava")
    with prune(model, fastv()), pytest.raises(PruningError, match="Copy the model before the context or after it"):
        copied(model)


def test_layers_that_are_added_or_taken_away_are_noticed():
    for change in (lambda layers: layers.append(build("llava").model.language_model.layers[0]), lambda layers: layers.__delitem__(4)):
        model, inputs = build("llava"), prompts("llava", ONE)
        with pytest.raises(PruningError, match=r"1 of .* hooks were removed"), prune(model, fastv()):
            change(model.model.language_model.layers)
            answer(model, inputs)


def test_a_row_of_padding_alone_costs_the_others_nothing(tiny_model, right):
    """Serving code fills up its batches."""
    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    batch = {name: torch.cat([rows, torch.zeros_like(rows)]) for name, rows in batch.items()}
    with prune(model, fastv()) as ledger, torch.no_grad():
        logits = model(**batch, pixel_values=inputs["pixel_values"]).logits
    assert [(record.n_visual, record.n_kept) for record in ledger.records] == [(16, 5), (0, 0)]
    assert torch.allclose(logits[0, -1], right[1][0, -1], atol=1e-5)


# ---- threads
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_threads_that_generate_wait_for_each_other(family):
    model, inputs = build(family), [prompts(family, [[8 + i, f"i{i}", 12]]) for i in range(4)]
    with prune(model, fastv()):
        expected = [answer(model, x) for x in inputs]
    found: list = [None] * 4
    with prune(model, fastv()) as ledger:
        threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, answer(model, inputs[i]))) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == expected
    assert len(ledger.records) == 4


def test_a_forward_in_the_middle_of_another_threads_is_refused(tiny_model):
    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    errors = []

    def in_between(*args: object) -> None:
        def forward() -> None:
            try:
                model(**inputs)
            except PruningError as error:
                errors.append(str(error))

        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()

    with prune(model, fastv()) as ledger, torch.no_grad():
        handle = model.model.language_model.layers[1].register_forward_hook(in_between)
        model(**inputs)
        handle.remove()
    assert len(errors) == 1
    assert "expected one thread at a time" in errors[0]
    assert len(ledger.records) == 1


# ---- caches
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


def test_rows_of_a_cache_can_be_selected_repeated_and_reordered(tiny_model):
    model, inputs = tiny_model("llava"), prompts("llava", MIXED)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    ways = {
        "batch_select_indices": (torch.tensor([2, 0]), torch.tensor([2, 0])),
        "reorder_cache": (torch.tensor([1, 2, 0]), torch.tensor([1, 2, 0])),
        "batch_repeat_interleave": (2, torch.arange(3).repeat_interleave(2)),
    }
    with prune(model, fastv()), torch.no_grad():
        cache = cache_of(model(**inputs, use_cache=True))
        places = mask.sum(1, keepdim=True) - 1
        whole = step(model, copy.deepcopy(cache), 3, attention_mask=mask, position_ids=places)
        for name, (argument, rows) in ways.items():
            changed = copy.deepcopy(cache)
            getattr(changed, name)(argument)
            found = step(model, changed, len(rows), attention_mask=mask[rows], position_ids=places[rows])
            assert torch.allclose(found, whole[rows], atol=1e-5), name


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


def _assistant() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TEXT)).eval()


@pytest.mark.parametrize("how", ["looked up", "by an assistant", "without a cache"])
@pytest.mark.parametrize("method", ["divprune", "fastv", "dart", "random"])
def test_guesses_in_the_first_forward_and_prompts_read_again_change_no_token(tiny_model, method, how):
    """Methods see the prompt and nothing behind it, whatever else the forward holds."""
    ways = {
        "looked up": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
        "by an assistant": {"assistant_model": _assistant()},
        "without a cache": {"use_cache": False},
    }
    model, inputs, pruner = tiny_model("llava"), prompts("llava", ONE), get_pruner(method, pruning_rate="2/3")
    try:
        answer(model, inputs, 12, **ways[how])
    except ValueError as error:
        pytest.skip(f"this version of transformers hands images to the assistant: {error}")
    with prune(model, pruner) as ledger:
        plain = answer(model, inputs, 12)
        assert answer(model, inputs, 12, **ways[how]) == plain
    assert len({(record.sample_id, tuple(record.order)) for record in ledger.records}) == 1
    assert len(ledger.records) == (13 if how == "without a cache" else 2)


def test_a_prompt_read_in_chunks_is_refused(tiny_model):
    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    with pytest.raises(PruningError, match="prefill_chunk_size=10, expected a prompt that is read whole"), prune(model, fastv()):
        answer(model, inputs, prefill_chunk_size=10)


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
    from vlm_pruner_eval.hf_compat import count_positions, has_multidimensional_positions

    model, inputs = tiny_model(family), prompts(family, [[3, "i1", "i2", "i0", "i1", "i2", 4]])
    config = copy.deepcopy(model.config)
    assert has_multidimensional_positions(config) == (n_positions is not None)
    counted = None if n_positions is None else count_positions(model.model, inputs)
    assert counted == (None if n_positions is None else [n_positions])
    n_tokens = inputs["input_ids"].shape[1]
    limit = n_positions or n_tokens
    config.get_text_config().max_position_embeddings = limit
    check_prompt_lengths([n_tokens], ["doc"], config, counted)
    config.get_text_config().max_position_embeddings = limit - 1
    with pytest.raises(
        ValueError, match=f"doc: got a prompt of {n_tokens} tokens .* takes {limit} positions, but the model has {limit - 1}"
    ):
        check_prompt_lengths([n_tokens], ["doc"], config, counted)
