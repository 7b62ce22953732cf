"""Where numbers come from: the machine, the times, and the content of checkpoint files, however large."""

from __future__ import annotations

import datetime
import hashlib
import io
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from stored import read_runs
from sweep_standin import StandIn, make_config, task_manager, write_tasks

from vlm_pruner_eval.sweep import checksums, machine, provenance
from vlm_pruner_eval.sweep.runner import run_sweep

DRIVERS = {
    "550.54.15": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  gcc 12.2.0\n",
    "570.86": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release Build  (dvs-builder@host)\n",
}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Files that were really hashed; those of 100 bytes are large, and hashes are remembered in an empty folder."""
    computed, found = checksums._computed, []
    monkeypatch.setattr(checksums, "LARGE_BYTES", 100)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "_computed", lambda file: found.append(file) or computed(file))
    return found


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["/opt/bin/vlm-pruner-eval", "sweep", "a b.yaml"], "vlm-pruner-eval sweep 'a b.yaml'"),
        (["/lib/vlm_pruner_eval/__main__.py", "sweep", "x"], "python -m vlm_pruner_eval sweep x"),
        (["/lib/lmms_eval/__main__.py", "--tasks", "pope"], "python -m lmms_eval --tasks pope"),
    ],
)
def test_the_command_is_one_that_can_be_typed(argv: list[str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance.sys, "argv", argv)
    assert provenance.command_line() == line


def write(folder: Path, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def test_a_large_file_is_hashed_once_and_known_by_its_content(tmp_path: Path, reads: list[Path]) -> None:
    path = write(tmp_path / "here", b"x" * 100)
    expected = hashlib.sha256(b"x" * 100).hexdigest()
    assert [checksums.sha256(path) for _ in range(3)] == [expected] * 3
    assert reads == [path]
    os.utime(path, (1, 1))  # touched, or another copy: the same content
    assert checksums.sha256(path) == expected
    assert reads == [path] * 2
    path.write_bytes(b"y" * 100)
    assert checksums.sha256(path) == hashlib.sha256(b"y" * 100).hexdigest()


def test_a_small_file_is_not_remembered(tmp_path: Path, reads: list[Path]) -> None:
    path = write(tmp_path / "here", b"x" * 99)
    assert checksums.sha256(path) == checksums.sha256(path) == hashlib.sha256(b"x" * 99).hexdigest()
    assert len(reads) == 2
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ["", "0123", "zz" * 32, "é"])
def test_a_broken_memory_is_computed_anew(tmp_path: Path, reads: list[Path], content: str) -> None:
    path = write(tmp_path / "here", b"x" * 100)
    expected = checksums.sha256(path)
    (entry,) = checksums.cache_folder().iterdir()
    entry.write_text(content, encoding="utf-8")
    assert checksums.sha256(path) == expected
    assert entry.read_text() == f"{expected}\n"


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, reads: list[Path]) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    path = write(tmp_path / "here", b"x" * 100)
    assert checksums.sha256(path) == checksums.sha256(path) == hashlib.sha256(b"x" * 100).hexdigest()
    assert len(reads) == 2


def test_copies_of_a_checkpoint_are_the_same_checkpoint(tmp_path: Path, reads: list[Path]) -> None:
    """Nodes of a cluster have copies of their own, of other times."""
    one, two = write(tmp_path / "one", b"x" * 200), write(tmp_path / "two", b"x" * 200)
    os.utime(two, (1, 1))
    assert provenance.checkpoint_files(str(one.parent)) == provenance.checkpoint_files(str(two.parent))
    write(tmp_path / "two", b"x" * 199 + b"y")
    assert provenance.checkpoint_files(str(one.parent)) != provenance.checkpoint_files(str(two.parent))


def test_a_relative_cache_home_is_ignored_as_the_standard_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert checksums.cache_folder() == Path.home() / ".cache" / "vlm_pruner_eval" / "sha256"


def test_a_record_says_on_which_machine_and_when(tmp_path: Path) -> None:
    config = make_config(tasks=["tiny_mean"], methods=["blind"], limit=2)
    before = int(time.time())
    tasks = task_manager(write_tasks(tmp_path / "tasks"))
    run_sweep(config, tmp_path / "out", console=Console(file=io.StringIO()), load=lambda *a, **k: StandIn(), task_manager=tasks)
    record = read_runs(tmp_path / "out")["unpruned"]
    found = record.provenance
    assert found.host["cores"] >= found.host["cores_usable"] >= 1
    assert found.host["memory_bytes"] > 100_000_000
    assert found.gpus == [], "a run on the CPU does not wake a GPU"
    assert found.cuda["runtime"] == torch.version.cuda
    started, ended = (datetime.datetime.fromisoformat(told).timestamp() for told in (found.started, found.time))
    assert before <= started <= ended <= time.time()
    assert 0 < record.times.answers_s < record.times.total_s


def test_gpus_are_named_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [SimpleNamespace(name=f"GPU {i}", total_memory=80 * 2**30, major=9, minor=0) for i in range(2)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", found.__getitem__)
    assert machine.gpus("cuda:1")[1] == {"name": "GPU 1", "memory_bytes": 80 * 2**30, "capability": "9.0"}
    assert machine.gpus("cpu") == []


@pytest.mark.parametrize("version", DRIVERS)
def test_the_driver_is_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    (tmp_path / "version").write_text(DRIVERS[version])
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "version")
    assert machine.driver_version() == version
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "none")
    assert machine.driver_version() is None
