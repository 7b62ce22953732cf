"""Hooks on a model: put there, found again, and taken away."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from vlm_pruner_eval.errors import PruningError
from vlm_pruner_eval.guard import NotCopied
from vlm_pruner_eval.probe import Probe
from vlm_pruner_eval.vision_probe import VisionProbe

INSTALLED = "_vlm_pruner_eval_hook"  # attribute of a model that is being pruned: its hook


def installed_probes(core: nn.Module) -> Mapping[int, Probe]:
    """The probes of the hook that is on a model now, by the layer of the stage that reads them; none without a hook."""
    hook = core.__dict__.get(INSTALLED)
    return {} if hook is None else hook.probes


def installed_vision(core: nn.Module) -> VisionProbe | None:
    """The vision probe of the hook that is on a model now; None without one."""
    hook = core.__dict__.get(INSTALLED)
    return None if hook is None else hook.vision


class Hooks(NotCopied):
    """Context that owns what was put on a model; on exit everything is as it was."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._replaced: list[tuple[object, str, object, Callable]] = []

    def add(self, *handles: RemovableHandle) -> None:
        """Take over hooks that were registered."""
        self._handles.extend(handles)

    def replace(self, owner: object, name: str, function: Callable) -> None:
        """Hide the method `name` of `owner` behind ``function(original, ...)``, on the instance; the user's own is kept for later."""
        original = getattr(owner, name)
        ours = functools.wraps(original)(functools.partial(function, original))
        self._replaced.append((owner, name, owner.__dict__.get(name), ours))
        owner.__dict__[name] = ours

    def check(self, replaced: Sequence[int] = ()) -> None:
        """Raise a PruningError if hooks are gone.

        Parameters
        ----------
        replaced
            Decoder layers that are not the ones with the hooks any more.
        """
        gone = len(replaced) + sum(handle.id not in (handle.hooks_dict_ref() or ()) for handle in self._handles)
        gone += sum(owner.__dict__.get(name) is not ours for owner, name, _, ours in self._replaced)
        if gone:
            total = len(self._handles) + len(self._replaced)
            raise PruningError(
                f"prune: {gone} of {total} hooks were removed from the model inside the context, so prompts may not have been pruned."
            )

    def __enter__(self) -> Hooks:
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for owner, name, before, _ in reversed(self._replaced):
            owner.__dict__.pop(name, None)
            if before is not None:
                owner.__dict__[name] = before
        self._replaced.clear()
