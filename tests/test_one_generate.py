"""Several methods as rows of one forward: answers, logits and records as in forwards of their own, whatever else is in the batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from test_prefix import AT_TWO, NEW, count_prefills, depth, read, samples
from thinning import only
from tiny_models import FAMILIES, N_LAYERS, generate, prompts, step_logits

from vlm_pruner_eval import ConfigError, Pruner, PruningError, get_pruner, prune
from vlm_pruner_eval.prefix import SharedPrefix, repeated

METHODS = ("vlmpruner", "fastv", "dart", "divprune", "random", "uniform", "pool", "blind")
CLOSE = 1e-4  # other paddings, other sums


def together(family: str, methods: Sequence[str] = METHODS) -> list[list[Pruner]]:
    """Pruners that may share a batch: lists of the same layers and positions."""
    made = [get_pruner(name, pruning_rate=0 if name == "blind" else rate) for name, rate in itertools.product(methods, ("1/3", "8/9"))]
    made += NEW
    mrope = family.startswith("qwen")
    kinds = {(tuple(stage.layer for stage in pruner.stages(N_LAYERS)), pruner.position_policy(mrope)): [] for pruner in made}
    for pruner in made:
        kinds[(tuple(stage.layer for stage in pruner.stages(N_LAYERS)), pruner.position_policy(mrope))].append(pruner)
    return list(kinds.values())


def read_rows(model, inputs, pruners: Sequence[Pruner], n_new: int = 4, **kwargs: object) -> list[tuple]:
    """(ids, logits, records) of every method, all read in one forward behind the prefix of the first."""
    with SharedPrefix(model, [depth(pruners[0])] * 2, pruners) as prefix:
        with prefix.reading(depth(pruners[0])):
            read(model, inputs, pruners[0])
        with prefix.reading(depth(pruners[0]), repeats=len(pruners)), prune(model, pruners) as ledger:
            output = generate(model, repeated(inputs, len(pruners)), n_new, **kwargs)
    rows = len(inputs["input_ids"])
    ids, logits = output.sequences.split(rows), step_logits(output).split(rows)
    records = [record.as_json() for record in ledger.records]
    return [(ids[i], logits[i], records[i * rows : (i + 1) * rows]) for i in range(len(pruners))]


@pytest.mark.parametrize("family", only(sorted(FAMILIES), ["internvl", "llava_next", "qwen3_vl"]))
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


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_rows_end_by_themselves(tiny_model, family: str) -> None:
    """An end token at different steps of different rows."""
    model, inputs = tiny_model(family), prompts(family, samples(family))
    pruners = max(together(family), key=len)
    own = [read(model, inputs, pruner)[0][:, -4:] for pruner in pruners]
    ends = sorted({int(ids[row, (i + row) % 4]) for i, ids in enumerate(own) for row in range(len(ids))})[::2]
    n_steps = set()
    for ids, before in zip(read_rows(model, inputs, pruners, eos_token_id=ends, pad_token_id=0), own, strict=True):
        for found, expected in zip(ids[0][:, inputs["input_ids"].shape[1] :].tolist(), before.tolist(), strict=True):
            n = next((i + 1 for i, token in enumerate(expected) if token in ends), len(expected))
            assert found[:n] == expected[:n]
            assert set(found[n:]) <= {0}
            n_steps.add(n)
    assert len(n_steps) > 2, "rows that all end together would prove nothing"


def test_a_prefix_is_given_to_every_row_and_computed_once(tiny_model) -> None:
    model, inputs = tiny_model("llava"), prompts("llava", samples("llava"))
    with SharedPrefix(model, [2, 2]) as prefix, count_prefills(model) as counts:
        with prefix.reading(2):
            read(model, inputs, AT_TWO[0])
        with prefix.reading(2, repeats=3), prune(model, AT_TWO):
            generate(model, repeated(inputs, 3), 2)
    assert (counts["vision"], counts[0], counts[1], counts[2]) == (1, 1, 1, 2)


def test_other_prompts_or_images_than_those_of_the_batch_are_refused(tiny_model) -> None:
    model, inputs = tiny_model("llava"), prompts("llava", samples("llava"))
    other = dict(inputs) | {"pixel_values": inputs["pixel_values"] + 1}
    with SharedPrefix(model, [2, 2]) as prefix:
        with prefix.reading(2), prune(model, AT_TWO[0]):
            generate(model, inputs, 1)
        changed = repeated(inputs, 3)
        changed["input_ids"] = changed["input_ids"].clone()
        changed["input_ids"][-1, -1] += 1
        for wrong, said in ((repeated(other, 3), "got other images"), (changed, "are not those whose prefix is kept")):
            with pytest.raises(PruningError, match=said), prefix.reading(2, repeats=3), prune(model, AT_TWO):
                generate(model, wrong, 1)
    nothing_read = SharedPrefix(model, [2, 2])
    with nothing_read, pytest.raises(PruningError, match="got other images"), nothing_read.reading(2, repeats=3), prune(model, AT_TWO):
        generate(model, repeated(inputs, 3), 1)


def test_methods_of_several_kinds_and_rows_that_do_not_fit_are_refused(tiny_model) -> None:
    model, inputs = tiny_model("llava"), prompts("llava", samples("llava"))
    with pytest.raises(
        ConfigError, match=r"got methods of 2 kinds for one batch .layers \[0\], contiguous positions; layers \[2\], original"
    ):
        prune(model, [AT_TWO[0], get_pruner("divprune", pruning_rate="1/2")])
    with pytest.raises(ConfigError, match=r"got methods of 0 kinds for one batch \(none\), expected"):
        prune(model, [])
    with pytest.raises(PruningError, match="got 2 methods for a batch of 3 rows, expected the same prompts"), prune(model, AT_TWO[:2]):
        generate(model, inputs, 1)
    assert len(inputs["input_ids"]) == 3
