"""What costs a tenth of a second in every command, done once a process; and a garbage collection that leaves imported modules alone."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from importlib import metadata

import pytest
import typer.testing

from vlm_pruner_eval import versions


def take(patch: pytest.MonkeyPatch) -> None:
    """Let commands that are called in this process take the shortcuts."""
    patch.setattr(typer.testing, "_get_command", functools.cache(typer.testing._get_command))
    patch.setattr(versions, "_installed", functools.partial(_installed, versions._installed))
    gc.collect()
    gc.freeze()  # a full collection looks at half a million objects of torch and transformers otherwise, in a third of a second


def _installed(find: Callable[[str], str | None], name: str) -> str | None:
    return _found(find, name, metadata.version, tuple(sys.path))


@functools.cache
def _found(find: Callable[[str], str | None], name: str, *_: object) -> str | None:
    """The version of a package, as long as nobody changes how or where it is looked up."""
    return find(name)
