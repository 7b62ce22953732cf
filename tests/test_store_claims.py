"""Claims: one process holds a unit, the kernel frees it when the process dies, and a disk without locks is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import pytest
from forked import live

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.store import claims
from vlm_pruner_eval.store.claims import HOLDER, LOCK, Claim, check_locks, holder_of, holders, process_words


class Other:
    """A fork that holds claims, or tries to; it says so through a pipe and waits until it is ended."""

    def __init__(self, act: Callable[[], object]):
        reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            live(lambda: self._wait(act, writer))
        os.close(writer)
        with os.fdopen(reader) as said:
            self.said = said.readline().strip()

    def _wait(self, act: Callable[[], object], writer: int) -> None:
        os.write(writer, f"{act()}\n".encode())
        os.close(writer)
        signal.pause()

    def end(self, how: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, how)
        os.waitpid(self.pid, 0)


@pytest.fixture
def others() -> Iterator[list[Other]]:
    """Processes that are ended with the test."""
    started: list[Other] = []
    yield started
    for other in started:
        other.end()


_HELD: list[Claim] = []  # of a fork, so that nothing gives them back early


def take(folder: Path) -> bool:
    _HELD.append(Claim(folder))
    return _HELD[-1].acquire()


def test_one_of_two_processes_gets_a_unit_and_says_who_it_is(tmp_path: Path, others: list[Other]) -> None:
    folder = tmp_path / "runs" / "r" / "gqa"
    assert holder_of(folder) is None and not folder.exists()
    others.append(Other(lambda: take(folder)))
    assert others[0].said == "True"
    with Claim(folder) as mine:
        assert not mine.acquire()
    assert holder_of(folder).startswith(f"{process_words(others[0].pid)}, since ")
    assert Claim(tmp_path / "runs" / "r" / "mme").acquire(), "another unit is free"


def test_a_holder_that_is_killed_frees_its_unit_at_once(tmp_path: Path, others: list[Other]) -> None:
    other = Other(lambda: take(tmp_path))
    other.end(signal.SIGKILL)
    assert holder_of(tmp_path) is None
    assert [line.split(",")[0] for line in holders(tmp_path)] == [process_words(other.pid)], "it says who died over it"
    with Claim(tmp_path) as mine:
        assert mine.acquire()
        assert [line.split(",")[0] for line in holders(tmp_path)] == [process_words(pid) for pid in (os.getpid(), other.pid)]
        assert holder_of(tmp_path).startswith(process_words(os.getpid())) and "\n" not in holder_of(tmp_path)
        others.append(Other(lambda: take(tmp_path)))
        assert others[0].said == "False"
    assert holders(tmp_path) == [] and holder_of(tmp_path) is None


def test_a_claim_that_is_not_held_gives_nothing_back(tmp_path: Path, others: list[Other]) -> None:
    others.append(Other(lambda: take(tmp_path)))
    mine = Claim(tmp_path)
    assert not mine.acquire()
    mine.release()
    assert holder_of(tmp_path) is not None and (tmp_path / HOLDER).is_file()


def test_a_holder_that_has_not_said_its_name_is_one_all_the_same(tmp_path: Path, others: list[Other]) -> None:
    others.append(Other(lambda: take(tmp_path)))
    (tmp_path / HOLDER).unlink()
    assert holder_of(tmp_path) == "a process that has just begun"


def test_two_claims_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    with Claim(tmp_path) as first, Claim(tmp_path) as second:
        assert first.acquire() and not second.acquire()
        second.release()
        assert holder_of(tmp_path) is not None


def test_lmms_evals_patch_of_file_locks_takes_nothing_from_claims(tmp_path: Path) -> None:
    """It makes all `FileLock` of a path in a process one, which anybody may then take again."""

    def patched() -> str:
        from lmms_eval import evaluator

        evaluator._enable_reentrant_filelocks()
        plain = [filelock.FileLock(tmp_path / "plain") for _ in range(2)]
        first, second = Claim(tmp_path), Claim(tmp_path)
        check_locks(tmp_path)
        return f"{plain[0] is plain[1]} {first.acquire()} {second.acquire()} {holder_of(tmp_path) is not None}"

    other = Other(patched)
    other.end()
    assert other.said == "True True False True"


# ---- disks without locks
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_that_knows_no_locks_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"without working file locks \(.+\).*choose a folder on another disk with --output"):
        check_locks(tmp_path / "new")
    assert os.listdir(tmp_path) == []


def test_a_disk_whose_locks_exclude_nobody_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda handle, operation: None)
    with pytest.raises(ConfigError, match="a lock that is held can be taken again"):
        check_locks(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_disk_with_locks_is_left_as_it_was(tmp_path: Path) -> None:
    check_locks(tmp_path / "new" / "deep")
    check_locks(tmp_path)
    assert os.listdir(tmp_path) == []


def test_who_holds_a_unit_of_a_folder_that_may_only_be_read_is_not_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LOCK).touch()

    def refuse(self: object, **options: object) -> None:
        raise PermissionError(errno.EROFS, "read-only file system")

    monkeypatch.setattr(claims.UnitLock, "acquire", refuse)
    assert holder_of(tmp_path) is None
