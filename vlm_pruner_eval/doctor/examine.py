"""All checks in their order, and the command."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from vlm_pruner_eval.doctor import devices, installation, registration, surroundings
from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Check, Finding, broken, findings
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.stdout import Stdout

if TYPE_CHECKING:
    from vlm_pruner_eval.sweep.config import SweepConfig

_COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}
_OUTPUT = Path("output")


def run(config: Path | None, output: Path | None, out: Stdout) -> bool:
    """The command `vlm-pruner-eval doctor`.

    Parameters
    ----------
    config
        A sweep file, to look at its checkpoint, tasks and data sets as well.
    output
        The results directory; None for the one that `sweep` would take.
    out
        Takes the findings.

    Returns
    -------
    bool
        Whether nothing failed.

    Raises
    ------
    ConfigError
        The sweep file is no sweep file.
    """
    before = list(findings([("messages of libraries", _quieten)]))
    loaded, problems = (None, []) if config is None else _read(config)
    folder = output or (_OUTPUT if loaded is None else Path(loaded.output or _OUTPUT / loaded.name))
    found = _show(out, [*before, *problems], examine(loaded, folder))
    counts = {status: sum(finding.status == status for finding in found) for status in (OK, WARN, FAIL)}
    out.line(f"{counts[OK]} ok, {counts[WARN]} to be aware of, {counts[FAIL]} to mend")
    out.add({**counts, "findings": [finding.as_json() for finding in found]})
    return not counts[FAIL]


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
        ("source", installation.source),
        ("python", installation.python),
        ("versions", installation.required),
        ("lock", installation.lock),
        ("torch and torchvision", installation.torch_and_torchvision),
        ("plugin", registration.plugin),
        ("packaged tasks", registration.packaged_tasks),
        ("self-test", installation.self_test),
        ("embedded benchmark", registration.embedded),
        ("GPU", devices.devices),
        ("attention", devices.attention),
        ("hub", surroundings.hub),
        ("caches", surroundings.caches),
        ("results", functools.partial(surroundings.output, output)),
    ]
    if config is not None:
        from vlm_pruner_eval.doctor import data_sets, sweep_file

        checks += [
            ("model id", functools.partial(sweep_file.model_id, config)),
            ("device", functools.partial(sweep_file.device, config)),
            ("checkpoint", functools.partial(sweep_file.checkpoint, config)),
            ("tasks", functools.partial(data_sets.tasks, config)),
        ]
    return findings(checks)


def _quieten() -> Iterator[Finding]:
    """Nothing is looked for; but what quietens lmms-eval needs a package of it, which may be what is broken."""
    from vlm_pruner_eval.sweep.progress import quieten

    quieten()  # first: progress bars read the environment when their library is imported
    yield from ()


def _read(path: Path) -> tuple[SweepConfig | None, list[Finding]]:
    """The sweep file; a file with problems is the user's to mend before, one that can't be read for lack of a package is a finding."""
    try:
        from vlm_pruner_eval.sweep import config as sweep_config
        from vlm_pruner_eval.sweep.grid import method_problems

        return sweep_config.load(path, check=method_problems), []
    except ConfigError:
        raise
    except Exception as error:  # as in `findings`: a broken package is what the doctor looks for
        return None, [broken("sweep file", error)]


def _show(out: Stdout, before: list[Finding], found: Iterable[Finding]) -> list[Finding]:
    """A table at the end on a terminal, elsewhere each line as soon as it is known."""
    console = out.console()
    if console.is_terminal and not console.quiet:
        with console.status("looking around, which takes some seconds"):
            everything = [*before, *found]
        console.print(_table(everything))
        return everything
    everything = []
    for finding in itertools.chain(before, found):
        everything.append(finding)
        out.line(f"{finding.status:5s} {finding.name}: {finding.found}")
        if finding.fix:
            out.line(f"      {finding.fix}")
    return everything


def _table(found: list[Finding]) -> Table:
    table = Table("", "what", "found", box=None, pad_edge=False)
    for finding in found:
        text = escape(finding.found) + (f"\n[bold]{escape(finding.fix)}[/bold]" if finding.fix else "")
        table.add_row(f"[{_COLOURS[finding.status]}]{finding.status}[/]", escape(finding.name), text)
    return table
