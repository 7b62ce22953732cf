"""report.md: the tables and everything needed to read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from vlm_pruner_eval.report.figures.all import WORDS
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.paper.beside import PaperTable
from vlm_pruner_eval.report.rows import PLUMBING, Row, is_plumbing
from vlm_pruner_eval.report.sheets.facts import facts
from vlm_pruner_eval.report.sheets.table import Entry, Table
from vlm_pruner_eval.report.stats.comparisons import Comparisons

_SCORES = "scores"
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_LEGEND = (
    "Several seeds: mean ± standard deviation over seeds. Where every document scored the same, the Wilson interval. Intervals: "
    "percentile bootstrap, 1000 resamples of whole clusters: documents that share an image or belong to a pair are drawn together."
)


def markdown(
    results: Results,
    rows: Sequence[Row],
    comparisons: Comparisons,
    paper: PaperTable | None,
    tables: Sequence[Table],
    figures: Mapping[str, Sequence[Path]],
) -> str:
    """The whole report as Markdown.

    Parameters
    ----------
    tables
        Of `sheets.all.sheets`; each gets a section of its own.
    figures
        Of `figures.all.draw_all`, in the folder of the report.
    """
    parts = [f"# {results.name}", *([f"**{PLUMBING}**"] if is_plumbing(results.tasks) else []), *_remarks(results, rows)]
    parts.append(_of_the_paper(paper))
    for shown in tables:
        parts += [f"## {shown.caption}", table(_lines(shown)), *shown.legend]
        if shown.id == _SCORES:
            parts += [_LEGEND, *comparisons.notes]
    parts = [inert(part) for part in parts]
    for name, paths in figures.items():
        parts += [f"![{WORDS[name].title}]({path.name})" for path in paths if path.suffix == ".png"] + [WORDS[name].legend]
    parts += ["## Where these numbers come from", inert(table(facts(results)))]
    return "\n\n".join(parts) + "\n"


def _of_the_paper(paper: PaperTable | None) -> str:
    """Whether the unpruned row reproduces the paper, in what setting, and what that allows to say of the pruned rows."""
    if paper is None:
        return "Printed numbers: none for this checkpoint."
    said = f"**{paper.verdict}** {paper.setting} {paper.noise}"
    if not paper.differences:
        return said
    return "\n".join([said, "", "Known differences to what the authors ran:", "", *(f"- {line}" for line in paper.differences)])


def _lines(shown: Table) -> Iterator[list[str]]:
    """A table with the headings of its groups as rows of their own."""
    yield list(shown.columns)
    for group in shown.groups:
        if group.heading:
            yield [f"*{group.heading}*", *[""] * (len(shown.columns) - 1)]
        for line in group.lines:
            yield [line.head, *map(_entry, line.entries)]


def _entry(entry: Entry) -> str:
    shown = f"**{entry.text}**" if entry.best else entry.text
    small = "; ".join(entry.small)
    if not small:
        return shown
    return f"{shown} {small}" if small.startswith("±") else f"{shown} [{small}]"


def _remarks(results: Results, rows: Sequence[Row]) -> Iterator[str]:
    for note in results.notes:
        yield f"Note: {note}"
    if results.not_run:
        yield f"Not run yet: {', '.join(results.not_run)}."
    problems = [problem for row in rows for problem in row.problems]
    if problems:
        yield "Failed runs (nothing of them is in an average):\n\n" + "\n".join(f"- {_one_line(problem)}" for problem in problems)


def table(lines: Iterable[list[str]]) -> str:
    """A Markdown table; the first line is its head."""
    head, *body = [[_one_line(value).replace("\\", "\\\\").replace("|", "\\|") for value in line] for line in lines]
    rule = ["---"] + ["---:" if len(head) > 2 else "---"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def inert(text: str) -> str:
    """Markdown in which no label, question or answer is HTML, a link or a picture: a page that shows it may carry those out."""
    return _TAG.sub("&lt;", text).replace("](", "]&#40;")


def _one_line(value: str) -> str:
    return " ".join(value.split())
