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
from sweep_standin import N_VISUAL, write_tasks
from vlm_pruner_eval.sweep.store import Store

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TIMED = ("prefill_ms", "decode_ms", "peak_bytes")
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

    def command(self, *options: object, launcher: list[str] | None = None, program: list[str] | None = None) -> list[str]:
        """The command line `sweep FILE ...`."""
        told = [str(option) for option in options]
        return [*(launcher or [sys.executable]), *(program or [str(HERE / "standin_main.py")]), "sweep", str(self.file), "--json", *told]

    def start(self, *options: object, launcher: list[str] | None = None, program: list[str] | None = None, **more: str) -> subprocess.Popen:
        """A process that is not waited for, in a group of its own."""
        command = self.command(*options, launcher=launcher, program=program)
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
    """All that must not depend on who made the runs, by run id."""
    store, found = Store(output), {}
    for folder in sorted((output / "runs").iterdir()):
        record = store.read(folder.name)
        kept = {name: record[name] for name in ("status", "tasks", "tokens", "kept_digest", "n_answers", "documents", "batch_size")}
        found[folder.name] = kept | {
            "draws": (folder / "draws.json").read_bytes(),
            "samples": [without_times(sample) for sample in store.each_sample(folder.name)],
            "files": sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")),  # killed processes leave hidden ones
        }
    return found


def without_times(sample: dict[str, Any]) -> str:
    """A sample's JSON but for what a clock or the allocator said."""
    kept = {name: value for name, value in sample.items() if name not in TIMED}
    if kept["record"] is not None:
        kept["record"] = {name: value for name, value in kept["record"].items() if name != "selection_ms"}
    return json.dumps(kept, sort_keys=True)


def last_json(text: str) -> dict[str, Any]:
    return json.loads(text.strip().splitlines()[-1])


def wait_until(is_so: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Until something is so, or the test fails."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
