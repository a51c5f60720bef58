"""Where a start ends and how accurate one run is: on processes whose mean is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fluidsched.simulation.steady import REJECTED_BELOW, batch_means, independence, mser5, number_in_system


def autoregressive(rng: np.random.Generator, runs: int, length: int, memory: float) -> np.ndarray:
    """X_t = memory·X_{t-1} + noise from its stationary law, mean 0, (runs, length)."""
    from scipy.signal import lfilter

    noise = rng.normal(size=(runs, length))
    noise[:, 0] /= math.sqrt(1.0 - memory**2)
    return np.asarray(lfilter([1.0], [1.0, -memory], noise, axis=1))


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_intervals_cover_the_known_mean(memory):
    """95 % intervals from runs of 100 times their memory or more hold the mean in at least 91 % of those given.

    1 000 runs: the share has standard error 0.7 %, so a true coverage of 93.5 % fails this once in 3 000 seeds.
    """
    series = autoregressive(np.random.default_rng(1), 1000, 64 * 64, memory)
    found = [
        batch_means(float(run.mean()), lambda count, run=run: run.reshape(count, -1).mean(axis=1))
        for run in series
    ]
    given = [one for one in found if not math.isnan(one.low)]
    covered = np.mean([one.low <= 0.0 <= one.high for one in given])
    assert len(given) >= 950
    assert 0.91 <= covered <= 0.98
    if memory == 0.0:  # independent: the longest list of batches is kept but for the level of the test
        kept = np.mean([one.batches == 64 for one in found])
        assert abs(kept - (1.0 - REJECTED_BELOW)) < 5 * math.sqrt(
            REJECTED_BELOW * (1 - REJECTED_BELOW) / 1000
        )


def test_independent_batches_give_uniform_p_values():
    """Kolmogorov–Smirnov at 1e-3 over 2 000 sets of 32 independent values."""
    from scipy.stats import kstest

    values = np.random.default_rng(2).normal(size=(2000, 32))
    assert kstest([independence(row) for row in values], "uniform").pvalue > 1e-3


def test_runs_too_short_for_their_memory_are_refused():
    """A hundredth of the memory long: neighbours are alike however they are joined."""
    series = autoregressive(np.random.default_rng(3), 200, 640, 0.9999)
    found = [
        batch_means(float(run.mean()), lambda count, run=run: run.reshape(count, -1).mean(axis=1))
        for run in series
    ]
    assert np.mean([math.isnan(one.low) for one in found]) > 0.8
    assert {one.batches for one in found if math.isnan(one.low)} == {8}


def test_quantiles_are_centred_on_the_whole_run():
    """Sectioning: the median of short batches is biased for skewed values, the interval's centre is not."""
    rng = np.random.default_rng(4)
    hits = 0
    for run in rng.exponential(size=(500, 640)):
        found = batch_means(
            float(np.median(run)), lambda count, run=run: np.median(run.reshape(count, -1), axis=1)
        )
        assert found.estimate == np.median(run)
        hits += found.low <= math.log(2.0) <= found.high
    assert hits / 500 > 0.9  # nominal 95 %, a tenth of the runs on 32 batches or fewer


def test_a_made_start_is_cut_where_it_ends():
    """A decaying start of 500 values over noise: the cut leaves less bias than a tenth of the start's mean effect.

    Over 200 seeds the cut lies between where the start has sunk below one standard deviation of the five-means
    and twice its length in at least 95 %, and the remaining mean is off by less than 4 standard errors.
    """
    rng = np.random.default_rng(5)
    start = 10.0 * np.maximum(0.0, 1.0 - np.arange(5000) / 500)
    near = 0
    for _ in range(200):
        series = rng.normal(size=5000) + start
        cut = mser5(series)
        assert cut is not None
        near += 450 <= cut <= 1000
        assert abs(series[cut:].mean()) < 4.5 / math.sqrt(5000 - cut) + start[cut:].mean()
    assert near / 200 >= 0.9


def test_stationary_noise_is_kept_almost_whole():
    """Without a start the median cut over 200 seeds is below 5 % of the run."""
    cuts = [mser5(row) for row in np.random.default_rng(6).normal(size=(200, 2000))]
    assert np.median([2000 if cut is None else cut for cut in cuts]) <= 100


def test_no_end_of_the_start():
    assert mser5(np.arange(1000.0)) is None
    assert mser5(np.ones(19)) is None
    assert mser5(np.ones(1000)) == 0


def test_mser5_is_the_argmin_by_definition():
    """Against the sums written out."""
    series = np.random.default_rng(7).exponential(size=203) + 3.0 * (np.arange(203) < 30)
    means = series[:200].reshape(40, 5).mean(axis=1)
    errors = [((means[d:] - means[d:].mean()) ** 2).sum() / (40 - d) ** 2 for d in range(21)]
    assert mser5(series) == 5 * int(np.argmin(errors))


def test_number_in_system_counts_both_ends():
    arrival = np.array([0.0, 1.0, 1.0])
    assert_array_equal(
        number_in_system(arrival, np.array([1.0, np.nan, 3.0]), np.array([0.0, 1.0, 3.0])), [1, 2, 1]
    )


def test_constant_batches_are_exact():
    found = batch_means(2.0, lambda count: np.full(count, 2.0))
    assert_allclose([found.low, found.high], 2.0)
