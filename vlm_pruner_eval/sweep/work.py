"""The worker loop: take a unit that nobody holds and that is not done, do it, until none is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.store.answers import AnswerLog
from vlm_pruner_eval.store.claims import Claim, check_locks
from vlm_pruner_eval.store.folder import Store
from vlm_pruner_eval.store.schema import FAILED, FINISHED
from vlm_pruner_eval.sweep import preflight, provenance
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import Run, expand, grid_of
from vlm_pruner_eval.sweep.metrics.score_line import score_line, title
from vlm_pruner_eval.sweep.opening import Loader, open_session, sharing
from vlm_pruner_eval.sweep.progress import SweepProgress
from vlm_pruner_eval.sweep.session import Session
from vlm_pruner_eval.sweep.units import Status, WorkUnit, folders_of, groups, status_of, units_of

_SKIPPED = {FINISHED: "finished before, skipped", FAILED: "failed before, skipped; --retry-failed repeats it", None: "left"}


@dataclass(frozen=True)
class Work:
    """A sweep that is to be done.

    Attributes
    ----------
    config, store
        What, and where to.
    runs, units
        The whole grid.
    todo
        The units to be made; those of them that have a record are made anew.
    console
        For progress and notices.
    load, task_manager
        In place of the loader of models and lmms-eval's task index; None: the real ones.
    checkpoint
        Identity of the checkpoint's files: records of others do not count.
    status
        Of all units before.
    command
        See `Session`.
    """

    config: SweepConfig
    store: Store
    runs: Sequence[Run]
    units: Sequence[WorkUnit]
    todo: Sequence[WorkUnit]
    console: Console
    load: Loader | None = None
    task_manager: Any = None
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    status: Status = field(default_factory=dict)
    command: str | None = None

    def begin(self) -> None:
        """Write the grid, only after everything that can be checked has been; and retire the records of units that are made anew.

        Answers of a unit with samples that failed go, and those of a finished one; of one that failed otherwise they are used again.
        """
        self.store.begin(grid_of(self.config, self.runs, folders_of(self.units)))
        for unit in self.todo:
            state = self.status.get(unit)
            if state is None:
                continue
            with Claim(unit.stored(self.store).folder) as claim:
                if not claim.acquire():
                    continue
                unit.stored(self.store).forget()
                log = AnswerLog(unit.stored(self.store).folder, {})
                if state == FINISHED or log.has_failures():
                    log.delete()

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Begin for other processes, which check what this one can't; nothing stays if they refuse a sweep that is new."""
        is_new = not (self.store.root / "sweep.json").exists()
        self.begin()
        try:
            yield
        except ConfigError:
            if is_new:
                self.store.withdraw()
            raise

    def is_made(self, unit: WorkUnit) -> bool:
        """Tell if a unit has a record that counts."""
        return status_of(self.store, [unit], self.config.limit, self.checkpoint)[unit] is not None

    def say(self, text: str) -> None:
        """Print a line for people."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def outcome(self, unit: WorkUnit, took_s: float | None) -> str:
        """Words for a unit that was made: its scores, or why it failed."""
        record = unit.stored(self.store).read()
        if record is None:
            return "is answered anew by another process"
        unpruned = self.store.unit(self.runs[0].run_id, unit.folder).read() if unit.run is not self.runs[0] else None
        return score_line([record], [unpruned] if unpruned and unpruned.status == FINISHED else None, took_s, is_named=False)


def work_of(
    config: SweepConfig,
    root: Path,
    console: Console,
    *,
    load: Loader | None = None,
    task_manager: Any = None,
    retry_failed: bool = False,
    rerun: str | None = None,
    todo: Collection[str] | None = None,
    command: str | None = None,
) -> Work:
    """Look at a results directory and decide what is to be done there; writes nothing.

    Parameters
    ----------
    todo
        Paths of units, of a process that is told them; those that have a record meanwhile are left out.

    Raises
    ------
    ConfigError
        See `run_sweep`.
    """
    runs = expand(config)
    units = units_of(config, runs)
    store = Store(root)
    store.check_writable()
    check_locks(root)
    preflight.refuse_other_sweep(store, config)
    again = preflight.chosen_again(runs, rerun)
    checkpoint = provenance.checkpoint_files(config.model.pretrained, config.model.revision)
    status = status_of(store, units, config.limit, checkpoint)
    wanted = FAILED if retry_failed else None

    def is_wanted(unit: WorkUnit) -> bool:
        if todo is not None:
            return unit.path in todo and status[unit] is None
        return status[unit] == wanted or unit.run.run_id in again

    chosen = [unit for unit in units if is_wanted(unit)]
    return Work(config, store, runs, units, chosen, console, load, task_manager, checkpoint, status, command)


def work_here(work: Work, opener: Callable[..., Session] = open_session) -> None:
    """Make the units of `work.todo` in this process; units that another process holds are left to it.

    Raises
    ------
    ConfigError
        What can't be run as written; nothing has been written then.
    StoppedError
        Nothing can go on.
    """
    work.say(_header(work))
    session = opener(work.config, work.store, work.todo, console=work.console, load=work.load, task_manager=work.task_manager)
    work = replace(work, checkpoint=session.checkpoint)  # of the hub, they may have come just now
    work.begin()
    todo = set(work.todo)
    left = dict(Counter(unit.task for unit in todo))
    with SweepProgress(work.console, len(work.units), left) as progress:
        context = replace(session.context, on_requests=progress.asked, on_answers=progress.answered)
        session = replace(session, command=work.command, context=context)
        for unit in work.units:
            if unit not in todo:
                progress.end(_title(unit), unit.task, _SKIPPED[work.status.get(unit)], is_made=False)
        for group in groups(work.todo, shared=work.config.share_prefix):
            _make_group(work, session, group, progress)
    for unit in work.todo:
        if not work.is_made(unit):
            work.say(f"{unit.name}: left to another process, which works on it")


def _make_group(work: Work, session: Session, group: Sequence[WorkUnit], progress: SweepProgress) -> None:
    """Make those units of a group that nobody holds or has made."""
    with ExitStack() as stack:
        claimed = [unit for unit in group if _claim(work, unit, stack)]
        if not claimed:
            return
        sharing_session = stack.enter_context(_together(session, claimed, progress))
        for unit in claimed:
            progress.start(_title(unit))
            sharing_session.make(unit)
            progress.end(_title(unit), unit.task, work.outcome(unit, progress.took_s))


def _claim(work: Work, unit: WorkUnit, stack: ExitStack) -> bool:
    if work.is_made(unit):
        return False
    claim = Claim(unit.stored(work.store).folder)
    if not claim.acquire():
        return False
    if work.is_made(unit):  # by one who held the claim until this moment
        claim.release()
        return False
    stack.callback(claim.release)
    return True


@contextmanager
def _together(session: Session, units: Sequence[WorkUnit], progress: SweepProgress) -> Iterator[Session]:
    """A session that makes units of one task; their answers are computed together if the sweep file asks for it."""
    with sharing(session, units) as sharing_session:
        if sharing_session.sources is not None:
            progress.share([_title(unit) for unit in units])
        yield sharing_session


def _title(unit: WorkUnit) -> str:
    return f"{title(unit.run)}, {unit.task}"


def _header(work: Work) -> str:
    """The sweep in a sentence or two."""
    n_runs = len({unit.run.run_id for unit in work.todo})
    n_tasks = len({unit.task for unit in work.todo})
    size = f"{n_runs} {'run' if n_runs == 1 else 'runs'} on {n_tasks} {'task' if n_tasks == 1 else 'tasks'}"
    line = f"{work.config.name}: {size}; loading {work.config.model.pretrained}."
    if not work.config.share_prefix or n_runs == 1:
        return line
    return f"{line} Runs share the image encoder and the layers before their first cuts: same answers, sooner, but without times."
