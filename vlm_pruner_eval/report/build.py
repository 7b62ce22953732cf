"""Write the report of a results directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_pruner_eval.report import tidy
from vlm_pruner_eval.report.efficiency import EfficiencyRow, efficiency
from vlm_pruner_eval.report.figures.all import draw_all
from vlm_pruner_eval.report.html.page import write_html
from vlm_pruner_eval.report.latex import latex
from vlm_pruner_eval.report.load import Results, load_results
from vlm_pruner_eval.report.markdown import markdown
from vlm_pruner_eval.report.paper.beside import PaperTable, paper_for
from vlm_pruner_eval.report.rows import PLUMBING, Row, is_plumbing, rows_of
from vlm_pruner_eval.report.sheets.all import sheets
from vlm_pruner_eval.report.sheets.table import Table
from vlm_pruner_eval.report.show.gallery import gallery
from vlm_pruner_eval.report.stats.compare import compare
from vlm_pruner_eval.report.stats.comparisons import Comparisons
from vlm_pruner_eval.report.stats.strata import Stratum, strata
from vlm_pruner_eval.store.files import write_atomic
from vlm_pruner_eval.sweep.store import to_json


@dataclass(frozen=True)
class Report:
    """Everything that a report says, before it is written in any format."""

    results: Results
    rows: list[Row]
    comparisons: Comparisons
    paper: PaperTable | None
    efficiency: Sequence[EfficiencyRow]
    strata: Sequence[Stratum]

    @property
    def tables(self) -> list[Table]:
        """Laid out for readers."""
        return sheets(self.results, self.rows, self.comparisons, self.paper, efficiency=self.efficiency, strata=self.strata)


def build(results_dir: Path | str) -> dict[str, Path]:
    """Compute and write the report of a results directory.

    Returns
    -------
    dict
        As of `write`.

    Raises
    ------
    ConfigError
        No sweep there, or runs that do not belong in one table.
    """
    return write(report_of(load_results(results_dir)))


def report_of(results: Results) -> Report:
    """Compute a report.

    Raises
    ------
    ConfigError
        Printed numbers, or a noise floor, that can't be read.
    """
    rows = rows_of(results)
    comparisons = compare(results, rows)
    return Report(results, rows, comparisons, paper_for(results, rows), efficiency(results), strata(results))


def write(report: Report) -> dict[str, Path]:
    """Write all files of a report into its results directory.

    Returns
    -------
    dict
        "md", "html", "json", "csv", "png", "svg" (the figure of scores), "tables", the folder of all tables as .csv and .tex, and the
        other figures by their file names.
    """
    results, root = report.results, report.results.store.root
    tables, figures = report.tables, draw_all(report.rows, results, root, report.comparisons)
    texts = {
        "md": markdown(results, report.rows, report.comparisons, report.paper, tables, figures),
        "json": to_json(as_json(report)) + "\n",
        "csv": tidy.scores_and_differences(report.rows, results.tasks, report.comparisons),
    }
    paths = {kind: root / f"report.{kind}" for kind in texts}
    for kind, content in texts.items():
        write_atomic(paths[kind], content)
    for path in figures.get("accuracy_vs_rate", ()):
        paths[path.suffix.removeprefix(".")] = path
    paths |= {path.name: path for name, drawn in figures.items() if name != "accuracy_vs_rate" for path in drawn}
    paths["html"] = write_html(
        *(results, report.rows, report.comparisons, report.paper, figures, gallery(results)),
        efficiency=report.efficiency,
        strata=report.strata,
    )
    paths["tables"] = _write_tables(report, tables, root / "tables")
    return paths


def _write_tables(report: Report, tables: Sequence[Table], folder: Path) -> Path:
    """The same tables as LaTeX and as numbers; what an earlier report left behind there is removed."""
    model, tasks = report.results.config["model"], report.results.tasks
    documents = {task: cell.n for row in report.rows[:1] for task, cell in row.cells.items()}
    counted = ", ".join(f"{task} {documents[task]}" for task in tasks if documents.get(task))
    caption = f"{model['pretrained']}, protocol {model['protocol']}" + (f"; documents: {counted}." if counted else ".")
    texts = {f"{table.id}.tex": latex(table, caption=caption) for table in tables}
    texts |= {
        "scores.csv": tidy.scores(report.rows, tasks),
        "differences.csv": tidy.differences(report.rows, tasks, report.comparisons),
        "power.csv": tidy.records(report.comparisons.power),
        "pairs.csv": tidy.records(report.comparisons.pairs),
        "efficiency.csv": tidy.records(report.efficiency),
        "strata.csv": tidy.records(report.strata),
    }
    if report.paper is not None:
        texts["paper.csv"] = tidy.paper(report.paper)
    for path in [*folder.glob("*.tex"), *folder.glob("*.csv")]:
        if path.name not in texts:
            path.unlink()
    for name, content in texts.items():
        write_atomic(folder / name, content)
    return folder


def as_json(report: Report) -> dict[str, Any]:
    """The whole report in plain types."""
    results = report.results
    runs = [{"key": run.key, "run_id": run.run_id, "status": run.status, "record": run.record} for run in results.runs]
    return {
        "name": results.name,
        "note": PLUMBING if is_plumbing(results.tasks) else None,
        "remarks": list(results.notes),
        "config": results.config,
        "tasks": results.tasks,
        "splits": results.splits,
        "rows": [dataclasses.asdict(row) | {"removed_percent": row.removed_percent, "group": row.heading} for row in report.rows],
        "comparisons": dataclasses.asdict(report.comparisons),
        "paper": None if report.paper is None else _paper_json(report.paper),
        "efficiency": [dataclasses.asdict(row) for row in report.efficiency],
        "strata": [dataclasses.asdict(item) for item in report.strata],
        "runs": runs,
    }


def _paper_json(paper: PaperTable) -> dict[str, Any]:
    """Without the rows' own scores, which stand under `rows`."""
    rows = [
        {
            "label": item.row.label,
            "pruning_rate": item.row.pruning_rate,
            "release": item.release,
            "cells": {task: dataclasses.asdict(cell) | {"difference": cell.difference} for task, cell in item.cells.items()},
            "average": dataclasses.asdict(item.average) | {"difference": item.average.difference},
        }
        for item in paper.rows
    ]
    return {
        "vlm": paper.vlm,
        "gate": dataclasses.asdict(paper.gate),
        "setting": paper.setting,
        "noise": paper.noise,
        "rule": paper.rule,
        "rows": rows,
        "footnotes": [dataclasses.asdict(note) for note in paper.footnotes],
        "differences": list(paper.differences),
    }
