"""The command `sweep` behind its options: which process this is, and what it reports at its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_pruner_eval.errors import StoppedError
from vlm_pruner_eval.exit_codes import FAILED
from vlm_pruner_eval.lmms.plan import Part
from vlm_pruner_eval.sweep import early
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.directory import is_held_by_parent
from vlm_pruner_eval.sweep.lock import Lock
from vlm_pruner_eval.sweep.signals import terminable

if TYPE_CHECKING:
    from vlm_pruner_eval.sweep.runner import Outcome

Report = Callable[[Path], dict[str, Path]]


@dataclass(frozen=True)
class Asked:
    """The command line."""

    config: SweepConfig
    output: Path
    retry_failed: bool = False
    rerun: str | None = None
    executor: str | None = None
    processes: int | None = None
    shard: str | None = None
    todo: Path | None = None
    address: str | None = None
    parts: int | None = None

    @property
    def is_alone(self) -> bool:
        """True of a sweep that no other process takes part in."""
        others = (self.executor, self.processes, self.shard, self.todo, self.address, self.parts)
        return all(option is None for option in others) and os.environ.get("WORLD_SIZE", "1") == "1"


@dataclass(frozen=True)
class Ended:
    """The exit code, and what a program may want to know; nothing of processes that others speak for."""

    code: int
    summary: Mapping[str, Any] = field(default_factory=dict)


def run(asked: Asked, report: Report, show: Report) -> Ended:
    """Run a sweep and report it.

    Parameters
    ----------
    asked
        The command line.
    report
        Writes and prints the report of a results directory, and returns its files.
    show
        The same of a sweep that was finished before; need not write what is there.

    Raises
    ------
    ConfigError, StoppedError
        See `run_sweep`, `executors.choose` and `Part.parse`.
    """
    n_runs = early.look(asked.config, asked.output, rerun=asked.rerun) if asked.is_alone else None
    if n_runs is not None:
        print(f"All {n_runs} runs are finished already.", file=sys.stderr)
        return Ended(0, {"runs": n_runs, "skipped": n_runs, "failed": 0, "report": str(show(asked.output)["md"])})
    if "lmms_eval" not in sys.modules and asked.todo is None:
        print(f"{asked.config.name}: loading transformers and lmms-eval ...", file=sys.stderr, flush=True)
    from vlm_pruner_eval.sweep.executors import choose
    from vlm_pruner_eval.sweep.executors.ranks import rank_of
    from vlm_pruner_eval.sweep.runner import run_sweep

    rank, shard = rank_of(), None if asked.shard is None else Part.parse(asked.shard)
    how = {"processes": asked.processes, "address": asked.address, "parts": asked.parts}
    executor = choose(asked.executor, **how, shard=shard, is_rank=rank is not None)
    options = {"retry_failed": asked.retry_failed, "rerun": asked.rerun, "executor": executor, "shard": shard, "todo": asked.todo}
    with terminable():
        if asked.todo is not None:
            return Ended(_as_child(asked, options))
        outcome = run_sweep(asked.config, asked.output, **options)
        if rank is not None and rank.index:
            return Ended(0)  # the first rank speaks for all
        paths = report(asked.output) if shard is None else _report_once(asked.output, outcome, report)
    summary = {"runs": outcome.runs, "skipped": outcome.skipped, "failed": outcome.failed}
    if shard is not None:
        summary |= {"left": outcome.left}
    return Ended(FAILED if outcome.failed else 0, summary | {"report": str(paths["md"]) if paths else None})


def _as_child(asked: Asked, options: dict) -> int:
    """A process that a sweep has started itself: that one reads the outcome from the store, and tells a stop from a crash by the code."""
    from vlm_pruner_eval.sweep.executors.allotment import STOPPED, end_with_parent
    from vlm_pruner_eval.sweep.runner import run_sweep

    if is_held_by_parent(asked.output):
        end_with_parent()
    try:
        run_sweep(asked.config, asked.output, **options)
    except StoppedError as error:
        print(f"vlm-pruner-eval: {error}", file=sys.stderr)
        return STOPPED
    return 0


def _report_once(output: Path, outcome: Outcome, report: Report) -> dict[str, Path] | None:
    """The report of a grid that shards made: by one that finds no run left; of two that do at the same time, by one."""
    if outcome.left:
        print(f"{outcome.left} runs are left, so there is no report yet; the shard that makes the last one writes it.", file=sys.stderr)
        return None
    lock = Lock(output / "report.lock", "writes the report")
    if holder := lock.acquire():
        print(f"The report is being written by {holder}.", file=sys.stderr)
        return None
    try:
        return report(output)
    finally:
        lock.release()
