"""What pruning saves of a model's time and memory, beside the least time that the machine allows, and what the hook itself costs.

Random weights of the real shape: the times of matrix products do not depend on their values; the choices of the methods do, and are
not those of a trained model. Every ratio is of calls that took turns in one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

from vlm_pruner_eval.budget import Rate
from vlm_pruner_eval.cost import DecoderShape, prefill_flops
from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.lmms.settings import DEVICE
from vlm_pruner_eval.pruners import Pruner, get_pruner
from vlm_pruner_eval.shown import short
from vlm_pruner_eval.speed.geometry import GEOMETRIES, Geometry, build, check_memory, prompts
from vlm_pruner_eval.speed.machine import machine
from vlm_pruner_eval.speed.memory import HOW, peak_extra_bytes
from vlm_pruner_eval.speed.roofline import Limits, Probe, prefill_bound_ms
from vlm_pruner_eval.speed.stages import Answered, answer
from vlm_pruner_eval.timing import median_iqr

ROUNDS = 3
METHODS, RATES, BATCH_SIZES = ("vlmpruner", "divprune"), ("0.667", "0.889"), (1, 8)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PLAIN, NONE = "unpruned", "none"


@dataclass(frozen=True)
class Request:
    """What is asked of the machine.

    Attributes
    ----------
    n_text, n_new
        Words of the prompt around the image, and tokens generated.
    repeats
        Answers of each case in each round.
    """

    geometry: Geometry
    device: torch.device
    dtype: torch.dtype
    batch_sizes: tuple[int, ...]
    n_text: int
    n_new: int
    repeats: int

    @classmethod
    def of(
        cls, geometry: str, *, device: str | None, dtype: str | None, batch_sizes: Sequence[int], n_text: int, n_new: int, repeats: int
    ) -> Request:
        """Check everything that can be checked before the model is made.

        Raises
        ------
        ConfigError
            All problems at once; or, alone, that memory is too small.
        """
        problems = [
            f"{option}: got {value}, expected {least} or more."
            for option, value, least in (
                ("--text-tokens", n_text, 8),
                ("--new-tokens", n_new, 2),
                ("--repeats", repeats, 1),
                ("--batch-sizes", min(batch_sizes, default=0), 1),
            )
            if value < least
        ]
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        known = name.partition(":")[0] in HOW and DEVICE.fullmatch(name) is not None
        where = torch.device(name if known else "cpu")
        if not known or (where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count()):
            problems.append(f"--device: got {short(device)}, expected cpu, or cuda where torch finds a GPU.")
        chosen = dtype or ("float16" if where.type == "cuda" else "float32")
        if chosen not in DTYPES:
            problems.append(f"--dtype: got {chosen!r}, expected one of {', '.join(DTYPES)}.")
        if geometry not in GEOMETRIES:
            problems.append(f"--geometry: got {geometry!r}, expected the name of a geometry; {closest(geometry, GEOMETRIES)}")
        if problems:
            raise ConfigError(problems)
        asked = cls(GEOMETRIES[geometry], where, DTYPES[chosen], tuple(batch_sizes), n_text, n_new, repeats)
        check_memory(asked.geometry, where, asked.dtype, max(batch_sizes), asked.geometry.n_visual + n_text + n_new)
        return asked

    def head(self, benchmark: str, model: nn.Module) -> dict[str, Any]:
        """The fields that a result starts with."""
        return {
            "benchmark": benchmark,
            **machine(self.dtype, [self.device]),
            "geometry": self.geometry.name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "attention": model.config._attn_implementation,
            "image": self.geometry.image,
            "n_visual": self.geometry.n_visual,
            "n_text": self.n_text,
            "n_new": self.n_new,
            "rounds": ROUNDS,
            "repeats": self.repeats,
        }


@dataclass(frozen=True)
class Case:
    """One way to answer; `rounds` holds its answers, in the order of the repeats that all cases share."""

    name: str
    pruner: Pruner | None
    layer: int
    rounds: list[list[Answered]] = field(default_factory=list)

    @property
    def answers(self) -> list[Answered]:
        """Those of all rounds."""
        return [answered for answers in self.rounds for answered in answers]

    def values(self, name: str) -> list[float]:
        """One number an answer; of a list (tokens), its median."""
        found = [getattr(answered, name) for answered in self.answers]
        return [median(value) if isinstance(value, list) else value for value in found]

    def summary(self, name: str) -> dict[str, float]:
        """Median, interquartile range, the least, and how far the rounds' medians lie apart, as a share of the median."""
        values, size = self.values(name), len(self.rounds[0])
        middle, iqr = median_iqr(values)
        medians = [median(values[first : first + size]) for first in range(0, len(values), size)]
        return {"ms": middle, "iqr_ms": iqr, "best_ms": min(values), "noise": (max(medians) - min(medians)) / middle}


def paired_ratio(above: Case, below: Case, name: str) -> float:
    """Median over the repeats of one case's number over another's."""
    return median(a / b for a, b in zip(above.values(name), below.values(name), strict=True))


def cases_of(pruners: Iterable[Pruner], *, with_overhead: bool = True) -> list[Case]:
    """The model without hooks, with `none` and (to see the hook's own cost) a method at rate 0, then `pruners`."""
    cases = [Case(PLAIN, None, 2), Case(NONE, get_pruner(NONE, pruning_rate=0), 2)]
    if with_overhead:
        cases.append(Case("vlmpruner at rate 0", get_pruner("vlmpruner", pruning_rate=0), 2))
    return cases + [Case(f"{pruner.name} {pruner.pruning_rate}", pruner, pruner.layer) for pruner in pruners]


def take_turns(
    cases: Sequence[Case], run: Callable[[Case], Answered], repeats: int, before_round: Callable[[], None] = lambda: None
) -> None:
    """Fill every case's `rounds`; every second repeat goes backwards, so that a drift of the machine cancels."""
    for case in cases:
        run(case)  # not counted: memory not yet touched, kernels not yet loaded
    for _ in range(ROUNDS):
        before_round()
        answers: dict[str, list[Answered]] = {case.name: [] for case in cases}
        for repeat in range(repeats):
            for case in cases if repeat % 2 == 0 else reversed(cases):
                answers[case.name].append(run(case))
        for case in cases:
            case.rounds.append(answers[case.name])


def bench_prefill(
    geometry: str,
    methods: Sequence[str] = METHODS,
    rates: Sequence[Rate] = RATES,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    n_text: int = 64,
    n_new: int = 8,
    repeats: int = 3,
    dtype: str | None = None,
    device: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time the first token and the later ones, unpruned and pruned, and measure memory.

    Parameters
    ----------
    geometry
        A name in `speed.geometry.GEOMETRIES`.
    methods, rates
        Every method is run at every rate.
    n_text, n_new
        Words of the prompt around the image, and tokens generated.
    repeats
        Answers of each case in each of three rounds.
    dtype, device
        Default: float16 on a GPU if there is one, else float32 on the CPU.
    progress
        Told of every batch size as it begins.

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
    options = {"device": device, "dtype": dtype, "batch_sizes": batch_sizes, "n_text": n_text, "n_new": n_new, "repeats": repeats}
    asked = Request.of(geometry, **options)
    model = build(asked.geometry, asked.device, asked.dtype)
    found: dict[str, list[dict[str, Any]]] = {"limits": [], "rows": [], "overhead": []}
    for batch in asked.batch_sizes:
        progress(f"{asked.geometry.name}: batch {batch}")
        _bench_batch(asked, model, batch, cases_of(pruners), found)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {**asked.head("prefill", model), "memory": HOW[asked.device.type], "weight_bytes": weights, **found}


def _bench_batch(asked: Request, model: nn.Module, batch: int, cases: list[Case], found: dict[str, list[dict[str, Any]]]) -> None:
    inputs, shape = prompts(asked.geometry, model, batch, asked.n_text), DecoderShape.of(model.config.get_text_config())
    probe = Probe(shape, inputs["input_ids"].numel(), asked.device, asked.dtype)
    take_turns(cases, lambda case: answer(model, inputs, case.pruner, asked.n_new, case.layer), asked.repeats, probe.measure)
    limits = probe.limits
    found["limits"].append({"batch": batch, "matmul_tflops": limits.flops_per_s / 1e12, "copy_gb_per_s": limits.bytes_per_s / 1e9})
    plain, none, rate_0, *pruned = cases
    for case in (plain, *pruned):
        held = (none if case is plain else case).answers[0].records  # without a hook there are no records; `none` holds as much
        row = row_of(case, plain, held, shape, limits, asked.dtype.itemsize)
        row["peak_extra_bytes"] = peak_extra_bytes(lambda case=case: answer(model, inputs, case.pruner, 1, case.layer), asked.device)
        found["rows"].append({"batch": batch, **row})
    found["overhead"] += [{"batch": batch, **overhead_of(case, plain)} for case in (none, rate_0)]


def row_of(case: Case, plain: Case, held: Sequence[Any], shape: DecoderShape, limits: Limits, bytes_per_value: int) -> dict[str, Any]:
    """One row of the result.

    Parameters
    ----------
    plain
        The unpruned case that took turns with this one.
    held
        One SampleRecord a row of the batch: what the layers held after prefill.
    """
    lengths, batch = held[0].kv_lengths, len(held)
    full = [lengths[0] - held[0].visual_lengths[0] + held[0].n_visual] * len(lengths)
    bound, plain_bound = (prefill_bound_ms(shape, each, batch, limits, bytes_per_value) for each in (lengths, full))
    llm, speedup = case.summary("llm_ms"), paired_ratio(plain, case, "llm_ms")
    return {
        "method": PLAIN if case.pruner is None else case.pruner.name,
        "pruning_rate": None if case.pruner is None else str(case.pruner.pruning_rate),
        "layer": None if case.pruner is None else case.layer,
        "n_kept": held[0].n_kept,
        "lengths": lengths,
        "quirks": sorted({quirk for record in held for quirk in record.quirks}),
        "ttft": case.summary("ttft_ms"),
        "llm_prefill": llm,
        "vision_ms": median(case.values("vision_ms")),
        "selection_ms": median(case.values("selection_ms")),
        "cut_ms": median(case.values("cut_ms")),
        "decode": case.summary("decode_ms"),
        "kv_bytes": sum(record.kv_bytes for record in held),
        "llm_flops": batch * prefill_flops(shape, lengths, logits=0),
        "bound_ms": bound,
        "over_bound": llm["ms"] / bound,
        "best_over_bound": llm["best_ms"] / bound,
        "ttft_speedup": paired_ratio(plain, case, "ttft_ms"),
        "llm_speedup": speedup,
        "bound_speedup": plain_bound / bound,
        "of_bound_speedup": speedup * bound / plain_bound,
        "decode_speedup": paired_ratio(plain, case, "decode_ms"),
        "own_time": _own_time(case, plain, bound, plain_bound),
    }


def _own_time(case: Case, plain: Case, bound: float, plain_bound: float) -> dict[str, float] | None:
    """The prefill of the language model by what the process computed, which waits for nobody: on a busy machine the better measure.

    None where it says nothing: on a GPU, where the host only queues work, and with several threads, whose times add up.
    """
    used = case.answers[0].tokens.device
    if used.type != "cpu" or torch.get_num_threads() > 1:
        return None
    summary, speedup = case.summary("llm_cpu_ms"), paired_ratio(plain, case, "llm_cpu_ms")
    ratios = {"over_bound": summary["ms"] / bound, "best_over_bound": summary["best_ms"] / bound}
    return {**summary, **ratios, "llm_speedup": speedup, "of_bound_speedup": speedup * bound / plain_bound}


def overhead_of(case: Case, plain: Case) -> dict[str, Any]:
    """How much longer a prompt and a token take under a hook that prunes nothing: ratios of times on the wall and of this process."""
    same = all(torch.equal(a.tokens, b.tokens) for a, b in zip(case.answers, plain.answers, strict=True))
    names = {"prefill": "prefill_ms", "decode": "decode_ms", "prefill_cpu": "prefill_cpu_ms", "decode_cpu": "decode_cpu_ms"}
    ratios = {key: paired_ratio(case, plain, name) for key, name in names.items()}
    return {"hook": case.name, "same_tokens": same, **ratios, "n": len(case.answers)}


def bench_profile(
    geometry: str,
    method: str = "vlmpruner",
    rate: Rate = "0.889",
    *,
    batch_sizes: Sequence[int] = (1,),
    n_text: int = 64,
    n_new: int = 8,
    repeats: int = 3,
    dtype: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Where the time of an answer goes, unpruned and pruned; the parameters are those of `bench_prefill`.

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
    options = {"device": device, "dtype": dtype, "batch_sizes": batch_sizes, "n_text": n_text, "n_new": n_new, "repeats": repeats}
    asked = Request.of(geometry, **options)
    model, rows = build(asked.geometry, asked.device, asked.dtype), []
    for batch in asked.batch_sizes:
        inputs = prompts(asked.geometry, model, batch, n_text)
        cases = [Case(PLAIN, None, pruner.layer), Case(method, pruner, pruner.layer)]
        take_turns(cases, lambda case, inputs=inputs: answer(model, inputs, case.pruner, asked.n_new, case.layer), asked.repeats)
        rows += [_profile_row(case, batch) for case in cases]
    return {**asked.head("profile", model), "layer": pruner.layer, "pruning_rate": str(pruner.pruning_rate), "rows": rows}


def _profile_row(case: Case, batch: int) -> dict[str, Any]:
    parts = [answered.parts() for answered in case.answers]
    return {
        "batch": batch,
        "method": case.name,
        "ttft_ms": median(case.values("ttft_ms")),
        "parts_ms": {name: median(part[name] for part in parts) for name in parts[0]},
    }
