r"""Policies held against bounds: what each bound says of a measured quantity, and whether the policy respects it.

A bound is one of three kinds of statement, and each is tested as what it is.

*On every path* (the no-wait floor per request, the memory of a WAIT table, the hindsight optimum of the path that
was run): a single excess beyond rounding is a violation; no statistics enter.

*In the mean* (the fluid optimum, the theorem constants, the embedded queue): the bound speaks of an expectation, the
runs are R independent draws. With D_r how far replication r lies beyond the bound, the policy violates it if the whole
interval mean(D) ± t_{R−1}·s_D/√R lies beyond. A policy that attains a bound is therefore called a violator with
probability (1 − confidence)/2: ask for more confidence where many are judged. One replication has no interval and
cannot prove a violation of a mean. The constants of Nested WAIT are about runs in which nobody is preempted.

*A probability* (overflow within the horizon): the share of the runs in which it happened has Clopper and Pearson's
interval; the policy violates the bound if the lower end lies above.

An estimate that is itself only a lower bound (requests still without the event at the horizon) can violate an upper
bound, never a lower one; there the floor is held against the requests that have the event.

**What the fluid optimum bounds**: the long-run reward of every policy, if prompts recompute for no less than the
decodes they replace, and if no policy picks requests of one type by their length: at offered rates that fit, all are
served and the picking does not matter; beyond, policies that may do so, or are not known, are not judged on types of
random length. Where rates vary in time, the window measured has others than the mean rates of the program. A
stability condition bounds the rates at which a policy is stable: one that is not stable here is not judged by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from fluidsched.bounds.bound import Bound
from fluidsched.bounds.floor import floor_violated, no_wait_floor
from fluidsched.bounds.hindsight import Hindsight
from fluidsched.bounds.stability import stability_conditions
from fluidsched.bounds.theorems import nested_wait_bounds, nested_wait_overflow, wait_bounds
from fluidsched.errors import InputError
from fluidsched.simulation.measures import UNITS, interval, latencies
from fluidsched.simulation.result import PolicyOutcome, SimulationResult
from fluidsched.workload import ArrivalPath
from fluidsched.workload.lengths import JointAtoms

if TYPE_CHECKING:
    from fluidsched.fluid import FluidSolution
    from fluidsched.policy import PolicyTable
    from fluidsched.server import Server
    from fluidsched.workload import Workload

__all__ = ["BOUNDED", "VERDICTS", "BoundRow", "judge"]

_Real = npt.NDArray[np.float64]
BoundVerdict = Literal["respects", "violates", "not applicable"]
VERDICTS: tuple[str, ...] = ("respects", "violates", "not applicable")

BOUNDED = {
    "requests": "request_throughput",
    "output_tokens": "output_throughput",
    "total_tokens": "total_token_throughput",
}
"""Objective of the fluid program → the measure its optimum bounds."""

_ROUNDING = 1e-9  # relative: an excess that is no violation of what holds on every path
_MOST_ATOMS = 1_000_000  # of a length law, up to which the mean floor is summed over it

_FLUID_SOURCE = "fluid linear program"
_FLOOR_SOURCE = "an empty server"


@dataclass(frozen=True)
class BoundRow:
    """One policy against one bound; NaN where there is no number.

    Attributes
    ----------
    policy : str
    bound : str
        "fluid optimum", "critical rate (Dong-Cao)", "no-wait floor", "WAIT theorem", "embedded queue",
        "Nested WAIT theorem", "Nested WAIT entry queue", "Nested WAIT overflow", "hindsight (LP relaxation)" …
    measure, unit : str
        The measured quantity that is bounded; of one type with its name in brackets, as in "mean_ttft[chat]".
    direction : {"upper", "lower"}
    estimate, low, high : float
        Mean over replications and its interval at the comparison's confidence.
    lower_bound : bool
        Requests without the event at the end make the estimate a lower bound.
    value : float
        The bound; of one that depends on the path, its mean over the replications.
    ratio : float
        Estimate over bound.
    verdict : {"respects", "violates", "not applicable"}
    why : str
        The conditions the bound holds under; if not applicable, the one that fails.
    formula, source : str
    """

    policy: str
    bound: str
    measure: str
    unit: str
    direction: str
    estimate: float
    low: float
    high: float
    lower_bound: bool
    value: float
    ratio: float
    verdict: str
    why: str
    formula: str
    source: str


@dataclass(frozen=True)
class _Evidence:
    """What R replications say of a bounded quantity.

    `values` (R,); `limit` (R,), the bound where it depends on the path; `certain`: the bound holds on every path, and
    `worst` (R,) is the largest excess of any single request; `at_least`: values are lower bounds; `share`: values are 0
    or 1 and the bound is a probability.
    """

    values: _Real
    limit: _Real | None = None
    certain: bool = False
    worst: _Real | None = None
    at_least: bool = False
    share: bool = False


@dataclass(frozen=True)
class _Case:
    """One policy's runs, and what is known beside them."""

    runs: SimulationResult
    outcome: PolicyOutcome
    table: PolicyTable | None
    confidence: float

    def row(self, name: str, measure: str, bound: Bound, evidence: _Evidence | None) -> BoundRow:
        """The row of one bound; `evidence` None where the quantity was not measured."""
        estimate = low = high = value = ratio = math.nan
        verdict: BoundVerdict = "not applicable"
        why = bound.condition
        if evidence is not None:
            estimate, low, high = _interval(evidence, self.confidence)
        elif bound.applies:
            why = "not measured without the records of the runs"
        if evidence is not None and bound.value is not None and math.isnan(estimate):
            why = "nothing was measured"
        elif evidence is not None and bound.value is not None:
            limit = np.full(len(evidence.values), bound.value) if evidence.limit is None else evidence.limit
            value = float(np.nanmean(limit))
            ratio = estimate / value if value != 0.0 else math.nan
            verdict, why = _verdict(bound, evidence, limit, self.confidence)
        return BoundRow(
            policy=self.outcome.name,
            bound=name,
            measure=measure,
            unit=UNITS.get(measure.partition("[")[0], bound.unit),
            direction=bound.direction,
            estimate=estimate,
            low=low,
            high=high,
            lower_bound=evidence is not None and evidence.at_least,
            value=value,
            ratio=ratio,
            verdict=verdict,
            why=why,
            formula=bound.formula,
            source=bound.source,
        )

    def measured(self, measure: str) -> _Evidence:
        """Evidence on one of the measures of the runs."""
        at_least = bool(self.outcome.lower_bounds[measure].any())
        return _Evidence(self.outcome.values[measure], at_least=at_least)


def judge(
    runs: SimulationResult,
    bounds: Sequence[FluidSolution | Hindsight],
    tables: Sequence[PolicyTable],
    confidence: float,
) -> tuple[BoundRow, ...]:
    """Hold every policy against every bound that follows from `bounds`.

    Parameters
    ----------
    runs : SimulationResult
    bounds : sequence of FluidSolution or Hindsight
        A solution stands for all that follows from its workload and server.
    tables : sequence of PolicyTable
        Of the policies by name; bounds on a table are not applicable to policies without one.
    confidence : float
        Of the intervals, in (0, 1).

    Returns
    -------
    tuple of BoundRow
        Grouped by bound, within a bound in the order of the runs.
    """
    by_name = {table.name: table for table in tables}
    cases = [_Case(runs, outcome, by_name.get(outcome.name), confidence) for outcome in runs.outcomes]
    rows: list[BoundRow] = []
    for bound in bounds:
        if isinstance(bound, Hindsight):
            rows += [_hindsight_row(case, bound) for case in cases]
            continue
        if runs.server is not None and runs.server != bound.server:
            raise InputError(
                "bound",
                f"a solution for {bound.server!r}",
                f"be of the server that was simulated, {runs.server!r}",
            )
        of_each = [list(_fluid_rows(case, bound)) for case in cases]
        names = dict.fromkeys((row.bound, row.measure) for of_one in of_each for row in of_one)
        rows += [
            row for name in names for of_one in of_each for row in of_one if (row.bound, row.measure) == name
        ]
    return tuple(rows)


# ---- statistics -----------------------------------------------------------------------------------------------------


def _interval(evidence: _Evidence, confidence: float) -> tuple[float, float, float]:
    if not evidence.share:
        return interval(evidence.values, confidence)
    from scipy.special import betaincinv

    count, hits = len(evidence.values), int(evidence.values.sum())
    tail = (1.0 - confidence) / 2.0
    low = float(betaincinv(hits, count - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, count - hits, 1.0 - tail)) if hits < count else 1.0
    return hits / count, low, high


def _verdict(bound: Bound, evidence: _Evidence, limit: _Real, confidence: float) -> tuple[BoundVerdict, str]:
    """Respects, violates or not applicable, and why."""
    sign = 1.0 if bound.direction == "upper" else -1.0
    excess = sign * (evidence.values - limit)
    rounding = _ROUNDING * float(np.nanmax(np.abs(limit)))
    if evidence.certain:
        worst = excess if evidence.worst is None else evidence.worst
        return ("violates" if float(np.nanmax(worst)) > rounding else "respects"), bound.condition
    beyond = float(np.nanmean(excess)) > rounding
    if not beyond:
        return "respects", bound.condition
    if evidence.at_least and bound.direction == "lower":
        return "not applicable", "the estimate is itself a lower bound: requests are still without the event"
    if evidence.share:
        low = _interval(evidence, confidence)[1] - float(limit[0])
    elif np.count_nonzero(~np.isnan(excess)) < 2:
        return "not applicable", "beyond the bound, but one replication cannot tell a mean from chance"
    else:
        low = interval(excess, confidence)[1]
    return ("violates" if low > rounding else "respects"), bound.condition


# ---- what follows from a fluid solution ---------------------------------------------------------------------------


def _fluid_rows(case: _Case, fluid: FluidSolution) -> Iterator[BoundRow]:
    yield _optimum_row(case, fluid)
    for bound in stability_conditions(fluid.workload, fluid.server):
        author = bound.name.partition("[")[2].rstrip("]")
        yield _critical_row(case, f"critical rate ({author})", bound)
    yield from _floor_rows(case, fluid.workload, fluid.server)
    yield from _theorem_rows(case, _WAIT, fluid.workload, fluid.server)
    yield from _theorem_rows(case, _NESTED_WAIT, fluid.workload, fluid.server)
    yield _overflow_row(case, fluid.workload, fluid.server)


def _optimum_row(case: _Case, fluid: FluidSolution) -> BoundRow:
    measure = BOUNDED.get(fluid.objective)
    if measure is None:
        bound = Bound.not_applicable(
            "reward",
            "reward/s",
            "upper",
            "max Σ r_j a_j",
            _FLUID_SOURCE,
            "a reward of one's own is not measured",
        )
        return case.row("fluid optimum", "reward", bound, None)
    violated = _recompute_too_cheap(fluid.workload, fluid.server) or _left_early(case, "aborted")
    overload = not np.all(fluid.admitted_rate >= fluid.arrival_rate * (1.0 - 1e-9))
    condition = "long-run rate at the offered rates" + (
        ", no choice by length within a type" if overload else ""
    )
    if violated is None and overload and _picks_by_length(case):
        random = [t.name for t in fluid.workload.types if not t.law.is_fixed]
        if random:
            violated = (
                f"beyond the boundary the policy may pick requests of type {random[0]!r} by their length"
            )
    varying = [t.name for t in fluid.workload.types if not t.arrivals.has_constant_rate]
    if violated is None and varying:
        violated = (
            f"the rate of type {varying[0]!r} varies: at mean rates the optimum bounds the long run, not the "
            "window measured"
        )
    unit, formula = UNITS[measure], "max Σ_j r_j a_j"
    if violated is not None:
        bound = Bound.not_applicable(measure, unit, "upper", formula, _FLUID_SOURCE, violated)
    else:
        bound = Bound(measure, fluid.upper_bound, unit, "upper", formula, _FLUID_SOURCE, condition)
    return case.row("fluid optimum", measure, bound, case.measured(measure))


def _recompute_too_cheap(workload: Workload, server: Server) -> str | None:
    """The condition of floor and optimum that the server fails for some request of the types; None if none."""
    for member in workload.types:
        tokens, one_more = member.cached_tokens()
        violated = floor_violated(server, member.law.prompt_law.values, tokens + (one_more > 0.0))
        if violated is not None:
            return violated
    return None


def _left_early(case: _Case, *statuses: str) -> str | None:
    """What forbids bounds on requests served to their end, if any abandoned or was aborted; None if none did."""
    for status in statuses or ("abandoned", "aborted"):
        count = float(np.sum(case.outcome.values.get(status, 0.0)))
        if count:
            return f"is about requests that stay to their end; {count:,.0f} left unfinished ({status})"
    return None


def _picks_by_length(case: _Case) -> bool:
    """Whether the policy may prefer lengths within a type: by its table, or as a rule of the user's own."""
    table = case.table
    if table is None or (case.runs.engine == "reference" and not table.provenance):
        return True  # nothing is known of it: rules of one's own come with a plain table
    return table.order != "fcfs" or any(row.match.output is not None for row in table.types)


def _critical_row(case: _Case, name: str, bound: Bound) -> BoundRow:
    verdict = case.runs.verdict(case.outcome.name)
    early = _left_early(case, "aborted")
    if bound.applies and early is not None:
        bound = Bound.not_applicable(
            bound.name, bound.unit, bound.direction, bound.formula, bound.source, early
        )
    if bound.applies and verdict not in ("stable", "finished"):
        bound = Bound.not_applicable(
            bound.name,
            bound.unit,
            bound.direction,
            bound.formula,
            bound.source,
            f"bounds the rates at which a policy is stable; here it is {verdict}",
        )
    return case.row(name, "request_throughput", bound, case.measured("request_throughput"))


def _floor_rows(case: _Case, workload: Workload, server: Server) -> Iterator[BoundRow]:
    name = "no-wait floor"
    formulas = ("T(p) in the cheapest chunking", "TTFT floor + Σ_k T(one decode)")
    violated = _recompute_too_cheap(workload, server)
    for position, (measure, formula) in enumerate(zip(("mean_ttft", "mean_e2e"), formulas, strict=True)):
        evidence, limit = case.measured(measure), math.nan
        if violated is None and case.runs.engine_runs:
            evidence = _floor_evidence(case, server, position)
            limit = float(np.nanmean(evidence.limit)) if not np.all(np.isnan(evidence.limit)) else math.nan  # type: ignore[arg-type]
        elif violated is None:
            violated = _left_early(case)
            limit = _mean_floor(workload, server, position)
            if violated is None and math.isnan(limit):
                violated = "neither request records nor a small law of lengths are at hand"
        if violated is not None or math.isnan(limit):
            bound = Bound.not_applicable(
                measure, "s", "lower", formula, _FLOOR_SOURCE, violated or "no request had its event"
            )
        else:
            condition = "every request" if evidence.certain else "mean over the lengths' law"
            bound = Bound(measure, limit, "s", "lower", formula, _FLOOR_SOURCE, condition)
        yield case.row(name, measure, bound, evidence)


def _floor_evidence(case: _Case, server: Server, position: int) -> _Evidence:
    """Latencies of the requests that have the event, against the floors of these same requests."""
    values, limits, worst = [], [], []
    for r, path in enumerate(case.runs.paths):
        run = case.runs.run(case.outcome.name, r)
        event = run.first_token_s if position == 0 else run.finish_s
        seen = (path.arrival_s >= case.runs.warmup) & ~np.isnan(event)
        floor = no_wait_floor(path, server)[position][seen]
        spent = event[seen] - path.arrival_s[seen]
        # Instants are sums of many iterations: their rounding counts beside the floor's own.
        rounding = 1e-12 * event[seen]
        some = len(spent) > 0
        values.append(float(spent.mean()) if some else math.nan)
        limits.append(float(floor.mean()) if some else math.nan)
        worst.append(float((floor - spent - rounding).max()) if some else math.nan)
    return _Evidence(np.array(values), np.array(limits), certain=True, worst=np.array(worst))


def _mean_floor(workload: Workload, server: Server, position: int) -> float:
    """Σ_j f_j E[floor] over the types' laws, s; NaN where a law has too many points."""
    total, rate = 0.0, workload.arrival_rate
    for member, share in zip(workload.types, rate / rate.sum(), strict=True):
        if share == 0.0:
            continue
        points = len(member.law.prompt_law.values) * len(member.law.output_law.values)
        if points > _MOST_ATOMS and not isinstance(member.law, JointAtoms):
            return math.nan
        prompts, outputs, weights = member.law.atoms()
        tokens, one_more = member.cached_tokens()
        place = np.searchsorted(member.law.prompt_law.values, prompts)
        for more in (0, 1):
            cached = np.minimum(tokens[place] + more, prompts - 1)
            path = ArrivalPath.from_arrays(
                np.zeros(len(prompts)), prompts, outputs, cached_prompt_tokens=cached
            )
            chance = one_more[place] if more else 1.0 - one_more[place]
            if not chance.any():
                continue
            total += share * float((weights * chance) @ no_wait_floor(path, server)[position])
    return total


@dataclass(frozen=True)
class _Theorem:
    """How the constants of one theorem are asked for and held against the runs of a table of its `kind`.

    `rows`: quantity → bound and measure; `certain`: those that hold on every path; `per_type`: those stated of each
    type too.
    """

    kind: str
    bounds: Callable[..., tuple[Bound, ...]]
    source: str
    rows: Mapping[str, tuple[str, str]]
    certain: tuple[str, ...] = ()
    per_type: tuple[str, ...] = ()


_WAIT = _Theorem(
    "wait",
    wait_bounds,
    "arXiv 2504.11320, Theorem 1",
    {
        "memory": ("WAIT theorem", "peak_kv"),
        "mean_ttft": ("WAIT theorem", "mean_ttft"),
        "mean_waiting": ("embedded queue", "mean_waiting"),
        "output_throughput_gap": ("WAIT theorem", "effective_throughput"),
    },
    certain=("memory",),
    per_type=("mean_ttft", "mean_e2e"),
)
_NESTED_WAIT = _Theorem(
    "nested-wait",
    nested_wait_bounds,
    "arXiv 2504.11320, Theorem 2",
    {
        "mean_ttft": ("Nested WAIT theorem", "mean_ttft"),
        "mean_e2e": ("Nested WAIT theorem", "mean_e2e"),
        "mean_waiting": ("Nested WAIT entry queue", "mean_waiting"),
        "output_throughput_gap": ("Nested WAIT theorem", "effective_throughput"),
    },
)


def _theorem_rows(case: _Case, theorem: _Theorem, workload: Workload, server: Server) -> Iterator[BoundRow]:
    for bound in _theorem_bounds(case, theorem, workload, server):
        quantity, _, member = bound.name.partition("[")
        if member:
            if theorem.kind == _kind(case) and quantity in theorem.per_type:
                evidence = _of_type(case, quantity[5:], member.rstrip("]"))
                yield case.row(theorem.rows["mean_ttft"][0], bound.name, bound, evidence)
            continue
        if quantity not in theorem.rows:  # of the queue at decisions, which no measure counts
            continue
        name, measure = theorem.rows[quantity]
        evidence = case.measured(measure)
        if quantity in theorem.certain:
            evidence = _Evidence(evidence.values, certain=True)
        elif quantity == "output_throughput_gap":
            bound = _least_throughput(bound, workload, case.runs)
        yield case.row(name, measure, bound, evidence)


def _theorem_bounds(
    case: _Case, theorem: _Theorem, workload: Workload, server: Server
) -> tuple[Bound, ...] | list[Bound]:
    """The theorem's numbers for the table that was run, or what of the runs does not meet its conditions."""
    table, violated = case.table, None
    if table is None:
        violated = "its table is not at hand"
    elif (early := _left_early(case)) is not None:
        violated = early
    elif theorem.kind == table.kind == "wait" and table.type_names != workload.type_names:
        violated = "the solution is not for the types the table was compiled from"
    elif theorem.kind == table.kind == "nested-wait" and (count := float(_preemptions(case).sum())) > 0.0:
        violated = f"is about runs in which nobody is preempted; there were {count:,.0f} preemptions"
    if table is None or violated is not None:
        return [
            Bound.not_applicable(quantity, UNITS[measure], "upper", "", theorem.source, violated or "")
            for quantity, (_, measure) in theorem.rows.items()
        ]
    return theorem.bounds(table, workload, server, horizon=case.runs.horizon)


def _kind(case: _Case) -> str | None:
    return None if case.table is None else case.table.kind


def _preemptions(case: _Case) -> _Real:
    """Preemptions of each replication."""
    return np.asarray(case.outcome.values["preemptions"], dtype=np.float64)


def _least_throughput(gap: Bound, workload: Workload, runs: SimulationResult) -> Bound:
    """The gap over (0, H] as a floor of the effective throughput in the measured window (w, H].

    At most λō·w output tokens are completed by w in the mean, so at least λō(H − w) − gap·H after it.
    """
    formula, name = "Σ_j λ_j E[o_j] − gap·H/(H − w)", "effective_throughput"
    if gap.value is None or runs.horizon is None:
        return Bound.not_applicable(name, gap.unit, "lower", formula, gap.source, gap.condition)
    offered = float(workload.arrival_rate @ workload.mean_output_tokens)
    value = offered - gap.value * runs.horizon / (runs.horizon - runs.warmup)
    return Bound(name, max(value, 0.0), gap.unit, "lower", formula, gap.source, gap.condition)


def _of_type(case: _Case, latency: str, member: str) -> _Evidence | None:
    """Mean latency of one type in each replication; None without request records or labels."""
    runs = case.runs
    if not runs.engine_runs:
        return None
    means, at_least = [], False
    for r, path in enumerate(runs.paths):
        if path.type is None or member not in path.type_names:
            return None
        run = runs.run(case.outcome.name, r)
        here = path.type[path.arrival_s >= runs.warmup] == path.type_names.index(member)
        observed, censored = latencies(path, run, runs.warmup, latency)
        event = run.first_token_s if latency == "ttft" else run.finish_s
        seen = ~np.isnan(event[path.arrival_s >= runs.warmup])
        mine = np.concatenate([observed[here[seen]], censored[here[~seen]]])
        at_least |= bool(here[~seen].any())
        means.append(float(mine.mean()) if len(mine) else math.nan)
    return _Evidence(np.array(means), at_least=at_least)


def _overflow_row(case: _Case, workload: Workload, server: Server) -> BoundRow:
    name, measure = "Nested WAIT overflow", "overflow_share"
    evidence = _Evidence((_preemptions(case) > 0).astype(np.float64), share=True)
    violated = None
    if case.table is None:
        violated = "its table is not at hand"
    elif case.runs.horizon is None:
        violated = "the runs have no horizon"
    if violated is not None or case.table is None or case.runs.horizon is None:
        bound = Bound.not_applicable(
            "overflow_probability", "", "upper", "", "arXiv 2504.11320, Theorem 2", violated or ""
        )
    else:
        bound = nested_wait_overflow(case.table, workload, server, case.runs.horizon)
    return case.row(name, measure, bound, evidence)


# ---- hindsight ------------------------------------------------------------------------------------------------------


def _hindsight_row(case: _Case, hindsight: Hindsight) -> BoundRow:
    bound, outcome = hindsight.to_bound(), case.outcome
    completed = outcome.values["completed"]
    violated: str | None = None
    if case.runs.replications != 1 or case.runs.warmup > 0.0:
        violated = "bounds one path, run once and measured from its start"
    elif completed[0] != hindsight.requests:
        violated = f"bounds {hindsight.requests:,} finished requests; {completed[0]:,.0f} finished"
    elif (
        hindsight.method != "combinatorial"
        and outcome.values["preemptions"].any()
        and (case.table is None or case.table.preemption != "restart")
    ):
        violated = "covers schedules without preemption that keeps tokens; the run has some"
    if violated is not None:
        bound = Bound.not_applicable(
            bound.name, bound.unit, bound.direction, bound.formula, bound.source, violated
        )
    evidence = _Evidence(outcome.values["mean_e2e"], certain=True)
    return case.row(f"hindsight ({hindsight.method})", "mean_e2e", bound, evidence)
