"""Where a number comes from: versions, machine, checkpoint files, commit, command, times."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import vlm_pruner_eval
from vlm_pruner_eval.redact import without_secrets
from vlm_pruner_eval.store.schema import plain
from vlm_pruner_eval.store.summaries import Provenance
from vlm_pruner_eval.sweep import machine
from vlm_pruner_eval.sweep.checksums import sha256

_PACKAGES = {
    "lmms_eval": "lmms-eval",
    "torch": "torch",
    "transformers": "transformers",
    "numpy": "numpy",
    "datasets": "datasets",
    "pillow": "Pillow",
}


def collect(
    describe: Mapping[str, Any], checkpoint: Mapping[str, Any], started: float | None = None, command: str | None = None
) -> Provenance:
    """Everything about the surroundings of a unit.

    Parameters
    ----------
    describe
        ``PrunedModel.describe()``: device, dtype, attention backend, revision, threads.
    checkpoint
        ``checkpoint_files(...)`` of the loaded model.
    started
        When this process began the unit, in seconds since 1970; one that was resumed began earlier.
    command
        What was typed, if not the command of this process.
    """
    import torch

    device = str(describe.get("device", "cpu"))
    return Provenance(
        versions=_versions(),
        platform=platform.platform(),
        processor=processor(device),
        host=machine.host(),
        gpus=machine.gpus(device),
        cuda=machine.cuda(),
        threads=torch.get_num_threads(),
        model=plain(dict(describe)),
        checkpoint=dict(checkpoint),
        git_commit=git_commit(Path(vlm_pruner_eval.__file__).parent.parent),
        command=command or command_line(),
        started=None if started is None else _utc(started),
        time=_utc(time.time()),
    )


def command_line() -> str:
    """The command that was typed, without the access tokens in it: records and reports are shared."""
    program = Path(sys.argv[0])
    words = ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]
    return without_secrets(shlex.join([*words, *sys.argv[1:]]))


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")


def processor(device: str = "cpu") -> str:
    """Name of the processor that computes: the GPU's, else the CPU's with what decides how it rounds (model, vector instructions)."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    vectors, cpuinfo = torch.backends.cpu.get_cpu_capability(), Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in facts:
        return f"{platform.processor() or platform.machine()}, {vectors}"
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')}), {vectors}"


@functools.cache
def _versions() -> dict[str, str]:
    ours = {"vlm_pruner_eval": vlm_pruner_eval.__version__, "python": platform.python_version()}
    return ours | {name: metadata.version(package) for name, package in _PACKAGES.items()}


@functools.cache
def git_commit(root: Path) -> str | None:
    """Commit of the source tree `root` when this process asked first, with "+changes" if it was edited; None if it is none."""
    if not (root / ".git").exists():
        return None
    answers = []
    git = ["git", "--no-optional-locks", "-C", str(root)]  # killed, it would leave a lock on which the user's own git fails
    for command in (["rev-parse", "HEAD"], ["status", "--porcelain"]):
        try:
            done = subprocess.run([*git, *command], capture_output=True, text=True, timeout=20, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:  # a repository without a commit, or one that belongs to another user
            return None
        answers.append(done.stdout.strip())
    return answers[0] + ("+changes" if answers[1] else "")


def checkpoint_files(pretrained: str, revision: str | None = None) -> dict[str, Any]:
    """Identity of the checkpoint's files.

    Returns
    -------
    dict
        name -> SHA-256 for files of a folder (of large ones computed once, see `checksums`);
        name -> content id of the hub's cache for a hub checkpoint, with its commit; empty before it has been downloaded.
    """
    folder = _folder(pretrained)
    if folder is not None:
        return {
            file.name: sha256(file)
            for file in sorted(folder.iterdir())
            if file.is_file() and file.suffix in (".json", ".safetensors", ".bin")
        }
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        config = try_to_load_from_cache(pretrained, "config.json", revision=revision)
    except HFValidationError:  # neither a folder nor a possible hub id: loading the model will say so
        return {}
    if not isinstance(config, str):
        return {}
    snapshot = Path(config).parent
    return {"commit": snapshot.name} | {file.name: file.resolve().name for file in sorted(snapshot.iterdir()) if file.is_file()}


def _folder(pretrained: str) -> Path | None:
    if pretrained == "minivlm":
        from vlm_pruner_eval.embedded import minivlm_path

        return minivlm_path()
    return Path(pretrained) if os.path.isdir(pretrained) else None  # os.path: text that can be no path raises nothing
