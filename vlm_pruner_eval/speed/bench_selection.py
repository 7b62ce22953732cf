"""`bench selection`: time and memory of every method's choice, beside the broadcast cosine of the VLM-Pruner release.

Paper: arXiv 2512.02700, efficiency analysis. Every ratio is of two times of one run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.pruners import Pruner, get_pruner, list_pruners, parameters, pruner_class
from vlm_pruner_eval.pruners.by_question import LLAVA_TOWER
from vlm_pruner_eval.pruners.in_stages import PUBLISHED_DEPTH
from vlm_pruner_eval.speed import measuring
from vlm_pruner_eval.speed.measuring import HOW_MEMORY, ROUNDS, call_ms, summary
from vlm_pruner_eval.types import QuestionTokens, Selection, TextTokens, VisionTokens, VisualTokens, row_major

Line = dict[str, Any]  # of the result
SIZES = (576, 1280, 2304, 2880)
RATES = (0.667, 0.889)
WIDTH, CHANNELS, HEADS, N_TEXT = 4096, 256, 32, 40
TOWER_WIDTH, TOWER_HEADS, TOWER_HEAD_DIM, CLIP_WIDTH = 1024, 16, 64, 768  # of CLIP ViT-L/14 at 336 pixels
TOWER_LAYERS = (5, 8, -2, -1)  # that methods look at by default
WITHOUT_RULE = frozenset({"none", "blind"})  # they keep all or nothing
BATCH = 8  # images that a GPU chooses for at once
_MOST = 100_000  # visual tokens, whose states take 1.6 GB
_YARDSTICK_REPEATS = 3  # it takes seconds
_YARDSTICK_COPIES = 4  # of [V, V, C] that the broadcast needs at a time, at most


def methods_with_a_rule() -> list[str]:
    """Registered methods that choose among tokens by something."""
    return [name for name in list_pruners() if name not in WITHOUT_RULE and not pruner_class(name).before_model]


def image_tokens(n_visual: int, width: int, device: torch.device, *, seed: int = 0) -> VisualTokens:
    """Tokens [V, width] as of a photo: neighbours alike, a mean in common, so that the growth takes several passes."""
    rows = max(r for r in range(1, math.isqrt(n_visual) + 1) if n_visual % r == 0)
    grid = (rows, n_visual // rows)
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(n_visual + seed))
    waves = torch.cos(row_major(*grid)[:, 1:].float() @ (0.3 * normal(2, 8)) + normal(8))
    states = waves @ normal(8, width) + normal(width) + normal(n_visual, width)
    head_dim = max(1, width // HEADS)
    keys = normal(n_visual, HEADS, head_dim)
    text_keys = normal(N_TEXT, HEADS, head_dim)
    text_states = normal(N_TEXT, width)
    text_positions = torch.arange(n_visual, n_visual + N_TEXT, device=device)
    attention = normal(n_visual).softmax(0).to(device)
    return VisualTokens(
        states.to(device),
        grid=grid,
        keys=keys.to(device),
        attention=attention,
        normed_hidden_states=(states / states.norm(dim=-1, keepdim=True) * math.sqrt(width)).to(device),
        positions=torch.arange(n_visual, device=device),
        text=TextTokens(text_states.to(device), text_keys.to(device), text_positions),
        vision=_tower(states, normal, device),
        question=_question(states, normal, device),
        own_attention=attention.flip(0),
        text_attention=partial(_of_rows, normal(N_TEXT, n_visual).softmax(-1).to(device)),
        sample_id=f"bench {n_visual}",
    )


def _tower(states: Tensor, normal: Callable[..., Tensor], device: torch.device) -> VisionTokens:
    """Values of a tower with a CLS token, whose states are columns of `states` [V, D]; its projector is one matrix with a bend."""
    n_visual, width = states.shape
    narrow = states[:, :TOWER_WIDTH].contiguous()
    heads = (TOWER_HEADS, TOWER_HEAD_DIM)

    def each(*shape: int) -> dict[int, Tensor]:
        return {layer: normal(*shape).to(device) for layer in TOWER_LAYERS}

    return VisionTokens(
        states=narrow.to(device),
        project=partial(_projected, normal(narrow.shape[1], width).to(device)),
        cls_state=normal(narrow.shape[1]).to(device),
        cls_attention={layer: values.softmax(-1) for layer, values in each(TOWER_HEADS, n_visual).items()},
        received_attention={layer: values.softmax(-1) for layer, values in each(n_visual).items()},
        keys=each(n_visual, *heads),
        cls_query=each(*heads),
        cls_key=each(*heads),
    )


def _question(states: Tensor, normal: Callable[..., Tensor], device: torch.device) -> QuestionTokens:
    n_visual, width = states.shape
    return QuestionTokens(
        image_embeddings=states.to(device),
        text_embeddings=normal(N_TEXT, width).to(device),
        clip_image=normal(n_visual, CLIP_WIDTH).to(device),
        clip_text=normal(1, CLIP_WIDTH).to(device),
    )


def _projected(weight: Tensor, states: Tensor) -> Tensor:
    return torch.tanh(states.to(weight.dtype) @ weight)


def _of_rows(attention: Tensor, rows: Tensor | None) -> Tensor:
    return attention if rows is None else attention[rows]


def _built(name: str, rate: float) -> Pruner:
    """Build a method with the text side of LLaVA's tower, if it has to be named; nothing is loaded here."""
    return get_pruner(name, pruning_rate=rate, **({"text_tower": LLAVA_TOWER} if "text_tower" in parameters(pruner_class(name)) else {}))


def broadcast_cosine(features: Tensor) -> Tensor:
    """Cosines [V, V] of rows [V, C] by a broadcast over [V, V, C], as the release computes them once per image.

    Paper: arXiv 2512.02700, as released (Casey-bit/VLMPruner 556a914).
    """
    return cosine_similarity(features[:, None], features[None], dim=-1)


def bench_selection(
    methods: Sequence[str] = (),
    sizes: Sequence[int] = SIZES,
    repeats: int = 8,
    *,
    rates: Sequence[float] = RATES,
    width: int = WIDTH,
) -> dict[str, Any]:
    """Time and measure every method at every size and rate on every device here, in float32; on a GPU also for a batch of images.

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
    used = [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]
    result = {
        "benchmark": "selection",
        **measuring.machine(torch.float32, used),
        "width": width,
        "rounds": ROUNDS,
        "repeats": repeats,
        "memory": {device.type: HOW_MEMORY[device.type] for device in used},
        "yardstick": [],
        "rows": [],
    }
    for device in used:
        for n_visual in sizes:
            measuring.tell(f"{device}: {n_visual} tokens")
            pruners = [_built(name, rate) for name in names for rate in rates]
            n_images = BATCH if device.type == "cuda" else 1
            images = [image_tokens(n_visual, width, device, seed=seed) for seed in range(n_images)]
            yardstick, rows = _bench_size(pruners, images, repeats)
            head = {"device": str(device), "n_visual": n_visual}
            result["yardstick"].append(head | yardstick)
            result["rows"] += [head | row for row in rows]
    return result


def _checked(methods: Sequence[str], sizes: Sequence[int], repeats: int) -> list[str]:
    known = methods_with_a_rule()
    unknown = [name for name in methods if name not in known]
    problems = [f"--methods: got {name!r}, expected methods with a rule; {closest(name, known)}" for name in unknown]
    beyond = [size for size in sizes if not 16 <= size <= _MOST]
    problems += [f"--sizes: got {size}, expected numbers of visual tokens, 16 to {_MOST}." for size in beyond]
    if not sizes:
        problems.append("--sizes: got none, expected numbers of visual tokens, such as 576,1280.")
    if repeats < 1:
        problems.append(f"--repeats: got {repeats}, expected 1 or more.")
    if problems:
        raise ConfigError(problems)
    return [*methods] or known


@torch.inference_mode()
def _bench_size(pruners: Sequence[Pruner], images: Sequence[VisualTokens], repeats: int) -> tuple[Line, list[Line]]:
    """Summary of the yardstick at one size, and a row for every pruner; each round goes over all of them.

    The first of `images` alone, and all of them as a batch if there are several.
    """
    tokens = images[0]
    features = tokens.hidden_states[:, :CHANNELS].contiguous()
    skipped = _why_skipped(features)
    calls: list[dict[str, Callable[[], Any]]] = []
    for pruner in pruners:
        keep = pruner.keep_at(pruner.stages(PUBLISHED_DEPTH)[0], tokens.n_visual)  # of several cuts the first is timed
        timed = {name: partial(_afresh, [tokens], getattr(pruner, name), tokens, keep) for name in ("select", "choose")}
        if len(images) > 1:
            timed["select_batch"] = partial(_afresh, images, pruner.select_batch, images, [keep] * len(images))
        calls.append(timed)
    # times, a list a round
    yardstick_ms = []
    rounds: list[dict[str, list[list[float]]]] = [{name: [] for name in timed} for timed in calls]
    for _ in range(ROUNDS):
        if skipped is None:
            yardstick = {"yardstick": partial(broadcast_cosine, features)}
            yardstick_ms.append(_times(yardstick, min(repeats, _YARDSTICK_REPEATS))["yardstick"])
        for timed, found in zip(calls, rounds, strict=True):
            for name, values in _times(timed, repeats).items():
                found[name].append(values)
    # the result
    line = summary(yardstick_ms) if skipped is None else {"ms": None, "skipped": skipped}
    rows = []
    for pruner, timed, found in zip(pruners, calls, rounds, strict=True):
        times = {name: summary(values) for name, values in found.items()}
        ratios = {"yardstick_ratio": _ratio(line, times["select"])}
        if len(images) > 1:
            ratios |= {"batch": len(images), "batch_yardstick_ratio": _ratio(line, times["select_batch"], len(images))}
        rows.append(_row(pruner, tokens, timed["select"], {**times, **ratios}))
    return line, rows


def _afresh(images: Sequence[VisualTokens], call: Callable[..., Any], *args: object) -> Any:
    """Call for images of which nothing is remembered from the call before."""
    for image in images:
        image.memory.clear()
    return call(*args)


def _ratio(yardstick: Line, time: Line, n_images: int = 1) -> float | None:
    """Ratio of the yardstick's time for `n_images` to a method's."""
    return None if yardstick["ms"] is None else n_images * yardstick["ms"] / time["ms"]


def _times(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Times in ms of calls that take turns."""
    for call in calls.values():
        call()  # not timed: a cold cache, or a GPU's kernels not yet loaded
    return measuring.take_turns({name: partial(call_ms, call) for name, call in calls.items()}, repeats)


def _row(pruner: Pruner, tokens: VisualTokens, select: Callable[[], Selection], times: Line) -> Line:
    """Row of the result; a ratio above 1 says that the method is the faster one."""
    selection = select()
    parts = [part for part in (selection.order, selection.hidden_states) if part is not None]
    peak_bytes = measuring.peak_extra_bytes(select, tokens.hidden_states.device)
    return {
        "method": pruner.name,
        "pruning_rate": pruner.pruning_rate,
        "n_kept": len(selection.order),
        "quirks": sorted(selection.quirks),
        **times,
        "peak_bytes": peak_bytes,
        "answer_bytes": sum(part.nbytes for part in parts),
        "peak_in_matrices": peak_bytes / (4 * tokens.n_visual**2),
    }


def _why_skipped(features: Tensor) -> str | None:
    """Reason not to run the broadcast over features [V, C], if its memory can't be had."""
    needed = _YARDSTICK_COPIES * features.nbytes * len(features)
    free = measuring.free_bytes(features.device)
    if needed <= free:
        return None
    return f"the broadcast needs up to {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
