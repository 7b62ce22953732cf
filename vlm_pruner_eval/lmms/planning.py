"""Plan of a call: options of `generate`, and which requests meet in a batch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from loguru import logger
from torch import Tensor

from vlm_pruner_eval.lmms.prompts import Prompt, Request

WINDOW_BATCHES = 8  # batches whose images are held in memory, so that prompts of like length meet in one batch
SAMPLING = ("temperature", "top_p", "top_k")
FILLED_IN = ["\n\n"]  # what lmms-eval puts into `until` of every task that names no stop string
PASSED_ON = ("max_new_tokens", "num_beams", "repetition_penalty", "length_penalty")


@dataclass(frozen=True)
class Generation:
    """Arguments of ``model.generate``, and the strings at which an answer ends."""

    kwargs: Mapping[str, object]
    stops: tuple[str, ...] = field(default=())

    @property
    def n_beams(self) -> int:
        """Rows per prompt."""
        return self.kwargs["num_beams"]

    def cut(self, text: str) -> str:
        """`text` up to the first stop string."""
        return text[: min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=len(text))]


@dataclass(frozen=True)
class Defaults:
    """What a family does where a task says nothing, so that its answers are those of lmms-eval's own wrapper.

    Attributes
    ----------
    new_tokens
        The longest answer, in tokens.
    stops_at_blank_line
        Whether an answer ends at the stop string that lmms-eval fills in; of its own wrappers only Qwen2-VL's does.
    """

    new_tokens: int = 1024
    stops_at_blank_line: bool = False


def generation(options: Mapping[str, object], defaults: Defaults = Defaults()) -> Generation:  # frozen
    """Map a task's generation_kwargs to `generate`'s; greedy unless a temperature above 0 or do_sample asks for sampling."""
    temperature = options.get("temperature")
    samples = bool(options.get("do_sample", temperature is not None)) and temperature != 0
    kwargs = {"max_new_tokens": defaults.new_tokens, "num_beams": 1, "do_sample": samples}
    kwargs |= {name: options[name] for name in PASSED_ON if options.get(name) is not None}
    kwargs |= {name: options[name] for name in SAMPLING if samples and options.get(name) is not None}
    stops = options.get("until") or ()
    if stops == FILLED_IN and not defaults.stops_at_blank_line:
        stops = ()
    unread = sorted(set(options) - {*PASSED_ON, *SAMPLING, "do_sample", "until"})
    if unread:
        logger.warning(f"vlm_pruner_eval: generation_kwargs {', '.join(unread)} have no meaning for this model and are not used.")
    return Generation(kwargs, (stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop))


def windows(asked: Sequence[Request], batch_size: int, defaults: Defaults) -> Iterator[tuple[Generation, list[Request]]]:
    """Requests with equal generation options, longest question first, in windows of a few batches.

    Long prompts come first so that a batch that does not fit into memory fails at once, not after hours.
    """
    groups: dict[str, list[Request]] = {}
    for request in asked:
        groups.setdefault(json.dumps(request.options, sort_keys=True, default=str), []).append(request)
    for requests in groups.values():
        options = generation(requests[0].options, defaults)
        requests.sort(key=lambda request: -request.length)
        for start in range(0, len(requests), batch_size * WINDOW_BATCHES):
            yield options, requests[start : start + batch_size * WINDOW_BATCHES]


def batches(prompts: list[Prompt], batch_size: int) -> Iterator[list[Prompt]]:
    """Batches of prompts of like length: more frames and images first, then longer text.

    Videos of one batch have equally many frames, which the families that stack them need.
    """
    prompts = sorted(prompts, key=lambda prompt: (prompt.n_frames, len(prompt.images), len(prompt.text)), reverse=True)
    for _, group in itertools.groupby(prompts, key=lambda prompt: prompt.n_frames):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def count_new(new_ids: Tensor, eos_ids: Collection[int]) -> int:
    """Tokens that one row [n] really generated: up to and with its first end token; the rest is padding."""
    ends = [at for at, token in enumerate(new_ids.tolist()) if token in eos_ids]
    return ends[0] + 1 if ends else len(new_ids)
