"""`bench prefill` and `bench profile`: time and memory that pruning saves of a model, and where the time goes.

Random weights of the real shape: times of matrix products do not depend on their values; the choices of the methods do,
and are not those of a trained model. Every ratio is of calls that took turns in one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vlm_pruner_eval.budget import Rate
from vlm_pruner_eval.cost import DecoderShape, prefill_flops
from vlm_pruner_eval.pruners import get_pruner
from vlm_pruner_eval.speed.bench_setup import UNPRUNED, Case, Setup, paired_ratio, run_cases
from vlm_pruner_eval.speed.measuring import HOW_MEMORY, peak_extra_bytes, tell
from vlm_pruner_eval.speed.model_sizes import build, prompts
from vlm_pruner_eval.speed.roofline import Limits
from vlm_pruner_eval.speed.stages import DECODE, PARTS, SELECTION, Answered, answer


def bench_prefill(
    setup: Setup,
    methods: Sequence[str] = ("vlmpruner", "divprune"),
    rates: Sequence[Rate] = ("0.667", "0.889"),
) -> dict[str, Any]:
    """Time the first token and the later ones, unpruned and with every method at every rate, and measure memory.

    Returns
    -------
    dict
        `limits` measured, `rows`, and `overhead` of the hook where nothing is pruned; it can be written as JSON.

    Raises
    ------
    ConfigError
        Something can't be run as asked, or memory is too small.
    """
    pruners = [get_pruner(method, pruning_rate=rate) for method in methods for rate in rates]
    setup.check()
    model = build(setup.sizes, setup.torch_device, setup.torch_dtype)
    result = setup.head("prefill", model) | {
        "memory": HOW_MEMORY[setup.torch_device.type],
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "limits": [],
        "rows": [],
        "overhead": [],
    }
    for batch in setup.batch_sizes:
        tell(f"{setup.geometry}: batch {batch}")
        cases = [Case(f"{pruner.name} {pruner.pruning_rate}", pruner, pruner.layer) for pruner in pruners]
        for key, lines in _bench_batch(setup, model, batch, cases).items():
            result[key] += [{"batch": batch, **line} for line in lines]
    return result


def _answer(model: nn.Module, inputs: dict[str, Tensor], n_new: int, case: Case) -> Answered:
    return answer(model, inputs, case.pruner, n_new, case.layer)


def _bench_batch(setup: Setup, model: nn.Module, batch: int, pruned: list[Case]) -> dict[str, list[dict[str, Any]]]:
    """Lines of `limits`, `rows` and `overhead` at one batch size."""
    inputs = prompts(setup.sizes, model, batch, setup.n_text)
    shape = DecoderShape.of(model.config.get_text_config())
    limits = Limits(shape, inputs["input_ids"].numel(), setup.torch_device, setup.torch_dtype)
    # the model without hooks, and under hooks that prune nothing
    plain = Case(UNPRUNED, None, 2)
    none = Case("none", get_pruner("none", pruning_rate=0), 2)
    rate_0 = Case("vlmpruner at rate 0", get_pruner("vlmpruner", pruning_rate=0), 2)
    run_cases(
        [plain, none, rate_0, *pruned],
        partial(_answer, model, inputs, setup.n_new),
        setup.repeats,
        before_round=limits.measure,
    )
    rows = []
    for case in (plain, *pruned):
        # without a hook there are no records; `none` holds as much
        held = (none if case is plain else case).answers[0].records
        peak = {"peak_extra_bytes": peak_extra_bytes(partial(_answer, model, inputs, 1, case), setup.torch_device)}
        rows.append(row_of(case, plain, held, limits) | peak)
    rates = {"matmul_tflops": median(limits.flops_per_s) / 1e12, "copy_gb_per_s": median(limits.bytes_per_s) / 1e9}
    return {"limits": [rates], "rows": rows, "overhead": [overhead_of(case, plain) for case in (none, rate_0)]}


def row_of(case: Case, plain: Case, held: Sequence[Any], limits: Limits) -> dict[str, Any]:
    """Row of the result.

    Parameters
    ----------
    plain
        The unpruned case that took turns with this one.
    held
        One SampleRecord a row of the batch: tokens of every layer after prefill.
    """
    batch = len(held)
    lengths = held[0].kv_lengths
    full = [lengths[0] - held[0].visual_lengths[0] + held[0].n_visual] * len(lengths)
    bound = limits.bound_ms(lengths, batch)
    bound_speedup = limits.bound_ms(full, batch) / bound
    pruner = case.pruner
    return {
        "method": UNPRUNED if pruner is None else pruner.name,
        "pruning_rate": None if pruner is None else str(pruner.pruning_rate),
        "layer": None if pruner is None else case.layer,
        "n_kept": held[0].n_kept,
        "lengths": lengths,
        "quirks": sorted({quirk for record in held for quirk in record.quirks}),
        "ttft": case.summary("ttft"),
        "llm_prefill": case.summary("llm"),
        "vision_ms": case.median("vision"),
        "selection_ms": case.median(SELECTION),
        "cut_ms": case.median("cut"),
        "decode": case.summary(DECODE),
        "kv_bytes": sum(record.kv_bytes for record in held),
        "llm_flops": batch * prefill_flops(limits.shape, lengths, logits=0),
        "bound_ms": bound,
        "ttft_speedup": paired_ratio(plain, case, "ttft"),
        "bound_speedup": bound_speedup,
        "decode_speedup": paired_ratio(plain, case, DECODE),
        **_beside_bound(case, plain, "llm", bound, bound_speedup),
        "own_time": _own_time(case, plain, bound, bound_speedup),
    }


def _beside_bound(case: Case, plain: Case, name: str, bound: float, bound_speedup: float) -> dict[str, float]:
    """Ratios of a time of the language model's prefill to the bound, and of its speed-up to the bound's."""
    times = case.summary(name)
    speedup = paired_ratio(plain, case, name)
    return {
        "over_bound": times["ms"] / bound,
        "best_over_bound": times["best_ms"] / bound,
        "llm_speedup": speedup,
        "of_bound_speedup": speedup / bound_speedup,
    }


def _own_time(case: Case, plain: Case, bound: float, bound_speedup: float) -> dict[str, Any] | None:
    """The language model's prefill in this process's own time: on a busy machine the better measure.

    None where it says nothing: on a GPU, where the host only queues work, and with several threads, whose times add up.
    """
    if case.answers[0].tokens.device.type != "cpu" or torch.get_num_threads() > 1:
        return None
    return case.summary("llm_cpu") | _beside_bound(case, plain, "llm_cpu", bound, bound_speedup)


def overhead_of(case: Case, plain: Case) -> dict[str, Any]:
    """Ratios of times under a hook that prunes nothing to the bare model's: wall clock, and this process's own."""
    pairs = zip(case.answers, plain.answers, strict=True)
    names = {"prefill": "prefill", "decode": DECODE, "prefill_cpu": "prefill_cpu", "decode_cpu": "decode_cpu"}
    return {
        "hook": case.name,
        "same_tokens": all(torch.equal(hooked.tokens, bare.tokens) for hooked, bare in pairs),
        **{key: paired_ratio(case, plain, name) for key, name in names.items()},
        "n": len(case.answers),
    }


def bench_profile(setup: Setup, method: str = "vlmpruner", rate: Rate = "0.889") -> dict[str, Any]:
    """Divide the time of an answer into its parts, unpruned and pruned.

    Returns
    -------
    dict
        `rows` with `parts_ms`: medians of the parts of the time to the first token, and of one more token.

    Raises
    ------
    ConfigError
        Something can't be run as asked, or memory is too small.
    """
    pruner = get_pruner(method, pruning_rate=rate)
    setup.check()
    model = build(setup.sizes, setup.torch_device, setup.torch_dtype)
    rows = []
    for batch in setup.batch_sizes:
        inputs = prompts(setup.sizes, model, batch, setup.n_text)
        cases = [Case(UNPRUNED, None, pruner.layer), Case(method, pruner, pruner.layer)]
        run_cases(cases, partial(_answer, model, inputs, setup.n_new), setup.repeats)
        for case in cases:
            parts = {name: case.median(name) for name in (*PARTS, DECODE)}
            ttft = case.median("ttft")
            shares = {name: parts[name] / ttft for name in PARTS}
            row = {"batch": batch, "method": case.name, "ttft_ms": ttft, "parts_ms": parts}
            rows.append(row | {"share_of_ttft": shares})
    head = setup.head("profile", model)
    return head | {"layer": pruner.layer, "pruning_rate": str(pruner.pruning_rate), "rows": rows}
