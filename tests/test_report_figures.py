"""The figures: what stands on them, what is left out, and that the same results give the same bytes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from PIL import Image
from vlm_pruner_eval.report.figures.all import WORDS, costs, draw_all
from vlm_pruner_eval.report.html.svg import inline

from vlm_pruner_eval.report.figures import pareto, radar, rates, style
from vlm_pruner_eval.report.figures.pareto import Cost, front, points_of
from vlm_pruner_eval.report.load import Results
from vlm_pruner_eval.report.rows import Cell, Row
from vlm_pruner_eval.report.stats.comparisons import AVERAGE, Comparison, Comparisons
from vlm_pruner_eval.report.stats.paired import Estimate
from vlm_pruner_eval.sweep.store import Store

TASKS = ["gqa", "mme", "pope", "ocrbench"]
SVG = "{http://www.w3.org/2000/svg}"


def row(label: str, rate: str | None, relative: float | None, *, method: str = "vlmpruner", by: float = 1.0, **changes: Any) -> Row:
    """A row whose scores are `by` of 60, 1800, 85 and 300."""
    full = dict(zip(TASKS, (60.0, 1800.0, 85.0, 300.0), strict=True))
    cells = {task: Cell(by * value, by * value * 0.98, by * value * 1.01, n=100) for task, value in full.items()}
    rest = dict.fromkeys(("asked", "kept", "layer_averaged", "prefill_ms", "selection_ms"))
    made = Row(label, method, rate, "finished", cells, Cell(relative), **rest, quirks={}, problems=(), asked_rate=rate)
    return dataclasses.replace(made, **changes)


@pytest.fixture
def rows() -> list[Row]:
    return [
        row("unpruned", None, 100.0, method="none"),
        row("VLM-Pruner", "2/3", 98.0, by=0.98),
        row("_$odd{<&>", "2/3", 95.0, method="fastv", by=0.95),
        row("VLM-Pruner", "8/9", 94.0, by=0.94),
        row("_$odd{<&>", "8/9", 84.0, method="fastv", by=0.84),
        row("blind", None, 40.0, method="blind", by=0.4),
    ]


def texts(path: Path) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ET.parse(path).iter(f"{SVG}text")]


# ---- accuracy against rate
def test_every_benchmark_has_a_panel_and_every_method_a_line(rows: list[Row], tmp_path: Path) -> None:
    png, svg = rates.draw(rows, TASKS, tmp_path / "rates")
    found = texts(svg)
    assert {style.AVERAGE, *TASKS, "VLM-Pruner", "_$odd{<&>", "unpruned", "66.7", "88.9"} <= set(found)
    assert found.count("VLM-Pruner") == 1, "one legend for all panels"
    with Image.open(png) as image:
        assert image.width > 1500
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 20


def test_the_same_rows_give_the_same_bytes_and_other_rows_do_not(rows: list[Row], tmp_path: Path) -> None:
    first = [path.read_bytes() for path in rates.draw(rows, TASKS, tmp_path / "a")]
    assert [path.read_bytes() for path in rates.draw(rows, TASKS, tmp_path / "a")] == first
    wider = dataclasses.replace(rows[1], cells=rows[1].cells | {"gqa": dataclasses.replace(rows[1].cells["gqa"], low=40.0)})
    changed = rates.draw([rows[0], wider, *rows[2:]], TASKS, tmp_path / "b")
    assert changed[1].read_bytes() != first[1], "an interval is part of the picture"


def test_a_row_far_below_is_named_instead_of_flattening_the_others(rows: list[Row], tmp_path: Path) -> None:
    _, svg = rates.draw(rows, TASKS, tmp_path / "rates")
    assert "↓ blind 24.0" in texts(svg)
    assert "↓ blind 40.0" in texts(svg), "the panel of averages too"
    near = [*rows[:-1], row("blind", None, 86.0, method="blind", by=0.86)]
    _, svg = rates.draw(near, TASKS, tmp_path / "near")
    assert not any("↓" in found for found in texts(svg))
    assert "blind" in texts(svg)


def test_ends_of_an_interval_always_hold_the_score() -> None:
    assert style.bounds(Cell(50.0, 48.0, 53.0)) == (48.0, 53.0)
    assert style.bounds(Cell(50.0, 51.0, 53.0)) == (50.0, 53.0)
    assert style.bounds(Cell(50.0, sd=2.0)) == (48.0, 52.0)
    assert style.bounds(Cell(50.0)) == (50.0, 50.0)


def test_an_iso_compute_row_stands_at_its_own_rate_without_a_tick(rows: list[Row], tmp_path: Path) -> None:
    iso = row("iso", 0.5, 97.0, by=0.97, asked_rate="8/9", iso_layer=2)
    _, svg = rates.draw([*rows, iso], TASKS, tmp_path / "rates")
    found = texts(svg)
    assert "iso" in found
    assert "50.0" not in found


def test_methods_keep_colour_and_marker_apart() -> None:
    many = [row(f"m{i}", "2/3", 90.0) for i in range(40)]
    assert len(set(style.looks(many).values())) == 40


# ---- the front
def test_the_front_is_what_no_other_row_beats(rows: list[Row]) -> None:
    costs = {
        ("unpruned", None): 10.0,
        ("VLM-Pruner", "2/3"): 6.0,
        ("_$odd{<&>", "2/3"): 6.0,
        ("VLM-Pruner", "8/9"): 4.0,
        ("blind", None): 1.0,
    }
    points = points_of(rows, Cost("ms", costs))
    assert [point.row.label for point in points] == ["unpruned", "VLM-Pruner", "_$odd{<&>", "VLM-Pruner"], "blind and the unknown are out"
    assert [(point.cost, point.score) for point in front(points)] == [(4.0, 94.0), (6.0, 98.0), (10.0, 100.0)]


def test_ties_are_all_on_the_front_and_a_dearer_equal_is_not() -> None:
    same = [row("a", "2/3", 90.0), row("b", "2/3", 90.0), row("c", "2/3", 90.0)]
    points = points_of(same, Cost("ms", {("a", "2/3"): 2.0, ("b", "2/3"): 2.0, ("c", "2/3"): 3.0}))
    assert [point.row.label for point in front(points)] == ["a", "b"]


def test_pareto_has_a_panel_for_each_cost_that_is_known(rows: list[Row], tmp_path: Path) -> None:
    known = {item.key: cost for item, cost in zip(rows, (10.0, 6.0, 6.0, 4.0, 4.0, 1.0), strict=True)}
    paths = pareto.draw(rows, [Cost("time, ms", known), Cost("GFLOPs", {})], TASKS, tmp_path / "pareto")
    found = texts(paths[1])
    assert {"time, ms", style.AVERAGE, pareto.FRONT, "88.9 %"} <= set(found)
    assert "GFLOPs" not in found
    assert pareto.draw(rows, [Cost("GFLOPs", {})], TASKS, tmp_path / "none") == []
    assert not (tmp_path / "none.svg").exists()


def test_times_of_other_machines_or_batches_are_no_axis(rows: list[Row], tmp_path: Path) -> None:
    results = stand_in(tmp_path)
    assert [cost.label for cost in costs(results)] == ["prefill of a batch, ms (median)", "prefill of a prompt, GFLOPs (mean)"]
    results.runs[0].record["provenance"]["processor"] = "Abacus"
    assert [cost.label for cost in costs(results)] == ["prefill of a prompt, GFLOPs (mean)"]


# ---- the radar
def test_the_radar_shows_percent_of_unpruned_on_every_axis(rows: list[Row], tmp_path: Path) -> None:
    assert radar.relative_scores(rows[3], rows[0], TASKS) == pytest.approx([94.0] * 4)
    _, svg = radar.draw(rows, TASKS, tmp_path / "radar")
    found = texts(svg)
    assert {*TASKS, "66.7 % removed (2/3)", "88.9 % removed (8/9)", "VLM-Pruner", "unpruned"} <= set(found)
    assert "blind" not in found
    assert radar._rings([84.0, 98.0]) == [80, 85, 90, 95, 100]
    assert radar._rings([0.0, 120.0]) == [0, 25, 50, 75, 100, 125]
    assert radar._rings([60.0, 400.0]) == [0, 100, 200, 300, 400]
    assert len(radar._rings([0.0, 7000.0])) < 10


def test_a_radar_names_the_benchmarks_that_have_no_axis(rows: list[Row], tmp_path: Path) -> None:
    zero = dataclasses.replace(rows[0], cells=rows[0].cells | {"ocrbench": Cell(0.0)})
    _, svg = radar.draw([zero, *rows[1:]], TASKS, tmp_path / "radar")
    found = texts(svg)
    assert "ocrbench" not in found and "gqa" in found
    assert "no score above 0 there: ocrbench." in " ".join(found)


def test_a_radar_needs_three_benchmarks_and_whole_rows(rows: list[Row], tmp_path: Path) -> None:
    assert radar.draw(rows, TASKS[:2], tmp_path / "two") == []
    assert radar.draw(rows[1:], TASKS, tmp_path / "no_unpruned") == []
    hollow = dataclasses.replace(rows[1], cells=rows[1].cells | {"gqa": Cell(None)}, label="hollow")
    _, svg = radar.draw([*rows, hollow], TASKS, tmp_path / "hollow")
    assert "hollow" not in texts(svg)


# ---- all of them
def stand_in(root: Path) -> Results:
    from vlm_pruner_eval.report.load import RunResult

    times = {"prefill_ms": {"median": 5.0, "iqr": 1.0}, "selection_ms": None, "decode_ms": None, "batch_sizes": [1]}
    tasks = {task: {"main": {"metric": "m", "value": 50.0, "low": 40.0, "high": 60.0, "n": 9}, "metrics": {}} for task in TASKS}
    tokens = {"asked": None, "kept": None, "layer_averaged": None, "quirks": {}}
    runs = []
    for label, method, rate in (("unpruned", "none", None), ("VLM-Pruner", "vlmpruner", "2/3")):
        memory = {"flops": {"mean": 7e9}}
        record = {"tasks": tasks, "tokens": tokens, "times": times, "memory": memory, "provenance": {"processor": "P"}, "config": {}}
        runs.append(RunResult(label, label, label, method, rate, None, "finished", record, asked_rate=rate))
    return Results(Store(root), "name", {"tasks": TASKS, "model": {}}, tuple(runs), ())


def test_all_figures_are_drawn_and_old_ones_are_removed(rows: list[Row], tmp_path: Path) -> None:
    results = stand_in(tmp_path)
    drawn = draw_all(rows, results, tmp_path / "out")
    assert set(drawn) == set(WORDS) == {"accuracy_vs_rate", "pareto", "radar"}
    assert {path.name for paths in drawn.values() for path in paths} == {path.name for path in (tmp_path / "out").iterdir()}
    again = draw_all(rows[:1], results, tmp_path / "out")
    assert set(again) == {"accuracy_vs_rate"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"accuracy_vs_rate.png", "accuracy_vs_rate.svg"}


def test_intervals_of_averages_come_from_the_comparisons(rows: list[Row], tmp_path: Path) -> None:
    results = stand_in(tmp_path)
    plain = draw_all(rows, results, tmp_path / "a")["accuracy_vs_rate"][1].read_bytes()
    compared = Comparisons((Comparison("VLM-Pruner", "2/3", AVERAGE, Estimate(98.0, 80.0, 99.0)),))
    assert draw_all(rows, results, tmp_path / "b", compared)["accuracy_vs_rate"][1].read_bytes() != plain


# ---- in a page
def test_an_inlined_figure_keeps_its_references_and_takes_the_pages_colours(rows: list[Row], tmp_path: Path) -> None:
    _, svg = rates.draw(rows, TASKS, tmp_path / "rates")
    page = inline(svg, name="one", title="A <title>", description="Told & shown")
    root = ET.fromstring(page)
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    assert all(name.startswith("one-") for name in ids)
    used = re.findall(r"url\(#([^)]+)\)", page) + [element.attrib["href"][1:] for element in root.iter() if "href" in element.attrib]
    assert len(used) > 20
    assert set(used) <= set(ids)
    assert (root[0].tag, root[0].text, root[1].tag, root[1].text) == ("title", "A <title>", "desc", "Told & shown")
    assert "xmlns" not in page
    assert "http" not in page
    assert style.INK not in page
    assert "var(--ink)" in page
    assert "_$odd{<&>" in ["".join(element.itertext()).strip() for element in root.iter("text")]
