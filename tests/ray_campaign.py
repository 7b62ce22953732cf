"""Kills workers and whole nodes of a Ray cluster in the middle of sweeps, and shows that nothing is lost, doubled or different.

    python tests/ray_campaign.py [--seed 0] [--workers 20] [--nodes 3]

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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import psutil
import ray_standin
from fault_checks import FOUND, Expected
from rich.console import Console
from sweep_standin import write_tasks

from vlm_pruner_eval.sweep import provenance
from vlm_pruner_eval.sweep.runner import run_sweep

N_ANSWERS, N_IN_A_BATCH = 10 * 12, 3
_NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}
_AT_START_S, _TRIES = 1.0, 3


class Nodes:
    """Two nodes of a cluster on this machine, which this process has joined."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args=_NODE | {"include_dashboard": False})
        self._second: Any = None
        self.mend()
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")

    def mend(self) -> None:
        """A new second node, if the last one was killed."""
        if self._second is None:
            self._second = self._cluster.add_node(**_NODE)

    def workers(self, folder: Path, *, second_only: bool) -> list[psutil.Process]:
        """Living workers that have loaded the model, by the files in `folder`."""
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

    def end(self) -> None:
        """The cluster goes."""
        import ray

        ray.shutdown()
        self._cluster.shutdown()

    def _raylet(self, node: Any) -> psutil.Process:
        return psutil.Process(node.all_processes["raylet"][0].process.pid)

    def _children(self, node: Any) -> list[psutil.Process]:
        try:
            return self._raylet(node).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


class Killer(threading.Thread):
    """Kills one worker, or the second node, at a drawn moment of a sweep."""

    def __init__(self, draw: random.Random, nodes: Nodes, folder: Path, log: Path, *, node: bool):
        super().__init__(name="killer", daemon=True)
        self._nodes, self._node, self._folder, self._log, self._draw = nodes, node, folder, log, draw
        self._after = -1 if draw.random() < 0.15 else draw.randrange(N_ANSWERS - 2 * N_IN_A_BATCH)
        self.killed: str | None = None
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._is_due():
            if self._ended.wait(0.01):
                return
        self._ended.wait(self._draw.uniform(0, 0.1 if self._after >= 0 else _AT_START_S))
        victims = self._nodes.workers(self._folder, second_only=self._node)
        if not victims or self._ended.is_set():
            return
        self.killed = f"behind answer {self._after}" if self._after >= 0 else "while it started"
        if self._node:
            self._nodes.kill_second()
        else:
            with suppress(psutil.NoSuchProcess):
                self._draw.choice(victims).kill()

    def end(self) -> None:
        """No kill any more."""
        self._ended.set()
        self.join()

    def _is_due(self) -> bool:
        if self._after < 0:
            return bool(self._nodes.workers(self._folder, second_only=self._node))
        return self._log.exists() and self._log.read_bytes().count(b"\n") > self._after


@dataclass
class Campaign:
    """Sweeps on the cluster, compared with one that a single process made."""

    folder: Path
    draw: random.Random
    nodes: Nodes
    tasks: Path
    expected: Expected
    found: Counter[str]
    done: Counter[str]

    def kill(self, *, node: bool) -> str | None:
        """One sweep with a kill; None if that came too late."""
        self.nodes.mend()
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        log, workers = folder / "answers.log", folder / "workers"
        workers.mkdir()
        ray_standin.behave(self.tasks, STANDIN_LOG=str(log), STANDIN_WORKERS=str(workers), STANDIN_PAUSE="0.05")
        console = Console(file=io.StringIO(), record=True, width=200)
        killer = Killer(self.draw, self.nodes, workers, log, node=node)
        killer.start()
        try:
            with ray_standin.with_standin():
                outcome = run_sweep(ray_standin.config(), folder / "out", console=console, executor="ray", processes=2)
        finally:
            killer.end()
        answers = Counter(line.partition(" ")[2] for line in log.read_text().splitlines())
        repeated = answers.total() - len(answers)
        findings = vars(ray_standin.compare(self.tasks, folder / "out", self.expected))
        found = Counter({name: len(listed) for name, listed in findings.items()})
        found["lost"] += outcome.failed + outcome.left
        # the batch that a worker was at was not written down yet
        found["repeated"] += max(0, repeated - N_IN_A_BATCH * bool(killer.killed))
        self.found += found
        self.done += Counter(sweeps=1, answers_computed_twice=repeated)
        if found.total():
            print(f"{folder}, killed {killer.killed}: {findings}\n{console.export_text()}", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(folder)
        print(f"{'node' if node else 'worker'} killed {killer.killed}, {dict(found) if found.total() else 'nothing found'}", flush=True)
        return killer.killed


def campaign(folder: Path, seed: int, workers: int, nodes: int) -> dict[str, Any]:
    """So many workers and nodes killed: the summary."""
    import ray

    started = time.monotonic()
    tasks = write_tasks(folder / "tasks")
    os.environ.update(ray_standin.environment(tasks) | {"HF_DATASETS_CACHE": str(folder / "datasets")})
    expected = ray_standin.alone(tasks, folder / "alone")
    cluster = Nodes()
    made = Campaign(folder, random.Random(seed), cluster, tasks, expected, Counter(), Counter())
    moments: dict[str, list[str]] = {"workers": [], "nodes": []}
    try:
        for kind in ["workers"] * workers + ["nodes"] * nodes:
            tries = (made.kill(node=kind == "nodes") for _ in range(_TRIES))
            moments[kind] += [next(filter(None, tries), "(too late)")]
    finally:
        cluster.end()
    return {
        "kills": {kind: len(listed) - listed.count("(too late)") for kind, listed in moments.items()},
        "moments": moments,
        **made.done,
        "found": {name: made.found[name] for name in FOUND},
        "complete": not any("(too late)" in listed for listed in moments.values()),
        "command": provenance.command_line(),
        "ray": ray.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "seed": seed,
        "seconds": round(time.monotonic() - started),
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=20, help="sweeps in which a worker is killed")
    parser.add_argument("--nodes", type=int, default=3, help="sweeps in which a node is killed")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray-campaign-", ignore_cleanup_errors=True) as folder:
        summary = campaign(Path(folder), asked.seed, asked.workers, asked.nodes)
    print(json.dumps(summary))
    return 0 if summary["complete"] and not any(summary["found"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
