"""`bench answering`: a checkpoint with random weights is really answered by lmms-eval, pruned and unpruned, and compared."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest
from test_cli import clean_surroundings  # noqa: F401  # a fixture that is always on
from typer.testing import CliRunner

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.speed.bench_answering import write_checkpoint
from vlm_pruner_eval.speed.bench_commands import app


def test_runs_are_answered_and_compared(tmp_path: Path) -> None:
    out = tmp_path / "answering.json"
    options = {"--checkpoint": tmp_path, "--limit": 2, "--batch-size": 2, "--methods": "fastv", "--rounds": 1, "--out": out}
    command = ["answering", *(str(part) for option in options.items() for part in option)]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    result = json.loads(out.read_text())
    assert (result["n"], result["batch_size"], result["failed"], result["pretrained"]) == (2, 2, 0, "mini-float16-random")
    assert [[*seconds] for seconds in result["rounds"]] == [["unpruned", "fastv-8of9"]]
    ratios = [each["fastv-8of9"] / each["unpruned"] for each in result["rounds"]]
    assert result["ratios"] == {"fastv-8of9": pytest.approx(median(ratios))}
    weights = tmp_path / "mini-float16-random" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert write_checkpoint("mini", tmp_path, "float16") == weights.parent
    assert weights.stat().st_mtime_ns == before, "14 GB are written once"


def test_a_geometry_that_needs_another_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--geometry: got 'qwen2-vl-7b', expected one of mini, 100m, llava-1\.5-7b"):
        write_checkpoint("qwen2-vl-7b", tmp_path, "float16")
