"""The tables about scores and differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.rows import Cell, Row, is_plumbing
from vlm_pruner_eval.report.sheets.table import NO_NUMBER, Entry, Group, Line, Table, grouped, interval
from vlm_pruner_eval.report.stats.comparisons import AVERAGE, Comparison, Comparisons
from vlm_pruner_eval.report.stats.paired import Estimate
from vlm_pruner_eval.sweep.grid import UNPRUNED, rate_percent

_SIGNIFICANT = 0.05
_ROUNDED_TO_ZERO = 0.05  # one decimal is shown


def scores(rows: Sequence[Row], results: Results, comparisons: Comparisons) -> Table:
    """Scores with intervals, relative average, flip rate and kept gain."""
    tasks, names = results.tasks, text.short_names(results.tasks)
    winners = not is_plumbing(tasks)

    def entries(row: Row) -> Iterator[Entry]:
        for task in tasks:
            compared = comparisons.of(row.label, row.pruning_rate, task)
            yield _score(row, row.cells.get(task), best=winners and compared is not None and compared.bold)
        average = comparisons.of(row.label, row.pruning_rate, AVERAGE)
        yield _average(row, average, best=winners and average is not None and average.bold)
        yield _share(average.flip_rate if average else None)
        yield _estimate(_percent(average.gain_kept) if average else None)

    bold = "Bold: the best of its rate, where the paired 95 % interval of its difference to the runner-up excludes 0." if winners else ""
    legend = (
        "In small print or brackets: the 95 % interval of a score (bootstrap over clusters of documents); ± the standard deviation over "
        "seeds. Relative Avg: "
        "100 × mean over the benchmarks of score / unpruned score (arXiv 2512.02700). Flips: share of answers that differ from the "
        "unpruned model's, mean over the benchmarks. Gain kept: (row − blind) / (unpruned − blind).",
    )
    columns = ("method", *(names[task] for task in tasks), "relative Avg, %", "flips, %", "gain kept, %")
    return Table("table-scores", "Scores by method and pruning rate", columns, grouped(rows, entries), (*legend, *filter(None, [bold])))


def differences(rows: Sequence[Row], results: Results, comparisons: Comparisons, *, coloured: bool = False) -> Table | None:
    """Differences to the unpruned model with intervals and Holm-corrected p; None where none could be computed.

    `coloured` says that the format shows colours, which the legend then explains.
    """
    tasks, names = [*results.tasks, AVERAGE], text.short_names(results.tasks)
    pruned = [row for row in rows if row.method != UNPRUNED]

    def entries(row: Row) -> Iterator[Entry]:
        for task in tasks:
            yield _difference(comparisons.of(row.label, row.pruning_rate, task))

    if all(cell.difference is None for cell in comparisons.cells):
        return None
    colours = f" (green: better, red: worse, p below {_SIGNIFICANT})" if coloured else ""
    legend = (
        "Row minus unpruned on the same documents, in the unit of the benchmark (Avg: percent of unpruned), with its paired 95 % interval "
        f"and p after Holm's correction over the table{colours}. McNemar: the exact test on right and wrong answers, uncorrected, for "
        "scores of 0 or 1 and one seed; it takes documents to be independent. Where all documents score as unpruned, or all differ by "
        "the same, nothing can be said of the width of an interval, and none is given.",
    )
    columns = ("method", *(names.get(task, task) for task in tasks))
    return Table("table-differences", "Difference to the unpruned model", columns, grouped(pruned, entries), legend)


def contests(results: Results, comparisons: Comparisons) -> Table | None:
    """The best row of each rate and benchmark against the runner-up; nothing for the embedded benchmark, where nobody wins."""
    if is_plumbing(results.tasks) or not comparisons.contests:
        return None
    names = text.short_names(results.tasks)
    ordered = sorted(comparisons.contests, key=lambda contest: rate_percent(contest.pruning_rate))
    groups = []
    for percent, listed in groupby(ordered, key=lambda contest: rate_percent(contest.pruning_rate)):
        lines = tuple(
            Line(
                names.get(contest.task, contest.task),
                (
                    Entry(contest.best, kind="words", best=contest.decided),
                    Entry(contest.runner_up, kind="words"),
                    _estimate(contest.difference, signed=True),
                    Entry("yes" if contest.decided else "no"),
                ),
            )
            for contest in listed
        )
        groups.append(Group(f"{percent:.1f} % removed", lines))
    columns = ("benchmark", "best", "runner-up", "difference", "decided")
    legend = ("Decided: the paired 95 % interval of the difference excludes 0.",)
    return Table("table-contests", "Best method and runner-up at each rate", columns, tuple(groups), legend, words=("best", "runner-up"))


def power(results: Results, comparisons: Comparisons) -> Table | None:
    """The smallest difference that each benchmark could have shown."""
    if not comparisons.power:
        return None
    names = text.short_names(results.tasks)
    lines = tuple(
        Line(
            names.get(entry.task, entry.task), (Entry(str(entry.n_documents)), Entry(str(entry.n_clusters)), Entry(f"{entry.smallest:.2f}"))
        )
        for entry in comparisons.power
    )
    legend = (
        "Smallest difference to the unpruned model that would be found in 80 of 100 such samples at the 5 % level, from the paired "
        "spread that was observed (median over the pruned rows), in the unit of the benchmark. A smaller difference in the tables above "
        "says little.",
    )
    columns = ("benchmark", "documents", "clusters", "smallest difference")
    return Table("table-power", "What this number of documents can show", columns, (Group("", lines),), legend)


def _score(row: Row, cell: Cell | None, *, best: bool) -> Entry:
    first, *rest = text.cell_lines(row, cell)
    return Entry(first, tuple(filter(None, rest)), kind="missing" if cell is None or cell.value is None else "", best=best)


def _average(row: Row, compared: Comparison | None, *, best: bool) -> Entry:
    if row.relative.value is None:
        return NO_NUMBER
    deviation = "" if row.relative.sd is None else f"± {row.relative.sd:.1f}"
    small = deviation or (_of(compared.score) if compared is not None and compared.score is not None and row.method != UNPRUNED else "")
    return Entry(text.number(row.relative.value), (small,) if small else (), best=best)


def _share(value: float | None) -> Entry:
    return NO_NUMBER if value is None else Entry(f"{100 * value:.1f}")


def _difference(compared: Comparison | None) -> Entry:
    if compared is None or compared.difference is None:
        return NO_NUMBER
    if compared.alike is not None:
        is_zero = abs(compared.difference.value) < _ROUNDED_TO_ZERO
        small = f"{compared.alike} of {compared.alike} equal" if is_zero else f"the same on all {compared.alike}"
        return Entry(f"{0.0 if is_zero else compared.difference.value:+.1f}", (small,))
    small = [_of(compared.difference)]
    if compared.p_holm is not None:
        small.append(f"p {_p(compared.p_holm)}")
    if compared.mcnemar_p is not None:
        small.append(f"McNemar {_p(compared.mcnemar_p)}")
    shown = compared.p_holm is not None and compared.p_holm < _SIGNIFICANT
    kind = ("good" if compared.difference.value > 0 else "bad") if shown else ""
    return Entry(f"{compared.difference.value:+.1f}", tuple(filter(None, small)), kind=kind)


def _estimate(estimate: Estimate | None, *, signed: bool = False) -> Entry:
    if estimate is None:
        return NO_NUMBER
    value = f"{estimate.value:+.1f}" if signed else text.number(estimate.value)
    return Entry(value, tuple(filter(None, [_of(estimate)])))


def _percent(share: Estimate | None) -> Estimate | None:
    if share is None:
        return None
    low, high = (None if end is None else 100 * end for end in (share.low, share.high))
    return Estimate(100 * share.value, low, high)


def _of(estimate: Estimate) -> str:
    return interval(estimate.low, estimate.high)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
