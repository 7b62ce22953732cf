"""The report of a results directory as a command's output: tables, and the files that hold it."""

from __future__ import annotations

from pathlib import Path

from vlm_pruner_eval.report.current import current_report
from vlm_pruner_eval.stdout import Stdout


def write_and_print(directory: Path, out: Stdout) -> dict[str, Path]:
    """Write the report, print its tables and where it is, and return its files, see `build.write`."""
    from vlm_pruner_eval.report.build import write
    from vlm_pruner_eval.report.contents import report_of
    from vlm_pruner_eval.report.load import load_sweep
    from vlm_pruner_eval.report.writers.screen import WIDTH, print_paper, print_tables

    made = report_of(load_sweep(directory))
    paths = write(made)
    console = out.console(WIDTH)
    print_tables(console, made.results, made.rows)
    print_paper(console, made.paper)
    for kind, path in paths.items():
        out.line(f"{kind.rpartition('.')[2]:7s}{path}")
    return paths


def print_finished(directory: Path, out: Stdout) -> dict[str, Path]:
    """Print the scores of a finished sweep and where its report is, which is written only if something is newer than it."""
    from vlm_pruner_eval.sweep.status import print_status, read_status

    path = current_report(directory)
    if path is None:
        return write_and_print(directory, out)
    print_status(out.console(), read_status(directory))
    out.line(f"md     {path}")
    return {"md": path}
