"""A short fault campaign finds nothing, and would find what it looks for."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import fault_sections as parts
import pytest
from fault_checks import FOUND, age
from fault_sections import Section
from fault_sweep import Attempt, standin_sweep
from fault_trace import FULL, KILL, POWER
from sweep_standin import make_config
from test_cli import behaviour, call, clean_surroundings, write  # noqa: F401  # fixtures
from thinning import only

from vlm_pruner_eval import durable
from vlm_pruner_eval.errors import StoppedError
from vlm_pruner_eval.store import claims, files
from vlm_pruner_eval.store.answers import ANSWERS
from vlm_pruner_eval.store.files import remove_leftovers, write_atomic
from vlm_pruner_eval.store.folder import Store
from vlm_pruner_eval.sweep import provenance
from vlm_pruner_eval.sweep.grid import expand, grid_of

ANSWER, RECORD = "write runs/RUN/UNIT/answers.jsonl", "rename runs/RUN/UNIT/record.json"
SHORT = {
    "random": (partial(parts.standin_kills, kills=4, span_s=0.8, pause_s=0.01, n_runs=3, has_report=False), 4),
    "kill_at_writes": (partial(parts.at_writes, kind=KILL, only=(ANSWER, RECORD)), 2),
    "power_at_writes": (partial(parts.at_writes, kind=POWER, only=(ANSWER,)), 1),
    "full_at_writes": (partial(parts.at_writes, kind=FULL, only=(ANSWER,)), 0),
    "logs": (partial(parts.damaged_logs, step=300), 1),
}
LONG = {
    "two_workers": (partial(parts.two_workers, kills=3, span_s=0.3, pause_s=0.01, n_runs=3), 3),
    "larger_limit": (partial(parts.larger_limit, kills=3, span_s=1.0, pause_s=0.02), 3),
    "all_writes": (partial(parts.at_writes, kind=KILL), 40),
    "memory": (partial(parts.short_of_memory, rounds=1, kills=2), 0),
    "disks": (partial(parts.small_disks, limits=1), 0),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets are prepared in a folder of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.mark.parametrize(("work", "kills"), only([*SHORT.values(), *LONG.values()], [*SHORT.values()]), ids=[*SHORT, *LONG])
def test_nothing_is_lost_doubled_or_different(tmp_path: Path, work: Callable[[Section], None], kills: int) -> None:
    section = Section(tmp_path / "section", seed=0)
    work(section)
    assert section.findings == {}
    assert section.sweeps >= 1 and section.resumes >= 1
    assert section.kills.total() >= kills, "a campaign that breaks nothing finds nothing"


def test_it_would_find_what_it_looks_for(tmp_path: Path) -> None:
    section = Section(tmp_path, seed=0)
    sweep = standin_sweep(tmp_path, n_runs=3, limit=6).unreported()
    watch = section.begin(sweep, section.reference(sweep))
    watch.look("before")
    end = Attempt(sweep).wait()
    watch.finish("the whole", end.answers)
    assert watch.findings == {}
    first, second, third, *_ = sorted(sweep.output.rglob(ANSWERS))
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes() * 2)
    third.write_bytes(third.read_bytes().replace(b'"answer": "', b'"answer": "X', 1))
    next(sweep.output.rglob("run.json")).write_text("{")
    (sweep.output / ".left.tmp").touch()
    watch.finish("broken")
    watch.look("written again", end.answers)
    assert set(watch.findings) == set(FOUND), watch.findings


# ---- what campaigns led to
def test_a_crash_leaves_files_that_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor when the grid stays as it was, nor in the folders of runs."""
    config = make_config()
    store, grid = Store(tmp_path), grid_of(config, expand(config))
    store.begin(grid)
    for folder in (tmp_path / "images", tmp_path / "runs" / "a"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(files.os, "unlink", lambda name: None)  # as a crash, which tidies nothing
            patch.setattr(files.os, "replace", interrupted)
            write_atomic(folder / "file", "half")
        (folder / ".mine.settings").write_text("not ours")
    store.begin(grid)
    assert len(list(tmp_path.rglob(".*.tmp"))) == 2, "another process may be writing them"
    age(tmp_path)
    store.begin(grid)
    assert list(tmp_path.rglob(".*.tmp")) == []
    assert len(list(tmp_path.rglob(".mine.settings"))) == 2


def interrupted(*args: object) -> None:
    raise KeyboardInterrupt


def test_leftovers_of_a_folder_of_ones_own_go_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_atomic(folder / "run.json", "{}")
    (folder / ".run.json.abcd_123.tmp").write_text("ha")
    remove_leftovers(folder)
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_every_new_folder_is_written_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_folder", synced.append)
    durable.make_folder(tmp_path / "a" / "b")
    durable.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_stops_a_sweep_before_its_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", full)
    config = make_config()
    with pytest.raises(StoppedError, match=r"The disk is full .* make room, then run the same command again"):
        Store(tmp_path / "out").begin(grid_of(config, expand(config)))


@pytest.mark.usefixtures("behaviour")
def test_a_report_that_does_not_fit_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path)
    assert call("sweep", file, "--output", tmp_path / "out").exit_code == 0

    replace = os.replace

    def full(source: str, target: Path) -> None:
        if target.name == "report.md":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        result = call("report", tmp_path / "out")
    assert result.exit_code == 1
    assert "vlm-pruner-eval: The disk is full ([Errno 28] No space left on device)" in result.stderr
    assert not (tmp_path / "out" / "report.md").exists(), "half of it would be taken for the whole"
    assert call("report", tmp_path / "out").exit_code == 0


def test_a_full_disk_is_no_disk_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(claims.UnitLock, "acquire", full)
    with pytest.raises(OSError, match="No space left"):
        claims.check_locks(tmp_path)


def test_a_killed_sweep_leaves_no_lock_in_the_users_repository(tmp_path: Path) -> None:
    """`git status` takes one to write down what it found, unless it is told not to."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    package = tmp_path / "package" / "__init__.py"
    write_atomic(package, "")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    index = tmp_path / ".git" / "index"
    os.utime(package, (1, 1))  # the index is out of date from here on
    before = index.read_bytes()
    assert len(provenance.git_commit(tmp_path)) == 40
    assert index.read_bytes() == before
    subprocess.run([*git, "status", "--porcelain"], check=True)
    assert index.read_bytes() != before, "the test shows nothing"
