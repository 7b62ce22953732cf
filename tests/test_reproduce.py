"""Reproductions from the command to the report, with a stand-in model and with the embedded checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import stored
from reproduce_standin import GOOD, N_DOCS, RELEASE, VARIANTS, Loads, call, empty_folder, install_loads, last_json, printing, read, write
from sweep_standin import Behaviour
from thinning import some
from typer.testing import CliRunner

from vlm_pruner_eval.cli import app
from vlm_pruner_eval.report.load import load_sweep
from vlm_pruner_eval.report.paper.gate import IMPOSSIBLE, INSIDE, OUTSIDE


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield from empty_folder(tmp_path, monkeypatch)


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loads:
    return install_loads(tmp_path, monkeypatch)


@pytest.fixture
def prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    return printing(tmp_path, monkeypatch)


# ---- stages, with a stand-in model
def test_flips_and_spread_are_those_of_the_answers(tmp_path: Path, loads: Loads) -> None:
    """Unpruned, the stand-in answers everything right; a variant with flip=n answers the first n documents wrong."""
    loads.behaviours = {"batch16-sdpa": Behaviour(flip=3), "batch16-eager": Behaviour(flip=6)}
    result = call("--config", write(tmp_path, tasks=["tiny_mean", "tiny_pairs"]), "--method", "fastv")
    assert result.exit_code == 0, result.output
    assert loads.names == [*VARIANTS, "batch1-sdpa"]
    measured = read()["noise"]
    assert (measured["reference"], list(measured["variants"])) == ("batch1-sdpa", VARIANTS)
    task = measured["tasks"]["tiny_mean"]
    assert task["scores"] == pytest.approx(dict(zip(VARIANTS, (100, 100 * 21 / 24, 100, 75), strict=True)))
    assert task["spread"] == pytest.approx(25)
    assert task["answer_flips"]["batch16-sdpa"] == {"changed": 3, "documents": 24, "share": 3 / 24}
    assert task["answer_flips"]["batch1-eager"]["changed"] == 0
    assert task["score_flips"]["batch16-eager"] == {"changed": 6, "documents": 24, "share": 6 / 24}
    assert measured["tasks"]["tiny_pairs"]["score_flips"]["batch16-sdpa"]["changed"] == 3
    # pairs: 10 of 12 and 9 of 12 are right
    assert measured["average_spread"] == pytest.approx(100 - (75 + 75) / 2)
    text = Path("output/reproduce/tiny/reproduce.md").read_text()
    assert "batch16-sdpa | 87.50 |  | 3 of 24 (12.50 %) | 3 of 24 (12.50 %)" in text


def test_rows_have_release_and_sane_rows_with_quirk_rates(tmp_path: Path, loads: Loads, prints: Callable[..., None]) -> None:
    prints(tiny_mean=100.0)
    result = call("--config", write(tmp_path), "--method", "vlmpruner", "--json")
    assert result.exit_code == 0, result.output
    assert last_json(result) == {
        "gate": "reproduces",
        "runs": 4 + 5,
        "skipped": 1,
        "failed": 0,
        "rows": True,
        "report": "output/reproduce/tiny/reproduce.md",
    }
    done = read()
    rows = {(row["label"], row["pruning_rate"]): row for row in done["rows"]}
    assert list(rows) == [
        ("unpruned", None),
        *((label, rate) for rate in ("2/3", "8/9") for label in ("VLM-Pruner (release)", "vlmpruner")),
    ]
    release, sane = rows["VLM-Pruner (release)", "2/3"], rows["vlmpruner", "2/3"]
    assert (release["release"], sane["release"], rows["unpruned", None]["release"]) == (True, False, False)
    # the stand-in reports "stall" on every second document
    assert release["quirks"] == {"stall": {"samples": 12, "share": 0.5}}
    assert release["samples_with_images"] == N_DOCS
    assert rows["unpruned", None]["quirks"] == {}
    cell = release["scores"]["tiny_mean"]
    assert cell["printed"] == {"value": 71.2, "table": "T", "read_from": "printed table"}
    assert (cell["value"], cell["difference"]) == (pytest.approx(100 * 17 / 24), pytest.approx(100 * 17 / 24 - 71.2))
    assert cell["low"] < cell["value"] < cell["high"]
    assert sane["scores"]["tiny_mean"]["difference"] == cell["difference"]
    assert sane["scores"]["tiny_mean"]["verdict"] is None
    for rate, verdict in (("2/3", "equivalent"), ("8/9", "outside")):
        row = rows[RELEASE["label"], rate]
        assert (row["scores"]["tiny_mean"]["verdict"], row["relative_average"]["verdict"]) == (verdict, verdict)
    assert rows["unpruned", None]["scores"]["tiny_mean"]["verdict"] is None
    assert "torch" in done["provenance"]["versions"]
    assert done["provenance"]["processor"]
    text = Path("output/reproduce/tiny/reproduce.md").read_text()
    assert "stall 50.0 %" in text
    assert "stall 50.0 %" in call("--config", tmp_path / "sweep.yaml", "--method", "vlmpruner").stdout


def test_an_ablation_has_no_printed_number_and_an_average_over_an_impossible_bound_no_verdict(
    tmp_path: Path, loads: Loads, prints: Callable[..., None]
) -> None:
    prints(tiny_mean=150.0)
    ablation = RELEASE | {"pivots": 2, "label": "pivots 2"}
    config = write(tmp_path, methods=[RELEASE, ablation], pruning_rates=["2/3"])
    assert call("--config", config, "--batch-sizes", "1", "--attention", "sdpa").exit_code == 0
    assert [item["verdict"] for item in read()["gate"]["tasks"]] == [IMPOSSIBLE]
    release, changed = read()["rows"][1:]
    assert (release["scores"]["tiny_mean"]["verdict"], release["relative_average"]["verdict"]) == ("equivalent", "not comparable")
    assert (changed["release"], changed["scores"]["tiny_mean"]["printed"], changed["relative_average"]["printed"]) == (True, None, None)


def test_folders_are_ordinary_sweeps_and_the_unpruned_run_is_not_run_twice(tmp_path: Path, loads: Loads) -> None:
    call("--config", write(tmp_path), "--method", "fastv")
    reported = CliRunner().invoke(app, ["report", "output/reproduce/tiny/rows"])
    assert reported.exit_code == 0, reported.output
    (held,) = load_sweep("output/reproduce/tiny/noise/batch16-eager").records
    assert held.config["model"]["attn_implementation"] == "eager"
    first, second = (Path("output/reproduce/tiny", part, "runs") for part in ("noise/batch1-sdpa", "rows"))
    names = sorted(path.relative_to(first) for path in first.glob("unpruned-*/**/*.json*"))
    assert {path.name for path in names} == {"run.json", "plan.json", "answers.jsonl", "scores.jsonl", "draws.json", "record.json"}
    for name in names:
        assert (first / name).read_text() == (second / name).read_text()


def test_a_second_call_loads_nothing_and_more_methods_only_add(tmp_path: Path, loads: Loads) -> None:
    config = write(tmp_path)
    call("--config", config, "--method", "vlmpruner")
    before, first = list(loads.names), read()
    again = call("--config", config, "--method", "vlmpruner", "--json")
    assert (last_json(again)["runs"], last_json(again)["skipped"]) == (9, 9)
    assert loads.names == before
    assert read()["rows"] == first["rows"]
    more = call("--config", config, "--json")
    assert (last_json(more)["runs"], last_json(more)["skipped"]) == (11, 9)


def test_the_variants_are_as_asked_and_the_first_is_the_reference(tmp_path: Path, loads: Loads) -> None:
    loads.behaviours = {"batch2-eager": Behaviour(flip=6)}
    result = call(
        "--config", write(tmp_path), "--batch-sizes", "2", "--attention", "eager,sdpa", "--output", "told", "--tasks", "tiny_mean"
    )
    assert result.exit_code == 0, result.output
    assert loads.names == ["batch2-eager", "batch2-sdpa", "batch2-eager"]
    done = json.loads(Path("told/reproduce.json").read_text())
    assert (done["noise"]["reference"], list(done["noise"]["tasks"])) == ("batch2-eager", ["tiny_mean"])
    assert done["gate"]["tasks"][0]["score"] == 75
    assert done["config"]["model"]["batch_size"] == 2


def test_a_failed_variant_is_reported_and_the_others_count(tmp_path: Path, loads: Loads) -> None:
    loads.behaviours = {"batch16-eager": Behaviour(explode={"none"})}
    result = call("--config", write(tmp_path), "--method", "vlmpruner", "--json")
    assert (result.exit_code, last_json(result)["failed"], last_json(result)["rows"]) == (1, 1, True)
    measured = read()["noise"]
    assert "the device is gone" in measured["variants"]["batch16-eager"]["problem"]
    assert measured["tasks"]["tiny_mean"]["scores"]["batch16-eager"] is None
    assert measured["tasks"]["tiny_mean"]["spread"] == 0
    text = Path("output/reproduce/tiny/reproduce.md").read_text()
    assert "- batch16-eager: RuntimeError: the device is gone" in text
    assert "batch16-eager | n/a |  | failed | failed" in text


def test_without_the_unpruned_reference_no_row_is_run(tmp_path: Path, loads: Loads) -> None:
    loads.behaviours = {"batch1-sdpa": Behaviour(fail={("none", 5)})}
    result = call("--config", write(tmp_path), "--json")
    assert (result.exit_code, last_json(result)["rows"]) == (1, False)
    assert "The unpruned row does not reproduce: the run batch1-sdpa failed (1 of 24 samples failed" in read()["gate"]["sentence"]
    assert not Path("output/reproduce/tiny/rows").exists()


# ---- the gate
def test_outside_the_gate_no_row_is_run_unless_told(tmp_path: Path, loads: Loads, prints: Callable[..., None]) -> None:
    prints(tiny_mean=99.4, tiny_pairs=100.0)
    config = write(tmp_path, tasks=["tiny_mean", "tiny_pairs"], methods=["fastv"])
    result = call("--config", config, "--json")
    assert (result.exit_code, last_json(result)["gate"], last_json(result)["rows"]) == (1, "does not reproduce", False)
    assert "The unpruned row does not reproduce: tiny_mean (1 of 2 tasks) outside." in " ".join(result.stderr.split())
    assert [item["verdict"] for item in read()["gate"]["tasks"]] == [OUTSIDE, INSIDE]
    assert not Path("output/reproduce/tiny/rows").exists()
    assert "Not run: the unpruned row has to reproduce first" in Path("output/reproduce/tiny/reproduce.md").read_text()
    anyway = call("--config", config, "--anyway", "--json")
    assert (anyway.exit_code, last_json(anyway)["rows"], last_json(anyway)["skipped"]) == (1, True, 5)
    assert "tiny_mean (1 of 2 tasks) outside" in read()["gate"]["sentence"]


def test_a_measured_spread_widens_the_gate(tmp_path: Path, loads: Loads, prints: Callable[..., None]) -> None:
    prints(tiny_mean=92.0)
    loads.behaviours = {"batch16-eager": Behaviour(flip=1)}  # 1 of 24: a spread of 4.17, so 8.33 are allowed
    result = call("--config", write(tmp_path), "--method", "fastv", "--json")
    assert (result.exit_code, last_json(result)["gate"]) == (0, "reproduces")
    (verdict,) = [item for item in read()["gate"]["tasks"] if item["printed"]]
    assert (verdict["tolerance"], verdict["difference"]) == (pytest.approx(2 * 100 / 24), pytest.approx(8.0))


@pytest.mark.parametrize(
    ("options", "reason"),
    some(
        [
            (["--limit", "12"], "limit 12"),
            (["--pretrained", "some/other"], "other checkpoint, some/other"),
            (["hf"], "protocol hf"),
        ],
        3,
    ),
)
def test_what_printed_numbers_do_not_speak_of_is_not_gated(
    tmp_path: Path, loads: Loads, prints: Callable[..., None], options: list[str], reason: str
) -> None:
    prints(tiny_mean=10.0)
    protocol = {"model": GOOD["model"] | {"protocol": "hf"}} if options == ["hf"] else {}
    config = write(tmp_path, **protocol, pruning_rates=["2/3"])
    one_variant = ["--batch-sizes", "1", "--attention", "sdpa"]
    result = call("--config", config, "--method", "vlmpruner", "--json", *one_variant, *([] if protocol else options))
    assert (result.exit_code, last_json(result)["gate"], last_json(result)["rows"]) == (0, "not comparable", True)
    assert f"not comparable with printed numbers ({reason})" in " ".join(result.stderr.split())
    verdicts = [row["scores"]["tiny_mean"]["verdict"] for row in read()["rows"] if row["scores"]["tiny_mean"]["printed"]]
    assert set(verdicts) <= {None, "not comparable"}


# ---- the real thing, small
@pytest.mark.slow
def test_minivlm_from_command_to_report_and_again(tmp_path: Path) -> None:
    """The embedded checkpoint on the embedded benchmark, through lmms-eval."""
    model = {"id": "vlmpruner_llava", "pretrained": "minivlm", "device": "cpu", "visual_tokens": 576}
    config = write(tmp_path, model=model, tasks=["digitscenes_exist"], pruning_rates=["8/9"], methods=[RELEASE, "vlmpruner", "fastv"])
    options = ["--config", config, "--limit", "6", "--method", "vlmpruner", "--batch-sizes", "1,4", "--json"]
    result = call(*options)
    assert result.exit_code == 0, result.output
    assert last_json(result) == {
        "gate": "not comparable",
        "runs": 7,
        "skipped": 1,
        "failed": 0,
        "rows": True,
        "report": "output/reproduce/tiny/reproduce.md",
    }
    done = read()
    assert list(done["noise"]["variants"]) == ["batch1-sdpa", "batch4-sdpa", "batch1-eager", "batch4-eager"]
    task = done["noise"]["tasks"]["digitscenes_exist"]
    assert [flips["documents"] for flips in task["answer_flips"].values()] == [6, 6, 6]
    assert task["spread"] == max(task["scores"].values()) - min(task["scores"].values())
    assert (done["gate"]["incomparable"]) == ["limit 6", "other checkpoint, minivlm", "protocol hf"]
    plain, release, sane = done["rows"]
    assert (plain["tokens_kept"]["mean"], sane["tokens_kept"]["mean"], sane["tokens_asked"]["mean"]) == (576, 64, 64)
    assert (release["release"], release["samples_with_images"]) == (True, 6)
    # with its quirks on, a stalled pass ends the selection early: that is what the rate counts
    assert release["tokens_kept"]["mean"] < 64
    assert release["quirks"]["stall"]["share"] == release["quirks"]["stall"]["samples"] / 6 > 0
    assert done["provenance"]["model"]["device"] == "cpu"
    for variant in done["noise"]["variants"]:
        (record,) = stored.read_runs(Path("output/reproduce/tiny/noise", variant)).values()
        loaded = record.provenance.model
        assert f"batch{loaded['batch_size']}-{loaded['attn_implementation']}" == variant
    again = call(*options)
    assert (again.exit_code, last_json(again)["skipped"]) == (0, 7)
    assert read()["noise"] == done["noise"]
