"""One process of a Ray cluster with the model loaded: it makes runs, or answers shares of them, as the driver asks."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.lmms.plan import WHOLE, Part
from vlm_pruner_eval.sweep import images
from vlm_pruner_eval.sweep.config import validate
from vlm_pruner_eval.sweep.directory import claim
from vlm_pruner_eval.sweep.grid import Run, expand
from vlm_pruner_eval.sweep.progress import quieten
from vlm_pruner_eval.sweep.session import Session
from vlm_pruner_eval.sweep.store import Store

Opener = Callable[..., Session]  # `opening.open_session`, or a stand-in of the same interface
_CLAIM_S = 1.0


class Worker:
    """An actor of Ray. What it is told and what it answers are plain types; a model never travels.

    Parameters
    ----------
    sweep
        The content of a sweep file.
    todo
        Ids of the runs that may be asked for.
    folder
        The driver's current folder, which relative paths of the sweep file start from; taken where it exists.
    root, token
        The results directory as the driver names it, and a file that the driver has put there.
    made_by
        Goes into the provenance of the runs; the node is added here.
    opener
        Loads the model.
    """

    def __init__(
        self, *, sweep: dict[str, Any], todo: list[str], folder: str, root: str, token: str, made_by: dict[str, Any], opener: Opener
    ):
        self._sweep, self._todo, self._folder, self._results, self._token = sweep, todo, Path(folder), Path(root), token
        self._made_by, self._opener = made_by, opener
        self._sent: set[Path] = set()

    def ready(self) -> dict[str, Any]:
        """Load the model.

        Not done when the worker is made: what is raised there reaches the driver as text only, and of an exception with several
        sentences only one arrives.

        Returns
        -------
        dict
            `problems`: why it can't; if there are none, `host`, `sees_results` (whether it works in the driver's directory) and
            `checkpoint` (its files, see `provenance.checkpoint_files`).
        """
        quieten()
        try:
            self._open()
        except ConfigError as error:
            return {"problems": list(error.problems)}
        about = {"host": socket.gethostname(), "sees_results": self._sees_results, "checkpoint": dict(self._session.checkpoint)}
        return {"problems": [], **about}

    def _open(self) -> None:
        if self._folder.is_dir():
            os.chdir(self._folder)
        config = validate(self._sweep)
        runs = {run.run_id: run for run in expand(config)}
        if unknown := set(self._todo) - set(runs):
            raise ConfigError(
                f"--executor ray: on {socket.gethostname()} the grid has no run {min(unknown)!r}, so another version of this package or of "
                "its libraries is installed there; install the same on every node."
            )
        self._sees_results = (self._results / self._token).is_file()
        self._root = self._results if self._sees_results else Path(tempfile.mkdtemp(prefix="vlm-pruner-eval-"))
        self._runs = {run_id: runs[run_id] for run_id in self._todo}
        session = self._opener(config, Store(self._root), list(self._runs.values()), console=Console(quiet=True))
        self._session = replace(session, made_by=self._described())

    def _described(self) -> dict[str, Any]:
        import ray

        executor = {"name": "ray", "version": ray.__version__, "node": ray.get_runtime_context().get_node_id(), "pid": os.getpid()}
        return {**self._made_by, "executor": executor}

    def answer_share(self, run_id: str, index: int, count: int) -> str | None:
        """Answer one share of a run into its journal; what goes wrong is met again, and recorded, by who makes the whole run."""
        part = Part(index, count)
        with self._claimed(self._runs[run_id], part):
            return self._session.answer_share(self._runs[run_id], part)

    def make(self, run_id: str) -> dict[str, bytes] | None:
        """Make one run, and record it; returns its files where the driver can't read them here."""
        with self._claimed(self._runs[run_id], WHOLE):
            self._session.run(self._runs[run_id])
        return None if self._sees_results else self._take_files(run_id)

    def leave(self) -> None:
        """Remove what was only for this worker."""
        if not self._sees_results:
            shutil.rmtree(self._root, ignore_errors=True)

    @contextmanager
    def _claimed(self, run: Run, part: Part) -> Iterator[None]:
        """Wait for the worker that had this before: Ray may take it for dead while it still writes."""
        lock = claim(self._session.store.run_dir(run.run_id), f"a Ray worker on {socket.gethostname()}", part)
        while lock.acquire() is not None:
            time.sleep(_CLAIM_S)
        try:
            self._session.model.on_answers = lambda *_: lock.check()
            yield
        finally:
            lock.release()

    def _take_files(self, run_id: str) -> dict[str, bytes]:
        """What the driver is to write, by path, the record last: it is what makes the run exist. Pictures are sent once."""
        folder = self._session.store.run_dir(run_id)
        own = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        pictures = set((self._root / images.FOLDER).glob("*.jpg")) - self._sent
        self._sent |= pictures
        found = sorted([*own, *pictures], key=lambda path: path.name == "run.json")
        contents = {path.relative_to(self._root).as_posix(): path.read_bytes() for path in found}
        shutil.rmtree(folder)
        return contents
