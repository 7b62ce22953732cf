"""`bench selection`: its numbers and its memory, and that selection does not copy the states."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from vlm_pruner_eval import ConfigError, VisualTokens, get_pruner, keep_count
from vlm_pruner_eval.pruners import blocks
from vlm_pruner_eval.pruners.divprune import would_repeat
from vlm_pruner_eval.speed import bench_selection as selection
from vlm_pruner_eval.speed import measuring
from vlm_pruner_eval.speed.bench_commands import app
from vlm_pruner_eval.speed.measuring import peak_extra_bytes, summary, take_turns

CPU = torch.device("cpu")
METHODS = ["vlmpruner", "dart", "divprune", "fastv", "random"]


def tokens(n_visual: int = 60, width: int = 64) -> VisualTokens:
    return selection.image_tokens(n_visual, width, CPU)


# ---- the benchmark
@pytest.fixture(scope="module")
def result() -> dict:
    return selection.bench_selection(METHODS, [36, 48], 2, width=64)


def test_the_json_says_what_was_measured_where(result: dict):
    assert json.loads(json.dumps(result)) == result
    assert result["benchmark"] == "selection" and result["dtype"] == "float32" and result["rounds"] == 3 and result["repeats"] == 2
    assert result["versions"].keys() >= {"torch", "python", "transformers", "vlm_pruner_eval"}
    assert result["device"]["cpu"] and result["command"] and result["memory"]["cpu"]
    assert result["threads"] == torch.get_num_threads()
    on_cpu = [row for row in result["rows"] if row["device"] == "cpu"]
    wanted = [(size, name, rate) for size in (36, 48) for name in METHODS for rate in (0.667, 0.889)]
    assert [(row["n_visual"], row["method"], row["pruning_rate"]) for row in on_cpu] == wanted
    assert all(row["n_kept"] == keep_count(row["n_visual"], row["pruning_rate"]) for row in on_cpu)


def test_ratios_are_of_the_times_beside_them(result: dict):
    yardstick = {(line["device"], line["n_visual"]): line["ms"] for line in result["yardstick"]}
    for row in result["rows"]:
        assert row["yardstick_ratio"] == pytest.approx(yardstick[row["device"], row["n_visual"]] / row["select"]["ms"])
        assert row["peak_in_matrices"] == pytest.approx(row["peak_bytes"] / (4 * row["n_visual"] ** 2))
        assert row["peak_bytes"] >= row["answer_bytes"] >= 8 * row["n_kept"]


def test_a_batch_of_images_is_timed_beside_one():
    """As on a GPU."""
    images = [selection.image_tokens(36, 64, CPU, seed=seed) for seed in range(3)]
    assert not torch.equal(images[0].hidden_states, images[1].hidden_states)
    line, (row,) = selection._bench_size([get_pruner("vlmpruner", pruning_rate=0.5)], images, 1)
    assert row["batch"] == 3
    assert row["batch_yardstick_ratio"] == pytest.approx(3 * line["ms"] / row["select_batch"]["ms"])


def test_times_are_medians_of_rounds():
    found = summary([[1.0, 2.0, 9.0], [4.0, 4.0, 4.0], [3.0, 3.0, 30.0]])
    spread = {"iqr_ms": 1.0, "best_ms": 1.0, "noise": pytest.approx(2 / 3)}
    assert found == {"ms": 3.0, "rounds_ms": [2.0, 4.0, 3.0], **spread}


def test_calls_take_turns_and_none_is_timed_before_it_has_run_once():
    calls = []
    times = selection._times({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_results_of_turns_stay_with_their_calls():
    count = iter(range(10))
    assert take_turns({"a": lambda: next(count), "b": lambda: next(count)}, 2) == {"a": [0, 3], "b": [1, 2]}


def test_a_yardstick_that_does_not_fit_is_skipped_and_says_so(monkeypatch):
    monkeypatch.setattr(measuring, "free_bytes", lambda device: 1000)
    got = selection.bench_selection(["fastv"], [36], 1, width=64)
    assert got["yardstick"][0]["ms"] is None and "are free" in got["yardstick"][0]["skipped"]
    assert all(row["yardstick_ratio"] is None for row in got["rows"])


def test_every_method_with_a_rule_is_there():
    assert {"vlmpruner", "fastv", "dart", "divprune", "random", "uniform", "pool"} <= {*selection.methods_with_a_rule()}
    assert not {"none", "blind", "downsample"} & {*selection.methods_with_a_rule()}


def test_every_method_with_a_rule_can_be_measured():
    """The text side of CLIP is made up as the rest is: nothing is loaded. Of methods that cut several times it is the first cut."""
    got = selection.bench_selection([], [36], 1, width=64)
    assert {row["method"] for row in got["rows"]} == {*selection.methods_with_a_rule()}
    assert all(0 < row["n_kept"] <= 36 and row["choose"]["ms"] > 0 for row in got["rows"])


def test_bad_input_is_refused_all_at_once():
    with pytest.raises(ConfigError) as refusal:
        selection.bench_selection(["fastvv", "none"], [3], 0)
    assert [problem.split(":")[0] for problem in refusal.value.problems] == ["--methods", "--methods", "--sizes", "--repeats"]
    assert "fastv" in refusal.value.problems[0]


def test_the_input_exercises_the_growth():
    """Cosines as of a photo: the default threshold is not reached by everything, nor by nothing."""
    given = selection.image_tokens(576, 512, CPU)
    cosine = selection.broadcast_cosine(given.hidden_states)[~torch.eye(576, dtype=torch.bool)]
    assert 0.02 < (cosine > 0.5).float().mean() < 0.98


def test_the_yardstick_is_the_cosine_matrix():
    features = tokens().hidden_states
    unit = features / features.norm(dim=1, keepdim=True)
    assert torch.allclose(selection.broadcast_cosine(features), unit @ unit.T, atol=1e-5)


# ---- memory
def test_the_peak_counts_what_lives_at_one_time():
    def two_then_one() -> torch.Tensor:
        first = torch.zeros(1000, 100)
        second = first + 1
        del first
        return second * 2

    assert peak_extra_bytes(two_then_one, CPU) == pytest.approx(2 * 400_000, rel=0.01)


@pytest.mark.parametrize("rate", selection.RATES)
def test_vlm_pruner_stays_under_three_matrices_with_its_answer(rate: float):
    """At the paper's size, where the states alone are seven times as large as the [V, V] matrix."""
    given, pruner = selection.image_tokens(576, 4096, CPU), get_pruner("vlmpruner", pruning_rate=rate)
    assert peak_extra_bytes(lambda: pruner.select(given), CPU) < 3 * 4 * 576**2


# ---- blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 700), (100, 130), (33, 517)])
def test_sums_in_blocks_are_the_same_to_the_bit(shape: tuple[int, int], dtype: torch.dtype, monkeypatch):
    rows = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 + 5).to(dtype)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4096)
    assert shape == (1, 1) or (len(blocks.row_blocks(rows)) > 1 and len(blocks.column_blocks(rows)) > 1)
    assert torch.equal(blocks.l1_norms(rows), rows.abs().sum(-1))
    assert torch.equal(blocks.squared_distances(rows, rows[:1]), (rows - rows[:1]).square().sum(-1))
    assert torch.equal(blocks.variances(rows), (rows - rows.mean(0)).square().mean(0))


# ---- the repeats of DivPrune's release, found after the loop
@pytest.mark.parametrize("seed", range(20))
def test_would_repeat_is_what_a_loop_without_memory_does(seed: int):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randint(0, 4, (14, 2), generator=generator).float()  # some stand at one place
    distance = torch.cdist(points, points) + 0.01 * torch.rand(14, 14, generator=generator).round()
    order = torch.randperm(14, generator=generator)[:9]
    repeats, nearest = False, distance[order[0]]
    for step in range(1, 9):
        taken = [*order[:step].tolist()]
        best = max(range(14), key=lambda i: (i in taken or i == order[step], nearest[i].item(), -i))
        repeats |= best in taken
        nearest = torch.minimum(nearest, distance[order[step]])
    assert bool(would_repeat(distance, order)) == repeats


# ---- the command
def test_the_command_prints_a_table_and_one_json_line(tmp_path):
    before, out = torch.get_num_threads(), tmp_path / "deep" / "selection.json"
    args = ["selection", "--methods", "fastv,vlmpruner", "--sizes", "36", "--repeats", "1", "--threads", "2", "--out", str(out)]
    got = CliRunner().invoke(app, args)
    assert got.exit_code == 0, got.output
    told = CliRunner().invoke(app, [*args, "--json"])
    last = json.loads(told.stdout)
    assert last == json.loads(out.read_text())
    assert last["threads"] == 2 and torch.get_num_threads() == before
    assert "yardstick" in got.stdout and sum("vlmpruner" in line for line in got.stdout.splitlines()) == 2


def test_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), measuring.threads(before + 1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
