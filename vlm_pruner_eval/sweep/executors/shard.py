"""`--shard i/n`: several processes, on as many machines, over one results directory and with nothing else between them.

Every run is claimed before it is begun, by a lock in its folder. A shard takes its own share of the grid first and then helps with
runs that nobody has claimed, or whose claimer died; those go on from their journals.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from vlm_pruner_eval.lmms.plan import Part
from vlm_pruner_eval.sweep.directory import claim, claimed_by
from vlm_pruner_eval.sweep.executors.base import Work
from vlm_pruner_eval.sweep.grid import Run
from vlm_pruner_eval.sweep.groups import groups
from vlm_pruner_eval.sweep.lock import Lock
from vlm_pruner_eval.sweep.progress import SweepProgress
from vlm_pruner_eval.sweep.session import Session


class Shard:
    """Makes what it can claim."""

    def __init__(self, part: Part):
        self.part = part

    def run(self, work: Work) -> None:
        """Make the runs of `work.todo` that no living process holds; those that one does hold are left to it."""
        if not any(self._is_free(work, run) for run in work.todo):
            return
        session = work.open()
        work.begin()
        with SweepProgress(work.console, len(work.todo)) as progress:
            for group in self._groups(work):
                self._make(work, session, group, progress)
            for run in work.todo:
                if not work.is_made(run):
                    holder = claimed_by(work.store.run_dir(run.run_id))
                    work.console.print(f"{run.key}: left to {holder}", highlight=False, markup=False, soft_wrap=True)

    def _groups(self, work: Work) -> list[list[Run]]:
        """What is claimed together: runs that share answers, else one run each. The own share, then the others' from their ends."""
        todo = {run.run_id for run in work.todo}
        mine = [run for number, run in enumerate(work.runs) if self.part.has(number) and run.run_id in todo]
        others = [run for number, run in enumerate(work.runs) if not self.part.has(number) and run.run_id in todo][::-1]
        return [group for runs in (mine, others) for group in groups(runs, shared=work.config.share_prefix)]

    def _make(self, work: Work, session: Session, runs: Sequence[Run], progress: SweepProgress) -> None:
        """Make those of `runs` that can be claimed."""
        with ExitStack() as stack:
            claims = {run.run_id: lock for run in runs if (lock := self._claim(work, run, stack)) is not None}
            claimed = [run for run in runs if run.run_id in claims]
            work.prepare(session, claimed)
            sharing_session = stack.enter_context(work.together(session, claimed, progress))
            for run in claimed:
                work.make(sharing_session, run, progress, claims[run.run_id].check)
                claims[run.run_id].release()

    def _claim(self, work: Work, run: Run, stack: ExitStack) -> Lock | None:
        lock = claim(work.store.run_dir(run.run_id), f"shard {self.part}")
        if work.is_made(run) or lock.acquire() is not None:
            return None
        if work.is_made(run):  # by one who held the claim until this moment
            lock.release()
            return None
        stack.callback(lock.release)
        return lock

    def _is_free(self, work: Work, run: Run) -> bool:
        return not work.is_made(run) and claimed_by(work.store.run_dir(run.run_id)) is None
