"""A sweep made by several processes: every unit once, the same results as by one, whoever dies on the way."""

from __future__ import annotations

import io
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from rich.console import Console
from stored import read_runs, units
from sweep_processes import Surroundings, last_json, left_behind, wait_until
from sweep_standin import StandIn, make_config, task_manager, write_tasks

from vlm_pruner_eval.errors import ConfigError, StoppedError
from vlm_pruner_eval.store.claims import Claim
from vlm_pruner_eval.store.folder import Unit
from vlm_pruner_eval.sweep import runner, workers
from vlm_pruner_eval.sweep.config import load, validate
from vlm_pruner_eval.sweep.grid import expand
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep
from vlm_pruner_eval.sweep.units import units_of
from vlm_pruner_eval.sweep.workers import read_todo, sweep_file, visible_gpus

ROOT = Path(__file__).parent.parent
MINIVLM = {"id": "vlmpruner_llava", "pretrained": "minivlm", "batch_size": 4, "visual_tokens": 576, "device": "cpu"}
N_ANSWERS = 8 * 24  # runs, and documents of both tasks
SIZE = 3  # of the stand-in's batches


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Surroundings:
    return Surroundings(tmp_path_factory.mktemp("surroundings"))


@pytest.fixture(scope="module")
def plain(surroundings: Surroundings) -> dict[str, Any]:
    """What one process leaves."""
    code, output = surroundings.fork("--output", "plain").wait()
    assert code == 0, output
    assert len(surroundings.answered()) == len(set(surroundings.answered())) == N_ANSWERS
    forget(surroundings)
    return left_behind(surroundings.folder / "plain")


def forget(surroundings: Surroundings) -> None:
    for path in (surroundings.log, *(surroundings.folder / "tasks").glob("deaths*")):
        path.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def own_counts(surroundings: Surroundings) -> None:
    """Every test counts its own answers and deaths."""
    forget(surroundings)


def summary(text: str) -> dict[str, Any]:
    return last_json("\n".join(line for line in text.splitlines() if line.startswith("{")))


# ---- the same command several times
def test_commands_over_one_folder_share_its_units(surroundings: Surroundings, plain: dict[str, Any]) -> None:
    forks = [surroundings.fork("--output", "shared", STANDIN_PAUSE="0.02", STANDIN_REPORT="yes") for _ in range(3)]
    ended = [fork.wait() for fork in forks]
    assert [code for code, _ in ended] == [0] * 3, ended
    assert len(surroundings.answered()) == len(set(surroundings.answered())) == N_ANSWERS
    assert left_behind(surroundings.folder / "shared") == plain
    assert any(summary(text)["report"] == "shared/report.md" for _, text in ended), "the last one reports"
    assert (surroundings.folder / "shared" / "report.md").is_file()


@pytest.mark.slow
def test_a_unit_of_a_process_that_died_is_finished_by_another(surroundings: Surroundings, plain: dict[str, Any]) -> None:
    """Behind two batches, which are not answered again."""
    code, _ = surroundings.fork("--output", "died", STANDIN_DIE="random:2:1").wait()
    assert code == -signal.SIGKILL
    code, text = surroundings.fork("--output", "died").wait()
    assert code == 0, text
    assert summary(text)["left"] == 0
    answers = Counter(surroundings.answered())
    assert len(answers) == N_ANSWERS
    assert sum(answers.values()) - N_ANSWERS <= SIZE, "at most the batch that was not written down any more"
    assert left_behind(surroundings.folder / "died") == plain


@pytest.mark.slow
def test_a_unit_that_a_living_process_holds_is_left_to_it(surroundings: Surroundings, plain: dict[str, Any]) -> None:
    output = surroundings.folder / "held"
    config = load(surroundings.file)
    held = units_of(config, expand(config))[3]
    with Claim(output / "runs" / held.path) as claim:
        assert claim.acquire()
        code, text = surroundings.fork("--output", "held").wait()
    assert code == 0, text
    assert f"{held.name}: left to another process, which works on it" in text
    assert "1 of 8 runs are left; other processes work on them" in text
    assert summary(text) == {"runs": 8, "skipped": 0, "failed": 0, "left": 1, "report": None}
    assert len(surroundings.answered()) == N_ANSWERS - 12
    code, text = surroundings.fork("--output", "held").wait()
    assert (code, summary(text)["skipped"]) == (0, 7), text
    assert left_behind(output) == plain


# ---- in this process
@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return task_manager(write_tasks(tmp_path_factory.mktemp("tasks")))


def here(output: Path, tasks: Any, **options: Any) -> tuple[Outcome, StandIn, str]:
    model, console = StandIn(options.pop("behaviour", None)), Console(file=io.StringIO(), record=True, width=200)
    asked = {"load": lambda *a, **k: model} | options
    outcome = run_sweep(make_config(), output, console=console, task_manager=tasks, **asked)
    return outcome, model, console.export_text()


def test_a_unit_that_was_finished_meanwhile_is_not_made_again(tmp_path: Path, tasks: Any) -> None:
    """Another command finishes all between this one's first look and its claims."""
    mine = StandIn()

    def load_slowly(*args: object, **kwargs: object) -> StandIn:
        assert here(tmp_path / "out", tasks)[0] == Outcome(runs=6, skipped=0, failed=0)
        return mine

    assert here(tmp_path / "out", tasks, load=load_slowly)[0].failed == 0
    assert mine.answered == []


def test_a_model_of_the_callers_own_is_not_handed_to_processes(tmp_path: Path, tasks: Any) -> None:
    for options in ({"processes": 2}, {"executor": "ray"}):
        with pytest.raises(ConfigError, match="of your own can't be given to other processes"):
            here(tmp_path / "out", tasks, **options)
    assert not (tmp_path / "out").exists()


# ---- processes of one machine
@pytest.fixture
def one_task(surroundings: Surroundings, plain: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A sweep of eight units, and what one process leaves of them."""
    surroundings.write(tasks=["tiny_mean"])
    yield {place: left for place, left in plain.items() if place[1] == "tiny_mean"}
    surroundings.write()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_leave_what_one_leaves(surroundings: Surroundings, one_task: dict[str, Any]) -> None:
    """Deaths included: a process that is killed is replaced, and its unit goes on from its log."""
    dies = {"STANDIN_DIE": "vlmpruner:3:1", "STANDIN_PAUSE": "0.05"}
    code, text = surroundings.fork("--output", "two", "--processes", "2", **dies).wait(400)
    assert code == 0, text
    assert text.count("was ended by SIGKILL during vlmpruner-2of3 tiny_mean") == 1, text
    answers = Counter(surroundings.answered())
    assert len(answers) == N_ANSWERS // 2 and sum(answers.values()) - N_ANSWERS // 2 <= SIZE
    output = surroundings.folder / "two"
    assert left_behind(output) == one_task
    assert text.count("[8/8]") == 1 and "2 processes; their output is in two/logs" in text
    commands = {unit.read().provenance.command for key in read_runs(output) for unit in units(output, key).values()}
    assert len(commands) == 1, "the command that was typed, not the processes'"
    assert commands.pop().endswith("--output two --processes 2")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_deadly_unit_fails_alone(surroundings: Surroundings, one_task: dict[str, Any]) -> None:
    dies = {"STANDIN_DIE": f"fastv:1:{workers.MOST_DEATHS}", "STANDIN_PAUSE": "0.05", "STANDIN_REPORT": "yes"}
    code, text = surroundings.fork("--output", "deadly", "--processes", "2", **dies).wait(400)
    assert code == 1, text
    assert text.count("was ended by SIGKILL during fastv-2of3 tiny_mean") == workers.MOST_DEATHS, text
    assert summary(text) | {"report": None} == {"runs": 8, "skipped": 0, "failed": 1, "left": 0, "report": None}
    output = surroundings.folder / "deadly"
    (unit,) = units(output, "fastv-2of3").values()
    assert unit.read().problem.startswith("3 processes died while they made this; the last one was ended by SIGKILL, see ")
    assert len(list(unit.answers())) == 3 * SIZE, "its answers stay"
    dead = ("fastv-2of3", "tiny_mean")
    made = left_behind(output)
    assert {place: left for place, left in made.items() if place != dead} == {
        place: left for place, left in one_task.items() if place != dead
    }
    assert "fastv-2of3" in (output / "report.md").read_text()
    before = len(surroundings.answered())
    code, text = surroundings.fork("--output", "deadly", "--retry-failed").wait()
    assert code == 0, text
    assert len(surroundings.answered()) - before == SIZE, "it goes on from the log of the dead"
    assert left_behind(output) == one_task


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_the_one_that_started_them(surroundings: Surroundings, how: signal.Signals) -> None:
    name = f"ended {how}"
    fork = surroundings.fork("--output", name, "--processes", "2", STANDIN_PAUSE="0.3")
    output = surroundings.folder / name
    wait_until(lambda: len(list(output.rglob("answers.jsonl"))) == 2, 200)
    children = psutil.Process(fork.pid).children()
    assert len(children) == 2
    os.kill(fork.pid, how)
    code, text = fork.wait()
    assert code == (-how if how != signal.SIGINT else 130), text
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    holders = list(output.rglob(".holder"))
    assert bool(holders) == (how == signal.SIGKILL), "asked to end, they give back what they hold"
    assert not [path for path in output.rglob("record.json") if Unit(path.parent).read().status != "finished"], "an end is no failure"
    if how != signal.SIGKILL:
        assert re.search(r"Stopped\. \d of 8 runs finished", text), text


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_model_in_two_processes_answers_as_in_one(tmp_path: Path) -> None:
    surroundings = Surroundings(tmp_path)
    surroundings.write(model=MINIVLM, tasks=["digitscenes_exist"], methods=["vlmpruner", "fastv"], limit=2, gallery=2)
    config, quiet = load(surroundings.file), {"console": Console(quiet=True)}
    for name, count in (("one", 1), ("two", 2)):
        assert run_sweep(config, tmp_path / name, processes=count, **quiet) == Outcome(runs=3, skipped=0, failed=0)
    one, two = left_behind(tmp_path / "one"), left_behind(tmp_path / "two")
    assert len(one) == 3 and one == two
    assert pictures(tmp_path / "one") == pictures(tmp_path / "two") != {}


def pictures(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "images").iterdir()}


class Script:
    """Programs in place of workers: what each of them does is a line of Python."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.output, self.patch = tmp_path / "out", monkeypatch

    def __call__(self, line: str) -> None:
        self.patch.setattr(workers, "COMMAND", ("python", "-c", f"import os, sys; {line}"))
        run_sweep(make_config(), self.output, processes=2, console=Console(file=io.StringIO(), record=True))


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(tmp_path, monkeypatch)


def test_processes_that_end_before_they_begin_stop_the_sweep(script: Script) -> None:
    with pytest.raises(StoppedError, match=r"12 units are left \(first: unpruned tiny_mean\).*ended 3 times.*no such driver"):
        script("print('no such driver'); sys.exit(9)")


def test_what_a_process_says_of_its_end_is_said(script: Script) -> None:
    with pytest.raises(StoppedError, match=r"^the disk is full$"):
        script(f"print('vlm-pruner-eval: the disk is full'); sys.exit({workers.STOPPED})")
    with pytest.raises(ConfigError) as refused:
        script("print('vlm-pruner-eval: a: bad'); print('noise'); print('vlm-pruner-eval: b: bad'); sys.exit(2)")
    assert refused.value.problems == ("a: bad", "b: bad")
    assert (script.output / "sweep.json").is_file(), "the sweep of the first command stays"


# ---- choices
@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_a_sweep_file_is_handed_on_as_it_is_understood(path: Path) -> None:
    config = load(path)
    assert validate(yaml.safe_load(yaml.safe_dump(sweep_file(config)))) == config


def test_odd_values_are_handed_on() -> None:
    methods = [
        {"name": "vlmpruner", "threshold": 1e-05, "label": "1e5"},
        {"name": "random", "seeds": [3, 4]},
        {"name": "fastv", "layer": 1},
    ]
    config = make_config(methods=methods, pruning_rates=[0.1 + 0.2, "8/9"], limit=None)
    assert validate(yaml.safe_load(yaml.safe_dump(sweep_file(config)))) == config


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(None, "can't be read"), ("{", "can't be read"), ('{"units": ["a/b"], "command": "x"}', "'a/b' is no part of the grid")],
)
def test_what_a_process_is_told_must_be_of_its_sweep(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "todo.json").write_text(text)
    with pytest.raises(ConfigError, match=f"--todo: .*{sentence}"):
        read_todo(tmp_path / "todo.json", units_of(make_config(), expand(make_config())))


@pytest.mark.parametrize(
    ("seen", "device", "processes", "expected"),
    [
        ([], None, None, None),
        (["0"], None, None, None),
        (["2", "5"], None, None, ["2", "5"]),
        (["2", "5"], "cuda:1", None, None),
        (["2", "5"], None, 3, ["2", "5", "2"]),
        (["2", "5"], "cpu", 2, [None, None]),
        ([], None, 99, [None] * 12),
        (["2", "5"], None, 1, None),
    ],
)
def test_how_many_processes_and_with_which_gpu(
    seen: list[str], device: str | None, processes: int | None, expected: list | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """None: this process alone."""
    chosen: list[Any] = []
    monkeypatch.setattr(runner, "visible_gpus", lambda: seen)
    monkeypatch.setattr(runner, "work_here", lambda work: chosen.append(None))
    monkeypatch.setattr(runner, "work_in_processes", lambda work, gpus: chosen.append(gpus))
    model = make_config().model.model_dump(exclude_none=True) | ({"device": device} if device else {})
    run_sweep(make_config(model=model), tmp_path / "out", processes=processes, console=Console(quiet=True))
    assert chosen == [expected]


@pytest.mark.parametrize(("given", "count", "expected"), [(None, 2, ["0", "1"]), ("3, 1", 2, ["3", "1"]), ("", 0, []), ("-1", 0, [])])
def test_visible_gpus(given: str | None, count: int, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert visible_gpus() == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--executor", "locale"), "--executor: got 'locale', which is unknown; did you mean 'local'?"),
        (("--processes", "0"), "--processes: got 0, expected 1 or more"),
        (("--address", "auto"), "--address: got it without --executor ray"),
    ],
)
def test_options_that_mean_nothing_are_a_sentence(surroundings: Surroundings, options: tuple[str, ...], sentence: str) -> None:
    code, text = surroundings.fork("--output", "nonsense", *options).wait()
    assert code == 2 and sentence in text, text
    assert not (surroundings.folder / "nonsense").exists()


def test_a_sweep_under_torchrun_is_a_sentence(surroundings: Surroundings) -> None:
    code, text = surroundings.fork("--output", "ranks", WORLD_SIZE="2", RANK="0").wait()
    assert code == 2 and "vlm-pruner-eval: torchrun: " in text and "start `vlm-pruner-eval sweep` itself" in text
    assert not (surroundings.folder / "ranks").exists()
