"""`sweep status`: what the files of a sweep say of every run, while it runs, after a crash, and where they are damaged."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from sweep_standin import Behaviour, StandIn, make_config, task_manager, write_tasks
from typer.testing import CliRunner
from vlm_pruner_eval.lmms.journal import Journal
from vlm_pruner_eval.lmms.lines import encode

from vlm_pruner_eval.cli import app
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.grid import expand
from vlm_pruner_eval.sweep.runner import run_sweep
from vlm_pruner_eval.sweep.status import SweepStatus, print_status, read_status

CONFIG = make_config(tasks=["tiny_mean"], methods=["vlmpruner", "fastv", "uniform", "blind"], limit=6)
HOLDER = "process 4711 on host node7"


def nobody(directory: Path) -> None:
    return None


def somebody(directory: Path) -> Any:
    """Holds the sweep's directory, but no single run."""
    return HOLDER if (directory / "sweep.json").exists() else None


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpruned run finished, vlmpruner failed, fastv half done after 4 of 6 answers, the others not begun."""
    folder = tmp_path_factory.mktemp("interrupted")
    tasks, append, left = task_manager(write_tasks(folder / "tasks")), Journal.append, [16]

    def interrupting(self: Journal, *args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        append(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "append", interrupting)
        with pytest.raises(KeyboardInterrupt):
            behaviour = Behaviour(fail={("vlmpruner", 3)})
            run_sweep(
                CONFIG, folder / "out", console=Console(file=io.StringIO()), load=lambda *a, **k: StandIn(behaviour), task_manager=tasks
            )
    return folder / "out"


@pytest.fixture
def output(interrupted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted, tmp_path / "out"))


def folder_of(output: Path, key: str) -> Path:
    return next((output / "runs").glob(f"{key}-*"))


def states(status: SweepStatus) -> dict[str, tuple[str, int, int | None]]:
    return {run.key: (run.state, run.answers, run.expected) for run in status.runs}


def test_every_run_has_a_state_and_its_answers(output: Path) -> None:
    status = read_status(output, nobody)
    assert states(status) == {
        "unpruned": ("finished", 6, 6),
        "vlmpruner-2of3": ("failed", 6, 6),
        "fastv-2of3": ("half done", 4, 6),
        "uniform-2of3": ("not begun", 0, 6),
        "blind": ("not begun", 0, 6),
    }
    assert status.runs[1].problem.startswith("1 of 6 samples failed")
    assert status.runs[0].scores.startswith("tiny_mean ") and not status.runs[2].scores
    told = status.as_json()
    seconds = status.runs[0].seconds / 6  # an answer
    assert told.pop("seconds_left") == pytest.approx((2 + 6 + 6) * seconds), "failed runs are not repeated by themselves"
    assert told == {
        "name": "tiny",
        "runs": 5,
        "finished": 1,
        "failed": 1,
        "running": 0,
        "half_done": 1,
        "damaged": 0,
        "not_begun": 2,
        "answers": 16,
        "expected": 30,
        "held_by": None,
    }


def test_what_a_process_is_at_work_on_is_running(output: Path) -> None:
    status = read_status(output, somebody)
    assert status.held_by == HOLDER
    assert states(status)["fastv-2of3"] == ("running", 4, 6)
    assert status.counts["half done"] == 0


def test_of_two_half_runs_the_one_written_last_is_running_unless_they_share(output: Path) -> None:
    other = output / "runs" / expand(CONFIG)[3].run_id
    shutil.copytree(folder_of(output, "fastv"), other)
    os.utime(other / "journal.jsonl", (1, 1))
    found = states(read_status(output, somebody))
    assert (found["fastv-2of3"][0], found["uniform-2of3"][0]) == ("running", "half done")
    grid = json.loads((output / "sweep.json").read_text())
    grid["config"]["share_prefix"] = True
    (output / "sweep.json").write_text(json.dumps(grid))
    assert read_status(output, somebody).counts["running"] == 2


def test_a_run_that_a_process_claimed_is_running_before_its_first_answer(output: Path) -> None:
    claimed = output / "runs" / expand(CONFIG)[4].run_id
    claimed.mkdir()
    status = read_status(output, lambda directory: HOLDER if directory == claimed else None)
    assert states(status)["blind"] == ("running", 0, 6)
    assert states(status)["fastv-2of3"][0] == "half done"
    assert status.held_by is None


def test_a_failed_run_that_is_tried_again_is_running_while_a_process_is_at_it(output: Path) -> None:
    folder = folder_of(output, "vlmpruner")
    shutil.rmtree(folder_of(output, "fastv"))
    journal = (folder / "journal.jsonl").open("wb")
    with journal:
        journal.write(encode({"call": "generate_until", "requests": [0, 1], "seconds": 1.0, "answers": [{}, {}]}))
    os.utime(folder / "run.json", (1, 1))
    assert states(read_status(output, somebody))["vlmpruner-2of3"] == ("running", 2, 6)
    assert states(read_status(output, nobody))["vlmpruner-2of3"] == ("failed", 6, 6)
    os.utime(folder / "journal.jsonl", (0, 0))
    assert states(read_status(output, somebody))["vlmpruner-2of3"][0] == "failed"
    claimed = states(read_status(output, lambda directory: HOLDER if directory == folder else None))
    assert claimed["vlmpruner-2of3"] == ("running", 2, 6)


def test_how_much_is_expected_comes_from_the_journal_where_nothing_is_finished(output: Path) -> None:
    for key in ("unpruned", "vlmpruner"):
        shutil.rmtree(folder_of(output, key))
    assert states(read_status(output, nobody))["fastv-2of3"] == ("half done", 4, 6)
    shutil.rmtree(folder_of(output, "fastv"))
    status = read_status(output, nobody)
    assert {run.expected for run in status.runs} == {None}
    assert status.as_json()["expected"] is None


def test_parts_of_a_run_are_counted_together_and_once(output: Path) -> None:
    folder = folder_of(output, "fastv")
    part = folder / "journal.2of2.jsonl"
    shutil.copy(folder / "journal.jsonl", part)
    with part.open("ab") as file:
        file.write(encode({"call": "generate_until", "requests": [5], "seconds": 1.0, "answers": [{}]}))
        file.write(b'{"crc": "00000000", "entr')  # a line that a crash cut
    assert states(read_status(output, nobody))["fastv-2of3"] == ("half done", 5, 6)


@pytest.mark.parametrize("damage", ["journal", "record", "samples"])
def test_damage_is_shown_with_its_place_and_the_rest_is_read(output: Path, damage: str) -> None:
    key, sentence = "unpruned", "its record can't be read or its samples.jsonl is missing"
    if damage == "journal":
        key, sentence = "fastv-2of3", "journal.jsonl, line 3: got a line that does not fit its checksum"
        path = folder_of(output, "fastv") / "journal.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        lines[2] = lines[2].replace(b"doc_id", b"dox_id")
        path.write_bytes(b"".join(lines))
    elif damage == "record":
        (folder_of(output, key) / "run.json").write_text("{")
    else:
        (folder_of(output, key) / "samples.jsonl").unlink()
    status = read_status(output, nobody)
    (run,) = [run for run in status.runs if run.state == "damaged"]
    assert run.key == key
    assert sentence in run.problem
    assert status.counts["not begun"] == 2


def test_a_run_that_is_recorded_while_we_look_is_finished(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(output, "fastv")

    def vanishing(path: Path, **options: Any) -> Iterator[Any]:
        for name in ("run.json", "samples.jsonl"):
            text = (folder_of(output, "unpruned") / name).read_text()
            (folder / name).write_text(text.replace(folder_of(output, "unpruned").name, folder.name))
        path.unlink()
        raise FileNotFoundError(path)

    monkeypatch.setattr("vlm_pruner_eval.sweep.status.read_entries", vanishing)
    assert states(read_status(output, nobody))["fastv-2of3"] == ("finished", 6, 6)


def test_the_table_is_for_people_and_the_counts_for_programs(output: Path) -> None:
    console = Console(file=io.StringIO(), width=120, record=True)
    print_status(console, read_status(output, somebody))
    text = console.export_text()
    assert "fastv-2of3      running    4 of 6" in text
    assert "tiny: 5 runs: 1 finished, 1 failed, 1 running, 2 not begun; held by process 4711 on host node7. About " in text
    assert "unpruned        finished   6 of 6   tiny_mean " in text
    assert read_status(output, somebody).as_json()["answers"] == 16


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that nobody holds, whoever runs the tests."""
    module = ModuleType("lock")
    module.holder_of = nobody
    monkeypatch.setitem(sys.modules, "vlm_pruner_eval.sweep.lock", module)


def test_status_works_beside_the_sweep_itself(output: Path, lock: None) -> None:
    result = CliRunner().invoke(app, ["sweep", "status", str(output), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["failed"] == 1, "a failed run is no error of the command that says so"
    own_help = CliRunner().invoke(app, ["sweep", "status", "--help"], terminal_width=100).output
    assert "sweep status [OPTIONS]" in own_help
    shown = CliRunner().invoke(app, ["sweep", "--help"], terminal_width=100).output
    assert "--retry-failed" in shown and "sweep status DIRECTORY" in shown


@pytest.mark.parametrize("content", [None, "{", "[]", '{"name": "x", "runs": [3], "config": {}}'])
def test_a_folder_without_a_sweep_is_a_sentence_and_exit_code_2(tmp_path: Path, lock: None, content: str | None) -> None:
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    result = CliRunner().invoke(app, ["sweep", "status", str(tmp_path)])
    assert result.exit_code == 2
    assert f"vlm-pruner-eval: {tmp_path}" in result.output
    with pytest.raises(ConfigError):
        read_status(tmp_path, nobody)


def test_looking_needs_neither_torch_nor_lmms_eval(output: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vlm_pruner_eval.sweep.status import read_status; "
        f"print(len(read_status(Path({str(output)!r}), lambda directory: None).runs)); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'lmms_eval')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr
