"""Fleets checked against percentiles of latency: the fluid plan's replicas, corrected by simulation.

`plan_capacity` says how many replicas carry a demand, not how long requests wait. Here every pool k of its plan is
simulated as N_k independent replicas, each receiving the rates

    λ_jk = (rate of type j routed to pool k) / N_k,

which for Poisson arrivals is exactly what random routing within the pool gives each replica (a router that looks at
queues does better, so the fleet found is on the safe side of it). Routing between the pools stays the plan's. A
target, such as a p99 TTFT of 1 s, holds for the fleet if it holds in every pool.

*Search.* The latency of a pool falls as its load per replica does, so the least N_k that meets the targets is sought
by doubling the replicas added and then bisection, on common random numbers.

*Confirmation.* Whoever tries many fleets on the same paths finds one that was lucky. So the fleet found is simulated
again on paths of its own; where it then fails, one replica is added and it is confirmed anew. With K pools, M targets
and confidence 1 − δ the i-th confirmation of a pool asks of every target that

    mean + t_{R−1, 1−δ_i}·s/√R ≤ target,       δ_i = δ/(2^i K M),       i = 1, 2, …

over the R replications' values (Student). Σ_i δ_i ≤ δ/(K M), so with probability at least 1 − δ no fleet is reported
whose expected measure, at this horizon and warm-up, lies above a target (Bonferroni over pools, targets and
confirmations; replications' values taken as normal).

*Prefill and decode apart.* With one pool of each, TTFT and scheduling delay are the prefill pool's alone, which never
waits for the other: it is sought and confirmed first, its requests ending with their first token. Then the decode
pool is sought for TPOT and E2E, on runs of the whole fleet: the prefill pool found, the transfer, and a decode replica
drawn for each request. E2E may need more prefill replicas than TTFT does (or than the plan, where no TTFT is asked);
so where no number of decode replicas allowed meets it, the prefill pool gets one more and the decode pool is sought
again.

*The end of a run.* Judged are the requests that arrive between the warm-up and the horizon. Others keep arriving
after it, until those judged have finished: a sixth of the horizon more, then twice as long again and again, on the
same arrivals, as long as a value is only a lower bound for want of an end. More replicas would not help there; only
waiting does. A backlog that grows significantly never meets a target, nor does a value still without an end after
the last doubling.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fluidsched import _files
from fluidsched._checks import check_count, check_real
from fluidsched._display import Tabular
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.fluid import CapacityPlan
from fluidsched.policy import PolicyTable, baselines
from fluidsched.server import Server
from fluidsched.simulation.measures import Settled, check_targets
from fluidsched.workload import Workload

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.simulation import SimulationResult

__all__ = ["FleetCheck", "VerifiedCapacity", "verify_capacity"]

SCHEMA = "fluidsched.verified-capacity/1"

Progress = Callable[[str, int, int], None]

#: How often the time after the horizon is doubled for requests that have not finished.
_DOUBLINGS = 6
Verdict = Literal["met", "missed", "undecided"]


@dataclass(frozen=True)
class FleetCheck:
    """One measure of one pool with so many replicas, against its target.

    Attributes
    ----------
    pool : str
    replicas : int
        N_k tried.
    step : {"search", "confirmation"}
        Confirmations run on paths of their own.
    measure : str
        Such as "p99_ttft".
    target : float
        What the measure may be at most, s.
    estimate : float
        Mean over replications, s; NaN where no request had the latency.
    low, high : float
        One-sided limits at the confidence of this check, s: below `low`, and above `high`, the measure's
        expectation lies with at most the error rate the check may spend.
    verdict : {"met", "missed", "undecided"}
        "met" if high ≤ target, "missed" if low > target.
    """

    pool: str
    replicas: int
    step: Literal["search", "confirmation"]
    measure: str
    target: float
    estimate: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True, eq=False, repr=False)
class VerifiedCapacity(Tabular):
    """A fleet that meets its latency targets in simulation. P pools, J types.

    Attributes
    ----------
    plan : CapacityPlan
        The fluid plan it started from.
    replicas : ndarray of shape (P,)
        N, at least the plan's.
    routed_rate : ndarray of shape (P, J)
        The plan's routing, which the simulation kept, req/s.
    targets : dict of str to float
        Measure → what it may be at most, s.
    checks : tuple of FleetCheck
        Everything tried, in order.
    policy : PolicyTable
        What every replica ran.
    settings : dict
        confidence, horizon_s, warmup_s, replications, seed.
    """

    plan: CapacityPlan
    replicas: NDArray[np.int64]
    routed_rate: NDArray[np.float64]
    targets: Mapping[str, float]
    checks: tuple[FleetCheck, ...]
    policy: PolicyTable
    settings: Mapping[str, Any]

    @property
    def added(self) -> NDArray[np.int64]:
        """Replicas beyond the fluid plan's, shape (P,)."""
        return np.asarray(self.replicas - self.plan.replicas)

    @property
    def total_cost(self) -> float:
        """Σ cost_k N_k."""
        return float(self.plan.cost @ self.replicas)

    @cached_property
    def confirmed(self) -> tuple[FleetCheck, ...]:
        """The last confirmation of every pool and measure."""
        last = {(c.pool, c.measure): c for c in self.checks if c.step == "confirmation"}
        return tuple(last.values())

    def to_frame(self) -> pd.DataFrame:
        """Return one row per check, in the order made; limits in s."""
        import pandas as pd

        return pd.DataFrame([dataclasses.asdict(check) for check in self.checks])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, schema first."""
        answer: dict[str, Any] = _files.to_jsonable(
            {
                "schema": SCHEMA,
                "plan": self.plan.to_dict(),
                "replicas": dict(
                    zip((pool.name for pool in self.plan.pools), self.replicas.tolist(), strict=True)
                ),
                "added": dict(zip((pool.name for pool in self.plan.pools), self.added.tolist(), strict=True)),
                "total_cost": self.total_cost,
                "targets_s": dict(self.targets),
                "policy": self.policy.name,
                "settings": dict(self.settings),
                "checks": [dataclasses.asdict(check) for check in self.checks],
            }
        )
        return answer

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw what was tried, measure against replicas; see `fluidsched.plots.fleet_checks`."""
        from fluidsched import plots

        return plots.fleet_checks(self, ax=ax)

    def __repr__(self) -> str:
        asked = self.settings
        lines = [
            "VerifiedCapacity",
            f"  carries         {self.plan.workload.total_arrival_rate:.4g} req/s in {len(self.plan.workload)} types",
            f"  total cost      {self.total_cost:.6g} (fluid plan {self.plan.total_cost:.6g})",
        ]
        for pool, count, more in zip(
            self.plan.pools, self.replicas.tolist(), self.added.tolist(), strict=True
        ):
            if count:
                note = f", {more} more than the fluid plan" if more else ""
                lines.append(f"  {count:g} × {pool.name}{note}")
                for c in self.confirmed:
                    if c.pool == pool.name:
                        value = "none to measure" if math.isnan(c.estimate) else f"{c.estimate:.4g} s"
                        lines.append(
                            f"    {c.measure:<13} {value} (at most {c.high:.4g}; target {c.target:g} s)"
                        )
        lines.append(
            f"  confirmed at {asked['confidence']:.4g} confidence under {self.policy.name}: {asked['replications']}"
            f" replications of {asked['horizon_s']:g} s, seed {asked['seed']}"
        )
        return "\n".join(lines)


def verify_capacity(
    plan: CapacityPlan,
    targets: Mapping[str, float],
    *,
    policy: PolicyTable | None = None,
    horizon: float | None = None,
    warmup: float | None = None,
    replications: int = 16,
    seed: int = 7,
    confidence: float = 0.95,
    most_replicas: int | None = None,
    transfer_bandwidth: float | None = None,
    transfer_latency: float = 0.0,
    progress: Progress | None = None,
) -> VerifiedCapacity:
    """Check a fleet against latency targets by simulation, and add replicas where they are missed.

    Parameters
    ----------
    plan : CapacityPlan
        From `plan_capacity` or `plan_load`; pools that serve whole requests, or one that prefills and one that
        decodes. The demand checked is the one planned for, headroom included.
    targets : mapping of str to float
        Measure → what it may be at most, s: "p99_ttft", "p99_tpot", "mean_e2e", … (any latency of
        `SimulationResult.summary`). Held to in every pool, hence by the whole fleet; with prefill and decode apart,
        by the fleet.
    policy : PolicyTable, optional
        What every replica runs; default `baselines.vllm()`.
    horizon, warmup : float, optional
        The requests judged arrive between the two, s; the warm-up is a sixth by default. The default horizon is
        600 mean times in service by the fluid plan and 4 000 arrivals. Runs go on after it until they have finished.
    replications : int
        R ≥ 2 independent runs for each number of replicas tried.
    seed : int
        Of all runs: one seed, one answer.
    confidence : float
        1 − δ of the module's statement, below 1.
    most_replicas : int, optional
        Of any pool; default four times the plan's and eight more.
    transfer_bandwidth, transfer_latency
        Of KV from prefill to decode replicas, tokens/s and s; see `simulate_cluster`.
    progress : callable, optional
        Called as ``progress(pool, replicas tried, replicas tried)``.

    Returns
    -------
    VerifiedCapacity

    Raises
    ------
    InputError
        If an argument is wrong, or there is more than one pool that prefills or decodes, or one that serves whole
        requests beside them.
    InfeasibleError
        If a target is missed with `most_replicas`; shows the nearest miss.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 14.0, prompt_tokens=500, output_tokens=100)])
    >>> plan = fs.plan_capacity(workload, [fs.catalog.server("l40s", "llama-3-8b")], cost=[1.0])
    >>> fleet = verify_capacity(plan, {"p99_ttft": 0.25}, horizon=120.0, replications=4)
    >>> plan.replicas.tolist(), fleet.replicas.tolist()
    ([1], [2])
    """
    asked = check_targets(targets)
    runs = check_count("replications", replications, minimum=2)
    level = check_real("confidence", confidence, above=0.0, below=1.0)
    table = baselines.vllm() if policy is None else policy
    routed = plan.routing.routed_rate
    span = _long_enough(plan) if horizon is None else check_real("horizon", horizon, above=0.0)
    start = span / 6 if warmup is None else check_real("warmup", warmup, minimum=0.0, below=span)
    active = [k for k, rate in enumerate(routed) if plan.replicas[k] > 0 and rate.any()]
    error = (1.0 - level) / max(len(active) * len(asked), 1)
    replicas = plan.replicas.copy()
    sampling = _Sampling(span, start, runs)
    trials: list[_PoolTrial] = []
    apart = any(plan.pools[k].stage != "whole" for k in active)
    if not apart and (transfer_latency or transfer_bandwidth is not None):
        raise InputError(
            "transfer_latency" if transfer_latency else "transfer_bandwidth",
            transfer_latency or transfer_bandwidth,
            "be left out: pools that serve requests whole transfer nothing",
        )

    def trial(
        k: int, simulated: _Simulated, measures: Mapping[str, float], again: int = 0, share: float = 1.0
    ) -> _PoolTrial:
        seeds = np.random.SeedSequence(check_count("seed", seed), spawn_key=(k, again) if again else (k,))
        trials.append(
            _PoolTrial(plan.pools[k].name, simulated, measures, sampling, seeds, share * error, progress)
        )
        return trials[-1]

    def limits(k: int) -> tuple[int, int]:
        fewest = int(plan.replicas[k])
        limit = 4 * fewest + 8
        if most_replicas is not None:
            limit = check_count("most_replicas", most_replicas, minimum=1)
        return fewest, max(limit, fewest)

    if apart:
        prefill, decode = _one_of_each(plan, active)
        of_prefill = {m: limit for m, limit in asked.items() if m.endswith(("_ttft", "_scheduling_delay"))}
        of_decode = {m: limit for m, limit in asked.items() if m not in of_prefill}
        fewest, limit = limits(prefill)
        share = _prefills(plan.workload.with_rates(routed[prefill]))
        if of_prefill:
            alone = _pool_alone(share, plan.pools[prefill].server, table)
            replicas[prefill] = trial(prefill, alone, of_prefill).least(fewest, limit)
        whole_lives = any(measure.endswith("_e2e") for measure in of_decode)
        while of_decode:
            again = int(replicas[prefill]) - fewest
            whole = _pair(
                plan, prefill, decode, int(replicas[prefill]), table, transfer_bandwidth, transfer_latency
            )
            portion = (
                0.5 ** (again + 1) if whole_lives else 1.0
            )  # of the error rate: there may be more attempts
            try:
                replicas[decode] = trial(decode, whole, of_decode, again, portion).least(*limits(decode))
                break
            except InfeasibleError:
                if not whole_lives or replicas[prefill] >= limit:
                    raise
                replicas[prefill] += 1
    else:
        for k in active:
            share = plan.workload.with_rates(routed[k])
            alone = _pool_alone(share, plan.pools[k].server, table)
            replicas[k] = trial(k, alone, asked).least(*limits(k))
    checks = [check for tried in trials for check in tried.checks]
    replicas.setflags(write=False)
    settings = {
        "confidence": level,
        "horizon_s": span,
        "warmup_s": start,
        "replications": runs,
        "seed": seed,
    }
    return VerifiedCapacity(plan, replicas, routed, asked, tuple(checks), table, settings)


def _long_enough(plan: CapacityPlan) -> float:
    """600 mean times in service (Little: batch over rate) and 4 000 arrivals of every replica; ≥ 900 s."""
    routing = plan.routing
    rate = np.divide(
        routing.routed_rate.sum(axis=1),
        plan.replicas,
        out=np.zeros(len(plan.pools)),
        where=plan.replicas > 0,
    )
    used = rate > 0.0
    enough = (600.0 * routing.batch_size[used] + 4000.0) / rate[used]
    return math.ceil(float(enough.max(initial=900.0)) / 60.0) * 60.0


class _Sampling(NamedTuple):
    """Requests judged arrive from `warmup` to `horizon`, s, in so many replications."""

    horizon: float
    warmup: float
    replications: int


_Simulated = Callable[[int, float, _Sampling, np.random.SeedSequence, Settled], "SimulationResult"]
"""(replicas, end of the runs in s, sampling, seed, what sees every run) → runs of one policy."""


def _pool_alone(workload: Workload, server: Server, policy: PolicyTable) -> _Simulated:
    """One replica with its share of what is routed to the pool."""

    def simulated(
        replicas: int, end: float, sampling: _Sampling, seed: np.random.SeedSequence, settled: Settled
    ) -> SimulationResult:
        from fluidsched.simulation import simulate

        return simulate(
            workload.with_rates(workload.arrival_rate / replicas),
            server,
            policy,
            horizon=end,
            warmup=sampling.warmup,
            replications=sampling.replications,
            seed=seed,
            kept_replications=0,
            on_run=settled.seen,
        )

    return simulated


def _pair(
    plan: CapacityPlan,
    prefill: int,
    decode: int,
    prefills: int,
    policy: PolicyTable,
    bandwidth: float | None,
    latency: float,
) -> _Simulated:
    """The whole fleet, with so many prefill replicas and the number of decode replicas to be tried."""

    def simulated(
        replicas: int, end: float, sampling: _Sampling, seed: np.random.SeedSequence, settled: Settled
    ) -> SimulationResult:
        from fluidsched.simulation import routers
        from fluidsched.simulation.cluster import simulate_cluster

        pools = [
            dataclasses.replace(plan.pools[k], replicas=number)
            for k, number in ((prefill, prefills), (decode, replicas))
        ]
        runs = simulate_cluster(
            plan.workload.with_rates(plan.routing.routed_rate[prefill]),
            pools,
            policy,
            routers.random(),
            transfer_bandwidth=bandwidth,
            transfer_latency=latency,
            horizon=end,
            warmup=sampling.warmup,
            replications=sampling.replications,
            seed=seed,
        ).whole
        (name,) = runs.policies
        for r, path in enumerate(runs.paths):
            settled.seen(name, r, path, runs.run(name, r))
        return runs

    return simulated


def _prefills(workload: Workload) -> Workload:
    """The same requests ending with their first token."""
    return workload.with_types(
        dataclasses.replace(
            member,
            prompt_tokens=member.law.prompt_law,
            output_tokens=1,
            lengths=None,
            output_range=None if member.output_range is None else (1, None),
        )
        for member in workload.types
    )


def _one_of_each(plan: CapacityPlan, active: list[int]) -> tuple[int, int]:
    """The pool that prefills and the one that decodes."""
    stages = [plan.pools[k].stage for k in active]
    if sorted(stages) != ["decode", "prefill"]:
        raise InputError(
            "plan",
            ", ".join(f"{plan.pools[k].name!r} ({stage})" for k, stage in zip(active, stages, strict=True)),
            "use one pool that prefills and one that decodes, or pools that serve requests whole",
            "Plan with one server for each stage.",
        )
    return active[stages.index("prefill")], active[stages.index("decode")]


class _PoolTrial:
    """One pool's search for the least number of replicas, with a record of everything tried."""

    def __init__(
        self,
        name: str,
        simulated: _Simulated,
        targets: Mapping[str, float],
        sampling: _Sampling,
        seeds: np.random.SeedSequence,
        error: float,
        progress: Progress | None,
    ) -> None:
        self._name, self._simulated, self._targets, self._sampling = name, simulated, targets, sampling
        self._search_seed, self._seeds = seeds.spawn(1)[0], seeds
        self._error, self._progress = error, progress
        self._tried = 0
        self._falls_behind = False
        self.checks: list[FleetCheck] = []

    def least(self, fewest: int, limit: int) -> int:
        """Return the least number from `fewest` to `limit` that passes search and confirmation."""
        short, enough, more = fewest - 1, fewest, 1
        while not self._passes(enough, "search", self._search_seed, self._error):
            if enough >= limit:
                raise self._nearest_miss(limit)
            short, enough, more = enough, min(enough + more, limit), 2 * more
        while enough - short > 1:
            middle = (short + enough) // 2
            if self._passes(middle, "search", self._search_seed, self._error):
                enough = middle
            else:
                short = middle
        spent = self._error / 2
        while not self._passes(enough, "confirmation", self._seeds.spawn(1)[0], spent):
            if enough >= limit:
                raise self._nearest_miss(limit)
            enough, spent = enough + 1, spent / 2
        return enough

    def _passes(
        self,
        replicas: int,
        step: Literal["search", "confirmation"],
        seed: np.random.SeedSequence,
        error: float,
    ) -> bool:
        values, is_bound, self._falls_behind = self._measured(replicas, seed)
        made = [
            _check(
                (self._name, replicas, step),
                measure,
                target,
                values[measure],
                self._falls_behind or is_bound[measure],
                error,
            )
            for measure, target in self._targets.items()
        ]
        self.checks += made
        self._tried += 1
        if self._progress is not None:
            self._progress(f"verify {self._name}", self._tried, self._tried)
        return all(check.verdict == "met" for check in made)

    def _measured(
        self, replicas: int, seed: np.random.SeedSequence
    ) -> tuple[dict[str, NDArray[np.float64]], dict[str, bool], bool]:
        """Return measure → values (R,), measure → whether they are lower bounds, and whether backlog grows."""
        horizon, warmup, _ = self._sampling
        longer = horizon / 6
        for _ in range(_DOUBLINGS):
            settled = Settled(self._targets, warmup, horizon)
            runs = self._simulated(replicas, horizon + longer, self._sampling, seed, settled)
            (name,) = runs.policies
            values, is_bound = {}, {}
            for measure in self._targets:
                judged = settled.of(name, measure)
                values[measure] = np.array([value for value, _ in judged])
                is_bound[measure] = any(bound for _, bound in judged)
            verdict = runs.verdict(name)
            falls_behind = verdict == "unstable" or verdict.startswith("stuck")
            missed = any(is_bound[m] and values[m].min() > t for m, t in self._targets.items())
            if falls_behind or missed or not any(is_bound.values()):
                break
            longer *= 2
        return values, is_bound, falls_behind

    def _nearest_miss(self, limit: int) -> InfeasibleError:
        last = [c for c in self.checks if c.replicas == limit and c.verdict != "met"]
        shown = "; ".join(
            f"{c.measure} {c.estimate:.4g} s (between {c.low:.4g} and {c.high:.4g}) against {c.target:g} s"
            for c in last
        )
        horizon = self._sampling.horizon
        longest = horizon / 6 * 2 ** (_DOUBLINGS - 1)
        open_ended = any(math.isinf(c.high) and c.verdict == "undecided" for c in last)
        reason = (
            " Its backlog grows."
            if self._falls_behind
            else (
                f" Requests that arrived before {horizon:g} s are still unfinished {longest:g} s later, which leaves"
                " a measure without an upper limit."
                if open_ended
                else ""
            )
        )
        return InfeasibleError(
            f"{limit} replicas of {self._name!r} do not meet the targets: {shown}. Allow more replicas, a longer"
            f" time, or another server or policy; where even an idle server is too slow no number helps.{reason}",
            "slo",
        )


def _check(
    tried: tuple[str, int, Literal["search", "confirmation"]],
    measure: str,
    target: float,
    values: NDArray[np.float64],
    is_bound: bool,
    error: float,
) -> FleetCheck:
    """Judge one measure's values (R,); a lower bound, or a growing backlog, has no upper limit."""
    from scipy.special import stdtrit

    known = values[~np.isnan(values)]
    if not len(known) and measure.endswith("_tpot"):  # no request has a second token: none can be late
        return FleetCheck(*tried, measure, target, math.nan, math.nan, math.nan, "met")
    estimate, low, high = math.nan, -math.inf, math.inf
    if len(known):
        estimate = float(known.mean())
    if len(known) > 1:
        spread = float(known.std(ddof=1)) / math.sqrt(len(known))
        half = float(stdtrit(len(known) - 1, 1.0 - error)) * spread
        low, high = estimate - half, math.inf if is_bound else estimate + half
    verdict: Verdict = "met" if high <= target else "missed" if low > target else "undecided"
    return FleetCheck(*tried, measure, target, estimate, low, high, verdict)
