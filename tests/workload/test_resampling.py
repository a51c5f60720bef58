"""Paths faster, slower, and resampled: what stays, and the exact variance of the stationary bootstrap.

Statistical tests fix a seed; with a random one each would reject a correct sampler with probability 1e-6, in the
normal approximation of a mean or variance over thousands of independent paths.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import fluidsched as fs
from fluidsched.errors import InputError

ERROR_RATE = 1e-6
LIMIT = stats.norm.isf(ERROR_RATE / 2)

seeds = st.integers(0, 2**32)


@st.composite
def paths(draw: st.DrawFn) -> fs.ArrivalPath:
    """A path with a duration, sampled or replayed; each request recognisable by its prompt."""
    times = np.sort(draw(st.lists(st.floats(0, 50, allow_subnormal=False), min_size=2, max_size=12)))
    horizon = draw(st.sampled_from([None, 51.0]))
    if horizon is None and times[-1] - times[0] < 0.1:
        times[-1] = times[0] + 0.1
    count = len(times)
    return fs.ArrivalPath.from_arrays(
        times,
        np.arange(1, count + 1),
        np.full(count, 3),
        np.zeros(count, int),
        type_names=["a"],
        horizon=horizon,
    )


@given(paths(), st.floats(0.01, 100))
def test_acceleration_divides_times(path: fs.ArrivalPath, zeta: float) -> None:
    """Times and horizon divided by ζ, rate multiplied; there and back by a power of two is the same path."""
    fast = path.accelerated(zeta)
    np.testing.assert_array_equal(fast.arrival_s, path.arrival_s / zeta)
    assert fast.rate == pytest.approx(zeta * path.rate, rel=1e-9)
    assert path.accelerated(4.0).accelerated(0.25) == path
    assert path.at_rate(7.0).rate == pytest.approx(7.0, rel=1e-9)
    np.testing.assert_array_equal(path.at_rate(7.0).prompt_tokens, path.prompt_tokens)


def test_only_a_rate_can_be_changed() -> None:
    """Requests all at once, or none, have no rate to scale; factors are positive."""
    at_once = fs.ArrivalPath.from_arrays([1, 1], [9, 9], [1, 1])
    with pytest.raises(InputError, match="different times"):
        at_once.at_rate(1.0)
    with pytest.raises(InputError, match="zeta must"):
        at_once.accelerated(0.0)
    with pytest.raises(InputError, match="arrival_rate must"):
        at_once.at_rate(float("inf"))
    with pytest.raises(InputError, match="have requests and a duration"):
        at_once.bootstrapped(10.0, seed=1)


def test_dispersion_counts_windows_from_the_start() -> None:
    """Windows start at 0 for a sampled path, at the first arrival for a replayed one; the rest is left out."""
    times = [2.0, 2.1, 2.2, 4.5, 7.9]
    columns = ([9] * 5, [1] * 5)
    sampled = fs.ArrivalPath.from_arrays(times, *columns, horizon=8.0)
    assert sampled.dispersion(2.0) == np.var([0, 3, 1, 1]) / 1.25
    replayed = fs.ArrivalPath.from_arrays(times, *columns)
    assert replayed.dispersion(2.0) == np.var([3, 1]) / 2.0
    with pytest.raises(InputError, match="window must"):
        replayed.dispersion(3.0)


def test_dispersion_of_poisson_is_one() -> None:
    """Over M windows it is χ²/M with M − 1 degrees of freedom, counts of 50 being nearly normal."""
    path = fs.Workload([fs.RequestType("a", 50.0, 9, 9)]).sample(1000.0, seed=3)
    assert ERROR_RATE / 2 < stats.chi2(999).cdf(1000 * path.dispersion(1.0)) < 1 - ERROR_RATE / 2


@given(paths(), seeds, st.floats(1, 200), st.floats(0.5, 30))
def test_bootstrap_keeps_requests_and_only_adds(
    path: fs.ArrivalPath, seed: int, horizon: float, block: float
) -> None:
    """Requests of the path with their own columns, inside the horizon; more horizon, the same beginning."""
    drawn = path.bootstrapped(horizon, seed, mean_block=block)
    assert drawn.horizon == horizon
    assert set(drawn.prompt_tokens.tolist()) <= set(path.prompt_tokens.tolist())
    assert drawn.type_names == path.type_names
    assert drawn == path.bootstrapped(horizon, seed, mean_block=block)
    longer = path.bootstrapped(3 * horizon, seed, mean_block=block)
    np.testing.assert_array_equal(longer.prompt_tokens[: len(drawn)], drawn.prompt_tokens)
    np.testing.assert_array_equal(longer.arrival_s[: len(drawn)], drawn.arrival_s)


@given(paths(), seeds)
def test_bootstrap_is_as_fast_as_its_path(path: fs.ArrivalPath, seed: int) -> None:
    """The bootstrap of the path twice as fast, with pieces half as long, is the bootstrap twice as fast."""
    slow = path.bootstrapped(64.0, seed, mean_block=8.0)
    fast = path.accelerated(2.0).bootstrapped(32.0, seed, mean_block=4.0)
    np.testing.assert_array_equal(fast.arrival_s, slow.arrival_s / 2)
    np.testing.assert_array_equal(fast.prompt_tokens, slow.prompt_tokens)


def test_long_pieces_are_the_path_rotated() -> None:
    """One piece longer than the path is the path from a random point on, turn after turn."""
    path = fs.ArrivalPath.from_arrays([1, 2, 4, 8], [1, 2, 3, 4], [9] * 4, horizon=10.0)
    drawn = path.bootstrapped(40.0, seed=1, mean_block=1e9)
    assert len(drawn) == 16
    gap = {1: 1.0, 2: 2.0, 3: 4.0, 4: 3.0}
    np.testing.assert_allclose(np.diff(drawn.arrival_s), [gap[p] for p in drawn.prompt_tokens[:-1]])


def bootstrap_variance(path: fs.ArrivalPath, window: float, block: float) -> float:
    """Var N*(h) of the module's formula, by a sum over pairs of requests and turns of the circle."""
    rate, period = path.rate, path.duration
    # From request i on, request j > i comes first in the same turn, j ≤ i (itself too) in the next.
    distance = path.arrival_s[None, :] - path.arrival_s[:, None]
    distance = distance + period * np.tri(len(path))
    pairs = 0.0
    for turn in range(int(window / period) + 1):
        lag = distance + turn * period
        near = lag[lag < window]
        pairs += ((window - near) * np.exp(-near / block)).sum() / period
    smooth = block * window - block**2 * (1 - np.exp(-window / block))  # ∫ (h − τ) e^(−τ/b) dτ
    return rate * window + 2 * pairs - 2 * rate**2 * smooth


@pytest.mark.parametrize(("window", "block"), [(1.0, 3.0), (4.0, 3.0), (14.0, 5.0)])
def test_bootstrapped_counts_have_their_exact_mean_and_variance(window: float, block: float) -> None:
    """4 000 windows: mean λh and the variance of the formula (equal times, and windows beyond a turn, too)."""
    times = [0.5, 0.5, 0.6, 0.9, 3.0, 7.0, 7.1, 7.1, 7.15, 9.0]
    path = fs.ArrivalPath.from_arrays(times, [9] * 10, [1] * 10, horizon=12.0)
    # In windows that start later than 0 as well: the bootstrap is stationary.
    rng = np.random.default_rng(5)
    for start in (0.0, 6.5):
        drawn = [path.bootstrapped(start + window, rng, mean_block=block).arrival_s for _ in range(4000)]
        counts = np.array([(t >= start).sum() for t in drawn])
        sd = np.sqrt(bootstrap_variance(path, window, block))
        limit = stats.norm.isf(ERROR_RATE / 8)
        assert abs(counts.mean() - path.rate * window) < limit * sd / np.sqrt(4000)
        spread = np.sqrt((np.mean((counts - counts.mean()) ** 4) - sd**4) / 4000)
        assert abs(counts.var() - sd**2) < limit * spread


def test_bootstrap_keeps_bursts_that_resampling_by_request_loses() -> None:
    """Bursts of 20 s: with pieces of 300 s the index of dispersion of 10 s windows is by the formula the path's
    own to 5 %, and measured on a bootstrap of 100 bursts to 50 % (five times 1/√100); a Poisson sample has 1.
    """
    bursty = fs.arrivals.markov_modulated([1, 10], mean_sojourn=[180, 20])
    types = [fs.RequestType("a", 5.0, fs.lengths.uniform(1, 9), 5, arrivals=bursty)]
    path = fs.Workload(types).sample(20_000.0, seed=6)
    again = path.bootstrapped(20_000.0, seed=7, mean_block=300.0)
    assert path.dispersion(10.0) > 20
    exact = bootstrap_index(path, 10.0, 300.0)
    assert exact == pytest.approx(path.dispersion(10.0), rel=0.05)
    assert again.dispersion(10.0) == pytest.approx(exact, rel=0.5)
    assert path.to_workload(types=1).sample(20_000.0, seed=8).dispersion(10.0) < 1.2


def bootstrap_index(path: fs.ArrivalPath, window: float, block: float) -> float:
    """Var N*(h) / (λh) for a long path: `bootstrap_variance` with pairs found by sorting."""
    times, rate = path.arrival_s, path.rate
    pairs = 0.0
    last = np.searchsorted(times, times + window)
    for i, end in enumerate(last.tolist()):
        near = times[i + 1 : end] - times[i]
        pairs += ((window - near) * np.exp(-near / block)).sum()
    smooth = block * window - block**2 * (1 - np.exp(-window / block))
    return float(1 + (2 * pairs / path.duration - 2 * rate**2 * smooth) / (rate * window))


@pytest.mark.data
@pytest.mark.parametrize("window", [1.0, 10.0])
def test_bootstrap_keeps_the_bursts_of_a_real_trace(data_root: Path, window: float) -> None:
    """Azure code, index 13 and 72 in windows of 1 and 10 s: kept on average over 20 paths with pieces of 300 s.

    Normal approximation with the standard error estimated from the 20 indices.
    """
    path = fs.read_trace(data_root / "traces" / "AzureLLMInferenceTrace_code.csv")
    rng = np.random.default_rng(9)
    indices = np.array(
        [path.bootstrapped(3500.0, rng, mean_block=300.0).dispersion(window) for _ in range(20)]
    )
    error = indices.std(ddof=1) / np.sqrt(20)
    assert abs(indices.mean() - path.dispersion(window)) < stats.t(19).isf(ERROR_RATE / 2) * error
    assert indices.mean() > 0.7 * path.dispersion(window)
