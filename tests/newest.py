"""Tries releases that are newer than the locked ones, package by package and all at once, and prints what they would break.

Every required package whose newest release is not the locked one is raised alone, above the cap of setup.cfg too, in an environment of
its own (.venv-newest), and has to pass the doctor's self-test and the regression sweep; transformers and torch also the tests of the
hook. Exit code 1 if one does not pass, or if all of them together do not.

Usage: bash scripts/test.sh --newest [--only NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table

from vlm_pruner_eval.versions import LOCK, applies, locked

ROOT = Path(__file__).resolve().parent.parent
UV = str(Path(sys.prefix) / "bin" / "uv")
PLACE = ROOT / ".venv-newest"
PYTHON = str(PLACE / "bin" / "python")
HOOK_TESTS = ("tests/test_hook_exact.py", "tests/test_hook_batches.py", "tests/test_hook_caches.py", "tests/test_hook_refusals.py")
WITH_HOOK_TESTS = ("transformers", "torch")
ALL = "all at once"
_ESSENTIAL = ("torch and torchvision", "plugin", "packaged tasks", "self-test", "embedded")
_QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Failed(Exception):
    """A command that ended with another exit code than 0, with its last line."""


@dataclass
class Row:
    """One line of the table: `passes` is "yes", or why not."""

    package: str
    locked: str
    newest: str
    within_cap: bool
    passes: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Survey, try, print."""
    parser = argparse.ArgumentParser(description="What newer releases than the locked ones would break.")
    parser.add_argument("--only", nargs="*", help="try these packages alone, and not all at once")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    asked = parser.parse_args(arguments)
    run([UV, "venv", "--quiet", "--clear", "--python", sys.executable, str(PLACE)])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row, files in candidates(Path(folder), asked.only):
            print(f"{row.package}: {row.locked} -> {row.newest}", file=sys.stderr, flush=True)
            row.passes = attempt(files, Path(folder), with_hook_tests=row.package in (*WITH_HOOK_TESTS, ALL))
            print(f"{row.package}: {row.passes}", file=sys.stderr, flush=True)
            rows.append(row)
    show(rows)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return int(any(row.passes != "yes" for row in rows))


# ---- what there is
def requirements() -> list[Requirement]:
    """Everything that setup.cfg asks for on this interpreter, tests included."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    text = parser["options"]["install_requires"] + parser["options.extras_require"]["test"]
    lines = [line.strip() for line in text.splitlines()]
    return [one for one in map(Requirement, filter(None, lines)) if applies(one)]


def uncapped(requirement: Requirement) -> Requirement:
    """The same without an upper bound."""
    found = Requirement(str(requirement))
    found.specifier = SpecifierSet(",".join(str(clause) for clause in requirement.specifier if not clause.operator.startswith("<")))
    return found


def candidates(folder: Path, only: Sequence[str] | None) -> Iterator[tuple[Row, Path | str]]:
    """Rows to be filled, each with the file of its pins, or a sentence where there can be none."""
    wanted = requirements()
    everything = pins_of(resolve(folder, [uncapped(one) for one in wanted], "--upgrade"))
    changed = [one for one in wanted if everything[one.name.lower()] != locked()[one.name.lower()]]
    for one in changed if only is None else [one for one in wanted if one.name in only]:
        newest = everything[one.name.lower()]
        row = Row(one.name, locked()[one.name.lower()], newest, one.specifier.contains(newest, prereleases=True), "")
        try:
            yield row, resolve(folder, [uncapped(other) if other is one else other for other in wanted], "--upgrade-package", one.name)
        except Failed as error:
            yield row, f"no: the other ranges exclude it ({error})"
    if only is None and len(changed) > 1:
        yield Row(ALL, "", f"{len(changed)} packages", False, ""), resolve(folder, [uncapped(one) for one in wanted], "--upgrade")


def resolve(folder: Path, wanted: Sequence[Requirement], *options: str) -> Path:
    """A file of pins; what the options do not raise stays as locked where it can."""
    asked = folder / "asked.in"
    asked.write_text("\n".join(map(str, wanted)) + "\n")
    pins = folder / "pins.txt"
    pins.write_text(LOCK.read_text(encoding="utf-8"))
    run([UV, "pip", "compile", "--quiet", "--python", sys.executable, "--output-file", str(pins), *options, str(asked)])
    return pins


def pins_of(file: Path) -> dict[str, str]:
    """Name -> version."""
    lines = [line.partition("#")[0].partition(";")[0].strip() for line in file.read_text().splitlines()]
    return dict(line.lower().split("==") for line in lines if line)


# ---- trying
def attempt(pins: Path | str, folder: Path, *, with_hook_tests: bool) -> str:
    """ "yes", or "no" with the reason."""
    if isinstance(pins, str):
        return pins
    try:
        run([UV, "pip", "sync", "--quiet", "--python", PYTHON, str(pins)])
        run([UV, "pip", "install", "--quiet", "--python", PYTHON, "--no-deps", "--editable", str(ROOT)])
        examine()
        output = tempfile.mkdtemp(dir=folder)
        run([PYTHON, "-m", "vlm_pruner_eval", "sweep", "configs/ci.yaml", "--output", output])
        run([PYTHON, "-m", "vlm_pruner_eval", "report", output, "--check", "results/reference/ci.json"])
        if with_hook_tests:
            run([PYTHON, "-m", "pytest", "-q", "-x", "-n", "2", "--dist", "loadfile", *HOOK_TESTS])
    except Failed as error:
        return f"no: {error}"
    return "yes"


def examine() -> None:
    """The doctor, of whose findings only some are about packages."""
    text = subprocess.run(
        [PYTHON, "-m", "vlm_pruner_eval", "doctor", "--json"], check=False, capture_output=True, text=True, env=os.environ | _QUIET
    ).stdout
    findings = json.loads(text)["findings"] if text else []
    bad = [finding for finding in findings if finding["status"] == "fail" and finding["name"].startswith(_ESSENTIAL)]
    if bad or not findings:
        raise Failed(f"doctor: {bad[0]['name']}: {bad[0]['found']}" if bad else "the doctor itself can't run")


def run(command: Sequence[str]) -> None:
    """A command in the repository's root."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | _QUIET)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise Failed(said[-1].strip() if said else f"{command[0]} ended with exit code {done.returncode}")


def show(rows: Sequence[Row]) -> None:
    """The table."""
    table = Table("package", "locked", "newest", "cap", "passes", box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row.package, row.locked, row.newest, "" if row.package == ALL else "within" if row.within_cap else "beyond", row.passes
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table if rows else "Nothing is newer than what is locked.")


if __name__ == "__main__":
    sys.exit(main())
