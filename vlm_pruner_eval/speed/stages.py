"""Times within one answer: the vision tower, the layers before and behind the cut, selection, decoding, the host."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from vlm_pruner_eval.hook import prune
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.pruners import Pruner
from vlm_pruner_eval.timing import Span, median_iqr

VISION = ("vision_tower", "visual", "multi_modal_projector")  # modules of a VLM's core that make visual tokens
# parts of the time to the first token, in their order; the cut is what happens between layers K-1 and K
BEFORE, SELECTION, REST, BEHIND = "layers before K", "selection", "rest of the cut", "layers from K on"
PARTS = ("vision", BEFORE, SELECTION, REST, BEHIND, "lm_head", "host")
DECODE = "decode per token"


@dataclass(frozen=True)
class Answered:
    """Times of one `generate` call, in milliseconds, and the records of its prefill.

    Attributes
    ----------
    ms
        `PARTS`, which add up to ``ttft``: from the call to the first token on the host, image preprocessing left out.
        ``prefill``: the same without the vision tower. ``llm``: prefill of the language model, selection and every hook
        included; no lm_head. ``cut``: selection and the rest of the cut. `DECODE`: a later token, median.
        ``llm_cpu``, ``prefill_cpu``, ``decode_cpu``: processor time of this process, all threads together; on a busy
        machine it moves less than the wall clock. On a GPU it is the host's work only.
    tokens : Tensor [B, n_new]
    """

    ms: dict[str, float]
    tokens: Tensor
    records: list[SampleRecord]


class _Arrivals(BaseStreamer):
    """Arrival times of tokens on the host, in ms; unlike the streamers of transformers it takes batches."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.put(None)  # the start

    def put(self, value: Tensor | None) -> None:
        # generate copies tokens to the host first, so the device has made them
        self.times.append((time.perf_counter() * 1e3, time.process_time() * 1e3))

    def end(self) -> None:
        """Nothing is held back."""

    def gaps(self, clock: int) -> list[float]:
        """From the start to the first token, then from token to token; clock 0 is the wall's, 1 this process's own."""
        times = [each[clock] for each in self.times]
        del times[1]  # the prompt, which comes first
        return [after - before for before, after in itertools.pairwise(times)]


class _Stages:
    """Spans of one prefill, by hooks around modules. Hooks of `prune` that are there count as the model's own."""

    def __init__(self, model: nn.Module, layer: int):
        self.laps: dict[str, list[tuple[Span, float]]] = defaultdict(list)
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self._running: dict[str, tuple[Span, float]] = {}
        self._device = model.device
        self._is_prefill = True
        text = model.model.language_model
        layers = text.layers
        for module in (getattr(model.model, name) for name in VISION if hasattr(model.model, name)):
            self._around("vision", module, module)
        self._around("llm", text, text)
        # prepended last, so it runs first: whoever starts a stage must know already which forward this is
        self.handles.append(text.register_forward_pre_hook(self._see_length, with_kwargs=True, prepend=True))
        if layer > 0:
            self._around(BEFORE, layers[0], layers[layer - 1])
        # the cut is made by a hook in front of layer K: the pre-hooks before and after it are its ends
        self.handles.append(layers[layer].register_forward_pre_hook(self._starts("cut"), prepend=True))
        self.handles.append(layers[layer].register_forward_pre_hook(self._stops("cut")))
        self._around(BEHIND, layers[layer], layers[-1])
        self._around("lm_head", model.lm_head, model.lm_head)

    def _see_length(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._is_prefill = kwargs["inputs_embeds"].shape[1] > 1

    def _around(self, name: str, first: nn.Module, last: nn.Module) -> None:
        # in front of everything that other hooks do, except behind a cut, which has a name of its own
        self.handles.append(first.register_forward_pre_hook(self._starts(name), prepend=name != BEHIND))
        self.handles.append(last.register_forward_hook(self._stops(name)))

    def _starts(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if self._is_prefill:
                self._running[name] = (Span(self._device), time.process_time())

        return hook

    def _stops(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            if name in self._running:
                span, started = self._running.pop(name)
                self.laps[name].append((span.stop(), (time.process_time() - started) * 1e3))

        return hook

    def ms(self, name: str) -> float:
        """Total of a stage."""
        return sum(span.ms for span, _ in self.laps.get(name, ()))

    def cpu_ms(self, name: str) -> float:
        """Total of a stage in this process's own time."""
        return sum(cpu for _, cpu in self.laps.get(name, ()))


@torch.inference_mode()
def answer(model: nn.Module, inputs: dict[str, Tensor], pruner: Pruner | None, n_new: int, layer: int) -> Answered:
    """Generate `n_new` tokens greedily and time the parts of the answer.

    Parameters
    ----------
    inputs
        A batch of prompts [B, L] with their images.
    pruner
        None: the model without any hook of ours but the clock's.
    layer
        K, at which the decoder is divided for the clock; the pruner's first cut, if it makes one.
    """
    arrivals = _Arrivals()  # before the hook is put in: that is part of its cost
    with ExitStack() as stack:
        ledger = stack.enter_context(prune(model, pruner)) if pruner is not None else None
        stages = _Stages(model, layer)
        for handle in stages.handles:
            stack.callback(handle.remove)
        output = model.generate(**inputs, max_new_tokens=n_new, streamer=arrivals)
    records = [] if ledger is None else ledger.records
    ttft, *later = arrivals.gaps(0)
    ttft_cpu, *later_cpu = arrivals.gaps(1)
    # the parts of the time to the first token
    ms = {name: stages.ms(name) for name in ("vision", BEFORE, BEHIND, "lm_head")}
    ms["host"] = ttft - sum(ms.values()) - stages.ms("cut")
    ms[SELECTION] = sum(record.selection_ms for record in records)
    ms[REST] = stages.ms("cut") - ms[SELECTION]
    # other times
    ms |= {"ttft": ttft, "prefill": ttft - ms["vision"], "llm": stages.ms("llm"), "cut": stages.ms("cut")}
    ms |= {"llm_cpu": stages.cpu_ms("llm"), "prefill_cpu": ttft_cpu - stages.cpu_ms("vision")}
    ms |= {DECODE: median_iqr(later)[0], "decode_cpu": median_iqr(later_cpu)[0]}
    return Answered(ms, output[:, -n_new:], records)
