"""What a check found, and checks that can't break each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from vlm_pruner_eval.shown import of_error, sentence

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's list.

    Attributes
    ----------
    name
        What was looked at.
    status
        "ok"; "warn" for what some sweeps can do without; "fail" for what stops them.
    found
        What is there.
    fix
        What to do, a sentence; empty where all is well.
    """

    name: str
    status: str
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        if (self.status == OK) == bool(self.fix):
            raise ValueError(f"{self.name}: got status {self.status!r} and fix {self.fix!r}, expected a fix exactly where not all is well.")

    def as_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


Check = Callable[[], Iterable[Finding]]


def findings(checks: Iterable[tuple[str, Check]]) -> Iterator[Finding]:
    """What all checks find, fit to be shown; one that breaks is a finding itself."""
    for name, check in checks:
        try:
            for finding in check():
                yield _presentable(finding)
        except Exception as error:  # what a broken package raises when it is imported can be anything; it is what the doctor looks for
            yield broken(name, error)


def broken(name: str, error: Exception) -> Finding:
    """A check that could not be made."""
    return _presentable(Finding(name, FAIL, of_error(error), "Mend what is named here, or make the environment anew."))


def _presentable(finding: Finding) -> Finding:
    """On one line each, without tokens: messages of libraries and paths are not ours."""
    return Finding(sentence(finding.name), finding.status, sentence(finding.found), sentence(finding.fix))
