"""`bench grid`: both ways give the same tokens in float32, and the groups are those that cut alike."""

from __future__ import annotations

import pytest

from vlm_pruner_eval import ConfigError
from vlm_pruner_eval.speed import bench_grid as benchmark
from vlm_pruner_eval.speed.bench_setup import Setup


def test_both_ways_answer_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    setup = Setup(geometry="mini", n_text=16, n_new=3, batch_sizes=[2], device="cpu", dtype="float32")
    found = benchmark.bench_grid(setup, ["vlmpruner", "fastv", "divprune"], ["2/3", "8/9"], documents=2, rows=6)
    assert (found["runs"], found["answers"], found["different"]) == (8, 8 * 4, 0)
    assert sorted(found["groups"]) == [2, 2, 2, 4, 6]  # unpruned; blind; three and one at layer 2; DivPrune's
    assert len(found["rounds"]) == 1
    assert found["ratio"] > 0


def test_a_wrong_method_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match="fastvv"):
        benchmark.bench_grid(Setup(geometry="mini"), ["fastvv"])
