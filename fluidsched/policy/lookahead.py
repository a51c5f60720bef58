r"""Compiling look-ahead admission: how much memory to keep free where the future is not known.

A look-ahead table admits while the KV *forecast* for the residents stays within C − h at every later iteration.
The compiler chooses the headroom h such that what is then held exceeds C with probability δ or less.

**Residents.** Seen at a random iteration, a resident is at stage s (it holds p + s tokens) with weight
a_j P_j(S > s) / Σ a_j E[S_j]; `x = s + u` is its stage u iterations later, if it is still there. Full memory holds
N = C/κ̄ of them, κ̄ the mean KV of one (`capped.resident_kv_law`).

**Law.** The table does not see types, so it knows one law of outputs for all, pooled with the admitted rates, cut into
m ≤ 16 slices of the same probability. A slice is represented by its root-mean-square length, which keeps the memory
a request takes over time, about o²/2 beyond its prompt. Having survived s stages, a request is expected to survive
to x with probability q̂ = (slices longer than x)/(slices longer than s), 0 where none is left. The forecast's error for
one resident is (p + x)(1{S > x} − q̂), with mean and variance, over residents and over what happens to them,

    b(u) = Σ_j a_j Σ_s (E[p + x; S > x] − q̂ E[p + x; S > s]) / Σ a_j E[S_j]
    v(u) = Σ_j a_j Σ_s ((1 − 2q̂) E[(p + x)²; S > x] + q̂² E[(p + x)²; S > s]) / Σ a_j E[S_j] − (…)²,

where (…)², the square of the mean, is left out to stay above. N independent residents then give the headroom

    h = max_u (N b(u) + z_δ sqrt(N v(u)))⁺,        z_δ the standard normal's (1 − δ)-quantile.

b is what the slices, refuted beliefs (requests that outlive the longest slice) and prompts that tell about outputs add;
with q̂ the true conditional law and outputs independent of prompts, b = 0 and N v is the variance of the future KV,

    V(u) = (C/κ̄) Σ_j a_j Σ_s E[(p + s + u)²] P(S > s + u)(1 − P(S > s + u)/P(S > s)) / Σ a_j E[S_j].

**Known.** With true lengths nothing is random: h = 0, and memory holds on every path. With predictions of a stated
error the same h, the forecast of a request of length o believed to be β long being (p + x) 1{x < β}. Its error is
p + x at x = β, …, o − 1 if β < o (a belief outlived is replaced by "gone after the next token", so this covers both)
and −(p + x) at x = o, …, β − 1 if β > o; b and v sum its powers, in closed form per request, over draws of (p, o, β).

**Reserve.** Every resident counts p + R − 1, R the smallest length that an output exceeds with probability δ at most;
with δ = 0 the longest output, and memory holds on every path.

The normal law for N residents, their independence and memory being full are approximations: the certificate says
"approximation" where that of a cap, whose residents' law is known, says "probability". It is that of one iteration's
memory, and the tests hold it against simulations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_choice
from fluidsched.errors import InfeasibleError
from fluidsched.policy import capped
from fluidsched.policy.problem import Problem, Slack, entry
from fluidsched.policy.profiles import FloatArray, StageProfile
from fluidsched.policy.table import MOST_LENGTHS, Lookahead

if TYPE_CHECKING:
    from fluidsched.workload.predictions import Prediction

__all__ = [
    "LookaheadPlan",
    "checked_mode",
    "equal_slices",
    "forecast_error",
    "lookahead_certificate",
    "plan_lookahead",
]

Mode = Literal["law", "known", "reserve"]
MOST_AHEAD = 1024  # iterations ahead looked at: all if there are fewer, else this many, evenly spaced
DRAWS = 20_000  # of prompts, outputs and predictions where beliefs are predictions


@dataclass(frozen=True)
class LookaheadPlan:
    """A look-ahead and what it rests on.

    Attributes
    ----------
    lookahead : Lookahead
    is_certain : bool
        Whether memory holds on every path.
    residents : float
        N, the requests that the memory admission may fill holds in the mean.
    bias, deviation : float
        N b and sqrt(N v), tokens, at the iteration ahead that asks for most headroom.
    ahead : int
        That iteration, u.
    """

    lookahead: Lookahead
    is_certain: bool
    residents: float
    bias: float = 0.0
    deviation: float = 0.0
    ahead: int = 0


def equal_slices(present: FloatArray, count: int = MOST_LENGTHS) -> tuple[int, ...]:
    """Cut a law of outputs into slices of the same probability, each represented by its root-mean-square length.

    Parameters
    ----------
    present : float64[L]
        P(S > s), s = 0..L − 1, the outputs' tail.
    count : int
        m, slices.

    Returns
    -------
    tuple of int, length m
        In order, whole tokens, at least 1. One atom may lie in several slices.

    Examples
    --------
    >>> equal_slices(np.array([1.0, 0.5, 0.5, 0.5]), 2)
    (1, 4)
    """
    mass = present - np.append(present[1:], 0.0)
    squares = np.arange(1, len(mass) + 1, dtype=np.float64) ** 2
    below = np.concatenate([[0.0], np.cumsum(mass)])
    partial = np.concatenate([[0.0], np.cumsum(mass * squares)])  # of E[o²] up to each level of probability
    total = np.interp(np.linspace(0.0, below[-1], count + 1), below, partial)
    lengths = np.sqrt(np.diff(total) * (count / below[-1]))
    return tuple(max(1, round(float(length))) for length in lengths)


def _iterations_ahead(stages: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(1, max(stages - 1, 1), min(MOST_AHEAD, stages)).astype(np.int64))


def forecast_error(
    profile: StageProfile, rate: FloatArray, lengths: tuple[int, ...]
) -> tuple[NDArray[np.int64], FloatArray, FloatArray]:
    """Mean b and second moment v of the forecast's error of one resident, by iterations ahead.

    Parameters
    ----------
    profile : StageProfile
        Of A types and L stages.
    rate : float64[A]
        Admitted rates.
    lengths : tuple of int
        The slices that the table believes.

    Returns
    -------
    ahead : int64[U]
    mean, square : float64[U]
        b(u), tokens, and v(u), tokens².
    """
    present = rate @ profile.present
    prompt, prompt_square = rate @ profile.prompt, rate @ profile.prompt_square
    residents = float(present.sum())
    stages = profile.stages
    longer = len(lengths) - np.searchsorted(np.array(lengths), np.arange(2 * stages), side="right")
    ahead = _iterations_ahead(stages)
    mean, square = np.empty(len(ahead)), np.empty(len(ahead))
    for i, u in enumerate(ahead.tolist()):
        later = np.arange(stages) + u
        extra = (later + profile.padding).astype(np.float64)
        left = longer[:stages]
        survive = np.divide(longer[later], left, out=np.zeros(stages), where=left > 0)

        def tail(values: FloatArray, shift: int = u) -> FloatArray:
            """The same one's value at stage s + u; nothing beyond the last stage."""
            return np.concatenate([values[shift:], np.zeros(shift)])

        now = (prompt + extra * present, prompt_square + extra * (2.0 * prompt + extra * present))
        then_p, then = tail(prompt), tail(present)
        after = (then_p + extra * then, tail(prompt_square) + extra * (2.0 * then_p + extra * then))
        mean[i] = float(np.sum(after[0] - survive * now[0])) / residents
        square[i] = float(np.sum((1.0 - 2.0 * survive) * after[1] + survive**2 * now[1])) / residents
    return ahead, mean, np.maximum(square, 0.0)


def predicted_error(
    prompt: NDArray[np.int64], output: NDArray[np.int64], believed: NDArray[np.int64], padding: int
) -> tuple[NDArray[np.int64], FloatArray, FloatArray]:
    """The same where request i, output o_i long, is believed to be β_i long; over M draws, each weighed o_i."""
    base = prompt.astype(np.float64) + padding
    ahead = _iterations_ahead(int(max(output.max(), believed.max())))
    ahead = ahead[:: -(-len(ahead) // 128)]
    mean, square = np.empty(len(ahead)), np.empty(len(ahead))
    short = believed < output
    for i, u in enumerate(ahead.tolist()):
        first = np.maximum(np.minimum(believed, output), u)
        last = np.where(short, output, np.minimum(believed, output + u))  # one past the last x
        count = np.maximum(last - first, 0).astype(np.float64)
        middle = base + (first + last - 1) / 2.0
        mean[i] = float(np.sum(np.where(short, 1.0, -1.0) * count * middle))
        square[i] = float(np.sum(count * middle**2 + count * (count**2 - 1.0) / 12.0))
    weight = float(output.sum())
    return ahead, mean / weight, square / weight


def _draws(
    problem: Problem, prediction: Prediction
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Prompts, outputs and predictions of M requests in the proportions of the admitted rates; always the same."""
    rng = np.random.default_rng(0)
    share = problem.rate / problem.rate.sum()
    lengths = [
        request_type.law.sample(rng, max(1, round(DRAWS * part)))
        for request_type, part in zip(problem.workload.types, share.tolist(), strict=True)
    ]
    prompt, output = (np.concatenate(parts) for parts in zip(*lengths, strict=True))
    return prompt, output, prediction.predict(output, rng)[0]


def checked_mode(mode: str) -> Mode:
    """Return `mode` if it is one of `Mode`."""
    check_choice("mode", mode, get_args(Mode))
    return cast(Mode, mode)


def plan_lookahead(problem: Problem, mode: Mode, prediction: Prediction | None) -> LookaheadPlan:
    """Choose the headroom of a mode; `InfeasibleError` where it takes the whole memory."""
    capacity = problem.capacity
    mean_kv = capped.resident_kv_law(problem)[0]
    if mode == "reserve":
        return _plan_reserve(problem)
    if mode == "known" and prediction is None:
        return LookaheadPlan(Lookahead("known"), True, capacity / mean_kv)
    lengths: tuple[int, ...] = ()
    if mode == "law":
        profile = problem.mean_profile
        lengths = equal_slices(problem.rate @ profile.present / problem.rate.sum())
        ahead, mean, square = forecast_error(profile, problem.rate, lengths)
    else:
        assert prediction is not None
        ahead, mean, square = predicted_error(*_draws(problem, prediction), problem.padding)
    if math.isinf(capacity):
        return LookaheadPlan(Lookahead(mode, 0.0, lengths), True, math.inf)
    full = capacity / mean_kv
    z = problem.z
    needed = full * mean + z * np.sqrt(full * square)
    worst = int(needed.argmax())
    headroom = float(max(needed[worst], 0.0))
    if headroom >= capacity:
        raise InfeasibleError(
            f"no look-ahead {mode!r} exists: it would keep {headroom:,.0f} of {capacity:,.0f} KV tokens free for "
            f"an overflow probability of {problem.overflow_probability:g}.",
            "memory",
        )
    return LookaheadPlan(
        Lookahead(mode, math.ceil(headroom), lengths),
        False,
        (capacity - headroom) / mean_kv,
        float(full * mean[worst]),
        math.sqrt(full * float(square[worst])),
        int(ahead[worst]),
    )


def _plan_reserve(problem: Problem) -> LookaheadPlan:
    profile = problem.memory_profile
    present = problem.rate @ profile.present / problem.rate.sum()
    beyond = np.append(present[1:], 0.0)  # P(o > R) for R = 1..L
    length = 1 + int(np.argmax(beyond <= problem.overflow_probability + 1e-12))
    certain = beyond[length - 1] <= 0.0
    resident = problem.mean_profile
    prompts = float((problem.rate @ resident.prompt).sum() / (problem.rate @ resident.present).sum())
    one = prompts + length - 1 + problem.padding
    return LookaheadPlan(
        Lookahead("reserve", float(length)),
        bool(certain and problem.is_bounded),
        problem.capacity / one,
    )


def check_carried(problem: Problem, plan: LookaheadPlan, token_budget: float, slack: Slack) -> float:
    """The multiple of the admitted rates carried, or `InfeasibleError`."""
    residents = min(plan.residents, problem.slots)
    multiple = capped.carried(problem, None if math.isinf(residents) else residents, token_budget)
    margin = 0.0 if slack == "auto" else slack
    if multiple > 1.0 + margin:
        return multiple
    raise InfeasibleError(
        f"look-ahead {plan.lookahead.mode!r} has {residents:,.1f} requests in service in the mean and so carries "
        f"{multiple:.3f} times the admitted rates, not {1.0 + margin:g} times.",
        "time",
    )


_FORMULA = {
    "law": "C − headroom, forecast by the law of outputs; headroom = max_u (N b(u) + z sqrt(N v(u)))⁺",
    "known": "C − headroom, forecast by predicted lengths; headroom = max_u (N b(u) + z sqrt(N v(u)))⁺",
    "reserve": "Σ (p + R − 1) ≤ C, R the (1 − δ)-quantile of outputs",
}


def lookahead_certificate(problem: Problem, plan: LookaheadPlan, multiple: float) -> dict[str, Any]:
    """What look-ahead guarantees; entries as in `fluidsched.policy.problem.entry`."""
    mode, headroom = plan.lookahead.mode, plan.lookahead.headroom_tokens
    guarantee = "certain" if plan.is_certain else ("probability" if mode == "reserve" else "approximation")
    worst: FloatArray | float = problem.capacity
    if not plan.is_certain:  # everybody who is in service in the mean as large as the largest gets
        workload = problem.workload
        largest = (workload.max_prompt_tokens + workload.max_output_tokens - 1).max() + problem.padding
        worst = plan.residents * float(largest) if problem.is_bounded else math.inf
    value = 0.0 if plan.is_certain else problem.overflow_probability
    formula = "every forecast is what is held, and each is at most C; decodes never pause for the budget"
    return {
        "memory": entry(
            problem.capacity,
            "tokens",
            formula if plan.is_certain and mode == "known" else _FORMULA[mode],
            guarantee,
            capacity=problem.capacity,
            worst_case=worst,
        ),
        "overflow_probability": entry(
            value,
            "per request" if mode == "reserve" and not plan.is_certain else "per iteration",
            "P(o > R) of one request"
            if mode == "reserve"
            else "δ of the normal approximation for independent residents, memory full",
            guarantee,
        ),
        "headroom": entry(
            headroom,
            "output tokens reserved per request" if mode == "reserve" else "tokens",
            _FORMULA[mode],
            guarantee,
            bias=plan.bias,
            sd=plan.deviation,
            z=0.0 if plan.is_certain else problem.z,
            iterations_ahead=plan.ahead,
        ),
        "carried": entry(
            multiple,
            "× admitted rates",
            "min_i N / (c0_i Σ a_j S_j + N Σ a_j w_ij), N in service in the mean where memory is full; forecasts that "
            "peak later leave some of it unused",
            "expectation",
            residents=plan.residents,
        ),
        "throughput": entry(
            float(problem.rate.sum()), "requests/s", "Σ_j a_j in the long run", "expectation"
        ),
    }
