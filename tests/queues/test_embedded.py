"""The embedded queue: reference values, independent methods against the roots, extremes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fluidsched.errors import InputError
from fluidsched.queues import (
    critical_queue_bound,
    embedded,
    embedded_queue_mean,
    embedded_queue_pmf,
    embedded_queue_tail,
    embedded_queue_transient,
    embedded_queue_variance,
)

POISSON = {(4, 0.9): 5.09988, (20, 0.95): 16.82888, (1, 0.9): 4.05, (2, 0.8): 1.94525}
BINOMIAL = {
    (10, 4, 0.3): 1.942085,
    (21, 9, 0.3): 4.139283,
    (20, 8, 0.35): 4.777626,
    (50, 18, 0.33): 10.622453,
    (100, 35, 0.3): 17.478766,
}


def arrivals_pmf(mean: float, trials: int | None, size: int) -> np.ndarray:
    law = stats.poisson(mean) if trials is None else stats.binom(trials, mean / trials)
    return np.asarray(law.pmf(np.arange(size)))


def chain_law(n: int, mean: float, trials: int | None, wait: bool, size: int) -> np.ndarray:
    """Stationary law of the chain cut at `size`, from the transition matrix itself (first witness)."""
    x = arrivals_pmf(mean, trials, size + n + 1)
    matrix = np.zeros((size, size))
    for state in range(size):
        for arrivals, probability in enumerate(x):
            total = state + arrivals
            after = total - n if total >= n else (total if wait else 0)
            matrix[state, min(after, size - 1)] += probability
    system = np.vstack([matrix.T - np.eye(size), np.ones(size)])
    return np.asarray(np.linalg.lstsq(system, np.r_[np.zeros(size), 1.0], rcond=None)[0])


@pytest.mark.parametrize(("key", "value"), POISSON.items())
def test_poisson_reference_values(key: tuple[int, float], value: float) -> None:
    n, load = key
    assert embedded_queue_mean(n, n * load) == pytest.approx(value, abs=5.1e-6)


@pytest.mark.parametrize(("key", "value"), BINOMIAL.items())
def test_binomial_reference_values(key: tuple[int, int, float], value: float) -> None:
    trials, n, p = key
    assert embedded_queue_mean(n, trials * p, trials) == pytest.approx(value, abs=5.1e-7)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize(
    ("n", "mean", "trials"),
    [(1, 0.6, None), (4, 3.0, None), (7, 2.0, None), (4, 3.0, 10), (3, 2.0, 3), (5, 2.4, 4)],
)
def test_moments_agree_with_the_transition_matrix(
    n: int, mean: float, trials: int | None, wait: bool
) -> None:
    law = chain_law(n, mean, trials, wait, 120)
    states = np.arange(len(law))
    first = float(law @ states)
    assert embedded_queue_mean(n, mean, trials, wait) == pytest.approx(first, abs=1e-9)
    assert embedded_queue_variance(n, mean, trials, wait) == pytest.approx(
        float(law @ (states - first) ** 2), abs=1e-8
    )


def test_critical_mean_is_refused_with_the_condition() -> None:
    """A mean at the threshold has no stationary law; no number is returned for it."""
    with pytest.raises(InputError, match="no stationary law"):
        embedded_queue_mean(4, 4.0)
    with pytest.raises(InputError, match="below trials"):
        embedded_queue_mean(9, 5.0, trials=5)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="mean_arrivals"):
            embedded_queue_mean(4, bad)
    with pytest.raises(InputError, match="threshold"):
        embedded_queue_mean(0, 0.5)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize(
    ("n", "mean", "trials"),
    [(1, 0.6, None), (4, 3.0, None), (7, 2.0, None), (4, 3.0, 10), (3, 2.0, 3), (5, 2.4, 4)],
)
def test_law_agrees_with_the_transition_matrix(n: int, mean: float, trials: int | None, wait: bool) -> None:
    law = chain_law(n, mean, trials, wait, 120)
    assert embedded_queue_pmf(n, mean, trials, wait, size=60) == pytest.approx(law[:60], abs=1e-12)
    tail = np.cumsum(law[::-1])[::-1]
    assert embedded_queue_tail(n, mean, np.arange(59), trials, wait) == pytest.approx(tail[1:60], abs=1e-12)


LAWS = st.one_of(
    st.tuples(st.integers(1, 300), st.floats(0.02, 1 - 1e-6), st.none()),
    st.tuples(st.integers(1, 300), st.floats(0.02, 1 - 1e-6), st.integers(2, 1000)),
)


@given(LAWS, st.booleans())
def test_moments_by_roots_equal_moments_of_the_law_by_fft(
    law: tuple[int, float, int | None], wait: bool
) -> None:
    """Second witness, at any load: the tail by Wiener–Hopf, summed, its end in closed form."""
    n, load, trials = law
    mean = load * (n if trials is None else min(n, trials))
    base, decay = embedded._tail(n, mean, trials, wait, 1)
    x = np.arange(len(base))
    ratio, last, size = math.exp(-decay), float(base[-1]), len(base)
    first = base.sum() + last * ratio / -math.expm1(-decay)
    beyond = last * ratio * ((2 * size + 1) / -math.expm1(-decay) + 2 * ratio / math.expm1(-decay) ** 2)
    second = ((2 * x + 1) @ base + beyond) - first**2
    assert embedded_queue_mean(n, mean, trials, wait) == pytest.approx(first, rel=1e-9, abs=1e-12 * n)
    assert embedded_queue_variance(n, mean, trials, wait) == pytest.approx(
        second, rel=1e-8, abs=1e-12 * n * n
    )


@pytest.mark.parametrize("load", [0.1, 0.5, 0.9, 0.99, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("trials", [None, 10_001, 20_000, 10**7])
def test_threshold_of_10_000_is_stable_up_to_1_minus_1e_6(load: float, trials: int | None) -> None:
    """Roots against the law by FFT at the largest sizes promised."""
    n = 10_000
    mean = load * n
    tail, decay = embedded._tail(n, mean, trials, False, 1)
    expected = tail.sum() + (tail[-1] / math.expm1(decay) if tail[-1] > 0 else 0.0)
    assert embedded_queue_mean(n, mean, trials, wait=False) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_tail_is_relatively_exact_far_out() -> None:
    """n = 1, far out: the witness is the chain cut at 400, solved by GTH, which never subtracts."""
    mean, size = 0.5, 400
    x = arrivals_pmf(mean, None, size + 2)
    matrix = np.zeros((size, size))
    for state in range(size):
        for arrivals, probability in enumerate(x):
            matrix[state, min(max(state + arrivals - 1, 0), size - 1)] += probability
    law = np.ones(size)
    for k in range(size - 1, 0, -1):
        matrix[:k, k] /= matrix[k, :k].sum()
        matrix[:k, :k] += np.outer(matrix[:k, k], matrix[k, :k])
    for k in range(1, size):
        law[k] = law[:k] @ matrix[:k, k]
    tail = np.cumsum((law / law.sum())[::-1])[::-1][1:]
    levels = np.array([1, 10, 50, 100, 150])
    assert embedded_queue_tail(1, mean, levels, wait=False) == pytest.approx(tail[levels], rel=1e-9)


@pytest.mark.parametrize("trials", [1, 3, 5])
def test_no_more_trials_than_places_leave_a_uniform_remainder(trials: int) -> None:
    """Nobody is ever left behind by a full gate: those who wait for it are 0, …, n − 1, equally often."""
    tail = embedded_queue_tail(5, 0.6 * trials, np.arange(7), trials=trials)
    assert tail == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0, 0.0, 0.0], abs=1e-15)


def test_pmf_until_tail_mass_and_up_to_a_size() -> None:
    law = embedded_queue_pmf(20, 19.0, tail_mass=1e-9)
    assert 1.0 - 1.01e-9 < law.sum() <= 1.0 - 0.9e-9
    assert np.array_equal(embedded_queue_pmf(20, 19.0, size=len(law)), law)
    assert (
        float(embedded_queue_tail(20, 19.0, len(law) - 1))
        <= 1e-9
        < float(embedded_queue_tail(20, 19.0, len(law) - 2))
    )
    with pytest.raises(InputError, match="Give `size`"):
        embedded_queue_pmf(10_000, 10_000 - 1e-4)
    with pytest.raises(InputError, match="level"):
        embedded_queue_tail(4, 3.0, [-1])


def test_transient_mean_without_waiting_is_spitzers_identity() -> None:
    """E[V_b] = Σ_{k≤b} E[(S_k)⁺]/k, S_k = Poisson(km) − kn; also at and beyond the critical rate."""
    n, cycles = 5, 200
    for mean in (4.0, 5.0, 5.3):
        expected, total = [0.0], 0.0
        for k in range(1, cycles + 1):
            y = np.arange(k * n, k * n + 60 * int(math.sqrt(k * mean) + 1) + int(k * mean))
            total += float((y - k * n) @ stats.poisson.pmf(y, k * mean)) / k
            expected.append(total)
        assert embedded_queue_transient(n, mean, cycles, wait=False).mean == pytest.approx(
            expected, rel=1e-10
        )


@pytest.mark.parametrize("trials", [None, 10])
def test_transient_moments_reach_the_stationary_ones(trials: int | None) -> None:
    moments = embedded_queue_transient(4, 3.0, 400, trials)
    assert moments.mean[0] == moments.variance[0] == 0.0
    assert moments.mean[-1] == pytest.approx(embedded_queue_mean(4, 3.0, trials), rel=1e-9)
    assert moments.variance[-1] == pytest.approx(embedded_queue_variance(4, 3.0, trials), rel=1e-9)


def test_transient_mean_stays_below_the_critical_bound() -> None:
    n, cycles = 9, 300
    mean = embedded_queue_transient(n, float(n), cycles).mean
    assert all(mean[b] <= critical_queue_bound(n, b) for b in range(cycles + 1))


def test_no_levels_have_no_tail() -> None:
    """Of an empty array of levels, in its shape."""
    assert embedded_queue_tail(4, 3.6, np.zeros((0, 3), dtype=int)).shape == (0, 3)
