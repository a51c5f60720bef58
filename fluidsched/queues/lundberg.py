r"""The exponential (Lundberg) bound on a boundary queue, and the buffer it asks for.

**System.** The boundary queue of a Nested WAIT segment, counted after decisions, is dominated by

    V' = V + Y − n·1{V + Y ≥ n},          Y ~ Binomial(N, p),          Np < n,          V_0 = 0:

N requests leave the segment before per cycle, each goes on with probability p, and n are taken at once.

**Bound.** Let S_k be the sum of k independent copies of Y − n, and θ > 0 with E[e^{θ(Y − n)}] = 1, that is

    e^{−θn} (1 − p + p e^θ)^N = 1.

e^{θ S_k} is a martingale of mean 1, so by Doob P(max_k S_k ≥ y) ≤ e^{−θy}. The queue V̂' = max(V̂ + Y − n,
0) that does not wait has the law of max_{k≤b} S_k after b cycles, and V ≤ V̂ + n − 1 by induction. A union
over b cycles gives

    P(V > x within b cycles) ≤ b e^{−θ(x − n)},          hence the buffer          x = n + ln(b/δ)/θ.

The logarithm N ln(1 − p + p e^θ) − nθ is convex, 0 at θ = 0 with slope Np − n < 0, and at least N ln p + (N
− n)θ; so the positive root is unique and lies below N ln(1/p)/(N − n). Hoeffding's lemma gives θ ≥ 8(n −
Np)/N. It depends on p and q = n/N alone. If N ≤ n no root exists because V never exceeds n − 1; the exponent
is then infinite.

**Many pairs at once.** f(θ) = ln(1 − p + p e^θ) − qθ is nearly symmetric about its minimum, where the tilted
probability p e^θ/(1 − p + p e^θ) is q; at the root it is therefore near 2q − p. From there Halley's method needs
three steps, four near q = 1.

**Sources.** Ao, Luo, Simchi-Levi, Wang, arXiv 2504.11320 (Theorem 2), with b = 1 + H/c0 cycles and δ shared
among the segments.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fluidsched._checks import check_count, check_real
from fluidsched.errors import InputError

__all__ = ["lundberg_buffer", "lundberg_exponent", "lundberg_exponents"]

_Array = npt.NDArray[np.float64]

_HALLEY_STEPS = 4
_CHUNK = 1 << 14  # pairs at a time: what the processor's cache holds


def lundberg_exponent(trials: int, probability: float, threshold: int) -> float:
    """Decay rate θ of a boundary queue's tail, the positive root of e^{−θn} (1 − p + p e^θ)^N = 1.

    Parameters
    ----------
    trials : int
        N, requests that leave the segment before in one cycle.
    probability : float
        p, share of them that goes on; 0 < p < 1.
    threshold : int
        n, requests taken at once; Np < n.

    Returns
    -------
    float
        Per request; infinite when N ≤ n (the queue then never exceeds n − 1).

    Raises
    ------
    InputError
        If Np ≥ n: the queue is not stable and no positive root exists.

    Examples
    --------
    >>> round(lundberg_exponent(10, 0.3, 4), 6)
    0.871061
    >>> lundberg_exponent(20, 0.5, 20)
    inf
    """
    count, p, n = _checked_boundary(trials, probability, threshold)
    if count <= n:
        return math.inf

    def log_transform(theta: float) -> float:
        if theta < 700.0:
            return count * math.log1p(p * math.expm1(theta)) - n * theta
        # The same with p e^θ taken out, which may overflow.
        return count * (math.log(p) + math.log1p((1.0 - p) / p * math.exp(-theta))) + (count - n) * theta

    from scipy.optimize import brentq

    low, high = 7.9 * (n - count * p) / count, -1.01 * count * math.log(p) / (count - n)
    if not log_transform(low) < 0.0 < log_transform(high):
        raise InputError(
            "threshold", n, f"exceed trials · probability = {count * p:g} by more than rounding", "Raise it."
        )
    return float(brentq(log_transform, low, high, xtol=1e-300, rtol=8.9e-16, maxiter=500))


def lundberg_exponents(probability: npt.ArrayLike, ratio: npt.ArrayLike) -> _Array:
    """Exponents of many boundary queues at once, as functions of p and q = n/N.

    Parameters
    ----------
    probability : array_like
        p in (0, 1), any shape.
    ratio : array_like
        q = threshold / trials, broadcast against p; need not come from whole numbers.

    Returns
    -------
    numpy.ndarray
        θ, within 1e-9 relative, 1e-7 where p < 1e-9 (closer to rounding where q is not within 1e-6 of p or 0);
        infinite where q ≥ 1, NaN where q ≤ p: such a queue is not stable.

    Examples
    --------
    >>> lundberg_exponents([0.3, 0.3, 0.5, 0.5], [0.4, 0.35, 0.95, 0.5]).round(6)
    array([ 0.871061,  0.451427, 13.862925,       nan])
    """
    p, q = np.broadcast_arrays(np.asarray(probability, np.float64), np.asarray(ratio, np.float64))
    shape = p.shape
    p, q = p.ravel(), q.ravel()
    result = np.full(p.shape, math.nan)
    result[q >= 1.0] = math.inf
    stable = np.flatnonzero((p < q) & (q < 1.0))
    for start in range(0, len(stable), _CHUNK):
        at = stable[start : start + _CHUNK]
        result[at] = _halley(p[at], q[at])
    return result.reshape(shape)


def exponents_at_most(p: _Array, q: _Array) -> _Array:
    """Upper bound on θ for 0 < p < q < 1, close where θ is small and ten times quicker than θ itself.

    q is the mean over 0 ≤ t ≤ θ of the tilted probability, a sigmoid from p on. A sigmoid's mean is at least the
    smaller of its middle value and the mean of its ends; setting these equal to q gives the two bounds whose larger
    is taken. And θ < −ln p/(1 − q).
    """
    odds = p / (1.0 - p)
    ratio = q / ((1.0 - q) * odds)
    above = 1.0 - 2.0 * q + p  # 1 less the end that makes the mean of the ends q
    ends = np.divide((1.0 - above) / odds, above, out=np.full_like(p, math.inf), where=above > 0.0)
    return np.asarray(np.minimum(np.log(np.maximum(ends, ratio * ratio)), -np.log(p) / (1.0 - q)))


def _halley(p: _Array, q: _Array) -> _Array:
    """The root for 0 < p < q < 1, between the minimum of f and −ln p/(1 − q)."""
    odds = (1.0 - p) / p
    largest = -np.log(p) / (1.0 - q)
    least = np.log(q * odds / (1.0 - q))  # where f is smallest
    above = np.maximum(1.0 - 2.0 * q + p, (1.0 - q) / 2.0)  # 1 less the tilted probability, never 0
    theta = np.minimum(np.log((1.0 - above) * odds / above), largest)
    for _ in range(_HALLEY_STEPS):
        left = odds * np.exp(-theta)
        weight = 1.0 / (1.0 + left)  # the tilted probability
        value = np.where(
            theta < 1.0,
            np.log1p(p * np.expm1(np.minimum(theta, 1.0))) - q * theta,
            np.log(p) + np.log1p(left) + (1.0 - q) * theta,
        )
        slope = weight - q
        curvature = weight * (1.0 - weight)
        theta = theta - 2.0 * value * slope / (2.0 * slope * slope - value * curvature)
        theta = np.clip(theta, least, largest)
    return np.asarray(theta)


def lundberg_buffer(
    trials: int, probability: float, threshold: int, cycles: float, overflow_probability: float
) -> float:
    """Buffer n + ln(b/δ)/θ: the queue exceeds it within b cycles with probability at most δ.

    Parameters
    ----------
    trials, probability, threshold
        N, p, n as in `lundberg_exponent`.
    cycles : float
        b ≥ 1; over a horizon of H seconds at most 1 + H/c0, with c0 the time of an empty batch.
    overflow_probability : float
        δ in (0, 1). Of a table with L segments each queue gets its share δ/L.

    Returns
    -------
    float
        Requests.

    Examples
    --------
    >>> round(lundberg_buffer(10, 0.3, 4, 1e6, 0.01), 2)
    25.15
    """
    n = check_count("threshold", threshold, minimum=1)
    b = check_real("cycles", cycles, minimum=1.0)
    delta = check_real("overflow_probability", overflow_probability, above=0.0, maximum=1.0)
    return n + (math.log(b) - math.log(delta)) / lundberg_exponent(trials, probability, n)


def _checked_boundary(trials: int, probability: float, threshold: int) -> tuple[int, float, int]:
    """Validate (N, p, n) of a boundary queue."""
    count = check_count("trials", trials, minimum=1)
    p = check_real("probability", probability, above=0.0, maximum=1.0)
    n = check_count("threshold", threshold, minimum=1)
    if p == 1.0:
        raise InputError("probability", p, "be below 1", "Merge two segments that everybody passes.")
    if count * p >= n:
        raise InputError(
            "threshold", n, f"exceed trials · probability = {count * p:g}", "Raise the segment's threshold."
        )
    return count, p, n
