"""What a check found, and checks that can't break each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

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
    """What all checks find; one that breaks is a finding itself."""
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # what a broken package raises when it is imported can be anything; it is what the doctor looks for
            yield Finding(name, FAIL, f"{type(error).__name__}: {error}", "Mend what is named here, or make the environment anew.")
