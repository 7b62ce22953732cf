"""Versions that the package was tested with: ranges of its metadata, pins of its lock, releases known not to work."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_pruner_eval.errors import ConfigError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "vlm-pruner-eval"
LOCK = Path(__file__).resolve().parent.parent / "scripts" / "requirements.lock"

OK, OLDER, NEWER, BROKEN, ABSENT = "ok", "older than supported", "newer than tested", "known not to work", "not installed"


@dataclass(frozen=True)
class Fault:
    """Releases of a package that are known not to work, and the reason."""

    releases: str
    reason: str


FAULTS = {
    "filelock": Fault(">=4.3", "lmms-eval 0.7.3 imports filelock._api, which this release no longer has"),
    "sentencepiece": Fault(">=0.2.3", "its generated code needs protobuf 7, which other packages of lmms-eval exclude"),
}


@dataclass(frozen=True)
class Version:
    """One required package, as it is installed and as it was tested.

    Attributes
    ----------
    name
        Of the distribution.
    found
        The installed version, or None.
    wanted
        The range of the package's metadata, such as ">=4.57,<5.25".
    locked
        The version of the lock for this interpreter and platform; None if there is no lock here (an installed wheel).
    verdict
        `OK`, `OLDER`, `NEWER`, `BROKEN` or `ABSENT`.
    reason
        Of `BROKEN`: why; else empty.
    """

    name: str
    found: str | None
    wanted: str
    locked: str | None
    verdict: str
    reason: str = ""

    @property
    def facts(self) -> str:
        """Versions in words, such as "tested with 5.24.0 (>=4.57,<5.25), found 5.30.0: newer than tested"."""
        tested = self.wanted if self.locked is None else f"{self.locked} ({self.wanted})"
        verdict = f"{self.verdict}, as {self.reason}" if self.reason else self.verdict
        return f"tested with {tested}, found {self.found or 'nothing'}: {verdict}"

    @property
    def fix(self) -> str:
        """Command that installs a tested version."""
        wanted = self.wanted if self.locked is None else f"=={self.locked}"
        return f"Install a tested version: pip install '{self.name}{wanted}'."

    def __str__(self) -> str:
        return f"{self.name}: {self.facts}"


def requirements() -> list[Requirement]:
    """Return what the installed package requires on this interpreter and platform, extras left out."""
    from packaging.requirements import Requirement

    return [requirement for requirement in map(Requirement, metadata.requires(DISTRIBUTION) or ()) if applies(requirement)]


def applies(requirement: Requirement) -> bool:
    """Return True for a requirement that holds on this interpreter and platform without an extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def tested_range(name: str) -> str:
    """Return the range of a required package, such as ">=4.57,<5.25"; words where the metadata are not there."""
    try:
        found = [requirement for requirement in requirements() if requirement.name == name]
    except metadata.PackageNotFoundError:
        found = []
    return shown(found[0]) if found else "(unknown: the package is not installed)"


def shown(requirement: Requirement) -> str:
    """Return a requirement's range, the lower bound first."""
    return ",".join(sorted(map(str, requirement.specifier), key=lambda clause: not clause.startswith(">"))) or "any"


@functools.cache
def locked() -> dict[str, str]:
    """Return the versions of the lock by name, for this interpreter and platform; empty where there is no lock."""
    from packaging.requirements import Requirement

    if not LOCK.is_file():
        return {}
    lines = [line.partition("#")[0].strip() for line in LOCK.read_text(encoding="utf-8").splitlines()]
    pins = [pin for pin in map(Requirement, filter(None, lines)) if applies(pin)]
    return {pin.name.lower(): str(pin.specifier).removeprefix("==") for pin in pins}


def versions() -> list[Version]:
    """Return every required package, judged.

    Raises
    ------
    PackageNotFoundError
        The package itself is not installed, so that its ranges are not known.
    """
    return [judge(requirement) for requirement in requirements()]


def not_as_tested() -> list[str]:
    """Return words for every required package that is not as tested; none if the ranges are not known."""
    try:
        return [str(version) for version in versions() if version.verdict != OK]
    except metadata.PackageNotFoundError:
        return []


def changed() -> dict[str, tuple[str, str | None]]:
    """Return packages that differ from the lock, required or not: name -> (locked, found or None)."""
    found = {name: _installed(name) for name in locked()}
    return {name: (wanted, found[name]) for name, wanted in locked().items() if found[name] != wanted}


_warned: set[str] = set()


def check(warn: Callable[[str], None]) -> None:
    """Refuse packages that are absent or known not to work, and say once in a process which ones were not tested.

    Raises
    ------
    ConfigError
        A sentence for each, with what to do.
    """
    try:
        found = versions()
    except metadata.PackageNotFoundError:  # run from a folder: nothing is known of the ranges
        return
    if bad := [version for version in found if version.verdict in (ABSENT, BROKEN)]:
        raise ConfigError([f"{version}. {version.fix}" for version in bad])
    if strange := [str(version) for version in found if version.verdict != OK]:
        text = f"Not as tested: {'; '.join(strange)}. Results may differ; the self-test decides if it works at all."
        if text not in _warned:
            _warned.add(text)
            warn(text)


def mend() -> str:
    """Return what to do about an environment that is not as it was tested."""
    if LOCK.is_file():
        return (
            "To install the tested versions: delete .venv and call bash scripts/quickstart.sh, or pip install -r scripts/requirements.lock."
        )
    return "To install tested versions: pip install vlm-pruner-eval into a new environment."


def judge(requirement: Requirement) -> Version:
    """Hold one required package as it is installed against what was tested."""
    from packaging.version import Version as Release

    pin = locked().get(requirement.name.lower())
    is_within = pin is not None and requirement.specifier.contains(pin, prereleases=True)
    facts = {"name": requirement.name, "wanted": shown(requirement), "locked": pin if is_within else None}
    found = _installed(requirement.name)
    if found is None:
        return Version(**facts, found=None, verdict=ABSENT)
    fault = FAULTS.get(requirement.name)
    if fault is not None and _within(fault.releases, found):
        return Version(**facts, found=found, verdict=BROKEN, reason=fault.reason)
    if requirement.specifier.contains(found, prereleases=True):
        return Version(**facts, found=found, verdict=OK)
    floors = [Release(clause.version) for clause in requirement.specifier if clause.operator in (">=", ">", "==", "~=")]
    is_older = any(Release(found) < floor for floor in floors)
    return Version(**facts, found=found, verdict=OLDER if is_older else NEWER)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _within(releases: str, found: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(releases).contains(found, prereleases=True)
