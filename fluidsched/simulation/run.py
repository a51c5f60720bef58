"""Simulate policies on common arrival paths.

The paths come first and serve every policy alike, so that differences between policies are not differences
between paths. A workload is drawn R times: replication r uses child r of `SeedSequence(seed)`, so the same
seed gives the same paths whatever the policies, their number, the engine or R. A path is replayed once as
it is.

Everything that can be wrong with the input is found before anything runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from fluidsched._checks import check_choice, check_count, check_real
from fluidsched.errors import InputError
from fluidsched.policy.table import PolicyTable
from fluidsched.server import Server
from fluidsched.simulation.laws import Audit, check_agreement, check_laws
from fluidsched.simulation.limits import (
    check_kernel,
    check_run,
    never_fits,
    remark_on_memory,
    within_model_length,
)
from fluidsched.simulation.records import EngineRun
from fluidsched.simulation.reference import run_reference
from fluidsched.simulation.result import SimulationResult
from fluidsched.simulation.rules import UserRule
from fluidsched.workload import ArrivalPath, Workload
from fluidsched.workload.path import Seed, seed_sequence

__all__ = ["ENGINES", "OCCUPANCY_POINTS", "common_paths", "simulate"]

Policy = PolicyTable | UserRule
Progress = Callable[[str, int, int], None]

ENGINES = ("kernel", "reference")

OCCUPANCY_POINTS = 512
"""Grid points of every run's occupancy series."""

WARMUP_SHARE = 1 / 6
"""Default warm-up of a run with a horizon, as a share of it."""


def simulate(
    workload: Workload | ArrivalPath,
    server: Server,
    policies: Policy | Sequence[Policy],
    *,
    horizon: float | None = None,
    warmup: float | None = None,
    replications: int | None = None,
    seed: Seed = 0,
    engine: Literal["kernel", "reference"] = "kernel",
    check: bool = False,
    oversize: Literal["raise", "reject"] = "raise",
    progress: Progress | None = None,
) -> SimulationResult:
    """Run every policy on the same arrival paths.

    Parameters
    ----------
    workload : Workload or ArrivalPath
        A workload is sampled; a path is replayed.
    server : Server
        Its limits bind beside each table's own; the smaller counts.
    policies : PolicyTable, UserRule, or a sequence of them
        With unique names. A rule of the user's own needs ``engine="reference"``.
    horizon : float, optional
        End of every run, s. Required for a workload. A path without one runs until it is empty or stuck;
        one that was sampled ends at its own horizon at the latest.
    warmup : float, optional
        Start of the measured window, s, before the horizon. Default: a sixth of the horizon; 0 for a path
        that runs until empty.
    replications : int, optional
        R, independent paths drawn from the workload; 16 by default. A path is one replication.
    seed : int, SeedSequence or Generator
        Source of the R paths.
    engine : {"kernel", "reference"}
        "kernel" is compiled, and runs replications in parallel threads. "reference" is the definition in
        plain Python, some hundred times slower; it alone follows an iteration time that is any function.
    check : bool
        Verify the laws of `fluidsched.simulation.laws` in every run. With the kernel the first replication
        of every policy also runs on the reference engine, which must agree and whose every batch is
        audited.
    oversize : {"raise", "reject"}
        What to do with requests that can never fit: an error before the run, or status `rejected`.
    progress : callable, optional
        Called as ``progress("simulate <policy>", runs done, runs in all)``.

    Returns
    -------
    SimulationResult

    Raises
    ------
    InputError
        Before anything runs: zero replications, a horizon of 0, a warm-up not before the horizon, a
        repeated policy name, a table for other types than the path's, a `wait`
        cohort above the server's token budget, a request that can never fit, several replications of a
        path.
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
    """
    check_choice("engine", engine, ENGINES)
    given = _check_policies(policies, engine)
    tables = [policy.table if isinstance(policy, UserRule) else policy for policy in given]
    check_choice("oversize", oversize, ("raise", "reject"))
    if not isinstance(server, Server):
        raise InputError("server", server, "be a Server")
    if engine == "kernel":
        server.iteration_time.require_coefficients('engine="kernel"')
        for table in tables:
            check_kernel(table)
    paths, horizon, warmup = common_paths(workload, horizon, warmup, replications, seed)
    paths = [within_model_length(path, server) for path in paths]
    for table in tables:
        remark_on_memory(server, table)
        for path in paths:
            check_run(path, server, table, horizon)
            if oversize == "raise":
                _refuse_oversize(path, server, table)

    engine_runs: list[list[EngineRun]] = []
    for policy in given:
        stage = f"simulate {policy.name}"
        done = len(engine_runs) * len(paths)
        settings = _Settings(server, policy, horizon, warmup)
        runs = _kernel_runs(paths, settings) if engine == "kernel" else []
        for r, path in enumerate(paths):
            if engine == "reference":
                runs.append(_reference_run(path, settings, audited=check))
            elif check and r == 0:
                check_agreement(runs[0], _reference_run(path, settings, audited=True))
            if check:
                lossless = tables[len(engine_runs)].preemption != "restart"
                check_laws(path, server, runs[r], warmup=warmup, lossless=lossless)
            if progress is not None:
                progress(stage, done + r + 1, len(tables) * len(paths))
        engine_runs.append(runs)
    return SimulationResult.collect(
        tables,
        paths,
        engine_runs,
        horizon=horizon,
        warmup=warmup,
        seed=int(seed) if isinstance(seed, (int, np.integer)) and isinstance(workload, Workload) else None,
        engine=engine,
        workload=workload.name,
        server=server,
    )


def common_paths(
    workload: Workload | ArrivalPath,
    horizon: float | None,
    warmup: float | None,
    replications: int | None,
    seed: Seed,
) -> tuple[list[ArrivalPath], float | None, float]:
    """Return the R paths of a simulation, its horizon and its warm-up; arguments as for `simulate`."""
    if isinstance(workload, ArrivalPath):
        paths, horizon = _replayed(workload, horizon, replications)
    elif isinstance(workload, Workload):
        paths, horizon = _sampled(workload, horizon, replications, seed)
    else:
        raise InputError("workload", workload, "be a Workload or an ArrivalPath")
    return paths, horizon, _check_warmup(warmup, horizon, paths)


class _Settings(NamedTuple):
    """What all runs of one policy share."""

    server: Server
    policy: Policy
    horizon: float | None
    warmup: float


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
    )
    if audit is not None:
        audit.check(run)
    return run


def _check_policies(policies: Policy | Sequence[Policy], engine: str) -> list[Policy]:
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


def _sampled(
    workload: Workload, horizon: float | None, replications: int | None, seed: Seed
) -> tuple[list[ArrivalPath], float]:
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
    children = [
        np.random.SeedSequence(root.entropy, spawn_key=(*root.spawn_key, r), pool_size=root.pool_size)
        for r in range(count)
    ]
    return [workload.sample(horizon, child) for child in children], horizon


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
    if horizon is None:
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


def _check_warmup(warmup: float | None, horizon: float | None, paths: Sequence[ArrivalPath]) -> float:
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


def _refuse_oversize(path: ArrivalPath, server: Server, table: PolicyTable) -> None:
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
