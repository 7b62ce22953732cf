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
from test_store import record

from vlm_pruner_eval.errors import OutOfMemoryError
from vlm_pruner_eval.lmms.shared_runs import Configuration
from vlm_pruner_eval.store.answers import AnswerLog
from vlm_pruner_eval.store.schema import UnitRecord
from vlm_pruner_eval.store.summaries import Score, Spread, TaskScore, Tokens
from vlm_pruner_eval.sweep.grid import expand
from vlm_pruner_eval.sweep.metrics.score_line import score_line, title
from vlm_pruner_eval.sweep.progress import SweepProgress, duration
from vlm_pruner_eval.sweep.runner import run_sweep


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def answer(progress: SweepProgress, clock: Clock, batches: int, *, size: int = 2, seconds: float = 1.0) -> None:
    for _ in range(batches):
        clock.wait(seconds)
        progress.answered(size, True)


def plain(left: dict[str, int], total: int = 4) -> tuple[SweepProgress, Clock, io.StringIO]:
    clock, file = Clock(), io.StringIO()
    return SweepProgress(Console(file=file, width=60), total, left, clock=clock), clock, file


def test_speed_and_time_left_are_unknown_before_something_was_measured() -> None:
    progress, clock, _ = plain({"a": 3})
    progress.start("first")
    progress.asked(20)
    answer(progress, clock, 1)
    assert (progress.rate, progress.left_s()) == (None, None), "one batch, the slowest of all, says little"
    answer(progress, clock, 4)
    assert (progress.rate, progress.left_s()) == (2.0, None), "no unit has ended yet"
    progress.end("first", "a", "good")
    assert progress.left_s() == 2 * 5


def test_time_left_is_that_of_the_units_of_each_task() -> None:
    progress, clock, _ = plain({"a": 3, "b": 2})
    for task, seconds in (("a", 10), ("b", 100), ("a", 20)):
        progress.start(task)
        clock.wait(seconds)
        progress.end(task, task, "good")
    assert progress.left_s() == 15 + 100
    progress.start("a")
    progress.asked(4)
    clock.wait(5)
    assert progress.left_s() == 15 + 100 - 5
    clock.wait(1000)
    assert progress.left_s() == 0, "a unit that takes longer than all before"
    other, clock, _ = plain({"a": 1, "b": 1})
    other.start("a")
    clock.wait(8)
    other.end("a", "a", "good")
    assert other.left_s() == 8, "of another task, the mean of those that are known"


def test_units_that_were_skipped_took_no_time() -> None:
    progress, clock, _ = plain({"a": 2})
    progress.end("first", "a", "finished before, skipped", is_made=False)
    assert progress.left_s() is None
    progress.start("second")
    clock.wait(6)
    progress.end("second", "a", "good")
    assert progress.left_s() == 6


def test_answers_of_an_earlier_process_are_not_speed() -> None:
    progress, clock, file = plain({"a": 1})
    progress.start("first")
    progress.asked(20)
    clock.wait(0.5)
    progress.answered(10, False)
    assert progress.rate is None
    answer(progress, clock, 4)
    assert progress.rate == 2.0
    assert file.getvalue() == "[0/4] first: goes on behind 10 of 20\n"


def test_a_call_that_begins_anew_is_counted_once_and_another_one_is_added() -> None:
    progress, clock, _ = plain({"a": 1})
    progress.start("first")
    progress.asked(20)
    answer(progress, clock, 4)
    progress.asked(20)  # out of memory
    assert progress._unit_facts() == "0 of 20 questions, 2 per second"
    answer(progress, clock, 10)
    progress.asked(6)  # log-likelihoods
    assert progress._unit_facts() == "20 of 26 questions, 2 per second"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (45, "45 s"), (60, "1 min"), (750, "12 min 30 s"), (12000, "3 h 20 min"), (187300, "2 d 4 h")]
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_elsewhere_a_long_unit_says_a_line_every_half_minute() -> None:
    progress, clock, file = plain({"a": 2})
    with progress:
        progress.end("unpruned", "a", "finished before, skipped", is_made=False)
        progress.start("x[b]")
        progress.asked(100)
        answer(progress, clock, 40)
        assert progress.took_s == 40
        progress.end("x[b]", "a", "FAILED after 40 s: boom")
        progress.start("c")
        progress.asked(100)
        answer(progress, clock, 31)
    assert file.getvalue().splitlines() == [
        "[1/4] unpruned: finished before, skipped",
        "[1/4] x[b]: 60 of 100 questions, 2 per second; time left unknown",
        "[2/4] x[b]: FAILED after 40 s: boom",
        "[2/4] c: 60 of 100 questions, 2 per second; about 10 s left",
    ]


def test_units_that_share_their_answers_are_named_together() -> None:
    progress, clock, file = plain({"a": 2})
    progress.share(["a", "b"])
    for name in ("a", "b"):
        progress.start(name)
        progress.asked(80)
        if name == "a":
            answer(progress, clock, 40)
        progress.answered(80, False)
        progress.end(name, "a", "good")
    progress.share(["c", "d", "e"])
    assert file.getvalue().splitlines() == [
        "[0/4] answering 2 runs together: a; b",
        "[0/4] 2 runs together: 60 of 80 questions, 2 per second; time left unknown",
        "[1/4] a: good",
        "[2/4] b: good",
        "[2/4] answering 3 runs together",
    ]


def test_on_a_terminal_bars_show_units_and_questions() -> None:
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=True, width=140, color_system=None)
    with SweepProgress(console, 4, {"a": 4}, clock=clock) as progress:
        progress.start("first")
        progress.asked(40)
        answer(progress, clock, 20)
        progress.end("first", "a", "failed: boom")
        progress.start("second [bold]")
        progress.asked(40)
        answer(progress, clock, 3)
        progress._bars.refresh()
    shown = file.getvalue()
    for text in ("1 of 4 done, 1 failed, about 57 s left", "second [bold]", "6 of 40 questions, 2 per second", "[1/4] first: failed: boom"):
        assert text in shown


# ---- lines of scores
def scored(scores: dict[str, float | None], **changes: Any) -> UnitRecord:
    mains = {task: None if value is None else Score(value=value, n=4) for task, value in scores.items()}
    tokens = Tokens(kept=Spread(mean=10.25, min=1, max=99, n=4), n_visual=Spread(mean=36, min=1, max=99, n=4))
    return record(**{"scores": {task: TaskScore(metrics={}, main=main) for task, main in mains.items()}, "tokens": tokens} | changes)


def test_a_finished_run_is_a_line_of_scores() -> None:
    unpruned, mine = [scored({"t_a": 80.0}), scored({"t_b": 1600.0})], [scored({"t_a": 40.0}), scored({"t_b": 1600.0})]
    assert score_line(mine, unpruned, 75) == "a 40.0, b 1600 (75.0 % of unpruned), kept 10.25 of 36, 1 min 15 s"
    assert score_line(mine, None) == "a 40.0, b 1600, kept 10.25 of 36", "the unpruned run is not there yet"
    shared = [mine[0], scored({"t_b": 1600.0}, shared_prefix=True)]
    assert score_line(shared, unpruned, 75) == "a 40.0, b 1600 (75.0 % of unpruned), kept 10.25 of 36"
    assert score_line(mine[:1], unpruned[:1], 75, is_named=False) == "40.0 (50.0 % of unpruned), kept 10.25 of 36, 1 min 15 s"
    nothing = [scored({"t_a": None, "t_b": 1600.0}, tokens=Tokens())]
    assert score_line(nothing, unpruned) == "a n/a, b 1600", "an average over other tasks would be another number"
    failed = record(status="failed", problem="boom")
    assert score_line([failed], unpruned, 3) == "FAILED after 3 s: boom"
    unscored = scored({"t_a": 40.0}, status="failed", problem="no metric", unscored=["no metric"])
    assert score_line([unscored, mine[1]], unpruned) == "FAILED: no metric Scores: a 40.0, b 1600"


def test_runs_are_named_for_people() -> None:
    config = make_config(methods=["random", {"name": "random", "label": "many", "seeds": [3, 7]}, "blind"])
    names = ["unpruned", "random, 66.7 % removed", "many seed 3, 66.7 % removed", "many seed 7, 66.7 % removed", "blind"]
    assert [title(run) for run in expand(config)] == names


def test_every_unit_says_its_score(tmp_path: Path) -> None:
    config = make_config(methods=["fastv"], limit=8)
    console, tasks = Console(file=io.StringIO(), record=True, width=300), task_manager(write_tasks(tmp_path / "tasks"))
    broken = Behaviour(fail={("fastv", 3)})
    run_sweep(config, tmp_path / "out", console=console, load=lambda *args, **kwargs: StandIn(broken), task_manager=tasks)
    head, first, second, third, *_ = console.export_text().splitlines()
    assert head == "tiny: 2 runs on 2 tasks; loading somewhere/tiny."
    assert first.startswith("[1/4] unpruned, tiny_mean: 1.0, kept 36 of 36, ")
    assert second.startswith("[2/4] unpruned, tiny_pairs: 1.0, kept 36 of 36, ")
    assert third.startswith("[3/4] fastv, 66.7 % removed, tiny_mean: FAILED after ") and "document 3" in third


# ---- what the worker loop and the model tell it
class Recorder(SweepProgress):
    """Calls in order."""

    calls: list[tuple[Any, ...]]

    def __init__(self, console: Console, total: int, left: dict[str, int], **options: Any):
        super().__init__(console, total, left, **options)
        Recorder.calls = [("left", dict(left))]

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
    append, left = AnswerLog.append, iter(range(9))

    def interrupted(self: AnswerLog, *args: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        append(self, *args)

    def sweep() -> None:
        console = Console(file=io.StringIO())
        run_sweep(config, tmp_path / "out", console=console, load=lambda *args, **kwargs: StandIn(), task_manager=tasks)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AnswerLog, "append", interrupted)
        sweep()
    monkeypatch.setattr("vlm_pruner_eval.sweep.work.SweepProgress", Recorder)
    sweep()
    assert Recorder.calls == [
        ("left", {"tiny_mean": 1}),
        ("start", "fastv, 66.7 % removed, tiny_mean"),
        ("asked", 6),
        ("answered", 3, False),
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
    monkeypatch.setattr("vlm_pruner_eval.sweep.work.SweepProgress", Recorder)
    console = Console(file=io.StringIO())
    run_sweep(config, tmp_path / "out", console=console, load=lambda *a, **k: Hungry(size=4), task_manager=tasks)
    anew = [("asked", 6), ("answered", 4, True), ("asked", 6), *[("answered", 2, True)] * 3]
    assert Recorder.calls == [("left", {"tiny_mean": 2}), ("start", "unpruned, tiny_mean"), *anew, ("start", "blind, tiny_mean"), *anew]


def test_shared_answers_are_shown_while_they_are_computed() -> None:
    """Not when each run reads its own from its log, which is at the end and all at once."""
    model, told = fresh_model(), []
    set_batch_size(model, 2)
    model.context.on_requests = lambda n: told.append(("asked", n))
    model.context.on_answers = lambda n, is_new: told.append((n, is_new))
    runs = {"a": Configuration("fastv", "1/2"), "b": Configuration("none", None)}
    try:
        together(model, runs, [request("first", i) for i in range(4)])
    finally:
        model.context.on_requests = model.context.on_answers = None
    computed = [call for call in told if call[1] is True]
    assert told[0] == ("asked", 4) and computed == [(2, True)] * 2
    assert told.index((2, True)) < told.index(("asked", 4), 1), "before the second run asks"
    assert sum(n for n, is_new in told if is_new is False and n != "asked") == 2 * 4, "each reads back its own"
