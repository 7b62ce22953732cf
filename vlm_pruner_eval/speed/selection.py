"""How long methods take to choose, with how much memory, beside the broadcast cosine of the release as yardstick.

Paper: arXiv 2512.02700, efficiency analysis. Every ratio is of two times of one run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.pruners import Pruner, get_pruner, list_pruners, pruner_class
from vlm_pruner_eval.speed.machine import devices, machine, wait_for
from vlm_pruner_eval.speed.memory import HOW, free_bytes, peak_extra_bytes
from vlm_pruner_eval.speed.plain import PLAIN, broadcast_cosine
from vlm_pruner_eval.timing import median_iqr
from vlm_pruner_eval.types import TextTokens, VisualTokens, row_major

SIZES = (576, 1280, 2304, 2880)
RATES = (0.667, 0.889)
WIDTH, CHANNELS, HEADS, N_TEXT = 4096, 256, 32, 40
WITHOUT_RULE = frozenset({"none", "blind"})  # they keep all or nothing
ROUNDS = 3
_MOST = 100_000  # visual tokens, whose states take 1.6 GB
_YARDSTICK_REPEATS = 3  # it takes seconds
_YARDSTICK_COPIES = 4  # of [V, V, C] that the broadcast needs at a time, at most


@dataclass
class Times:
    """Times of one call, in milliseconds: a list for every round over all cases."""

    rounds: list[list[float]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Median of the rounds' medians, the interquartile range over all, each round's median, and their spread over the median."""
        medians = [median(values) for values in self.rounds]
        middle = median(medians)
        return {
            "ms": middle,
            "iqr_ms": median_iqr([value for values in self.rounds for value in values])[1],
            "rounds_ms": medians,
            "noise": (max(medians) - min(medians)) / middle,
        }


@dataclass(frozen=True)
class Case:
    """One method at one rate on one input."""

    pruner: Pruner
    tokens: VisualTokens
    keep: int
    times: dict[str, Times]

    def calls(self) -> dict[str, Callable[[], object]]:
        """What is timed: the whole of `select`, its rule alone, and a plain formulation of the rule where there is one."""
        timed: dict[str, Callable[[], object]] = {
            "select": lambda: self.pruner.select(self.tokens, self.keep),
            "choose": lambda: self.pruner.choose(self.tokens, self.keep),
        }
        if self.pruner.name in PLAIN:
            timed["plain"] = lambda: PLAIN[self.pruner.name](self.tokens, self.keep)
        return timed


def methods_with_a_rule() -> list[str]:
    """Registered methods that choose among tokens by something."""
    return [name for name in list_pruners() if name not in WITHOUT_RULE and not pruner_class(name).before_model]


def image_tokens(n_visual: int, width: int, device: torch.device) -> VisualTokens:
    """Tokens [V, width] as of a photo: neighbours alike, a mean in common, so that the growth takes several passes."""
    rows = max(r for r in range(1, math.isqrt(n_visual) + 1) if n_visual % r == 0)
    grid, generator = (rows, n_visual // rows), torch.Generator().manual_seed(n_visual)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    waves = torch.cos(row_major(*grid)[:, 1:].float() @ (0.3 * normal(2, 8)) + normal(8))
    states = waves @ normal(8, width) + normal(width) + normal(n_visual, width)
    keys, text_keys = normal(n_visual, HEADS, max(1, width // HEADS)), normal(N_TEXT, HEADS, max(1, width // HEADS))
    text = TextTokens(normal(N_TEXT, width).to(device), text_keys.to(device), torch.arange(n_visual, n_visual + N_TEXT, device=device))
    return VisualTokens(
        states.to(device),
        grid=grid,
        keys=keys.to(device),
        attention=normal(n_visual).softmax(0).to(device),
        normed_hidden_states=(states / states.norm(dim=-1, keepdim=True) * math.sqrt(width)).to(device),
        positions=torch.arange(n_visual, device=device),
        text=text,
        sample_id=f"bench {n_visual}",
    )


def bench_selection(
    methods: Sequence[str] = (),
    sizes: Sequence[int] = SIZES,
    repeats: int = 8,
    *,
    rates: Sequence[float] = RATES,
    width: int = WIDTH,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time and measure every method at every size and rate on every device here, in float32.

    Parameters
    ----------
    methods
        Names; none means all that have a rule.
    sizes
        Numbers of visual tokens V.
    repeats
        Calls of each case in each of three rounds over all cases of a size.
    rates
        Pruning rates.
    width
        D, the width of the hidden states; keys have as many numbers.
    progress
        Told of every size as it begins.

    Returns
    -------
    dict
        `yardstick` and `rows`, with times in ms and memory in bytes; it can be written as JSON.

    Raises
    ------
    ConfigError
        Unknown methods, sizes or repeats out of range: all at once.
    """
    names = _checked(methods, sizes, repeats)
    used, yardsticks, rows = devices(), [], []
    for device in used:
        for n_visual in sizes:
            progress(f"{device}: {n_visual} tokens")
            yardstick, found = _bench_size(names, n_visual, repeats, rates, width, device)
            yardsticks.append(yardstick)
            rows += found
    return {
        "benchmark": "selection",
        **machine(torch.float32, used),
        "width": width,
        "rounds": ROUNDS,
        "repeats": repeats,
        "memory": {device.type: HOW[device.type] for device in used},
        "yardstick": yardsticks,
        "rows": rows,
    }


def _checked(methods: Sequence[str], sizes: Sequence[int], repeats: int) -> list[str]:
    known = methods_with_a_rule()
    problems = [f"--methods: got {name!r}, expected methods with a rule; {closest(name, known)}" for name in methods if name not in known]
    problems += [f"--sizes: got {size}, expected numbers of visual tokens, 16 to {_MOST}." for size in sizes if not 16 <= size <= _MOST]
    if not sizes:
        problems.append("--sizes: got none, expected numbers of visual tokens, such as 576,1280.")
    if repeats < 1:
        problems.append(f"--repeats: got {repeats}, expected 1 or more.")
    if problems:
        raise ConfigError(problems)
    return [*methods] or known


@torch.inference_mode()
def _bench_size(
    names: list[str], n_visual: int, repeats: int, rates: Sequence[float], width: int, device: torch.device
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    tokens = image_tokens(n_visual, width, device)
    cases = [_case(name, rate, tokens) for name in names for rate in rates]
    features = tokens.hidden_states[:, :CHANNELS].contiguous()
    yardstick, skipped = Times(), _why_skipped(n_visual, features.shape[1], device)
    for _ in range(ROUNDS):
        if skipped is None:
            timed = _round({"yardstick": lambda: broadcast_cosine(features)}, min(repeats, _YARDSTICK_REPEATS), device)
            yardstick.rounds.append(timed["yardstick"])
        for case in cases:
            for name, values in _round(case.calls(), repeats, device).items():
                case.times[name].rounds.append(values)
    head = {"device": str(device), "n_visual": n_visual}
    summary = yardstick.summary() if skipped is None else {"ms": None, "skipped": skipped}
    return {**head, **summary}, [{**head, **_row(case, summary["ms"], device)} for case in cases]


def _case(name: str, rate: float, tokens: VisualTokens) -> Case:
    pruner = get_pruner(name, pruning_rate=rate)
    return Case(pruner, tokens, pruner.default_keep(tokens.n_visual), {key: Times() for key in ("select", "choose", "plain")})


def _round(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Times in ms of the calls, which take turns, so that a slow moment of the machine meets all of them.

    Every other turn goes backwards: what follows another reading of the same tokens finds them in the cache.
    """
    for call in calls.values():
        call()  # not timed: a cold cache, or a GPU's kernels not yet loaded
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in [*calls][:: -1 if turn % 2 else 1]:
            times[name].append(_ms(calls[name], device))
    return times


def _ms(call: Callable[[], object], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    call()
    wait_for(device)
    return (time.perf_counter() - start) * 1e3


def _row(case: Case, yardstick_ms: float | None, device: torch.device) -> dict[str, Any]:
    """One row of the result; a ratio above 1 says that the method is the faster one."""
    selection = case.pruner.select(case.tokens, case.keep)
    answer_bytes = sum(part.nbytes for part in (selection.order, selection.hidden_states) if part is not None)
    peak_bytes = peak_extra_bytes(case.calls()["select"], device)
    times = {name: made.summary() for name, made in case.times.items() if made.rounds}
    return {
        "method": case.pruner.name,
        "pruning_rate": case.pruner.pruning_rate,
        "n_kept": len(selection.order),
        "quirks": sorted(selection.quirks),
        **times,
        "yardstick_ratio": None if yardstick_ms is None else yardstick_ms / times["select"]["ms"],
        "plain_ratio": times["plain"]["ms"] / times["choose"]["ms"] if "plain" in times else None,
        "peak_bytes": peak_bytes,
        "answer_bytes": answer_bytes,
        "peak_in_matrices": peak_bytes / (4 * case.tokens.n_visual**2),
    }


def _why_skipped(n_visual: int, channels: int, device: torch.device) -> str | None:
    needed, free = _YARDSTICK_COPIES * 4 * n_visual**2 * channels, free_bytes(device)
    if needed <= free:
        return None
    return f"the broadcast needs up to {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
