r"""The embedded queue of a threshold rule: exact mean, variance, law, tail and transient moments.

**System.** A queue is looked at once per cycle. In a cycle X requests arrive, independent of the past; then n
requests (the *threshold*) are admitted if n are there and, under WAIT, none otherwise. Counted just after the
decision, the queue follows

    W' = W + X − n·1{W + X ≥ n}          (`wait=True`),      V' = max(V + X − n, 0)          (`wait=False`).

The second rule admits whoever is there, up to n. X is Poisson with mean m (arrivals at rate λ, cycles of
length T, m = λT: the entry queue of a type) or binomial with N trials and mean m = Np (each of the N
requests that finish a segment goes on with probability p: a boundary queue of Nested WAIT). Both are stable
iff m < n.

**Waiting is an independent uniform.** Write A(z) for the generating function of X, π(z) for that of the
queue and q_i = P(queue + X = i). One step of either recursion gives

    π_W(z) (z^n − A(z)) = (z^n − 1) Σ_{i<n} q_i z^i,          π_V(z) (z^n − A(z)) = Σ_{i<n} q_i (z^n − z^i).

By Rouché's theorem z^n = A(z) has, for m < n, n roots in the closed unit disc: 1 and z_1, …, z_{n−1}
inside. Both right-hand sides have degree n − 1 after division by the factor that vanishes at 1, and must
vanish at every z_k, so

    π_V(z) = c (z − 1) Π_k (z − z_k) / (z^n − A(z)),          π_W(z) = π_V(z) · (1 + z + … + z^{n−1}) / n:

the waiting queue is the plain one plus an independent uniform on {0, …, n − 1}. Waiting for a full
threshold costs (n − 1)/2 requests in the mean and (n² − 1)/12 in the variance, at any load.

**Moments.** Put z = e^s and expand log π_V at s = 0. With s.d. σ and third cumulant κ₃ of X and a = σ²/(2(n
− m)),

    E[V]   = a − (n + m − 1)/2 + Σ_k 1/(1 − z_k)
    Var[V] = a² + κ₃/(3(n − m)) − σ²/2 − ((n − m)² − 1)/12 − Σ_k z_k/(1 − z_k)².

**Roots.** A root is a fixed point z = ω_k A(z)^{1/n}, ω_k = e^{2πik/n}. For Poisson arrivals the principal
branch of the Lambert function solves it, z_k = −(n/m) W₀(−(m/n) e^{−m/n} ω_k). For binomial arrivals the
map z ↦ ω_k (1 − p + pz)^{N/n} takes the disc into itself and contracts it by m/n; Newton's method, with a
plain step of the map where a Newton step would leave the disc, finds the root at any load.

**Sources.** The recursion and its dominance of WAIT: Ao, Luo, Simchi-Levi, Wang, arXiv 2504.11320. The
generating functions are those of the classical bulk-service queue (Bailey 1954); the factorisation into a
uniform is derived here.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fluidsched._checks import check_count, check_real
from fluidsched.errors import InputError, SolverError

__all__ = ["embedded_queue_mean", "embedded_queue_variance"]

_NEWTON_STEPS = 200  # 5 to 20 are used
_ROOT_TOLERANCE = 1e-15  # residual |z − ω A(z)^(1/n)|: a few rounding errors of numbers below 1


def embedded_queue_mean(
    threshold: int, mean_arrivals: float, trials: int | None = None, wait: bool = True
) -> float:
    """Mean of the stationary embedded queue, counted just after decisions.

    Parameters
    ----------
    threshold : int
        n, requests admitted at once; at least 1.
    mean_arrivals : float
        m, mean number of requests that arrive per cycle; 0 < m < n.
    trials : int, optional
        N: arrivals are Binomial(N, m/N) instead of Poisson(m); m < N.
    wait : bool
        True: nobody is admitted until n are there. False: up to n are admitted in every cycle.

    Returns
    -------
    float
        Requests. The absolute error is about 1e-15·n plus what the conditioning of n − m costs.

    Raises
    ------
    InputError
        If m ≥ n (no stationary law exists) or an argument is out of range.

    Notes
    -----
    Upper bound for the entry queue of literal WAIT, whose cycles start no later than assumed here; exact
    when cycles start every T seconds regardless. See the module's text for the derivation.

    Examples
    --------
    >>> round(embedded_queue_mean(4, 3.6), 5)
    5.09988
    >>> round(embedded_queue_mean(4, 3.0, trials=10), 6)
    1.942085
    >>> embedded_queue_mean(20, 19.0) - embedded_queue_mean(20, 19.0, wait=False)
    9.5
    """
    n, m, count = _checked(threshold, mean_arrivals, trials)
    plain = 0.0
    if _can_queue(n, count):
        variance, _ = _cumulants(m, count)
        plain = variance / (2.0 * (n - m)) - (n + m - 1.0) / 2.0
        plain += float(np.sum(1.0 / (1.0 - _roots(n, m, count))).real)
    # At light load terms of size n cancel; a result below zero is their rounding.
    plain = max(plain, 0.0)
    return plain + (n - 1) / 2.0 if wait else plain


def embedded_queue_variance(
    threshold: int, mean_arrivals: float, trials: int | None = None, wait: bool = True
) -> float:
    """Variance of the stationary embedded queue, in requests squared; arguments as `embedded_queue_mean`.

    Examples
    --------
    >>> round(embedded_queue_variance(1, 0.9), 4)
    22.8825
    >>> round(embedded_queue_variance(4, 3.6) - embedded_queue_variance(4, 3.6, wait=False), 9)
    1.25
    """
    n, m, count = _checked(threshold, mean_arrivals, trials)
    plain = 0.0
    if _can_queue(n, count):
        second, third = _cumulants(m, count)
        z = _roots(n, m, count)
        slack = n - m
        plain = (
            (second / (2.0 * slack)) ** 2
            + third / (3.0 * slack)
            - second / 2.0
            - (slack * slack - 1.0) / 12.0
        )
        plain -= float(np.sum(z / (1.0 - z) ** 2).real)
    plain = max(plain, 0.0)
    return plain + (n * n - 1) / 12.0 if wait else plain


def _checked(threshold: int, mean_arrivals: float, trials: int | None) -> tuple[int, float, int | None]:
    """Validate the three parameters of the law; stability and aperiodicity included."""
    n = check_count("threshold", threshold, minimum=1)
    m = check_real("mean_arrivals", mean_arrivals, above=0.0)
    count = None if trials is None else check_count("trials", trials, minimum=1)
    if count is not None and m >= count:
        raise InputError(
            "mean_arrivals", m, f"be below trials = {count:,}", "A trial succeeds with probability < 1."
        )
    if m >= n:
        raise InputError(
            "mean_arrivals",
            m,
            f"be below threshold = {n:,}: at or above it the queue has no stationary law",
            "Raise the threshold, or use embedded_queue_transient over a finite horizon.",
        )
    return n, m, count


def _can_queue(n: int, trials: int | None) -> bool:
    """Whether the plain rule ever leaves anybody waiting: not if at most n can arrive per cycle."""
    return trials is None or trials > n


def _cumulants(m: float, trials: int | None) -> tuple[float, float]:
    """Second and third cumulant of the arrivals per cycle."""
    if trials is None:
        return m, m
    p = m / trials
    return m * (1.0 - p), m * (1.0 - p) * (1.0 - 2.0 * p)


def _roots(n: int, m: float, trials: int | None) -> npt.NDArray[np.complex128]:
    """The n − 1 roots of z^n = A(z) strictly inside the unit disc, in the order of ω_k."""
    omega = np.exp(2j * np.pi * np.arange(1, n) / n)
    if trials is None:
        from scipy.special import lambertw

        load = m / n
        return np.asarray(-lambertw(-load * math.exp(-load) * omega) / load, dtype=np.complex128)
    p = m / trials
    power = trials / n  # above 1: `_can_queue`
    z = omega * (1.0 - p) ** power
    for _ in range(_NEWTON_STEPS):
        image = omega * np.exp(power * _log1p(p * (z - 1.0)))
        if np.max(np.abs(z - image), initial=0.0) <= _ROOT_TOLERANCE:
            return np.asarray(z, dtype=np.complex128)
        newton = z - (z - image) / (1.0 - power * p * image / (1.0 - p + p * z))
        z = np.where(np.abs(newton) < 1.0, newton, image)
    raise SolverError(f"the roots of z^{n} = A(z) did not settle in {_NEWTON_STEPS} Newton steps")


def _log1p(w: npt.NDArray[np.complex128]) -> npt.NDArray[np.complex128]:
    """log(1 + w), accurate for small w (NumPy's complex log1p rounds 1 + w first)."""
    x, y = w.real, w.imag
    return np.asarray(
        0.5 * np.log1p(x * (2.0 + x) + y * y) + 1j * np.arctan2(y, 1.0 + x), dtype=np.complex128
    )
