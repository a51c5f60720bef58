"""Theorem constants against exact values, and the closed-form TTFT against a simulated literal WAIT queue."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluidsched.errors import InputError
from fluidsched.queues import (
    critical_queue_bound,
    embedded_queue_mean,
    fixed_cycle_ttft,
    slack_queue_bound,
    throughput_gap_bound,
)

CASES = {(4, 0.9): (5.23, 6.90), (20, 0.95): (16.8, 26.3), (20, 0.7): (9.6, 16.6)}


def mean_with_error(values: np.ndarray, batches: int = 100) -> tuple[float, float]:
    """Mean and its standard error from non-overlapping batches, long against the queue's memory."""
    means = values[: len(values) // batches * batches].reshape(batches, -1).mean(axis=1)
    return float(means.mean()), float(means.std(ddof=1) / math.sqrt(batches))


def waiting_times(n: int, load: float, requests: int, seed: int, fixed: bool) -> np.ndarray:
    """Times from arrival to admission, cycle time 1: literal WAIT, or cycles at whole seconds only."""
    rng = np.random.default_rng(seed)
    arrivals = np.cumsum(rng.exponential(1.0 / (n * load), size=requests // n * n))
    full = arrivals[n - 1 :: n]  # the arrival that completes each batch
    if fixed:
        full = np.ceil(full)
    index = np.arange(len(full))
    start = np.maximum.accumulate(full - index) + index  # σ_i = max(σ_{i−1} + 1, t_i)
    return np.repeat(start, n) - arrivals


@pytest.mark.parametrize(("case", "values"), CASES.items())
def test_literal_wait_lies_below_the_fixed_cycle_bound(
    case: tuple[int, float], values: tuple[float, float]
) -> None:
    """Time-average entry queue of literal WAIT, by Little's law.

    Null: it is the stated figure up to its rounding. Each two-sided test errs with probability below 1e-5
    (4.5 standard errors of 100 batch means); the bound is a closed form and is compared exactly.
    """
    n, load = case
    literal, bound = values
    rate = n * load
    estimate, error = mean_with_error(rate * waiting_times(n, load, 2_000_000, seed=11, fixed=False))
    rounding = 0.005 if literal < 10 and n == 4 else 0.05
    assert abs(estimate - literal) <= rounding + 4.5 * error
    assert rate * (fixed_cycle_ttft(n, rate, 1.0) - 1.0) == pytest.approx(bound, abs=0.051)
    assert estimate + 4.5 * error < bound


@pytest.mark.parametrize("case", CASES)
def test_fixed_cycles_have_exactly_the_closed_form(case: tuple[int, float]) -> None:
    """Mean TTFT of cycles at whole seconds; the two-sided test errs with probability below 1e-5."""
    n, load = case
    estimate, error = mean_with_error(waiting_times(n, load, 2_000_000, seed=12, fixed=True) + 1.0)
    assert abs(estimate - fixed_cycle_ttft(n, n * load, 1.0)) <= 4.5 * error


@given(st.integers(1, 200), st.floats(0.01, 0.999))
def test_slack_bound_exceeds_the_exact_mean(n: int, load: float) -> None:
    assert embedded_queue_mean(n, n * load) <= slack_queue_bound(n, n * load)


def test_critical_sum_is_the_sum() -> None:
    """The asymptotic expansion continues the sum to rounding."""
    for cycles in (1, 64, 65, 1000, 100_000):
        direct = 9.0 + 3.0 * math.fsum(k**-0.5 for k in range(1, cycles + 1))
        assert critical_queue_bound(9, cycles) == pytest.approx(direct, rel=1e-13)


def test_gap_falls_with_the_horizon_and_adds_over_types() -> None:
    one = throughput_gap_bound([10], [5.0], [3.0], [4], 100.0)
    two = throughput_gap_bound([10, 10], [5.0, 5.0], [3.0, 3.0], [4, 4], 200.0)
    assert one == pytest.approx(two)
    with pytest.raises(InputError, match="one entry per type"):
        throughput_gap_bound([10], [5.0, 1.0], [3.0], [4], 100.0)
    with pytest.raises(InputError, match="horizon"):
        throughput_gap_bound([10], [5.0], [3.0], [4], 0.0)
    with pytest.raises(InputError, match="entry_queue"):
        throughput_gap_bound([10], [math.nan], [3.0], [4], 1.0)
