"""How often the host waits for the device: once a batch of choices, and once more a prefill; and that no check is lost over it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from every_field import afresh, mapped, tensors
from standin_device import DEVICE, CountSyncs, OnDevice, held
from tiny_models import N_LAYERS, build, prompts
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from toy_pruners import IN_MODEL, KeyNorm, NoCheck, TwoStages, made

from vlm_pruner_eval import Pruner, PruningError, Selection, VisualTokens, get_pruner, kernels, prune
from vlm_pruner_eval.device_copy import to_host
from vlm_pruner_eval.pruners.fastv import FastV
from vlm_pruner_eval.pruners.fields import PARTS, replaced
from vlm_pruner_eval.speed.bench_selection import image_tokens

CPU = torch.device("cpu")
N_VISUAL = 120


def tokens(dtype: torch.dtype = torch.float32) -> VisualTokens:
    """Tokens of an image with all that a method may ask for."""
    return mapped(_made(N_VISUAL), lambda value: value.to(dtype) if value.is_floating_point() else value)


_made = functools.cache(functools.partial(image_tokens, width=300, device=CPU))  # for all tests: `mapped` makes others of them


def on_device(given: VisualTokens) -> VisualTokens:
    return mapped(given, OnDevice)


def counted(call: Callable[[], object]) -> tuple[object, CountSyncs]:
    with torch.no_grad(), CountSyncs() as found:
        answer = call()
    return answer, found


def waits(found: CountSyncs) -> int:
    return sum(found.syncs.values())


BATCHES = [*((name, False) for name in (*IN_MODEL, "keynorm")), *((name, True) for name in ("vlmpruner", "divprune", "cdpruner", "scope"))]
# Waits of a choice whose rule has to look at numbers before it can go on: how many outliers, which text rates, which crops there are.
MORE_WAITS = {"prumerge": 2, "prumerge_plus": 2, "sparsevlm": 2, "holov": 2}
# Waits of a prefill beyond one for each stage: of those above, of transformers' masks for rows of different lengths (2 or 4), and of
# windows that are merged in the tower (2 for each image).
BEYOND_STAGES = {"prumerge": 3, "prumerge_plus": 3, "sparsevlm": 1, "holov": 1, "mustdrop": 8}


def allowed(method: str) -> range:
    """How often a choice may wait, for whatever number of images; once at least, since its answer comes to the host."""
    return range(2, 3) if method == "keynorm" else range(1, 1 + MORE_WAITS.get(method, 1))


# ---- one wait for each choice
@pytest.mark.parametrize(("quirks", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize("method", IN_MODEL)
def test_select_waits_once(method: str, quirks: bool, dtype: torch.dtype):
    pruner, here = made(method, official_quirks=quirks), tokens(dtype)
    for keep in (0, 13, 40, N_VISUAL):
        got, found = counted(lambda keep=keep: pruner.select(on_device(here), keep))
        assert waits(found) in allowed(method), found.syncs
        expected = pruner.select(afresh(here), keep)
        assert got.order.device == DEVICE and torch.equal(held(got.order), expected.order)
        assert got.host_order.device == CPU and torch.equal(got.host_order, expected.order)
        assert got.quirks == expected.quirks and (got.hidden_states is None) == (expected.hidden_states is None)
        if expected.hidden_states is not None:
            assert got.hidden_states.device == DEVICE and torch.equal(held(got.hidden_states), expected.hidden_states)


def by_stand_in(function: Callable) -> Callable:
    """Run a kernel's launcher on the CPU, where tests have Triton interpret kernels, for tensors of the stand-in."""

    def run(*args: object, **kwargs: object) -> object:
        return tree_map(OnDevice, function(*map(held, args), **kwargs))

    return run


@pytest.mark.parametrize(("method", "by_kernels"), BATCHES)
def test_a_batch_waits_once(method: str, by_kernels: bool, monkeypatch: pytest.MonkeyPatch):
    """Images of different sizes; a method from outside has its tokens checked before."""
    if by_kernels:
        pytest.importorskip("triton", reason="kernels need Triton")
        if torch.cuda.is_available():
            pytest.skip("tensors are on the CPU, where Triton has to interpret kernels")
        from vlm_pruner_eval.kernels import bss_kernel, coverage_kernel, determinant_kernel, max_min_kernel

        monkeypatch.setattr(kernels, "usable", lambda device, n_visual=1: device == DEVICE)
        monkeypatch.setattr(bss_kernel, "grow", by_stand_in(bss_kernel.grow))
        monkeypatch.setattr(max_min_kernel, "max_min", by_stand_in(max_min_kernel.max_min))
        monkeypatch.setattr(coverage_kernel, "coverage", by_stand_in(coverage_kernel.coverage))
        monkeypatch.setattr(determinant_kernel, "largest_determinant", by_stand_in(determinant_kernel.largest_determinant))
    pruner = KeyNorm(pruning_rate=0.5) if method == "keynorm" else made(method)
    here, keeps = [tokens(), *(mapped(_made(n), Tensor.clone) for n in (36, 1))], [13, 0, 1]
    found, seen = counted(lambda: pruner.select_batch([*map(on_device, here)], keeps))
    assert waits(seen) in allowed(method), seen.syncs
    for got, expected in zip(found, [pruner.select(*one) for one in zip(here, keeps, strict=True)], strict=True):
        assert got.order.device == DEVICE and torch.equal(got.host_order, expected.order) and got.quirks == expected.quirks
        if expected.hidden_states is not None:
            torch.testing.assert_close(held(got.hidden_states), expected.hidden_states)


def test_a_method_from_outside_has_its_tokens_checked_before_its_choice():
    pruner = KeyNorm(pruning_rate=0.5, merge=True)
    got, found = counted(lambda: pruner.select(on_device(tokens()), 13))
    assert waits(found) == 2, found.syncs
    assert torch.equal(got.host_order, pruner.select(tokens(), 13).order)


def test_what_is_said_of_a_choice_is_not_said_of_another_one():
    class Mine(FastV):
        def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
            return super().choose(tokens, keep)

    class Renamed(FastV):
        name: ClassVar[str] = "renamed"

    assert FastV.checks_late and Renamed.checks_late and not Mine.checks_late and not Pruner.checks_late


def test_the_work_on_the_device_does_not_grow_with_the_tokens():
    """VLM-Pruner's growth makes a pass for every few tokens: if one of its steps were on the device, launches would grow as they do."""
    launches = []
    for n_visual in (144, 1440):
        given = on_device(image_tokens(n_visual, 512, CPU))
        found = counted(lambda given=given: get_pruner("vlmpruner", pruning_rate=0.889).select(given))[1]
        launches.append(sum(found.launches.values()))
    assert 0 < launches[1] < 1.2 * launches[0], launches


# ---- the same refusals as on a CPU
def refusal(pruner: Pruner, given: VisualTokens, keep: int = 13) -> str:
    """What is said of the tokens on the device, and of the same ones here."""
    sentences = []
    for where in (given, on_device(given)):
        with pytest.raises(PruningError) as error, torch.no_grad(), CountSyncs():
            pruner.select(where, keep)
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1]
    return sentences[0]


@pytest.mark.parametrize("method", [*IN_MODEL, "keynorm"])
def test_bad_tokens_are_refused_in_the_same_words(method: str):
    pruner = KeyNorm(pruning_rate=0.5) if method == "keynorm" else made(method)
    given = tokens()
    needs = pruner.needs_now(0, {}) - {"positions", "text", "text_attention"}
    paths = {"hidden_states", *(f"{need.partition('.')[0]}.{PARTS[need][0]}" if need in PARTS else need for need in needs)}
    every = {
        name: tensor for name, tensor in tensors(given).items() if name.partition("[")[0] in paths and name.rpartition("_")[2] != "query"
    }
    assert every
    for name, tensor in every.items():
        poisoned, is_by_token = tensor.clone(), len(tensor) == N_VISUAL  # or heads first
        poisoned[7] = float("nan")
        poisoned[8] = float("-inf")
        said = refusal(pruner, replaced(given, every | {name: poisoned}))
        where = f" in 2 of {N_VISUAL} tokens (first: token 7)" if is_by_token else ""
        assert f"{name} holds NaN or infinity{where}" in said


def test_bad_text_is_refused_too():
    given = tokens()
    keys = given.text.keys.clone()
    keys[3] = float("nan")
    given = dataclasses.replace(given, text=dataclasses.replace(given.text, keys=keys))
    assert "text.keys holds NaN" in refusal(get_pruner("dart", pruning_rate=0.5), given)


def answering(answer: Callable[[VisualTokens], object], *, late: bool) -> Pruner:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Answering(Pruner):
        name: ClassVar[str] = "answering"
        checks_late: ClassVar[bool] = late

        def choose(self, tokens: VisualTokens, keep: int) -> object:
            return answer(tokens)

    return Answering(pruning_rate=0.5)


def picked(tokens: VisualTokens, *indices: int) -> Tensor:
    return torch.tensor(indices).to(tokens.hidden_states.device, non_blocking=True)


ANSWERS = {
    "3 indices of which 2 are distinct": lambda tokens: picked(tokens, 5, 5, 1),
    "chose indices 1 to 4294967296, expected 0 to 119": lambda tokens: picked(tokens, 5, 2**32, 1),
    "states of shape (120, 300)": lambda tokens: Selection(picked(tokens, 5, 2, 1), tokens.hidden_states),
    "merged states hold NaN or infinity": lambda tokens: Selection(picked(tokens, 5, 2, 1), tokens.hidden_states[:3] / 0),
    "choose raised ZeroDivisionError": lambda tokens: 1 / 0,
}


@pytest.mark.parametrize("said", ANSWERS)
def test_wrong_answers_are_refused_in_the_same_words(said: str):
    """And where the tokens are bad, they are what is blamed."""
    states = tokens().hidden_states.clone()
    states[7] = float("nan")
    bad = dataclasses.replace(tokens(), hidden_states=states)
    for late in (False, True):
        assert said in refusal(answering(ANSWERS[said], late=late), tokens(), 3)
        assert f"hidden_states holds NaN or infinity in 1 of {N_VISUAL}" in refusal(answering(ANSWERS[said], late=late), bad, 3)


# ---- merged states: proven finite where they can be, looked at where not
@pytest.mark.parametrize("scale, looked, finite", [(1.0, 1, True), (30000.0, 2, True), (50000.0, 2, False)])
def test_states_near_the_end_of_half_precision_are_looked_at(scale: float, looked: int, finite: bool):
    """Twice 30000 fits into float16, twice 50000 does not; neither is known before the states are there."""

    def doubled(given: VisualTokens) -> Selection:
        (coords,) = given.on_host(given.coords)
        assert len(coords) == N_VISUAL
        return Selection(torch.tensor([5, 2, 1]), given.hidden_states[:3] * 2, amplification=2.0)

    given = tokens(torch.float16)
    largest = given.hidden_states.abs().max()
    given = dataclasses.replace(given, hidden_states=(given.hidden_states.float() / largest.float() * scale).half())
    given.hidden_states[0, 0] = scale
    pruner = answering(doubled, late=True)
    if not finite:
        assert "merged states hold NaN or infinity in torch.float16" in refusal(pruner, given, 3)
        return
    _, found = counted(lambda: pruner.select(on_device(given), 3))
    assert waits(found) == looked, found.syncs


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("params", [{"name": "vlmpruner", "pivots": 1}, {"name": "pool"}], ids=lambda params: params["name"])
def test_the_bound_on_merged_states_holds(params: dict, quirks: bool):
    """Also where weights nearly cancel out, so that coefficients are large: one kept token receives cosines of both signs."""
    pruner, used, bounds = get_pruner(**params, pruning_rate=0.5, official_quirks=quirks), [], []
    for seed in range(8):
        states = torch.randn(N_VISUAL, 3, generator=torch.Generator().manual_seed(seed))
        for keep in (1, 5, 100):
            got = pruner.select(dataclasses.replace(tokens(), hidden_states=states), keep)
            used.append((got.hidden_states.abs().max() / states.abs().max() / got.amplification).item())
            bounds.append(got.amplification)
    assert 0.5 < max(used) <= 1 + 1e-5  # a bound, and not one that is far off
    assert max(bounds) == 1 if params["name"] == "pool" else max(bounds) > 2


# ---- what crosses
def test_one_copy_brings_every_type_to_the_bit():
    sent = [
        torch.tensor([True, False, True]),
        torch.tensor([2**40 + 1, -3]),
        torch.tensor(1.5),
        torch.tensor([[1, 2, 3]], dtype=torch.uint8).T,
        torch.randn(4, 6)[:, ::2],
        torch.tensor([65504.0, float("nan"), -0.0], dtype=torch.float16),
        torch.tensor([float("inf"), 1e-40]).bfloat16(),
        torch.tensor([1 / 3, 1e300], dtype=torch.float64),
        torch.zeros(0, 3),
    ]
    stays = torch.arange(3)
    got, found = counted(lambda: to_host(OnDevice(sent[0]), stays, *map(OnDevice, sent[1:])))
    assert waits(found) == 1
    assert got[1] is stays
    for one, other in zip([got[0], *got[2:]], sent, strict=True):
        assert one.device == CPU and one.dtype == other.dtype and one.shape == other.shape
        assert torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    assert counted(lambda: to_host(stays))[0][0] is stays


# ---- a whole prefill
def moved(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for held_by in (module._parameters, module._buffers):
            held_by.update({name: OnDevice(value.detach()) for name, value in held_by.items() if value is not None})
    return model


@pytest.fixture
def _autocast_on_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models switch autocast off by the type of the device, of which torch knows none for "meta"."""
    real = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device_type, **kwargs: real("cpu" if device_type == "meta" else device_type, **kwargs))


def prefill(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, CountSyncs]:
    output, found = counted(lambda: model(**{name: OnDevice(value) for name, value in inputs.items()}))
    return held(output.logits), found


@pytest.fixture(scope="module")
def there() -> nn.Module:
    """LLaVA on the stand-in device."""
    return moved(build("llava"))


N_IMAGES = 2
TWO_ROWS = [(3, "i0", 4), (5, "i1", 2)]
TWO_IMAGES = [(3, "i0", 2, "i1", 4)]


ON_IMAGES = ("vlmpruner", "twostages", "pool")  # both images in one row; the others in a row each


@pytest.mark.usefixtures("_autocast_on_the_stand_in")
@pytest.mark.parametrize("method", [*IN_MODEL, "twostages", "first"])
def test_a_prefill_waits_once_and_once_for_each_stage(tiny_model, there: nn.Module, method: str):
    """Beyond what the model waits for by itself; logits and records as on a CPU."""
    inputs, model = prompts("llava", TWO_IMAGES if method in ON_IMAGES else TWO_ROWS), tiny_model("llava")
    own = {"twostages": TwoStages, "first": First}
    pruner = own[method](pruning_rate="2/3") if method in own else made(method)
    with torch.no_grad(), prune(model, pruner) as ledger:
        expected = model(**inputs).logits
    plain = waits(prefill(there, inputs)[1])
    with prune(there, pruner) as ledger_there:
        logits, found = prefill(there, inputs)
    choices = N_IMAGES if method == "first" else 1  # which has a select of its own
    assert waits(found) - plain == 1 + choices * len(pruner.stages(N_LAYERS)) + BEYOND_STAGES.get(method, 0), found.syncs
    assert torch.allclose(logits, expected, atol=1e-5)
    timeless = [[dataclasses.replace(record, selection_ms=None) for record in told.records] for told in (ledger, ledger_there)]
    assert timeless[0] == timeless[1]


class First(NoCheck):
    """A method that replaces `select`, and answers rightly."""

    def choose(self, tokens: VisualTokens, keep: int) -> Tensor:
        return tokens.hidden_states.norm(dim=-1).topk(keep).indices


@pytest.mark.usefixtures("_autocast_on_the_stand_in")
@pytest.mark.parametrize("family, of_its_own", [("llava_next", 1), ("qwen2_vl", 1), ("internvl", 0)])
def test_families_wait_once_for_the_sizes_of_all_images(family: str, of_its_own: int):
    inputs, there = prompts(family, TWO_ROWS[:1]), moved(build(family))
    plain = waits(prefill(there, inputs)[1])
    with prune(there, get_pruner("vlmpruner", pruning_rate="2/3")) as ledger:
        _, found = prefill(there, inputs)
    assert waits(found) - plain == 1 + 1 + of_its_own, found.syncs
    assert ledger.records[0].n_kept < ledger.records[0].n_visual


# ---- the counter itself
def test_the_count_would_notice():
    values = OnDevice(torch.tensor([3.0, -1.0, 2.0]))
    with CountSyncs() as found:
        values.sum().item()
        bool((values > 0).any())
        values[values > 0]
        (values > 0).nonzero()
        values.cpu()
        values.tolist()
        torch.zeros(3).to(DEVICE)
        torch.zeros(3).to(DEVICE, non_blocking=True)
        torch.tensor([1, 2], device=DEVICE)
        torch.tensor([], device=DEVICE)
        values[values.argmax().view(1)]
        values[torch.tensor([1, 0])]
    assert dict(found.syncs) == {"_local_scalar_dense": 2, "index": 2, "nonzero": 1, "_to_copy": 4}
    assert found.launches["gt"] == 3 and found.launches["_to_copy"] >= 5 and not found.launches["view"]
    with pytest.raises(AssertionError, match="mixes"), CountSyncs():
        values + torch.ones(3)
