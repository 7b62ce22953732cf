"""Results as pandas tables: a row a run, a score, an answer, as the files hold them."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from rich.console import Console
from stored import answers, read_runs, scores
from sweep_standin import N_VISUAL, Behaviour, StandIn, make_config, task_manager, write_tasks

import vlm_pruner_eval
from vlm_pruner_eval import ConfigError, load_results, run_sweep
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.frames import Frames

RAW: dict[str, Any] = {
    "name": "tiny",
    "model": {"id": "vlmpruner_llava", "pretrained": "somewhere/tiny", "visual_tokens": N_VISUAL},
    "tasks": ["tiny_mean", "tiny_pairs"],
    "pruning_rates": ["2/3"],
    "methods": ["vlmpruner", {"name": "random", "seeds": [3]}, "blind"],
    "limit": 6,
    "gallery": 0,
}
NAMED = ["run", "method", "label", "seed", "pruning_rate"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def sweep(config: SweepConfig | Mapping[str, Any] | Path | str, output: Path, tasks: Path, behaviour: Behaviour | None = None) -> None:
    console = Console(file=io.StringIO())
    run_sweep(config, output, console=console, load=lambda *a, **k: StandIn(behaviour), task_manager=task_manager(tasks))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, tasks: Path) -> Path:
    folder = tmp_path_factory.mktemp("frames") / "out"
    sweep(RAW, folder, tasks, Behaviour(fail={("random", 2)}))
    return folder


@pytest.fixture(scope="module")
def frames(output: Path) -> Frames:
    return load_results(output)


def test_the_names_are_public() -> None:
    assert {"load_results", "run_sweep"} <= set(vlm_pruner_eval.__all__)


def test_a_run_a_row(frames: Frames, output: Path) -> None:
    runs = frames.runs.set_index("run")
    assert list(runs.index) == ["unpruned", "vlmpruner-2of3", "random-2of3-seed3", "blind"]
    assert runs["pruning_rate"].tolist() == [0.0, pytest.approx(2 / 3), pytest.approx(2 / 3), 1.0]
    assert runs["seed"].dropna().to_dict() == {"random-2of3-seed3": 3}
    assert runs["status"].tolist() == ["finished", "finished", "failed", "finished"]
    assert "1 of 6 samples failed" in runs.loc["random-2of3-seed3", "problem"]
    assert runs.loc["unpruned", ["n_visual", "kept"]].tolist() == [N_VISUAL, N_VISUAL]
    assert runs["kept"].tolist() == [36, 12, 12, 0] and runs["answers"].tolist() == [12] * 4
    assert runs["prefill_ms"].tolist() == [20.0] * 4 and runs["selection_ms"].tolist() == [0.5] * 4
    assert runs.loc["vlmpruner-2of3", "parameters"]["threshold"] == 0.8
    assert all(pd.api.types.is_float_dtype(runs[name]) for name in ("pruning_rate", "kept", "layer_averaged", "decode_ms"))
    assert runs["run_id"].tolist() == [record.line.run_id for record in read_runs(output).values()]


def test_a_score_a_row_a_run_and_benchmark(frames: Frames, output: Path) -> None:
    assert list(frames.scores) == [*NAMED, "task", "metric", "value", "low", "high", "n"]
    table = frames.scores.set_index(["run", "task"])
    for key, record in read_runs(output).items():
        for task, score in record.scores.items():
            assert table.loc[(key, task), ["value", "low", "high", "n"]].tolist() == [
                getattr(score.main, x) for x in ("value", "low", "high", "n")
            ]
    assert len(table) == sum(len(record.scores) for record in read_runs(output).values()) >= 6
    assert pd.api.types.is_float_dtype(table["value"]) and pd.api.types.is_integer_dtype(table["n"])


def test_an_answer_a_row(frames: Frames, output: Path) -> None:
    assert frames.answers.shape[0] == 4 * 12 and set(NAMED) <= set(frames.answers)
    for key, table in frames.answers.sort_values(["run", "task", "doc_id"]).groupby("run"):
        kept, found = answers(output, key), {(score.task, score.doc_id): score for score in scores(output, key)}
        assert table["answer"].tolist() == [answer.answer for answer in kept]
        assert table["n_kept"].dropna().tolist() == [answer.record.n_kept for answer in kept if answer.record]
        assert table["images"].tolist() == [list(answer.images) for answer in kept]
        assert table["target"].tolist() == [found[answer.task, answer.doc_id].target for answer in kept]
    failed = frames.answers[frames.answers["error"].notna()]
    assert failed[["run", "task", "doc_id"]].values.tolist() == [["random-2of3-seed3", task, 2] for task in RAW["tasks"]]
    assert failed["n_kept"].isna().all() and "PruningError" in failed["error"].iloc[0]
    means = frames.answers[frames.answers["task"] == "tiny_mean"].groupby("run")["score"].mean()
    table = frames.scores[frames.scores["task"] == "tiny_mean"].set_index("run")["value"]
    for key in table.index:
        assert means[key] == pytest.approx(table[key])


def test_targets_are_text_and_keep_their_zeros(tasks: Path, tmp_path: Path) -> None:
    """OCR asks for "0139", which is no number; a task with numbers for targets gives text, too."""
    sweep(RAW | {"methods": ["blind"], "tasks": ["tiny_mean"]}, tmp_path / "out", tasks)
    (path, *_) = (tmp_path / "out").rglob("scores.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        "".join([lines[0].replace('"target": "no"', '"target": "0139"'), lines[1].replace('"target": "yes"', '"target": 7'), *lines[2:]])
    )
    found = load_results(tmp_path / "out")
    key = found.runs.set_index("run_id").loc[path.parents[1].name, "run"]
    targets = found.answers.loc[found.answers["run"] == key, "target"]
    assert targets.iloc[:2].tolist() == ["0139", "7"]


def test_what_is_not_finished_is_a_row_without_numbers(tasks: Path, tmp_path: Path) -> None:
    sweep(RAW, tmp_path / "out", tasks)
    folder = {
        line.key: tmp_path / "out" / "runs" / line.run_id for line in [record.line for record in read_runs(tmp_path / "out").values()]
    }
    for path in folder["blind"].rglob("record.json"):
        path.unlink()
    next(folder["vlmpruner-2of3"].rglob("record.json")).unlink()
    found = load_results(tmp_path / "out")
    runs = found.runs.set_index("run")
    assert runs["status"].to_dict() == {
        "unpruned": "finished",
        "vlmpruner-2of3": "unfinished",
        "random-2of3-seed3": "finished",
        "blind": "not run",
    }
    assert runs.loc["blind", ["kept", "answers", "prefill_ms"]].isna().all()
    assert found.scores.groupby("run").size().to_dict() == {"unpruned": 2, "vlmpruner-2of3": 1, "random-2of3-seed3": 2}
    assert found.answers.groupby("run").size().to_dict() == {"unpruned": 12, "vlmpruner-2of3": 6, "random-2of3-seed3": 12}


def test_a_smaller_limit_shows_no_answer_beyond_it(tasks: Path, tmp_path: Path) -> None:
    sweep(RAW, tmp_path / "out", tasks)
    sweep(RAW | {"limit": 4}, tmp_path / "out", tasks)
    found = load_results(tmp_path / "out")
    assert len(found.answers) == 4 * 8 and found.answers["doc_id"].max() == 3
    assert found.answers["score"].notna().all()


def test_a_sweep_is_given_as_a_mapping_a_path_or_what_was_read(tasks: Path, tmp_path: Path) -> None:
    raw = RAW | {"methods": ["blind"]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(raw))
    given = [raw, tmp_path / "sweep.yaml", str(tmp_path / "sweep.yaml"), make_config(**raw)]
    found = []
    for number, config in enumerate(given):
        sweep(config, tmp_path / str(number), tasks)
        found.append(load_results(tmp_path / str(number)).scores)
    for table in found[1:]:
        pd.testing.assert_frame_equal(table, found[0])
    for bad in (raw | {"taks": []}, str(tmp_path / "nowhere.yaml")):
        with pytest.raises(ConfigError, match=r"taks: is an unknown key|can't be read"):
            sweep(bad, tmp_path / "bad", tasks)
    assert not (tmp_path / "bad").exists()


def test_a_folder_without_results_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no sweep"):
        load_results(tmp_path)
