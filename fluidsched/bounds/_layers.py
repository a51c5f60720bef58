r"""Compiled layered search for the hindsight optimum: dynamic programming over rounds, cut to a beam of states.

A state at round t is the set of requests started and what these will hold from t on. Prices π on memory give every
state a lower bound f on the total latency of whatever follows from it: f begins at L(π), and each decision adds what
it costs beyond the best the bound had assumed,

    starting a request of class c at t          cost_c(t) − best_c(t)
    leaving one that could start at t waiting   best_c(t + 1) − best_c(t)
    memory left unused in round t               π_t (C − used),

with cost_c(t) = t + Σ_k π_{t+k} held_{c,k} and best_c(t) = min_{s≥t} cost_c(s). When all have started, f is the total
latency. States whose f leaves no room for an improvement are discarded: that is part of a proof. States beyond the
width are dropped, those with the largest f plus a penalty for memory left open in the next rounds: that is not, and the
least f among them is returned. If nothing was dropped the search is exact.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

__all__ = ["first_fit", "search"]

_Int = npt.NDArray[np.int64]
_Real = npt.NDArray[np.float64]


@numba.njit(cache=True)
def _place(order: Any, arrival: Any, kind: Any, held: Any, length: Any, capacity: float) -> Any:
    used = np.zeros(arrival.max() + length[kind].sum() + held.shape[1])
    start = np.zeros(len(arrival), dtype=np.int64)
    for i in order:
        c, t = kind[i], arrival[i]
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
    return start


def first_fit(arrival: _Int, kind: _Int, held: _Real, length: _Int, capacity: float) -> _Int:
    """Start rounds (N,) when each request, by (arrival, KV work), takes the first round at which it fits."""
    order = np.lexsort((np.arange(len(arrival)), held.sum(axis=1)[kind], arrival))
    return np.asarray(_place(order, arrival, kind, held, length, capacity))


@numba.njit(cache=True)
def _hash(started: Any, room: Any) -> Any:
    code = np.uint64(1469598103934665603)
    prime = np.uint64(1099511628211)
    for value in started:
        code = (code ^ np.uint64(value)) * prime
    for amount in room:
        code = (code ^ np.uint64(int(amount))) * prime
    return code


@numba.njit(cache=True)
def _search(
    first: Any,
    last: Any,
    arrival: Any,
    held: Any,
    length: Any,
    capacity: float,
    price: Any,
    cost: Any,
    best: Any,
    bound: float,
    ceiling: float,
    width: int,
    weight: float,
    decay: float,
) -> Any:
    classes, requests, longest = len(length), len(arrival), held.shape[1]
    rounds, places = cost.shape[1] - 1, 4 * width
    started = np.zeros((places, classes), np.int32)
    used = np.zeros((places, longest))  # from the current round on
    start = np.zeros((places, requests), np.int32)
    f, rank, here = np.zeros(places), np.zeros(places), np.zeros(classes, np.int64)
    codes, kept = np.zeros(places, np.uint64), np.zeros(places, np.bool_)
    found = np.full(requests, -1, np.int32)
    f[0], states, dropped = bound, 1, np.inf
    after = np.zeros(rounds + 1)  # price of all memory from a round on
    for t in range(rounds - 1, -1, -1):
        after[t] = after[t + 1] + price[t] * capacity
    for t in range(rounds):
        for c in range(classes):
            while first[c] + here[c] < last[c] and arrival[first[c] + here[c]] <= t:
                here[c] += 1
        skip = best[:, t + 1] - best[:, t]
        for c in np.argsort(-skip):  # where waiting costs most first: bounds separate early
            if here[c] == 0:
                continue
            excess, parents = cost[c, t] - best[c, t], states
            for i in range(parents):
                waiting, base = here[c] - started[i, c], f[i]
                for q in range(1, waiting + 1):
                    fits = base + q * excess < ceiling
                    for k in range(length[c]):
                        if used[i, k] + q * held[c, k] > capacity:
                            fits = False
                            break
                    if not fits:
                        break
                    value = base + q * excess + (waiting - q) * skip[c]
                    if value >= ceiling:
                        continue
                    if states == places:
                        dropped = min(dropped, value)
                        continue
                    started[states], used[states], start[states] = started[i], used[i], start[i]
                    for z in range(q):
                        start[states, first[c] + started[i, c] + z] = t
                    started[states, c] += q
                    for k in range(length[c]):
                        used[states, k] += q * held[c, k]
                    f[states] = value
                    states += 1
                f[i] = base + waiting * skip[c]
            limit = np.inf
            if states > 2 * width:
                for i in range(states):
                    rank[i] = _rank(f[i], used[i], price, t, capacity, weight, decay)
                limit = np.partition(rank[:states], width)[width]
            count = 0
            for i in range(states):
                if f[i] >= ceiling:
                    continue
                if limit < np.inf and rank[i] >= limit:
                    dropped = min(dropped, f[i])
                    continue
                if count < i:
                    started[count], used[count], start[count] = started[i], used[i], start[i]
                    f[count] = f[i]
                count += 1
            states = count
        # The round ends: its unused memory is paid for, and what is left moves up.
        count = 0
        for i in range(states):
            value = f[i] + price[t] * (capacity - used[i, 0])
            if value >= ceiling:
                continue
            started[count], start[count] = started[i], start[i]
            for k in range(longest - 1):
                used[count, k] = used[i, k + 1]
            used[count, longest - 1] = 0.0
            f[count] = value
            if started[count].sum() < requests:
                codes[count] = _hash(started[count], used[count])
                count += 1
                continue
            value += after[t + 1]
            for k in range(min(longest, rounds - t - 1)):
                value -= price[t + 1 + k] * used[count, k]
            if value < ceiling:
                ceiling = np.rint(value) - 1.0 + (ceiling - np.floor(ceiling))  # whole rounds: improve by one
                found[:] = start[count]
        states = count
        if states == 0:
            break
        # Equal states: the cheapest stands for all.
        kept[:states] = True
        order = np.argsort(codes[:states])
        head = 0
        for place in range(1, states):
            i, j = order[head], order[place]
            if codes[i] != codes[j]:
                head = place
            elif np.all(started[i] == started[j]) and np.all(used[i] == used[j]):
                if f[j] < f[i]:
                    kept[i], head = False, place
                else:
                    kept[j] = False
        limit = np.inf
        if kept[:states].sum() > width:
            for i in range(states):
                rank[i] = _rank(f[i], used[i], price, t + 1, capacity, weight, decay)
            limit = np.partition(rank[:states][kept[:states]], width)[width]
        count = 0
        for i in range(states):
            if not kept[i]:
                continue
            if limit < np.inf and rank[i] >= limit:
                dropped = min(dropped, f[i])
                continue
            if count < i:
                started[count], used[count], start[count] = started[i], used[i], start[i]
                f[count] = f[i]
            count += 1
        states = count
    return found, dropped


@numba.njit(cache=True)
def _rank(f: float, used: Any, price: Any, t: int, capacity: float, weight: float, decay: float) -> float:
    """f plus the price of memory open in the coming rounds, later ones counting less: it may still be filled."""
    for k in range(min(len(used), len(price) - t)):
        f += weight * price[t + k] * (capacity - used[k])
        weight *= decay
    return f


def search(
    arrival: _Int,
    kind: _Int,
    held: _Real,
    length: _Int,
    capacity: float,
    price: _Real,
    cost: _Real,
    best: _Real,
    bound: float,
    ceiling: float,
    width: int,
    weight: float,
    decay: float,
) -> tuple[_Int | None, float]:
    """Best schedule below a ceiling that the beam meets, and the least bound among the states it dropped.

    Parameters
    ----------
    arrival, kind : (N,)
        Round and class of each request.
    held : (K, longest)
        KV held in each iteration of a request of the class.
    length : (K,)
        Iterations.
    capacity : float
    price : (T,)
        π, zero at the end.
    cost, best : (K, T + 1)
        cost_c(t), best_c(t).
    bound : float
        L(π), rounds.
    ceiling : float
        Only states with f below it are kept: a little above the largest total latency of interest.
    width : int
        States kept per round.
    weight, decay : float
        Of the ranking's penalty for open memory: weight · decay^k in the k-th round ahead.

    Returns
    -------
    start : (N,) or None
        Rounds, first come first within a class; None if no schedule below the ceiling was met.
    dropped : float
        Infinite if nothing was dropped: then the schedule is optimal, or there is none below the ceiling.
    """
    order = np.lexsort((arrival, kind))
    classes = np.arange(len(length))
    first = np.searchsorted(kind[order], classes)
    last = np.searchsorted(kind[order], classes, side="right")
    found, dropped = _search(
        first, last, arrival[order], held, length, capacity, price, cost, best, bound, ceiling, width, weight, decay
    )  # fmt: skip
    if found[0] < 0:
        return None, float(dropped)
    start = np.empty(len(order), dtype=np.int64)
    start[order] = found
    return start, float(dropped)
