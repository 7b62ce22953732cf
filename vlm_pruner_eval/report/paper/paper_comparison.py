"""The paper beside ours: every cell with the printed number, the difference, and, on release rows, a verdict on their equivalence."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.paper import gate as gates
from vlm_pruner_eval.report.paper.differences import differences
from vlm_pruner_eval.report.paper.disagreements import Disagreement, disagreements
from vlm_pruner_eval.report.paper.gate import FAILS, Gate, judge_scores, tolerance, within
from vlm_pruner_eval.report.paper.papers import DEFAULT, PAPERS, Paper
from vlm_pruner_eval.report.paper.printed import (
    AVERAGE,
    METHODS,
    Number,
    PaperModel,
    PrintedNumbers,
    benchmark_of,
    full_score,
    incomparable,
    is_possible,
    is_whole_paper,
    paper_model,
    read_printed,
)
from vlm_pruner_eval.report.paper.recompute import recompute_averages
from vlm_pruner_eval.report.rows import Cell, Row
from vlm_pruner_eval.store.schema import FINISHED
from vlm_pruner_eval.sweep.grid import UNPRUNED

EQUIVALENT, OUTSIDE, NOT_RUN, INCOMPARABLE, NO_CLAIM = "equivalent", "outside", "not run", "not comparable", "no claim"
NO_NUMBER = "no printed number"
# Parameters in which a row may differ from the method's defaults and still be what the paper ran.
_FREE = frozenset({"official_quirks", "selection_dtype", "seed"})


@dataclass(frozen=True)
class Compared:
    """A cell of ours beside the paper's.

    Attributes
    ----------
    cell
        Our score with its 95 % interval, in the benchmark's own unit.
    printed, tolerance
        The printed number, and how far ours may be from it; None if nothing is printed.
    verdict
        On release rows "equivalent", "outside", "not run", "not comparable" or "no claim"; None on other rows.
    reason
        Why it is none of the first two.
    errata
        Numbers of the errata that touch the printed number.
    """

    cell: Cell
    printed: Number | None
    tolerance: float | None
    verdict: str | None
    reason: str | None = None
    errata: tuple[int, ...] = ()

    @property
    def difference(self) -> float | None:
        """Score minus printed number."""
        return None if self.printed is None or self.cell.value is None else self.cell.value - self.printed.value


@dataclass(frozen=True)
class PaperRow:
    """A row of the table: `cells` by task, and the relative average (a printed one beside it if the tasks are the paper's nine)."""

    row: Row
    cells: dict[str, Compared]
    average: Compared


@dataclass(frozen=True)
class PaperTable:
    """Everything about the paper that a report shows.

    Attributes
    ----------
    vlm
        The model's name in the paper's tables.
    gate
        Verdict on the unpruned row. If it does not give the printed upper bound, no verdict is given on any pruned row.
    setting
        Harness, protocol and splits of our unpruned row, one sentence.
    noise
        Origin of the tolerance's noise, one sentence.
    footnotes
        The errata that touch a printed number of the table.
    differences
        Ways in which this sweep asks, counts or shows the model otherwise than the authors did, a sentence each.
    paper
        Name and reference of the paper.
    disagreements
        Numbers of the table's methods, rates and benchmarks that papers print differently.
    """

    vlm: str
    gate: Gate
    setting: str
    noise: str
    rows: tuple[PaperRow, ...]
    footnotes: tuple[str, ...]
    differences: tuple[str, ...] = ()
    rule: str = gates.RULE
    paper: str = PAPERS[DEFAULT].title
    disagreements: tuple[Disagreement, ...] = ()

    @property
    def verdict(self) -> str:
        """The gate's sentence, and what is not claimed if the unpruned row does not reproduce the paper."""
        return f"{self.gate.sentence} Nothing is claimed about pruned rows." if self.gate.stops else self.gate.sentence


@dataclass(frozen=True)
class Reference:
    """Printed numbers with gate and noise, against which rows are held.

    Attributes
    ----------
    spreads
        By task, and under `AVERAGE`: the measured spread of the unpruned score, the numeric noise.
    """

    vlm: str | None
    printed: PrintedNumbers
    gate: Gate
    spreads: Mapping[str, float | None] = field(default_factory=dict)

    def compare(self, row: Row, tasks: list[str]) -> PaperRow:
        """A row beside its printed numbers."""
        cells = {
            task: self._cell(row, task, row.cells.get(task, Cell(None)), benchmark_of(task, self.vlm, self.printed.paper)) for task in tasks
        }
        average = self._cell(row, AVERAGE, row.relative, AVERAGE if is_whole_paper(tasks, self.vlm, self.printed.paper) else None)
        return PaperRow(row, cells, average)

    def _cell(self, row: Row, task: str, cell: Cell, benchmark: str | None) -> Compared:
        published = is_as_published(row, self.printed.paper)
        number = self.printed.find(self.vlm, row.method, row.percent, benchmark) if published else None
        allowed = None if number is None else tolerance(full_score(benchmark), self.spreads.get(task))
        verdict, reason = None, None
        if row.method != UNPRUNED and row.release and published and row.method in METHODS:
            verdict, reason = self._verdict(row, cell, number, benchmark, allowed)
        errata = self.printed.errata_of(self.vlm, row.method, row.percent, benchmark) if number is not None else ()
        return Compared(cell, number, allowed, verdict, reason, errata)

    def _verdict(self, row: Row, cell: Cell, number: Number | None, benchmark: str | None, allowed: float | None) -> tuple[str, str | None]:
        if number is None:
            return NOT_RUN, NO_NUMBER
        if cell.value is None:
            return NOT_RUN, "no score" if row.status == FINISHED else row.status
        if self.gate.status == gates.INCOMPARABLE:
            return INCOMPARABLE, self.gate.sentence
        if self.gate.stops:
            return NO_CLAIM, "the unpruned row does not reproduce"
        if not is_possible(number, benchmark) or (benchmark == AVERAGE and not self.printed.has_sound_averages(self.vlm)):
            return INCOMPARABLE, "the printed upper bound is above the benchmark's maximum"
        return (EQUIVALENT if within(cell.value - number.value, allowed) else OUTSIDE), None


def said(compared: Compared) -> str:
    """The verdict in words; if nothing was held against anything, with the reason."""
    if compared.verdict != NOT_RUN:
        return compared.verdict or ""
    return compared.reason if str(compared.reason).startswith(NOT_RUN) else f"{NOT_RUN} ({compared.reason})"


def is_as_published(row: Row, paper: Paper = PAPERS[DEFAULT]) -> bool:
    """Return True if a row differs from the method's default settings as the paper's does: an ablation has no printed number here."""
    changed = {name: value for name, value in row.changed.items() if name not in _FREE}
    return row.iso_layer is None and changed == paper.settings.get(row.method, {})


def paper_for(results: Results, rows: list[Row], printed: PrintedNumbers | None = None) -> PaperTable | None:
    """The numbers for a sweep of the paper that its file names; None if its checkpoint is none of the papers'.

    Parameters
    ----------
    rows
        Of `rows_of`.
    printed
        Other printed numbers than the package's.

    Raises
    ------
    ConfigError
        Printed numbers, or the noise floor of `reproduce`, that can't be read.
    """
    model = results.config["model"]
    paper = paper_model(model["pretrained"])
    if paper is None:
        return None
    others = {name: read_printed(paper=name) for name in PAPERS}
    printed = others[results.config.get("paper", DEFAULT)] if printed is None else printed  # older sweeps name none
    spreads, noise = _noise(results)
    reference = Reference(paper.vlm, printed, _gate(results, rows, paper, printed, spreads), spreads)
    compared = tuple(reference.compare(row, results.tasks) for row in rows)
    footnotes = tuple(_footnotes(compared, printed, paper.vlm))
    known = tuple(differences(paper.vlm, results.tasks, printed.paper))
    return PaperTable(
        paper.vlm,
        reference.gate,
        f"{_setting(results, paper)} Printed: {printed.paper.title}.",
        noise,
        compared,
        footnotes,
        known,
        paper=printed.paper.title,
        disagreements=disagreements(others, paper.vlm, rows, results.tasks),
    )


def _gate(results: Results, rows: list[Row], paper: PaperModel, printed: PrintedNumbers, spreads: Mapping[str, float | None]) -> Gate:
    model = results.config["model"]
    reasons = tuple(
        incomparable(paper, model_id=model["id"], pretrained=model["pretrained"], protocol=model["protocol"], limit=results.config["limit"])
    )
    unpruned = next((row for row in rows if row.method == UNPRUNED), None)
    if unpruned is None or unpruned.status != FINISHED:
        got = NOT_RUN if unpruned is None else unpruned.status
        return Gate(FAILS, f"The unpruned row does not reproduce: it is {got}, so no pruned row is held against the paper.", ())
    scores = {task: unpruned.cells[task].value for task in results.tasks}
    return judge_scores(scores, spreads, printed, paper.vlm, reasons)


def _noise(results: Results) -> tuple[dict[str, float | None], str]:
    """Spreads that `vlm-pruner-eval reproduce` measured for this very sweep, which it keeps in the folder above."""
    path = results.store.root.absolute().parent / "reproduce.json"
    missing = (
        "The numeric noise of the unpruned model was not measured for this sweep, so the tolerance is the half point alone; "
        "`vlm-pruner-eval reproduce` measures it."
    )
    if not path.is_file():
        return {}, missing
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
        if done["config"] != results.config:
            return {}, missing
        noise: dict[str, Any] = done["noise"]
        spreads = {task: measured["spread"] for task, measured in noise["tasks"].items()}
        return spreads | {AVERAGE: noise["average_spread"]}, f"Noise: spread of the unpruned score over {', '.join(noise['variants'])}."
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: can't be read as the noise floor of a reproduction ({error}); run `reproduce` again.") from error


def _setting(results: Results, paper: PaperModel) -> str:
    record = next(iter(results.records), None)
    version = f"lmms-eval {record.provenance.versions['lmms_eval']}" if record else "lmms-eval"
    splits = ", ".join(f"{task}: {results.splits[task]}" for task in results.tasks if task in results.splits)
    sentence = f"Ours: {version}, protocol {results.config['model']['protocol']}" + (f", splits {splits}." if splits else ".")
    if paper.has_script:
        return sentence
    return f"{sentence} No evaluation script was released for {paper.vlm}: what the authors ran is read from the paper's text."


def _footnotes(rows: tuple[PaperRow, ...], printed: PrintedNumbers, vlm: str) -> Iterator[str]:
    """The errata that touch a printed number; of a misprinted upper bound, with both averages of every row."""
    shown = {number for item in rows for compared in (*item.cells.values(), item.average) for number in compared.errata}
    both = [row for row in recompute_averages(printed) if row.vlm == vlm and row.corrected is not None]
    listed = ", ".join(f"{row.method} {row.derived:.2f} / {row.corrected:.2f}" for row in both)
    for erratum in (erratum for erratum in printed.errata if erratum.number in shown):
        averages = f" Averages from the printed cells / with the corrected value: {listed}." if erratum.corrected and both else ""
        yield f"Note {erratum.number}: {erratum.text}{averages}"
