"""Installation of the package: the copy that is meant, tested versions, and everything that it brings along."""

from __future__ import annotations

import hashlib
import importlib
import json
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
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.redact import of_error
from vlm_pruner_eval.versions import DISTRIBUTION

_STATUS = {versions.OK: OK, versions.NEWER: WARN}
_MOST_NAMES = 6
_BUILD = re.compile(r"cpu|cu\d+|rocm[\d.]+|xpu")  # behind the "+" of a version
REINSTALL = "Install the package again: pip install -e . in its folder."
# SHA-256 of the embedded files: the reference scores in results/ hold for these bytes only
PACKED = {
    "model.safetensors": "88f8bc9c2bd4adc28f117485f4225b8baee16b677ee9164084cc522fa70ff0f5",
    "test.parquet": "c9494d5379c516bb813c7bbfe9b3526196d929568c9baad37f4e1f87414e62ff",
}


def source() -> Iterator[Finding]:
    """Compare the folder that Python imports with the one that was installed."""
    imported = Path(vlm_pruner_eval.__file__).resolve().parent.parent
    try:
        installed = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        found = f"{imported} is imported, but not installed: lmms-eval can't find it, tested versions are not known"
        yield Finding("source", FAIL, found, REINSTALL)
        return
    home = _home(installed)
    if home is not None and home != imported:
        fix = "Leave the folder or unset PYTHONPATH, or install the copy that you want to use: pip install -e ."
        yield Finding("source", WARN, f"{imported} is imported, but {home} is installed", fix)
    elif installed.version != vlm_pruner_eval.__version__:
        found = f"{vlm_pruner_eval.__version__} is imported, but installed as {installed.version}"
        yield Finding("source", WARN, found, REINSTALL)
    else:
        yield Finding("source", OK, f"{imported}, on {sys.executable}")


def _home(installed: metadata.Distribution) -> Path | None:
    """Folder that holds the installed package, a checkout or site-packages; None if the installation does not say."""
    direct = json.loads(installed.read_text("direct_url.json") or "{}")
    if direct.get("dir_info", {}).get("editable"):
        return Path(url2pathname(urlsplit(direct["url"]).path)).resolve()
    files = [file for file in installed.files or () if file.parts[-2:] == ("vlm_pruner_eval", "__init__.py")]
    return Path(str(files[0].locate())).resolve().parent.parent if files else None


def required() -> Iterator[Finding]:
    """Yield every required package: the tested version, the installed one, and their difference."""
    for version in versions.versions():
        status = _STATUS.get(version.verdict, FAIL)
        yield Finding(version.name, status, version.facts, "" if status == OK else version.fix)


def lock() -> Iterator[Finding]:
    """Compare all packages of the lock, required or not, if there is a lock."""
    if not versions.LOCK.is_file():
        return
    n_locked = len(versions.locked())
    changed = [f"{name} {found or 'absent'} (locked: {pin})" for name, (pin, found) in versions.changed().items()]
    if not changed:
        yield Finding("lock", OK, f"{n_locked} packages as in {versions.LOCK}")
        return
    names = ", ".join(changed[:_MOST_NAMES]) + (", and more" if len(changed) > _MOST_NAMES else "")
    found = f"{len(changed)} of {n_locked} packages are not as locked: {names}"
    yield Finding("lock", WARN, found, versions.mend())


def self_test() -> Iterator[Finding]:
    """Run the self-test: late imports of lmms-eval, and a pruned answer against a slow recomputation."""
    for name, step in selftest.STEPS.items():
        try:
            yield Finding(f"self-test: {name}", OK, step())
        except Exception as error:  # releases of other projects break anything
            yield Finding(f"self-test: {name}", FAIL, selftest.failure(name, error), versions.mend())


def torch_and_torchvision() -> Iterator[Finding]:
    """Import both: builds that do not match break then, not when they are installed."""
    name = "torch and torchvision"
    fix = "Install both anew from one place, as pytorch.org/get-started says for this system."
    loaded: list[str] = []
    for module in ("torch", "torchvision"):
        try:
            loaded.append(importlib.import_module(module).__version__)
        except Exception as error:  # operators that do not exist, libraries that can't be loaded
            beside = f" beside torch {loaded[0]}" if loaded else ""
            yield Finding(name, FAIL, f"{module} can't be imported{beside} ({of_error(error)})", fix)
            return
    builds = {version.partition("+")[2] for version in loaded}
    if len(builds) > 1 and all(map(_BUILD.fullmatch, builds)):
        yield Finding(name, WARN, f"{loaded[0]} and {loaded[1]} are builds for different devices", fix)
    else:
        yield Finding(name, OK, f"{loaded[0]} and {loaded[1]} fit together")


# ---- what the package brings
def plugin() -> Iterator[Finding]:
    """Look for our models in lmms-eval, which finds them by the entry point that pip wrote down."""
    entries = [entry for entry in metadata.entry_points(group="lmms_eval.models") if entry.name == "vlm_pruner_eval"]
    if not entries:
        yield Finding("plugin", FAIL, "lmms-eval does not see the package's entry point", REINSTALL)
        return
    from lmms_eval.models import MODEL_REGISTRY_V2

    from vlm_pruner_eval.lmms.plugin import MODELS

    missing = set(MODELS) - set(MODEL_REGISTRY_V2.list_canonical_model_ids())
    if missing:
        entries[0].load()()  # lmms-eval only logs what this raises; here it becomes a finding
    yield _known("plugin", f"{len(MODELS)} model ids of {Path(vlm_pruner_eval.__file__).parent}", missing)


def packaged_tasks() -> Iterator[Finding]:
    """Look for the tasks that come with the package."""
    import lmms_eval.models  # noqa: F401  # loads the plugins, which add the packaged tasks to every index
    from lmms_eval.tasks import TaskManager

    from vlm_pruner_eval.lmms.plugin import packaged_tasks

    names = packaged_tasks()
    missing = set(names) - set(TaskManager(verbosity="WARNING", include_defaults=False).all_tasks)
    yield _known("packaged tasks", str(len(names)), missing)


def _known(name: str, found: str, missing: set[str]) -> Finding:
    if missing:
        return Finding(name, FAIL, f"lmms-eval does not know {', '.join(sorted(missing))}", REINSTALL)
    return Finding(name, OK, f"lmms-eval knows {found}")


def embedded() -> Iterator[Finding]:
    """Check that the embedded checkpoint and questions are there as they were packed."""
    from vlm_pruner_eval import embedded

    locations = {
        "embedded checkpoint": lambda: embedded.minivlm_path() / "model.safetensors",
        "embedded questions": embedded.questions_path,
    }
    for name, locate in locations.items():
        try:
            path = locate()
        except ConfigError as error:
            yield Finding(name, FAIL, str(error), REINSTALL)
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest == PACKED[path.name]:
            yield Finding(name, OK, f"{path}, SHA-256 {digest[:12]}...")
        else:
            digests = f"SHA-256 {digest[:12]}..., expected {PACKED[path.name][:12]}..."
            found = f"{path} is not what was packed: {path.stat().st_size} bytes, {digests}"
            yield Finding(name, FAIL, found, REINSTALL)
