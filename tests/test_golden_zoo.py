"""The method zoo against what its authors' released code answered (tests/golden/zoo/README.md says what equality means)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zoo_adapter import MODULES, Arrays, answer

GOLDEN = Path(os.environ.get("VLM_PRUNER_EVAL_GOLDEN", Path(__file__).parent / "golden"))
METHODS = [method for methods in MODULES.values() for method in methods]
FILES = [path for method in METHODS for kind in ("zoo", "baselines") for path in sorted((GOLDEN / kind / method).glob("*.npz"))]
STATES = {"output_states", "merged_states", "output_tokens", "merged_tokens"}
PREFIX = 12  # picks that mean anything where the features have that rank


def load(path: Path) -> tuple[Arrays, dict[str, Any]]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files if name != "meta"}, json.loads(str(arrays["meta"]))


def test_every_method_has_files():
    assert {path.parent.name for path in FILES} == set(METHODS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_answers_equal_the_releases(path: Path):
    arrays, meta = load(path)
    found = answer(path.parent.name, arrays, meta)
    assert found, "an adapter that answers nothing proves nothing"
    for name, value in found.items():
        compare(name, np.asarray(value), arrays[name], meta)


def compare(name: str, got: np.ndarray, released: np.ndarray, meta: dict[str, Any]) -> None:
    equality = meta.get("equality", "order")
    if name in STATES or released.dtype.kind == "f":
        assert got.shape == released.shape
        tolerance = 2e-3 if released.dtype == np.float16 else 1e-4
        assert np.abs(got - released.astype(np.float32)).max() < tolerance * np.abs(released).max()
    elif equality == "twins":  # every patch is there twice
        half = meta["N"] // 2
        assert np.array_equal(np.sort(got % half), np.sort(released % half))
        if name != "keep":
            assert np.array_equal(got % half, released % half)
    elif equality == "prefix":
        if name == "greedy_order":
            assert np.array_equal(got[..., :PREFIX], released[..., :PREFIX])
    else:
        assert np.array_equal(got, released), name
