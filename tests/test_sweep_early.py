"""What is answered before lmms-eval and transformers are imported."""

from __future__ import annotations

import fcntl
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from stored import units
from sweep_standin import Behaviour, StandIn, make_config, task_manager, write_tasks

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.current import current_report
from vlm_pruner_eval.store.claims import Claim
from vlm_pruner_eval.sweep import early, identity
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.runner import run_sweep


@pytest.fixture
def config(tmp_path: Path) -> SweepConfig:
    return make_config(methods=["fastv", "uniform"], tasks=["tiny_mean"], include_path=str(write_tasks(tmp_path / "tasks")))


def sweep(config: SweepConfig, output: Path, behaviour: Behaviour | None = None) -> None:
    tasks, console = task_manager(Path(config.include_path)), Console(file=io.StringIO())
    run_sweep(config, output, console=console, load=lambda *args, **kwargs: StandIn(behaviour), task_manager=tasks)


def test_a_finished_sweep_is_known_and_every_other_is_not(config: SweepConfig, tmp_path: Path) -> None:
    output = tmp_path / "out"
    early.refuse(config, output)
    assert early.look(config, output) is None and not output.exists()
    sweep(config, output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert early.look(config, output) == 3
    assert early.look(config, output, rerun="fastv") is None
    for change in ({"limit": 5}, {"methods": config.methods[:1]}, {"gallery": 1}):
        assert early.look(config.model_copy(update=change), output) is None, "the grid is to be written anew"
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    (units(output, "fastv-2of3")["tiny_mean"].folder / "record.json").unlink()
    assert early.look(config, output) is None


def test_a_failed_run_is_left_to_do(config: SweepConfig, tmp_path: Path) -> None:
    sweep(config, tmp_path / "out", Behaviour(fail={("fastv", 3)}))
    assert early.look(config, tmp_path / "out") is None


def test_a_folder_in_use_is_no_reason_to_refuse_but_one_without_locks_is(
    config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Claim(tmp_path / "out" / "runs" / "x" / "y") as claim:
        assert claim.acquire()
        early.refuse(config, tmp_path / "out")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with pytest.raises(ConfigError, match="without working file locks"):
        early.refuse(config, tmp_path / "out")


def test_tasks_that_no_file_defines_are_refused(tmp_path: Path) -> None:
    (problem,) = early.task_problems(make_config(tasks=["pope", "pop"]))
    assert problem.startswith("tasks: got 'pop', which lmms-eval does not know; did you mean 'pope'?")
    for task in ("pope", "digitscenes", "mmlu_anatomy", "mmmu_val"):
        assert early.task_problems(make_config(tasks=[task])) == []
    missing = make_config(tasks=["mine"], include_path=str(tmp_path / "nowhere"))
    assert early.task_problems(missing)[0].startswith("include_path: there is no folder")


def test_no_name_that_lmms_eval_knows_is_refused(index: Any) -> None:
    known = set(index.all_tasks)
    unsure = known - identity.defined_names() - identity.own_task_names()
    assert len(unsure) < 40 and len(known) > 1500
    assert [task for task in unsure if early.task_problems(make_config(tasks=[task]))] == []


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from vlm_pruner_eval.sweep import main, early; from vlm_pruner_eval.reproduce import plan\n"
        "from vlm_pruner_eval.sweep.config import validate; from pathlib import Path\n"
        "raw = dict(name='a', model=dict(id='vlmpruner_llava', pretrained='minivlm'), tasks=['pope'], methods=['fastv'])\n"
        "try: early.refuse(validate(raw | dict(pruning_rates=[0.5], tasks=['pop'])), Path('/tmp/there-is-nothing'))\n"
        "except ValueError as error: print('did you mean \\'pope\\'' in str(error), 'torch' in sys.modules)\n"
        "print(early.look(validate(raw | dict(pruning_rates=[0.5])), Path('/tmp/there-is-nothing')))\n"
        "print({'transformers', 'lmms_eval'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "True False\nNone\nset()\n", done.stdout + done.stderr


def test_a_finished_sweeps_report_is_written_again_only_where_something_is_newer(config: SweepConfig, tmp_path: Path) -> None:
    output = tmp_path / "out"
    sweep(config, output)
    assert current_report(output) is None
    build(output)
    assert current_report(output) == output / "report.md"
    folder = units(output, "fastv-2of3")["tiny_mean"].folder
    with Claim(folder) as claim:  # who looks at a unit changes nothing
        assert claim.acquire()
    assert current_report(output) == output / "report.md"
    later = (output / "report.md").stat().st_mtime + 3600
    for path in (folder / "record.json", output / "sweep.json"):
        before = path.stat()
        os.utime(path, (later, later))
        assert current_report(output) is None
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert current_report(output) is not None
    (output / "report.html").unlink()
    assert current_report(output) is None
