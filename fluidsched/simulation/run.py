"""Simulate policies on common arrival paths.

The paths come first and serve every policy alike, so that differences between policies are not differences
between paths. A workload is drawn R times: replication r uses child r of `SeedSequence(seed)`, so the same
seed gives the same paths whatever the policies, their number, the engine or R. A path is replayed once as
it is.

Everything that can be wrong with the input is found before anything runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_choice, check_count, check_real
from fluidsched._processors import usable_threads
from fluidsched.errors import InputError
from fluidsched.policy.table import PolicyTable
from fluidsched.server import Server
from fluidsched.simulation.laws import Accounts, Audit, check_agreement, check_laws
from fluidsched.simulation.limits import (
    check_run,
    forecasts,
    never_fits,
    remark_on_memory,
    within_model_length,
)
from fluidsched.simulation.measures import check_slo
from fluidsched.simulation.records import STATUSES, EngineRun
from fluidsched.simulation.reference import run_reference
from fluidsched.simulation.result import Measured, SimulationResult
from fluidsched.simulation.rules import UserRule
from fluidsched.simulation.steady import GRID, mser5, number_in_system
from fluidsched.simulation.tally import Tally
from fluidsched.simulation.threads import available_memory, in_threads
from fluidsched.workload import ArrivalPath, Workload
from fluidsched.workload.model import PIECE
from fluidsched.workload.path import DrawnPaths, Seed, seed_sequence

__all__ = [
    "ENGINES",
    "OCCUPANCY_POINTS",
    "check_memory",
    "check_policies",
    "check_warmup",
    "common_paths",
    "kept_within",
    "refuse_oversize",
    "replication_seeds",
    "simulate",
]

Policy = PolicyTable | UserRule
Progress = Callable[[str, int, int], None]
OnRun = Callable[[str, int, ArrivalPath, EngineRun], None]

ENGINES = ("kernel", "reference")

OCCUPANCY_POINTS = 512
"""Grid points of every run's occupancy series."""

WARMUP_SHARE = 1 / 6
"""Default warm-up of a run with a horizon, as a share of it."""


def simulate(
    workload: Workload | ArrivalPath | Sequence[ArrivalPath],
    server: Server,
    policies: Policy | Sequence[Policy],
    *,
    horizon: float | None = None,
    warmup: float | Literal["mser5"] | None = None,
    replications: int | None = None,
    seed: Seed = 0,
    engine: Literal["kernel", "reference"] = "kernel",
    check: bool = False,
    oversize: Literal["raise", "reject"] = "raise",
    slo: Mapping[str, float] | None = None,
    records: bool = True,
    kept_replications: int | None = None,
    on_run: OnRun | None = None,
    progress: Progress | None = None,
) -> SimulationResult:
    """Run every policy on the same arrival paths.

    Parameters
    ----------
    workload : Workload, ArrivalPath, or a sequence of paths
        A workload is sampled; a path is replayed; of several paths (bootstrapped ones, say) each is a
        replication. A sequence that is no list or tuple is asked for its paths a few at a time.
    server : Server
        Its limits bind beside each table's own; the smaller counts.
    policies : PolicyTable, UserRule, or a sequence of them
        With unique names. A rule of the user's own needs ``engine="reference"``.
    horizon : float, optional
        End of every run, s. Required for a workload. A path without one runs until it is empty or stuck;
        one that was sampled ends at its own horizon at the latest.
    warmup : float or "mser5", optional
        Start of the measured window, s, before the horizon. Default: a sixth of the horizon; 0 for a path
        that runs until empty. "mser5" looks for it in runs of all policies, made twice for that: the latest
        end of the start of any policy, so that all are measured over one window
        (`fluidsched.simulation.steady`). Where a policy's start shows no end in the first half of the run,
        as in overload, it is the half, and the result's `transients` and print say so.
    replications : int, optional
        R, independent paths drawn from the workload; 16 by default. A path is one replication.
    seed : int, SeedSequence or Generator
        Source of the R paths.
    engine : {"kernel", "reference"}
        "kernel" is compiled, and runs replications in parallel threads, one per processor or as many as the
        environment variable ``FLUIDSCHED_THREADS`` allows. "reference" is the definition in
        plain Python, some hundred times slower; it alone follows an iteration time that is any function, and
        fills a prefix cache with the run (`ArrivalPath.prompt_blocks`) where requests may leave unfinished, behind
        routers that look, and under WAIT, Nested WAIT and vLLM v0.
    check : bool
        Verify the laws of `fluidsched.simulation.laws` in every run. With the kernel, and with records, the first
        replication of every policy also runs on the reference engine, which must agree and whose every batch is
        audited.
    oversize : {"raise", "reject"}
        What to do with requests that can never fit: an error before the run, or status `rejected`.
    slo : mapping, optional
        Latency name → limit per request, s, for `goodput`; see also `SimulationResult.with_slo`.
    records : bool
        False: forget requests once they are counted, for runs of any length in memory that does not grow with it
        (`fluidsched.simulation.streaming`). Paths are drawn piece by piece, with the same requests; quantiles
        of latencies and slowdown are within 0.8 %; `requests`, `latencies`, `chrome_trace` and other SLOs
        are not to be had. On the kernel, to a horizon, with a fixed warm-up.
    kept_replications : int, optional
        Of how many replications, the first ones, paths and records are kept; all by default. Every replication is
        measured, but those not kept are drawn, run and forgotten a few at a time (`BATCH` per thread), so that
        memory does not grow with their number. What looks at every request of every replication (`by_type`,
        `with_slo`) then is not to be had; `on_run` is.
    on_run : callable, optional
        Called as ``on_run(policy name, replication, path, run)`` with every `EngineRun` once it is over, for
        measures of one's own.
    progress : callable, optional
        Called as ``progress("simulate <policy>", runs done, runs in all)``.

    Returns
    -------
    SimulationResult

    Raises
    ------
    InputError
        Before anything runs (of replications not kept: before these run): zero replications, a horizon of 0, a
        warm-up not before the horizon, a repeated policy name, a table for other types than the path's, a `wait`
        cohort above the server's token budget, a request that can never fit, several replications of a
        path.
        Also when the records would not fit into memory, with what they take.
    SimulationError
        With `check`, if a run breaks a law.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 4.0, prompt_tokens=512, output_tokens=128)])
    >>> server = fs.Server(137_000, fs.IterationTime.paper(d0=0.01, d1=3.3e-7))
    >>> runs = fs.simulate(workload, server, fs.baselines.vllm(), horizon=30.0, replications=2, seed=7)
    >>> runs.policies, runs.measures("vllm")["request_throughput"].shape
    (('vllm',), (2,))

    Many replications of which none is kept:

    >>> runs = fs.simulate(workload, server, fs.baselines.vllm(), horizon=5.0, replications=200, kept_replications=0)
    >>> runs.replications, len(runs.paths), runs.measures("vllm")["mean_ttft"].shape
    (200, 0, (200,))

    A long run by pieces, with an interval from its batches:

    >>> long = fs.simulate(workload, server, fs.baselines.vllm(), horizon=20_000.0, replications=1, records=False)
    >>> row = long.batch_means("vllm").set_index("measure").loc["mean_ttft"]
    >>> bool(row.low < row.estimate < row.high)
    True
    """
    check_choice("engine", engine, ENGINES)
    given = check_policies(policies, engine)
    tables = [policy.table if isinstance(policy, UserRule) else policy for policy in given]
    check_choice("oversize", oversize, ("raise", "reject"))
    if not isinstance(server, Server):
        raise InputError("server", server, "be a Server")
    if engine == "kernel":
        server.iteration_time.require_coefficients('engine="kernel"')
    found_by_rule = isinstance(warmup, str)
    if isinstance(warmup, str):
        check_choice("warmup", warmup, ("mser5",), "Or give seconds.")
        warmup = None
    if not records:
        for name, value in (("kept_replications", kept_replications), ("on_run", on_run)):
            if value is not None:
                raise InputError(name, value, "be left out with records=False", "No run has records then.")
        if found_by_rule or engine != "kernel":
            raise InputError(
                "records",
                False,
                'come with engine="kernel" and a fixed warm-up',
                "The others look at every request.",
            )
        plain = [policy for policy in given if isinstance(policy, PolicyTable)]
        for table in plain:
            if forecasts(table):
                raise InputError(
                    "records",
                    False,
                    f"be True with table {table.name!r}, which goes by output lengths",
                    "What it believes is not carried from one piece of a path to the next.",
                )
        return _without_records(
            workload,
            server,
            plain,
            horizon,
            warmup,
            replications,
            seed,
            check,
            oversize,
            check_slo(slo),
            progress,
        )
    slo = check_slo(slo)
    if kept_replications is not None:
        kept_replications = check_count("kept_replications", kept_replications)
    check_memory(workload, horizon, replications, len(given), kept=kept_replications)
    paths, horizon, start = common_paths(workload, horizon, warmup, replications, seed)
    for table in tables:
        remark_on_memory(server, table)
    kept = len(paths) if kept_replications is None else min(kept_replications, len(paths))

    @lru_cache(maxsize=1)
    def drawn(batch: range) -> list[ArrivalPath]:
        found = [within_model_length(paths[r], server) for r in batch]
        for table in tables:
            for path in found:
                check_run(path, server, table, horizon)
                if oversize == "raise":
                    refuse_oversize(path, server, table)
        return found

    batches = _batches(len(paths), kept)
    transients: dict[str, float] = {}
    if found_by_rule:
        length = _length(paths, horizon)
        present = np.zeros((len(given), GRID))
        for batch in batches:
            for k, policy in enumerate(given):
                runs = _runs(drawn(batch), _Settings(server, policy, horizon, 0.0), engine)
                present[k] += _present(drawn(batch), runs, length)
        for policy, series in zip(given, present, strict=True):
            cut = mser5(series / len(paths))
            transients[policy.name] = math.nan if cut is None else length / GRID * cut
        start = max(length / 2.0 if math.isnan(end) else end for end in transients.values())
    measured = Measured(tables, server, warmup=start, slo=slo)
    kept_paths: list[ArrivalPath] = []
    kept_runs: list[list[EngineRun]] = [[] for _ in given]
    for batch in batches:
        of_batch = drawn(batch)
        keep = max(kept - batch.start, 0)
        kept_paths += of_batch[:keep]
        for k, policy in enumerate(given):
            settings = _Settings(server, policy, horizon, start)
            runs = _kernel_runs(of_batch, settings) if engine == "kernel" else []
            for r, path in zip(batch, of_batch, strict=True):
                if engine == "reference":
                    runs.append(_reference_run(path, settings, audited=check))
                run = runs[r - batch.start]
                if check:
                    if engine == "kernel" and r == 0:
                        check_agreement(run, _reference_run(path, settings, audited=True))
                    check_laws(path, server, run, warmup=start, lossless=tables[k].preemption != "restart")
                if on_run is not None:
                    on_run(policy.name, r, path, run)
                if progress is not None:
                    done = batch.start * len(given) + k * len(batch) + r - batch.start + 1
                    progress(f"simulate {policy.name}", done, len(given) * len(paths))
            measured.add(k, of_batch, runs)
            kept_runs[k] += runs[:keep]
    return SimulationResult.collect(
        measured,
        kept_paths,
        kept_runs,
        horizon=horizon,
        seed=int(seed) if isinstance(seed, (int, np.integer)) and isinstance(workload, Workload) else None,
        engine=engine,
        workload=of_batch[0].name,
        transients=transients,
    )


BATCH = 4
"""Replications per thread that are run at once where not all are kept."""


def _batches(count: int, kept: int) -> list[range]:
    """Replications run at once: all where all are kept, else the kept ones and then a few at a time."""
    size = BATCH * usable_threads()
    edges = [0, *range(min(max(kept, size), count), count, size), count]
    return [range(*pair) for pair in pairwise(edges)]


BYTES_PER_REQUEST = 256
"""Of one run: the path while it is drawn and checked, what the kernel keeps, and measuring; measured, rounded up."""

BYTES_KEPT = 96
"""Of each further path or run that is kept: its columns."""

BYTES_PER_ROUTE = 10
"""Of each request and replica of a cluster: whether it fits there, as the router reads it."""

BYTES_PER_RUN = 60_000
"""Of each run that is kept: its occupancy and gaps."""

BYTES_PER_SLOT = 128
"""Of each place for a resident, of all replicas that are stopped where a router looks."""


def check_memory(
    workload: object,
    horizon: float | None,
    replications: int | None,
    runs: int,
    *,
    kept: int | None = None,
    replicas: float = 0.0,
    slots: float = 0.0,
) -> None:
    """Refuse before anything is allocated what would not fit.

    Parameters
    ----------
    workload, horizon, replications
        As for `simulate`; what is no demand, or has no horizon, is refused elsewhere. Of a sequence of paths the
        first is taken for all.
    runs : int
        Runs of each path.
    kept : int, optional
        Replications whose records are kept; all by default.
    replicas : float
        Replicas of a cluster in all.
    slots : float
        Residents that the replicas may have at once, where they run side by side; at most the requests each.
    """
    if isinstance(workload, ArrivalPath):
        requests, paths = float(len(workload)), 1
    elif isinstance(workload, Workload) and horizon is not None:
        requests = workload.total_arrival_rate * check_real("horizon", horizon, above=0.0)
        paths = 16 if replications is None else check_count("replications", replications, minimum=1)
    elif isinstance(workload, Sequence) and len(workload) and isinstance(workload[0], ArrivalPath):
        requests, paths = float(len(workload[0])), len(workload)
    else:
        return  # refused in a moment
    kept = paths if kept is None else min(kept, paths)
    columns = float(kept * runs)  # paths and runs in memory at once
    if kept < paths:
        columns += 3 * min(BATCH * usable_threads(), paths)
    needed = requests * (BYTES_PER_REQUEST + BYTES_KEPT * columns) + BYTES_PER_RUN * columns
    needed += replicas * (requests * BYTES_PER_ROUTE + BYTES_PER_RUN * paths * runs)
    needed += min(slots, requests * replicas) * BYTES_PER_SLOT
    available = available_memory()
    if needed > available:
        of_many = f" on {replicas:,.0f} replicas" if replicas else ""
        raise InputError(
            "horizon" if horizon is not None else "workload",
            f"{requests:,.3g} requests for each of {paths} paths and {runs} policies{of_many}",
            f"fit into memory: records take about {needed / 2**30:,.1f} GiB, {available / 2**30:,.1f} are free",
            "Use fewer replicas, replications or policies, or a shorter horizon."
            if replicas
            else "Use records=False, which keeps none, or a small kept_replications; or a shorter horizon, or fewer "
            "replications.",
        )


def kept_within(size: float, requests: float, replications: int, runs: int) -> int:
    """Return of how many replications the records take at most `size` bytes, at least one; see `check_memory`."""
    each = runs * (requests * BYTES_KEPT + BYTES_PER_RUN)
    return max(1, min(replications, int(size / each)))


def _refuse_leaving(workload: Workload | ArrivalPath | Sequence[ArrivalPath], server: Server) -> None:
    """Runs in pieces know no deadlines."""
    given: list[tuple[str, object]] = [
        (f"server.{name}", getattr(server, name)) for name in ("waiting_timeout", "total_timeout")
    ]
    if isinstance(workload, Workload):
        given += [
            (f"{name} of type {member.name!r}", getattr(member, name))
            for member in workload.types
            for name in ("patience", "abort_after")
        ]
    else:
        paths = [workload] if isinstance(workload, ArrivalPath) else workload
        given += [
            (name, getattr(path, name, None)) for path in paths for name in ("patience_s", "abort_after_s")
        ]
    for name, value in given:
        if value is not None:
            raise InputError(
                name,
                f"{len(value):,} values" if isinstance(value, np.ndarray) else value,
                "be None for runs without records",
                "Simulate with records.",
            )


def _without_records(
    workload: Workload | ArrivalPath | Sequence[ArrivalPath],
    server: Server,
    tables: Sequence[PolicyTable],
    horizon: float | None,
    warmup: float | None,
    replications: int | None,
    seed: Seed,
    check: bool,
    oversize: str,
    slo: dict[str, float],
    progress: Progress | None,
) -> SimulationResult:
    """Every run in pieces."""
    from fluidsched.simulation.streaming import run_pieces

    _refuse_leaving(workload, server)
    if isinstance(workload, ArrivalPath):
        paths, horizon = _replayed(workload, horizon, replications)
        if horizon is None:
            raise InputError("horizon", "nothing", "be given, s, for runs without records")
        seeds: list[np.random.SeedSequence] = []
        names, rows = workload.type_names, workload.type is not None
    elif isinstance(workload, Workload):
        horizon, seeds = replication_seeds(horizon, replications, seed)
        names, rows = workload.type_names, True
    else:
        raise InputError("workload", workload, "be a Workload or an ArrivalPath, without records")
    start = check_warmup(warmup, horizon, ())
    count = len(seeds) or 1

    def drawn(r: int) -> Iterator[ArrivalPath]:
        if not isinstance(workload, Workload):
            yield from _slices(paths[0], horizon)
            return
        yield from workload.pieces(horizon, seeds[r])

    def checked(pieces: Iterable[ArrivalPath], table: PolicyTable) -> Iterator[ArrivalPath]:
        for piece in pieces:
            if oversize == "raise":
                refuse_oversize(within_model_length(piece, server), server, table)
            yield piece

    found: list[list[tuple[EngineRun, Tally]]] = []
    for table in tables:
        remark_on_memory(server, table)
        types = names if rows else table.type_names

        def one(
            r: int, table: PolicyTable = table, types: tuple[str, ...] = types
        ) -> tuple[EngineRun, Tally]:
            tally = Tally(start, horizon, types, slo)
            lossless = table.preemption != "restart"
            run = run_pieces(
                checked(drawn(r), table),
                server,
                table,
                tally,
                horizon=horizon,
                warmup=start,
                occupancy_points=OCCUPANCY_POINTS,
                accounts=Accounts(server, warmup=start, lossless=lossless) if check else None,
            )
            tally.occupancy = run.occupancy
            return run, tally

        runs = []
        for r, done in enumerate(in_threads(one, range(count))):
            runs.append(done)
            if progress is not None:
                progress(f"simulate {table.name}", len(found) * count + r + 1, len(tables) * count)
        found.append(runs)
    return SimulationResult.collect_tallies(
        tables,
        found,
        horizon=horizon,
        warmup=start,
        seed=int(seed) if isinstance(seed, (int, np.integer)) and isinstance(workload, Workload) else None,
        workload=workload.name,
        server=server,
        slo=slo,
    )


def _slices(path: ArrivalPath, horizon: float) -> Iterator[ArrivalPath]:
    """A path in pieces; requests at one instant stay together."""
    first = 0
    while True:
        last = first + PIECE
        if last >= len(path):
            yield dataclasses.replace(path.selected(slice(first, None)), horizon=horizon)
            return
        end = float(path.arrival_s[last])
        last = int(np.searchsorted(path.arrival_s, end))
        if last == first:  # more than a piece at one instant
            end = math.nextafter(end, math.inf)
            last = int(np.searchsorted(path.arrival_s, end))
        yield dataclasses.replace(path.selected(slice(first, last)), horizon=end)
        first = last


def common_paths(
    workload: Workload | ArrivalPath | Sequence[ArrivalPath],
    horizon: float | None,
    warmup: float | None,
    replications: int | None,
    seed: Seed,
) -> tuple[Sequence[ArrivalPath], float | None, float]:
    """Return the R paths of a simulation, its horizon and its warm-up; arguments as for `simulate`.

    Sampled paths, and those of a sequence that is no list or tuple, are drawn when they are asked for.
    """
    paths: Sequence[ArrivalPath]
    if isinstance(workload, ArrivalPath):
        paths, horizon = _replayed(workload, horizon, replications)
    elif isinstance(workload, Workload):
        end, children = replication_seeds(horizon, replications, seed)
        horizon = end
        paths = DrawnPaths(len(children), lambda r: workload.sample(end, children[r]))
    elif isinstance(workload, Sequence):
        paths, horizon = _given(workload, horizon, replications)
    else:
        raise InputError("workload", workload, "be a Workload, an ArrivalPath, or a sequence of paths")
    return paths, horizon, check_warmup(warmup, horizon, paths)


class _Settings(NamedTuple):
    """What all runs of one policy share."""

    server: Server
    policy: Policy
    horizon: float | None
    warmup: float


def _runs(paths: Sequence[ArrivalPath], settings: _Settings, engine: str) -> list[EngineRun]:
    if engine == "kernel":
        return _kernel_runs(paths, settings)
    return [_reference_run(path, settings, audited=False) for path in paths]


def _length(paths: Sequence[ArrivalPath], horizon: float | None) -> float:
    """The time in which requests come: the horizon, or the last arrival of a path that runs until empty."""
    if horizon is not None:
        return horizon
    return max((float(path.arrival_s[-1]) for path in paths if len(path)), default=0.0)


def _present(paths: Sequence[ArrivalPath], runs: Sequence[EngineRun], length: float) -> NDArray[np.float64]:
    """Number in the system at `GRID` instants of the time in which requests come, summed over the runs."""
    instants = length / GRID * np.arange(1.0, GRID + 1.0)
    series = np.zeros(GRID)
    for path, run in zip(paths, runs, strict=True):
        rejected = run.status == STATUSES.index("rejected")  # never in the system
        series += number_in_system(path.arrival_s[~rejected], run.finish_s[~rejected], instants)
    return series


def _kernel_runs(paths: Sequence[ArrivalPath], settings: _Settings) -> list[EngineRun]:
    from fluidsched.simulation.kernel import run_many

    assert isinstance(settings.policy, PolicyTable)
    return run_many(
        paths,
        settings.server,
        settings.policy,
        horizon=settings.horizon,
        warmup=settings.warmup,
        occupancy_points=OCCUPANCY_POINTS,
    )


def _reference_run(path: ArrivalPath, settings: _Settings, *, audited: bool) -> EngineRun:
    server, policy, horizon, warmup = settings
    table = policy.table if isinstance(policy, UserRule) else policy
    audit = Audit(path, server, table, horizon=horizon, warmup=warmup) if audited else None
    run = run_reference(
        path,
        server,
        policy,
        horizon=horizon,
        warmup=warmup,
        occupancy_points=OCCUPANCY_POINTS,
        on_iteration=None if audit is None else audit.observe,
        on_idle=None if audit is None else audit.observe_idle,
    )
    if audit is not None:
        audit.check(run)
    return run


def check_policies(policies: Policy | Sequence[Policy], engine: str) -> list[Policy]:
    if isinstance(policies, str) or not isinstance(policies, (PolicyTable, UserRule, Iterable)):
        raise InputError(
            "policies",
            policies,
            "be a PolicyTable, a UserRule, or a sequence of them",
            "Tables of engines are made by fluidsched.baselines, others by compile_policy.",
        )
    given: list[Policy] = [policies] if isinstance(policies, (PolicyTable, UserRule)) else list(policies)
    if not given:
        raise InputError("policies", "none", "hold at least one PolicyTable")
    seen = set()
    for k, policy in enumerate(given):
        if not isinstance(policy, (PolicyTable, UserRule)):
            raise InputError(f"policies[{k}]", policy, "be a PolicyTable or a UserRule")
        if isinstance(policy, UserRule) and engine != "reference":
            raise InputError("engine", engine, f"be 'reference' to follow {policy.name!r}, a rule in Python")
        if policy.name in seen:
            raise InputError(
                f"policies[{k}].name", policy.name, "be unique in a run", "Use table.renamed(name)."
            )
        seen.add(policy.name)
    return given


def replication_seeds(
    horizon: float | None, replications: int | None, seed: Seed
) -> tuple[float, list[np.random.SeedSequence]]:
    """The horizon and the seed of each replication."""
    if horizon is None:
        raise InputError(
            "horizon",
            "nothing",
            "be given, s, to sample a workload",
            "Use at least a few hundred request lives.",
        )
    horizon = check_real("horizon", horizon, above=0.0)
    count = 16 if replications is None else check_count("replications", replications, minimum=1)
    root = seed_sequence(seed)
    return horizon, [
        np.random.SeedSequence(root.entropy, spawn_key=(*root.spawn_key, r), pool_size=root.pool_size)
        for r in range(count)
    ]


def _given(
    paths: Sequence[ArrivalPath], horizon: float | None, replications: int | None
) -> tuple[Sequence[ArrivalPath], float | None]:
    """Paths drawn elsewhere, one per replication."""
    if not len(paths):
        raise InputError("workload", "no path", "hold at least one ArrivalPath")
    first = paths[0]
    if not isinstance(first, ArrivalPath):
        raise InputError("workload[0]", first, "be an ArrivalPath")
    if replications is not None and replications != len(paths):
        raise InputError("replications", replications, f"be left out, or {len(paths)}, one per path")

    def one(r: int) -> ArrivalPath:
        path = paths[r]
        if not isinstance(path, ArrivalPath):
            raise InputError(f"workload[{r}]", path, "be an ArrivalPath")
        if horizon is None and path.horizon != first.horizon:
            raise InputError(
                f"workload[{r}].horizon",
                path.horizon,
                f"be that of the first path, {first.horizon}",
                "Or give a horizon for all.",
            )
        return _replayed(path, horizon, None)[0][0]

    drawn = DrawnPaths(len(paths), one)
    return drawn[:] if isinstance(paths, (list, tuple)) else drawn, _replayed(first, horizon, None)[1]


def _replayed(
    path: ArrivalPath, horizon: float | None, replications: int | None
) -> tuple[list[ArrivalPath], float | None]:
    if replications is not None and check_count("replications", replications, minimum=1) > 1:
        raise InputError(
            "replications",
            replications,
            "be 1 for a path: replaying it again would give the same run",
            "For independent replications simulate path.to_workload().",
        )
    if horizon is None or horizon == path.horizon:
        return [path], path.horizon
    horizon = check_real("horizon", horizon, above=0.0)
    if path.horizon is not None and horizon > path.horizon:
        raise InputError(
            "horizon",
            horizon,
            f"be at most the {path.horizon:g} s the path was drawn for",
            "Draw a longer path.",
        )
    return [_until(path, horizon)], horizon


def _until(path: ArrivalPath, horizon: float) -> ArrivalPath:
    """The requests that arrive by the horizon."""
    count = int(np.searchsorted(path.arrival_s, horizon, side="right"))
    return dataclasses.replace(path.selected(slice(count)), horizon=horizon)


def check_warmup(warmup: float | None, horizon: float | None, paths: Sequence[ArrivalPath]) -> float:
    if warmup is None:
        return 0.0 if horizon is None else WARMUP_SHARE * horizon
    warmup = check_real("warmup", warmup, minimum=0.0)
    if horizon is not None and warmup >= horizon:
        raise InputError("warmup", warmup, f"be below the horizon, {horizon:g} s")
    if horizon is None and warmup > 0.0:
        last = max((float(path.arrival_s[-1]) for path in paths if len(path)), default=0.0)
        if warmup > last:
            raise InputError("warmup", warmup, f"leave some of the path, whose last arrival is at {last:g} s")
    return warmup


def refuse_oversize(path: ArrivalPath, server: Server, table: PolicyTable) -> None:
    oversize = np.flatnonzero(never_fits(path, server, table))
    if oversize.size:
        i = int(oversize[0])
        longest = server.max_model_len
        prompt, output = int(path.prompt_tokens[i]), int(path.output_tokens[i])
        others = f" (and {oversize.size - 1:,} more)" if oversize.size > 1 else ""
        of_type = "" if path.label(i) is None else f" of type {path.label(i)!r}"
        raise InputError(
            f"request {i}{of_type}",
            f"{prompt:,} prompt and {output:,} output tokens{others}",
            f"fit alone into the {server.kv_capacity:,.0f} KV tokens of {server.name!r} "
            f"under table {table.name!r}"
            + ("" if longest is None else f", with a prompt below max_model_len, {longest:,} tokens"),
            'Use a larger server or shorter requests; from Python, oversize="reject" turns such requests away.',
        )
