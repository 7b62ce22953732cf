"""Progress: what is shown on a terminal and elsewhere, and that speed and time left are of what was measured, or unknown."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lmms_requests import fresh_model, request, set_batch_size
from rich.console import Console
from sweep_standin import StandIn, make_config, task_manager, write_tasks
from test_lmms_shared import together

from vlm_pruner_eval.errors import OutOfMemoryError
from vlm_pruner_eval.lmms.journal import Journal
from vlm_pruner_eval.lmms.shared import Configuration
from vlm_pruner_eval.sweep.progress import SweepProgress
from vlm_pruner_eval.sweep.runner import run_sweep
from vlm_pruner_eval.sweep.speed import Speed, duration


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def answer(target: Speed | SweepProgress, clock: Clock, batches: int, *, size: int = 2, seconds: float = 1.0) -> None:
    for _ in range(batches):
        clock.wait(seconds)
        target.answered(size, True)


def test_time_left_is_unknown_before_something_was_measured() -> None:
    clock = Clock()
    speed = Speed(3, clock=clock)
    speed.start()
    assert (speed.questions, speed.rate, speed.left_s()) == (None, None, None)
    speed.asked(20)
    assert (speed.questions, speed.done, speed.left_s()) == (20, 0, None)
    answer(speed, clock, 1)
    assert speed.left_s() is None, "one batch, the slowest of all, says little"
    answer(speed, clock, 4)
    assert (speed.rate, speed.done) == (2.0, 10)
    assert speed.left_s() == 10 / 2 + 2 * 20 / 2


def test_time_left_counts_what_runs_take_beside_answering_and_the_speed_of_the_run_itself() -> None:
    clock = Clock()
    speed = Speed(3, clock=clock)
    speed.start()
    clock.wait(3)
    speed.asked(20)
    answer(speed, clock, 10)
    clock.wait(4)
    assert speed.end() == 17
    speed.start()
    speed.asked(20)
    answer(speed, clock, 5, seconds=0.5)  # this method is twice as fast
    assert speed.rate == 4.0
    assert speed.left_s() == pytest.approx(10 / 4 + 20 / (30 / 12.5) + 7 * 2)


def test_answers_of_an_earlier_process_are_not_speed() -> None:
    clock = Clock()
    speed = Speed(1, clock=clock)
    speed.start()
    speed.asked(20)
    clock.wait(0.5)
    speed.answered(10, False)
    assert (speed.done, speed.rate) == (10, None)
    answer(speed, clock, 4)
    assert (speed.done, speed.rate, speed.left_s()) == (18, 2.0, 1.0)


def test_a_call_that_begins_anew_is_counted_once_and_another_one_is_added() -> None:
    clock = Clock()
    speed = Speed(1, clock=clock)
    speed.start()
    speed.asked(20)
    answer(speed, clock, 4)
    speed.asked(20)  # out of memory
    assert (speed.questions, speed.done) == (20, 0)
    answer(speed, clock, 10)
    speed.asked(6)  # log-likelihoods
    assert (speed.questions, speed.done) == (26, 20)


def test_runs_that_share_their_answers_cost_time_once() -> None:
    """All are computed in the first run, of whose answers each one reads its own back afterwards."""
    clock = Clock()
    speed = Speed(5, shared=True, clock=clock)
    speed.start()
    speed.asked(20)
    answer(speed, clock, 5)
    assert speed.left_s() == 5.0, "the other runs have nothing left to compute"
    answer(speed, clock, 5)
    speed.answered(20, False)
    assert (speed.done, speed.questions) == (20, 20)
    clock.wait(3)
    speed.end()
    assert speed.left_s() == 4 * 3


def test_a_run_that_asked_nothing_tells_nothing() -> None:
    clock = Clock()
    speed = Speed(3, clock=clock)
    speed.start()
    speed.asked(4)
    answer(speed, clock, 2)
    speed.end()
    speed.start()
    speed.end()
    assert speed.left_s() == 2.0, "from what the first run told"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (45, "45 s"), (60, "1 min"), (750, "12 min 30 s"), (12000, "3 h 20 min"), (187300, "2 d 4 h")]
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def plain(clock: Clock) -> tuple[SweepProgress, io.StringIO]:
    file = io.StringIO()
    return SweepProgress(Console(file=file, width=60), 4, todo=2, clock=clock), file


def test_elsewhere_a_long_run_says_a_line_every_half_minute() -> None:
    clock = Clock()
    progress, file = plain(clock)
    with progress:
        progress.end("unpruned", "finished before, skipped")
        progress.start("a[b]")
        progress.asked(100)
        answer(progress, clock, 40)
        progress.finished("a[b]", "FAILED: boom")
        progress.end("c", "failed before, skipped")
    assert file.getvalue().splitlines() == [
        "[1/4] unpruned: finished before, skipped",
        "[1/4] a[b]: started",
        "[1/4] a[b]: 60 of 100 questions, 2 per second; about 1 min 10 s left",
        "[2/4] a[b]: FAILED: boom in 40 s",
        "[3/4] c: failed before, skipped",
    ]


def test_on_a_terminal_bars_show_runs_and_questions() -> None:
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=True, width=140, color_system=None)
    with SweepProgress(console, 4, clock=clock) as progress:
        progress.start("first")
        progress.asked(40)
        answer(progress, clock, 20)
        progress.finished("first", "failed: boom")
        progress.start("second [bold]")
        progress.asked(40)
        answer(progress, clock, 3)
        progress._bars.refresh()
    shown = file.getvalue()
    for text in (
        "1 of 4 runs, 1 failed, 3 left, about 57 s left",
        "second [bold]",
        "6 of 40 questions, 2 per second",
        "[1/4] first: failed: boom in",
    ):
        assert text in shown


class Recorder(SweepProgress):
    """What the runner and the model call, in order."""

    calls: list[tuple[Any, ...]]

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        Recorder.calls = [("todo", options["todo"], options["shared"])]

    def start(self, key: str) -> None:
        super().start(key)
        self.calls.append(("start", key))

    def asked(self, count: int) -> None:
        super().asked(count)
        self.calls.append(("asked", count))

    def answered(self, count: int, is_new: bool = True) -> None:
        super().answered(count, is_new)
        self.calls.append(("answered", count, is_new))


def test_a_resumed_sweep_tells_found_answers_from_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tasks=["tiny_mean"], methods=["fastv"], limit=6)
    tasks = task_manager(write_tasks(tmp_path / "tasks"))
    append, left = Journal.append, [9]

    def interrupted(self: Journal, *args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        append(self, *args)

    def sweep() -> None:
        console = Console(file=io.StringIO())
        run_sweep(config, tmp_path / "out", console=console, load=lambda *args, **kwargs: StandIn(), task_manager=tasks)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep()
    monkeypatch.setattr("vlm_pruner_eval.sweep.executors.base.SweepProgress", Recorder)
    sweep()
    assert Recorder.calls == [
        ("todo", 1, False),
        ("start", "fastv-2of3"),
        ("asked", 6),
        *[("answered", 1, False)] * 3,
        *[("answered", 1, True)] * 3,
    ]


class Hungry(StandIn):
    """Has no memory for batches of 4."""

    def batches_of(self, *args: Any) -> Iterator[Any]:
        for number, batch in enumerate(super().batches_of(*args)):
            if number and self.batch_size == 4:
                raise OutOfMemoryError("A batch of 4 did not fit.")
            yield batch


def test_answers_that_begin_anew_are_asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tasks = make_config(tasks=["tiny_mean"], methods=["blind"], limit=6), task_manager(write_tasks(tmp_path / "tasks"))
    monkeypatch.setattr("vlm_pruner_eval.sweep.executors.base.SweepProgress", Recorder)
    console = Console(file=io.StringIO())
    run_sweep(config, tmp_path / "out", console=console, load=lambda *a, **k: Hungry(size=4), task_manager=tasks)
    anew = [("asked", 6), ("answered", 4, True), ("asked", 6), *[("answered", 2, True)] * 3]
    assert Recorder.calls == [("todo", 2, False), ("start", "unpruned"), *anew, ("start", "blind"), *anew]


def test_shared_answers_are_shown_while_they_are_computed() -> None:
    """Not when each run reads its own from its journal, which is at the end and all at once."""
    model, told = fresh_model(), []
    set_batch_size(model, 2)
    model.on_requests, model.on_answers = (lambda n: told.append(("asked", n))), (lambda n, is_new: told.append((n, is_new)))
    runs = {"a": Configuration("fastv", "1/2"), "b": Configuration("none", None)}
    try:
        together(model, runs, [request("first", i) for i in range(4)])
    finally:
        model.on_requests = model.on_answers = None
    read_back = [(2, False)] * 2
    assert told == [("asked", 4), (0, False), (2, True), (2, True), *read_back, ("asked", 4), *read_back]
