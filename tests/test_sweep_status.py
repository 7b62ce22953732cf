"""`sweep status`: what the files of a sweep say of every run, while it runs, after a crash, and where they are damaged."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stored import units
from sweep_standin import Behaviour, StandIn, make_config, task_manager, write_tasks
from typer.testing import CliRunner

from vlm_pruner_eval.cli import app
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.store.answers import ANSWERS, PLAN, AnswerLog
from vlm_pruner_eval.store.claims import Claim, process_words
from vlm_pruner_eval.sweep.runner import run_sweep
from vlm_pruner_eval.sweep.status import SweepStatus, print_status, read_status

CONFIG = make_config(methods=["vlmpruner", "fastv", "uniform", "blind"], limit=6)
MINE = process_words(os.getpid())


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpruned run finished, vlmpruner failed, fastv half done after 4 of 12 answers, the others not begun."""
    folder = tmp_path_factory.mktemp("interrupted")
    tasks, append, left = task_manager(write_tasks(folder / "tasks")), AnswerLog.append, iter(range(12 + 12 + 4))

    def interrupting(self: AnswerLog, *args: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        append(self, *args)

    behaviour, console = Behaviour(fail={("vlmpruner", 3)}), Console(file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AnswerLog, "append", interrupting)
        run_sweep(CONFIG, folder / "out", console=console, load=lambda *a, **k: StandIn(behaviour), task_manager=tasks)
    return folder / "out"


@pytest.fixture
def output(interrupted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(interrupted, tmp_path / "out"))


def folder_of(output: Path, key: str, task: str = "tiny_mean") -> Path:
    return units(output, key)[task].folder


def states(status: SweepStatus) -> dict[str, tuple[str, int, int | None]]:
    return {run.key: (run.state, run.answers, run.expected) for run in status.runs}


def test_every_run_has_a_state_and_its_answers(output: Path) -> None:
    status = read_status(output)
    assert states(status) == {
        "unpruned": ("finished", 12, 12),
        "vlmpruner-2of3": ("failed", 12, 12),
        "fastv-2of3": ("half done", 4, 12),
        "uniform-2of3": ("not begun", 0, 12),
        "blind": ("not begun", 0, 12),
    }
    assert status.runs[1].problem.startswith("1 of 6 samples failed")
    assert status.runs[0].scores.startswith("mean ") and not status.runs[2].scores
    told = status.as_json()
    seconds = status.runs[0].seconds / 12  # an answer
    assert told.pop("seconds_left") == pytest.approx((8 + 12 + 12) * seconds), "failed runs are not repeated by themselves"
    assert told == {
        "name": "tiny",
        "runs": 5,
        "finished": 1,
        "failed": 1,
        "running": 0,
        "half_done": 1,
        "damaged": 0,
        "not_begun": 2,
        "answers": 28,
        "expected": 60,
        "held_by": [],
    }


def test_what_a_process_has_claimed_is_running(output: Path) -> None:
    """Before its first answer, in the middle, and when it failed before."""
    wanted = {"blind": ("running", 0, 12), "fastv-2of3": ("running", 4, 12), "vlmpruner-2of3": ("running", 12, 12)}
    for key, expected in wanted.items():
        with Claim(folder_of(output, key)) as claim:
            assert claim.acquire()
            status = read_status(output)
            assert states(status)[key] == expected and status.counts["running"] == 1
            (holder,) = status.held_by
            assert holder.startswith(MINE)
    assert read_status(output).held_by == ()


def test_a_run_whose_other_unit_is_left_is_half_done(output: Path) -> None:
    (folder_of(output, "unpruned", "tiny_pairs") / "record.json").unlink()
    shutil.rmtree(folder_of(output, "vlmpruner-2of3", "tiny_pairs"))
    found = states(read_status(output))
    assert found["unpruned"] == ("half done", 12, 12)
    assert found["vlmpruner-2of3"] == ("failed", 6, 12)


def test_how_much_is_expected_comes_from_the_plan_where_nothing_is_finished(output: Path) -> None:
    for key in ("unpruned", "vlmpruner-2of3"):
        shutil.rmtree(folder_of(output, key).parent)
    found = read_status(output)
    assert states(found)["fastv-2of3"] == ("half done", 4, None), "nobody has asked the second task yet"
    one = json.loads((output / "sweep.json").read_text())
    one["units"].pop("tiny_pairs")
    (output / "sweep.json").write_text(json.dumps(one))
    assert states(read_status(output))["fastv-2of3"] == ("half done", 4, 6)
    shutil.rmtree(folder_of(output, "fastv-2of3"))
    assert read_status(output).as_json()["expected"] is None


def test_another_limit_makes_a_finished_run_half_done(output: Path) -> None:
    grid = json.loads((output / "sweep.json").read_text())
    grid["config"]["limit"] = 9
    (output / "sweep.json").write_text(json.dumps(grid))
    assert states(read_status(output))["unpruned"][:2] == ("half done", 12)


def test_a_batch_that_a_crash_cut_is_not_counted(output: Path) -> None:
    with (folder_of(output, "fastv-2of3") / ANSWERS).open("ab") as file:
        file.write(b'{"task": "tiny_me')
    assert states(read_status(output))["fastv-2of3"] == ("half done", 4, 12)


@pytest.mark.parametrize(
    ("damage", "key", "sentence"),
    [
        ("log", "fastv-2of3", "answers.jsonl, line 3: got a line that does not fit its checksum"),
        ("record", "unpruned", "record.json: can't be read"),
        ("plan", "fastv-2of3", "plan.json: can't be read"),
        ("answers", "unpruned", "its answers.jsonl is missing"),
    ],
)
def test_damage_is_shown_with_its_place_and_the_rest_is_read(output: Path, damage: str, key: str, sentence: str) -> None:
    folder = folder_of(output, key)
    if damage == "log":
        lines = (folder / ANSWERS).read_bytes().splitlines(keepends=True)
        lines[2] = lines[2].replace(b"doc_id", b"dox_id")
        (folder / ANSWERS).write_bytes(b"".join(lines))
    elif damage == "answers":
        (folder / ANSWERS).unlink()
    else:
        (folder / {"record": "record.json", "plan": PLAN}[damage]).write_text("{")
    status = read_status(output)
    (run,) = [run for run in status.runs if run.state == "damaged"]
    assert run.key == key and sentence in run.problem
    assert status.counts["not begun"] == 2


def test_a_unit_that_begins_anew_while_we_look_is_no_error(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanishing(folder: Path) -> Any:
        raise FileNotFoundError(folder)

    monkeypatch.setattr("vlm_pruner_eval.sweep.status.count_answers", vanishing)
    assert states(read_status(output))["fastv-2of3"][:2] == ("not begun", 0)


def test_the_table_is_for_people_and_the_counts_for_programs(output: Path) -> None:
    console = Console(file=io.StringIO(), width=200, record=True)
    with Claim(folder_of(output, "fastv-2of3")) as claim:
        assert claim.acquire()
        print_status(console, read_status(output))
    text = console.export_text()
    assert re.search(r"fastv-2of3 +running +4 of 12", text) and re.search(r"unpruned +finished +12 of 12 +mean ", text)
    assert f"tiny: 5 runs: 1 finished, 1 failed, 1 running, 2 not begun; made by {MINE}, since " in text
    print_status(console, read_status(output))
    assert "no process works on it. About " in console.export_text()


def test_status_works_beside_the_sweep_itself(output: Path) -> None:
    result = CliRunner().invoke(app, ["sweep", "status", str(output), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["failed"] == 1, "a failed run is no error of the command that says so"
    own_help = CliRunner().invoke(app, ["sweep", "status", "--help"], terminal_width=100).output
    assert "sweep status [OPTIONS]" in own_help
    shown = CliRunner().invoke(app, ["sweep", "--help"], terminal_width=100).output
    assert "--retry-failed" in shown and "sweep status DIRECTORY" in shown


@pytest.mark.parametrize("content", [None, "{", "[]", '{"name": "x", "runs": [3], "config": {}}'])
def test_a_folder_without_a_sweep_is_a_sentence_and_exit_code_2(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    result = CliRunner().invoke(app, ["sweep", "status", str(tmp_path)])
    assert result.exit_code == 2
    assert f"vlm-pruner-eval: {tmp_path}" in result.output
    with pytest.raises(ConfigError):
        read_status(tmp_path)


def test_looking_needs_neither_torch_nor_lmms_eval(output: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from vlm_pruner_eval.sweep.status import read_status; "
        f"print(len(read_status(Path({str(output)!r})).runs)); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'lmms_eval')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "5\n"), done.stderr
