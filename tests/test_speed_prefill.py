"""`bench prefill` and `bench profile`: shapes of the results, ratios, refusals. Nothing here depends on a time."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

from vlm_pruner_eval import ConfigError, get_pruner
from vlm_pruner_eval.cost import DecoderShape, kv_bytes, prefill_flops
from vlm_pruner_eval.speed import bench_prefill, bench_setup, model_sizes, roofline, stages
from vlm_pruner_eval.speed.bench_commands import app
from vlm_pruner_eval.speed.bench_setup import Case, Setup, paired_ratio, run_cases
from vlm_pruner_eval.speed.bench_tables import print_result
from vlm_pruner_eval.speed.model_sizes import GEOMETRIES, Geometry, build, needed_bytes, prompts
from vlm_pruner_eval.speed.roofline import Limits, causal_layer_flops, layer_weight_bytes
from vlm_pruner_eval.speed.stages import DECODE, PARTS, Answered, answer

CPU = torch.device("cpu")
SHAPE = DecoderShape(hidden=8, intermediate=16, n_heads=2, n_kv_heads=1, head_dim=4, vocabulary=10)
TEXT = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 60}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"model_type": "clip_vision_model", "image_size": 60, "patch_size": 10, **TOWER}


def tiny_config() -> object:
    return transformers.LlavaConfig(vision_config=VISION, text_config=TEXT | HEADS, image_token_index=4)


def tiny_images(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 60, 60, generator=generator)}


TINY = Geometry("tiny", tiny_config, "LlavaForConditionalGeneration", n_visual=36, n_patches=37, features=tiny_images)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Geometry:
    """The geometry is known, and limits are not measured."""
    monkeypatch.setitem(GEOMETRIES, "tiny", TINY)
    monkeypatch.setattr(Limits, "measure", lambda self: (self.flops_per_s.append(1e9), self.bytes_per_s.append(1e8)))
    return TINY


def answered(llm: float, tokens: int = 1, **times: float) -> Answered:
    ms = {"ttft": 2 * llm, "llm": llm, "prefill": llm, DECODE: 1.0, "cut": 0.0, **dict.fromkeys(PARTS, 0.0)}
    ms |= {"llm_cpu": llm / 3, "prefill_cpu": llm / 2, "decode_cpu": 1.0}
    return Answered(ms | times, torch.tensor([[tokens]]), [])


def case(*rounds: list[Answered], pruner: object = None) -> Case:
    return Case("case", pruner, 2, list(rounds))


def limits(flops_per_s: float, bytes_per_s: float, dtype: torch.dtype = torch.float16) -> Limits:
    return Limits(SHAPE, 16, CPU, dtype, [flops_per_s], [bytes_per_s])


# ---- the bound
def test_the_bound_of_a_layer_is_the_slower_of_arithmetic_and_weights():
    flops = causal_layer_flops(SHAPE, 5)
    weights = layer_weight_bytes(SHAPE, 2)
    assert flops == 4 * 5 * 8 * (8 + 4) + 2 * 25 * 8 + 6 * 5 * 8 * 16
    assert weights == 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)
    assert limits(flops * 10, weights * 1e6).bound_ms([5, 5, 5], 2) == pytest.approx(3 * 2 * 100)
    assert limits(flops * 1e6, weights * 10).bound_ms([5, 1], 2) == pytest.approx(2 * 100), "weights are read once for all rows"
    between = limits(causal_layer_flops(SHAPE, 50) * 1.0, weights * 2.0)
    assert between.bound_ms([50, 1], 1) == pytest.approx(1000 + 500)


def test_layer_weights_are_those_of_the_model():
    model = build(TINY, torch.device("meta"), torch.float16)
    layer = model.model.language_model.layers[0]
    held = sum(p.nbytes for p in layer.parameters() if p.dim() == 2)
    assert layer_weight_bytes(DecoderShape.of(model.config.text_config), 2) == held


def test_limits_are_measured_and_the_median_counts(monkeypatch):
    monkeypatch.setattr(roofline, "COPIED_BYTES", {"cpu": 1_000_000})
    monkeypatch.setattr(roofline, "SQUARE", {"cpu": 64})
    one = limits(1e9, 1e9)
    one.measure()
    assert one.flops_per_s[-1] > 1e6 and one.bytes_per_s[-1] > 1e6
    three = Limits(SHAPE, 16, CPU, torch.float16, [1.0, 9.0, 3.0], [5.0, 7.0, 6.0])
    assert three.bound_ms([5], 1) == limits(3.0, 6.0).bound_ms([5], 1)


# ---- geometries
SIZES_B = {"llava-1.5-7b": 7.0634, "llava-1.5-13b": 13.3515, "llava-next-7b": 7.0634, "qwen2-vl-7b": 8.2914, "100m": 0.0971}


@pytest.mark.parametrize("name", SIZES_B)
def test_models_have_the_size_that_their_name_says(name):
    model = build(GEOMETRIES[name], torch.device("meta"), torch.float16)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(SIZES_B[name] * 1e9, rel=1e-3)
    assert {p.dtype for p in model.parameters()} == {torch.float16}


def narrow(name: str) -> Geometry:
    """The same prompt and layout with layers of a few numbers."""

    def config() -> object:
        full = GEOMETRIES[name].config()
        text = {"hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 1}
        text |= {"num_key_value_heads": 1, "head_dim": 128, "layer_types": ["full_attention"] * 3}
        vision = TOWER | {"intermediate_size": 16}
        if name.startswith("qwen"):
            vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 128}
        for part, values in ((full.text_config, text), (full.vision_config, vision)):
            for key, value in values.items():
                setattr(part, key, value)
        return full

    return dataclasses.replace(GEOMETRIES[name], config=config)


@pytest.mark.parametrize("name", sorted(GEOMETRIES))
def test_prompts_hold_the_visual_tokens_that_the_geometry_says(name):
    geometry = narrow(name)
    model = build(geometry, CPU, torch.float32)
    inputs = prompts(geometry, model, 2, 20)
    n_visual = geometry.n_visual
    assert inputs["input_ids"].shape == (2, n_visual + 20)
    assert not torch.equal(*inputs["input_ids"])
    done = answer(model, inputs, get_pruner("uniform", pruning_rate=0.75), 2, 2)
    assert [(r.n_visual, r.n_kept, r.n_images) for r in done.records] == [(n_visual, n_visual // 4, 1)] * 2
    assert done.records[0].kv_lengths == [n_visual + 20] * 2 + [n_visual // 4 + 20]


def test_memory_is_estimated_and_refused_before_anything_is_allocated(monkeypatch, tiny):
    n_weights = sum(p.numel() for p in build(tiny, torch.device("meta"), torch.float32).parameters())
    cache = kv_bytes(DecoderShape.of(tiny.config().text_config), [50] * 4, 4)
    assert needed_bytes(tiny, torch.float32, 3, 50) == 4 * n_weights + 3 * cache
    assert 1e8 < model_sizes.free_bytes(CPU) < 1e14
    monkeypatch.setattr(model_sizes, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(bench_prefill, "build", None)
    with pytest.raises(ConfigError, match=r"--geometry tiny: float32 at batch 4 needs at least .* GB .* 0\.0 GB are free"):
        bench_prefill.bench_prefill(Setup(geometry="tiny", batch_sizes=(1, 4), device="cpu"))


# ---- one answer
def hooks_of(model: torch.nn.Module) -> list[object]:
    """Hooks on all modules, those of transformers included."""
    return [[*module._forward_pre_hooks.values(), *module._forward_hooks.values()] for module in model.modules()]


def test_parts_add_up_and_nothing_is_left_on_the_model(tiny):
    model = build(tiny, CPU, torch.float32)
    inputs = prompts(tiny, model, 2, 10)
    expected = model.generate(**inputs, max_new_tokens=3)[:, -3:]
    before = hooks_of(model)
    plain = answer(model, inputs, None, 3, 2)
    assert torch.equal(plain.tokens, expected)
    assert (plain.records, plain.ms["selection"]) == ([], 0)
    pruned = answer(model, inputs, get_pruner("vlmpruner", pruning_rate=0.5), 3, 2)
    assert pruned.ms["cut"] > pruned.ms["selection"] > 0
    for ms in (plain.ms, pruned.ms):
        assert sum(ms[name] for name in PARTS) == pytest.approx(ms["ttft"])
        assert min(ms[name] for name in (*PARTS, DECODE) if name != "selection") > 0
        assert ms["llm"] > ms["layers before K"] + ms["cut"] + ms["layers from K on"]
        assert ms["prefill"] == ms["ttft"] - ms["vision"]
    assert hooks_of(model) == before


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
    once = {"llm", "cut", "layers from K on", "lm_head"} | ({"layers before K"} if layer else set())
    assert {name: len(laps) for name, laps in made[0].laps.items()} == {"vision": 2, **dict.fromkeys(once, 1)}


def test_a_cut_before_the_first_layer_is_seen_too(tiny):
    model = build(tiny, CPU, torch.float32)
    found = answer(model, prompts(tiny, model, 1, 10), get_pruner("divprune", pruning_rate=0.5), 2, 0)
    assert found.ms["layers before K"] == 0
    assert found.ms["cut"] > found.ms["selection"] > 0
    assert found.records[0].kv_lengths == [28] * 4


# ---- ratios
def test_ratios_are_medians_of_pairs():
    slow = case([answered(10), answered(30)], [answered(80)])
    fast = case([answered(5), answered(10)], [answered(20)])
    assert paired_ratio(slow, fast, "llm") == 3  # of 2, 3 and 4


def test_every_case_is_warmed_up_and_then_takes_turns_in_every_round():
    order, cases = [], [Case("a", None, 0), Case("b", None, 0)]

    def run(one: Case) -> Answered:
        order.append(one.name)
        return answered(1)

    run_cases(cases, run, 2, lambda: order.append("|"))
    assert "".join(order) == "ab|abba|abba|abba"
    assert [len(answers) for answers in cases[0].rounds] == [2, 2, 2]


def record(lengths: list[int], visual: list[int]) -> SimpleNamespace:
    return SimpleNamespace(kv_lengths=lengths, visual_lengths=visual, n_visual=40, n_kept=visual[-1], quirks={"stall"}, kv_bytes=100)


@pytest.mark.parametrize("lengths", [[50, 20, 20], [20, 20, 20]])
def test_a_row_says_how_far_from_the_limit_it_is(lengths, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    held = [record(lengths, [n - 10 for n in lengths])] * 2
    plain = case([answered(90.0)] * 3)
    pruned = case([answered(30.0)] * 3, pruner=get_pruner("fastv", pruning_rate="0.75"))
    row = bench_prefill.row_of(pruned, plain, held, limits(1e6, 1e9))
    bound = sum(2 * causal_layer_flops(SHAPE, n) for n in lengths) / 1e3
    full = 3 * 2 * causal_layer_flops(SHAPE, 50) / 1e3
    assert row["bound_ms"] == pytest.approx(bound)
    assert row["over_bound"] == row["best_over_bound"] == pytest.approx(30 / bound)
    assert (row["llm_speedup"], row["ttft_speedup"], row["bound_speedup"]) == (3, 3, pytest.approx(full / bound))
    assert row["of_bound_speedup"] == row["own_time"]["of_bound_speedup"] == pytest.approx(3 / (full / bound))
    assert (row["own_time"]["ms"], row["own_time"]["llm_speedup"]) == (10, 3)
    assert row["own_time"]["over_bound"] == row["own_time"]["best_over_bound"] == pytest.approx(10 / bound)
    assert row["llm_flops"] == 2 * prefill_flops(SHAPE, lengths, logits=0)
    assert (row["kv_bytes"], row["n_kept"], row["pruning_rate"], row["quirks"]) == (200, 10, "0.75", ["stall"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert bench_prefill.row_of(pruned, plain, held, limits(1e6, 1e9))["own_time"] is None, "times of threads add up"


def test_overhead_is_a_ratio_and_the_tokens_are_compared():
    plain = case([answered(10, **{DECODE: 4.0})])
    found = bench_prefill.overhead_of(case([answered(11, **{DECODE: 5.0})]), plain)
    ratios = {"prefill": 1.1, "decode": 1.25, "prefill_cpu": 1.1, "decode_cpu": 1.0}
    assert found == {"hook": "case", "same_tokens": True, **ratios, "n": 1}
    assert not bench_prefill.overhead_of(case([answered(11, tokens=2)]), plain)["same_tokens"]


# ---- whole runs
def test_bench_prefill_of_a_tiny_geometry(tiny, capsys):
    setup = Setup(geometry="tiny", batch_sizes=(1, 2), n_text=10, n_new=3, repeats=1, device="cpu")
    result = bench_prefill.bench_prefill(setup, ["uniform", "divprune"], ["1/2"])
    assert json.loads(json.dumps(result)) == result
    head = {"benchmark", "device", "dtype", "threads", "versions", "command", "geometry", "n_text", "weight_bytes", "memory"}
    assert head <= set(result)
    lines = [("unpruned", 36, [46] * 4), ("uniform", 18, [46, 46, 28, 28]), ("divprune", 18, [28] * 4)]
    found = [(row["batch"], row["method"], row["n_kept"], row["lengths"]) for row in result["rows"]]
    assert found == [(batch, *line) for batch in (1, 2) for line in lines]
    shape = DecoderShape.of(tiny.config().text_config)
    bounds = Limits(shape, 0, CPU, torch.float32, [1e9], [1e8])
    for row in result["rows"]:
        assert row["kv_bytes"] == row["batch"] * kv_bytes(shape, row["lengths"], 4)
        assert row["bound_ms"] == pytest.approx(bounds.bound_ms(row["lengths"], row["batch"]))
        assert row["peak_extra_bytes"] > row["kv_bytes"]
        assert (row["llm_speedup"] == 1) == (row["method"] == "unpruned")
    hooks = [(batch, hook, True, 3) for batch in (1, 2) for hook in ("none", "vlmpruner at rate 0")]
    assert [(one["batch"], one["hook"], one["same_tokens"], one["n"]) for one in result["overhead"]] == hooks
    assert [(one["batch"], one["copy_gb_per_s"]) for one in result["limits"]] == [(1, 0.1), (2, 0.1)]
    print_result(result)
    shown = capsys.readouterr().out
    assert "vlmpruner at rate 0" in shown and "of_bound_speedup" in shown and "37 patches" in shown


def test_bench_profile_of_a_tiny_geometry(tiny, capsys):
    setup = Setup(geometry="tiny", batch_sizes=(2,), n_text=10, n_new=2, repeats=1, device="cpu")
    result = bench_prefill.bench_profile(setup, "uniform", "1/2")
    assert json.loads(json.dumps(result)) == result
    plain, pruned = result["rows"]
    assert (plain["method"], pruned["method"], result["layer"]) == ("unpruned", "uniform", 2)
    assert plain["parts_ms"]["selection"] == 0 < pruned["parts_ms"]["selection"]
    assert [*plain["parts_ms"]] == [*PARTS, DECODE]
    print_result(result)
    assert "layers from K on" in capsys.readouterr().out


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        Setup(geometry="lava", batch_sizes=(), n_text=1, n_new=1, repeats=0, dtype="int8", device="xpu").check()
    found = " ".join(caught.value.problems)
    assert len(caught.value.problems) == 7
    assert "did you mean" in found and "--dtype: got 'int8', expected one of float32" in found


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [bench_setup._is_here(name) for name in ("cpu", "cuda", "cuda:0", "cuda:1", "cuda:x", "meta")] == [
        *(True, True, True),
        *(False, False, False),
    ]


def test_command_line_of_a_tiny_geometry(tiny):
    small = ["--geometry", "tiny", "--batch-sizes", "1", "--text-tokens", "10", "--new-tokens", "2", "--repeats", "1"]
    small += ["--device", "cpu", "--json"]
    done = CliRunner().invoke(app, ["prefill", "--methods", "uniform", "--rates", "0.5", *small])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["benchmark"] == "prefill"
    done = CliRunner().invoke(app, ["profile", "--method", "uniform", *small])
    assert json.loads(done.stdout)["benchmark"] == "profile"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prefill", "--batch-sizes", "1,two"], "--batch-sizes: got '1,two', expected whole numbers"),
        (["prefill", "--batch-sizes", "9" * 400], "--batch-sizes: got"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments, sentence):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr
