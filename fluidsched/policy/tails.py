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

**Far beyond the mean** no transform is evaluated: with parts of at most M tokens Bernstein's inequality,
P(S > C) ≤ exp(−t² / (2 Var S + 2Mt/3)), t = C − E S, follows from Chernoff's; where it is 0 in floating point, so is
that.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fluidsched.policy.problem import Problem, entry
from fluidsched.policy.profiles import FloatArray
from fluidsched.workload.lengths import IndependentLengths, JointLaw, LengthLaw

__all__ = [
    "Held",
    "Tail",
    "negligible",
    "overflow_entry",
    "resident_moments",
    "resident_transform",
    "sized",
    "tail_of",
]

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
VANISHED = -746.0  # e to this is 0 in floating point
STEPS = 30  # of the search for θ
TOGETHER = 8  # cells of which one logarithm is taken


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


class _Points(NamedTuple):
    """Points of the types' laws, type after type, the longest output of each first; N points, A types, L stages.

    Of a product law its outputs, with prompts of 0: E[e^{zp}] is a factor of all.
    """

    prompts: FloatArray  # (N,)
    longest: FloatArray  # (N,), the type's longest prompt; 0 for a product law
    weights: FloatArray
    products: list[tuple[slice, LengthLaw]]  # where, and the law of the prompts
    first: IntArray  # (A,), where a type's points begin
    beyond: IntArray  # (L, A), how many of a type's points have o > s
    gone: FloatArray  # (L, A), P(o ≤ s)


def _points_of(problem: Problem) -> _Points:
    if "points" not in problem.shared:
        problem.shared["points"] = _stacked(problem)
    points: _Points = problem.shared["points"]
    return points


def _stacked(problem: Problem) -> _Points:
    workload = problem.workload
    stack = workload.stacked_points
    parts = [(stack.law_of_point, stack.prompt_tokens, stack.output_tokens, stack.weights)]
    products: dict[int, LengthLaw] = {}
    for j in np.setdiff1d(np.arange(len(workload)), stack.law).tolist():
        law = workload.types[j].law
        if _is_product(law):
            products[j] = law.prompt
            outputs, weights = law.output.values, law.output.weights
            prompts = np.zeros_like(outputs)
        else:
            prompts, outputs, weights = law.atoms()
        parts.append((np.full(len(outputs), j), prompts, outputs, weights))
    all_kinds, all_prompts, all_outputs, all_weights = zip(*parts, strict=True)
    kind, outputs = np.concatenate(all_kinds), np.concatenate(all_outputs)
    order = np.lexsort((-outputs, kind))
    kind, outputs = kind[order], outputs[order]
    tokens = np.concatenate(all_prompts)[order].astype(np.float64)
    weights = np.concatenate(all_weights)[order].astype(np.float64)
    bounds = np.searchsorted(kind, np.arange(len(workload) + 1))
    stages = problem.mean_profile.stages
    cells = (outputs - 1) * len(workload) + kind
    number, mass = (
        np.bincount(cells, x, minlength=stages * len(workload)).reshape(stages, len(workload))
        for x in (None, weights)
    )
    longest = problem.workload.max_prompt_tokens.astype(np.float64)
    longest[list(products)] = 0.0
    below = np.zeros(mass.shape)
    np.cumsum(mass[:-1], axis=0, out=below[1:])
    return _Points(
        tokens,
        longest[kind],
        weights,
        [(slice(bounds[j], bounds[j + 1]), law) for j, law in products.items()],
        bounds[:-1],
        np.cumsum(number[::-1], axis=0)[::-1].astype(np.int64),
        below,
    )


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
        n_c; fast where equal ones lie together.
    """

    def __init__(
        self, problem: Problem, kind: IntArray, stage: IntArray, extra: int | IntArray, count: FloatArray
    ) -> None:
        points = _points_of(problem)
        self._points = points
        self._tokens, self._count = (stage + extra).astype(np.int64), count
        first, beyond = points.first[kind], points.beyond[stage, kind]
        self._first, self._last = first, first + beyond
        self._gone = points.gone[stage, kind]
        held = problem.workload.max_prompt_tokens[kind] + self._tokens
        self._top = np.where(beyond > 0, held, 0).astype(np.float64)  # most a resident of the cell holds
        self.largest = float(count @ self._top)
        # Cells of one count, a few at a time, are multiplied before a logarithm is taken of them.
        fresh = np.append(True, count[1:] != count[:-1])[: len(count)]
        since = np.arange(len(count))
        since -= np.maximum.accumulate(np.where(fresh, since, 0))
        self._groups = np.flatnonzero(since % TOGETHER == 0)
        self._group_count = count[self._groups]
        self._most_tokens = int(self._tokens.max(initial=0))
        self._line: _Line | None = None
        self._rooms: NDArray[np.complex128] | None = None

    def _on_line(self, real: float) -> _Line:
        """What the values at all z with this real part have in common."""
        if self._line is None or self._line.real != real:
            points = self._points  # all over e^{Re z most}, which alone may overflow
            decay = points.weights * np.exp(real * (points.prompts - points.longest))
            products = []
            for part, prompt in points.products:
                values = prompt.values.astype(np.float64)
                products.append((part, values, prompt.weights * np.exp(real * (values - values.max()))))
                decay[part] *= products[-1][2].sum()
            most = real * self._top
            gone = self._gone * np.exp(-most)
            value = gone + self._alive(decay, np.empty((2, len(gone))))
            scale = 1.0 / value
            self._line = _Line(
                real,
                float(self._count @ (np.log(value) + most)),
                decay,
                products,
                gone * scale,
                scale,
            )
        return self._line

    def _alive(self, points: NDArray[Any], rooms: NDArray[Any]) -> Any:
        """Sums over the points of each cell's type with o > s, in the first of two rooms (2, M)."""
        sums = np.append(np.zeros(1, points.dtype), np.cumsum(points))
        alive, before = rooms
        np.take(sums, self._last, out=alive, mode="clip")  # "clip": straight into the room
        np.take(sums, self._first, out=before, mode="clip")
        alive -= before
        return alive

    def __call__(self, z: Any) -> Any:
        """K(z), z real or complex; of several z with one real part in turn only the first costs more."""
        line = self._on_line(float(np.real(z)))
        if not np.iscomplexobj(z):
            return line.value
        turn = float(np.imag(z))
        points = line.points * _turned(turn * self._points.prompts)
        for part, values, weights in line.products:
            points[part] *= (weights @ _turned(turn * values)) / weights.sum()
        # Each cell over its value on the real axis: no factor is above 1, and where a product underflows so does e^K.
        if self._rooms is None:  # of its own: new ones for every z take longer than the sums
            self._rooms = np.empty((2, len(self._count)), dtype=np.complex128)
        factors, held = self._alive(points, self._rooms), self._rooms[1]
        shifts = _turned(turn * np.arange(self._most_tokens + 1.0))
        np.take(shifts, self._tokens, out=held, mode="clip")
        factors *= held
        factors *= line.scale
        factors += line.gone
        with np.errstate(divide="ignore"):
            return line.value + self._group_count @ np.log(np.multiply.reduceat(factors, self._groups))


def _turned(angle: FloatArray) -> NDArray[np.complex128]:
    """e^{i angle}."""
    result = np.empty(angle.shape, dtype=np.complex128)
    np.cos(angle, out=result.real)
    np.sin(angle, out=result.imag)
    return result


class _Line(NamedTuple):
    """Values of `Held` at the z of one real part.

    K on the real axis; the points' weights there, those of a product law's prompts; of every cell the share that is
    gone, and one over its transform.
    """

    real: float
    value: float
    points: FloatArray
    products: list[tuple[slice, FloatArray, FloatArray]]
    gone: FloatArray
    scale: FloatArray


class _ResidentPoints(NamedTuple):
    """Points of all types' laws, and the laws that are products of too many to write out, with their types."""

    kind: IntArray
    prompt: FloatArray
    output: FloatArray
    weight: FloatArray
    products: list[tuple[int, IndependentLengths]]
    most: float  # tokens of the longest request and one more


def _resident_points(problem: Problem) -> _ResidentPoints:
    stack, workload = problem.workload.stacked_points, problem.workload
    parts = [(stack.law_of_point, stack.prompt_tokens, stack.output_tokens, stack.weights)]
    products = []
    for j in np.setdiff1d(np.arange(len(workload)), stack.law).tolist():
        law = workload.types[j].law
        if _is_product(law):
            products.append((j, law))
        else:
            p, o, w = law.atoms()
            parts.append((np.full(len(p), j), p, o, w))
    kind, *points = (np.concatenate(part) for part in zip(*parts, strict=True))
    prompt, output, weight = (part.astype(np.float64) for part in points)
    most = float((workload.max_prompt_tokens + workload.max_output_tokens).max())
    return _ResidentPoints(kind, prompt, output, weight, products, most)


def _product_moment(law: IndependentLengths, z: Any, most: float) -> Any:
    """E[e^{zp}(e^{zo} − 1)] over e^{Re z most}."""
    real = np.real(z)
    p, o = (axis.values.astype(np.float64) for axis in (law.prompt, law.output))
    first = law.prompt.weights @ np.exp(z * p - real * p.max())
    second = law.output.weights @ (np.exp(z * o - real * o.max()) * -np.expm1(-z * o))
    return first * second * np.exp(real * (p.max() + o.max() - most))


def resident_moments(problem: Problem, theta: float) -> FloatArray:
    """E e^{θX} of the KV of a resident of each type at a random iteration, but for a common factor, (A,)."""
    points = _resident_points(problem)
    grown = np.exp(theta * (points.prompt + points.output - points.most)) * -np.expm1(-theta * points.output)
    moments = np.bincount(points.kind, points.weight * grown, len(problem.rate))
    for j, law in points.products:
        moments[j] += _product_moment(law, theta, points.most)
    return np.asarray(moments / problem.workload.iterations)


def resident_transform(problem: Problem) -> tuple[Callable[[Any], Any], float]:
    """log E e^{zX} of the KV of one resident at a random iteration, and the most it can hold, tokens."""
    kind, prompt, output, share, products, most = _resident_points(problem)
    weight = problem.rate[kind] * share
    total = float(problem.rate @ problem.workload.iterations)

    def transform(z: Any) -> Any:
        # e^{zp}(e^{zo} − 1) = e^{z(p + o)}(1 − e^{−zo}), over e^{z most} so that neither factor overflows.
        real = np.real(z)
        moment = weight @ (np.exp(z * (prompt + output) - real * most) * -np.expm1(-z * output))
        for j, law in products:
            moment = moment + problem.rate[j] * _product_moment(law, z, most)
        above = np.exp(z - real) * -np.expm1(-z) * total  # (e^z − 1) S, over e^{Re z}
        with np.errstate(divide="ignore"):  # it may be 0, as e^K then is
            return np.log(moment / above) + real * (most - 1.0) + z * problem.padding

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

    theta, lowest = _near_minimum(exponent, float(deviation), float(largest))
    if lowest > CERTAIN:
        return Tail(1.0, 1.0, theta)
    chernoff = math.exp(min(lowest, 0.0)) or sys.float_info.min
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


def negligible(level: float, mean: float, variance: float, most: float) -> Tail | None:
    """The tail where Bernstein's inequality alone says that its bound is 0 in floating point; else None.

    For a sum of independent parts of this mean and variance in all, none of them above `most`.
    """
    beyond = level - mean
    if (
        beyond <= 0.0
        or math.isinf(beyond)
        or beyond * beyond < -2.0 * VANISHED * (variance + most * beyond / 3.0)
    ):
        return None
    return Tail(sys.float_info.min, sys.float_info.min, beyond / (variance + most * beyond / 3.0))


def _near_minimum(
    exponent: Callable[[float], float], deviation: float, largest: float
) -> tuple[float, float]:
    """θ near the minimum of a convex function that is 0 at 0, and its value.

    Half a sd⁻¹ at least (the line must keep off 0), and no nearer than where e to the value is 0 in floating point.
    """
    least = 0.5 / deviation
    low, high = 0.0, min(1.0 / deviation, 600.0 / largest)
    value = exponent(high)
    for _ in range(STEPS):  # until the minimum lies below `high`
        if value < VANISHED and high >= least:
            return high, value
        wider = min(2.0 * high, 600.0)
        further = exponent(wider)
        if not further < value:
            high = wider
            break
        low, high, value = high / 2.0, wider, further
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    inner: list[tuple[float, float]] = []  # golden sections: one of the two serves the next interval, too
    for _ in range(STEPS):
        if high - low < 0.02 * high:
            break
        a, b = high - golden * (high - low), low + golden * (high - low)
        if not inner:
            inner = [(a, exponent(a)), (b, exponent(b))]
        elif inner[0][0] > (low + high) / 2.0:
            inner = [(a, exponent(a)), inner[0]]
        else:
            inner = [inner[0], (b, exponent(b))]
        if not inner[1][1] < inner[0][1]:
            high, inner = inner[1][0], inner[:1]
        else:
            low, inner = inner[0][0], inner[1:]
    theta = max((low + high) / 2.0, least)
    return theta, exponent(theta)


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
) -> tuple[Problem, Any, Tail | None]:
    """A plan whose actual overflow probability is at most δ, the problem with the z that it took, and its tail.

    The normal approximation is asked for δ times what it was off by, a little less each time. No tail where memory
    holds with certainty.
    """
    found = plan(problem)
    if problem.is_certain:
        return problem, found, None
    delta, asked = problem.overflow_probability, problem.overflow_probability
    while (reached := tail(problem, found)).probability > delta:
        asked *= 0.98 * delta / reached.probability
        problem = problem.asked_for(asked)
        found = plan(problem)
    return problem, found, reached
