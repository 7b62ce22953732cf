"""What an executor is given, and what it owes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rich.console import Console

from vlm_pruner_eval.lmms.journal import Journal
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.grid import Run
from vlm_pruner_eval.sweep.groups import groups
from vlm_pruner_eval.sweep.opening import Loader, open_session, sharing
from vlm_pruner_eval.sweep.progress import SweepProgress
from vlm_pruner_eval.sweep.score_line import score_line, title
from vlm_pruner_eval.sweep.session import Session
from vlm_pruner_eval.sweep.store import FAILED, FINISHED, Store

_SKIPPED = {FINISHED: "finished before, skipped", FAILED: "failed before, skipped; --retry-failed repeats it", None: "left"}


@dataclass(frozen=True)
class Work:
    """A sweep that is to be done, in a directory that this process holds.

    Attributes
    ----------
    config, store
        What, and where to.
    runs
        The whole grid.
    todo
        The runs to be made.
    console
        For progress and notices.
    load, task_manager
        In place of the loader of models and lmms-eval's task index; None: the real ones.
    status
        `Store.status` of all runs before, by run id.
    stamps
        `Store.stamp` of the runs to be made, by run id: a run whose record is still that one has not been made yet.
    check
        Raises a StoppedError when another process has taken this one's place in the directory.
    made_by
        See `Session`.
    """

    config: SweepConfig
    store: Store
    runs: list[Run]
    todo: list[Run]
    console: Console
    load: Loader | None = None
    task_manager: Any = None
    status: Mapping[str, str | None] = field(default_factory=dict)
    stamps: Mapping[str, str | None] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def begin(self) -> None:
        """Write the grid; only after everything that can be checked has been."""
        self.store.begin(self.config.name, self.config.model_dump(), [run.line() for run in self.runs])

    def open(self, **options: Any) -> Session:
        """Load the model, see `open_session`."""
        self.console.print(self._header(), markup=False, highlight=False, soft_wrap=True)
        session = open_session(
            self.config, self.store, self.todo, console=self.console, load=self.load, task_manager=self.task_manager, **options
        )
        return replace(session, made_by=self.made_by)

    def prepare(self, session: Session, runs: Sequence[Run]) -> None:
        """Before `runs` are begun: drop the journals of those that failed and are tried again, and of those that need none any more."""
        for run in runs:
            if self.status.get(run.run_id) == FAILED:
                session.begin_again(run)
        self.tidy()

    def tidy(self) -> None:
        """Drop the journals of runs that are finished: a process was killed after it had recorded one."""
        for run in self.runs:
            if self.status.get(run.run_id) == FINISHED:
                Journal(self.store.run_dir(run.run_id), {}).delete()

    def is_made(self, run: Run) -> bool:
        """Whether someone has recorded a run since the work began."""
        stamp = self.store.stamp(run.run_id)  # none while a record is replaced
        return stamp is not None and stamp != self.stamps.get(run.run_id)

    def _header(self) -> str:
        """The sweep in a sentence or two."""
        config, n = self.config, len(self.todo)
        size = f"{n} {'run' if n == 1 else 'runs'} on {len(config.tasks)} {'task' if len(config.tasks) == 1 else 'tasks'}"
        line = f"{config.name}: {size}; loading {config.model.pretrained}."
        if not config.share_prefix or n == 1:
            return line
        return f"{line} Runs share the image encoder and the layers before their first cuts: same answers, sooner, but without times."

    def make_all(self, session: Session, progress: SweepProgress) -> None:
        """Make every run of `todo`; those of a group share their answers, if the sweep file asks for it."""
        for group in groups(self.todo, shared=self.config.share_prefix):
            with self.together(session, group, progress) as sharing_session:
                for run in group:
                    self.make(sharing_session, run, progress)

    @contextmanager
    def together(self, session: Session, group: Sequence[Run], progress: SweepProgress) -> Iterator[Session]:
        """A session that makes the runs of a group."""
        with sharing(session, group) as sharing_session:
            if sharing_session.sources is not None:
                progress.share([title(run) for run in group])
            yield sharing_session

    def skip(self, progress: SweepProgress, run: Run) -> None:
        """Show a run that is not to be made."""
        progress.end(title(run), _SKIPPED[self.status.get(run.run_id)])

    def make(self, session: Session, run: Run, progress: SweepProgress, check: Callable[[], None] = lambda: None) -> None:
        """Make one run and show how it goes; `check` is called with every batch, as `self.check` is."""

        def answered(count: int, is_new: bool) -> None:
            others = session.part.count if is_new else 1  # who answer the other parts of the run at the same time
            progress.answered(count * others, is_new)
            self.check()
            check()

        session.model.on_requests, session.model.on_answers = progress.asked, answered
        progress.start(title(run))
        session.run(run)
        took_s = progress.stop()
        progress.end(title(run), self.outcome(run, took_s))

    def outcome(self, run: Run, took_s: float | None) -> str:
        """Words for a run that was made: its scores, or why it failed."""
        record = self.store.read(run.run_id)
        if record is None:  # of one that answers a part of the runs that another process records
            return "answered"
        unpruned = self.store.read(self.runs[0].run_id)
        return score_line(record, unpruned if unpruned and unpruned.get("status") == FINISHED else None, took_s)


class Executor(Protocol):
    """Makes the runs of a sweep, somewhere."""

    def run(self, work: Work) -> None:
        """Make every run of `work.todo`; one that fails is recorded in the store, and the others go on.

        It calls `work.begin()` once it has checked what can be checked. The outcome is read from the store.

        Raises
        ------
        ConfigError
            A request that can't be run as written; nothing has been written then.
        StoppedError
            Nothing can go on.
        """
