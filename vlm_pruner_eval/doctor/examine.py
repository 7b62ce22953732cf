"""All checks in their order, and the command."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from vlm_pruner_eval.doctor import installation, surroundings
from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Check, Finding, broken, findings
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.stdout import Stdout

if TYPE_CHECKING:
    from vlm_pruner_eval.sweep.config import SweepConfig

_COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}
_OUTPUT = Path("output")


def run(config: Path | None, output: Path | None, out: Stdout) -> bool:
    """Run `vlm-pruner-eval doctor`; each finding is printed as soon as it is known.

    Parameters
    ----------
    config
        A sweep file, to look at its checkpoint, tasks and data sets as well.
    output
        The results directory; None for the one that `sweep` would take.

    Returns
    -------
    bool
        True if nothing failed.

    Raises
    ------
    ConfigError
        The sweep file is no sweep file.
    """
    # messages of lmms-eval are quietened first, by code that needs a package which may be broken
    before = list(findings([("messages of libraries", _quieten)]))
    loaded, problems = (None, []) if config is None else _read(config)
    folder = output or (_OUTPUT if loaded is None else Path(loaded.output or _OUTPUT / loaded.name))
    found = []
    console = out.console()
    for finding in itertools.chain(before, problems, examine(loaded, folder)):
        found.append(finding)
        status = f"[{_COLOURS[finding.status]}]{finding.status:5s}[/]"
        fix = f"\n      {finding.fix}" if finding.fix else ""
        console.print(f"{status} {escape(f'{finding.name}: {finding.found}{fix}')}", soft_wrap=True, highlight=False)
    counts = {status: sum(finding.status == status for finding in found) for status in (OK, WARN, FAIL)}
    out.line(f"{counts[OK]} ok, {counts[WARN]} to be aware of, {counts[FAIL]} to mend")
    out.add({**counts, "findings": [asdict(finding) for finding in found]})
    return not counts[FAIL]


def examine(config: SweepConfig | None, output: Path) -> Iterator[Finding]:
    """Yield everything that is found; nothing is downloaded, and no model is loaded."""
    checks: list[tuple[str, Check]] = [
        ("source", installation.source),
        ("versions", installation.required),
        ("lock", installation.lock),
        ("torch and torchvision", installation.torch_and_torchvision),
        ("plugin", installation.plugin),
        ("packaged tasks", installation.packaged_tasks),
        ("self-test", installation.self_test),
        ("embedded benchmark", installation.embedded),
        ("GPU", surroundings.devices),
        ("hub", surroundings.hub),
        ("caches", surroundings.caches),
        ("results", partial(surroundings.output, output)),
    ]
    if config is not None:
        from vlm_pruner_eval.doctor import data_sets, sweep_file

        checks += [
            ("model id", partial(sweep_file.model_id, config)),
            ("device", partial(sweep_file.device, config)),
            ("checkpoint", partial(sweep_file.checkpoint, config)),
            ("tasks", partial(data_sets.tasks, config)),
        ]
    return findings(checks)


def _quieten() -> Iterator[Finding]:
    from vlm_pruner_eval.sweep.progress import quieten

    quieten()  # progress bars read the environment when their library is imported
    yield from ()


def _read(path: Path) -> tuple[SweepConfig | None, list[Finding]]:
    """Read the sweep file; a package that is missing for it is a finding, a problem of the file is the user's."""
    try:
        from vlm_pruner_eval.sweep import config as sweep_config
        from vlm_pruner_eval.sweep.grid import method_problems

        return sweep_config.load(path, check=method_problems), []
    except ConfigError:
        raise
    except Exception as error:  # as in `findings`
        return None, [broken("sweep file", error)]
