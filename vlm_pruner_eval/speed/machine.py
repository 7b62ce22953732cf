"""What a measurement was made on and by: processor, threads, versions, command; and where its JSON goes."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vlm_pruner_eval
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep.provenance import command_line, processor

_MOST_THREADS = 1024


def devices() -> list[torch.device]:
    """The CPU, and the first GPU when there is one."""
    return [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


def machine(dtype: torch.dtype, used: list[torch.device]) -> dict[str, Any]:
    """Fields that every benchmark's JSON starts with."""
    versions = {"vlm_pruner_eval": vlm_pruner_eval.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return {
        "device": {str(device): processor(str(device)) for device in used},
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions | {"transformers": metadata.version("transformers")},
        "command": command_line(),
    }


def wait_for(device: torch.device) -> None:
    """Return when everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many CPU threads while the context is open.

    Raises
    ------
    ConfigError
        Fewer than one, or more than any machine has.
    """
    if not 1 <= count <= _MOST_THREADS:
        raise ConfigError(f"--threads: got {count}, expected 1 to {_MOST_THREADS}.")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_json(result: dict[str, Any], out: Path | None) -> None:
    """Write the result to a file, if one is named.

    Raises
    ------
    ConfigError
        The file can't be written.
    """
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out: {out} can't be written ({error}); choose another place.") from error
