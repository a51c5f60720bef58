r"""Clusters: replicas of servers, in pools, behind a router.

Every replica runs by the rules of `fluidsched.simulation.reference`, by itself; the router sends each request to
one of them when it arrives, for good. So once the replicas are chosen a cluster's run is the P runs of its
replicas on their parts of the path, and only a router that looks at the replicas ties them together. Letters: N
requests, K pools, P replicas (pool by pool, in the order given), J types, R replications.

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
 10. Request records are those of the request's replica; a rejected request has none. Counters and integrals
     are sums over the replicas, but `busy_s`, which is their mean (the busy fraction of a replica), and
     `peak_kv`, the largest of them. The run ends when its last replica does; "stuck" if one is. Occupancy is the
     sum of the replicas' series, each kept until its next row, at all their times.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_choice
from fluidsched._display import Tabular
from fluidsched.errors import InputError
from fluidsched.policy.table import PolicyTable
from fluidsched.server import Pool, Server
from fluidsched.simulation.laws import check_laws
from fluidsched.simulation.limits import UNLIMITED, check_run, effective_limits, never_fits
from fluidsched.simulation.measures import alone_s, measure_run
from fluidsched.simulation.records import STATUSES, EngineRun, Verdict
from fluidsched.simulation.reference import Engine, run_reference
from fluidsched.simulation.result import SimulationResult
from fluidsched.simulation.routers import Router
from fluidsched.simulation.run import ENGINES, OCCUPANCY_POINTS, common_paths
from fluidsched.workload import ArrivalPath, Workload
from fluidsched.workload.path import Seed, seed_sequence

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ClusterResult", "simulate_cluster"]

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0

RULES = ("join_shortest_queue", "least_kv", "power_of_two")
"""Rules that look, in the order of the compiled loop's codes."""

Integers = NDArray[np.int64]


@dataclass(frozen=True, repr=False, eq=False)
class ClusterResult(Tabular):
    """Runs of several routers and policies on the same R paths, over the same P replicas.

    Attributes
    ----------
    whole : SimulationResult
        The cluster as one system; its policies are named "policy, router". Its `server` stands for the memory
        of all replicas together and for nothing else.
    pools : tuple of Pool
    pool_of : (P,) int64 array
        Pool of each replica.
    replica_runs : tuple
        `[k][r][p]`: the run of replica p, on the requests routed to it in their order.
    chosen : tuple
        `[k][r]`: replica of each request, -1 for those rejected; (N,) int64 arrays.
    """

    whole: SimulationResult
    pools: tuple[Pool, ...]
    pool_of: Integers
    replica_runs: tuple[tuple[tuple[EngineRun, ...], ...], ...]
    chosen: tuple[tuple[Integers, ...], ...]

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
        """One row per request, with its replica; see `SimulationResult.requests`."""
        frame = self.whole.requests(policy, replication)
        frame["replica"] = self.chosen[self.policies.index(policy)][replication]
        return frame

    def replicas(self, policy: str) -> pd.DataFrame:
        """One row per replica: pool and every measure of its own requests, mean over replications."""
        import pandas as pd

        self.whole.outcome(policy)
        k = self.policies.index(policy)
        rows = []
        for p, pool in enumerate(self.pool_of):
            server = self.pools[pool].server
            slots = effective_limits(server, self.whole.tables[k]).slots
            measured = []
            for path, chosen, runs in zip(
                self.whole.paths, self.chosen[k], self.replica_runs[k], strict=True
            ):
                own = path.selected(chosen == p)
                values, _ = measure_run(
                    own,
                    runs[p],
                    warmup=self.whole.warmup,
                    kv_capacity=server.kv_capacity,
                    slots=slots if slots < UNLIMITED else math.inf,
                    alone=alone_s(own, [server]),
                    type_of=own.type,
                    slo=self.whole.slo,
                )
                measured.append(values)
            frame = pd.DataFrame(measured)
            rows.append({"replica": p, "pool": self.pools[pool].name, **frame.mean().to_dict()})
        return pd.DataFrame(rows)

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
    pools: Sequence[Pool],
    policies: PolicyTable | Sequence[PolicyTable],
    routers: Router | Sequence[Router],
    *,
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
    pools : sequence of Pool
        K pools of whole numbers of replicas, with unique names, that serve requests whole.
    policies : PolicyTable or sequence of them
        With unique names. All replicas follow the same one.
    routers : Router or sequence of them
        From `fs.routers`, with unique names.
    horizon, warmup, replications, seed
        As for `simulate`.
    engine : {"kernel", "reference"}
        "kernel" stops compiled replicas where a router looks at them; "reference" steps all replicas from
        arrival to arrival and is the definition.
    check : bool
        Verify the laws of every replica's run.
    oversize : {"raise", "reject"}
        What to do with requests that fit no replica.

    Raises
    ------
    InputError
        As `simulate`; also for fractional replicas, pools that do not serve requests whole, a split of other
        pools or types than these, or, behind a router that looks and on the kernel, tables of kind "nested-wait"
        or "vllm_v0" or with preemption "swap".

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
    """
    check_choice("engine", engine, ENGINES)
    check_choice("oversize", oversize, ("raise", "reject"))
    tables = _unique("policies", [policies] if isinstance(policies, PolicyTable) else policies, PolicyTable)
    ways = _unique("routers", [routers] if isinstance(routers, Router) else routers, Router)
    pools = tuple(_unique("pools", pools, Pool))
    pool_of = _replicas(pools)
    servers = [pools[k].server for k in pool_of]
    for pool in pools:
        if engine == "kernel":
            pool.server.iteration_time.require_coefficients('engine="kernel"')
    for pool in pools:
        if pool.server.max_model_len is not None:
            raise InputError(
                f"server.max_model_len of pool {pool.name!r}",
                pool.server.max_model_len,
                "be None in a cluster: a request's output must not depend on the replica that serves it",
                "Cut the outputs of the path instead.",
            )
    for table in tables:
        slow = table.kind in ("nested-wait", "vllm_v0") or table.preemption == "swap"
        if engine == "kernel" and slow and any(router.looks for router in ways):
            raise InputError(
                "engine",
                engine,
                f"be 'reference' for table {table.name!r} behind a router that looks at the replicas",
                "Routers that do not look (round_robin, random, split) run it on the kernel.",
            )
    paths, horizon, warmup = common_paths(workload, horizon, warmup, replications, seed)
    draws = _chances(paths, seed)
    for table in tables:
        for path in paths:
            for pool in pools:
                check_run(path, pool.server, table, horizon)
            if oversize == "raise":
                _refuse_oversize(path, _fits(path, servers, table), table)
            for router in ways:
                _check_split(router, pools, path)

    named, whole_runs, replica_runs, chosen = [], [], [], []
    for table in tables:
        for router in ways:
            runs = [
                _run(path, servers, pool_of, table, router, uniform, horizon, warmup, engine, check)
                for path, uniform in zip(paths, draws, strict=True)
            ]
            named.append(table.renamed(f"{table.name}, {router.name}"))
            chosen.append(tuple(places for places, _ in runs))
            replica_runs.append(tuple(tuple(parts) for _, parts in runs))
            whole_runs.append([_together(len(path), *run) for path, run in zip(paths, runs, strict=True)])
    whole = SimulationResult.collect(
        named,
        paths,
        whole_runs,
        horizon=horizon,
        warmup=warmup,
        seed=int(seed) if isinstance(seed, (int, np.integer)) and isinstance(workload, Workload) else None,
        engine=engine,
        workload=workload.name,
        server=_memory_of(pools),
        replicas=servers,
    )
    return ClusterResult(whole, pools, pool_of, tuple(replica_runs), tuple(chosen))


# ------------------------------------------------------------------ what is given


def _unique(argument: str, given: Sequence[object], kind: type) -> list:  # type: ignore[type-arg]
    items = list(given)
    if not items:
        raise InputError(argument, "none", f"hold at least one {kind.__name__}")
    for k, item in enumerate(items):
        if not isinstance(item, kind):
            raise InputError(f"{argument}[{k}]", item, f"be a {kind.__name__}")
    names = [item.name for item in items]  # type: ignore[attr-defined]
    for k, name in enumerate(names):
        if name in names[:k]:
            raise InputError(f"{argument}[{k}].name", name, "be unique in a run")
    return items


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
        if pool.stage != "whole":
            raise InputError(f"pools[{k}].stage", pool.stage, "be 'whole': other stages are not simulated")
    counts = [int(pool.replicas) for pool in pools]
    if sum(counts) == 0:
        raise InputError("pools", "no replica", "have at least one replica in all")
    return np.repeat(np.arange(len(pools)), counts)


def _check_split(router: Router, pools: Sequence[Pool], path: ArrivalPath) -> None:
    if router.routed_rate is None:
        return
    shape = (len(router.routed_rate), len(router.routed_rate[0]))
    types = max(len(path.type_names), 1)
    place = f"routed_rate of router {router.name!r}"
    if shape != (len(pools), types):
        raise InputError(
            place, f"shape {shape}", f"have {len(pools)} rows (pools) and {types} columns (types)"
        )
    totals = np.sum(router.routed_rate, axis=0)
    for k, pool in enumerate(pools):
        if pool.replicas == 0 and any(router.routed_rate[k]):
            raise InputError(place, f"a rate to pool {pool.name!r}", "be zero where a pool has no replica")
    for j in np.flatnonzero(totals == 0.0):
        if path.type is None or (path.type == j).any():
            name = path.type_names[j] if path.type_names else "*"
            raise InputError(place, f"no rate for type {name!r}", "send every type that arrives somewhere")


def _memory_of(pools: Sequence[Pool]) -> Server:
    capacity = sum(int(pool.replicas) * pool.server.kv_capacity for pool in pools if pool.replicas)
    name = " + ".join(f"{pool.replicas:g} × {pool.name}" for pool in pools)
    return Server(capacity, pools[0].server.iteration_time, name=name)


def _fits(path: ArrivalPath, servers: Sequence[Server], table: PolicyTable) -> NDArray[np.bool_]:
    """Rule 2: which replicas are able, shape (N, P)."""
    of_server = {id(server): ~never_fits(path, server, table) for server in servers}
    return np.stack([of_server[id(server)] for server in servers], axis=1)


def _refuse_oversize(path: ArrivalPath, fits: NDArray[np.bool_], table: PolicyTable) -> None:
    nowhere = np.flatnonzero(~fits.any(axis=1))
    if nowhere.size:
        i = int(nowhere[0])
        raise InputError(
            f"request {i}",
            f"{int(path.prompt_tokens[i]):,} prompt and {int(path.output_tokens[i]):,} output tokens",
            f"fit alone into a replica of some pool under table {table.name!r}",
            'Use larger servers, or oversize="reject" to turn such requests away.',
        )


def _chances(paths: Sequence[ArrivalPath], seed: Seed) -> list[NDArray[np.float64]]:
    """Rule 9: two uniform numbers per request, (N, 2) for each replication."""
    root = seed_sequence(seed)
    return [
        np.random.default_rng(
            np.random.SeedSequence(root.entropy, spawn_key=(*root.spawn_key, r, 1), pool_size=root.pool_size)
        ).random((len(path), 2))
        for r, path in enumerate(paths)
    ]


# ------------------------------------------------------------------ routing


def _run(
    path: ArrivalPath,
    servers: Sequence[Server],
    pool_of: Integers,
    table: PolicyTable,
    router: Router,
    uniform: NDArray[np.float64],
    horizon: float | None,
    warmup: float,
    engine: str,
    check: bool,
) -> tuple[Integers, list[EngineRun]]:
    """One run of the cluster: the replica of each request, and each replica's run on its requests."""
    fits = _fits(path, servers, table)
    if not router.looks:
        chosen = blind_choice(router, path, fits, pool_of, uniform)
    elif engine == "reference":
        chosen = observant_choice(router, path, servers, table, fits, uniform, horizon)
    else:
        from fluidsched.simulation.kernel import choose_replicas

        chosen = choose_replicas(
            path, servers, table, horizon=horizon, rule=RULES.index(router.rule), fits=fits, draws=uniform
        )
    chosen.flags.writeable = False
    run_engine = run_reference
    if engine == "kernel":
        from fluidsched.simulation.kernel import run_kernel as run_engine  # type: ignore[assignment]
    parts = [path.selected(chosen == p) for p in range(len(servers))]
    runs = [
        run_engine(part, server, table, horizon=horizon, warmup=warmup, occupancy_points=OCCUPANCY_POINTS)
        for part, server in zip(parts, servers, strict=True)
    ]
    if check:
        for part, server, run in zip(parts, servers, runs, strict=True):
            check_laws(part, server, run, warmup=warmup, lossless=table.preemption != "restart")
    return chosen, runs


def observant_choice(
    router: Router,
    path: ArrivalPath,
    servers: Sequence[Server],
    table: PolicyTable,
    fits: NDArray[np.bool_],
    uniform: NDArray[np.float64],
    horizon: float | None,
) -> Integers:
    """Rules 4 to 6, the definition: replicas of the reference engine step from arrival to arrival.

    Returns the replica of each request, -1 where none is able.
    """
    engines = [Engine(path, server, table, horizon=horizon) for server in servers]
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
) -> Integers:
    """Rules 3, 7 and 8: the replica of each request, -1 where none is able, for routers that do not look."""
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
        pool = _split(router, path, able)
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


def _split(router: Router, path: ArrivalPath, able: NDArray[np.bool_]) -> Integers:
    """Rule 8: the pool of each request, -1 where none is able; `able` (N, K)."""
    rates = np.asarray(router.routed_rate)[: able.shape[1]]
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


_PER_REQUEST = ("admitted_s", "first_token_s", "finish_s", "preemptions", "status")
_SUMS = tuple(
    field.name
    for field in dataclasses.fields(EngineRun)
    if field.type in ("int", "float") and field.name not in ("end_s", "busy_s", "peak_kv")
)


def _together(count: int, chosen: Integers, runs: Sequence[EngineRun]) -> EngineRun:
    """Rule 10."""
    records: dict[str, NDArray[Any]] = {}
    for name in _PER_REQUEST:
        example = getattr(runs[0], name)
        fill = (
            math.nan if example.dtype.kind == "f" else STATUSES.index("rejected") if name == "status" else 0
        )
        records[name] = np.full(count, fill, dtype=example.dtype)
        for p, run in enumerate(runs):
            records[name][chosen == p] = getattr(run, name)
    verdicts = {run.verdict for run in runs}
    verdict: Verdict = "finished"
    if verdicts - {"finished"}:
        verdict = "stuck" if "stuck" in verdicts else "horizon"
    starved = dict.fromkeys(name for run in runs for name in run.starved_types)
    return EngineRun(
        **records,  # type: ignore[arg-type]
        **{name: sum(getattr(run, name) for run in runs) for name in _SUMS},
        end_s=max(run.end_s for run in runs),
        verdict=verdict,
        starved_types=tuple(starved),
        busy_s=math.fsum(run.busy_s for run in runs) / len(runs),
        peak_kv=max(run.peak_kv for run in runs),
        gap_counts=np.sum([run.gap_counts for run in runs], axis=0),
        occupancy=_occupancy([run.occupancy for run in runs if run.occupancy is not None]),
    )


def _occupancy(series: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    times = np.unique(np.concatenate([rows[:, 0] for rows in series]))
    total = np.zeros((len(times), 4))
    total[:, 0] = times
    for rows in series:
        last = np.searchsorted(rows[:, 0], times, side="right") - 1
        total[:, 1:] += np.where(last[:, None] >= 0, rows[np.maximum(last, 0), 1:], 0.0)
    return total
