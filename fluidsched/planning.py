"""The main job: from a workload and a server to a compared set of policies, in one call.

`plan` runs the whole chain: fluid solution, policy tables, simulation under common arrival paths, comparison with
the fluid bound, and (unless a recorded path is replayed) the same comparison across offered loads. What it returns
is a frozen `Plan`; `Plan.write` puts it into a directory, whole files only, with a manifest.

An overloaded workload is an answer, not an error: the plan then says by how much the demand exceeds the server,
whom the fluid optimum refuses, and shows how each policy fares under the offered rates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidsched._checks import check_count, check_real
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.fluid import FluidSolution, solve_fluid
from fluidsched.policy import PolicyTable, baselines, compile_policy
from fluidsched.server import Server, catalog
from fluidsched.workload import ArrivalPath, Workload, workloads

if TYPE_CHECKING:
    import pandas as pd

    from fluidsched.comparison import Comparison
    from fluidsched.simulation import SimulationResult

__all__ = ["CURVE_LOADS", "Plan", "plan", "policy_tables", "types_for"]

Progress = Callable[[str, int, int], None]

#: Offered loads of the load curve, as shares of the fluid boundary.
CURVE_LOADS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05)

#: Numbers of types tried for WAIT and gated tables, beside the workload's own: fewer types wait less and reach further.
NUMBERS_OF_TYPES = (1, 3, 12)

#: Margin of the tables where neither memory nor the batch is limited, so that there is no largest one.
SLACK_WITHOUT_LIMITS = 0.1

#: Policies whose tables look at types.
TYPED_KINDS = ("wait", "gated")

#: Between tables of nearly equal latency the earlier one is recommended: the compiled cap, a stock engine's flag
#: that also protects it when the load rises, then the other compiled tables, then the engines as they come.
PREFERENCE = ("capped", "gated", "wait", "vllm", "sarathi")

#: The solution's names of resources, for people.
RESOURCES = {
    "kv": "kv (memory of the KV cache)",
    "batch": "batch (requests in one iteration)",
    "tokens": "tokens (in one iteration)",
}

_DEFAULT_LOAD = 0.8


@dataclass(frozen=True, repr=False)
class Plan:
    """What `plan` found; every part is the frozen object of one step of the chain.

    Attributes
    ----------
    workload : Workload
        The request types planned for, at the planned rates.
    server : Server
    fluid : FluidSolution
        The fluid optimum at the planned rates.
    tables : tuple of PolicyTable
        Every policy simulated.
    missing : dict of str to str
        Policies for which no table exists, with the reason.
    runs : SimulationResult
    comparison : Comparison
    curve : pandas.DataFrame or None
        Load curve: the columns of `SimulationResult.summary` and load (share of the fluid boundary), arrival_rate
        (req/s), behind (whether more than one request in a hundred had no first token when a run ended). None for
        replays and when switched off.
    recommended : str
        Name of the recommended table.
    remarks : tuple of str
        What a reader should know beside the numbers.
    settings : dict
        Seed, replications, horizon (s), warm-up (s), objective, whether a path was replayed.
    """

    workload: Workload
    server: Server
    fluid: FluidSolution
    tables: tuple[PolicyTable, ...]
    missing: dict[str, str]
    runs: SimulationResult
    comparison: Comparison
    curve: pd.DataFrame | None
    recommended: str
    remarks: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def recommended_table(self) -> PolicyTable:
        """The recommended `PolicyTable`."""
        return next(table for table in self.tables if table.name == self.recommended)

    def __repr__(self) -> str:
        from fluidsched.reporting import plan_text

        return plan_text(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as one JSON-able dictionary, schema ``fluidsched.plan/1`` (tables by name, not embedded)."""
        from fluidsched.reporting import plan_summary

        return plan_summary(self)

    def write(self, directory: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Write the plan's files into `directory` and return it; see `reporting.write_plan`."""
        from fluidsched.reporting import write_plan

        return write_plan(self, directory, force=force)


def plan(
    workload: Workload | ArrivalPath | None = None,
    server: Server | None = None,
    *,
    load: float | None = None,
    replay: bool = False,
    objective: str = "requests",
    horizon: float = 3600.0,
    warmup: float | None = None,
    replications: int = 16,
    seed: int = 7,
    overflow_probability: float = 0.01,
    curve: bool = True,
    progress: Progress | None = None,
) -> Plan:
    """Answer the question: what can this server carry, whom should it admit and when, and how good is that?

    Parameters
    ----------
    workload : Workload or ArrivalPath, optional
        What is asked. A path is turned into 12 request types. Default: the embedded Azure conversation workload at
        0.8 of the server's fluid boundary.
    server : Server, optional
        Default: one A100-80GB with Llama-2-7B from the catalog.
    load : float, optional
        Scale the workload to this share of the fluid boundary; default: keep its own rates (0.8 when `workload` is
        not given). Not together with `replay`.
    replay : bool, optional
        Simulate the given `ArrivalPath` itself, once, instead of Poisson arrivals of its types. Requests longer
        than the KV cache are rejected then, and counted; they are left out of the types. Without `replay` they
        are an error.
    objective : {"requests", "output_tokens"}, optional
        Reward of the fluid program.
    horizon, warmup : float, optional
        Simulated seconds per replication, and how many of them are left out of the measures (default: a sixth).
    replications : int, optional
        Independent arrival paths, common to all policies.
    seed : int, optional
        Of the arrival paths.
    overflow_probability : float, optional
        δ of the compiled tables.
    curve : bool, optional
        Whether to simulate the load curve too (not for replays).
    progress : callable, optional
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    Plan

    Raises
    ------
    InputError
        On wrong arguments; nothing has run then.

    Examples
    --------
    >>> import fluidsched as fs
    >>> result = fs.plan(horizon=60.0, warmup=10.0, replications=2, curve=False)
    >>> result.fluid.is_stable, result.recommended in [t.name for t in result.tables]
    (True, True)
    """
    check_count("replications", replications, minimum=1)
    check_real("horizon", horizon, above=0.0)
    warmup = horizon / 6 if warmup is None else check_real("warmup", warmup, minimum=0.0)
    if warmup >= horizon:
        raise InputError("warmup", warmup, f"be below the horizon, {horizon:g} s")
    server = catalog.server("a100-80gb", "llama-2-7b") if server is None else server
    path: ArrivalPath | None = None
    own_rate: float | None = None
    if workload is None:
        workload = workloads.azure_conv()
        load = _DEFAULT_LOAD if load is None else load
    if isinstance(workload, ArrivalPath):
        path = workload
        served = _servable(path, server, rejecting=replay)
        workload = served.to_workload(types=types_for(served))
    elif replay:
        raise InputError(
            "replay",
            "a Workload",
            "come with an ArrivalPath",
            "Read one with fluidsched.read_trace, or drop replay.",
        )
    if replay and load is not None:
        raise InputError("load", load, "be left out with replay", "A replayed path keeps its own rate.")
    if load is not None:
        own_rate = workload.total_arrival_rate
        workload = workload.at_load(check_real("load", load, above=0.0), server)

    fluid = solve_fluid(workload, server, objective=objective)
    workload.require_no_cached_prefixes("a plan, whose policies are simulated")
    tables, missing = policy_tables(fluid, overflow_probability=overflow_probability)
    from fluidsched.comparison import compare
    from fluidsched.simulation import simulate

    if replay:
        assert path is not None
        runs = simulate(path, server, tables, replications=1, oversize="reject", progress=progress)
    else:
        runs = simulate(
            workload,
            server,
            tables,
            horizon=horizon,
            warmup=warmup,
            replications=replications,
            seed=seed,
            progress=progress,
        )
    frame = None
    if curve and not replay:
        frame = _load_curve(
            workload,
            server,
            objective=objective,
            horizon=horizon / 2,
            warmup=warmup / 2,
            replications=max(2, replications // 2),
            seed=seed,
            overflow_probability=overflow_probability,
            numbers_of_types={
                kind: [len(table.types) for table in tables if table.kind == kind]
                or _numbers_of_types(workload)
                for kind in TYPED_KINDS
            },
            progress=progress,
        )
    recommended = _recommend(runs)
    return Plan(
        workload=workload,
        server=server,
        fluid=fluid,
        tables=tuple(tables),
        missing=missing,
        runs=runs,
        comparison=compare(runs, bound=fluid, baseline="vllm"),
        curve=frame,
        recommended=recommended,
        remarks=(
            *_remarks(fluid, own_rate),
            *_rejections(runs),
            *_stuck(runs),
            *_curve_ends(frame),
            _recommendation(runs, recommended, fluid),
        ),
        settings={
            "seed": None if replay else seed,
            "replications": runs.replications,
            "horizon_s": None if replay else horizon,
            "warmup_s": None if replay else warmup,
            "objective": objective,
            "overflow_probability": overflow_probability,
            "replay": replay,
            "load": load,
        },
    )


def types_for(path: ArrivalPath) -> int:
    """Twelve types, or fewer where the path has too few distinct lengths."""
    distinct = len(np.unique(np.stack([path.prompt_tokens, path.output_tokens]), axis=1).T)
    return max(k for k in (1, 3, 12) if k <= distinct)


def _servable(path: ArrivalPath, server: Server, *, rejecting: bool) -> ArrivalPath:
    """The requests of a path that fit into the KV cache alone; others are an error unless they are to be rejected."""
    from fluidsched.simulation.limits import never_fits

    too_long = never_fits(path, server, baselines.vllm())
    if not too_long.any():
        return path
    if rejecting and not too_long.all():
        return path.selected(~too_long)
    i, count = int(too_long.argmax()), int(too_long.sum())
    others = f" (and {count - 1:,} more of {len(path):,} requests)" if count > 1 else ""
    raise InputError(
        f"request {i + 1} of {path.name!r}",
        f"{path.prompt_tokens[i]:,} prompt and {path.output_tokens[i]:,} output tokens{others}",
        f"fit alone into the {server.kv_capacity:,.0f} KV tokens of {server.name!r}",
        "Use a larger server."
        if too_long.all()
        else "Use a larger server, drop such requests, or replay the path: a replay rejects and counts them.",
    )


def policy_tables(
    fluid: FluidSolution,
    *,
    overflow_probability: float = 0.01,
    numbers_of_types: Mapping[str, Sequence[int]] | None = None,
) -> tuple[list[PolicyTable], dict[str, str]]:
    """Compile wait, gated and capped from a solution and put vLLM and Sarathi beside them.

    Of the tables that look at types the one with the lowest certified TTFT is kept, over the numbers of types tried.

    Parameters
    ----------
    fluid : FluidSolution
    overflow_probability : float, optional
        δ of the compiled tables.
    numbers_of_types : dict of str to sequence of int, optional
        Numbers of types to try for "wait" and "gated"; default 1, 3, 12 and the workload's own.

    Returns
    -------
    tables : list of PolicyTable
        Those that exist, in the order wait, gated, capped, vllm, sarathi.
    missing : dict of str to str
        The reason for each that does not.
    """
    own = _numbers_of_types(fluid.workload)
    tried = dict.fromkeys(TYPED_KINDS, own) if numbers_of_types is None else numbers_of_types
    tables: list[PolicyTable] = []
    missing: dict[str, str] = {}
    for kind in (*TYPED_KINDS, "capped"):
        try:
            if kind in TYPED_KINDS:
                tables.append(_compile_typed(fluid, kind, tried[kind], overflow_probability))
            else:
                tables.append(compile_policy(fluid, kind, overflow_probability=overflow_probability))
        except InfeasibleError as error:
            missing[kind] = str(error)
    tables += [baselines.vllm(), baselines.sarathi()]
    return tables, missing


def _numbers_of_types(workload: Workload) -> Sequence[int]:
    return (*(types for types in NUMBERS_OF_TYPES if types < len(workload)), len(workload))


def _compile_typed(
    fluid: FluidSolution, kind: str, numbers_of_types: Sequence[int], overflow_probability: float
) -> PolicyTable:
    """The table with the lowest certified TTFT over the numbers of types tried; all reasons if none exists."""
    reasons: list[str] = []
    best: PolicyTable | None = None
    server = fluid.server
    limited = np.isfinite(server.kv_capacity) or server.max_batch_size is not None
    for types in numbers_of_types:
        solution = fluid
        if types < len(fluid.workload):
            try:
                merged = fluid.workload.merged(types)
            except InputError:
                continue  # these types do not merge into that many boxes
            solution = solve_fluid(merged, server, objective=fluid.objective)
        try:
            table = compile_policy(
                solution,
                kind,
                slack="auto" if limited else SLACK_WITHOUT_LIMITS,
                overflow_probability=overflow_probability,
            )
        except InfeasibleError as error:
            reasons.append(f"with {types} type{'s' if types > 1 else ''}, {error}")
            continue
        if best is None or table.certificate["ttft"]["value"] < best.certificate["ttft"]["value"]:
            best = table
    if best is None:
        raise InfeasibleError("\n  ".join(reasons))
    return best


def _load_curve(
    workload: Workload,
    server: Server,
    *,
    objective: str,
    horizon: float,
    warmup: float,
    replications: int,
    seed: int,
    overflow_probability: float,
    numbers_of_types: Mapping[str, Sequence[int]],
    progress: Progress | None,
) -> pd.DataFrame:
    """Simulate every policy at `CURVE_LOADS`, its table compiled anew for each load; a line ends where none exists."""
    import pandas as pd

    from fluidsched.simulation import simulate

    parts = []
    for done, load in enumerate(CURVE_LOADS):
        if progress is not None:
            progress("load curve", done, len(CURVE_LOADS))
        offered = workload.at_load(load, server)
        tables, _ = policy_tables(
            solve_fluid(offered, server, objective=objective),
            overflow_probability=overflow_probability,
            numbers_of_types=numbers_of_types,
        )
        runs = simulate(
            offered, server, tables, horizon=horizon, warmup=warmup, replications=replications, seed=seed
        )
        part = runs.summary()
        behind = {name: bool(runs.outcome(name).lower_bounds["p99_ttft"].any()) for name in runs.policies}
        part = part[part["measure"].isin(["request_throughput", "mean_ttft", "p99_ttft", "mean_e2e"])]
        parts.append(
            part.assign(load=load, arrival_rate=offered.total_arrival_rate, behind=part["policy"].map(behind))
        )
    if progress is not None:
        progress("load curve", len(CURVE_LOADS), len(CURVE_LOADS))
    return pd.concat(parts, ignore_index=True)


def _keeps_up(runs: SimulationResult, name: str) -> bool:
    """Whether at most one request in a hundred was left without a first token when a run ended."""
    return not runs.outcome(name).lower_bounds["p99_ttft"].any()


def _recommend(runs: SimulationResult) -> str:
    """The simplest of the tables whose mean end-to-end latency is within 5 % of the lowest (`PREFERENCE`).

    Policies that do not keep up are passed over while others do.
    """
    candidates = [name for name in PREFERENCE if name in runs.policies]
    candidates = [name for name in candidates if _keeps_up(runs, name)] or candidates
    latency = {name: float(np.mean(runs.measures(name)["mean_e2e"])) for name in candidates}
    if any(np.isnan(value) for value in latency.values()):
        return candidates[0]  # some run measured no request: nothing tells the policies apart
    return next(name for name in candidates if latency[name] <= 1.05 * min(latency.values()))


def _remarks(fluid: FluidSolution, own_rate: float | None) -> list[str]:
    """What the numbers mean for the reader's question, in sentences."""
    workload, server = fluid.workload, fluid.server
    offered, critical = workload.total_arrival_rate, fluid.critical_rate
    load = float(fluid.load.max())
    tightest = fluid.resources[int(fluid.load.argmax())]
    if fluid.is_stable:
        remarks = [
            f"The server can carry {critical:.2f} req/s of this mix; the workload brings {offered:.2f} req/s, "
            f"a load of {load:.2f}. The tightest resource is {RESOURCES.get(tightest, tightest)}."
        ]
        pressed = solve_fluid(workload.at_load(1.5, server), server, objective=fluid.objective)
        remarks.append(
            "Everything fits, so every bid price is 0: one more request displaces nothing. With demand at 1.5 of "
            f"the boundary {_extreme_prices(pressed)}"
        )
    else:
        refused = [
            f"{name} ({1 - share:.0%})"
            for name, share in zip(workload.type_names, fluid.admitted_fraction.tolist(), strict=True)
            if share < 1 - 1e-9
        ]
        remarks = [
            f"The workload brings {offered:.2f} req/s, {load:.2f} times the {critical:.2f} req/s the server can "
            f"carry of this mix: {offered - critical:.2f} req/s too many. The optimum admits "
            f"{fluid.admitted_rate.sum():.2f} req/s by refusing {', '.join(refused)}.",
            f"A bid price is the reward that one more request displaces; {_extreme_prices(fluid)}",
        ]
    if own_rate is not None:
        share = own_rate / critical
        fits = "it would fit" if share < 1 else "it would not fit"
        margin = ", with little room for chance" if 0.9 < share < 1 else ""
        remarks.append(
            f"At its own {own_rate:.2f} req/s the workload would be {share:.2f} of what this server can carry: "
            f"{fits}{margin}."
        )
    return remarks


def _extreme_prices(fluid: FluidSolution) -> str:
    """The cheapest and the dearest type of a server that is full, in words."""
    prices, names = fluid.bid_price, fluid.workload.type_names
    low, high = int(prices.argmin()), int(prices.argmax())
    return (
        f"the cheapest type is {names[low]} ({prices[low]:.3g} of reward per request), the dearest {names[high]} "
        f"({prices[high]:.3g}); a type is refused where its price exceeds its reward."
    )


def _curve_ends(curve: pd.DataFrame | None) -> list[str]:
    """Says where along the load curve the compiled tables end, and that it is for want of a table."""
    if curve is None:
        return []
    last = curve.groupby("policy", sort=False)["load"].max()
    ends = [f"{name} {load:.2f}" for name, load in last.items() if load < max(CURVE_LOADS)]
    return (
        [f"In the load curve a table ends where none exists beyond: {', '.join(ends)} of the boundary."]
        if ends
        else []
    )


def _stuck(runs: SimulationResult) -> list[str]:
    """Says what a stuck run is, where one is."""
    names = [name for name in runs.policies if "stuck" in runs.outcome(name).verdicts]
    if not names:
        return []
    return [
        f"{' and '.join(names)} ended stuck: requests wait for others to come with them, and none come after the "
        "end of the arrivals."
    ]


def _rejections(runs: SimulationResult) -> list[str]:
    """Says so where requests of a replayed path can never fit, which only a replay tolerates."""
    rejected = max(int(runs.measures(name)["rejected"].max()) for name in runs.policies)
    if not rejected:
        return []
    who = "1 request is" if rejected == 1 else f"{rejected:,} requests are"
    return [f"{who} longer than the KV cache: never to be served, rejected, and in none of the rates above."]


def _seconds(value: float) -> str:
    return f"{value:.3g} s" if value < 100.0 else f"{value:,.0f} s"


def _recommendation(runs: SimulationResult, recommended: str, fluid: FluidSolution) -> str:
    ttft, e2e = (float(np.mean(runs.measures(recommended)[name])) for name in ("mean_ttft", "mean_e2e"))
    if np.isnan(e2e):
        return (
            f"Some runs measured no request, so they do not tell the policies apart: {recommended} is named as the "
            "simplest to deploy safely. Simulate a longer horizon."
        )
    latency = f"mean TTFT {_seconds(ttft)}, mean end-to-end latency {_seconds(e2e)}"
    choice = "the simplest to deploy safely of those within 5 % of the lowest end-to-end latency"
    if not fluid.is_stable:
        return (
            f"Shed load or add servers: under these rates every policy builds a backlog. Least bad: {recommended} "
            f"({latency}, growing for as long as the load lasts), {choice}."
        )
    if not _keeps_up(runs, recommended):
        return (
            f"No policy keeps up, though the mean load fits. Least bad: {recommended} ({latency}), {choice}."
        )
    return (
        f"Recommended table: {recommended} ({latency}), {choice} among the policies that keep up."
        f"{_sooner(runs, recommended, ttft)}"
    )


def _sooner(runs: SimulationResult, recommended: str, ttft: float) -> str:
    """Names the policy with the lowest mean TTFT where the recommended one's is more than half as long again."""
    means = {
        name: float(np.mean(runs.measures(name)["mean_ttft"]))
        for name in runs.policies
        if _keeps_up(runs, name)
    }
    first = min(means, key=means.__getitem__)
    if first == recommended or ttft <= 1.5 * means[first]:
        return ""
    e2e = float(np.mean(runs.measures(first)["mean_e2e"]))
    return (
        f" If the first token matters more, take {first}: mean TTFT {means[first]:.3g} s, mean end-to-end latency "
        f"{e2e:.4g} s."
    )
