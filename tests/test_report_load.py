"""What must not stand in one table is refused with a sentence; what is lost is shown as lost."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sweep_standin import StandIn, make_config, task_manager, write_tasks

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.load import SAMPLES_MISSING, load_results
from vlm_pruner_eval.report.rows import rows_of
from vlm_pruner_eval.sweep import documents
from vlm_pruner_eval.sweep.runner import run_sweep

Record = dict[str, Any]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("load")
    model = StandIn()
    described = model.describe() | {"layers": 4}
    model.describe = lambda: described
    section = {"id": "vlmpruner_llava", "pretrained": "somewhere/tiny", "visual_tokens": 36, "layers": 4}
    methods = ["vlmpruner", {"name": "uniform", "layer": 0, "iso_layer": 2}, {"name": "random", "seeds": [0, 1]}, "blind"]
    config = make_config(model=section, methods=methods)
    tasks = task_manager(write_tasks(root / "tasks"))
    run_sweep(config, root / "sweep", console=Console(file=io.StringIO()), load=lambda *args, **kwargs: model, task_manager=tasks)
    return root / "sweep"


@pytest.fixture
def folder(sweep: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sweep, tmp_path / "sweep"))


def run_of(folder: Path, key: str) -> Path:
    (path,) = [path.parent for path in folder.glob("runs/*/run.json") if json.loads(path.read_text())["key"] == key]
    return path


def change_record(folder: Path, key: str, change: Callable[[Record], object]) -> None:
    path = run_of(folder, key) / "run.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def change_samples(folder: Path, key: str, change: Callable[[list[str]], list[str]]) -> None:
    path = run_of(folder, key) / "samples.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def refusal(folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(folder)
    assert not (folder / "report.md").exists()
    return list(caught.value.problems)


def test_a_whole_sweep_is_read_with_its_splits_and_parameters(folder: Path) -> None:
    results = load_results(folder)
    assert results.splits == {"tiny_mean": "test", "tiny_pairs": "test"}
    assert results.notes == ()
    row = next(row for row in rows_of(results) if row.method == "vlmpruner")
    assert (row.params["pivots"], row.changed, row.release) == (4, {}, False)
    assert row.runs == (run_of(folder, "vlmpruner-2of3").name,)
    random = next(row for row in rows_of(results) if row.method == "random")
    assert (len(random.runs), "seed" in random.params) == (2, False)


def test_an_iso_compute_row_stands_under_the_rate_that_was_asked_and_says_what_it_removes(folder: Path) -> None:
    rows = rows_of(load_results(folder))
    iso = next(row for row in rows if row.iso_layer is not None)
    # (2 + 2 x 1/3) / 4 = 2/3 is kept
    assert (iso.label, iso.pruning_rate, iso.asked_rate, round(iso.percent, 1)) == ("uniform (iso-compute)", "1/3", "2/3", 33.3)
    assert [row.label for row in rows if row.heading == "66.7 % removed (2/3)"] == ["vlmpruner", "uniform (iso-compute)", "random"]
    text = build(folder)["md"].read_text()
    assert (
        "uniform (iso-compute), listed under 66.7 %: removes 33.3 %, so that it keeps in every layer what a method that prunes at" in text
    )


# ---- missing samples
def test_without_its_answers_a_run_is_not_run_and_enters_nothing(folder: Path) -> None:
    before = {row.label: row for row in rows_of(load_results(folder))}
    (run_of(folder, "vlmpruner-2of3") / "samples.jsonl").unlink()
    results = load_results(folder)
    after = {row.label: row for row in rows_of(results)}
    assert (after["vlmpruner"].status, after["vlmpruner"].cells, after["vlmpruner"].relative.value) == (SAMPLES_MISSING, {}, None)
    assert {label for label in before if before[label] != after[label]} == {"vlmpruner"}
    assert results.notes == (
        "The answers (samples.jsonl) of vlmpruner-2of3 are missing, so nothing of them is shown; run the sweep again.",
    )
    assert "| vlmpruner | not run: samples missing | not run: samples missing | n/a |" in build(folder)["md"].read_text()


def test_one_lost_seed_is_counted(folder: Path) -> None:
    (run_of(folder, "random-2of3-seed1") / "samples.jsonl").unlink()
    row = next(row for row in rows_of(load_results(folder)) if row.method == "random")
    assert (row.status, row.cells["tiny_mean"].seeds) == ("1 of 2 seeds finished", 1)


@pytest.mark.parametrize(
    ("change", "got"),
    [(lambda lines: lines[:-1], "holds 23 answers, expected 24"), (lambda lines: [*lines[:-1], lines[-1][:40]], "1 lines are cut off")],
)
def test_answers_that_are_incomplete_are_refused(folder: Path, change: Callable[[list[str]], list[str]], got: str) -> None:
    change_samples(folder, "vlmpruner-2of3", change)
    (problem, *_) = refusal(folder)
    assert problem.startswith("vlmpruner-2of3: samples.jsonl holds 23 answers")
    assert got in problem
    assert "samples are missing; delete the run's folder and run the sweep again." in problem


# ---- other documents
def test_different_document_sets_are_refused(folder: Path) -> None:
    def rename(lines: list[str]) -> list[str]:
        return [line.replace('"doc_id": 3,', '"doc_id": 99,') if '"tiny_mean"' in line else line for line in lines]

    change_samples(folder, "vlmpruner-2of3", rename)
    assert refusal(folder) == [
        "vlmpruner-2of3: answered other documents of tiny_mean than unpruned (2 are on one side only, the first is 3); "
        "differences would not be paired: run one of them again."
    ]


def test_lines_that_another_program_wrote_are_read_all_the_same(folder: Path) -> None:
    def reorder(lines: list[str]) -> list[str]:
        return [json.dumps(dict(reversed(json.loads(line).items()))) + "\n" for line in lines]

    change_samples(folder, "vlmpruner-2of3", reorder)
    assert load_results(folder).notes == ()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda record: record["documents"].update(tiny_mean="0" * 16),
            "vlmpruner-2of3: the documents of tiny_mean have another content than those of unpruned: another revision of the data set;",
        ),
        (
            lambda record: record["tasks"]["tiny_pairs"]["clusters"].update(digest="0"),
            "vlmpruner-2of3: the images of tiny_pairs have another content than those of unpruned: another revision of the data set;",
        ),
        (lambda record: record["config"]["model"].update(revision="v2"), 'vlmpruner-2of3: has model.revision "v2", but unpruned has null;'),
    ],
)
def test_another_revision_of_data_or_model_is_refused(folder: Path, change: Callable[[Record], object], sentence: str) -> None:
    change_record(folder, "vlmpruner-2of3", change)
    (problem,) = refusal(folder)
    assert problem.startswith(sentence)


def test_the_fingerprint_is_of_what_the_documents_say() -> None:
    class Picture:
        pass

    rows = [{"doc_id": i, "doc": {"question": f"q{i}", "image": Picture(), "options": ["a", "b"]}, "target": "a"} for i in range(3)]
    digest = documents.fingerprints({"t": rows})
    assert documents.fingerprints({"t": rows[::-1]}) == digest, "the order is that of the log"
    assert documents.fingerprints({"t": [*rows, rows[0]]}) == digest, "a second filter logs a document twice"
    for change in ({"target": "b"}, {"doc": {"question": "other"}}, {"doc_id": 9}):
        assert documents.fingerprints({"t": [rows[0] | change, *rows[1:]]}) != digest
    assert documents.fingerprints({"t": [row | {"doc": row["doc"] | {"image": Picture()}} for row in rows]}) == digest


def test_a_sweep_records_the_fingerprint_of_every_task(folder: Path) -> None:
    held = {json.loads(path.read_text())["documents"]["tiny_mean"] for path in folder.glob("runs/*/run.json")}
    assert len(held) == 1
    assert all(len(digest) == 16 for digest in held)


# ---- two runs with the same id
def test_a_copied_run_is_refused(folder: Path) -> None:
    original = run_of(folder, "vlmpruner-2of3")
    shutil.copytree(original, original.with_name("vlmpruner-copy"))
    assert refusal(folder) == [
        f"runs/vlmpruner-copy: holds the record of {original.name!r}: two runs with the same id; delete the copy, or move it away."
    ]


def test_a_grid_that_lists_a_run_twice_is_refused(folder: Path) -> None:
    path = folder / "sweep.json"
    grid = json.loads(path.read_text())
    grid["runs"].append(grid["runs"][1])
    path.write_text(json.dumps(grid))
    problems = refusal(folder)
    assert problems[0].startswith("sweep.json: lists 2 runs with the run_id 'vlmpruner-2of3-")
    assert problems[1].startswith("sweep.json: lists 2 runs with the key 'vlmpruner-2of3'")


# ---- two meanings of a budget
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("budget", "layer_average", "random-2of3-seed0: has budget kept, but vlmpruner-2of3 has layer_average; a table does not mix"),
        ("scope", "per_sample", "uniform-iso-compute-2of3: has scope per_image, but vlmpruner-2of3 has per_sample; a table does not mix"),
    ],
)
def test_two_meanings_of_a_budget_are_refused(folder: Path, name: str, value: str, sentence: str) -> None:
    path = folder / "sweep.json"
    grid = json.loads(path.read_text())
    grid["runs"][1]["parameters"][name] = value
    path.write_text(json.dumps(grid))
    assert refusal(folder)[0].startswith(sentence)


def test_a_wrong_number_of_layers_is_refused_before_anything_runs(tmp_path: Path) -> None:
    class Deeper(StandIn):
        def describe(self) -> dict[str, object]:
            return super().describe() | {"layers": 40}

    section = {"id": "vlmpruner_llava", "pretrained": "somewhere/tiny", "visual_tokens": 36, "layers": 32}
    tasks = task_manager(write_tasks(tmp_path / "tasks"))
    with pytest.raises(ConfigError, match=r"model.layers: got 32, but somewhere/tiny has 40 decoder layers; write 40."):
        run_sweep(make_config(model=section), tmp_path / "out", load=lambda *args, **kwargs: Deeper(), task_manager=tasks)
    assert not (tmp_path / "out").exists()
