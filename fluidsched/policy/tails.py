r"""The tail of the KV that independent residents hold, from the law of their lengths.

**Transform.** Resident c of n_c like it holds Y_c tokens, 0 if it is gone; the sum over residents, S, has

    K(z) = log E e^{zS} = Σ_c n_c log E e^{zY_c},

a finite sum: length laws have finitely many points. A resident of type j admitted s iterations ago holds p + s + e (e:
padding of paged memory, or −1 between iterations) if o > s, so E e^{zY} = P(o ≤ s) + e^{z(s + e)} E[e^{zp}; o > s]. One
under a cap, seen at a random iteration, is at each iteration of each request with the same weight:
E e^{zX} = Σ_j a_j E[e^{zp}(e^{zo} − 1)] / ((e^z − 1) Σ_j a_j E[o]).

**Bound.** Chernoff: P(S > C) ≤ e^{K(θ) − θ(C + 1)} for every θ ≥ 0, S being whole (C rounded down). θ is chosen near
the minimum; the bound holds for any.

**Value.** Along the line Re z = θ > 0 the tail of a whole-valued sum is

    P(S > C) = (1/2π) ∫_{−π}^{π} Re[ e^{K(θ+it) − (θ+it)(C+1)} / (1 − e^{−(θ+it)}) ] dt.

The trapezoidal rule with step h leaves out nothing but copies of the tail 2π/h tokens apart, damped by e^{−2πθ/h}; h is
taken small enough for e^{−30}. The sum ends at t = π, or where what is beyond is below 1e-12 of what was added: the
integrand has then decayed like the transform of a sum of many independent parts. So the relative error is about 1e-10,
down to probabilities of 1e-100, below which the bound stands for them; no normal approximation is made. Where C lies
far below the mean (a dozen standard deviations) the bound is 1 and stands, too: the integral would lose its digits.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fluidsched.policy.problem import Problem, entry
from fluidsched.policy.profiles import FloatArray
from fluidsched.workload.lengths import IndependentLengths, JointLaw

__all__ = ["Held", "Tail", "overflow_entry", "resident_transform", "sized", "tail_of"]

IntArray = NDArray[np.int64]
DAMPING = 30.0  # −log of what the trapezoidal rule's copies are damped by
NODES = 8  # of the trapezoidal rule at a time
MOST_NODES = 1 << 14
ENOUGH = 1e-12
NEGLIGIBLE = 1e-100  # a bound below stands for the probability; the integrand would soon underflow
CERTAIN = (
    9.0  # K(θ) − θ(C + 1) above: C lies so far below the mean that the bound, 1, stands for the probability
)
WRITTEN_OUT = 64  # points (p, o) of a product law up to which they are taken one by one
STEPS = 30  # of the search for θ


@dataclass(frozen=True)
class Tail:
    """P(S > C): the value, a bound by Chernoff's inequality, and the θ of both.

    Attributes
    ----------
    probability, chernoff : float
    theta : float
        Per token.
    """

    probability: float
    chernoff: float
    theta: float


def _is_product(law: JointLaw) -> TypeGuard[IndependentLengths]:
    """Whether a law is a product of too many points to write out."""
    if not isinstance(law, IndependentLengths):
        return False
    return len(law.prompt.values) * len(law.output.values) > WRITTEN_OUT


class Held:
    """KV of independent residents: n_c of them at stage s_c of type j_c, M cells in all.

    Parameters
    ----------
    problem : Problem
    kind : int64[M]
        Type j_c.
    stage : int64[M]
        s_c.
    extra : int64[M]
        Tokens beyond p + s_c, e of the module's text.
    count : float64[M]
        n_c.
    """

    def __init__(
        self, problem: Problem, kind: IntArray, stage: IntArray, extra: int, count: FloatArray
    ) -> None:
        self._tokens, self._count = (stage + extra).astype(np.float64), count
        prompts, weights, gone = [], [], np.empty(len(kind))
        position = 0
        self._products: list[tuple[slice, Any]] = []
        first = np.empty(len(kind), dtype=np.int64)
        last = np.empty(len(kind), dtype=np.int64)
        self.largest = 0.0
        self._top = np.zeros(len(kind))  # most a resident of the cell holds, 0 if all are gone
        longest = []  # prompt of the type, for each point
        for j, request_type in enumerate(problem.workload.types):
            mine = np.flatnonzero(kind == j)
            law = request_type.law
            if _is_product(law):  # E[e^{zp}] is a factor of all
                p, o, w = np.zeros_like(law.output.values), law.output.values, law.output.weights
                self._products.append((slice(position, position + len(o)), law.prompt))
            else:
                p, o, w = law.atoms()
            order = np.argsort(-o, kind="stable")
            prompts.append(p[order].astype(np.float64))
            weights.append(w[order])
            beyond = np.searchsorted(-o[order], -stage[mine])  # points with o > s
            first[mine], last[mine] = position, position + beyond
            gone[mine] = np.append(0.0, np.cumsum(w[order][::-1]))[len(o) - beyond]
            position += len(o)
            here = beyond > 0
            held = law.maximum_prompt + self._tokens[mine]
            self.largest += float((count[mine] * held)[here].sum())
            self._top[mine] = np.where(here, held, 0.0)
            longest.append(np.full(len(o), 0.0 if _is_product(law) else law.maximum_prompt))
        self._prompts, self._weights = np.concatenate(prompts), np.concatenate(weights)
        self._longest = np.concatenate(longest)
        self._first, self._last, self._gone = first, last, gone

    def cells(self, z: Any) -> NDArray[Any]:
        """log E e^{zY_c} times n_c, (M,); z real or complex."""
        real = np.real(z)  # all over e^{Re z most}, which alone may overflow
        points = self._weights * np.exp(z * self._prompts - real * self._longest)
        for part, prompt in self._products:
            values = prompt.values.astype(np.float64)
            points[part] *= prompt.weights @ np.exp(z * values - real * values.max())
        sums = np.append(0.0, np.cumsum(points))
        alive = sums[self._last] - sums[self._first]
        most = real * self._top
        held = np.exp(1j * np.imag(z) * self._tokens) if np.iscomplexobj(z) else 1.0
        return np.asarray(self._count * (np.log(self._gone * np.exp(-most) + held * alive) + most))

    def __call__(self, z: Any) -> Any:
        """K(z)."""
        return self.cells(z).sum()


def resident_transform(problem: Problem) -> tuple[Callable[[Any], Any], float]:
    """log E e^{zX} of the KV of one resident at a random iteration, and the most it can hold, tokens."""
    points, products = [], []
    for rate, request_type in zip(problem.rate.tolist(), problem.workload.types, strict=True):
        law = request_type.law
        if _is_product(law):
            products.append((rate, law))
        else:
            p, o, w = law.atoms()
            points.append((p, o, rate * w))
    prompt, output, weight = (
        (np.concatenate([*map(np.asarray, x)]).astype(np.float64) for x in zip(*points, strict=True))
        if points
        else (np.zeros(0),) * 3
    )
    total = float(problem.rate @ problem.workload.iterations)

    def transform(z: Any) -> Any:
        # e^{zp}(e^{zo} − 1) = e^{z(p + o)}(1 − e^{−zo}), over e^{z most} so that neither factor overflows.
        real = np.real(z)
        moment = weight @ (np.exp(z * (prompt + output) - real * most) * -np.expm1(-z * output))
        for rate, law in products:
            p, o = (axis.values.astype(np.float64) for axis in (law.prompt, law.output))
            first = law.prompt.weights @ np.exp(z * p - real * p.max())
            second = law.output.weights @ (np.exp(z * o - real * o.max()) * -np.expm1(-z * o))
            moment = moment + rate * first * second * np.exp(real * (p.max() + o.max() - most))
        above = np.exp(z - real) * -np.expm1(-z) * total  # (e^z − 1) S, over e^{Re z}
        return np.log(moment / above) + real * (most - 1.0) + z * problem.padding

    most = float(max(t.law.maximum_prompt + t.law.maximum_output for t in problem.workload.types))
    return transform, most - 1.0 + problem.padding


def tail_of(
    transform: Callable[[Any], Any], level: float, mean: float, deviation: float, largest: float
) -> Tail:
    """P(S > level) for a whole-valued sum S ≥ 0 with this log-transform, mean, standard deviation and maximum.

    Parameters
    ----------
    transform : callable
        K(z) for real and complex z.
    level : float
        C, tokens.
    mean, deviation : float
        Of S, tokens: where to look.
    largest : float
        S never exceeds it.

    Examples
    --------
    >>> tosses = tail_of(lambda z: 100 * np.log((1 + np.exp(z)) / 2), 60, 50.0, 5.0, 100.0)
    >>> round(tosses.probability, 8), tosses.chernoff > tosses.probability
    (0.0176001, True)
    """
    if not level < largest:
        return Tail(0.0, 0.0, math.inf)
    if deviation <= 0.0:
        certain = 1.0 if mean > level else 0.0
        return Tail(certain, certain, math.inf)
    beyond = math.floor(level) + 1.0

    def exponent(theta: float) -> float:
        return float(transform(theta)) - theta * beyond

    theta = _near_minimum(exponent, deviation, largest)
    if exponent(theta) > CERTAIN:
        return Tail(1.0, 1.0, theta)
    chernoff = math.exp(min(exponent(theta), 0.0)) or sys.float_info.min
    if chernoff < NEGLIGIBLE:
        return Tail(chernoff, chernoff, theta)
    step = min(2.0 * math.pi * theta / DAMPING, 0.5 / deviation, math.pi)
    intervals = math.ceil(math.pi / step)
    step = math.pi / intervals
    total, k = 0.0, 0
    while k <= min(intervals, MOST_NODES):
        t = step * np.arange(k, min(k + NODES, intervals + 1))
        z = theta + 1j * t
        values = np.array([np.exp(transform(x) - x * beyond) for x in z]) / -np.expm1(-z)
        weight = np.where((t == 0.0) | (np.arange(k, k + len(t)) == intervals), 0.5, 1.0)
        part = float((weight * values.real).sum())
        total += part
        if k and np.abs(values).sum() < ENOUGH * abs(total):
            break
        k += NODES
    else:
        if intervals > MOST_NODES:
            return Tail(chernoff, chernoff, theta)  # a transform that does not decay: the bound alone
    value = total * step / math.pi
    return Tail(min(max(value, 0.0), chernoff), chernoff, theta)


def _near_minimum(exponent: Callable[[float], float], deviation: float, largest: float) -> float:
    """θ near the minimum of a convex function that is 0 at 0, half a sd⁻¹ at least (the line must keep off 0)."""
    low, high = 0.0, min(1.0 / deviation, 600.0 / largest)
    value = exponent(high)
    for _ in range(STEPS):  # until the minimum lies below `high`
        wider = min(2.0 * high, 600.0)
        further = exponent(wider)
        if not further < value:
            high = wider
            break
        low, high, value = high / 2.0, wider, further
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(STEPS):
        if high - low < 0.02 * high:
            break
        a, b = high - golden * (high - low), low + golden * (high - low)
        at_a, at_b = exponent(a), exponent(b)
        if not at_b < at_a:
            high = b
        else:
            low = a
    return max((low + high) / 2.0, 0.5 / deviation)


def overflow_entry(problem: Problem, tail: Tail | None, assuming: str) -> dict[str, Any]:
    """The certificate's line on overflow: the tail of the actual law, or 0 where every length is accounted for."""
    if tail is None:
        return entry(0.0, "per iteration", "0: every length is accounted for", "certain")
    return entry(
        tail.probability,
        "per iteration",
        f"P(KV > C) from the law of the lengths, {assuming}: (1/2π) ∫ Re e^(K(z) − z(C + 1)) / (1 − e^(−z)) dt",
        "probability",
        target=problem.overflow_probability,
        chernoff=tail.chernoff,
        holds_for="independent requests of the types' laws",
    )


def sized(
    problem: Problem, plan: Callable[[Problem], Any], tail: Callable[[Problem, Any], Tail]
) -> tuple[Problem, Any]:
    """A plan whose actual overflow probability is at most δ, and the problem with the z that it took.

    The normal approximation is asked for δ times what it was off by, a little less each time.
    """
    found = plan(problem)
    if problem.is_certain or math.isinf(problem.capacity):
        return problem, found
    delta, asked = problem.overflow_probability, problem.overflow_probability
    while (reached := tail(problem, found).probability) > delta:
        asked *= 0.98 * delta / reached
        problem = problem.asked_for(asked)
        found = plan(problem)
    return problem, found
