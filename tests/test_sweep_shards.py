"""A sweep made by several processes: every run once, the same results as by one, whoever dies on the way."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import test_sweep_shared
import yaml
from rich.console import Console
from sweep_processes import Surroundings, last_json, left_behind, wait_until
from sweep_standin import Behaviour, StandIn, make_config, task_manager, write_tasks
from test_sweep_shared import manager  # noqa: F401  # a fixture
from vlm_pruner_eval.lmms.plan import Part
from vlm_pruner_eval.sweep.directory import claim, hold
from vlm_pruner_eval.sweep.executors import Local, choose, gpus, local
from vlm_pruner_eval.sweep.executors.allotment import sweep_file
from vlm_pruner_eval.sweep.store import Store

from vlm_pruner_eval.errors import ConfigError, StoppedError
from vlm_pruner_eval.sweep.config import SweepConfig, load, validate
from vlm_pruner_eval.sweep.grid import expand
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep
from vlm_pruner_eval.sweep.score_line import title

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
MINIVLM = {"id": "vlmpruner_llava", "pretrained": "minivlm", "batch_size": 4, "visual_tokens": 576, "device": "cpu"}
N_ANSWERS = 8 * 24


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Surroundings:
    return Surroundings(tmp_path_factory.mktemp("surroundings"))


@pytest.fixture(scope="module")
def plain(surroundings: Surroundings) -> dict[str, Any]:
    """What one process leaves."""
    code, output = surroundings.fork("--output", "plain").wait()
    assert code == 0, output
    assert sorted(surroundings.answered()) == sorted(set(surroundings.answered()))
    return left_behind(surroundings.folder / "plain")


@pytest.fixture(autouse=True)
def forget(surroundings: Surroundings) -> None:
    """Every test counts its own answers and deaths."""
    for path in (surroundings.log, *(surroundings.folder / "tasks").glob("deaths*")):
        path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return task_manager(write_tasks(tmp_path_factory.mktemp("tasks")))


class Shards:
    """Shards of one sweep, one after the other, in this process."""

    def __init__(self, output: Path, tasks: Any):
        self.output, self.tasks, self.store, self.loaded = output, tasks, Store(output), list[StandIn]()

    def __call__(self, config: SweepConfig, shard: Part | None, behaviour: Behaviour | None = None, **options: Any) -> Outcome:
        def load(model_id: str, **args: object) -> StandIn:
            self.loaded.append(StandIn(behaviour))
            return self.loaded[-1]

        console = Console(file=io.StringIO(), record=True, width=200)
        try:
            return run_sweep(config, self.output, shard=shard, console=console, load=load, task_manager=self.tasks, **options)
        finally:
            self.log = console.export_text()


@pytest.fixture
def shards(tmp_path: Path, tasks: Any) -> Shards:
    return Shards(tmp_path / "out", tasks)


# ---- shards
def test_four_shards_race_and_every_run_is_made_once(surroundings: Surroundings, plain: dict[str, Any]) -> None:
    forget_answers(surroundings)
    forks = [surroundings.fork("--output", "four", "--shard", f"{i}/4", STANDIN_PAUSE="0.01", STANDIN_REPORT="yes") for i in (1, 2, 3, 4)]
    ended = [fork.wait() for fork in forks]
    assert [code for code, _ in ended] == [0] * 4, ended
    answers = surroundings.answered()
    assert len(answers) == len(set(answers)) == N_ANSWERS
    output = surroundings.folder / "four"
    assert left_behind(output) == plain
    summaries = [next(line for line in text.splitlines()[::-1] if line.startswith('{"runs"')) for _, text in ended]
    assert sum('"report": "four/report.md"' in summary for summary in summaries) == 1, "the last one reports, and only it"
    assert (output / "report.md").is_file()
    assert not list(output.rglob("*.lock")) and not list(output.rglob(".*"))


def forget_answers(surroundings: Surroundings) -> None:
    surroundings.log.unlink(missing_ok=True)


def test_the_run_of_a_shard_that_died_is_finished_by_another(surroundings: Surroundings, plain: dict[str, Any]) -> None:
    """Behind two batches, which are not answered again."""
    code, _ = surroundings.fork("--output", "died", "--shard", "1/2", STANDIN_DIE="random:2:1").wait()
    assert code == -signal.SIGKILL
    code, text = surroundings.fork("--output", "died", "--shard", "2/2").wait()
    assert code == 0, text
    assert last_json_line(text)["left"] == 0
    answers = Counter(surroundings.answered())
    assert len(answers) == N_ANSWERS
    assert max(answers.values()) <= 2 and sum(answers.values()) - N_ANSWERS <= 3, "at most the batch that was not journaled any more"
    assert left_behind(surroundings.folder / "died") == plain


def last_json_line(text: str) -> dict[str, Any]:
    return last_json("\n".join(line for line in text.splitlines() if line.startswith("{")))


def test_who_may_work_beside_whom(surroundings: Surroundings) -> None:
    output = surroundings.folder / "beside"
    with hold(output, Part(0, 2)):
        before = sorted(output.iterdir())
        for options, who in ((("--shard", "1/2"), "shard 1/2"), ((), "shard 1/2")):
            code, text = surroundings.fork("--output", "beside", *options).wait()
            assert code == 2, text
            assert f"is in use by process {os.getpid()} on host" in text and who in text
        assert sorted(output.iterdir()) == before
    with hold(output):
        code, text = surroundings.fork("--output", "beside", "--shard", "1/2").wait()
        assert code == 2 and "(a sweep, since" in text
    assert not output.exists()


def test_a_run_that_a_living_process_holds_is_left_to_it(shards: Shards) -> None:
    config = make_config()
    held = expand(config)[1]
    lock = claim(shards.store.run_dir(held.run_id), "shard 2/2")
    assert lock.acquire() is None
    assert shards(config, Part(0, 2)) == Outcome(runs=6, skipped=0, failed=0, left=1)
    assert f"{held.key}: left to process {os.getpid()} on host" in shards.log
    assert "1 of 6 runs are left; other shards make them, or this command again" in shards.log
    assert shards(config, Part(0, 2)) == Outcome(runs=6, skipped=5, failed=0, left=1)
    assert len(shards.loaded) == 1, "nothing is loaded where nothing is free"
    lock.release()
    assert shards(config, Part(0, 2)) == Outcome(runs=6, skipped=5, failed=0)


def test_a_shard_takes_its_own_share_first(shards: Shards) -> None:
    shards(make_config(), Part(1, 3))
    names = [title(run) for run in expand(make_config())]
    made = [line.partition("] ")[2].partition(": ")[0] for line in shards.log.splitlines() if line.startswith("[")]
    assert made == [names[i] for i in (1, 4, 5, 3, 2, 0)]


def test_a_run_that_was_finished_meanwhile_is_not_made_again(shards: Shards, tmp_path: Path, tasks: Any) -> None:
    """Another shard finishes a run between this one's first look and its claim."""
    config = make_config()
    other = Shards(shards.output, tasks)

    def load_slowly(*args: object, **kwargs: object) -> StandIn:
        other(config, Part(1, 2))
        return StandIn()

    run_sweep(config, shards.output, shard=Part(0, 2), load=load_slowly, task_manager=tasks, console=Console(quiet=True))
    assert other.loaded[0].evaluated == ["vlmpruner", "random", "blind", "random", "random", "none"]
    records = {path: path.stat().st_mtime_ns for path in shards.output.rglob("run.json")}
    assert len(records) == 6
    assert shards(config, Part(0, 2)) == Outcome(runs=6, skipped=6, failed=0)


def test_failed_runs_are_retried_once_by_all_shards_together(shards: Shards, tasks: Any) -> None:
    config, broken = make_config(), Behaviour(fail={("vlmpruner", 3)})
    assert shards(config, Part(0, 2), broken) == Outcome(runs=6, skipped=0, failed=1)
    other = Shards(shards.output, tasks)

    def load_slowly(*args: object, **kwargs: object) -> StandIn:
        other(config, Part(1, 2), broken, retry_failed=True)  # fails again, after this shard has seen the first failure
        return StandIn()

    asked = {"shard": Part(0, 2), "load": load_slowly, "task_manager": tasks, "console": Console(quiet=True), "retry_failed": True}
    assert run_sweep(config, shards.output, **asked).failed == 1, "it failed anew, and nobody asked for a third time"
    assert shards(config, Part(0, 2), retry_failed=True) == Outcome(runs=6, skipped=5, failed=0)


def test_a_refused_shard_leaves_nothing(shards: Shards) -> None:
    with pytest.raises(ConfigError, match="layer: got 99"):
        shards(make_config(methods=["fastv"]), Part(0, 2), Behaviour(refuse={"fastv"}))
    assert not shards.output.exists()


def test_a_process_whose_place_was_taken_stops_at_once(shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    def robbed(self: Any) -> None:
        raise StoppedError(f"{self.path.name} was taken")

    monkeypatch.setattr("vlm_pruner_eval.sweep.lock.Lock.check", robbed)
    for shard, name in ((None, "sweep.lock"), (Part(0, 2), "shard.1of2.lock")):
        with pytest.raises(StoppedError, match=name):
            shards(make_config(), shard)
        assert len(shards.loaded[-1].answered) <= 1, "not even the first run was gone on with"
        assert not list(shards.output.rglob("run.json"))


def test_shards_share_answers_among_the_runs_that_they_claimed(tmp_path: Path, manager: Any) -> None:  # noqa: F811
    config = test_sweep_shared.make(tasks=["digitscenes_exist"], methods=["vlmpruner", "fastv", "divprune"], limit=2)
    options = {"load": lambda *args, **kwargs: test_sweep_shared.minivlm(), "task_manager": manager, "console": Console(quiet=True)}
    run_sweep(config, tmp_path / "plain", **options)
    shared = config.model_copy(update={"share_prefix": True})
    assert run_sweep(shared, tmp_path / "shard", shard=Part(1, 2), **options) == Outcome(runs=4, skipped=0, failed=0)
    results = [left_behind(tmp_path / name) for name in ("plain", "shard")]
    assert results[0] == results[1]
    store = Store(tmp_path / "shard")
    assert all(store.read(run.run_id)["shared_prefix"] for run in expand(shared))


# ---- processes of one machine
@pytest.mark.timeout(600)
def test_processes_that_die_are_replaced_and_a_deadly_run_fails_alone(surroundings: Surroundings, plain: dict[str, Any]) -> None:
    code, text = surroundings.fork(
        "--output", "workers", "--processes", "2", STANDIN_DIE="vlmpruner:3:1,fastv:2:3", STANDIN_PAUSE="0.05", STANDIN_REPORT="yes"
    ).wait(400)
    assert code == 1, text
    output = surroundings.folder / "workers"
    assert text.count("was ended by SIGKILL during fastv-2of3") == 3 and text.count("during vlmpruner-2of3") == 1, text
    assert last_json_line(text) | {"report": None} == {"runs": 8, "skipped": 0, "failed": 1, "report": None}
    made = left_behind(output)
    (dead,) = [run_id for run_id in made if run_id.startswith("fastv")]
    record = Store(output).read(dead)
    assert record["problem"].startswith("3 processes died while they made this run; the last one was ended by SIGKILL, see ")
    assert made[dead]["status"] == "failed" and "journal.jsonl" in made[dead]["files"]
    commands = {Store(output).read(run_id)["provenance"]["command"] for run_id in made}
    assert len(commands) == 1 and commands.pop().endswith("--output workers --processes 2"), (
        "the command that was typed, not the processes'"
    )
    assert {run_id: made[run_id] for run_id in made if run_id != dead} == {run_id: plain[run_id] for run_id in plain if run_id != dead}
    assert "fastv-2of3" in (output / "report.md").read_text()
    before = len(surroundings.answered())
    code, text = surroundings.fork("--output", "workers", "--retry-failed").wait()
    assert code == 0, text
    assert len(surroundings.answered()) - before < 24, "it goes on from the journal of the dead"
    assert left_behind(output) == plain


@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_processes_end_with_the_one_that_started_them(surroundings: Surroundings, how: signal.Signals) -> None:
    name = f"ended {how}"
    fork = surroundings.fork("--output", name, "--processes", "2", STANDIN_PAUSE="0.3")
    output = surroundings.folder / name
    wait_until(lambda: len(list(output.rglob("journal.jsonl"))) == 2, 200)
    children = psutil.Process(fork.pid).children()
    assert len(children) == 2
    os.kill(fork.pid, how)
    code, text = fork.wait()
    assert code == -how, text
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    left = [path.name for path in output.rglob("*.lock")]
    assert bool(left) == (how == signal.SIGKILL), "asked to end, they give back what they hold"


@pytest.mark.timeout(600)
def test_what_a_process_refuses_the_sweep_refuses(surroundings: Surroundings) -> None:
    surroundings.write(tasks=["tiny_meen", "tiny_pairs"])
    try:
        code, text = surroundings.fork("--output", "refused", "--processes", "2").wait(200)
    finally:
        surroundings.write()
    assert code == 2
    assert text.count("vlm-pruner-eval: tasks: got 'tiny_meen', which lmms-eval does not know; did you mean 'tiny_mean'?") == 1, text
    assert not (surroundings.folder / "refused").exists()


@pytest.mark.timeout(600)
def test_a_real_model_in_two_processes_answers_as_in_one(tmp_path: Path) -> None:
    surroundings = Surroundings(tmp_path)
    surroundings.write(model=MINIVLM, tasks=["digitscenes_exist"], methods=["vlmpruner", "fastv"], limit=2, gallery=2)
    config, quiet = load(surroundings.file), {"console": Console(quiet=True)}
    for name, executor in (("one", None), ("two", Local(2))):
        assert run_sweep(config, tmp_path / name, executor=executor, **quiet) == Outcome(runs=3, skipped=0, failed=0)
    one, two = left_behind(tmp_path / "one"), left_behind(tmp_path / "two")
    assert len(one) == 3 and one == two
    logs = [(tmp_path / "two" / "logs" / f"shard-{i}-of-2.log").read_text() for i in (1, 2)]
    assert sorted("".join(logs).count(f"] {title(run)}: digitscenes_exist ") for run in expand(config)) == [1, 1, 1]
    assert pictures(tmp_path / "one") == pictures(tmp_path / "two") != {}


def pictures(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "images").iterdir()}


# ---- choices
@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_a_sweep_file_is_handed_on_as_it_is_understood(path: Path) -> None:
    config = load(path)
    assert validate(yaml.safe_load(yaml.safe_dump(sweep_file(config)))) == config


def test_odd_values_are_handed_on(tmp_path: Path) -> None:
    methods = [
        {"name": "vlmpruner", "threshold": 1e-05, "label": "1e5"},
        {"name": "random", "seeds": [3, 4]},
        {"name": "fastv", "layer": 1},
    ]
    config = make_config(methods=methods, pruning_rates=[0.1 + 0.2, "8/9"], limit=None)
    assert validate(yaml.safe_load(yaml.safe_dump(sweep_file(config)))) == config


@pytest.mark.parametrize(
    ("seen", "device", "processes", "expected"),
    [
        ([], None, None, [None]),
        (["0"], None, None, [None]),
        (["2", "5"], None, None, ["2", "5"]),
        (["2", "5"], "cuda:1", None, [None]),
        (["2", "5"], None, 3, ["2", "5", "2"]),
        (["2", "5"], "cpu", 2, [None, None]),
        ([], None, 9, [None] * 6),
        (["2", "5"], None, 1, [None]),
    ],
)
def test_how_many_processes_and_with_which_gpu(
    seen: list[str], device: str | None, processes: int | None, expected: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen: list[Any] = []

    def workers(gpus: list[str | None], command: object) -> Any:
        chosen.extend(gpus)
        return Recorded()

    class Recorded:
        def run(self, work: Any) -> None:
            assert len(work.todo) == 6
            if not chosen:
                chosen.append(None)

    monkeypatch.setattr(local, "visible_gpus", lambda: seen)
    monkeypatch.setattr(local, "InProcess", Recorded)
    monkeypatch.setattr(local.workers, "Workers", workers)
    config = make_config(model=make_config().model.model_dump(exclude_none=True) | ({"device": device} if device else {}))
    run_sweep(config, tmp_path / "out", executor=Local(processes), console=Console(quiet=True))
    assert chosen == expected


@pytest.mark.parametrize(("given", "count", "expected"), [(None, 2, ["0", "1"]), ("3, 1", 2, ["3", "1"]), ("", 0, []), ("-1", 0, [])])
def test_visible_gpus(given: str | None, count: int, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert gpus.visible_gpus() == expected


def test_a_model_of_the_callers_own_is_not_handed_to_processes(tmp_path: Path, tasks: Any) -> None:
    with pytest.raises(ConfigError, match="a loader or a task index of your own can't be given to other processes"):
        run_sweep(make_config(), tmp_path / "out", executor=Local(2), task_manager=tasks, load=lambda *args, **kwargs: StandIn())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "locale"}, "--executor: got 'locale', which is unknown; did you mean 'local'?"),
        ({"processes": 0}, "--processes: got 0, expected 1 or more"),
        ({"processes": 2, "shard": Part(0, 2)}, "--processes: got it with --shard"),
        ({"name": "local", "shard": Part(0, 2)}, "--executor: got it with --shard"),
        ({"shard": Part(0, 2), "is_rank": True}, "--shard: got it under torchrun"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(**{"name": None, "processes": None, "shard": None, "is_rank": False} | options)
    assert sentence in str(caught.value)


def test_nonsense_on_the_command_line_is_a_sentence(surroundings: Surroundings) -> None:
    for options, sentence in ((("--shard", "3/2"), "--shard: got '3/2'"), (("--shard", "1/1", "--todo", "none"), "--todo: ")):
        code, text = surroundings.fork("--output", "nonsense", *options).wait()
        assert code == 2 and sentence in text, text
    assert not (surroundings.folder / "nonsense").exists()


# ---- Slurm
def slurm(surroundings: Surroundings, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    script = ["bash", str(ROOT / "scripts" / "slurm_array.sh")]
    return subprocess.run(
        [*script, *arguments], env=surroundings.environment | variables, cwd=surroundings.folder, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "lowest", "step", "shard"), [("1", "1", "1", "1/4"), ("4", "1", "1", "4/4"), ("0", "0", "1", "1/4"), ("7", "3", "2", "3/4")]
)
def test_a_task_of_a_slurm_array_is_a_shard(
    surroundings: Surroundings, tmp_path: Path, task: str, lowest: str, step: str, shard: str
) -> None:
    """The script of another submit folder: Slurm copies the one it was given."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "sweep.sh").write_text('echo "$@"\n')
    array = {"TASK_ID": task, "TASK_COUNT": "4", "TASK_MIN": lowest, "TASK_STEP": step}
    variables = {f"SLURM_ARRAY_{name}": value for name, value in array.items()}
    done = slurm(surroundings, "x.yaml", "--output", "a b", SLURM_SUBMIT_DIR=str(tmp_path), **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == f"x.yaml --output a b --shard {shard}"


def test_slurms_script_without_slurm_is_a_sentence(surroundings: Surroundings) -> None:
    for arguments, variables in (((), {"SLURM_ARRAY_TASK_ID": "1"}), (("x.yaml",), {"SLURM_ARRAY_TASK_ID": ""})):
        done = slurm(surroundings, *arguments, **variables)
        assert done.returncode == 2 and done.stderr.startswith("usage: sbatch --array=1-N")
    done = slurm(surroundings, "x.yaml", SLURM_ARRAY_TASK_ID="1")
    assert done.returncode != 0 and "submit with --array=1-N" in done.stderr


def test_a_slurm_array_makes_a_sweep(surroundings: Surroundings, plain: dict[str, Any], tmp_path: Path) -> None:
    """The first of two tasks, by hand: it helps with the share of the other one, which never starts. The command is the stand-in's."""
    command = tmp_path / "scripts" / "sweep.sh"
    command.parent.mkdir()
    shutil.copy(ROOT / "scripts" / "sweep.sh", command)
    installed = tmp_path / "bin" / "vlm-pruner-eval"
    installed.parent.mkdir()
    installed.write_text(f'#!/bin/sh\nexec {surroundings.command()[0]} {surroundings.command()[1]} "$@"\n')
    installed.chmod(0o755)
    path = f"{installed.parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_SUBMIT_DIR": str(tmp_path), "PATH": path}
    done = slurm(surroundings, str(surroundings.file), "--output", str(tmp_path / "out"), **variables)
    assert done.returncode == 0, done.stderr
    assert left_behind(tmp_path / "out") == plain
