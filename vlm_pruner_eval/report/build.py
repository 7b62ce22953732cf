"""Write the report of a results directory."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from vlm_pruner_eval.report.figure import draw
from vlm_pruner_eval.report.load import Results, load_results
from vlm_pruner_eval.report.markdown import markdown
from vlm_pruner_eval.report.tables import PLUMBING, Row, is_plumbing, rows_of
from vlm_pruner_eval.sweep.store import to_json, write_atomic

_COLUMNS = ("method", "label", "pruning_rate", "removed_percent", "status", "task", "score", "low_95", "high_95", "sd_over_seeds", "seeds")
_MEASURED = ("n_documents", "relative_avg", "tokens_asked", "tokens_kept", "tokens_layer_averaged", "prefill_ms", "selection_ms", "quirks")


def build(results_dir: Path | str) -> dict[str, Path]:
    """Write report.md, report.json, report.csv and the figure into a results directory.

    Returns
    -------
    dict
        "md", "json", "csv", "png", "svg" -> path.

    Raises
    ------
    ConfigError
        No sweep there, or runs that do not belong in one table.
    """
    results = load_results(results_dir)
    rows = rows_of(results)
    return write(results, rows)


def write(results: Results, rows: list[Row]) -> dict[str, Path]:
    """Write all files of a report from rows that are computed already."""
    root = results.store.root
    texts = {"md": markdown(results, rows), "json": to_json(_as_json(results, rows)) + "\n", "csv": _as_csv(rows, results.tasks)}
    paths = {}
    for kind, content in texts.items():
        paths[kind] = root / f"report.{kind}"
        write_atomic(paths[kind], content)
    paths["png"], paths["svg"] = draw(rows, results.tasks, root / "accuracy_vs_rate")
    return paths


def _as_json(results: Results, rows: list[Row]) -> dict[str, Any]:
    runs = [{"key": run.key, "run_id": run.run_id, "status": run.status, "record": run.record} for run in results.runs]
    return {
        "name": results.name,
        "note": PLUMBING if is_plumbing(results.tasks) else None,
        "remarks": list(results.notes),
        "config": results.config,
        "tasks": results.tasks,
        "rows": [dataclasses.asdict(row) | {"removed_percent": row.percent, "group": row.heading} for row in rows],
        "runs": runs,
    }


def _as_csv(rows: list[Row], tasks: list[str]) -> str:
    """One line a row and task; empty fields where there is no number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_COLUMNS, *_MEASURED])
    for row in rows:
        for task in tasks:
            cell = row.cells.get(task)
            score = [cell.value, cell.low, cell.high, cell.sd, cell.seeds, cell.n] if cell else [None] * 6
            tokens = [(row.asked or {}).get("mean"), (row.kept or {}).get("mean"), row.layer_averaged]
            times = [(row.prefill_ms or {}).get("median"), (row.selection_ms or {}).get("median")]
            quirks = ";".join(f"{name}={count}" for name, count in sorted(row.quirks.items()))
            head = [row.method, row.label, row.pruning_rate, row.percent, row.status, task]
            writer.writerow([*head, *score, row.relative.value, *tokens, *times, quirks])
    return out.getvalue()
