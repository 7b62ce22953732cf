"""Kills workers and whole nodes of a Ray cluster in the middle of sweeps, and shows that nothing is lost, doubled or different.

    python tests/ray_campaign.py [--short] [--seed 0] [--only SECTION ...]

Two nodes of a cluster on this machine, one worker each, the driver on the first one; the model is a stand-in. One kill a sweep, by
SIGKILL: of a worker, or of the second node (its raylet with all that it has started), which is then replaced for the next sweep. The
moment is drawn: behind some answer of all, or while a worker loads the model. After every sweep all that it left is compared with
what one process leaves. The last line of the output is a JSON summary. Exit code 1 where anything was found. Needs the extra `cluster`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import psutil
import ray_standin
from rich.console import Console
from sweep_processes import RAW, left_behind
from sweep_standin import StandIn, task_manager, write_tasks
from vlm_pruner_eval.sweep.executors import RayExecutor, on_ray

from vlm_pruner_eval.sweep import provenance
from vlm_pruner_eval.sweep.config import SweepConfig, validate
from vlm_pruner_eval.sweep.runner import Outcome, run_sweep

METHODS = ["vlmpruner", {"name": "random", "seeds": [0, 1]}, "blind"]
N_ANSWERS, N_IN_A_RUN, N_IN_A_BATCH = 5 * 24, 24, 3
FOUND = ("lost", "doubled", "repeated", "different", "failed", "left_behind")
_NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}
_AT_START_S, _TRIES = 3.0, 3


@dataclass(frozen=True)
class Section:
    """So many sweeps with one kill each.

    Attributes
    ----------
    node
        Whether a whole node is killed.
    sees_results
        Whether the workers see the results directory.
    parts
        Shares of every run.
    """

    kills: int
    node: bool = False
    sees_results: bool = True
    parts: int | None = None

    @property
    def may_repeat(self) -> int:
        """Answers that are computed twice: of the batch that was not written down yet; all of the run where nothing is at hand."""
        return N_IN_A_BATCH if self.sees_results else N_IN_A_RUN


FULL = {
    "workers": Section(12),
    "workers_of_shares": Section(4, parts=2),
    "workers_apart": Section(4, sees_results=False),
    "nodes": Section(3, node=True),
}
SHORT = {"workers": Section(1), "nodes": Section(1, node=True)}


class Killer(threading.Thread):
    """Kills one worker, or the second node, at a drawn moment of a sweep."""

    def __init__(self, draw: random.Random, cluster: Nodes, section: Section, folder: Path, log: Path):
        super().__init__(name="killer", daemon=True)
        self._nodes, self._section, self._folder, self._log, self._draw = cluster, section, folder, log, draw
        self._after = -1 if draw.random() < 0.15 else draw.randrange(N_ANSWERS - N_IN_A_BATCH)
        self.killed: str | None = None
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._is_due():
            if self._ended.wait(0.01):
                return
        self._ended.wait(self._draw.uniform(0, 0.2) if self._after >= 0 else self._draw.uniform(0, _AT_START_S))
        victims = self._nodes.workers(self._folder, second_only=self._section.node)
        if not victims or self._ended.is_set():
            return
        self.killed = f"behind answer {self._after}" if self._after >= 0 else "while it started"
        if self._section.node:
            self._nodes.kill_second()
        else:
            with suppress(psutil.NoSuchProcess):
                self._draw.choice(victims).kill()

    def end(self) -> None:
        self._ended.set()
        self.join()

    def _is_due(self) -> bool:
        if self._after < 0:
            return bool(self._nodes.workers(self._folder, second_only=self._section.node))
        return count(self._log) > self._after


class Nodes:
    """Two nodes of a cluster on this machine, which this process has joined."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args=_NODE)
        self._second: Any = None
        self.mend()
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")
        on_ray.hush(ray)

    def mend(self) -> None:
        """A new second node, if the last one was killed."""
        if self._second is None:
            self._second = self._cluster.add_node(**{name: value for name, value in _NODE.items() if name != "include_dashboard"})

    def workers(self, folder: Path, *, second_only: bool) -> list[psutil.Process]:
        """Living workers that have begun to load the model."""
        known = {int(path.name) for path in folder.iterdir()}
        nodes = [self._second] if second_only else [self._cluster.head_node, self._second]
        return [process for node in nodes for process in self._children(node) if process.pid in known]

    def kill_second(self) -> None:
        """All at once, as when the power goes."""
        node, self._second = self._second, None
        for process in [self._raylet(node), *self._children(node)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def _raylet(self, node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def _children(self, node: Any) -> list[psutil.Process]:
        try:
            return self._raylet(node).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def end(self) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()


@dataclass
class Campaign:
    """Sweeps on the cluster, compared with one that a single process made."""

    folder: Path
    draw: random.Random
    tasks: Path = field(init=False)
    found: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.tasks = write_tasks(self.folder / "tasks")
        os.environ.update(ray_standin.environment(self.tasks) | {"HF_DATASETS_CACHE": str(self.folder / "datasets")})
        index, output = task_manager(self.tasks), self.folder / "alone"
        run_sweep(config(), output, console=Console(file=io.StringIO()), load=lambda *_, **__: StandIn(size=3), task_manager=index)
        self.expected = left_behind(output)

    def section(self, nodes: Nodes, section: Section) -> dict[str, Any]:
        """All kills of a section; a kill that came too late does not count, and is tried again."""
        done: Counter[str] = Counter()
        moments: list[str] = []
        started = time.monotonic()
        for _ in range(section.kills):
            for _ in range(_TRIES):
                nodes.mend()
                moment = self._round(nodes, section, done)
                if moment is not None:
                    moments.append(moment)
                    break
        return {"kills": len(moments), "moments": moments, **done, "seconds": round(time.monotonic() - started)}

    def _round(self, nodes: Nodes, section: Section, done: Counter[str]) -> str | None:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        log, workers = folder / "answers.log", folder / "workers"
        workers.mkdir()
        ray_standin.behave(self.tasks, STANDIN_LOG=str(log), STANDIN_WORKERS=str(workers), STANDIN_PAUSE="0.05")
        console = Console(file=io.StringIO(), record=True, width=200)
        executor = RayExecutor(processes=2, parts=section.parts, opener=ray_standin.standin_session)
        killer = Killer(self.draw, nodes, section, workers, log)
        killer.start()
        try:
            with unseen(not section.sees_results):
                outcome = run_sweep(config(), folder / "out", console=console, executor=executor)
        finally:
            killer.end()
        before = Counter(self.found)
        self._compare(outcome, folder / "out", log, section if killer.killed else Section(0), done)
        if self.found != before:
            print(f"{folder}, killed {killer.killed}:\n{console.export_text()}", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(folder)
        done["sweeps"] += 1
        print(f"killed {killer.killed}, {dict(self.found) or 'nothing found'}", flush=True)
        return killer.killed

    def _compare(self, outcome: Outcome, output: Path, log: Path, section: Section, done: Counter[str]) -> None:
        """Count what differs from the sweep of one process."""
        answers = Counter(line.partition(" ")[2] for line in log.read_text().splitlines())
        repeated = sum(answers.values()) - len(answers)
        done["answers_computed_twice"] += repeated
        found = left_behind(output)
        asked = [sample_of(text) for run in self.expected.values() for text in run["samples"]]
        samples = [sample_of(text) for run in found.values() for text in run["samples"]]
        self.found += Counter(
            failed=outcome.failed + outcome.left,
            repeated=max(0, repeated - section.may_repeat * bool(section.kills)),
            lost=max(0, len(asked) - len(set(samples) & set(asked)) - (len(asked) - len(set(asked)))),
            doubled=sum(n - 1 for run in found.values() for n in Counter(map(sample_of, run["samples"])).values()),
            different=sum(found.get(run_id) != run for run_id, run in self.expected.items()) + len(set(found) - set(self.expected)),
            left_behind=sum(1 for path in output.rglob("*") if path.name.startswith(".") or path.suffix == ".lock"),
        )


def sample_of(text: str) -> tuple[str, int]:
    sample = json.loads(text)
    return sample["task"], sample["doc_id"]


@contextmanager
def unseen(is_so: bool) -> Iterator[None]:
    """Nobody writes the file by which workers know the results directory."""
    if not is_so:
        yield
        return
    with mock.patch.object(on_ray, "write_atomic", lambda path, content: None):
        yield


def config() -> SweepConfig:
    return validate(RAW | {"methods": METHODS})


def count(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def campaign(sections: dict[str, Section], folder: Path, seed: int) -> dict[str, Any]:
    """Run sections one after the other; their summary."""
    import ray

    made, started = Campaign(folder, random.Random(seed)), time.monotonic()
    nodes, done = Nodes(), {}
    try:
        for name, section in sections.items():
            print(f"{name}: {section.kills} kills", flush=True)
            done[name] = made.section(nodes, section)
    finally:
        nodes.end()
    complete = all(done[name]["kills"] == section.kills for name, section in sections.items())
    where = {
        "command": provenance.command_line(),
        "ray": ray.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "seed": seed,
    }
    found = {name: made.found[name] for name in FOUND}
    return {"sections": done, "found": found, "complete": complete, **where, "seconds": round(time.monotonic() - started)}


def main(run: Callable[..., dict[str, Any]] = campaign) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one kill of a worker and one of a node")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=FULL, default=list(FULL))
    asked = parser.parse_args()
    sections = {name: section for name, section in (SHORT if asked.short else FULL).items() if name in asked.only}
    with tempfile.TemporaryDirectory(prefix="ray-campaign-", ignore_cleanup_errors=True) as folder:
        summary = run(sections, Path(folder), asked.seed)
    print(json.dumps(summary))
    return 0 if summary["complete"] and not any(summary["found"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
