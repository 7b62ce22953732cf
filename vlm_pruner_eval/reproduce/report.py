"""reproduce.md for people, reproduce.json for programs, and the summary on the screen, all from one Reproduction."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlm_pruner_eval.redact import spelled_out
from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.load import load_sweep
from vlm_pruner_eval.report.paper.gate import RULE, TaskVerdict
from vlm_pruner_eval.report.paper.paper_comparison import Compared, said
from vlm_pruner_eval.report.rows import PLUMBING, is_plumbing
from vlm_pruner_eval.report.tables.table_layout import facts
from vlm_pruner_eval.report.text import exact
from vlm_pruner_eval.report.writers.markdown import inert, lines, table
from vlm_pruner_eval.report.writers.screen import WIDTH, print_tables, print_verdicts
from vlm_pruner_eval.reproduce.noise import Flips, Noise
from vlm_pruner_eval.reproduce.reproduced_rows import ReproducedRow, as_json
from vlm_pruner_eval.reproduce.run import Reproduction
from vlm_pruner_eval.store.files import write_atomic
from vlm_pruner_eval.store.schema import to_json

_NOISE_LEGEND = (
    "The unpruned model answered the same questions under every variant. Spread: largest minus smallest score. Answers flipped: "
    "documents whose answer text differs from the reference variant's. Scores flipped: documents whose own score differs (n/a where "
    "the task gives a document none). A difference between two methods that is not above this floor means nothing."
)
_ROWS_LEGEND = (
    "Scores with 95 % intervals over documents (several seeds: ± standard deviation over seeds). Difference = score minus printed "
    "number. Only release rows (official_quirks) are held against the printed numbers, under the rule of the gate; a row with other "
    "than the method's default parameters has no printed number. The printed average is compared when the tasks are the paper's nine."
)
_QUIRKS_LEGEND = (
    "Share of prompts with images in which a misbehaviour of the release fired (release rows) or would have fired (other rows)."
)


def write(done: Reproduction) -> dict[str, Path]:
    """Write reproduce.md and reproduce.json; returns "md" and "json" -> path."""
    paths = {kind: done.plan.output / f"reproduce.{kind}" for kind in ("md", "json")}
    write_atomic(paths["md"], markdown(done))
    write_atomic(paths["json"], to_json(reproduction_json(done)) + "\n")
    return paths


def reproduction_json(done: Reproduction) -> dict[str, Any]:
    """Everything, in plain types."""
    plan, noise, gate = done.plan, done.noise, done.gate
    return {
        "name": plan.name,
        "config": plan.rows.model_dump(),
        "vlm": plan.vlm,
        "provenance": noise.record.provenance if noise.record else None,
        "results_version": noise.record.config["results_version"] if noise.record else None,
        "noise": {
            "reference": noise.variants[0].name,
            "variants": {item.name: dataclasses.asdict(item) | {"problem": noise.problems.get(item.name)} for item in noise.variants},
            "average_spread": noise.average_spread,
            "tasks": {name: _noise_json(noise, name) for name in noise.tasks},
        },
        "gate": {
            "status": gate.status,
            "sentence": gate.sentence,
            "rule": RULE,
            "incomparable": list(plan.incomparable),
            "tasks": [dataclasses.asdict(item) | {"difference": item.difference} for item in gate.tasks],
        },
        "rows": None if done.rows is None else as_json(done.rows),
        "runs": dataclasses.asdict(done.counts),
    }


def _noise_json(noise: Noise, name: str) -> dict[str, Any]:
    task = noise.tasks[name]
    flips = {
        kind: {variant: None if item is None else dataclasses.asdict(item) | {"share": item.share} for variant, item in counted.items()}
        for kind, counted in (("answer_flips", task.answer_flips), ("score_flips", task.score_flips))
    }
    return {"metric": task.metric, "scores": task.scores, "spread": task.spread} | flips


def markdown(done: Reproduction) -> str:
    """The whole report as Markdown."""
    plan, noise = done.plan, done.noise
    plumbing = [f"**{PLUMBING}**"] if is_plumbing(list(noise.tasks)) else []
    parts = [f"# Reproduction: {plan.name}", *plumbing, f"**{done.gate.sentence}**", *_failures(done)]
    if noise.tasks:
        parts += ["## Noise floor of the unpruned model", table(_noise_lines(noise)), _NOISE_LEGEND]
        parts += ["## Gate: the unpruned row", table(_gate_lines(done.gate.tasks)), RULE]
    parts += ["## Rows", *_rows_parts(done)]
    if noise.record is not None:
        parts += ["## Where these numbers come from", table(lines(facts(load_sweep(plan.noise_dir(plan.variants[0])))))]
    return inert("\n\n".join(parts)) + "\n"


def _failures(done: Reproduction) -> Iterator[str]:
    problems = [f"{name}: {' '.join(problem.split())}" for name, problem in done.noise.problems.items()]
    problems += [" ".join(problem.split()) for item in done.rows or [] for problem in item.row.problems]
    if problems:
        yield "Failed runs:\n\n" + "\n".join(f"- {problem}" for problem in problems)


def _noise_lines(noise: Noise) -> Iterator[list[str]]:
    yield ["task", "variant", "score", "spread", "answers flipped", "scores flipped"]
    for name, task in noise.tasks.items():
        for variant in (item.name for item in noise.variants):
            is_first = variant == noise.variants[0].name
            head = [name, f"{variant} (reference)", exact(task.scores[variant]), exact(task.spread)] if is_first else ["", variant]
            yield head + (["", ""] if is_first else [exact(task.scores[variant]), "", *_flip_cells(noise, name, variant)])


def _flip_cells(noise: Noise, name: str, variant: str) -> list[str]:
    if variant in noise.problems:
        return ["failed", "failed"]
    task = noise.tasks[name]
    return [flips(task.answer_flips[variant]), flips(task.score_flips[variant])]


def _gate_lines(verdicts: tuple[TaskVerdict, ...]) -> Iterator[list[str]]:
    yield ["task", "benchmark", "score", "printed", "difference", "tolerance", "verdict"]
    for item in verdicts:
        printed = exact(None if item.printed is None else item.printed.value)
        yield [item.task, item.benchmark or "", exact(item.score), printed, signed(item.difference), exact(item.tolerance), item.verdict]


def _rows_parts(done: Reproduction) -> Iterator[str]:
    if done.rows is None:
        yield "Not run: the unpruned row has to reproduce first (`--anyway` runs them all the same)."
        return
    yield table(_row_lines(done.rows))
    yield _ROWS_LEGEND
    yield "## Quirks"
    yield table(_quirk_lines(done.rows))
    yield _QUIRKS_LEGEND
    yield f"The plain tables, with tokens and times: `vlm-pruner-eval report {done.plan.rows_dir}`."


def _row_lines(rows: list[ReproducedRow]) -> Iterator[list[str]]:
    yield ["row", "removed", "task", "score", "printed", "difference", "verdict"]
    for item in rows:
        head = [item.row.label, item.row.heading.replace(" removed", "")]
        if not item.row.cells:
            yield [*head, item.row.status, "", "", "", ""]
            continue
        for name, compared in [*item.cells.items(), ("relative Avg", item.average)]:
            yield [*head, name, *_compared_cells(item, compared)]
            head = ["", ""]


def _compared_cells(item: ReproducedRow, compared: Compared) -> list[str]:
    score, interval = text.cell_lines(item.row, compared.cell)
    shown = score if not interval else f"{score} {interval}" if interval.startswith("±") else f"{score} [{interval}]"
    printed = "" if compared.printed is None else exact(compared.printed.value)
    return [shown, printed, "" if compared.printed is None else signed(compared.difference), said(compared)]


def _quirk_lines(rows: list[ReproducedRow]) -> Iterator[list[str]]:
    yield ["row", "removed", "prompts", "quirks"]
    for item in rows:
        yield [item.row.label, item.row.heading.replace(" removed", ""), str(item.samples), quirk_rates(item)]


def quirk_rates(item: ReproducedRow) -> str:
    """One text like "stall 12.5 %", or "none"."""
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in item.quirks.items()) or "none"


def flips(counted: Flips | None) -> str:
    """A count like "3 of 200 (1.50 %)"."""
    return text.NOTHING if counted is None else f"{counted.changed} of {counted.documents} ({100 * counted.share:.2f} %)"


def signed(value: float | None) -> str:
    """Two decimals with a sign."""
    return text.NOTHING if value is None else f"{value:+.2f}"


def print_summary(console: Console, done: Reproduction) -> None:
    """Noise and gate in one table, the tables of the rows, the verdicts of the release rows, and the sentence of the gate."""
    if done.noise.tasks:
        console.print(_overview(done), width=WIDTH)
    if done.rows is not None:
        print_tables(console, done.results, [item.row for item in done.rows])
        for item in done.rows:
            print_verdicts(console, item)
            if item.quirks:
                console.print(Text(f"quirk rates, {item.row.label}, {item.row.heading}: {quirk_rates(item)}"), width=WIDTH)
    for line in _failures(done):
        console.print(Text(spelled_out(line), style="red"), width=WIDTH)
    console.print(Text(done.gate.sentence, style="bold red" if done.gate.stops else "bold"), width=WIDTH)


def _overview(done: Reproduction) -> Table:
    noise = done.noise
    variants = ", ".join(item.name for item in noise.variants)
    shown = Table(title=Text(f"unpruned, {variants}"), box=box.SIMPLE_HEAD, pad_edge=False, padding=0, title_justify="left")
    shown.add_column("task", overflow="fold")
    for name in ("score", "spread", "answers flipped", "printed", "tolerance"):
        shown.add_column(name, justify="right", overflow="fold")
    shown.add_column("verdict", overflow="fold")
    for item in done.gate.tasks:
        counted = list(noise.tasks[item.task].answer_flips.values())
        worst = flips(max(counted, key=lambda flip: flip.changed)) if counted else text.NOTHING
        printed = exact(None if item.printed is None else item.printed.value)
        numbers = [exact(item.score), exact(item.spread), worst, printed, exact(item.tolerance)]
        shown.add_row(*(Text(value) for value in [item.task, *numbers, item.verdict]))
    return shown
