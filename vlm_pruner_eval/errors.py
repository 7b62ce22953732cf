"""The exceptions that users meet. Every message is a sentence: what was got, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from vlm_pruner_eval import redact


class ConfigError(ValueError):
    """A request that can't be run as written: unknown names, values out of range, a model that can't be pruned.

    Parameters
    ----------
    problems
        One sentence, or all the sentences found in one pass: a user mends a file once, not once per error. What they quote of
        the input is made fit to be shown (`redact.sentence`).
    """

    def __init__(self, problems: str | Iterable[str]):
        listed = (problems,) if isinstance(problems, str) else problems
        self.problems: tuple[str, ...] = tuple(redact.sentence(problem) for problem in listed)
        super().__init__("\n".join(self.problems))


class DamagedError(ConfigError):
    """A file of results that is not what was written; nothing can go on before a person has looked at it."""


class PruningError(RuntimeError):
    """What the tensors hold differs from what was asked, or a method can't answer (NaN, duplicates, wrong count)."""


class OutOfMemoryError(PruningError):
    """A batch did not fit into the memory; the run has to begin anew with smaller batches, as answers must not mix batch sizes."""


class StoppedError(RuntimeError):
    """A sweep can't go on for a reason outside of it, such as a full disk; the same command continues it when that is mended."""


_LONGEST = 200  # characters of a name that are compared


def closest(name: object, known: Iterable[str]) -> str:
    """The tail of a sentence about an unknown name: its closest match, if any, and the known ones."""
    names = sorted(known)
    match = difflib.get_close_matches((name if isinstance(name, str) else redact.short(name))[:_LONGEST], names, n=1, cutoff=0.5)
    hint = f"did you mean {match[0]!r}? " if match else ""
    return f"{hint}Known: {', '.join(names) or '(none)'}."
