"""What a row cost: from the hook's tensors to the record of a run, and from records to rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from report_sweeps import PEAKS, SHAPE, copied, edit, folder
from sweep_standin import N_LAYERS
from test_hook_exact import MIXED, ONE
from tiny_models import generate, prompts

from vlm_pruner_eval import get_pruner, prune
from vlm_pruner_eval.cost import DecoderShape, kv_bytes, literature_flops, prefill_flops
from vlm_pruner_eval.hf_compat import cache_of
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.report.load import load_sweep
from vlm_pruner_eval.report.rows import Row, rows_of
from vlm_pruner_eval.store.answers import Answer
from vlm_pruner_eval.store.kept import Kept
from vlm_pruner_eval.store.summaries import Median, Memory, Spread, Times, Tokens
from vlm_pruner_eval.sweep import records
from vlm_pruner_eval.timing import time_forwards


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
def answer(doc_id: int, lengths: list[int], *, n_visual: int = 5, **changes: object) -> Answer:
    record = SampleRecord(
        row=0,
        n_visual=n_visual,
        n_asked=3,
        n_kept=3,
        n_images=1,
        layer=1,
        kept_positions=[0, 1, 2],
        order=[0, 1, 2],
        kv_lengths=lengths,
        visual_lengths=[5, 3],
        kv_bytes=100 * (doc_id + 1),
    )
    times = {"prefill_ms": 1.0 + doc_id, "decode_ms": 2.0, "batch_size": 4, "peak_bytes": 1000 - doc_id}
    return Answer("t", "test", doc_id, "yes", record=Kept.of(record), **times | changes)


FAILED = Answer("t", "test", 3, "", error="no memory")


def test_flops_and_bytes_come_from_the_real_lengths() -> None:
    answers = [answer(0, [20, 10]), answer(1, [40, 30])]
    found = records.summarise_memory(answers, {"shape": dataclasses.asdict(SHAPE), "dtype": "float16"})
    flops = [prefill_flops(SHAPE, lengths, logits=1) for lengths in ([20, 10], [40, 30])]
    assert found.flops == Spread(mean=sum(flops) / 2, min=flops[0], max=flops[1], n=2)
    assert found.literature_flops.max == literature_flops(SHAPE, [40, 30])
    assert found.kv_bytes_counted == Spread(mean=50 * 2 * 32 * 2, min=30 * 2 * 32 * 2, max=70 * 2 * 32 * 2, n=2)
    assert found.kv_bytes_measured == Spread(mean=150, min=100, max=200, n=2)
    assert found.peak_bytes == 1000
    single = records.summarise_memory(answers, {"shape": dataclasses.asdict(SHAPE), "dtype": "float32"})
    assert single.kv_bytes_counted.mean == 2 * found.kv_bytes_counted.mean


def test_prompts_without_images_failed_ones_and_further_choices_do_not_count() -> None:
    plain = answer(2, [9, 9], n_visual=0)
    found = records.summarise_memory([answer(0, [20, 10]), answer(0, [20, 10]), answer(1, [40, 30]), plain, FAILED], {})
    assert found.kv_bytes_measured == Spread(mean=150, min=100, max=200, n=2)
    assert (found.flops, found.literature_flops, found.kv_bytes_counted) == (None, None, None)
    assert records.summarise_memory([FAILED], {}).peak_bytes is None


def test_decoded_tokens_per_second_are_rows_over_a_step() -> None:
    found = records.summarise_times([answer(0, [9]), answer(1, [9], decode_ms=4.0), answer(2, [9], decode_ms=None)], 3.0, 2.0)
    assert found.decoded_tokens_per_s == Median(median=1500.0, iqr=500.0, n=2)
    assert (found.total_s, found.answers_s) == (3.0, 2.0)


def test_units_of_a_run_count_as_much_as_they_hold() -> None:
    """One task of three prompts and one of one: medians are averaged over the prompts, spreads are those of one list."""
    lengths = [[20, 10], [40, 30], [60, 50], [80, 70]]
    answers = [answer(i, each, prefill_ms=float(10 * i)) for i, each in enumerate(lengths)]
    model = {"shape": dataclasses.asdict(SHAPE), "dtype": "float16"}
    parts, whole = ([answers[:3], answers[3:]], [answers])
    spreads = [Memory.merged([records.summarise_memory(part, model) for part in split]) for split in (parts, whole)]
    assert spreads[0].flops.mean == pytest.approx(spreads[1].flops.mean)
    assert [found.kv_bytes_counted.max for found in spreads] == [150 * 2 * 32 * 2] * 2
    times = Times.merged([records.summarise_times(part, 3.0, 2.0) for part in parts])
    assert (times.prefill_ms.median, times.prefill_ms.n) == ((3 * 10 + 30) / 4, 4)
    assert (times.total_s, times.batch_sizes) == (6.0, [4])
    tokens = Tokens.merged([records.summarise_tokens(part) for part in parts])
    assert (tokens.samples_with_images, tokens.kept.n, tokens.layers) == (4, 4, [1])


def test_times_that_other_runs_shared_are_not_there() -> None:
    shared = answer(0, [9]).untimed()
    found = records.summarise_times([shared, answer(1, [9])], 3.0, 2.0)
    assert (found.prefill_ms, found.total_s, found.batch_sizes) == (None, None, [4])
    assert Times.merged([found, records.summarise_times([answer(1, [9])], 3.0, 2.0)]).total_s is None


# ---- rows
def costs(root: Path) -> dict[str, Row]:
    """By label, those at 2/3 and without a rate."""
    return {row.label: row for row in rows_of(load_sweep(root)) if row.pruning_rate != "8/9"}


def test_costs_of_a_row() -> None:
    rows = costs(folder("good"))
    full, pruned = [50] * N_LAYERS, [50, 50, 26, 26]
    row, found = rows["vlmpruner"], rows["vlmpruner"].costs
    assert (row.tokens.kept.mean, row.tokens.layer_averaged.mean, found.batch_sizes) == (12.0, 24.0, (1,))
    assert found.flops == prefill_flops(SHAPE, pruned, logits=1)
    assert found.literature_flops == literature_flops(SHAPE, pruned)
    assert found.flops_share == found.flops / prefill_flops(SHAPE, full, logits=1)
    assert (found.kv_bytes_counted, found.kv_bytes_measured) == (kv_bytes(SHAPE, pruned, 4), 10 * sum(pruned))
    assert found.peak_bytes == PEAKS["vlmpruner"] + 11
    assert (row.prefill_ms, found.prefill_speedup) == ({"median": 8.0, "iqr": 0.0}, 2.5)
    assert (found.decode_ms["median"], found.decoded_tokens_per_s["median"], row.selection_ms["median"]) == (2.0, 500.0, 0.5)
    assert (rows["unpruned"].costs.flops_share, rows["unpruned"].costs.prefill_speedup) == (1.0, 1.0)
    assert rows["blind"].costs.flops < found.flops < rows["unpruned"].costs.flops


def test_seeds_share_a_row() -> None:
    row = costs(folder("good"))["random"]
    assert row.prefill_ms["median"] == 6.0, "the median of 5, 6 and 7"
    assert row.costs.prefill_speedup == pytest.approx(20 / 6)
    assert row.costs.flops == prefill_flops(SHAPE, [50, 50, 26, 26], logits=1)


def test_other_conditions_have_no_speedup(tmp_path: Path) -> None:
    root = copied("good", tmp_path)
    edit(root, "vlmpruner-2of3", lambda record: record["provenance"].update(processor="another"))
    edit(root, "blind", lambda record: record["times"].update(batch_sizes=[8]))
    rows = costs(root)
    assert [rows[label].costs.prefill_speedup for label in ("vlmpruner", "blind")] == [None, None]
    assert rows["random"].costs.prefill_speedup is not None


def test_a_row_without_a_finished_run_has_no_costs_and_nothing_is_a_share_of_it(tmp_path: Path) -> None:
    root = copied("good", tmp_path)
    edit(root, "unpruned", lambda record: record.update(status="failed", problem="no memory"))
    rows = costs(root)
    assert rows["unpruned"].costs is None
    assert (rows["vlmpruner"].costs.flops_share, rows["vlmpruner"].costs.prefill_speedup) == (None, None)
