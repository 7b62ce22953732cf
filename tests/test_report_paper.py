"""The paper beside ours: printed numbers and errata, the gate on the unpruned row, verdicts on release rows only."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_sweeps import HOSTILE, RELEASE, configure, copied, edit_grid, markdown_of
from rich.console import Console
from typer.testing import CliRunner

from vlm_pruner_eval.cli import app
from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.contents import report_of
from vlm_pruner_eval.report.load import load_sweep
from vlm_pruner_eval.report.paper import printed
from vlm_pruner_eval.report.paper.differences import OF_TASK, differences
from vlm_pruner_eval.report.paper.gate import FAILS, INCOMPARABLE, REPRODUCES
from vlm_pruner_eval.report.paper.paper_comparison import EQUIVALENT, NO_CLAIM, NOT_RUN, OUTSIDE, Compared, PaperTable, paper_for
from vlm_pruner_eval.report.paper.papers import PAPERS
from vlm_pruner_eval.report.paper.printed import Erratum, Number, PrintedNumbers, read_printed
from vlm_pruner_eval.report.paper.recompute import recompute_averages, recompute_lines
from vlm_pruner_eval.report.rows import rows_of
from vlm_pruner_eval.report.writers.screen import print_paper

RESULTS = Path(__file__).parent.parent / "results"
HEADER = "paper,table,vlm,method,retained_tokens,pruning_rate_percent,benchmark,metric,value,read_from\n"
COLUMNS = {"tiny_mean": "A", "tiny_pairs": "B"}
Change = Callable[[dict[tuple[str, float, str], float]], None]


# ---- the printed numbers themselves
def test_the_printed_numbers_lie_in_the_package_and_nowhere_else() -> None:
    names = {"errata.csv", *(f"{name}.csv" for name in PAPERS)}
    assert {path.name for path in printed.DATA.glob("*.csv")} == names
    assert not [path for path in RESULTS.rglob("*.csv") if path.name in names]


def test_every_printed_average_is_derived_again() -> None:
    rows = recompute_averages(read_printed())
    assert (len(rows), sum(row.matches for row in rows)) == (29, 28)
    (wrong,) = [row for row in rows if not row.matches]
    assert (wrong.vlm, wrong.method, wrong.printed, round(wrong.derived, 2)) == ("LLaVA-1.5-13B", "DivPrune", 90.20, 90.01)


def test_2826_gives_both_averages() -> None:
    both = {row.method: (row.printed, round(row.corrected, 2)) for row in recompute_averages(read_printed()) if row.corrected is not None}
    assert both == {"FastV": (84.75, 88.35), "DART": (88.12, 91.86), "DivPrune": (90.20, 93.79), "VLM-Pruner": (92.68, 96.51)}


def test_a_cell_that_was_removed_is_named_and_its_average_does_not_match() -> None:
    table = read_printed()
    gone = ("LLaVA-1.5-7B", "FastV", 88.9, "POPE")
    fewer = PrintedNumbers({key: number for key, number in table.numbers.items() if key != gone}, table.errata)
    rows = recompute_averages(fewer)
    assert sum(row.matches for row in rows) == 27
    assert "LLaVA-1.5-7B, FastV, 88.9 % removed: printed 84.60, can't be derived again: POPE is missing." in recompute_lines(fewer)


def test_the_command_needs_no_results_directory() -> None:
    result = CliRunner().invoke(app, ["report", "--recompute-paper"])
    assert result.exit_code == 0
    assert "28 of 29 printed averages match" in result.stdout
    assert "LLaVA-1.5-13B, DivPrune, 88.9 % removed: printed 90.20, its own cells give 90.01." in result.stdout
    assert "VLM-Pruner, 88.9 % removed: 92.68 from the printed cells, 96.51 with the corrected upper bound." in result.stdout
    told = CliRunner().invoke(app, ["report", "--recompute-paper", "--json"])
    assert json.loads(told.stdout) == {"averages": 29, "match": 28}
    refused = CliRunner().invoke(app, ["report"])
    assert refused.exit_code == 2
    assert "got no results directory" in refused.output


def test_errata_touch_the_cells_they_speak_of() -> None:
    table = read_printed()
    assert table.errata_of("LLaVA-1.5-13B", "none", None, "MME") == (1,)
    assert table.errata_of("LLaVA-1.5-13B", "vlmpruner", 88.9, "Avg") == (1,)
    assert table.errata_of("LLaVA-1.5-13B", "divprune", 88.9, "Avg") == (1, 2)
    assert table.errata_of("LLaVA-1.5-13B", "divprune", 88.9, "GQA") == ()
    assert table.errata_of("LLaVA-1.5-7B", "fastv", 66.7, "MMB") == (4, 5)
    assert table.errata_of("LLaVA-1.5-7B", "dart", 66.7, "MMB") == ()
    assert table.errata_of("LLaVA-1.5-7B", "vlmpruner", 88.9, "Avg") == (3,)
    assert table.errata_of("LLaVA-1.5-7B", "vlmpruner", 50.0, "Avg") == (), "nothing is printed there"


def test_errata_that_cannot_be_read_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "errata.csv").write_text("number,vlm,method,pruning_rate_percent,benchmark,corrected,text\none,,,,,,x\n")
    with pytest.raises(ConfigError, match="can't be read as errata"):
        read_printed(tmp_path)


@pytest.mark.parametrize(
    ("task", "columns"),
    [  # of LLaVA-1.5-7B, LLaVA-NeXT-7B, Qwen2-VL-7B-Instruct
        ("textvqa_val_ocr", ("VQAText", None, "VQAText")),
        ("textvqa_val", (None, "VQAText", None)),
        ("ok_vqa_val2014_plain", ("OKVQA", "OKVQA", None)),
        ("ok_vqa_val2014", (None, None, "OKVQA")),
        ("ocrbench_short", ("OCRBench", "OCRBench", None)),
        ("ocrbench", (None, None, "OCRBench")),
        ("mmbench_en_dev_llava", ("MMB", "MMB", None)),
        ("mmbench_en_dev_static", (None, None, "MMB")),
        ("pope_splits_llava", ("POPE", "POPE", None)),
        ("gqa", ("GQA", "GQA", "GQA")),
    ],
)
def test_a_printed_number_stands_for_a_task_only_where_the_authors_asked_the_same(task: str, columns: tuple[str | None, ...]) -> None:
    models = ("LLaVA-1.5-7B", "LLaVA-NeXT-7B", "Qwen2-VL-7B-Instruct")
    assert tuple(printed.benchmark_of(task, vlm) for vlm in models) == columns
    assert printed.benchmark_of(task, None) is not None


def test_what_we_do_otherwise_than_the_authors_is_known_of_every_table() -> None:
    tasks = ["mmbench_en_dev_llava", "pope_splits", "textvqa_val_ocr"]
    of_llava = list(differences("LLaVA-1.5-7B", tasks))
    assert [line.split(":")[0] for line in of_llava] == ["mmbench_en_dev_llava", "pope_splits", "pope_splits"]
    assert "4,377" in of_llava[0] and "2,910" in of_llava[2]
    assert list(differences("LLaVA-NeXT-7B", tasks))[-3:] == of_llava
    assert "2,304" in " ".join(differences("LLaVA-NeXT-7B", []))
    assert "182" in " ".join(differences("LLaVA-Video-7B-Qwen2", ["mvbench"]))
    (of_qwen,) = differences("Qwen2-VL-7B-Instruct", tasks)  # asked by a copy of lmms-eval, not by LLaVA's scripts
    assert "mmbench_en_test" in of_qwen


# ---- a sweep of a model of the paper
@pytest.fixture
def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(printed, "BENCHMARKS", COLUMNS)
    return copied("paper", tmp_path)


def numbers(root: Path, **extra: Any) -> PrintedNumbers:
    """A paper that prints our own numbers, which are therefore all equivalent."""
    cells = {}
    for row in rows_of(load_sweep(root)):
        if row.label in ("unpruned", RELEASE["label"], HOSTILE):
            scores = {COLUMNS[task]: cell.value for task, cell in row.cells.items()} | {"Avg": row.relative.value}
            for benchmark, value in scores.items():
                cells["LLaVA-1.5-7B", printed.METHODS[row.method], round(row.percent or 0.0, 1), benchmark] = Number(value, "T", "print")
    return PrintedNumbers(cells, **extra)


def paper(root: Path, table: PrintedNumbers | None) -> PaperTable | None:
    results = load_sweep(root)
    return paper_for(results, rows_of(results), table)


def verdicts(table: PaperTable) -> dict[tuple[str, float | None, str], str | None]:
    """By label, percentage and benchmark."""
    return {
        (item.row.label, item.row.percent and round(item.row.percent, 1), name): compared.verdict
        for item in table.rows
        for name, compared in [*item.cells.items(), ("Avg", item.average)]
    }


def of(table: PaperTable, label: str, percent: float, name: str) -> Compared:
    (item,) = [item for item in table.rows if (item.row.label, round(item.row.percent or 0.0, 1)) == (label, percent)]
    return item.average if name == "Avg" else item.cells[name]


def shifted(table: PrintedNumbers, key: tuple[str, str, float, str], by: float) -> PrintedNumbers:
    return PrintedNumbers(table.numbers | {key: Number(table.numbers[key].value + by, "T", "print")}, table.errata)


KEY = ("LLaVA-1.5-7B", "VLM-Pruner", 66.7, "A")
CELL = ("VLM-Pruner (release)", 66.7, "tiny_mean")


def test_only_release_rows_with_the_papers_parameters_get_a_verdict(changed: Path) -> None:
    table = paper(changed, numbers(changed))
    assert (table.vlm, table.gate.status) == ("LLaVA-1.5-7B", REPRODUCES)
    given = {key for key, verdict in verdicts(table).items() if verdict is not None}
    assert given == {(RELEASE["label"], percent, name) for percent in (66.7, 88.9) for name in ("tiny_mean", "tiny_pairs", "Avg")}
    assert {verdicts(table)[key] for key in given} == {EQUIVALENT}
    # the sane row and the paper's own baseline stand beside the printed number all the same; an ablation and an iso-compute row don't
    assert of(table, "VLM-Pruner", 66.7, "tiny_mean").difference == pytest.approx(0)
    assert of(table, HOSTILE, 66.7, "tiny_mean").printed is not None
    assert of(table, "pivots 2", 66.7, "tiny_mean").printed is None
    iso = next(item for item in table.rows if item.row.label == "iso")
    assert iso.cells["tiny_mean"].printed is None


@pytest.mark.parametrize(("by", "verdict"), [(0.49, EQUIVALENT), (-0.49, EQUIVALENT), (0.51, OUTSIDE), (-0.51, OUTSIDE)])
def test_equivalent_means_within_half_a_point(changed: Path, by: float, verdict: str) -> None:
    table = paper(changed, shifted(numbers(changed), KEY, by))
    changed = {key: value for key, value in verdicts(table).items() if value not in (None, EQUIVALENT)}
    assert changed == ({CELL: OUTSIDE} if verdict == OUTSIDE else {})
    assert of(table, *CELL).difference == pytest.approx(-by)


def test_twice_the_noise_that_reproduce_measured_widens_the_tolerance(changed: Path) -> None:
    far = shifted(numbers(changed), KEY, 0.9)
    assert of(paper(changed, far), *CELL).verdict == OUTSIDE
    assert "noise of the unpruned model was not measured" in paper(changed, far).noise
    measured = {
        "config": load_sweep(changed).config,
        "noise": {"variants": {"batch1-sdpa": {}, "batch1-eager": {}}, "average_spread": 0.2, "tasks": {"tiny_mean": {"spread": 0.46}}},
    }
    (changed.parent / "reproduce.json").write_text(json.dumps(measured))
    table = paper(changed, far)
    assert (of(table, *CELL).verdict, of(table, *CELL).tolerance) == (EQUIVALENT, pytest.approx(0.92))
    assert of(table, "VLM-Pruner (release)", 66.7, "tiny_pairs").tolerance == 0.5
    assert "batch1-sdpa, batch1-eager" in table.noise
    (changed.parent / "reproduce.json").write_text(json.dumps(measured | {"config": {"another": "sweep"}}))
    assert of(paper(changed, far), *CELL).verdict == OUTSIDE
    (changed.parent / "reproduce.json").write_text("{")
    with pytest.raises(ConfigError, match="can't be read as the noise floor"):
        paper(changed, far)


def test_removing_one_printed_number_makes_exactly_its_cell_not_run(changed: Path) -> None:
    table = numbers(changed)
    fewer = PrintedNumbers({key: number for key, number in table.numbers.items() if key != KEY})
    before, after = verdicts(paper(changed, table)), verdicts(paper(changed, fewer))
    assert {key for key in before if before[key] != after[key]} == {CELL}
    cell = of(paper(changed, fewer), *CELL)
    assert (cell.verdict, cell.reason, cell.printed, cell.cell.value is not None) == (NOT_RUN, "no printed number", None, True)


def test_removing_one_file_of_answers_makes_exactly_its_row_not_run(changed: Path) -> None:
    table = numbers(changed)
    before = verdicts(paper(changed, table))
    (run,) = changed.glob("runs/vlm-pruner-release-2of3-*")
    (run / "tiny_mean" / "answers.jsonl").unlink()
    after = verdicts(paper(changed, table))
    gone = {(RELEASE["label"], 66.7, name) for name in ("tiny_mean", "tiny_pairs", "Avg")}
    assert {key for key in before if before[key] != after[key]} == gone
    assert {of(paper(changed, table), *key).reason for key in gone} == {"not run: answers missing"}
    text = markdown_of(changed)
    assert "| VLM-Pruner (release) | not run: answers missing | not run: answers missing | n/a |" in text
    assert "The answers (answers.jsonl) of vlm-pruner-release-2of3 are missing" in text


def test_without_the_unpruned_answers_nothing_is_claimed(changed: Path) -> None:
    table = numbers(changed)
    (run,) = changed.glob("runs/unpruned-*")
    (run / "tiny_pairs" / "answers.jsonl").unlink()
    after = paper(changed, table)
    assert (after.gate.status, after.gate.stops) == (FAILS, True)
    assert "it is not run: answers missing" in after.gate.sentence
    assert of(after, *CELL).verdict == NO_CLAIM


def test_nothing_is_claimed_about_pruned_rows_when_the_unpruned_one_fails_the_gate(changed: Path) -> None:
    far = shifted(numbers(changed), ("LLaVA-1.5-7B", printed.METHODS["none"], 0.0, "A"), -0.6)
    table = paper(changed, far)
    assert table.gate.sentence == "The unpruned row does not reproduce: tiny_mean (1 of 2 tasks) outside."
    assert {verdict for verdict in verdicts(table).values() if verdict is not None} == {NO_CLAIM}
    console = Console(file=io.StringIO(), record=True, width=250)
    print_paper(console, table)
    assert "Nothing is claimed about pruned rows." in " ".join(console.export_text().split())


@pytest.mark.parametrize(
    ("name", "value", "reason"), [("protocol", "hf", "protocol hf"), ("id", "vlmpruner_internvl", "model id vlmpruner_i")]
)
def test_another_protocol_or_model_is_not_comparable(changed: Path, name: str, value: str, reason: str) -> None:
    table = numbers(changed)
    edit_grid(changed, lambda grid: grid["config"]["model"].update({name: value}))
    configure(changed, "", lambda config: config["model"].update({name: value}))
    found = paper(changed, table)
    assert (found.gate.status, of(found, *CELL).verdict) == (INCOMPARABLE, "not comparable")
    assert reason in found.gate.sentence


def test_an_average_over_an_impossible_upper_bound_has_no_verdict(changed: Path) -> None:
    key = ("LLaVA-1.5-7B", printed.METHODS["none"], 0.0, "B")
    erratum = Erratum(7, "B is misprinted.", (("LLaVA-1.5-7B", printed.METHODS["none"], None, "B"),), {key: 75.0})
    table = numbers(changed, errata=(erratum,))
    found = paper(changed, shifted(table, key, 100.0))
    assert (of(found, *CELL).verdict, of(found, RELEASE["label"], 66.7, "Avg").verdict) == (EQUIVALENT, "not comparable")
    (note,) = found.footnotes
    assert note.startswith("Note 7: B is misprinted.")


def test_a_checkpoint_that_is_not_the_papers_has_no_printed_numbers(changed: Path) -> None:
    for path in (changed / "sweep.json", *changed.glob("runs/*/run.json")):
        path.write_text(path.read_text().replace("llava-hf/llava-1.5-7b-hf", "somewhere/tiny"))
    assert paper(changed, None) is None
    assert "No numbers are printed for this checkpoint" in markdown_of(changed)


# ---- how it is shown
def test_the_report_shows_ours_the_printed_number_the_difference_and_the_verdict(changed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    assert "Known differences" not in markdown_of(changed)
    monkeypatch.setitem(OF_TASK, "tiny_mean", ("another mean.",))
    far = shifted(numbers(changed), KEY, 2.0)
    lines = [f"VLM-Pruner,T,{key[0]},{key[1]},1,{key[2]},{key[3]},acc,{value.value},print" for key, value in far.numbers.items()]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text(HEADER + "\n".join(lines) + "\n")
    monkeypatch.setattr(printed, "DATA", tmp_path / "data")
    made = report_of(load_sweep(changed))
    cell = of(made.paper, *CELL)
    paths = build(changed)
    text = paths["md"].read_text()
    assert "## Our scores beside the paper's for LLaVA-1.5-7B" in text
    assert f"paper {cell.printed.value:g} (-2.00); outside]" in text
    assert "The unpruned row reproduces: 2 of 2 tasks with a printed number are inside. Ours: lmms-eval" in text
    assert "protocol paper, splits tiny_mean: test, tiny_pairs: test." in text
    assert "\n- tiny_mean: another mean.\n" in text
    assert "tiny_mean: another mean." in paths["html"].read_text()
    table = json.loads(paths["json"].read_text())["paper"]
    assert table["differences"] == ["tiny_mean: another mean."]
    held = {(row["label"], row["pruning_rate"]): row for row in table["rows"]}
    assert held[RELEASE["label"], "2/3"]["cells"]["tiny_mean"]["verdict"] == OUTSIDE
    assert held[RELEASE["label"], "2/3"]["cells"]["tiny_mean"]["difference"] == pytest.approx(-2)
    lines = list(csv.DictReader(io.StringIO((paths["tables"] / "paper.csv").read_text())))
    (line,) = [line for line in lines if (line["label"], line["pruning_rate"], line["task"]) == (RELEASE["label"], "2/3", "tiny_mean")]
    assert (line["verdict"], float(line["difference"]), line["table"]) == (OUTSIDE, pytest.approx(-2), "T")
    assert r"\toprule" in (paths["tables"] / "paper.tex").read_text()
