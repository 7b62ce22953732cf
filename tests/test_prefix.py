"""A shared prefix: forwards that take another one's image features and first layers answer bit by bit as forwards of their own."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import tiny_models
import torch
import transformers
from test_hook_batches import SEVERAL_UNDER_BEAMS
from tiny_models import FAMILIES, N_LAYERS, generate, prompts, step_logits
from toy_pruners import Broken, KeyNorm, TwoStages, made

from vlm_pruner_eval import Pruner, PruningError, get_pruner, prune
from vlm_pruner_eval.prefix import SharedPrefix, first_cut

OF_TOWER = [made("visionzip", "2/3"), made("cdpruner", "8/9")]  # and of the question
NEW = [*OF_TOWER, *(made(name, rate) for name, rate in (("sparsevlm", "2/3"), ("sparsevlm", "8/9"), ("vscan", "1/3"), ("vscan", "8/9")))]
METHODS = ("vlmpruner", "fastv", "dart", "divprune", "random", "uniform", "pool")
PRUNERS: list[Pruner] = [
    get_pruner("none", pruning_rate=0),
    *(get_pruner(name, pruning_rate=rate) for name, rate in itertools.product(METHODS, ("1/3", "8/9"))),
    get_pruner("blind", pruning_rate=0),
    get_pruner("vlmpruner", pruning_rate="2/3", official_quirks=True),
    get_pruner("uniform", pruning_rate=0),
    TwoStages(pruning_rate="1/2"),
    *NEW,
    *(KeyNorm(pruning_rate="2/3", layer=layer, merge=True) for layer in (1, 3, N_LAYERS - 1)),
]
MIXED = [[5, "i0", 7], [3, "i1", 4, "i0", 9], [12]]  # left padding, several images, none
AT_TWO = [get_pruner(name, pruning_rate="2/3") for name in ("fastv", "uniform", "dart")]
SOME = [pruner for i, pruner in enumerate(PRUNERS) if i % 5 == 0 or isinstance(pruner, (TwoStages, KeyNorm))]  # one for each layer of a cut


def depth(pruner: Pruner) -> int:
    return first_cut(pruner, N_LAYERS)


def samples(family: str) -> list:
    return [*MIXED, [4, "v0", 6], [2, "v0", 3, "i0", 5]] if FAMILIES[family].videos else MIXED


def read(model, inputs, pruner: Pruner, **kwargs: object) -> tuple:
    """(ids, logits, records without times) of one method."""
    with prune(model, pruner) as ledger:
        output = generate(model, inputs, 4, **kwargs)
    records = [record.as_json() for record in ledger.records]
    for record in records:
        assert record.pop("selection_ms") >= 0
    return output.sequences, step_logits(output), records


def read_shared(model, inputs, pruners: Sequence[Pruner], **kwargs: object) -> list[tuple]:
    """The same of all methods over one prefix, in their own order."""
    found = {}
    with SharedPrefix(model, [depth(pruner) for pruner in pruners], pruners) as prefix:
        for i in sorted(range(len(pruners)), key=lambda i: -depth(pruners[i])):
            with prefix.reading(depth(pruners[i])):
                found[i] = read(model, inputs, pruners[i], **kwargs)
    return [found[i] for i in range(len(pruners))]


def assert_equal(found: Sequence[tuple], expected: Sequence[tuple]) -> None:
    for (ids, logits, records), (own_ids, own_logits, own_records) in zip(found, expected, strict=True):
        assert torch.equal(ids, own_ids)
        assert torch.equal(logits, own_logits)
        assert records == own_records


@contextmanager
def count_prefills(model) -> Iterator[Counter]:
    """How often the MLP of every decoder layer ran over more than one token, and how often each vision tower ran ("vision")."""
    counts: Counter = Counter()
    vision = getattr(model.model, "vision_tower", None) or model.model.visual
    handles = [vision.register_forward_hook(lambda *_: counts.update(["vision"]))]
    for i, layer in enumerate(model.model.language_model.layers):
        handles.append(layer.mlp.register_forward_hook(lambda m, args, out, i=i: counts.update([i] * (args[0].shape[1] > 1))))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


WAYS = [
    *((family, "sdpa", torch.float32, 1) for family in sorted(FAMILIES)),
    ("llava_next", "eager", torch.float32, 1),
    ("llava_onevision", "sdpa", torch.bfloat16, 1),
    *((family, "sdpa", torch.float32, 2) for family in ("llava", "internvl", "qwen2_vl")),
]


def pruners_of(way: tuple, *, is_all: bool) -> list[Pruner]:
    """Every sixth method, so that six ways after each other meet all; or all."""
    if is_all:
        return PRUNERS
    turn = WAYS.index(way) % 6
    return [pruner for i, pruner in enumerate(PRUNERS) if i % 6 == turn or isinstance(pruner, TwoStages)]


@pytest.mark.parametrize(
    ("way", "is_all"), [*((way, False) for way in WAYS), *(pytest.param(way, True, marks=pytest.mark.slow) for way in WAYS)], ids=str
)
def test_every_method_answers_as_by_itself(tiny_model, way: tuple[str, str, torch.dtype, int], is_all: bool) -> None:
    family, attention, dtype, beams = way
    model, rows = tiny_model(family, attention, dtype), samples(family)
    if beams > 1:
        second = "i1" if SEVERAL_UNDER_BEAMS or family != "internvl" else "i0"  # of InternVL, i1 has two tiles
        rows = [[5, "i0", 7], [9, second, 3]]
    inputs, pruners = prompts(family, rows, dtype), pruners_of(way, is_all=is_all)
    expected = [read(model, inputs, pruner, num_beams=beams) for pruner in pruners]
    assert len({str(ids.tolist()) for ids, *_ in expected}) > 2, "methods that all answer the same would prove nothing"
    assert_equal(read_shared(model, inputs, pruners, num_beams=beams), expected)


def test_what_is_shared_is_computed_once(tiny_model, family: str) -> None:
    model, inputs, pruners = tiny_model(family), prompts(family, samples(family)), SOME
    cuts = Counter(depth(pruner) for pruner in pruners)
    n_towers = 2 if FAMILIES[family].videos else 1
    with count_prefills(model) as counts:
        read_shared(model, inputs, pruners)
    assert counts["vision"] == n_towers
    assert counts[0] == 1 + cuts[0]
    assert [counts[k] - counts[k - 1] for k in (1, 2, 3)] == [cuts[k] for k in (1, 2, 3)]
    with count_prefills(model) as counts:
        read_shared(model, inputs, AT_TWO)
    assert counts == {"vision": n_towers, 0: 1, 1: 1, 2: 3, 3: 3, 4: 3}


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_a_method_that_fails_leaves_the_prefix_to_the_others(tiny_model, family: str) -> None:
    model, inputs = tiny_model(family), prompts(family, MIXED)
    expected = [read(model, inputs, pruner) for pruner in AT_TWO]
    with SharedPrefix(model, [2, 2, 2, 2]) as prefix:
        with pytest.raises(PruningError, match="broken on purpose"), prefix.reading(2):
            read(model, inputs, Broken(pruning_rate="1/2"))
        with count_prefills(model) as counts:
            for pruner, own in zip(AT_TWO, expected, strict=True):
                with prefix.reading(2):
                    assert_equal([read(model, inputs, pruner)], [own])
    assert (counts["vision"], counts[0], counts[2]) == (0, 0, 3), "what the failed method had computed is used"


def test_another_batch_in_the_same_context_is_refused(tiny_model) -> None:
    family, model = "llava", tiny_model("llava")
    with SharedPrefix(model, [2, 2, 2]) as prefix:
        with prefix.reading(2):
            read(model, prompts(family, MIXED), AT_TWO[0])
        for other in ([MIXED[0]], [[5, "i1", 7], *MIXED[1:]], [MIXED[1], MIXED[0], MIXED[2]]):
            with pytest.raises(PruningError, match="not those whose prefix is kept"), prefix.reading(2):
                read(model, prompts(family, other), AT_TWO[1])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_nothing_stays_on_the_model(tiny_model, family: str) -> None:
    model, inputs = tiny_model(family), prompts(family, MIXED)
    plain = step_logits(generate(model, inputs, 3))
    before = [dict(module.__dict__) for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    read_shared(model, inputs, AT_TWO)
    with pytest.raises(RuntimeError, match="half way"), SharedPrefix(model, [2, 2]) as prefix, prefix.reading(2):
        read(model, inputs, AT_TWO[0])
        raise RuntimeError("half way")
    assert [module.__dict__.keys() for module in model.modules()] == [found.keys() for found in before]
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(step_logits(generate(model, inputs, 3)), plain)


def test_the_kept_tensors_are_let_go(tiny_model, family: str) -> None:
    model, inputs, held = tiny_model(family), prompts(family, samples(family)), []
    with SharedPrefix(model, [2, 2]) as prefix:
        with prefix.reading(2):
            read(model, inputs, AT_TWO[0])
        kept = prefix._kept[2]
        held += [weakref.ref(tensor) for tensor in (kept.states, kept.seen[0], *kept.cached[0], prefix._entered[0])]
        features = prefix._features[0][2]
        while not isinstance(features, torch.Tensor):
            features = features.pooler_output if hasattr(features, "pooler_output") else features[0]
        held.append(weakref.ref(features))
        del kept, features
        assert all(ref() is not None for ref in held)
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def test_without_a_cache_it_says_so(tiny_model) -> None:
    model, inputs = tiny_model("llava"), prompts("llava", MIXED)
    sentence = r"expected generate\(\) with use_cache=True"
    with SharedPrefix(model, [2, 2]) as prefix, pytest.raises(PruningError, match=sentence), prefix.reading(2), prune(model, AT_TWO[0]):
        generate(model, inputs, 2, use_cache=False)


def test_layers_with_sliding_windows_are_computed_anew() -> None:
    config = FAMILIES["llava_onevision"].config()
    kinds = ["full_attention", "sliding_attention", *["full_attention"] * (N_LAYERS - 2)]
    for name, value in {"use_sliding_window": True, "sliding_window": 8, "layer_types": kinds}.items():
        setattr(config.text_config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlavaOnevisionForConditionalGeneration(config).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=tiny_models.PAD, eos_token_id=None, bos_token_id=1)
    inputs = prompts("llava_onevision", MIXED)
    expected = [read(model, inputs, pruner) for pruner in AT_TWO]
    with count_prefills(model) as counts:
        found = read_shared(model, inputs, AT_TWO)
    assert_equal(found, expected)
    assert (counts["vision"], counts[0], counts[1]) == (1, 1, 3)
