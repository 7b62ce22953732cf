"""What a row cost: from the hook's tensors to the record of a run, and from records to rows."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from sweep_standin import N_LAYERS, N_VISUAL, StandIn, make_config, task_manager, write_tasks
from test_hook_exact import MIXED, ONE
from tiny_models import generate, prompts
from vlm_pruner_eval.report.efficiency import EfficiencyRow, efficiency

from vlm_pruner_eval import get_pruner, prune
from vlm_pruner_eval.cost import DecoderShape, kv_bytes, literature_flops, prefill_flops
from vlm_pruner_eval.hf_compat import cache_of
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.lmms.log import Answer
from vlm_pruner_eval.report.load import load_results
from vlm_pruner_eval.report.rows import rows_of
from vlm_pruner_eval.sweep import records
from vlm_pruner_eval.sweep.runner import run_sweep
from vlm_pruner_eval.timing import time_forwards

SHAPE = DecoderShape(hidden=64, intermediate=96, n_heads=4, n_kv_heads=2, head_dim=16, vocabulary=120)
PEAKS = {"none": 9000, "vlmpruner": 5000, "random": 4000, "blind": 3000}


# ---- measured in the hook
@pytest.mark.parametrize(("method", "rate"), [("none", 0), ("uniform", "2/3"), ("pool", "2/3")])
def test_measured_bytes_are_those_of_the_cache(tiny_model, family: str, method: str, rate: object) -> None:
    model, inputs = tiny_model(family), prompts(family, ONE)
    with prune(model, get_pruner(method, pruning_rate=rate)) as ledger:
        cache = cache_of(generate(model, inputs, 1))
    (record,) = ledger.records
    assert record.kv_bytes == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 4
    assert record.kv_bytes == kv_bytes(DecoderShape.of(model.config.get_text_config()), record.kv_lengths, 4)
    assert record.as_json()["kv_bytes"] == record.kv_bytes


def test_a_batchs_padding_counts_and_is_shared(tiny_model) -> None:
    model = tiny_model("llava")
    with prune(model, get_pruner("uniform", pruning_rate="2/3")) as ledger:
        cache = cache_of(generate(model, prompts("llava", MIXED), 1))
    whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert [record.kv_bytes for record in ledger.records] == [whole // 3] * 3
    counted = [kv_bytes(DecoderShape.of(model.config.text_config), record.kv_lengths, 4) for record in ledger.records]
    assert sum(counted) < whole


def test_without_a_cache_there_is_nothing_to_measure(tiny_model) -> None:
    with prune(tiny_model("llava"), get_pruner("uniform", pruning_rate="2/3")) as ledger, torch.no_grad():
        tiny_model("llava")(**prompts("llava", ONE), use_cache=False)
    assert ledger.records[0].kv_bytes is None


def test_a_gpus_peak_is_measured_and_a_cpu_has_none(tiny_model) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_model("llava").to(device)
    try:
        with time_forwards(model.model) as times:
            generate(model, {name: value.to(device) for name, value in prompts("llava", ONE).items()}, 2)
    finally:
        model.to("cpu")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert times.peak_bytes is None if device == "cpu" else times.peak_bytes > weights
    assert (len(times.prefill), len(times.decode)) == (1, 1)


# ---- summarised over a run
def sample(doc_id: int, lengths: list[int], **changes: object) -> dict:
    record = SampleRecord(
        row=0,
        n_visual=5,
        n_asked=3,
        n_kept=3,
        n_images=1,
        layer=1,
        kept_positions=[],
        order=[],
        kv_lengths=lengths,
        visual_lengths=[5, 3],
        kv_bytes=100 * (doc_id + 1),
    )
    shared = {"task": "t", "prefill_ms": 1.0 + doc_id, "decode_ms": 2.0, "batch_size": 4, "peak_bytes": 1000 - doc_id}
    return shared | {"doc_id": doc_id, "record": record.as_json()} | changes


def test_flops_and_bytes_come_from_the_real_lengths() -> None:
    samples = [sample(0, [20, 10]), sample(1, [40, 30])]
    found = records.summarise_memory(samples, {"shape": dataclasses.asdict(SHAPE), "dtype": "float16"})
    flops = [prefill_flops(SHAPE, lengths, logits=1) for lengths in ([20, 10], [40, 30])]
    assert found["flops"] == {"mean": sum(flops) / 2, "min": flops[0], "max": flops[1]}
    assert found["literature_flops"]["max"] == literature_flops(SHAPE, [40, 30])
    assert found["kv_bytes_counted"] == {"mean": 50 * 2 * 32 * 2, "min": 30 * 2 * 32 * 2, "max": 70 * 2 * 32 * 2}
    assert found["kv_bytes_measured"] == {"mean": 150, "min": 100, "max": 200}
    assert found["peak_bytes"] == 1000
    single = records.summarise_memory(samples, {"shape": dataclasses.asdict(SHAPE), "dtype": "float32"})
    assert single["kv_bytes_counted"]["mean"] == 2 * found["kv_bytes_counted"]["mean"]


def test_prompts_without_images_failed_ones_and_further_choices_do_not_count() -> None:
    plain = sample(2, [9, 9])
    plain["record"]["n_visual"] = 0
    failed = {"task": "t", "doc_id": 3, "record": None, "prefill_ms": None, "decode_ms": None, "batch_size": None}
    found = records.summarise_memory([sample(0, [20, 10]), sample(0, [20, 10]), sample(1, [40, 30]), plain, failed], {})
    assert found["kv_bytes_measured"] == {"mean": 150, "min": 100, "max": 200}
    assert (found["flops"], found["literature_flops"], found["kv_bytes_counted"]) == (None, None, None)
    assert records.summarise_memory([failed], {})["peak_bytes"] is None


def test_decoded_tokens_per_second_are_rows_over_a_step() -> None:
    found = records.summarise_times([sample(0, [9]), sample(1, [9], decode_ms=4.0), sample(2, [9], decode_ms=None)])
    assert found["decoded_tokens_per_s"] == {"median": 1500.0, "iqr": 500.0, "n": 2}


# ---- rows
class Costly(StandIn):
    """The stand-in with a shape, and answers that carry what a GPU would measure."""

    def describe(self) -> dict[str, object]:
        return super().describe() | {"shape": dataclasses.asdict(SHAPE)}

    def _answer(self, doc_id: int, task: str, split: str) -> Answer:
        answer = super()._answer(doc_id, task, split)
        text = 50 - N_VISUAL
        lengths = [text + n for n in answer.record.visual_lengths]
        prefill_ms = {"none": 20.0, "vlmpruner": 8.0, "random": 5.0 + self.params.get("seed", 0), "blind": 1.0}[self.method]
        record = dataclasses.replace(answer.record, kv_lengths=lengths, kv_bytes=10 * sum(lengths))
        return dataclasses.replace(answer, record=record, prefill_ms=prefill_ms, peak_bytes=PEAKS[self.method] + doc_id)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("costs")
    tasks = task_manager(write_tasks(root / "tasks"))
    run_sweep(make_config(), root / "out", console=Console(file=io.StringIO()), load=lambda *_, **__: Costly(), task_manager=tasks)
    return root / "out"


def by_label(folder: Path) -> dict[str, EfficiencyRow]:
    return {row.label: row for row in efficiency(load_results(folder))}


def test_rows_are_those_of_the_main_table(folder: Path) -> None:
    results = load_results(folder)
    assert [(row.label, row.pruning_rate) for row in efficiency(results)] == [(row.label, row.pruning_rate) for row in rows_of(results)]


def test_costs_of_a_row(folder: Path) -> None:
    rows = by_label(folder)
    full, pruned = [50] * N_LAYERS, [50, 50, 26, 26]
    row = rows["vlmpruner"]
    assert (row.kept, row.layer_averaged, row.batch_sizes) == (12.0, 24.0, (1,))
    assert row.flops == prefill_flops(SHAPE, pruned, logits=1)
    assert row.literature_flops == literature_flops(SHAPE, pruned)
    assert row.flops_share == row.flops / prefill_flops(SHAPE, full, logits=1)
    assert (row.kv_bytes_counted, row.kv_bytes_measured) == (kv_bytes(SHAPE, pruned, 4), 10 * sum(pruned))
    assert row.peak_bytes == PEAKS["vlmpruner"] + 11
    assert (row.prefill_ms, row.prefill_speedup) == ({"median": 8.0, "iqr": 0.0}, 2.5)
    assert row.decode_ms["median"] == 2.0 and row.decoded_tokens_per_s["median"] == 500.0 and row.selection_ms["median"] == 0.5
    assert (rows["unpruned"].flops_share, rows["unpruned"].prefill_speedup) == (1.0, 1.0)
    assert rows["blind"].flops < row.flops < rows["unpruned"].flops


def test_seeds_share_a_row(folder: Path) -> None:
    row = by_label(folder)["random"]
    assert row.prefill_ms["median"] == 6.0, "the median of 5, 6 and 7"
    assert row.prefill_speedup == pytest.approx(20 / 6)
    assert row.flops == prefill_flops(SHAPE, [50, 50, 26, 26], logits=1)


def rewritten(folder: Path, tmp_path: Path, change) -> Path:
    """A copy of the results whose records went through `change`."""
    for path in folder.rglob("*"):
        target = tmp_path / path.relative_to(folder)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path.name == "run.json":
            record = json.loads(path.read_text())
            change(record)
            target.write_text(json.dumps(record))
        else:
            target.write_bytes(path.read_bytes())
    return tmp_path


def test_other_conditions_have_no_speedup(folder: Path, tmp_path: Path) -> None:
    def move(record: dict) -> None:
        if record["method"] == "vlmpruner":
            record["provenance"]["processor"] = "another"
        if record["method"] == "blind":
            record["times"]["batch_sizes"] = [8]

    rows = by_label(rewritten(folder, tmp_path, move))
    assert [rows[label].prefill_speedup for label in ("vlmpruner", "blind")] == [None, None]
    assert rows["random"].prefill_speedup is not None


def test_records_of_an_older_version_have_times_only(folder: Path, tmp_path: Path) -> None:
    def age(record: dict) -> None:
        del record["memory"], record["times"]["decoded_tokens_per_s"]

    row = by_label(rewritten(folder, tmp_path, age))["vlmpruner"]
    assert (row.kept, row.prefill_ms["median"]) == (12.0, 8.0)
    assert (row.flops, row.flops_share, row.kv_bytes_measured, row.peak_bytes, row.decoded_tokens_per_s) == (None,) * 5


def test_a_run_that_is_not_finished_has_no_row(folder: Path, tmp_path: Path) -> None:
    copy = rewritten(folder, tmp_path, lambda record: record.update(status="failed" if record["method"] == "none" else "finished"))
    rows = by_label(copy)
    assert "unpruned" not in rows
    assert (rows["vlmpruner"].flops_share, rows["vlmpruner"].prefill_speedup) == (None, None)
