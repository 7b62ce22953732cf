"""The parts of a fault campaign; each breaks sweeps in its own way, goes on with the same command, and looks at what is there."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_checks import Expected, Findings, Watch, age_temporaries, temporaries
from fault_sweep import Attempt, End, Faults, Sweep, minivlm_sweep, standin_sweep
from fault_trace import FULL, KILL, POWER, Trap

SENTENCE = "make room, then run the same command again"


@dataclass
class Section:
    """What a part of the campaign did and found."""

    folder: Path
    seed: int
    kills: Counter[str] = field(default_factory=Counter)  # by how it was ended
    codes: Counter[str] = field(default_factory=Counter)  # exit codes of attempts that ended themselves, by what was expected
    resumes: int = 0
    sweeps: int = 0  # that came to their end after being broken
    findings: Findings = field(default_factory=Findings)
    boundaries: set[str] = field(default_factory=set)
    hit: set[str] = field(default_factory=set)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def reference(self, sweep: Sweep, **options: Any) -> Expected:
        """Run it undisturbed."""
        quiet = sweep.into(self.folder / "reference")
        end = Attempt(quiet).wait()
        if end.code != 0:
            raise RuntimeError(f"the undisturbed sweep ended with {end.code or end.signal}:\n{end.log[-3000:]}")
        self.boundaries |= set(names(end))
        self.facts["events"] = names(end)
        self.facts["seconds_undisturbed"] = round(end.seconds, 1)
        return Expected(quiet, **options)

    def begin(self, sweep: Sweep, expected: Expected) -> Watch:
        """An empty results directory."""
        shutil.rmtree(sweep.output, ignore_errors=True)
        for lost in sweep.output.parent.glob(f"{sweep.output.name}.lost*"):
            shutil.rmtree(lost)
        return Watch(sweep, expected, self.findings)

    def expect(self, end: End, code: int, what: str, sentence: str = "") -> None:
        """An attempt that ends itself, in the way that it should."""
        self.codes[f"{what}: {end.code if end.signal is None else -end.signal}"] += 1
        text = end.log[-1500:]
        if end.code != code:
            self.findings.broken.append(f"{what}: ended with {end.code if end.signal is None else -end.signal}, expected {code}: {text}")
        elif sentence not in end.log or (code and "Traceback" in end.log):
            self.findings.broken.append(f"{what}: expected a sentence with {sentence!r}, got: {text}")

    def finish(self, watch: Watch, what: str) -> None:
        """The same command once more, undisturbed."""
        self.resumes += 1
        watch.look(what)
        age_temporaries(watch.sweep.output)
        end = Attempt(watch.sweep).wait()
        self.expect(end, 0, "undisturbed at last")
        watch.repeated(end.events, what)
        watch.finish(what)
        self.sweeps += 1

    def as_json(self) -> dict[str, Any]:
        own = {name: value for name, value in self.facts.items() if name != "events"}
        return {
            "kills": dict(self.kills),
            "exit_codes": dict(self.codes),
            "resumes": self.resumes,
            "sweeps_finished": self.sweeps,
            **{name: len(listed) for name, listed in vars(self.findings).items()},
            "findings": {name: listed[:20] for name, listed in vars(self.findings).items() if listed},
            "boundaries": sorted(self.boundaries),
            "hit": sorted(self.hit),
            **own,
        }


def names(end: End) -> list[str]:
    """Its events in order, without the remarks between them."""
    return [line for line in end.events if not line.startswith("#")]


# ---- kills at random moments
def random_kills(section: Section, sweep: Sweep, expected: Expected, *, kills: int, span_s: float, signals: dict[int, float]) -> None:
    """Kill the sweep after 0 to `span_s` seconds, again and again, until it finishes; then begin anew, until there were `kills`.

    `signals`: with their weights.
    """
    most = done = 0
    while done < kills:
        watch = section.begin(sweep, expected)
        while done < kills:
            (chosen,) = section.random.choices(list(signals), list(signals.values()))
            end = Attempt(sweep).wait(section.random.uniform(0, span_s), chosen)
            if end.code == 0:
                break
            told = signal.Signals(chosen).name
            section.kills[told] += 1
            section.resumes += 1
            done += 1
            if end.was_deaf:
                section.findings.broken.append(f"{told}: still there after a minute: {end.log[-1000:]}")
            elif end.signal != chosen:
                section.codes[f"{told}: {end.code}"] += 1
                began = bool(end.events)  # before that, the interpreter is starting, and it says so in its own way
                if end.code not in (1, 130, 128 + chosen) or (began and "Traceback" in end.log):
                    section.findings.broken.append(f"{told}: ended with {end.code}, {end.signal}: {end.log[-1500:]}")
            watch.repeated(end.events, f"kill {done}")
            watch.look(f"kill {done}")
            most = max(most, temporaries(sweep.output))
        section.finish(watch, f"after kill {done}")
    section.facts["most_temporary_files"] = most


def standin_kills(section: Section, *, kills: int, span_s: float, pause_s: float, has_report: bool = True) -> None:
    sweep = standin_sweep(section.folder, pause_s=pause_s)
    sweep = sweep if has_report else sweep.unreported()
    weights = {signal.SIGKILL: 0.8, signal.SIGTERM: 0.1, signal.SIGINT: 0.1}
    random_kills(section, sweep, section.reference(sweep), kills=kills, span_s=span_s, signals=weights)


def minivlm_kills(section: Section, *, kills: int, limit: int, real: int) -> None:
    """MiniVLM, run by run and with everything before the cuts shared; both must come to what separate runs come to."""
    for shared in (False, True):
        sweep = minivlm_sweep(section.folder / f"shared_{shared}", limit=limit, options=("--share-prefix",) * shared)
        if not shared:
            expected = section.reference(sweep)
        span_s = section.facts["seconds_undisturbed"] * (0.3 if shared else 0.6)
        random_kills(section, sweep, expected, kills=kills, span_s=span_s, signals={signal.SIGKILL: 1.0})
        section.facts["shared_kills" if shared else "separate_kills"] = kills
    for number in range(real):
        _real_process(section, sweep, expected, number)


def _real_process(section: Section, sweep: Sweep, expected: Expected, number: int) -> None:
    """Without any fork: the command line as users start it, its files limited, then killed, then left alone."""
    watch, env = section.begin(sweep, expected), dict(os.environ) | {"HF_DATASETS_CACHE": str(section.folder / "datasets")}
    command = [sys.executable, "-m", "vlm_pruner_eval", *(arg for arg in sweep.argv if arg != "--share-prefix")]
    limited = ["bash", "-c", f'ulimit -f {8 + 4 * number}; exec "$@" 2>&1 | cat; exit "${{PIPESTATUS[0]}}"', "limited", *command]
    done = subprocess.run(limited, capture_output=True, text=True, env=env, check=False)
    section.expect(End(done.returncode, None, done.stdout, [], 0.0), 1, "real process, ulimit -f", SENTENCE)
    watch.look("ulimit -f")
    process = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(sweep.output.glob("runs/*/run.json"))[number:] and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    section.kills["SIGKILL of a real process"] += 1
    watch.look("kill of a real process")
    section.resumes += 2
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    section.expect(End(done.returncode, None, done.stdout + done.stderr, [], 0.0), 0, "real process")
    watch.finish("real process")
    section.sweeps += 1


# ---- at chosen writes
def at_writes(section: Section, *, kind: str, each: int, only: Iterable[str] = (), again: bool = False) -> None:
    """Break the sweep before (of a write: half way through) `each` occurrences of every kind of write that it makes.

    `only`: these kinds of writes; default all. `again`: also at a random one of the resumed process.
    """
    sweep = standin_sweep(section.folder, n_runs=3, limit=6).unreported()
    expected = section.reference(sweep)
    events = section.facts["events"]
    for number in _chosen(events, each, only):
        if _can_break(kind, events[number]):
            watch = section.begin(sweep, expected)
            _break(section, watch, Trap(number, kind))
            if again:
                section.resumes += 1
                _break(section, watch, Trap(section.random.randrange(len(events)), kind), may_miss=True)
            section.finish(watch, f"{kind} at {events[number]} ({number})")


def in_report(section: Section, *, kind: str) -> None:
    """The same at every kind of write that the report makes, one after the other in one folder: its runs stay finished."""
    sweep = standin_sweep(section.folder, n_runs=3, limit=6)
    expected = section.reference(sweep)
    events = section.facts["events"]
    first = 1 + max(number for number, name in enumerate(events) if "runs/RUN" in name)
    watch = section.begin(sweep, expected)
    if Attempt(sweep.unreported()).wait().code != 0:
        raise RuntimeError("the undisturbed sweep without its report failed")
    for name in dict.fromkeys(events[first:]):
        if _can_break(kind, name):
            section.resumes += 1
            _break(section, watch, Trap(kind=kind, name=name))
    section.finish(watch, f"{kind} in the report")


def _can_break(kind: str, event: str) -> bool:
    """To remove, rename or sync needs no space."""
    return kind != FULL or event.split(maxsplit=1)[0] in ("open", "write", "mkdir")


def _chosen(events: list[str], each: int, only: Iterable[str]) -> Iterator[int]:
    """Numbers of the first, the last, and others between them, of every kind of event."""
    for name in dict.fromkeys(events):
        places = [i for i, other in enumerate(events) if other == name]
        if not only or name in only:
            yield from sorted({places[round((i + (each == 1) / 2) * (len(places) - 1) / max(1, each - 1))] for i in range(each)})


def _break(section: Section, watch: Watch, trap: Trap, *, may_miss: bool = False) -> None:
    end = Attempt(watch.sweep, Faults(trap=trap)).wait()
    if may_miss and end.code == 0:
        return
    seen = names(end)
    where = trap.name if trap.name in seen else seen[min(trap.at or 0, len(seen) - 1)]
    section.hit.add(where)
    if trap.kind == FULL:
        section.expect(end, 1, "disk full", SENTENCE)
    elif end.signal == signal.SIGKILL:
        section.kills["SIGKILL at a write" if trap.kind == KILL else "power cut at a write"] += 1
    else:
        section.findings.broken.append(f"{trap.kind} at {where}: ended with {end.code}: {end.log[-1500:]}")
    if trap.kind == POWER:
        watch.acknowledged(end.events, f"power cut at {where}")
        watch.held.clear()
    else:
        watch.repeated(end.events, f"{trap.kind} at {where}")
    watch.look(f"{trap.kind} at {where}")


# ---- disks
def full_disks(section: Section, *, levels: int, limits: int) -> None:
    """A small file system at several sizes, and files that may not become longer than so much."""
    sweep = standin_sweep(section.folder, n_runs=3, limit=24)
    expected = section.reference(sweep)
    sizes = [path.stat().st_size for path in expected.sweep.output.rglob("*") if path.is_file()]
    section.facts |= {"tmpfs_levels": 0, "file_limits": 0, "stopped_at": []}
    pages = sum(-(-size // 4096) for size in sizes)
    for level in range(levels):
        _on_tmpfs(section, sweep, expected, 4096 * max(1, round(pages * (level + 0.5) / levels)))
    for number in range(limits):
        most = 12_000 + number * (max(sizes) - 12_000) // limits
        for kills in (False, True):
            watch = section.begin(sweep, expected)
            end = Attempt(sweep, Faults(file_bytes=most, kill_at_limit=kills)).wait()
            if kills and end.signal == signal.SIGXFSZ:
                section.kills["SIGXFSZ in the middle of a write"] += 1
            else:
                section.expect(end, 1, "file limit", SENTENCE)
            watch.look(f"files of at most {most} bytes")
            section.finish(watch, f"files of at most {most} bytes")
            section.facts["file_limits"] += 1


def _on_tmpfs(section: Section, sweep: Sweep, expected: Expected, size: int) -> None:
    with tmpfs(section.folder / "disk", size) as disk:
        if disk is None:
            section.facts["no_tmpfs"] = "mounting is not permitted"
            return
        small = sweep.into(disk / "out")
        # its log and list of events must not lie on the small disk
        small = dataclasses.replace(small, beside=section.folder)
        watch = section.begin(small, expected)
        end = Attempt(small).wait()
        stopped = [name for name in names(end) if name.split()[0] in ("write", "open", "mkdir")][-1]
        section.expect(end, 1, "tmpfs full", SENTENCE)
        section.facts["stopped_at"].append(f"{size // 1024} KiB: {stopped}")
        section.facts["tmpfs_levels"] += 1
        watch.look(f"tmpfs of {size} bytes")
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        section.finish(watch, f"tmpfs of {size} bytes")


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path | None]:
    """A file system of so many bytes; None where it may not be mounted."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False)
    if done.returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
