r"""What a compiler works from: admitted rates, the server's time and limits, and the stages of every type.

A compiled table must keep up with the admitted rates a_j (time), and what its residents hold must stay
within the server (memory, slots, tokens per iteration). Amounts that are random because lengths are, sums
over independent residents, are taken at mean + z_δ · standard deviation, z_δ the standard normal's (1 −
δ)-quantile, a normal approximation; what a table then holds is checked against the tail of the actual law
(`fluidsched.policy.tails`), and where that exceeds δ the table is compiled again with a larger z. With δ = 0
every request is taken as long as its type allows, and the bound is certain.

Types the fluid optimum refuses (a_j = 0) are left out here and get threshold 0: they are never admitted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

import fluidsched
from fluidsched._checks import check_choice, check_real
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.policy.profiles import (
    FloatArray,
    StageProfile,
    mean_profile,
    normal_quantile,
    worst_profile,
)
from fluidsched.policy.robust import checked_budget, checked_errors, protected_rates
from fluidsched.policy.table import Match, TableType
from fluidsched.server import Server
from fluidsched.workload import RequestType, Workload

if TYPE_CHECKING:
    from fluidsched.fluid import FluidSolution

__all__ = [
    "SHARE_TOLERANCE",
    "Problem",
    "Slack",
    "boundary_problem",
    "check_slack",
    "entry",
    "expected_largest",
    "largest_share",
    "least_severe",
    "no_table",
    "queue_estimate",
]

Slack = float | Literal["auto"]
_T = TypeVar("_T")
SHARE_TOLERANCE = 1e-3  # of the largest load reported


class _kept(Generic[_T]):
    """A property that follows from lengths, server and δ: computed once for problems that share them."""

    def __init__(self, compute: Callable[[Any], _T]) -> None:
        self._compute, self._name = compute, compute.__name__
        self.__doc__ = compute.__doc__

    def __get__(self, problem: Any, owner: type | None = None) -> _T:
        if problem is None:
            return self  # type: ignore[return-value]  # what describes the class asks for it
        if self._name not in problem.shared:
            problem.shared[self._name] = self._compute(problem)
        kept: _T = problem.shared[self._name]
        return kept


@dataclass(frozen=True)
class Problem:
    """Admitted demand on a server, active types (a_j > 0) only; A of them.

    Attributes
    ----------
    workload : Workload
        The active types.
    server : Server
    rate : float64[A]
        Admitted rates a_j, requests/s.
    overflow_probability : float
        δ; 0 for bounds that hold with certainty.
    kv_reserve : float
        Tokens of KV capacity that tables leave free.
    rate_error : float64[A], optional
        d_j of `fluidsched.policy.robust`; None: rates are taken as known.
    error_budget : float
        Γ, how many types may be off by as much; infinite: all.
    stricter : float, optional
        Probability below δ that the normal approximation is taken at; None: δ itself.
    shared : dict
        What follows from the lengths, the server and δ alone, kept for other rates.
    """

    workload: Workload
    server: Server
    rate: FloatArray
    overflow_probability: float
    kv_reserve: float = 0.0
    rate_error: FloatArray | None = None
    error_budget: float = math.inf
    stricter: float | None = None
    shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        fluid: FluidSolution,
        overflow_probability: float,
        kv_reserve: float = 0.0,
        rate: FloatArray | None = None,
        rate_error: float | Sequence[float] = 0.0,
        error_budget: float | None = None,
    ) -> Problem:
        """The problem a fluid solution poses, at its admitted rates or at `rate` (J,).

        `InputError` if the iteration time has no affine pieces, or δ = 0 and a type's lengths have no
        bound.
        """
        rate = np.asarray(fluid.admitted_rate if rate is None else rate, dtype=np.float64)
        normal_quantile(overflow_probability)  # checks it
        fluid.server.iteration_time.require_coefficients("compiling a policy")
        active = np.flatnonzero(rate > 0.0)
        if not active.size:
            raise InputError("fluid.admitted_rate", "0 for every type", "be positive for at least one type")
        workload = fluid.workload
        if active.size < len(workload):
            workload = Workload([workload.types[j] for j in active], workload.name)
        kv_reserve = check_real("kv_reserve", kv_reserve, minimum=0.0)
        if kv_reserve >= fluid.server.usable_kv_capacity:
            raise InputError(
                "kv_reserve",
                kv_reserve,
                f"be below the KV capacity, {fluid.server.usable_kv_capacity:,.0f} tokens",
            )
        errors = checked_errors(rate_error, len(rate))
        problem = cls(
            workload,
            fluid.server,
            rate[active],
            float(overflow_probability),
            kv_reserve,
            None if errors is None or not errors[active].any() else errors[active],
            checked_budget(error_budget, errors),
        )
        if overflow_probability == 0.0 and not problem.is_bounded:
            unbounded = next(t.name for t in workload.types if not t.law.is_bounded)
            raise InputError(
                "overflow_probability",
                0,
                f"be positive: the lengths of type {unbounded!r} have no upper bound",
                "Give its length law a maximum, or allow an overflow probability.",
            )
        return problem

    def at_rate(self, rate: FloatArray) -> Problem:
        """The same at other admitted rates, (A,)."""
        return dataclasses.replace(self, rate=rate)

    def without_errors(self) -> Problem:
        """The same with the rates taken as known."""
        return dataclasses.replace(self, rate_error=None, error_budget=math.inf)

    def protected_rate(self, slope: FloatArray) -> FloatArray | None:
        """Rates that thresholds keep up with against the slack time B (`fluidsched.policy.robust`), (A,).

        `slope` (A,) is what one more request per cycle adds to it at least, s. None where rates are known.
        """
        if self.rate_error is None:
            return None
        return protected_rates(self.rate, slope, self.rate_error, self.error_budget)

    # ------------------------------------------------------------------ lengths

    @property
    def is_bounded(self) -> bool:
        """Whether every type's lengths have a largest value."""
        return all(t.law.is_bounded for t in self.workload.types)

    @_kept
    def is_fixed(self) -> bool:
        """Whether every type has one length, so that nothing about memory is random."""
        return all(t.law.is_fixed for t in self.workload.types)

    @_kept
    def has_fixed_times(self) -> bool:
        """Whether nothing about the time of a batch is random either: cached prefixes are whole tokens."""
        return self.is_fixed and not any(t.cached_tokens()[1].any() for t in self.workload.types)

    @property
    def is_certain(self) -> bool:
        """Whether memory bounds hold with certainty."""
        return self.is_fixed or self.overflow_probability == 0.0

    @property
    def guarantee(self) -> str:
        """What kind of guarantee memory bounds are: "certain" or "probability"."""
        return "certain" if self.is_certain else "probability"

    @cached_property
    def z(self) -> float:
        """Standard deviations added to the mean; 0 where bounds are certain."""
        return 0.0 if self.is_certain else normal_quantile(self.normal_probability)

    @property
    def normal_probability(self) -> float:
        """What the normal approximation is asked for: δ, or less where the actual law's tail is larger."""
        return self.overflow_probability if self.stricter is None else self.stricter

    def asked_for(self, normal_probability: float) -> Problem:
        """The same with more standard deviations added to the means."""
        return dataclasses.replace(self, stricter=normal_probability)

    @_kept
    def padding(self) -> int:
        """Tokens per request that paging may waste."""
        return (self.server.block_size or 1) - 1

    @_kept
    def mean_profile(self) -> StageProfile:
        """Stages in expectation over the length laws: what rates and times use."""
        return mean_profile(self.workload, self.padding)

    @cached_property
    def mixed_stages(self) -> FloatArray:
        """Mean over the types, by rate, of `present`, `prompt` and `prompt_square` of the mean profile, (3, L)."""
        weight = self.rate / self.rate.sum()
        profile = self.mean_profile
        return np.stack([weight @ x for x in (profile.present, profile.prompt, profile.prompt_square)])

    @_kept
    def memory_profile(self) -> StageProfile:
        """Stages that memory bounds use: the longest requests if they are to be certain."""
        return self.worst_profile if self.overflow_probability == 0.0 else self.mean_profile

    @_kept
    def worst_profile(self) -> StageProfile:
        """Stages of the longest requests."""
        return self.mean_profile if self.is_fixed else worst_profile(self.workload, self.padding)

    @property
    def size(self) -> int:
        """Types times stages: what deriving something about all stages costs."""
        return int(self.mean_profile.present.size)

    # ------------------------------------------------------------------ time and limits

    @property
    def coefficients(self) -> FloatArray:
        """(I, 5): base, per prefill token, per decode token, per KV token, per prefill attention."""
        return self.server.iteration_time.require_coefficients("compiling a policy")

    @_kept
    def work(self) -> FloatArray:
        """Busy work w_j of every piece, (I, A), seconds beyond the base over a request's life."""
        from fluidsched.fluid import busy_work

        return np.asarray(busy_work(self.workload, self.server.iteration_time))

    @_kept
    def lumped_work(self) -> FloatArray:
        """Busy work with prompts at the steepest price of any piece, (I, A), s: a bound however they are batched.

        T(decodes + prompts) ≤ T(decodes) + n_pf max_i c_pf,i + q_pf max_i c_attn,i, so the mean iteration
        is at most max_i (c0_i + Σ_j q_j w_ij) with this work, while with `work` it is that of the mean
        batch: a batch has a whole prompt or none, and beyond a knee the two differ.
        """
        _, per_prefill, _, _, per_attention = self.coefficients.T
        prompt, attention = self.workload.mean_prefill_tokens, self.workload.prefill_attention
        own = np.outer(per_prefill, prompt) + np.outer(per_attention, attention)
        return np.asarray(self.work - own + per_prefill.max() * prompt + per_attention.max() * attention)

    @_kept
    def life_work_variance(self) -> FloatArray:
        """Variance over a type's lengths of the busy work of a life, the largest of the pieces', (A,), s².

        Of a prompt the share f is taken as cached: rounding to whole tokens is left out.
        """
        if self.is_fixed:
            return np.zeros(len(self.workload))
        result = np.zeros(len(self.workload))
        cached = self.workload.cached_prefix_fraction
        for _, per_prefill, per_decode, per_kv, per_attention in self.coefficients.tolist():
            terms: dict[tuple[int, int], Any] = {  # w as a polynomial in (p, o)
                (0, 0): -per_decode,
                (1, 0): per_prefill * (1.0 - cached) - per_kv,
                (0, 1): per_decode - per_kv / 2.0,
                (1, 1): per_kv,
                (0, 2): per_kv / 2.0,
                (2, 0): per_attention * (1.0 - cached**2) / 2.0,
            }
            mean = sum(c * self.workload.moment(*powers) for powers, c in terms.items())
            square = sum(
                c * d * self.workload.moment(i + k, j + m)
                for (i, j), c in terms.items()
                for (k, m), d in terms.items()
            )
            result = np.maximum(result, np.asarray(square - mean * mean))
        return result

    def queue_factor(self, entries_per_second: FloatArray) -> FloatArray:
        """Factor on the mean queue for random lengths, (A,): 1 + a_j Σ_i x_i Var(w_i), x the entries per second.

        Cycles whose requests bring random work have random lengths: over many cycles the arrivals per
        cycle have the variance m + a_j² Σ_i n_i Var(w_i) instead of m, and in heavy traffic the mean queue
        is proportional to it. 1 for fixed lengths.
        """
        return np.asarray(1.0 + self.rate * float(entries_per_second @ self.life_work_variance))

    @_kept
    def decode_spread(self) -> FloatArray:
        """Second moment of the difference of two pieces' decode work, summed over a life, (I, I, A), s².

        Times q_j, summed: the variance of the difference over a Poisson number of decodes at every stage.
        """
        profile = self.mean_profile
        stages = np.arange(1, profile.stages, dtype=np.float64)
        present, prompt = profile.present[:, 1:], profile.prompt[:, 1:]
        square = profile.prompt_square[:, 1:] + stages * (2.0 * prompt + stages * present)
        sums = [x.sum(axis=1) for x in (present, prompt + stages * present, square)]
        c = self.coefficients
        decode, kv = ((c[:, None, i] - c[None, :, i])[..., None] for i in (2, 3))
        return np.asarray(decode**2 * sums[0] + 2.0 * decode * kv * sums[1] + kv**2 * sums[2])

    @_kept
    def work_variance(self) -> FloatArray | None:
        """Variance of the difference of two pieces' busy work at each stage, (I, I, A, L), s²; None if all 0.

        At stage s ≥ 1 a request adds Δc_dec + Δc_kv (p + s) while it is there, at stage 0 Δc_pf (1 − f) p +
        Δc_attn (1 − f²) p²/2, f the share of prompts that is cached (not rounded to tokens).
        """
        if self.is_fixed or len(self.coefficients) == 1:
            return None
        profile = self.mean_profile
        stages = np.arange(profile.stages, dtype=np.float64)
        present = profile.present
        read = profile.prompt + stages * present
        square = profile.prompt_square + stages * (2.0 * profile.prompt + stages * present)
        p, p2, p3, p4 = (self.workload.moment(i, 0) for i in (1, 2, 3, 4))
        cached = self.workload.cached_prefix_fraction
        c = self.coefficients
        _, per_prefill, per_decode, per_kv, per_attention = np.moveaxis(c[:, None, :] - c[None, :, :], 2, 0)[
            ..., None
        ]
        prefill, attention = per_prefill * (1.0 - cached), per_attention * (1.0 - cached**2)
        prompt_part = (
            prefill**2 * (p2 - p * p)
            + prefill * attention * (p3 - p * p2)
            + attention**2 / 4.0 * (p4 - p2 * p2)
        )
        decode, kv = per_decode[..., None], per_kv[..., None]
        result = (
            decode**2 * (present * (1.0 - present))
            + 2.0 * decode * kv * (read * (1.0 - present))
            + kv**2 * (square - read * read)
        )
        result[..., 0] = prompt_part
        return np.asarray(np.maximum(result, 0.0))

    @property
    def capacity(self) -> float:
        """KV tokens that tables may fill: whole blocks where memory is paged, less the reserve."""
        return self.server.usable_kv_capacity - self.kv_reserve

    @property
    def kv_limit(self) -> float | None:
        """What admission is told not to exceed, tokens: None without a reserve."""
        return self.capacity if self.kv_reserve > 0.0 and math.isfinite(self.capacity) else None

    @property
    def slots(self) -> float:
        """Most requests in service."""
        return math.inf if self.server.max_batch_size is None else float(self.server.max_batch_size)

    def equilibrium(
        self, stretch: float, base_factor: float = 1.0, work: FloatArray | None = None
    ) -> tuple[float, float]:
        """Interval of β with  stretch · (base_factor · c0_i + β Σ a_j w_ij) ≤ β  for every piece i; seconds.

        `work` (I, A) replaces the busy work w.

        Empty (low > high) if the server is too slow for `stretch` times the admitted rates.
        """
        base = stretch * base_factor * self.coefficients[:, 0]
        idle = 1.0 - stretch * ((self.work if work is None else work) @ self.rate)
        low = np.divide(base, idle, out=np.zeros_like(base), where=idle > 0.0)
        high = np.divide(base, idle, out=np.full_like(base, math.inf), where=idle < 0.0)
        if np.any((idle == 0.0) & (base > 0.0)):
            return math.inf, 0.0
        return float(low.max(initial=0.0)), float(high.min(initial=math.inf))

    def quantile(self, mean: NDArray[np.float64], variance: NDArray[np.float64]) -> NDArray[np.float64]:
        """mean + z · sd."""
        return np.asarray(mean + self.z * np.sqrt(variance))


def expected_largest(mean: FloatArray, variance: FloatArray) -> FloatArray:
    """Bound on E[max_i X_i] for jointly normal X, exact for two; mean (I, …), variance of differences (I, I, …).

    E[max] ≤ E[X_m] + Σ_i E[(X_i − X_m)⁺], m the largest in the mean, and for a normal difference of mean
    −d and standard deviation σ,  E[(·)⁺] = σ φ(d/σ) − d Φ(−d/σ).

    Examples
    --------
    >>> float(expected_largest(np.array([1.0, 1.0]), np.array([[0.0, 2.0], [2.0, 0.0]])).round(6))
    1.56419
    """
    from scipy.special import ndtr

    first = mean.argmax(axis=0)
    largest = np.take_along_axis(mean, first[None], axis=0)[0]
    spread = np.sqrt(np.take_along_axis(variance, first[None, None], axis=0)[0])
    behind = largest - mean
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(spread > 0.0, behind / spread, math.inf)
    excess = spread * np.exp(-ratio * ratio / 2.0) / math.sqrt(2.0 * math.pi) - behind * ndtr(-ratio)
    return np.asarray(largest + np.where(spread > 0.0, excess, 0.0).sum(axis=0))


def entry(value: Any, unit: str, formula: str, guarantee: str, **more: Any) -> dict[str, Any]:
    """One line of a certificate: value, unit, the formula it comes from, and what kind of guarantee it is.

    `guarantee` is "certain" (on every path), "probability" (up to the stated overflow probability), "approximation"
    (the same, if the normal law stood for the actual one) or "expectation" (for long-run means).
    """
    return {"value": value, "unit": unit, "formula": formula, "guarantee": guarantee, **more}


_REASONS = {  # the least severe first
    "rounding": "it would do if thresholds need not be whole",
    "segments": "no whole thresholds keep every boundary queue stable, p_k n_(k−1) < n_k < n_(k−1): so few requests "
    "per run need fewer segments",
    "tokens": "the token budget per iteration is too small",
    "batch": "more requests would be in service than the batch or half the token budget allows",
    "memory": "the thresholds need more KV memory than the server has",
    "time": "the server is too slow",
}


_WAYS_OUT = {"segments": "fewer segments"}
INSIDE = (
    ' What the optimum admits lies on the boundary: admitted_share="auto" (--admitted-share auto) goes as little '
    "inside as a table needs."
)


def boundary_problem(fluid: FluidSolution, problem: Problem) -> Problem:
    """The same server, limits and errors at the fluid boundary along the offered mix."""
    offered = np.asarray(fluid.workload.arrival_rate)
    rate = offered / float(np.max(fluid.load))
    admitted = np.asarray(fluid.admitted_rate) > 0.0
    errors = np.zeros(len(offered))
    if problem.rate_error is not None:
        errors[admitted] = problem.rate_error
        errors[~admitted] = problem.rate_error.max()  # the refused: as much as the worst of the others
    boundary = Problem.of(
        fluid,
        problem.overflow_probability,
        problem.kv_reserve,
        rate,
        errors.tolist(),
        problem.error_budget if math.isfinite(problem.error_budget) else None,
    )
    if len(boundary.rate) == len(problem.rate):
        return problem.at_rate(boundary.rate)  # the same types: lengths need no second look
    return boundary


def largest_share(full: Problem, exists: Callable[[Problem, int], bool], lengths: Sequence[int]) -> float:
    """Largest share of the rates of `full` at which `exists` for a length; 0 if nowhere.

    In whole thousandths, rounded down. `exists` must be monotone in the load: what exists at a load exists below
    it. Every length is asked only whether it goes further than the best so far, a few spread over all of them
    first.
    """

    def reaches(thousandths: int, length: int) -> bool:
        return exists(full.at_rate(thousandths * SHARE_TOLERANCE * full.rate), length)

    whole = round(1.0 / SHARE_TOLERANCE)
    best = 0
    for length in (*lengths[3::8], *(k for i, k in enumerate(lengths) if i % 8 != 3)):
        if best == whole or not reaches(best + 1, length):
            continue
        low, high = best + 1, whole + 1
        while high - low > 1:
            middle = (low + high) // 2
            if reaches(middle, length):
                low = middle
            else:
                high = middle
        best = low
    return best * SHARE_TOLERANCE


def least_severe(reasons: Iterable[str]) -> str:
    """The reason that least would have to change for: "rounding" before "tokens", …, "time" last."""
    return min(set(reasons), key=list(_REASONS).index)


def no_table(
    what: str,
    problem: Problem,
    fluid: FluidSolution,
    margin: float,
    reasons: Iterable[str],
    exists: Callable[[Problem, int], bool],
    lengths: Sequence[int],
) -> InfeasibleError:
    """The error that no table `what` exists: the least severe reason, the largest load at which one does."""
    reason = least_severe(reasons)
    share = largest_share(boundary_problem(fluid, problem), exists, lengths)
    until = (
        f"One exists up to {share:.3f} of the fluid boundary."
        if share > 0.0
        else f"None exists at any load: {_WAYS_OUT.get(reason, 'fewer types or more memory')} would help."
    )
    if share > 0.0 and float(np.max(fluid.load)) > 1.0:
        until += INSIDE
    margin_text = f" with slack {margin:g}" if margin else ""
    return InfeasibleError(
        f"no {what}{margin_text} exists at load {float(np.max(fluid.load)):.3f}: {_REASONS[reason]}. {until}",
        reason,
    )


def match_of(request_type: RequestType) -> Match:
    """How requests of a type are recognised: by its ranges of lengths if it has them, else by its name.

    A range of outputs that holds every length is not looked at.
    """
    if request_type.prompt_range is None:
        return Match(label=request_type.name)
    output = request_type.output_range
    return Match(prompt=request_type.prompt_range, output=None if output == (1, None) else output)


def predictor_of(rows: Iterable[TableType]) -> str | None:
    """Return "exact" if a row looks at output lengths, which the path then must tell."""
    return "exact" if any(row.match.output is not None for row in rows) else None


def rows_of(
    fluid: FluidSolution,
    threshold: NDArray[np.int64],
    gate: NDArray[np.int64],
    period: NDArray[np.int64] | None = None,
) -> tuple[TableType, ...]:
    """Rows of a table with these numbers for the admitted types, in their order, and 0 for the refused."""
    rows = []
    position = iter(range(len(threshold)))
    for request_type, offered, admitted in zip(
        fluid.workload.types, fluid.workload.arrival_rate.tolist(), fluid.admitted_rate.tolist(), strict=True
    ):
        i = next(position) if admitted > 0.0 else None
        rows.append(
            TableType(
                request_type.name,
                match_of(request_type),
                offered,
                min(admitted, offered),
                threshold=0 if i is None else int(threshold[i]),
                gate=0 if i is None else int(gate[i]),
                period=None if period is None else (1 if i is None else int(period[i])),
                priority=request_type.priority,
            )
        )
    return tuple(rows)


def provenance_of(fluid: FluidSolution) -> dict[str, Any]:
    """Fingerprints of what a table was compiled from, and by which version."""
    return {
        "inputs": {
            "workload": fluid.workload.fingerprint,
            "server": fluid.server.fingerprint,
            "objective": fluid.objective,
        },
        "version": fluidsched.__version__,
        "seed": None,
    }


def check_slack(slack: Any) -> Slack:
    """Return `slack` if it is "auto" or a non-negative number."""
    if isinstance(slack, str):
        check_choice("slack", slack, ("auto",), "Or give a number, e.g. 0.05.")
        return "auto"
    return check_real("slack", slack, minimum=0.0, remedy='Use "auto" for the largest feasible one.')


def queue_estimate(
    threshold: FloatArray, mean_arrivals: FloatArray, variance: FloatArray | None = None
) -> FloatArray:
    """Approximate mean of V' = max(V + X − n, 0), X ~ Poisson(m): quick, for choosing among tables.

    X of another variance than m where `variance` is given.

    The mean of the maximum of a Gaussian random walk with drift m − n and variance m, expanded for a drift
    of x standard deviations, √m (1/(2x) − 0.5826 + x/4 − 0.0415 x²), and continued as a normal tail beyond
    x = 1. Certificates use the exact mean (`fluidsched.queues.embedded_queue_mean`).
    """
    deviation = np.sqrt(mean_arrivals if variance is None else variance)
    drift = (threshold - mean_arrivals) / deviation
    with np.errstate(divide="ignore", over="ignore"):
        near = 0.5 / drift - 0.5826 + drift / 4.0 - 0.0415 * drift * drift
    mean = deviation * np.where(drift > 1.0, 0.1259 * np.exp(0.9 - 0.9 * drift * drift), near)
    return np.asarray(np.where(drift > 0.0, mean, math.inf))
