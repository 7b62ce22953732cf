"""The tables by capability, and on the documents that a coarser image gets wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.rows import Row
from vlm_pruner_eval.report.sheets.table import NO_NUMBER, Entry, Group, Line, Table, grouped, interval
from vlm_pruner_eval.report.stats.strata import CAPABILITY_NOTE, HARD_NOTE, Stratum
from vlm_pruner_eval.sweep.grid import rate_percent


def capabilities(rows: Sequence[Row], strata: Sequence[Stratum]) -> Table | None:
    """One column a capability, in the order of the strata; None without any."""
    found = {(item.name, item.label, item.pruning_rate): item for item in strata if item.control is None}
    names = list(dict.fromkeys(name for name, _, _ in found))
    if not names:
        return None

    def entries(row: Row) -> Iterator[Entry]:
        for name in names:
            item = found.get((name, row.label, row.pruning_rate))
            yield NO_NUMBER if item is None else _score(item)

    largest = {name: max(item.n_documents for key, item in found.items() if key[0] == name) for name in names}
    parts = {name: dict.fromkeys(part for key, item in found.items() if key[0] == name for part in item.parts) for name in names}
    shown = [row for row in rows if any((name, row.label, row.pruning_rate) in found for name in names)]
    legend = (CAPABILITY_NOTE, "Made of: " + "; ".join(f"{name}: {', '.join(parts[name])}" for name in names) + ".")
    columns = ("method", *(f"{name}, {largest[name]} documents" for name in names))
    return Table("table-capabilities", "Scores by capability, % of unpruned", columns, grouped(shown, entries), legend)


def hard_subsets(strata: Sequence[Stratum]) -> Table | None:
    """One group of rows for each control and rate; None without a control."""
    groups: dict[str, list[Stratum]] = {}
    for item in strata:
        if item.control is not None:
            groups.setdefault(f"{item.name.removeprefix('hard: ')}, {_rate(item)}", []).append(item)
    if not groups:
        return None
    shown = tuple(Group(heading, tuple(_line(item) for item in items)) for heading, items in groups.items())
    columns = ("method", "score, %", "documents", "tasks")
    return Table("table-hard", "Documents that a coarser image gets wrong", columns, shown, (HARD_NOTE,), words=("tasks",))


def _line(item: Stratum) -> Line:
    tasks = ", ".join(text.short_names(list(item.parts)).values())
    return Line(item.label, (_score(item), Entry(str(item.n_documents)), Entry(tasks, kind="words")))


def _score(item: Stratum) -> Entry:
    small = interval(item.score.low, item.score.high)
    return Entry(text.number(item.score.value), (small,) if small else ())


def _rate(item: Stratum) -> str:
    percent = rate_percent(item.pruning_rate)
    return "no rate" if percent is None else f"{percent:.1f} % removed"
