"""`bench prefill`, `bench profile` and `bench questions`: shapes of the results, ratios, refusals. Nothing here depends on a time."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

from vlm_pruner_eval import ConfigError, PruningError, get_pruner
from vlm_pruner_eval.cost import DecoderShape, kv_bytes, prefill_flops
from vlm_pruner_eval.speed import geometry as geometries
from vlm_pruner_eval.speed import prefill, questions, roofline, show, stages
from vlm_pruner_eval.speed.cli import app
from vlm_pruner_eval.speed.geometry import GEOMETRIES, Geometry, build, needed_bytes, prompts
from vlm_pruner_eval.speed.prefill import Case, bench_prefill, bench_profile, overhead_of, paired_ratio, row_of, take_turns
from vlm_pruner_eval.speed.roofline import Limits, Probe, causal_layer_flops, layer_weight_bytes, prefill_bound_ms
from vlm_pruner_eval.speed.stages import Answered, answer

CPU = torch.device("cpu")
SHAPE = DecoderShape(hidden=8, intermediate=16, n_heads=2, n_kv_heads=1, head_dim=4, vocabulary=10)
TEXT = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 60}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
VISION = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def _tiny_config() -> object:
    vision = VISION | {"image_size": 60, "patch_size": 10}
    return transformers.LlavaConfig(vision_config=vision, text_config=TEXT | HEADS, image_token_index=4, image_seq_length=36)


def _tiny_images(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 60, 60, generator=generator)}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Geometry:
    geometry = Geometry("tiny", "LlavaForConditionalGeneration", _tiny_config, n_visual=36, n_patches=37, features=_tiny_images)
    monkeypatch.setitem(GEOMETRIES, "tiny", geometry)
    monkeypatch.setattr(Probe, "measure", lambda self: (self.rates.append(1e9), self.bandwidths.append(1e8)))
    return geometry


def answered(llm_ms: float, tokens: int = 1, **times: object) -> Answered:
    parts = dict.fromkeys(("vision_ms", "before_ms", "cut_ms", "behind_ms", "head_ms", "selection_ms"), 0.0)
    cpu = {"llm_cpu_ms": llm_ms / 3, "prefill_cpu_ms": llm_ms / 2, "decode_cpu_ms": [1.0]}
    fields = {"ttft_ms": 2 * llm_ms, "llm_ms": llm_ms, "decode_ms": [1.0], "tokens": torch.tensor([[tokens]])} | parts | cpu
    return Answered(**fields | times)


def case(*rounds: list[Answered], pruner: object = None) -> Case:
    return Case("case", pruner, 2, list(rounds))


# ---- what is limited by what


def test_the_bound_of_a_layer_is_the_slower_of_arithmetic_and_weights():
    flops = causal_layer_flops(SHAPE, 5)
    assert flops == 4 * 5 * 8 * (8 + 4) + 2 * 25 * 8 + 6 * 5 * 8 * 16
    weights = layer_weight_bytes(SHAPE, 2)
    assert weights == 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    computing = Limits(flops_per_s=flops * 10, bytes_per_s=weights * 1e6)
    assert prefill_bound_ms(SHAPE, [5, 5, 5], 2, computing, 2) == pytest.approx(3 * 2 * 100)
    reading = Limits(flops_per_s=flops * 1e6, bytes_per_s=weights * 10)
    assert prefill_bound_ms(SHAPE, [5, 1], 2, reading, 2) == pytest.approx(2 * 100)  # the weights are read once for all rows
    between = Limits(flops_per_s=causal_layer_flops(SHAPE, 50) * 1.0, bytes_per_s=weights * 2.0)
    assert prefill_bound_ms(SHAPE, [50, 1], 1, between, 2) == pytest.approx(1000 + 500)


def test_layer_weights_are_those_of_the_model():
    model = build(Geometry("t", "LlavaForConditionalGeneration", _tiny_config, 36, 37, _tiny_images), torch.device("meta"), torch.float16)
    layer = model.model.language_model.layers[0]
    held = sum(p.nbytes for p in layer.parameters() if p.dim() == 2)
    assert layer_weight_bytes(DecoderShape.of(model.config.text_config), 2) == held


def test_limits_are_measured_and_the_median_counts(monkeypatch):
    monkeypatch.setattr(roofline, "COPIED_BYTES", {"cpu": 1_000_000})
    monkeypatch.setattr(roofline, "SQUARE", {"cpu": 64})
    probe = Probe(SHAPE, 16, CPU, torch.float32)
    probe.rates, probe.bandwidths = [1.0, 9.0, 3.0], [5.0, 7.0, 6.0]
    assert probe.limits == Limits(3.0, 6.0)
    probe.measure()
    assert probe.rates[-1] > 1e6
    assert probe.bandwidths[-1] > 1e6


# ---- geometries


@pytest.mark.parametrize(
    ("name", "billions"), [("llava-1.5-7b", 7.06), ("llava-1.5-13b", 13.35), ("llava-next-7b", 7.06), ("qwen2-vl-7b", 8.29), ("100m", 0.1)]
)
def test_models_have_the_size_that_their_name_says(name, billions):
    model = build(GEOMETRIES[name], torch.device("meta"), torch.float16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.05 if name == "100m" else 2e-3)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def _narrow(name: str) -> Geometry:
    """The same prompt and layout with layers of a few numbers."""

    def config() -> object:
        full = GEOMETRIES[name].config()
        text = {"hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 1, "num_key_value_heads": 1}
        for key, value in {**text, "head_dim": 128, "layer_types": ["full_attention"] * 3}.items():
            setattr(full.text_config, key, value)
        towers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        merged = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 128}
        for key, value in (merged if name.startswith("qwen") else towers).items():
            setattr(full.vision_config, key, value)
        return full

    return dataclasses.replace(GEOMETRIES[name], config=config)


@pytest.mark.parametrize("name", sorted(GEOMETRIES))
def test_prompts_hold_the_visual_tokens_that_the_geometry_says(name):
    geometry = _narrow(name)
    model = build(geometry, CPU, torch.float32)
    inputs = prompts(geometry, model, 2, 20)
    assert inputs["input_ids"].shape == (2, geometry.n_visual + 20)
    assert not torch.equal(*inputs["input_ids"])
    done = answer(model, inputs, get_pruner("uniform", pruning_rate=0.75), 2, 2)
    assert [(r.n_visual, r.n_kept, r.n_images) for r in done.records] == [(geometry.n_visual, geometry.n_visual // 4, 1)] * 2
    assert done.records[0].kv_lengths == [geometry.n_visual + 20] * 2 + [geometry.n_visual // 4 + 20]


def test_memory_is_estimated_and_refused_before_anything_is_allocated(monkeypatch, tiny):
    n_weights = sum(p.numel() for p in build(tiny, torch.device("meta"), torch.float32).parameters())
    vision, text = 37 * (16 * 2 + 2 * 24), 50 * (4 * 32 + 3 * 48)
    cache = kv_bytes(DecoderShape.of(tiny.config().text_config), [50] * 4, 4)
    assert needed_bytes(tiny, torch.float32, 3, 50) == 4 * n_weights + 3 * (cache + 4 * max(vision, text))
    monkeypatch.setattr(geometries, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(prefill, "build", None)
    with pytest.raises(ConfigError, match=r"--geometry tiny: float32 at batch 4 needs at least .* GB on cpu and 0.0 GB are free; use a"):
        bench_prefill("tiny", batch_sizes=(1, 4), device="cpu")


def test_free_memory_is_that_of_the_machine():
    assert 1e8 < geometries.free_bytes(CPU) < 1e14


# ---- one answer


def test_parts_add_up_and_nothing_is_left_on_the_model(tiny):
    model = build(tiny, CPU, torch.float32)
    inputs = prompts(tiny, model, 2, 10)
    expected = model.generate(**inputs, max_new_tokens=3)[:, -3:]
    plain = answer(model, inputs, None, 3, 2)
    assert torch.equal(plain.tokens, expected)
    assert (plain.records, plain.selection_ms, len(plain.decode_ms), len(plain.decode_cpu_ms)) == ([], 0, 2, 2)
    pruned = answer(model, inputs, get_pruner("vlmpruner", pruning_rate=0.5), 3, 2)
    assert pruned.cut_ms > pruned.selection_ms > 0
    for found in (plain, pruned):
        parts = found.parts()
        assert sum(ms for name, ms in parts.items() if name != "decode per token") == pytest.approx(found.ttft_ms)
        assert min(found.vision_ms, found.before_ms, found.behind_ms, found.head_ms, found.host_ms) > 0
        assert found.llm_ms > found.before_ms + found.cut_ms + found.behind_ms
    core, text = model.model, model.model.language_model
    modules = [model, core, text, text.norm, model.lm_head, core.vision_tower, core.multi_modal_projector, *text.layers]
    assert not any(hook for module in modules for hook in module._forward_pre_hooks.values())


@pytest.mark.parametrize("layer", [0, 2])
def test_stages_are_timed_in_the_prefill_and_not_in_later_steps(tiny, monkeypatch, layer):
    made = []

    class Kept(stages._Stages):
        def __init__(self, *arguments: object):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(stages, "_Stages", Kept)
    model = build(tiny, CPU, torch.float32)
    answer(model, prompts(tiny, model, 1, 10), None, 4, layer)
    before = {"before": 1} if layer else {}
    assert {name: len(laps) for name, laps in made[0].laps.items()} == {"vision": 2, "llm": 1, **before, "cut": 1, "behind": 1, "head": 1}


def test_a_cut_before_the_first_layer_is_seen_too(tiny):
    model = build(tiny, CPU, torch.float32)
    found = answer(model, prompts(tiny, model, 1, 10), get_pruner("divprune", pruning_rate=0.5), 2, 0)
    assert found.before_ms == 0
    assert found.cut_ms > found.selection_ms > 0
    assert found.records[0].kv_lengths == [28] * 4


# ---- ratios


def test_ratios_are_medians_of_pairs():
    slow, fast = case([answered(10), answered(30)], [answered(80)]), case([answered(5), answered(10)], [answered(20)])
    assert paired_ratio(slow, fast, "llm_ms") == 3  # of 2, 3 and 4


def test_a_summary_holds_median_spread_and_the_spread_of_the_rounds():
    rounds = [[answered(9), answered(11)], [answered(10), answered(10)], [answered(11), answered(13)]]
    assert case(*rounds).summary("llm_ms") == {"ms": 10.5, "iqr_ms": 1.0, "best_ms": 9, "noise": pytest.approx((12 - 10) / 10.5)}


def test_cases_take_turns_forwards_and_backwards():
    order, cases = [], [Case("a", None, 0), Case("b", None, 0)]

    def run(one: Case) -> Answered:
        order.append(one.name)
        return answered(1)

    take_turns(cases, run, 2, lambda: order.append("|"))
    assert "".join(order) == "ab|abba|abba|abba"
    assert [len(answers) for answers in cases[0].rounds] == [2, 2, 2]


def _record(lengths: list[int], visual: list[int]) -> SimpleNamespace:
    return SimpleNamespace(kv_lengths=lengths, visual_lengths=visual, n_visual=40, n_kept=visual[-1], quirks={"stall"}, kv_bytes=100)


@pytest.mark.parametrize("lengths", [[50, 20, 20], [20, 20, 20]])
def test_a_row_says_how_far_from_the_limit_it_is(lengths):
    limits, held = Limits(1e6, 1e9), [_record(lengths, [n - 10 for n in lengths])] * 2
    plain, pruned = case([answered(90.0)] * 3), case([answered(30.0)] * 3, pruner=get_pruner("fastv", pruning_rate="0.75"))
    row = row_of(pruned, plain, held, SHAPE, limits, 4)
    bound = sum(2 * causal_layer_flops(SHAPE, n) for n in lengths) / 1e3
    full = 3 * 2 * causal_layer_flops(SHAPE, 50) / 1e3
    assert row["bound_ms"] == pytest.approx(bound)
    assert row["over_bound"] == row["best_over_bound"] == pytest.approx(30 / bound)
    assert (row["llm_speedup"], row["ttft_speedup"], row["bound_speedup"]) == (3, 3, pytest.approx(full / bound))
    assert row["of_bound_speedup"] == pytest.approx(3 / (full / bound))
    own = row["own_time"]
    assert (own["ms"], own["llm_speedup"], own["over_bound"]) == (10, 3, pytest.approx(10 / bound))
    assert own["best_over_bound"] == own["over_bound"]
    assert own["of_bound_speedup"] == pytest.approx(3 / (full / bound))
    assert row["llm_flops"] == 2 * prefill_flops(SHAPE, lengths, logits=0)
    assert (row["kv_bytes"], row["n_kept"], row["pruning_rate"], row["quirks"]) == (200, 10, "0.75", ["stall"])


def test_own_time_says_nothing_where_threads_add_up(monkeypatch):
    held, cases = [_record([50, 20], [40, 10])], [case([answered(3.0)] * 2)] * 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert row_of(*cases, held, SHAPE, Limits(1e6, 1e9), 4)["own_time"] is None


def test_overhead_is_a_ratio_and_the_tokens_are_compared():
    plain = case([answered(10, decode_ms=[2.0, 4.0, 9.0])])
    hooked = case([answered(11, decode_ms=[5.0])])
    found = overhead_of(hooked, plain)
    assert found == {"hook": "case", "same_tokens": True, "prefill": 1.1, "decode": 1.25, "prefill_cpu": 1.1, "decode_cpu": 1.0, "n": 1}
    assert not overhead_of(case([answered(11, tokens=2)]), plain)["same_tokens"]


# ---- whole runs


def test_bench_prefill_of_a_tiny_geometry(tiny, capsys):
    result = bench_prefill("tiny", ["uniform", "divprune"], ["1/2"], batch_sizes=(1, 2), n_text=10, n_new=3, repeats=1, device="cpu")
    head = ("benchmark", "device", "dtype", "threads", "versions", "command", "geometry", "n_text", "weight_bytes")
    assert json.loads(json.dumps(result)) == result
    assert set(head) <= set(result)
    assert [(r["batch"], r["method"], r["n_kept"], r["lengths"]) for r in result["rows"]] == [
        (batch, *row)
        for batch in (1, 2)
        for row in (("unpruned", 36, [46] * 4), ("uniform", 18, [46, 46, 28, 28]), ("divprune", 18, [28] * 4))
    ]
    shape = DecoderShape.of(tiny.config().text_config)
    for row in result["rows"]:
        assert row["kv_bytes"] == row["batch"] * kv_bytes(shape, row["lengths"], 4)
        assert row["bound_ms"] == pytest.approx(prefill_bound_ms(shape, row["lengths"], row["batch"], Limits(1e9, 1e8), 4))
        assert row["peak_extra_bytes"] > row["kv_bytes"]
        assert (row["llm_speedup"] == 1) == (row["method"] == "unpruned")
    assert [(o["batch"], o["hook"], o["same_tokens"], o["n"]) for o in result["overhead"]] == [
        (batch, hook, True, 3) for batch in (1, 2) for hook in ("none", "vlmpruner at rate 0")
    ]
    show.print_prefill(result)
    shown = capsys.readouterr().out
    assert "hook that prunes nothing (none, batch 2)" in shown
    assert "OTHER TOKENS" not in shown


def test_bench_profile_of_a_tiny_geometry(tiny, capsys):
    result = bench_profile("tiny", "uniform", "1/2", batch_sizes=(2,), n_text=10, n_new=2, repeats=1, device="cpu")
    assert json.loads(json.dumps(result)) == result
    plain, pruned = result["rows"]
    assert (plain["method"], pruned["method"], result["layer"]) == ("unpruned", "uniform", 2)
    assert plain["parts_ms"]["selection"] == 0 < pruned["parts_ms"]["selection"]
    show.print_profile(result)
    assert "layers from K on" in capsys.readouterr().out


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        bench_prefill("lava", batch_sizes=(), n_text=1, n_new=1, repeats=0, dtype="int8", device="xpu")
    found = caught.value.problems
    assert len(found) == 7
    assert any("did you mean" in problem for problem in found)
    assert any("--dtype: got 'int8', expected one of float32, float16, bfloat16." in problem for problem in found)


# ---- questions


def test_questions_are_answered_alike_at_any_batch_size(monkeypatch):
    monkeypatch.setattr(questions, "ROUNDS", 1)
    result = questions.bench_questions((1, 3), limit=1, device="cpu")
    assert json.loads(json.dumps(result)) == result
    assert result["same_answers"]
    assert result["n_questions"] == 6
    found = [(row["batch_size"], row["answers_that_differ"], row["kept_sets_that_differ"]) for row in result["rows"]]
    assert found == [(size, 0, 0) for size in (1, 1, 3, 3)]
    assert [row["workers"] for row in result["rows"]] == [0, 2, 0, 2]
    assert [row["speedup"] for row in result["rows"][:2]] == [1, 1]
    assert [row["workers_speedup"] for row in result["rows"][::2]] == [1, 1]
    assert min(row["prefill_ms"] for row in result["rows"]) > 0


def test_pictures_are_enlarged_and_decoded_when_they_are_looked_up():
    (document,) = questions._documents("read", 1, (500, 400))
    assert document["image"].size == (500, 400)
    assert questions._documents("read", 2, None)[1]["image"].size == (336, 336)


def test_a_row_of_questions_counts_what_differs():
    right, wrong, moved = (questions.Answer(*x) for x in (("4", (1, 2)), ("5", (1, 2)), ("4", (1, 3))))
    one, alone, ahead = questions.Case(1, 0), questions.Case(4, 0), questions.Case(4, 2)
    given = {one: [[right, right]] * 3, alone: [[right, right], [wrong, right], [moved, wrong]], ahead: [[right, right]] * 3}
    times = {one: [4.0, 4.0, 4.0], alone: [1.0, 2.0, 0.5], ahead: [0.5, 0.5, 0.5], questions.Case(1, 2): [3.0, 3.0, 3.0]}
    row = questions.row_of(alone, times, given)
    assert (row["questions_per_s"], row["speedup"], row["noise"], row["workers_speedup"]) == (2.0, 4.0, 1.5, 1.0)
    assert (row["answers_that_differ"], row["kept_sets_that_differ"]) == (2, 1)
    row = questions.row_of(ahead, times, given)
    assert (row["batch_size"], row["workers"], row["speedup"], row["workers_speedup"]) == (4, 2, 6.0, 2.0)


@pytest.mark.parametrize("sizes", [(2, 4), (1, 0), (1, 1), ()])
def test_batch_sizes_need_something_to_compare_with(sizes):
    with pytest.raises(ConfigError, match=r"--batch-sizes: got .* 1 among them to compare with"):
        questions.bench_questions(sizes)


def test_what_can_not_be_timed_is_refused_all_at_once():
    with pytest.raises(ConfigError) as error:
        questions.bench_questions((1,), workers=(2, -1), limit=0, image_size=(0, 5))
    assert [problem.split(":")[0] for problem in error.value.problems] == ["--workers", "--limit", "--image-size"]


def test_a_question_that_fails_is_no_answer(monkeypatch):
    shown = questions._messages
    monkeypatch.setattr(questions, "_messages", lambda document: None if document["task"] == "where" else shown(document))
    with pytest.raises(PruningError, match="1 of 6 questions failed at batch 1; the first: "):
        questions.bench_questions((1,), limit=1, device="cpu")


# ---- command line


def test_the_document_is_json_and_differing_answers_exit_with_1(monkeypatch, tmp_path):
    counts = {"answers_that_differ": 3, "kept_sets_that_differ": 0}
    row = {"batch_size": 1, "workers": 2, "questions_per_s": 2.0, "noise": 0.0, "prefill_ms": 9.0, "workers_speedup": 1.0} | counts
    row["speedup"] = 1.0
    asked, result = {}, {"same_answers": False, "rows": [row]}
    monkeypatch.setattr(questions, "bench_questions", lambda sizes, **options: asked.update(options) or result)
    done = CliRunner().invoke(app, ["questions", "--method", "none", "--out", str(tmp_path / "q.json"), "--json"])
    assert done.exit_code == 1
    written = json.loads((tmp_path / "q.json").read_text())
    assert json.loads(done.stdout) == written == result
    assert (asked["method"], asked["rate"], asked["workers"], asked["image_size"]) == ("none", None, [0, 2], None)
    CliRunner().invoke(app, ["questions", "--workers", "4", "--image-size", "40x30"])
    assert (asked["workers"], asked["image_size"]) == ([4], (40, 30))


def test_command_line_of_a_tiny_geometry(tiny):
    small = ["--geometry", "tiny", "--batch-sizes", "1", "--text-tokens", "10", "--new-tokens", "2", "--repeats", "1"]
    small += ["--device", "cpu", "--json"]
    done = CliRunner().invoke(app, ["prefill", "--methods", "uniform", "--rates", "0.5", *small])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["benchmark"] == "prefill"
    done = CliRunner().invoke(app, ["profile", "--method", "uniform", *small])
    assert json.loads(done.stdout)["benchmark"] == "profile"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prefill", "--batch-sizes", "1,two"], "--batch-sizes: got '1,two', expected whole numbers"),
        (["profile", "--geometry", "nano"], "--geometry: got 'nano'"),
        (["questions", "--image-size", "40"], "--image-size: got '40', expected a width and a height in pixels"),
        (["prefill", "--methods", "fastw"], "fastv"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments, sentence):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr
