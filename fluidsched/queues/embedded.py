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

**Law.** Let z₊ = e^θ > 1 be the pole of π_V nearest to the disc (θ the Lundberg exponent of X − n) and
π̃(z) = π_V(z)(1 − z/z₊). Then

    (1 − A(z) z^{−n}) / ((1 − 1/z)(1 − z/z₊)) = const · Π_k (1 − z_k/z) / π̃(z)

has no zero and no pole in an annulus around 1 < |z| ≤ z₊, so the positive powers of its logarithm (one FFT
on a circle) are those of −log π̃ (the factors z_k/z have negative powers only); the exponential of that
series is π̃ up to its constant, fixed by π_V(1) = 1. Removing the pole keeps the series short at any load,
however slowly the queue's own law decays, and gives its tail exactly: geometric with ratio e^{−θ}. On the
circle |z| = z₊ the rounding is relative to that tail. No root is used: the two methods witness each other.

**From empty.** The moments after b cycles follow the recursion itself, one convolution per cycle.

**Sources.** The recursion and its dominance of WAIT: Ao, Luo, Simchi-Levi, Wang, arXiv 2504.11320. The
generating functions are those of the classical bulk-service queue (Bailey 1954); the factorisation into a
uniform is derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fluidsched._checks import check_count, check_real
from fluidsched.errors import InputError, SolverError
from fluidsched.queues.lundberg import lundberg_exponent

__all__ = [
    "embedded_queue_mean",
    "embedded_queue_means",
    "embedded_queue_pmf",
    "embedded_queue_tail",
    "embedded_queue_transient",
    "embedded_queue_variance",
]

_Real = npt.NDArray[np.float64]
_Complex = npt.NDArray[np.complex128]

_ROOTS_AT_A_TIME = 1 << 18
_NEWTON_STEPS = 200  # 5 to 20 are used
_LARGEST_PMF = 50_000_000  # entries returned before the caller must say how many it wants
_SERIES_TOLERANCE = 1e-13  # size of the last Fourier coefficients against the largest
_LARGEST_DECAY = 700.0  # P(V > 0) ≤ e^−θ: below the smallest normal number
_LARGEST_SERIES = 1 << 22
_LARGEST_THRESHOLD = 1_000_000  # roots are found one by one
_LARGEST_LAW = 10_000_000  # numbers of arrivals in a cycle that are told apart
_NEGLIGIBLE = 1e-20  # probability dropped per cycle from the end of a transient law
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
        Requests. The absolute error is below 1e-15·n, or what the last digit of m decides near m = n.

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
        plain += float(np.sum(1.0 / _root_gaps(n, m, count)).real)
    # At light load terms of size n cancel; a result below zero is their rounding.
    plain = max(plain, 0.0)
    return plain + (n - 1) / 2.0 if wait else plain


def embedded_queue_means(threshold: npt.NDArray[np.int64], mean_arrivals: _Real, wait: bool = True) -> _Real:
    """Means of many queues with Poisson arrivals at once; infinite where m ≥ n. Lengths J.

    Examples
    --------
    >>> embedded_queue_means(np.array([4, 20, 1]), np.array([3.6, 19.0, 2.0])).round(5)
    array([ 5.09988, 16.82888,      inf])
    """
    n, m = np.asarray(threshold, dtype=np.int64), np.asarray(mean_arrivals, dtype=np.float64)
    means = np.full(len(n), math.inf)
    stable = np.flatnonzero(m < n)
    roots = n[stable] // 2 * (n[stable] > 1)
    for part in np.split(stable, np.flatnonzero(np.diff(np.cumsum(roots) // _ROOTS_AT_A_TIME)) + 1):
        size, arrivals = n[part], m[part]
        half = size // 2 * (size > 1)
        first = np.cumsum(half) - half
        order = np.arange(half.sum()) - np.repeat(first, half) + 1.0  # k of ω_k
        u = _poisson_gaps(2.0 * np.pi * order / np.repeat(size, half), np.repeat(arrivals / size, half))
        # ω_{n/2} = −1 is its own conjugate, all others stand for two.
        twice = np.where(2.0 * order == np.repeat(size, half), 1.0, 2.0) * (1.0 / u).real
        sums = np.bincount(np.repeat(np.arange(len(part)), half), twice, minlength=len(part))
        plain = arrivals / (2.0 * (size - arrivals)) - (size + arrivals - 1.0) / 2.0 + sums
        means[part] = np.maximum(plain, 0.0) + ((size - 1) / 2.0 if wait else 0.0)
    return means


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
        u = _root_gaps(n, m, count)
        slack = n - m
        plain = (
            (second / (2.0 * slack)) ** 2
            + third / (3.0 * slack)
            - second / 2.0
            - (slack * slack - 1.0) / 12.0
        )
        plain -= float(np.sum((1.0 - u) / u**2).real)
    plain = max(plain, 0.0)
    return plain + (n * n - 1) / 12.0 if wait else plain


def embedded_queue_pmf(
    threshold: int,
    mean_arrivals: float,
    trials: int | None = None,
    wait: bool = True,
    *,
    size: int | None = None,
    tail_mass: float = 1e-12,
) -> _Real:
    """Probabilities of the stationary embedded queue being 0, 1, 2, …

    Parameters
    ----------
    threshold, mean_arrivals, trials, wait
        As in `embedded_queue_mean`.
    size : int, optional
        Number of entries; if not given, the fewest that leave at most `tail_mass` beyond them.
    tail_mass : float
        In (0, 1).

    Returns
    -------
    numpy.ndarray
        Entry x is the probability of x requests; absolute error about 1e-14.

    Examples
    --------
    >>> law = embedded_queue_pmf(4, 3.6)
    >>> round(float(law @ np.arange(len(law))), 5)
    5.09988
    >>> embedded_queue_pmf(3, 1.5, trials=3, wait=False)        # three arrivals at most: nobody stays
    array([1.])
    """
    n, m, count = _checked(threshold, mean_arrivals, trials)
    if size is not None:
        entries = check_count("size", size, minimum=1)
        tail, _ = _tail(n, m, count, wait, entries)
    else:
        mass = check_real("tail_mass", tail_mass, above=0.0, maximum=1.0)
        tail, decay = _tail(n, m, count, wait, 1)
        if tail[-1] > mass:
            entries = len(tail) + math.ceil(math.log(tail[-1] / mass) / decay)
            if entries > _LARGEST_PMF:
                raise InputError(
                    "tail_mass",
                    mass,
                    f"leave at most {_LARGEST_PMF:,} entries, not {entries:,}",
                    "Give `size`, or use embedded_queue_tail.",
                )
            tail, _ = _tail(n, m, count, wait, entries)
        entries = int(np.argmax(tail <= mass)) + 1
    return np.maximum(-np.diff(tail[:entries], prepend=1.0), 0.0)


def embedded_queue_tail(
    threshold: int,
    mean_arrivals: float,
    level: npt.ArrayLike,
    trials: int | None = None,
    wait: bool = True,
) -> _Real:
    """Probability that the stationary embedded queue exceeds `level`.

    Parameters
    ----------
    threshold, mean_arrivals, trials, wait
        As in `embedded_queue_mean`.
    level : array_like of int
        x ≥ 0, any shape.

    Returns
    -------
    numpy.ndarray
        P(W > x), of the shape of `level`; the error is relative to about 1e-9 however far out, unless
        almost nobody ever waits (absolute then, 1e-16).

    Examples
    --------
    >>> [f"{p:.4g}" for p in embedded_queue_tail(4, 3.6, [3, 10, 100])]
    ['0.5042', '0.1198', '9.587e-10']
    """
    n, m, count = _checked(threshold, mean_arrivals, trials)
    levels = np.asarray(level)
    if levels.size == 0:
        return np.zeros(levels.shape)
    if levels.dtype.kind not in "iu" or levels.min() < 0:
        raise InputError("level", level, "be whole numbers of at least 0")
    tail, _ = _tail(n, m, count, wait, int(levels.max()) + 1)
    return np.asarray(tail[levels])


class QueueMoments(NamedTuple):
    """Moments of the embedded queue after 0, 1, …, b cycles, each of shape (b + 1,)."""

    mean: _Real
    variance: _Real


def embedded_queue_transient(
    threshold: int, mean_arrivals: float, cycles: int, trials: int | None = None, wait: bool = True
) -> QueueMoments:
    """Mean and variance of the embedded queue after each of the first cycles, starting empty.

    Parameters
    ----------
    threshold, trials, wait
        As in `embedded_queue_mean`.
    mean_arrivals : float
        m > 0; at or above the threshold is allowed: the queue then grows with the number of cycles.
    cycles : int
        b. One convolution each, of about n + 10√(bm) entries.

    Returns
    -------
    QueueMoments
        `mean` and `variance`, entry i after i cycles.

    Examples
    --------
    >>> embedded_queue_transient(2, 2.0, 3).mean.round(4)       # at the critical rate it goes on growing
    array([0.    , 0.812 , 1.2638, 1.6138])
    """
    n = check_count("threshold", threshold, minimum=1)
    m = check_real("mean_arrivals", mean_arrivals, above=0.0)
    count = None if trials is None else check_count("trials", trials, minimum=1)
    _check_trials(m, count)
    b = check_count("cycles", cycles)
    from scipy.signal import convolve

    law, arrivals = np.ones(1), _arrival_law(m, count)
    mean, variance = np.zeros(b + 1), np.zeros(b + 1)
    for cycle in range(1, b + 1):
        total = np.maximum(convolve(law, arrivals), 0.0)  # FFT where that is faster: rounding may be negative
        below, rest = total[:n], total[n:]
        law = np.zeros(max(n, len(rest)))
        law[: len(rest)] = rest
        if wait:
            law[: len(below)] += below
        else:
            law[0] += below.sum()
        kept = len(law) - int(np.argmax(np.cumsum(law[::-1]) > _NEGLIGIBLE))
        law = law[:kept] / law[:kept].sum()
        states = np.arange(kept)
        mean[cycle] = law @ states
        variance[cycle] = law @ (states - mean[cycle]) ** 2
    return QueueMoments(mean, variance)


def _checked(threshold: int, mean_arrivals: float, trials: int | None) -> tuple[int, float, int | None]:
    """Validate the three parameters of the law; stability and aperiodicity included."""
    n = check_count("threshold", threshold, minimum=1)
    m = check_real("mean_arrivals", mean_arrivals, above=0.0)
    count = None if trials is None else check_count("trials", trials, minimum=1)
    _check_trials(m, count)
    if m >= n:
        raise InputError(
            "mean_arrivals",
            m,
            f"be below threshold = {n:,}: at or above it the queue has no stationary law",
            "Raise the threshold, or use embedded_queue_transient over a finite horizon.",
        )
    if n > _LARGEST_THRESHOLD:
        raise InputError(
            "threshold",
            n,
            f"be at most {_LARGEST_THRESHOLD:,}",
            "Take slack_queue_bound; where a compiler chose it, give the server a max_batch_size.",
        )
    return n, m, count


def _check_trials(m: float, trials: int | None) -> None:
    if trials is not None and m >= trials:
        raise InputError(
            "mean_arrivals", m, f"be below trials = {trials:,}", "A trial succeeds with probability below 1."
        )


def _can_queue(n: int, trials: int | None) -> bool:
    """Whether the plain rule ever leaves anybody waiting: not if at most n can arrive per cycle."""
    return trials is None or trials > n


def _cumulants(m: float, trials: int | None) -> tuple[float, float]:
    """Second and third cumulant of the arrivals per cycle."""
    if trials is None:
        return m, m
    p = m / trials
    return m * (1.0 - p), m * (1.0 - p) * (1.0 - 2.0 * p)


def _root_gaps(n: int, m: float, trials: int | None) -> _Complex:
    """1 − z_k for the n − 1 roots of z^n = A(z) strictly inside the unit disc, in the order of ω_k.

    The roots nearest to 1 decide the sums, so the iteration is on u = 1 − z, whose digits survive there:
    u = −expm1(log ω + log A(1 − u)/n).
    """
    if n == 1:
        return np.zeros(0, dtype=np.complex128)
    angle = 2.0 * np.pi * np.arange(1, n // 2 + 1) / n  # the other half are their conjugates
    if trials is None:
        u = _poisson_gaps(angle, np.full(len(angle), m / n))
    else:
        p, power = m / trials, trials / n  # power above 1: `_can_queue`
        start = 1.0 - np.exp(1j * angle) * (1.0 - p) ** power
        u = _settled(1j * angle, start, lambda u: (power * _log1p(-p * u), -power * p / (1.0 - p * u)))
    return np.concatenate([u, u[: (n - 1) // 2][::-1].conj()])


def _poisson_gaps(angle: _Real, load: _Real) -> _Complex:
    """The gaps of the roots with these angles of ω, each for its own load m/n."""
    from scipy.special import lambertw

    start = 1.0 + lambertw(-load * np.exp(-load) * np.exp(1j * angle)) / load
    return _settled(1j * angle, start, lambda u: (-load * u, -load))


def _settled(
    log_omega: Any, u: Any, log_root_and_slope: Callable[[_Complex], tuple[_Complex, Any]]
) -> _Complex:
    """Newton's method for u = −expm1(log ω + log A(1 − u)/n)."""
    for _ in range(_NEWTON_STEPS):
        log_root, slope = log_root_and_slope(u)
        image = -np.expm1(log_omega + log_root)
        if (np.abs(u - image) <= _ROOT_TOLERANCE * np.abs(u)).all():
            return np.asarray(u)
        newton = u - (u - image) / (1.0 + slope * (1.0 - image))
        u = np.where(np.abs(1.0 - newton) < 1.0, newton, image)
    raise SolverError(f"roots of z^n = A(z) did not settle in {_NEWTON_STEPS} Newton steps")


def _log1p(w: _Complex) -> _Complex:
    """log(1 + w), accurate for small w (NumPy's complex log1p rounds 1 + w first)."""
    small = np.abs(w) < 0.5
    x, y = np.where(small, w.real, 0.0), np.where(small, w.imag, 0.0)
    near = 0.5 * np.log1p(x * (2.0 + x) + y * y)
    return np.asarray(
        np.where(small, near, np.log(np.abs(1.0 + w))) + 1j * np.arctan2(w.imag, 1.0 + w.real),
        dtype=np.complex128,
    )


def _arrival_law(m: float, trials: int | None) -> _Real:
    """Probabilities of 0, 1, … arrivals in a cycle, up to where the rest is negligible."""
    from scipy.stats import binom, poisson

    law = poisson(m) if trials is None else binom(trials, m / trials)
    digits = -math.log(_NEGLIGIBLE)
    last = math.ceil(m + math.sqrt(2.0 * m * digits) + 2.0 / 3.0 * digits)  # Bernstein's inequality
    last = last if trials is None else min(last, trials)
    if last > _LARGEST_LAW:
        raise InputError("mean_arrivals", m, f"be about {_LARGEST_LAW:,} at most", "Take shorter cycles.")
    return np.asarray(law.pmf(np.arange(last + 1)), dtype=np.float64)


def _decay(n: int, m: float, trials: int | None) -> float:
    """The Lundberg exponent θ = log z₊ of X − n; infinite if the plain rule never leaves anybody waiting."""
    if trials is not None:
        return lundberg_exponent(trials, m / trials, n)
    from scipy.optimize import brentq

    # m(e^θ − 1) = nθ. With e^θ − 1 ≥ θ + θ²/2 the root is at most 2(n − m)/m; it is at least log(n/m).
    low, high = 0.99 * math.log(n / m), 1.01 * min(2.0 * (n - m) / m, 2.0 * math.log(n / m) + 2.0)
    return float(brentq(lambda t: m * math.expm1(t) - n * t, low, high, xtol=1e-300, rtol=8.9e-16))


def _tail(n: int, m: float, trials: int | None, wait: bool, size: int) -> tuple[_Real, float]:
    """P(queue > x) for x = 0, 1, … into its geometric part, at least `size` entries; and the decay θ."""
    plain, decay = np.zeros(1), math.inf
    if _can_queue(n, trials):
        plain, decay = _plain_tail(n, m, trials)
    length = max(size, len(plain) + (n if wait else 0))
    more = np.arange(1, length - len(plain) + 1)
    plain = np.concatenate([plain, plain[-1] * np.exp(-decay * more)])
    if not wait:
        return plain, decay
    # P(W > x) = (1/n) Σ_{u<n} P(V > x − u), with P(V > negative) = 1; summed from the small end.
    beyond = plain[-1] / math.expm1(decay) if decay < math.inf else 0.0
    upward = np.cumsum(np.concatenate([[beyond], plain[::-1]]))[::-1]  # Σ_{i≥x} P(V > i)
    first = np.arange(length) + 1 - n
    return (upward[np.maximum(first, 0)] - upward[1:] + np.maximum(-first, 0)) / n, decay


def _plain_tail(n: int, m: float, trials: int | None) -> tuple[_Real, float]:
    """P(V > x) of the plain rule from x = 0 until it is geometric, by Wiener–Hopf on a circle; and θ."""
    decay = _decay(n, m, trials)
    if decay > _LARGEST_DECAY:
        return np.zeros(1), decay
    length = 1 << (8 * n + 64).bit_length()
    while length <= _LARGEST_SERIES:
        for share in (1.0, 0.9, 0.5):  # at light load the next poles are as near as z₊: a smaller circle then
            series = _pole_free_series(n, m, trials, decay, share * decay, length)
            if series is not None:
                return _tail_of_series(series, decay, share * decay), decay
        length *= 2
    raise SolverError(
        f"the law of the queue (n = {n}, m = {m:g}) did not settle in {_LARGEST_SERIES:,} terms"
    )


def _pole_free_series(
    n: int, m: float, trials: int | None, decay: float, log_radius: float, length: int
) -> _Real | None:
    """Coefficients of π̃(z)/π̃(0) times r^x, x < length/2; None if `length` points do not resolve them."""
    # Half a step off z₊ itself; angles within (−π, π], as n log z must keep its digits on both sides of 1.
    angle = 2.0 * np.pi * (np.fft.fftfreq(length) + 0.5 / length)
    log_z = log_radius + 1j * angle
    off_one = np.expm1(log_z)
    log_transform = m * off_one if trials is None else trials * _log1p(m / trials * off_one)
    ratio = -np.expm1(log_transform - n * log_z) / (-np.expm1(-log_z) * -np.expm1(log_z - decay))
    shift = np.exp(-1j * np.pi * np.arange(length) / length)
    coefficients = (np.fft.fft(np.log(ratio)) / length * shift).real
    half, eighth = length // 2, length // 8
    if np.max(np.abs(coefficients[half - eighth : half + eighth])) > _SERIES_TOLERANCE:
        return None
    positive = np.zeros(length)
    positive[1:half] = -coefficients[1:half]
    values = np.exp(np.fft.ifft(positive / shift) * length)
    series = (np.fft.fft(values) / length * shift).real
    if np.max(np.abs(series[half:])) > _SERIES_TOLERANCE * np.max(np.abs(series)):
        return None
    return np.asarray(series[:half])


def _tail_of_series(series: _Real, decay: float, log_radius: float) -> _Real:
    """P(V > x) from the scaled coefficients of π̃: normalise, put the pole back, add from the far end."""
    from scipy.signal import lfilter

    shrink = np.exp(-log_radius * np.arange(len(series)))
    empty = -math.expm1(-decay) / float(series @ shrink)
    law = empty * np.maximum(lfilter([1.0], [1.0, -math.exp(log_radius - decay)], series), 0.0) * shrink
    beyond = law[-1] / math.expm1(decay)
    return np.asarray(np.cumsum(np.concatenate([[beyond], law[:0:-1]]))[::-1])
