"""The process that a fault campaign kills: the real command line, run by a fork of a process that has imported everything.

A kill so costs milliseconds and hits the sweep, not its imports. The model is a stand-in that answers through the wrapper's own
planning of batches, or MiniVLM.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import Any

import lmms_eval.tasks
import matplotlib.backends.backend_agg
import matplotlib.backends.backend_svg
import matplotlib.figure
import torch
from fault_trace import NO_TRAP, Trace, Trap
from forked import live, own_streams
from PIL import Image
from sweep_standin import N_VISUAL, StandIn, task_manager, write_tasks

from vlm_pruner_eval import cli, selftest, versions
from vlm_pruner_eval.embedded import tasks_path
from vlm_pruner_eval.lmms import families
from vlm_pruner_eval.lmms.model import PrunedModel
from vlm_pruner_eval.lmms.planning import Defaults
from vlm_pruner_eval.lmms.prompts import Prompt, Request, image_digest
from vlm_pruner_eval.report import build, printing
from vlm_pruner_eval.report.figures import style
from vlm_pruner_eval.report.writers import screen
from vlm_pruner_eval.store.answers import Answer, AnswerLog
from vlm_pruner_eval.sweep import identity, runner
from vlm_pruner_eval.sweep.config import SweepConfig, load
from vlm_pruner_eval.sweep.grid import method_problems

# what a fork must not spend its life on
IMPORTED = (
    *(build, screen, style, runner),
    *(matplotlib.backends.backend_agg, matplotlib.backends.backend_svg, matplotlib.figure),
)
_POLL_S, _DEAF_S = 0.002, 60.0
_DOCUMENTS_A_PICTURE = 5
_MODEL = "vlmpruner_llava"


@dataclass(frozen=True)
class Faults:
    """What happens to one attempt from inside.

    Attributes
    ----------
    trap
        At one of its writes, see `fault_trace`.
    file_bytes
        The longest file that it may write; with `kill_at_limit` it dies there in the middle of a write, else the write fails.
    memory_seed, memory_share
        Batches that do not fit: this share of those with several prompts, drawn anew by every process.
    """

    trap: Trap = NO_TRAP
    file_bytes: int | None = None
    kill_at_limit: bool = False
    memory_seed: int | None = None
    memory_share: float = 0.0


NO_FAULTS = Faults()


class Pictures:
    """Stands in for the maker of prompts: one picture for a few documents in a row."""

    def look_up(self, request: Request, task_dict: object) -> int:
        return request.doc_id // _DOCUMENTS_A_PICTURE

    def ask(self, request: Request, number: int) -> Image.Image:
        return _picture(number)

    def render(self, request: Request, picture: Image.Image) -> Prompt:
        return Prompt(request, "?" * request.length, [picture], image_digests=[image_digest(picture)], originals=[picture])


class PausingStandIn(StandIn):
    """A stand-in that takes its time for every batch, shows pictures, and may lack memory."""

    defaults = Defaults()
    # the real planning, and the real treatment of batches that fail
    batches_of = PrunedModel.batches_of
    _made, _steps, _told = PrunedModel._made, PrunedModel._steps, PrunedModel._told
    pruner = None
    answers_of_batch = PrunedModel.answers_of_batch

    def __init__(self, size: int, pause_s: float, faults: Faults):
        super().__init__(size=size)
        self.pause_s, self.faults, self.memory = pause_s, faults, random.Random(faults.memory_seed)
        self.settings, self.processing = SimpleNamespace(workers=2), RLock()
        self.prompts = Pictures()

    def describe(self) -> dict[str, object]:
        return super().describe() | {"geometry": {"family": "qwen2_vl", "temporal_patch": 2}}

    def prepare(self, batch: list[Prompt], pruner: object = None) -> list[Prompt]:
        return batch

    def answer(self, batch: list[Prompt], options: object) -> list[Answer]:
        time.sleep(self.pause_s)
        if self.batch_size > 1 and self.memory.random() < self.faults.memory_share:
            raise self.memory.choice([MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")])
        return [self._of(prompt, len(batch)) for prompt in batch]

    def _of(self, prompt: Prompt, n: int) -> Answer:
        request = prompt.request
        answer = self._answer(request.doc_id, request.task, request.split)
        record = dataclasses.replace(answer.record, layouts=((N_VISUAL, 6, 6, 1),))
        return dataclasses.replace(answer, batch_size=n, images=prompt.digests, record=record)


@functools.cache
def _picture(seed: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (50 * seed % 256, 90, 200))


@dataclass(frozen=True)
class Sweep:
    """A command that can be attempted again and again."""

    file: Path
    output: Path
    tasks: Any
    make: Callable[[Faults], Any]
    options: tuple[str, ...] = ()
    has_report: bool = True

    @functools.cached_property
    def sources(self) -> dict[str, str]:
        """Digests of the tasks' files."""
        return identity.task_sources(self.config().tasks)

    @property
    def argv(self) -> list[str]:
        return ["sweep", str(self.file), "--output", str(self.output), *self.options]

    def config(self) -> SweepConfig:
        overrides = {"share_prefix": True} if "--share-prefix" in self.options else {}
        return load(self.file, overrides=overrides, check=method_problems)

    def into(self, output: Path) -> Sweep:
        return dataclasses.replace(self, output=output)

    def unreported(self) -> Sweep:
        """The same up to the report, which takes longer than all before it."""
        return dataclasses.replace(self, has_report=False)


@dataclass(frozen=True)
class End:
    """How an attempt ended: an exit code, or the signal that ended it, negative; its writes in order; answers written, by unit."""

    code: int
    log: str
    events: list[str]
    answers: Counter[str]
    seconds: float
    was_deaf: bool = False


def standin_sweep(folder: Path, *, pause_s: float = 0.0, n_runs: int = 7, limit: int = 12, size: int = 3) -> Sweep:
    """The stand-in on three tasks, or on two if there are three runs at most."""
    methods = ["vlmpruner", {"name": "random", "seeds": [0, 1]}, "blind", "uniform", "fastv"]
    tasks = ["tiny_mean", "tiny_pairs", "tiny_state"]
    if n_runs <= 3:
        methods, tasks = methods[0 : n_runs - 1 : 2], tasks[:2]
    model = {"pretrained": "somewhere/tiny", "batch_size": size}
    file = _write(folder, model, tasks, methods, visual_tokens=N_VISUAL, limit=limit)
    return Sweep(file, folder / "out", task_manager(write_tasks(folder / "tasks")), functools.partial(PausingStandIn, size, pause_s))


def minivlm_sweep(folder: Path, *, limit: int = 8, options: tuple[str, ...] = ()) -> Sweep:
    """MiniVLM on two tasks of DIGITSCENES; loaded here, once for all attempts."""
    args = {"pretrained": "minivlm", "batch_size": 4, "device": "cpu"}
    methods = ["vlmpruner", "fastv", {"name": "random", "seeds": [0]}, "blind"]
    file = _write(folder, args, ["digitscenes_exist", "digitscenes_pairs"], methods, visual_tokens=576, limit=limit)
    model = families.load(_MODEL, **args)
    index = lmms_eval.tasks.TaskManager("ERROR", include_path=[str(tasks_path())], include_defaults=False, model_name=_MODEL)
    return Sweep(file, folder / "out", index, lambda faults: model, options)


def _write(folder: Path, model: dict[str, Any], tasks: list[str], methods: list[Any], *, visual_tokens: int, limit: int) -> Path:
    """A sweep file."""
    raw = {"model": {"id": _MODEL, **model, "visual_tokens": visual_tokens}, "tasks": tasks, "methods": methods, "limit": limit}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(raw | {"name": "faults", "pruning_rates": ["2/3"], "gallery": 10}))  # JSON is YAML
    return path


@functools.cache
def _import_late() -> None:
    """Import what an evaluation imports, once for all forks."""
    selftest.late_imports()


class Attempt:
    """One start of a sweep's command, running; `lane` tells several of one folder apart."""

    def __init__(self, sweep: Sweep, faults: Faults = NO_FAULTS, lane: str = ""):
        self.started = time.monotonic()
        self._log, self._events = (sweep.output.with_name(f"{sweep.output.name}{lane}.{kind}") for kind in ("log", "events"))
        for path in (self._log, self._events):
            path.write_text("")
        _import_late()
        assert sweep.sources is not None
        self.pid = os.fork()
        if not self.pid:
            live(lambda: self._live(sweep, faults))
        with contextlib.suppress(OSError):  # the child does the same; whoever is first
            os.setpgid(self.pid, self.pid)

    def wait(self, kill_after_s: float | None = None, with_signal: int = signal.SIGKILL) -> End:
        """Its end; after so many seconds its process group gets a signal, and after another minute, which is a finding, the last one."""
        begun, told_at, is_deaf = time.monotonic(), None, False
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            now = time.monotonic()
            if pid:
                return self._end(os.waitstatus_to_exitcode(status), is_deaf)
            if told_at is None and kill_after_s is not None and now - begun >= kill_after_s:
                os.killpg(self.pid, with_signal)
                told_at = now
            if told_at is not None and now - told_at > _DEAF_S:
                os.killpg(self.pid, signal.SIGKILL)
                is_deaf = True
            time.sleep(_POLL_S)

    def _end(self, code: int, is_deaf: bool) -> End:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # what it started itself, such as git
        lines = self._events.read_text().splitlines()
        answers: Counter[str] = Counter()
        for line in lines:
            if line.startswith("#"):
                _, unit, number = line.split()
                answers[unit] += int(number)
        events = [line for line in lines if not line.startswith("#")]
        return End(code, self._log.read_text(errors="replace"), events, answers, time.monotonic() - self.started, is_deaf)

    def _live(self, sweep: Sweep, faults: Faults) -> None:
        """The life of the fork."""
        os.setpgid(0, 0)
        own_streams(self._log)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        families.load = lambda *args, **kwargs: sweep.make(faults)
        lmms_eval.tasks.TaskManager = lambda **kwargs: sweep.tasks
        # what takes seconds and writes nothing
        selftest.run = lambda: None
        versions.check = lambda say: None
        identity.task_sources = lambda *args: sweep.sources
        if not sweep.has_report:
            printing.write_and_print = lambda directory, out: {"md": directory}
        sys.argv = ["vlm-pruner-eval", *sweep.argv]
        if faults.file_bytes is None:
            trace = Trace(sweep.output, self._events, faults.trap)
            trace.install()
            _note_answers(trace)
        else:  # without a trace, whose own file would be limited, too
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if faults.kill_at_limit else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (faults.file_bytes, faults.file_bytes))
        cli.app(sweep.argv)


def _note_answers(trace: Trace) -> None:
    """Every answer that is written down shows in the trace, after that."""
    append = AnswerLog.append

    def noting(self: AnswerLog, call: str, batch: list[Any], seconds: float) -> None:
        append(self, call, batch, seconds)
        trace.note(f"{self.folder.parent.name}/{self.folder.name}", len(batch))

    AnswerLog.append = noting
