"""Outcome of a comparison of rows: plain data for tables, figures and programs."""

from __future__ import annotations

from dataclasses import dataclass

from vlm_pruner_eval.report.stats.paired import Estimate

AVERAGE = "Avg"  # stands for a task in a comparison of relative averages


@dataclass(frozen=True)
class Comparison:
    """One row (a label at a rate, over its seeds) on one task, or on `AVERAGE`, against the unpruned row.

    Attributes
    ----------
    task
        A task, or `AVERAGE`.
    score
        Mean over the seeds, in the unit of the table; for `AVERAGE` percent of unpruned. None where the row has none.
    sd, seeds
        Standard deviation over seeds (None for one), and how many.
    difference
        Row minus unpruned; None for the unpruned row itself, and where the draws are not there.
    p, p_holm
        Of no difference: t-test with the cluster bootstrap's standard error; and after Holm's correction over the table.
    mcnemar_p
        Exact McNemar test, where every document scored 0 or 1 and there is one seed. It takes documents to be independent.
    flip_rate
        Share of documents, 0 to 1, with another answer than the unpruned model's (`AVERAGE`: mean over the tasks).
    gain_kept
        (row - blind) / (unpruned - blind), 1 when everything is kept; None without a blind row, or when the model gains nothing
        from the image that the data can show.
    alike
        Documents, where the difference is the same on every resample: there is no spread, so no interval. Else None.
    bold
        Best of its rate, and the interval of its difference to the runner-up excludes 0.
    """

    label: str
    pruning_rate: str | float | None
    task: str
    score: Estimate | None
    sd: float | None = None
    seeds: int = 1
    difference: Estimate | None = None
    p: float | None = None
    p_holm: float | None = None
    mcnemar_p: float | None = None
    flip_rate: float | None = None
    gain_kept: Estimate | None = None
    alike: int | None = None
    bold: bool = False


@dataclass(frozen=True)
class Pair:
    """Two rows listed under one rate, on one task or `AVERAGE`: first minus second; `p_holm` is over the pairs of that task and rate."""

    task: str
    pruning_rate: str | float | None
    first: str
    second: str
    difference: Estimate | None
    p: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class Contest:
    """The best row of a rate on one task or `AVERAGE`, and the runner-up; `decided` when the interval of `difference` excludes 0.

    Iso-compute rows do not compete: they keep more tokens than the rate says. On the embedded benchmark nothing is decided.
    """

    task: str
    pruning_rate: str | float | None
    best: str
    runner_up: str
    difference: Estimate | None
    decided: bool


@dataclass(frozen=True)
class Power:
    """The smallest difference to unpruned that a task's documents could have shown, in the task's unit.

    80 % power at the 5 % level, from the observed paired spread; the median over the pruned rows.
    """

    task: str
    n_documents: int
    n_clusters: int
    smallest: float


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of a table.

    Attributes
    ----------
    notes
        Sentences for the reader about all that could not be computed.
    """

    cells: tuple[Comparison, ...] = ()
    contests: tuple[Contest, ...] = ()
    pairs: tuple[Pair, ...] = ()
    power: tuple[Power, ...] = ()
    notes: tuple[str, ...] = ()

    def of(self, label: str, pruning_rate: str | float | None, task: str) -> Comparison | None:
        """The comparison of one row on one task (or `AVERAGE`); None where there is none."""
        return next((cell for cell in self.cells if (cell.label, cell.pruning_rate, cell.task) == (label, pruning_rate, task)), None)
