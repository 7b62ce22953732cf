"""Proof that every forward of a model went through the hooks, and that no two threads were in it at the same time.

Layouts of images and the prefill at hand belong to a context, not to a thread: a second thread would read the first one's. Calls of
generate() therefore wait for each other; a bare forward in the middle of another thread's is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from vlm_pruner_eval.errors import PruningError


class NotCopied:
    """Object on a model that must not travel with a copy or a pickle of it."""

    def __reduce_ex__(self, protocol: object) -> object:
        raise PruningError(
            "prune: got a copy (or a pickle) of a model that is being pruned, expected none: it would keep the hooks for good. Copy the "
            "model before the context or after it."
        )


class Guard(NotCopied):
    """Watches the calls of one model while it is being pruned.

    Attributes
    ----------
    n_seen
        Forwards of the language model that the hooks followed to their end.
    """

    def __init__(self) -> None:
        self.n_seen = 0
        self._n_calls = 0  # of generate() that are running, one inside the other
        self._ran = False
        self._thread: int | None = None
        self._starts: list[tuple[nn.Module, int]] = []  # modules that are running, and n_seen when they began
        self._turn = threading.RLock()  # held during generate()
        self._mutex = threading.Lock()

    # ---- threads
    def check_thread(self) -> None:
        """Raise a PruningError if another thread is in the middle of a forward or of generate()."""
        if self._thread not in (None, threading.get_ident()):
            raise PruningError(
                f"prune: got a forward in thread {threading.current_thread().name!r} while another thread is using this context, "
                "expected one thread at a time: call generate(), which waits for its turn, or give each thread a model of its own."
            )

    def _enter(self) -> None:
        with self._mutex:
            self.check_thread()
            self._thread = threading.get_ident()

    def _leave(self) -> None:
        if not self._n_calls and not self._starts:
            self._thread = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until no other thread generates, and let none begin while this is open."""
        with self._turn:
            yield

    # ---- calls of the model
    def generate(self, original: Callable, *args: object, **kwargs: object) -> object:
        """Run ``model.generate`` as the only thread, and hold it against what the hooks saw."""
        with self.turn():
            self._enter()
            self._n_calls += 1
            self._ran = True
            before = self.n_seen
            try:
                output = original(*args, **kwargs)
            finally:
                self._n_calls -= 1
                self._leave()
            self._check_seen(before, "generate()")
            return output

    def begin(self, module: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the model and of what is inside or around it."""
        self._enter()
        self._ran = True
        self._starts.append((module, self.n_seen))

    def end(self, module: nn.Module, args: tuple, output: object) -> None:
        """Forward hook of the same modules, called after an exception, too (then without an output)."""
        if threading.get_ident() != self._thread:
            return  # a thread that was refused
        while self._starts:
            running, before = self._starts.pop()
            if running is module:
                break
        else:
            return
        self._leave()
        if output is not None:
            self._check_seen(before, f"the forward of {type(module).__name__}")

    def check_exit(self) -> None:
        """Raise a PruningError if the model ran in this context and the hooks saw no forward of its language model."""
        if self._ran:
            self._check_seen(0, "this context")

    def _check_seen(self, before: int, what: str) -> None:
        if self.n_seen == before:
            raise PruningError(
                f"prune: {what} ended without a forward of the language model that the hooks could follow, so nothing proves that the "
                "prompt was pruned; something runs the model past its modules (replaced, traced or compiled code), or an "
                "error was swallowed. Load it afresh, or look for the error."
            )
