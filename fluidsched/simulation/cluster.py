r"""Clusters: replicas of servers, in pools, behind a router.

Every replica runs by the rules of `fluidsched.simulation.reference`, by itself, under the table of its pool; the
router sends each request to one of them when it arrives, for good. So once the replicas are chosen a cluster's run is
the P runs of its replicas on their parts of the path, and only a router that looks at the replicas ties them together.
Letters: N requests, K pools, P replicas (pool by pool, in the order given), J types, R replications.

Prefill and decode apart
  0. Where pools have the stages "prefill" and "decode" a request goes through two replicas, one of each. The prefill
     replica computes the prompt and emits token 1: to it the request has one output token. The KV of the prompt then
     leaves it, and with p prompt tokens, a latency of L s and a bandwidth of B tokens/s reaches a decode replica
     L + p/B s later, however many are on their way; in between it is in neither memory. At that instant the request
     is routed among the decode replicas and waits there with its KV at hand: it is handed over (rule 6a of the
     reference), and a decode replica that preempts it computes it again itself. With one output token it is finished
     after the prefill. Routing rules 1 to 9 hold for either stage by itself, "arrival" being the arrival there and
     the order that of these instants, equal ones by index; u and v of the second stage come from child (r, 2).
     Prefills do not wait for decodes, so the decode stage is run when the prefill stage is over.

  0a. Patience is over with the admission by the prefill replica. Who hangs up (`abort_after_s`) leaves the replica
     it is at as rules 35 to 37 of the reference say; or, if its KV reaches the decode replicas at that instant or
     later, it leaves on the way, at the instant itself (but not before the end of its prefill), and is never routed
     there: status `aborted`, its prompt's KV dropped. A server's timeouts count from the arrival at that server, the
     waiting timeout until the admission there.

Routing
  1. Requests are routed at their arrival, those of one instant in the order of the path. At an instant
     iterations end first, then requests are routed, then replicas decide. What is seen of a replica during an
     iteration is what that iteration holds (those who leave at its end included), with whoever was routed there
     since it began.
  2. A request goes only to replicas whose server could hold it alone (`limits.never_fits`), here called able;
     without one it is `rejected`. Ties go to the lowest index.
  3. `round_robin`: the first able replica after the one chosen last, in cyclic order; the first request begins
     at replica 0.
  4. `join_shortest_queue`: the able replica with the fewest requests in it, waiting or resident.
  5. `least_kv`: the able replica with the fewest KV tokens, those held by residents and those that the waiting
     need at admission (prompt and tokens already produced; without these all that comes within one iteration
     would go to one replica).
  6. `power_of_two`: of the m able replicas, in order, number ⌊u m⌋ and of the others number ⌊v (m - 1)⌋; the one
     with fewer requests in it.
  7. `random`: number ⌊u m⌋ of the able replicas.
  8. `split`: w_jk is the share of pool k in the rates of type j, over the able pools (all of the first able pool
     if these have none). Request n = 0, 1, … of the type goes to the first pool whose cumulative share exceeds
     the fractional part of (n + 1/2)(√5 - 1)/2: an even sequence, so that every pool sees its share with an
     error of a few requests rather than of √n. Within a pool: round robin.
  9. u and v are row i of one array of uniform numbers per replication, drawn from `SeedSequence(seed)`'s
     child (r, 1), whatever the router; so two routers see the same requests and the same chances.

The cluster's record
 10. Request records are those of the request's replica; a rejected request has none. Of a request that was handed
     over, admission is that of the prefill replica, the finish that of the decode replica, preemptions are added,
     and the gap before token 2 holds the transfer and the wait. Counters and integrals are sums over the replicas,
     so what is on its way neither waits nor is resident; but `busy_s` is their mean (the busy fraction of a
     replica), and `peak_kv` the largest of them. The run ends when its last replica does; "stuck" if one is.
     Occupancy is the sum of the replicas' series, each kept until its next row, at all their times.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_choice, check_real
from fluidsched._display import Tabular
from fluidsched.errors import InputError, SimulationError
from fluidsched.policy.table import PolicyTable
from fluidsched.server import IterationTime, Pool, Server
from fluidsched.simulation.laws import Audit, check_agreement, check_laws
from fluidsched.simulation.limits import (
    UNLIMITED,
    check_handed_over,
    check_run,
    effective_limits,
    never_fits,
)
from fluidsched.simulation.measures import alone_s, measure_run
from fluidsched.simulation.records import STATUSES, EngineRun, Verdict
from fluidsched.simulation.reference import Engine, run_reference
from fluidsched.simulation.result import Measured, SimulationResult
from fluidsched.simulation.routers import Router
from fluidsched.simulation.run import ENGINES, OCCUPANCY_POINTS, check_memory, common_paths
from fluidsched.workload import ArrivalPath, Workload
from fluidsched.workload.path import Seed, seed_sequence

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ClusterResult", "Handover", "simulate_cluster"]

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0

RULES = ("join_shortest_queue", "least_kv", "power_of_two")
"""Rules that look, in the order of the compiled loop's codes."""

Integers = NDArray[np.int64]

Assignment = PolicyTable | Mapping[str, PolicyTable]
"""A table for all pools, or one for each by the pool's name."""


@dataclass(frozen=True, repr=False, eq=False)
class Handover:
    """The M requests of one run that went from a prefill to a decode replica, in order of arrival there.

    Attributes
    ----------
    request : (M,) int64 array
        Their indices in the path.
    replica : (M,) int64 array
        Decode replica of each.
    path : ArrivalPath
        What the decode stage saw; `arrival_s` is when the KV had come over.
    first_token_s, admitted_s : (M,) float arrays
        End of the prefill, and admission by the decode replica (NaN: not by the end), s.
    lost : (H,) int64 array
        Indices of those who hung up while their KV was on its way, and so are none of the M.
    lost_s : (H,) float array
        When they did, s.
    """

    request: Integers
    replica: Integers
    path: ArrivalPath
    first_token_s: NDArray[np.float64]
    admitted_s: NDArray[np.float64]
    lost: Integers
    lost_s: NDArray[np.float64]


@dataclass(frozen=True, repr=False, eq=False)
class ClusterResult(Tabular):
    """Runs of several routers and policies on the same R paths, over the same P replicas.

    Attributes
    ----------
    whole : SimulationResult
        The cluster as one system; its policies are named "policy, router". Its `server` stands for the memory
        of all replicas together and for nothing else. Slowdown and the share of slots in use are measured where
        all replicas serve requests whole under one table.
    pools : tuple of Pool
    tables : tuple of tuple of PolicyTable
        `[k]`: the table of each pool under the k-th policy.
    pool_of : (P,) int64 array
        Pool of each replica.
    replica_runs : tuple
        `[k][r][p]`: the run of replica p, on the requests routed to it in their order.
    chosen : tuple
        `[k][r]`: replica of each request, -1 for those rejected; (N,) int64 arrays. With prefill and decode
        apart, the prefill replica.
    handed_over : tuple
        `[k][r]`: the `Handover` of prefilled requests; empty where pools serve requests whole.
    """

    whole: SimulationResult
    pools: tuple[Pool, ...]
    tables: tuple[tuple[PolicyTable, ...], ...]
    pool_of: Integers
    replica_runs: tuple[tuple[tuple[EngineRun, ...], ...], ...]
    chosen: tuple[tuple[Integers, ...], ...]
    handed_over: tuple[tuple[Handover, ...], ...] = ()

    @property
    def policies(self) -> tuple[str, ...]:
        """Names "policy, router", policies first."""
        return self.whole.policies

    def measures(self, policy: str) -> dict[str, NDArray[np.float64]]:
        """Measure → its value for the whole cluster in each replication, shape (R,)."""
        return self.whole.measures(policy)

    def verdict(self, policy: str) -> str:
        """How the cluster fared; see `SimulationResult.verdict`."""
        return self.whole.verdict(policy)

    def summary(self) -> pd.DataFrame:
        """The cluster's measures; see `SimulationResult.summary`."""
        return self.whole.summary()

    def requests(self, policy: str, replication: int = 0) -> pd.DataFrame:
        """One row per request, with its replica; see `SimulationResult.requests`.

        With prefill and decode apart also ``decode_replica`` (-1: none), ``ready_s`` (its KV had come over) and
        ``decode_admitted_s``.
        """
        frame = self.whole.requests(policy, replication)
        k = self.policies.index(policy)
        frame["replica"] = self.chosen[k][replication]
        if self.handed_over:
            handover = self.handed_over[k][replication]
            columns = {
                "decode_replica": (handover.replica, -1),
                "ready_s": (handover.path.arrival_s, math.nan),
                "decode_admitted_s": (handover.admitted_s, math.nan),
            }
            for name, (values, elsewhere) in columns.items():
                column = np.full(len(frame), elsewhere)
                column[handover.request] = values
                frame[name] = column
        return frame

    def replicas(self, policy: str) -> pd.DataFrame:
        """One row per replica: pool and every measure of its own requests, mean over replications.

        What a prefill replica serves has one output token; at a decode replica requests arrive when their KV has
        come over, and have their first token.
        """
        import pandas as pd

        self.whole.outcome(policy)
        k = self.policies.index(policy)
        rows = []
        for p, pool in enumerate(self.pool_of):
            server, stage = self.pools[pool].server, self.pools[pool].stage
            slots = effective_limits(server, self.tables[k][pool]).slots
            measured = []
            for r, runs in enumerate(self.replica_runs[k]):
                own = self._part(k, r, p)
                values, _ = measure_run(
                    own,
                    runs[p],
                    warmup=self.whole.warmup,
                    kv_capacity=server.kv_capacity,
                    slots=slots if slots < UNLIMITED else math.inf,
                    alone=alone_s(own, [server]) if stage != "decode" else None,
                    type_of=own.type,
                    slo=self.whole.slo,
                )
                measured.append(values)
            frame = pd.DataFrame(measured)
            if stage == "decode":
                frame[[name for name in frame.columns if str(name).endswith("_ttft")]] = math.nan
            rows.append({"replica": p, "pool": self.pools[pool].name, **frame.mean().to_dict()})
        return pd.DataFrame(rows)

    def _part(self, k: int, r: int, p: int) -> ArrivalPath:
        """What replica p saw of the r-th path under the k-th policy."""
        path, chosen = self.whole.paths[r], self.chosen[k][r]
        stage = self.pools[self.pool_of[p]].stage
        if stage == "decode":
            handover = self.handed_over[k][r]
            return handover.path.selected(handover.replica == p)
        return (path if stage == "whole" else _prefills(path)).selected(chosen == p)

    def to_frame(self) -> pd.DataFrame:
        """The replicas of every policy, one below the other."""
        import pandas as pd

        frames = [self.replicas(policy) for policy in self.policies]
        return pd.concat(frames, keys=self.policies, names=["policy", None]).reset_index(level=0)

    def __repr__(self) -> str:
        fleet = " + ".join(f"{pool.replicas:g} × {pool.name}" for pool in self.pools)
        return f"{fleet}\n{self.whole!r}"


def simulate_cluster(
    workload: Workload | ArrivalPath,
    pools: Pool | Sequence[Pool],
    policies: Assignment | Sequence[Assignment],
    routers: Router | Sequence[Router],
    *,
    transfer_bandwidth: float | None = None,
    transfer_latency: float = 0.0,
    horizon: float | None = None,
    warmup: float | None = None,
    replications: int | None = None,
    seed: Seed = 0,
    engine: Literal["kernel", "reference"] = "kernel",
    check: bool = False,
    oversize: Literal["raise", "reject"] = "raise",
) -> ClusterResult:
    """Run every policy behind every router, on the same arrival paths.

    Parameters
    ----------
    workload : Workload or ArrivalPath
        A workload is sampled; a path is replayed.
    pools : Pool or sequence of Pool
        K pools of whole numbers of replicas, with unique names, that all serve requests whole; or pools of stages
        "prefill" and "decode", at least one of each.
    policies : PolicyTable, mapping of str to PolicyTable, or a sequence of them
        A table that all replicas follow, or the name of every pool and the table of its replicas. Decode pools take
        tables of kinds "vllm", "capped", "sarathi" and "gated". With unique names; that of a mapping is its tables'
        names joined by " + " in the order of the pools.
    routers : Router or sequence of them
        From `fs.routers`, with unique names.
    transfer_bandwidth : float, optional
        KV tokens per second from a prefill to a decode replica, for each request by itself; None: infinite.
    transfer_latency : float
        What a transfer takes beside that, s.
    horizon, warmup, replications, seed
        As for `simulate`.
    engine : {"kernel", "reference"}
        "kernel" stops compiled replicas where a router looks at them; "reference" steps all replicas from
        arrival to arrival and is the definition.
    check : bool
        Verify the laws of every replica's run. With the kernel the first replication of every policy behind every
        router also runs on the reference engine, which must choose the same replicas and agree in every run, and whose
        every batch is audited.
    oversize : {"raise", "reject"}
        What to do with requests that fit no replica.

    Returns
    -------
    ClusterResult

    Raises
    ------
    InputError
        As `simulate`; also for fractional replicas, stages that do not serve requests to their end, a split of
        other pools or types than these, transfers without anything to transfer; behind a router that looks and
        on the kernel, pools of one stage with different tables; and what would not fit into memory.

    Examples
    --------
    >>> import fluidsched as fs
    >>> server = fs.Server(137_000, fs.IterationTime.paper(d0=0.01, d1=3.3e-7), name="gpu")
    >>> workload = fs.Workload([fs.RequestType("chat", 40.0, prompt_tokens=512, output_tokens=128)])
    >>> runs = simulate_cluster(workload, [fs.Pool(server, 4)], fs.baselines.vllm(),
    ...                         [fs.routers.round_robin(), fs.routers.join_shortest_queue()],
    ...                         horizon=60.0, replications=2)
    >>> runs.policies
    ('vllm, round-robin', 'vllm, join-shortest-queue')

    Prefill and decode on machines of their own, a KV transfer between them:

    >>> pools = [fs.Pool(server, 1, "prefill", name="prefill"), fs.Pool(server, 2, "decode", name="decode")]
    >>> tables = {"prefill": fs.baselines.vllm(), "decode": fs.baselines.sarathi()}
    >>> runs = simulate_cluster(workload, pools, tables, fs.routers.round_robin(), transfer_bandwidth=1e6,
    ...                         transfer_latency=0.002, horizon=60.0, replications=2)
    >>> runs.policies
    ('vllm + sarathi, round-robin',)
    """
    check_choice("engine", engine, ENGINES)
    check_choice("oversize", oversize, ("raise", "reject"))
    ways = _unique("routers", routers, Router)
    pools = tuple(_unique("pools", pools, Pool))
    assigned = _assigned(policies, pools)
    _check_memory(workload, pools, assigned, ways, horizon, replications)
    pool_of = _replicas(pools)
    apart = any(pool.stage != "whole" for pool in pools)
    transfer = _transfer(transfer_bandwidth, transfer_latency, apart)
    for pool in pools:
        if engine == "kernel":
            pool.server.iteration_time.require_coefficients('engine="kernel"')
        if pool.server.max_model_len is not None:
            raise InputError(
                f"server.max_model_len of pool {pool.name!r}",
                pool.server.max_model_len,
                "be None in a cluster: a request's output must not depend on the replica that serves it",
                "Cut the outputs of the path instead.",
            )
    drawn, horizon, warmup = common_paths(workload, horizon, warmup, replications, seed)
    paths = list(drawn)
    draws = [_chances(paths, seed, stage) for stage in (1, 2)]
    systems = [
        _System(_stages(pools, pool_of, tables, apart), transfer, horizon, warmup, engine, check)
        for _, tables in assigned
    ]
    for system in systems:
        for router in ways:
            _check_router(system, router)
            for path in paths:
                _check_split(router, pools, path, apart)
        for path in paths:
            _check_tables(system, path)
            if oversize == "raise":
                _refuse_oversize(path, system)

    alike = not apart and all(len({id(table) for table in tables}) == 1 for _, tables in assigned)
    named, whole_runs, replica_runs, chosen, handed_over = [], [], [], [], []
    for (name, tables), system in zip(assigned, systems, strict=True):
        for router in ways:
            runs = [_run(path, system, router, uniform) for path, *uniform in zip(paths, *draws, strict=True)]
            if check and engine == "kernel":
                defined = system._replace(engine="reference")
                _check_agreement(runs[0], _run(paths[0], defined, router, [uniform[0] for uniform in draws]))
            named.append(tables[0].renamed(f"{name}, {router.name}"))
            chosen.append(tuple(run.chosen for run in runs))
            replica_runs.append(tuple(tuple(run.runs) for run in runs))
            handed_over.append(tuple(run.handover for run in runs if run.handover is not None))
            whole_runs.append([_together(path, run) for path, run in zip(paths, runs, strict=True)])
    measured = Measured(
        named,
        _memory_of(pools),
        warmup=warmup,
        replicas=[pools[k].server for k in pool_of] if alike else (),
    )
    for k, of_policy in enumerate(whole_runs):
        measured.add(k, paths, of_policy)
    whole = SimulationResult.collect(
        measured,
        paths,
        whole_runs,
        horizon=horizon,
        seed=int(seed) if isinstance(seed, (int, np.integer)) and isinstance(workload, Workload) else None,
        engine=engine,
        workload=workload.name,
    )
    return ClusterResult(
        whole,
        pools,
        tuple(tables for _, tables in assigned for _ in ways),
        pool_of,
        tuple(replica_runs),
        tuple(chosen),
        tuple(handed_over) if apart else (),
    )


class _Stage(NamedTuple):
    """The replicas that requests are routed among at one instant, a subset of the cluster's.

    `pools`: its pools, as indices of the cluster's; of each replica `member`, its index in the cluster, `pool_of`,
    its place in `pools`, and its server and table.
    """

    pools: Integers
    member: Integers
    pool_of: Integers
    servers: list[Server]
    tables: list[PolicyTable]


class _System(NamedTuple):
    """A cluster under its tables: one stage, or prefill and decode, and how it is run."""

    stages: list[_Stage]
    transfer: tuple[float, float]  # latency, s; s per token
    horizon: float | None
    warmup: float
    engine: str
    check: bool


class _Run(NamedTuple):
    """Replica of each request at its arrival (-1: rejected), every replica's run, and what was handed over."""

    chosen: Integers
    runs: list[EngineRun]
    handover: Handover | None


# ------------------------------------------------------------------ what is given


def _unique(argument: str, given: object, kind: type) -> list:  # type: ignore[type-arg]
    if isinstance(given, kind):
        given = [given]
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(argument, given, f"be a {kind.__name__}, or a sequence of them")
    items = list(given)
    if not items:
        raise InputError(argument, "none", f"hold at least one {kind.__name__}")
    for k, item in enumerate(items):
        if not isinstance(item, kind):
            raise InputError(f"{argument}[{k}]", item, f"be a {kind.__name__}")
    names = [item.name for item in items]
    for k, name in enumerate(names):
        if name in names[:k]:
            raise InputError(f"{argument}[{k}].name", name, "be unique in a run")
    return items


def _assigned(
    policies: Assignment | Sequence[Assignment], pools: Sequence[Pool]
) -> list[tuple[str, tuple[PolicyTable, ...]]]:
    """Names of the policies, and the table of each pool."""
    if isinstance(policies, str) or not isinstance(policies, (PolicyTable, Iterable)):
        raise InputError(
            "policies",
            policies,
            "be a PolicyTable, map pools' names to PolicyTables, or be a sequence of these",
        )
    given = [policies] if isinstance(policies, (PolicyTable, Mapping)) else list(policies)
    if not given:
        raise InputError("policies", "none", "hold at least one PolicyTable")
    names = [pool.name for pool in pools]
    assigned: list[tuple[str, tuple[PolicyTable, ...]]] = []
    for k, policy in enumerate(given):
        if isinstance(policy, PolicyTable):
            assigned.append((policy.name, (policy,) * len(pools)))
        elif isinstance(policy, Mapping) and all(isinstance(t, PolicyTable) for t in policy.values()):
            if set(policy) != set(names):
                raise InputError(
                    f"policies[{k}]",
                    f"tables for {', '.join(map(repr, policy)) or 'no pool'}",
                    f"have one for each of the pools {', '.join(map(repr, names))}",
                )
            tables = tuple(policy[name] for name in names)
            assigned.append((" + ".join(dict.fromkeys(table.name for table in tables)), tables))
        else:
            raise InputError(
                f"policies[{k}]", policy, "be a PolicyTable, or map pools' names to PolicyTables"
            )
        if assigned[-1][0] in [name for name, _ in assigned[:-1]]:
            raise InputError(
                f"policies[{k}].name", assigned[-1][0], "be unique in a run", "Use table.renamed(name)."
            )
    return assigned


def _check_memory(
    workload: object,
    pools: Sequence[Pool],
    assigned: Sequence[tuple[str, tuple[PolicyTable, ...]]],
    ways: Sequence[Router],
    horizon: float | None,
    replications: int | None,
) -> None:
    """Refuse what would not fit, before replicas and requests are laid out."""
    replicas = sum(pool.replicas for pool in pools)
    slots = 0.0
    if any(router.looks for router in ways):
        slots = max(
            sum(
                pool.replicas * float(effective_limits(pool.server, table).slots)
                for pool, table in zip(pools, tables, strict=True)
            )
            for _, tables in assigned
        )
    runs = len(assigned) * len(ways)
    check_memory(workload, horizon, replications, runs, replicas=replicas, slots=slots)


def _replicas(pools: Sequence[Pool]) -> Integers:
    """Pool of each replica."""
    for k, pool in enumerate(pools):
        if pool.replicas != math.floor(pool.replicas):
            raise InputError(
                f"pools[{k}].replicas",
                pool.replicas,
                "be a whole number",
                "Servers run or they do not: round.",
            )
    counts = [int(pool.replicas) for pool in pools]
    if sum(counts) == 0:
        raise InputError("pools", "no replica", "have at least one replica in all")
    stages = {pool.stage for pool in pools}
    if "whole" in stages and len(stages) > 1:
        raise InputError(
            "pools",
            f"stages {', '.join(sorted(stages))}",
            "all be 'whole', or all 'prefill' or 'decode'",
            "Simulate the two clusters apart, each with its share of the requests.",
        )
    running = {pool.stage for pool, count in zip(pools, counts, strict=True) if count}
    if "whole" not in stages and running != {"prefill", "decode"}:
        raise InputError(
            "pools", f"replicas of stage {running.pop()!r} only", "have replicas that prefill and that decode"
        )
    return np.repeat(np.arange(len(pools)), counts)


def _transfer(bandwidth: float | None, latency: float, apart: bool) -> tuple[float, float]:
    """Latency, s, and seconds per token."""
    latency = check_real("transfer_latency", latency, minimum=0.0)
    if bandwidth is not None:
        bandwidth = check_real("transfer_bandwidth", bandwidth, above=0.0, remedy="None is infinite.")
    if not apart and (latency or bandwidth is not None):
        raise InputError(
            "transfer_latency" if latency else "transfer_bandwidth",
            latency or bandwidth,
            "be left out: pools that serve requests whole transfer nothing",
            'Give pools the stages "prefill" and "decode".',
        )
    return latency, 0.0 if bandwidth is None else 1.0 / bandwidth


def _stages(
    pools: Sequence[Pool], pool_of: Integers, tables: Sequence[PolicyTable], apart: bool
) -> list[_Stage]:
    stages = []
    for stage in ("prefill", "decode") if apart else ("whole",):
        here = np.flatnonzero([pool.stage == stage for pool in pools])
        member = np.flatnonzero(np.isin(pool_of, here))
        place = np.searchsorted(here, pool_of[member])
        stages.append(
            _Stage(
                here,
                member,
                place,
                [pools[k].server for k in pool_of[member]],
                [tables[k] for k in pool_of[member]],
            )
        )
    return stages


def _check_router(system: _System, router: Router) -> None:
    """Refuse what the compiled router does not do."""
    if system.engine != "kernel" or not router.looks:
        return
    for stage in system.stages:
        mixed = [table for table in stage.tables if table is not stage.tables[0]]
        if mixed:
            raise InputError(
                "engine",
                system.engine,
                f"be 'reference' for table {mixed[0].name!r} behind a router that looks at the replicas and beside "
                f"table {stage.tables[0].name!r}",
                "Routers that do not look (round_robin, random, split) run it on the kernel.",
            )


def _check_split(router: Router, pools: Sequence[Pool], path: ArrivalPath, apart: bool) -> None:
    if router.routed_rate is None:
        return
    shape = (len(router.routed_rate), len(router.routed_rate[0]))
    types = max(len(path.type_names), 1)
    place = f"routed_rate of router {router.name!r}"
    if shape != (len(pools), types):
        raise InputError(
            place, f"shape {shape}", f"have {len(pools)} rows (pools) and {types} columns (types)"
        )
    for k, pool in enumerate(pools):
        if pool.replicas == 0 and any(router.routed_rate[k]):
            raise InputError(place, f"a rate to pool {pool.name!r}", "be zero where a pool has no replica")
    for stage in ("prefill", "decode") if apart else ("whole",):
        totals = np.sum(
            [r for r, pool in zip(router.routed_rate, pools, strict=True) if pool.stage == stage], 0
        )
        arrives = np.ones(len(path), dtype=bool) if stage != "decode" else path.output_tokens > 1
        for j in np.flatnonzero(totals == 0.0):
            if (arrives if path.type is None else (path.type == j) & arrives).any():
                name = path.type_names[j] if path.type_names else "*"
                raise InputError(
                    place, f"no rate for type {name!r}", "send every type that arrives somewhere"
                )


def _check_tables(system: _System, path: ArrivalPath) -> None:
    """What `check_run` asks of every pool, on what it sees of the path."""
    parts = [path] if len(system.stages) == 1 else [_prefills(path), _decodes(path, path.output_tokens > 1)]
    for number, (stage, part) in enumerate(zip(system.stages, parts, strict=True)):
        for server, table in {
            (id(s), id(t)): (s, t) for s, t in zip(stage.servers, stage.tables, strict=True)
        }.values():
            check_run(part, server, table, system.horizon)
            if number == 1:
                check_handed_over(part, table)


def _memory_of(pools: Sequence[Pool]) -> Server:
    """A stand-in with the memory of all replicas, and no time of its own."""
    capacity = sum(int(pool.replicas) * pool.server.kv_capacity for pool in pools if pool.replicas)
    name = " + ".join(f"{pool.replicas:g} × {pool.name}" for pool in pools)
    return Server(capacity, IterationTime.function(_no_time), name=name)


def _no_time(batch: object) -> float:
    return 1.0  # an iteration time has to be positive; a function has no pieces that measures would look at


def _fits(path: ArrivalPath, stage: _Stage) -> NDArray[np.bool_]:
    """Rule 2: which replicas of a stage are able, shape (N, P)."""
    pairs = list(zip(stage.servers, stage.tables, strict=True))
    known = {(id(server), id(table)): ~never_fits(path, server, table) for server, table in pairs}
    return np.stack([known[id(server), id(table)] for server, table in pairs], axis=1)


def _able(path: ArrivalPath, system: _System) -> NDArray[np.bool_]:
    """Rules 2 and 0: which replicas of the first stage a request can go to that can be served to its end, (N, P)."""
    if len(system.stages) == 1:
        return _fits(path, system.stages[0])
    decodes = path.output_tokens > 1
    to_its_end = ~decodes
    to_its_end[decodes] = _fits(_decodes(path, decodes), system.stages[1]).any(axis=1)
    return _fits(_prefills(path), system.stages[0]) & to_its_end[:, None]


def _refuse_oversize(path: ArrivalPath, system: _System) -> None:
    nowhere = np.flatnonzero(~_able(path, system).any(axis=1))
    if nowhere.size:
        i = int(nowhere[0])
        tables = dict.fromkeys(table.name for stage in system.stages for table in stage.tables)
        raise InputError(
            f"request {i}",
            f"{int(path.prompt_tokens[i]):,} prompt and {int(path.output_tokens[i]):,} output tokens",
            f"fit alone into a replica of some pool{' of each stage' if len(system.stages) > 1 else ''} under "
            f"table {' and '.join(map(repr, tables))}",
            'Use larger servers, or oversize="reject" to turn such requests away.',
        )


def _chances(paths: Sequence[ArrivalPath], seed: Seed, stage: int) -> list[NDArray[np.float64]]:
    """Rules 9 and 0: two uniform numbers per request, (N, 2) for each replication."""
    root = seed_sequence(seed)
    return [
        np.random.default_rng(
            np.random.SeedSequence(
                root.entropy, spawn_key=(*root.spawn_key, r, stage), pool_size=root.pool_size
            )
        ).random((len(path), 2))
        for r, path in enumerate(paths)
    ]


def _prefills(path: ArrivalPath) -> ArrivalPath:
    """What prefill replicas see of a path: outputs of one token."""
    one = np.ones_like(path.output_tokens)
    return dataclasses.replace(
        path,
        output_tokens=one,
        predicted_output_tokens=None if path.predicted_output_tokens is None else one,
        predicted_output_minimum=None if path.predicted_output_minimum is None else one,
    )


def _decodes(path: ArrivalPath, index: NDArray[Any]) -> ArrivalPath:
    """What decode replicas see of the requests at `index`, but for the times: they have no prefix cache."""
    return dataclasses.replace(
        path.selected(index), cached_prompt_tokens=None, prompt_blocks=None, patience_s=None, horizon=None
    )


# ------------------------------------------------------------------ routing


def _run(path: ArrivalPath, system: _System, router: Router, uniform: Sequence[NDArray[np.float64]]) -> _Run:
    """One run of the cluster."""
    first = system.stages[0]
    if len(system.stages) == 1:
        chosen, runs = _run_stage(path, system, 0, router, _able(path, system), uniform[0])
        return _Run(chosen, runs, None)
    prefills = _prefills(path)
    local, runs = _run_stage(prefills, system, 0, router, _able(path, system), uniform[0])
    chosen = np.where(local >= 0, first.member[local], -1)
    chosen.flags.writeable = False
    ended = np.full(len(path), np.nan)
    for p, run in enumerate(runs):
        ended[local == p] = run.finish_s
    latency, per_token = system.transfer
    ready = ended + (latency + per_token * path.prompt_tokens)
    hang_up = np.full(len(path), np.inf)
    if path.abort_after_s is not None:
        hang_up = path.arrival_s + path.abort_after_s
    coming = ~np.isnan(ready) & (path.output_tokens > 1)
    end = math.inf if system.horizon is None else system.horizon
    lost = np.flatnonzero(coming & (hang_up <= ready) & (hang_up <= end))
    coming[lost] = False
    over = np.flatnonzero(coming)
    over = over[np.argsort(ready[over], kind="stable")]
    # ascending indices are what `selected` asks for; here it is the order of arrival at the decode stage
    decodes = dataclasses.replace(_decodes(path, np.arange(len(path))), arrival_s=np.zeros(len(path)))
    left_s = None if path.abort_after_s is None else np.maximum(hang_up - ready, 0.0)[over]
    decodes = dataclasses.replace(decodes.selected(over), arrival_s=ready[over], abort_after_s=left_s)
    second = system.stages[1]
    place, more = _run_stage(
        decodes, system, 1, router, _fits(decodes, second), uniform[1][over], first_token_s=ended[over]
    )
    admitted = np.full(len(over), np.nan)
    for p, run in enumerate(more):
        admitted[place == p] = run.admitted_s
    handover = Handover(
        over, second.member[place], decodes, ended[over], admitted, lost, np.maximum(hang_up, ended)[lost]
    )
    for field in dataclasses.fields(handover):
        array = getattr(handover, field.name)
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    every: list[Any] = [None] * (len(runs) + len(more))
    for stage, part in ((first, runs), (second, more)):
        for p, run in zip(stage.member.tolist(), part, strict=True):
            every[p] = run
    return _Run(chosen, every, handover)


def _run_stage(
    path: ArrivalPath,
    system: _System,
    number: int,
    router: Router,
    fits: NDArray[np.bool_],
    uniform: NDArray[np.float64],
    first_token_s: NDArray[np.float64] | None = None,
) -> tuple[Integers, list[EngineRun]]:
    """The replica of each request, counted within the stage, and each replica's run on its requests."""
    stage, horizon = system.stages[number], system.horizon
    if not router.looks:
        rates = None if router.routed_rate is None else np.asarray(router.routed_rate)[stage.pools]
        chosen = blind_choice(router, path, fits, stage.pool_of, uniform, rates)
    elif system.engine == "reference":
        chosen = observant_choice(router, path, stage, fits, uniform, horizon, first_token_s)
    else:
        from fluidsched.simulation.kernel import choose_replicas

        chosen = choose_replicas(
            path,
            stage.servers,
            stage.tables[0],
            horizon=horizon,
            rule=RULES.index(router.rule),
            fits=fits,
            draws=uniform,
            first_token_s=first_token_s,
        )
    chosen.flags.writeable = False
    run_engine = run_reference
    if system.engine == "kernel":
        from fluidsched.simulation.kernel import run_kernel as run_engine  # type: ignore[assignment]
    runs = []
    for p, (server, table) in enumerate(zip(stage.servers, stage.tables, strict=True)):
        mine = chosen == p
        part = path.selected(mine)
        audit: Audit | None = None
        watched: dict[str, Any] = {}
        if system.check and system.engine == "reference":
            handed = first_token_s is not None
            audit = Audit(part, server, table, horizon=horizon, warmup=system.warmup, handed_over=handed)
            watched = {"on_iteration": audit.observe, "on_idle": audit.observe_idle}
        run = run_engine(
            part,
            server,
            table,
            horizon=horizon,
            warmup=system.warmup,
            occupancy_points=OCCUPANCY_POINTS,
            first_token_s=None if first_token_s is None else first_token_s[mine],
            **watched,
        )
        if audit is not None:
            audit.check(run)
        if system.check:
            check_laws(
                part,
                server,
                run,
                warmup=system.warmup,
                lossless=table.preemption != "restart",
                handed_over=first_token_s is not None,
            )
        runs.append(run)
    return chosen, runs


def _check_agreement(ours: _Run, defined: _Run) -> None:
    """Verify that a run on the kernel is the reference's: the same replicas, and the same run of each."""
    same_way = [np.array_equal(ours.chosen, defined.chosen)]
    if ours.handover is not None and defined.handover is not None:
        same_way += [
            np.array_equal(getattr(ours.handover, name), getattr(defined.handover, name))
            for name in ("request", "replica", "lost")
        ]
    if not all(same_way):
        raise SimulationError(
            "a run broke a law it must keep: the kernel's replicas are the reference's; found other ones chosen"
        )
    for run, reference in zip(ours.runs, defined.runs, strict=True):
        check_agreement(run, reference)


def observant_choice(
    router: Router,
    path: ArrivalPath,
    stage: _Stage,
    fits: NDArray[np.bool_],
    uniform: NDArray[np.float64],
    horizon: float | None,
    first_token_s: NDArray[np.float64] | None,
) -> Integers:
    """Rules 4 to 6, the definition: replicas of the reference engine step from arrival to arrival.

    Returns the replica of each request, -1 where none is able.
    """
    engines = [
        Engine(path, server, table, horizon=horizon, first_token_s=first_token_s)
        for server, table in zip(stage.servers, stage.tables, strict=True)
    ]
    chosen = np.full(len(path), -1, dtype=np.int64)
    for i, arrival in enumerate(path.arrival_s.tolist()):
        able = np.flatnonzero(fits[i])
        if able.size == 0:
            continue
        for engine in engines:
            engine.advance(arrival)
        among = _two(able, *uniform[i]) if router.rule == "power_of_two" else able.tolist()
        looked_at = 1 if router.rule == "least_kv" else 0
        chosen[i] = min(among, key=lambda p: (engines[p].seen(arrival)[looked_at], p))
        engines[chosen[i]].join(i)
    return chosen


def _two(able: Integers, u: float, v: float) -> list[int]:
    """Rule 6."""
    if able.size == 1:
        return [int(able[0])]
    first = int(u * able.size)
    second = int(v * (able.size - 1))
    second += second >= first
    return [int(able[first]), int(able[second])]


def blind_choice(
    router: Router,
    path: ArrivalPath,
    fits: NDArray[np.bool_],
    pool_of: Integers,
    uniform: NDArray[np.float64],
    rates: NDArray[np.float64] | None,
) -> Integers:
    """Rules 3, 7 and 8: the replica of each request, -1 where none is able, for routers that do not look.

    `rates` (K, J): what a split sends to the pools.
    """
    count = len(path)
    if router.rule == "random":
        number = (uniform[:, 0] * fits.sum(axis=1)).astype(np.int64)
        # the first replica up to which number + 1 are able
        chosen = (np.cumsum(fits, axis=1) <= number[:, None]).sum(axis=1)
    elif router.rule == "round_robin":
        chosen = _in_turn(fits)
    else:
        pools = int(pool_of[-1]) + 1
        able = np.zeros((count, pools), dtype=np.bool_)
        able[:, pool_of] = fits
        assert rates is not None
        pool = _split(rates, path, able)
        chosen = np.full(count, -1)
        for k in range(pools):
            mine = np.flatnonzero(pool == k)
            members = np.flatnonzero(pool_of == k)
            if mine.size:
                chosen[mine] = members[np.arange(mine.size) % members.size]
    chosen[~fits.any(axis=1)] = -1
    return np.asarray(chosen, dtype=np.int64)


def _in_turn(fits: NDArray[np.bool_]) -> Integers:
    """Rule 3."""
    count, replicas = fits.shape
    if fits.all():
        return np.asarray(np.arange(count) % replicas, dtype=np.int64)
    chosen = np.full(count, -1)
    last = replicas - 1
    for i, row in enumerate(fits):
        able = np.flatnonzero(row)
        if able.size:
            last = chosen[i] = able[np.argmin((able - last - 1) % replicas)]
    return chosen


def _split(rates: NDArray[np.float64], path: ArrivalPath, able: NDArray[np.bool_]) -> Integers:
    """Rule 8: the pool of each request, -1 where none is able; `able` (N, K)."""
    rates = rates[: able.shape[1]]
    types = np.zeros(len(path), dtype=np.int64) if path.type is None else path.type
    shares = rates.T[types] * able
    nothing = shares.sum(axis=1) == 0.0
    shares[nothing] = able[nothing]
    shares[nothing] *= np.cumsum(able[nothing], axis=1) == 1
    edges = np.cumsum(shares, axis=1)
    number = np.empty(len(path))
    for j in np.unique(types):
        mine = types == j
        number[mine] = np.arange(np.count_nonzero(mine))
    place = np.modf((number + 0.5) * GOLDEN)[0] * edges[:, -1]
    pool = np.minimum((edges <= place[:, None]).sum(axis=1), able.shape[1] - 1)
    return np.where(able.any(axis=1), pool, -1)


# ------------------------------------------------------------------ records


_PER_REQUEST = ("admitted_s", "first_token_s", "finish_s", "left_s", "preemptions", "status")
_SUMS = tuple(
    field.name
    for field in dataclasses.fields(EngineRun)
    if field.type in ("int", "float") and field.name not in ("end_s", "busy_s", "peak_kv")
)


def _together(path: ArrivalPath, cluster: _Run) -> EngineRun:
    """Rule 10."""
    count = len(path)
    chosen, runs, handover = cluster
    dropped = 0
    records: dict[str, NDArray[Any]] = {}
    for name in _PER_REQUEST:
        example = getattr(runs[0], name)
        fill = (
            math.nan if example.dtype.kind == "f" else STATUSES.index("rejected") if name == "status" else 0
        )
        records[name] = np.full(count, fill, dtype=example.dtype)
        for p, run in enumerate(runs):
            mine = chosen == p
            if mine.any():
                records[name][mine] = getattr(run, name)
    if handover is not None:
        _hand_over(records, runs, handover)
        held = path.prompt_tokens[handover.lost]
        if path.cached_prompt_tokens is not None:
            held = held - path.cached_prompt_tokens[handover.lost]
        dropped = int(held.sum())
    verdicts = {run.verdict for run in runs}
    verdict: Verdict = "finished"
    if verdicts - {"finished"}:
        verdict = "stuck" if "stuck" in verdicts else "horizon"
    starved = dict.fromkeys(name for run in runs for name in run.starved_types)
    sums: dict[str, Any] = {name: sum(getattr(run, name) for run in runs) for name in _SUMS}
    sums["dropped_tokens"] += dropped
    ends = [run.end_s for run in runs] + ([] if handover is None else handover.lost_s.tolist())
    return EngineRun(
        **records,  # type: ignore[arg-type]
        **sums,
        end_s=max(ends),
        verdict=verdict,
        starved_types=tuple(starved),
        busy_s=math.fsum(run.busy_s for run in runs) / len(runs),
        peak_kv=max(run.peak_kv for run in runs),
        gap_counts=np.sum([run.gap_counts for run in runs], axis=0),
        occupancy=_occupancy([run.occupancy for run in runs if run.occupancy is not None]),
    )


def _hand_over(records: dict[str, NDArray[Any]], runs: Sequence[EngineRun], handover: Handover) -> None:
    """Rule 10: what the decode replicas know of the requests that went there."""
    for p in np.unique(handover.replica).tolist():
        there = handover.request[handover.replica == p]
        records["preemptions"][there] += runs[p].preemptions
        for name in ("first_token_s", "finish_s", "left_s", "status"):
            records[name][there] = getattr(runs[p], name)
    records["finish_s"][handover.lost] = math.nan
    records["left_s"][handover.lost] = handover.lost_s
    records["status"][handover.lost] = STATUSES.index("aborted")


def _occupancy(series: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    times = np.unique(np.concatenate([rows[:, 0] for rows in series]))
    total = np.zeros((len(times), 4))
    total[:, 0] = times
    for rows in series:
        last = np.searchsorted(rows[:, 0], times, side="right") - 1
        total[:, 1:] += np.where(last[:, None] >= 0, rows[np.maximum(last, 0), 1:], 0.0)
    return total
