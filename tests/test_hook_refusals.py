"""A prompt that was not pruned as asked never passes for one that was; what can't work is refused in a sentence."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import pytest
import torch
from test_hook_exact import MIXED, ONE
from tiny_models import FAMILIES, IMAGE, N_LAYERS, TEXT, build, generate, prompts
from torch import nn
from toy_pruners import Broken, NoCheck, StateNorm, Stride, TwoStages
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from vlm_pruner_eval import ConfigError, PruningError, Stage, prune
from vlm_pruner_eval.hf_compat import cache_argument, cache_of, with_cache
from vlm_pruner_eval.pruners import get_pruner


def traces(model: nn.Module) -> tuple[set, set]:
    """Hooks of all modules, but for transformers' own output capturing, and attributes of the two that are patched."""
    hooks = {
        (name, key, id(function))
        for name, module in model.named_modules()
        for table in (module._forward_pre_hooks, module._forward_hooks)
        for key, function in table.items()
        if "output_capturing" not in getattr(function, "__name__", "")
    }
    return hooks, {(id(owner), name) for owner in (model, model.model, model.model.language_model) for name in owner.__dict__}


@pytest.fixture
def llava(tiny_model):
    """The tiny LLaVA, on which a test must leave nothing behind, however it ends."""
    model = tiny_model("llava")
    before = traces(model)
    yield model
    assert traces(model) == before


@pytest.mark.parametrize("ending", ["as usual", "by an exception"])
def test_nothing_stays_behind_on_any_family(tiny_model, family, ending):
    model, inputs, pruner = tiny_model(family), prompts(family, ONE), StateNorm(pruning_rate="2/3")
    plain, before = generate(model, inputs, 1).logits[0], traces(model)
    if ending == "as usual":
        with prune(model, pruner):
            assert not torch.equal(generate(model, inputs, 1).logits[0], plain)
            assert traces(model) != before
    else:
        with pytest.raises(ZeroDivisionError), prune(model, pruner):
            model(**inputs, use_cache=True)
            raise ZeroDivisionError
    assert traces(model) == before
    assert torch.equal(generate(model, inputs, 1).logits[0], plain)


# ---- methods that answer wrongly
FAULTS = {
    "all": "expected exactly 5 of 16",
    "duplicates": "expected no repeats",
    "out of range": "expected 0 to 15",
    "unsorted float": "expected a 1-D int64 tensor",
    "raises": "broken on purpose",
}


@pytest.mark.parametrize("method", [Broken, NoCheck])
@pytest.mark.parametrize("fault", FAULTS)
def test_sabotaged_methods_are_caught(llava, method, fault):
    expected = RuntimeError if fault == "raises" and method is NoCheck else PruningError
    with pytest.raises(expected, match=FAULTS[fault]), prune(llava, method(pruning_rate="2/3", fault=fault)):
        generate(llava, prompts("llava", ONE))


def test_a_method_that_answers_with_something_else_is_caught(llava):
    class Wrong(StateNorm):
        def select(self, tokens, keep=None):
            return torch.arange(keep)

    with pytest.raises(PruningError, match="expected a Selection"), prune(llava, Wrong(pruning_rate=0.5)):
        generate(llava, prompts("llava", ONE))


@pytest.mark.parametrize("name", ["vlmpruner", "random", "divprune"])
def test_nan_in_the_hidden_states_names_the_sample(llava, name):
    inputs = prompts("llava", MIXED)
    inputs["pixel_values"][1] = float("nan")
    pruner = get_pruner(name, pruning_rate="2/3")
    with pytest.raises(PruningError, match=r"layer .*sample 'b/0'.*NaN"), prune(llava, pruner, sample_ids=["a", "b", "c"]):
        generate(llava, inputs)


# ---- what happens to hooks, caches and exceptions inside the context
REMOVALS: dict[str, Callable[[nn.Module], object]] = {
    "layer": lambda model: model.model.language_model.layers[2]._forward_pre_hooks.popitem(),
    "core": lambda model: model.model._forward_pre_hooks.popitem(),
    "norm": lambda model: model.model.language_model.norm._forward_hooks.popitem(),
    "features": lambda model: model.model.__dict__.pop("get_image_features"),
}


@pytest.mark.parametrize("where", REMOVALS)
def test_a_hook_that_is_removed_inside_the_context_is_noticed(llava, where):
    with pytest.raises(PruningError, match=r"1 of .* hooks were removed"), prune(llava, Stride(pruning_rate=0.5)):
        generate(llava, prompts("llava", ONE), 1)
        REMOVALS[where](llava)
        generate(llava, prompts("llava", [[3]]), 1)


def test_a_cache_that_was_not_cut_is_noticed(llava):
    """Another tool that pads layer 3 back behind our back: the measured length is not the asked one."""

    def tamper(module, args, kwargs, output):
        cache = cache_argument(kwargs, "layer 3").layers[3]
        cache.keys, cache.values = (torch.cat([x, x[:, :, :1]], 2) for x in (cache.keys, cache.values))

    handle = llava.model.language_model.layers[3].register_forward_hook(tamper, with_kwargs=True)
    try:
        with pytest.raises(PruningError, match="decoder layer 3 holds 17 tokens"), prune(llava, Stride(pruning_rate="2/3")):
            generate(llava, prompts("llava", ONE), 1)
    finally:
        handle.remove()


@pytest.mark.parametrize("swallowed", [False, True])
def test_an_exception_in_generate_goes_through_or_is_not_forgotten(llava, monkeypatch, swallowed):
    def explode(*args, **kwargs):
        raise ZeroDivisionError("in the middle of generate")

    monkeypatch.setattr(llava.model.language_model.layers[3].mlp, "forward", explode)
    error, said = (PruningError, "never finished") if swallowed else (ZeroDivisionError, "in the middle")
    inside = contextlib.suppress(*[ZeroDivisionError] * swallowed)
    with pytest.raises(error, match=said), prune(llava, Stride(pruning_rate=0.5)), inside:
        generate(llava, prompts("llava", ONE))


def test_nested_use_is_refused_and_the_outer_context_lives_on(llava):
    with prune(llava, Stride(pruning_rate="2/3")) as ledger:
        with pytest.raises(PruningError, match="pruned already"), prune(llava, Stride(pruning_rate=0.5)):
            pass
        generate(llava, prompts("llava", ONE), 1)
    assert ledger.records[0].n_kept == 5


def test_a_users_own_instance_patch_is_restored():
    model, calls = build("llava"), []
    original = model.model.get_image_features

    @functools.wraps(original)  # generate() reads its signature
    def mine(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.model.get_image_features = mine
    with prune(model, Stride(pruning_rate=0.5)):
        generate(model, prompts("llava", ONE), 1)
    assert model.model.__dict__["get_image_features"] is mine
    generate(model, prompts("llava", ONE), 1)
    assert calls == [1, 1]


# ---- requests that can't work, refused before the context opens
class Custom(TwoStages):
    """Cuts where it is told to."""

    def stages(self, n_layers):
        return {0.5: (Stage(3, 0.5), Stage(1, 0.2)), 0.25: (Stage(0, 0.5),)}[self.pruning_rate]


@pytest.mark.parametrize(
    ("pruner", "said"),
    [
        (Stride(pruning_rate=0.5, layer=N_LAYERS), "layer: got 5, expected 0 to 4"),
        (Stride(pruning_rate=0.5, layer=99), "layer: got 99, expected 0 to 4"),
        (Custom(pruning_rate=0.5), "ascending"),
        (Custom(pruning_rate=0.25), "come from the layer before"),
        *((wrong, "expected a Pruner") for wrong in ("vlmpruner", None, Stride)),
    ],
)
def test_requests_that_can_not_work(llava, pruner, said):
    with pytest.raises(ConfigError, match=said):
        prune(llava, pruner)


def test_models_that_can_not_be_pruned(llava, monkeypatch):
    with pytest.raises(ConfigError, match=r"model_type 'llama'.*known: .*llava"):
        prune(LlamaForCausalLM(LlamaConfig(**TEXT)), Stride(pruning_rate=0.5))
    config = llava.model.language_model.config
    monkeypatch.setattr(config, "layer_types", ["full_attention"] * 4 + ["sliding_attention"], raising=False)
    with pytest.raises(ConfigError, match="sliding-window"):
        prune(llava, Stride(pruning_rate=0.5))
    monkeypatch.setattr(llava.config.vision_config, "model_type", "pixtral", raising=False)
    with pytest.raises(ConfigError, match="Pixtral"):
        prune(llava, Stride(pruning_rate=0.5))


# ---- inputs that can't be pruned
def _static_cache(model: nn.Module) -> None:
    cache = StaticCache(config=model.model.language_model.config, max_cache_len=64)
    model(**prompts("llava", ONE), **with_cache(model.forward, cache), use_cache=True)


def _embeddings_alone(model: nn.Module) -> None:
    inputs = prompts("llava", [[9]])
    model(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), attention_mask=inputs["attention_mask"])


def _image_tokens(n: int) -> Callable[[nn.Module], None]:
    ids = torch.tensor([[5] + [IMAGE] * n + [6]])
    return lambda model: model(**prompts("llava", ONE) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _no_image(model: nn.Module) -> None:
    generate(model, prompts("llava", ONE), 1)  # its features must not be taken for the next prompt's
    generate(model, {k: v for k, v in prompts("llava", ONE).items() if k != "pixel_values"}, 1)


@pytest.mark.parametrize(
    ("feed", "said"),
    [
        (_static_cache, "cache"),
        (_embeddings_alone, "inputs_embeds alone"),
        (_image_tokens(15), "do not match"),
        (_image_tokens(20), "do not match"),
        (_no_image, "16 image tokens, but the encoded images make 0"),
        (lambda model: generate(model, prompts("llava", ONE), 1, prefill_chunk_size=10), "got prefill_chunk_size=10"),
    ],
)
def test_inputs_that_can_not_be_pruned(llava, feed, said):
    with pytest.raises((PruningError, ValueError), match=said), prune(llava, Stride(pruning_rate=0.5)), torch.no_grad():
        feed(llava)


@pytest.mark.parametrize(
    ("family", "segment"), [(name, kind) for name in sorted(FAMILIES) for kind in ("i0", "v0")[: 1 + FAMILIES[name].videos]]
)
def test_new_images_and_videos_in_a_later_turn_are_refused(tiny_model, family, segment):
    model, late = tiny_model(family), prompts(family, [[4, segment, 7]])
    del late["attention_mask"]
    positions = torch.arange(9, 9 + late["input_ids"].shape[1])[None]
    with pytest.raises(PruningError, match="later turn"), prune(model, Stride(pruning_rate=0.5)), torch.no_grad():
        cache = cache_of(model(**prompts(family, [[9]]), use_cache=True))
        model(**late, position_ids=positions, **with_cache(model.forward, cache))


def test_sample_ids_must_fit_the_batch(llava):
    with pytest.raises(PruningError, match="2 sample_ids for a batch of 3"), prune(llava, Stride(pruning_rate=0.5), sample_ids=["a", "b"]):
        generate(llava, prompts("llava", MIXED))
