"""The embedded queue: reference values, independent methods against the roots, extremes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fluidsched.errors import InputError
from fluidsched.queues import embedded_queue_mean, embedded_queue_variance

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
