"""A device that is not the CPU, made of CPU tensors, that counts how often the host has to wait for it, and what is launched on it.

Tensors on it say that they are on "meta", and every operation on them passes through `CountSyncs`, which computes it on the
CPU. What waits on a GPU is counted: values or sizes that depend on data, copies to the host, and copies to the device that
are not asked to go on in the background.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
DATA_DEPENDENT = {
    aten._local_scalar_dense,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPIES = {aten._to_copy, aten.copy_}
NO_WORK = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view, aten.lift_fresh}


class OnDevice(Tensor):
    """A tensor of the stand-in; its numbers are in `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype, device=DEVICE)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> object:
        raise AssertionError(f"{func} on the stand-in device outside of CountSyncs")

    def tolist(self) -> object:
        """As of a tensor on a GPU: by way of the host."""
        return self.cpu().tolist()


def held(value: object) -> object:
    """The CPU tensor behind a tensor of the stand-in; anything else as it is."""
    return value.held if isinstance(value, OnDevice) else value


class _FromNumbers(TorchFunctionMode):
    """torch.tensor(..., device=DEVICE) as a copy to the device; of itself it would make a tensor of "meta", which holds no numbers."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE:
            del kwargs["device"]
            numbers = args if isinstance(args[0], Tensor) else tree_map(lambda one: one.item() if isinstance(one, OnDevice) else one, args)
            return func(*numbers, **kwargs).to(DEVICE)
        return func(*args, **kwargs)


def _is_view(func: Any) -> bool:
    """True for an operation that returns its argument's own numbers, unchanged."""
    made = [part.alias_info for part in func._schema.returns]
    return bool(made) and all(alias is not None and not alias.is_write for alias in made)


def _empty(value: object) -> object:
    """Tensors of nothing that were made on the device out of sight, as torch.tensor([]) makes them, are the stand-in's too."""
    unseen = isinstance(value, Tensor) and not isinstance(value, OnDevice) and value.device == DEVICE and not value.numel()
    return OnDevice(torch.empty(value.shape, dtype=value.dtype)) if unseen else value


class CountSyncs(TorchDispatchMode):
    """While active, `syncs` counts operations by name for which the host waits for the stand-in device.

    `launches` counts those that give it work: each is at least one kernel or copy on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self._from_numbers = _FromNumbers()

    def __enter__(self) -> CountSyncs:
        self._from_numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._from_numbers.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> object:
        args, kwargs = tree_map(_empty, args), tree_map(_empty, dict(kwargs or {}))
        leaves = tree_leaves((args, kwargs))
        here = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target) == DEVICE
        if not here and not to_device:
            return func(*args, **kwargs)
        packet = func.overloadpacket
        if packet not in COPIES | INDEXING:
            apart = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, OnDevice) and leaf.dim()]
            assert not apart, f"{func} mixes tensors of the host and of the device"
        name = str(packet).removeprefix("aten.")
        if self._waits(packet, args, kwargs, bool(here), to_device):
            self.syncs[name] += 1
        if packet not in NO_WORK and not _is_view(func):
            self.launches[name] += 1
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        result = func(*tree_map(held, args), **tree_map(held, kwargs))
        if target is not None and not to_device:
            return result
        return tree_map(lambda value: OnDevice(value) if isinstance(value, Tensor) else value, result)

    def _waits(self, packet: Any, args: tuple, kwargs: dict, from_device: bool, to_device: bool) -> bool:
        if packet in INDEXING:
            indices = [index for index in args[1] if index is not None]  # those of the host are allowed, and copied to the device
            return any(not isinstance(index, OnDevice) or index.dtype in (torch.bool, torch.uint8) for index in indices)
        if packet in COPIES and not any(value.numel() for value in args if isinstance(value, Tensor)):
            return False
        if packet is aten._to_copy:
            leaves = kwargs.get("device") is not None and not to_device
            arrives = to_device and not from_device
            return leaves or (arrives and not kwargs.get("non_blocking", False))
        if packet is aten.copy_:
            return not all(isinstance(value, OnDevice) for value in args[:2])
        return packet in DATA_DEPENDENT
