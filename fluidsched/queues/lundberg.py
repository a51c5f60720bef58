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
Np)/N. If N ≤ n no root exists because V never exceeds n − 1; the exponent is then infinite.

**Sources.** Ao, Luo, Simchi-Levi, Wang, arXiv 2504.11320 (Theorem 2), with b = 1 + H/c0 cycles and δ shared
among the segments.
"""

from __future__ import annotations

import math

from fluidsched._checks import check_count, check_real
from fluidsched.errors import InputError

__all__ = ["lundberg_buffer", "lundberg_exponent"]


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
        if theta < 1.0:
            return count * math.log1p(p * math.expm1(theta)) - n * theta
        # The same with e^θ taken out, which may overflow.
        return count * math.log1p((1.0 - p) * math.expm1(-theta)) + (count - n) * theta

    from scipy.optimize import brentq

    low, high = 7.9 * (n - count * p) / count, -1.01 * count * math.log(p) / (count - n)
    if not log_transform(low) < 0.0 < log_transform(high):
        raise InputError(
            "threshold", n, f"exceed trials · probability = {count * p:g} by more than rounding", "Raise it."
        )
    return float(brentq(log_transform, low, high, xtol=1e-300, rtol=8.9e-16, maxiter=500))


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
