"""SIGTERM in the middle of a sweep: what is held is given back, and the process ends by that signal."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import live

from vlm_pruner_eval.sweep.signals import terminable


def ended(life: Callable[[], object]) -> int:
    """Exit code of a fork, negative where it was a signal."""
    pid = os.fork()
    if not pid:
        live(life)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()


def terminated_in_rays_wait() -> None:
    """It catches what a handler raises, and raises its own."""
    with contextlib.suppress(KeyboardInterrupt):
        terminated()
    raise KeyboardInterrupt


def test_nothing_inside_takes_it_for_an_error(tmp_path: Path) -> None:
    def life() -> None:
        with terminable():
            try:
                terminated()
            except Exception:
                (tmp_path / "recorded").touch()

    assert ended(life) == -signal.SIGTERM
    assert not (tmp_path / "recorded").exists()


@pytest.mark.parametrize("work", [terminated, terminated_in_rays_wait])
def test_what_is_held_is_given_back_and_the_signal_ends_the_process(work: Callable[[], None], tmp_path: Path) -> None:
    def life() -> None:
        with terminable():
            try:
                work()
            finally:
                (tmp_path / "given back").touch()
        (tmp_path / "went on").touch()

    assert ended(life) == -signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["given back"]


def test_ctrl_c_stays_what_it_is() -> None:
    def life() -> None:
        with terminable():
            raise KeyboardInterrupt

    assert ended(life) == 1


def test_a_program_that_treats_the_signal_itself_goes_on_doing_so() -> None:
    def life() -> None:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
        with terminable():
            terminated()

    assert ended(life) == 7
