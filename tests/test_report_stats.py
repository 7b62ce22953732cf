from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from lmms_eval.api.metrics import clustered_stderr, paired_ttest, power_analysis
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from vlm_pruner_eval.report.stats.paired import (
    Estimate,
    difference,
    estimate,
    holm,
    mcnemar,
    p_of_no_difference,
    share_of_gain,
    smallest_difference,
    standard_error,
)
from vlm_pruner_eval.sweep.metrics.clusters import Clusters

N_CLUSTERS, N_STUDIES, TRUTH = 400, 1000, 0.6


def study(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """Scores [documents, studies] of 0 and 1 with mean TRUTH, alike within a cluster: how hard an image is differs."""
    hardness = rng.beta(0.6 * TRUTH, 0.6 * (1 - TRUTH), size=(len(sizes), N_STUDIES))
    return (rng.random((sizes.sum(), N_STUDIES)) < np.repeat(hardness, sizes, axis=0)).astype(float)


def coverage(clusters: Clusters, scores: np.ndarray) -> float:
    """Share of studies whose percentile interval of the mean holds the truth."""
    docs = list(clusters.of)
    sums = clusters.sums(clusters.by_cluster(docs, np.column_stack([scores, np.ones(len(docs))])))
    low, high = np.percentile(sums[:, :-1] / sums[:, -1:], [2.5, 97.5], axis=0)
    return float(np.mean((low <= TRUTH) & (high >= TRUTH)))


def test_the_cluster_bootstrap_covers_as_often_as_it_says_and_single_documents_do_not() -> None:
    rng = np.random.default_rng(11)
    sizes = rng.integers(1, 7, size=N_CLUSTERS)
    scores = study(rng, sizes)
    of = dict(enumerate(np.repeat(np.arange(N_CLUSTERS), sizes).tolist()))
    assert 0.93 <= coverage(Clusters("simulated", of), scores) <= 0.97
    assert coverage(Clusters("simulated", {doc: doc for doc in of}), scores) < 0.85


def clustered(seed: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Two models' scores on documents of 300 clusters."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(300), rng.integers(1, 6, size=300))
    easy = rng.random(300)[groups]
    first, second = ((rng.random(len(groups)) < share * easy).astype(float) for share in (1.0, 0.9))
    return first, second, groups.tolist()


def draws_of(scores: np.ndarray, groups: list[int]) -> np.ndarray:
    clusters = Clusters("simulated", dict(enumerate(groups)))
    sums = clusters.sums(clusters.by_cluster(list(clusters.of), np.column_stack([scores, np.ones(len(scores))])))
    return sums[:, 0] / sums[:, 1]


def test_standard_errors_are_lmms_evals_clustered_ones() -> None:
    first, second, groups = clustered(3)
    n = max(groups) + 1
    for scores in (first, first - second):
        expected = clustered_stderr(scores.tolist(), groups)
        assert standard_error(draws_of(scores, groups), n) == pytest.approx(expected, rel=0.06)
    alone = list(range(len(first)))
    assert standard_error(draws_of(first, alone), len(first)) < 0.9 * clustered_stderr(first.tolist(), groups)


def test_unclustered_differences_are_lmms_evals_paired_test() -> None:
    first, second, _ = clustered(4)
    first, second = first[:250], second[:250]
    expected = paired_ttest(first.tolist(), second.tolist())
    draws = draws_of(first, list(range(250))) - draws_of(second, list(range(250)))
    got = estimate(float(first.mean() - second.mean()), draws)
    assert got.value == pytest.approx(expected["mean_diff"])
    assert (got.low, got.high) == (pytest.approx(expected["ci_lower"], abs=0.008), pytest.approx(expected["ci_upper"], abs=0.008))
    assert p_of_no_difference(got.value, draws, 250) == pytest.approx(expected["p_value"], rel=0.25)


def test_differences_without_any_spread_have_the_p_that_the_draws_can_show() -> None:
    assert p_of_no_difference(0.0, np.zeros(1000), 40) == 1.0
    assert p_of_no_difference(-100.0, np.full(1000, -100.0), 40) == 2 / 1001


def test_mcnemar_is_the_binomial_of_the_documents_that_only_one_gets_right() -> None:
    """One against eight: 2 x (C(9, 0) + C(9, 1)) / 2^9; documents that both get right or wrong say nothing."""
    first = [1] * 40 + [0] * 10 + [1] + [0] * 8
    second = [1] * 40 + [0] * 10 + [0] + [1] * 8
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(first, second) == statsmodels_mcnemar([[40, 1], [8, 10]], exact=True).pvalue
    assert mcnemar(first[:50], second[:50]) == 1.0


def test_holm_by_hand() -> None:
    """Sorted .005 .01 .03 .04 times 4 3 2 1, never less than the one before: .02 .03 .06 .06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    with_gaps = holm([0.01, None, 0.04, 0.03, None, 0.005])
    assert (with_gaps[1], with_gaps[4]) == (None, None)
    assert [value for value in with_gaps if value is not None] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, 0.04]) == multipletests([0.01, 0.04], method="holm")[1].tolist()
    assert holm([None]) == [None]


def test_the_smallest_difference_is_lmms_evals_power_analysis() -> None:
    """A paired spread of 0.5 over 1000 documents, and the share of studies that then find such a difference."""
    error = 0.5 / math.sqrt(1000)
    expected = power_analysis(0.05, std_a=0.5, correlation=0.5, current_n=1000)["min_detectable_effect"]
    assert smallest_difference(error) == pytest.approx(expected, abs=1e-4)
    found = np.random.default_rng(0).normal(smallest_difference(error), error, size=20000) > 1.959964 * error
    assert found.mean() == pytest.approx(0.80, abs=0.01)


def test_the_share_of_the_gain_over_a_blind_model() -> None:
    rng = np.random.default_rng(1)
    unpruned, blind = rng.normal(80, 1, 1000), rng.normal(40, 1, 1000)
    half = (unpruned + blind) / 2
    assert share_of_gain(60.0, 80.0, 40.0, [half, unpruned, blind]) == Estimate(0.5, pytest.approx(0.5), pytest.approx(0.5))
    assert share_of_gain(60.0, 80.0, 40.0, [None, unpruned, blind]) == Estimate(0.5)
    assert share_of_gain(60.0, 40.0, 40.0, [half, unpruned, blind]) is None
    assert share_of_gain(40.5, 41.0, 40.0, [half, blind + rng.normal(1, 3, 1000), blind]) is None


def test_an_interval_that_touches_zero_does_not_exclude_it() -> None:
    assert [Estimate(1.0, low, 2.0).excludes_zero for low in (0.5, 0.0, -0.5)] == [True, False, False]
    assert Estimate(-1.0, -2.0, -0.5).excludes_zero
    assert not Estimate(1.0).excludes_zero
    assert not Estimate(0.0, 1e-9, 1e-9).excludes_zero  # rounding


def test_comparisons_do_not_load_torch() -> None:
    code = "import sys, vlm_pruner_eval.report.stats.compare; sys.exit(bool({'torch', 'lmms_eval', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_a_difference_without_any_spread_has_no_interval() -> None:
    assert difference(0.0, np.zeros(1000)) == Estimate(0.0)
    assert difference(5.0, np.full(1000, 5.0)) == Estimate(5.0)
    spread = difference(1.0, np.linspace(0.0, 2.0, 1000))
    assert spread.low < 1.0 < spread.high
