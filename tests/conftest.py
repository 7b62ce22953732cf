"""Shared by all tests: one thread, quiet libraries, the tiny models built once, and how hard hypothesis tries."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import quick_commands
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported: kernels then run on the CPU

import transformers
from hypothesis import HealthCheck, settings
from tiny_models import FAMILIES, build

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

# The same examples in every run; scripts/test.sh --all takes "deep": many more, other ones each time.
settings.register_profile("quick", max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("deep", settings.get_profile("quick"), max_examples=300, derandomize=False)
settings.load_profile("quick")


@pytest.fixture(scope="session", autouse=True)
def shortcuts() -> Iterator[None]:
    """Sweeps do once a process what takes seconds; where lmms-eval was not imported, no test makes one."""
    with pytest.MonkeyPatch.context() as patch:
        quick_commands.take(patch)
        if "lmms_eval" in sys.modules:
            importlib.import_module("shortcuts").take(patch)
        yield


@pytest.fixture(scope="session")
def index() -> Any:
    """lmms-eval's whole index of tasks, packaged ones included, which takes seconds to read."""
    return importlib.import_module("shortcuts").index_for("vlmpruner_llava")


@functools.cache
def _model(family: str, attention: str, dtype: torch.dtype) -> torch.nn.Module:
    return build(family, attention, dtype)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny_model():
    """Function (family, attention="sdpa", dtype=float32) -> a tiny model, shared between tests: leave it as it was."""

    def get(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        return _model(family, attention, dtype)

    return get
