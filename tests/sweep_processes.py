"""Helpers of tests in which several processes make one sweep: starting them, and comparing what they leave, byte for byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import standin_main
import yaml
from forked import live, own_streams
from stored import read_runs, units
from sweep_standin import N_VISUAL, write_tasks

HERE = Path(__file__).parent
RAW: dict[str, Any] = {
    "name": "tiny",
    "model": {"id": "vlmpruner_llava", "pretrained": "somewhere/tiny", "batch_size": 3, "visual_tokens": N_VISUAL, "device": None},
    "tasks": ["tiny_mean", "tiny_pairs"],
    "pruning_rates": ["2/3"],
    "methods": ["vlmpruner", {"name": "random", "seeds": [0, 1, 2]}, "blind", "uniform", "fastv"],
    "limit": 12,
    "gallery": 0,
}


@dataclass
class Surroundings:
    """A folder with tasks and a sweep file, in which the stand-in's command line is run."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.file, self.log = self.folder / "sweep.yaml", self.folder / "answers.log"
        self.write()
        path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
        own = {"STANDIN_TASKS": str(write_tasks(self.folder / "tasks")), "STANDIN_LOG": str(self.log), "PYTHONPATH": path}
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(self.folder / "datasets")}
        self.environment = os.environ | own | quiet | self.environment

    def write(self, **changes: Any) -> None:
        """The sweep file."""
        self.file.write_text(yaml.safe_dump(RAW | changes))

    def start(self, *options: object, program: list[str] | None = None, **more: str) -> subprocess.Popen:
        """A process that is not waited for, in a group of its own."""
        told = [str(option) for option in options]
        command = [sys.executable, *(program or [str(HERE / "standin_main.py")]), "sweep", str(self.file), "--json", *told]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environment = self.environment | more
        return subprocess.Popen(command, env=environment, cwd=self.folder, text=True, start_new_session=True, **streams)

    def run(self, *options: object, **more: Any) -> subprocess.CompletedProcess:
        """A process to its end."""
        process = self.start(*options, **more)
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def fork(self, *options: object, main: Callable[[], object] = standin_main.main, **more: str) -> Fork:
        """The same as `start`, in a moment: a copy of this process, which has imported everything."""
        return Fork(self, ["vlm-pruner-eval", "sweep", str(self.file), "--json", *map(str, options)], more, main)

    def answered(self) -> list[str]:
        """What was answered, by whomever: method, seed, task, document."""
        return [line.partition(" ")[2] for line in self.log.read_text().splitlines()] if self.log.exists() else []


class Fork:
    """A copy of this process in which the stand-in's command line runs."""

    def __init__(self, surroundings: Surroundings, argv: list[str], environment: dict[str, str], main: Callable[[], object]):
        self._output = surroundings.folder / f"{uuid.uuid4().hex}.out"
        self.pid = os.fork()
        if not self.pid:
            os.chdir(surroundings.folder)
            os.environ.update(surroundings.environment | environment)
            live(lambda: self._run(argv, main))

    def _run(self, argv: list[str], main: Callable[[], object]) -> None:
        own_streams(self._output)
        sys.argv = argv
        main()

    def wait(self, timeout_s: float = 120.0) -> tuple[int, str]:
        """Exit code, negative where it was a signal; and what it printed."""
        deadline = time.monotonic() + timeout_s
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status), self._output.read_text()
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"it did not end in time; it printed: {self._output.read_text()[-2000:]}")
            time.sleep(0.01)


def left_behind(output: Path) -> dict[str, Any]:
    """All that must not depend on who made the units, by run and task."""
    found: dict[str, Any] = {}
    for key in read_runs(output):
        for task, unit in units(output, key).items():
            record = unit.read().model_dump(include={"status", "scores", "tokens", "kept_digest", "n_answers", "documents", "batch_size"})
            found[key, task] = record | {
                "draws": (unit.folder / "draws.json").read_bytes(),
                "scores by document": (unit.folder / "scores.jsonl").read_bytes(),
                "answers": [answer.untimed() for answer in unit.answers()],
                "files": sorted(
                    path.name for path in unit.folder.iterdir() if not path.name.startswith(".")
                ),  # the killed leave hidden ones
            }
    return found


def last_json(text: str) -> dict[str, Any]:
    return json.loads(text.strip().splitlines()[-1])


def wait_until(is_so: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Until something is so, or the test fails."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
