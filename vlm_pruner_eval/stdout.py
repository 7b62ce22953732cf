"""Standard output of a command: text for people or, with --json, one JSON document and nothing else."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text for people.")]


class Stdout:
    """Destination of a command's output.

    Parameters
    ----------
    as_json
        True if the document is wanted and the text is not.
    stream
        Takes the document.
    """

    def __init__(self, as_json: bool, stream: TextIO):
        self.as_json = as_json
        self._stream = stream
        self._document: dict[str, Any] = {}

    def console(self, width: int | None = None) -> Console:
        """Return a console for tables, which prints nothing if the document is wanted."""
        return Console(width=width, quiet=self.as_json)

    def line(self, text: str) -> None:
        """Print one line for people."""
        if not self.as_json:
            print(text, flush=True)

    def add(self, part: Mapping[str, Any]) -> None:
        """Add keys to the document, which is printed when the command ends or fails after it has found something."""
        self._document |= part

    def end(self) -> None:
        """Print the document, on one line."""
        if self.as_json and self._document:
            print(json.dumps(self._document), file=self._stream, flush=True)


@contextlib.contextmanager
def stdout(as_json: bool) -> Iterator[Stdout]:
    """Print the document of a command at its end; what libraries print meanwhile goes to stderr.

    A command that is refused has no document, only its sentences on stderr and its exit code.
    """
    out = Stdout(as_json, sys.stdout)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        try:
            yield out
        except typer.Exit:  # after a result that is a failure, such as a failed run
            out.end()
            raise
    out.end()
