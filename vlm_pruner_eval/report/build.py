"""Write the report of a results directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vlm_pruner_eval.report.contents import Report, report_of
from vlm_pruner_eval.report.figures.report_figures import draw_all
from vlm_pruner_eval.report.load import load_sweep
from vlm_pruner_eval.report.paper.paper_comparison import Compared, PaperTable
from vlm_pruner_eval.report.show.gallery import gallery
from vlm_pruner_eval.report.writers.comma_separated import comma_separated
from vlm_pruner_eval.report.writers.html import html
from vlm_pruner_eval.report.writers.latex import latex
from vlm_pruner_eval.report.writers.markdown import markdown
from vlm_pruner_eval.store.files import write_atomic
from vlm_pruner_eval.store.schema import to_json


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
    return write(report_of(load_sweep(results_dir)))


def write(report: Report) -> dict[str, Path]:
    """Write all files of a report into its results directory, report.md last.

    Returns
    -------
    dict
        "md", "html", "json", "png", "svg" (the figure of scores), "tables", the folder of all tables as .csv and .tex, and the other
        figures by their file names.
    """
    results, root = report.results, report.results.store.root
    paths = {kind: root / f"report.{kind}" for kind in ("md", "html", "json")} | {"tables": root / "tables"}
    paths["md"].unlink(missing_ok=True)  # if it is there, so is all the rest
    figures = draw_all(report.rows, results, root, report.comparisons)
    for name, drawn in figures.items():
        paths |= {path.suffix.removeprefix(".") if name == "accuracy_vs_rate" else path.name: path for path in drawn}
    _write_tables(report, paths["tables"])
    write_atomic(paths["json"], to_json(as_json(report)) + "\n")
    write_atomic(paths["html"], html(report, figures, gallery(results)))
    write_atomic(paths["md"], markdown(report, figures))
    return paths


def _write_tables(report: Report, folder: Path) -> None:
    """Write the tables as LaTeX and as numbers, and remove those of an earlier report."""
    folder.mkdir(exist_ok=True)
    for path in [*folder.glob("*.tex"), *folder.glob("*.csv")]:
        path.unlink(missing_ok=True)  # another process may be writing the same report
    model, tasks = report.results.config["model"], report.results.tasks
    documents = {task: cell.n for row in report.rows[:1] for task, cell in row.cells.items()}
    counted = ", ".join(f"{task} {documents[task]}" for task in tasks if documents.get(task))
    caption = f"{model['pretrained']}, protocol {model['protocol']}" + (f"; documents: {counted}." if counted else ".")
    for table in report.tables:
        write_atomic(folder / f"{table.id}.csv", comma_separated(table))
        if table.on_pages:
            write_atomic(folder / f"{table.id}.tex", latex(table, caption=caption))


def as_json(report: Report) -> dict[str, Any]:
    """The whole report in plain types."""
    results = report.results
    runs = [{"key": run.key, "run_id": run.run_id, "status": run.status, "record": run.record} for run in results.runs]
    return {
        "name": results.name,
        "note": report.plumbing,
        "remarks": list(results.notes),
        "config": results.config,
        "tasks": results.tasks,
        "splits": results.splits,
        "rows": [dataclasses.asdict(row) | {"removed_percent": row.removed_percent, "group": row.heading} for row in report.rows],
        "comparisons": dataclasses.asdict(report.comparisons),
        "paper": None if report.paper is None else _paper_json(report.paper),
        "strata": [dataclasses.asdict(item) for item in report.strata],
        "runs": runs,
    }


def _paper_json(paper: PaperTable) -> dict[str, Any]:
    """Return the table without the rows' own scores, which stand under `rows`."""
    rows = [
        {
            "label": item.row.label,
            "pruning_rate": item.row.pruning_rate,
            "release": item.row.release,
            "cells": {task: _compared_json(compared) for task, compared in item.cells.items()},
            "average": _compared_json(item.average),
        }
        for item in paper.rows
    ]
    return dataclasses.asdict(paper) | {"rows": rows}


def _compared_json(compared: Compared) -> dict[str, Any]:
    return dataclasses.asdict(compared) | {"difference": compared.difference}
