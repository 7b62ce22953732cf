"""`bench grid`: many methods over the same documents, one generate for each beside one generate for all that cut alike.

Random weights of the real shape, as in `bench prefill`. Both ways take turns in one run; needs no lmms-eval.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from vlm_pruner_eval.budget import Rate
from vlm_pruner_eval.hook import prune
from vlm_pruner_eval.prefix import SharedPrefix, first_cut, repeated, rows_together
from vlm_pruner_eval.pruners import Pruner, get_pruner
from vlm_pruner_eval.speed.bench_setup import Setup
from vlm_pruner_eval.speed.measuring import ROUNDS, call_ms, tell
from vlm_pruner_eval.speed.model_sizes import build, prompts
from vlm_pruner_eval.vlms import family_of

METHODS = ("vlmpruner", "fastv", "dart", "divprune", "pool", "random", "uniform")

Inputs = Mapping[str, Tensor]


def bench_grid(
    setup: Setup, methods: Sequence[str] = METHODS, rates: Sequence[Rate] = ("2/3", "7/9", "8/9"), documents: int = 4, rows: int = 64
) -> dict[str, Any]:
    """Answer documents by the unpruned model, the blind one and every method at every rate, separately and together.

    Parameters
    ----------
    documents
        Batches of prompts, each of `setup.batch_sizes[0]` documents.
    rows
        Most rows of a batch of several methods.

    Returns
    -------
    dict
        `rounds` with milliseconds of both ways, `ratio` (together over separate, median of the rounds), `runs`, and `different`: rows
        whose new tokens are not the same in both ways, which half precision may make.

    Raises
    ------
    ConfigError
        Something can't be run as asked, or memory is too small.
    """
    pruners = {"none": get_pruner("none", pruning_rate=0), "blind": get_pruner("blind", pruning_rate=0)}
    pruners |= {f"{name} {rate}": get_pruner(name, pruning_rate=rate) for name, rate in product(methods, rates)}
    setup.check()
    model = build(setup.sizes, setup.torch_device, setup.torch_dtype)
    size = setup.batch_sizes[0]
    found = prompts(setup.sizes, model, size * documents, setup.n_text)
    batches = [_part(found, number, documents) for number in range(documents)]
    groups = rows_together(pruners, _n_layers(model), mrope=family_of(model).mrope, most=max(1, rows // size))
    ways = {
        "separate": functools.partial(_each, model, batches, pruners, setup.n_new),
        "together": functools.partial(_together, model, batches, pruners, groups, setup.n_new),
    }
    answers = {way: answer() for way, answer in ways.items()}  # not timed: memory not yet touched, kernels not yet compiled
    rounds = []
    for number in range(ROUNDS):
        order = [*ways] if number % 2 == 0 else [*reversed(ways)]
        rounds.append({f"{way}_ms": call_ms(ways[way]) for way in order})
        tell(f"round {number + 1}: {rounds[-1]['together_ms'] / rounds[-1]['separate_ms']:.3f} of the time")
    pairs = [(answers["separate"][key], answers["together"][key]) for key in answers["separate"]]
    return setup.head("grid", model) | {
        "runs": len(pruners),
        "documents": documents,
        "batch_size": size,
        "most_rows": rows,
        "groups": [len(group) * size for group in groups],
        "ratio": median(each["together_ms"] / each["separate_ms"] for each in rounds),
        "different": sum(int((one != other).any(1).sum()) for one, other in pairs),
        "answers": sum(len(one) for one, _ in pairs),
        "rounds": rounds,
    }


def _n_layers(model: nn.Module) -> int:
    return len(model.model.language_model.layers)


def _part(found: Inputs, number: int, count: int) -> dict[str, Tensor]:
    """Return the documents of one batch; all families of the benchmark have equally many rows of each tensor for a document."""
    return {name: tensor.chunk(count)[number] for name, tensor in found.items()}


def _generate(model: nn.Module, inputs: Inputs, n_new: int) -> Tensor:
    return model.generate(**inputs, max_new_tokens=n_new, do_sample=False)[:, inputs["input_ids"].shape[1] :]


@torch.inference_mode()
def _each(model: nn.Module, batches: Sequence[Inputs], pruners: Mapping[str, Pruner], n_new: int) -> dict[tuple[int, str], Tensor]:
    """New tokens [B, n] by batch and method, each from a call of its own."""
    found = {}
    for number, inputs in enumerate(batches):
        for name, pruner in pruners.items():
            with prune(model, pruner):
                found[number, name] = _generate(model, inputs, n_new)
    return found


@torch.inference_mode()
def _together(
    model: nn.Module, batches: Sequence[Inputs], pruners: Mapping[str, Pruner], groups: Sequence[Sequence[str]], n_new: int
) -> dict[tuple[int, str], Tensor]:
    """The same with one call for each group of methods."""
    return {(number, name): new for number, inputs in enumerate(batches) for name, new in _of_batch(model, inputs, pruners, groups, n_new)}


def _of_batch(
    model: nn.Module, inputs: Inputs, pruners: Mapping[str, Pruner], groups: Sequence[Sequence[str]], n_new: int
) -> Iterator[tuple[str, Tensor]]:
    depths = {name: first_cut(pruner, _n_layers(model)) for name, pruner in pruners.items()}
    with SharedPrefix(model, [*depths.values()], [*pruners.values()]) as prefix:
        for group in groups:
            n = len(group)
            chosen = [pruners[name] for name in group]
            with prefix.reading(depths[group[0]], repeats=n), prune(model, chosen):
                new = _generate(model, inputs if n == 1 else repeated(inputs, n), n_new)
            yield from zip(group, new.chunk(n), strict=True)
