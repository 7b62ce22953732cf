"""Is the package installed as it was tested: the copy that is meant, versions, parts that must fit together."""

from __future__ import annotations

import configparser
import importlib
import json
import platform
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import vlm_pruner_eval
from vlm_pruner_eval import selftest, versions
from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding
from vlm_pruner_eval.shown import of_error
from vlm_pruner_eval.versions import DISTRIBUTION

_STATUS = {versions.OK: OK, versions.NEWER: WARN, versions.OLDER: FAIL, versions.BROKEN: FAIL, versions.ABSENT: FAIL}
_MOST_NAMES = 6
REINSTALL = "Install the package again: pip install -e . in its folder."
_BUILD = re.compile(r"cpu|cu\d+|rocm[\d.]+|xpu")  # behind the "+" of a version, and the name of a package index as well


def source() -> Iterator[Finding]:
    """Whether the folder that Python imports is the one that was installed, and was installed as it is now."""
    imported = Path(vlm_pruner_eval.__file__).resolve().parent.parent
    try:
        installed = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        found = f"{imported} is imported, but not installed: lmms-eval can't find its models, and the tested versions are not known"
        yield Finding("source", FAIL, found, REINSTALL)
        return
    home = _home(installed)
    if home is not None and home != imported:
        fix = "Leave the folder or unset PYTHONPATH, or install the copy that you want to use: pip install -e ."
        yield Finding("source", WARN, f"{imported} is imported, but {home} is installed", fix)
    elif installed.version != vlm_pruner_eval.__version__:
        yield Finding("source", WARN, f"{vlm_pruner_eval.__version__} is imported, but installed as {installed.version}", REINSTALL)
    elif changed := _changed_requirements(imported / "setup.cfg"):
        yield Finding("source", WARN, f"requirements have changed since it was installed: {', '.join(changed)}", REINSTALL)
    else:
        yield Finding("source", OK, f"{imported}, on {sys.executable}")


def _home(installed: metadata.Distribution) -> Path | None:
    """The folder that holds the installed package: its checkout, or site-packages; None if the installation does not say."""
    direct = json.loads(installed.read_text("direct_url.json") or "{}")
    if direct.get("dir_info", {}).get("editable"):
        return Path(url2pathname(urlsplit(direct["url"]).path)).resolve()
    files = [file for file in installed.files or () if file.parts[-2:] == ("vlm_pruner_eval", "__init__.py")]
    return Path(str(files[0].locate())).resolve().parent.parent if files else None


def _changed_requirements(setup: Path) -> list[str]:
    """Names whose ranges in a checkout differ from those that pip wrote down when the checkout was installed."""
    from packaging.requirements import Requirement

    if not setup.is_file():
        return []
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(setup, encoding="utf-8")
    lines = parser.get("options", "install_requires", fallback="").splitlines()
    now = {requirement for requirement in map(Requirement, filter(str.strip, lines)) if versions.applies(requirement)}
    return sorted({requirement.name for requirement in now ^ set(versions.requirements())})


def python() -> Iterator[Finding]:
    """The interpreter, against the range in the package's metadata."""
    from packaging.specifiers import SpecifierSet

    wanted, found = metadata.metadata(DISTRIBUTION)["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(found, prereleases=True):
        yield Finding("python", OK, f"{found} ({wanted})")
    else:
        yield Finding("python", FAIL, f"{found}, tested {wanted}", f"Make a virtual environment with a Python in {wanted}.")


def required() -> Iterator[Finding]:
    """Every required package: tested with, found, and what is known of the difference."""
    for version in versions.versions():
        status = _STATUS[version.verdict]
        yield Finding(version.name, status, version.facts, "" if status == OK else version.fix)


def lock() -> Iterator[Finding]:
    """All packages of the lock, required or not, where there is a lock."""
    if not versions.LOCK.is_file():
        return
    changed = [f"{name} {found or 'absent'} (locked: {wanted})" for name, (wanted, found) in versions.changed().items()]
    if not changed:
        yield Finding("lock", OK, f"{len(versions.locked())} packages as in {versions.LOCK}")
        return
    shown = ", ".join(changed[:_MOST_NAMES]) + (f" and {len(changed) - _MOST_NAMES} more" if len(changed) > _MOST_NAMES else "")
    yield Finding("lock", WARN, f"{len(changed)} of {len(versions.locked())} packages are not as locked: {shown}", versions.mend())


def self_test() -> Iterator[Finding]:
    """Late imports of lmms-eval, and a pruned answer against a slow recomputation."""
    for name, step in selftest.steps():
        try:
            yield Finding(f"self-test: {name}", OK, step())
        except Exception as error:  # whatever a release of another project breaks is what is looked for
            yield Finding(f"self-test: {name}", FAIL, selftest.failure(name, error), versions.mend())


def torch_and_torchvision() -> Iterator[Finding]:
    """Builds that do not match break when they are imported, not when they are installed."""
    name, fix, loaded = "torch and torchvision", _pair(), []
    for module in ("torch", "torchvision"):
        try:
            loaded.append(importlib.import_module(module).__version__)
        except Exception as error:  # operators that do not exist, libraries that can't be loaded: all of it is a mismatch
            beside = f" beside torch {loaded[0]}" if loaded else ""
            yield Finding(name, FAIL, f"{module} can't be imported{beside} ({of_error(error)})", fix)
            return
    builds = {version.partition("+")[2] for version in loaded}
    expected = torchvision_for(loaded[0])
    if expected and not loaded[1].startswith(f"{expected}."):
        yield Finding(name, WARN, f"{loaded[0]} and {loaded[1]}; this torch goes with torchvision {expected}", fix)
    elif len(builds) == 2 and all(_BUILD.fullmatch(build) for build in builds):
        yield Finding(name, WARN, f"{loaded[0]} and {loaded[1]} are builds for different devices", fix)
    else:
        yield Finding(name, OK, f"{loaded[0]} and {loaded[1]} fit together")


def torchvision_for(torch_version: str) -> str | None:
    """Release of torchvision that is made for a torch 2.x: their minor versions are 15 apart (0.20 for 2.5, 0.29 for 2.14)."""
    major, minor = torch_version.split(".")[:2]
    return f"0.{int(minor) + 15}" if major == "2" else None


def _pair() -> str:
    """How to get two builds that belong together, for the torch that is installed."""
    try:
        release, _, build = metadata.version("torch").partition("+")
    except metadata.PackageNotFoundError:
        release = build = ""
    fitting = torchvision_for(release) if release else None
    wanted = f"'torch=={release}' 'torchvision=={fitting}.*'" if fitting else "torch torchvision"
    index = f" --index-url https://download.pytorch.org/whl/{build}" if _BUILD.fullmatch(build) else ""
    return f"Install both from one place: pip install --force-reinstall {wanted}{index}."
