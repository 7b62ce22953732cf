"""Rows, and the tables that every writer makes of them."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
from report_sweeps import as_embedded, copied, edit, edit_grid, folder, markdown_of
from rich.console import Console

from vlm_pruner_eval.report import text as words
from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.contents import Report, report_of
from vlm_pruner_eval.report.load import Results, load_sweep
from vlm_pruner_eval.report.rows import PLUMBING, Cell, Row, is_plumbing, relative_average, rows_of
from vlm_pruner_eval.report.tables import columns
from vlm_pruner_eval.report.tables.table import Column, Entry, Group, Line, Table
from vlm_pruner_eval.report.writers.latex import latex
from vlm_pruner_eval.report.writers.screen import WIDTH, print_tables
from vlm_pruner_eval.store.summaries import Tokens


@pytest.fixture(scope="module")
def good() -> Report:
    return report_of(load_sweep(folder("good")))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of the report of "good"."""
    root = copied("good", tmp_path_factory.mktemp("built"))
    (root / "tables").mkdir()
    (root / "tables" / "stale.tex").write_text("of an earlier report")
    before = set(root.iterdir())
    paths = build(root)
    assert set(root.iterdir()) - before <= set(paths.values())
    return paths


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    return copied("good", tmp_path)


def rows(root: Path) -> dict[tuple[str, str | None], Row]:
    return {row.key: row for row in rows_of(load_sweep(root))}


def screen(results: Results, listed: list[Row]) -> list[str]:
    console = Console(file=io.StringIO(), record=True, width=250)
    print_tables(console, results, listed)
    return console.export_text().splitlines()


# ---- rows
def test_an_average_over_other_benchmarks_is_no_average() -> None:
    assert relative_average({"a": 1.0, "b": None}, {"a": 2.0, "b": 2.0}) is None
    assert relative_average({"a": 1.0, "b": 1.0}, {"a": 2.0}) is None
    assert relative_average({"a": 1.0}, {"a": 0.0}) is None
    assert relative_average({}, {}) is None
    assert relative_average({"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 2.0}) == 100.0


def test_rows_come_unpruned_first_then_by_rate_and_blind_last(good: Report) -> None:
    assert [(row.label, row.heading) for row in good.rows] == [
        ("unpruned", "unpruned"),
        ("vlmpruner", "66.7 % removed (2/3)"),
        ("random", "66.7 % removed (2/3)"),
        ("vlmpruner", "88.9 % removed (8/9)"),
        ("random", "88.9 % removed (8/9)"),
        ("blind", "no visual token"),
    ]
    unpruned, pruned = good.rows[:2]
    assert unpruned.relative.value == 100.0
    tokens = pruned.tokens
    assert (tokens.asked.mean, tokens.kept.mean, tokens.layer_averaged.mean) == (12.0, 12.0, 24.0)
    assert (tokens.quirks, pruned.prefill_ms["median"]) == ({"stall": 12}, 8.0)
    cell = pruned.cells["tiny_mean"]
    assert cell.low < cell.value < cell.high
    assert pruned.relative.value == pytest.approx(50 * sum(pruned.cells[task].value / unpruned.cells[task].value for task in pruned.cells))


def test_seeds_become_a_mean_and_a_deviation(good: Report) -> None:
    row = good.rows[2]
    values = [run.scores["tiny_mean"] for run in good.results.runs if run.run_id in row.runs]
    mean = sum(values) / 3
    cell = row.cells["tiny_mean"]
    assert (cell.value, cell.sd) == pytest.approx((mean, (sum((value - mean) ** 2 for value in values) / 2) ** 0.5))
    assert (cell.seeds, cell.low, row.relative.seeds) == (3, None, 3)


def test_a_failed_run_says_so_and_enters_nothing(tmp_path: Path) -> None:
    root = copied("bad", tmp_path)
    row = rows(root)["vlmpruner", "2/3"]
    assert (row.status, row.cells, row.relative.value, row.tokens.kept, row.costs) == ("failed", {}, None, None, None)
    assert "samples failed" in row.problems[0] and rows(root)["random", "2/3"].status == "finished"
    text = markdown_of(root)
    assert "| vlmpruner | failed | failed | n/a |" in text
    assert re.search(r"vlmpruner-2of3: 1 of 12 samples failed \(first: tiny_mean.* 1 of 12 samples failed \(first: tiny_pairs", text)


def test_a_missing_run_is_not_run_and_a_missing_seed_is_named(changed: Path) -> None:
    for key in ("vlmpruner-8of9", "random-8of9-seed1"):
        next(changed.glob(f"runs/{key}-*/tiny_pairs/record.json")).unlink()
    found = rows(changed)
    assert (found["vlmpruner", "8/9"].status, found["vlmpruner", "8/9"].cells) == ("not run", {})
    assert (found["random", "8/9"].status, found["random", "8/9"].cells["tiny_mean"].seeds) == (
        "2 of 3 seeds finished",
        2,
    )
    text = markdown_of(changed)
    assert "Not run yet: vlmpruner-8of9, random-8of9-seed1." in text
    assert "| vlmpruner | not run | not run | n/a |" in text


def test_without_the_unpruned_run_there_is_no_average(changed: Path) -> None:
    next(changed.glob("runs/unpruned-*/run.json")).unlink()
    assert {row.relative.value for row in rows(changed).values()} == {None}
    shutil.rmtree(changed / "runs")
    assert "| unpruned | not run | not run | n/a |" in markdown_of(changed)


def test_runs_of_an_older_grid_are_left_out_and_other_processors_pointed_out(changed: Path) -> None:
    edit_grid(changed, lambda grid: grid.update(runs=[run for run in grid["runs"] if run["method"] != "random"]))
    edit(changed, "blind", lambda record: record["provenance"].update(processor="Abacus"))
    results = load_sweep(changed)
    assert {run.method for run in results.runs} == {"none", "vlmpruner", "blind"}
    assert "6 older runs" in results.notes[0]
    assert "Abacus" in results.notes[1]


# ---- the screen
@pytest.mark.parametrize("which", ["good", "bad"])
def test_the_table_on_the_screen_fits_a_hundred_columns(which: str) -> None:
    results = load_sweep(folder(which))
    lines = screen(results, rows_of(results))
    assert max(map(len, lines)) <= WIDTH
    text = " ".join(" ".join(lines).split())
    assert "unpruned" in text and "88.9 %" in text and "ms: prefill of a batch." in text and "GFLOPs" not in text
    assert ("samples failed" in text) == (which == "bad")


def test_rows_without_times_show_their_arithmetic_instead(good: Report) -> None:
    untimed = [replace(row, prefill_ms=None) if row.method == "vlmpruner" else row for row in good.rows]
    lines = screen(good.results, untimed)
    said = " ".join(" ".join(lines).split())
    assert "GFLOPs: exact, of one prompt's prefill" in said and "ms: " not in said
    last = [line.split()[-1] for line in lines if line.split()[:1] in (["removed"], ["none"], ["66.7"])]
    assert last == ["GFLOPs", *(words.significant(row.costs.flops / 1e9) for row in good.rows[:2])]


def test_a_wide_sweep_is_split_into_tables(changed: Path) -> None:
    names = [f"digitscenes_task{i}" for i in range(9)]
    edit(changed, "", lambda record: record.update(scores=dict.fromkeys(names, record["scores"]["tiny_mean"])), "tiny_mean")
    results = load_sweep(changed)
    lines = screen(results, rows_of(results))
    assert max(map(len, lines)) <= WIDTH
    assert all(f"task{i}" in "\n".join(lines) for i in range(9))


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (Cell(95.0, 91.0, 99.0, n=100), "95.0 ±4"),
        (Cell(95.0, 90.6, 98.7, n=100), "95.0 ±4"),
        (Cell(100.0, 67.6, 100.0, n=8), "100.0 68–100"),
        (Cell(0.0, 0.0, 3.7, n=100), "0.0 0–4"),
        (Cell(50.0, None, None), "50.0"),
        (Cell(50.0, sd=2.0, seeds=3), "50.0 sd 2.0"),
    ],
)
def test_an_interval_with_unlike_sides_shows_its_ends(good: Report, cell: Cell, shown: str) -> None:
    assert "".join(words.cell_short(good.rows[1], cell)) == shown


# ---- files
def test_a_column_is_one_entry_of_one_list(changed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = Column("n_runs", lambda item: len(item.row.runs), "runs behind it", screen="runs")
    monkeypatch.setattr(columns, "SCORES", (*columns.SCORES, new))
    paths = build(changed)
    results = load_sweep(changed)
    line = next(line for line in screen(results, rows_of(results)) if " random " in line)
    assert line.split()[-1] == "3"
    for path in (paths["md"], paths["html"], paths["tables"] / "scores.tex"):
        assert "runs behind it" in path.read_text()
    read = pandas.read_csv(paths["tables"] / "scores.csv")
    assert set(read[read.label == "random"].n_runs) == {3}


def test_the_files_hold_the_same_numbers(built: dict[str, Path], good: Report) -> None:
    row = good.rows[1]
    cell = row.cells["tiny_mean"]
    held = json.loads(built["json"].read_text())
    assert [line["label"] for line in held["rows"]] == [row.label for row in good.rows]
    assert held["rows"][1]["cells"]["tiny_mean"]["value"] == cell.value and len(held["runs"]) == 10
    assert len(held["comparisons"]["cells"]) == len(good.comparisons.cells) > 0
    assert held["rows"][1]["costs"]["flops"] == row.costs.flops
    read = pandas.read_csv(built["tables"] / "scores.csv")
    assert len(read) == len(good.rows) * 2
    line = read.loc[2].to_dict()
    assert (line["method"], line["task"], line["score"]) == ("vlmpruner", "tiny_mean", cell.value)
    assert (line["tokens_kept"], line["quirks"]) == (12, "stall=12")
    removed = dict(zip(read.label, read.removed_percent, strict=True))
    assert (removed["unpruned"], removed["blind"]) == (0.0, 100.0), "rows without a rate fall out of no plot"
    text = built["md"].read_text()
    # bold: it beats random on these documents, and the interval of that difference excludes 0
    assert f"| vlmpruner | **{cell.value:.1f}** [{cell.low:.1f}–{cell.high:.1f}] |" in text
    quirk = ("mended here: stall 12 of 24", "stall: VLM-Pruner stops")
    for fact in ("somewhere/tiny", "| protocol | hf |", "the first 12", "torch ", "score / unpruned score", *quirk):
        assert fact in text


def test_the_tables_as_numbers_hold_the_comparisons(built: dict[str, Path], good: Report) -> None:
    read = {path.stem: pandas.read_csv(path) for path in built["tables"].glob("*.csv")}
    assert read.keys() == {table.id for table in good.tables} >= {"scores", "differences", "power", "pairs", "tokens", "costs"}
    for name, task in (("scores", "tiny_mean"), ("differences", "tiny_mean"), ("differences", "Avg")):
        held = read[name]
        (line,) = held[(held.label == "vlmpruner") & (held.asked_rate == "8/9") & (held.task == task)].to_dict("records")
        cell = good.comparisons.of("vlmpruner", "8/9", task)
        assert (line["difference"], line["difference_low_95"], line["p_holm"]) == (
            cell.difference.value,
            cell.difference.low,
            cell.p_holm,
        )
        assert (line["flip_rate"], line["gain_kept"]) == (cell.flip_rate, cell.gain_kept.value)
    assert list(read["power"].smallest) == [power.smallest for power in good.comparisons.power]
    assert list(read["pairs"].difference) == [pair.difference.value for pair in good.comparisons.pairs]
    assert set(zip(read["pairs"]["first"], read["pairs"].second, strict=True)) == {("vlmpruner", "random")}
    assert list(read["costs"].label) == [row.label for row in good.rows]


def test_every_table_is_written_as_latex_with_all_its_rows_and_columns(built: dict[str, Path], good: Report) -> None:
    tables = built["tables"]
    on_pages = [table for table in good.tables if table.on_pages]
    assert {path.stem for path in tables.glob("*.tex")} == {table.id for table in on_pages}
    for table in on_pages:
        text = (tables / f"{table.id}.tex").read_text()
        assert "somewhere/tiny, protocol hf; documents: tiny\\_mean 12" in text
        bare = text.replace(r"\{", "").replace(r"\}", "")
        assert bare.count("{") == bare.count("}")
        body = text.split(r"\toprule")[1].split(r"\bottomrule")[0].splitlines()
        lines = [line for line in body if line.endswith(r" \\") and not line.startswith(r"\multicolumn")]
        assert len(lines) == 1 + len(table.lines)
        assert {line.replace(r"\&", "").count("&") for line in lines} == {len(table.heads) - 1}
        assert text.isascii() or set(text) - set(map(chr, range(128))) <= set("’éü"), "LaTeX may not know the character"


def test_the_embedded_benchmark_is_no_evidence_and_nobody_wins(changed: Path, built: dict[str, Path]) -> None:
    assert PLUMBING not in built["md"].read_text()
    assert is_plumbing(load_sweep(as_embedded(changed)).tasks)
    paths = build(changed)
    text = paths["md"].read_text()
    assert PLUMBING in text and "**" not in text and "## Best method" not in text
    assert json.loads(paths["json"].read_text())["note"] == PLUMBING


def test_tables_are_true_of_every_format(built: dict[str, Path]) -> None:
    """In Markdown and LaTeX small print stands in brackets beside its number, and nothing is coloured."""
    plain = built["md"].read_text() + "".join(path.read_text() for path in built["tables"].glob("*.tex"))
    assert not re.search(r"[Uu]nder a score|under it|in report\.html|[Gg]reen|\b[Rr]ed\b", plain)
    assert "Green: better than unpruned; red: worse" in built["html"].read_text()


HOSTILE = Table(
    "t",
    "50 % of A_1 & B",
    (
        Column("", lambda item: "1.0", "score", lambda value, item: item[0]),
        Column("", lambda item: "w", "words", lambda value, item: item[1], words=True),
    ),
    (
        Group("88.9 % removed", (Line("[x] ~$#^{}\\", ((Entry("1.0", ("0.5–1.5",), best=True), Entry("a_b")),)),)),
        Group("", (Line("y", ((Entry("2.0", ("± 0.1",)), Entry("-0.2", ("-0.3 to 0.0", "p < 0.001"))),)),)),
    ),
    legend=("4nd² × 2",),
)


def test_latex_is_booktabs_with_everything_escaped() -> None:
    lines = latex(HOSTILE, caption="tiny, 12 documents").splitlines()
    assert r"\caption{50 \% of A\_1 \& B. tiny, 12 documents}" in lines
    assert r"\begin{tabular}{lrl}" in lines
    assert r"\multicolumn{3}{l}{\emph{88.9 \% removed}} \\" in lines
    # a row that begins with [ would be read as the argument of the line break before it
    hostile = r"{[}x{]} \textasciitilde{}\$\#\textasciicircum{}\{\}\textbackslash{}"
    assert rf"{hostile} & \textbf{{1.0}} {{\scriptsize [0.5--1.5]}} & a\_b \\" in lines
    assert r"y & 2.0 {\scriptsize $\pm$ 0.1} & -0.2 {\scriptsize [-0.3 to 0.0; p $<$ 0.001]} \\" in lines
    assert r"\par\smallskip\footnotesize 4nd$^2$ $\times$ 2" in lines


# ---- misbehaviours of releases
def test_misbehaviours_are_counted_of_samples_and_say_if_they_acted(good: Report) -> None:
    row = replace(good.rows[1], tokens=Tokens(quirks={"stall": 24, "repeats": 2}, samples_with_images=48))
    assert words.quirks(row) == "mended here: repeats 2 of 48, stall 24 of 48"
    release = replace(row, params=row.params | {"official_quirks": True})
    assert words.quirks(release) == "acted: stall 24 of 48; mended here: repeats 2 of 48"
    assert words.quirks(replace(row, tokens=Tokens())) == "none"
    shown = " ".join(" ".join(screen(good.results, [release])).split())
    assert "VLM-Pruner stops when a pass adds nothing" in shown and "acted: stall 24 of 48" in shown


def test_every_misbehaviour_that_a_method_counts_has_words() -> None:
    told = "".join(path.read_text() for path in (Path(words.__file__).parent.parent / "pruners").rglob("*.py"))
    counted = set(re.findall(r'"(\w+)": ', "".join(re.findall(r"fired = \{.*?\n?.*?\}\n", told, re.DOTALL)))) | {"repeats"}
    assert {"stall", "count", "set_order"} <= counted <= set(words.QUIRKS)
