"""Documents that one method gets right and another wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.answer_arrays import RIGHT
from vlm_pruner_eval.report.load import Results, RunResult
from vlm_pruner_eval.report.show.documents_shown import Place, pick_runs, task_order
from vlm_pruner_eval.sweep.grid import UNPRUNED


@dataclass(frozen=True)
class Flip:
    """A document on which two runs differ; `to_wrong`: the first is right and the second wrong."""

    place: Place
    to_wrong: bool
    before: str
    after: str


@dataclass(frozen=True)
class Flips:
    """All flips between two runs.

    Attributes
    ----------
    first, second
        The two runs.
    flips
        Right to wrong first, each in the order of tasks and documents.
    n_documents
        Documents that both answered and the task scored one by one.
    """

    first: RunResult
    second: RunResult
    flips: tuple[Flip, ...]
    n_documents: int


def find_flips(results: Results, first: str, second: str, rate: str | None = None, task: str | None = None) -> Flips:
    """Compare two runs document by document; a score of 0.5 or more counts as right.

    Parameters
    ----------
    first, second
        Labels, names or keys; "unpruned" or "none" is the unpruned run.
    task
        Only the documents of this task.

    Raises
    ------
    ConfigError
        Runs that are not there, the same run twice, or no document that has a score of its own.
    """
    before, after = (_run(results, name, rate) for name in (first, second))
    if before.run_id == after.run_id:
        raise ConfigError(f"--flips: got {first!r} and {second!r}, which are the same run; name two.")
    ours, theirs = (_scores(results, run) for run in (before, after))
    shared = [place for place in ours if place in theirs and task in (None, place.task)]
    if not shared:
        where = f" of {task}" if task else ""
        raise ConfigError(f"--flips: no document{where} has a score of its own in both runs; a flip can't be told.")
    flips = [
        Flip(place, ours[place][1] >= RIGHT, ours[place][0], theirs[place][0])
        for place in shared
        if (ours[place][1] >= RIGHT) != (theirs[place][1] >= RIGHT)
    ]
    order = task_order(results)
    flips.sort(key=lambda flip: (not flip.to_wrong, order(flip.place.task), flip.place.doc_id))
    return Flips(before, after, tuple(flips), len(shared))


def _run(results: Results, name: str, rate: str | None) -> RunResult:
    if name.strip().lower() in (UNPRUNED, "unpruned"):
        return pick_runs(results, (), rate)[0]
    return pick_runs(results, (name,), rate)[-1]


def _scores(results: Results, run: RunResult) -> dict[Place, tuple[str, float]]:
    """Answer and score by document."""
    splits = results.splits
    return {
        Place(one.task, splits.get(one.task, ""), one.doc_id): (str(one.answer), one.score)
        for one in results.each_score(run.run_id)
        if one.score is not None
    }


def drawable_first(flips: Sequence[Flip], kept: set[Place]) -> list[Flip]:
    """The flips whose pictures were kept, right to wrong and wrong to right in turn."""
    sides = [[flip for flip in flips if flip.place in kept and flip.to_wrong is side] for side in (True, False)]
    longest = max(map(len, sides))
    return [side[i] for i in range(longest) for side in sides if i < len(side)]
