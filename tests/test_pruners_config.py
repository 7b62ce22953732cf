"""Requests that can't be run as written, budgets, and methods from other people's packages."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm_pruner_eval import ConfigError, Pruner, PruningError, Selection, Stage, VisualTokens, get_pruner, keep_count, list_pruners
from vlm_pruner_eval.budget import share_for_layer_average

BUILT_IN = {"vlmpruner", "fastv", "dart", "divprune", "random", "uniform", "pool", "downsample", "blind", "none"}


def tokens(n_visual: int = 12) -> VisualTokens:
    generator = torch.Generator().manual_seed(0)
    return VisualTokens(torch.randn(n_visual, 4, generator=generator), grid=(1, n_visual), sample_id="doc 7")


def problems(method: str, **params: object) -> str:
    with pytest.raises(ConfigError) as refusal:
        get_pruner(method, **{"pruning_rate": 0.5} | params)
    return str(refusal.value)


# ---- names and values
def test_the_built_in_methods():
    assert set(list_pruners()) >= BUILT_IN
    for name in BUILT_IN:
        pruner = get_pruner(name, pruning_rate=0.5)
        assert pruner.name == name
        with pytest.raises(dataclasses.FrozenInstanceError):
            pruner.layer = 3


def test_unknown_method_names_the_closest():
    for typed, meant in (("vlm_pruner", "vlmpruner"), ("fast_v", "fastv"), ("divprun", "divprune"), ("rand", "random")):
        sentence = problems(typed)
        assert f"did you mean {meant!r}" in sentence and "dart" in sentence
    for method in (float("nan"), None, 3):
        assert "expected a name" in problems(method)


def test_unknown_parameters_name_the_closest_and_come_all_at_once():
    sentence = problems("vlmpruner", tresh=0.8, self_wieght=0.1, token_batch=0, pruning_rate=2)
    for part in ("'tresh'", "did you mean 'threshold'", "did you mean 'self_weight'", "pruning_rate: got 2"):
        assert part in sentence
    assert "unknown parameter 'pivots'" in problems("fastv", pivots=4)


def test_rates_out_of_range():
    for rate in (1, 1.0, -0.1, 1.5, float("nan"), float("inf"), "nan", "lots", "", "9/8", "1/0", None, True, [0.5]):
        for method in ("vlmpruner", "blind"):
            sentence = problems(method, pruning_rate=rate)
            assert "pruning_rate: got" in sentence and "expected a number in [0, 1)" in sentence


@pytest.mark.parametrize(
    "method, params, said",
    [
        ("vlmpruner", {"threshold_step": 0}, "threshold_step: got 0, expected a number above 0"),
        ("vlmpruner", {"threshold_step": -0.1}, "threshold_step: got -0.1"),
        ("vlmpruner", {"threshold": float("nan")}, "threshold: got nan"),
        ("vlmpruner", {"pivots": 0}, "pivots: got 0"),
        ("vlmpruner", {"pivots": 4.0}, "pivots: got 4.0 (float), expected int"),
        ("vlmpruner", {"token_batch": True}, "token_batch: got True (bool), expected int"),
        ("vlmpruner", {"channels": "all"}, "channels: got 'all' (str), expected int"),
        ("vlmpruner", {"spatial_weight": -1}, "spatial_weight: got -1"),
        ("vlmpruner", {"self_weight": 1.2}, "self_weight: got 1.2"),
        ("vlmpruner", {"merge": 1}, "merge: got 1 (int), expected bool"),
        ("vlmpruner", {"layer": 0}, "reads keys of the layer before"),
        ("fastv", {"layer": 0}, "reads attention of the layer before"),
        ("fastv", {"layer": -1}, "layer: got -1"),
        ("fastv", {"layer": "2"}, "layer: got '2' (str), expected int"),
        ("fastv", {"positions": "auto"}, "positions: got 'auto', expected one of original, contiguous"),
        ("fastv", {"selection_dtype": "float16"}, "selection_dtype: got 'float16'"),
        ("fastv", {"budget": "average"}, "budget: got 'average'"),
        ("fastv", {"official_quirks": "yes"}, "official_quirks: got 'yes'"),
        ("divprune", {"layer": 2}, "acts at layer 0 only"),
        ("dart", {"image_pivots": 0}, "image_pivots: got 0"),
        ("dart", {"text_pivots": -1}, "text_pivots: got -1"),
        ("random", {"seed": 0.5}, "seed: got 0.5"),
    ],
)
def test_wrong_values(method: str, params: dict, said: str):
    sentence = problems(method, **params)
    assert said in sentence and method in sentence


# ---- budgets
@pytest.mark.parametrize(
    "rate, kept", [("2/3", 192), ("7/9", 128), ("8/9", 64), (0.667, 192), (0.778, 128), (0.889, 64), (0, 576), ("0.889", 64)]
)
def test_fractions_and_decimals(rate: object, kept: int):
    assert keep_count(576, rate) == kept
    assert get_pruner("uniform", pruning_rate=rate).default_keep(576) == kept


def test_fractions_are_exact():
    """In floating point 1 - 8/9 times 9 / 2 is not 0.5; exactly it is, and half rounds to even: 4.5 tokens are 4, 13.5 are 14."""
    assert [keep_count(count, "1/2") for count in (9, 27)] == [4, 14]
    assert keep_count(27, Fraction(17, 18)) == keep_count(27, "17/18") == 2  # 1.5
    assert keep_count(1, "8/9") == keep_count(3, "8/9") == 1 and keep_count(0, "8/9") == 0


def test_counts_of_tokens_are_whole_numbers():
    for count in (-1, 2.0, True, "9"):
        with pytest.raises(ConfigError, match="n_visual: got"):
            keep_count(count, 0.5)
    assert keep_count(np.int64(576), np.float32(0.875)) == 72
    assert len(get_pruner("uniform", pruning_rate=np.float64(0.5)).select(tokens(), np.int64(3)).order) == 3


@pytest.mark.parametrize("rate, kept", [("2/3", 166), ("7/9", 98), ("8/9", 30)])
def test_layer_average(rate: str, kept: int):
    """LLaVA-1.5-7B: 2 of 32 layers see all 576 tokens, so an average of 192 / 128 / 64 leaves 166 / 98 / 30."""
    pruner = get_pruner("fastv", pruning_rate=rate, budget="layer_average")
    (stage,) = pruner.stages(32)
    assert stage.layer == 2 and pruner.keep_at(stage, 576) == kept
    assert get_pruner("fastv", pruning_rate=0, budget="layer_average").stages(32) == (Stage(2, 1),)
    at_the_start = get_pruner("divprune", pruning_rate=rate, budget="layer_average")
    assert at_the_start.keep_at(*at_the_start.stages(32), 576) == keep_count(576, rate)


def test_layer_averages_that_do_not_exist():
    with pytest.raises(ConfigError, match=r"lower the pruning rate below 0\.5000"):
        get_pruner("fastv", pruning_rate=0.6, layer=16, budget="layer_average").stages(32)
    with pytest.raises(ConfigError, match="expected 0 to 31"):
        share_for_layer_average(0.5, 32, 32)


def test_position_policies():
    divprune = get_pruner("divprune", pruning_rate=0.5)
    assert divprune.layer == 0
    assert [divprune.position_policy(mrope) for mrope in (False, True)] == ["contiguous", "original"]
    assert get_pruner("divprune", pruning_rate=0.5, positions="original").position_policy(False) == "original"
    for name in BUILT_IN - {"divprune"}:
        assert get_pruner(name, pruning_rate=0.5).position_policy(False) == "original"


# ---- methods of one's own
OWN = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from vlm_pruner_eval import Pruner

@dataclass(frozen=True, kw_only=True)
class Last(Pruner):
    name: ClassVar[str] = "last"
    skip: int = 0

    def choose(self, tokens, keep):
        return torch.arange(tokens.n_visual - 1 - self.skip, tokens.n_visual - 1 - self.skip - keep, -1)

@dataclass(frozen=True, kw_only=True)
class Demanding(Pruner):
    name: ClassVar[str] = "demanding"
    strength: float

    def choose(self, tokens, keep):
        return torch.arange(keep)

not_a_class = 3
"""


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A distribution as pip leaves it: a module, and metadata with an entry point."""
    (tmp_path / "throw_away_methods.py").write_text(OWN)
    metadata = tmp_path / "throw_away_methods-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: throw-away-methods\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vlm_pruner_eval.pruners]\nlast = throw_away_methods:Last\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "throw_away_methods"
    sys.modules.pop("throw_away_methods", None)


def test_a_method_by_entry_point(own_package: str):
    assert "last" in list_pruners()
    assert get_pruner("last", pruning_rate=0.75).select(tokens()).order.tolist() == [11, 10, 9]
    assert "did you mean 'skip'" in problems("last", skp=1)
    assert "did you mean 'last'" in problems("lasst")


def test_a_method_by_path(own_package: str):
    assert get_pruner(f"{own_package}:Last", pruning_rate=0.75, skip=2).select(tokens()).order.tolist() == [9, 8, 7]


def test_an_entry_point_is_gone_with_its_package():
    assert "last" not in list_pruners()


def test_paths_that_lead_nowhere(own_package: str):
    assert "can't be imported" in problems("no_such_package:Thing")
    assert "can't be imported" in problems(f"{own_package}:Lost")
    assert "can't be imported" in problems(":Last")
    assert "expected a subclass of vlm_pruner_eval.Pruner" in problems(f"{own_package}:not_a_class")
    assert "expected a subclass of vlm_pruner_eval.Pruner" in problems("fractions:Fraction")


def test_a_parameter_without_default_is_asked_for(own_package: str):
    assert "parameter 'strength' has no default; pass strength=..." in problems(f"{own_package}:Demanding")
    assert get_pruner(f"{own_package}:Demanding", pruning_rate=0.5, strength=2).strength == 2


def test_needs_are_checked():
    @dataclass(frozen=True, kw_only=True)
    class Greedy(Pruner):
        name: ClassVar[str] = "greedy"
        needs: ClassVar[frozenset[str]] = frozenset({"vision"})

    with pytest.raises(ConfigError, match=r"needs: got \['vision'\]"):
        Greedy(pruning_rate=0.5)


# ---- the base class checks the answer
def answering(answer: object) -> Pruner:
    @dataclass(frozen=True, kw_only=True)
    class Answering(Pruner):
        name: ClassVar[str] = "answering"

        def choose(self, tokens: VisualTokens, keep: int) -> Tensor | Selection:
            return answer() if callable(answer) else answer

    return Answering(pruning_rate=0.75)


STATES = torch.zeros(3, 4)


@pytest.mark.parametrize(
    "answer, said",
    [
        (torch.arange(12), "chose 12 tokens, expected exactly 3 of 12"),
        (torch.arange(2), "chose 2 tokens, expected exactly 3 of 12"),
        (torch.tensor([1, 5, 5]), "3 indices of which 2 are distinct"),
        (torch.tensor([1, 5, 12]), "chose indices 1 to 12, expected 0 to 11"),
        (torch.tensor([-1, 5, 6]), "chose indices -1 to 6, expected 0 to 11"),
        (torch.tensor([3.0, 1.0, 2.0]), "of torch.float32, expected a 1-D int64 tensor"),
        (torch.tensor([[3, 1, 2]]), "chose (1, 3) of torch.int64, expected a 1-D int64 tensor"),
        (torch.tensor([True, False, True]), "of torch.bool, expected a 1-D int64 tensor"),
        ([3, 1, 2], "chose list, expected a 1-D int64 tensor"),
        (None, "chose NoneType, expected a 1-D int64 tensor"),
        (
            Selection(torch.arange(3), torch.zeros(12, 4)),
            "states of shape (12, 4) of torch.float32, expected a floating-point tensor (3, 4)",
        ),
        (Selection(torch.arange(3), torch.zeros(3, 5)), "states of shape (3, 5)"),
        (Selection(torch.arange(3), torch.zeros(3, 4, dtype=torch.int64)), "of torch.int64, expected a floating-point tensor"),
        (Selection(torch.arange(3), [0.0]), "states of type list"),
        (Selection(torch.arange(3), STATES / 0), "merged states hold NaN or infinity"),
        (lambda: 1 / 0, "choose raised ZeroDivisionError: division by zero"),
        (lambda: torch.zeros(2) + torch.zeros(3), "choose raised RuntimeError"),
    ],
)
def test_wrong_answers_are_refused(answer: object, said: str):
    with pytest.raises(PruningError) as refusal:
        answering(answer).select(tokens())
    sentence = str(refusal.value)
    assert said in sentence and "'answering'" in sentence and "'doc 7'" in sentence


def test_right_answers_are_not():
    got = answering(Selection(torch.tensor([7, 0, 3]), STATES.double())).select(tokens())
    assert got.keep.tolist() == [0, 3, 7] and got.hidden_states.dtype == torch.float32


def test_a_method_that_chooses_nothing_yet():
    with pytest.raises(PruningError, match=r"NotImplementedError: Pruner\.choose is not written yet"):
        Pruner(pruning_rate=0.5).select(tokens())


# ---- contradictory tokens
def test_tokens_that_contradict_themselves():
    states = torch.zeros(12, 4)
    with pytest.raises(PruningError, match="12 tokens do not fill a grid of 3 x 5 = 15"):
        VisualTokens(states, grid=(3, 5))
    with pytest.raises(PruningError, match=r"coords has shape \(11, 3\), expected \(12, 3\)"):
        VisualTokens(states, grid=(3, 4), coords=torch.zeros(11, 3))
    with pytest.raises(PruningError, match="got grid 0 x 4"):
        VisualTokens(states, grid=(0, 4))
    with pytest.raises(PruningError, match=r"shape \(0, 4\), expected \[V, D\] with at least one token"):
        VisualTokens(states[:0], grid=(1, 1))
    with pytest.raises(PruningError, match=r"attention has shape \(11,\), expected 12 rows"):
        get_pruner("fastv", pruning_rate=0.5).select(VisualTokens(states, grid=(3, 4), attention=torch.rand(11)))
