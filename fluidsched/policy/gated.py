r"""Compiling the gated family: at most n_j requests of type j in any k_j consecutive iterations, decodes
always run.

**Time.** If every type is admitted as fast as its window allows, q_j = n_j / k_j per iteration in the
mean, the mean iteration is at most T(q) = E max_i (c0_i + Σ_j q_j w_ij) with prompts at the steepest price
of any piece, however they fall into batches, and the number of decodes taken Poisson. Type j keeps up,
with margin ε, if (1 + ε) a_j T(q) ≤ q_j. For a window of about k iterations

    n_j = ⌈(1 + ε) a_j k T⌉,        k_j = ⌊n_j / ((1 + ε) a_j T)⌋ ≥ k:

the period is stretched by what rounding the threshold up has gained, and T, first that of rates (1 + ε) a
exactly, is raised to T(q) until the condition holds.

**Memory.** At most one entry of n_j lies in each run of k_j consecutive ages; `fluidsched.policy.profiles`
bounds what they hold (certain for fixed lengths, mean + z_δ · sd for random ones, requests independent). A
prompt may be cut to the token budget B: at most one resident is partly prefilled at a time, and it gets at
least B less the decodes, so with decodes held to B/2 a request lags at most ⌈(p_max − 1) / (B − decodes)⌉
iterations behind its age (p_max less what is cached of it).

**Waiting.** Admissions of type j are those of a queue with n_j servers and constant service k_j
iterations: the i-th enters k_j iterations after the (i − n_j)-th, or at the first decision after it
arrives. At any time the number in such an M/D/n system, seen one service earlier, makes the same step as
V' = max(V + X − n, 0), X Poisson with mean m = a_j k_j T. So the mean number waiting *is* E[V], and
rounding to whole iterations adds less than one iteration to the wait. Random lengths make iterations
random; E[V] is then multiplied by what they do in heavy traffic (`Problem.queue_factor`).

**Which k.** There is no gate to fill, so large thresholds cost memory, not waiting, and the margin is
taken as large as possible: for each k the largest feasible ε, and of all k the one with the shortest wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_count
from fluidsched.errors import InputError
from fluidsched.policy.problem import Problem, Slack, entry, expected_largest, no_table, queue_estimate
from fluidsched.policy.profiles import FloatArray, SpacedProfile
from fluidsched.policy.tails import Held, Tail, overflow_entry, tail_of
from fluidsched.queues import embedded_queue_means

if TYPE_CHECKING:
    from fluidsched.fluid import FluidSolution

__all__ = ["GatedPlan", "gated_certificate", "gated_exists", "plan_gated", "why_not", "windows_to_try"]

IntArray = NDArray[np.int64]

ROUNDING = 1e-12
SAFETY = 1e-9  # relative: times of smaller margins are taken so much shorter where a climb starts
SLACK_TOLERANCE = 1e-4  # relative, of 1 + ε
LONGEST_PERIOD = 2**31  # iterations
MANY = 50_000  # types × stages from which the periods are tabulated more coarsely


@dataclass(frozen=True)
class GatedPlan:
    """Thresholds and periods; A active types.

    Attributes
    ----------
    window : int
        k, the shortest period, iterations.
    threshold, period : int64[A]
        n_j, requests; k_j, iterations.
    iteration_time : float
        T(q), s.
    slack : float
        min_j q_j / (a_j T(q)) − 1.
    kv, in_service : float
        Bounds on resident KV (tokens) and on residents.
    wait : float
        Estimate of the mean wait for the window, s; picks k.
    """

    window: int
    threshold: IntArray
    period: IntArray
    iteration_time: float
    slack: float
    kv: float
    in_service: float
    wait: float


class _Spacing:
    """Bounds on what spaced entries hold, tabulated as they are asked for: 12 periods per octave (4 for many
    types), others at the next below."""

    def __init__(self, problem: Problem, token_budget: float) -> None:
        decodes = min(problem.slots, token_budget / 2.0)
        lag = np.zeros(len(problem.rate), dtype=np.int64)
        if math.isfinite(token_budget):
            per_iteration = max(math.floor(token_budget - decodes), 1)
            lag = -(-(problem.workload.max_prefill_tokens - 1) // per_iteration)
        self.lag = lag
        self.most_in_service = min(problem.slots, decodes)
        self._profile: SpacedProfile = problem.memory_profile.spaced(lag)
        ages = self._profile.ages
        density = 12 if problem.size <= MANY else 4
        steps = np.exp2(np.arange(0.0, math.log2(ages) + 1 / density, 1 / density))
        self._periods = np.unique(np.append(np.floor(steps), ages)).astype(np.int64)
        self._at = self._periods.searchsorted(np.arange(ages + 1), side="right") - 1
        # Where lengths are fixed nothing varies: means alone.
        self.is_fixed = problem.memory_profile.is_fixed
        self._kept = [0, 2] if self.is_fixed else [0, 1, 2, 3]
        self._bounds = np.empty((len(self._kept), len(self._periods) * len(lag)))
        self._known = np.zeros(len(self._periods), dtype=np.bool_)
        self._rows = np.arange(len(lag))

    def held(self, problem: Problem, n: FloatArray, period: FloatArray) -> tuple[float, float] | str:
        """KV tokens and residents that thresholds n spaced by whole periods hold at most, or the limit they break."""
        at = self._at[np.minimum(period, len(self._at) - 1.0).astype(np.int64)]
        if not self._known.all():
            for i in np.unique(at[~self._known[at]]).tolist():
                bound = self._profile.bound(int(self._periods[i]))
                self._bounds[:, i * len(n) : (i + 1) * len(n)] = bound[self._kept]
                self._known[i] = True
        cell = at * len(n) + self._rows
        half = len(self._kept) // 2
        found = []
        for first, limit, name in ((0, problem.capacity, "memory"), (half, self.most_in_service, "batch")):
            most = float(n @ self._bounds[first].take(cell))
            if not self.is_fixed:
                variance = n @ self._bounds[first + 1].take(cell)
                most = float(problem.quantile(np.asarray(most), variance))
            if most > limit * (1 + ROUNDING):
                return name
            found.append(most)
        return found[0], found[1]

    @property
    def periods(self) -> IntArray:
        """The tabulated periods."""
        return self._periods


def _spacing(problem: Problem, token_budget: float) -> _Spacing:
    key = ("spacing", token_budget)
    if key not in problem.shared:
        problem.shared[key] = _Spacing(problem, token_budget)
    spacing: _Spacing = problem.shared[key]
    return spacing


def _iteration_time(problem: Problem, per_iteration: FloatArray) -> float:
    """Bound T(q) on the mean iteration when q_j requests of type j enter per iteration in the mean, s.

    Prompts at the steepest price, however they fall into batches; the number decoding Poisson.
    """
    mean = problem.coefficients[:, 0] + problem.lumped_work @ per_iteration
    if len(mean) == 1:
        return float(mean[0])
    return float(expected_largest(mean, problem.decode_spread @ per_iteration))


def _ahead(
    problem: Problem, stretch: float, wanted: FloatArray, per_iteration: FloatArray, reached: float
) -> float:
    """A Newton step from `reached` towards the fixed point, not beyond it; `wanted` is (1 + ε) a_j `reached`.

    Entries never fall below those found, nor below (1 + ε) a_j T: so T is at least the root of the convex function
    max_i (c0_i + Σ_j max(q_j, (1 + ε) a_j T) w_ij) − T.
    """
    mean = problem.coefficients[:, 0] + problem.lumped_work @ np.maximum(wanted, per_iteration)
    piece = int(mean.argmax())
    slope = stretch * float(problem.lumped_work[piece] @ (problem.rate * (wanted > per_iteration)))
    return reached + (float(mean[piece]) - reached) / (1.0 - slope) if slope < 1.0 else reached


class _Found(NamedTuple):
    """Thresholds and periods that keep up within the server's limits; as in `GatedPlan`."""

    threshold: FloatArray
    period: FloatArray
    iteration_time: float
    kv: float
    in_service: float

    def plan(self, problem: Problem, window: int) -> GatedPlan:
        n, period, time = self.threshold, self.period, self.iteration_time
        rate, per_iteration = problem.rate, n / period
        queue = queue_estimate(n, rate * period * time) * problem.queue_factor(per_iteration / time)
        return GatedPlan(
            window,
            n.astype(np.int64),
            period.astype(np.int64),
            time,
            float((per_iteration / (rate * time)).min()) - 1.0,
            self.kv,
            self.in_service,
            float(queue.sum() / rate.sum()),
        )


def _evaluate(
    problem: Problem,
    spacing: _Spacing,
    token_budget: float,
    window: int,
    stretch: float,
    reached: float = 0.0,
) -> _Found | str:
    """What one window and margin need, or what forbids it; `reached` is T(q) of a smaller margin, if known."""
    low, high = problem.equilibrium(stretch, work=problem.lumped_work)
    if low > high:
        return "time"
    longest = high / stretch * (1 + ROUNDING)
    stretched = stretch * problem.rate
    tokens = problem.workload.processed_tokens
    time = max(low / stretch, reached)
    slope = problem.lumped_work.min(axis=0)
    protected = problem.protected_rate(slope)
    if protected is not None and not np.all(np.isfinite(protected)):
        return "time"
    per_iteration = np.zeros_like(stretched)
    reached = _iteration_time(problem, per_iteration) if protected is not None else 0.0
    while time <= longest:
        wanted = stretched * time
        if protected is not None:
            wanted = np.maximum(wanted, protected * (reached - float(per_iteration @ slope)))
        n = np.maximum(np.ceil(wanted * window * (1 - ROUNDING)), 1.0)
        period = np.minimum(np.floor(n / wanted * (1 + ROUNDING)), LONGEST_PERIOD)
        held = spacing.held(problem, n, period)
        if isinstance(held, str):
            return held
        per_iteration = n / period
        if float(per_iteration @ tokens) > token_budget:
            return "tokens"
        reached = _iteration_time(problem, per_iteration)
        needed = wanted = stretched * reached
        if protected is not None:
            needed = np.maximum(wanted, protected * (reached - float(per_iteration @ slope)))
        if (needed <= per_iteration * (1 + ROUNDING)).all():
            return _Found(n, period, reached, *held)
        time = max(reached, min(_ahead(problem, stretch, wanted, per_iteration, reached), high / stretch))
    return "rounding"


def _solve(
    problem: Problem,
    spacing: _Spacing,
    token_budget: float,
    window: int,
    slack: Slack,
    near: Sequence[float] = (),
) -> tuple[GatedPlan | str, Sequence[float]]:
    """The plan of one window, or what forbids it; with "auto" also the multiples of the rates 1 + ε between which
    margins end.

    `near`: those of another window. Where thresholds are small windows hardly differ, so these are tried first, and
    what the bisection asks on either side of them is then known.
    """

    def at(stretch: float, reached: float = 0.0) -> _Found | str:
        return _evaluate(problem, spacing, token_budget, window, stretch, reached * (1.0 - SAFETY))

    if slack != "auto":
        only = at(1.0 + slack)
        return only if isinstance(only, str) else only.plan(problem, window), ()
    known, broken = 0.0, math.inf
    best: _Found | None = None
    reason = ""

    def holds(stretch: float) -> bool:
        nonlocal known, broken, best, reason
        if known < stretch < broken:
            found = at(stretch, 0.0 if best is None else best.iteration_time)
            if isinstance(found, str):
                broken, reason = stretch, found
            else:
                known, best = stretch, found
        return stretch <= known

    for stretch in near:
        holds(stretch)
    if not holds(1.0):
        return reason, near
    low, high = 1.0, 2.0
    while holds(high):
        low, high = high, 2.0 * high
    while high - low > SLACK_TOLERANCE * low:
        middle = (low + high) / 2.0
        low, high = (middle, high) if holds(middle) else (low, middle)
    if best is None or known != low:
        again = at(low)
        return again if isinstance(again, str) else again.plan(problem, window), (low, high)
    return best.plan(problem, window), (low, high)


def plan_gated(
    problem: Problem, fluid: FluidSolution, slack: Slack, token_budget: float, window: int | None
) -> tuple[GatedPlan, _Spacing]:
    """The best plan over the windows, or `InfeasibleError` with the reason and the largest load."""
    if (
        slack == "auto"
        and math.isinf(problem.capacity)
        and math.isinf(problem.slots)
        and math.isinf(token_budget)
    ):
        raise InputError(
            "slack", "auto", "be a number where nothing limits the thresholds: there is no largest slack"
        )
    spacing = _spacing(problem, token_budget)
    windows = windows_to_try(problem, token_budget, window)
    plans: list[GatedPlan | str] = []
    margins: Sequence[float] = ()
    for k in windows:
        found, margins = _solve(problem, spacing, token_budget, k, slack, margins)
        plans.append(found)
    feasible = [p for p in plans if not isinstance(p, str)]
    if feasible:
        return min(feasible, key=lambda p: (p.wait, p.iteration_time)), spacing
    margin = 0.0 if slack == "auto" else slack

    raise no_table(
        "gated table",
        problem,
        fluid,
        margin,
        [p for p in plans if isinstance(p, str)],
        lambda offered, k: gated_exists(offered, margin, token_budget, k),
        windows,
    )


def windows_to_try(problem: Problem, token_budget: float, window: int | None) -> list[int]:
    """The window given, or those tabulated: steps of 6 % (19 % for many types) up to the longest age."""
    if window is None:
        return [int(k) for k in _spacing(problem, token_budget).periods]
    return [check_count("block_iterations", window, minimum=1)]


def gated_exists(problem: Problem, margin: float, token_budget: float, window: int) -> bool:
    """Whether a table with this slack exists for a window."""
    plan, _ = _solve(problem, _spacing(problem, token_budget), token_budget, window, margin)
    return not isinstance(plan, str)


def why_not(problem: Problem, margin: float, token_budget: float, window: int | None) -> list[str]:
    """What forbids a table with this slack, for each window that has none."""
    spacing = _spacing(problem, token_budget)
    plans = [
        _solve(problem, spacing, token_budget, k, margin)[0]
        for k in windows_to_try(problem, token_budget, window)
    ]
    return [plan for plan in plans if isinstance(plan, str)]


def gated_overflow(problem: Problem, plan: GatedPlan, lag: IntArray) -> Tail:
    """P(KV > C) with every window full, each window's requests where they hold most in the mean, independent."""
    mean, variance = problem.mean_profile.kv
    kinds, stages, counts = [], [], []
    for j, (n, k) in enumerate(zip(plan.threshold.tolist(), plan.period.tolist(), strict=True)):
        last = int(np.count_nonzero(problem.mean_profile.present[j])) - 1
        delay = int(lag[j])
        for age in range(last + delay, -1, -k):
            low, high = max(age - k + 1 - delay, 0), min(age, last)
            kinds.append(j)
            stages.append(low + int(mean[j, low : high + 1].argmax()))
            counts.append(float(n))
    kind, stage, count = np.array(kinds), np.array(stages), np.array(counts)
    held = Held(problem, kind, stage, problem.padding, count)
    return tail_of(
        held,
        problem.capacity,
        float(count @ mean[kind, stage]),
        math.sqrt(count @ variance[kind, stage]),
        held.largest,
    )


def gated_certificate(
    problem: Problem, plan: GatedPlan, spacing: _Spacing, tail: Tail | None, token_budget: float
) -> dict[str, Any]:
    """What a compiled gated table guarantees; entries as in `fluidsched.policy.problem.entry`.

    `tail` is its `gated_overflow`, None where memory holds with certainty.
    """
    rate, n, period, time = problem.rate, plan.threshold, plan.period, plan.iteration_time
    arrivals = rate * period * time
    queue = embedded_queue_means(n, np.where(arrivals < n * (1 - ROUNDING), arrivals, math.inf), wait=False)
    factor = problem.queue_factor(n / (period * time))
    queue = queue * factor
    ttft = queue / rate + (2.0 + spacing.lag) * time
    worst = math.inf
    if problem.is_bounded:
        worst = float(n @ problem.worst_profile.spaced(spacing.lag).of_fixed(period)[1])
    certain = problem.is_certain
    cohort = float(n @ problem.workload.max_prefill_tokens)
    return {
        "memory": entry(
            plan.kv,
            "tokens",
            "Σ_j n_j Σ_i max of h_j over the i-th k_j ages from the last" + ("" if certain else " + z sd"),
            problem.guarantee,
            capacity=problem.capacity,
            worst_case=worst,
            z=problem.z,
        ),
        "overflow_probability": overflow_entry(problem, tail, "every window full"),
        "in_service": entry(
            plan.in_service,
            "requests",
            "Σ_j n_j Σ_i max of P(S_j > s) over the i-th k_j ages" + ("" if certain else " + z sd"),
            "certain" if certain else "approximation",
            limit=problem.server.max_batch_size,
        ),
        "iteration_time": entry(
            time,
            "s",
            "T(q) = E max_i (c0_i + Σ_j q_j w_ij), q_j = n_j / k_j, prompts at the steepest price",
            "expectation",
        ),
        "slack": entry(plan.slack, "", "min_j n_j / (k_j a_j T(q)) − 1", "expectation"),
        "robustness": entry(
            plan.slack,
            "relative error of all rates at once",
            "margin_j = n_j / (k_j a_j T(q)) − 1: the table keeps up with any rates up to (1 + margin_j) a_j, and its "
            "memory bound holds for all rates",
            "expectation",
            per_type=n / arrivals - 1.0,
            all_rates_30_percent_up=plan.slack >= 0.3,
        ),
        "largest_cohort": entry(
            cohort,
            "tokens",
            "Σ_j n_j p_max, all windows open at once; served in chunks of the token budget",
            "certain" if problem.is_bounded else "probability",
            token_budget=token_budget,
        ),
        "throughput": entry(
            float(rate.sum()),
            "requests/s",
            "Σ_j a_j in the long run, iff the slack is positive",
            "expectation",
        ),
        "queue": entry(
            float(queue.sum()),
            "requests",
            "Σ_j factor · E[V_j], V' = max(V + X − n, 0), X ~ Poisson(a_j k_j T): M/D/n with n_j servers",
            "expectation",
            per_type=queue,
            factor=factor,
            factor_formula="1 + a_j Σ_i (q_i / T) Var(w_i): random iterations; 1 for fixed lengths",
            holds_for="Poisson arrivals at the admitted rates",
        ),
        "ttft": entry(
            float(rate @ ttft / rate.sum()),
            "s",
            "E[V_j] / a_j + (2 + lag_j) T(q), mean over requests",
            "expectation",
            per_type=ttft,
            holds_for="Poisson arrivals at the admitted rates",
        ),
    }
