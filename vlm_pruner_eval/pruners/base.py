"""The base of every method: its parameters, and the contract of `select`."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import traceback
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval import kernels
from vlm_pruner_eval.budget import Rate, keep_share, parse_rate, share_for_layer_average
from vlm_pruner_eval.errors import ConfigError, PruningError
from vlm_pruner_eval.pruners.fields import PARTS, PLAIN, read, replaced
from vlm_pruner_eval.pruners.token_checks import Inspection, checked
from vlm_pruner_eval.redact import short
from vlm_pruner_eval.types import Selection, Stage, VisualTokens

OPTIONAL_FIELDS = PLAIN | PARTS.keys()
ALWAYS_THERE = frozenset({"hidden_states", "coords", "grid", "sample_id", "image", "is_video"}) | frozenset(
    {"ids", "n_original", "stage", "memory", "contiguous"}
)
_MOST = 2**63 - 1
FROM_PREVIOUS_LAYER = frozenset({"keys", "attention", "text_attention"})


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """A training-free visual-token pruning method: WHAT to keep, never where tokens are or how they are cut.

    A subclass sets `name` and `needs`, adds its parameters as dataclass fields, and writes `choose`. On a GPU, `select` waits for the
    device twice: before `choose`, to check the tokens, and after it, to check the answer. With `checks_late` both are one.

    Parameters
    ----------
    pruning_rate
        Fraction of visual tokens removed, in [0, 1): a float or an exact fraction such as "8/9".
    layer
        K: the first decoder layer (0-based) that sees the shortened sequence.
    positions
        "original": kept tokens keep their position ids and decoding continues from the original length;
        "contiguous": renumbered 0..n'-1, decoding continues from n' (not possible under mRoPE).
    selection_dtype
        "float32": selection arithmetic in float32 whatever the model's dtype; "model": in the model's dtype.
    budget
        "kept": the rate says how many tokens are kept from layer K on; "layer_average": how many on average over layers.
    scope
        "per_image": every image or video has a budget of its own; "per_sample": one budget over all images of a prompt; "per_view":
        every view of an image (base view and tiles) or frame of a video has one, and newline tokens are dropped.
    official_quirks
        Reproduce the misbehaviours of the authors' release that shaped printed numbers (see README, "Quirks").

    Raises
    ------
    ConfigError
        With every wrong parameter of the call.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    quirks_change_count: ClassVar[bool] = False
    acts_in_tower: ClassVar[bool] = False  # has `inside_tower` and `merged_inside`: merges patches inside the vision tower
    joint_views: ClassVar[bool] = False  # the views of an image are given to one call of `choose_batch`
    fixed_layer: ClassVar[int | None] = None
    before_model: ClassVar[bool] = False  # acts on the images, so there is nothing for the hook to cut
    without_effect: ClassVar[frozenset[str]] = frozenset()  # parameters that are accepted, so that grids need no exception, and do nothing
    _by_batch: ClassVar[bool] = False  # the choice is written in `choose_batch`
    checks_late: ClassVar[bool] = False  # `choose` bears NaN and infinity (no error, no endless loop) until its first `tokens.on_host`

    pruning_rate: Rate
    layer: int = 2
    positions: str = "original"
    selection_dtype: str = "float32"
    budget: str = "kept"
    scope: str = "per_image"
    official_quirks: bool = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        chooses = {"choose", "choose_batch"} & cls.__dict__.keys()
        if chooses and "checks_late" not in cls.__dict__:
            cls.checks_late = False  # said of a parent's choose, not of this one
        if chooses:
            cls._by_batch = "choose_batch" in chooses

    def __post_init__(self) -> None:
        problems = [*self._rate_problems(), *self._type_problems()]
        if not problems:  # ranges are checked on values of the right type only
            problems = [f"{self.name}: {problem}" for problem in self.problems()]
        if problems:
            raise ConfigError(problems)

    # ---- for subclasses
    def choose(self, tokens: VisualTokens, keep: int) -> Tensor | Selection:
        """Choose `keep` tokens: local indices [R] in selection order, or a Selection that also carries new states.

        `tokens` come in the arithmetic dtype of `selection_dtype`, and have been checked for NaN and infinity; with `checks_late`,
        on a device, only when `tokens.on_host` has copied something. Indices may be on the device or in the memory of the host.
        Built-in methods write `choose_batch` instead where several images at once are faster on a GPU.
        """
        if type(self).choose_batch is Pruner.choose_batch:
            raise NotImplementedError(f"{type(self).__name__}.choose is not written yet.")
        (chosen,) = self.choose_batch([tokens], [keep])
        return chosen

    def choose_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int]) -> Sequence[Tensor | Selection]:
        """Choose for several images at once, written in place of `choose` where that is faster on a GPU.

        `tokens` are on one device and share one `on_host`: called once, for all images, it is all that synchronises.
        """
        return [self.choose(given, keep) for given, keep in zip(tokens, keeps, strict=True)]

    def problems(self) -> list[str]:
        """What is wrong with the values of the parameters; a subclass extends the list."""
        found = []
        if self.layer < 0:
            found.append(f"layer: got {self.layer}, expected a 0-based decoder layer, 0 or more.")
        if self.fixed_layer is not None and self.layer != self.fixed_layer:
            found.append(f"layer: got {self.layer}, but this method acts at layer {self.fixed_layer} only; leave it out.")
        if self.layer == 0 and self.needs & FROM_PREVIOUS_LAYER:
            wanted = ", ".join(sorted(self.needs & FROM_PREVIOUS_LAYER))
            found.append(f"layer: got 0, but this method reads {wanted} of the layer before; use layer >= 1.")
        choices = {
            "positions": self.position_choices(),
            "selection_dtype": ("float32", "model"),
            "budget": ("kept", "layer_average"),
            "scope": ("per_image", "per_sample", "per_view"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                found.append(f"{field}: got {short(getattr(self, field))}, expected one of {', '.join(allowed)}.")
        unknown = self.needs - OPTIONAL_FIELDS
        if unknown:
            found.append(
                f"needs: got {sorted(unknown)}, expected fields out of {sorted(OPTIONAL_FIELDS)}; "
                f"{', '.join(sorted(ALWAYS_THERE))} are always there and are not named."
            )
        return found

    def tower_layers(self) -> tuple[int, ...]:
        """Layers of the vision tower whose attention or keys `needs` names, 0-based, or counted from the end by negative numbers."""
        return ()

    def needs_now(self, stage: int, memory: Mapping[str, Any]) -> frozenset[str]:
        """Fields out of `needs` that are looked at in `stage` (0-based), given what earlier stages left in the scope's `memory`."""
        return self.needs

    def decides_count(self) -> bool:
        """Tell if the method may keep another number of tokens than it is asked for; records hold what was kept."""
        return self.official_quirks and self.quirks_change_count

    def position_choices(self) -> tuple[str, ...]:
        """Values that `positions` may take."""
        return ("original", "contiguous")

    # ---- for the hook
    def stages(self, n_layers: int) -> tuple[Stage, ...]:
        """The cuts, in ascending order of layer; default one at `layer` that keeps ``1 - pruning_rate``."""
        share: Fraction | float = 1 - parse_rate(self.pruning_rate)
        if self.budget == "layer_average" and share != 1:
            share = share_for_layer_average(share, self.layer, n_layers)
        return (Stage(self.layer, share),)

    def keep_at(self, stage: Stage, n_visual: int) -> int:
        """Tokens of a scope of `n_visual` ORIGINAL tokens that remain after `stage`."""
        return keep_share(n_visual, stage.share)

    def position_policy(self, mrope: bool) -> str:
        """What `positions` means, "original" or "contiguous", given whether the model has multi-dimensional rotary positions."""
        return self.positions

    def select(self, tokens: VisualTokens, keep: int | None = None) -> Selection:
        """Choose tokens of one scope; deterministic, and never writes to its input.

        Parameters
        ----------
        tokens
            V visual tokens with the fields that `needs` names.
        keep
            How many to keep; default ``keep_count(V, pruning_rate)``.

        Returns
        -------
        Selection
            Exactly `keep` unique indices in [0, V) (with official_quirks: unique and in range), new states in the
            input's dtype, both on the device of `tokens.hidden_states`.

        Raises
        ------
        PruningError
            Missing fields, NaN or infinity in what the method reads, or an answer that breaks the contract.
        """
        return self._selected([tokens], [keep])[0]

    def select_batch(self, tokens: Sequence[VisualTokens], keeps: Sequence[int | None] | None = None) -> list[Selection]:
        """Choose tokens of several scopes as `select` does one by one; on a GPU all answers come with one synchronisation.

        An error is about one of them, and names it; the others have no answer then.
        """
        if not tokens:
            return []
        wanted = [None] * len(tokens) if keeps is None else [*keeps]
        if len(wanted) != len(tokens):
            raise PruningError(
                f"method {self.name!r}: got {len(wanted)} numbers of tokens to keep for {len(tokens)} images, expected one each."
            )
        if type(self).select is not Pruner.select:  # replaced, and with it the way to choose
            return [self.select(given, keep) for given, keep in zip(tokens, wanted, strict=True)]
        return self._selected(tokens, wanted)

    def default_keep(self, n_visual: int) -> int:
        """``keep_count(n_visual, pruning_rate)``."""
        return keep_share(n_visual, 1 - parse_rate(self.pruning_rate))

    # ---- private
    def _where(self, *tokens: VisualTokens) -> str:
        names = _joined([repr(given.sample_id) for given in tokens])
        return f"method {self.name or type(self).__name__!r}, layer {self.layer}, sample {names}"

    def _count(self, tokens: VisualTokens, keep: int | None) -> int:
        """How many tokens to keep when `keep` are asked for."""
        if keep is None:
            return self.default_keep(tokens.n_visual)
        if isinstance(keep, bool) or not isinstance(keep, Integral) or not 0 <= keep <= tokens.n_visual:
            raise PruningError(
                f"{self._where(tokens)}: asked to keep {keep!r} of {tokens.n_visual} tokens, "
                f"expected a whole number from 0 to {tokens.n_visual}."
            )
        return int(keep)

    def _selected(self, tokens: Sequence[VisualTokens], wanted: Sequence[int | None]) -> list[Selection]:
        """Answers for images on one device; on a CPU, where a batch would only take memory, one by one."""
        devices = {given.hidden_states.device for given in tokens}
        if len(tokens) > 1 and (len(devices) > 1 or not _gains(*devices)) and len(parts := self._parts(tokens)) > 1:
            return [found for part in parts for found in self._selected(tokens[part], wanted[part])]
        keeps = [self._count(given, keep) for given, keep in zip(tokens, wanted, strict=True)]
        where = [self._where(given) for given in tokens]
        inspection = Inspection([self._read(given) for given in tokens], where)
        if not self.checks_late:
            inspection.finish()
        exact = not self.decides_count()
        try:
            answers = self._chosen(tokens, keeps, inspection)
            selections = [answer if isinstance(answer, Selection) else Selection(answer) for answer in answers]
            return checked(selections, tokens, keeps, inspection, where=where, exact=exact)
        except PruningError:
            inspection.finish()  # if NaN in the input is the reason, it is what must be said
            raise

    def _parts(self, tokens: Sequence[VisualTokens]) -> list[slice]:
        """Runs of tokens that are chosen from together: the views of an image if the method looks at them jointly, else each by itself."""
        starts = [i for i, given in enumerate(tokens) if i == 0 or not self.joint_views or given.image != tokens[i - 1].image]
        return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True)]

    def _chosen(self, tokens: Sequence[VisualTokens], keeps: Sequence[int], inspection: Inspection) -> Sequence[Tensor | Selection]:
        """Answers of `choose` or `choose_batch`; whatever these raise names the method and the sample, since a run meets thousands."""
        if len(tokens) > 1 and not self._by_batch:
            return [self._chosen([given], [keep], inspection)[0] for given, keep in zip(tokens, keeps, strict=True)]
        try:
            given = [self._in_arithmetic_dtype(one, inspection) for one in tokens]
            return self.choose_batch(given, keeps) if self._by_batch else [self.choose(given[0], keeps[0])]
        except PruningError:
            raise
        except Exception as error:
            raise PruningError(
                f"{self._where(*tokens)}: {'choose_batch' if len(tokens) > 1 else 'choose'} raised {type(error).__name__}: {error} "
                f"({self._place(error)}). Expected {_joined(keeps)} of {_joined([one.n_visual for one in tokens])} local indices; "
                "mend the method or leave the sample out."
            ) from error

    def _place(self, error: Exception) -> str:
        """The last line of the method's own file that was executed."""
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == inspect.getsourcefile(type(self))]
        frame = (own or frames)[-1]
        return f"{frame.filename}, line {frame.lineno}"

    def _dtype(self, given: torch.dtype) -> torch.dtype:
        return given if self.selection_dtype == "model" else torch.float32

    def _read(self, tokens: VisualTokens) -> dict[str, Tensor]:
        """The floating-point tensors that this method reads, by name."""
        return read(tokens, self.needs_now(tokens.stage, tokens.memory), self.tower_layers(), self._where(tokens))

    def _in_arithmetic_dtype(self, tokens: VisualTokens, inspection: Inspection) -> VisualTokens:
        cast = {name: value.to(self._dtype(value.dtype)) for name, value in self._read(tokens).items()}
        return replaced(tokens, cast, on_host=inspection.on_host)

    def _rate_problems(self) -> list[str]:
        try:
            parse_rate(self.pruning_rate)
        except ConfigError as error:
            return list(error.problems)
        return []

    def _type_problems(self) -> list[str]:
        hints = typing.get_type_hints(type(self))
        found = []
        for field in dataclasses.fields(self):
            if field.name == "pruning_rate":
                continue
            value, wanted = getattr(self, field.name), hints[field.name]
            if not _is_a(value, wanted):
                expected = getattr(wanted, "__name__", wanted)
                found.append(f"{self.name}: {field.name}: got {short(value)} ({type(value).__name__}), expected {expected}.")
        return found


def _is_a(value: Any, wanted: object) -> bool:
    """Tell if `value` fits a scalar annotation; an int is a float; a bool, NaN, infinity and what no tensor holds are neither."""
    if wanted is float:
        is_number = isinstance(value, (int, float, Fraction)) and not isinstance(value, bool)
        return is_number and -sys.float_info.max <= value <= sys.float_info.max
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST
    return isinstance(value, wanted) if isinstance(wanted, type) else True


def _gains(device: torch.device) -> bool:
    """Return True if choosing for several images at once is faster on `device` than one by one."""
    return device.type != "cpu" or kernels.usable(device)


def _joined(parts: Sequence[object]) -> str:
    return ", ".join(map(str, parts))


def unit_rows(rows: Tensor) -> Tensor:
    """Rows [N, D] scaled to length 1, so that a product of two is their cosine; a zero row stays zero.

    The floor of 1e-8 on a length is the usual one of cosine similarity; half precision can't hold it and takes its smallest normal number.
    """
    floor = max(1e-8, torch.finfo(rows.dtype).tiny)
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=floor)
