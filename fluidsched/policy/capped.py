r"""Compiling the cap: how many requests may be in service before their growing KV no longer fits.

**Memory.** A resident request seen at a random iteration is of type j in iteration k ≤ o with weight a_j
per iteration, and holds p + k − 1 tokens. So its KV has mean and second moment

    κ̄ = Σ a_j W_j / Σ a_j S_j,        Σ a_j E[Σ_{k=1..o} (p + k − 1)²] / Σ a_j S_j,

and standard deviation σ. For independent lengths N residents hold N κ̄ + z_δ σ √N or less with probability
about 1 − δ in the normal approximation. The cap is the largest whole N for which that is within C and the tail of
the actual law, P(KV of N residents > C), at most δ (`fluidsched.policy.tails`; KV is skewed to the right, which at
small δ costs a resident or two), or the server's largest batch if smaller. With δ = 0 every resident is taken as
large as the largest request ever gets. Where rates may be off, the same holds in the worst mixes: that in which
mean + z sd is largest, and that in which Chernoff's bound on the tail is (`fluidsched.policy.robust`).

**Time.** While more wait than are let in, N are in service. Completions then come at rates θa with one
iteration in N / (θ Σ a_j S_j) seconds, and T = max_i (c0_i + θ T Σ a_j w_ij); the queue shrinks iff θ > 1,
that is iff

    c0_i Σ a_j S_j + N Σ a_j w_ij < N        for every piece i.

That is so for the mean batch. A batch has whole prompts or none: with prompts at the steepest price of any
piece (`Problem.lumped_work`) the same condition suffices however they fall, and where the two differ, beyond a
knee, the certificate gives both.

A token budget B per iteration binds in the same way with Σ a_j τ_j in place of Σ a_j S_j and B in place of
N. Without a limit of its kind only Σ a_j w_ij < 1 remains. The left-hand sides are linear in the rates:
the largest load carried is the smallest ratio of the right-hand side to the left.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidsched.errors import InfeasibleError
from fluidsched.policy.problem import INSIDE, Problem, Slack, boundary_problem, entry
from fluidsched.policy.profiles import FloatArray, normal_quantile
from fluidsched.policy.robust import CLOSE, largest_kv, largest_ratio, top_sum
from fluidsched.policy.tails import Tail, resident_moments, resident_transform, tail_of

if TYPE_CHECKING:
    from fluidsched.fluid import FluidSolution

RATES_OFF = 0.3  # of the robustness line

__all__ = ["capped_certificate", "carried", "plan_cap", "resident_kv_law", "share_carried"]


def resident_kv_law(problem: Problem) -> tuple[float, float]:
    """Mean κ̄ and standard deviation σ of the KV of one resident at a random iteration, tokens.

    Paging adds its largest waste, block size − 1 tokens, to every resident.
    """
    return _law_of(problem, *(float(problem.rate @ sums) for sums in _life_sums(problem)))


def _life_sums(problem: Problem) -> tuple[FloatArray, FloatArray, FloatArray]:
    """E of the iterations, the KV and the squared KV held over a life: S, W and Σ_k (p + k − 1)², (A,) each."""
    workload = problem.workload
    o, oo, ooo = (workload.moment(0, i) for i in (1, 2, 3))
    squares = workload.moment(2, 1) + workload.moment(1, 2) - workload.moment(1, 1)
    return workload.iterations, workload.kv_work, squares + ooo / 3.0 - oo / 2.0 + o / 6.0


def _law_of(problem: Problem, iterations: Any, kv: Any, squares: Any) -> tuple[Any, Any]:
    """κ̄ and σ from the sums over types of rate times `_life_sums`; numbers or arrays of mixes."""
    mean = kv / iterations
    return mean + problem.padding, np.sqrt(np.maximum(squares / iterations - mean * mean, 0.0))


def plan_cap(problem: Problem) -> tuple[float, int | None]:
    """The real N at which memory is full at mean + z sd, and the cap: whole, within the largest batch, or None."""
    by_law = problem.overflow_probability > 0.0 and not math.isinf(problem.capacity)
    if math.isinf(problem.capacity):
        real = math.inf
    elif problem.overflow_probability == 0.0:
        real = problem.capacity / _largest_request(problem)
    elif problem.rate_error is not None:
        real = _real_cap_of_any_mix(problem)
    else:
        mean, deviation = resident_kv_law(problem)
        half = normal_quantile(problem.overflow_probability) * deviation / 2.0
        root = (math.sqrt(half * half + mean * problem.capacity) - half) / mean
        real = root * root
    cap = min(real * (1 + 1e-12), problem.slots)
    if math.isinf(cap):
        return real, None
    return real, _cap_by_law(problem, math.floor(cap)) if by_law else math.floor(cap)


def overflow(problem: Problem, cap: int) -> Tail:
    """P(KV of `cap` residents > C) at a random iteration, for independent lengths.

    Where rates may be off, the probability in that of the mixes allowed in which Chernoff's bound is largest; the
    bound holds in every mix.
    """
    known = problem.without_errors()
    tail = _overflow_of_mix(known, cap)
    if problem.rate_error is None or math.isinf(tail.theta):
        return tail
    iterations, level = problem.workload.iterations, math.floor(problem.capacity) + 1.0
    while True:  # between θ and mixes: the bound is least in one and largest in the other
        moments = resident_moments(known, tail.theta)
        _, mix = largest_ratio(problem.rate * iterations, moments, problem.rate_error, problem.error_budget)
        worst = known.at_rate(mix / iterations)
        found = _overflow_of_mix(worst, cap)
        if found.chernoff <= tail.chernoff * (1.0 + CLOSE):
            exponent = cap * float(resident_transform(worst)[0](tail.theta)) - tail.theta * level
            return Tail(max(found.probability, tail.probability), math.exp(min(exponent, 0.0)), tail.theta)
        tail = found


def _overflow_of_mix(problem: Problem, cap: int) -> Tail:
    mean, deviation = resident_kv_law(problem)
    transform, largest = resident_transform(problem)
    return tail_of(
        lambda z: cap * transform(z), problem.capacity, cap * mean, math.sqrt(cap) * deviation, cap * largest
    )


def _cap_by_law(problem: Problem, cap: int) -> int:
    """The largest number up to `cap` that overflows with probability δ at most."""
    while cap > 0 and overflow(problem, cap).probability > problem.overflow_probability:
        cap -= 1
    return cap


def _held_by_any_mix(problem: Problem, cap: float) -> float:
    """Most that `cap` residents hold at mean + z sd over all mixes that the errors allow, tokens."""
    assert problem.rate_error is not None
    z = normal_quantile(problem.overflow_probability)
    iterations, kv, squares = _life_sums(problem)
    one = largest_kv(
        problem.rate * iterations,
        kv / iterations,
        squares / iterations,
        z / math.sqrt(cap),
        problem.rate_error,
        problem.error_budget,
    )
    return cap * (one + problem.padding)


def _real_cap_of_any_mix(problem: Problem) -> float:
    """The real N at which memory is full in the worst mix: root of an increasing function, by bisection."""
    low, high = 0.0, problem.capacity / (resident_kv_law(problem)[0])
    while high - low > 1e-6 * high:
        middle = (low + high) / 2.0
        if _held_by_any_mix(problem, middle) <= problem.capacity:
            low = middle
        else:
            high = middle
    return low


def _largest_request(problem: Problem) -> float:
    workload = problem.workload
    return float((workload.max_prompt_tokens + workload.max_output_tokens - 1).max()) + problem.padding


def carried(
    problem: Problem, cap: float | None, token_budget: float, work: FloatArray | None = None
) -> float:
    """Largest multiple of the admitted rates that stays stable under a cap and a token budget.

    With the busy work of the mean batch, or with `work` (I, A). Where rates may be off, whatever the errors.
    """
    if cap == 0:
        return 0.0
    base, busy = problem.coefficients[:, :1], problem.work if work is None else work
    needed = [busy]
    for limit, demand in (
        (math.inf if cap is None else cap, problem.workload.iterations),
        (token_budget, problem.workload.processed_tokens),
    ):
        needed.append(busy + base * demand / limit)
    use = problem.rate * np.array(needed)
    total = use.sum(axis=-1)
    if problem.rate_error is not None:
        total = total + top_sum(np.abs(use) * problem.rate_error, problem.error_budget)
    most = float(np.max(total))
    return math.inf if most <= 0.0 else 1.0 / most


def _mix_off(problem: Problem, cap: int | None, z: float) -> tuple[float, float]:
    """Most KV held at mean + z sd, and least multiple carried, over the mixes with every rate 30 % off or less.

    N κ̄ is largest with the weight on the types that hold most per resident: with the types in that order,
    the first few 30 % up and the others 30 % down; σ is that of the same mix. Carried is least with all
    rates up.
    """
    multiple = carried(problem.without_errors(), cap, math.inf) / (1.0 + RATES_OFF)
    if cap is None:
        return math.inf, multiple
    order = np.argsort(-problem.workload.kv_work / problem.workload.iterations)
    sums = np.array([problem.rate * life for life in _life_sums(problem)])[:, order]
    up = np.concatenate([np.zeros((3, 1)), np.cumsum(sums, axis=1)], axis=1)  # the first 0..A types
    mixes = (1.0 - RATES_OFF) * up[:, -1:] + 2.0 * RATES_OFF * up
    mean, deviation = _law_of(problem, *mixes)
    return float((cap * mean + z * deviation * math.sqrt(cap)).max()), multiple


def share_carried(problem: Problem, fluid: FluidSolution, token_budget: float) -> float:
    """Share of the fluid boundary, along the offered mix, below which a cap carries what is offered."""
    at_boundary = boundary_problem(fluid, problem)
    return carried(at_boundary, plan_cap(at_boundary)[1], token_budget)


def check_carried(
    problem: Problem, fluid: FluidSolution, cap: int | None, token_budget: float, slack: Slack
) -> float:
    """The multiple carried, or `InfeasibleError` with the largest load if it does not exceed 1 + slack."""
    if cap == 0:
        raise InfeasibleError(
            f"no cap exists: not one request fits into {problem.capacity:,.0f} KV tokens with an overflow "
            f"probability of {problem.overflow_probability:g}.",
            "memory",
        )
    multiple = carried(problem, cap, token_budget)
    margin = 0.0 if slack == "auto" else slack
    if multiple > 1.0 + margin:
        return multiple
    share = share_carried(problem, fluid, token_budget)
    allowed = "no limit on requests in service" if cap is None else f"a cap of {cap:,}, which memory allows,"
    raise InfeasibleError(
        f"at load {float(np.max(fluid.load)):.3f} {allowed} carries {multiple:.3f} times the admitted rates, "
        f"not {1.0 + margin:g} times. A cap exists below {share:.3f} of the fluid boundary."
        + (INSIDE if share > 0.0 and float(np.max(fluid.load)) > 1.0 else ""),
        "time",
    )


def _overflow_entry(problem: Problem, cap: int | None, by_law: bool) -> dict[str, Any]:
    delta = problem.overflow_probability
    if not by_law or cap is None or math.isinf(problem.capacity):
        return entry(0.0, "per iteration", "0: what N residents hold at most is within C", "certain")
    tail = overflow(problem, cap)
    mixes = "in the admitted proportions"
    if problem.rate_error is not None:
        mixes = "in any proportions the rate errors allow: of the mix in which `chernoff` is largest; it bounds all"
    return entry(
        tail.probability,
        "per iteration",
        "P(KV of N residents > C), N in service at random iterations of their lives, from the law of the lengths: "
        "(1/2π) ∫ Re e^(K(z) − z(C + 1)) / (1 − e^(−z)) dt, z = θ + it",
        "probability",
        target=delta,
        chernoff=tail.chernoff,
        holds_for=f"independent requests {mixes}",
    )


def capped_certificate(problem: Problem, real: float, cap: int | None, token_budget: float) -> dict[str, Any]:
    """What a cap guarantees; entries as in `fluidsched.policy.problem.entry`."""
    mean, deviation = resident_kv_law(problem)
    by_law = problem.overflow_probability > 0.0
    z = normal_quantile(problem.overflow_probability) if by_law else 0.0
    worst: FloatArray | float = math.inf
    if cap is not None and problem.is_bounded:
        worst = cap * _largest_request(problem)
    held = math.inf if cap is None else (cap * mean + z * deviation * math.sqrt(cap) if by_law else worst)
    memory_off, carried_off = _mix_off(problem, cap, z)
    known = problem.without_errors()
    at_least = carried(known, cap, token_budget, problem.lumped_work)
    if cap is not None and by_law and problem.rate_error is not None:
        held = _held_by_any_mix(problem, cap)
    return {
        "memory": entry(
            held,
            "tokens",
            ("N κ̄ + z σ sqrt(N)" if by_law else "N max_j (p_max + o_max − 1)")
            + (
                ", the largest over the mixes of the rate errors"
                if by_law and problem.rate_error is not None
                else ""
            ),
            "probability" if by_law else "certain",
            capacity=problem.capacity,
            worst_case=worst,
            mean_per_resident=mean,
            sd_per_resident=deviation,
            z=z,
        ),
        "overflow_probability": _overflow_entry(problem, cap, by_law),
        "cap": entry(
            cap,
            "requests",
            "largest N ≤ `real` with P(KV of N residents > C) ≤ δ, at most the largest batch"
            if by_law
            else "⌊N⌋ of `real`, at most the largest batch",
            "probability" if by_law else "certain",
            real=real,
            real_formula="N κ̄ + z σ sqrt(N) = C: the normal approximation"
            if by_law
            else "N max_j (p_max + o_max − 1) = C",
        ),
        "carried": entry(
            multiple := carried(known, cap, token_budget),
            "× admitted rates",
            "min_i N / (c0_i Σ a_j S_j + N Σ a_j w_ij), and likewise for the token budget; stable above 1 where "
            "the mean batch stands for all",
            "expectation",
            at_least=at_least,
            at_least_formula="the same with w_ij at the steepest price of a prompt: batches have whole prompts or none",
        ),
        "robustness": entry(
            multiple - 1.0,
            "relative error of all rates at once",
            "carried − 1 for rates in the same proportions; with each rate up to 30 % off, the most that N residents "
            "hold at mean + z sd, and the least that is carried",
            "expectation",
            memory_mix_30_percent_off=memory_off,
            carried_mix_30_percent_off=carried_off,
        ),
        "throughput": entry(
            float(problem.rate.sum()) * min(1.0, at_least),
            "requests/s",
            "Σ_j a_j in the long run where `carried` is at least 1 with prompts apart, else that share of it",
            "expectation",
        ),
    }
