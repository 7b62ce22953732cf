"""All tables of a report in reading order: which lines they have, and the words around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from vlm_pruner_eval.report import text
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.paper.disagreements import Disagreement
from vlm_pruner_eval.report.paper.paper_comparison import PaperRow, PaperTable
from vlm_pruner_eval.report.paper.papers import PAPERS
from vlm_pruner_eval.report.paper.printed import Number
from vlm_pruner_eval.report.rows import LITERATURE_FORMULA, OUR_FORMULA, Row, is_plumbing
from vlm_pruner_eval.report.stats.comparisons import AVERAGE, Comparisons
from vlm_pruner_eval.report.stats.strata import CAPABILITY_NOTE, HARD_NOTE, Stratum
from vlm_pruner_eval.report.tables import columns
from vlm_pruner_eval.report.tables.columns import Item
from vlm_pruner_eval.report.tables.table import NO_NUMBER, Column, Group, Line, Table
from vlm_pruner_eval.store.schema import FINISHED, RunRecord
from vlm_pruner_eval.sweep.grid import UNPRUNED, rate_percent


def tables_of(
    results: Results, rows: Sequence[Row], comparisons: Comparisons, paper: PaperTable | None, strata: Sequence[Stratum]
) -> list[Table]:
    """Scores, the paper beside them, differences, power, tokens, costs, capabilities; what can't be computed is left out.

    Every table's id is the name of its files.
    """
    found = [
        scores(rows, results.tasks, comparisons),
        None if paper is None else beside_the_paper(paper, results.tasks),
        None if paper is None else printed_differently(paper),
        differences(rows, results.tasks, comparisons),
        contests(results.tasks, comparisons),
        pairs(comparisons),
        power(results.tasks, comparisons),
        tokens(rows),
        costs(rows),
        capabilities(rows, strata),
        hard_subsets(strata),
    ]
    return [table for table in found if table is not None]


def scores(rows: Sequence[Row], tasks: Sequence[str], comparisons: Comparisons) -> Table:
    """Scores with intervals, relative average, flips, kept gain, and the tokens that they cost."""
    winners = not is_plumbing(tasks)

    def items(row: Row) -> Iterator[Item]:
        average = comparisons.of(row.label, row.pruning_rate, AVERAGE)
        for task in tasks:
            yield Item(row, task, comparisons.of(row.label, row.pruning_rate, task), average, has_winners=winners)

    bold = "Bold: the best of its rate, where the paired 95 % interval of its difference to the runner-up excludes 0."
    legend = (
        "In small print or brackets: the 95 % interval of a score, or ± the standard deviation over seeds. Intervals: percentile "
        "bootstrap, 1000 resamples of whole clusters (documents that share an image or belong to a pair); where every document scored the "
        "same, Wilson's. Relative Avg: 100 × mean over the benchmarks of score / unpruned score (arXiv 2512.02700). Flips: share of "
        "answers that differ from the unpruned model's, mean over the benchmarks. Gain kept: (row − blind) / (unpruned − blind).",
        *([bold] if winners else []),
        "Tokens: visual tokens a prompt that were kept, and their count averaged over all decoder layers.",
        *_iso(rows),
    )
    names = text.short_names(tasks)
    return Table("scores", "Scores by method and pruning rate", columns.SCORES, _grouped(rows, items), legend, across=names)


def _iso(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.iso_layer is not None:
            yield (
                f"{row.label}, listed under {rate_percent(row.asked_rate):.1f} %: removes {row.percent:.1f} %, so that it keeps in every "
                f"layer what a method that prunes at layer {row.iso_layer} keeps on average; it does not compete for the best of its rate."
            )


def beside_the_paper(paper: PaperTable, tasks: Sequence[str]) -> Table | None:
    """Ours with its interval, the printed number, the difference and the verdict; None if nothing is printed for any row."""
    shown = {item.row.key: item for item in paper.rows if _is_printed(item)}
    if not shown:
        return None
    gate = {verdict.task: verdict for verdict in paper.gate.tasks}

    def items(row: Row) -> Iterator[Item]:
        for key, compared in [*shown[row.key].cells.items(), (AVERAGE, shown[row.key].average)]:
            yield Item(row, key, compared, gate=gate.get(key) if row.method == UNPRUNED else None)

    legend = (
        "Ours with its 95 % interval (± over seeds); under it the printed number, in brackets ours minus printed, in the unit of the "
        "benchmark; then the verdict; [n] is a note on the printed number. Only rows that run as the release does (official_quirks) get a "
        "verdict; on the unpruned row it is the gate's.",
        paper.rule,
        paper.noise,
        *paper.footnotes,
    )
    caption = f"Our scores beside the paper's for {paper.vlm}: {paper.paper}"
    groups = _grouped([item.row for item in shown.values()], items)
    return Table("paper", caption, columns.PAPER, groups, legend, across=text.short_names(tasks) | {AVERAGE: "relative Avg, %"})


@dataclass(frozen=True)
class _Printed:
    """A number of one paper (`key`)."""

    key: str
    of: Disagreement

    @property
    def number(self) -> Number:
        return self.of.numbers[self.key]


def printed_differently(paper: PaperTable) -> Table | None:
    """Methods, rates and benchmarks of this sweep for which papers print numbers that don't reproduce each other; None without any."""
    groups = tuple(
        Group(
            "unpruned" if percent == 0 else f"{percent:.1f} % removed",
            tuple(Line(f"{item.method}, {item.benchmark}", tuple(_Printed(name, item) for name in item.numbers)) for item in listed),
        )
        for percent, listed in groupby(paper.disagreements, key=lambda item: item.percent)
    )
    if not groups:
        return None
    named = {name: known for name, known in PAPERS.items() if any(name in item.numbers for item in paper.disagreements)}
    legend = (
        "Two printed numbers differ if neither reproduces the other: by more than 0.5 % of the benchmark's full score. The prompt may be "
        "another one, or a count of tokens means something else, so say from which paper a baseline's number is. Their counts:",
        *(f"{known.name}: {known.tokens}" for known in named.values()),
    )
    heads = {name: known.name for name, known in named.items()}
    caption = f"Printed numbers for {paper.vlm} that differ between papers"
    return Table("printed", caption, columns.PRINTED, groups, legend, head="method, benchmark", across=heads)


def _is_printed(item: PaperRow) -> bool:
    return any(cell.printed is not None or cell.verdict is not None for cell in (*item.cells.values(), item.average))


def differences(rows: Sequence[Row], tasks: Sequence[str], comparisons: Comparisons) -> Table | None:
    """Differences to the unpruned model with intervals and Holm-corrected p; None if none could be computed."""
    if all(cell.difference is None for cell in comparisons.cells):
        return None

    def items(row: Row) -> Iterator[Item]:
        for task in (*tasks, AVERAGE):
            compared = comparisons.of(row.label, row.pruning_rate, task)
            if compared is not None and compared.difference is not None:
                yield Item(row, task, compared)

    legend = (
        "Row minus unpruned on the same documents, in the unit of the benchmark (Avg: percent of unpruned), with its paired 95 % interval "
        "and p after Holm's correction over the table. McNemar: the exact test on right and wrong answers, uncorrected, for scores of 0 "
        "or 1 and one seed; it takes documents to be independent. Where all documents score as unpruned, or all differ by the same, "
        "nothing can be said of the width of an interval, and none is given.",
    )
    groups = _grouped([row for row in rows if row.method != UNPRUNED], items)
    names = text.short_names(tasks) | {AVERAGE: AVERAGE}
    return Table("differences", "Difference to the unpruned model", columns.DIFFERENCES, groups, legend, across=names)


def contests(tasks: Sequence[str], comparisons: Comparisons) -> Table | None:
    """The best row of each rate and benchmark against the runner-up; nothing for the embedded benchmark, where nobody wins."""
    if is_plumbing(tasks) or not comparisons.contests:
        return None
    names = text.short_names(tasks)
    ordered = sorted(comparisons.contests, key=lambda contest: rate_percent(contest.pruning_rate))
    groups = tuple(
        Group(_removed(rate), tuple(Line(names.get(contest.task, contest.task), (contest,)) for contest in listed))
        for rate, listed in groupby(ordered, key=lambda contest: contest.pruning_rate)
    )
    legend = ("Decided: the paired 95 % interval of the difference excludes 0.",)
    return Table("contests", "Best method and runner-up at each rate", columns.CONTESTS, groups, legend, head="benchmark")


def pairs(comparisons: Comparisons) -> Table | None:
    """All pairs of the rows of each rate, for programs."""
    lines = tuple(Line(pair.first, (pair,)) for pair in comparisons.pairs)
    return Table("pairs", "All pairs", columns.PAIRS, (Group("", lines),)) if lines else None


def power(tasks: Sequence[str], comparisons: Comparisons) -> Table | None:
    """The smallest difference that each benchmark could have shown."""
    if not comparisons.power:
        return None
    names = text.short_names(tasks)
    lines = tuple(Line(names.get(entry.task, entry.task), (entry,)) for entry in comparisons.power)
    legend = (
        "Smallest difference to the unpruned model that would be found in 80 of 100 such samples at the 5 % level, from the paired "
        "spread that was observed (median over the pruned rows), in the unit of the benchmark. A smaller difference in the tables above "
        "says little.",
    )
    caption = "What this number of documents can show"
    return Table("power", caption, columns.POWER, (Group("", lines),), legend, head="benchmark")


def tokens(rows: Sequence[Row]) -> Table:
    """Tokens asked for and kept, the status of the runs, and the misbehaviours of releases that were counted."""
    legend = (
        "Visual tokens a prompt: asked for, measured from the tensors (with their range where it varies), and the measured count averaged "
        "over all decoder layers. Misbehaviours of the authors' release: on how many samples they acted (rows with official_quirks), or "
        "would have acted and were mended here.",
        *text.quirk_names(rows),
        *text.adaptations(rows),
    )
    return Table("tokens", "Visual tokens", columns.TOKENS, _grouped(rows, lambda row: [Item(row)]), legend)


def costs(rows: Sequence[Row]) -> Table | None:
    """Arithmetic, memory and time of the rows that have run; columns without a number are named instead of shown."""
    shown = [row for row in rows if row.costs is not None]
    if not shown:
        return None
    sizes = sorted({size for row in shown for size in row.costs.batch_sizes})
    batches = f"{', '.join(map(str, sizes))} prompts" if sizes != [1] else "1 prompt"
    table = Table("costs", "What a prompt costs", columns.COSTS, _grouped(shown, lambda row: [Item(row)]))
    empty = [column for column in table.columns if column.header and _is_empty(column, table)]
    legend = (
        f"GFLOPs of one prompt's prefill in the language model; ours: {OUR_FORMULA}; the literature's: {LITERATURE_FORMULA}. KV: keys and "
        "values after the prefill, a prompt; measured from the tensors of the cache, padding included. Times: median, and in small "
        f"print or brackets the interquartile range; the prefill of a batch ({batches}) with the selection, without the vision "
        "tower. Peak memory is measured on a GPU only.",
        *([f"Not measured here: {'; '.join(column.header for column in empty)}."] if empty else []),
    )
    hidden = tuple(replace(column, header="") if column in empty else column for column in table.columns)
    return replace(table, columns=hidden, legend=legend)


def _is_empty(column: Column, table: Table) -> bool:
    return all(column.entry(line.items[0]) == NO_NUMBER for line in table.lines)


def capabilities(rows: Sequence[Row], strata: Sequence[Stratum]) -> Table | None:
    """One column a capability, in the order of the strata; None without any."""
    found = {(item.label, item.pruning_rate, item.name): item for item in strata if item.control is None}
    if not found:
        return None
    names = list(dict.fromkeys(name for _, _, name in found))
    of_name = {name: [item for item in found.values() if item.name == name] for name in names}
    heads = {name: f"{name}, {max(item.n_documents for item in of_name[name])} documents" for name in names}
    parts = {name: ", ".join(dict.fromkeys(part for item in of_name[name] for part in item.parts)) for name in names}

    def items(row: Row) -> list[Item]:
        return [Item(row, name, found[(*row.key, name)]) for name in names if (*row.key, name) in found]

    legend = (CAPABILITY_NOTE, "Made of: " + "; ".join(f"{name}: {listed}" for name, listed in parts.items()) + ".")
    groups = _grouped([row for row in rows if items(row)], items)
    return Table("capabilities", "Scores by capability, % of unpruned", columns.CAPABILITIES, groups, legend, across=heads)


def hard_subsets(strata: Sequence[Stratum]) -> Table | None:
    """One group of rows for each control and rate; None without a control."""
    groups: dict[str, list[Line]] = {}
    for item in strata:
        if item.control is not None:
            groups.setdefault(f"{item.name.removeprefix('hard: ')}, {_removed(item.pruning_rate)}", []).append(Line(item.label, (item,)))
    if not groups:
        return None
    listed = tuple(Group(heading, tuple(lines)) for heading, lines in groups.items())
    return Table("hard", "Documents that a coarser image gets wrong", columns.HARD, listed, (HARD_NOTE,))


def _grouped(rows: Sequence[Row], items: Callable[[Row], Iterable[Item]]) -> tuple[Group, ...]:
    """Rows under the headings of their rates; `items` makes those of a row."""
    groups = []
    for heading, listed in groupby(rows, key=lambda row: row.heading):
        group = list(listed)
        lines = tuple(Line(row.label, tuple(items(row)), "" if row.status == FINISHED else row.status) for row in group)
        groups.append(Group(heading, lines, _brief(group[0])))
    return tuple(groups)


def _brief(row: Row) -> str:
    if row.percent is None:
        return "none" if row.method == UNPRUNED else "all"
    return f"{row.percent:.1f} %"


def _removed(rate: str | float | None) -> str:
    percent = rate_percent(rate)
    return "no rate" if percent is None else f"{percent:.1f} % removed"


# ---- origin of the numbers
@dataclass(frozen=True)
class _Fact:
    name: str
    value: str


def facts(results: Results) -> Table:
    """Model, settings, versions and device of the numbers."""
    record = results.records[0] if results.records else None
    named = _settings(results.config) | (_measured_by(record) if record is not None else {})
    lines = tuple(Line(name, (_Fact(name, value),)) for name, value in named.items())
    caption = "Model, settings, versions and device"
    return Table("provenance", caption, columns.FACTS, (Group("", lines),), head="what")


def _settings(config: Mapping[str, Any]) -> dict[str, str]:
    model = config["model"]
    return {
        "model": f"{model['id']}, {model['pretrained']}" + (f" @ {model['revision']}" if model["revision"] else ""),
        "protocol": model["protocol"],
        "dtype, attention, batch size": f"{model['dtype']}, {model['attn_implementation']}, {model['batch_size']}",
        "tasks": ", ".join(config["tasks"]),
        "questions a task": "all" if config["limit"] is None else f"the first {config['limit']}",
        "seed": str(config["seed"]),
    }


def _measured_by(record: RunRecord) -> dict[str, str]:
    where = record.provenance
    mains = {task: (scores.main, scores.note or "none") for task, scores in record.scores.items()}
    metrics = [f"{task}: {main.metric} ({main.n})" if main else f"{task}: {note}" for task, (main, note) in mains.items()]
    loaded = [f"{name} {value}" for name, value in where.model.items() if name in ("device", "dtype", "commit") and value is not None]
    return {
        "metric (documents)": ", ".join(metrics),
        "processor": where.processor,
        "as loaded": ", ".join([*loaded, f"{where.threads} CPU threads"]),
        "versions": ", ".join(f"{name} {version}" for name, version in where.versions.items()),
        "results version": str(record.config["results_version"]) + (f", commit {where.git_commit}" if where.git_commit else ""),
        "made": f"{where.time}, by `{where.command.replace('`', chr(39))}`",  # a ` would end the span of code
    }
