"""Every paper's printed numbers: all of them are there, each paper has its own gate, and where two papers differ is shown."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
from report_sweeps import copied, edit_grid, folder

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.report.build import build
from vlm_pruner_eval.report.load import load_sweep
from vlm_pruner_eval.report.paper import printed
from vlm_pruner_eval.report.paper.differences import differences
from vlm_pruner_eval.report.paper.disagreements import disagreements
from vlm_pruner_eval.report.paper.gate import FAILS, INSIDE, NO_NUMBER, REPRODUCES, judge_scores
from vlm_pruner_eval.report.paper.paper_comparison import is_as_published, paper_for
from vlm_pruner_eval.report.paper.papers import PAPERS
from vlm_pruner_eval.report.paper.printed import METHODS, read_printed
from vlm_pruner_eval.report.rows import Row, rows_of
from vlm_pruner_eval.sweep.config import PAPERS as NAMES
from vlm_pruner_eval.sweep.config import validate

README = (Path(__file__).parent.parent / "results" / "paper" / "README.md").read_text()
COUNTS = {"vlm_pruner": 380, "dart": 176, "sparsevlm": 110, "divprune": 99, "cdpruner": 132, "zoo_prune": 86, "fastv_readme": 10}
SEVEN_B = "LLaVA-1.5-7B"
NO_SCORES = {"FLOPs", "Latency", "Acc", "Avg"}
SWEEP = {
    "name": "s",
    "model": {"id": "vlmpruner_llava", "pretrained": "minivlm"},
    "tasks": ["gqa"],
    "pruning_rates": [0.5],
    "methods": ["fastv"],
}
every_paper = pytest.mark.parametrize("name", NAMES)


def lines(name: str) -> list[dict[str, str]]:
    with (printed.DATA / f"{name}.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def row_of(method: str, *, percent: float, **changed: object) -> Row:
    any_row = rows_of(load_sweep(folder("paper")))[0]
    return replace(any_row, method=method, pruning_rate=percent / 100, changed=changed, iso_layer=None)


# ---- the numbers
def test_every_paper_has_one_file_with_all_its_numbers() -> None:
    assert tuple(PAPERS) == NAMES == tuple(COUNTS)
    assert {name: len(lines(name)) for name in NAMES} == COUNTS
    assert sum(COUNTS.values()) == 993
    assert len({tuple(line) for name in NAMES for line in lines(name)}) == 1, "one layout"
    every = Counter(tuple(line.values()) for name in NAMES for line in lines(name))
    assert max(every.values()) == 1, "a number is there once"


@every_paper
def test_a_file_holds_its_paper_alone_and_its_protocol_is_written_down(name: str) -> None:
    (source,) = {line["paper"] for line in lines(name)}
    assert source.startswith(PAPERS[name].name)
    assert all(math.isfinite(float(line["value"])) for line in lines(name))
    assert f"`{name}`" in README
    identifier = PAPERS[name].reference.split("arXiv ")[1][:10]
    assert identifier in README
    for line in csv.DictReader((printed.DATA / "errata.csv").open(newline="")):
        assert line["paper"] in NAMES


@every_paper
def test_every_paper_has_an_unpruned_number_for_whatever_it_prints_of_a_pruned_llava(name: str) -> None:
    found = read_printed(paper=name).numbers
    pruned = {benchmark for vlm, method, _, benchmark in found if vlm == SEVEN_B and method in METHODS.values()}
    assert pruned
    assert [benchmark for benchmark in pruned if (SEVEN_B, METHODS["none"], 0.0, benchmark) not in found] == []


def test_a_share_that_is_printed_is_a_rate_and_flops_are_none() -> None:
    table = read_printed(paper="divprune")
    assert table.find(SEVEN_B, "divprune", 90.2, "GQA").value == 56.85
    assert {key[2] for key in table.numbers if key[1] == "FastV"} == set()
    assert table.find("LLaVA-1.5-13B", "none", None, "POPE").value == 85.99


@every_paper
def test_printed_averages_that_their_cells_do_not_give_are_in_the_errata(name: str) -> None:
    rows: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    for line in lines(name):
        if line["read_from"] == "printed table" and line["vlm"] and line["table"] in ("Table 1", "Table 2", "Table 3"):
            rows[line["table"], line["vlm"], line["method"], line["retained_tokens"]][line["benchmark"]] = float(line["value"])
    wrong = set()
    for (table, vlm, method, _), cells in rows.items():
        bound = next(of for (there, model, whose, _), of in rows.items() if (there, model) == (table, vlm) and whose.startswith("vanilla"))
        scores = cells.keys() - NO_SCORES
        if "Avg" in cells and scores:
            average = 100 * mean(cells[benchmark] / bound[benchmark] for benchmark in scores)
            wrong |= {(vlm, method)} if abs(average - cells["Avg"]) > 0.07 else set()
    of_errata = {
        (e.cells[0][0], e.cells[0][1]) for e in read_printed(paper=name).errata if e.cells[0][3] == "Avg" and "own cells" in e.text
    }
    assert wrong == of_errata
    assert bool(wrong) == (name in ("vlm_pruner", "dart", "sparsevlm"))


# ---- what stands for what
@pytest.mark.parametrize(
    ("name", "task", "value"),
    [
        ("vlm_pruner", "mme_total", 1862),
        ("dart", "mme_total", 1862),
        ("cdpruner", "mme_total", None),  # perception alone
        ("divprune", "mme_total", None),
        ("sparsevlm", "seedbench_image", None),  # videos as well
        ("fastv_readme", "seedbench_image", None),
        ("divprune", "seedbench_image", 66.17),
        ("divprune", "ok_vqa_val2014", 53.39),
        ("divprune", "ok_vqa_val2014_plain", None),
        ("vlm_pruner", "ok_vqa_val2014", None),
        ("dart", "mmbench_en_dev_llava", 64.7),
        ("zoo_prune", "mmbench_en_dev_llava", None),
        ("zoo_prune", "mmbench_en_dev_static", 64.7),
    ],
)
def test_a_task_is_held_against_the_same_score_asked_the_same_way(name: str, task: str, value: float | None) -> None:
    gate = judge_scores({task: value or 1.0}, {}, read_printed(paper=name), SEVEN_B, ())
    (verdict,) = gate.tasks
    assert (verdict.printed and verdict.printed.value, verdict.verdict) == (value, NO_NUMBER if value is None else INSIDE)


@pytest.mark.parametrize(("name", "value"), dict(zip(NAMES, (61.95, 61.9, 61.9, 61.96, 61.9, 61.9, 62.0), strict=True)).items())
def test_every_paper_has_its_own_gate(name: str, value: float) -> None:
    for score, status in ((value + 0.49, REPRODUCES), (value + 0.51, FAILS), (value - 0.51, FAILS)):
        assert judge_scores({"gqa": score}, {}, read_printed(paper=name), SEVEN_B, ()).status == status
    everybody = {judge_scores({"gqa": 62.43}, {}, read_printed(paper=other), SEVEN_B, ()).status for other in NAMES}
    assert everybody == {REPRODUCES, FAILS}, "the same score passes one paper's gate and fails another's"


@pytest.mark.parametrize(
    ("name", "method", "changed", "is_theirs"),
    [
        ("vlm_pruner", "fastv", {}, True),
        ("vlm_pruner", "fastv", {"budget": "layer_average"}, False),
        ("sparsevlm", "fastv", {"budget": "layer_average"}, True),
        ("sparsevlm", "fastv", {}, False),
        ("dart", "dart", {"official_quirks": True}, True),
        ("fastv_readme", "fastv", {"layer": 3}, True),
        ("fastv_readme", "fastv", {}, False),
    ],
)
def test_a_row_is_held_against_numbers_of_its_own_settings(name: str, method: str, changed: dict[str, object], is_theirs: bool) -> None:
    assert is_as_published(row_of(method, percent=50, **changed), PAPERS[name]) == is_theirs


# ---- where papers differ
def test_fastv_at_64_tokens_differs_between_papers() -> None:
    papers = {name: read_printed(paper=name) for name in NAMES}
    rows = [row_of("none", percent=0), row_of("fastv", percent=88.89), row_of("fastv", percent=88.89), row_of("uniform", percent=88.89)]
    found = {(item.method, item.percent, item.benchmark): item for item in disagreements(papers, SEVEN_B, rows, ["pope", "gqa", "chartqa"])}
    pope = found["FastV", 88.9, "POPE"]
    assert {name: number.value for name, number in pope.numbers.items()} == {
        "vlm_pruner": 59.7,
        "dart": 48.0,
        "sparsevlm": 38.2,
        "cdpruner": 35.5,
        "zoo_prune": 48.0,
    }
    assert pope.spread == 24.2
    assert found.keys() == {("FastV", 88.9, "POPE"), ("FastV", 88.9, "GQA")}, "61.9, 61.95 and 62.0 reproduce each other"
    assert disagreements(papers, SEVEN_B, rows, ["ok_vqa_val2014"])[0].numbers.keys() == {"vlm_pruner", "divprune"}
    assert disagreements(papers, "Qwen2-VL-7B-Instruct", rows, ["pope"]) == ()


HEADER = "paper,table,vlm,method,retained_tokens,pruning_rate_percent,benchmark,metric,value,read_from\n"


@pytest.fixture
def two_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep whose benchmark A two papers print: VLM-Pruner's as ours, DART's 3 points below; the pruned rows differ by 9."""
    monkeypatch.setattr(printed, "BENCHMARKS", {"tiny_mean": "A", "tiny_pairs": "B"})
    monkeypatch.setattr("vlm_pruner_eval.report.paper.disagreements.BENCHMARKS", printed.BENCHMARKS)
    root = copied("paper", tmp_path)
    ours = next(row for row in rows_of(load_sweep(root)) if row.method == "none").cells["tiny_mean"].value
    (tmp_path / "data").mkdir()
    for name, more in (("VLM-Pruner", 0), ("DART", -3)):
        numbers = (("vanilla", 0, ours + more), ("VLM-Pruner", 66.7, 70 - 3 * more))
        text = [f"{name} (x),T,{SEVEN_B},{method},1,{rate},A,acc,{value},printed table\n" for method, rate, value in numbers]
        (tmp_path / "data" / f"{name}.csv").write_text(HEADER + "".join(text))
    monkeypatch.setattr(printed, "DATA", tmp_path / "data")
    return root


def beside(root: Path, name: str) -> None:
    edit_grid(root, lambda grid: grid["config"].update(paper=name))


def test_the_sweep_file_names_the_paper_whose_gate_is_asked(two_papers: Path) -> None:
    results = load_sweep(two_papers)
    assert results.config["paper"] == "vlm_pruner"
    assert paper_for(results, rows_of(results)).gate.status == REPRODUCES
    beside(two_papers, "dart")
    results = load_sweep(two_papers)
    table = paper_for(results, rows_of(results))
    assert (table.gate.status, table.paper) == (FAILS, "DART (arXiv 2502.11494, EMNLP 2025)")
    assert "Printed: DART (arXiv 2502.11494" in table.setting
    assert any("decoder layer 2" in line for line in table.differences)
    edit_grid(two_papers, lambda grid: grid["config"].pop("paper"))  # as an older sweep
    results = load_sweep(two_papers)
    assert paper_for(results, rows_of(results)).paper.startswith("VLM-Pruner")


def test_the_report_lists_what_papers_print_differently(two_papers: Path) -> None:
    beside(two_papers, "dart")
    paths = build(two_papers)
    text, page = paths["md"].read_text(), paths["html"].read_text()
    assert f"## Our scores beside the paper's for {SEVEN_B}: DART (arXiv 2502.11494" in text
    assert f"## Printed numbers for {SEVEN_B} that differ between papers" in text
    assert "| method, benchmark | VLM-Pruner | DART | differ by |" in text
    assert "| VLM-Pruner, A | 70 | 79 | 9 |" in text
    assert "DART: 64 tokens are kept from decoder layer 2 on" in text
    assert f"<summary>Printed numbers for {SEVEN_B} that differ between papers</summary>" in page
    found = list(csv.DictReader(io.StringIO((paths["tables"] / "printed.csv").read_text())))
    assert [(line["method"], line["paper"], float(line["printed"])) for line in found if line["removed_percent"] == "66.7"] == [
        ("VLM-Pruner", "vlm_pruner", 70.0),
        ("VLM-Pruner", "dart", 79.0),
    ]


def test_papers_that_agree_make_no_table(two_papers: Path) -> None:
    (printed.DATA / "DART.csv").unlink()
    assert "differ between papers" not in build(two_papers)["md"].read_text()


# ---- the sweep file
def test_an_unknown_paper_is_refused_with_the_closest_name() -> None:
    assert validate(SWEEP).paper == "vlm_pruner"
    assert validate(SWEEP | {"paper": "fastv_readme"}).paper == "fastv_readme"
    with pytest.raises(ConfigError, match=r"paper: got 'sparse_vlm', a paper .* did you mean 'sparsevlm'\? Known: cdpruner, dart"):
        validate(SWEEP | {"paper": "sparse_vlm"})
    with pytest.raises(ConfigError, match=r"paper: got 3 \(int\), expected the paper"):
        validate(SWEEP | {"paper": 3})


def test_what_differs_is_said_of_the_paper_that_is_named() -> None:
    tasks = ["mmbench_en_dev_llava", "gqa"]
    for name, paper in PAPERS.items():
        said = list(differences(SEVEN_B, tasks, paper))
        assert any(line.startswith("gqa") for line in said) == (not paper.by_lmms_eval)
        assert (paper.tokens in said) == (name != "vlm_pruner")
