"""The real command line in a process of its own, with a stand-in in place of the model: `python standin_main.py sweep FILE ...`.

The processes that it starts itself are such processes, too. How it behaves is read from the environment, which they inherit:

STANDIN_TASKS    folder of the tasks, see `sweep_standin.write_tasks`
STANDIN_SIZE     prompts per batch, default 3
STANDIN_PAUSE    seconds per batch
STANDIN_DIE      "METHOD:BATCHES:TIMES,...": kill the process when it has answered so many batches of a method, so many times in all;
                 they are counted in the folder of the tasks, by all processes together
STANDIN_EXPLODE  a method that raises
STANDIN_REPORT   "yes" to write the report, too, which takes longer than all else
STANDIN_LOG      a file to which every answer is appended: pid, method, seed, task, document
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import lmms_eval.tasks
from sweep_standin import StandIn, task_manager

from vlm_pruner_eval import cli
from vlm_pruner_eval.lmms import families
from vlm_pruner_eval.lmms.prompts import Request
from vlm_pruner_eval.report import printing
from vlm_pruner_eval.store.answers import Batch, Done
from vlm_pruner_eval.sweep import workers


def tasks_folder() -> Path:
    return Path(os.environ["STANDIN_TASKS"])


class Subprocess(StandIn):
    """Takes its time, writes down what it answers, and may die over it."""

    def batches_of(self, asked: Sequence[Request], done: Done) -> Iterator[Batch]:
        if self.method == os.environ.get("STANDIN_EXPLODE"):
            raise RuntimeError("the device is gone")
        for number, batch in enumerate(super().batches_of(asked, done), start=1):
            time.sleep(float(os.environ.get("STANDIN_PAUSE", "0")))
            self._write_down(batch)
            yield batch
            self._die(number)

    def _write_down(self, batch: Batch) -> None:
        if path := os.environ.get("STANDIN_LOG"):
            seed = self.params.get("seed")
            lines = [f"{os.getpid()} {self.method} {seed} {request.task} {request.doc_id}\n" for request, _ in batch]
            with open(path, "a") as file:
                file.write("".join(lines))

    def _die(self, number: int) -> None:
        for wish in filter(None, os.environ.get("STANDIN_DIE", "").split(",")):
            method, batches, times = wish.split(":")
            if method == self.method and number == int(batches):
                deaths = tasks_folder() / f"deaths of {method}"
                with deaths.open("a") as file:
                    file.write(f"{os.getpid()}\n")
                if len(deaths.read_text().splitlines()) <= int(times):
                    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    families.load = lambda *args, **kwargs: Subprocess(size=int(os.environ.get("STANDIN_SIZE", "3")))
    index = task_manager(tasks_folder())
    lmms_eval.tasks.TaskManager = lambda **kwargs: index
    workers.COMMAND = (sys.executable, __file__)
    if os.environ.get("STANDIN_REPORT") != "yes":
        printing.write_and_print = lambda directory, out: {"md": directory / "report.md"}
    cli.main()


if __name__ == "__main__":
    main()
