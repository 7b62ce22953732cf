"""Which cases of a table run by default; the others are slow, which scripts/test.sh --all runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], nth: int) -> list[Any]:
    """Every nth case by default."""
    return [_case(case, i % nth > 0) for i, case in enumerate(cases)]


def only(cases: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """The cases of `default` by default."""
    return [_case(case, case not in default) for case in cases]


def _case(case: Any, is_slow: bool) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow if is_slow else ())
