"""Arrival processes: when requests of one type come.

An arrival process draws the times 0 < t_1 ≤ t_2 ≤ ... < H of one type from a random stream. The processes
here draw *gaps in units of the mean gap* one after another from the stream, so that with the same stream

- a longer horizon only adds arrivals (the earlier ones stay), and
- multiplying the rate by ζ divides every time by ζ.

Poisson: gaps are independent and exponential with mean 1/λ; the number of arrivals in a window of length h is
Poisson with mean λh, independent of other windows.
"""

from __future__ import annotations

import math

import numpy as np

from fluidsched._checks import check_real
from fluidsched.errors import InputError
from fluidsched.workload.lengths import FloatArray

__all__ = ["poisson"]

MAX_REQUESTS = 10**8
"""Largest expected number of requests of one draw."""


def poisson(rate: float, horizon: float, rng: np.random.Generator) -> FloatArray:
    """Arrival times of a Poisson process on [0, horizon).

    Parameters
    ----------
    rate : float
        Requests per second, at least 0.
    horizon : float
        Length of the window in seconds, positive.
    rng : numpy.random.Generator
        Stream to draw from.

    Returns
    -------
    float64[N]
        Times in seconds since the start of the window, ascending.

    Examples
    --------
    >>> poisson(2.0, 3.0, np.random.default_rng(1)).round(3)
    array([0.537, 0.691])
    """
    rate = check_real("rate", rate, minimum=0)
    horizon = check_real("horizon", horizon, above=0)
    expected = rate * horizon
    if expected == 0:
        return np.empty(0)
    if expected > MAX_REQUESTS:
        remedy = "Use a shorter horizon or a lower rate."
        raise InputError(
            "horizon", f"{expected:.3g} expected requests", f"give at most {MAX_REQUESTS:,}", remedy
        )
    gaps = rng.standard_exponential(int(expected + 6 * math.sqrt(expected)) + 16)
    times = np.cumsum(gaps) / rate
    while times[-1] < horizon:
        gaps = np.concatenate([gaps, rng.standard_exponential(int(6 * math.sqrt(expected)) + 16)])
        times = np.cumsum(gaps) / rate
    return times[: np.searchsorted(times, horizon)]
