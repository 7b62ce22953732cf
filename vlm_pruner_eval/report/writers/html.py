"""report.html: the whole report as one page that needs no other file, no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.contents import Report
from vlm_pruner_eval.report.figures.report_figures import WORDS
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.show.gallery import Picture
from vlm_pruner_eval.report.tables.columns import SIGNIFICANT
from vlm_pruner_eval.report.tables.table_layout import facts

_SIGNATURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"<?xml": "image/svg+xml"}
_COLOURS = f"Green: better than unpruned; red: worse; p below {SIGNIFICANT}."


def html(report: Report, figures: Mapping[str, Sequence[Path]], pictures: Sequence[Picture]) -> str:
    """Write the page; everything is escaped.

    Parameters
    ----------
    figures
        Of `draw_all`; the .svg files are put into the page.
    pictures
        Of `gallery`.

    Raises
    ------
    ConfigError
        A picture that is neither PNG nor JPEG.
    """
    return _template().render(
        title=report.results.name,
        summary=_summary(report.results),
        remarks=list(report.remarks()),
        sections=[section for section in _sections(report, figures, pictures) if any(section["parts"].values())],
    )


def _sections(report: Report, figures: Mapping[str, Sequence[Path]], pictures: Sequence[Picture]) -> Iterator[dict[str, Any]]:
    """Id, title and parts (of which a section has some) of every section."""
    tables = {table.id: table for table in [*report.tables, facts(report.results)] if table.on_pages}

    def section(id: str, title: str, *names: str, **parts: Sequence[object]) -> dict[str, Any]:
        shown = [tables[name] for name in names if name in tables]
        return {"id": id, "title": title, "parts": {"tables": shown} | parts}

    drawings = [(path.read_bytes(), WORDS[name]) for name, paths in figures.items() for path in paths if path.suffix == ".svg"]
    paper = () if report.paper is None else report.paper.differences
    folded = {name: [tables[name]] if name in tables else [] for name in ("contests", "printed")}
    colours = [_COLOURS] if "differences" in tables else []
    yield section("scores", "Scores", "scores", notes=report.comparisons.notes)
    yield section("paper", "Beside the paper", "paper", folded=folded["printed"], notes=paper)
    yield section("differences", "Differences, and what they can show", "differences", "power", text=colours, folded=folded["contests"])
    yield section("costs", "Tokens, memory and time", "tokens", "costs")
    yield section("strata", "By capability, and on hard documents", "capabilities", "hard")
    yield section("figures", "Figures", drawings=drawings)
    yield section("gallery", "What was kept", pictures=pictures)
    yield section("provenance", "Where these numbers come from", "provenance")


@cache
def _template() -> Any:
    loader = PackageLoader("vlm_pruner_eval.report.writers", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = data_uri
    return environment.get_template("report.html.jinja")


def _summary(results: Results) -> str:
    finished, model, limit = sum(run.finished for run in results.runs), results.config["model"], results.config["limit"]
    tasks = len(results.tasks)
    questions = "all their questions" if limit is None else f"the first {limit} questions of each"
    return (
        f"{model['pretrained']}, protocol {model['protocol']}: {finished} of {len(results.runs)} runs finished on {tasks} "
        f"benchmark{'' if tasks == 1 else 's'}, {questions}."
    )


def data_uri(content: bytes) -> str:
    """A PNG, JPEG or SVG as a URI that holds it."""
    for signature, kind in _SIGNATURES.items():
        if content.startswith(signature):
            return f"data:{kind};base64,{base64.b64encode(content).decode()}"
    raise ConfigError(f"gallery: got an image that begins with {content[:4]!r}, expected PNG or JPEG.")
