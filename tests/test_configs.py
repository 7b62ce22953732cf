"""Every shipped sweep file: valid, whole, and made of tasks, models and protocols that exist."""

from __future__ import annotations

import importlib
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from lmms_eval.utils import load_yaml_config

from vlm_pruner_eval.lmms import planning
from vlm_pruner_eval.lmms.plugin import MODELS
from vlm_pruner_eval.sweep.config import SweepConfig, load
from vlm_pruner_eval.sweep.grid import Run, expand, method_problems
from vlm_pruner_eval.sweep.metrics.scores import BENCHMARK_GROUPS, MAIN_METRICS
from vlm_pruner_eval.sweep.opening import check_tasks, unscorable

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
RUNS = {
    "ci.yaml": 8,
    "quickstart.yaml": 20,
    "suite_2026.yaml": 41,
    "multi_image.yaml": 41,
    "zoo_llava15_7b.yaml": 83,
    "zoo_llava_next.yaml": 83,
    "zoo_llava_next_total.yaml": 83,
    "zoo_qwen2_5_vl.yaml": 74,
    "paper/ablations.yaml": 33,
    "paper/table1_llava15_7b.yaml": 62,
    "paper/table2_llava15_13b.yaml": 18,
    "paper/table2_llava_next_7b.yaml": 18,
    "paper/table3_qwen2_vl_7b.yaml": 56,
    "paper/table4_llava_video_7b.yaml": 18,
    "paper/table7_qwen3_vl_4b.yaml": 56,
}
TABLES = [CONFIGS / name for name in RUNS if name.startswith("paper/table")]
NINE = [
    "gqa",
    "mmbench_en_dev_llava",
    "mme_total",
    "pope_splits",
    "scienceqa_img",
    "textvqa_val_ocr",
    "ocrbench_short",
    "seedbench_image",
    "ok_vqa_val2014_plain",
]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
every_table = pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)


def read(path: Path) -> SweepConfig:
    return load(path, check=method_problems)


def named(name: str) -> SweepConfig:
    return read(CONFIGS / "paper" / f"{name}.yaml")


def leaves(task: str, index: Any) -> list[dict[str, Any]]:
    raw = load_yaml_config(index.task_index[task]["yaml_path"], mode="simple")
    return [leaf for member in raw["task"] for leaf in leaves(member, index)] if isinstance(raw["task"], list) else [raw]


def test_the_files_are_these() -> None:
    assert {path.relative_to(CONFIGS).as_posix() for path in FILES} == set(RUNS)


@every_file
def test_the_grid_is_whole(path: Path) -> None:
    config = read(path)
    runs = expand(config)
    assert len(runs) == RUNS[path.relative_to(CONFIGS).as_posix()]
    assert [run.method for run in runs].index("none") == 0
    wanted = Counter()
    for entry in config.methods:
        wanted[entry.shown] += (1 if entry.name == "blind" else len(config.rates)) * len(entry.seeds or (0,))
    assert Counter(run.label for run in runs[1:]) == wanted


def test_paper_tables_do_not_share_their_prefix() -> None:
    """They are there for their times, too."""
    shared = [path.name for path in FILES if read(path).share_prefix]
    assert {"ci.yaml", "quickstart.yaml", "zoo_llava15_7b.yaml"} <= set(shared)
    assert not {path.name for path in TABLES} & set(shared)


@every_file
def test_model_and_protocol_exist(path: Path) -> None:
    model = read(path).model
    module, _, name = MODELS[model.id].rpartition(".")
    family = getattr(importlib.import_module(module), name)
    assert family.model_id == model.id
    assert model.protocol in family.family.spec.protocols
    settings = {"max_frames_num", "min_pixels", "max_pixels"}
    assert {name for name in settings if getattr(model, name) is not None} <= family.family.spec.takes


@every_file
def test_every_task_is_known_and_has_the_metric_that_stands_for_it(path: Path, index: Any) -> None:
    config = read(path)
    check_tasks(config, index)
    assert unscorable(config, index) == []
    for task in config.tasks:
        metrics = {line["metric"] for leaf in leaves(task, index) for line in leaf["metric_list"]}
        if task in BENCHMARK_GROUPS:
            assert len(metrics) == 1  # of every member, so that their mean says something
        else:
            assert set(MAIN_METRICS[task].metrics) <= metrics


@every_file
def test_every_answer_is_greedy(path: Path, index: Any) -> None:
    for task in read(path).tasks:
        for leaf in leaves(task, index):
            assert planning.generation(leaf.get("generation_kwargs") or {}).kwargs["do_sample"] is False, leaf["task"]


def test_what_the_authors_submitted_to_a_server_is_found_out(index: Any) -> None:
    config = named("table3_qwen2_vl_7b")
    tasks = [*config.tasks, "mmbench_en_test", "mmbench_cn"]
    assert unscorable(config.model_copy(update={"tasks": tasks}), index) == ["mmbench_en_test", "mmbench_cn_test"]


def rows(config: SweepConfig, method: str) -> list[Run]:
    return [run for run in expand(config) if run.method == method]


@every_table
def test_a_table_has_release_rows_sane_rows_and_controls(path: Path) -> None:
    config = read(path)
    assert config.limit is None
    assert (config.model.batch_size, config.model.attn_implementation) == (1, "sdpa")
    n_rates = len(config.rates)
    for method in ("vlmpruner", "dart", "divprune"):
        release = [run for run in rows(config, method) if run.label.endswith("(release)")]
        assert len(release) == n_rates
        assert all((run.params["official_quirks"], run.params["selection_dtype"]) == (True, "model") for run in release)
        sane = [run for run in rows(config, method) if run not in release and run.iso_layer is None]
        assert [run.params for run in sane] == [{}] * n_rates
    assert len(rows(config, "fastv")) == len(rows(config, "uniform")) == n_rates
    assert Counter(run.seed for run in rows(config, "random")) == dict.fromkeys(range(5), n_rates)
    assert len(rows(config, "blind")) == 1
    controls = {"pool", "downsample"} if config.model.id.startswith("vlmpruner_qwen") else {"pool"}  # the others have no dynamic resolution
    assert Counter(run.method for run in expand(config) if run.method in controls and run.iso_layer is None) == dict.fromkeys(
        controls, n_rates
    )


@every_table
def test_methods_that_prune_before_the_first_layer_have_a_row_of_equal_compute(path: Path) -> None:
    """64 of 576 from layer 2 of 32 on are 96 on average; every method at layer 0 is in the file at that count too."""
    config = read(path)
    runs = expand(config)
    before = {run.method for run in runs if run.config["parameters"]["layer"] == 0 and run.method not in ("none", "blind")}
    equal = [run for run in runs if run.iso_layer is not None]
    assert {run.method for run in equal} == before >= {"divprune"}
    assert Counter(run.asked_rate for run in equal) == dict.fromkeys(config.rates, len(before))
    for run in equal:
        assert run.iso_layer == 2
        asked, got, layers = Fraction(run.asked_rate), Fraction(run.pruning_rate), config.model.layers
        assert 1 - got == (2 + (layers - 2) * (1 - asked)) / layers


@pytest.mark.parametrize(
    ("name", "model", "dtype", "protocol", "rates"),
    [
        ("table1_llava15_7b", "vlmpruner_llava", "float16", "paper", ["2/3", "7/9", "8/9"]),
        ("table2_llava15_13b", "vlmpruner_llava", "float16", "paper", ["8/9"]),
        ("table2_llava_next_7b", "vlmpruner_llava_next", "float16", "paper", ["8/9"]),
        ("table3_qwen2_vl_7b", "vlmpruner_qwen2_vl", "bfloat16", "paper", ["2/3", "7/9", "8/9"]),
        ("table4_llava_video_7b", "vlmpruner_llava_video", "bfloat16", "hf", ["8/9"]),
        ("table7_qwen3_vl_4b", "vlmpruner_qwen3_vl", "bfloat16", "hf", ["2/3", "7/9", "8/9"]),
        ("ablations", "vlmpruner_llava", "float16", "paper", ["8/9"]),
    ],
)
def test_a_table_is_run_as_published(name: str, model: str, dtype: str, protocol: str, rates: list[str]) -> None:
    config = named(name)
    assert (config.model.id, config.model.dtype, config.model.protocol, config.rates) == (model, dtype, protocol, rates)
    assert config.name == f"paper_{name}"


def test_the_benchmarks_of_the_paper() -> None:
    for name in ("table1_llava15_7b", "table2_llava15_13b", "ablations"):
        assert named(name).tasks == NINE
    # the authors' loader leaves OCR tokens out for checkpoints of 1.6, and Qwen2-VL was asked by a copy of lmms-eval
    assert named("table2_llava_next_7b").tasks == [{"textvqa_val_ocr": "textvqa_val"}.get(task, task) for task in NINE]
    stock = {
        "mmbench_en_dev_llava": "mmbench_en_dev_static",
        "ocrbench_short": "ocrbench",
        "ok_vqa_val2014_plain": "ok_vqa_val2014",
    }
    assert named("table3_qwen2_vl_7b").tasks == [stock.get(task, task) for task in NINE]
    video = named("table4_llava_video_7b")
    assert video.tasks == ["mvbench", "mlvu_dev", "videomme", "longvideobench_val_v"]
    assert video.model.max_frames_num == 64
    assert named("table7_qwen3_vl_4b").tasks == ["mme_total", "scienceqa_img", "ocrbench"]


def test_an_ablation_changes_one_thing() -> None:
    runs = expand(named("ablations"))
    default = runs[1].config["parameters"]
    changed: dict[str, list[Any]] = {}
    for run in runs[2:-1]:
        differing = {name: value for name, value in run.config["parameters"].items() if value != default[name]}
        ((name, value),) = differing.items()
        changed.setdefault(name, []).append(value)
    assert changed == {
        "pivots": [1, 2, 3, 5, 6, 7, 8],
        "channels": [128, 512, 1024, 4096],
        "threshold": [0.6, 0.7, 0.9, 1.0],
        "token_batch": [1, 2, 4, 8],
        "self_weight": [0.1, 0.5, 0.7, 0.9],
        "layer": [1, 3, 4, 8],
        "spatial_weight": [0.0],
        "merge": [False],
        "positions": ["contiguous"],
    }
    sane = runs[-1].config["parameters"]
    assert {name for name in sane if sane[name] != default[name]} == {"official_quirks", "selection_dtype"}


def test_the_suite_beyond_the_paper_runs_both_kinds_of_positions() -> None:
    config = read(CONFIGS / "suite_2026.yaml")
    assert config.tasks == ["chartqa", "docvqa_val", "infovqa_val", "mmstar", "refcoco_bbox_rec_testA", "ai2d"]
    # DivPrune's default is contiguous where rotary positions have one dimension
    for method, positions in (("vlmpruner", "contiguous"), ("fastv", "contiguous"), ("divprune", "auto")):
        assert {run.config["parameters"]["positions"] for run in rows(config, method)} == {"original", positions}
