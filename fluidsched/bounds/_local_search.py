"""Compiled search for a good schedule: serial placement of an order of requests, annealed over orders."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

__all__ = ["anneal"]

_Int = npt.NDArray[np.int64]


@numba.njit(cache=True)
def _place(
    order: Any, arrival: Any, kind: Any, held: Any, length: Any, capacity: float, used: Any, start: Any
) -> int:
    """Put each request of `order` at its first feasible round; return the total latency in rounds."""
    used[:] = 0.0
    total = 0
    for i in order:
        c = kind[i]
        t = arrival[i]
        k = length[c] - 1
        while k >= 0:
            if used[t + k] + held[c, k] > capacity:
                t += 1
                k = length[c] - 1
            else:
                k -= 1
        for k in range(length[c]):
            used[t + k] += held[c, k]
        start[i] = t
        total += t + length[c] - arrival[i]
    return total


@numba.njit(cache=True)
def _anneal(
    arrival: Any, kind: Any, held: Any, length: Any, capacity: float, order: Any, draws: Any, heat: float
) -> Any:
    """Metropolis over orders (swap, or move one request), cooled linearly to zero; the best starts found."""
    used = np.zeros(arrival.max() + length[kind].sum() + held.shape[1])
    start = np.zeros(len(arrival), dtype=np.int64)
    current = _place(order, arrival, kind, held, length, capacity, used, start)
    best, best_start = current, start.copy()
    n = len(order)
    for step in range(len(draws)):
        temperature = heat * (1.0 - step / len(draws))
        i, j = int(draws[step, 0] * n), int(draws[step, 1] * n)
        candidate = order.copy()
        if draws[step, 2] < 0.5:
            candidate[i], candidate[j] = order[j], order[i]
        else:
            moved = order[i]
            if i < j:
                candidate[i:j] = order[i + 1 : j + 1]
            else:
                candidate[j + 1 : i + 1] = order[j:i]
            candidate[j] = moved
        value = _place(candidate, arrival, kind, held, length, capacity, used, start)
        if value <= current or draws[step, 3] < math.exp((current - value) / max(temperature, 1e-12)):
            order, current = candidate, value
            if value < best:
                best, best_start = value, start.copy()
    return best_start


def anneal(
    arrival: _Int, kind: _Int, held: npt.NDArray[np.float64], length: _Int, capacity: float, steps: int
) -> _Int:
    """Start rounds of a good schedule without preemption.

    Parameters
    ----------
    arrival : (N,)
        Rounds.
    kind : (N,)
        Class of each request.
    held : (K, longest)
        KV held in each iteration of a request of the class.
    length : (K,)
        Iterations.
    capacity : float
    steps : int
        Orders tried; the draws are fixed by a seed, so equal inputs give equal schedules.
    """
    draws = np.random.default_rng(0).random((steps, 4))
    work = held.sum(axis=1)
    order = np.lexsort((np.arange(len(arrival)), work[kind], arrival))
    heat = 0.3 * float(length[kind].mean())  # rounds of latency; tuned on requests of 1 to 20 rounds
    return np.asarray(_anneal(arrival, kind, held, length, capacity, order, draws, heat))
