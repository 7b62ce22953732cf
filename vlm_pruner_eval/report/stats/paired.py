"""The statistics of a comparison: intervals and tests from paired draws, McNemar, Holm, and the power that the data had."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_pruner_eval.sweep.metrics.scores import percentile_interval

LEVEL, POWER = 0.05, 0.80
_ROUNDING = 1e-6  # draws are kept with nine digits


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, both ends None where it could not be computed."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """True if the interval is known and 0 lies outside it, by more than the rounding of draws."""
        return self.low is not None and (self.low > _ROUNDING or self.high < -_ROUNDING)


def estimate(value: float, draws: np.ndarray | None) -> Estimate:
    """A value with the percentile interval of its `draws` [resamples], or without one."""
    return Estimate(value) if draws is None else Estimate(value, *percentile_interval(draws))


def difference(value: float, draws: np.ndarray) -> Estimate:
    """A paired difference with the percentile interval of its `draws` [resamples]; without one where they do not differ at all.

    Resampling documents that all differ by the same says nothing of the documents that were not asked.
    """
    return Estimate(value) if float(np.ptp(draws)) <= _ROUNDING else estimate(value, draws)


def standard_error(draws: np.ndarray, n_clusters: int) -> float:
    """Standard deviation of `draws` [resamples], made as large as that of independent samples: a bootstrap's is biased by (n - 1) / n."""
    return float(np.std(draws, ddof=1)) * math.sqrt(n_clusters / (n_clusters - 1))


def p_of_no_difference(difference: float, draws: np.ndarray, n_clusters: int) -> float:
    """Two-sided p of a paired t-test over clusters, with the cluster bootstrap's standard error.

    A percentile of 1000 draws can't be below 0.001, which Holm's correction over a table would turn into 0.1 or more; hence the
    t distribution (n_clusters - 1 degrees of freedom) for the tail. Where every draw is the same difference there is no spread to
    test with, and the answer is the smallest p that so many draws can show.

    Parameters
    ----------
    difference
        The observed difference.
    draws
        [resamples]: the difference on every resample.
    n_clusters
        Independent units.
    """
    from scipy import stats

    error = standard_error(draws, n_clusters)
    if error <= _ROUNDING:
        return 1.0 if abs(difference) <= _ROUNDING else 2 / (len(draws) + 1)
    return float(2 * stats.t.sf(abs(difference) / error, n_clusters - 1))


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """McNemar's exact p: documents that only one of two models gets right (scores 0 or 1, same order)."""
    from scipy import stats

    ours, theirs = np.asarray(first) == 1, np.asarray(second) == 1
    alone = int(np.sum(ours & ~theirs)), int(np.sum(~ours & theirs))
    return float(min(1.0, 2 * stats.binom.cdf(min(alone), sum(alone), 0.5)))


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction of the p values that are known, in the same order."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    order = np.argsort(known)
    known[order] = np.minimum(np.maximum.accumulate(known[order] * np.arange(len(known), 0, -1)), 1.0)
    corrected = iter(known.tolist())
    return [None if value is None else next(corrected) for value in values]


def smallest_difference(error: float) -> float:
    """The true difference that a two-sided 5 % test finds 80 times out of 100, where differences have this standard error.

    Paper: arXiv 2411.00640, section 5: (z of 1 - level / 2 + z of power) x the standard error of the paired difference.
    """
    from scipy import stats

    return float(stats.norm.ppf(1 - LEVEL / 2) + stats.norm.ppf(POWER)) * error


def share_of_gain(row: float, unpruned: float, blind: float, draws: Sequence[np.ndarray | None]) -> Estimate | None:
    """``(row - blind) / (unpruned - blind)``, with the interval from the three draws [resamples] in this order.

    Returns
    -------
    Estimate or None
        None when the gain is not above 0, or its own interval holds 0: a share of nothing has no meaning.
    """
    gain = unpruned - blind
    if gain <= 0:
        return None
    value = (row - blind) / gain
    if any(draw is None for draw in draws):
        return Estimate(value)
    of_row, of_unpruned, of_blind = draws
    gains = of_unpruned - of_blind
    if percentile_interval(gains)[0] <= 0:
        return None
    known = gains > 0  # at most one in forty is left out, and only ends beyond them could tell
    return estimate(value, (of_row[known] - of_blind[known]) / gains[known])
