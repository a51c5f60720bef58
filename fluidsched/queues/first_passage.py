r"""The exact probability that a boundary queue exceeds a level within b cycles, and the exact buffer.

**System.** V' = V + Y − n·1{V + Y ≥ n}, Y ~ Binomial(N, p), V_0 = 0, as in `lundberg`. Kill the chain when
it first exceeds x. On the states 0..x that leaves a substochastic matrix with two bands,

    Q[v, w] = b(w − v)·1{w < n} + b(w − v + n),          b the probabilities of Y,

and the probability a(v) = 1 − Σ_w Q[v, w] of being killed at once, summed from the terms that leave.

**Repeated squaring.** With a_b(v) the probability of being killed within b cycles,

    a_{b+c} = a_b + Q^b a_c,          Q^{2b} = Q^b Q^b:

no term is negative, so no digit cancels, however small the answer. Squaring would double the relative error
of Q^b each time; but its row sums are known (1 − a_b), and scaling each row to its sum keeps the error at a
few roundings. The rows of Q^b become proportional to one another, to the quasi-stationary law ν, at the
rate at which the queue forgets. From then on Q^b = (1 − a_b) νᵀ and each doubling is a multiplication of
vectors: time grows with the logarithm of the memory of the queue, hardly with b.

**Buffer.** The probability decreases in x and is at most δ at the Lundberg buffer: the exact buffer is found
below it by bisection. Memory bounds need the queue *after* decisions. The base memory of a table provides for n
requests at a segment's first position; either n are being served there, or the segment is paused and the n
places stand empty. What waits beyond them is at most what a decision would leave.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fluidsched._checks import check_count, check_real
from fluidsched.queues.lundberg import _checked_boundary, lundberg_buffer

__all__ = ["exact_buffer", "first_passage_probability"]

_Array = npt.NDArray[np.float64]

_PROPORTIONAL = 1e-12  # relative spread at which the rows of Q^b count as one quasi-stationary law


def first_passage_probability(
    trials: int, probability: float, threshold: int, level: int, cycles: int
) -> float:
    """Probability that the boundary queue, empty at first, exceeds `level` within `cycles` cycles.

    Parameters
    ----------
    trials, probability, threshold
        N, p, n of the queue; Np < n.
    level : int
        x, requests left after a decision.
    cycles : int
        b, any size.

    Returns
    -------
    float
        With a relative error of about 1e-11, however small.

    Notes
    -----
    Time O(x³ log of the queue's memory): milliseconds for x in the hundreds.

    Examples
    --------
    >>> round(first_passage_probability(10, 0.3, 4, level=29, cycles=10**9), 6)
    0.00689
    >>> first_passage_probability(1, 0.25, 1, level=0, cycles=100)
    0.0
    """
    count, p, n = _checked_boundary(trials, probability, threshold)
    x = check_count("level", level)
    b = check_count("cycles", cycles)
    return _killed_within(*_killed_chain(_binomial_law(count, p), n, x), b)


def exact_buffer(
    trials: int, probability: float, threshold: int, cycles: int, overflow_probability: float
) -> int:
    """Smallest x that the boundary queue exceeds within `cycles` cycles with probability at most δ.

    Parameters
    ----------
    trials, probability, threshold, cycles
        As in `first_passage_probability`.
    overflow_probability : float
        δ in (0, 1).

    Returns
    -------
    int
        Requests; never more than `lundberg_buffer` for the same arguments.

    Examples
    --------
    >>> exact_buffer(10, 0.3, 4, 10**6, 0.01), round(lundberg_buffer(10, 0.3, 4, 10**6, 0.01), 2)
    (21, 25.15)
    """
    count, p, n = _checked_boundary(trials, probability, threshold)
    b = check_count("cycles", cycles, minimum=1)
    delta = check_real("overflow_probability", overflow_probability, above=0.0, maximum=1.0)
    law = _binomial_law(count, p)
    enough = math.floor(lundberg_buffer(count, p, n, b, delta))
    short = -1
    while enough - short > 1:
        middle = (short + enough) // 2
        if _killed_within(*_killed_chain(law, n, middle), b) <= delta:
            enough = middle
        else:
            short = middle
    return enough


def _binomial_law(trials: int, probability: float) -> _Array:
    """Probabilities of 0..N successes, each within a few N roundings: products of ratios away from the mode."""
    mode = min(int((trials + 1) * probability), trials)
    up, down = np.arange(mode, trials), np.arange(mode, 0, -1)
    odds = probability / (1.0 - probability)
    above = np.cumprod((trials - up) / (up + 1.0) * odds)
    below = np.cumprod(down / (trials - down + 1.0) / odds)
    law = np.concatenate([below[::-1], [1.0], above])
    return np.asarray(law / law.sum(), dtype=np.float64)


def _killed_chain(law: _Array, n: int, x: int) -> tuple[_Array, _Array]:
    """Q (x + 1, x + 1) and the probability (x + 1,) of exceeding x in one cycle, from each state."""
    states = np.arange(x + 1)
    step = states[None, :] - states[:, None]
    padded = np.zeros(max(len(law), n + x + 2) + x)  # law at index y + x: y runs from −x
    padded[x : x + len(law)] = law
    matrix = padded[step + n + x] + np.where(states[None, :] < n, padded[step + x], 0.0)
    # Left behind above x: Y ≥ n + x + 1 − v; and, while x < n − 1, too few to be taken: x − v < Y < n − v.
    at_least = np.append(np.cumsum(law[::-1])[::-1], 0.0)  # summed from the small end
    killed = at_least[np.minimum(n + x + 1 - states, len(law))]
    if x < n - 1:
        killed += np.array([law[x + 1 - v : n - v].sum() for v in states])
    return matrix, killed


def _killed_within(matrix: _Array, killed: _Array, cycles: int) -> float:
    """Probability of being killed within `cycles` steps, starting from state 0."""
    power, killed_power = matrix, killed  # Q^(2^k) and a_(2^k)
    law: _Array | None = None  # ν, once the rows of Q^(2^k) are proportional
    total = np.zeros_like(killed)  # a of the steps counted so far
    while cycles:
        survive = 1.0 - killed_power
        if law is None:
            sums = power.sum(axis=1)
            power = power * (survive / np.where(sums > 0.0, sums, 1.0))[:, None]
            law = _common_row(power)
        if cycles & 1:
            total = killed_power + (power @ total if law is None else survive * (law @ total))
        if law is None:
            killed_power = killed_power + power @ killed_power
            power = power @ power
        else:
            killed_power = killed_power + survive * (law @ killed_power)
        killed_power = np.minimum(killed_power, 1.0)
        cycles >>= 1
    return float(min(total[0], 1.0))


def _common_row(matrix: _Array) -> _Array | None:
    """The law all rows are proportional to, or None while they differ."""
    sums = matrix.sum(axis=1)
    if np.any(sums <= 0.0):
        return None
    row = matrix[0] / sums[0]
    if np.all(np.abs(matrix / sums[:, None] - row) <= _PROPORTIONAL * row):
        return np.asarray(row, dtype=np.float64)
    return None
