"""A prompt that was not pruned as asked never passes for one that was; what can't work is refused in a sentence."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from test_hook_exact import MIXED, ONE
from tiny_models import IMAGE, N_LAYERS, TEXT, build, generate, prompts
from toy_pruners import Broken, NoCheck, StateNorm, Stride, TwoStages
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from vlm_pruner_eval import ConfigError, PruningError, Stage, prune
from vlm_pruner_eval.hf_compat import cache_argument, cache_of, with_cache
from vlm_pruner_eval.pruners import get_pruner

FAULTS = {
    "all": "expected exactly 5 of 16",
    "duplicates": "expected no repeats",
    "out of range": "expected 0 to 15",
    "unsorted float": "expected a 1-D int64 tensor",
    "raises": "broken on purpose",
}


def left_behind(model: torch.nn.Module) -> list[str]:
    """Hooks and instance attributes that a context forgot (transformers' own output capturing stays by itself)."""
    core, text = model.model, model.model.language_model
    hooks = [h for m in core.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    names = [name for owner in (core, text) for name in owner.__dict__ if name.startswith(("get_", "_vlm_pruner"))]
    return [repr(h) for h in hooks if "output_capturing" not in getattr(h, "__name__", "")] + names


@pytest.fixture(autouse=True)
def _nothing_stays(tiny_model):
    yield
    assert left_behind(tiny_model("llava")) == []


@pytest.mark.parametrize("method", [Broken, NoCheck])
@pytest.mark.parametrize("fault", FAULTS)
def test_sabotaged_methods_are_caught(tiny_model, method, fault):
    model = tiny_model("llava")
    expected = RuntimeError if fault == "raises" and method is NoCheck else PruningError
    with pytest.raises(expected, match=FAULTS[fault]), prune(model, method(pruning_rate="2/3", fault=fault)):
        generate(model, prompts("llava", ONE))


def test_a_method_that_answers_with_something_else_is_caught(tiny_model):
    class Wrong(StateNorm):
        def select(self, tokens, keep=None):
            return torch.arange(keep)

    with pytest.raises(PruningError, match="expected a Selection"), prune(tiny_model("llava"), Wrong(pruning_rate=0.5)):
        generate(tiny_model("llava"), prompts("llava", ONE))


@pytest.mark.parametrize("where", ["layer", "core", "norm", "features"])
def test_a_hook_that_is_removed_inside_the_context_is_noticed(tiny_model, where):
    model = tiny_model("llava")
    core, text = model.model, model.model.language_model

    def remove():
        if where == "features":
            del core.__dict__["get_image_features"]
        elif where == "norm":
            text.norm._forward_hooks.popitem()
        else:
            (text.layers[2] if where == "layer" else core)._forward_pre_hooks.popitem()

    with pytest.raises(PruningError, match=r"1 of .* hooks were removed"), prune(model, Stride(pruning_rate=0.5)):
        generate(model, prompts("llava", ONE), 1)
        remove()
        generate(model, prompts("llava", [[3]]), 1)


def test_a_cache_that_was_not_cut_is_noticed(tiny_model):
    """Another tool that pads layer 3 back behind our back: the measured length is not the asked one."""
    model = tiny_model("llava")
    layer = model.model.language_model.layers[3]

    def tamper(module, args, kwargs, output):
        cache = cache_argument(kwargs, "layer 3").layers[3]
        cache.keys, cache.values = (torch.cat([x, x[:, :, :1]], 2) for x in (cache.keys, cache.values))

    handle = layer.register_forward_hook(tamper, with_kwargs=True)
    try:
        with pytest.raises(PruningError, match="decoder layer 3 holds 17 tokens"), prune(model, Stride(pruning_rate="2/3")):
            generate(model, prompts("llava", ONE), 1)
    finally:
        handle.remove()


def test_an_exception_in_generate_goes_through_and_the_hooks_are_gone(tiny_model, monkeypatch):
    model = tiny_model("llava")

    def explode(*args, **kwargs):
        raise ZeroDivisionError("in the middle of generate")

    monkeypatch.setattr(model.model.language_model.layers[3].mlp, "forward", explode)
    with pytest.raises(ZeroDivisionError, match="in the middle"), prune(model, Stride(pruning_rate=0.5)):
        generate(model, prompts("llava", ONE))


def test_an_exception_that_is_swallowed_inside_the_context_is_not_forgotten(tiny_model, monkeypatch):
    model = tiny_model("llava")

    def explode(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(model.model.language_model.layers[3].mlp, "forward", explode)
    swallowed = contextlib.suppress(ZeroDivisionError)
    with pytest.raises(PruningError, match="never finished"), prune(model, Stride(pruning_rate=0.5)), swallowed:
        generate(model, prompts("llava", ONE))


def test_nested_use_is_refused_and_the_outer_context_lives_on(tiny_model):
    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    with prune(model, Stride(pruning_rate="2/3")) as ledger:
        with pytest.raises(PruningError, match="pruned already"), prune(model, Stride(pruning_rate=0.5)):
            pass
        generate(model, inputs, 1)
    assert ledger.records[0].n_kept == 5


def test_a_users_own_instance_patch_is_restored(tiny_model):
    model = build("llava")
    core, calls = model.model, []
    original = core.get_image_features

    @functools.wraps(original)  # generate() reads its signature
    def mine(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    core.get_image_features = mine
    with prune(model, Stride(pruning_rate=0.5)):
        generate(model, prompts("llava", ONE), 1)
    assert calls == [1]
    assert core.__dict__["get_image_features"] is mine
    generate(model, prompts("llava", ONE), 1)
    assert calls == [1, 1]


@pytest.mark.parametrize("layer", [N_LAYERS, 99])
def test_a_layer_out_of_range(tiny_model, layer):
    with (
        pytest.raises(ConfigError, match=f"layer: got {layer}, expected 0 to 4"),
        prune(tiny_model("llava"), Stride(pruning_rate=0.5, layer=layer)),
    ):
        pass


@pytest.mark.parametrize(("shares", "message"), [(((3, 0.5), (1, 0.2)), "ascending"), (((0, 0.5),), "come from the layer before")])
def test_stages_that_can_not_work(tiny_model, shares, message):
    class Custom(TwoStages):
        def stages(self, n_layers):
            return tuple(Stage(layer, share) for layer, share in shares)

    with pytest.raises(ConfigError, match=message):
        prune(tiny_model("llava"), Custom(pruning_rate=0.5))


def test_a_model_of_no_known_family():
    model = LlamaForCausalLM(LlamaConfig(**TEXT))
    with pytest.raises(ConfigError, match=r"model_type 'llama'.*known: .*llava"):
        prune(model, Stride(pruning_rate=0.5))


def test_a_pixtral_tower_is_refused(tiny_model, monkeypatch):
    model = tiny_model("llava")
    monkeypatch.setattr(model.config.vision_config, "model_type", "pixtral", raising=False)
    with pytest.raises(ConfigError, match="Pixtral"):
        prune(model, Stride(pruning_rate=0.5))


def test_sliding_window_layers_are_refused(tiny_model, monkeypatch):
    model = tiny_model("llava")
    monkeypatch.setattr(model.model.language_model.config, "layer_types", ["full_attention"] * 4 + ["sliding_attention"], raising=False)
    with pytest.raises(ConfigError, match="sliding-window"):
        prune(model, Stride(pruning_rate=0.5))


@pytest.mark.parametrize("pruner", ["vlmpruner", None, Stride])
def test_something_that_is_not_a_pruner(tiny_model, pruner):
    with pytest.raises(ConfigError, match="expected a Pruner"):
        prune(tiny_model("llava"), pruner)


def test_static_caches_are_refused(tiny_model):
    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    cache = StaticCache(config=model.model.language_model.config, max_cache_len=64)
    with pytest.raises(PruningError, match="cache"), prune(model, Stride(pruning_rate=0.5)), torch.no_grad():
        model(**inputs, **with_cache(model.forward, cache), use_cache=True)


def test_inputs_embeds_alone_are_refused(tiny_model):
    model, inputs = tiny_model("llava"), prompts("llava", [[9]])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(PruningError, match="inputs_embeds alone"), prune(model, Stride(pruning_rate=0.5)), torch.no_grad():
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


@pytest.mark.parametrize("n_tokens", [15, 20])
def test_image_tokens_that_do_not_match_the_features(tiny_model, n_tokens):
    inputs = prompts("llava", ONE)
    ids = torch.tensor([[5] + [IMAGE] * n_tokens + [6]])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with (
        pytest.raises((PruningError, ValueError), match="do not match"),
        prune(tiny_model("llava"), Stride(pruning_rate=0.5)),
        torch.no_grad(),
    ):
        tiny_model("llava")(**inputs)


def test_image_tokens_without_an_image(tiny_model):
    inputs = {k: v for k, v in prompts("llava", ONE).items() if k != "pixel_values"}
    with (
        pytest.raises(PruningError, match="16 image tokens, but the encoded images make 0"),
        prune(tiny_model("llava"), Stride(pruning_rate=0.5)),
    ):
        generate(tiny_model("llava"), prompts("llava", ONE), 1)  # its features must not be taken for the next prompt's
        generate(tiny_model("llava"), inputs, 1)


def test_a_new_image_in_a_later_turn_is_refused(tiny_model):
    model, inputs = tiny_model("llava"), prompts("llava", ONE)
    with pytest.raises(PruningError, match="later turn"), prune(model, Stride(pruning_rate=0.5)), torch.no_grad():
        cache = cache_of(model(**prompts("llava", [[9]]), use_cache=True))
        length = 9 + inputs["input_ids"].shape[1]
        model(**inputs | {"attention_mask": torch.ones(1, length, dtype=torch.long)}, **with_cache(model.forward, cache))


@pytest.mark.parametrize("name", ["vlmpruner", "random", "divprune"])
def test_nan_in_the_hidden_states_names_the_sample(tiny_model, name):
    model, inputs = build("llava"), prompts("llava", MIXED)
    inputs["pixel_values"][1] = float("nan")
    pruner = get_pruner(name, pruning_rate="2/3")
    with pytest.raises(PruningError, match=r"layer .*sample 'b/0'.*NaN"), prune(model, pruner, sample_ids=["a", "b", "c"]):
        generate(model, inputs)


def test_sample_ids_must_fit_the_batch(tiny_model):
    with (
        pytest.raises(PruningError, match="2 sample_ids for a batch of 3"),
        prune(tiny_model("llava"), Stride(pruning_rate=0.5), sample_ids=["a", "b"]),
    ):
        generate(tiny_model("llava"), prompts("llava", MIXED))
