"""report.html: one file that needs nothing else, readable by eye, keyboard and screen reader, and safe against its own content."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from html_reader import Reader
from PIL import Image
from report_sweeps import HOSTILE, RELEASE, folder
from rich.console import Console
from sweep_standin import task_manager

from vlm_pruner_eval.embedded import tasks_path
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.contents import Report
from vlm_pruner_eval.report.figures.report_figures import draw_all
from vlm_pruner_eval.report.load import load_sweep
from vlm_pruner_eval.report.paper import printed
from vlm_pruner_eval.report.paper.paper_comparison import paper_for
from vlm_pruner_eval.report.paper.printed import Erratum, Number, PrintedNumbers
from vlm_pruner_eval.report.rows import Row, rows_of
from vlm_pruner_eval.report.show.gallery import Picture
from vlm_pruner_eval.report.stats.compare import compare
from vlm_pruner_eval.report.stats.comparisons import Comparison, Comparisons, Contest
from vlm_pruner_eval.report.stats.paired import Estimate
from vlm_pruner_eval.report.stats.strata import CAPABILITIES, Stratum
from vlm_pruner_eval.report.tables.table_layout import contests, costs, scores
from vlm_pruner_eval.report.writers.html import data_uri, html
from vlm_pruner_eval.sweep.config import validate
from vlm_pruner_eval.sweep.runner import run_sweep

LABEL = RELEASE["label"]
VLM = "LLaVA-1.5-7B"


def picture(kind: str = "PNG") -> Picture:
    out = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(out, format=kind)
    words = {"title": "tiny_mean/test/3", "alt": f'Kept: "all" {HOSTILE}', "question": f"what? {HOSTILE}", "gold": "<i>no</i>"}
    return Picture(png=out.getvalue(), answers={HOSTILE: "</dd><p>yes"}, **words)


def numbers(rows: list[Row]) -> PrintedNumbers:
    """A paper that prints our unpruned scores, and for the release 0 points less on A at 2/3 and 9 more at 8/9."""
    of_key = {row.key: row.cells["tiny_mean"].value for row in rows if row.cells}
    cells = {(VLM, printed.METHODS["none"], 0.0, "A"): of_key["unpruned", None]}
    for rate, percent, by in (("2/3", 66.7, 0.0), ("8/9", 88.9, 9.0)):
        cells[VLM, "VLM-Pruner", percent, "A"] = of_key[RELEASE["label"], rate] + by
    erratum = Erratum(4, f"A is doubtful. {HOSTILE}", ((VLM, "VLM-Pruner", 88.9, "A"),))
    return PrintedNumbers({key: Number(value, "Table 1", "print") for key, value in cells.items()}, (erratum,))


@pytest.fixture(scope="module")
def made() -> Iterator[Report]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(printed, "BENCHMARKS", {"tiny_mean": "A"})
        results = load_sweep(folder("paper"))
        results = dataclasses.replace(results, grid=results.grid.model_copy(update={"name": "<b>hostile</b> & 'sweep'"}))
        rows = rows_of(results)
        strata = [
            Stratum(CAPABILITIES[0], LABEL, "vlmpruner", "2/3", Estimate(81.5, 70.25, 90.0), 24, ("tiny_mean",)),
            Stratum("hard: pool fails", LABEL, "vlmpruner", "8/9", Estimate(37.5, 12.5, 62.5), 8, ("tiny_mean",), "pool"),
        ]
        yield Report(results, rows, compare(results, rows), paper_for(results, rows, numbers(rows)), strata)


@pytest.fixture(scope="module")
def text(made: Report, tmp_path_factory: pytest.TempPathFactory) -> str:
    figures = draw_all(made.rows, made.results, tmp_path_factory.mktemp("figures"), made.comparisons)
    return html(made, figures, [picture(), picture("JPEG")])


@pytest.fixture(scope="module")
def page(text: str) -> Reader:
    return Reader(text)


def test_the_page_is_well_formed_and_says_what_it_is(page: Reader) -> None:
    assert [element.tag for element in page.elements[:2]] == ["html", "head"]
    (html,), (title,), (charset,) = page.all("html"), page.all("title"), page.all("meta")[:1]
    assert (html.attributes["lang"], charset.attributes["charset"]) == ("en", "utf-8")
    assert title.text == "<b>hostile</b> & 'sweep': report on visual-token pruning"
    levels = [int(element.tag[1]) for element in page.elements if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_ids_are_unique_and_everything_that_is_referred_to_is_there(page: Reader) -> None:
    ids = Counter(element.attributes["id"] for element in page.elements if "id" in element.attributes)
    assert max(ids.values()) == 1
    referred = set()
    for element in page.elements:
        for name, value in element.attributes.items():
            if name == "href":
                assert value.startswith("#"), f"{element.tag} leads out of the page: {value}"
                referred.add(value[1:])
            if name in ("aria-labelledby", "aria-describedby"):
                referred |= set(value.split())
            referred |= set(re.findall(r"url\(#([^)]+)\)", value))
    assert referred <= set(ids)
    assert {"content", "scores", "figures", "gallery", "provenance"} <= referred


def test_the_page_needs_no_other_file_and_no_script(page: Reader, text: str) -> None:
    assert not page.all("script") + page.all("link") + page.all("iframe")
    assert "@import" not in text
    assert not re.findall(r"(?i)https?://", text)
    sources = [value for element in page.elements for name, value in element.attributes.items() if name in ("src", "srcset")]
    assert len(sources) == 2 + 2, "two figures, two pictures"
    assert all(source.startswith("data:image/") for source in sources)
    assert not any(name.startswith("on") for element in page.elements for name in element.attributes)


def test_a_keyboard_and_a_screen_reader_find_their_way(page: Reader) -> None:
    first = page.all("a")[0]
    assert (first.attributes["href"], first.text) == ("#content", "Skip to the content")
    tables = page.all("table")
    assert len(tables) >= 8
    for start in (i for i, element in enumerate(page.elements) if element.tag == "table"):
        caption = page.elements[start + 1]
        assert caption.tag == "caption"
        assert caption.text.strip()
    assert {element.attributes["scope"] for element in page.all("th")} == {"col", "row", "rowgroup"}
    assert all(element.attributes["alt"].strip() for element in page.all("img"))
    # whatever may be wider than the window scrolls by itself, and can be scrolled without a mouse
    boxes = [element for element in page.elements if element.attributes.get("class") == "scroll"]
    assert len(boxes) == len(tables) + 2, "the figures, too"
    assert all(box.attributes["tabindex"] == "0" and box.attributes["role"] == "region" for box in boxes)
    assert all("div" in element.inside for element in tables)


def test_every_row_of_a_table_has_a_cell_for_every_column(page: Reader) -> None:
    widths: list[list[int]] = []  # of every table, of every row
    for element in page.elements:
        if element.tag == "table":
            widths.append([])
        elif element.tag == "tr":
            widths[-1].append(0)
        elif element.tag in ("th", "td"):
            widths[-1][-1] += int(element.attributes.get("colspan", 1))
    assert min(map(len, widths)) >= 2
    assert all(len(set(rows)) == 1 for rows in widths)


def test_hostile_names_are_text(page: Reader, text: str) -> None:
    assert "<script" not in text
    assert "<b>hostile" not in text
    assert len(page.table("table-scores")[HOSTILE]) == 2 * 7, "two rates: two scores, Avg, flips, gain, tokens kept and layer-averaged"
    assert page.all("img")[2].attributes["alt"] == f'Kept: "all" {HOSTILE}'
    assert "</dd><p>yes" in [element.text for element in page.all("dd")]
    assert any(f"A is doubtful. {HOSTILE}" in element.text for element in page.all("p"))


def test_the_tables_hold_the_numbers_of_the_report(page: Reader, made: Report) -> None:
    row = next(row for row in made.rows if row.key == (LABEL, "2/3"))
    cell, average = row.cells["tiny_mean"], made.comparisons.of(LABEL, "2/3", "Avg")
    found = page.table("table-scores")[LABEL]
    assert found[0] == f"{cell.value:.1f}{cell.low:.1f}–{cell.high:.1f}"
    assert found[2] == f"{row.relative.value:.1f}{average.score.low:.1f}–{average.score.high:.1f}"
    assert found[3] == f"{100 * average.flip_rate:.1f}"
    compared = made.comparisons.of(LABEL, "2/3", "tiny_mean")
    difference = page.table("table-differences")[LABEL][0]
    assert difference.startswith(f"{compared.difference.value:+.1f}{compared.difference.low:.1f} to ")
    assert f"p {compared.p_holm:.3f}" in difference
    assert f"McNemar {compared.mcnemar_p:.3f}" in difference
    (power,) = [entry for entry in made.comparisons.power if entry.task == "tiny_mean"]
    assert page.table("table-power")["mean"] == ["24", "12", f"{power.smallest:.2f}"]
    assert page.table("table-tokens")[LABEL][1:4] == ["12", "12", "24.0"]
    assert page.table("table-costs")[LABEL][0].endswith(f"{100 * row.costs.flops_share:.0f} % of unpruned")
    assert page.table("table-costs")[LABEL][4].startswith("8.00IQR 0.000")
    assert page.table("table-capabilities")[LABEL] == ["81.570.2–90.0"]
    assert page.table("table-hard")[LABEL] == ["37.512.5–62.5", "8", "tiny_mean"]


def test_failed_runs_and_the_gate_stand_at_the_top(page: Reader) -> None:
    notices = [element for element in page.all("p") if element.attributes.get("class", "").startswith("notice")]
    assert any(element.text.startswith("Failed, and in no average: blind") and "bad" in element.attributes["class"] for element in notices)
    (gate,) = [element for element in notices if "unpruned row" in element.text]
    assert gate.text.startswith("The unpruned row reproduces: 1 of 1 tasks")
    assert page.table("table-scores")["blind"][0] == "failed"


def test_the_paper_stands_beside_ours_with_verdict_and_footnote(page: Reader) -> None:
    first, second = (page.table("table-paper")[LABEL][i] for i in (0, 3))
    assert "(+0.00)equivalent" in first
    assert "(-9.00) [4]outside" in second
    kinds = {element.attributes.get("class") for element in page.all("td") if "paper " in element.text}
    assert kinds == {"good", "bad", None}, "the sane row has a printed number and no verdict"
    assert "iso" not in page.table("table-paper")
    assert any(element.text.startswith("Note 4: A is doubtful") for element in page.all("p"))


def test_the_gallery_holds_its_pictures(page: Reader) -> None:
    *figures, png, jpeg = page.all("img")
    assert {figure.attributes["src"].partition(";")[0] for figure in figures} == {"data:image/svg+xml"}
    assert base64.b64decode(png.attributes["src"].removeprefix("data:image/png;base64,")) == picture().png
    assert jpeg.attributes["src"].startswith("data:image/jpeg;base64,")
    assert "tiny_mean/test/3" in [element.text for element in page.all("h3")]
    with pytest.raises(ConfigError, match="expected PNG or JPEG"):
        data_uri(b"GIF89a")


def test_bold_is_what_the_comparison_decided_and_nothing_on_the_embedded_benchmark(made: Report) -> None:
    winner = Comparison(LABEL, "2/3", "tiny_mean", Estimate(50.0), bold=True)
    contest = Contest("tiny_mean", "2/3", LABEL, "random", Estimate(4.0, 1.0, 7.0), decided=True)

    def bold(tasks: list[str], cell: Comparison) -> list[tuple[str, int]]:
        table = scores(made.rows, tasks, Comparisons((cell,), (contest,)))
        return [(line.head, i) for line in table.lines for i, entry in enumerate(table.cells(line)) if entry.best]

    assert bold(made.results.tasks, winner) == [(LABEL, 0)]
    shown = contests(made.results.tasks, Comparisons((winner,), (contest,)))
    assert [entry.text for entry in shown.cells(shown.lines[0])] == [LABEL, "random", "+4.0", "yes"]
    assert bold(["digitscenes_x"], dataclasses.replace(winner, task="digitscenes_x")) == []
    assert contests(["digitscenes_x"], Comparisons((), (contest,))) is None


def test_columns_without_a_number_are_named_instead_of_shown(made: Report) -> None:
    rows = [dataclasses.replace(row, costs=row.costs and dataclasses.replace(row.costs, peak_bytes=None)) for row in made.rows]
    table = costs(rows)
    assert "peak memory, MiB" not in [head for head, _ in table.heads]
    assert table.legend[-1] == "Not measured here: peak memory, MiB."
    assert {record["peak_bytes"] for record in table.records()} == {None}


def test_colours_have_contrast_in_light_and_dark() -> None:
    """WCAG 2.2, 1.4.3: 4.5 : 1 for text."""
    style = (files("vlm_pruner_eval.report.writers.templates") / "style.css.jinja").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 3, "light, dark and print"
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))
        for text in ("ink", "muted", "accent", "good", "bad"):
            for ground in ("paper", "band"):
                assert contrast(colours[text], colours[ground]) >= 4.5, f"{text} on {ground}"


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_a_real_small_sweep_has_a_page_with_pictures(tmp_path: Path) -> None:
    raw = {
        "name": "real",
        "model": {"id": "vlmpruner_llava", "pretrained": "minivlm", "batch_size": 4, "visual_tokens": 576},
        "tasks": ["digitscenes_where", "digitscenes_read"],
        "pruning_rates": ["8/9"],
        "methods": ["vlmpruner", "blind"],
        "limit": 3,
        "gallery": 2,
    }
    tasks = task_manager(tasks_path(), "vlmpruner_llava")
    outcome = run_sweep(validate(raw), tmp_path, console=Console(file=io.StringIO()), task_manager=tasks)
    assert outcome.failed == 0
    page = Reader(build(tmp_path)["html"].read_text(encoding="utf-8"))
    assert len(page.all("img")) >= 2 + 2
    assert "checks the plumbing" in page.all("p")[1].text
    assert not page.all("strong")[2:], "only the titles of figures are bold: nobody wins on the embedded benchmark"
    assert page.table("table-tokens")["vlmpruner"][1:3] == ["64", "64"]
    assert float(re.match(r"[\d.]+", page.table("table-costs")["vlmpruner"][0]).group()) > 0, "FLOPs"
