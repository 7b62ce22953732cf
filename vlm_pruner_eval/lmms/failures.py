"""The log of failed samples: a full traceback for every kind of failure, then a count of those that are the same."""

from __future__ import annotations

import threading
import traceback

from loguru import logger

_MOST_NAMES = 3
Kind = tuple[object, ...]


class FailureLog:
    """Tells every kind of failure once, however many samples, runs and threads meet it; every sample's error is recorded elsewhere."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: set[Kind] = set()
        self._more: dict[Kind, list[str]] = {}  # since the last summary

    def is_new(self, error: BaseException) -> bool:
        """Return True if no failure of this kind was told yet."""
        with self._lock:
            return kind_of(error) not in self._told

    def tell(self, sample_id: str, error: BaseException) -> None:
        """Log the failure of a sample: with its traceback, or later in `summarise`."""
        kind = kind_of(error)
        with self._lock:
            if kind in self._told:
                self._more.setdefault(kind, []).append(sample_id)
                return
            self._told.add(kind)
        logger.error("Sample {} failed:\n{}", sample_id, "".join(traceback.format_exception(error)))

    def summarise(self) -> None:
        """Log how many samples failed like those that were told."""
        with self._lock:
            more = self._more
            self._more = {}
        for kind, sample_ids in more.items():
            names = ", ".join(sample_ids[:_MOST_NAMES]) + (", ..." if len(sample_ids) > _MOST_NAMES else "")
            count = f"{len(sample_ids)} more {'sample' if len(sample_ids) == 1 else 'samples'}"
            logger.error("{}: the same {} as shown before ({}).", count, kind[0], names)


def kind_of(error: BaseException) -> Kind:
    """Return what failures of one kind have in common: the type of the error, and type and place of what caused it."""
    cause = root_cause(error)
    frames = traceback.extract_tb(cause.__traceback__)
    place = (frames[-1].filename, frames[-1].lineno) if frames else ()
    return (type(error).__name__, type(cause).__name__, *place)


def root_cause(error: BaseException) -> BaseException:
    """Return the first error of a chain."""
    seen = {id(error)}
    while (before := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) and id(before) not in seen:
        seen.add(id(before))
        error = before
    return error
