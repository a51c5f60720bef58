r"""The exact probability that a boundary queue exceeds a level within b cycles, and the exact buffer.

**System.** V' = V + Y − n·1{V + Y ≥ n}, Y ~ Binomial(N, p), V_0 = 0, as in `lundberg`. Kill the chain when
it first exceeds x. On the states 0..x that leaves a substochastic matrix with two bands,

    Q[v, w] = b(w − v)·1{w < n} + b(w − v + n),          b the probabilities of Y,

and the probability a(v) = 1 − Σ_w Q[v, w] of being killed at once, summed from the terms that leave.

**Long runs.** Let ν be the quasi-stationary law, νQ = λν, λ = 1 − ε. Survival of b cycles from 0 tends to cλ^b
with 1/c = Σ_v ν(v) h(v), h the right eigenvector with h(0) = 1: h(v) = E_v[λ^{−σ}; not killed], σ the cycles
until 0 is reached. With k(v) the probability to be killed before that and d = h − (1 − k),

    a_b = 1 − λ^b/(1 + g),          g = Σ_{v≥1} ν(v) (d(v) − k(v)),          d = ε(I − Q')^{−1}(1 − k + d),

Q' without state 0, d found by iteration: the two parts of g are sums of positive terms of the order of ε times
the queue's memory, and nothing is lost where a_b is small.

It holds once the queue has forgotten where it began. The time-reversed chain ν(v)Q[v, w]/(λν(w)) is stochastic,
and it averages the ratios μ_t(w)/(λ^t ν(w)), μ_t the law after t cycles, not normalised, once more in each
cycle: their spread D_t never grows. Cycles are stepped through until D_t^{b/t}, what it is expected to be after
b, is below e^{−40}, or to the end. Where the queue forgets slowly the stride is doubled now and then,

    a_{2c} = a_c + Q^c a_c,          Q^{2c} = Q^c Q^c,

rows of Q^c scaled to their known sums 1 − a_c, which keeps its error at a few roundings.

**The quasi-stationary law** is that of inverse iteration, ν ∝ ν(I − Q)^{−1}, which gains a factor of ε times
the queue's memory in each of two or three steps. I − Q is eliminated state by state from 1 up, state 0 last
(the order of Grassmann, Taksar and Heyman): pivots are probabilities to leave for above or for 0, none of them
small, and the last one, to be killed before the return to 0, is a sum of what kills. No step subtracts, so
small probabilities keep all their digits.

**Buffer.** The probability decreases in x and is at most δ at the Lundberg buffer. With the states up to x
eliminated, the row of state 0 holds the law of the first state above x on an excursion from 0: one elimination
gives the probability q_x that an excursion exceeds x for all x, and 1 − exp(−b q_x/E[excursion]) shows where to
look. Two neighbouring levels then settle it. Memory bounds need the queue *after* decisions. The base memory of
a table provides for n requests at a segment's first position; either n are being served there, or the segment
is paused and the n places stand empty. What waits beyond them is at most what a decision would leave."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fluidsched._checks import check_count, check_real
from fluidsched.errors import InputError
from fluidsched.queues.lundberg import _checked_boundary, lundberg_buffer

__all__ = ["exact_buffer", "first_passage_probability"]

_Array = npt.NDArray[np.float64]

_LARGEST_LEVEL = 5_000  # states of the chain, whose matrix is dense
_LARGEST_TRIALS = 10_000_000
_FORGOTTEN = 40.0  # −log of what is left of the start, relative, where the limit is taken
_CHECKED = 8  # steps between looks at the ratios
_STEPS_PER_SQUARING = 5  # a squaring costs about as much as a fifth as many steps as there are states
_ITERATIONS = 20  # of inverse iteration: one that needs more has no dominant law
_PRECISION = 1e-14  # relative change at which an iteration has converged
_RESIDUAL = 1e-12  # largest relative residual of a law that is taken


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
    Time O(x³), and O(x²) for each step until the queue has forgotten its start: for 1e9 cycles under 50 ms on one
    processor up to level 900 or so, 65 ms at 1 000 (N = 1 000, p = .3, n = 310). Within a few thousandths of
    criticality a queue forgets slowly, which takes .5 s at level 600 (n = 301) and more above.

    Examples
    --------
    >>> round(first_passage_probability(10, 0.3, 4, level=29, cycles=10**9), 6)
    0.00689
    >>> first_passage_probability(1, 0.25, 1, level=0, cycles=100)
    0.0
    """
    count, p, n = _checked_boundary(trials, probability, threshold)
    x = check_count("level", level, maximum=_LARGEST_LEVEL, remedy="Take lundberg_buffer's bound.")
    b = check_count("cycles", cycles)
    return _Chain(_binomial_law(count, p), n, x).exceeds(x, b)


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
    enough, short = math.floor(lundberg_buffer(count, p, n, b, delta)), -1
    if enough > _LARGEST_LEVEL:
        raise InputError(
            "threshold", n, f"need a buffer of at most {_LARGEST_LEVEL:,}", "Take lundberg_buffer's."
        )
    chain = _Chain(_binomial_law(count, p), n, enough)
    level, tries = chain.level(b, delta), 0
    while enough - short > 1:
        level = min(max(level, short + 1), enough - 1)
        if chain.exceeds(level, b) <= delta:
            enough = level
        else:
            short = level
        tries += 1
        if tries < 3:
            level += -1 if enough == level else 1
        else:
            level = (short + enough) // 2
    return enough


def _binomial_law(trials: int, probability: float) -> _Array:
    """Probabilities of 0..N successes, each within a few N roundings: products of ratios away from the mode."""
    if trials > _LARGEST_TRIALS:
        raise InputError("trials", trials, f"be at most {_LARGEST_TRIALS:,}")
    mode = min(int((trials + 1) * probability), trials)
    up, down = np.arange(mode, trials), np.arange(mode, 0, -1)
    odds = probability / (1.0 - probability)
    above = np.cumprod((trials - up) / (up + 1.0) * odds)
    below = np.cumprod(down / (trials - down + 1.0) / odds)
    law = np.concatenate([below[::-1], [1.0], above])
    return np.asarray(law / law.sum(), dtype=np.float64)


class _Chain:
    """The chain on the states 0..top, which those on fewer states are corners of, and I − Q eliminated."""

    def __init__(self, law: _Array, n: int, top: int) -> None:
        self._law, self._n = law, n
        self._from = np.append(np.cumsum(law[::-1])[::-1], 0.0)  # P(Y ≥ y), summed from the small end
        padded = np.zeros(max(len(law), n + top + 2) + top)  # law at index y + top: y runs from −top
        padded[top : top + len(law)] = law
        rows = np.lib.stride_tricks.sliding_window_view(padded, top + 1)
        self._matrix = rows[n : n + top + 1][::-1].copy()  # Q[v, w], V + Y ≥ n
        self._matrix[:, :n] += rows[: top + 1][::-1, :n]

    def _killed(self, x: int) -> _Array:
        """Probability of exceeding x in one cycle, from 0..x."""
        states = np.arange(x + 1)
        # Left behind above x: Y ≥ n + x + 1 − v; and, while x < n − 1, too few to be taken: x − v < Y < n − v.
        killed = self._from[np.minimum(self._n + x + 1 - states, len(self._law))]
        if x < self._n - 1:
            killed += np.array([self._law[x + 1 - v : self._n - v].sum() for v in states])
        return np.asarray(killed)

    @cached_property
    def _factors(self) -> _Array | None:
        """(I − Q)ᵀ on the states 1..top, L and U in one: columns are dominated by the diagonal, rows stay in place.

        None where rounding exchanged some all the same.
        """
        from scipy.linalg import lu_factor

        rest = -self._matrix[1:, 1:].T
        if rest.size == 0:  # which scipy 1.13 hands to LAPACK, and LAPACK refuses
            return np.asarray(rest)
        np.fill_diagonal(rest, 1.0 + rest.diagonal())
        factors, pivots = lu_factor(rest, overwrite_a=True, check_finite=False)
        return np.asarray(factors) if np.all(pivots == np.arange(len(pivots))) else None

    def exceeds(self, x: int, cycles: int) -> float:
        """Probability of exceeding x within `cycles`, from 0; x ≤ top."""
        killed = self._killed(x)
        if not killed.any():
            return 0.0
        matrix = self._matrix[: x + 1, : x + 1]
        limit = None if self._factors is None else _quasi_stationary(matrix, killed, self._factors[:x, :x])
        powers = [(matrix, killed)]  # Q^c and a_c for c = 1, 2, 4, …
        alive = np.zeros_like(killed)  # μ_t
        alive[0] = 1.0
        dead, done = 0.0, 0
        while True:
            power, killed_power = powers[-1]
            stride = 1 << (len(powers) - 1)
            for step in range(1, max(len(killed) // _STEPS_PER_SQUARING, 2 * _CHECKED) + 1):
                if done + stride > cycles:
                    break
                dead += float(alive @ killed_power)
                alive = alive @ power
                done += stride
                if step % _CHECKED:
                    continue
                if dead >= 1.0 - sys.float_info.epsilon:
                    return 1.0
                if limit is not None and limit.forgotten(alive, done, cycles):
                    return limit.killed_within(cycles)
            if done + 2 * stride > cycles:
                break
            killed_power = np.minimum(killed_power + power @ killed_power, 1.0)
            power = power @ power
            sums = power.sum(axis=1)
            power *= ((1.0 - killed_power) / np.where(sums > 0.0, sums, 1.0))[:, None]
            powers.append((power, killed_power))
        for i in range(len(powers) - 1, -1, -1):
            power, killed_power = powers[i]
            while done + (1 << i) <= cycles:
                dead += float(alive @ killed_power)
                alive = alive @ power
                done += 1 << i
        return min(dead, 1.0)

    def level(self, cycles: int, overflow_probability: float) -> int:
        """About the smallest level that is exceeded within `cycles` with probability at most δ; at most top."""
        top = len(self._matrix) - 1
        killed = self._killed(top)
        if top == 0 or not killed.any() or self._factors is None:
            return top
        lu = self._factors
        visits = _solve(lu, self._matrix[0, 1:], left=True)
        # lu holds L, with −L[w, v] the probability that w is the first state above v, and Uᵀ, the elimination of kills.
        from scipy.linalg import solve_triangular

        reached = solve_triangular(
            lu, self._matrix[0, 1:], lower=True, unit_diagonal=True, check_finite=False
        )
        beyond = solve_triangular(lu, killed[1:], trans=1, check_finite=False)
        above = np.cumsum(np.tril(-lu, -1)[::-1], axis=0)[::-1]  # [w, v]: from v first to w or above
        tail = np.tril(np.append(above[1:], np.zeros((1, top)), axis=0) + beyond)
        exceeds = killed[0] + np.append(np.cumsum(self._matrix[0, :0:-1])[::-1], 0.0)
        exceeds[1:] += tail @ reached  # q_x for x = 0..top
        rare = -np.expm1(-cycles * exceeds / (1.0 + visits.sum())) <= overflow_probability
        return int(np.argmax(rare)) if rare.any() else top


def _solve(lu: _Array, right: _Array, left: bool = False) -> _Array:
    """(I − Q')^{−1} r, or r (I − Q')^{−1}, from the elimination of its transpose."""
    from scipy.linalg import lu_solve

    pivots = np.arange(len(right), dtype=np.int32)
    return np.asarray(lu_solve((lu, pivots), right, trans=0 if left else 1, check_finite=False))


@dataclass(frozen=True)
class _Limit:
    """ν, ε and g of the module's text."""

    law: _Array
    rate: float
    gap: float

    def forgotten(self, alive: _Array, done: int, cycles: int) -> bool:
        """Whether the start will not be felt any more after `cycles`, `alive` being left after `done`."""
        ratio = alive / self.law
        spread = float(ratio.max() - ratio.min()) / float(ratio.max())
        return spread <= 0.0 or -math.log(spread) * cycles >= _FORGOTTEN * done

    def killed_within(self, cycles: int) -> float:
        """Of a queue that has forgotten where it began."""
        return min(max(-math.expm1(cycles * math.log1p(-self.rate) - math.log1p(self.gap)), 0.0), 1.0)


def _quasi_stationary(matrix: _Array, killed: _Array, lu: _Array) -> _Limit | None:
    """The limit; None where inverse iteration finds no positive law (states that do not communicate, underflow)."""
    if len(killed) == 1:
        return _Limit(np.ones(1), float(killed[0]), 0.0) if killed[0] < 1.0 else None
    home = _solve(lu, matrix[1:, 0])  # 1 − k
    away = _solve(lu, killed[1:])  # k
    visits = _solve(lu, matrix[0, 1:], left=True)  # before the return to 0
    killed_away = float(killed[0] + visits @ killed[1:])
    law = np.append(1.0, visits) / (1.0 + visits.sum())
    if not (killed_away > 0.0 and np.all(law > 0.0)):
        return None
    for _ in range(_ITERATIONS):
        first = (law[0] + law[1:] @ home) / killed_away
        after = np.append(first, _solve(lu, law[1:] + first * matrix[0, 1:], left=True))
        after /= after.sum()
        if not np.all(after > 0.0):
            return None
        change = float(np.abs(after / law - 1.0).max())
        law = after
        if change < _PRECISION:
            break
    rate = float(law @ killed)
    if rate >= 1.0 or np.abs((law @ matrix) / ((1.0 - rate) * law) - 1.0).max() > _RESIDUAL:
        return None
    more = np.zeros_like(home)  # d
    for _ in range(_ITERATIONS):
        before, more = more, rate * _solve(lu, home + more)
        if np.all(more - before <= _PRECISION * more):
            return _Limit(law, rate, float(law[1:] @ more - law[1:] @ away))
    return None
