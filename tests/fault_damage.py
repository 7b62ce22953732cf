"""More parts of a fault campaign: journals that were cut or changed, and memory that does not suffice."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from fault_checks import Expected, age_temporaries, files_of
from fault_sections import Section
from fault_sweep import Attempt, Faults, standin_sweep
from fault_trace import Trap
from vlm_pruner_eval.sweep.store import Store

from vlm_pruner_eval.sweep.grid import expand

SIZES = (6, 3, 1)


# ---- journals
def damaged_journals(section: Section, *, step: int) -> None:
    """A journal cut at every `step`-th of its last 300 bytes, and one with a line that was changed."""
    sweep = standin_sweep(section.folder, n_runs=3, limit=6).unreported()
    expected = section.reference(sweep)
    samples = [i for i, name in enumerate(section.facts["events"]) if name == "open runs/RUN/samples.jsonl (temporary)"]
    section.begin(sweep, expected)
    Attempt(sweep, Faults(trap=Trap(samples[-1]))).wait()
    section.kills["SIGKILL at a write"] += 1
    left = section.folder / "left"
    shutil.copytree(sweep.output, left)
    (journal,) = left.glob("runs/*/journal.jsonl")
    content, place = journal.read_bytes(), journal.relative_to(left)
    cuts = range(1, 301, step)
    for cut in cuts:
        watch = section.begin(sweep, expected)
        shutil.copytree(left, sweep.output)
        (sweep.output / place).write_bytes(content[:-cut])
        section.finish(watch, f"journal without its last {cut} bytes")
    section.facts |= {"cuts": len(cuts), "changed_lines": 0}
    lines = content.splitlines(keepends=True)
    for number in range(0, len(lines) - 1, 1 if step == 1 else 3):
        watch = section.begin(sweep, expected)
        shutil.copytree(left, sweep.output)
        changed = bytearray(lines[number])
        changed[section.random.randrange(len(changed) - 1)] ^= 1
        (sweep.output / place).write_bytes(b"".join([*lines[:number], bytes(changed), *lines[number + 1 :]]))
        before = _contents(sweep.output)
        section.expect(Attempt(sweep).wait(), 2, "changed line", f"journal.jsonl, line {number + 1}: got a line that does not fit")
        if _contents(sweep.output) != before:
            section.findings.lost.append(f"line {number + 1} changed: refusing it changed files")
        shutil.rmtree(sweep.output / place.parent)  # as the sentence says
        section.finish(watch, f"line {number + 1} changed")
        section.facts["changed_lines"] += 1


def _contents(root: Path) -> dict[str, bytes]:
    """Of all files but locks: that of the process which was killed is taken over, and given back."""
    return {name: (root / name).read_bytes() for name in files_of(root) if (root / name).is_file() and not name.endswith(".lock")}


# ---- memory
def short_of_memory(section: Section, *, rounds: int, kills: bool) -> None:
    """Batches that do not fit, at random, with kills between: a run has batches of one size, and says which did not fit."""
    sweep = standin_sweep(section.folder, n_runs=7, limit=12, size=SIZES[0]).unreported()
    expected = section.reference(sweep, any_batch=True)
    events = len(section.facts["events"])
    plans = {size: _batches(section.reference(standin_sweep(section.folder / str(size), size=size).unreported())) for size in SIZES}
    ended: Counter[str] = Counter()
    for number in range(rounds):
        watch = section.begin(sweep, expected)
        for _ in range(3 if kills else 0):
            trap = Trap(section.random.randrange(events))
            end = Attempt(sweep, Faults(trap=trap, memory_seed=section.random.randrange(10**9), memory_share=0.06)).wait()
            section.kills["SIGKILL at a write"] += end.killed
            section.resumes += 1
            watch.look(f"memory, round {number}")
        age_temporaries(sweep.output)
        end = Attempt(sweep, Faults(memory_seed=section.random.randrange(10**9), memory_share=0.06)).wait()
        section.expect(end, 0, "short of memory")
        watch.finish(f"memory, round {number}")
        section.sweeps += 1
        for run in expand(sweep.config()):
            ended[_mixed(section, watch.store, run.run_id, run.key, plans)] += 1
    section.facts["runs_by_batch_size"] = dict(ended)


def _batches(reference: Expected) -> dict[str, dict[tuple[str, int], int]]:
    """By run, the size of every sample's batch."""
    store = Store(reference.sweep.output)
    return {key: {(s["task"], s["doc_id"]): s["batch_size"] for s in store.each_sample(run_id)} for run_id, key in reference.runs.items()}


def _mixed(section: Section, store: Store, run_id: str, key: str, plans: dict[int, Any]) -> str:
    """The size of a run's batches, after comparing every sample with an undisturbed run of that size."""
    record = store.read(run_id)
    size, exhausted = record["batch_size"], record["exhausted"]
    found = {(s["task"], s["doc_id"]): s["batch_size"] for s in store.each_sample(run_id)}
    if exhausted != list(SIZES[: SIZES.index(size)]):
        section.findings.broken.append(f"{key}: batch_size {size}, exhausted {exhausted}")
    if found != plans[size][key]:
        section.findings.different.append(f"{key}: batches are not those of size {size}: {json.dumps(Counter(found.values()))}")
    return str(size)
