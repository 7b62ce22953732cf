"""Where the time of one answer goes: the vision tower, the layers before and behind the cut, selection, decoding, the host."""

from __future__ import annotations

import itertools
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from vlm_pruner_eval.hook import prune
from vlm_pruner_eval.ledger import SampleRecord
from vlm_pruner_eval.pruners import Pruner
from vlm_pruner_eval.timing import Span

VISION = ("vision_tower", "visual", "multi_modal_projector")  # modules of a VLM's core that make visual tokens


@dataclass(frozen=True)
class Answered:
    """Times of one `generate` call, in milliseconds, and what its prefill held.

    Attributes
    ----------
    ttft_ms
        From the call to the first token on the host: vision tower, projector, prefill with selection, lm_head, generate's own work.
        The image's preprocessing is not in it.
    llm_ms
        Prefill of the language model, selection and every hook included; no lm_head.
    vision_ms, before_ms, cut_ms, behind_ms, head_ms
        Parts of `ttft_ms`: vision tower and projector; layers before K; what happens between layers K-1 and K, selection included; layers
        from K on; lm_head.
    selection_ms
        The part of `cut_ms` in the methods' `select`, all rows.
    decode_ms
        Every later token, from the one before.
    llm_cpu_ms, prefill_cpu_ms, decode_cpu_ms
        What this process computed in `llm_ms`, in `prefill_ms` and in each of `decode_ms`, all threads together; on a busy machine it
        moves less than the clock on the wall. On a GPU it is the host's work only.
    tokens : Tensor [B, n_new]
    """

    ttft_ms: float
    llm_ms: float
    vision_ms: float
    before_ms: float
    cut_ms: float
    behind_ms: float
    head_ms: float
    selection_ms: float
    decode_ms: list[float]
    llm_cpu_ms: float
    prefill_cpu_ms: float
    decode_cpu_ms: list[float]
    tokens: Tensor
    records: list[SampleRecord] = field(default_factory=list)

    @property
    def prefill_ms(self) -> float:
        """The time to the first token without the vision tower: all that a hook on the language model can slow down."""
        return self.ttft_ms - self.vision_ms

    @property
    def host_ms(self) -> float:
        """What is left of `ttft_ms`: generate's own work, embeddings, masks, the hook outside the layers, sampling."""
        return self.ttft_ms - self.vision_ms - self.before_ms - self.cut_ms - self.behind_ms - self.head_ms

    def parts(self) -> dict[str, float]:
        """The parts that add up to `ttft_ms`, and the time of one more token."""
        return {
            "vision": self.vision_ms,
            "layers before K": self.before_ms,
            "selection": self.selection_ms,
            "rest of the cut": self.cut_ms - self.selection_ms,
            "layers from K on": self.behind_ms,
            "lm_head": self.head_ms,
            "host": self.host_ms,
            "decode per token": median(self.decode_ms),
        }


class _Arrivals(BaseStreamer):
    """When each token reached the host, in ms: on the wall, and of this process. Unlike the streamers of transformers it takes batches."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.put(None)  # the start

    def put(self, value: Tensor | None) -> None:
        self.wall.append(time.perf_counter() * 1e3)  # generate copies tokens to the host first, so the device has made them
        self.cpu.append(time.process_time() * 1e3)

    def end(self) -> None:
        """Nothing is held back."""

    def gaps(self) -> tuple[list[float], list[float]]:
        """From the start to the first token, then from token to token: on the wall, and of this process."""
        return tuple(
            [after - before for before, after in itertools.pairwise([times[0], *times[2:]])]  # times[1]: the prompt, which comes first
            for times in (self.wall, self.cpu)
        )


class _Lap:
    """A stretch of device time, and of this process's own."""

    def __init__(self, device: torch.device):
        self.span, self.cpu_ms = Span(device), -time.process_time() * 1e3

    def stop(self) -> _Lap:
        self.span.stop()
        self.cpu_ms += time.process_time() * 1e3
        return self


class _Stages:
    """Spans of one prefill, by hooks around modules. Hooks of `prune` that are there already count as the model's own."""

    def __init__(self, model: nn.Module, layer: int):
        self.laps: dict[str, list[_Lap]] = {}
        self._running: dict[str, _Lap] = {}
        self._is_prefill = True
        core, layers = model.model, model.model.language_model.layers
        self._device = model.device
        text = core.language_model
        self._handles = []
        for module in (getattr(core, name) for name in VISION if hasattr(core, name)):
            self._around(module, module, "vision")
        self._around(text, text, "llm")
        # prepended last, so it runs first: whoever starts a stage must know already which forward this is
        self._handles.append(text.register_forward_pre_hook(self._see_length, with_kwargs=True, prepend=True))
        if layer > 0:
            self._around(layers[0], layers[layer - 1], "before")
        # the cut is made by a hook in front of layer K: the pre-hooks before and after it are its ends
        self._handles.append(layers[layer].register_forward_pre_hook(self._starts("cut"), prepend=True))
        self._handles.append(layers[layer].register_forward_pre_hook(self._stops("cut")))
        self._around(layers[layer], layers[-1], "behind")
        self._around(model.lm_head, model.lm_head, "head")

    def _see_length(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._is_prefill = kwargs["inputs_embeds"].shape[1] > 1

    def _around(self, first: nn.Module, last: nn.Module, name: str) -> None:
        # in front of everything that other hooks do, except behind a cut, which has a name of its own
        prepend = name != "behind"
        self._handles.append(first.register_forward_pre_hook(self._starts(name), prepend=prepend))
        self._handles.append(last.register_forward_hook(self._stops(name)))

    def _starts(self, name: str):
        def hook(*_: object) -> None:
            if self._is_prefill:
                self._running[name] = _Lap(self._device)

        return hook

    def _stops(self, name: str):
        def hook(*_: object) -> None:
            if name in self._running:
                self.laps.setdefault(name, []).append(self._running.pop(name).stop())

        return hook

    def ms(self, name: str) -> float:
        """Total of a stage that happens in prefill only."""
        return sum(lap.span.ms for lap in self.laps.get(name, ()))

    def cpu_ms(self, name: str) -> float:
        """The same of this process's own time."""
        return sum(lap.cpu_ms for lap in self.laps.get(name, ()))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.inference_mode()
def answer(model: nn.Module, inputs: dict[str, Tensor], pruner: Pruner | None, n_new: int, layer: int) -> Answered:
    """Generate `n_new` tokens greedily and say where the time went.

    Parameters
    ----------
    inputs
        A batch of prompts [B, L] with their images.
    pruner
        None: the model without any hook of ours but the clock's.
    layer
        K, where the decoder is divided for the clock; the pruner's first cut, if it makes one.
    """
    arrivals = _Arrivals()  # before the hook is put in: that is part of its cost
    with ExitStack() as stack:
        ledger = stack.enter_context(prune(model, pruner)) if pruner is not None else None
        stages = _Stages(model, layer)
        stack.callback(stages.remove)
        output = model.generate(**inputs, max_new_tokens=n_new, streamer=arrivals)
    (ttft_ms, *decode_ms), (ttft_cpu_ms, *decode_cpu_ms) = arrivals.gaps()
    records = [] if ledger is None else ledger.records
    return Answered(
        ttft_ms=ttft_ms,
        **{f"{name}_ms": stages.ms(name) for name in ("llm", "vision", "before", "cut", "behind", "head")},
        selection_ms=sum(record.selection_ms for record in records),
        decode_ms=decode_ms,
        llm_cpu_ms=stages.cpu_ms("llm"),
        prefill_cpu_ms=ttft_cpu_ms - stages.cpu_ms("vision"),
        decode_cpu_ms=decode_cpu_ms,
        tokens=output[:, -n_new:],
        records=records,
    )
