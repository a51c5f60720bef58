r"""Rates that may be wrong: what a table needs to keep up with every rate in a box, or in a budgeted box.

**Uncertainty.** The rate of type j is a_j (1 + e_j), and all that is known of the errors is

    |e_j| ≤ d_j,        Σ_j |e_j| / d_j ≤ Γ.

Γ ≥ A, the number of types: a box, everything may be wrong at once. Smaller Γ: about Γ types may be wrong as
far as they can (Bertsimas, Sim, *The price of robustness*, Operations Research 52, 2004). Memory bounds of WAIT
and gated tables hold whatever arrives; only keeping up depends on rates, and only rates above a_j hurt.

**Keeping up at other rates.** Let T(x) be the mean cycle when x_j requests of type j enter per cycle (a block; an
iteration of a gated table), n the table's most (n_j; n_j / k_j), and v_j ≥ 0 a slope that T has at least: the
smallest of its pieces. For 0 ≤ x ≤ n, whatever the law of x,

    T(x) ≤ B + Σ_j v_j x_j,        B = T(n) − Σ_j v_j n_j

(one piece: B is the base, with equality). Suppose that for given rates a

    n_j (1 − Σ_i a_i v_i) > a_j B        for all j.                                          (*)

Then the fluid drains. Take B + Σ v x for T, which only slows the server. While the types of a set Q have queues,
they enter at n_j per cycle and the others at a_i per second, so a cycle lasts

    T_Q = (B + Σ_{j∈Q} n_j v_j) / (1 − Σ_{i∉Q} a_i v_i)  >  B / (1 − Σ_i a_i v_i)        by (*),

and the work v that leaves their queues in it, Σ_Q n_j v_j = T_Q (1 − Σ_{i∉Q} a_i v_i) − B, exceeds what enters,
T_Q Σ_Q a_j v_j, by T_Q (1 − Σ_i a_i v_i) − B > 0. The usual condition
a_j T(n) < n_j implies (*), and not the other way around: the cycle in which every type is full need not be
repeated for ever.

**Worst case.** For fixed n, (*) is linear in the errors: with π_i = d_i a_i v_i and y_j = a_j B / n_j it reads

    y_j + max { Σ_i u_i π_i + u_j d_j y_j : 0 ≤ u ≤ 1, Σ u ≤ Γ } ≤ 1 − Σ_i a_i v_i.

The maximum is reached with u_j ∈ {0, frac Γ, min(1, Γ)} and the rest of Γ on the largest of the other π, a sum
called Q_j(Γ − u_j). So (*) holds for all errors iff a_j B / n_j ≤ x_j,

    x_j = min over u of ( 1 − Σ_i a_i v_i − u π_j − Q_j(Γ − u) ) / (1 + u d_j),

that is n_j ≥ (a_j / x_j) B: the same kind of condition as at known rates, with *protected rates* a_j / x_j, and B
in place of T. It is monotone in n, so the smallest thresholds are climbed to as before.

**A cap** sees rates in its load and in the mix of its residents. Load: with u_il = w_il + c0_i S_l / N the
multiple carried is 1 / (Σ_l a_l u_il + the Γ largest of d_l a_l u_il). Mix: one resident holds κ̄ + z σ / √N, a
concave function of its first two moments, which move over a convex set; each of its tangents, maximised over the
errors by Dinkelbach's iteration, is an upper bound, and tangents at the maximisers lead to the largest value. The tail
of the actual law: at one θ, Chernoff's bound grows with E e^{θX} of a resident, which is such a ratio, too, so the same
iteration finds the mix in which it is largest, and a bound for all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_real
from fluidsched.errors import InputError

__all__ = ["checked_budget", "checked_errors", "largest_kv", "largest_ratio", "protected_rates", "top_sum"]

FloatArray = NDArray[np.float64]
TANGENTS = 50  # most tangents of the resident's KV; a few suffice
CLOSE = 1e-9  # relative difference of bound and value at which they stop


def checked_errors(rate_error: Any, types: int) -> FloatArray | None:
    """Errors d, (J,), from a number or one per type; None where all are 0."""
    try:
        errors = np.array(rate_error, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError("rate_error", rate_error, "be a number, or one per type") from None
    if errors.ndim == 0:
        errors = np.full(types, float(errors))
    if errors.shape != (types,):
        raise InputError("rate_error", f"shape {errors.shape}", f"be a number, or one per type, ({types},)")
    for j, error in enumerate(errors.tolist()):
        if not 0.0 <= error < 1.0:
            place = "rate_error" if np.ndim(rate_error) == 0 else f"rate_error[{j}]"
            raise InputError(place, error, "be a relative error in [0, 1)")
    return errors if errors.any() else None


def checked_budget(error_budget: Any, errors: FloatArray | None) -> float:
    """Γ; None stands for a box."""
    if error_budget is None:
        return math.inf
    if errors is None:
        raise InputError(
            "error_budget", error_budget, "come with rate_error > 0", "Without errors there is no budget."
        )
    return check_real("error_budget", error_budget, minimum=0.0)


def top_sum(values: FloatArray, budget: float) -> FloatArray:
    """Sum of the `budget` largest non-negative values along the last axis, a fraction of the last counted.

    Examples
    --------
    >>> float(top_sum(np.array([1.0, 4.0, 2.0]), 1.5))
    5.0
    """
    ordered = -np.sort(-values, axis=-1)
    share = np.clip(budget - np.arange(values.shape[-1]), 0.0, 1.0)
    return np.asarray(ordered @ share)


def protected_rates(rate: FloatArray, slope: FloatArray, errors: FloatArray, budget: float) -> FloatArray:
    """a_j / x_j of the module's text, (A,); infinite where no threshold keeps up with all errors.

    Parameters
    ----------
    rate, slope, errors : float64[A]
        a_j, requests/s; v_j, s; d_j.
    budget : float
        Γ.

    Examples
    --------
    >>> a, v, d = np.array([2.0, 1.0]), np.array([0.1, 0.2]), np.array([0.5, 0.5])
    >>> protected_rates(a, v, d, 2.0).round(6)           # box: 1.5 a / (1 - 0.6)
    array([7.5 , 3.75])
    >>> protected_rates(a, v, d, 1.0).round(6)           # one of them: 1.5 a / (1 - 0.5)
    array([6., 3.])
    """
    protection = errors * rate * slope
    budget = min(budget, float(len(rate)))
    order = np.argsort(-protection, kind="stable")
    rank = np.empty(len(rate), dtype=np.int64)
    rank[order] = np.arange(len(rate))
    sums = np.concatenate([[0.0], np.cumsum(protection[order])])
    positions = np.arange(len(sums), dtype=np.float64)

    def largest_of_others(number: float) -> FloatArray:
        """Q_j: the sum of the `number` largest without type j's own."""
        before = np.interp(number, positions, sums)
        beyond = np.interp(number + 1.0, positions, sums)
        return np.asarray(np.where(number <= rank, before, beyond - protection))

    idle = 1.0 - float(rate @ slope)
    most = np.full(len(rate), math.inf)
    for own in {0.0, budget - math.floor(budget), min(1.0, budget)}:
        if own > budget:
            continue
        room = (idle - own * protection - largest_of_others(budget - own)) / (1.0 + own * errors)
        most = np.minimum(most, room)
    with np.errstate(divide="ignore"):
        return np.asarray(np.where(most > 0.0, rate / most, math.inf))


def largest_ratio(
    weight: FloatArray, value: FloatArray, errors: FloatArray, budget: float
) -> tuple[float, FloatArray]:
    """max over the errors of Σ w_l (1 + e_l) c_l / Σ w_l (1 + e_l), and the weights w_l (1 + e_l) that reach it."""
    mix = weight
    ratio = float(weight @ value / weight.sum())
    while True:
        gain = weight * errors * np.abs(value - ratio)
        order = np.argsort(-gain, kind="stable")
        used = np.empty(len(weight))
        used[order] = np.clip(budget - np.arange(len(weight)), 0.0, 1.0)
        better = weight * (1.0 + used * errors * np.sign(value - ratio))
        reached = float(better @ value / better.sum())
        if reached <= ratio + 1e-14 * abs(ratio):
            return ratio, mix
        ratio, mix = reached, better


def largest_kv(
    weight: FloatArray,
    mean: FloatArray,
    square: FloatArray,
    deviations: float,
    errors: FloatArray,
    budget: float,
) -> float:
    """Upper bound, close to 1e-9, of mean + `deviations` · sd of one resident's KV over all mixes.

    Parameters
    ----------
    weight : float64[A]
        a_j S_j: how many residents are of type j.
    mean, square : float64[A]
        First and second moment of the KV of a resident of type j, tokens, tokens².
    deviations : float
        z / √N.
    errors, budget
        d_j and Γ.
    """
    value, mix = largest_ratio(weight, mean, errors, budget)
    if deviations == 0.0:
        return value
    bound, best = math.inf, -math.inf
    for _ in range(TANGENTS):
        share = mix / mix.sum()
        centre, second = float(share @ mean), float(share @ square)
        spread = math.sqrt(max(second - centre * centre, 1e-12 * second))
        best = max(best, centre + deviations * spread)
        # √(m₂ − m²) ≤ (m₂ − 2 m c + c² + s²) / (2s) for every c and s, with equality at c = m, s the sd
        slope = mean + deviations / (2.0 * spread) * (square - 2.0 * centre * mean)
        reached, corner = largest_ratio(weight, slope, errors, budget)
        bound = min(bound, reached + deviations / (2.0 * spread) * (centre * centre + spread * spread))
        if bound <= best * (1.0 + CLOSE):
            break
        mix = _between(share, corner / corner.sum(), mean, square, deviations)
    return bound


def _between(
    first: FloatArray, second: FloatArray, mean: FloatArray, square: FloatArray, deviations: float
) -> FloatArray:
    """The mix between two that holds most: golden section of a concave function."""

    def held(t: float) -> float:
        share = (1.0 - t) * first + t * second
        centre = float(share @ mean)
        return centre + deviations * math.sqrt(max(float(share @ square) - centre * centre, 0.0))

    low, high, golden = 0.0, 1.0, (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(60):
        a, b = high - golden * (high - low), low + golden * (high - low)
        if held(a) < held(b):
            low = a
        else:
            high = b
    t = (low + high) / 2.0
    return (1.0 - t) * first + t * second
