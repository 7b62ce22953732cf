from __future__ import annotations

import copy
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from sweep_standin import make_config, write_tasks

from vlm_pruner_eval.budget import keep_count
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.config import load, validate
from vlm_pruner_eval.sweep.grid import expand, method_problems, rate_percent, unit_folders
from vlm_pruner_eval.sweep.identity import RESULTS_VERSION

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


def test_neighbours_and_limits_are_no_part_of_a_run() -> None:
    """Another task or more questions answer only what is new."""
    wanted = [run.run_id for run in expand(validate(BASE))]
    for change in ({"tasks": ["a", "b"]}, {"limit": 5}, {"gallery": 3}, {"share_prefix": True}, {"methods": ["vlmpruner", "fastv"]}):
        assert [run.run_id for run in expand(validate(BASE | change))][:2] == wanted


def test_the_version_of_what_results_mean_is_part_of_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    before = expand(validate(BASE))[1].run_id
    monkeypatch.setattr("vlm_pruner_eval.sweep.identity.RESULTS_VERSION", RESULTS_VERSION + 1)
    assert expand(validate(BASE))[1].run_id != before


def test_a_unit_has_a_folder_of_its_task_with_a_digest_of_foreign_files(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    config = make_config(tasks=["tiny_mean", "digitscenes_read"], include_path=str(tmp_path))
    before = unit_folders(config)
    assert before["digitscenes_read"] == "digitscenes_read" and re.fullmatch(r"tiny_mean-[0-9a-f]{12}", before["tiny_mean"])
    (tmp_path / "tiny_mean.yaml").write_text((tmp_path / "tiny_mean.yaml").read_text() + "# edited\n")
    after = unit_folders(config)
    assert after["tiny_mean"] != before["tiny_mean"] and after["digitscenes_read"] == "digitscenes_read"


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
        ([{"name": "fastv", "label": "x"}, {"name": "dart", "label": "x"}], "methods: two different runs are both named 'x-2of3'"),
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


# ---- iso-compute rows, and budgets that must not be mixed
ISO = {"name": "divprune", "iso_layer": 2}
LAYERS = {"id": "vlmpruner_llava", "pretrained": "somewhere/tiny", "layers": 32}


def test_an_iso_compute_row_keeps_in_every_layer_what_the_others_keep_on_average() -> None:
    """64 of 576 from layer 2 of 32 on: (2 x 576 + 30 x 64) / 32 = 96, a rate of 5/6; listed under the rate that was asked."""
    config = validate(BASE | {"model": LAYERS, "methods": ["vlmpruner", ISO, "divprune"], "pruning_rates": ["8/9", 0.5]})
    runs = {run.key: run for run in expand(config)}
    iso = runs["divprune-iso-compute-8of9"]
    assert (iso.pruning_rate, iso.asked_rate, iso.iso_layer, iso.params) == ("5/6", "8/9", 2, {})
    assert keep_count(576, iso.pruning_rate) == (2 * 576 + 30 * 64) / 32 == 96
    assert runs["divprune-iso-compute-0.5"].pruning_rate == pytest.approx(1 - (2 + 30 * 0.5) / 32)
    plain = runs["divprune-8of9"]
    assert (plain.pruning_rate, plain.asked_rate, plain.iso_layer) == ("8/9", "8/9", None)
    fewer = expand(validate(BASE | {"model": LAYERS | {"layers": 16}, "methods": [ISO]}))[1]
    assert fewer.pruning_rate == str(1 - (2 + 14 * Fraction(1, 9)) / 16)


def test_the_layers_only_say_what_an_iso_compute_row_is() -> None:
    ids = [[run.run_id for run in expand(validate(BASE | {"model": LAYERS | {"layers": layers}}))] for layers in (32, 16)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("model", "entry", "sentence"),
    [
        (LAYERS, {"name": "fastv", "iso_layer": 2}, "methods[0]: iso_layer: got method fastv, but it prunes at layer 2; expected a method"),
        (LAYERS, {"name": "blind", "iso_layer": 2}, "methods[0]: iso_layer: got method blind, but it has no rate"),
        (LAYERS, ISO | {"iso_layer": 32}, "methods[0].iso_layer: got 32, expected 1 to 31 for a model of 32 layers."),
        (LAYERS, ISO | {"iso_layer": 0}, "methods[0].iso_layer: got 0 (int), expected the layer, 1 or more"),
        (BASE["model"], ISO, "methods[0].iso_layer: needs model.layers, the decoder layers of the model (32 for LLaVA-1.5-7B); add it."),
    ],
)
def test_an_iso_compute_row_that_means_nothing_is_refused(model: dict[str, Any], entry: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(validate(BASE | {"model": model, "methods": [entry]}))
    assert any(problem.startswith(sentence) for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"budget": "layer_average"}, "fastv-0.1: has budget layer_average, but vlmpruner-0.1 has kept;"),
        ({"scope": "per_sample"}, "fastv-0.1: has scope per_sample, but vlmpruner-0.1 has per_image;"),
    ],
)
def test_two_meanings_of_a_budget_are_refused_before_anything_runs(changes: dict[str, str], sentence: str) -> None:
    raw = BASE | {"pruning_rates": [0.1], "methods": ["vlmpruner", {"name": "fastv"} | changes]}
    with pytest.raises(ConfigError) as caught:
        expand(validate(raw))
    assert sentence in str(caught.value)
    assert len(expand(validate(raw | {"methods": [{"name": name} | changes for name in ("vlmpruner", "fastv")]}))) == 3


def test_where_nothing_precedes_the_cut_kept_and_layer_average_are_the_same_count() -> None:
    """DivPrune prunes before the first layer, and blind has no budget: neither mixes anything."""
    raw = BASE | {"pruning_rates": [0.1], "methods": [{"name": "fastv", "budget": "layer_average"}, "divprune", "blind"]}
    assert [run.method for run in expand(validate(raw))] == ["none", "fastv", "divprune", "blind"]


def test_a_run_says_in_what_it_differs_from_its_methods_defaults() -> None:
    methods = ["vlmpruner", {"name": "vlmpruner", "official_quirks": True, "pivots": 4, "label": "release"}]
    assert [run.changed for run in expand(validate(BASE | {"methods": methods}))] == [{}, {}, {"official_quirks": True}]


def test_entries_of_one_method_are_told_apart_by_their_parameters() -> None:
    methods = ["vlmpruner", {"name": "vlmpruner", "threshold": 0.9}, {"name": "fastv", "layer": 3}, {"name": "vlmpruner", "label": "mine"}]
    runs = expand(make_config(pruning_rates=["2/3"], methods=[*methods[:3], methods[3] | {"pivots": 5}]))
    assert [(run.label, run.key) for run in runs[1:]] == [
        ("vlmpruner", "vlmpruner-2of3"),
        ("vlmpruner threshold=0.9", "vlmpruner-threshold-0.9-2of3"),
        ("fastv", "fastv-2of3"),
        ("mine", "mine-2of3"),
    ]
    with pytest.raises(ConfigError, match="are the same run; remove one"):
        expand(make_config(methods=["fastv", "fastv"]))
