"""The method zoo against what its authors' released code answered (tests/golden/README.md says what equality means)."""

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
PREFIX = 12  # picks that mean anything where the features have that rank
IN_HALF = 0.9  # smallest overlap with indices that were chosen in half precision


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
        compare(name, np.asarray(value), arrays, meta)


def compare(name: str, got: np.ndarray, arrays: Arrays, meta: dict[str, Any]) -> None:
    """Hold one output against the release's, as strictly as `meta["equality"]` lets it; without that entry one by one."""
    released = arrays[name]
    kind = "half" if meta.get("compute_dtype") == "f16" else meta.get("equality", "order")
    assert got.shape == released.shape, f"{name}: {got.shape} in place of {released.shape}"
    assert (got.dtype.kind == "f") == (released.dtype.kind == "f"), f"{name}: {got.dtype} in place of {released.dtype}"
    if released.dtype.kind == "f":
        assert_states(name, got, released, loose=kind == "half")
    elif kind in ("twins", "prefix", "ties", "half"):
        {"twins": assert_twins, "prefix": assert_prefix, "ties": assert_ties, "half": assert_overlap}[kind](name, got, arrays, meta)
    else:  # order, set, exact, and duplicates, where a row may be there twice
        assert np.array_equal(got, released), name


def assert_states(name: str, got: np.ndarray, released: np.ndarray, *, loose: bool) -> None:
    tolerance = 1e-2 if loose else 2e-3 if released.dtype == np.float16 else 1e-4
    distance = np.abs(got.astype(np.float64) - released.astype(np.float64))
    assert distance.max(initial=0) <= tolerance * np.abs(released).max(initial=0), name


def assert_twins(name: str, got: np.ndarray, arrays: Arrays, meta: dict[str, Any]) -> None:
    """Every patch is there twice: either of the two may be taken, in the same order."""
    half = meta["N"] // 2
    in_order = name.endswith("order") and name != "llm_order"
    pairs = [part % half if in_order else np.sort(part % half, axis=-1) for part in (got, arrays[name])]
    assert np.array_equal(*pairs), name


def assert_prefix(name: str, got: np.ndarray, arrays: Arrays, meta: dict[str, Any]) -> None:
    """Rounding noise decides behind the rank of the features; of the kept ones, the meaningful picks are there."""
    picked = arrays["greedy_order"][..., :PREFIX]
    if name == "greedy_order":
        assert np.array_equal(got[..., :PREFIX], picked)
    elif name == "keep":
        assert all(set(first) <= set(kept) for first, kept in zip(picked.tolist(), got.tolist(), strict=True))


def assert_ties(name: str, got: np.ndarray, arrays: Arrays, meta: dict[str, Any]) -> None:
    """Equal scores: HoloV's rows have the release's attention one by one, VisPruner's important patches are its own."""
    released = arrays[name]
    if name == "important":
        assert np.array_equal(got, released)
    elif name == "order":
        attention = arrays["cls_attention"].mean(1)
        values = [np.take_along_axis(attention, np.where(rows < 0, 0, rows), 1) for rows in (got, released)]
        assert np.array_equal(got < 0, released < 0) and np.array_equal(*values)
    else:  # as many, each once
        assert all(len(set(row)) == len(row) for row in got.reshape(-1, got.shape[-1]).tolist())
        if name == "keep" and "important" in arrays:
            assert all(set(first) <= set(kept) for first, kept in zip(arrays["important"].tolist(), got.tolist(), strict=True))


def assert_overlap(name: str, got: np.ndarray, arrays: Arrays, meta: dict[str, Any]) -> None:
    """Chosen in half precision, whose rounding depends on the order of sums."""
    wanted = set(arrays[name].ravel().tolist())
    assert len(wanted & set(got.ravel().tolist())) >= IN_HALF * len(wanted), name


# ---- the comparison itself
def scene(kind: str, **arrays: Any) -> tuple[Arrays, dict[str, Any]]:
    return {name: np.asarray(values) for name, values in arrays.items()}, {"equality": kind, "N": 8}


def test_the_comparison_tells_right_from_wrong():
    """Each kind of equality with an answer that passes and one that does not."""
    long = [[*range(14)]]
    attention = np.array([[[4.0, 4.0, 2.0, 1.0]]])
    cases = [
        ("order", "order", [[3, 1]], [[3, 1]], [[1, 3]], {}),
        ("set", "keep", [[1, 3]], [[1, 3]], [[1, 2]], {}),
        ("exact", "segment_ids_9", [[1, 0]], [[1, 0]], [[1, 1]], {}),
        ("duplicates", "order", [[2, 2]], [[2, 2]], [[2, 3]], {}),
        ("twins", "greedy_order", [[1, 6]], [[5, 2]], [[2, 1]], {}),
        ("twins", "keep", [[1, 6]], [[2, 5]], [[2, 4]], {}),
        ("prefix", "greedy_order", long, [[*range(12), 20, 30]], [[1, 0, *range(2, 14)]], {}),
        ("prefix", "keep", long, [[*range(12), 20, 30]], [[*range(11), 18, 20, 30]], {"greedy_order": np.array(long)}),
        ("ties", "important", [[3, 1]], [[3, 1]], [[1, 3]], {}),
        ("ties", "diverse", [[3, 1]], [[0, 7]], [[0, 0]], {}),
        ("ties", "keep", [[1, 3, 4]], [[1, 3, 7]], [[1, 4, 7]], {"important": np.array([[3, 1]])}),
        ("ties", "order", [[0, 2]], [[1, 2]], [[0, 3]], {"cls_attention": attention}),
        ("ties", "order", [[0, -1]], [[1, -1]], [[1, 0]], {"cls_attention": attention}),
    ]
    for kind, name, released, right, wrong, beside in cases:
        arrays, meta = scene(kind, **{name: released}, **beside)
        compare(name, np.asarray(right), arrays, meta)
        with pytest.raises(AssertionError):
            compare(name, np.asarray(wrong), arrays, meta)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_comparison_of_states(dtype: type):
    released = np.array([[100, 1], [0, 2]], dtype=dtype)
    near = 0.1 if dtype is np.float16 else 0.005
    for meta in ({}, {"equality": "set"}, {"equality": "ties"}):
        compare("merged_states", released + near, {"merged_states": released}, meta)
        for wrong in (released + 5 * near, released[:1], released * np.nan, released.astype(int)):
            with pytest.raises(AssertionError):
                compare("merged_states", wrong, {"merged_states": released}, meta)


def test_the_comparison_of_files_without_an_entry():
    arrays = {"keep_indexs": np.array([4, 5, 9])}
    compare("keep_indexs", np.array([4, 5, 9]), arrays, {"compute_dtype": "f32"})
    with pytest.raises(AssertionError):
        compare("keep_indexs", np.array([4, 9, 5]), arrays, {"compute_dtype": "f32"})
    many = {"all_indices": np.arange(20)}
    compare("all_indices", np.arange(20)[::-1] + 1, many, {"compute_dtype": "f16"})
    with pytest.raises(AssertionError):
        compare("all_indices", np.arange(20) + 3, many, {"compute_dtype": "f16"})
