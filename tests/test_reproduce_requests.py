"""What `reproduce` is asked and can't do: a sentence, before anything is loaded or written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from reproduce_standin import Loads, call, empty_folder, install_loads, write
from sweep_standin import Behaviour

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.reproduce import plan
from vlm_pruner_eval.reproduce.plan import make_plan


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from empty_folder(tmp_path, monkeypatch)


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loads:
    return install_loads(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "llava-1.5-7"], "model: got 'llava-1.5-7', which is none of the paper's; did you mean 'llava-1.5-7b'?"),
        ([], "got neither of --model and --config"),
        (["--model", "llava-1.5-7b", "--config", "FILE"], "got both of --model and --config"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: can't be read as a text file"),
        (
            ["--config", "FILE", "--tasks", "tiny_men"],
            "tasks: got 'tiny_men', which the sweep file does not hold; did you mean 'tiny_mean'?",
        ),
        (["--config", "FILE", "--tasks", "tiny_mean,tiny_mean"], "tasks: got tiny_mean,tiny_mean, expected each task once"),
        (["--config", "FILE", "--method", "dart"], "method: got 'dart', which the sweep file does not hold; Known: fastv, vlmpruner."),
        (["--config", "FILE", "--batch-sizes", "0"], "batch-sizes: got '0', expected whole numbers, 1 or more"),
        (["--config", "FILE", "--batch-sizes", "1,1"], "batch-sizes: got 1,1, expected each value once"),
        (["--config", "FILE", "--batch-sizes", ","], "batch-sizes: got nothing"),
        (["--config", "FILE", "--attention", "spda"], "attention: got 'spda', which is unknown; did you mean 'sdpa'?"),
        (["--config", "FILE", "--attention", "sdpa,flash_attention_2"], "but flash-attn is not installed"),
        (["--config", "FILE", "--limit", "0"], "limit: got 0 (int), expected a whole number of questions per task"),
        (["--config", "FILE", "--pretrained", ""], "pretrained: got an empty text"),
        (["--config", "FILE", "--output", "TAKEN"], "is not a folder; choose another folder with --output"),
    ],
)
def test_bad_input_is_a_sentence_and_nothing_is_written(
    tmp_path: Path, here: Path, loads: Loads, monkeypatch: pytest.MonkeyPatch, options: list[str], sentence: str
) -> None:
    monkeypatch.setattr(plan, "_has_flash_attention", lambda: False)
    (tmp_path / "taken").write_text("mine")
    places = {"FILE": write(tmp_path), "TAKEN": tmp_path / "taken"}
    result = call(*(places.get(option, option) for option in options))
    assert result.exit_code == 2, result.output
    assert sentence in result.output
    assert "Traceback" not in result.output
    assert (os.listdir(here), loads.names) == ([], [])


def test_all_problems_of_a_request_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(config=write(tmp_path), tasks="a", methods=["b"], batch_sizes="0", attention="c")
    assert len(caught.value.problems) == 4


def test_methods_that_the_model_refuses_come_up_before_the_noise_floor_is_run(tmp_path: Path, here: Path, loads: Loads) -> None:
    loads.behaviours = {"batch1-sdpa": Behaviour(refuse={"fastv"})}
    result = call("--config", write(tmp_path))
    assert result.exit_code == 2
    assert "fastv-2of3: layer: got 99" in result.output
    assert os.listdir(here) == []
    del result  # its traceback holds the model
    assert call("--config", write(tmp_path), "--method", "vlmpruner").exit_code == 0


def test_without_the_repository_a_sentence_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "REPOSITORY", tmp_path)
    result = call("--model", "llava-1.5-7b")
    assert result.exit_code == 2
    assert "installed without its repository" in result.output
    assert "--config FILE" in result.output
