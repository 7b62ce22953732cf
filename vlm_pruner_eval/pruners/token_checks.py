"""The checks before and behind a method's choice, without a wait of their own for the device.

What tells the host that numbers are finite is a number or two, made on the device. They come along with what else is copied to
the host: with the first tensors that a method asks for, or else with its answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlm_pruner_eval.device_copy import to_host
from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.types import Selection, VisualTokens

SUMMED_IN = torch.float32  # weighted sums of states are, whatever their dtype


class Inspection:
    """What one call of `select_batch` reads, and whether the host knows yet that it is finite.

    On a CPU it is known at once, on a device from the first copy to the host on.

    Parameters
    ----------
    named : sequence of mappings of str to Tensor
        For each image floating-point tensors of any shape, by the names that they have in sentences.
    where
        How sentences about each image begin.

    Raises
    ------
    PruningError
        NaN or infinity, here or in the call that brings the first copy.
    """

    def __init__(self, named: Sequence[Mapping[str, Tensor]], where: Sequence[str]):
        self._where = where
        self._named = [(i, name, value) for i, mapping in enumerate(named) for name, value in mapping.items() if value.numel()]
        self._largest: list[float | None] = [None] * len(named)
        self._unread = [evidence(value) for _, _, value in self._named]
        if all(value.device.type == "cpu" for value in self._unread):
            self.finish()

    def on_host(self, *tensors: Tensor) -> list[Tensor]:
        """The same tensors in the memory of the host; if that takes a copy, the check of the input comes along."""
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return [*tensors]
        arrived = to_host(*tensors, *self._unread)
        self._judge(arrived[len(tensors) :])
        return arrived[: len(tensors)]

    def finish(self) -> None:
        """Check the input now, if it is not checked yet."""
        self._judge(to_host(*self._unread))

    def bounds(self, image: int, amplification: float | None, dtype: torch.dtype) -> bool:
        """Tell if states of `dtype` that are `amplification` times those of `image` at most are sure to be finite.

        False also where the size of the image's states is not known on the host.
        """
        largest = self._largest[image]
        if amplification is None or largest is None:
            return False
        highest: float = min(torch.finfo(dtype).max, torch.finfo(SUMMED_IN).max)
        return amplification * largest < highest / 2  # half: sums are rounded

    def _judge(self, found: list[Tensor]) -> None:
        if not self._unread:
            return
        self._unread = []
        for (image, name, value), numbers in zip(self._named, found, strict=True):
            if not tells_finite(numbers):
                self._look(image, name, value)
            elif name == "hidden_states" and value.device.type != "cpu":
                self._largest[image] = numbers.abs().max().item()

    def _look(self, image: int, name: str, value: Tensor) -> None:
        bad = (~torch.isfinite(value)).flatten(1).any(1) if value.dim() > 1 else ~torch.isfinite(value)
        if bool(bad.any()):
            raise PruningError(
                f"{self._where[image]}: {name} holds NaN or infinity in {int(bad.sum())} of {len(bad)} tokens "
                f"(first: token {int(bad.nonzero()[0])}); run the unpruned model in float32 or bfloat16 to find "
                "the layer that overflows."
            )


def evidence(values: Tensor) -> Tensor:
    """One or two numbers, [] or [2], that are finite only if all `values` are, one at least of any shape.

    On a device these are the smallest and the largest. On a CPU it is their sum, which costs a tenth of a look at every element;
    a sum of finite values may overflow too, so one that is not finite calls for that look.
    """
    if values.device.type == "cpu":
        return values.sum(dtype=SUMMED_IN)
    return torch.stack(values.aminmax())


def tells_finite(found: Tensor) -> bool:
    """Tell if what `evidence` returned, in the memory of the host, says that there is neither NaN nor infinity."""
    return all(map(math.isfinite, found.view(-1).tolist()))  # a tenth of the time that torch takes for numbers so few


def checked(
    selections: Sequence[Selection],
    tokens: Sequence[VisualTokens],
    keeps: Sequence[int],
    inspection: Inspection,
    *,
    where: Sequence[str],
    exact: bool,
) -> list[Selection]:
    """A method's answers, if they are right: each on the device of its tokens, with `merged` and the order in the memory of the host.

    Raises
    ------
    PruningError
        As `check_selection`, and new states that hold NaN or infinity.
    """
    # what can be said without numbers, and what has to be looked at
    states, unproven = [], {}
    for i, (selection, given, keep) in enumerate(zip(selections, tokens, keeps, strict=True)):
        check_form(selection, given, keep, where=where[i], exact=exact)
        merged = selection.hidden_states
        if merged is not None:
            merged = merged.to(given.hidden_states.dtype)
            if merged.numel() and not inspection.bounds(i, selection.amplification, merged.dtype):
                unproven[i] = evidence(merged)
        states.append(merged)
    # the numbers
    places = {i: selection.merged for i, selection in enumerate(selections) if selection.merged is not None}
    arrived = iter(inspection.on_host(*(selection.order for selection in selections), *places.values(), *unproven.values()))
    inspection.finish()
    orders = [next(arrived) for _ in selections]
    places = {i: next(arrived) for i in places}
    found = dict(zip(unproven, arrived, strict=True))
    answers = []
    for i, (selection, order, merged) in enumerate(zip(selections, orders, states, strict=True)):
        check_indices(order, tokens[i].n_visual, where=where[i])
        if merged is not None and i in found and not tells_finite(found[i]) and not bool(torch.isfinite(merged).all()):
            raise PruningError(f"{where[i]}: the merged states hold NaN or infinity in {merged.dtype}.")
        there = selection.order.to(tokens[i].hidden_states.device, non_blocking=True)
        answers.append(dataclasses.replace(selection, order=there, host_order=order, hidden_states=merged, merged=places.get(i)))
    return answers


def check_selection(selection: Selection, tokens: VisualTokens, keep: int, *, where: str, exact: bool) -> Tensor:
    """Refuse an answer that is not `keep` unique local indices in range, with states of the right shape.

    Returns
    -------
    Tensor [R] int64
        The indices in selection order, in the memory of the host.

    Raises
    ------
    PruningError
        Naming what was got and what was expected.
    """
    check_form(selection, tokens, keep, where=where, exact=exact)
    (order,) = to_host(selection.order)
    check_indices(order, tokens.n_visual, where=where)
    return order


def check_form(selection: Selection, tokens: VisualTokens, keep: int, *, where: str, exact: bool) -> None:
    """The part of `check_selection` that looks at types and shapes only, for which nobody waits."""
    order, states = selection.order, selection.hidden_states
    if not isinstance(order, Tensor) or order.dim() != 1 or order.dtype != torch.int64:
        got = f"{tuple(order.shape)} of {order.dtype}" if isinstance(order, Tensor) else type(order).__name__
        raise PruningError(f"{where}: chose {got}, expected a 1-D int64 tensor of local indices.")
    if exact and len(order) != keep:
        raise PruningError(f"{where}: chose {len(order)} tokens, expected exactly {keep} of {tokens.n_visual}.")
    expected = (len(order), tokens.hidden_states.shape[1])
    if states is not None and not (isinstance(states, Tensor) and states.is_floating_point() and tuple(states.shape) == expected):
        got = f"shape {tuple(states.shape)} of {states.dtype}" if isinstance(states, Tensor) else f"type {type(states).__name__}"
        raise PruningError(f"{where}: returned states of {got}, expected a floating-point tensor {expected} in the order of `keep`.")


def check_indices(order: Tensor, n_visual: int, *, where: str) -> None:
    """The part of `check_selection` that looks at the indices [R], which are in the memory of the host."""
    indices = order.tolist()  # of a few hundred numbers Python knows sooner than torch
    if indices and (min(indices) < 0 or max(indices) >= n_visual):
        raise PruningError(f"{where}: chose indices {min(indices)} to {max(indices)}, expected 0 to {n_visual - 1}.")
    distinct = len(set(indices))
    if distinct != len(indices):
        raise PruningError(f"{where}: chose {len(indices)} indices of which {distinct} are distinct, expected no repeats.")
