"""Groups of runs that are answered together, in the order in which they are made."""

from __future__ import annotations

from collections.abc import Sequence

from vlm_pruner_eval.sweep.grid import UNPRUNED, Run, rate_percent


def groups(runs: Sequence[Run], *, shared: bool) -> list[list[Run]]:
    """Split runs into groups; every run is in one of them.

    Without a shared prefix every run is a group. With one, the first group is the unpruned run and the first pruned method at the
    largest rate, whose scores are there long before all others': these are the second group. Where the unpruned run is not among
    `runs`, or fewer than two would be left for the second group, all are one group.
    """
    if not shared:
        return [[run] for run in runs]
    unpruned = [run for run in runs if run.method == UNPRUNED]
    pruned = [run for run in runs if run.pruning_rate is not None]
    if unpruned and pruned and len(runs) >= 4:
        first = [*unpruned, max(pruned, key=lambda run: rate_percent(run.pruning_rate))]  # of equal ones the first
        return [first, [run for run in runs if run not in first]]
    return [list(runs)] if runs else []
