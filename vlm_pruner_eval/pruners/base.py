"""The base of every method: parameters, the contract of `select`, and the check of its answer."""

from __future__ import annotations

import dataclasses
import sys
import typing
from dataclasses import dataclass
from fractions import Fraction
from numbers import Integral
from typing import ClassVar

import torch
from torch import Tensor

from vlm_pruner_eval.budget import Rate, keep_share, parse_rate, share_for_layer_average
from vlm_pruner_eval.errors import ConfigError, PruningError
from vlm_pruner_eval.shown import short
from vlm_pruner_eval.types import Selection, Stage, TextTokens, VisualTokens

OPTIONAL_FIELDS = frozenset({"keys", "attention", "normed_hidden_states", "positions", "text"})
_MOST = 2**63 - 1
FROM_PREVIOUS_LAYER = frozenset({"keys", "attention"})


@dataclass(frozen=True, kw_only=True)
class Pruner:
    """A training-free visual-token pruning method: WHAT to keep, never where tokens are or how they are cut.

    A subclass sets `name` and `needs`, adds its parameters as dataclass fields, and writes `choose`.

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
        "per_image": every image or video has a budget of its own; "per_sample": one budget over all images of a prompt.
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
    fixed_layer: ClassVar[int | None] = None
    before_model: ClassVar[bool] = False  # acts on the images, so there is nothing for the hook to cut

    pruning_rate: Rate
    layer: int = 2
    positions: str = "original"
    selection_dtype: str = "float32"
    budget: str = "kept"
    scope: str = "per_image"
    official_quirks: bool = False

    def __post_init__(self) -> None:
        problems = [*self._rate_problems(), *self._type_problems()]
        if not problems:  # ranges are checked on values of the right type only
            problems = [f"{self.name}: {problem}" for problem in self.problems()]
        if problems:
            raise ConfigError(problems)

    # ---- for subclasses
    def choose(self, tokens: VisualTokens, keep: int) -> Tensor | Selection:
        """Choose `keep` tokens: local indices [R] in selection order, or a Selection that also carries new states.

        `tokens` come in the arithmetic dtype of `selection_dtype`, and have been checked for NaN and infinity.
        """
        raise NotImplementedError(f"{type(self).__name__}.choose is not written yet.")

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
            "scope": ("per_image", "per_sample"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                found.append(f"{field}: got {short(getattr(self, field))}, expected one of {', '.join(allowed)}.")
        unknown = self.needs - OPTIONAL_FIELDS
        if unknown:
            found.append(f"needs: got {sorted(unknown)}, expected fields out of {sorted(OPTIONAL_FIELDS)}.")
        return found

    def position_choices(self) -> tuple[str, ...]:
        """Values that `positions` may take."""
        return ("original", "contiguous")

    # ---- for the hook
    def stages(self, n_layers: int) -> tuple[Stage, ...]:
        """The cuts, in ascending order of layer; default one at `layer` that keeps ``1 - pruning_rate``."""
        share = 1 - parse_rate(self.pruning_rate)
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
            input's dtype.

        Raises
        ------
        PruningError
            Missing fields, NaN or infinity in what the method reads, or an answer that breaks the contract.
        """
        if keep is None:
            keep = self.default_keep(tokens.n_visual)
        if isinstance(keep, bool) or not isinstance(keep, Integral) or not 0 <= keep <= tokens.n_visual:
            raise PruningError(
                f"{self._where(tokens)}: asked to keep {keep!r} of {tokens.n_visual} tokens, "
                f"expected a whole number from 0 to {tokens.n_visual}."
            )
        self._check_input(tokens)
        keep = int(keep)
        answer = self._chosen(tokens, keep)
        selection = answer if isinstance(answer, Selection) else Selection(answer)
        exact = not (self.official_quirks and self.quirks_change_count)
        check_selection(selection, tokens, keep, where=self._where(tokens), exact=exact)
        if selection.hidden_states is not None:
            merged = selection.hidden_states.to(tokens.hidden_states.dtype)
            if not all_finite(merged):
                raise PruningError(f"{self._where(tokens)}: the merged states hold NaN or infinity in {merged.dtype}.")
            selection = dataclasses.replace(selection, hidden_states=merged)
        return selection

    def default_keep(self, n_visual: int) -> int:
        """``keep_count(n_visual, pruning_rate)``."""
        return keep_share(n_visual, 1 - parse_rate(self.pruning_rate))

    # ---- private
    def _where(self, tokens: VisualTokens) -> str:
        return f"method {self.name or type(self).__name__!r}, layer {self.layer}, sample {tokens.sample_id!r}"

    def _chosen(self, tokens: VisualTokens, keep: int) -> Tensor | Selection:
        """What `choose` answers; whatever it raises names the method and the sample, since a run meets thousands."""
        try:
            return self.choose(self._in_arithmetic_dtype(tokens), keep)
        except PruningError:
            raise
        except Exception as error:
            raise PruningError(
                f"{self._where(tokens)}: choose raised {type(error).__name__}: {error}. Expected {keep} of {tokens.n_visual} "
                "local indices; the cause is shown above, mend the method or leave the sample out."
            ) from error

    def _dtype(self, given: torch.dtype) -> torch.dtype:
        return given if self.selection_dtype == "model" else torch.float32

    def _read(self, tokens: VisualTokens) -> dict[str, Tensor]:
        """The floating-point tensors that this method reads, by field name ("text.keys" for nested ones)."""
        named: dict[str, Tensor | None] = {"hidden_states": tokens.hidden_states}
        for field in sorted(self.needs):
            value = getattr(tokens, field)
            if value is None:
                raise PruningError(f"{self._where(tokens)}: needs {field!r}, got None; fill VisualTokens.{field}.")
            if isinstance(value, TextTokens):
                named |= {f"text.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
            else:
                named[field] = value
        return {name: value for name, value in named.items() if value is not None and value.is_floating_point()}

    def _check_input(self, tokens: VisualTokens) -> None:
        for name, value in self._read(tokens).items():
            if not name.startswith("text.") and value.shape[0] != tokens.n_visual:
                raise PruningError(f"{self._where(tokens)}: {name} has shape {tuple(value.shape)}, expected {tokens.n_visual} rows.")
            if not all_finite(value):
                bad = (~torch.isfinite(value)).flatten(1).any(1) if value.dim() > 1 else ~torch.isfinite(value)
                raise PruningError(
                    f"{self._where(tokens)}: {name} holds NaN or infinity in {int(bad.sum())} of {len(bad)} tokens "
                    f"(first: token {int(bad.nonzero()[0])}); run the unpruned model in float32 or bfloat16 to find "
                    "the layer that overflows."
                )

    def _in_arithmetic_dtype(self, tokens: VisualTokens) -> VisualTokens:
        cast = {name: value.to(self._dtype(value.dtype)) for name, value in self._read(tokens).items()}
        nested = {name[5:]: cast.pop(name) for name in list(cast) if name.startswith("text.")}
        if nested:
            cast["text"] = dataclasses.replace(tokens.text, **nested)
        return dataclasses.replace(tokens, **cast)

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


def _is_a(value: object, wanted: object) -> bool:
    """Whether `value` fits a scalar annotation; an int is a float; a bool, NaN, infinity and what no tensor holds are neither."""
    if wanted is float:
        return isinstance(value, (int, float, Fraction)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST
    return isinstance(value, wanted) if isinstance(wanted, type) else True


def check_selection(selection: Selection, tokens: VisualTokens, keep: int, *, where: str, exact: bool) -> None:
    """Refuse an answer that is not `keep` unique local indices in range, with states of the right shape.

    Raises
    ------
    PruningError
        Naming what was got and what was expected.
    """
    order = selection.order
    if not isinstance(order, Tensor) or order.dim() != 1 or order.dtype != torch.int64:
        got = f"{tuple(order.shape)} of {order.dtype}" if isinstance(order, Tensor) else type(order).__name__
        raise PruningError(f"{where}: chose {got}, expected a 1-D int64 tensor of local indices.")
    if exact and len(order) != keep:
        raise PruningError(f"{where}: chose {len(order)} tokens, expected exactly {keep} of {tokens.n_visual}.")
    if len(order) and (int(order.min()) < 0 or int(order.max()) >= tokens.n_visual):
        raise PruningError(f"{where}: chose indices {int(order.min())} to {int(order.max())}, expected 0 to {tokens.n_visual - 1}.")
    distinct = len(torch.unique(order))
    if distinct != len(order):
        raise PruningError(f"{where}: chose {len(order)} indices of which {distinct} are distinct, expected no repeats.")
    states = selection.hidden_states
    expected = (len(order), tokens.hidden_states.shape[1])
    if states is not None and not (isinstance(states, Tensor) and states.is_floating_point() and tuple(states.shape) == expected):
        got = f"shape {tuple(states.shape)} of {states.dtype}" if isinstance(states, Tensor) else f"type {type(states).__name__}"
        raise PruningError(f"{where}: returned states of {got}, expected a floating-point tensor {expected} in the order of `keep`.")


def all_finite(values: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    One NaN or infinity makes the sum one too, and a sum costs a tenth of a look at every element; a sum of finite values
    that overflows is told apart by that look.
    """
    return bool(torch.isfinite(values.sum(dtype=torch.float32))) or bool(torch.isfinite(values).all())


def unit_rows(rows: Tensor) -> Tensor:
    """Rows [N, D] scaled to length 1, so that a product of two is their cosine; a zero row stays zero.

    The floor of 1e-8 on a length is the usual one of cosine similarity; half precision can't hold it and takes its smallest normal number.
    """
    floor = max(1e-8, torch.finfo(rows.dtype).tiny)
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=floor)
