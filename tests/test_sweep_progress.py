"""Progress: what is shown on a terminal and elsewhere, and that speed and time left are of what was measured, or unknown."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lmms_requests import fresh_model, request, set_batch_size
from rich.console import Console
from sweep_standin import Behaviour, StandIn, make_config, task_manager, write_tasks
from test_lmms_shared import together
from vlm_pruner_eval.lmms.journal import Journal
from vlm_pruner_eval.sweep.speed import Speed, duration

from vlm_pruner_eval.errors import OutOfMemoryError
from vlm_pruner_eval.lmms.shared import Configuration
from vlm_pruner_eval.sweep.grid import expand
from vlm_pruner_eval.sweep.progress import SweepProgress
from vlm_pruner_eval.sweep.runner import run_sweep
from vlm_pruner_eval.sweep.score_line import score_line, title


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
    speed = Speed(9, clock=clock)
    speed.share(5)
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
    for _ in range(4):
        speed.start()
        clock.wait(3)
        speed.end()
    speed.share(2)
    speed.start()
    speed.asked(20)
    assert speed.left_s() is None, "another group has another speed"
    answer(speed, clock, 5, seconds=2.0)
    assert speed.left_s() == 10 + 2 * 3


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
        assert progress.stop() == 40
        progress.end("a[b]", "FAILED after 40 s: boom")
        progress.end("c", "failed before, skipped")
    assert file.getvalue().splitlines() == [
        "[1/4] unpruned: finished before, skipped",
        "[1/4] a[b]: 60 of 100 questions, 2 per second; about 1 min 10 s left",
        "[2/4] a[b]: FAILED after 40 s: boom",
        "[3/4] c: failed before, skipped",
    ]


def test_groups_say_what_is_left_of_them_and_the_last_one_of_the_sweep() -> None:
    clock = Clock()
    progress, file = plain(clock)
    for names, rate in ((["a", "b"], 2), (["c", "d"], 1)):
        progress.share(names)
        for name in names:
            progress.start(name)
            progress.asked(80)
            if name == names[0]:
                answer(progress, clock, 80 // rate, size=rate)
            progress.answered(80, False)
            progress.stop()
            progress.end(name, "good")
    assert file.getvalue().splitlines() == [
        "[0/4] answering 2 runs together: a; b",
        "[0/4] 2 runs together: 60 of 80 questions, 2 per second; about 10 s left for them",
        "[1/4] a: good",
        "[2/4] b: good",
        "[2/4] answering 2 runs together: c; d",
        "[2/4] 2 runs together: 30 of 80 questions, 1 per second; about 50 s left",
        "[2/4] 2 runs together: 60 of 80 questions, 1 per second; about 20 s left",
        "[3/4] c: good",
        "[4/4] d: good",
    ]


def record(scores: dict[str, float | None], **more: Any) -> dict[str, Any]:
    tasks = {task: {"main": None if value is None else {"value": value}} for task, value in scores.items()}
    kept = {name: {"mean": mean, "min": 1, "max": 99} for name, mean in (("kept", 10.25), ("n_visual", 36.0))}
    return {"status": "finished", "method": "fastv", "tasks": tasks, "tokens": kept} | more


def test_a_finished_run_is_a_line_of_scores() -> None:
    unpruned = record({"t_a": 80.0, "t_b": 1600.0}, method="none")
    mine = record({"t_a": 40.0, "t_b": 1600.0})
    assert score_line(mine, unpruned, 75) == "a 40.0, b 1600 (75.0 % of unpruned), kept 10.25 of 36, 1 min 15 s"
    assert score_line(mine | {"shared_prefix": True}, unpruned, 75) == "a 40.0, b 1600 (75.0 % of unpruned), kept 10.25 of 36"
    assert score_line(mine, None) == "a 40.0, b 1600, kept 10.25 of 36", "the unpruned run is not there yet"
    assert score_line(unpruned, unpruned) == "a 80.0, b 1600, kept 10.25 of 36"
    nothing = record({"t_a": None, "t_b": 1600.0}, tokens={"kept": None, "n_visual": None})
    assert score_line(nothing, unpruned) == "a n/a, b 1600", "an average over other tasks would be another number"
    assert score_line({"status": "failed", "problem": "boom"}, unpruned, 3) == "FAILED after 3 s: boom"


def test_runs_are_named_for_people() -> None:
    config = make_config(methods=["random", {"name": "random", "label": "many", "seeds": [3, 7]}, "blind"])
    names = ["unpruned", "random, 66.7 % removed", "many seed 3, 66.7 % removed", "many seed 7, 66.7 % removed", "blind"]
    assert [title(run) for run in expand(config)] == names


def test_every_run_says_its_scores(tmp_path: Path) -> None:
    config = make_config(methods=["fastv"], limit=8)
    console, tasks = Console(file=io.StringIO(), record=True, width=300), task_manager(write_tasks(tmp_path / "tasks"))
    broken = Behaviour(fail={("fastv", 3)})
    run_sweep(config, tmp_path / "out", console=console, load=lambda *args, **kwargs: StandIn(broken), task_manager=tasks)
    head, first, second, _ = console.export_text().splitlines()
    assert head == "tiny: 2 runs on 2 tasks; loading somewhere/tiny."
    assert first.startswith("[1/2] unpruned: mean 1.0, pairs 1.0, kept 36 of 36, ")
    assert second.startswith("[2/2] fastv, 66.7 % removed: FAILED after ") and "document 3" in second


def test_on_a_terminal_bars_show_runs_and_questions() -> None:
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=True, width=140, color_system=None)
    with SweepProgress(console, 4, clock=clock) as progress:
        progress.start("first")
        progress.asked(40)
        answer(progress, clock, 20)
        progress.stop()
        progress.end("first", "failed: boom")
        progress.start("second [bold]")
        progress.asked(40)
        answer(progress, clock, 3)
        progress._bars.refresh()
    shown = file.getvalue()
    for text in (
        "1 of 4 runs, 1 failed, 3 left, about 57 s left",
        "second [bold]",
        "6 of 40 questions, 2 per second",
        "[1/4] first: failed: boom",
    ):
        assert text in shown


class Recorder(SweepProgress):
    """What the runner and the model call, in order."""

    calls: list[tuple[Any, ...]]

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        Recorder.calls = [("todo", options["todo"])]

    def start(self, name: str) -> None:
        super().start(name)
        self.calls.append(("start", name))

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
    monkeypatch.setattr("vlm_pruner_eval.sweep.executors.inprocess.SweepProgress", Recorder)
    sweep()
    assert Recorder.calls == [
        ("todo", 1),
        ("start", "fastv, 66.7 % removed"),
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
    monkeypatch.setattr("vlm_pruner_eval.sweep.executors.inprocess.SweepProgress", Recorder)
    console = Console(file=io.StringIO())
    run_sweep(config, tmp_path / "out", console=console, load=lambda *a, **k: Hungry(size=4), task_manager=tasks)
    anew = [("asked", 6), ("answered", 4, True), ("asked", 6), *[("answered", 2, True)] * 3]
    assert Recorder.calls == [("todo", 2), ("start", "unpruned"), *anew, ("start", "blind"), *anew]


def test_shared_answers_are_shown_while_they_are_computed() -> None:
    """Not when each run reads its own from its journal, which is at the end and all at once."""
    model, told = fresh_model(), []
    set_batch_size(model, 2)
    model.context.on_requests, model.context.on_answers = (
        (lambda n: told.append(("asked", n))),
        (lambda n, is_new: told.append((n, is_new))),
    )
    runs = {"a": Configuration("fastv", "1/2"), "b": Configuration("none", None)}
    try:
        together(model, runs, [request("first", i) for i in range(4)])
    finally:
        model.context.on_requests = model.context.on_answers = None
    read_back = [(2, False)] * 2
    assert told == [("asked", 4), (0, False), (2, True), (2, True), *read_back, ("asked", 4), *read_back]
