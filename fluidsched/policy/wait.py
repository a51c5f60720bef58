r"""Compiling WAIT: thresholds and block length from the fluid solution.

**Rule** (Ao, Luo, Simchi-Levi, Wang, arXiv 2504.11320, Algorithm 1, with decisions every k iterations). A
type is *open* when at least n_j of its requests wait. A block of k iterations admits n_j requests of every
open type and serves them and the residents of open types; the other types pause and keep their KV. No type
is open: the server idles. k = 1 is the paper's rule.

**Time.** One block with all types open and full lasts

    T_k(n) = Σ_{r<k} max_i ( c0_i + Σ_j n_j w_ij(r) ),

w_ij(r) the busy work per entry of type j in iteration r of a block under piece i (one piece: k·c0 + Σ_j
n_j w_j). Type j keeps up, with margin ε, iff (1 + ε) a_j T_k(n) ≤ n_j. Raising some n_i raises the
left-hand side, so the conditions are monotone, and iterating

    n ← ⌈(1 + ε) a T_k(n)⌉

from below climbs to the componentwise smallest solution, or past every limit. It is run in the one
variable β = (1 + ε) T_k(n), n = ⌈aβ⌉: started from the continuous solution, and helped along by Newton
steps on the convex function β ↦ (1 + ε) T_k(max(n, aβ)) − β, whose least root lies below the one sought. A
step that finds no root proves that there is none.

For random lengths the batch is random, and T_k is the expectation of the sum over r of the largest piece:
the pieces are taken jointly normal, the residents independent. It exceeds the duration of the mean batch
where the batch is near a knee. Newton steps then use the mean batch, a bound from below.

**Memory.** With f_j, g_j of `fluidsched.policy.profiles` (running, paused) the residents hold at most

    max_r Σ_j n_j max( f_j(r), g_j )

when each type has one length: with certainty, whatever arrives. For random lengths every entry is taken
full and its requests independent, and what they hold at mean + z · sd, the larger of the running and the
paused value for mean and variance separately. z is the normal quantile of δ, raised until the tail of the actual law
(`wait_overflow`) is at most δ. Residents, at most Σ_j n_j ⌈S_j / k⌉, are held to the server's largest batch in the same
way, and the largest cohort, Σ_j n_j (p_max + decodes), to its token budget, if it has one; of prompts that are
partly cached only the rest counts there.

**Waiting.** Counted just after decisions, the entry queue of type j is at most W' = W + X − n·1{W + X ≥
n}, X Poisson with mean m = a_j T_k(n) (`fluidsched.queues`), its time average at most E[W] + m/2. By
Little's law the wait is at most that over a_j, and the first token comes at the end of the first iteration
of the block. E[W] is (n − 1)/2 plus the mean of the queue that does not wait for a full threshold; random
lengths make cycles random, and that second part is multiplied by what they do in heavy traffic
(`Problem.queue_factor`).

**Which k.** Small k rounds thresholds up by more; large k makes arrivals wait longer. All lengths to 32
are tried, then steps of 5 % up to the longest output (to 8 and 25 % for many types); the one with the
smallest bound on the mean wait is taken. With ``slack="auto"`` every k is taken at the largest ε at which a
table exists.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_count
from fluidsched._display import Tabular
from fluidsched.errors import InputError
from fluidsched.policy.problem import (
    Problem,
    Slack,
    check_slack,
    entry,
    expected_largest,
    no_table,
    queue_estimate,
)
from fluidsched.policy.profiles import BlockProfile, FloatArray, fold
from fluidsched.policy.tails import Held, Tail, negligible, overflow_entry, tail_of
from fluidsched.queues import embedded_queue_means

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.fluid import FluidSolution

__all__ = [
    "WaitCurve",
    "WaitPlan",
    "block_lengths",
    "plan_wait",
    "wait_certificate",
    "wait_curve",
    "wait_exists",
    "why_not",
]

IntArray = NDArray[np.int64]
ROUNDING = 1e-12  # relative: n counts as ⌈x⌉ if it is within this of x
SAFETY = 1e-9  # relative: bounds that cut a search short are taken this much looser
SLACK_TOLERANCE = 1e-6  # relative, of 1 + ε, when the largest slack is sought
SEARCH_TOLERANCE = 1e-3  # the same while block lengths are compared
MANY = 50_000  # types × stages from which block lengths are tried more coarsely
CHECKED_TOGETHER = 8  # steps of a climb after which the server's limits are looked at
KEPT = 200_000  # types × stages up to which all block lengths' conditions are kept


@dataclass(frozen=True)
class WaitPlan:
    """Thresholds for one block length. A active types.

    Attributes
    ----------
    block_iterations : int
        k.
    threshold : int64[A]
        n_j, requests.
    cycle_time : float
        T_k(n), s.
    first_iteration : float
        Duration of a full block's first iteration, s.
    slack : float
        min_j n_j / (a_j T_k(n)) − 1.
    kv, in_service : float
        Bounds on resident KV (tokens) and on residents.
    wait : float
        Estimate of the mean wait until admission, s; picks k.
    """

    block_iterations: int
    threshold: IntArray
    cycle_time: float
    first_iteration: float
    slack: float
    kv: float
    in_service: float
    wait: float


class _Lengths:
    """What the conditions for one block length k owe to lengths and server alone."""

    def __init__(self, problem: Problem, k: int) -> None:
        self._problem, self._k = problem, k
        longest = problem.workload.max_output_tokens
        self.cohort: IntArray = problem.workload.max_prefill_tokens + (-(-longest // k) - 1)

    @cached_property
    def memory(self) -> BlockProfile:
        return self._problem.memory_profile.block(self._k)

    @cached_property
    def _times(self) -> BlockProfile:
        problem = self._problem
        if problem.memory_profile is problem.mean_profile:
            return self.memory
        return problem.mean_profile.block(self._k)

    @cached_property
    def _prefill(self) -> FloatArray:
        """Work of the prompts under every piece, (I, A), s."""
        _, per_prefill, _, _, per_attention = self._problem.coefficients.T
        workload = self._problem.workload
        own = np.outer(per_prefill, workload.mean_prefill_tokens)
        return np.asarray(own + np.outer(per_attention, workload.prefill_attention))

    @cached_property
    def work(self) -> FloatArray:
        """w_ij(r), (I, A, k), s."""
        _, _, per_decode, per_kv, _ = self._problem.coefficients.T
        times = self._times
        work = per_decode[:, None, None] * times.decodes + per_kv[:, None, None] * times.decode_kv
        work[:, :, 0] += self._prefill
        return np.asarray(work)

    @cached_property
    def first_work(self) -> FloatArray:
        """w_ij(0), (I, A), s."""
        _, _, per_decode, per_kv, _ = self._problem.coefficients.T
        decodes, read = self._times.first_iteration
        return np.asarray(np.outer(per_decode, decodes) + np.outer(per_kv, read) + self._prefill)

    @cached_property
    def slope(self) -> FloatArray:
        """What one more entry adds to T_k at least, (A,), s; with one piece, what it adds."""
        if len(self._problem.coefficients) == 1:
            return np.asarray(self._problem.work[0])
        return np.asarray(self.work.min(axis=0).sum(axis=1))

    @cached_property
    def variance(self) -> FloatArray | None:
        """Variance of the difference of two pieces in iteration r, (I, I, A, k), s²; None if all 0."""
        spread = self._problem.work_variance
        return None if spread is None else fold(spread, self._k)


class _Block:
    """The conditions on thresholds for one block length k."""

    def __init__(self, problem: Problem, k: int) -> None:
        self.k = k
        self.rate = problem.rate
        self._quantile, self._is_fixed = problem.quantile, problem.memory_profile.is_fixed
        self._limits = (problem.capacity, problem.slots, problem.server.token_budget)
        lengths: _Lengths | None = problem.shared.get(("block", k))
        if lengths is None:
            lengths = _Lengths(problem, k)
            if problem.size <= KEPT:
                problem.shared["block", k] = lengths
        self._lengths = lengths
        self._base: FloatArray = problem.coefficients[:, 0]
        self._memory, self._slope = lengths.memory, lengths.slope
        self._is_linear = len(self._base) == 1
        self.protected = problem.protected_rate(self._slope)
        self._bound = problem.memory_profile.block_bound(k)

    def _under_pieces(self, n: FloatArray) -> FloatArray:
        """Mean durations of the iterations of a full block under every piece, (I, k), s."""
        return np.asarray(self._base[:, None] + n @ self._lengths.work)

    def times(self, n: FloatArray) -> FloatArray:
        """Durations of the iterations of a full block, (k,), s."""
        mean = self._under_pieces(n)
        if self._lengths.variance is None:
            return np.asarray(mean.max(axis=0))
        return expected_largest(mean, n @ self._lengths.variance)

    def cycle_time(self, n: FloatArray) -> float:
        if self._is_linear:
            return float(self.k * self._base[0] + n @ self._slope)
        return float(self.times(n).sum())

    def first_iteration(self, n: FloatArray) -> float:
        """Mean duration of the first iteration of a full block, s."""
        if self._is_linear:
            return float(self._base[0] + n @ self._lengths.first_work[0])
        return float(self.times(n)[0])

    def robust_thresholds(self, n: FloatArray, cycle_time: float) -> FloatArray:
        """What thresholds must be, given T_k(n), to keep up with rates that are off (`policy.robust`)."""
        assert self.protected is not None
        return np.asarray(self.protected * (cycle_time - float(n @ self._slope)))

    def mean_batch_cycle(self, n: FloatArray, direction: FloatArray) -> tuple[float, float]:
        """Cycle of mean batches, a convex bound of T_k from below, and a subgradient along `direction`."""
        if self._is_linear:
            return self.cycle_time(n), float(direction @ self._slope)
        times = self._under_pieces(n)
        piece = times.argmax(axis=0)
        iterations = np.arange(self.k)
        slopes = direction @ self._lengths.work
        return float(times[piece, iterations].sum()), float(slopes[piece, iterations].sum())

    def kv(self, n: FloatArray) -> float:
        if self._is_fixed:
            return float((n @ self._memory.mean).max())
        return float(self._quantile(n @ self._memory.mean, n @ self._memory.variance).max())

    def in_service(self, n: FloatArray) -> float:
        memory = self._memory
        if self._is_fixed:
            return float(n @ memory.in_service)
        return float(self._quantile(n @ memory.in_service, n @ memory.in_service_variance))

    def exceeded(self, n: FloatArray) -> str | None:
        """The first of the server's limits that thresholds `n` break: "memory", "batch", "tokens"."""
        capacity, slots, budget = self._limits
        mean, variance = self._bound
        most = self._quantile(n @ mean, n @ variance)  # no need to look at every iteration where this fits
        if most > capacity and self.kv(n) > capacity * (1 + ROUNDING):
            return "memory"
        if slots < math.inf and self.in_service(n) > slots * (1 + ROUNDING):
            return "batch"
        if budget is not None and np.ceil(n) @ self._lengths.cohort > budget:
            return "tokens"
        return None


def _whole(amount: FloatArray) -> FloatArray:
    return np.maximum(np.ceil(amount * (1.0 - ROUNDING)), 1.0)


def _continuous(amount: FloatArray) -> FloatArray:
    return amount


def least_thresholds(
    block: _Block,
    stretch: float,
    interval: tuple[float, float],
    whole: Callable[[FloatArray], FloatArray] = _whole,
) -> FloatArray | str:
    """Smallest n with n ≥ stretch · a · T_k(n), if within the server's limits; else what forbids it.

    `interval` holds bounds of β from `Problem.equilibrium`; `whole` rounds requests up. Where rates may be
    off, also n ≥ the block's `robust_thresholds` (which grow with n, so the climb is the same).
    """
    beta, beta_max = interval
    rate = block.rate
    is_robust = block.protected is not None
    if is_robust:
        robust = block.robust_thresholds(np.zeros_like(rate), block.cycle_time(np.zeros_like(rate)))
        if not np.all(np.isfinite(robust)):
            return "time"
    unchecked: list[FloatArray] = []
    while beta <= beta_max * (1 + ROUNDING):
        n = whole(np.maximum(rate * beta, robust) if is_robust else rate * beta)
        unchecked.append(n)
        if len(unchecked) == CHECKED_TOGETHER:
            if (broken := _first_broken(block, unchecked)) is not None:
                return broken
            unchecked = []
        cycle = block.cycle_time(n)
        reached = stretch * cycle
        needed = wanted = rate * reached
        if is_robust:
            robust = block.robust_thresholds(n, cycle)
            needed = np.maximum(wanted, robust)
        if (needed <= n * (1 + ROUNDING)).all():
            return _first_broken(block, unchecked) or n
        value, slope = block.mean_batch_cycle(np.maximum(n, wanted), rate * (wanted > n))
        climb = stretch * value - reached
        if climb > 0.0 and stretch * slope >= 1.0:
            break
        beta = reached + (climb / (1.0 - stretch * slope) if climb > 0.0 else 0.0)
    return _first_broken(block, unchecked) or "time"


def _first_broken(block: _Block, climbed: list[FloatArray]) -> str | None:
    """The limit that the first of these thresholds to break one breaks; they grow, so the last is looked at first."""
    if not climbed or block.exceeded(climbed[-1]) is None:
        return None
    return next(broken for n in climbed if (broken := block.exceeded(n)) is not None)


def block_lengths(longest: int, block_iterations: int | None = None, size: int = 0) -> list[int]:
    """Block lengths to try: the one given, or all up to 32, then steps of 5 % up to the longest output.

    For `size` types times stages above `MANY`: all up to 8, then steps of 25 %.
    """
    if block_iterations is not None:
        return [
            check_count(
                "block_iterations",
                block_iterations,
                minimum=1,
                maximum=longest,
                remedy="Longer blocks than the longest output end early.",
            )
        ]
    dense, step = (8, 1.25) if size > MANY else (32, 1.05)
    steps = round(math.log(max(longest, dense + 1) / dense) / math.log(step)) + 1
    lengths = np.unique(np.round(np.geomspace(dense, max(longest, dense + 1), steps)).astype(int))
    return [k for k in sorted({*range(1, dense + 1), *lengths.tolist(), longest}) if k <= longest]


def _mean_wait(problem: Problem, n: FloatArray, cycle: float) -> float:
    """Estimate of the mean wait until admission, s."""
    queue = (n - 1.0) / 2.0 + queue_estimate(n, problem.rate * cycle) * problem.queue_factor(n / cycle)
    return float(queue.sum() / problem.rate.sum()) + cycle / 2.0


def _slack_of(problem: Problem, n: FloatArray, cycle: float) -> float:
    return float((n / (problem.rate * cycle)).min()) - 1.0


def _plan(problem: Problem, block: _Block, n: FloatArray) -> WaitPlan:
    cycle = block.cycle_time(n)
    return WaitPlan(
        block.k,
        n.astype(np.int64),
        cycle,
        block.first_iteration(n),
        _slack_of(problem, n, cycle),
        block.kv(n),
        block.in_service(n),
        _mean_wait(problem, n, cycle),
    )


def _least_wait(problem: Problem, n: FloatArray, cycle: float) -> float:
    """What the mean wait is at least with thresholds from `n` and cycles from `cycle` on, s: grows with both.

    Half a cycle and, of every type, the entry queue of the best threshold from n_j on: (n' − 1)/2 for a full
    threshold, and the queue that does not wait for one; of n' > n_j + 3 the first alone.
    """
    queue = (n + 3.0) / 2.0
    arrivals = problem.rate * cycle
    for more in range(4):
        queue = np.minimum(queue, (n + more - 1.0) / 2.0 + queue_estimate(n + more, arrivals))
    wait = float(queue.sum() / problem.rate.sum()) + cycle / 2.0
    return wait * (1.0 - SAFETY)


def _least_wait_in_blocks(problem: Problem, k: int, slack: Slack) -> float:
    """The same for tables in blocks of k iterations, before looking at a block; infinite where there is none.

    From the climb for mean batches, which last less. With one piece they last as long: what is returned then is
    the wait of the table with the slack given, if its residents fit.
    """
    stretch = 1.0 + (0.0 if slack == "auto" else slack)
    low, high = problem.equilibrium(stretch, k)
    base, beta = k * problem.coefficients[:, 0], low
    while beta <= high * (1 + ROUNDING):
        n = _whole(problem.rate * beta)
        cycle = float((base + problem.work @ n).max())
        reached = stretch * cycle
        if np.all(problem.rate * reached <= n * (1 + ROUNDING)):
            if slack == "auto" or len(base) > 1 or problem.rate_error is not None:
                return _least_wait(problem, n, cycle)
            return min(
                _mean_wait(problem, n, cycle) * (1.0 - SAFETY), sys.float_info.max
            )  # critical: no mean
        beta = reached
    return math.inf


class _Search:
    """The plan for block length k: with the slack given, or by bisection for the largest that there is.

    Attributes
    ----------
    plan : WaitPlan or str
        The plan of the largest slack found so far, or why there is none: a limit, or "wait" (given up, because its mean
        wait is longer than asked for).
    """

    def __init__(
        self,
        problem: Problem,
        k: int,
        slack: Slack,
        longest_wait: float = math.inf,
        tried: list[float] | None = None,
    ) -> None:
        """Look for the least slack and double it; of the 1 + ε in `tried` (some were given up there) the last first."""
        self._problem, self._k = problem, k
        self._longest_wait, self._tried = longest_wait, tried
        self._reached = (
            0.0  # T_k of thresholds found: those of a larger margin are no smaller, nor is their cycle
        )
        self._low = self._high = 1.0
        self._block: _Block | None = None
        found = self._first(slack)
        self.plan = found if isinstance(found, str) else _plan(problem, self._block_of_k, found)

    @property
    def _block_of_k(self) -> _Block:
        if self._block is None:
            self._block = _Block(self._problem, self._k)
        return self._block

    def _at(self, stretch: float) -> FloatArray | str:
        low, high = self._problem.equilibrium(stretch, self._k)
        if low > high:
            return "time"
        start = max(low, stretch * self._reached * (1.0 - SAFETY))
        return least_thresholds(self._block_of_k, stretch, (start, high))

    def _is_long(self, stretch: float, n: FloatArray) -> bool:
        if math.isinf(self._longest_wait):
            return False
        if _least_wait(self._problem, n, self._block_of_k.cycle_time(n)) <= self._longest_wait:
            return False
        if self._tried is not None:
            self._tried.append(stretch)
        return True

    def _first(self, slack: Slack) -> FloatArray | str:
        problem = self._problem
        if _memory_over_a_block(problem, self._k) > problem.capacity * (1 + ROUNDING):
            return "memory"
        if slack != "auto":
            return self._at(1.0 + slack)
        if self._tried:
            found = self._at(self._tried[-1])
            if not isinstance(found, str) and self._is_long(self._tried[-1], found):
                return "wait"
        best = self._at(1.0)
        if isinstance(best, str):
            return best
        self._reached = self._block_of_k.cycle_time(best)
        self._low = 1.0 + _slack_of(problem, best, self._reached)
        self._high = 2.0 * self._low
        while not isinstance(found := self._at(self._high), str):
            best, self._low, self._high = found, self._high, 2.0 * self._high
            self._reached = self._block_of_k.cycle_time(best)
            if self._is_long(self._low, best):
                return "wait"
        return best

    def refined(self, tolerance: float, longest_wait: float = math.inf) -> WaitPlan | str:
        """The plan once 1 + ε is known to within `tolerance`, relative; goes on where it stopped."""
        self._longest_wait = longest_wait
        best: FloatArray | None = None
        while not isinstance(self.plan, str) and self._high - self._low > tolerance * self._low:
            middle = (self._low + self._high) / 2.0
            found = self._at(middle)
            if isinstance(found, str):
                self._high = middle
                continue
            best = found
            self._reached = self._block_of_k.cycle_time(best)
            if self._is_long(middle, best):
                self.plan = "wait"
            self._low = max(middle, 1.0 + _slack_of(self._problem, best, self._reached))
        if best is not None and not isinstance(self.plan, str):
            self.plan = _plan(self._problem, self._block_of_k, best)
        return self.plan


def _solve(problem: Problem, k: int, slack: Slack) -> WaitPlan | str:
    """The plan for block length k, or why there is none."""
    return _Search(problem, k, slack).refined(SLACK_TOLERANCE)


def _memory_over_a_block(problem: Problem, k: int) -> float:
    """Mean KV over a full block at the least thresholds can be: a quick bound from below."""
    low, high = problem.equilibrium(1.0, k)
    if low > high:
        return 0.0
    least = np.maximum(problem.rate * low * (1 - ROUNDING), 1.0)
    return float(least @ problem.memory_profile.life_kv) / k


def _check_limited(problem: Problem, slack: Slack) -> None:
    if slack == "auto" and math.isinf(problem.capacity) and math.isinf(problem.slots):
        raise InputError(
            "slack",
            "auto",
            "be a number where neither KV memory nor the batch is limited: there is no largest slack",
            "Give e.g. slack=0.1.",
        )


def plan_wait(problem: Problem, fluid: FluidSolution, slack: Slack, block_iterations: int | None) -> WaitPlan:
    """The best plan over the block lengths, or `InfeasibleError` with the reason and the largest load."""
    lengths = block_lengths(problem.mean_profile.stages, block_iterations, problem.size)
    _check_limited(problem, slack)
    margin = 0.0 if slack == "auto" else slack
    best: _Search | None = None
    wait = math.inf
    tried: list[float] = []
    for least, k in sorted((_least_wait_in_blocks(problem, k, slack), k) for k in lengths):
        if least > wait or math.isinf(least):
            break
        search = _Search(problem, k, slack, wait, tried)
        plan = search.refined(SEARCH_TOLERANCE, wait)
        if not isinstance(plan, str) and (best is None or plan.wait < wait):
            best, wait = search, plan.wait
    if best is not None:
        exact = best.refined(SLACK_TOLERANCE)
        assert isinstance(exact, WaitPlan)
        return exact
    blocks = f"of {lengths[0]}" if len(lengths) == 1 else f"of 1 to {lengths[-1]:,}"
    raise no_table(
        f"WAIT table in blocks {blocks} iterations",
        problem,
        fluid,
        margin,
        why_not(problem, margin, lengths),
        lambda offered, k: wait_exists(offered, margin, k),
        lengths,
    )


def wait_exists(problem: Problem, margin: float, k: int) -> bool:
    """Whether a table with this slack exists in blocks of k iterations."""
    return not isinstance(_solve(problem, k, margin), str)


def why_not(problem: Problem, margin: float, lengths: Sequence[int]) -> list[str]:
    """What forbids thresholds that need not be whole, per block length; "rounding" where nothing does."""
    reasons = []
    for k in lengths:
        interval = problem.equilibrium(1.0 + margin, k)
        found: FloatArray | str = "time"
        if interval[0] <= interval[1]:
            found = least_thresholds(_Block(problem, k), 1.0 + margin, interval, _continuous)
        reasons.append(found if isinstance(found, str) else "rounding")
    return reasons


def wait_overflow(problem: Problem, plan: WaitPlan) -> Tail:
    """P(KV > C) with every entry full and its requests independent, where mean + z sd is largest in a block.

    Of types that hold more paused than running then, what they hold paused.
    """
    k, n = plan.block_iterations, plan.threshold.astype(np.float64)
    profile = problem.mean_profile
    memory = profile.block(k)
    mean, variance = n @ memory.mean, n @ memory.variance
    r = int(problem.quantile(mean, variance).argmax())
    runs = memory.running_kv[:, r] >= memory.paused_kv
    longest, workload = problem.worst_profile.block(k), problem.workload
    largest = float(n @ np.where(runs, longest.running_kv[:, r], longest.paused_kv))
    if largest <= problem.capacity:
        return Tail(0.0, 0.0, math.inf)
    most = float((workload.max_prompt_tokens + workload.max_output_tokens).max()) + problem.padding
    if (tail := negligible(problem.capacity, float(mean[r]), float(variance[r]), most)) is not None:
        return tail
    present = profile.present
    parts = []
    for extra, first, mine in ((0, r, runs), (-1, k, ~runs)):
        stages = np.arange(first, profile.stages, k)
        at, kind = np.nonzero((present[:, stages] > 0.0).T & mine)  # stages lie together in memory
        parts.append((kind, stages[at], np.full(len(at), extra + problem.padding)))
    kind, stage, shift = (np.concatenate(part) for part in zip(*parts, strict=True))
    _, rank = np.unique(n, return_inverse=True)
    if rank.any():  # equal counts together
        order = np.argsort(rank.astype(np.int16 if len(n) < 1 << 15 else np.int64)[kind], kind="stable")
        kind, stage, shift = kind[order], stage[order], shift[order]
    held = Held(problem, kind, stage, shift, n[kind])
    return tail_of(held, problem.capacity, float(mean[r]), math.sqrt(variance[r]), largest)


def wait_certificate(
    problem: Problem, plan: WaitPlan, tail: Tail | None, horizon: float | None
) -> dict[str, Any]:
    """What a compiled WAIT table guarantees; entries as in `fluidsched.policy.problem.entry`.

    `tail` is its `wait_overflow`, None where memory holds with certainty.
    """
    k, n, cycle, rate = plan.block_iterations, plan.threshold, plan.cycle_time, problem.rate
    workload = problem.workload
    arrivals = rate * cycle
    plain = embedded_queue_means(n, np.where(arrivals < n * (1 - ROUNDING), arrivals, math.inf), wait=False)
    factor = problem.queue_factor(n / cycle)
    queue = (n - 1) / 2.0 + factor * plain
    ttft = queue / rate + cycle / 2.0 + plan.first_iteration
    longest_requests = problem.worst_profile.block(k)
    worst = float((n @ longest_requests.mean).max()) if problem.is_bounded else math.inf
    blocks_per_life = np.asarray(problem.mean_profile.present[:, ::k].sum(axis=1))
    lost = float((workload.mean_output_tokens * (queue + arrivals + (blocks_per_life + 1.0) * n)).sum())
    outputs = float(rate @ workload.mean_output_tokens)
    prompts = float(n @ workload.max_prefill_tokens)
    earlier = n * (-(-workload.max_output_tokens // k) - 1)
    longest = problem.server.iteration_time(
        prompts,
        float(earlier.sum()),
        float(n @ longest_requests.decode_kv[:, 0]),
        float(n @ workload.max_prefill_attention),
    )
    lengths_known = "certain" if problem.is_bounded else "probability"
    timing = "certain" if problem.has_fixed_times else "expectation"
    return {
        "memory": entry(
            plan.kv,
            "tokens",
            "max_r Σ_j n_j max(f_j(r), g_j)"
            + ("" if problem.is_certain else " + z sqrt(Σ_j n_j max(φ_j(r), γ_j))"),
            problem.guarantee,
            capacity=problem.capacity,
            worst_case=worst,
            z=problem.z,
        ),
        "overflow_probability": overflow_entry(problem, tail, "every entry full"),
        "in_service": entry(
            plan.in_service,
            "requests",
            "Σ_j n_j Σ_i P(S_j > ik)" + ("" if problem.is_certain else " + z sd"),
            "certain" if problem.is_certain else "approximation",
            limit=problem.server.max_batch_size,
        ),
        "cycle_time": entry(
            cycle,
            "s",
            "T_k(n) = Σ_r " + ("max_i" if problem.is_fixed else "E max_i") + " (c0_i + Σ_j n_j w_ij(r))",
            timing,
        ),
        "slack": entry(plan.slack, "", "min_j n_j / (a_j T_k(n)) − 1", timing),
        "slack_per_cycle": entry(
            float((n / rate).min()) - cycle,
            "s",
            "min_j n_j / a_j − T_k(n)",
            timing,
            per_type=n / rate - cycle,
        ),
        "robustness": entry(
            plan.slack,
            "relative error of all rates at once",
            "margin_j = n_j / (a_j T_k(n)) − 1: the table keeps up with any rates up to (1 + margin_j) a_j, and its "
            "memory bound holds for all rates",
            timing,
            per_type=n / arrivals - 1.0,
            all_rates_30_percent_up=plan.slack >= 0.3,
        ),
        "largest_cohort": entry(
            float(prompts + earlier.sum()),
            "tokens",
            "Σ_j n_j (p_max + ⌈o_max / k⌉ − 1)",
            lengths_known,
            iteration_s=float(longest),
        ),
        "throughput": entry(
            float(rate.sum()),
            "requests/s",
            "Σ_j a_j in the long run, iff the slack is positive; over H seconds at most loss_tokens/H below "
            "Σ_j a_j E[o_j], loss_tokens = Σ_j E[o_j] (E[W_j] + a_j T + (E⌈S_j/k⌉ + 1) n_j)",
            "expectation",
            output_tokens_per_s=outputs,
            loss_tokens=lost,
            horizon_s=horizon,
            output_tokens_per_s_over_horizon=None if horizon is None else max(outputs - lost / horizon, 0.0),
        ),
        "queue": entry(
            float((queue + arrivals / 2.0).sum()),
            "requests",
            "Σ_j E[W_j] + a_j T / 2, E[W] = (n − 1)/2 + factor · E[V], V' = max(V + X − n, 0), X ~ Poisson(a_j T)",
            "expectation",
            per_type=queue + arrivals / 2.0,
            factor=factor,
            factor_formula="1 + a_j Σ_i (n_i / T) Var(w_i): random cycles; 1 for fixed lengths",
            holds_for="Poisson arrivals at the admitted rates",
        ),
        "ttft": entry(
            float(rate @ ttft / rate.sum()),
            "s",
            "E[W_j] / a_j + T / 2 + first iteration of a full block, mean over requests",
            "expectation",
            per_type=ttft,
            holds_for="Poisson arrivals at the admitted rates",
        ),
    }


@dataclass(frozen=True, repr=False)
class WaitCurve(Tabular):
    """Memory and wait against the block length, K lengths; NaN where no table exists.

    Attributes
    ----------
    block_iterations : int64[K]
        k.
    slack : float64[K]
        Slack reached.
    kv : float64[K]
        Bound on resident KV, tokens.
    wait : float64[K]
        Bound on the mean wait until admission, s (estimate of the queue part).
    reason : tuple of str or None, length K
        Why there is no table: "time", "memory", "batch", "tokens"; None where there is one.
    capacity : float
        KV tokens the server holds.
    """

    block_iterations: IntArray
    slack: FloatArray
    kv: FloatArray
    wait: FloatArray
    reason: tuple[str | None, ...]
    capacity: float

    def __repr__(self) -> str:
        exists = ~np.isnan(self.wait)
        head = f"WaitCurve: tables at {np.count_nonzero(exists)} of {len(exists)} block lengths"
        if not exists.any():
            return head
        best = int(np.nanargmin(self.wait))
        return (
            f"{head}; shortest mean wait {self.wait[best]:.3g} s at k = {self.block_iterations[best]}, "
            f"with {self.kv[best]:,.0f} of {self.capacity:,.0f} KV tokens"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per block length."""
        import pandas as pd

        columns = {name: getattr(self, name) for name in ("slack", "kv", "wait", "reason")}
        return pd.DataFrame(columns, index=pd.Index(self.block_iterations, name="block_iterations"))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw memory and wait against the block length; see `fluidsched.plots.wait_curve`."""
        from fluidsched import plots

        return plots.wait_curve(self, ax=ax)


def wait_curve(
    fluid: FluidSolution,
    *,
    slack: Slack = "auto",
    overflow_probability: float = 0.01,
    block_iterations: Sequence[int] | None = None,
) -> WaitCurve:
    """Return the memory a WAIT table needs and the wait it adds, against its block length.

    Parameters
    ----------
    fluid : FluidSolution
    slack, overflow_probability
        As in `compile_policy`.
    block_iterations : sequence of int, optional
        Block lengths; None: those that `compile_policy` tries.

    Returns
    -------
    WaitCurve
    """
    problem = Problem.of(fluid, overflow_probability)
    longest = problem.mean_profile.stages
    lengths = (
        block_lengths(longest, size=problem.size)
        if block_iterations is None
        else [block_lengths(longest, k)[0] for k in block_iterations]
    )
    slack = check_slack(slack)
    _check_limited(problem, slack)
    plans = [_solve(problem, k, slack) for k in lengths]

    def column(name: str) -> FloatArray:
        return np.array([math.nan if isinstance(p, str) else getattr(p, name) for p in plans])

    return WaitCurve(
        np.array(lengths, dtype=np.int64),
        column("slack"),
        column("kv"),
        column("wait"),
        tuple(p if isinstance(p, str) else None for p in plans),
        problem.capacity,
    )
