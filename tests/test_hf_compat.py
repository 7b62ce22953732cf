"""What the hook does with a host that names its arguments in another way, and that versions are recognised by their features."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from test_hook_exact import ONE
from tiny_models import build, generate, prompts
from toy_pruners import KeyNorm, Stride
from transformers import DynamicCache, StaticCache
from transformers.models.llama import modeling_llama

import vlm_pruner_eval
from vlm_pruner_eval import ConfigError, PruningError, hf_compat, prune, versions

PACKAGE = Path(vlm_pruner_eval.__file__).parent


def renamed(model: torch.nn.Module, old: str, new: str) -> torch.nn.Module:
    """Let decoder layers take an argument under another name, as a release of transformers could; the hook sees that name."""
    text = model.model.language_model

    for layer in text.layers:
        inner = layer.forward

        def forward(*args, inner=inner, **kwargs):
            return inner(*args, **{old if name == new else name: value for name, value in kwargs.items()})

        layer.forward = forward
        call = type(layer).__call__

        def outer(self, *args, call=call, **kwargs):
            return call(self, *args, **{new if name == old else name: value for name, value in kwargs.items()})

        layer.__class__ = type(type(layer).__name__, (type(layer),), {"__call__": outer})
    return model


CACHE = next(iter(hf_compat.with_cache(modeling_llama.LlamaDecoderLayer.forward, None)))  # its name in this transformers


@pytest.mark.parametrize(
    ("old", "said"),
    [
        (CACHE, "decoder layer 2: .* the cache as 'renamed'"),
        ("no cache", "without a cache"),
        # a mask of the whole prompt would meet a shortened sequence, or no mask at all would be set
        ("position_embeddings", "without position_embeddings"),
        ("attention_mask", "without attention_mask"),
    ],
)
def test_arguments_under_unknown_names_are_refused_with_the_tested_versions(old: str, said: str) -> None:
    model = renamed(build("llava"), CACHE if old == "no cache" else old, "renamed")
    with pytest.raises(PruningError, match=said) as error, prune(model, KeyNorm(pruning_rate="2/3")), torch.no_grad():
        model(**prompts("llava", ONE), use_cache=old != "no cache")
    assert versions.tested_range("transformers") in str(error.value)


@pytest.mark.parametrize("new", hf_compat.CACHE_NAMES)
def test_every_known_name_of_the_cache_gives_the_same_answer(new: str) -> None:
    inputs = prompts("llava", ONE)
    answers = []
    for model in (build("llava"), renamed(build("llava"), CACHE, new)):
        with prune(model, KeyNorm(pruning_rate="2/3")) as ledger:
            answers.append(generate(model, inputs, 4).sequences)
        assert ledger.records[0].n_kept == 5
    assert torch.equal(*answers)


def test_static_caches_are_refused_however_they_come() -> None:
    model, inputs = build("llava"), prompts("llava", ONE)  # its own: transformers 4.57 keeps a refused cache on the model
    cache = StaticCache(config=model.model.language_model.config, max_cache_len=64)
    assert [hf_compat.is_static(one) for one in (cache, DynamicCache(), None)] == [True, False, False]
    for options in ({"cache_implementation": "static"}, hf_compat.with_cache(model.forward, cache)):
        with pytest.raises(PruningError, match=r"(dynamic|default) cache"), prune(model, Stride(pruning_rate=0.5)):
            model.generate(**inputs, **options, max_new_tokens=2, do_sample=False)


def test_a_model_that_is_put_together_otherwise_is_a_sentence() -> None:
    model = build("llava")
    model.model.language_model.blocks = model.model.language_model.layers
    del model.model.language_model.layers
    with pytest.raises(ConfigError, match="has no layers, expected"):
        prune(model, Stride(pruning_rate=0.5))


def test_repeated_images_are_told_from_equal_prompts() -> None:
    a, b, c, d = (torch.full((2, 2), float(value)) for value in range(4))
    twice, others = torch.tensor([[1, 2], [1, 2]]), torch.tensor([[1, 2], [1, 3]])
    assert hf_compat.repeated_singly(torch.stack([a, a, b, b]), [2, 2], twice)  # two beams of a prompt with the images a, b
    assert not hf_compat.repeated_singly(torch.stack([a, b, a, b]), [2, 2], twice)  # repeated rightly
    assert not hf_compat.repeated_singly(torch.stack([a, b, c, d]), [2, 2], twice)  # two prompts with one question
    assert not hf_compat.repeated_singly(torch.stack([a, a, a, a]), [2, 2], twice)  # the order is no matter
    assert not hf_compat.repeated_singly(torch.stack([a, a, b, b]), [2, 2], others)
    assert not hf_compat.repeated_singly(torch.stack([a, a]), [1, 1], twice)


def test_no_other_file_asks_for_the_version_of_transformers() -> None:
    """Features decide, in one file; versions are only shown."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "__version__" and getattr(node.value, "id", "") == "transformers":
                found.append(file.relative_to(PACKAGE).as_posix())
            if isinstance(node, ast.Constant) and node.value in hf_compat.CACHE_NAMES[1:]:
                found.append(file.relative_to(PACKAGE).as_posix())
    assert set(found) <= {"hf_compat.py", "embedded/measure.py", "speed/measuring.py"}, found
