"""`--executor ray`: the same files as one process leaves, whatever becomes of the workers. Needs the extra `cluster`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_standin
from rich.console import Console
from sweep_processes import RAW, left_behind
from sweep_standin import StandIn, task_manager, write_tasks

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.config import SweepConfig, validate
from vlm_pruner_eval.sweep.executors import RayExecutor, choose, on_ray
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep
from vlm_pruner_eval.sweep.store import Store


def config(**changes: Any) -> SweepConfig:
    return validate(RAW | {"methods": ["vlmpruner", {"name": "random", "seeds": [0, 1]}, "blind"]} | changes)


class Ray:
    """A cluster of this machine, and sweeps on it."""

    def __init__(self, folder: Path):
        self.folder, self.tasks = folder, write_tasks(folder / "tasks")
        self.log = ""

    def sweep(self, name: str, asked: SweepConfig, *, ray: bool = True, **options: Any) -> Outcome:
        console = Console(file=io.StringIO(), record=True, width=200)
        if ray:
            options = {"executor": RayExecutor(processes=2, opener=ray_standin.standin_session, **options)}
        else:
            options = {"load": lambda *_, **__: StandIn(size=3), "task_manager": task_manager(self.tasks)}
        try:
            return run_sweep(asked, self.folder / name, console=console, **options)
        finally:
            self.log = console.export_text()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ray]:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'vlm-pruner-eval[cluster]'")
    folder = tmp_path_factory.mktemp("ray")
    made = Ray(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_standin.environment().items():
            patch.setenv(name, value)
        patch.setenv("STANDIN_TASKS", str(made.tasks))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=80_000_000)
        yield made
        ray.shutdown()


def test_it_leaves_what_one_process_leaves(cluster: Ray) -> None:
    cluster.sweep("alone", config(), ray=False)
    assert cluster.sweep("both", config()) == Outcome(runs=5, skipped=0, failed=0, left=0)
    assert left_behind(cluster.folder / "both") == left_behind(cluster.folder / "alone")
    assert list((cluster.folder / "both").glob(".seen-by-workers-*")) == []
    assert cluster.sweep("both", config()) == Outcome(runs=5, skipped=5, failed=0, left=0)


def test_a_run_is_answered_in_shares(cluster: Ray) -> None:
    asked = config(methods=["uniform"], limit=None)
    cluster.sweep("alone2", asked, ray=False)
    assert cluster.sweep("shares", asked, parts=2).failed == 0
    assert left_behind(cluster.folder / "shares") == left_behind(cluster.folder / "alone2")


def test_a_worker_that_dies_is_replaced(cluster: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    killed: list[int] = []
    hand_out = on_ray.Crew._hand_out

    def deadly(self: on_ray.Crew) -> None:
        hand_out(self)
        workers = [worker for worker, task in self.busy.values() if task is not None]
        if workers and len(killed) < 2:
            killed.append(1)
            ray.kill(workers[0])

    monkeypatch.setattr(on_ray.Crew, "_hand_out", deadly)
    assert cluster.sweep("deaths", config()).failed == 0
    assert len(killed) == 2 and "its worker died, another one goes on" in cluster.log
    assert left_behind(cluster.folder / "deaths") == left_behind(cluster.folder / "alone")


def test_a_run_that_kills_every_worker_is_a_failed_run(cluster: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    hand_out = on_ray.Crew._hand_out

    def deadly(self: on_ray.Crew) -> None:
        hand_out(self)
        for worker, task in list(self.busy.values()):
            if task is not None and task.run.method == "blind":
                ray.kill(worker)

    monkeypatch.setattr(on_ray.Crew, "_hand_out", deadly)
    assert cluster.sweep("hopeless", config()).failed == 1
    (record,) = [
        record for record in map(Store(cluster.folder / "hopeless").read, runs_of(cluster, "hopeless")) if record["status"] == "failed"
    ]
    assert record["method"] == "blind" and record["problem"].startswith("3 workers died at this run, the last one so: ")
    monkeypatch.undo()
    again = run_sweep(
        config(),
        cluster.folder / "hopeless",
        retry_failed=True,
        console=Console(file=io.StringIO()),
        executor=RayExecutor(processes=1, opener=ray_standin.standin_session),
    )
    assert again.failed == 0
    assert left_behind(cluster.folder / "hopeless") == left_behind(cluster.folder / "alone")


def runs_of(cluster: Ray, name: str) -> list[str]:
    return [path.name for path in (cluster.folder / name / "runs").iterdir()]


def test_workers_that_do_not_see_the_results_send_them(cluster: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "write_atomic", lambda path, content: None if path.name.startswith(".seen") else real(path, content))
    assert cluster.sweep("apart", config()).failed == 0
    assert "does not see" in cluster.log
    assert left_behind(cluster.folder / "apart") == left_behind(cluster.folder / "alone")
    with pytest.raises(ConfigError, match="--parts: shares of a run need a results directory that all workers see"):
        cluster.sweep("apart2", config(), parts=2)


real = on_ray.write_atomic


def test_what_a_worker_refuses_is_said_by_the_driver(cluster: Ray) -> None:
    with pytest.raises(ConfigError, match=r"tasks: got 'tiny_meen', which lmms-eval does not know; did you mean 'tiny_mean'"):
        cluster.sweep("bad", config(tasks=["tiny_meen"]))
    assert not (cluster.folder / "bad" / "sweep.json").exists()


# ---- without a cluster
def test_a_missing_ray_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--executor ray: Ray is not installed .*pip install 'vlm-pruner-eval\[cluster\]'"):
        on_ray._import_ray()


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
    chosen = choose("ray", processes=3, shard=None, is_rank=False, address="auto", parts=2)
    assert (chosen.address, chosen.processes, chosen.parts) == ("auto", 3, 2)
