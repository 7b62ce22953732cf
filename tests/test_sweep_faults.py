"""The short fault campaign finds nothing, and would find what it looks for."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_cli import behaviour, call, clean_surroundings, write  # noqa: F401  # fixtures
from vlm_pruner_eval.sweep.files import remove_leftovers, write_atomic
from vlm_pruner_eval.sweep.store import Store

from vlm_pruner_eval import durable
from vlm_pruner_eval.errors import StoppedError
from vlm_pruner_eval.sweep import files

CAMPAIGN = Path(__file__).parent / "fault_campaign.py"
SECTIONS = ("random", "kill_at_writes", "power_at_writes", "full_at_writes", "journals", "memory")


@pytest.fixture(scope="module")
def campaign() -> dict[str, Any]:
    """What the short campaign found."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CAMPAIGN.parent.parent), str(CAMPAIGN.parent)])}
    done = subprocess.run([sys.executable, str(CAMPAIGN), "--short"], capture_output=True, text=True, env=env, check=False, timeout=290)
    assert done.stdout.strip(), done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"returncode": done.returncode}


@pytest.mark.parametrize("section", SECTIONS)
def test_nothing_is_lost_doubled_or_different(campaign: dict[str, Any], section: str) -> None:
    found = campaign["sections"][section]
    assert found["findings"] == {}
    assert found["sweeps_finished"] >= 1 and found["resumes"] >= 1


def test_it_did_what_it_says(campaign: dict[str, Any]) -> None:
    """A campaign that broke nothing would find nothing."""
    assert campaign["returncode"] == 0
    kinds = campaign["kills_by_kind"]
    assert sum(kinds.get(name, 0) for name in ("SIGKILL", "SIGTERM", "SIGINT")) == 8
    assert kinds["power cut at a write"] == 2
    sections = campaign["sections"]
    assert sections["kill_at_writes"]["kills"] == {"SIGKILL at a write": 5}
    assert "write runs/RUN/journal.jsonl" in sections["kill_at_writes"]["hit"]
    assert "rename runs/RUN/run.json" in sections["kill_at_writes"]["hit"]
    assert sections["full_at_writes"]["exit_codes"]["disk full: 1"] == 4
    assert sections["journals"]["cuts"] == 3 and sections["journals"]["exit_codes"]["changed line: 2"] >= 2
    assert set(sections["memory"]["runs_by_batch_size"]) & {"3", "1"}, "no batch was too large"


# ---- what the campaign led to
def test_a_crash_leaves_files_that_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.os, "unlink", lambda name: None)  # as a crash, which tidies nothing
        patch.setattr(files.os, "replace", interrupted)
        write_atomic(tmp_path / "images" / "a.jpg", "half")
    (left,) = (tmp_path / "images").iterdir()
    store = Store(tmp_path)
    store.begin("tiny", {}, [])
    assert left.exists(), "another process may be writing it"
    os.utime(left, (0, 0))
    (tmp_path / "images" / ".mine.settings").write_text("not ours")
    os.utime(tmp_path / "images" / ".mine.settings", (0, 0))
    store.begin("tiny", {}, [])
    assert [path.name for path in (tmp_path / "images").iterdir()] == [".mine.settings"]


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
    with pytest.raises(StoppedError, match=r"The disk is full .* make room, then run the same command again"):
        Store(tmp_path / "out").begin("tiny", {}, [])


@pytest.mark.usefixtures("behaviour")
def test_a_report_that_does_not_fit_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path)
    assert call("sweep", file, "--output", tmp_path / "out").exit_code == 0

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        result = call("report", tmp_path / "out")
    assert result.exit_code == 1
    assert "vlm-pruner-eval: The disk is full ([Errno 28] No space left on device)" in result.stderr
    assert call("report", tmp_path / "out").exit_code == 0
