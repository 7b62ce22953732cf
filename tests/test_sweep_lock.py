"""Locks: one holder, no living holder is ever robbed, no dead one keeps a lock."""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sweep_processes import wait_until
from vlm_pruner_eval.lmms.plan import Part
from vlm_pruner_eval.sweep.directory import claim, claimed_by, hold, last_claim
from vlm_pruner_eval.sweep.holder import Holder, living
from vlm_pruner_eval.sweep.lock import Lock, holder_of
from vlm_pruner_eval.sweep.processes import is_running, machine_id, start_of

from vlm_pruner_eval.errors import ConfigError, StoppedError
from vlm_pruner_eval.sweep import lock as locks
from vlm_pruner_eval.sweep import processes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "folder" / "sweep.lock"


def in_a_fork(work: Callable[[], object]) -> int:
    """Pid of a copy of this process that does something and ends with 0 if it returns something true."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return pid


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def forever() -> None:
    time.sleep(600)


def write(path: Path, silent_s: float = 0.0, **changes: object) -> Holder:
    """A lock of somebody, touched so long ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = dataclasses.replace(Holder.here("a test"), **changes)
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    then = time.time() - silent_s
    os.utime(path, (then, then))
    return holder


OTHER_HOST = {"host": "node17", "machine": "another boot of another machine"}
REBOOTED = {"host": socket.gethostname(), "machine": "another boot"}


def test_one_holder_and_nothing_left_of_a_lock_given_back(path: Path, tmp_path: Path) -> None:
    mine = Lock(path)
    assert mine.acquire() is None
    holder = Lock(path).acquire()
    assert (holder.pid, holder.host, holder.what) == (os.getpid(), socket.gethostname(), "a sweep")
    assert [name for _, _, names in os.walk(tmp_path) for name in names] == ["sweep.lock"]
    mine.release()
    assert list(tmp_path.iterdir()) == [], "folders that the lock made are gone with it"
    assert Lock(path).acquire() is None


def test_a_folder_in_which_something_was_put_stays(path: Path) -> None:
    mine = Lock(path)
    mine.acquire()
    (path.parent / "result").write_text("mine")
    mine.release()
    assert [entry.name for entry in path.parent.iterdir()] == ["result"]


def test_a_directory_in_use_is_refused_and_not_touched(tmp_path: Path) -> None:
    with hold(tmp_path):
        before = tmp_path.stat().st_mtime_ns, (tmp_path / "sweep.lock").read_bytes()
        with pytest.raises(ConfigError) as caught, hold(tmp_path):
            pass
        assert (tmp_path.stat().st_mtime_ns, (tmp_path / "sweep.lock").read_bytes()) == before
    assert str(caught.value).startswith(
        f"output: {str(tmp_path)!r} is in use by process {os.getpid()} on host {socket.gethostname()} (a sweep"
    )
    assert "wait until it has ended, or stop it, or choose another folder" in str(caught.value)
    with hold(tmp_path):
        pass


def test_a_lock_is_given_back_after_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), hold(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_and_shards_exclude_each_other(tmp_path: Path) -> None:
    with hold(tmp_path, Part(0, 2)), hold(tmp_path, Part(1, 2)), hold(tmp_path, Part(1, 3)):
        for shard, what in ((Part(0, 2), "shard 1/2"), (None, "shard 1/2")):
            with pytest.raises(ConfigError, match=what), hold(tmp_path, shard):
                pass
    with hold(tmp_path), pytest.raises(ConfigError, match="a sweep"), hold(tmp_path, Part(0, 2)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_says_it_is_a_child_must_be_one(tmp_path: Path) -> None:
    sentence = "--todo: is given by a sweep to the processes that it starts itself"
    with pytest.raises(ConfigError, match=sentence), hold(tmp_path, Part(0, 2), is_child=True):
        pass
    with hold(tmp_path):
        with pytest.raises(ConfigError, match="is in use by"), hold(tmp_path, Part(0, 2), is_child=True):  # itself is not its parent
            pass
        assert code_of(in_a_fork(lambda: _holds(tmp_path, Part(0, 2)))) == 0


def _holds(folder: Path, shard: Part) -> bool:
    with hold(folder, shard, is_child=True):
        return (folder / "shard.1of2.lock").exists()


# ---- left behind
@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_holder_loses_its_lock(path: Path, reaped: bool) -> None:
    pid = in_a_fork(lambda: Lock(path).acquire() is None and forever())
    wait_until(lambda: living(path))
    os.kill(pid, signal.SIGKILL)
    if reaped:
        os.waitpid(pid, 0)
    else:
        wait_until(lambda: not start_of(pid))  # a zombie: it has a pid, but does not run
    assert holder_of(path.parent) is None
    assert Lock(path).acquire() is None
    if not reaped:
        os.waitpid(pid, 0)


def test_another_process_of_the_same_pid_is_not_the_holder(path: Path) -> None:
    write(path, started="1")
    assert Lock(path).acquire() is None
    assert json.loads(path.read_text())["started"] == start_of(os.getpid())


@pytest.mark.parametrize(("who", "limit"), [(OTHER_HOST, 600), (REBOOTED, 120)])
def test_on_another_machine_silence_is_what_counts(path: Path, who: dict[str, str], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, silent_s=limit - 20, pid=os.getpid(), **who)
    monkeypatch.setattr(time, "time", lambda: 4e9)  # this host's clock is wrong; the folder's is asked
    assert Lock(path).acquire().machine == who["machine"]
    monkeypatch.undo()
    write(path, silent_s=limit + 20, pid=os.getpid(), **who)
    assert Lock(path).acquire() is None
    assert [entry.name for entry in path.parent.iterdir()] == ["sweep.lock"]


def test_the_sentence_about_another_host_says_how_long_its_death_counts(tmp_path: Path) -> None:
    write(tmp_path / "sweep.lock", **OTHER_HOST)
    with pytest.raises(ConfigError, match=r"on host node17 .* counts for 10 minutes after its last sign of life"), hold(tmp_path):
        pass


def test_half_a_lock_is_somebodys_until_it_is_old(path: Path) -> None:
    write(path)
    path.write_text('{"host": "no')
    assert str(Lock(path).acquire()) == "a process unknown"
    write(path, silent_s=700)
    path.write_text('{"host": "no')
    os.utime(path, (time.time() - 700,) * 2)
    assert Lock(path).acquire() is None


def test_one_who_only_looks_believes_what_stands_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, silent_s=700, **OTHER_HOST)

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert holder_of(path.parent).host == "node17"


# ---- alive
def test_a_holder_touches_its_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.02)
    mine = Lock(path)
    mine.acquire()
    os.utime(path, (1.0, 1.0))
    wait_until(lambda: path.stat().st_mtime > 1e9)
    mine.check()
    mine.release()


def test_one_who_was_robbed_stops_and_leaves_the_other_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_S", 0.02)
    mine = Lock(path)
    mine.acquire()
    other = write(path, token="another", **OTHER_HOST)
    wait_until(lambda: mine._taken_by)
    with pytest.raises(StoppedError, match=r"stood still for so long that process \d+ on host node17 .* took its place"):
        mine.check()
    mine.release()
    assert living(path) == other


def test_a_copy_of_the_holder_does_not_give_the_lock_back(path: Path) -> None:
    mine = Lock(path)
    mine.acquire()
    assert code_of(in_a_fork(lambda: mine.release() is None)) == 0
    assert living(path).pid == os.getpid()
    mine.release()


# ---- races and odd disks
@pytest.mark.parametrize("left_behind", [True, False])
def test_of_many_that_come_at_once_one_gets_it(path: Path, left_behind: bool) -> None:
    for attempt in range(3):
        if left_behind:
            write(path, started="1")
        gate = path.parent.parent / f"go on {attempt}"
        running = {in_a_fork(functools.partial(_races, path, time.monotonic() + 0.5, gate)) for _ in range(6)}
        codes = []
        while len(running) > 1:  # all but the one that has it
            for pid in list(running):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    running.remove(pid)
                    codes.append(code_of(pid))
        gate.mkdir(parents=True)
        assert [*codes, *map(code_of, running)] == [1] * 5 + [0]
        assert not list(path.parent.glob(".*")), "no helper files stay"


def _races(path: Path, begin: float, gate: Path) -> bool:
    """Whether it got the lock, which it then holds until the gate opens."""
    mine = Lock(path)
    while time.monotonic() < begin:
        pass
    if mine.acquire() is not None:
        return False
    wait_until(gate.exists)
    mine.release()
    return True


def test_many_in_turn_are_never_two(tmp_path: Path) -> None:
    """Each holder finds the folder empty, and some die in it."""
    path, inside = tmp_path / "run.lock", tmp_path / "inside"
    inside.mkdir()
    deadline = time.monotonic() + 3.0
    pids = [in_a_fork(lambda number=number: _take_turns(path, inside, deadline, dies=number < 4)) for number in range(8)]
    codes = [code_of(pid) for pid in pids]
    assert codes[4:] == [0] * 4, "somebody met another one inside"
    assert set(codes[:4]) <= {0, -signal.SIGKILL} and -signal.SIGKILL in codes, "on a busy machine, not all come to their third turn"


def _take_turns(path: Path, inside: Path, deadline: float, *, dies: bool) -> bool:
    turns = 0
    while time.monotonic() < deadline:
        mine = Lock(path)
        if mine.acquire() is not None:
            continue
        for entry in inside.iterdir():
            if is_running(int(entry.name), start_of(int(entry.name))):
                return False
            entry.unlink()
        own = inside / str(os.getpid())
        own.touch()
        turns += 1
        if dies and turns == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        own.unlink()
        mine.release()
    return True


def test_without_the_guard_a_lock_taken_meanwhile_is_put_back(path: Path) -> None:
    other = write(path, token="of one who was faster")
    locks._remove(path, "of the dead one")
    assert living(path) == other
    assert [entry.name for entry in path.parent.iterdir()] == ["sweep.lock"]


def test_leftovers_of_the_killed_are_removed_when_they_are_old(path: Path) -> None:
    path.parent.mkdir(parents=True)
    for name, age_s in (("old", 4000), ("new", 100)):
        leftover = path.parent / f".sweep.lock.{name}"
        leftover.touch()
        os.utime(leftover, (time.time() - age_s,) * 2)
    Lock(path).acquire()
    assert sorted(entry.name for entry in path.parent.iterdir()) == [".sweep.lock.new", "sweep.lock"]


@pytest.fixture
def odd_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import fcntl

    def refuse(*args: object) -> None:
        raise OSError(getattr(errno, request.param[1]), "not here")

    monkeypatch.setattr(fcntl if request.param[0] == "flock" else os, request.param[0], refuse)


@pytest.mark.parametrize("odd_disk", [("link", "EPERM"), ("flock", "ENOLCK")], indirect=True)
def test_disks_without_links_or_file_locks(path: Path, odd_disk: None) -> None:
    mine = Lock(path)
    assert mine.acquire() is None
    assert Lock(path).acquire().pid == os.getpid()
    mine.release()
    write(path, started="1")
    assert Lock(path).acquire() is None


@pytest.mark.parametrize(
    ("odd_disk", "error", "sentence"),
    [(("link", "ENOSPC"), StoppedError, "The disk is full"), (("link", "EROFS"), ConfigError, "output: .* can't be written")],
    indirect=["odd_disk"],
)
def test_a_lock_that_can_not_be_written(path: Path, tmp_path: Path, odd_disk: None, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        Lock(path).acquire()
    assert list(tmp_path.iterdir()) == []


def test_claims_say_who_makes_a_run_and_who_made_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "a"
    assert claimed_by(run_dir) is None and last_claim(run_dir) is None
    pid = in_a_fork(lambda: claim(run_dir, "shard 2/4").acquire() is None)
    assert code_of(pid) == 0
    assert claimed_by(run_dir) is None
    assert (last_claim(run_dir).pid, last_claim(run_dir).what) == (pid, "shard 2/4")


def test_which_process_is_which(monkeypatch: pytest.MonkeyPatch) -> None:
    own, machine = start_of(os.getpid()), machine_id()
    assert own and is_running(os.getpid(), own) and not is_running(os.getpid(), "1")
    assert start_of(2**22 + 1) == "" and not is_running(2**22 + 1, "")
    monkeypatch.setattr(processes, "_has_proc", lambda: False)  # as on other systems
    machine_id.cache_clear()
    other = start_of(os.getpid())
    assert other and other != own and is_running(os.getpid(), other) and not is_running(os.getpid(), own)
    assert start_of(2**22 + 1) == "" and machine_id() not in ("", machine)
    machine_id.cache_clear()


def test_a_process_that_this_user_may_not_see_is_believed_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "_PROC", tmp_path)  # each user sees their own processes there only
    assert is_running(os.getpid(), "1")
    assert not is_running(2**22 + 1, "1")
