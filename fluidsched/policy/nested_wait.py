r"""Compiling Nested WAIT: segments, thresholds, buffers and block length when output lengths are not known.

**Rule** (Ao, Luo, Simchi-Levi, Wang, arXiv 2504.11320, Algorithm 2, with decisions every ℓ iterations). All
requests are one stream; only how many iterations one has been served is looked at. Blocks b = 0, 1, … of ℓ
iterations are cut at b_1 = 0 < b_2 < … < b_L into segments; segment k ends at position r_k = b_{k+1}ℓ − 1. A
run of the segments 1..K takes n_k requests from each of their blocks, K the largest number such that the
entries of all k ≤ K hold n_k.

**Law.** With Λ the admitted rate and S(s) = P(o > s), segment k is reached at rate Λ_k = Λ S(b_k ℓ), by a share
p_k = Λ_k/Λ_{k−1} of those in segment k − 1. Nothing else of the outputs is used, and of the prompts their mean,
square and maximum given o > s.

**Time.** A run of all segments, each full when it begins, lasts in the mean

    T(n) = Σ_{r<ℓ} max_i ( c0_i + Σ_b n_{k(b)} S(bℓ + r)/S(b_k ℓ) · (work of an iteration at position bℓ + r) ),

later segments run more rarely still. The table keeps up with margin ε iff (1 + ε) Λ T(n) ≤ n_1, and every
boundary queue is stable iff p_k n_{k−1} < n_k; n_k < n_{k−1} is what a segment is for. With S = 1 inside the
segments this T(n) is the theorem's, which `cycle_time` states as the longest.

**Memory.** Places of block b hold at most p + (b + 1)ℓ − 1 tokens and a queue before segment k at most
p + r_{k−1} a request, so with buffers x_k the residents hold at most

    M(n) + Σ_{k≥2} (p + r_{k−1}) x_k,        M(n) = Σ_b n_{k(b)} (p + (b + 1)ℓ − 1).

Queue k exceeds x_k = n_k + ln(L(1 + H/(ℓ c0))/δ)/θ_k within H seconds with probability at most δ/L (`lundberg`);
the smallest such x_k is computed exactly (`first_passage`). If every length ends at some r_k and ℓ = 1, n_k = βΛ_k
gives M(n) = β Σ_j λ_j W_j.

**Prompts that differ.** p is the largest prompt of those that get that far: certain, and wasteful where few
prompts are long. Who stands where when the c-th cohort enters is decided by output lengths alone, so given
that, prompts are independent with their laws given o > s; taking every place as filled, Bernstein's inequality
bounds what all prompts hold by

    μ + Mλ/3 + √((Mλ/3)² + 2Vλ),        λ = ln(L(1 + H/(ℓ c0))/δ),

but for probability δ/L over the horizon (μ, V: means and variances added up, M: largest excess over a mean):
the share of δ that L segments with L − 1 queues leave over. The smaller of the two is taken and named.

**Choosing thresholds.** n(b) = ⌈n_1 S + s √n_1 (√S − S)⌉, S = S(bℓ): proportional to the flow, with a reserve of s
standard deviations that grows from segment to segment, since p_k falls short of n_k/n_{k−1} by
s √(n_1 S)(1 − √p_k)/n_{k−1}. Several s are tried.

**Choosing boundaries.** With thresholds that depend on the cut alone, memory is a sum over consecutive cuts

    cost(i → j) = n(i) Σ_{i≤b<j} held(b) + (p + jℓ − 1)( n(j) + c/θ(n(i), p_ij, n(j)) ),      c = ln(L(1 + H/(ℓ c0))/δ),

and the best cuts are a shortest path. c depends on the number L of segments: a path for the c of an assumed L̂ is a
bound for all L ≥ L̂, so L̂ = 1 and then the length of the path last found are assumed until the bound meets the best
solution; fewer segments than that are looked at one number at a time, as long as they cost less. A solution on a
coarser grid first bounds the cost; edges through which no path is as good are dropped, first by base memory, then
with an upper bound on θ (`exponents_at_most`), then with θ itself.

**Choosing ℓ and n_1.** For each ℓ the smallest n_1 that keeps up with margin ε, or with ``slack="auto"`` the n_1 and s
of the largest slack; of all ℓ the one with the smallest mean time spent waiting at the entry and at boundaries. While
these are compared, cuts lie on a coarse grid and buffers are Lundberg's; the plan chosen is then refined. But for
rounding, slack grows with n_1 and falls with s, so for each s the largest n_1 that memory holds is sought: below
capacity/Σ_b S(bℓ) held(b), as n(b) ≥ n_1 S, by interpolating what is filled. Rounding and the choice of cuts, which
looks at memory alone, move slack by some thousandths, so the largest is found to within that; small n_1 are looked at
one by one. An ℓ is passed over if the cuts and s of the best plan so far, in its blocks and with a larger n_1, fit with
slack and wait longer: its largest slack has a larger n_1 still.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_choice, check_count, check_real
from fluidsched._display import Tabular
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.policy.problem import Problem, Slack, entry, no_table, queue_estimate
from fluidsched.policy.profiles import FloatArray
from fluidsched.policy.table import Segment
from fluidsched.policy.wait import block_lengths
from fluidsched.queues import embedded_queue_mean, exact_buffer, lundberg_buffer, lundberg_exponents
from fluidsched.queues.lundberg import exponents_at_most

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.fluid import FluidSolution

__all__ = [
    "NestedOptions",
    "NestedPlan",
    "SegmentCurve",
    "Stream",
    "check_bounded",
    "nested_certificate",
    "nested_exists",
    "plan_nested",
    "segment_curve",
    "shortest_cuts",
    "why_not",
]

IntArray = NDArray[np.int64]
Segments = Sequence[int] | str

HORIZON = 3600.0
"""Default horizon of the overflow probability, s."""

RESERVES = (0.25, 0.5, 1.0, 2.0, 4.0)  # s of the thresholds
STABLE = (
    1.0 - 1e-9
)  # of a threshold: the most that may come to it in the mean; beyond, exponents are rounding
MOST_CUTS = 4096
COARSE_CUTS = 128
PAIRS = 1 << 17  # of cuts looked at together: what the processor's cache holds
RELAXATIONS = 3
REFINEMENTS = 3
ROUNDED = 24  # largest n_1 for which rounding of the thresholds after it matters: all nearby are looked at
FILLINGS = 5  # of n_1 tried with one reserve
FIRST_FILL, FILL, FULL = 0.9, 0.985, 0.97  # shares of a limit: tried first, aimed at, large enough
EXACT_STATES = 512  # largest Lundberg buffer below which the exact one is computed
MOST_UNSTABLE = 64  # first thresholds tried in a row that no whole thresholds after them make stable
BUFFERS = ("exact", "lundberg")
CHOICES = ("optimal", "quantiles")
_NO_EDGES = (np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))


@dataclass(frozen=True)
class NestedOptions:
    """How a Nested WAIT table is to be compiled; arguments of `compile_policy`.

    Attributes
    ----------
    slack : "auto" or float
    block_iterations : int or None
    horizon : float
        H, s.
    segments : sequence of int, "optimal" or "quantiles"
        Boundaries r_k, or how they are chosen.
    segment_count : int or None
        L; None: with "optimal" the best.
    buffer : {"exact", "lundberg"}
    """

    slack: Slack
    block_iterations: int | None
    horizon: float
    segments: Segments
    segment_count: int | None
    buffer: str

    def __post_init__(self) -> None:
        check_choice("buffer", self.buffer, BUFFERS)
        if isinstance(self.segments, str):
            check_choice("segments", self.segments, CHOICES, "Or give the boundaries, e.g. [99, 399].")
            if self.segment_count is not None:
                check_count("segment_count", self.segment_count, minimum=1)
            elif self.segments == "quantiles":
                raise InputError("segment_count", None, 'be given with segments="quantiles"')
        elif self.segment_count is not None:
            raise InputError(
                "segment_count", self.segment_count, "be left out where the boundaries are given"
            )


@dataclass(frozen=True)
class NestedPlan:
    """Segments for one block length.

    Attributes
    ----------
    block_iterations : int
        ℓ.
    first : int64[L]
        First block b_k of each segment.
    threshold : int64[L]
        n_k, requests.
    buffer : float64[L]
        x_k, requests; 0 for the first.
    share : float64[L]
        p_k; 1 for the first.
    exponent : float64[L]
        θ_k, per request; infinite for the first.
    blocks : int
        B, blocks of the longest output.
    base, memory, certain_memory : float
        M(n); what residents hold at most as certified, and with the longest prompts everywhere. Tokens.
    prompts : str
        "longest" or "law": which bound of the prompts `memory` takes.
    in_service : float
        Places and buffers, requests.
    cycle_time, longest_cycle, first_iteration : float
        T(n) in the mean and with every place full and the longest prompts; its first iteration in the mean. s.
    slack : float
        n_1/(Λ T(n)) − 1.
    wait : float
        Estimate of the mean time a request spends waiting at the entry and at boundaries, s; picks ℓ.
    method : tuple of str, length L
        How each buffer was found: "exact" or "lundberg"; "none" for the first.
    reserve : float
        s of the thresholds, standard deviations.
    """

    block_iterations: int
    blocks: int
    first: IntArray
    threshold: IntArray
    buffer: FloatArray
    share: FloatArray
    exponent: FloatArray
    base: float
    memory: float
    certain_memory: float
    prompts: str
    in_service: float
    cycle_time: float
    longest_cycle: float
    first_iteration: float
    slack: float
    wait: float
    method: tuple[str, ...]
    reserve: float

    @property
    def segments(self) -> tuple[Segment, ...]:
        """As a table states them."""
        ends = [*self.first[1:].tolist(), self.blocks]
        return tuple(
            Segment(end * self.block_iterations - 1, threshold, buffer)
            for end, threshold, buffer in zip(
                ends, self.threshold.tolist(), self.buffer.tolist(), strict=True
            )
        )

    def largest_cohort(self, problem: Problem) -> float:
        """Tokens of the first iteration of a run of all segments, all full, with the longest prompts."""
        sizes = np.diff([*self.first.tolist(), self.blocks])
        decodes = float(self.threshold @ sizes - self.threshold[0])
        return float(self.threshold[0]) * float(problem.workload.max_prefill_tokens.max()) + decodes


class Stream:
    """All requests of a problem as one stream, in blocks of ℓ iterations; B blocks, ℓB stages.

    Attributes
    ----------
    rate : float
        Λ, requests/s.
    share : float64[B]
        P(o > bℓ).
    held : float64[B]
        Tokens a place of the block holds at most, with the mean prompt (of those that get there).
    entry_held : float64[B]
        The same of one that waits before the block.
    excess : float64[B]
        Largest prompt of those that get there less the mean.
    variance : float64[B]
        Of the prompt.
    """

    def __init__(self, problem: Problem, block: int) -> None:
        self.problem = problem
        self.block = block
        self.rate = float(problem.rate.sum())
        mixed = problem.mixed_stages
        stages = -(-mixed.shape[1] // block) * block
        padded: FloatArray = np.pad(mixed, ((0, 0), (0, stages - mixed.shape[1])))
        self._present, self._prompt, square = padded
        alive: FloatArray = self._present[::block]
        by_output = np.argsort(-problem.workload.max_output_tokens, kind="stable")
        longest_prompt = np.maximum.accumulate(problem.workload.max_prompt_tokens[by_output])
        still = np.searchsorted(-problem.workload.max_output_tokens[by_output], -np.arange(0, stages, block))
        longest = longest_prompt[still - 1]  # of the types whose outputs can be longer than s
        mean = self._prompt[::block] / alive
        end = np.arange(1, len(alive) + 1) * block - 1.0 + problem.padding
        self.share = alive
        self.held = mean + end
        self.entry_held = mean + end - block
        self.excess = np.maximum(longest - mean, 0.0)
        self.variance = np.maximum(square[::block] / alive - mean * mean, 0.0)
        self.below = np.append(0.0, np.cumsum(self.held))

    @property
    def blocks(self) -> int:
        """B."""
        return len(self.share)

    def thresholds(self, first: float, reserve: float, whole: bool = True) -> FloatArray:
        """n(b) of the module's text for every block; not whole: without rounding up."""
        root = np.sqrt(self.share)
        amount = first * self.share + reserve * math.sqrt(first) * (root - self.share)
        return np.ceil(amount * (1 - 1e-12)) if whole else amount

    def times(self, first: IntArray, threshold: FloatArray) -> FloatArray:
        """Mean durations of the ℓ iterations of a run of all segments, full when it begins; s."""
        sizes = np.diff([*first.tolist(), self.blocks]) * self.block
        per_request = np.repeat(threshold / self.share[first], sizes)
        decodes, reads = per_request * self._present, per_request * self._prompt
        reads += np.arange(len(reads)) * decodes
        decodes[0] = reads[0] = 0.0
        return self._under_pieces(decodes, reads, threshold[0], *self._mean_prompt)

    def longest_times(self, first: IntArray, threshold: FloatArray) -> FloatArray:
        """The same with every place full and every prompt the longest that gets there."""
        sizes = np.diff([*first.tolist(), self.blocks]) * self.block
        decodes = np.repeat(threshold, sizes)
        prompts = np.repeat(self.held + self.excess, self.block)
        within = np.tile(np.arange(self.block), self.blocks)
        reads = decodes * (prompts - (self.block - 1) + within - self.problem.padding)
        decodes[0] = reads[0] = 0.0
        workload = self.problem.workload
        tokens, attention = workload.max_prefill_tokens.max(), workload.max_prefill_attention.max()
        return self._under_pieces(decodes, reads, threshold[0], float(tokens), float(attention))

    def _under_pieces(
        self, decodes: FloatArray, reads: FloatArray, entering: float, prompt: float, attention: float
    ) -> FloatArray:
        base, per_prefill, per_decode, per_kv, per_attention = self.problem.coefficients.T
        by_iteration = [x.reshape(-1, self.block).sum(axis=0) for x in (decodes, reads)]
        work = np.outer(per_decode, by_iteration[0]) + np.outer(per_kv, by_iteration[1]) + base[:, None]
        work[:, 0] += entering * (per_prefill * prompt + per_attention * attention)
        return np.asarray(work.max(axis=0))

    @cached_property
    def _mean_prompt(self) -> tuple[float, float]:
        """Mean tokens and attention work of a prompt, what is cached of it left out."""
        weight = self.problem.rate / self.rate
        workload = self.problem.workload
        return float(weight @ workload.mean_prefill_tokens), float(weight @ workload.prefill_attention)

    def memory(self, first: IntArray, threshold: FloatArray, buffer: FloatArray, log: float) -> _Memory:
        """What residents hold at most: base, certain, and by Bernstein's inequality with exponent `log`."""
        sizes = np.diff([*first.tolist(), self.blocks])
        places = np.repeat(threshold, sizes)
        base = float(places @ self.held)
        mean = base + float(buffer @ self.entry_held[first])
        excess = float(places @ self.excess + buffer @ self.excess[first])
        variance = float(places @ self.variance + buffer @ self.variance[first])
        third = float(self.excess.max()) * log / 3.0
        random = third + math.sqrt(third * third + 2.0 * variance * log)
        by_law = random < excess
        return _Memory(
            base, mean + (random if by_law else excess), mean + excess, "law" if by_law else "longest"
        )


@dataclass(frozen=True)
class _Memory:
    base: float
    needed: float
    certain: float
    prompts: str


def shortest_cuts(
    stream: Stream,
    threshold: FloatArray,
    cuts: IntArray,
    log: float,
    count: int | None = None,
    limit: float = math.inf,
) -> tuple[float, IntArray]:
    """Least memory and the first blocks of the segments that need it; infinite where no cuts are stable.

    Parameters
    ----------
    stream : Stream
    threshold : float64[B]
        n(b), should a segment begin at block b.
    cuts : int64[Q]
        Blocks at which a segment may begin; the first is 0.
    log : float
        ln((1 + H/(ℓ c0))/δ), to which ln L is added.
    count : int, optional
        Exactly so many segments; None: as many as is best.
    limit : float
        Tokens; where more are needed the memory returned may be infinite.

    Returns
    -------
    memory : float
        Tokens, with mean prompts and Lundberg buffers.
    first : int64[L]
    """
    if len(cuts) > 2 * COARSE_CUTS:
        thinned = np.unique(np.linspace(0, len(cuts) - 1, len(cuts) // 4).astype(np.int64))
        limit = min(limit, shortest_cuts(stream, threshold, cuts[thinned], log, count, limit)[0])
    graph = _Graph(stream, threshold, cuts, log, limit * (1 + 1e-9))
    if count is not None:
        value, path = graph.path_of_length(log + math.log(count), count)
        return value, cuts[path]
    best, chosen = math.inf, np.zeros(1, dtype=np.int64)
    assumed = 1
    while True:
        bound, path = graph.shortest_path(log + math.log(assumed))
        if math.isinf(bound):
            return math.inf, cuts[chosen]
        value = graph.cost_of(path, log + math.log(len(path)))
        if value < best:
            best, chosen = value, path
            graph.prune(best)
        if bound >= best * (1 - 1e-12):
            break
        assumed = max(assumed + 1, len(path))
    for fewer in range(len(chosen) - 1, 0, -1):  # whose own logarithm is smaller than any assumed so far
        value, path = graph.path_of_length(log + math.log(fewer), fewer)
        if value >= best:
            break
        best, chosen = value, path
    return best, cuts[chosen]


class _Graph:
    """Segments as edges i → j between cuts, the end the last; those into j lie together, from `start[j − 1]` on.

    Edges on no path that costs at most `limit`, at `log` or more, are left out.
    """

    def __init__(
        self, stream: Stream, threshold: FloatArray, cuts: IntArray, log: float, limit: float
    ) -> None:
        self.size = len(cuts)
        self.log = log
        self._threshold, self._share = threshold[cuts], stream.share[cuts]
        self._below = np.append(stream.below[cuts], stream.below[-1])
        self._queue = stream.entry_held[cuts]
        # Least base memory of the blocks from each cut on, had every block its own threshold.
        least = np.append(np.cumsum((np.minimum.accumulate(threshold) * stream.held)[::-1])[::-1], 0.0)
        rest = least[np.append(cuts, stream.blocks)]
        columns = max(1, PAIRS // self.size)
        parts = [
            self._edges(first, min(first + columns, self.size), rest, limit)
            for first in range(1, self.size, columns)
        ]
        source, target, base = (np.concatenate(x) for x in zip(*parts, strict=True)) if parts else _NO_EDGES
        last = np.arange(self.size)
        base = np.append(base, self._threshold * (self._below[-1] - self._below[:-1]))
        self._keep(np.append(source, last), np.append(target, np.full(self.size, self.size)), base)
        if math.isfinite(limit):  # exponents cost most: first with quick bounds on them
            self.per_log = self._buffers(exponents_at_most)
            self.prune(limit)
        self.per_log = self._buffers(lundberg_exponents)
        if math.isfinite(limit):
            self.prune(limit)

    def _edges(
        self, first: int, last: int, rest: FloatArray, limit: float
    ) -> tuple[IntArray, IntArray, FloatArray]:
        """Stable edges into the cuts first..last − 1 that base memory does not rule out."""
        n, share = self._threshold, self._share
        into = np.arange(first, last)[:, None]
        own, mine = n[into], share[into]
        base = n[: last - 1] * (self._below[into] - self._below[: last - 1]) + self._queue[into] * own
        stable = (n[: last - 1] > own) & (mine * n[: last - 1] < STABLE * own * share[: last - 1])
        stable &= (mine < share[: last - 1]) & (np.arange(last - 1) < into)
        stable &= base - rest[: last - 1] <= limit - rest[0] - rest[into]
        target, source = np.nonzero(stable)
        return source, target + first, base[target, source]

    def _keep(self, source: IntArray, target: IntArray, base: FloatArray) -> None:
        self.source, self.target, self.base = source, target, base
        self.start = np.searchsorted(target, np.arange(1, self.size + 2)).tolist()

    def _buffers(self, exponents: Callable[[FloatArray, FloatArray], FloatArray]) -> FloatArray:
        """Tokens of the buffer of each edge per unit of log; 0 into the end."""
        inner = self.start[-2]
        i, j = self.source[:inner], self.target[:inner]
        n, share = self._threshold, self._share
        theta = exponents(share[j] / share[i], n[j] / n[i])
        return np.append(self._queue[j] / theta, np.zeros(len(self.source) - inner))

    def _forward(self, cost: FloatArray) -> tuple[FloatArray, IntArray]:
        """Least cost from the first cut to each, and the edge it ends with."""
        value = np.full(self.size + 1, math.inf)
        edge = np.zeros(self.size + 1, dtype=np.int64)
        value[0] = 0.0
        source, low = self.source, self.start[0]
        for j, high in enumerate(self.start[1:], start=1):
            if high > low:
                reached = value[source[low:high]]
                reached += cost[low:high]
                i = reached.argmin()
                value[j], edge[j] = reached[i], low + i
            low = high
        return value, edge

    def shortest_path(self, log: float) -> tuple[float, IntArray]:
        """Least cost of any number of segments and their cuts."""
        value, edge = self._forward(self.base + log * self.per_log)
        if math.isinf(value[-1]):
            return math.inf, np.zeros(1, dtype=np.int64)
        path, j = [], self.size
        while j:
            j = int(self.source[edge[j]])
            path.append(j)
        return float(value[-1]), np.array(path[::-1], dtype=np.int64)

    def prune(self, limit: float) -> None:
        """Drop edges on no path that costs at most `limit`, at the graph's log or more."""
        cost = self.base + self.log * self.per_log
        there, _ = self._forward(cost)
        back = np.full(self.size + 1, math.inf)
        back[-1] = 0.0
        high = self.start[-1]
        for j in range(self.size, 0, -1):
            low = self.start[j - 1]
            if high > low and back[j] < math.inf:
                source = self.source[low:high]
                back[source] = np.minimum(back[source], cost[low:high] + back[j])
            high = low
        kept = there[self.source] + cost + back[self.target] <= limit * (1 + 1e-9)
        self.per_log = self.per_log[kept]
        self._keep(self.source[kept], self.target[kept], self.base[kept])

    def path_of_length(self, log: float, count: int) -> tuple[float, IntArray]:
        """Least cost of exactly `count` segments and their cuts."""
        cost = self.base + log * self.per_log
        value = np.full((self.size + 1, count + 1), math.inf)  # by cut and segments so far
        edge = np.zeros((self.size + 1, count + 1), dtype=np.int64)
        value[0, 0] = 0.0
        low = self.start[0]
        for j, high in enumerate(self.start[1:], start=1):
            if high > low:
                reached = value[self.source[low:high], :-1] + cost[low:high, None]
                i = reached.argmin(axis=0)
                value[j, 1:], edge[j, 1:] = reached[i, np.arange(count)], low + i
            low = high
        if math.isinf(value[-1, count]):
            return math.inf, np.zeros(1, dtype=np.int64)
        path, j = [], self.size
        for left in range(count, 0, -1):
            j = int(self.source[edge[j, left]])
            path.append(j)
        return float(value[-1, count]), np.array(path[::-1], dtype=np.int64)

    def cost_of(self, path: IntArray, log: float) -> float:
        """Cost of given cuts; infinite if one of its edges is not there."""
        total = 0.0
        for i, j in zip(path.tolist(), [*path[1:].tolist(), self.size], strict=True):
            low, high = self.start[j - 1], self.start[j]
            at = low + np.flatnonzero(self.source[low:high] == i)
            if not at.size:
                return math.inf
            total += float(self.base[at[0]] + log * self.per_log[at[0]])
        return total


# ------------------------------------------------------------------ plans


def _spread(cuts: IntArray, most: int) -> IntArray:
    """At most so many of the cuts, evenly spread, the first among them."""
    if len(cuts) <= most:
        return cuts
    return np.asarray(cuts[np.unique(np.linspace(0, len(cuts) - 1, most).astype(np.int64))])


class _Choice(NamedTuple):
    """First blocks of the segments, their thresholds, and the reserve s of these."""

    first: IntArray
    threshold: FloatArray
    reserve: float


class _Planner:
    """Everything about one block length."""

    def __init__(self, problem: Problem, options: NestedOptions, block: int) -> None:
        self.stream = Stream(problem, block)
        self.options = options
        self.cycles = 1 + math.floor(options.horizon / (block * problem.server.iteration_time.empty))
        self.log = math.log(self.cycles / problem.overflow_probability)
        self.fixed = self._given_cuts()
        share = self.stream.share
        cuts = np.append(0, 1 + np.flatnonzero(np.diff(share) < 0.0))
        self.cuts = _spread(cuts, MOST_CUTS)

    def _given_cuts(self) -> IntArray | None:
        """First blocks where boundaries are given or quantiles; checked."""
        options, stream, block = self.options, self.stream, self.stream.block
        if options.segments == "optimal":
            return None
        if isinstance(options.segments, str):
            count = options.segment_count or 1
            levels = 1.0 - np.arange(1, count) / count
            cuts = [int(np.argmax(stream.share <= level * (1 + 1e-12))) for level in levels]
            return np.unique([0, *(cut for cut in cuts if cut > 0)]).astype(np.int64)
        first = [0]
        for i, given in enumerate(options.segments):
            boundary = check_count(f"segments[{i}]", given)
            if (boundary + 1) % block:
                raise InputError(
                    f"segments[{i}]", boundary, f"be one less than a multiple of block_iterations, {block}"
                )
            first.append((boundary + 1) // block)
        longest = self.stream.problem.mean_profile.stages - 1
        if not options.segments or options.segments[-1] < longest:
            last = options.segments[-1] if options.segments else "nothing"
            raise InputError(
                "segments", last, f"end at {longest:,} at least, the last iteration of the longest output"
            )
        for i, cut in enumerate(first[1:-1], start=1):
            if cut <= first[i - 1]:
                raise InputError(f"segments[{i - 1}]", options.segments[i - 1], "be above the one before")
            if cut >= stream.blocks:
                raise InputError(
                    f"segments[{i}]",
                    options.segments[i],
                    f"be reached: nobody is served more than {longest + 1:,} times, and segment {i + 1} begins there",
                    f"Leave out what is above {longest:,}.",
                )
            if stream.share[cut] == stream.share[first[i - 1]]:
                raise InputError(
                    f"segments[{i - 1}]",
                    options.segments[i - 1],
                    "be passed by fewer requests than enter the segment: nobody finishes in it",
                    "Merge it with the next one.",
                )
        return np.array(first[:-1], dtype=np.int64)

    def choose(
        self, n: float, whole: bool = True, fine: bool = False, reserve: float | None = None
    ) -> _Choice | None:
        """First blocks and thresholds for n_1 = n, of least memory over the reserves; None if none is stable.

        Cuts are those of a coarse grid, unless `fine`. Memory is U-shaped in the reserve: few reserves are tried
        unless none of these is stable, or only the one given.
        """
        tried: dict[int, tuple[float, IntArray, FloatArray]] = {}

        def memory(i: int, limit: float = math.inf) -> float:
            if i not in tried:
                threshold = self.stream.thresholds(n, RESERVES[i], whole)
                tried[i] = (*self._cut(threshold, _spread(self.cuts, COARSE_CUTS), limit), threshold)
            return tried[i][0]

        best = len(RESERVES) // 2 if reserve is None else RESERVES.index(reserve)
        if math.isinf(memory(best)) and reserve is None:
            best = min(range(len(RESERVES)), key=memory)
        for step in (-1, 1) if reserve is None else ():
            while 0 <= best + step < len(RESERVES) and memory(best + step, memory(best)) < memory(best):
                best += step
        value, first, threshold = tried[best]
        if math.isinf(value):
            return None
        if fine and len(self.cuts) > COARSE_CUTS:
            finer, cuts = self._cut(threshold, self.cuts)
            first = cuts if finer <= value else first
        return _Choice(first, threshold[first], RESERVES[best])

    def _cut(self, threshold: FloatArray, cuts: IntArray, limit: float = math.inf) -> tuple[float, IntArray]:
        if self.fixed is not None:
            return self._cost(self.fixed, threshold), self.fixed
        return shortest_cuts(self.stream, threshold, cuts, self.log, self.options.segment_count, limit)

    def _cost(self, first: IntArray, threshold: FloatArray) -> float:
        graph = _Graph(self.stream, threshold, first, self.log, math.inf)
        return graph.cost_of(np.arange(len(first)), self.log + math.log(len(first)))

    def plan(self, n: int, fine: bool = False, reserve: float | None = None) -> NestedPlan | None:
        """The plan for n_1 = n; None if no cuts are stable.

        With coarse cuts and Lundberg buffers, which need more memory, unless `fine`.
        """
        chosen = self.choose(n, fine=fine, reserve=reserve)
        return None if chosen is None else self._planned(n, chosen, fine)

    def _planned(self, n: int, chosen: _Choice, fine: bool = False) -> NestedPlan:
        """The plan with these cuts and thresholds, which have to be stable."""
        stream, problem = self.stream, self.stream.problem
        first, threshold, reserve = chosen
        count = len(first)
        share = np.append(1.0, stream.share[first[1:]] / stream.share[first[:-1]])
        sizes = threshold.astype(np.int64)
        exponent = np.append(math.inf, lundberg_exponents(share[1:], threshold[1:] / threshold[:-1]))
        buffer = np.zeros(count)
        delta = problem.overflow_probability / count
        method = ["lundberg"] * count
        for k in range(1, count):
            args = int(sizes[k - 1]), float(share[k]), int(sizes[k])
            buffer[k] = lundberg_buffer(*args, self.cycles, delta)
            if fine and self.options.buffer == "exact" and buffer[k] <= EXACT_STATES:
                buffer[k], method[k] = exact_buffer(*args, self.cycles, delta), "exact"
        memory = stream.memory(first, threshold, buffer, self.log + math.log(count))
        times = stream.times(first, threshold)
        cycle = float(times.sum())
        arrivals = stream.rate * cycle
        mean = np.append(arrivals, share[1:] * threshold[:-1])
        spread = np.append(arrivals, mean[1:] * (1.0 - share[1:]))
        queues = (threshold - 1.0) / 2.0 + queue_estimate(threshold, mean, spread)
        return NestedPlan(
            stream.block, stream.blocks, first, sizes, buffer, share, exponent,
            memory.base, memory.needed, memory.certain, memory.prompts,
            float(np.repeat(threshold, np.diff([*first.tolist(), stream.blocks])).sum() + buffer.sum()),
            cycle, float(stream.longest_times(first, threshold).sum()), float(times[0]),
            n / arrivals - 1.0, float(queues.sum()) / stream.rate + cycle / 2.0, ("none", *method[1:]),
            reserve,
        )  # fmt: skip

    def exceeded(self, plan: NestedPlan) -> str | None:
        """The first of the server's limits that the plan breaks."""
        problem = self.stream.problem
        if plan.memory > problem.capacity * (1 + 1e-12):
            return "memory"
        if plan.in_service > problem.slots:
            return "batch"
        budget = problem.server.token_budget
        if budget is not None and plan.largest_cohort(problem) > budget:
            return "tokens"
        return None

    def filled(self, plan: NestedPlan) -> float:
        """Largest share of one of the server's limits that the plan takes."""
        problem = self.stream.problem
        shares = [plan.memory / problem.capacity, plan.in_service / problem.slots]
        if problem.server.token_budget is not None:
            shares.append(plan.largest_cohort(problem) / problem.server.token_budget)
        return max(shares)

    def solve(self, explain: bool = True) -> NestedPlan | str:
        """A plan with the slack asked for, fine only where it has to be, or why there is none.

        Without `explain` the reason may be "memory" where it is "rounding".
        """
        problem, stream = self.stream.problem, self.stream
        margin = 0.0 if self.options.slack == "auto" else self.options.slack
        low, high = problem.equilibrium(1.0 + margin, stream.block)
        if low > high:
            return "time"
        n = max(1, math.ceil(stream.rate * low * (1 - 1e-12)))
        if n * float(stream.share @ (stream.held - stream.block)) > 4.0 * problem.capacity:
            return "memory"

        def full() -> str:
            return self._relaxed(margin, low) if explain else "memory"

        n_or_reason = self._climb(n, margin, high, problem.capacity)
        if isinstance(n_or_reason, str):
            return full() if n_or_reason == "memory" else n_or_reason
        n = n_or_reason
        plan = self._within(n, margin)
        if isinstance(plan, str):
            return full() if plan == "memory" else plan
        return plan if self.options.slack != "auto" else self._largest(plan)

    def _climb(self, n: int, margin: float, high: float, capacity: float) -> int | str:
        """The least n_1 from `n` on that keeps up; or "time", "segments", "memory" (the base exceeds `capacity`)."""
        stream, unstable = self.stream, 0
        while True:  # boundaries decide how long a run takes, not buffers: those are for the last n alone
            # Whatever the cuts, a block has at least the places that the flow past it fills.
            if float(np.ceil(n * stream.share * (1 - 1e-9)) @ stream.held) > capacity * (1 + 1e-12):
                return "segments" if unstable else "memory"
            chosen = self.choose(n)
            if chosen is None:
                unstable += 1
                if unstable > MOST_UNSTABLE:
                    return "segments"
                n += 1
                continue
            cycle = float(stream.times(chosen.first, chosen.threshold).sum())
            needed = math.ceil((1.0 + margin) * stream.rate * cycle * (1 - 1e-12))
            if needed <= n and stream.rate * cycle < n:
                return n
            none = np.zeros(len(chosen.first))
            if stream.memory(chosen.first, chosen.threshold, none, self.log).base > capacity:
                return "memory"
            n = max(needed, n + 1)
            if stream.rate * high < n:
                return "time"

    def least(self, margin: float) -> NestedPlan | str:
        """The fine plan of least n_1 that keeps up, whatever memory it takes; or "time" or "segments"."""
        low, high = self.stream.problem.equilibrium(1.0 + margin, self.stream.block)
        if low > high:
            return "time"
        start = max(1, math.ceil(self.stream.rate * low * (1 - 1e-12)))
        n = self._climb(start, margin, high, math.inf)
        if isinstance(n, str):
            return n
        return self.plan(n, fine=True) or "segments"

    def _within(self, n: int, margin: float) -> NestedPlan | str:
        """The plan for n_1 = n if it keeps up within the server's limits, fine only if the coarse one does not."""
        broken = "time"
        for fine in (False, True):
            plan = self.plan(n, fine)
            if plan is None:
                return "segments"
            broken = self.exceeded(plan) or ("" if plan.slack >= margin and plan.slack > 0.0 else "time")
            if not broken:
                return plan
            if broken == "memory" and plan.base > self.stream.problem.capacity:
                break
        return broken

    def waits_longer(self, other: NestedPlan) -> bool:
        """Whether a plan with the cuts of `other`, for other blocks, shows that the largest slack waits longer.

        It does if it has more requests per run and waits longer, and fits the server with slack: the largest slack
        comes from more still.
        """
        stream, stretch = self.stream, other.block_iterations / self.stream.block
        n = math.ceil(float(other.threshold[0]) / math.sqrt(stretch))
        if self.fixed is not None or n <= other.threshold[0]:
            return False
        first = np.unique(np.rint(other.first * stretch).astype(np.int64))
        first = first[first < stream.blocks]
        threshold = stream.thresholds(n, other.reserve)[first]
        share = stream.share[first]
        keep = [0]
        for j in range(1, len(first)):  # leave out cuts that are not stable
            i = keep[-1]
            if threshold[i] > threshold[j] and share[j] * threshold[i] < STABLE * share[i] * threshold[j]:
                keep.append(j)
        plan = self._planned(n, _Choice(first[keep], threshold[keep], other.reserve))
        return self.exceeded(plan) is None and plan.slack > 0.0 and plan.wait > other.wait

    def finish(self, plan: NestedPlan) -> NestedPlan:
        """The fine plan in place of a coarse one, and with ``slack="auto"`` the slack that it has room for besides."""
        margin = 0.0 if self.options.slack == "auto" else self.options.slack
        n = int(plan.threshold[0])
        reserve = plan.reserve if self.options.slack == "auto" else None

        def at(n: int) -> NestedPlan | None:
            found = self.plan(n, fine=True, reserve=reserve)
            good = (
                found is not None and not self.exceeded(found) and found.slack >= margin and found.slack > 0.0
            )
            return found if good else None

        plan = at(n) or plan
        if self.options.slack == "auto":
            for _ in range(REFINEMENTS):
                if self.filled(plan) >= FULL:
                    break
                n = int(n * min(self.stream.problem.capacity / plan.memory, 2.0))
                if n <= plan.threshold[0]:
                    break
                found = at(n)
                if found is None or found.slack <= plan.slack:
                    n = (n + int(plan.threshold[0])) // 2
                    found = at(n)
                    if found is None or found.slack <= plan.slack:
                        break
                plan = found
        return plan

    def _relaxed(self, margin: float, low: float) -> str:
        """Whether memory forbids even thresholds that need not be whole, or only rounding does.

        From n_1 = Λ low, which is too small, towards the least n_1 that keeps up.
        """
        n = self.stream.rate * low
        for _ in range(RELAXATIONS):
            chosen = self.choose(n, whole=False)
            if chosen is None:
                return "rounding"
            first, threshold = chosen.first, chosen.threshold
            n = (1.0 + margin) * self.stream.rate * float(self.stream.times(first, threshold).sum())
        exponent = lundberg_exponents(
            self.stream.share[first[1:]] / self.stream.share[first[:-1]], threshold[1:] / threshold[:-1]
        )
        log = self.log + math.log(len(first))
        buffer = np.append(0.0, threshold[1:] + log / exponent)
        needed = self.stream.memory(first, threshold, buffer, log).needed
        return "memory" if needed > self.stream.problem.capacity else "rounding"

    def _largest(self, plan: NestedPlan) -> NestedPlan:
        """The plan of the largest slack over the reserves, each with the n_1 that the server's limits allow.

        From a plan that they do. For a given n_1 slack falls with the reserve, while the n_1 that memory holds
        grows with it at first: reserves are tried from the smallest on until one gives no more slack, or two in a
        row where thresholds are small.
        """
        best, worse = plan, 0
        for reserve in RESERVES:
            found = self._fullest(reserve, plan)
            if found is not None and found.slack > best.slack:
                best, worse = found, 0
            elif best is not plan:
                worse += 1
                if worse == 2 or best.threshold[0] > ROUNDED:
                    break
        n = int(best.threshold[0])
        for fewer in range(n - 1, max(2 * n // 3, int(plan.threshold[0])), -1) if n <= ROUNDED else ():
            found = self.plan(fewer, reserve=best.reserve)
            if found is not None and found.slack > best.slack and self.exceeded(found) is None:
                best = found
        return best

    def _fullest(self, reserve: float, plan: NestedPlan) -> NestedPlan | None:
        """The plan with this reserve and about the largest n_1 that the server's limits allow, above `plan`'s."""
        stream, problem = self.stream, self.stream.problem
        # Places of a block are at least the flow past it.
        most = min(
            problem.capacity / float(stream.share @ stream.held), problem.slots / float(stream.share.sum())
        )
        low, high = int(plan.threshold[0]), math.floor(most * (1 + 1e-9)) + 1
        below, above = self.filled(plan), math.inf
        n, best = math.floor(FIRST_FILL * most), None
        for _ in range(FILLINGS):
            n = min(max(n, low + 1), high - 1)
            if n <= low:
                break
            found = self.plan(n, reserve=reserve)
            if found is None:
                break
            if self.exceeded(found) is None:
                best, low, below = found, n, self.filled(found)
                if below >= FULL and n > ROUNDED:
                    break
            else:
                high, above = n, self.filled(found)
            if math.isinf(above):
                n = int(n * FILL / below)
            else:
                n = int(low + (high - low) * (FILL - below) / (above - below))
        return best


def lengths_to_try(problem: Problem, options: NestedOptions) -> list[int]:
    """Block lengths ℓ: the one given, those that divide given boundaries, or a selection up to the longest output."""
    lengths = block_lengths(problem.mean_profile.stages, options.block_iterations)
    if not isinstance(options.segments, str):
        if options.block_iterations is None:
            divides = math.gcd(*(int(boundary) + 1 for boundary in options.segments)) or 1
            lengths = [k for k in lengths if divides % k == 0]
        return lengths
    return lengths if len(lengths) < 40 else [*lengths[:4], *lengths[4:24:4], *lengths[24::3]]


def check_bounded(problem: Problem) -> None:
    """Refuse what no certificate can stand behind: lengths without a bound, and certainty with a queue."""
    if not problem.is_bounded:
        name = next(t.name for t in problem.workload.types if not t.law.is_bounded)
        raise InputError(
            "fluid.workload",
            f"type {name!r} with lengths that have no upper bound",
            "have bounded lengths: the last segment has to end",
            "Give its length law a maximum.",
        )
    if problem.overflow_probability == 0.0:
        raise InputError(
            "overflow_probability", 0, "be positive: boundary queues have no upper bound", "Give e.g. 1e-6."
        )
    if problem.server.iteration_time.empty <= 0.0:
        raise InputError(
            "fluid.server.iteration_time",
            "0 s for an empty batch",
            "be positive: the number of cycles within the horizon is counted with it",
        )


def _least_wait(problem: Problem, options: NestedOptions, block: int, n: int = 1) -> float:
    """What the mean wait in blocks of ℓ iterations with n_1 ≥ n is at least: for n_1, and half a cycle.

    Grows with ℓ and n.
    """
    stretch = 1.0 + (0.0 if options.slack == "auto" else options.slack)
    low, _ = problem.equilibrium(stretch, block)
    rate = float(problem.rate.sum())
    return (max(rate * low, float(n)) - 1.0) / (2.0 * rate) + low / (2.0 * stretch)


def plan_nested(problem: Problem, fluid: FluidSolution, options: NestedOptions) -> NestedPlan:
    """The best plan over the block lengths, or `InfeasibleError` with the reason and the largest load."""
    check_bounded(problem)
    if options.slack == "auto" and math.isinf(problem.capacity):
        raise InputError(
            "slack",
            "auto",
            "be a number where KV memory is not limited: there is no largest slack",
            "Give 0.1.",
        )
    lengths = lengths_to_try(problem, options)
    if not lengths:
        raise InfeasibleError("no block length divides all the boundaries given", "rounding")
    best: tuple[_Planner, NestedPlan] | None = None
    reasons = []
    for block in lengths:
        if best is not None and _least_wait(problem, options, block) > best[1].wait:
            break  # and longer blocks wait longer
        planner = _Planner(problem, options, block)
        if best is not None and options.slack == "auto" and planner.waits_longer(best[1]):
            continue
        found = planner.solve()
        if isinstance(found, str):
            reasons.append(found)
        elif best is None or found.wait < best[1].wait:
            best = planner, found
    if best is not None:
        return best[0].finish(best[1])
    raise no_table(
        "Nested WAIT table",
        problem,
        fluid,
        0.0 if options.slack == "auto" else options.slack,
        reasons,
        lambda offered, k: nested_exists(offered, options, k),
        lengths,
    )


def _least(options: NestedOptions) -> NestedOptions:
    """The same without looking for more slack than has to be."""
    return dataclasses.replace(options, slack=0.0) if options.slack == "auto" else options


def nested_exists(problem: Problem, options: NestedOptions, block: int) -> bool:
    """Whether a table with this slack exists in blocks of ℓ iterations."""
    return not isinstance(_Planner(problem, _least(options), block).solve(explain=False), str)


def why_not(problem: Problem, options: NestedOptions) -> list[str]:
    """What forbids a table, per block length."""
    plans = [_Planner(problem, _least(options), k).solve() for k in lengths_to_try(problem, options)]
    return [plan for plan in plans if isinstance(plan, str)]


def nested_certificate(problem: Problem, plan: NestedPlan, options: NestedOptions) -> dict[str, Any]:
    """What a compiled Nested WAIT table guarantees; entries as in `fluidsched.policy.problem.entry`."""
    rate = float(problem.rate.sum())
    n, cycle = plan.threshold, plan.cycle_time
    arrivals = rate * cycle
    entry_queue = embedded_queue_mean(int(n[0]), arrivals) if arrivals < n[0] else math.inf
    queues = [
        embedded_queue_mean(int(n[k]), float(n[k - 1] * plan.share[k]), int(n[k - 1]))
        for k in range(1, len(n))
    ]
    count = len(n)
    places = "max over prompts" if plan.prompts == "longest" else "Bernstein bound on all prompts"
    named = {"exact": "smallest x with P(queue > x within b cycles) ≤ δ/L", "lundberg": "n_k + ln(L b/δ)/θ_k"}
    return {
        "memory": entry(
            plan.memory,
            "tokens",
            f"M(n) + Σ_k (p + r_(k-1)) x_k, {places}; M(n) = Σ_b n_k(b) (p + (b + 1)ℓ − 1)",
            "probability" if count > 1 or plan.prompts == "law" else "certain",
            capacity=problem.capacity,
            base=plan.base,
            prompts=plan.prompts,
            longest_prompts=plan.certain_memory,
        ),
        "overflow_probability": entry(
            problem.overflow_probability,
            "within the horizon",
            "Σ_k P(queue k exceeds x_k within b = 1 + H/(ℓ c0) cycles) ≤ (L − 1)δ/L"
            + (", and δ/L for the prompts" if plan.prompts == "law" else ""),
            "probability",
            horizon_s=options.horizon,
            holds_for="independent requests of the admitted mix, from an empty start, without max_hold_s",
        ),
        "buffer": entry(
            plan.buffer,
            "requests",
            "x_k: " + "; ".join(f"{name}: {named[name]}" for name in named if name in plan.method),
            "probability",
            method=list(plan.method),
        ),
        "boundary_queue": entry(
            [0.0, *queues],
            "requests",
            "E[V_k], V' = V + Y − n_k·1{V + Y ≥ n_k}, Y ~ Binomial(n_(k-1), p_k)",
            "expectation",
            share=plan.share,
            exponent=plan.exponent,
            slack=[math.inf, *(n[1:] / (plan.share[1:] * n[:-1]) - 1.0).tolist()],
        ),
        "in_service": entry(
            plan.in_service,
            "requests",
            "Σ_b n_k(b) + Σ_k x_k",
            "probability",
            limit=problem.server.max_batch_size,
        ),
        "cycle_time": entry(
            cycle,
            "s",
            "T(n), segments full when a run begins, mean prompts and outputs",
            "expectation",
            longest=plan.longest_cycle,
            longest_formula="T(n) with every place full and the longest prompts",
        ),
        "slack": entry(plan.slack, "", "n_1 / (Λ T(n)) − 1", "expectation"),
        "largest_cohort": entry(
            plan.largest_cohort(problem), "tokens", "n_1 p_max + Σ_(b ≥ 1) n_k(b)", "certain"
        ),
        "throughput": entry(
            rate, "requests/s", "Λ = Σ_j a_j in the long run, iff the slack is positive", "expectation"
        ),
        "queue": entry(
            entry_queue + arrivals / 2.0,
            "requests",
            "E[W] + Λ T / 2, W' = W + X − n_1·1{W + X ≥ n_1}, X ~ Poisson(Λ T)",
            "expectation",
            holds_for="Poisson arrivals at the admitted rates",
        ),
        "ttft": entry(
            entry_queue / rate + cycle / 2.0 + plan.first_iteration,
            "s",
            "E[W] / Λ + T / 2 + first iteration of a full block",
            "expectation",
            holds_for="Poisson arrivals at the admitted rates",
        ),
    }


# ------------------------------------------------------------------ curves


@dataclass(frozen=True)
class SegmentCurve(Tabular):
    """Memory that Nested WAIT needs against the number of segments, K numbers; NaN where no such table exists.

    Few segments hold places for the longest requests, many keep a buffer each: the curve is U-shaped.

    Attributes
    ----------
    segments : int64[K]
        L.
    memory : float64[K]
        What residents hold at most, as certified: base memory, buffers and the bound on prompts, tokens.
    base : float64[K]
        M(n), the places alone, tokens.
    threshold : float64[K]
        n_1, requests per run.
    reason : tuple of str or None, length K
        Why there is no table: "time" or "segments"; None where there is one.
    block_iterations : int
        ℓ.
    capacity : float
        KV tokens that tables may fill.
    """

    segments: IntArray
    memory: FloatArray
    base: FloatArray
    threshold: FloatArray
    reason: tuple[str | None, ...]
    block_iterations: int
    capacity: float

    @property
    def best(self) -> int | None:
        """The number of segments that needs least memory; None where no table exists."""
        if np.isnan(self.memory).all():
            return None
        return int(self.segments[np.nanargmin(self.memory)])

    def to_frame(self) -> pd.DataFrame:
        """One row per number of segments."""
        import pandas as pd

        columns = {name: getattr(self, name) for name in ("memory", "base", "threshold", "reason")}
        return pd.DataFrame(columns, index=pd.Index(self.segments, name="segments"))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw memory against the number of segments; see `fluidsched.plots.segment_curve`."""
        from fluidsched import plots

        return plots.segment_curve(self, ax=ax)


def segment_curve(
    fluid: FluidSolution,
    *,
    slack: float = 0.05,
    overflow_probability: float = 0.01,
    block_iterations: int | None = None,
    horizon: float = HORIZON,
    segment_counts: Sequence[int] | None = None,
    buffer: str = "exact",
) -> SegmentCurve:
    """Return the memory a Nested WAIT table needs against its number of segments, cut where least is needed.

    The memory is what the table would need; it may exceed what the server has.

    Parameters
    ----------
    fluid : FluidSolution
    slack, overflow_probability, block_iterations, horizon, buffer
        As in `compile_policy`; without `block_iterations` those of the table it compiles.
    segment_counts : sequence of int, optional
        Numbers L to try; None: 1 to 12, or to the number of possible cuts.

    Returns
    -------
    SegmentCurve

    Raises
    ------
    InfeasibleError
        Without `block_iterations`, if no table exists.

    Examples
    --------
    >>> import fluidsched as fs
    >>> law = fs.lengths.geometric(mean=30, maximum=300)
    >>> workload = fs.Workload([fs.RequestType("chat", 100.0, prompt_tokens=50, output_tokens=law)])
    >>> server = fs.Server(2_000_000, fs.IterationTime.affine(0.05, 1e-5, 5e-5, 1e-8))
    >>> curve = segment_curve(fs.solve_fluid(workload, server), block_iterations=5, segment_counts=[1, 2, 4, 8])
    >>> curve.best
    4
    """
    margin = check_real("slack", slack, minimum=0.0)
    problem = Problem.of(fluid, overflow_probability)
    check_bounded(problem)
    options = NestedOptions(margin, block_iterations, horizon, "optimal", None, buffer)
    if block_iterations is None:
        block_iterations = plan_nested(problem, fluid, options).block_iterations
    [block] = block_lengths(problem.mean_profile.stages, block_iterations)
    cuts = len(_Planner(problem, options, block).cuts)
    counts = list(range(1, min(12, cuts) + 1)) if segment_counts is None else list(segment_counts)
    for i, count in enumerate(counts):
        check_count(f"segment_counts[{i}]", count, minimum=1, maximum=cuts)
    plans = [
        _Planner(problem, dataclasses.replace(options, segment_count=count), block).least(margin)
        for count in counts
    ]

    def column(get: Callable[[NestedPlan], float]) -> FloatArray:
        return np.array([math.nan if isinstance(plan, str) else get(plan) for plan in plans])

    return SegmentCurve(
        np.array(counts, dtype=np.int64),
        column(lambda plan: plan.memory),
        column(lambda plan: plan.base),
        column(lambda plan: float(plan.threshold[0])),
        tuple(plan if isinstance(plan, str) else None for plan in plans),
        block,
        problem.capacity,
    )
