"""tables/*.tex: every table of the report as LaTeX (booktabs), to be read into a paper."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vlm_pruner_eval.report.tables.table import Entry, Table

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "−": r"$-$",
    "²": r"$^2$",
    "–": "--",
    "…": r"\ldots{}",
    "\u00a0": "~",
    "[": "{[}",  # at the start of a row, LaTeX would read it as the argument of the line break before
    "]": "{]}",
}


def latex(table: Table, *, caption: str) -> str:
    """One table as a `table*` environment.

    Parameters
    ----------
    caption
        What the reader must know besides the table's own caption: model, protocol, number of documents.
    """
    heads = [escape(head) for head, _ in table.heads]
    columns = "l" + "".join("l" if is_words else "r" for _, is_words in table.heads[1:])
    lines = [
        r"% Made by `vlm-pruner-eval report`. Needs \usepackage{booktabs}.",
        r"\begin{table*}",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        rf"\caption{{{escape(table.caption)}. {escape(caption)}}}",
        rf"\label{{tab:{table.id}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _row(heads),
        *_body(table),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\smallskip\footnotesize {escape(paragraph)}" for paragraph in table.legend),
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Plain text with LaTeX's special characters as LaTeX writes them."""
    return "".join(_SPECIAL.get(character, character) for character in " ".join(text.split()))


def _body(table: Table) -> Iterator[str]:
    for group in table.groups:
        yield r"\midrule"
        if group.heading:
            yield rf"\multicolumn{{{len(table.heads)}}}{{l}}{{\emph{{{escape(group.heading)}}}}} \\"
        for line in group.lines:
            yield _row([escape(line.head), *map(_entry, table.cells(line))])


def _entry(entry: Entry) -> str:
    shown = escape(entry.text)
    if entry.best:
        shown = rf"\textbf{{{shown}}}"
    small = "; ".join(escape(part) for part in entry.small)
    if not small:
        return shown
    return rf"{shown} {{\scriptsize {small}}}" if small.startswith(r"$\pm$") else rf"{shown} {{\scriptsize [{small}]}}"


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"
