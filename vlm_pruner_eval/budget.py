"""Counts of tokens that a rate means. The only place that turns a rate into a count."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral, Real

from vlm_pruner_eval.errors import ConfigError
from vlm_pruner_eval.redact import short

Rate = float | str | Fraction

# Bounded on purpose: Python would work out 10 ** 999999999 for the seven characters of "1e-999999999".
_RATE_TEXT = re.compile(r"[-+]?(\d{1,40}(/\d{1,40})?|(\d{1,40}\.\d{0,40}|\d{0,40}\.?\d{1,40})(e[-+]?\d{1,2})?)", re.ASCII | re.IGNORECASE)


def parse_rate(pruning_rate: object) -> Fraction | float:
    """Validate a pruning rate: the fraction of visual tokens that is REMOVED.

    Parameters
    ----------
    pruning_rate
        A number in [0, 1), or text that is an exact fraction ("2/3", "7/9", "8/9") or a decimal ("0.889").

    Returns
    -------
    Fraction for text (exact), float for a number.

    Raises
    ------
    ConfigError
        Not a number, NaN, or outside [0, 1).
    """
    expected = 'expected a number in [0, 1) or an exact fraction such as "8/9"'
    if isinstance(pruning_rate, bool) or not isinstance(pruning_rate, (str, Real)):
        raise ConfigError(f"pruning_rate: got {short(pruning_rate)} ({type(pruning_rate).__name__}), {expected}.")
    rate = _number(pruning_rate)
    if rate is None:
        raise ConfigError(f"pruning_rate: got {short(pruning_rate)}, {expected}.")
    if not 0 <= rate < 1:  # NaN fails this too
        raise ConfigError(
            f"pruning_rate: got {short(pruning_rate)}, {expected}. It is the fraction of visual tokens removed: "
            "0.889 keeps 64 of 576; method=blind removes them all."
        )
    return rate


def _number(given: str | Real) -> Fraction | float | None:
    """Exact for text, which may be no number at all."""
    if isinstance(given, Fraction):
        return given
    try:
        if isinstance(given, str):
            return Fraction(given.strip()) if _RATE_TEXT.fullmatch(given.strip()) else None
        return float(given)
    except ZeroDivisionError:
        return None
    except OverflowError:  # a whole number of more than 308 digits
        return math.inf


def keep_share(n_visual: int, share: Fraction | float) -> int:
    """``max(1, round(n_visual * share))``, half to even as Python rounds; 0 tokens stay 0, a share of 0 keeps none."""
    if n_visual <= 0 or share == 0:
        return 0
    return min(n_visual, max(1, round(n_visual * share)))


def keep_count(n_visual: int, pruning_rate: Rate) -> int:
    """Tokens kept out of `n_visual` at `pruning_rate`: ``max(1, round(n_visual * (1 - rate)))``.

    Paper: arXiv 2512.02700, section 4 (576 tokens: 192 / 128 / 64 at 66.7 / 77.8 / 88.9 %).

    Raises
    ------
    ConfigError
        The rate is not in [0, 1), or `n_visual` is not a whole number >= 0.
    """
    if isinstance(n_visual, bool) or not isinstance(n_visual, Integral) or n_visual < 0:
        raise ConfigError(f"n_visual: got {n_visual!r}, expected a whole number of visual tokens, 0 or more.")
    return keep_share(int(n_visual), 1 - parse_rate(pruning_rate))


def share_for_layer_average(share: Fraction | float, layer: int, n_layers: int) -> Fraction | float:
    """The share kept from `layer` on so that the average over all `n_layers` layers is `share`.

    Layers before `layer` see every token: ``(layer + (n_layers - layer) * x) / n_layers = share``.
    For 576 tokens and K = 2 of 32 layers, averages of 192 / 128 / 64 mean 166 / 98 / 30 kept tokens.

    Raises
    ------
    ConfigError
        `layer` is not a layer of the model, or no x > 0 solves it: the first layers alone already use more than the
        average allows.
    """
    if not 0 <= layer < n_layers:
        raise ConfigError(f"budget=layer_average: got layer {layer}, expected 0 to {n_layers - 1} for a model of {n_layers} layers.")
    solved = (share * n_layers - layer) / (n_layers - layer)
    if solved <= 0:
        raise ConfigError(
            f"budget=layer_average: an average share of {float(share):.4f} over {n_layers} layers can't be reached "
            f"by pruning at layer {layer}, since the layers before it see every token; "
            f"lower the pruning rate below {1 - layer / n_layers:.4f}, prune earlier, or use budget=kept."
        )
    return solved


def rate_at_layer_average(pruning_rate: Rate, layer: int, n_layers: int) -> Fraction | float:
    """The rate at which a method that prunes before the first layer does what `pruning_rate` at `layer` does on average over layers.

    ``1 - (layer + (n_layers - layer) * (1 - rate)) / n_layers``: 64 of 576 tokens from K = 2 of 32 layers on are 96 on average, so
    8/9 becomes 5/6. The inverse of `share_for_layer_average`.

    Raises
    ------
    ConfigError
        The rate is not in [0, 1), or `layer` is not a layer of the model.
    """
    if not 0 <= layer < n_layers:
        raise ConfigError(f"iso_layer: got {layer}, expected 0 to {n_layers - 1} for a model of {n_layers} layers.")
    share = 1 - parse_rate(pruning_rate)
    return 1 - (layer + (n_layers - layer) * share) / n_layers


def layer_average(lengths: Sequence[int]) -> float:
    """Mean number of visual tokens over the decoder layers, from the per-layer counts."""
    return math.fsum(lengths) / len(lengths)
