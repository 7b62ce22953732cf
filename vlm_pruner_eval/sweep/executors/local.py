"""`--executor local`: this machine, one process per visible GPU, or this process alone where there is one GPU or none."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.executors import workers
from vlm_pruner_eval.sweep.executors.base import Executor, Work
from vlm_pruner_eval.sweep.executors.gpus import visible_gpus
from vlm_pruner_eval.sweep.executors.inprocess import InProcess


class Local:
    """Chooses how many processes make the runs.

    Parameters
    ----------
    processes
        So many, whatever GPUs there are; None: see `run`.
    command
        What starts the command line in a process of its own; default: `workers.COMMAND`.

    Raises
    ------
    ConfigError
        Fewer than one process.
    """

    def __init__(self, processes: int | None = None, command: Sequence[str] | None = None):
        if processes is not None and processes < 1:
            raise ConfigError(f"--processes: got {processes}, expected 1 or more.")
        self._processes, self._command = processes, command or workers.COMMAND

    def run(self, work: Work) -> None:
        """Make the runs by one process per GPU; in this process, if there is but one, a device was chosen, or the model is the caller's."""
        own_model = work.load is not None or work.task_manager is not None
        if own_model and self._processes is not None and self._processes > 1:
            raise ConfigError(
                f"processes: got {self._processes}, but a loader or a task index of your own can't be given to other processes."
            )
        gpus = [] if own_model or work.config.model.device is not None else visible_gpus()
        self._chosen(len(work.todo), gpus).run(work)

    def _chosen(self, n_runs: int, gpus: list[str]) -> Executor:
        count = min(self._processes or max(1, len(gpus)), n_runs)
        if count == 1:
            return InProcess()
        return workers.Workers([gpus[index % len(gpus)] if gpus else None for index in range(count)], self._command)
