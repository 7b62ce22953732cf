"""The parts of a fault campaign; each breaks sweeps in its own way, goes on with the same command, and looks at what is there."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_checks import Expected, Findings, Watch, age, contents_of
from fault_sweep import NO_FAULTS, Attempt, End, Faults, Sweep, minivlm_sweep, standin_sweep
from fault_trace import FULL, POWER, Trap

from vlm_pruner_eval.store.answers import ANSWERS, read_lines

SENTENCE = "make room, then run the same command again"
SIZES = (6, 3, 1)
SIGNALS = {signal.SIGKILL: 0.8, signal.SIGTERM: 0.1, signal.SIGINT: 0.1}  # with their weights
TEMPORARY_SCORES = "open runs/RUN/UNIT/scores.jsonl (temporary)"


@dataclass
class Section:
    """What a part of the campaign did and found."""

    folder: Path
    seed: int
    kills: Counter[str] = field(default_factory=Counter)  # by how it was ended
    codes: Counter[str] = field(default_factory=Counter)  # exit codes of attempts that ended themselves, by what was expected
    resumes: int = 0
    sweeps: int = 0  # that came to their end after being broken
    findings: Findings = field(default_factory=lambda: defaultdict(list))
    boundaries: list[str] = field(default_factory=list)  # writes of the undisturbed sweep, in order
    hit: set[str] = field(default_factory=set)
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.folder.mkdir(parents=True, exist_ok=True)

    def reference(self, sweep: Sweep, **options: Any) -> Expected:
        """Run it undisturbed."""
        quiet = sweep.into(sweep.file.parent / "reference")
        end = Attempt(quiet).wait()
        assert end.code == 0, f"the undisturbed sweep ended with {end.code}:\n{end.log[-3000:]}"
        self.boundaries = end.events
        self.facts["seconds_undisturbed"] = round(end.seconds, 1)
        return Expected(sweep.config(), quiet.output, **options)

    def begin(self, sweep: Sweep, expected: Expected, **options: Any) -> Watch:
        """An empty results directory."""
        for folder in sweep.output.parent.glob(f"{sweep.output.name}*"):
            if folder.is_dir():
                shutil.rmtree(folder)
        return Watch(sweep.output, expected, self.findings, **options)

    def expect(self, end: End, code: int, what: str, sentence: str = "") -> None:
        """An attempt that ends itself, in the way that it should."""
        self.codes[f"{what}: {end.code}"] += 1
        if end.code != code or sentence not in end.log or (code and "Traceback" in end.log):
            self.findings["broken"].append(f"{what}: ended with {end.code}, expected {code} and {sentence!r}: {end.log[-1500:]}")

    def killed(self, end: End, by: int) -> None:
        """An attempt that was told to end by a signal."""
        told = signal.Signals(by).name
        self.kills[told] += 1
        self.resumes += 1
        began = bool(end.events)  # before that, the interpreter is starting, and it says so in its own way
        is_well = end.code == -by or (end.code in (1, 130, 128 + by) and not (began and "Traceback" in end.log))
        if end.was_deaf or not is_well:
            self.findings["broken"].append(f"{told}: ended with {end.code}, deaf: {end.was_deaf}: {end.log[-1500:]}")

    def finish(self, sweep: Sweep, watch: Watch, what: str, faults: Faults = NO_FAULTS) -> None:
        """The same command once more, undisturbed, and then two hours pass."""
        self.resumes += 1
        end = Attempt(sweep, faults).wait()
        self.expect(end, 0, "at last")
        age(sweep.output)
        watch.finish(what, end.answers)
        self.sweeps += 1


# ---- kills at random moments
def random_kills(section: Section, sweep: Sweep, expected: Expected, *, kills: int, span_s: float, signals: dict[int, float]) -> None:
    """Kill the sweep after 0 to `span_s` seconds until it finishes, and begin anew, until there were `kills`."""
    kills += section.kills.total()
    while section.kills.total() < kills:
        watch, code = section.begin(sweep, expected), -1
        while section.kills.total() < kills and code != 0:
            (chosen,) = section.random.choices(list(signals), list(signals.values()))
            end = Attempt(sweep).wait(section.random.uniform(0, span_s), chosen)
            code = end.code
            if code != 0:
                section.killed(end, chosen)
            watch.look(f"kill {section.resumes}", end.answers)
        section.finish(sweep, watch, f"after kill {section.resumes}")


def standin_kills(section: Section, *, kills: int, span_s: float, pause_s: float, has_report: bool = True, n_runs: int = 7) -> None:
    """The stand-in."""
    sweep = standin_sweep(section.folder, pause_s=pause_s, n_runs=n_runs)
    sweep = sweep if has_report else sweep.unreported()
    random_kills(section, sweep, section.reference(sweep), kills=kills, span_s=span_s, signals=SIGNALS)


def minivlm_kills(section: Section, *, kills: int, limit: int) -> None:
    """MiniVLM, run by run and with everything before the cuts shared; both must come to the same answers."""
    found = []
    for shared in (False, True):
        sweep = minivlm_sweep(section.folder / f"shared_{shared}", limit=limit, options=("--share-prefix",) * shared)
        found.append(section.reference(sweep))
        span_s = section.facts["seconds_undisturbed"] * 0.6
        random_kills(section, sweep, found[-1], kills=kills // 2, span_s=span_s, signals={signal.SIGKILL: 1.0})
    if found[0].answers != found[1].answers:
        section.findings["different"].append("answers of a shared prefix are others")


def two_workers(section: Section, *, kills: int, span_s: float, pause_s: float, n_runs: int = 7) -> None:
    """The same command twice over one folder; one of the two, drawn every time, is killed and started again."""
    sweep = standin_sweep(section.folder, pause_s=pause_s, n_runs=n_runs).unreported()
    expected = section.reference(sweep)
    made: Counter[str] = Counter()

    def ended(lane: str, attempt: Attempt, kill_after_s: float | None = None) -> None:
        end = attempt.wait(kill_after_s)
        if end.code == 0:
            section.codes["nothing left: 0"] += 1
        else:
            section.killed(end, signal.SIGKILL)
        watch.look(f"kill {section.resumes}", end.answers)
        made[lane] += end.answers.total()

    while section.kills.total() < kills:
        watch, running = section.begin(sweep, expected), {}
        while section.kills.total() < kills and not watch.is_finished():
            running |= {lane: Attempt(sweep, lane=lane) for lane in ("1", "2") if lane not in running}
            lane = section.random.choice(sorted(running))
            ended(lane, running.pop(lane), section.random.uniform(0, span_s))
        for lane, attempt in running.items():
            ended(lane, attempt)
        section.finish(sweep, watch, f"after kill {section.resumes}")
    section.facts["answers_by_worker"] = dict(made)


def larger_limit(section: Section, *, kills: int, span_s: float, pause_s: float) -> None:
    """A sweep that is killed, then given a larger limit and killed again: what the small one answered is used."""
    small = standin_sweep(section.folder / "small", pause_s=pause_s, limit=6).unreported()
    large = standin_sweep(section.folder / "large", pause_s=pause_s, limit=12).unreported()
    expected = section.reference(large, any_batch=True)
    while section.kills.total() < kills:
        watch = section.begin(large, expected)
        for sweep in (small.into(large.output), large):
            end = Attempt(sweep).wait(section.random.uniform(0, span_s))
            if end.code != 0:
                section.killed(end, signal.SIGKILL)
            watch.look(f"limit {sweep.config().limit}", end.answers)
        section.finish(large, watch, f"larger limit after kill {section.resumes}")


# ---- at chosen writes
def at_writes(section: Section, *, kind: str, only: Iterable[str] = (), again: bool = False) -> None:
    """Break the sweep before (of a write: half way through) one of every kind of write that it makes, the middle one.

    `only`: these kinds of writes; default all. `again`: also at a random one of the resumed process.
    """
    sweep = standin_sweep(section.folder, n_runs=3, limit=6).unreported()
    expected = section.reference(sweep)
    n = len(section.boundaries)
    for name in only or dict.fromkeys(section.boundaries):
        places = [number for number, other in enumerate(section.boundaries) if other == name]
        if _can_break(kind, name):
            watch = section.begin(sweep, expected)
            _break(section, sweep, watch, Trap(places[len(places) // 2], kind))
            if again:
                _break(section, sweep, watch, Trap(section.random.randrange(n), kind), may_miss=True)
            section.finish(sweep, watch, f"{kind} at {name}")


def in_report(section: Section, *, kind: str) -> None:
    """The same at every kind of write that the report makes, one after the other in one folder: its runs stay finished."""
    sweep = standin_sweep(section.folder, n_runs=3, limit=6)
    expected = section.reference(sweep)
    first = 1 + max(number for number, name in enumerate(section.boundaries) if "runs/RUN" in name)
    watch = section.begin(sweep, expected)
    section.expect(Attempt(sweep.unreported()).wait(), 0, "without its report")
    for name in dict.fromkeys(section.boundaries[first:]):
        if _can_break(kind, name):
            _break(section, sweep, watch, Trap(kind=kind, name=name))
    section.finish(sweep, watch, f"{kind} in the report")


def _can_break(kind: str, event: str) -> bool:
    """To remove, rename or sync needs no space."""
    return kind != FULL or event.split(maxsplit=1)[0] in ("open", "write", "mkdir")


def _break(section: Section, sweep: Sweep, watch: Watch, trap: Trap, *, may_miss: bool = False) -> None:
    end = Attempt(sweep, Faults(trap=trap)).wait()
    section.resumes += 1
    where = trap.name if trap.name in end.events else end.events[min(trap.at or 0, len(end.events) - 1)]
    if end.code != 0 or not may_miss:
        section.hit.add(where)
        if trap.kind == FULL:
            section.expect(end, 1, "disk full", SENTENCE)
        else:
            section.expect(end, -signal.SIGKILL, f"{trap.kind} at a write")
            section.kills[f"{trap.kind} at a write"] += 1
    if trap.kind == POWER:
        watch.held.clear()  # what was seen may not have been on the disk; what was written down was
    watch.look(f"{trap.kind} at {where}", end.answers)


def small_disks(section: Section, *, limits: int) -> None:
    """Files that may not become longer than so much: a write fails half way, or kills."""
    sweep = standin_sweep(section.folder, n_runs=3, limit=24)
    expected = section.reference(sweep)
    longest = max(path.stat().st_size for path in expected.output.rglob("*") if path.is_file())
    for number in range(limits):
        most = 4_000 + number * (longest - 4_000) // limits
        for kills in (False, True):
            watch = section.begin(sweep, expected)
            end = Attempt(sweep, Faults(file_bytes=most, kill_at_limit=kills)).wait()
            if kills and end.code == -signal.SIGXFSZ:
                section.kills["in the middle of a write"] += 1
            else:
                section.expect(end, 1, "file limit", SENTENCE)
            watch.look(f"files of at most {most} bytes")
            section.finish(sweep, watch, f"files of at most {most} bytes")


# ---- logs
def damaged_logs(section: Section, *, step: int) -> None:
    """A log cut at each of its last 300 bytes is read up to its last whole batch; at every `step`-th the command goes on.

    And one with a line that was changed, all of them at a `step` of 30 and less, is refused.
    """
    sweep = standin_sweep(section.folder, n_runs=3, limit=6).unreported()
    expected = section.reference(sweep)
    last = max(number for number, name in enumerate(section.boundaries) if name == TEMPORARY_SCORES)
    _break(section, sweep, section.begin(sweep, expected), Trap(last))
    left = sweep.output.rename(section.folder / "left")
    (log,) = (path for path in left.rglob(ANSWERS) if not (path.parent / "record.json").exists())
    content, place = log.read_bytes(), log.relative_to(left)
    ends = [batch[-1].end for batch in read_lines(log)]

    def changed(to: bytes) -> Watch:
        watch = section.begin(sweep, expected)
        shutil.copytree(left, sweep.output)
        (sweep.output / place).write_bytes(to)
        return watch

    for cut in range(1, 301):
        log.write_bytes(content[:-cut])
        section.facts["cuts"] = cut
        if [batch[-1].end for batch in read_lines(log)] != [end for end in ends if end <= len(content) - cut]:
            section.findings["lost"].append(f"log without its last {cut} bytes: other batches are read than are whole")
        if cut % step == 1:
            section.finish(sweep, changed(content[:-cut]), f"log without its last {cut} bytes")
    lines = content.splitlines(keepends=True)
    for number in range(0, len(lines), max(1, step // 30)):
        other = bytearray(lines[number])
        other[section.random.randrange(len(other) - 1)] ^= 1
        watch = changed(b"".join([*lines[:number], bytes(other), *lines[number + 1 :]]))
        before = contents_of(sweep.output)
        section.expect(Attempt(sweep).wait(), 2, "changed line", f"{ANSWERS}, line {number + 1}: got a line that does not fit")
        if contents_of(sweep.output) != before:
            section.findings["lost"].append(f"line {number + 1} changed: refusing it changed files")
        shutil.rmtree((sweep.output / place).parent)  # as the sentence says
        section.finish(sweep, watch, f"line {number + 1} changed")


# ---- memory
def short_of_memory(section: Section, *, rounds: int, kills: int) -> None:
    """Batches that do not fit, at random, with kills between: a unit has batches of one size, and says which did not fit."""
    plans = {size: section.reference(standin_sweep(section.folder / str(size), size=size).unreported()) for size in SIZES}
    sweep = standin_sweep(section.folder, size=SIZES[0]).unreported()
    expected = section.reference(sweep, any_batch=True)
    ended: Counter[int] = Counter()
    for number in range(rounds):
        watch = section.begin(sweep, expected, may_restart=True)
        for _ in range(kills):
            trap = Trap(section.random.randrange(len(section.boundaries)))
            end = Attempt(sweep, Faults(trap, memory_seed=section.random.randrange(10**9), memory_share=0.06)).wait()
            section.kills["kill at a write"] += end.code == -signal.SIGKILL
            section.resumes += 1
            watch.look(f"memory, round {number}")
        last = Faults(memory_seed=section.random.randrange(10**9), memory_share=0.06)
        section.finish(sweep, watch, f"memory, round {number}", last)
        for position, (path, folder) in enumerate(expected.units.items()):
            record = json.loads((sweep.output / folder / "record.json").read_text())
            size, exhausted = record["batch_size"], record["exhausted"]
            ended[size] += 1
            if exhausted != list(SIZES[: SIZES.index(size)]):
                section.findings["broken"].append(f"{path}: batch_size {size}, exhausted {exhausted}")
            planned = list(plans[size].answers.values())[position]  # the size is part of a run's id
            if dict(plans[SIZES[0]].answers_in(sweep.output, path)) != planned:
                section.findings["different"].append(f"{path}: batches are not those of size {size}")
    section.facts["units_by_batch_size"] = {str(size): count for size, count in sorted(ended.items())}
