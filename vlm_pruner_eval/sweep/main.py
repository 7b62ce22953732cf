"""The command `sweep` behind its options: which process this is, and what it reports at its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_pruner_eval.errors import ConfigError, StoppedError
from vlm_pruner_eval.exit_codes import FAILED
from vlm_pruner_eval.sweep import early
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.signals import terminable

Report = Callable[[Path], dict[str, Path]]


@dataclass(frozen=True)
class Request:
    """The command line."""

    config: SweepConfig
    output: Path
    retry_failed: bool = False
    rerun: str | None = None
    executor: str | None = None
    processes: int | None = None
    address: str | None = None
    todo: Path | None = None


@dataclass(frozen=True)
class Ended:
    """The exit code, and what a program may want to know."""

    code: int
    summary: Mapping[str, Any] = field(default_factory=dict)


def run(asked: Request, report: Report, show: Report) -> Ended:
    """Run a sweep and report it.

    Parameters
    ----------
    report
        Writes and prints the report of a results directory, and returns its files.
    show
        The same of a sweep that was finished before; need not write what is there.

    Raises
    ------
    ConfigError, StoppedError
        See `run_sweep`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "torchrun: a sweep was started by it with several processes, expected one; start `vlm-pruner-eval sweep` itself, which uses "
            "all GPUs of this machine, and give the same command on others that see the folder."
        )
    if asked.todo is not None:
        return Ended(_as_child(asked))
    n_runs = early.look(asked.config, asked.output, rerun=asked.rerun)
    if n_runs is not None:
        print(f"All {n_runs} runs are finished already.", file=sys.stderr)
        return Ended(0, {"runs": n_runs, "skipped": n_runs, "failed": 0, "left": 0, "report": str(show(asked.output)["md"])})
    if "lmms_eval" not in sys.modules:
        print(f"{asked.config.name}: loading transformers and lmms-eval ...", file=sys.stderr, flush=True)
    from vlm_pruner_eval.sweep.runner import run_sweep

    with terminable():
        outcome = run_sweep(
            asked.config,
            asked.output,
            retry_failed=asked.retry_failed,
            rerun=asked.rerun,
            executor=asked.executor or "local",
            processes=asked.processes,
            address=asked.address,
        )
        if outcome.held:
            print(f"{outcome.held} units are being made by other processes; the last of them writes the report.", file=sys.stderr)
        paths = report(asked.output) if not outcome.held else None
    summary = {"runs": outcome.runs, "skipped": outcome.skipped, "failed": outcome.failed, "left": outcome.left}
    return Ended(FAILED if outcome.failed else 0, summary | {"report": str(paths["md"]) if paths else None})


def _as_child(asked: Request) -> int:
    """A process that a sweep has started itself: that one reads the outcome from the store, and tells a stop from a crash by the code."""
    from vlm_pruner_eval.sweep.runner import run_as_child
    from vlm_pruner_eval.sweep.workers import STOPPED, end_with_parent

    end_with_parent()
    with terminable():
        try:
            run_as_child(asked.config, asked.output, asked.todo)
        except StoppedError as error:
            print(f"vlm-pruner-eval: {error}", file=sys.stderr)
            return STOPPED
    return 0
