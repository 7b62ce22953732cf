"""Several methods as rows of one forward: answers, logits and records as in forwards of their own, whatever else is in the batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from test_prefix import depth, read, samples
from tiny_models import FAMILIES, N_LAYERS, generate, prompts, step_logits

from vlm_pruner_eval import Pruner, get_pruner, prune
from vlm_pruner_eval.lmms.inputs import repeated
from vlm_pruner_eval.prefix import SharedPrefix

METHODS = ("vlmpruner", "fastv", "dart", "divprune", "random", "uniform", "pool", "blind")
CLOSE = 1e-4  # other paddings, other sums


def together(family: str, methods: Sequence[str] = METHODS) -> list[list[Pruner]]:
    """Pruners that may share a batch: lists of the same layers and positions."""
    made = [get_pruner(name, pruning_rate=0 if name == "blind" else rate) for name, rate in itertools.product(methods, ("1/3", "8/9"))]
    mrope = family.startswith("qwen")
    kinds = {(tuple(stage.layer for stage in pruner.stages(N_LAYERS)), pruner.position_policy(mrope)): [] for pruner in made}
    for pruner in made:
        kinds[(tuple(stage.layer for stage in pruner.stages(N_LAYERS)), pruner.position_policy(mrope))].append(pruner)
    return list(kinds.values())


def read_rows(model, inputs, pruners: Sequence[Pruner], n_new: int = 4, **kwargs: object) -> list[tuple]:
    """(ids, logits, records) of every method, all read in one forward behind the prefix of the first."""
    with SharedPrefix(model, [depth(pruners[0])] * 2) as prefix:
        with prefix.reading(depth(pruners[0])):
            read(model, inputs, pruners[0])
        with prefix.reading(depth(pruners[0]), repeats=len(pruners)), prune(model, pruners) as ledger:
            output = generate(model, repeated(inputs, len(pruners)), n_new, **kwargs)
    rows = len(inputs["input_ids"])
    ids, logits = output.sequences.split(rows), step_logits(output).split(rows)
    records = [record.as_json() for record in ledger.records]
    return [(ids[i], logits[i], records[i * rows : (i + 1) * rows]) for i in range(len(pruners))]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_answer_as_in_forwards_of_their_own(tiny_model, family: str) -> None:
    model, inputs = tiny_model(family), prompts(family, samples(family))
    for pruners in together(family):
        for pruner, (ids, logits, records) in zip(pruners, read_rows(model, inputs, pruners), strict=True):
            own_ids, own_logits, own_records = read(model, inputs, pruner)
            assert torch.equal(ids, own_ids), pruner
            assert (logits - own_logits).abs().max() < CLOSE
            for record, own in zip(records, own_records, strict=True):
                for name in ("selection_ms",):
                    record.pop(name, None)
                    own.pop(name, None)
                assert record == own, pruner
