"""Breaks sweeps in every way that the world does, and shows that nothing is lost, doubled or different afterwards.

    python tests/fault_campaign.py [--short] [--seed 0] [--lanes 2] [--only SECTION ...]

The last line of its output is a JSON summary. Exit code 1 where anything was found.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and before forks
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import fault_damage
import fault_sections as parts
import torch
from fault_sections import Section
from fault_sweep import use_cache
from fault_trace import FULL, KILL, POWER

FOUND = ("lost", "doubled", "repeated", "different", "broken", "left_behind")
JOURNAL, RECORD = "write runs/RUN/journal.jsonl", "rename runs/RUN/run.json"
SOME = (JOURNAL, "open runs/RUN/journal.jsonl", "write runs/RUN/samples.jsonl (temporary)", RECORD, "remove runs/RUN/journal.jsonl")
NEEDS_SPACE = (JOURNAL, "open sweep.json (temporary)", "write images/IMAGE.jpg (temporary)", "write runs/RUN/run.json (temporary)")
Sections = dict[str, Callable[[Section], None]]


def full() -> Sections:
    """About half an hour of processor time."""
    kills = functools.partial(parts.standin_kills, kills=130, span_s=6.0, pause_s=0.6)
    return {
        "random_1": kills,
        "kill_in_report": functools.partial(parts.in_report, kind=KILL),
        "full_in_report": functools.partial(parts.in_report, kind=FULL),
        "random_2": kills,
        "minivlm": functools.partial(parts.minivlm_kills, kills=20, limit=8, real=2),
        "kill_at_writes": functools.partial(parts.at_writes, kind=KILL, each=2, again=True),
        "power_at_writes": functools.partial(parts.at_writes, kind=POWER, each=2),
        "full_at_writes": functools.partial(parts.at_writes, kind=FULL, each=2),
        "disks": functools.partial(parts.full_disks, levels=16, limits=6),
        "journals": functools.partial(fault_damage.damaged_journals, step=1),
        "memory": functools.partial(fault_damage.short_of_memory, rounds=10, kills=False),
        "memory_and_kills": functools.partial(fault_damage.short_of_memory, rounds=10, kills=True),
    }


def short() -> Sections:
    """Some of it in less than a minute, without the report and without MiniVLM."""
    return {
        "random": functools.partial(parts.standin_kills, kills=8, span_s=1.5, pause_s=0.02, has_report=False),
        "kill_at_writes": functools.partial(parts.at_writes, kind=KILL, each=1, only=SOME),
        "power_at_writes": functools.partial(parts.at_writes, kind=POWER, each=1, only=(JOURNAL, RECORD)),
        "full_at_writes": functools.partial(parts.at_writes, kind=FULL, each=1, only=NEEDS_SPACE),
        "journals": functools.partial(fault_damage.damaged_journals, step=100),
        "memory": functools.partial(fault_damage.short_of_memory, rounds=1, kills=True),
    }


def run_lanes(sections: Sections, folder: Path, seed: int, lanes: int) -> dict[str, dict[str, Any]]:
    """All sections, so many at a time, each in a fork of its own; what they found by name."""
    waiting, running = list(sections.items()), {}
    while waiting or running:
        while waiting and len(running) < lanes:
            name, work = waiting.pop(0)
            print(f"{name}: started", file=sys.stderr, flush=True)
            pid = os.fork()
            if not pid:
                _lane(name, work, folder / name, seed)
            running[pid] = name
        pid, _ = os.wait()
        print(f"{running[pid]}: {_read(folder, running[pid])['seconds']} s", file=sys.stderr, flush=True)
        del running[pid]
    return {name: _read(folder, name) for name in sections}


def _lane(name: str, work: Callable[[Section], None], folder: Path, seed: int) -> None:
    folder.mkdir()
    use_cache(folder / "datasets")
    started, section = time.monotonic(), Section(folder, seed + sum(name.encode()))
    try:
        work(section)
    except BaseException:
        section.findings.broken.append(f"the campaign itself: {traceback.format_exc()}")
    (folder / "found.json").write_text(json.dumps(section.as_json() | {"seconds": round(time.monotonic() - started, 1)}))
    os._exit(0)


def _read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "found.json").read_text())


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All sections together."""
    kills: Counter[str] = Counter()
    boundaries, hit = set(), set()
    for name, section in found.items():
        kills.update(section["kills"])
        if name.startswith("kill_"):
            boundaries |= set(section["boundaries"])
            hit |= set(section["hit"])
    return {
        "kills": sum(kills.values()),
        "kills_by_kind": dict(kills),
        "resumes": sum(section["resumes"] for section in found.values()),
        "sweeps_finished": sum(section["sweeps_finished"] for section in found.values()),
        **{name: sum(section[name] for section in found.values()) for name in FOUND},
        "write_boundaries": len(boundaries),
        "write_boundaries_hit": len(boundaries & hit),
        "write_boundaries_not_hit": sorted(boundaries - hit),
        "sections": {
            name: {key: value for key, value in section.items() if key not in ("boundaries", "hit")} | {"hit": section["hit"]}
            for name, section in found.items()
        },
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="less than a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=2, help="sections at a time")
    parser.add_argument("--only", nargs="*", help="names of sections")
    parser.add_argument("--folder", type=Path, help="where results are left for inspection; default: a temporary one")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = {name: work for name, work in (short() if args.short else full()).items() if not args.only or name in args.only}
    folder = args.folder or Path(tempfile.mkdtemp(prefix="faults_"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        found = run_lanes(chosen, folder, args.seed, args.lanes)
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    result = summary(found)
    versions = {name: metadata.version(name) for name in ("lmms-eval", "torch", "transformers", "datasets")}
    about = {
        "seconds": round(time.monotonic() - started, 1),
        "seed": args.seed,
        "command": shlex.join(["python", "tests/fault_campaign.py", *argv]),
        "versions": {"python": platform.python_version(), "system": platform.platform()} | versions,
    }
    print(json.dumps(result | about), flush=True)
    return int(any(result[name] for name in FOUND))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
