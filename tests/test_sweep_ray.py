"""`--executor ray` on a real cluster of this machine: the same files as one process leaves, whatever becomes of the workers."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import ray_standin
from fault_checks import Expected
from rich.console import Console
from sweep_standin import write_tasks

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep import on_ray
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # a worker takes 8 s of processor time to import everything


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the tasks, with a cluster of two workers."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'vlm-pruner-eval[cluster]'")
    folder = write_tasks(tmp_path_factory.mktemp("ray") / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_standin.environment(folder).items():
            patch.setenv(name, value)
        with on_ray._connected(on_ray._import_ray(is_own=True), None, 2):
            yield folder


@pytest.fixture(scope="module")
def alone(tasks: Path) -> Expected:
    return ray_standin.alone(tasks, tasks.parent / "alone")


def sweep(output: Path, processes: int = 2, **changes: Any) -> tuple[Outcome, str]:
    console = Console(file=io.StringIO(), record=True, width=200)
    with ray_standin.with_standin():
        outcome = run_sweep(ray_standin.config(**changes), output, console=console, executor="ray", processes=processes)
    return outcome, console.export_text()


def test_it_leaves_what_one_process_leaves(tasks: Path, alone: Expected, tmp_path: Path) -> None:
    ray_standin.behave(tasks, STANDIN_LOG=str(tmp_path / "log"), STANDIN_PAUSE="0.1")
    outcome, log = sweep(tmp_path / "out")
    assert outcome == Outcome(runs=5, skipped=0, failed=0) and "[10/10]" in log
    answers = [line.split(" ", 1) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(answers) == len({answer for _, answer in answers}) == 10 * 12, "every unit is made once"
    assert len({process for process, _ in answers}) == 2, "by both workers"
    assert not list((tmp_path / "out").glob(".seen*"))
    assert ray_standin.compare(tmp_path / "out", alone) == {}
    assert sweep(tmp_path / "out")[0] == Outcome(runs=5, skipped=5, failed=0)


def test_workers_that_are_killed_are_started_again(tasks: Path, alone: Expected, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ray_standin.behave(tasks, STANDIN_LOG=str(tmp_path / "log"), STANDIN_DIE="random:2:1,blind:3:1")
    assert sweep(tmp_path / "out")[0] == Outcome(runs=5, skipped=0, failed=0)
    assert capfd.readouterr().out == "", "Ray tells of deaths where --json prints"
    assert {path.name for path in tasks.glob("deaths of *")} == {"deaths of random", "deaths of blind"}
    assert len((tmp_path / "log").read_text().splitlines()) == 10 * 12, "they had written down every batch"
    assert ray_standin.compare(tmp_path / "out", alone) == {}


def test_a_worker_that_does_not_see_the_folder_is_a_sentence(tasks: Path, tmp_path: Path) -> None:
    ray_standin.behave(tasks)
    seen = mock.MagicMock()
    seen.__enter__.return_value.name = "elsewhere"
    with (
        mock.patch.object(on_ray.tempfile, "NamedTemporaryFile", return_value=seen),
        pytest.raises(ConfigError, match=r"is not seen from the node .* a disk that every node shares"),
    ):
        sweep(tmp_path / "out", processes=1)
    assert not (tmp_path / "out").exists()


def test_what_a_worker_refuses_is_said_in_full(tasks: Path, tmp_path: Path) -> None:
    ray_standin.behave(tasks)
    with pytest.raises(ConfigError, match="tasks: got 'tiny_meen'") as caught:
        sweep(tmp_path / "out", processes=1, tasks=["tiny_meen", "tiny_pears"])
    assert len(caught.value.problems) == 2
    assert not (tmp_path / "out").exists()


def test_no_cluster_at_an_address_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", mock.Mock(side_effect=AssertionError("it would try for minutes")))
    with pytest.raises(ConfigError, match=r"no cluster at '127.0.0.1:1' .* can be joined"):
        run_sweep(ray_standin.config(), tmp_path / "out", executor="ray", address="127.0.0.1:1", console=Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("device", "resources", "wants", "places"),
    [
        (None, [{"GPU": 8, "CPU": 64}, {"GPU": 4, "CPU": 64}], {"num_gpus": 1}, 12),
        ("cpu", [{"GPU": 8, "CPU": 4}], {"num_cpus": 1}, 2),
        (None, [{"CPU": 64}, {"CPU": 1}], {"num_cpus": 1}, 4),
    ],
)
def test_a_worker_has_a_gpu_or_two_cores(device: str | None, resources: list[dict], wants: dict[str, int], places: int) -> None:
    nodes = [{"Alive": True, "Resources": found} for found in resources] + [{"Alive": False, "Resources": {"GPU": 99}}]
    assert on_ray._resources(SimpleNamespace(nodes=lambda: nodes), device) == (wants, places)


def test_sigterm_stays_what_the_sweep_does_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, lambda *_: None))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with on_ray._connected(ray, None, 1):
        assert signal.getsignal(signal.SIGTERM) == before


def test_one_gpu_for_all_workers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.device: got 'cuda:0'.* write cuda"):
        on_ray._resources(SimpleNamespace(nodes=list), "cuda:0")
