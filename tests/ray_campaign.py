"""Kills workers and whole nodes of a Ray cluster in the middle of sweeps, and shows that nothing is lost, doubled or different.

    python tests/ray_campaign.py [--seed 0] [--workers 20] [--nodes 3]

Two nodes of a cluster on this machine, one worker each, the driver on the first one; the model is a stand-in. One kill a sweep, by
SIGKILL: of a worker, or of the second node's raylet with its worker, which is then replaced. The moment is drawn: behind some answer
of all, or before a worker loads the model. After every sweep all that it left is compared with what one process leaves. The last
line of the output is a JSON summary. Exit code 1 where anything was found. Needs the extra `cluster`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import ray_standin
from fault_checks import FOUND, Expected
from rich.console import Console
from sweep_standin import write_tasks

from vlm_pruner_eval.sweep import on_ray, provenance
from vlm_pruner_eval.sweep.runner import run_sweep

N_ANSWERS, N_IN_A_BATCH = 10 * 12, 3
_NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


def one_kill(folder: Path, tasks: Path, expected: Expected, after: int, delay_s: float, raylet: int) -> tuple[bool, Counter[str]]:
    """A sweep with a kill: if it came in time, and what was found, with the answers that were computed `twice`."""
    folder.mkdir()
    log, killed = folder / "answers.log", folder / "killed"
    told = {"STANDIN_LOG": log, "STANDIN_KILLED": killed, "STANDIN_PAUSE": 0.05}
    ray_standin.behave(tasks, **told, STANDIN_AFTER=after, STANDIN_DELAY=delay_s, STANDIN_RAYLET=raylet)
    console = Console(file=io.StringIO(), record=True, width=200)
    with ray_standin.with_standin():
        outcome = run_sweep(ray_standin.config(), folder / "out", console=console, executor="ray", processes=2)
    answers = Counter(line.partition(" ")[2] for line in log.read_text().splitlines())
    findings = ray_standin.compare(folder / "out", expected)
    found = Counter({name: len(listed) for name, listed in findings.items()})
    found["lost"] += outcome.failed + outcome.left
    # the batch that a worker was at was not written down yet
    twice = answers.total() - len(answers)
    found["repeated"] += max(0, twice - N_IN_A_BATCH * killed.exists())
    if found.total():
        print(f"{dict(findings)}\n{console.export_text()}", file=sys.stderr, flush=True)
    print(f"behind answer {after}: killed {killed.exists()}, {twice} twice, found {found.total()}", flush=True)
    return killed.exists(), found + Counter(twice=twice)


def campaign(folder: Path, seed: int, wanted: dict[str, int]) -> dict[str, Any]:
    """So many workers and nodes killed: what was found, and at which answers they were killed."""
    ray = on_ray._import_ray(is_own=False)
    from ray.cluster_utils import Cluster

    started, draw = time.monotonic(), random.Random(seed)
    tasks = write_tasks(folder / "tasks")
    os.environ.update(ray_standin.environment(tasks))
    expected = ray_standin.alone(tasks, folder / "alone")
    cluster = Cluster(initialize_head=True, head_node_args=_NODE | {"include_dashboard": False})
    second = cluster.add_node(**_NODE)
    moments: dict[str, list[int]] = {kind: [] for kind in wanted}
    found: Counter[str] = Counter()
    with on_ray._connected(ray, cluster.address, None):
        for kind, listed in moments.items():
            for number in range(2 * wanted[kind]):  # some come too late
                if len(listed) == wanted[kind]:
                    break
                after = 0 if draw.random() < 0.15 else draw.randrange(N_ANSWERS - 2 * N_IN_A_BATCH)
                raylet = second.all_processes["raylet"][0].process.pid if kind == "nodes" else 0
                was_killed, more = one_kill(folder / f"{kind}{number}", tasks, expected, after, draw.uniform(0, 0.2), raylet)
                found += more
                listed.extend([after] * was_killed)
                if was_killed and raylet:
                    cluster.remove_node(second, allow_graceful=False)
                    second = cluster.add_node(**_NODE)
    cluster.shutdown()
    return {
        "kills": {kind: len(found_at) for kind, found_at in moments.items()},
        "behind_answers": moments,
        "answers_computed_twice": found["twice"],
        "found": {name: found[name] for name in FOUND},
        "complete": all(len(moments[kind]) == count for kind, count in wanted.items()),
        "command": provenance.command_line(),
        "versions": {"ray": ray.__version__, "python": platform.python_version()},
        "seed": seed,
        "seconds": round(time.monotonic() - started),
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=20, help="workers to be killed")
    parser.add_argument("--nodes", type=int, default=3, help="nodes to be killed")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray-campaign-", ignore_cleanup_errors=True) as folder:
        summary = campaign(Path(folder), asked.seed, {"workers": asked.workers, "nodes": asked.nodes})
    print(json.dumps(summary))
    return 0 if summary["complete"] and not any(summary["found"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
