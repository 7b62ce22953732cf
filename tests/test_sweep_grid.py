from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from sweep_standin import make_config

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.config import load, validate
from vlm_pruner_eval.sweep.grid import code_version, expand, method_problems, rate_percent

BASE: dict[str, Any] = {
    "name": "tiny",
    "model": {"id": "vlmpruner_llava", "pretrained": "somewhere/tiny"},
    "tasks": ["a"],
    "pruning_rates": ["8/9"],
    "methods": ["vlmpruner"],
}


def test_unpruned_first_then_methods_by_rates_by_seeds() -> None:
    config = make_config(pruning_rates=["2/3", 0.5], methods=["fastv", {"name": "random", "seeds": [3, 4]}, "blind"])
    assert [run.key for run in expand(config)] == [
        "unpruned",
        "fastv-2of3",
        "fastv-0.5",
        "random-2of3-seed3",
        "random-2of3-seed4",
        "random-0.5-seed3",
        "random-0.5-seed4",
        "blind",
    ]


def test_a_run_carries_what_configure_needs_and_every_parameter_resolved() -> None:
    run = expand(make_config(methods=[{"name": "vlmpruner", "threshold": 0.7, "label": "VLM-Pruner (0.7)"}]))[1]
    assert (run.method, run.pruning_rate, run.params, run.label) == ("vlmpruner", "2/3", {"threshold": 0.7}, "VLM-Pruner (0.7)")
    assert run.config["parameters"]["threshold"] == 0.7
    assert run.config["parameters"]["pivots"] == 4
    assert run.run_id.startswith("vlm-pruner-0.7-2of3-")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("model", "pretrained"), "elsewhere"),
        (("model", "revision"), "v2"),
        (("model", "dtype"), "float16"),
        (("model", "protocol"), "paper"),
        (("model", "attn_implementation"), "eager"),
        (("model", "batch_size"), 2),
        (("tasks",), ["b"]),
        (("limit",), 5),
        (("seed",), 1),
        (("pruning_rates",), ["7/9"]),
        (("methods",), [{"name": "vlmpruner", "threshold": 0.7}]),
        (("methods",), [{"name": "vlmpruner", "official_quirks": True}]),
    ],
)
def test_anything_that_can_change_an_answer_changes_the_id(where: tuple[str, ...], value: object) -> None:
    raw = copy.deepcopy(BASE)
    section = raw[where[0]] if len(where) == 2 else raw
    section[where[-1]] = value
    assert expand(validate(raw))[1].run_id != expand(validate(BASE))[1].run_id


def test_the_code_that_makes_answers_is_part_of_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    before = expand(validate(BASE))[1].run_id
    monkeypatch.setattr("vlm_pruner_eval.sweep.grid.code_version", lambda: "another")
    assert expand(validate(BASE))[1].run_id != before
    assert code_version().startswith("0.")


def test_a_label_and_a_spelled_out_default_change_no_hash() -> None:
    plain, labelled = (
        expand(validate(BASE | {"methods": [entry]}))[1] for entry in ("vlmpruner", {"name": "vlmpruner", "label": "Ours", "pivots": 4})
    )
    assert plain.run_id.rpartition("-")[2] == labelled.run_id.rpartition("-")[2]


def test_the_sweep_seed_is_the_seed_of_a_method_without_its_own() -> None:
    assert expand(make_config(seed=5, methods=["random"]))[1].params == {"seed": 5}
    assert expand(make_config(seed=5, methods=[{"name": "random", "seed": 2}]))[1].params == {"seed": 2}


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        (["vlmprunner"], "methods[0]: method: got 'vlmprunner', which is unknown; did you mean 'vlmpruner'?"),
        ([{"name": "vlmpruner", "treshold": 1.0}], "methods[0]: vlmpruner: unknown parameter 'treshold'; did you mean 'threshold'?"),
        ([{"name": "vlmpruner", "threshold_step": 0.0}], "methods[0]: vlmpruner: threshold_step: got 0"),
        ([{"name": "vlmpruner", "pivots": "4"}], "methods[0]: vlmpruner: pivots: got '4' (str)"),
        ([{"name": "fastv", "layer": -1}], "methods[0]: fastv: layer: got -1"),
        ([{"name": "fastv", "seeds": [1]}], "methods[0]: seeds: method fastv draws no random numbers"),
        ([{"name": "random", "seeds": [1], "seed": 2}], "methods[0]: got both seed and seeds"),
        ([{"name": "fastv", "pruning_rate": 0.5}], "methods[0]: pruning_rate: the rates of a sweep stand in pruning_rates"),
        (["none"], "methods[0]: got none, but the unpruned run is always in the grid"),
        (["fastv", "fastv"], "methods: 'fastv-2of3' and 'fastv-2of3' are the same run; remove one."),
        (["fastv", {"name": "fastv", "label": "F"}], "methods: 'f-2of3' and 'fastv-2of3' are the same run; remove one."),
        (["fastv", {"name": "fastv", "layer": 3}], "methods: two different runs are both named 'fastv-2of3'"),
        ([{"name": "random", "seeds": [1, 1]}], "methods: 'random-2of3-seed1' and 'random-2of3-seed1' are the same run"),
    ],
)
def test_what_a_method_refuses_is_refused_with_its_place(methods: list[Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(make_config(methods=methods))
    assert any(problem.startswith(sentence) for problem in caught.value.problems), caught.value.problems


def test_all_methods_are_checked_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        expand(make_config(methods=["nothing", {"name": "fastv", "x": 1}, "vlmpruner", "vlmpruner"]))
    assert len(caught.value.problems) == 3


def test_rates_as_percentages() -> None:
    assert rate_percent("8/9") == pytest.approx(88.8889, abs=1e-4)
    assert rate_percent(0.5) == 50.0
    assert rate_percent(None) is None


def test_problems_of_methods_are_reported_with_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nmodle: {}\ntasks: [a]\npruning_rates: [2]\nmethods: [fastw, 3, {name: dart, image_pivot: 2}]\n")
    with pytest.raises(ConfigError) as refusal:
        load(path, check=method_problems)
    text = str(refusal.value)
    for part in (
        "modle",
        "pruning_rates[0]",
        "methods[0]: method: got 'fastw'",
        "methods[1]",
        "methods[2]: dart: unknown parameter 'image_pivot'",
    ):
        assert part in text
    assert "did you mean 'image_pivots'?" in text
