"""What must not stand in one table is refused with a sentence; what is lost is shown as lost."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_sweeps import configure, edit, edit_grid, markdown_of
from rich.console import Console
from sweep_standin import StandIn, make_config, task_manager, write_tasks

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.load import ANSWERS_MISSING, NOT_RUN, load_sweep
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
    (path,) = folder.glob(f"runs/{key}-??????????")
    return path


def refusal(folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(folder)
    assert not (folder / "report.md").exists()
    return list(caught.value.problems)


def test_a_whole_sweep_is_read_with_its_splits_and_parameters(folder: Path) -> None:
    results = load_sweep(folder)
    assert results.splits == {"tiny_mean": "test", "tiny_pairs": "test"}
    assert results.notes == ()
    row = next(row for row in rows_of(results) if row.method == "vlmpruner")
    assert (row.params["pivots"], row.changed, row.release) == (4, {}, False)
    assert row.runs == (run_of(folder, "vlmpruner-2of3").name,)
    random = next(row for row in rows_of(results) if row.method == "random")
    assert (len(random.runs), "seed" in random.params) == (2, False)


def test_an_iso_compute_row_stands_under_the_rate_that_was_asked_and_says_what_it_removes(folder: Path) -> None:
    rows = rows_of(load_sweep(folder))
    iso = next(row for row in rows if row.iso_layer is not None)
    # (2 + 2 x 1/3) / 4 = 2/3 is kept
    assert (iso.label, iso.pruning_rate, iso.asked_rate, round(iso.percent, 1)) == ("uniform (iso-compute)", "1/3", "2/3", 33.3)
    assert [row.label for row in rows if row.heading == "66.7 % removed (2/3)"] == ["vlmpruner", "uniform (iso-compute)", "random"]
    text = markdown_of(folder)
    assert (
        "uniform (iso-compute), listed under 66.7 %: removes 33.3 %, so that it keeps in every layer what a method that prunes at" in text
    )


# ---- missing answers
def test_without_its_answers_a_run_is_not_run_and_enters_nothing(folder: Path) -> None:
    before = {row.label: row for row in rows_of(load_sweep(folder))}
    (run_of(folder, "vlmpruner-2of3") / "tiny_pairs" / "answers.jsonl").unlink()  # of one task
    results = load_sweep(folder)
    after = {row.label: row for row in rows_of(results)}
    assert (after["vlmpruner"].status, after["vlmpruner"].cells, after["vlmpruner"].relative.value) == (ANSWERS_MISSING, {}, None)
    assert {label for label in before if before[label] != after[label]} == {"vlmpruner"}
    (note,) = results.notes
    assert re.search(r"answers\.jsonl\) of vlmpruner-2of3 are missing.* run the sweep again", note)
    assert "| vlmpruner | not run: answers missing | not run: answers missing | n/a |" in markdown_of(folder)


def test_one_lost_seed_is_counted(folder: Path) -> None:
    (run_of(folder, "random-2of3-seed1") / "tiny_mean" / "answers.jsonl").unlink()
    row = next(row for row in rows_of(load_sweep(folder)) if row.method == "random")
    assert (row.status, row.cells["tiny_mean"].seeds) == ("1 of 2 seeds finished", 1)


@pytest.mark.parametrize(
    "lose",
    [
        lambda run: (run / "tiny_pairs" / "record.json").unlink(),
        lambda run: shutil.rmtree(run / "tiny_pairs"),
        lambda run: (run / "run.json").unlink(),
        lambda run: edit(run.parent.parent, run.name, lambda record: record.update(limit=5), "tiny_pairs"),
    ],
)
def test_a_run_that_lacks_a_task_is_not_run(folder: Path, lose: Callable[[Path], object]) -> None:
    lose(run_of(folder, "vlmpruner-2of3"))
    results = load_sweep(folder)
    assert results.not_run == ["vlmpruner-2of3"]
    row = next(row for row in rows_of(results) if row.method == "vlmpruner")
    assert (row.status, row.cells) == (NOT_RUN, {})


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("record.json", '{"schema": 2}', "got schema 2, expected 3: .*another version"),
        ("record.json", "{}", "no schema number"),
        ("record.json", "[1", "can't be read"),
        ("draws.json", "[]", "can't be read"),
        ("scores.jsonl", "{\n", "line 1: can't be read"),
        ("scores.jsonl", "{}\n", "line 1: can't be read \\(task: Field required"),
        ("scores.jsonl", "[]\n", "line 1: can't be read"),
        ("scores.jsonl", None, "can't be read"),
    ],
)
def test_a_file_that_is_not_what_was_written_is_refused(folder: Path, name: str, content: str | None, facts: str) -> None:
    path = run_of(folder, "vlmpruner-2of3") / "tiny_mean" / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    (problem,) = refusal(folder)
    assert problem.startswith(f"{path}")
    assert re.search(facts, problem) and "run the sweep again" in problem


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda record: record.update(surprise=1), "surprise: Extra inputs are not permitted"),
        (lambda record: record.update(status="perhaps"), "status: .*finished.*failed"),
        (lambda record: record["tokens"].update(quirks=["stall"]), "tokens.quirks"),
        (lambda record: record.pop("provenance"), "provenance: Field required"),
    ],
)
def test_fields_that_nobody_knows_or_that_are_missing_are_refused(folder: Path, change: Callable[[Record], object], facts: str) -> None:
    edit(folder, "vlmpruner-2of3", change, "tiny_mean")
    (problem,) = refusal(folder)
    assert re.search(rf"vlmpruner-2of3-.*record\.json: {facts}", problem)


# ---- what a table does not mix
@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda config: config["model"].update(revision="v2"), 'model.revision "v2", but unpruned has null'),
        (lambda config: config["model"].update(protocol="paper"), 'model.protocol "paper".*"hf"'),
        (lambda config: config["model"].update(pretrained="other"), 'model.pretrained "other"'),
        (lambda config: config.update(seed=7), "seed 7, but unpruned has 0"),
        (lambda config: config.update(results_version=0), "results_version 0"),
    ],
)
def test_other_settings_are_refused(folder: Path, change: Callable[[Record], object], facts: str) -> None:
    configure(folder, "vlmpruner-2of3", change)
    (problem,) = refusal(folder)
    assert re.search(rf"^vlmpruner-2of3: has {facts}.*do not belong in one table", problem)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (
            lambda record: record["documents"].update(tiny_mean="0" * 16),
            "the documents of tiny_mean have another content than those of unpruned",
        ),
        (
            lambda record: _score(record)["clusters"].update(digest="0"),
            "the images of tiny_mean have another content than those of unpruned",
        ),
        (lambda record: _score(record)["main"].update(n=11), "tiny_mean has 11 documents, but unpruned has 12"),
    ],
)
def test_other_documents_are_refused(folder: Path, change: Callable[[Record], object], facts: str) -> None:
    edit(folder, "vlmpruner-2of3", change, "tiny_mean")
    (problem,) = refusal(folder)
    assert problem.startswith(f"vlmpruner-2of3: {facts}")


def _score(record: Record) -> Record:
    return record["scores"]["tiny_mean"]


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
    held = {run.record.documents["tiny_mean"] for run in load_sweep(folder).runs}
    assert len(held) == 1
    assert all(len(digest) == 16 for digest in held)


# ---- names and ids
def test_a_run_in_the_folder_of_another_is_refused(folder: Path) -> None:
    original, other = run_of(folder, "vlmpruner-2of3"), run_of(folder, "blind")
    shutil.copy(original / "run.json", other / "run.json")
    (problem,) = refusal(folder)
    assert re.search(rf"{other.name}/run\.json: holds the record of {original.name!r}: two runs with the same id; delete the copy", problem)


def test_a_copied_run_enters_nothing(folder: Path) -> None:
    original = run_of(folder, "vlmpruner-2of3")
    rows = rows_of(load_sweep(folder))
    shutil.copytree(original, original.with_name("vlmpruner-copy"))
    results = load_sweep(folder)
    assert rows_of(results) == rows
    assert "1 older runs" in results.notes[0] and "left out" in results.notes[0]


def test_a_grid_that_lists_a_run_twice_is_refused(folder: Path) -> None:
    edit_grid(folder, lambda grid: grid["runs"].append(grid["runs"][1]))
    problems = refusal(folder)
    assert problems[0].startswith("sweep.json: lists 2 runs with the run_id 'vlmpruner-2of3-")
    assert problems[1].startswith("sweep.json: lists 2 runs with the key 'vlmpruner-2of3'")


# ---- two meanings of a budget
@pytest.mark.parametrize(
    ("name", "value", "facts"),
    [
        ("budget", "layer_average", "random-2of3-seed0: has budget kept, but vlmpruner-2of3 has layer_average"),
        ("scope", "per_sample", "uniform-iso-compute-2of3: has scope per_image, but vlmpruner-2of3 has per_sample"),
    ],
)
def test_two_meanings_of_a_budget_are_refused(folder: Path, name: str, value: str, facts: str) -> None:
    edit_grid(folder, lambda grid: grid["runs"][1]["parameters"].update({name: value}))
    assert refusal(folder)[0].startswith(facts)


def test_a_wrong_number_of_layers_is_refused_before_anything_runs(tmp_path: Path) -> None:
    class Deeper(StandIn):
        def describe(self) -> dict[str, object]:
            return super().describe() | {"layers": 40}

    section = {"id": "vlmpruner_llava", "pretrained": "somewhere/tiny", "visual_tokens": 36, "layers": 32}
    tasks = task_manager(write_tasks(tmp_path / "tasks"))
    with pytest.raises(ConfigError, match=r"model.layers: got 32, but somewhere/tiny has 40 decoder layers; write 40."):
        run_sweep(make_config(model=section), tmp_path / "out", load=lambda *args, **kwargs: Deeper(), task_manager=tasks)
    assert not (tmp_path / "out").exists()
