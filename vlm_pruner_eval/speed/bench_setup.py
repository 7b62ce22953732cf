"""Setup of `bench prefill` and `bench profile`: the model, its prompts, and cases that take turns in answering them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from vlm_pruner_eval.errors import ConfigError, closest
from vlm_pruner_eval.lmms.settings import DEVICE
from vlm_pruner_eval.pruners import Pruner
from vlm_pruner_eval.redact import short
from vlm_pruner_eval.speed.measuring import HOW_MEMORY, ROUNDS, machine, summary, take_turns
from vlm_pruner_eval.speed.model_sizes import GEOMETRIES, Geometry, check_memory
from vlm_pruner_eval.speed.stages import Answered

UNPRUNED = "unpruned"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Model, prompts and repeats, as a user asks for them.

    Attributes
    ----------
    geometry
        A name in `GEOMETRIES`.
    n_text, n_new
        Words of the prompt around the image, and tokens generated.
    repeats
        Answers of each case in each of three rounds.
    dtype, device
        None: float16 on a GPU if there is one, else float32 on the CPU.
    """

    geometry: str
    batch_sizes: Sequence[int] = (1,)
    n_text: int = 64
    n_new: int = 8
    repeats: int = 3
    dtype: str | None = None
    device: str | None = None

    def check(self) -> None:
        """Check everything that can be checked before the model is made.

        Raises
        ------
        ConfigError
            All problems at once; or, alone, that memory is too small.
        """
        least = {"--text-tokens": (self.n_text, 8), "--new-tokens": (self.n_new, 2), "--repeats": (self.repeats, 1)}
        least["--batch-sizes"] = (min(self.batch_sizes, default=0), 1)
        problems = [f"{name}: got {got}, expected {n} or more." for name, (got, n) in least.items() if got < n]
        if self.device is not None and not _is_here(self.device):
            problems.append(f"--device: got {short(self.device)}, expected cpu, or cuda where torch finds a GPU.")
        if self.dtype is not None and self.dtype not in DTYPES:
            problems.append(f"--dtype: got {self.dtype!r}, expected one of {', '.join(DTYPES)}.")
        if self.geometry not in GEOMETRIES:
            suggestion = closest(self.geometry, GEOMETRIES)
            problems.append(f"--geometry: got {self.geometry!r}, expected the name of a geometry; {suggestion}")
        if problems:
            raise ConfigError(problems)
        n_tokens = self.sizes.n_visual + self.n_text + self.n_new
        check_memory(self.sizes, self.torch_device, self.torch_dtype, max(self.batch_sizes), n_tokens)

    @property
    def sizes(self) -> Geometry:
        """The geometry that is named."""
        return GEOMETRIES[self.geometry]

    @property
    def torch_device(self) -> torch.device:
        """The device that is named, or the default one."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type that is named, or the device's default one."""
        return DTYPES[self.dtype or ("float16" if self.torch_device.type == "cuda" else "float32")]

    def head(self, benchmark: str, model: nn.Module) -> dict[str, Any]:
        """Return the fields that a result starts with."""
        return {
            "benchmark": benchmark,
            **machine(self.torch_dtype, [self.torch_device]),
            "geometry": self.geometry,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "attention": model.config._attn_implementation,
            "image": self.sizes.image,
            "n_visual": self.sizes.n_visual,
            "n_text": self.n_text,
            "n_new": self.n_new,
            "rounds": ROUNDS,
            "repeats": self.repeats,
        }


def _is_here(device: str) -> bool:
    if device.partition(":")[0] not in HOW_MEMORY or DEVICE.fullmatch(device) is None:
        return False
    found = torch.device(device)
    return found.type == "cpu" or (found.index or 0) < torch.cuda.device_count()


@dataclass(frozen=True)
class Case:
    """One way to answer; `rounds` holds its answers, in the order of the repeats that all cases share."""

    name: str
    pruner: Pruner | None
    layer: int
    rounds: list[list[Answered]] = field(default_factory=list)

    @property
    def answers(self) -> list[Answered]:
        """Answers of all rounds."""
        return [answered for answers in self.rounds for answered in answers]

    def values(self, name: str) -> list[float]:
        """Return one time an answer, in ms."""
        return [answered.ms[name] for answered in self.answers]

    def median(self, name: str) -> float:
        """Return the median of a time over all answers, in ms."""
        return median(self.values(name))

    def summary(self, name: str) -> dict[str, Any]:
        """Summarise a time, see `measuring.summary`."""
        return summary([[answered.ms[name] for answered in answers] for answers in self.rounds])


def paired_ratio(above: Case, below: Case, name: str) -> float:
    """Median over the repeats of one case's time over another's."""
    return median(a / b for a, b in zip(above.values(name), below.values(name), strict=True))


def run_cases(
    cases: Sequence[Case],
    run: Callable[[Case], Answered],
    repeats: int,
    before_round: Callable[[], None] = lambda: None,
) -> None:
    """Fill every case's `rounds`; in a round the cases take turns."""
    for case in cases:
        run(case)  # not counted: memory not yet touched, kernels not yet loaded
    calls = {case.name: partial(run, case) for case in cases}
    for _ in range(ROUNDS):
        before_round()
        answers = take_turns(calls, repeats)
        for case in cases:
            case.rounds.append(answers[case.name])
