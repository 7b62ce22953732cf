"""report.html: the whole report as one page that needs no other file, no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.efficiency import EfficiencyRow
from vlm_pruner_eval.report.figures.all import WORDS
from vlm_pruner_eval.report.html import svg
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.paper.beside import PaperTable
from vlm_pruner_eval.report.rows import PLUMBING, Row, is_plumbing
from vlm_pruner_eval.report.sheets.all import scores
from vlm_pruner_eval.report.sheets.costs import costs, tokens
from vlm_pruner_eval.report.sheets.facts import facts
from vlm_pruner_eval.report.sheets.paper import beside_the_paper
from vlm_pruner_eval.report.sheets.scores import contests, differences, power
from vlm_pruner_eval.report.sheets.strata import capabilities, hard_subsets
from vlm_pruner_eval.report.sheets.table import Table, of_facts
from vlm_pruner_eval.report.show.gallery import Picture
from vlm_pruner_eval.report.stats.comparisons import Comparisons
from vlm_pruner_eval.report.stats.strata import Stratum
from vlm_pruner_eval.store.files import write_atomic

_SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class Notice:
    """A line at the top of the page; `bad` when it takes something away from the numbers."""

    text: str
    bad: bool = False


@dataclass(frozen=True)
class Drawing:
    """A figure: its <svg> element and its words."""

    svg: str
    title: str
    legend: str


@dataclass(frozen=True)
class Shown:
    """A picture of the gallery, its image as a data URI."""

    source: str
    title: str
    alt: str
    question: str
    gold: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Section:
    """A part of the page; `folded` tables open on a click."""

    id: str
    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    pictures: tuple[Shown, ...] = ()
    folded: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to read."""
        return not (self.text or self.tables or self.drawings or self.pictures or self.folded or self.notes)


@dataclass(frozen=True)
class Page:
    """Everything that the template shows."""

    title: str
    summary: str
    notices: tuple[Notice, ...]
    sections: tuple[Section, ...]


def write_html(
    results: Results,
    rows: Sequence[Row],
    comparisons: Comparisons,
    paper: PaperTable | None,
    figures: Mapping[str, Sequence[Path]],
    pictures: Sequence[Picture],
    *,
    efficiency: Sequence[EfficiencyRow] = (),
    strata: Sequence[Stratum] = (),
) -> Path:
    """Write report.html into the results directory.

    Parameters
    ----------
    figures
        What `figures.all.draw_all` returned; the .svg files are put into the page.
    pictures
        What `show.gallery.gallery` returned.
    efficiency, strata
        Rows of the tables of costs, and of capabilities and the hard subset; a table without rows is left out.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ConfigError
        A picture that is neither PNG nor JPEG.
    """
    sections = (
        _scores(results, rows, comparisons),
        _paper(results, paper),
        _differences(results, rows, comparisons),
        _costs(rows, efficiency),
        _strata(rows, strata),
        Section("figures", "Figures", drawings=tuple(_drawings(figures))),
        Section("gallery", "What was kept", pictures=tuple(map(_shown, pictures))),
        _provenance(results),
    )
    notices = tuple(_notices(results, rows, paper))
    page = Page(results.name, _summary(results), notices, tuple(section for section in sections if not section.empty))
    path = results.store.root / "report.html"
    write_atomic(path, render(page))
    return path


def render(page: Page) -> str:
    """The page as HTML; everything but the drawings is escaped."""
    return _environment().get_template("report.html.jinja").render(page=page)


@cache
def _environment() -> Environment:
    loader = PackageLoader("vlm_pruner_eval.report.html", "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def _summary(results: Results) -> str:
    finished, model = sum(run.finished for run in results.runs), results.config["model"]
    tasks = len(results.tasks)
    limit = results.config["limit"]
    questions = "all their questions" if limit is None else f"the first {limit} questions of each"
    return (
        f"{model['pretrained']}, protocol {model['protocol']}: {finished} of {len(results.runs)} runs finished on {tasks} "
        f"benchmark{'' if tasks == 1 else 's'}, {questions}."
    )


def _notices(results: Results, rows: Sequence[Row], paper: PaperTable | None) -> Iterator[Notice]:
    if is_plumbing(results.tasks):
        yield Notice(PLUMBING)
    if results.not_run:
        yield Notice(f"Not run yet: {', '.join(results.not_run)}.", bad=True)
    for problem in (problem for row in rows for problem in row.problems):
        yield Notice(f"Failed, and in no average: {problem}", bad=True)
    for note in results.notes:
        yield Notice(note)
    if paper is None:
        yield Notice("No numbers are printed for this checkpoint, so nothing is held against the paper.")
    else:
        yield Notice(f"{paper.verdict} {paper.setting}", bad=paper.gate.stops)


def _scores(results: Results, rows: Sequence[Row], comparisons: Comparisons) -> Section:
    return Section("scores", "Scores", tables=(scores(results, rows, comparisons),), notes=comparisons.notes)


def _differences(results: Results, rows: Sequence[Row], comparisons: Comparisons) -> Section:
    return Section(
        "differences",
        "Differences, and what they can show",
        tables=_there(differences(rows, results, comparisons, coloured=True), power(results, comparisons)),
        folded=_there(contests(results, comparisons)),
    )


def _there(*tables: Table | None) -> tuple[Table, ...]:
    return tuple(table for table in tables if table is not None)


def _paper(results: Results, paper: PaperTable | None) -> Section:
    table = None if paper is None else beside_the_paper(paper, results.tasks)
    notes = () if paper is None else (*map(str, paper.footnotes), *paper.differences)
    return Section("paper", "Beside the paper", tables=_there(table), notes=notes)


def _costs(rows: Sequence[Row], efficiency: Sequence[EfficiencyRow]) -> Section:
    return Section("costs", "Tokens, memory and time", tables=_there(tokens(rows), costs(rows, efficiency)))


def _strata(rows: Sequence[Row], strata: Sequence[Stratum]) -> Section:
    tables = _there(capabilities(rows, strata), hard_subsets(strata))
    return Section("strata", "By capability, and on hard documents", tables=tables)


def _drawings(figures: Mapping[str, Sequence[Path]]) -> Iterator[Drawing]:
    for name, paths in figures.items():
        words = WORDS[name]
        for path in paths:
            if path.suffix == ".svg":
                drawn = svg.inline(path, name=name, title=words.title, description=words.description)
                yield Drawing(drawn, words.title, words.legend)


def _shown(picture: Picture) -> Shown:
    return Shown(data_uri(picture.png), picture.title, picture.alt, picture.question, picture.gold, picture.answers)


def _provenance(results: Results) -> Section:
    table = of_facts(list(facts(results)), id="table-provenance", caption="Model, settings, versions and device")
    return Section("provenance", "Where these numbers come from", tables=(table,))


def data_uri(content: bytes) -> str:
    """A PNG or JPEG as a URI that holds it."""
    for signature, kind in _SIGNATURES.items():
        if content.startswith(signature):
            return f"data:{kind};base64,{base64.b64encode(content).decode()}"
    raise ConfigError(f"gallery: got an image that begins with {content[:4]!r}, expected PNG or JPEG.")
