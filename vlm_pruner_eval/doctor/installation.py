"""Is the package installed as it was tested: versions, parts that must fit together, the plugin, what is embedded."""

from __future__ import annotations

import hashlib
import importlib
import json
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.markers import UndefinedEnvironmentName
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import vlm_pruner_eval
from vlm_pruner_eval.doctor.finding import FAIL, OK, WARN, Finding

DISTRIBUTION = "vlm-pruner-eval"
REINSTALL = "Install the package again: pip install -e . in its folder."


def python() -> Iterator[Finding]:
    """The interpreter, against the range in the package's metadata."""
    wanted, found = metadata.metadata(DISTRIBUTION)["Requires-Python"], platform.python_version()
    if SpecifierSet(wanted).contains(found, prereleases=True):
        yield Finding("python", OK, f"{found} ({wanted})")
    else:
        yield Finding("python", FAIL, f"{found}, tested {wanted}", f"Make a virtual environment with a Python in {wanted}.")


def versions() -> Iterator[Finding]:
    """Every required package, against the range that the package was tested with, as its metadata say."""
    for requirement in map(Requirement, metadata.requires(DISTRIBUTION) or ()):
        if not _applies(requirement):
            continue
        name, wanted = requirement.name, str(requirement.specifier) or "any"
        fix = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, FAIL, f"not installed, tested {wanted}", f"Install it: {fix}.")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Finding(name, OK, f"{found} ({wanted})")
        else:
            yield Finding(name, FAIL, f"{found}, tested {wanted}", f"Install a tested version: {fix}.")


def _applies(requirement: Requirement) -> bool:
    """Whether a requirement is one of the package itself, here."""
    try:
        return requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    except UndefinedEnvironmentName:
        return False


def torch_and_torchvision() -> Iterator[Finding]:
    """Builds that do not match break when they are imported, not when they are installed."""
    import torch

    try:
        torchvision = importlib.import_module("torchvision")
    except Exception as error:  # operators that do not exist, libraries that can't be loaded: all of it is a mismatch
        fix = "Install both from one place: pip install --force-reinstall torch torchvision."
        yield Finding("torchvision", FAIL, f"can't be imported beside torch {torch.__version__} ({error})", fix)
        return
    yield Finding("torch and torchvision", OK, f"{torch.__version__} and {torchvision.__version__} fit together")


def plugin() -> Iterator[Finding]:
    """Whether lmms-eval finds our models and tasks, and whether it is this very package that it finds."""
    from lmms_eval.models import get_model_manifest

    from vlm_pruner_eval.lmms.plugin import MODELS

    known = {entry.name for entry in metadata.entry_points(group="lmms_eval.models")}
    if "vlm_pruner_eval" not in known:
        yield Finding("plugin", FAIL, "lmms-eval does not see the package's entry point", REINSTALL)
        return
    missing = [model_id for model_id in MODELS if not _is_known(get_model_manifest, model_id)]
    if missing:
        yield Finding("plugin", FAIL, f"lmms-eval does not know {', '.join(missing)}", REINSTALL)
    else:
        yield Finding("plugin", OK, f"lmms-eval knows {len(MODELS)} model ids of {Path(vlm_pruner_eval.__file__).parent}")


def _is_known(get_model_manifest: object, model_id: str) -> bool:
    try:
        get_model_manifest(model_id)
    except ValueError:
        return False
    return True


def embedded() -> Iterator[Finding]:
    """The checkpoint and the questions inside the package: there, and as they were packed."""
    from vlm_pruner_eval.bench import minivlm_path, questions_path

    weights = minivlm_path() / "model.safetensors"
    with weights.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    end = 8 + size + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    if end != weights.stat().st_size:
        yield Finding("embedded checkpoint", FAIL, f"{weights} holds {weights.stat().st_size} bytes, its header says {end}", REINSTALL)
    else:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
        yield Finding("embedded checkpoint", OK, f"minivlm, {len(header)} tensors, SHA-256 {digest}...")
    import pyarrow.parquet as pq

    yield Finding("embedded questions", OK, f"DIGITSCENES, {pq.read_metadata(questions_path()).num_rows} rows")


def source() -> Iterator[Finding]:
    """Whether the folder that Python imports is the one that was installed."""
    imported = Path(vlm_pruner_eval.__file__).resolve().parent.parent
    files = [Path(str(file.locate())).resolve() for file in metadata.files(DISTRIBUTION) or () if file.name == "__init__.py"]
    if files and all(imported not in file.parents for file in files):
        fix = "Leave the folder or unset PYTHONPATH, or install the copy that you want to use: pip install -e ."
        yield Finding("source", WARN, f"{imported} is imported, but {files[0].parents[1]} is installed", fix)
    else:
        yield Finding("source", OK, f"{imported}, on {sys.executable}")
