"""What a sweep hands to the processes that it starts: the sweep file as it is understood, and the runs to be made."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.sweep import provenance
from vlm_pruner_eval.sweep.config import SweepConfig
from vlm_pruner_eval.sweep.executors.base import Work
from vlm_pruner_eval.sweep.files import write_atomic
from vlm_pruner_eval.sweep.grid import Run
from vlm_pruner_eval.sweep.store import Store

STOPPED = 3  # exit code of a process that can't go on for a reason that is not its own, such as a full disk
FOLDER = "logs"


@dataclass(frozen=True)
class Allotment:
    """Two files in the folder of the logs: the user's own sweep file may be edited while the sweep runs."""

    folder: Path

    @classmethod
    def write(cls, work: Work) -> Allotment:
        """Write both files."""
        made = cls(work.store.root / FOLDER)
        write_atomic(made.sweep, yaml.safe_dump(sweep_file(work.config), sort_keys=False, allow_unicode=True))
        stamps = {run.run_id: work.stamps[run.run_id] for run in work.todo}
        write_atomic(made.todo, json.dumps({"command": provenance.command_line(), "runs": stamps}, indent=1) + "\n")
        return made

    @property
    def sweep(self) -> Path:
        """The sweep file."""
        return self.folder / "sweep.yaml"

    @property
    def todo(self) -> Path:
        """The command of the sweep, and the runs, each with the stamp of its present record."""
        return self.folder / "todo.json"

    def remove_unless_begun(self, store: Store) -> None:
        """Leave nothing of a sweep that was refused."""
        if not (store.root / "sweep.json").exists():
            shutil.rmtree(self.folder)


def read_todo(path: Path, runs: list[Run]) -> tuple[dict[str, str | None], dict[str, str]]:
    """The stamps of the runs that a process of the sweep is to make, and what their records say of who made them (`Session.made_by`).

    Raises
    ------
    ConfigError
        The file can't be read, or was written by other code: its runs are not those of the grid.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        stamps, command = told["runs"], told["command"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"--todo: {str(path)!r} can't be read ({error}); it is given by a sweep to its own processes, leave it out."
        ) from error
    if unknown := set(stamps) - {run.run_id for run in runs}:
        raise ConfigError(f"--todo: {min(unknown)!r} is no run of the grid; the package was changed while the sweep ran, start it again.")
    return stamps, {"command": command}


def end_with_parent() -> None:
    """End this process when its standard input ends, which its parent holds open: also a parent that is killed takes it along."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(STOPPED)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()


def sweep_file(config: SweepConfig) -> dict[str, Any]:
    """A validated configuration in the form of a sweep file."""
    raw = config.model_dump(mode="json", exclude_none=True)
    return raw | {"methods": [{**method.pop("parameters"), **method} for method in raw["methods"]]}
