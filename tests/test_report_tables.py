from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from rich.console import Console
from sweep_standin import Behaviour, StandIn, make_config, task_manager, write_tasks
from vlm_pruner_eval.report.efficiency import efficiency

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report import text as words
from vlm_pruner_eval.report.build import build, report_of
from vlm_pruner_eval.report.load import load_results
from vlm_pruner_eval.report.rows import PLUMBING, Cell, is_plumbing, relative_average, rows_of
from vlm_pruner_eval.report.writers.screen import WIDTH, print_tables
from vlm_pruner_eval.sweep.runner import run_sweep

PAPER = Path(__file__).parent.parent / "results" / "paper" / "vlm_pruner.csv"


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One sweep that went well, one in which vlmpruner failed on a sample and a seed of random broke off."""
    root = tmp_path_factory.mktemp("sweeps")
    tasks = task_manager(write_tasks(root / "tasks"))
    console = Console(file=io.StringIO())
    config = make_config(pruning_rates=["8/9", "2/3"], methods=["vlmpruner", {"name": "random", "seeds": [0, 1, 2]}, "blind"])
    run_sweep(config, root / "good", console=console, load=lambda *args, **kwargs: StandIn(), task_manager=tasks)
    behaviour = Behaviour(fail={("vlmpruner", 3)})
    run_sweep(config, root / "bad", console=console, load=lambda *args, **kwargs: StandIn(behaviour), task_manager=tasks)
    return {"good": root / "good", "bad": root / "bad"}


@pytest.fixture
def copy(sweeps: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda which: Path(shutil.copytree(sweeps[which], tmp_path / which))


def record_of(folder: Path, key: str) -> tuple[Path, dict[str, Any]]:
    (path,) = [path for path in folder.glob("runs/*/run.json") if json.loads(path.read_text())["key"] == key]
    return path, json.loads(path.read_text())


def edit(folder: Path, key: str, change: Callable[[dict[str, Any]], None]) -> None:
    path, record = record_of(folder, key)
    change(record)
    path.write_text(json.dumps(record))


def test_the_relative_average_is_the_papers() -> None:
    """Every printed average of tables 1 and 2 from its own cells: 28 of 29 match, the other is in the errata."""
    tables: dict[tuple[str, str], dict[tuple[str, str], dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    with PAPER.open() as file:
        for row in csv.DictReader(file):
            if row["table"] in ("Table 1", "Table 2"):
                tables[row["table"], row["vlm"]][row["method"], row["retained_tokens"]][row["benchmark"]] = float(row["value"])
    matched, wrong = 0, []
    for rows in tables.values():
        (reference,) = [scores for (method, _), scores in rows.items() if method.startswith("vanilla")]
        for (method, tokens), scores in rows.items():
            if not method.startswith("vanilla"):
                ours = relative_average({name: value for name, value in scores.items() if name != "Avg"}, reference)
                matched += abs(ours - scores["Avg"]) <= 0.0101
                if abs(ours - scores["Avg"]) > 0.0101:
                    wrong.append((method, tokens, scores["Avg"], round(ours, 2)))
    assert (matched, wrong) == (28, [("DivPrune", "64", 90.2, 90.01)])


def test_an_average_over_other_benchmarks_is_no_average() -> None:
    assert relative_average({"a": 1.0, "b": None}, {"a": 2.0, "b": 2.0}) is None
    assert relative_average({"a": 1.0, "b": 1.0}, {"a": 2.0}) is None
    assert relative_average({"a": 1.0}, {"a": 0.0}) is None
    assert relative_average({}, {}) is None
    assert relative_average({"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 2.0}) == 100.0


def test_rows_come_unpruned_first_then_by_rate_and_blind_last(sweeps: dict[str, Path]) -> None:
    rows = rows_of(load_results(sweeps["good"]))
    assert [(row.label, row.heading) for row in rows] == [
        ("unpruned", "unpruned"),
        ("vlmpruner", "66.7 % removed (2/3)"),
        ("random", "66.7 % removed (2/3)"),
        ("vlmpruner", "88.9 % removed (8/9)"),
        ("random", "88.9 % removed (8/9)"),
        ("blind", "no visual token"),
    ]
    unpruned, pruned = rows[0], rows[1]
    assert unpruned.relative.value == 100.0
    assert (pruned.asked["mean"], pruned.kept["mean"], pruned.layer_averaged) == (12.0, 12.0, 24.0)
    assert (pruned.quirks, pruned.prefill_ms["median"]) == ({"stall": 12}, 20.0)
    cell = pruned.cells["tiny_mean"]
    assert cell.low < cell.value < cell.high
    assert pruned.relative.value == pytest.approx(50 * sum(pruned.cells[task].value / unpruned.cells[task].value for task in pruned.cells))


def test_seeds_become_a_mean_and_a_deviation(sweeps: dict[str, Path]) -> None:
    row = rows_of(load_results(sweeps["good"]))[2]
    values = [record_of(sweeps["good"], f"random-2of3-seed{seed}")[1]["tasks"]["tiny_mean"]["main"]["value"] for seed in range(3)]
    mean = sum(values) / 3
    assert row.cells["tiny_mean"].value == pytest.approx(mean)
    assert row.cells["tiny_mean"].sd == pytest.approx((sum((value - mean) ** 2 for value in values) / 2) ** 0.5)
    assert (row.cells["tiny_mean"].seeds, row.cells["tiny_mean"].low) == (3, None)
    assert row.relative.seeds == 3


def test_a_failed_run_says_so_and_enters_nothing(sweeps: dict[str, Path]) -> None:
    rows = {(row.label, row.pruning_rate): row for row in rows_of(load_results(sweeps["bad"]))}
    row = rows["vlmpruner", "2/3"]
    assert (row.status, row.cells, row.relative.value, row.kept) == ("failed", {}, None, None)
    assert "samples failed" in row.problems[0]
    assert rows["random", "2/3"].status == "finished"
    text = build(sweeps["bad"])["md"].read_text()
    assert "| vlmpruner | failed | failed | n/a |" in text
    assert "- vlmpruner-2of3: 2 of 24 samples failed" in text


def test_a_missing_run_is_not_run_and_a_missing_seed_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("good")
    for key in ("vlmpruner-8of9", "random-8of9-seed1"):
        record_of(folder, key)[0].unlink()
    rows = {(row.label, row.pruning_rate): row for row in rows_of(load_results(folder))}
    assert (rows["vlmpruner", "8/9"].status, rows["vlmpruner", "8/9"].cells) == ("not run", {})
    assert rows["random", "8/9"].status == "2 of 3 seeds finished"
    assert rows["random", "8/9"].cells["tiny_mean"].seeds == 2
    text = build(folder)["md"].read_text()
    assert "Not run yet: vlmpruner-8of9, random-8of9-seed1." in text
    assert "| vlmpruner | not run | not run | n/a |" in text


def test_without_the_unpruned_run_there_is_no_average(copy: Callable[[str], Path]) -> None:
    folder = copy("good")
    record_of(folder, "unpruned")[0].unlink()
    assert {row.relative.value for row in rows_of(load_results(folder))} == {None}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda record: record["config"]["model"].update(protocol="paper"), 'has model.protocol "paper", but unpruned has "hf"'),
        (lambda record: record["config"]["model"].update(pretrained="other"), 'has model.pretrained "other"'),
        (lambda record: record["config"].update(results_version=0), "has results_version 0, but unpruned has"),
        (lambda record: record["config"].update(limit=5), "has limit 5, but unpruned has 12"),
        (lambda record: record["tasks"]["tiny_mean"]["main"].update(n=11), "tiny_mean has 11 documents, but unpruned has 12"),
        (lambda record: record.update(status="perhaps"), "has status 'perhaps', expected finished or failed"),
    ],
)
def test_what_cannot_be_compared_is_refused(copy: Callable[[str], Path], change: Callable[[dict[str, Any]], None], sentence: str) -> None:
    folder = copy("good")
    edit(folder, "vlmpruner-2of3", change)
    with pytest.raises(ConfigError) as caught:
        build(folder)
    assert sentence in str(caught.value)
    assert not (folder / "report.md").exists()


def test_runs_of_an_older_grid_are_left_out_and_counted(copy: Callable[[str], Path]) -> None:
    folder = copy("good")
    grid = json.loads((folder / "sweep.json").read_text())
    grid["runs"] = [run for run in grid["runs"] if run["method"] != "random"]
    (folder / "sweep.json").write_text(json.dumps(grid))
    results = load_results(folder)
    assert {run.method for run in results.runs} == {"none", "vlmpruner", "blind"}
    assert results.notes == ("6 older runs in this folder do not belong to the present grid and are left out.",)


def test_different_processors_are_pointed_out(copy: Callable[[str], Path]) -> None:
    folder = copy("good")
    edit(folder, "blind", lambda record: record["provenance"].update(processor="Abacus"))
    assert any("different processors" in note and "Abacus" in note for note in load_results(folder).notes)


def test_the_files_hold_the_same_numbers(copy: Callable[[str], Path]) -> None:
    folder = copy("good")
    paths = build(folder)
    rows = rows_of(load_results(folder))
    report = json.loads(paths["json"].read_text())
    assert [row["label"] for row in report["rows"]] == [row.label for row in rows]
    assert report["rows"][1]["cells"]["tiny_mean"]["value"] == rows[1].cells["tiny_mean"].value
    assert len(report["runs"]) == 10
    lines = list(csv.DictReader(io.StringIO(paths["csv"].read_text())))
    assert len(lines) == len(rows) * 2
    assert float(lines[2]["score"]) == rows[1].cells["tiny_mean"].value
    assert (lines[2]["method"], lines[2]["task"], lines[2]["tokens_kept"], lines[2]["quirks"]) == (
        "vlmpruner",
        "tiny_mean",
        "12.0",
        "stall=12",
    )
    cell = rows[1].cells["tiny_mean"]
    text = paths["md"].read_text()
    # bold: it beats random on these documents, and the interval of that difference excludes 0
    assert f"| vlmpruner | **{cell.value:.1f}** [{cell.low:.1f}–{cell.high:.1f}] |" in text
    quirk = ("mended here: stall 12 of 24", "stall: VLM-Pruner stops")
    for fact in ("somewhere/tiny", "| protocol | hf |", "the first 12", "torch ", "score / unpruned score", *quirk):
        assert fact in text


def test_the_figure_is_drawn_in_both_formats_the_same_each_time(copy: Callable[[str], Path]) -> None:
    folder = copy("good")
    first = build(folder)
    with Image.open(first["png"]) as image:
        assert image.width > 800
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 20
    content = first["svg"].read_bytes()
    ElementTree.fromstring(content)
    assert build(folder)["svg"].read_bytes() == content
    edit(folder, "vlmpruner-2of3", lambda record: record["tasks"]["tiny_mean"]["main"].update(value=0.01, low=0.0, high=0.02))
    assert build(folder)["svg"].read_bytes() != content


def test_a_sweep_without_a_finished_run_still_has_a_report(copy: Callable[[str], Path]) -> None:
    folder = copy("good")
    shutil.rmtree(folder / "runs")
    text = build(folder)["md"].read_text()
    assert "| unpruned | not run | not run | n/a |" in text


def test_the_embedded_benchmark_is_no_evidence_and_nobody_wins(copy: Callable[[str], Path]) -> None:
    folder = copy("good")
    assert PLUMBING not in build(folder)["md"].read_text()
    for path in (folder / "sweep.json", *folder.glob("runs/*/run.json")):
        path.write_text(path.read_text().replace("tiny_", "digitscenes_"))
    assert is_plumbing(load_results(folder).tasks)
    paths = build(folder)
    text = paths["md"].read_text()
    assert "checks the plumbing; it is no evidence about which method is better" in text
    assert text.replace(f"**{PLUMBING}**", "").count("**") == 0
    assert json.loads(paths["json"].read_text())["note"] == PLUMBING


def test_the_terminal_table_fits_a_hundred_columns(sweeps: dict[str, Path]) -> None:
    for which in ("good", "bad"):
        results = load_results(sweeps[which])
        console = Console(file=io.StringIO(), record=True, width=250)
        print_tables(console, results, rows_of(results))
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= WIDTH
        text = "\n".join(lines)
        assert "unpruned" in text
        assert "88.9 %" in text
        assert ("samples failed" in text) == (which == "bad")


def test_rows_without_times_show_their_arithmetic_instead(copy: Callable[[str], Path]) -> None:
    folder, screens = copy("good"), []
    for is_shared in (False, True):
        if is_shared:
            edit(folder, "vlmpruner-2of3", lambda record: record["times"].update(prefill_ms=None))
        results = load_results(folder)
        costs = [replace(cost, flops=12.34e9 / (number + 1)) for number, cost in enumerate(efficiency(results))]
        console = Console(file=io.StringIO(), record=True, width=250)
        print_tables(console, results, rows_of(results), costs)
        screens.append(console.export_text())
    said = [" ".join(screen.split()) for screen in screens]
    assert "ms: prefill of a batch." in said[0] and "GFLOPs" not in said[0]
    assert "GFLOPs: exact, of one prompt's prefill" in said[1] and "ms: " not in said[1]
    last = [line.split()[-1] for line in screens[1].splitlines() if line.split()[:1] in (["removed"], ["none"], ["66.7"])]
    assert last == ["GFLOPs", "12.3", "6.17"]
    assert max(map(len, screens[1].splitlines())) <= WIDTH


def test_a_wide_sweep_is_split_into_tables(copy: Callable[[str], Path]) -> None:
    folder = copy("good")
    names = [f"digitscenes_task{i}" for i in range(9)]

    def widen(record: dict[str, Any]) -> None:
        record["tasks"] = dict.fromkeys(names, record["tasks"]["tiny_mean"])

    for path in folder.glob("runs/*/run.json"):
        record = json.loads(path.read_text())
        widen(record)
        path.write_text(json.dumps(record))
    results = load_results(folder)
    console = Console(file=io.StringIO(), record=True, width=250)
    print_tables(console, results, rows_of(results))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(f"task{i}" in text for i in range(9))


# ---- tables as LaTeX and as numbers
def test_every_table_is_written_as_latex_with_all_its_rows_and_columns(copy: Callable[[str], Path]) -> None:
    folder = copy("good")
    made = report_of(load_results(folder))
    (folder / "tables").mkdir()
    (folder / "tables" / "stale.tex").write_text("of an earlier report")
    tables = build(folder)["tables"]
    assert (
        {path.stem for path in tables.glob("*.tex")} == {table.id for table in made.tables} >= {"scores", "differences", "power", "tokens"}
    )
    for table in made.tables:
        text = (tables / f"{table.id}.tex").read_text()
        assert "somewhere/tiny, protocol hf; documents: tiny\\_mean 12" in text
        bare = text.replace(r"\{", "").replace(r"\}", "")
        assert bare.count("{") == bare.count("}")
        body = text.split(r"\toprule")[1].split(r"\bottomrule")[0].splitlines()
        lines = [line for line in body if line.endswith(r" \\") and not line.startswith(r"\multicolumn")]
        assert len(lines) == 1 + sum(len(group.lines) for group in table.groups)
        assert {line.replace(r"\&", "").count("&") for line in lines} == {len(table.columns) - 1}
        assert text.isascii() or set(text) - set(map(chr, range(128))) <= set("’éü"), "LaTeX may not know the character"


def test_the_tables_as_numbers_hold_the_comparisons(copy: Callable[[str], Path]) -> None:
    folder = copy("good")
    made = report_of(load_results(folder))
    tables = build(folder)["tables"]
    read = {path.stem: list(csv.DictReader(io.StringIO(path.read_text()))) for path in tables.glob("*.csv")}
    assert read.keys() == {"scores", "differences", "power", "pairs", "efficiency", "strata"}
    both = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))
    assert [{name: line[name] for name in read["scores"][0]} for line in both] == read["scores"], "the scores, and more"
    (line,) = [line for line in both if (line["label"], line["asked_rate"], line["task"]) == ("vlmpruner", "8/9", "tiny_mean")]
    cell = made.comparisons.of("vlmpruner", "8/9", "tiny_mean")
    assert (float(line["difference"]), float(line["p_holm"])) == (cell.difference.value, cell.p_holm)
    removed = {line["label"]: line["removed_percent"] for line in both}
    assert (removed["unpruned"], removed["blind"]) == ("0.0", "100.0"), "rows without a rate fall out of no plot"
    (line,) = [line for line in read["differences"] if (line["label"], line["asked_rate"], line["task"]) == ("vlmpruner", "8/9", "Avg")]
    cell = made.comparisons.of("vlmpruner", "8/9", "Avg")
    assert (float(line["difference"]), float(line["low_95"]), float(line["flip_rate"])) == (
        cell.difference.value,
        cell.difference.low,
        cell.flip_rate,
    )
    assert float(line["gain_kept"]) == cell.gain_kept.value
    assert [float(line["smallest"]) for line in read["power"]] == [power.smallest for power in made.comparisons.power]
    assert {(line["first"], line["second"]) for line in read["pairs"]} == {("vlmpruner", "random")}
    assert float(read["pairs"][0]["difference_value"]) == made.comparisons.pairs[0].difference.value
    assert [line["label"] for line in read["efficiency"]] == [row.label for row in made.rows]


def test_report_json_holds_everything(copy: Callable[[str], Path]) -> None:
    folder = copy("good")
    made = report_of(load_results(folder))
    held = json.loads(build(folder)["json"].read_text())
    assert len(held["comparisons"]["cells"]) == len(made.comparisons.cells) > 0
    assert held["comparisons"]["contests"][0]["best"] == "vlmpruner"
    assert (held["paper"], held["splits"]) == (None, {"tiny_mean": "test", "tiny_pairs": "test"})
    assert [row["label"] for row in held["efficiency"]] == [row.label for row in made.efficiency]
    assert [row["params"] for row in held["rows"]] == [row.params for row in made.rows]
    assert len(held["strata"]) == len(made.strata)


# ---- words
def test_misbehaviours_of_releases_say_if_they_acted(sweeps: dict[str, Path]) -> None:
    row = replace(rows_of(load_results(sweeps["good"]))[1], quirks={"stall": 24, "repeats": 2}, n_samples=48)
    assert words.quirks(row) == "mended here: repeats 2 of 48, stall 24 of 48"
    release = replace(row, params=row.params | {"official_quirks": True})
    assert words.quirks(release) == "acted: stall 24 of 48; mended here: repeats 2 of 48"
    assert words.quirks(replace(row, quirks={})) == "none"
    console = Console(file=io.StringIO(), record=True, width=250)
    print_tables(console, load_results(sweeps["good"]), [release])
    shown = " ".join(console.export_text().split())
    assert "VLM-Pruner stops when a pass adds nothing" in shown and "acted: stall 24 of 48" in shown


def test_every_misbehaviour_that_a_method_counts_has_words() -> None:
    told = "".join(path.read_text() for path in (Path(words.__file__).parent.parent / "pruners").rglob("*.py"))
    counted = set(re.findall(r'"(\w+)": ', "".join(re.findall(r"fired = \{.*?\n?.*?\}\n", told, re.DOTALL)))) | {"repeats"}
    assert {"stall", "count", "set_order"} <= counted <= set(words.QUIRKS)


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (Cell(95.0, 91.0, 99.0, n=100), "95.0 ±4"),
        (Cell(95.0, 90.6, 98.7, n=100), "95.0 ±4"),
        (Cell(100.0, 67.6, 100.0, n=8), "100.0 68–100"),
        (Cell(0.0, 0.0, 3.7, n=100), "0.0 0–4"),
        (Cell(50.0, None, None), "50.0"),
        (Cell(50.0, 50.0, 50.0), "50.0 ±0"),
    ],
)
def test_an_interval_with_unlike_sides_shows_its_ends(sweeps: dict[str, Path], cell: Cell, shown: str) -> None:
    row = rows_of(load_results(sweeps["good"]))[1]
    value, (interval, _) = words.cell_short(row, cell)
    assert value + interval == shown


def test_tables_are_true_of_every_format(copy: Callable[[str], Path]) -> None:
    """In Markdown and LaTeX small print stands in brackets beside its number, and nothing is coloured."""
    paths = build(copy("good"))
    plain = paths["md"].read_text() + "".join(path.read_text() for path in paths["tables"].glob("*.tex"))
    assert not re.search(r"[Uu]nder a score|under it|in report\.html|green|\bred\b", plain)
    assert "green: better, red: worse" in paths["html"].read_text()


def test_all_files_of_a_report_are_named(copy: Callable[[str], Path]) -> None:
    folder = copy("good")
    shutil.rmtree(folder / "tables", ignore_errors=True)
    before = set(folder.iterdir())
    paths = set(build(folder).values())
    assert {path for path in set(folder.iterdir()) - before if not path.name.startswith(".")} <= paths
    assert {path.name for path in paths} >= {"report.csv", "pareto.png", "pareto.svg"}
