"""Breaks sweeps in every way that the world does, and shows that nothing is lost, doubled or different afterwards.

    python tests/fault_campaign.py [--seed 0] [--lanes 2] [--only SECTION ...]

The last line of its output is a JSON summary. Exit code 1 where anything was found.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and before forks
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import fault_sections as parts
import torch
from fault_checks import FOUND
from fault_sections import Section
from fault_trace import FULL, KILL, POWER

SECTIONS: dict[str, Callable[[Section], None]] = {
    "random": partial(parts.standin_kills, kills=60, span_s=4.0, pause_s=0.1),
    "two_workers": partial(parts.two_workers, kills=40, span_s=2.5, pause_s=0.1),
    "larger_limit": partial(parts.larger_limit, kills=12, span_s=1.5, pause_s=0.05),
    "kill_at_writes": partial(parts.at_writes, kind=KILL, again=True),
    "power_at_writes": partial(parts.at_writes, kind=POWER),
    "full_at_writes": partial(parts.at_writes, kind=FULL),
    "kill_in_report": partial(parts.in_report, kind=KILL),
    "full_in_report": partial(parts.in_report, kind=FULL),
    "small_disks": partial(parts.small_disks, limits=6),
    "logs": partial(parts.damaged_logs, step=30),
    "memory": partial(parts.short_of_memory, rounds=3, kills=0),
    "memory_and_kills": partial(parts.short_of_memory, rounds=3, kills=3),
    "minivlm": partial(parts.minivlm_kills, kills=20, limit=8),
}


def run(name: str, folder: Path, seed: int) -> tuple[Section, float]:
    """One section, and its seconds."""
    print(f"{name}: started", file=sys.stderr, flush=True)
    started, section = time.monotonic(), Section(folder, seed + sum(name.encode()))
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"  # the first attempt prepares them there, not in the user's cache
    try:
        SECTIONS[name](section)
    except Exception:
        section.findings["broken"].append(f"the campaign itself: {traceback.format_exc()}")
    seconds = round(time.monotonic() - started, 1)
    print(f"{name}: {seconds} s, found {dict(section.findings) or 'nothing'}", file=sys.stderr, flush=True)
    return section, seconds


def summary(done: dict[str, tuple[Section, float]]) -> dict[str, Any]:
    """All sections together, and each."""
    sections = [section for section, _ in done.values()]
    killed = [done[name][0] for name in done if name.startswith("kill_")]
    boundaries = {name for section in killed for name in section.boundaries}
    by_kind = sum((section.kills for section in sections), Counter())
    each = {
        name: {"kills": section.kills, "exit_codes": section.codes, "findings": section.findings, **section.facts, "seconds": seconds}
        for name, (section, seconds) in done.items()
    }
    return {
        "kills": by_kind.total(),
        "kills_by_kind": by_kind,
        "resumes": sum(section.resumes for section in sections),
        "sweeps_finished": sum(section.sweeps for section in sections),
        **{name: sum(len(section.findings.get(name, ())) for section in sections) for name in FOUND},
        "write_boundaries": len(boundaries),
        "write_boundaries_not_hit": sorted(boundaries.difference(*(section.hit for section in killed))),
        "sections": each,
    }


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", type=int, default=2, help="sections at a time")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--folder", type=Path, help="where results are left for inspection; default: a temporary one")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults_", ignore_cleanup_errors=True) as temporary:
        folder = args.folder or Path(temporary)
        with ProcessPoolExecutor(args.lanes, mp_context=get_context("fork")) as lanes:
            begun = {name: lanes.submit(run, name, folder / name, args.seed) for name in args.only}
        result = summary({name: section.result() for name, section in begun.items()})
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
