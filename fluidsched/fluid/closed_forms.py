"""The fluid program's answers that need no solver.

Let ρ_i = Σ λ_j w_j^(i) be the seconds of busy work of piece i that arrive per second, c_i its base, and
let D_r be the use of resource r that arrives per second out of K_r per iteration (KV memory: D = Σ λ_j
W_j, K = C; batch size: Σ λ_j S_j and B; token budget: Σ λ_j τ_j and N). All demand is admitted by an
iteration time β iff

    c_i + ρ_i β ≤ β for every piece,        β D_r ≤ K_r for every resource;

the equilibrium is the smallest such β. With one piece it is c/(1 − ρ), and mean resident KV is β Σ λ_j
W_j.

Scaling all rates by x and eliminating β leaves conditions linear in x, one for each way two constraints
can meet:

    time and resource r:      x ( ρ_i + c_i D_r/K_r ) ≤ 1                     c_i > 0
    time alone:               x ρ_i ≤ 1                                       c_i ≥ 0
                              x ( |c_n| ρ_i + c_i ρ_n ) ≤ c_i + |c_n|         c_n < 0 < c_i

so the *load* of a resource, 1/(the largest x), is a maximum of finitely many numbers (`resource_load`).
With one piece the load of memory is Σ λ_j κ_j / C with κ_j = c W_j + C w_j, and with time and memory only
the optimum in overload is a fractional knapsack: serve types by decreasing r_j/κ_j (`knapsack`).

Source: Ao, Luo, Simchi-Levi, Wang (arXiv 2504.11320) for the underloaded paper's model; the rest is
derived here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched.errors import InputError

__all__ = ["Equilibrium", "boundary_rate", "equilibrium", "knapsack", "resource_load", "unlimited_rate"]


class Equilibrium(NamedTuple):
    """Equilibrium with all demand admitted, elementwise.

    Attributes
    ----------
    iteration_time : ndarray
        Smallest feasible mean iteration time β, s; inf where time alone forbids one.
    resident_kv : ndarray
        β Σ λ_j W_j, tokens; inf likewise (0 without demand).
    is_feasible : ndarray of bool
        Whether an iteration time exists and the memory suffices for it.
    """

    iteration_time: NDArray[np.float64]
    resident_kv: NDArray[np.float64]
    is_feasible: NDArray[np.bool_]


def equilibrium(
    base: ArrayLike, busy: ArrayLike, kv_demand: ArrayLike, kv_capacity: ArrayLike = np.inf
) -> Equilibrium:
    """Return the equilibrium that admits all demand, time and memory only.

    Parameters
    ----------
    base : array_like of shape (I,)
        c_i, s.
    busy : array_like of shape (..., I)
        ρ_i = Σ λ_j w_j^(i), s per s.
    kv_demand : array_like of shape (...)
        Σ λ_j W_j, token·iterations per s.
    kv_capacity : array_like, optional
        C, tokens; broadcasts.

    Examples
    --------
    One piece: 0.01/(1 − 0.5) s and 0.02 s · 1e6 tokens/s.

    >>> beta, resident, feasible = equilibrium([0.01], [0.5], 1e6, 30_000)
    >>> float(beta), float(resident), bool(feasible)
    (0.02, 20000.0, True)
    """
    base = np.asarray(base, dtype=np.float64)
    busy = np.asarray(busy, dtype=np.float64)
    kv_demand = np.asarray(kv_demand, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = base / (1.0 - busy)
    # c + ρβ ≤ β: a lower bound on β while ρ < 1, impossible for c > 0 beyond, an upper bound for c < 0
    # beyond.
    lower = np.where(busy < 1.0, crossing, np.where(base > 0.0, np.inf, 0.0))
    lower = np.where((base == 0.0) & (busy > 1.0), np.inf, lower).max(axis=-1)
    upper = np.where((busy > 1.0) & (base < 0.0), crossing, np.inf).min(axis=-1)
    iteration_time = np.where(lower <= upper, lower, np.inf)
    with np.errstate(invalid="ignore"):
        resident = np.where(kv_demand == 0.0, 0.0, iteration_time * kv_demand)
    feasible = np.isfinite(iteration_time) & (resident <= kv_capacity)
    return Equilibrium(iteration_time, resident, feasible)


def resource_load(
    base: ArrayLike, busy: ArrayLike, demand_per_capacity: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Return the load of one resource together with time: 1/(largest factor on all rates that both allow).

    Parameters
    ----------
    base : array_like of shape (I,)
        c_i, s; the largest positive.
    busy : array_like of shape (..., I)
        ρ_i, s per s.
    demand_per_capacity : array_like of shape (...), optional
        D_r/K_r, 1/s. Default: no other resource, time alone.

    Examples
    --------
    >>> float(resource_load([0.01], [0.5]))
    0.5
    >>> float(resource_load([0.01], [0.5], 30.0))
    0.8
    """
    base = np.asarray(base, dtype=np.float64)
    busy = np.asarray(busy, dtype=np.float64)
    positive, negative = base > 0.0, base < 0.0
    relative = np.zeros(()) if demand_per_capacity is None else np.asarray(demand_per_capacity)
    load = (busy[..., positive] + base[positive] * relative[..., None]).max(axis=-1)
    if np.any(base == 0.0):
        load = np.maximum(load, busy[..., base == 0.0].max(axis=-1))
    if np.any(negative):
        c_i, c_n = base[positive], -base[negative, None]
        crossing = c_n * busy[..., None, positive] + c_i * busy[..., negative][..., None]
        load = np.maximum(load, (crossing / (c_i + c_n)).max(axis=(-2, -1)))
    return np.asarray(load, dtype=np.float64)


def boundary_rate(
    base: ArrayLike, busy: ArrayLike, kv_work: ArrayLike, kv_capacity: ArrayLike
) -> NDArray[np.float64]:
    """Return r_C, the largest total rate of a mix that time and memory carry, req/s.

    With one piece this is C / Σ f_j κ_j.

    Parameters
    ----------
    base : array_like of shape (I,)
        c_i, s.
    busy : array_like of shape (..., I)
        Σ f_j w_j^(i) of the mix f, Σ f_j = 1: s per request.
    kv_work : array_like of shape (...)
        Σ f_j W_j, token·iterations per request.
    kv_capacity : array_like of shape (...)
        C, tokens.

    Examples
    --------
    >>> float(boundary_rate([0.01], [0.1], 1e5, 1e4))
    5.0
    """
    relative = np.asarray(kv_work, dtype=np.float64) / np.asarray(kv_capacity, dtype=np.float64)
    return np.asarray(1.0 / resource_load(base, busy, relative))


def unlimited_rate(base: ArrayLike, busy: ArrayLike) -> NDArray[np.float64]:
    """Return r_∞, the largest total rate of a mix with unlimited memory, req/s; arguments as `boundary_rate`.

    Examples
    --------
    >>> float(unlimited_rate([0.01], [0.1]))
    10.0
    """
    return np.asarray(1.0 / resource_load(base, busy))


def knapsack(
    reward: ArrayLike, kappa: ArrayLike, arrival_rate: ArrayLike, kv_capacity: float
) -> NDArray[np.float64]:
    """Return the optimal admitted rates with one piece, time and memory: Σ a_j κ_j ≤ C filled greedily.

    Parameters
    ----------
    reward : array_like of shape (J,)
        Reward of a request, non-negative.
    kappa : array_like of shape (J,)
        κ_j = c W_j + C w_j, token·s.
    arrival_rate : array_like of shape (J,)
        Offered rates, req/s.
    kv_capacity : float
        C, tokens, finite.

    Returns
    -------
    ndarray of shape (J,)
        Types in decreasing r_j/κ_j (ties: in the order given) are admitted in full while capacity lasts,
        one is rationed, the rest refused.

    Examples
    --------
    >>> knapsack([1, 1], [10, 20], [3, 3], kv_capacity=60).tolist()
    [3.0, 1.5]
    """
    reward, kappa, rate = (np.asarray(x, dtype=np.float64) for x in (reward, kappa, arrival_rate))
    if not np.isfinite(kv_capacity):
        raise InputError("kv_capacity", kv_capacity, "be finite", "With unlimited memory κ is not defined.")
    order = np.argsort(-reward / kappa, kind="stable")
    use = kappa[order] * rate[order]
    left = np.maximum(kv_capacity - np.concatenate([[0.0], np.cumsum(use)[:-1]]), 0.0)
    admitted = np.empty_like(rate)
    admitted[order] = np.minimum(rate[order], left / kappa[order])
    return admitted
