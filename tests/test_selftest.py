"""The self-test passes here, and fails when the hook, the host or a package is broken."""

from __future__ import annotations

import sys

import pytest
import torch

from vlm_pruner_eval import hf_compat, layer_arguments, selftest, versions
from vlm_pruner_eval.errors import PruningError, StoppedError


def test_it_passes_and_leaves_the_threads_and_the_random_state_alone() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    selftest.run()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("mistake", ["unmasked fillers", "renumbered positions", "nothing cut"])
def test_a_hook_that_prunes_wrongly_fails_it(monkeypatch: pytest.MonkeyPatch, mistake: str) -> None:
    right = hf_compat.causal_mask
    if mistake == "unmasked fillers":
        monkeypatch.setattr(hf_compat, "causal_mask", lambda config, hidden, mask, cache: right(config, hidden, None, cache))
    elif mistake == "renumbered positions":
        monkeypatch.setattr(layer_arguments, "take", lambda x, index: x[..., : index.shape[1], :].expand(len(index), -1, -1))
    else:
        monkeypatch.setattr("vlm_pruner_eval.prefill.Prefill.enter_layer", lambda self, i, hidden, state, rope: hidden)
    with pytest.raises(StoppedError, match="self-test of hook failed") as error:
        selftest.run()
    assert isinstance(error.value.__cause__, PruningError)


def test_a_module_that_lmms_eval_imports_late_and_that_is_gone_fails_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As filelock 4.3 did: nothing else notices before the first run."""
    monkeypatch.setitem(sys.modules, "filelock._api", None)
    monkeypatch.setattr(versions, "not_as_tested", lambda: ["filelock: tested with 4.2, found 4.3: newer than tested"])
    with pytest.raises(StoppedError) as error:
        selftest.run()
    sentence = str(error.value)
    assert "self-test of lmms-eval failed" in sentence and "filelock._api" in sentence and "newer than tested" in sentence
    assert "install" in sentence.rsplit(";", 1)[1]


def test_the_names_that_are_imported_late_are_those_of_functions() -> None:
    names = list(selftest._imported_in_functions("lmms_eval.evaluator"))
    assert "filelock._api" in names and "torch" not in names
