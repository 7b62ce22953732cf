"""A sweep under torchrun: the ranks answer every run together, and leave what one process leaves."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed
from rich.console import Console
from sweep_processes import TORCHRUN, Fork, Surroundings, last_json, left_behind, wait_until
from test_sweep_shards import MINIVLM, N_ANSWERS, pictures
from vlm_pruner_eval.lmms.plan import Part
from vlm_pruner_eval.sweep.directory import hold
from vlm_pruner_eval.sweep.executors import ranks as ranks_module
from vlm_pruner_eval.sweep.executors.ranks import Ranks, rank_of
from vlm_pruner_eval.sweep.store import Store

from vlm_pruner_eval.errors import ConfigError, PruningError, StoppedError
from vlm_pruner_eval.sweep.config import load
from vlm_pruner_eval.sweep.runner import run_sweep

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Surroundings:
    made = Surroundings(tmp_path_factory.mktemp("surroundings"))
    made.write(methods=["vlmpruner", {"name": "random", "seeds": [0, 1]}])
    return made


@pytest.fixture(scope="module")
def plain(surroundings: Surroundings) -> dict[str, Any]:
    """What one process leaves."""
    code, output = surroundings.fork("--output", "plain").wait()
    assert code == 0, output
    return left_behind(surroundings.folder / "plain")


@pytest.fixture(autouse=True)
def forget(surroundings: Surroundings) -> None:
    """Every test counts its own answers and deaths."""
    for path in (surroundings.log, *(surroundings.folder / "tasks").glob("deaths*")):
        path.unlink(missing_ok=True)


def start(
    surroundings: Surroundings, count: int, *options: str, only_rank: dict[int, dict[str, str]] | None = None, **more: Any
) -> list[Fork]:
    """Ranks as a launcher starts them that hosts no store of its own; `only_rank`: variables that one of them is given."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | more
    own = only_rank or {}
    return [surroundings.fork(*options, **job, RANK=str(i), LOCAL_RANK=str(i), **own.get(i, {})) for i in range(count)]


def test_ranks_leave_what_one_process_leaves(surroundings: Surroundings, plain: dict[str, Any]) -> None:
    surroundings.log.unlink(missing_ok=True)
    ended = [rank.wait() for rank in start(surroundings, 2, "--output", "two", STANDIN_REPORT="yes")]
    assert [code for code, _ in ended] == [0, 0], ended
    answers = [line.split() for line in surroundings.log.read_text().splitlines()]
    assert len(answers) == len(set(surroundings.answered())) == N_ANSWERS / 2
    assert sorted(Counter(pid for pid, *_ in answers).values()) == [N_ANSWERS / 4] * 2, "each rank answered half"
    output = surroundings.folder / "two"
    assert left_behind(output) == plain
    assert {Store(output).read(run_id)["parts"] for run_id in plain} == {2}
    assert '"report": "two/report.md"' in ended[0][1] and (output / "report.md").is_file()
    assert "started" not in ended[1][1] and "report" not in ended[1][1], "only the first rank talks"
    assert not list(output.rglob("*.lock"))


@pytest.mark.parametrize("count", [1, 3])
def test_killed_ranks_are_gone_on_with_by_as_many_as_there_are(surroundings: Surroundings, plain: dict[str, Any], count: int) -> None:
    name = f"killed {count}"
    surroundings.log.unlink(missing_ok=True)
    ranks = start(surroundings, 2, "--output", name, STANDIN_PAUSE="0.1")
    wait_until(lambda: len(surroundings.answered()) >= 24 + 9)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    assert [rank.wait()[0] for rank in ranks] == [-9, -9]
    again = start(surroundings, count, "--output", name) if count > 1 else [surroundings.fork("--output", name)]
    ended = [rank.wait() for rank in again]
    assert [code for code, _ in ended] == [0] * count, ended
    assert left_behind(surroundings.folder / name) == plain
    answers = Counter(surroundings.answered())
    assert len(answers) == N_ANSWERS / 2 and sum(answers.values()) <= N_ANSWERS / 2 + 6, "at most the batches that were not journaled"


def test_a_rank_that_fails_fails_the_run_at_once_and_the_others_go_on(surroundings: Surroundings, plain: dict[str, Any]) -> None:
    for broken in (0, 1):
        name = f"broken {broken}"
        ranks = start(surroundings, 2, "--output", name, only_rank={broken: {"STANDIN_EXPLODE": "vlmpruner"}})
        ended = [rank.wait(60) for rank in ranks]
        assert [code for code, _ in ended] == [1, 0], ended
        made = left_behind(surroundings.folder / name)
        (run_id,) = [run_id for run_id in made if run_id.startswith("vlmpruner")]
        record = Store(surroundings.folder / name).read(run_id)
        by_other = "PruningError: rank 1 could not answer its part of the run: RuntimeError: the device is gone"
        assert record["problem"] == ("RuntimeError: the device is gone", by_other)[broken]
        assert {key: made[key] for key in made if key != run_id} == {key: plain[key] for key in plain if key != run_id}
        ended = [rank.wait(60) for rank in start(surroundings, 2, "--output", name, "--retry-failed")]
        assert [code for code, _ in ended] == [0, 0], ended
        assert left_behind(surroundings.folder / name) == plain


def test_ranks_do_not_enter_a_directory_in_use(surroundings: Surroundings) -> None:
    with hold(surroundings.folder / "held"):
        ended = [rank.wait(60) for rank in start(surroundings, 2, "--output", "held")]
    assert [code for code, _ in ended] == [2, 2]
    assert f"is in use by process {os.getpid()}" in ended[0][1]
    assert not (surroundings.folder / "held").exists()


def test_finished_runs_are_skipped_by_all_ranks(surroundings: Surroundings, plain: dict[str, Any]) -> None:
    surroundings.log.unlink(missing_ok=True)
    ended = [rank.wait() for rank in start(surroundings, 2, "--output", "plain")]
    assert [code for code, _ in ended] == [0, 0]
    assert "All 4 runs are finished already." in ended[0][1]
    assert surroundings.answered() == []


@pytest.mark.timeout(600)
def test_a_real_model_under_torchrun_answers_as_in_one_process(tmp_path: Path) -> None:
    """Under the real launcher, and with shared prefixes."""
    surroundings = Surroundings(tmp_path)
    surroundings.write(model=MINIVLM | {"batch_size": 2}, tasks=["digitscenes_exist"], methods=["vlmpruner"], limit=6, gallery=2)
    run_sweep(load(surroundings.file), tmp_path / "one", console=Console(quiet=True))
    for name, options in (("two", ()), ("shared", ("--share-prefix",))):
        told = {"launcher": [*TORCHRUN, "--nproc_per_node=2"], "program": ["-m", "vlm_pruner_eval"]}
        done = surroundings.run("--output", name, *options, **told)
        assert done.returncode == 0, done.stderr
        assert last_json(done.stdout) == {"runs": 2, "skipped": 0, "failed": 0, "report": f"{name}/report.md"}
        assert left_behind(tmp_path / name) == left_behind(tmp_path / "one")
        assert pictures(tmp_path / name) == pictures(tmp_path / "one")


@pytest.mark.timeout(600)
def test_torchrun_ends_with_an_error_when_a_run_failed(surroundings: Surroundings) -> None:
    done = surroundings.run("--output", "failed", launcher=[*TORCHRUN, "--nproc_per_node=2"], STANDIN_EXPLODE="random")
    assert done.returncode != 0
    assert last_json(done.stdout)["failed"] == 2


# ---- talking
@pytest.fixture
def pair() -> tuple[Ranks, Ranks]:
    store = torch.distributed.HashStore()
    return Ranks(Part(0, 2), store), Ranks(Part(1, 2), store)


def test_the_first_rank_decides_and_the_others_wait(pair: tuple[Ranks, Ranks]) -> None:
    heard: list[Any] = []
    listener = threading.Thread(target=lambda: heard.append(pair[1].agree("runs", "not this")))
    listener.start()
    listener.join(0.2)
    assert heard == []
    assert pair[0].agree("runs", {"a": None, "b": [1, "ü"]}) == {"a": None, "b": [1, "ü"]}
    listener.join(10)
    assert heard == [{"a": None, "b": [1, "ü"]}]


def test_who_gives_up_is_heard_by_the_others(pair: tuple[Ranks, Ranks]) -> None:
    pair[1].give_up("a", "no memory")
    pair[0].check("b")
    pair[1].check("a")
    with pytest.raises(PruningError, match="rank 1 could not answer its part of the run: no memory"):
        pair[0].check("a")


def test_nobody_waits_for_ever(pair: tuple[Ranks, Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_PATIENCE_S", 0.2)
    with pytest.raises(StoppedError, match=r"rank 0 waited 0 minutes for all 2 ranks to reach the first run"):
        pair[0].meet("the first run")
    pair[1].part_company()  # only the first one waits there


def test_the_environment_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    assert rank_of() is None
    job = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "LOCAL_RANK": "1"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    assert rank_of() == Part(3, 4)
    monkeypatch.setattr(ranks_module, "visible_gpus", lambda: ["4", "6"])
    device = ranks_module._device(None)
    with ranks_module._as_one_process(device):
        assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    assert {name: os.environ[name] for name in job} == job
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert ranks_module._device("cpu") == {}
    with pytest.raises(ConfigError, match=r"model.device: got 'cuda:0' under torchrun"):
        ranks_module._device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"got LOCAL_RANK=2, but this node shows 2 GPUs"):
        ranks_module._device(None)


@pytest.mark.timeout(600)
def test_options_of_other_executors_are_refused(surroundings: Surroundings) -> None:
    ended = [rank.wait(60) for rank in start(surroundings, 2, "--output", "refused", "--shard", "1/2")]
    assert [code for code, _ in ended] == [2, 2]
    assert "--shard: got it under torchrun" in ended[0][1]
    assert not (surroundings.folder / "refused").exists()
