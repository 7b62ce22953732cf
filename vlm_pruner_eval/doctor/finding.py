"""Findings of the doctor, and checks that can't break each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from vlm_pruner_eval.redact import of_error, sentence

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's list.

    Attributes
    ----------
    name
        Subject of the check.
    status
        "ok"; "warn" for what some sweeps can do without; "fail" for what stops them.
    found
        Facts.
    fix
        Remedy, a sentence; empty if all is well, and only then.
    """

    name: str
    status: str
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        if (self.status == OK) == bool(self.fix):
            got = f"status {self.status!r} and fix {self.fix!r}"
            raise ValueError(f"{self.name}: got {got}, expected a fix unless all is well.")


Check = Callable[[], Iterable[Finding]]


def findings(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """Yield the findings of all checks, fit to be shown; a check that raises is a finding itself."""
    for name, check in checks:
        try:
            yield from map(_presentable, check())
        except Exception as error:  # a broken package can raise anything when it is imported; the doctor looks for it
            yield broken(name, error)


def broken(name: str, error: Exception) -> Finding:
    """Return the finding for a check that could not be made."""
    return _presentable(Finding(name, FAIL, of_error(error), "Mend what is named here, or make the environment anew."))


def _presentable(finding: Finding) -> Finding:
    """On one line each, without tokens: messages of libraries and paths are not ours."""
    return Finding(sentence(finding.name), finding.status, sentence(finding.found), sentence(finding.fix))
