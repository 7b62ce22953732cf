"""`sweep --dry-run`: kept tokens, questions, disk and time that hold against what real runs do, or are said to be unknown."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from stored import read_runs, units
from sweep_standin import StandIn, make_config, task_manager, write_tasks
from test_store import PROVENANCE, record

from vlm_pruner_eval.embedded import questions_path, tasks_path
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.store.schema import RunRecord
from vlm_pruner_eval.store.summaries import Spread, Times, Tokens
from vlm_pruner_eval.sweep import estimate
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import Run, expand
from vlm_pruner_eval.sweep.preview import Preview, preview, print_preview
from vlm_pruner_eval.sweep.runner import run_sweep

MODEL = {"id": "vlmpruner_llava", "pretrained": "somewhere/tiny", "visual_tokens": 576, "layers": 32}
MINIVLM = {"id": "vlmpruner_llava", "pretrained": "minivlm", "batch_size": 4, "device": "cpu", "visual_tokens": 576, "layers": 5}


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks of these sweeps are not in lmms-eval's index, which takes seconds to read."""
    monkeypatch.setattr("vlm_pruner_eval.sweep.preview._check_tasks", lambda config: None)


def kept(run_of: dict[str, Any] | str, *, rate: str = "8/9", layers: int | None = 32) -> tuple[int | None, float | None]:
    config = make_config(model=MODEL, pruning_rates=[rate], methods=[run_of])
    found = estimate.kept_tokens(expand(config)[1], 576, layers)
    return found.kept, found.layer_averaged


def test_kept_tokens_after_the_cut_and_on_average_over_layers() -> None:
    assert kept("vlmpruner") == (64, 96.0)  # (2 x 576 + 30 x 64) / 32
    assert kept("divprune") == (64, 64.0)
    assert kept("blind") == (0, 0.0)
    assert kept("downsample") == (64, 64.0)
    assert kept({"name": "divprune", "iso_layer": 2}) == (96, 96.0)
    assert kept({"name": "fastv", "budget": "layer_average"}, rate="2/3") == (166, pytest.approx((2 * 576 + 30 * 166) / 32))
    assert estimate.kept_tokens(expand(make_config(model=MODEL))[0], 576, 32) == estimate.Kept(576, 576.0)


def test_what_needs_the_number_of_layers_is_unknown_without_it() -> None:
    assert kept("vlmpruner", layers=None) == (64, None)
    assert kept({"name": "fastv", "budget": "layer_average"}, rate="2/3", layers=None) == (None, None)
    assert estimate.kept_tokens(expand(make_config())[1], None, 32) == estimate.Kept(None, None)


def test_a_budget_that_cannot_be_kept_is_refused_with_the_runs_key(tmp_path: Path) -> None:
    config = make_config(model=MODEL | {"layers": 4}, pruning_rates=["8/9"], methods=[{"name": "fastv", "budget": "layer_average"}])
    with pytest.raises(ConfigError, match=r"^fastv-8of9: budget=layer_average: an average share of 0.1111 over 4 layers can't be reached"):
        preview(config, tmp_path)


@pytest.mark.parametrize(
    ("tasks", "limit", "total", "is_exact"),
    [
        (["digitscenes_exist"], 10, 10, True),
        (["digitscenes_exist", "digitscenes_pairs"], 7, 14, True),
        (["digitscenes"], 3, 18, True),
        (["digitscenes", "digitscenes_exist"], 3, 18, True),
        (["digitscenes_exist", "gqa"], 10, 20, False),
        (["digitscenes_exist", "gqa"], None, None, False),
    ],
)
def test_questions_are_counted_where_no_download_is_needed(tasks: list[str], limit: int | None, total: int | None, is_exact: bool) -> None:
    found = estimate.count_questions(make_config(tasks=tasks, limit=limit))
    assert (found.total, found.is_exact) == (total, is_exact)


def test_packaged_questions_are_those_in_the_package() -> None:
    whole = estimate.count_questions(make_config(tasks=["digitscenes"], limit=None))
    assert whole.is_exact
    assert whole.total == pq.read_metadata(questions_path()).num_rows
    assert estimate.count_questions(make_config(tasks=["digitscenes"], limit=10**6)).total == whole.total


# ---- from earlier runs
def earlier(config: SweepConfig, run: Run, *, tokens: float = 1280.4, n: int = 10, **times: float | None) -> estimate.Earlier:
    told = {"total_s": 15.0, "answers_s": 10.0} | times
    made = PROVENANCE.model_copy(update={"model": {"layers": 28}})
    spread = Tokens(n_visual=Spread.of([tokens]))
    return estimate.Earlier(run.head, record(n_answers=n, times=Times(**told), tokens=spread, provenance=made))


def test_time_is_that_of_the_nearest_earlier_units_of_the_same_model() -> None:
    config = make_config(pruning_rates=["2/3", "8/9"], methods=["fastv", "dart"])
    runs = {run.key: run for run in expand(config)}
    assert estimate.pace(runs["fastv-2of3"], []) is None
    found = [earlier(config, runs["unpruned"], answers_s=14.0, total_s=15.0)]
    assert estimate.pace(runs["fastv-2of3"], found) == estimate.Pace(1.4, 1.0, "other methods")
    found += [earlier(config, runs["fastv-8of9"]), earlier(config, runs["fastv-8of9"], answers_s=12.0, total_s=13.0)]
    assert estimate.pace(runs["fastv-2of3"], found) == estimate.Pace(1.1, 3.0, "the same method")
    found.append(earlier(config, runs["fastv-2of3"], answers_s=9.0, total_s=9.5))
    assert estimate.pace(runs["fastv-2of3"], found) == estimate.Pace(0.9, 0.5, "the same method and rate")
    assert estimate.pace(runs["dart-8of9"], found).nearness == "other methods"


def test_units_of_another_model_and_units_that_shared_say_nothing_of_time() -> None:
    config, other = make_config(), make_config(model=MODEL | {"dtype": "float16"})
    shared = earlier(config, expand(config)[1], total_s=None, answers_s=None)
    assert estimate.pace(expand(config)[1], [shared, earlier(other, expand(other)[1])]) is None


def test_tokens_and_layers_come_from_the_file_or_from_earlier_unpruned_units() -> None:
    config = make_config(model={"id": "vlmpruner_qwen2_vl", "pretrained": "a/b"}, methods=["fastv"])
    first, second = expand(config)
    found = [earlier(config, second, tokens=5.0), earlier(config, first)]
    assert (estimate.visual_tokens(config, found), estimate.layers_of(config, found)) == (1280, 28)
    assert (estimate.visual_tokens(config, found[:1]), estimate.layers_of(config, [])) == (None, None)
    elsewhere = make_config(model={"id": "vlmpruner_qwen2_vl", "pretrained": "c/d"}, methods=["fastv"])
    assert estimate.visual_tokens(elsewhere, found) is None
    assert estimate.visual_tokens(make_config(model=MODEL), found) == 576


# ---- against real runs
def run(config: SweepConfig, output: Path, **options: Any) -> None:
    run_sweep(config, output, console=Console(file=io.StringIO()), **options)


def test_disk_and_questions_are_those_of_real_runs(tmp_path: Path) -> None:
    config = make_config(model=MINIVLM, tasks=["digitscenes_exist", "digitscenes_read"], methods=["fastv", "blind"], limit=4)
    output = tmp_path / "out"
    before = preview(config, output)
    assert (before.questions.total, before.questions.is_exact, before.seconds) == (8, True, None)
    run(config, output, task_manager=task_manager(tasks_path(), "vlmpruner_llava"))
    found = read_runs(output)
    for run_, expected in zip(before.runs, before.kept, strict=True):
        assert (found[run_.key].n_answers, found[run_.key].tokens.kept.mean) == (8, expected.kept)
        assert found[run_.key].tokens.layer_averaged.mean == pytest.approx(expected.layer_averaged)
        folders = [unit.folder for unit in units(output, run_.key).values()]
        bytes_ = sum((folder / name).stat().st_size for folder in folders for name in ("answers.jsonl", "scores.jsonl")) / 8
        assert bytes_ / 2 < estimate.sample_bytes(576, expected.kept) < bytes_ * 2, run_.key
    records = sum(path.stat().st_size for path in (output / "runs").rglob("*.json*"))
    assert records / 2 < before.disk.records < records * 2
    pictures = sum(path.stat().st_size for path in (output / "images").iterdir())
    assert 0 < pictures < before.disk.pictures
    longer = preview(make_config(**config.model_dump() | {"limit": 400, "methods": ["fastv", "blind"]}), output)
    assert set(longer.basis) == {"the same method and rate"}
    each, rest = zip(*[_seconds(record) for record in found.values()], strict=True)
    assert longer.seconds == pytest.approx(sum(each) * longer.questions.total + 2 * sum(rest))


def _seconds(record: RunRecord) -> tuple[float, float]:
    """Of a run's two units: seconds a question, and beside the questions."""
    times = [(unit.times, unit.n_answers) for unit in record.units.values()]
    each = sum(time.answers_s / n for time, n in times) / len(times)
    return each, sum(time.total_s - time.answers_s for time, _ in times) / len(times)


def shown(seen: Preview, width: int = 160) -> tuple[str, dict[str, Any]]:
    console = Console(file=io.StringIO(), width=width, record=True)
    print_preview(console, seen)
    return console.export_text(), json.loads(json.dumps(seen.as_json()))


def test_finished_runs_are_marked_and_not_estimated_again(tmp_path: Path) -> None:
    config = make_config(tasks=["tiny_mean"], methods=["uniform"])
    tasks = task_manager(write_tasks(tmp_path / "tasks"))
    run(config, tmp_path / "out", load=lambda *a, **k: StandIn(), task_manager=tasks)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    more = make_config(tasks=["tiny_mean"], methods=["uniform", "fastv"])
    text, line = shown(preview(more, tmp_path / "out"))
    assert line["runs"] == 3 and line["left"] == 1 and line["questions"] == 12 and line["questions_exact"]
    assert line["seconds"] > 0 and line["bytes"] > 12 * 900
    assert "12 a run, 12 in the 1 runs left" in text
    assert "(of the runs left 1 by other methods, as measured in this folder on " in text
    assert [row.split()[0] for row in text.splitlines() if row.rstrip().endswith("finished")] == ["unpruned", "uniform-2of3"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == files


def test_runs_can_be_told_apart_in_80_columns(tmp_path: Path) -> None:
    config = make_config(model=MODEL, pruning_rates=["8/9"], methods=[{"name": "random", "seeds": [0, 1, 2]}])
    seen = preview(config, tmp_path / "none")
    text, _ = shown(seen, width=80)
    assert all(sum(run.key in line.split() for line in text.splitlines()) == 1 for run in seen.runs)


def test_what_is_unknown_is_said_to_be(tmp_path: Path) -> None:
    config = make_config(model={"id": "vlmpruner_llava", "pretrained": "a/b"}, tasks=["gqa"], methods=["fastv"], limit=None)
    text, line = shown(preview(config, tmp_path / "none"))
    assert "questions unknown without the data sets" in text
    assert "time      unknown: run with --limit 8 first" in text
    assert "disk      unknown: set model.visual_tokens" in text
    assert (line["questions"], line["bytes"], line["seconds"]) == (None, None, None)
    known = make_config(model=MODEL, tasks=["gqa"], methods=["fastv"], limit=None)
    text, line = shown(preview(known, tmp_path / "none"))
    assert "if a run asked 1,000 questions" in text
    assert line["bytes"] is None, "a number for programs is never one of assumed questions"
    assert list(tmp_path.iterdir()) == []
