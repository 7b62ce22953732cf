"""Models and caches as others hand them over: pruned rightly, or refused; never unpruned, never other tokens, never zeros."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from test_hook_exact import ONE
from thinning import only
from tiny_models import IMAGE, VIDEO, VISION_END, VISION_START, build, prompts
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from vlm_pruner_eval import PruningError, prune
from vlm_pruner_eval.errors import ConfigError
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
@pytest.mark.parametrize("part", only(COMPILED, ["a forward"]))
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


WRAPPERS = [nn.DataParallel, Held, lambda model: torch.compile(model, backend="eager"), lambda model: Held(Held(model))]


@pytest.mark.parametrize("wrap", WRAPPERS)
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
    model, inputs, kept = peft.get_peft_model(build(family), settings).eval(), prompts(family, ONE), []
    for target in (model, model.get_base_model()):
        with prune(target, fastv()) as ledger:
            model.generate(**inputs, max_new_tokens=2)
        kept.append(ledger.records[0].kept_positions)
    assert kept[0] == kept[1] != []


def test_a_wrapper_without_a_model_or_around_two_is_refused(tiny_model):
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    for wrapper in (nn.Linear(2, 2), nn.ModuleList([nn.Identity()]), "llava", traced):
        with pytest.raises(ConfigError, match=r"got \w+, expected a Hugging Face model or a wrapper with one inside it"):
            prune(wrapper, fastv())
    with pytest.raises(ConfigError, match=r"holds 2 \(LlavaForConditionalGeneration\)"):
        prune(nn.ModuleList([tiny_model("llava"), build("llava")]), fastv())


# ---- code that goes past the hooks
class Past(nn.Module):
    """A layer that is run without its hooks."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.__dict__["hidden"] = layer
        self.self_attn = layer.self_attn

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.hidden.forward(*args, **kwargs)


def _call_forwards(model: nn.Module) -> None:
    for layer in text_of(model).layers:
        past = {"__call__": lambda self, *args, **kwargs: self.forward(*args, **kwargs)}
        layer.__class__ = type(layer.__class__.__name__, (layer.__class__,), past)


CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "layer replaced": (lambda model: text_of(model).layers.__setitem__(2, Past(text_of(model).layers[2])), "hooks were removed"),
    "model replaced": (lambda model: setattr(model.model, "language_model", text_of(build("llava"))), "never ran|could follow"),
    "hooks bypassed": (_call_forwards, "never ran"),
    "layer added": (lambda model: text_of(model).layers.append(text_of(build("llava")).layers[0]), "1 of .* hooks were removed"),
    "layer removed": (lambda model: text_of(model).layers.__delitem__(4), "1 of .* hooks were removed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stage_that_never_ran_can_not_pass(change: str):
    model, inputs = build("llava"), prompts("llava", ONE)
    apply, said = CHANGES[change]
    with pytest.raises(PruningError, match=said), prune(model, fastv()):
        apply(model)
        answer(model, inputs)


def test_a_rotary_function_that_writes_to_its_input_changes_nothing(tiny_model, monkeypatch, right):
    own = modeling_llama.apply_rotary_pos_emb

    def in_place(q: Tensor, k: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        turned = own(q, k, *args, **kwargs)
        return q.copy_(turned[0]), k.copy_(turned[1])

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", in_place)
    with prune(tiny_model("llava"), fastv()), torch.no_grad():
        assert answer(tiny_model("llava"), prompts("llava", ONE)) == right[0]


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


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps, lambda model: copy.deepcopy(model.model.language_model)])
def test_a_copy_made_inside_the_context_is_refused(tiny_model, copied: Callable):
    model = tiny_model("llava")
    with prune(model, fastv()), pytest.raises(PruningError, match="Copy the model before the context or after it"):
        copied(model)


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
