"""Runs made one after the other by the process that was started."""

from __future__ import annotations

from vlm_pruner_eval.sweep.executors.base import Work


class InProcess:
    """One loaded model, one run at a time."""

    def run(self, work: Work) -> None:
        """Make every run of `work.todo`, in the order of the grid."""
        session = work.open()
        work.begin()
        work.prepare(session, work.todo)
        todo = {run.run_id for run in work.todo}
        with work.making(session, len(work.runs)) as (session, progress):
            for run in work.runs:
                if run.run_id in todo:
                    work.make(session, run, progress)
                else:
                    work.skip(progress, run)
