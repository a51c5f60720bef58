r"""Memory prices of the hindsight relaxation, by an interior-point method that knows the program's structure.

With x_{c,t} the starts of class c at round t, time cut into spans (at every arrival of the class, and at least every
`_SPAN` rounds), y_{c,j} those who still wait after span j and s_t unused memory, the relaxation is

    min  Σ t x_{c,t} + H Σ_c y_{c,last}
    s.t. Σ_c Σ_k held_{c,k} x_{c,t−k} + s_t = C                                in every round
         Σ_{t in span j} x_{c,t} + y_{c,j} − y_{c,j−1} = arrivals of c in span j
         x, y, s ≥ 0.

A column meets consecutive rounds and one span, so with rows in order of time the normal equations A Θ Aᵀ of Mehrotra's
predictor–corrector steps are banded: each step costs rows × bandwidth², where a general solver finds no such order. The
prices are the duals of memory, and every prices give a bound: how well they are solved for decides how good it is, not
whether it holds.
"""

from __future__ import annotations

import time
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from fluidsched.errors import InputError

__all__ = ["memory_prices"]

_Int = npt.NDArray[np.int64]
_Real = npt.NDArray[np.float64]

_SPAN = 32  # rounds: shorter spans mean more rows, longer ones a wider band
_GAP = 1e-8  # relative, between primal and dual values
_STEPS = 200
_TO_THE_BOUNDARY = 0.995  # share of the way that a step goes
_MOST_ENTRIES = 3 * 10**8  # of the band, 8 bytes each
_LOST = 1e-30  # of the largest diagonal: a pivot that rounding has lost


def memory_prices(arrivals: _Real, held: _Real, length: _Int, capacity: float, time_limit: float) -> _Real:
    """Prices π (H,) of memory, at which L(π) is the value of the relaxation but for the tolerance.

    Parameters
    ----------
    arrivals : (K, H)
        Requests of each class that arrive in each round.
    held : (K, longest)
        KV held in each iteration of a request of the class.
    length : (K,)
        Iterations.
    capacity : float
    time_limit : float
        Seconds, after which the prices reached are returned.
    """
    deadline = time.monotonic() + time_limit
    program = _Columns(arrivals, held, length, capacity)
    with np.errstate(
        all="ignore"
    ):  # the last steps divide by slacks that vanish; what is not finite ends them
        return program.solve(deadline) / capacity


class _Columns:
    """The program in columns: those of x by (class, round), then y by (class, span), then s; rows in order of time."""

    def __init__(self, arrivals: _Real, held: _Real, length: _Int, capacity: float) -> None:
        classes, rounds = arrivals.shape
        first = np.array([int(np.flatnonzero(row)[0]) for row in arrivals])
        kinds = np.repeat(np.arange(classes), rounds - first)
        starts = np.concatenate([np.arange(a, rounds) for a in first])
        # Spans begin where the class arrives, and at multiples of `_SPAN` after its first arrival.
        begins = (arrivals > 0.0) | ((np.arange(rounds) % _SPAN == 0) & (np.arange(rounds) > first[:, None]))
        of_class, begin = np.nonzero(begins)
        span = np.cumsum(begins.ravel()).reshape(classes, rounds)[kinds, starts] - 1
        spans = len(begin)
        last = np.append(of_class[1:] != of_class[:-1], True)
        end = np.where(last, rounds, np.append(begin[1:], rounds))
        middle = np.concatenate([np.arange(rounds, dtype=np.float64), (begin + end - 1) / 2.0])
        place = np.empty(rounds + spans, dtype=np.int64)
        place[np.argsort(middle, kind="stable")] = np.arange(rounds + spans)
        self.memory, self.balance = place[:rounds], place[rounds:]  # positions of the rows
        self.kinds, self.starts, self.row = kinds, starts, self.balance[span]
        self.held, self.length = (
            held / capacity,
            length,
        )  # shares of the memory: the start takes all columns alike
        link = np.flatnonzero(~last)  # y of these spans goes on to the next
        self.before, self.after = self.balance[link], self.balance[link + 1]
        self.link = link
        self.cost = np.concatenate(
            [starts.astype(np.float64), np.where(last, float(rounds), 0.0), np.zeros(rounds)]
        )
        self.right = np.empty(rounds + spans)
        self.right[self.memory] = 1.0
        self.right[self.balance] = arrivals[of_class, begin]
        self.shape = (len(starts), spans, rounds)
        self.band = _bandwidth(kinds, starts, self.row, self.memory, length)
        if len(link):
            self.band = max(self.band, int(np.abs(self.before - self.after).max()))
        if self.band * len(self.right) > _MOST_ENTRIES:
            raise InputError(
                "path",
                f"{len(self.right):,} equations with a band of {self.band:,}",
                f"have at most {_MOST_ENTRIES:,} entries in the relaxation's equations",
                'Take hindsight_bound(method="combinatorial"), or a shorter path.',
            )

    def times(self, v: _Real) -> _Real:
        """A v."""
        x, y, s = np.split(v, np.cumsum(self.shape)[:-1])
        out = np.zeros(len(self.right))
        _multiply(out, x, self.kinds, self.starts, self.row, self.memory, self.held, self.length)
        out[self.balance] += y
        out[self.after] -= y[self.link]
        out[self.memory] += s
        return out

    def transposed(self, w: _Real) -> _Real:
        """Aᵀ w."""
        x = np.empty(self.shape[0])
        _transpose(x, w, self.kinds, self.starts, self.row, self.memory, self.held, self.length)
        y = w[self.balance].copy()
        y[self.link] -= w[self.after]
        return np.concatenate([x, y, w[self.memory]])

    def normal(self, theta: _Real) -> _Real:
        """A Θ Aᵀ: element (j, i) of the result (rows, band + 1) is its entry (j + i, j)."""
        x, y, s = np.split(theta, np.cumsum(self.shape)[:-1])
        out = np.zeros((len(self.right), self.band + 1))
        _form(out, x, self.kinds, self.starts, self.row, self.memory, self.held, self.length)
        out[self.balance, 0] += y
        out[self.after, 0] += y[self.link]
        low, high = np.minimum(self.before, self.after), np.maximum(self.before, self.after)
        np.subtract.at(out, (low, high - low), y[self.link])
        out[self.memory, 0] += s
        return out

    def solve(self, deadline: float) -> _Real:
        """Mehrotra's method from his starting point; the prices when the gap is closed or the time is up."""
        c, b = self.cost, self.right
        factor = self.normal(np.ones(len(c)))
        _factor(factor)
        v = self.transposed(_solved(factor, b))
        w = _solved(factor, self.times(c))
        z = c - self.transposed(w)
        v += max(-1.5 * float(v.min()), 0.0)
        z += max(-1.5 * float(z.min()), 0.0)
        product = float(v @ z)
        v, z = v + 0.5 * product / float(z.sum()), z + 0.5 * product / float(v.sum())
        for _ in range(_STEPS):
            primal, dual = self.times(v) - b, self.transposed(w) + z - c
            value, mu = float(c @ v), float(v @ z) / len(v)
            if abs(value - float(b @ w)) <= _GAP * (1.0 + abs(value)) and mu * len(v) <= _GAP * (
                1.0 + abs(value)
            ):
                break
            if time.monotonic() > deadline:
                break
            theta = v / z
            factor = self.normal(theta)
            _factor(factor)
            dv, _, dz = self._direction(factor, theta, v, primal, dual)
            ahead = float((v + _longest(v, dv) * dv) @ (z + _longest(z, dz) * dz)) / len(v)
            over = v + (dv * dz - (ahead / mu) ** 3 * mu) / z
            dv, dw, dz = self._direction(factor, theta, over, primal, dual)
            along = min(1.0, _TO_THE_BOUNDARY * _longest(v, dv))
            across = min(1.0, _TO_THE_BOUNDARY * _longest(z, dz))
            after = v + along * dv, w + across * dw, z + across * dz
            if not all(np.isfinite(part).all() for part in after):
                break
            v, w, z = after
        return np.asarray(np.maximum(-w[self.memory], 0.0))

    def _direction(
        self, factor: _Real, theta: _Real, over: _Real, primal: _Real, dual: _Real
    ) -> tuple[_Real, ...]:
        """Newton's step for the residuals; `over` is the complementarity to remove, divided by z."""
        dw = _solved(factor, self.times(over - theta * dual) - primal)
        dz = -dual - self.transposed(dw)
        return -over - theta * dz, dw, dz


def _longest(v: _Real, step: _Real) -> float:
    """The longest step that keeps v ≥ 0, at most 1 over the share that is then taken."""
    down = step < 0.0
    return (
        min(1.0 / _TO_THE_BOUNDARY, float((-v[down] / step[down]).min()))
        if down.any()
        else 1.0 / _TO_THE_BOUNDARY
    )


@numba.njit(cache=True)
def _bandwidth(kinds: Any, starts: Any, row: Any, memory: Any, length: Any) -> int:
    band = 0
    for i in range(len(kinds)):
        end = min(starts[i] + length[kinds[i]], len(memory)) - 1
        low = min(memory[starts[i]], row[i])
        band = max(band, max(memory[end], row[i]) - low)
    return band


@numba.njit(cache=True)
def _multiply(
    out: Any, x: Any, kinds: Any, starts: Any, row: Any, memory: Any, held: Any, length: Any
) -> None:
    for i in range(len(x)):
        out[row[i]] += x[i]
        for k in range(min(length[kinds[i]], len(memory) - starts[i])):
            out[memory[starts[i] + k]] += held[kinds[i], k] * x[i]


@numba.njit(cache=True)
def _transpose(
    out: Any, w: Any, kinds: Any, starts: Any, row: Any, memory: Any, held: Any, length: Any
) -> None:
    for i in range(len(out)):
        total = w[row[i]]
        for k in range(min(length[kinds[i]], len(memory) - starts[i])):
            total += held[kinds[i], k] * w[memory[starts[i] + k]]
        out[i] = total


@numba.njit(cache=True)
def _form(
    out: Any, theta: Any, kinds: Any, starts: Any, row: Any, memory: Any, held: Any, length: Any
) -> None:
    for i in range(len(theta)):
        c, t, r = kinds[i], starts[i], row[i]
        out[r, 0] += theta[i]
        served = min(length[c], len(memory) - t)
        for k in range(served):
            here, amount = memory[t + k], theta[i] * held[c, k]
            if here > r:
                out[r, here - r] += amount
            else:
                out[here, r - here] += amount
            for later in range(k, served):
                out[here, memory[t + later] - here] += amount * held[c, later]


@numba.njit(cache=True, fastmath={"contract"})
def _factor(a: Any) -> None:
    """Cholesky's factor in place, by panels of four columns.

    LAPACK's does the same on several threads, which spin for longer than they work at these bandwidths.
    """
    rows, width = a.shape
    lost = _LOST * a[:, 0].max()
    for first in range(0, rows, 4):
        for j in range(first, min(first + 4, rows)):
            for q in range(first, j):
                d = j - q
                if d < width:
                    f = a[q, d]
                    for i in range(width - d):
                        a[j, i] -= f * a[q, d + i]
            # A lost pivot becomes so large that the row takes no step.
            root = np.sqrt(a[j, 0]) if a[j, 0] > lost else 1e64
            a[j, 0] = root
            for i in range(1, width):
                a[j, i] /= root
        for r in range(first + 4, min(first + 3 + width, rows)):
            d = r - first
            f1 = a[first + 1, d - 1] if d - 1 < width else 0.0
            f2 = a[first + 2, d - 2] if d - 2 < width else 0.0
            f3 = a[first + 3, d - 3] if d - 3 < width else 0.0
            if d < width:
                f0 = a[first, d]
                for i in range(width - d):
                    a[r, i] -= (
                        f0 * a[first, d + i]
                        + f1 * a[first + 1, d - 1 + i]
                        + f2 * a[first + 2, d - 2 + i]
                        + f3 * a[first + 3, d - 3 + i]
                    )
            rest = max(width - d, 0)
            for i in range(rest, width - d + 1):
                a[r, i] -= f1 * a[first + 1, d - 1 + i]
            for i in range(rest, width - d + 2):
                a[r, i] -= f2 * a[first + 2, d - 2 + i]
            for i in range(rest, width - d + 3):
                a[r, i] -= f3 * a[first + 3, d - 3 + i]


@numba.njit(cache=True)
def _solved(factor: Any, right: Any) -> Any:
    """The solution for a right-hand side, from the factor."""
    rows, width = factor.shape
    out = right.copy()
    for j in range(rows):
        out[j] /= factor[j, 0]
        for i in range(1, min(width, rows - j)):
            out[j + i] -= factor[j, i] * out[j]
    for j in range(rows - 1, -1, -1):
        total = out[j]
        for i in range(1, min(width, rows - j)):
            total -= factor[j, i] * out[j + i]
        out[j] = total / factor[j, 0]
    return out
