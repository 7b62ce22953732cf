"""All checks in their order, and their list on a terminal."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlm_pruner_eval.doctor import installation, surroundings, sweep_file
from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Check, Finding, findings
from vlm_pruner_eval.sweep.config import SweepConfig

_COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}


def examine(config: SweepConfig | None, output: Path) -> Iterator[Finding]:
    """Everything that is found; nothing is downloaded, and no model is loaded.

    Parameters
    ----------
    config
        A sweep file, to look at its checkpoint, tasks and data sets as well.
    output
        The results directory.
    """
    checks: list[tuple[str, Check]] = [
        ("python", installation.python),
        ("versions", installation.versions),
        ("torch and torchvision", installation.torch_and_torchvision),
        ("plugin", installation.plugin),
        ("source", installation.source),
        ("embedded benchmark", installation.embedded),
        ("GPU", surroundings.devices),
        ("attention", surroundings.attention),
        ("hub", surroundings.hub),
        ("caches", surroundings.caches),
        ("results", functools.partial(surroundings.output, output)),
    ]
    if config is not None:
        checks += [
            ("model id", functools.partial(sweep_file.model_id, config)),
            ("checkpoint", functools.partial(sweep_file.checkpoint, config)),
            ("tasks", functools.partial(sweep_file.tasks, config)),
        ]
    return findings(checks)


def print_findings(console: Console, found: list[Finding]) -> None:
    """A line each, and behind it what to do."""
    table = Table("", "what", "found", box=None, pad_edge=False)
    for finding in found:
        text = escape(finding.found) + (f"\n[bold]{escape(finding.fix)}[/bold]" if finding.fix else "")
        table.add_row(f"[{_COLOURS[finding.status]}]{finding.status}[/]", escape(finding.name), text)
    console.print(table)
