"""Shared by all tests: one thread, quiet libraries, the tiny models built once, what costs seconds done once, and hypothesis's effort."""

from __future__ import annotations

import functools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from PIL import Image
from tiny_models import FAMILIES, build

import vlm_pruner_eval
from vlm_pruner_eval import selftest
from vlm_pruner_eval.report.figures import style
from vlm_pruner_eval.store.files import write_atomic
from vlm_pruner_eval.sweep import opening, provenance

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

# The same examples in every run; scripts/test.sh --all takes "deep": many more, other ones each time.
settings.register_profile("quick", max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("deep", settings.get_profile("quick"), max_examples=300, derandomize=False)
settings.load_profile("quick")


@pytest.fixture(scope="session", autouse=True)
def once_a_process() -> Iterator[None]:
    """Sweeps of this process test the installation once, ask git for the commit once a checkout, and draw blank figures."""
    commit = functools.cache(lambda file, ask=provenance.git_commit: ask())
    tested = functools.cache(lambda test: test())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "selftest", SimpleNamespace(run=lambda: tested(selftest.run)))
        patch.setattr(provenance, "git_commit", lambda: commit(vlm_pruner_eval.__file__))
        patch.setattr(style, "save", _save_blank)
        yield


@pytest.fixture(scope="module")
def real_figures(save=style.save) -> Iterator[None]:
    """Figures as users get them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "save", save)
        yield


def _save_blank(figure: object, stem: Path) -> list[Path]:
    """Write empty pictures, since to draw one takes a second."""
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, format="png")
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("png", "svg")]
    for path, content in zip(paths, (png.getvalue(), b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>'), strict=True):
        write_atomic(path, content)
    return paths


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
