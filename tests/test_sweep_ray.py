"""`--executor ray` on real clusters of this machine: the same files as one process leaves, whatever becomes of the workers.

What does not need real workers is in test_sweep_ray_crew.py. A worker takes 8 s of processor time to import everything.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_standin
from rich.console import Console
from sweep_processes import RAW, Surroundings, last_json, left_behind, wait_until
from sweep_standin import StandIn, task_manager
from vlm_pruner_eval.sweep.executors import RayExecutor, on_ray
from vlm_pruner_eval.sweep.store import Store

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.config import SweepConfig, validate
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
METHODS = ["vlmpruner", {"name": "random", "seeds": [0, 1]}, "blind"]
SLOW = pytest.mark.timeout(900)  # on a busy machine


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Surroundings]:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'vlm-pruner-eval[cluster]'")
    folder = tmp_path_factory.mktemp("ray")
    made = Surroundings(folder, ray_standin.environment(folder / "tasks"))
    made.write(methods=METHODS)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("STANDIN_TASKS", "STANDIN_LOG", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "HF_DATASETS_CACHE", "RAY_USAGE_STATS_ENABLED"):
            patch.setenv(name, made.environment[name])
        yield made


@pytest.fixture(scope="module")
def cluster(surroundings: Surroundings) -> Iterator[None]:
    import ray

    own = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", "object_store_memory": 80_000_000}
    ray.init(address="local", num_cpus=2, **own)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(surroundings: Surroundings) -> dict[str, Any]:
    """What one process leaves."""
    load = lambda *_, **__: StandIn(size=3)  # noqa: E731
    run_sweep(
        config(), surroundings.folder / "alone", console=silent(), load=load, task_manager=task_manager(surroundings.folder / "tasks")
    )
    return left_behind(surroundings.folder / "alone")


def silent() -> Console:
    return Console(file=io.StringIO(), record=True, width=200)


def config(**changes: Any) -> SweepConfig:
    return validate(RAW | {"methods": METHODS} | changes)


def sweep(output: Path, asked: SweepConfig | None = None, **options: Any) -> tuple[Outcome, str]:
    console = silent()
    executor = RayExecutor(**{"processes": 2, "opener": ray_standin.standin_session} | options)
    return run_sweep(asked or config(), output, console=console, executor=executor), console.export_text()


def answers(surroundings: Surroundings) -> list[tuple[str, str]]:
    """Process and answer."""
    return [tuple(line.split(" ", 1)) for line in surroundings.log.read_text().splitlines()]


@SLOW
def test_it_leaves_what_one_process_leaves(cluster: None, surroundings: Surroundings, alone: dict[str, Any]) -> None:
    """The last run is answered by both workers, as none is left for one of them."""
    output = surroundings.folder / "both"
    outcome, log = sweep(output)
    assert outcome == Outcome(runs=5, skipped=0, failed=0)
    assert left_behind(output) == alone
    found = answers(surroundings)
    assert len({process for process, _ in found}) == 2
    assert len(found) == len({answer for _, answer in found}) == 5 * 24
    assert log.count("in 2 shares") == 1
    records = map(Store(output).read, os.listdir(output / "runs"))
    executors = [record["provenance"]["executor"] for record in records]
    assert {str(about["pid"]) for about in executors} <= {process for process, _ in found}
    assert all(about["name"] == "ray" and len(about["node"]) > 20 for about in executors)
    assert sweep(output)[0] == Outcome(runs=5, skipped=5, failed=0)


@SLOW
def test_workers_that_are_killed_are_replaced(cluster: None, surroundings: Surroundings, alone: dict[str, Any]) -> None:
    surroundings.log.unlink(missing_ok=True)
    ray_standin.behave(surroundings.folder / "tasks", STANDIN_DIE="random:2:1,blind:3:1")
    outcome, log = sweep(surroundings.folder / "killed", parts=1)
    ray_standin.behave(surroundings.folder / "tasks")
    assert outcome.failed == 0
    assert log.count("another one takes over") == 2
    assert left_behind(surroundings.folder / "killed") == alone
    assert len(answers(surroundings)) == 5 * 24, "they had written down every batch"


@SLOW
def test_workers_that_do_not_see_the_results_send_them(
    cluster: None, surroundings: Surroundings, alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_ray, "write_atomic", lambda path, content: None)  # of the file by which they know the directory
    outcome, log = sweep(surroundings.folder / "apart", processes=1)
    assert outcome.failed == 0 and "does not see" in log
    assert left_behind(surroundings.folder / "apart") == alone


@SLOW
def test_what_a_worker_refuses_is_said_in_full(cluster: None, surroundings: Surroundings) -> None:
    with pytest.raises(ConfigError, match="tasks: got 'tiny_meen'") as caught:
        sweep(surroundings.folder / "bad", config(tasks=["tiny_meen", "tiny_pears"]), processes=1)
    assert len(caught.value.problems) == 2
    assert not (surroundings.folder / "bad").exists()


def test_no_cluster_at_an_address_is_a_sentence(surroundings: Surroundings) -> None:
    done = surroundings.run("--executor", "ray", "--address", "127.0.0.1:1", program=[str(ROOT / "tests" / "ray_standin.py")])
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("vlm-pruner-eval: --address: got '127.0.0.1:1', where no Ray cluster can be joined (")


@SLOW
@pytest.mark.cli
def test_the_command_starts_a_cluster_of_its_own_and_ends_it(surroundings: Surroundings, alone: dict[str, Any], tmp_path: Path) -> None:
    options = ("--executor", "ray", "--processes", "1", "--output", str(tmp_path / "out"))
    done = surroundings.run(*options, program=[str(ROOT / "tests" / "ray_standin.py")], RAY_ADDRESS="")
    assert done.returncode == 0, done.stderr
    assert left_behind(tmp_path / "out") == alone
    assert len(done.stdout.splitlines()) == 1 and last_json(done.stdout)["runs"] == 5
    assert "[5/5] " in done.stderr and not [word for word in ("INFO", "WARN", "raylet") if word in done.stderr]


FAKES = {
    "scontrol": 'printf "node1\\nnode2\\n"',
    "srun": """
echo "$*" >> "$SRUN_LOG"
while [[ "$1" == --* ]]; do shift; done
if [[ "$1" == hostname ]]; then echo "127.0.0.1 10.9.8.7"; exit; fi
exec "$@" --num-cpus=1 --object-store-memory=80000000
""",
    "vlm-pruner-eval": f'exec {sys.executable} {ROOT / "tests" / "ray_standin.py"} "$@"',
}


@pytest.fixture
def slurm(surroundings: Surroundings, tmp_path: Path) -> dict[str, str]:
    """Surroundings of a batch script on the first of two nodes, which are both this machine."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "sweep.sh", tmp_path / "scripts" / "sweep.sh")
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), surroundings.environment["PATH"]])
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_SUBMIT_DIR": str(tmp_path)}
    return surroundings.environment | job | {"PATH": path, "SRUN_LOG": str(tmp_path / "srun.log"), "STANDIN_PAUSE": "0.1"}


def count(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def batch(arguments: list[str], environment: dict[str, str], folder: Path) -> subprocess.Popen:
    command = ["bash", str(ROOT / "scripts" / "slurm_ray.sh"), *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, cwd=folder, text=True, **streams)


@SLOW
@pytest.mark.cli
def test_a_slurm_job_makes_a_sweep_also_in_two_goes(
    surroundings: Surroundings, slurm: dict[str, str], alone: dict[str, Any], tmp_path: Path
) -> None:
    """The first job is ended by Slurm as it runs out of time; its cluster and its lock go with it."""
    surroundings.log.unlink(missing_ok=True)
    output = tmp_path / "out"
    arguments = [str(surroundings.file), "--output", str(output), "--json"]
    job = batch(arguments, slurm, tmp_path)
    wait_until(lambda: job.poll() is not None or count(surroundings.log) > 30, timeout_s=400)
    job.terminate()
    _, log = job.communicate(timeout=120)
    assert job.returncode == 128 + signal.SIGTERM, log
    assert list(output.glob("*.lock")) == [] and list(output.glob(".seen-by-workers-*")) == []
    job = batch(arguments, slurm, tmp_path)
    out, log = job.communicate(timeout=600)
    assert job.returncode == 0, log
    assert last_json(out)["failed"] == 0 and left_behind(output) == alone
    assert count(surroundings.log) <= 5 * 24 + 2 * 3, "a batch of each worker at most was answered twice"
    calls = (tmp_path / "srun.log").read_text().splitlines()
    assert sum("--nodelist=node2" in call and "start --address=127.0.0.1:24711 --block" in call for call in calls) == 2
    assert sum("--nodelist=node1" in call and "start --head" in call and "--port=24711" in call for call in calls) == 2
    assert not [line for line in log.splitlines() if "SIGTERM received" in line], "Ray's own noise"


def test_the_batch_script_says_what_is_missing(slurm: dict[str, str], surroundings: Surroundings, tmp_path: Path) -> None:
    for arguments, changes, words in (
        ([], {}, "usage: sbatch --nodes=N"),
        (["x.yaml"], {"SLURM_JOB_ID": ""}, "usage: sbatch --nodes=N"),
        (["x.yaml"], {"PATH": f"{tmp_path}:/usr/bin:/bin"}, "Ray is not installed: expected it in "),
    ):
        job = batch(arguments, slurm | changes, tmp_path)
        _, log = job.communicate(timeout=60)
        assert job.returncode == 2 and log.startswith(words)
