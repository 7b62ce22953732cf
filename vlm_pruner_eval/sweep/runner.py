"""Runs a sweep: what is left of its grid is handed to an executor, in a directory that this process holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_pruner_eval.errors import ConfigError, StoppedError
from vlm_pruner_eval.lmms.plan import Part
from vlm_pruner_eval.sweep import preflight, provenance
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.directory import hold
from vlm_pruner_eval.sweep.executors import Executor, Local, Shard, Work
from vlm_pruner_eval.sweep.executors.allotment import read_todo
from vlm_pruner_eval.sweep.executors.ranks import Ranks, rank_of
from vlm_pruner_eval.sweep.grid import expand
from vlm_pruner_eval.sweep.opening import Loader
from vlm_pruner_eval.sweep.status import HALF_DONE, read_status
from vlm_pruner_eval.sweep.store import FAILED, FINISHED, Store


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to: runs of the grid, how many were finished before, how many are failed now, how many are not made yet."""

    runs: int
    skipped: int
    failed: int
    left: int = 0


def run_sweep(
    config: SweepConfig,
    output: Path,
    *,
    retry_failed: bool = False,
    rerun: str | None = None,
    executor: Executor | None = None,
    shard: Part | None = None,
    todo: Path | None = None,
    console: Console | None = None,
    load: Loader | None = None,
    task_manager: Any = None,
) -> Outcome:
    """Run every run of the grid that is neither finished nor failed, from its last whole batch on.

    Under torchrun every rank calls this; the ranks answer every run together.

    Parameters
    ----------
    config
        A validated sweep file.
    output
        Results directory; nothing stays there of a sweep that is refused.
    retry_failed
        Run those that failed, and only those.
    rerun
        A method (name or label) or a run (key) to answer anew, besides what is left.
    executor
        Makes the runs; default: `executors.Local`.
    shard
        Be one of several processes that share the grid, perhaps on other machines, with the same `output`; in place of an executor.
    todo
        Of a shard that a sweep has started itself: the file with its runs.
    console
        Progress goes there; default: standard error.
    load, task_manager
        Replace the loader of models and lmms-eval's task index, for programs that bring their own.

    Raises
    ------
    ConfigError
        Anything wrong with the request: methods, tasks, checkpoint, output directory, another process that uses it.
    StoppedError
        Nothing can go on, for example because the disk is full.
    """
    if shard is not None and executor is not None:
        raise ConfigError("run_sweep: got an executor and a shard, expected one of them.")
    runs = expand(config)
    work = Work(config, Store(output), runs, [], console or Console(stderr=True), load, task_manager)
    work.store.check_writable()
    preflight.refuse_other_sweep(work.store, config)
    again = preflight.chosen_again(runs, rerun)
    rank = rank_of()
    if rank is not None:
        return _run_rank(work, rank, retry_failed, again)
    with hold(output, shard, is_child=todo is not None) as lock:
        before = _status(work)
        if todo is None:
            _say_what_differs(work, before)
        stamps, made_by = (_stamps(work, before, retry_failed, again), {}) if todo is None else read_todo(todo, work.runs)
        work = replace(work, status=before, stamps=stamps, check=lock.check, made_by=made_by)
        with _told_when_stopped(work, is_silent=todo is not None):
            _make(work, Shard(shard) if shard is not None else executor or Local())
        after = _status(work)
    return _outcome(work, after, is_shard=shard is not None)


@contextmanager
def _told_when_stopped(work: Work, *, is_silent: bool) -> Iterator[None]:
    """Say what is kept when Ctrl-C or SIGTERM stops the sweep; `is_silent` of processes for which another one speaks."""
    try:
        yield
    except KeyboardInterrupt:
        if not is_silent:
            work.console.print(_stopped(work.store.root), markup=False, highlight=False, soft_wrap=True)
        raise


def _stopped(root: Path) -> str:
    try:
        found = read_status(root, lambda directory: None)
    except ConfigError:  # the grid was not written yet
        return "Stopped before the first run; nothing is lost, the same command begins again."
    parts = [f"{found.counts[FINISHED]} of {len(found.runs)} runs finished"]
    begun = [run for run in found.runs if run.state == HALF_DONE]
    if len(begun) == 1:
        parts.append(f"{begun[0].answers} of {begun[0].expected or '?'} answers of {begun[0].key} kept")
    elif begun:
        parts.append(f"{sum(run.answers for run in begun)} answers of {len(begun)} runs kept")
    return f"Stopped. {', '.join(parts)}; the same command goes on."


def _status(work: Work) -> dict[str, str | None]:
    """How the runs of the grid stand; records of other checkpoint files than are there now do not count."""
    checkpoint = provenance.checkpoint_files(work.config.model.pretrained, work.config.model.revision)
    return {run.run_id: work.store.status(run.run_id, checkpoint) for run in work.runs}


def _say_what_differs(work: Work, status: dict[str, str | None]) -> None:
    for notice in preflight.notices(work.store, work.runs, status):
        work.console.print(notice, markup=False, highlight=False, soft_wrap=True)


def _stamps(work: Work, status: dict[str, str | None], retry_failed: bool, again: Set[str]) -> dict[str, str | None]:
    """Runs to be made, with the stamps of their records: those without one, or the failed ones; and those asked for again."""
    asked = FAILED if retry_failed else None
    return {run_id: work.store.stamp(run_id) for run_id, found in status.items() if found == asked or run_id in again}


def _make(work: Work, executor: Executor) -> None:
    """Let the executor make the runs that have a stamp; where there are none, only the grid is written, and order made."""
    work = replace(work, todo=[run for run in work.runs if run.run_id in work.stamps])
    if work.todo:
        executor.run(work)
    else:
        work.begin()
        work.tidy()


def _run_rank(work: Work, part: Part, retry_failed: bool, again: Set[str]) -> Outcome:
    """One rank of torchrun: the first one decides what is to be done."""
    ranks = Ranks.join(part)
    with _held_by_first(work.store.root, ranks) as check:
        before = ranks.agree("view of the directory", _status(work) if ranks.is_first else None)
        if ranks.is_first:
            _say_what_differs(work, before)
        stamps = ranks.agree("runs", _stamps(work, before, retry_failed, again) if ranks.is_first else None)
        work = replace(work, console=ranks.console(work.console), status=before, stamps=stamps, check=check)
        if ranks.is_first or stamps:
            with _told_when_stopped(work, is_silent=not ranks.is_first):
                _make(work, ranks)
        ranks.part_company()
        after = _status(work)
    return _outcome(work, after)


@contextmanager
def _held_by_first(root: Path, ranks: Ranks) -> Iterator[Callable[[], None]]:
    """The directory, held by the first rank for all; gives what checks that it still is."""
    with ExitStack() as stack:
        check = _nothing
        if ranks.is_first:
            try:
                check = stack.enter_context(hold(root)).check
            except (ConfigError, StoppedError):
                ranks.agree("hold of the directory", False)
                ranks.part_company()
                raise
        if not ranks.agree("hold of the directory", True):
            ranks.part_company()
            raise ConfigError("output: the first rank does not hold the directory, and says why.")
        yield check


def _nothing() -> None:
    """The other ranks have no lock that could be lost."""


def _outcome(work: Work, after: dict[str, str | None], *, is_shard: bool = False) -> Outcome:
    """Counts, and a line where something is left to do."""
    statuses, total = list(after.values()), len(work.runs)
    skipped = sum(status == FINISHED and run_id not in work.stamps for run_id, status in work.status.items())
    failed, left = statuses.count(FAILED), statuses.count(None)
    if skipped == total:
        work.console.print(f"All {total} runs are finished already.", highlight=False)
    if failed:
        work.console.print(f"{failed} of {total} runs failed; --retry-failed repeats only those.", highlight=False)
    if left:
        how = "other shards make them, or this command again" if is_shard else "without --retry-failed they are run"
        work.console.print(f"{left} of {total} runs are left; {how}.", highlight=False)
    return Outcome(total, skipped, failed, left)
