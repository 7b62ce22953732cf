"""`--executor ray` without Ray: who gets which run, what becomes of it when workers die, and what is said where nothing can go on."""

from __future__ import annotations

import functools
import io
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_ray import FakeRay, Killed, LocalRayletDiedError, Reference
from rich.console import Console
from sweep_processes import RAW, left_behind
from sweep_standin import Behaviour, StandIn, task_manager, write_tasks
from vlm_pruner_eval.lmms.plan import Batch, Done, Part
from vlm_pruner_eval.sweep.executors import RayExecutor, choose, on_ray
from vlm_pruner_eval.sweep.executors.allotment import sweep_file
from vlm_pruner_eval.sweep.executors.ray_worker import Worker
from vlm_pruner_eval.sweep.store import Store

from vlm_pruner_eval.errors import ConfigError, StoppedError
from vlm_pruner_eval.lmms.prompts import Request
from vlm_pruner_eval.sweep.config import SweepConfig, validate
from vlm_pruner_eval.sweep.grid import expand
from vlm_pruner_eval.sweep.opening import open_session
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep


def config(**changes: Any) -> SweepConfig:
    return validate(RAW | {"tasks": ["tiny_mean"], "methods": ["vlmpruner", "blind"], "limit": 24} | changes)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        yield write_tasks(folder / "tasks")


class Mortal(StandIn):
    """Dies behind the first batch that it answers of a method, as often as `deaths` says."""

    def __init__(self, crew: Crew, **options: Any):
        super().__init__(**options)
        self.crew = crew

    def batches_of(self, asked: Sequence[Request], done: Done, part: Part) -> Iterator[Batch]:
        for batch in super().batches_of(asked, done, part):
            self.crew.answers += [(self.method, request.doc_id) for request, _ in batch]
            yield batch
            if self.crew.deaths.get(self.method, 0) > 0:
                self.crew.deaths[self.method] -= 1
                raise Killed


@dataclass
class Crew:
    """Sweeps by workers in this process."""

    folder: Path
    tasks: Path
    ray: FakeRay = field(default_factory=FakeRay)
    deaths: dict[str, int] = field(default_factory=dict)
    behaviour: Behaviour = field(default_factory=Behaviour)
    answers: list[tuple[str, int]] = field(default_factory=list)
    log: str = ""

    def sweep(self, asked: SweepConfig | None = None, name: str = "out", **options: Any) -> Outcome:
        own = {name: options.pop(name) for name in ("retry_failed", "load", "task_manager") if name in options}
        executor = RayExecutor(**{"processes": 2, "opener": self.open} | options)
        return self._run(asked or config(), name, executor=executor, **own)

    def alone(self, asked: SweepConfig | None = None) -> dict[str, Any]:
        """What one process leaves."""
        load = lambda *_, **__: StandIn(self.behaviour, size=3)  # noqa: E731
        self._run(asked or config(), "alone", load=load, task_manager=task_manager(self.tasks))
        return left_behind(self.folder / "alone")

    def left(self) -> dict[str, Any]:
        return left_behind(self.folder / "out")

    def open(self, *args: Any, **options: Any) -> Any:
        model = Mortal(self, behaviour=self.behaviour, size=3)
        return open_session(*args, **options, load=lambda *_, **__: model, task_manager=task_manager(self.tasks))

    def _run(self, asked: SweepConfig, name: str, **options: Any) -> Outcome:
        console = Console(file=io.StringIO(), record=True, width=200)
        try:
            return run_sweep(asked, self.folder / name, console=console, **options)
        finally:
            self.log = console.export_text()

    def record(self, method: str) -> dict[str, Any]:
        store = Store(self.folder / "out")
        (found,) = [record for run in expand(config()) if (record := store.read(run.run_id)) and record["method"] == method]
        return found


@pytest.fixture
def crew(tmp_path: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> Crew:
    made = Crew(tmp_path, tasks)
    monkeypatch.setitem(sys.modules, "ray", made.ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", made.ray.exceptions)
    return made


def test_records_say_where_they_were_made_and_by_which_command(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/vlm-pruner-eval", "sweep", "x.yaml"])
    assert crew.sweep() == Outcome(runs=3, skipped=0, failed=0)
    about = crew.record("blind")["provenance"]
    assert about["executor"] == {"name": "ray", "version": "0", "node": "node 1", "pid": about["executor"]["pid"]}
    assert about["command"] == "vlm-pruner-eval sweep x.yaml"
    assert crew.left() == crew.alone()
    assert [path.name for path in (crew.folder / "out").iterdir() if path.name.startswith(".")] == []


def test_the_last_runs_are_answered_by_all_workers(crew: Crew) -> None:
    """Three runs and two workers: when one run is left that nobody has begun, it is split."""
    crew.sweep()
    assert crew.log.count("in 2 shares") == 1
    assert crew.left() == crew.alone()
    assert len(crew.answers) == len(set(crew.answers)) == 72
    crew.sweep(name="wide", processes=6)
    assert crew.log.count("in 2 shares") == 3


def test_shares_that_were_asked_for_limit_the_workers(crew: Crew) -> None:
    crew.sweep(processes=9, parts=1)
    assert len(crew.ray.actors) == 3 and "shares" not in crew.log
    assert crew.left() == crew.alone()


def test_a_run_goes_on_behind_the_last_batch_of_a_dead_worker(crew: Crew) -> None:
    crew.deaths = {"vlmpruner": 2}
    assert crew.sweep(parts=1).failed == 0
    assert len(crew.ray.killed) == 2 and crew.log.count("died (The actor died unexpectedly") == 2
    assert len(crew.answers) == 72, "no batch was answered twice"
    assert crew.left() == crew.alone()


def test_a_dead_worker_of_a_share_is_replaced(crew: Crew) -> None:
    crew.deaths = {"vlmpruner": 3}
    assert crew.sweep(parts=2).failed == 0, "three deaths, but in two shares"
    assert crew.left() == crew.alone()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_that_kills_every_worker_fails_and_can_be_tried_again(crew: Crew, parts: int) -> None:
    crew.deaths = {"blind": 99}
    assert crew.sweep(parts=parts) == Outcome(runs=3, skipped=0, failed=1)
    record = crew.record("blind")
    assert record["problem"].startswith("3 Ray workers died while they made this run; the last one, on ")
    assert len(re.findall(r"blind: FAILED after \d+ s: 3 Ray workers died", crew.log)) == 1
    crew.deaths, before = {}, len(crew.answers)
    assert crew.sweep(parts=parts, retry_failed=True).failed == 0
    assert len(crew.answers) - before < 24, "what was answered before counts"
    assert crew.left() == crew.alone()


def test_a_failed_run_is_tried_again_from_its_first_answer_once(crew: Crew) -> None:
    crew.behaviour = Behaviour(fail={("vlmpruner", 3)})
    assert crew.sweep().failed == 1
    crew.behaviour, crew.answers = Behaviour(), []
    assert crew.sweep(retry_failed=True, parts=2) == Outcome(runs=3, skipped=2, failed=0)
    assert sorted(crew.answers) == [("vlmpruner", i) for i in range(24)]
    assert crew.left() == crew.alone()


def test_a_worker_that_dies_after_its_work_has_done_it(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Worker.make

    def dying(self: Worker, run_id: str) -> None:
        make(self, run_id)
        raise Killed

    monkeypatch.setattr(Worker, "make", dying)
    assert crew.sweep(parts=1).failed == 0
    assert len(crew.answers) == 72
    monkeypatch.undo()
    assert crew.left() == crew.alone()


def blind_to(crew: Crew, numbers: Sequence[int]) -> None:
    """Some workers don't see the results directory."""

    def on_call(reference: Reference) -> None:
        actor = reference.actor
        if reference.name == "ready" and actor.number in numbers:
            actor.made = actor.create()
            actor.made._token = "never written"

    crew.ray.on_call = on_call


def test_runs_of_workers_that_do_not_see_the_directory_come_back(crew: Crew, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    blind_to(crew, range(9))
    crew.deaths = {"vlmpruner": 1}
    assert crew.sweep().failed == 0
    assert "does not see" in crew.log and "shares" not in crew.log
    assert crew.answers.count(("vlmpruner", 0)) == 2, "nothing is left of what a dead worker answered"
    assert crew.left() == crew.alone()
    folders = [path for path in (tmp_path / "elsewhere").iterdir() if (path / "runs").exists()]
    assert all(not list((path / "runs").iterdir()) or crew.ray.killed for path in folders)
    assert len(folders) == len(crew.ray.killed), "the others have tidied up"


def test_an_earlier_attempt_in_the_directory_gives_way_to_a_run_that_comes_back(crew: Crew) -> None:
    crew.deaths = {"blind": 99}
    assert crew.sweep(parts=1).failed == 1
    run_dir = Store(crew.folder / "out").run_dir(crew.record("blind")["run_id"])
    assert (run_dir / "journal.jsonl").exists()
    blind_to(crew, range(99))
    crew.deaths = {}
    assert crew.sweep(retry_failed=True).failed == 0
    assert crew.left() == crew.alone(), "no journal stays beside the record"


def test_shares_need_a_worker_that_sees_the_directory(crew: Crew) -> None:
    blind_to(crew, range(9))
    with pytest.raises(ConfigError, match=r"--parts: got 2, but .* does not see .* leave --parts out"):
        crew.sweep(parts=2)
    assert not (crew.folder / "out" / "sweep.json").exists()
    blind_to(crew, range(len(crew.ray.actors) + 2, 99))
    crew.deaths = {"blind": 9}
    with pytest.raises(StoppedError, match=r"No worker that sees .* is left, which shares of a run need"):
        crew.sweep(config(methods=["blind"]))


def test_files_that_are_not_of_the_run_are_refused(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    blind_to(crew, range(9))
    monkeypatch.setattr(Worker, "_take_files", lambda self, run_id: {"runs/../../x": b""})
    with pytest.raises(StoppedError, match=r"A Ray worker sent 'runs/../../x', expected files of runs/"):
        crew.sweep()
    assert not (crew.folder.parent / "x").exists()


# ---- nothing can go on
def test_all_problems_of_a_request_arrive(crew: Crew) -> None:
    with pytest.raises(ConfigError) as caught:
        crew.sweep(config(tasks=["tiny_meen", "tiny_pears"]))
    assert len(caught.value.problems) == 2 and "did you mean 'tiny_mean'" in caught.value.problems[0]
    assert not (crew.folder / "out").exists(), "nothing stays of a sweep that was refused"


def test_another_checkpoint_on_a_node_is_refused(crew: Crew) -> None:
    opened = crew.open
    crew.open = lambda *args, **options: replace(opened(*args, **options), checkpoint={"commit": "other"})
    with pytest.raises(ConfigError, match=r"model.pretrained: the files of somewhere/tiny on .* are not those on this machine"):
        crew.sweep()


def test_another_version_on_a_node_is_refused(tmp_path: Path) -> None:
    told = {"sweep": sweep_file(config()), "folder": str(tmp_path), "root": str(tmp_path), "token": "", "made_by": {}}
    worker = Worker(**told, todo=["none-0"], opener=functools.partial(pytest.fail, "it was loaded"))
    (problem,) = worker.ready()["problems"]
    assert "the grid has no run 'none-0', so another version of this package or of its libraries is installed there" in problem


def test_workers_that_die_before_they_begin_end_the_sweep(crew: Crew) -> None:
    def on_call(reference: Reference) -> None:
        raise Killed

    crew.ray.on_call = on_call
    with pytest.raises(StoppedError, match="3 Ray workers died before they had loaded the model; the last one so: The actor died"):
        crew.sweep()


def test_workers_that_die_before_they_begin_do_not_end_a_sweep_that_others_make(crew: Crew) -> None:
    def on_call(reference: Reference) -> None:
        if reference.name == "ready" and reference.actor.number:
            raise Killed

    crew.ray.on_call = on_call
    assert crew.sweep().failed == 0
    assert len(crew.ray.actors) == 4 and "no more are started in their place" in crew.log
    assert crew.left() == crew.alone()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "The disk is full"),
        (ZeroDivisionError("by zero"), "A Ray worker can't go on: ZeroDivisionError: by zero"),
        (LocalRayletDiedError("the raylet is gone"), r"Ray has ended on this machine \(the raylet is gone\)"),
    ],
)
def test_an_error_that_is_not_a_runs_ends_the_sweep(crew: Crew, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def run(*args: Any) -> None:
        raise error

    where = "session.Session._record" if isinstance(error, OSError) else "executors.ray_worker.Worker.make"
    monkeypatch.setattr(f"vlm_pruner_eval.sweep.{where}", run)
    with pytest.raises(StoppedError, match=words):
        crew.sweep(parts=1)


def test_a_worker_whose_claim_was_taken_stops(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: Any) -> None:
        raise StoppedError("another one took its place")

    monkeypatch.setattr("vlm_pruner_eval.sweep.lock.Lock.check", check)
    worker = Worker(**on_ray._told(work_of(crew), "token"), opener=crew.open)
    assert worker.ready()["problems"] == []
    (run_id, *_) = worker._todo
    with pytest.raises(StoppedError, match="another one took its place"):
        worker.make(run_id)
    with pytest.raises(StoppedError, match="another one took its place"):
        worker.answer_share(run_id, 0, 2)
    worker.leave()
    assert len(crew.answers) == 3, "the first batch; it is in the journal, where the share found it"


def work_of(crew: Crew, **changes: Any) -> Any:
    runs = expand(config())
    store = Store(crew.folder / "out")
    return SimpleNamespace(**{"config": config(), "store": store, "todo": runs, "load": None, "task_manager": None} | changes)


# ---- what is asked of a cluster
@pytest.mark.parametrize(
    ("device", "gpus", "cpus", "wants", "workers"),
    [
        (None, 3, (8, 8), {"num_gpus": 1}, 3),
        ("cuda", 3, (8,), {"num_gpus": 1}, 3),
        ("cpu", 3, (8,), {"num_cpus": 1}, 4),
        (None, 0, (2, 64), {"num_cpus": 1}, 5),
        (None, 0, (1,), {"num_cpus": 1}, 1),
    ],
)
def test_one_worker_a_gpu_or_a_few_a_node(
    device: str | None, gpus: int, cpus: tuple[int, ...], wants: dict[str, int], workers: int
) -> None:
    assert on_ray._resources(FakeRay(gpus, cpus), device) == (wants, workers)


def test_a_gpu_by_number_is_refused(crew: Crew) -> None:
    with pytest.raises(ConfigError, match=r"model.device: got 'cuda:1', but Ray gives every worker a GPU of its own"):
        crew.sweep(config(model=RAW["model"] | {"device": "cuda:1"}))


def test_the_own_loader_of_a_program_is_refused(crew: Crew) -> None:
    with pytest.raises(ConfigError, match="a loader or a task index of your own can't be handed to Ray workers"):
        crew.sweep(load=lambda *_, **__: StandIn())


def test_that_nothing_is_shared_is_said(crew: Crew) -> None:
    assert crew.sweep(config(share_prefix=True)).failed == 0
    assert "share_prefix: Ray workers make runs one by one" in crew.log


def test_a_cluster_without_a_free_place_is_told_of_once(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    wait = crew.ray.wait

    def late(references: list[Reference], **options: Any) -> Any:
        looks.append(1)
        return wait(references, **options) if len(looks) > 3 else ([], references)

    monkeypatch.setattr(crew.ray, "wait", late)
    monkeypatch.setattr("vlm_pruner_eval.sweep.executors.ray_crew._LONG_S", -1.0)
    assert crew.sweep().failed == 0
    assert crew.log.count("No worker has started for a minute") == 1


@pytest.mark.parametrize("address", ["nowhere", "ray://head:10001", ":1", "head:", "head:x"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="expected auto, or HOST:PORT of the cluster's head"):
        on_ray._check_address(address)


def test_a_missing_ray_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--executor ray: Ray is not installed .*pip install 'vlm-pruner-eval\[cluster\]'"):
        on_ray._import_ray(alone=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"address": "auto"}, "--address: got it without --executor ray"),
        ({"parts": 2}, "--parts: got it without --executor ray"),
        ({"name": "ray", "parts": 0}, "--parts: got 0, expected 1 or more"),
        ({"name": "ray", "processes": -1}, "--processes: got -1, expected 1 or more"),
        ({"name": "rey"}, "did you mean 'ray'"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose(**{"name": None, "processes": None, "shard": None, "is_rank": False} | options)


def test_options_that_fit() -> None:
    chosen = choose("ray", processes=3, shard=None, is_rank=False, address="auto", parts=2)
    assert (chosen.address, chosen.processes, chosen.parts) == ("auto", 3, 2)
