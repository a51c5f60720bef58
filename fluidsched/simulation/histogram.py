r"""Durations counted in logarithmic buckets: memory that does not grow, quantiles with a stated error.

A positive float is m·2^e with 1 ≤ m < 2. Its bucket is e together with the first 6 bits of m - 1: 64 buckets of
equal width to each octave, from 2^-20 s (about a microsecond) to 2^24 s (about half a year). Numbers of one
bucket [l, u) differ by less than (u - l)/l ≤ 1/64, so the harmonic middle 2lu/(l + u) of the bucket in which
an order statistic lies is within

    (u - l)/(u + l) ≤ 1/129 < 0.8 %

of it. Durations below the first bucket count as zero, later ones as 2^24 s. Counts add: histograms of parts of a
run make the histogram of the run. Finding the bucket of a double takes a shift of its bits, since a double's
exponent and mantissa lie side by side; the compiled loops do just that. (The layout is that of HdrHistogram;
a bound relative to the value is what DDSketch, arXiv 1908.10693, gives with exact logarithms.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "BUCKETS",
    "FIRST",
    "RELATIVE_ERROR",
    "SHIFT",
    "at_rank",
    "bucket",
    "buckets",
    "count",
    "quantile",
    "quantiles",
    "values",
]

_BITS = 6
_OCTAVES = (-20, 24)

SHIFT = 52 - _BITS
"""Bits of a double to drop."""

FIRST = ((1023 + _OCTAVES[0]) << _BITS) - 1
"""What is left of a double, less this, is its bucket; bucket 0 is everything below 2^-20 s."""

BUCKETS = ((_OCTAVES[1] - _OCTAVES[0]) << _BITS) + 2
"""Number of buckets B: below, 64 per octave, and at or above 2^24 s."""

RELATIVE_ERROR = 1 / 129
"""Largest relative error of a quantile between 2^-20 s and 2^24 s."""

Counts = NDArray[np.int64]


def buckets(durations: ArrayLike) -> Counts:
    """Bucket of every duration (s, not NaN), int64 of the same shape.

    Examples
    --------
    >>> buckets([0.0, 1.0, 1.015625, 2.0]).tolist()
    [0, 1281, 1282, 1345]
    """
    bits = np.ascontiguousarray(durations, dtype=np.float64).view(np.int64) >> SHIFT
    return np.asarray(np.clip(bits - FIRST, 0, BUCKETS - 1), dtype=np.int64)


def bucket(duration: float) -> int:
    """Bucket of one duration, s; the same number without arrays."""
    mantissa, exponent = math.frexp(duration)  # in [1/2, 1)
    place = ((exponent - 1 - _OCTAVES[0]) << _BITS) + int((2.0 * mantissa - 1.0) * (1 << _BITS)) + 1
    return min(max(place, 0), BUCKETS - 1) if duration > 0.0 else 0


def count(durations: NDArray[np.float64]) -> Counts:
    """How many of the durations (s, not NaN) lie in each bucket, shape (B,)."""
    return np.bincount(buckets(durations), minlength=BUCKETS).astype(np.int64)


def _values() -> NDArray[np.float64]:
    edges = (np.arange(1, BUCKETS + 1, dtype=np.int64) + FIRST) << SHIFT
    lower, upper = edges[:-1].view(np.float64), edges[1:].view(np.float64)
    middle = 2.0 * lower * upper / (lower + upper)
    return np.concatenate([[0.0], middle[:-1], [lower[-1]]])


_VALUES = _values()
_VALUES.flags.writeable = False


def values() -> NDArray[np.float64]:
    """The duration each bucket stands for, s, shape (B,): its harmonic middle; 0 and 2^24 at the ends."""
    return _VALUES


def quantile(counts: Counts, level: float) -> float:
    """Quantile of the durations counted, s: the order statistics next to rank level·(n - 1), interpolated.

    Parameters
    ----------
    counts : (B,) int64 array
    level : float
        In [0, 1].

    Returns
    -------
    float
        Within `RELATIVE_ERROR` of the exact quantile; NaN if nothing was counted.

    Examples
    --------
    >>> quantile(count(np.array([1.0, 2.0, 3.0, 4.0])), 0.5)  # 2.5 within 0.8 %
    2.5155239587098848
    """
    return quantiles(counts, (level,))[0]


def quantiles(counts: Counts, levels: Sequence[float]) -> list[float]:
    """Several quantiles of one histogram, as `quantile` gives them."""
    total = int(counts.sum())
    return _at_ranks(counts, [(total - 1) * level for level in levels])


def at_rank(counts: Counts, rank: float) -> float:
    """The order statistic of this rank (0 … n - 1, interpolated) of the durations counted, s; NaN without any."""
    return _at_ranks(counts, [rank])[0]


def _at_ranks(counts: Counts, ranks: Sequence[float]) -> list[float]:
    below = np.cumsum(counts)
    total = int(below[-1])
    if total == 0:
        return [math.nan] * len(ranks)
    at = [math.floor(rank) for rank in ranks]
    neighbours = [[place, min(place + 1, total - 1)] for place in at]
    pairs = _VALUES[np.searchsorted(below, neighbours, side="right")].tolist()
    return [
        low + (rank - place) * (high - low) for (low, high), rank, place in zip(pairs, ranks, at, strict=True)
    ]
