"""The main job: from a workload and a server to a compared set of policies, in one call.

`plan` runs the whole chain: fluid solution, policy tables, simulation under common arrival paths, comparison with
the fluid bound, and the same tables across offered loads, as they would be deployed; then it recommends one
(`fluidsched.recommendation`). What it returns is a frozen `Plan`; `Plan.write` puts it into a directory, whole files
only, with a manifest.

A recorded path is replayed once, whole, which shows what would have happened and gives no interval. The loads around it
and all intervals come from paths made of random pieces of it, a tenth of its length in the mean, so that its bursts are
kept (`ArrivalPath.bootstrapped`); for another load the recorded requests come faster or slower before they are cut.

An overloaded workload is an answer, not an error: the plan then says by how much the demand exceeds the server,
whom the fluid optimum refuses, shows how each policy fares under the offered rates, and which table keeps up behind a
door that turns away whom the optimum does (`fluidsched.overload`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidsched._checks import check_count, check_real
from fluidsched._display import Tabular
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.fluid import FluidSolution, solve_fluid
from fluidsched.overload import Admission, offer
from fluidsched.policy import PolicyTable, baselines, compile_policy
from fluidsched.recommendation import (
    PRACTICAL,
    RESOLUTION,
    Reach,
    Recommendation,
    bracket,
    choose,
    gains_over,
    judge,
    keeps_up,
    settled_until,
)
from fluidsched.server import Server, catalog
from fluidsched.simulation.measures import Settled, check_targets, in_words, interval
from fluidsched.workload import ArrivalPath, Workload, workloads
from fluidsched.workload.path import DrawnPaths

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.comparison import Comparison
    from fluidsched.simulation import SimulationResult

__all__ = ["CURVE_LOADS", "Plan", "plan", "policy_tables", "types_for"]

Progress = Callable[[str, int, int], None]

#: Offered loads of the load curve, as shares of the fluid boundary.
CURVE_LOADS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0, 1.02)

#: Measures of the load curve.
CURVE_MEASURES = (
    "request_throughput",
    "mean_ttft",
    "p99_ttft",
    "mean_tpot",
    "p99_tpot",
    "mean_e2e",
    "preemptions",
)

#: Load of a server that is almost idle: targets missed here are missed at any load.
IDLE_LOAD = 0.02

#: Numbers of types tried for WAIT and gated tables, beside the workload's own: fewer types wait less and reach further.
NUMBERS_OF_TYPES = (1, 3, 12)

#: Margin of the tables where neither memory nor the batch is limited, so that there is no largest one.
SLACK_WITHOUT_LIMITS = 0.1

#: Policies whose tables look at types.
TYPED_KINDS = ("wait", "gated")

#: The solution's names of resources, for people.
RESOURCES = {
    "kv": "kv (memory of the KV cache)",
    "batch": "batch (requests in one iteration)",
    "tokens": "tokens (in one iteration)",
}

_DEFAULT_LOAD = 0.8

#: Simulated seconds per replication.
HORIZON = 3600.0

#: Records of the runs that a plan holds take about so many bytes at most.
KEPT_BYTES = 2.0**29


@dataclass(frozen=True, repr=False)
class Plan(Tabular):
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
        Load curve, the same tables at other loads: the columns of `SimulationResult.summary` and load (share of the
        fluid boundary), arrival_rate (req/s), behind (whether more than one request in a hundred had no first
        token when a run ended). None when switched off.
    recommendation : Recommendation
        What to run, what it gains over vLLM and Sarathi as they come, when one more server is needed.
    admission : Admission or None
        In overload: whom to turn away, and how the recommended table serves the others; None where everything fits,
        or where no table keeps up with what the optimum admits.
    remarks : tuple of str
        What a reader should know beside the numbers.
    settings : dict
        Seed, replications, horizon (s), warm-up (s), objective, targets (s), whether a path was replayed.
    """

    workload: Workload
    server: Server
    fluid: FluidSolution
    tables: tuple[PolicyTable, ...]
    missing: dict[str, str]
    runs: SimulationResult
    comparison: Comparison
    curve: pd.DataFrame | None
    recommendation: Recommendation
    admission: Admission | None
    remarks: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def recommended(self) -> str:
        """Name of the recommended table."""
        return self.recommendation.policy

    @property
    def recommended_table(self) -> PolicyTable:
        """The recommended `PolicyTable`."""
        return self.recommendation.table

    def __repr__(self) -> str:
        from fluidsched.reporting import plan_text

        return plan_text(self)

    def to_frame(self) -> pd.DataFrame:
        """The comparison's tidy frame: one row per policy and measure."""
        return self.comparison.to_frame()

    def plot(self, measure: str = "mean_ttft", ax: Axes | None = None) -> Axes:
        """Draw what the recommended table gains, by load; see `fluidsched.plots.gains`."""
        return self.recommendation.plot(measure, ax=ax)

    def _shown_frame(self) -> pd.DataFrame:
        return self.comparison._shown_frame()

    def _summary(self) -> list[tuple[str, str]]:
        load, critical = float(self.fluid.load.max()), self.fluid.critical_rate
        return [
            (
                "planned for",
                f"{self.workload.name}, {self.workload.total_arrival_rate:.4g} req/s, load {load:.2f}",
            ),
            ("server", f"{self.server.name}, carries {critical:.4g} req/s"),
            ("recommended", f"{self.recommended}: {self.recommendation.reason}"),
            *(("remark", remark) for remark in self.remarks),
        ]

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
    horizon: float | None = None,
    warmup: float | None = None,
    replications: int = 16,
    seed: int = 7,
    overflow_probability: float = 0.01,
    targets: Mapping[str, float] | None = None,
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
        Simulate the given `ArrivalPath` itself, once, instead of Poisson arrivals of its types, and pieces of it
        where replications or other loads are asked for. Requests longer than the KV cache are rejected then, and
        counted; they are left out of the types. Without `replay` they are an error.
    objective : {"requests", "output_tokens"}, optional
        Reward of the fluid program.
    horizon, warmup : float, optional
        Simulated seconds per replication (default 3600), and how many of them are left out of the measures (default:
        a sixth). Of a replay: of the paths made of its pieces, at its own load (default: as long as it is); at another
        load they are as much shorter or longer as the requests come faster or slower.
    replications : int, optional
        Independent arrival paths, common to all policies. The records of the first ones are kept, as many as take
        `KEPT_BYTES`: plots and bounds that hold for every request look at these, all measures at all replications. So
        memory does not grow with their number.
    seed : int, optional
        Of the arrival paths.
    overflow_probability : float, optional
        δ of the compiled tables.
    targets : mapping, optional
        Measure → what it may be at most, s, such as ``{"p99_ttft": 2.0}``: they weigh in the recommendation and in
        the load at which one more server is needed.
    curve : bool, optional
        Whether to simulate the same tables at other loads too, and the load up to which the recommended one keeps
        up.
    progress : callable, optional
        Called as ``progress(stage, done, total)``.

    Returns
    -------
    Plan

    Raises
    ------
    InputError
        On wrong arguments, or where one replication's records do not fit into memory; nothing has run then.
    InfeasibleError
        If no policy meets the targets even on a server that is almost idle; shows the nearest miss.

    Examples
    --------
    >>> import fluidsched as fs
    >>> result = fs.plan(horizon=60.0, warmup=10.0, replications=2, curve=False)
    >>> result.fluid.is_stable, result.recommended in [t.name for t in result.tables]
    (True, True)
    """
    check_count("replications", replications, minimum=1)
    if horizon is None:
        length = workload.duration if replay and isinstance(workload, ArrivalPath) else 0.0
        horizon = length if length > 0.0 else HORIZON
    check_real("horizon", horizon, above=0.0)
    warmup = horizon / 6 if warmup is None else check_real("warmup", warmup, minimum=0.0)
    if warmup >= horizon:
        raise InputError("warmup", warmup, f"be below the horizon, {horizon:g} s")
    server = catalog.server("a100-80gb", "llama-2-7b") if server is None else server
    path: ArrivalPath | None = None
    recorded: ArrivalPath | None = None
    own_rate: float | None = None
    if workload is None:
        workload = workloads.azure_conv()
        load = _DEFAULT_LOAD if load is None else load
    if isinstance(workload, ArrivalPath):
        path = workload
        served = _servable(path, server, rejecting=replay)
        workload = served.to_workload(types=types_for(served))
        recorded = served.labelled(workload) if replay else None
    elif replay:
        raise InputError(
            "replay",
            "a Workload",
            "come with an ArrivalPath",
            "Read one with fluidsched.read_trace, or drop `replay`.",
        )
    if replay and load is not None:
        raise InputError("load", load, "be left out with `replay`", "A replayed path keeps its own rate.")
    if load is not None:
        own_rate = workload.total_arrival_rate
        workload = workload.at_load(check_real("load", load, above=0.0), server)

    asked = {} if targets is None else check_targets(targets)
    fluid = solve_fluid(workload, server, objective=objective)
    tables, missing = policy_tables(fluid, overflow_probability=overflow_probability)
    from fluidsched.comparison import compare
    from fluidsched.simulation import simulate

    load_now = float(fluid.load.max())
    trial = _Trial(workload, recorded, load_now, server, horizon, warmup, replications, seed, asked)
    if replay:
        assert path is not None
        runs = simulate(path, server, tables, replications=1, oversize="reject", progress=progress)
    else:
        runs, settled = trial.at(None, tables, progress, kept=trial.kept(len(tables)))
    admission = None if fluid.is_stable else _admission(trial, fluid, tables, asked)
    chosen = choose(runs, asked) if admission is None else admission.table.name
    recommended = next(table for table in tables if table.name == chosen)
    gains = gains_over(runs, recommended.name, load_now, workload.total_arrival_rate)
    paired = runs.replications
    holds, fails, overload_rate = math.nan, math.inf, math.nan
    frame = None
    if curve:
        now = trial.at(None, tables, progress) if replay else (runs, settled)
        paired = now[0].replications
        curve_runs = {load_now: now} | _runs_by_load(trial, tables, load_now, progress)
        by_load = {load: at_load for load, (at_load, _) in curve_runs.items()}
        frame = _load_curve(by_load, fluid.critical_rate)
        gains = [
            gain
            for load, at_load in sorted(by_load.items())
            for gain in gains_over(at_load, recommended.name, load, load * fluid.critical_rate)
        ]
        holds, fails = _reach(trial, curve_runs, tables, recommended, progress)
        highest = max(by_load)
        if highest > 1.0:
            throughput = by_load[highest].measures(recommended.name)["request_throughput"]
            overload_rate = float(throughput.mean())
    reach = Reach(fluid.critical_rate, load_now, holds, fails, overload_rate, asked)
    return Plan(
        workload=workload,
        server=server,
        fluid=fluid,
        tables=tuple(tables),
        missing=missing,
        runs=runs,
        comparison=compare(runs, bound=fluid, baseline="vllm"),
        curve=frame,
        recommendation=Recommendation(
            recommended,
            _reason(runs, recommended.name, fluid, reach, admission),
            tuple(gains),
            reach,
            paired,
        ),
        admission=admission,
        remarks=(*_remarks(fluid, own_rate), *_rejections(runs), *_stuck(runs)),
        settings={
            "seed": seed if curve or not replay else None,
            "replications": paired,
            "horizon_s": horizon if curve or not replay else None,
            "warmup_s": warmup if curve or not replay else None,
            "objective": objective,
            "overflow_probability": overflow_probability,
            "targets_s": asked,
            "replay": replay,
            "load": load,
        },
    )


def types_for(path: ArrivalPath) -> int:
    """Twelve types, or fewer where the path has too few distinct lengths for as many ranges."""
    for types in (12, 3):
        try:
            path.to_workload(types=types)
        except InputError:
            continue
        return types
    return 1


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
    fluid: FluidSolution, *, overflow_probability: float = 0.01
) -> tuple[list[PolicyTable], dict[str, str]]:
    """Compile wait, gated and capped from a solution and put vLLM and Sarathi beside them.

    Of the tables that look at types the one with the lowest certified TTFT is kept, over 1, 3, 12 and the workload's
    own number of types. In overload all are compiled for the workload's own types, a little inside the admitted rates
    (`compile_policy`'s `admitted_share` "auto"): the optimum refuses whole types, which merged ones cannot say.

    Parameters
    ----------
    fluid : FluidSolution
    overflow_probability : float, optional
        δ of the compiled tables.

    Returns
    -------
    tables : list of PolicyTable
        Those that exist, in the order wait, gated, capped, vllm, sarathi.
    missing : dict of str to str
        The reason for each that does not.
    """
    tables: list[PolicyTable] = []
    missing: dict[str, str] = {}
    for kind in (*TYPED_KINDS, "capped"):
        try:
            if not fluid.is_stable:
                tables.append(
                    compile_policy(
                        fluid, kind, overflow_probability=overflow_probability, admitted_share="auto"
                    )
                )
            elif kind in TYPED_KINDS:
                tables.append(_compile_typed(fluid, kind, overflow_probability))
            else:
                tables.append(compile_policy(fluid, kind, overflow_probability=overflow_probability))
        except InfeasibleError as error:
            missing[kind] = str(error)
    tables += [baselines.vllm(), baselines.sarathi()]
    return tables, missing


def _compile_typed(fluid: FluidSolution, kind: str, overflow_probability: float) -> PolicyTable:
    """The table with the lowest certified TTFT over the numbers of types tried; all reasons if none exists."""
    reasons: list[str] = []
    best: PolicyTable | None = None
    server = fluid.server
    limited = np.isfinite(server.kv_capacity) or server.max_batch_size is not None
    own = len(fluid.workload)
    for types in (*(types for types in NUMBERS_OF_TYPES if types < own), own):
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


@dataclass(frozen=True)
class _Trial:
    """How every load of a plan is simulated: one mix, one seed, so that the same requests come faster or slower.

    Of a recorded path, at load `load_now`, the replications are made of random pieces.
    """

    workload: Workload
    recorded: ArrivalPath | None
    load_now: float
    server: Server
    horizon: float
    warmup: float
    replications: int
    seed: int
    targets: Mapping[str, float]

    def paths(self, load: float | None) -> DrawnPaths:
        """The requests that come at a share of the fluid boundary; None: at the workload's own rates."""
        seeds = np.random.SeedSequence(self.seed).spawn(self.replications)
        if self.recorded is None:
            workload = self.workload if load is None else self.workload.at_load(load, self.server)
            return DrawnPaths(len(seeds), lambda r: workload.sample(self.horizon, seeds[r]))
        speed = self._speed(load)
        faster = self.recorded.accelerated(speed)
        return DrawnPaths(len(seeds), lambda r: faster.bootstrapped(self.horizon / speed, seeds[r]))

    def at(
        self,
        load: float | None,
        tables: Sequence[PolicyTable],
        progress: Progress | None = None,
        *,
        kept: int = 0,
    ) -> tuple[SimulationResult, Settled]:
        """The tables at a share of the fluid boundary, with the records of so many replications, and what targets need.

        None: at the workload's own rates.
        """
        from fluidsched.simulation import simulate

        speed = self._speed(load)
        end, start = self.horizon / speed, self.warmup / speed
        settled = Settled(self.targets, start, settled_until(end, start))
        runs = simulate(
            self.paths(load),
            self.server,
            tables,
            horizon=end,
            warmup=start,
            kept_replications=kept,
            on_run=settled.seen,
            progress=progress,
        )
        return runs, settled

    def kept(self, tables: int) -> int:
        """Replications whose records are kept, of so many tables."""
        from fluidsched.simulation.run import kept_within

        requests = self.workload.total_arrival_rate * self.horizon
        return kept_within(KEPT_BYTES, requests, self.replications, tables)

    def _speed(self, load: float | None) -> float:
        """How much faster a recorded path is gone through, and ends."""
        return 1.0 if self.recorded is None or load is None else load / self.load_now


def _admission(
    trial: _Trial, fluid: FluidSolution, tables: Sequence[PolicyTable], targets: Mapping[str, float]
) -> Admission | None:
    """Whom to turn away and what to run for the others; a recorded path is replayed behind the door, once, whole."""
    if trial.recorded is not None:
        return offer(fluid, tables, [trial.recorded], seed=trial.seed, targets=targets)
    return offer(
        fluid,
        tables,
        trial.paths(None),
        seed=trial.seed,
        horizon=trial.horizon,
        warmup=trial.warmup,
        targets=targets,
        kept_replications=trial.kept(3 * len(tables)),
    )


def _runs_by_load(
    trial: _Trial, tables: Sequence[PolicyTable], load_now: float, progress: Progress | None
) -> dict[float, tuple[SimulationResult, Settled]]:
    """Run the tables, their numbers unchanged, at every load of the curve that is not told from the present one."""
    loads = [load for load in CURVE_LOADS if abs(load - load_now) > RESOLUTION]
    found = {}
    for done, load in enumerate(loads):
        if progress is not None:
            progress("load curve", done, len(loads))
        found[load] = trial.at(load, tables)
    if progress is not None:
        progress("load curve", len(loads), len(loads))
    return found


def _load_curve(by_load: Mapping[float, SimulationResult], critical_rate: float) -> pd.DataFrame:
    """The summaries of `CURVE_MEASURES` by load."""
    import pandas as pd

    parts = []
    for load, runs in sorted(by_load.items()):
        part = runs.summary()
        part = part[part["measure"].isin(CURVE_MEASURES)]
        behind = {name: not keeps_up(runs, name) for name in runs.policies}
        rate = load * critical_rate
        parts.append(part.assign(load=load, arrival_rate=rate, behind=part["policy"].map(behind)))
    return pd.concat(parts, ignore_index=True)


def _reach(
    trial: _Trial,
    by_load: Mapping[float, tuple[SimulationResult, Settled]],
    tables: Sequence[PolicyTable],
    table: PolicyTable,
    progress: Progress | None,
) -> tuple[float, float]:
    """Largest load at which a table holds and least at which it fails, from the curve's runs and some more.

    Where it meets the targets at no load of the curve, lower ones are tried; if no table meets them on an almost idle
    server, that is an `InfeasibleError`.
    """
    tried = 0

    def at(load: float) -> bool | None:
        nonlocal tried
        tried += 1
        if progress is not None:
            progress("largest load", tried, tried)
        return judged(trial.at(load, [table]))

    def judged(found: tuple[SimulationResult, Settled]) -> bool | None:
        runs, settled = found
        return judge(runs, table.name, trial.targets, settled)

    known = {load: judged(found) for load, found in by_load.items()}
    if trial.targets and True not in known.values():
        idle = trial.at(IDLE_LOAD, tables)
        _refuse_targets(*idle, trial.targets)
        known[IDLE_LOAD] = judged(idle)
    return bracket(known, at)


def _refuse_targets(runs: SimulationResult, settled: Settled, targets: Mapping[str, float]) -> None:
    """Raise where every policy misses the targets on an almost idle server: no number of servers helps then."""
    if any(judge(runs, name, targets, settled) is not False for name in runs.policies):
        return
    missed = {
        name: {measure: float(np.nanmean(runs.measures(name)[measure])) for measure in targets}
        for name in runs.policies
    }
    nearest = min(missed, key=lambda name: max(missed[name][m] / limit for m, limit in targets.items()))
    shown = " and ".join(
        f"{in_words(m)} {missed[nearest][m]:.3g} s (at most {limit:g} s)" for m, limit in targets.items()
    )
    raise InfeasibleError(
        f"no policy meets the targets even at {IDLE_LOAD:g} of the boundary; the nearest, {nearest}, has {shown}. "
        "More servers of this kind do not help: raise the targets or try a faster server.",
        "slo",
    )


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


def _reason(
    runs: SimulationResult,
    name: str,
    fluid: FluidSolution,
    reach: Reach,
    admission: Admission | None,
) -> str:
    """Why this policy, in sentences."""
    if admission is not None:
        return (
            "Shed load or add servers: under these rates every policy builds a backlog. "
            f"{admission.sentence()}"
        )
    ttft, e2e = (float(np.mean(runs.measures(name)[measure])) for measure in ("mean_ttft", "mean_e2e"))
    if np.isnan(e2e):
        return (
            f"Some runs measured no request, so they do not tell the policies apart: {name} is named as the "
            "simplest to deploy safely. Simulate a longer horizon."
        )
    latency = f"mean TTFT {_seconds(ttft)}, mean end-to-end latency {_seconds(e2e)}"
    choice = "the simplest to deploy safely of those within 5 % of the lowest end-to-end latency"
    targets = reach.targets
    missed = [
        f"{in_words(measure)} {_seconds(value)}, not {limit:g} s"
        for measure, limit in targets.items()
        if (value := float(np.mean(runs.measures(name)[measure]))) > limit
    ]
    if not fluid.is_stable:
        return (
            "Shed load or add servers: under these rates every policy builds a backlog, and no table keeps up with "
            f"what the optimum admits{' and meets the targets' if targets else ''}. Least bad: {name} ({latency}, "
            f"growing for as long as the load lasts), {choice}."
        )
    if not keeps_up(runs, name):
        return f"No policy keeps up, though the mean load fits. Least bad: {name} ({latency}), {choice}."
    if missed:
        return f"No policy meets the targets at this load. Nearest to them: {name} ({', '.join(missed)}; {latency})."
    able = [
        *(["keep up"] if "horizon" in runs.outcome(name).verdicts else []),  # else all were served in the end
        *(["meet the targets"] if targets else []),
    ]
    among = f" among the policies that {' and '.join(able)}" if able else ""
    return (
        f"Recommended table: {name} ({latency}), {choice}{among}."
        f"{_lower_latency(runs, name, e2e)}{_sooner(runs, name, ttft)}{_outgrown(reach)}"
    )


def _outgrown(reach: Reach) -> str:
    """Says so where the load is one that the table does not carry in the long run."""
    if reach.fails > reach.load + 1e-9:
        return ""
    return f" But that is more than one server carries for long: such paths at this load need {reach.in_servers()}."


def _lower_latency(runs: SimulationResult, name: str, e2e: float) -> str:
    """Names the policy with the lowest end-to-end latency where that is another, by more than noise."""
    means = {
        other: float(np.mean(runs.measures(other)["mean_e2e"]))
        for other in runs.policies
        if keeps_up(runs, other)
    }
    first = min(means, key=means.__getitem__)
    difference, low, _ = interval(runs.measures(name)["mean_e2e"] - runs.measures(first)["mean_e2e"])
    if not low > 0.0 or difference < PRACTICAL * e2e:
        return ""
    ttft = float(np.mean(runs.measures(first)["mean_ttft"]))
    return (
        f" Lowest end-to-end latency: {first}, {difference / e2e:.1%} less, with mean TTFT {_seconds(ttft)}."
    )


def _sooner(runs: SimulationResult, recommended: str, ttft: float) -> str:
    """Names the policy with the lowest mean TTFT where the recommended one's is more than half as long again."""
    means = {
        name: float(np.mean(runs.measures(name)["mean_ttft"]))
        for name in runs.policies
        if keeps_up(runs, name)
    }
    first = min(means, key=means.__getitem__)
    if first == recommended or ttft <= 1.5 * means[first]:
        return ""
    e2e = float(np.mean(runs.measures(first)["mean_e2e"]))
    return (
        f" If the first token matters more, take {first}: mean TTFT {means[first]:.3g} s, mean end-to-end latency "
        f"{e2e:.4g} s."
    )
