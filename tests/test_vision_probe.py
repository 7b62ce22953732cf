"""Methods see in the vision tower what the model itself computes there, token by token, on every family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tiny_models import FAMILIES, generate, prompts
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_pruner_eval import ConfigError, Pruner, PruningError, VisionTokens, VisualTokens, get_pruner, hf_compat, prune
from vlm_pruner_eval.prefix import SharedPrefix, first_cut, repeated
from vlm_pruner_eval.vlms import family_of
from vlm_pruner_eval.vlms.parts.towers import SequenceTower

ROWS = [[4, "i0", 7], [3, "i1", 2, "i2", 12]]
FIELDS = ("vision.states", "vision.cls_attention", "vision.received_attention", "vision.keys")
WITH_CLS = ("llava", "llava_next", "internvl")


@dataclass(frozen=True, kw_only=True)
class Looker(Pruner):
    """Keeps the first tokens, and what it was shown in `seen`."""

    name: ClassVar[str] = "looker"
    needs: ClassVar[frozenset[str]] = frozenset(FIELDS)
    fixed_layer: ClassVar[int | None] = 0
    seen: ClassVar[list[VisualTokens]] = []
    layer: int = 0

    def tower_layers(self) -> tuple[int, ...]:
        return (-2, 0)

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        self.seen.append(tokens)
        return torch.arange(keep)


@dataclass(frozen=True, kw_only=True)
class ClsLooker(Looker):
    """The same, with the CLS token's query."""

    name: ClassVar[str] = "clslooker"
    needs: ClassVar[frozenset[str]] = frozenset({*FIELDS, "vision.cls_query"})


def looked(model: Any, inputs: dict[str, Tensor], pruner: Pruner) -> list[VisualTokens]:
    pruner.seen.clear()
    with prune(model, pruner):
        generate(model, inputs, 1)
    return [*pruner.seen]


def attentions(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Softmax attention of each layer of a CLIP-like tower, as eager code returns it."""
    core, _ = hf_compat.decoder(model)
    pixels = inputs["pixel_values"]
    if pixels.dim() == 5:
        shape_of = __import__("sys").modules[type(core).__module__].image_size_to_num_patches
        sizes = [
            shape_of(image_size=size, grid_pinpoints=core.config.image_grid_pinpoints, patch_size=core.config.vision_config.image_size)
            for size in inputs["image_sizes"]
        ]
        pixels = torch.cat([found[:n] for found, n in zip(pixels, sizes, strict=True)])
    if core.config.model_type != "internvl":
        return core.vision_tower(pixels, output_attentions=True).attentions
    handles = []  # its tower takes no such argument in some versions, but returns them layer by layer
    for block in hf_compat.tower_blocks(core):
        attention = getattr(block, "self_attn", None) or block.attention
        handles.append(attention.register_forward_hook(lambda module, args, output: seen.append(output[1])))
    seen: list[Tensor] = []
    core.vision_tower(pixels)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", WITH_CLS)
def test_attention_is_that_of_eager_code(tiny_model, family):
    model = tiny_model(family, "eager")
    inputs = prompts(family, ROWS)
    found = looked(model, inputs, Looker(pruning_rate="1/2"))
    core, _ = hf_compat.decoder(model)
    tower = family_of(model).tower(core)
    for layer in (-2, 0):
        slow = attentions(model, inputs)[tower.number(layer)]
        first = found[0].vision
        n = int(first.cls_attention[layer].shape[1] if family != "llava_next" else tower.side**2)  # of NeXT, the base view
        cls = slow[0, :, 0, 1:]
        received = slow[0].mean((0, 1))[1:]
        if family == "internvl":
            cls, received = (pooled(values, tower.side, n) for values in (cls, received[None]))
            received = received[0]
        torch.testing.assert_close(first.cls_attention[layer][:, :n], cls)
        torch.testing.assert_close(first.received_attention[layer][:n], received)


def pooled(values: Tensor, side: int, n: int) -> Tensor:
    return adaptive_avg_pool2d(values.view(1, -1, side, side), int(n**0.5)).flatten(2)[0]


def test_tiles_are_aligned_with_the_packed_tokens(tiny_model):
    """Projecting the aligned states gives the very tokens that the language model reads."""
    for family in ("llava", "llava_next"):
        found = looked(tiny_model(family, "sdpa"), prompts(family, ROWS), Looker(pruning_rate="1/2"))
        for tokens in found:
            is_cell = tokens.coords[:, 1] >= 0
            assert bool(is_cell.any())
            projected = tokens.vision.project(tokens.vision.states)
            torch.testing.assert_close(projected[is_cell], tokens.hidden_states[is_cell])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_patches_of_qwen_are_put_back_from_window_order(tiny_model, family):
    """Tokens that the merger makes, in the order of the tower, are the model's own features once they are aligned."""
    model = tiny_model(family, "sdpa")
    core, _ = hf_compat.decoder(model)
    inputs = prompts(family, ROWS)
    merged: list[Tensor] = []
    handle = core.visual.merger.register_forward_hook(lambda module, args, output: merged.append(output))
    tokens = looked(model, inputs, Looker(pruning_rate="1/2"))
    handle.remove()
    tower = family_of(model).tower(core)
    assert isinstance(tower, SequenceTower)
    layouts = family_of(model).layouts(core, "image", {"image_grid_thw": inputs["image_grid_thw"]})
    per_patch = merged[0].repeat_interleave(tower.merge**2, 0)
    for found, given in zip(tower._aligned(per_patch, layouts), tokens, strict=True):
        torch.testing.assert_close(found, given.hidden_states)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_shows_fields_of_the_right_shapes(tiny_model, family):
    rows = [[4, "i0", 7], [3, "v1", 12]] if FAMILIES[family].videos else ROWS
    for tokens in looked(tiny_model(family, "sdpa"), prompts(family, rows), Looker(pruning_rate="1/2")):
        vision, n = tokens.vision, tokens.n_visual
        assert isinstance(vision, VisionTokens)
        assert len(vision.states) == n
        for layer in (-2, 0):
            assert vision.cls_attention[layer].shape[1] == len(vision.received_attention[layer]) == len(vision.keys[layer]) == n
            received = vision.received_attention[layer]
            assert bool((received >= 0).all())
            assert float(received.max()) < 1
            assert len(received.unique()) > 1, "attention that is the same everywhere is no attention"
        if tokens.vision.cls_state is None:
            torch.testing.assert_close(vision.project(vision.states), tokens.hidden_states)


def test_the_query_of_the_cls_token_gives_its_attention(tiny_model):
    tokens = looked(tiny_model("llava", "sdpa"), prompts("llava", ROWS), ClsLooker(pruning_rate="1/2"))[0].vision
    keys = torch.cat([tokens.cls_key[-2][None], tokens.keys[-2]])
    scores = torch.einsum("hd,nhd->hn", tokens.cls_query[-2], keys) * keys.shape[-1] ** -0.5
    torch.testing.assert_close(scores.softmax(-1)[:, 1:], tokens.cls_attention[-2])


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl"])
def test_a_tower_without_a_cls_token_has_no_query_of_it(tiny_model, family):
    with pytest.raises(ConfigError, match="CLS token"), prune(tiny_model(family, "sdpa"), ClsLooker(pruning_rate="1/2")):
        pass


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "llava_video"])
def test_a_shared_prefix_shows_the_tower_to_every_method(tiny_model, family):
    model, inputs = tiny_model(family, "sdpa"), prompts(family, ROWS)
    pruner, plain = Looker(pruning_rate="1/2"), Looker(pruning_rate="1/3")
    alone = looked(model, inputs, pruner)
    depth = first_cut(pruner, 4)
    with SharedPrefix(model, [depth, depth, depth], [pruner, plain]) as prefix:
        with prefix.reading(depth), prune(model, plain):
            generate(model, inputs, 1)
        with prefix.reading(depth):
            again = looked(model, inputs, pruner)
        pruner.seen.clear()
        with prefix.reading(depth, repeats=2), prune(model, [pruner, plain]):
            generate(model, repeated(inputs, 2), 1)
    for found in (again, pruner.seen[: len(alone)]):
        for one, other in zip(alone, found, strict=True):
            for name in ("cls_attention", "received_attention", "keys"):
                assert torch.equal(getattr(one.vision, name)[-2], getattr(other.vision, name)[-2])
            assert torch.equal(one.vision.states, other.vision.states)


class Softmaxes(TorchDispatchMode):
    """Shapes of all softmax results."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **kwargs or {})
        if "softmax" in str(func):
            self.shapes.append(tuple(found.shape))
        return found


@pytest.mark.parametrize(("name", "whole"), [("fastervlm", 0), ("visionzip", 0), ("scope", 0), ("prumerge", 0), ("hiprune", 2)])
def test_attention_of_all_queries_is_made_only_where_all_count(tiny_model, name, whole):
    """Of a view with 16 patches and a CLS token; the model's own attention is fused, so that a matrix of all queries would be ours."""
    model, inputs = tiny_model("llava", "sdpa"), prompts("llava", [[4, "i0", 7]])
    with Softmaxes() as seen, prune(model, get_pruner(name, pruning_rate="2/3")):
        generate(model, inputs, 1)
    n = family_of(model).tower(hf_compat.decoder(model)[0]).side ** 2 + 1
    assert len([shape for shape in seen.shapes if shape[-2:] == (n, n)]) == whole


def test_a_method_that_the_prefix_was_not_told_of_is_a_sentence(tiny_model):
    """And one that makes other features of the images, whose own would be given to the others."""
    model, inputs = tiny_model("llava", "sdpa"), prompts("llava", ROWS)
    plain, looker = get_pruner("divprune", pruning_rate="1/2"), Looker(pruning_rate="1/2")
    with SharedPrefix(model, [0, 0]) as prefix:
        with prefix.reading(0), prune(model, plain):
            generate(model, inputs, 1)
        with pytest.raises(PruningError, match="among the `pruners` of SharedPrefix"), prefix.reading(0), prune(model, looker):
            generate(model, inputs, 1)
    inside = get_pruner("mustdrop", pruning_rate="2/3")
    with (
        SharedPrefix(model, [0, 0], [inside]) as prefix,
        pytest.raises(PruningError, match="merges patches inside the vision tower"),
        prefix.reading(0),
        prune(model, inside),
    ):
        generate(model, inputs, 1)
