"""What the package brings: models and tasks that lmms-eval must find, a checkpoint and questions that must be as they were packed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import vlm_pruner_eval
from vlm_pruner_eval.doctor.finding import FAIL, OK, Finding
from vlm_pruner_eval.doctor.installation import REINSTALL
from vlm_pruner_eval.errors import ConfigError

# SHA-256 of the embedded files: the reference scores in results/ hold for these bytes only
PACKED = {
    "model.safetensors": "88f8bc9c2bd4adc28f117485f4225b8baee16b677ee9164084cc522fa70ff0f5",
    "test.parquet": "c9494d5379c516bb813c7bbfe9b3526196d929568c9baad37f4e1f87414e62ff",
}


def plugin() -> Iterator[Finding]:
    """Whether lmms-eval finds our models and tasks, by the entry point that pip wrote down."""
    entries = [entry for entry in metadata.entry_points(group="lmms_eval.models") if entry.name == "vlm_pruner_eval"]
    if not entries:
        yield Finding("plugin", FAIL, "lmms-eval does not see the package's entry point", REINSTALL)
        return
    from lmms_eval.models import MODEL_REGISTRY_V2

    from vlm_pruner_eval.lmms.plugin import MODELS

    missing = sorted(set(MODELS) - set(MODEL_REGISTRY_V2.list_canonical_model_ids()))
    if missing:
        entries[0].load()()  # lmms-eval only logs what this raises; here it becomes a finding
        yield Finding("plugin", FAIL, f"lmms-eval does not know {', '.join(missing)}", REINSTALL)
    else:
        yield Finding("plugin", OK, f"lmms-eval knows {len(MODELS)} model ids of {Path(vlm_pruner_eval.__file__).parent}")


def packaged_tasks() -> Iterator[Finding]:
    """Whether lmms-eval finds the tasks that come with the package."""
    import lmms_eval.models  # noqa: F401  # loads the plugins, which add the packaged tasks to every index
    from lmms_eval.tasks import TaskManager

    from vlm_pruner_eval.lmms import plugin

    names = plugin.packaged_tasks()
    missing = sorted(set(names) - set(TaskManager(verbosity="WARNING", include_defaults=False).all_tasks))
    if missing:
        yield Finding("packaged tasks", FAIL, f"lmms-eval does not know {', '.join(missing)}", REINSTALL)
    else:
        yield Finding("packaged tasks", OK, f"lmms-eval knows {len(names)}")


def embedded() -> Iterator[Finding]:
    """The checkpoint and the questions inside the package: there, as they were packed, and readable."""
    from vlm_pruner_eval.bench import minivlm_path, questions_path

    for name, locate, count in (
        ("embedded checkpoint", lambda: minivlm_path() / "model.safetensors", _tensors),
        ("embedded questions", questions_path, _rows),
    ):
        try:
            path = locate()
        except ConfigError as error:
            yield Finding(name, FAIL, str(error), REINSTALL)
            continue
        digest, expected = hashlib.sha256(path.read_bytes()).hexdigest(), PACKED[path.name]
        if digest != expected:
            found = f"{path} is not what was packed: {path.stat().st_size} bytes, SHA-256 {digest[:12]}..., expected {expected[:12]}..."
            yield Finding(name, FAIL, found, REINSTALL)
        else:
            yield Finding(name, OK, f"{count(path)}, SHA-256 {digest[:12]}...")


def _tensors(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return f"minivlm, {len(file.keys())} tensors"


def _rows(path: Path) -> str:
    import pyarrow.parquet as pq

    return f"DIGITSCENES, {pq.read_metadata(path).num_rows} rows"
