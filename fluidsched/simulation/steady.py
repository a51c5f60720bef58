r"""Where a run's start ends, and how accurate one long run is: MSER-5 and batch means.

**MSER-5** (White, 1997). A run starts empty, so its first part is unlike the long run. Of a series the means
Y_1 … Y_n of five consecutive values each are taken; leaving out the first d of them, the mean of the rest has
about the squared standard error

    MSER(d) = Σ_{i>d} (Y_i - Ȳ_d)² / (n - d)²,        Ȳ_d the mean of Y_{d+1} … Y_n.

Early values far from the rest inflate the sum, leaving out too much shrinks n - d: the start is cut at the d
that makes it least, sought in the first half. Where the least is at the half itself, no end of the start was
seen: the run is too short, or the system has no long run. The series is the number in the system X(t) at
`GRID` points of an even grid of the run, averaged over replications, which lowers the noise and not the
start's bias. X follows from arrivals and finishes, and by Little's law moves with the latencies.

**Batch means.** One run, cut after the warm-up into K batches of equal duration, has K values θ_k of a measure. If
batches are much longer than the memory of the process these are nearly independent and normal, and around the
whole run's value θ

    θ ± t_{K-1} √( Σ_k (θ_k - θ)² / (K (K - 1)) )

is an interval for what infinitely long runs would give. Taking θ instead of the mean of the θ_k (*sectioning*)
keeps the bias that quantiles have in short batches out of the centre. Whether batches are long enough is
tested by von Neumann's ratio of successive differences,

    C = 1 - Σ_k (θ_k - θ_{k+1})² / (2 Σ_k (θ_k - θ̄)²),

about normal with mean 0 and variance (K - 2)/(K² - 1) for independent values, near the correlation of
neighbours in general (von Neumann, 1941; Fishman, 1978). From K = 64 on batches are joined two by two until
the test does not reject independence at `REJECTED_BELOW`; if it still does at K = 8 the run is too short
for an interval, and none is given. Each test calls independent batches dependent with that probability, which
costs a wider interval and, rarely, none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BATCHES",
    "GRID",
    "REJECTED_BELOW",
    "BatchMeans",
    "batch_means",
    "independence",
    "mser5",
    "number_in_system",
]

FloatArray = NDArray[np.float64]

BATCHES = (64, 32, 16, 8)
"""Numbers of batches tried, in turn."""

GRID = 2000
"""Points of the series that MSER-5 looks at."""

REJECTED_BELOW = 0.1
"""Level of the test for independence of batches, one-sided."""

_GROUP = 5  # the five of MSER-5


def mser5(series: FloatArray) -> int | None:
    """Return how many values to leave out at the start, a multiple of five; None if no end of the start was seen.

    Parameters
    ----------
    series : (n,) float array
        At least 20 values; those after the last full five are not looked at.

    Examples
    --------
    A start of 100 values that decays, then noise:

    >>> noise = np.random.default_rng(1).normal(size=1000)
    >>> mser5(noise + 20.0 * np.maximum(0.0, 1.0 - np.arange(1000) / 100))
    95
    >>> mser5(noise + 0.1 * np.arange(1000)) is None
    True
    """
    count = len(series) // _GROUP
    if count < 4:
        return None
    means = np.asarray(series[: count * _GROUP], dtype=np.float64).reshape(count, _GROUP).mean(axis=1)
    centred = means - means.mean()  # so that sums of squares lose no digits
    left = np.arange(count, 0, -1)
    sums = np.cumsum(centred[::-1])[::-1]
    squares = np.cumsum(centred[::-1] ** 2)[::-1]
    errors = np.maximum(squares - sums**2 / left, 0.0) / left.astype(np.float64) ** 2
    half = count // 2
    best = int(np.argmin(errors[: half + 1]))
    return None if best == half else best * _GROUP


def number_in_system(arrival_s: FloatArray, finish_s: FloatArray, instants: FloatArray) -> FloatArray:
    """Requests that have arrived and not finished at each instant; `finish_s` is NaN for those that never do.

    Examples
    --------
    >>> number_in_system(np.array([0.0, 1.0]), np.array([2.0, np.nan]), np.array([0.0, 1.5, 2.0, 9.0]))
    array([1., 2., 1., 1.])
    """
    finished = np.sort(finish_s[~np.isnan(finish_s)])
    arrived = np.searchsorted(arrival_s, instants, side="right")
    return (arrived - np.searchsorted(finished, instants, side="right")).astype(np.float64)


def independence(values: FloatArray) -> float:
    """P-value of independence against positively correlated neighbours: small if batches are too short.

    NaN where values are undefined; 1 where they are all equal.
    """
    count = len(values)
    if count < 4 or np.isnan(values).any():
        return math.nan
    spread = 2.0 * float(((values - values.mean()) ** 2).sum())
    if spread == 0.0:
        return 1.0
    correlation = 1.0 - float((np.diff(values) ** 2).sum()) / spread
    return 0.5 * math.erfc(correlation * math.sqrt((count**2 - 1) / (count - 2)) / math.sqrt(2.0))


class BatchMeans(NamedTuple):
    """Interval of one measure from batches: ends are NaN if even the longest batches are too short.

    `independence` is the p-value of the test that the batches stand or fall by.
    """

    estimate: float
    low: float
    high: float
    batches: int
    independence: float


def batch_means(
    whole: float,
    parts: Callable[[int], FloatArray],
    confidence: float = 0.95,
    *,
    batches: Sequence[int] = BATCHES,
) -> BatchMeans:
    """Find an interval for a measure of one long run from its batches.

    Parameters
    ----------
    whole : float
        θ, the measure over the whole window.
    parts : callable
        K → θ_1 … θ_K, the measure in each of K batches, (K,) float array.
    confidence : float
        Of the interval, in (0, 1).
    batches : sequence of int
        K's to try, each half the one before.

    Examples
    --------
    >>> series = np.random.default_rng(3).normal(5.0, 1.0, size=6400)
    >>> found = batch_means(series.mean(), lambda count: series.reshape(count, -1).mean(axis=1))
    >>> found.batches, bool(found.low < 5.0 < found.high)
    (64, True)
    """
    from scipy.special import stdtrit

    count, p_value, low, high = 0, math.nan, math.nan, math.nan
    for count in batches:
        values = parts(count)
        p_value = independence(values)
        if p_value >= REJECTED_BELOW:
            error = math.sqrt(float(((values - whole) ** 2).sum()) / (count * (count - 1)))
            half = float(stdtrit(count - 1, 0.5 + confidence / 2.0)) * error
            low, high = whole - half, whole + half
            break
    return BatchMeans(float(whole), low, high, count, p_value)
