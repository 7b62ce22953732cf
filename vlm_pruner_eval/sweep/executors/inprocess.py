"""Runs made one after the other by the process that was started."""

from __future__ import annotations

from vlm_pruner_eval.sweep.executors.base import Work
from vlm_pruner_eval.sweep.progress import SweepProgress


class InProcess:
    """One loaded model, one run or one group of runs at a time."""

    def run(self, work: Work) -> None:
        """Make every run of `work.todo`, in the order of the grid or of its groups."""
        session = work.open()
        work.begin()
        work.prepare(session, work.todo)
        todo = {run.run_id for run in work.todo}
        with SweepProgress(work.console, len(work.runs), todo=len(work.todo)) as progress:
            for run in work.runs:
                if run.run_id not in todo:
                    work.skip(progress, run)
            work.make_all(session, progress)
