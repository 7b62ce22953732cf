"""The figures: what stands on them, what is left out, and that the same results give the same bytes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from PIL import Image
from report_sweeps import copied, edit, folder

from vlm_pruner_eval.report.figures import pareto, rates, style
from vlm_pruner_eval.report.figures.pareto import Cost, front, points_of
from vlm_pruner_eval.report.figures.report_figures import WORDS, costs, draw_all
from vlm_pruner_eval.report.load import load_sweep
from vlm_pruner_eval.report.rows import Cell, Row, rows_of
from vlm_pruner_eval.report.stats.comparisons import AVERAGE, Comparison, Comparisons
from vlm_pruner_eval.report.stats.paired import Estimate

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


def test_times_of_other_machines_or_batches_are_no_axis(tmp_path: Path) -> None:
    root = copied("good", tmp_path)
    both = ["prefill of a batch, ms (median)", "prefill of a prompt, GFLOPs (mean)"]
    results = load_sweep(root)
    assert [cost.label for cost in costs(rows_of(results), results)] == both
    edit(root, "blind", lambda record: record["provenance"].update(processor="Abacus"))
    results = load_sweep(root)
    assert [cost.label for cost in costs(rows_of(results), results)] == both[1:]


# ---- all of them
def test_all_figures_are_drawn_and_old_ones_are_removed(tmp_path: Path) -> None:
    results, out = load_sweep(folder("good")), tmp_path / "out"
    listed = rows_of(results)
    drawn = draw_all(listed, results, out)
    assert set(drawn) == set(WORDS) == {"accuracy_vs_rate", "pareto"}
    assert {path.name for paths in drawn.values() for path in paths} == {path.name for path in out.iterdir()}
    plain = drawn["accuracy_vs_rate"][1].read_bytes()
    # intervals of averages come from the comparisons
    compared = Comparisons((Comparison("vlmpruner", "2/3", AVERAGE, Estimate(83.0, 80.0, 99.0)),))
    assert draw_all(listed, results, out, compared)["accuracy_vs_rate"][1].read_bytes() != plain
    assert set(draw_all(listed[:1], results, out)) == {"accuracy_vs_rate"}
    assert {path.name for path in out.iterdir()} == {"accuracy_vs_rate.png", "accuracy_vs_rate.svg"}
