"""Policies against bounds: nothing simulated is beyond one, and what would be is called so."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.bounds import hindsight_bound, hindsight_optimum, no_wait_floor
from fluidsched.bounds.verdicts import BoundRow
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.policy import Segment, TableType
from fluidsched.simulation.result import Measured

FIXED = fs.Workload(
    [
        fs.RequestType("chat", 3.0, prompt_tokens=60, output_tokens=20),
        fs.RequestType("code", 1.0, prompt_tokens=150, output_tokens=8),
    ],
    name="fixed",
)
RANDOM = fs.Workload(
    [
        fs.RequestType("chat", 2.0, fs.lengths.uniform(20, 90), fs.lengths.geometric(mean=12, maximum=60)),
        fs.RequestType("long", 0.4, 100, fs.lengths.uniform(30, 70)),
    ],
    name="random",
)
MODELS = {
    "paper": fs.IterationTime.paper(d0=0.05, d1=2e-5),
    "affine": fs.IterationTime.affine(0.05, 1e-4, 1e-3, 1e-5, 1e-7),
    "knee": fs.IterationTime.two_piece(0.05, 1e-4, 200, 5e-4, 1e-5),
    "constant": fs.IterationTime.affine(0.1, 0.0, 0.0, 0.0),
}


def tables_for(fluid: fs.FluidSolution) -> list[fs.PolicyTable]:
    """Stock engines, and every compiled kind of which a table exists."""
    tables = [fs.baselines.vllm(), fs.baselines.sarathi(256), fs.baselines.orca(70)]
    for kind in ("capped", "gated", "wait", "nested-wait"):
        horizon = {"horizon": 1000.0} if kind == "nested-wait" else {}
        try:
            tables.append(fs.compile_policy(fluid, kind, **horizon))
        except InfeasibleError:
            continue
    try:
        certain = fs.compile_policy(fluid, "wait", overflow_probability=0.0)
        tables.append(dataclasses.replace(certain, name="certain wait"))
    except InfeasibleError:
        pass
    return tables


def lookahead_for(fluid: fs.FluidSolution) -> list[fs.PolicyTable]:
    """Look-ahead of either kind, compiled where a table exists: below the loads it may be run at."""
    server = fluid.server
    below = fs.solve_fluid(fluid.workload.at_load(min(fluid.load.max(), 0.6), server), server)
    return [
        dataclasses.replace(fs.compile_policy(below, "lookahead", mode=mode), name=f"lookahead {mode}")
        for mode in ("law", "known")
    ]


def judged(
    workload: fs.Workload,
    model: str,
    load: float,
    replications: int,
    requests: int,
    confidence: float,
    tables: Callable[[fs.FluidSolution], list[fs.PolicyTable]] = tables_for,
) -> fs.Comparison:
    server = fs.Server(4000, MODELS[model], name=model)
    offered = workload.at_load(load, server)
    fluid = fs.solve_fluid(offered, server)
    runs = fs.simulate(
        offered,
        server,
        tables(fluid),
        horizon=requests / offered.total_arrival_rate,
        replications=replications,
        seed=11,
        engine="reference" if tables is lookahead_for else "kernel",
    )
    return fs.compare(runs, bound=fluid, confidence=confidence)


def check_grid(
    loads: tuple[float, ...],
    replications: int,
    requests: int,
    confidence: float,
    tables: Callable[[fs.FluidSolution], list[fs.PolicyTable]] = tables_for,
) -> Counter[str]:
    """No violation in the grid; how often each bound was respected with a number."""
    respected: Counter[str] = Counter()
    for workload in (FIXED, RANDOM):
        for model in MODELS:
            for load in loads:
                comparison = judged(workload, model, load, replications, requests, confidence, tables)
                where = (workload.name, model, load)
                assert not comparison.violations, (where, comparison.violations)
                respected += Counter(
                    row.bound if "[" not in row.measure else "of a type"
                    for row in comparison.bounds
                    if row.verdict == "respects"
                )
    return respected


def test_nothing_violates_a_bound() -> None:
    """2 workloads × 4 iteration-time models × loads 0.3 to 1.2 × up to 8 policies, every bound.

    Of the about 600 comparisons in the mean those at a bound err with probability 2e-6 each: below 0.2 % together.
    """
    respected = check_grid((0.3, 0.9, 1.2), replications=6, requests=300, confidence=1 - 4e-6)
    expected = {"fluid optimum", "no-wait floor", "WAIT theorem", "embedded queue", "of a type"}
    assert expected | {"critical rate (Nie-Si-Zhou)", "critical rate (Dong-Cao)"} <= set(respected)
    assert respected["fluid optimum"] > 80
    assert respected["embedded queue"] >= 6
    assert respected["Nested WAIT overflow"] >= 4
    assert respected["Nested WAIT theorem"] >= 6
    assert respected["Nested WAIT entry queue"] >= 2


def test_lookahead_violates_no_bound() -> None:
    """The same grid under look-ahead admission, on the reference engine and so with shorter runs.

    The floor holds for every request; of the 144 comparisons in the mean those at a bound err below 0.03 % together.
    """
    respected = check_grid((0.3, 1.2), 3, 40, 1 - 4e-6, lookahead_for)
    assert respected["fluid optimum"] >= 16
    assert respected["no-wait floor"] == 2 * 2 * 16


@pytest.mark.slow
def test_nothing_violates_a_bound_on_a_finer_grid() -> None:
    """Loads 0.3, 0.4 … 1.2, longer runs: about 2 000 comparisons in the mean; all together err below 0.4 %."""
    loads = tuple(round(0.3 + 0.1 * k, 1) for k in range(10))
    respected = check_grid(loads, replications=12, requests=3000, confidence=1 - 4e-6)
    assert respected["fluid optimum"] > 300
    respected = check_grid(loads, 6, 300, 1 - 4e-6, lookahead_for)
    assert respected["fluid optimum"] >= 100


def nested_rows(simulated: float, judged_for: float) -> dict[tuple[str, str], BoundRow]:
    """12 runs of a Nested WAIT table whose memory and buffers need about 7 300 tokens, by bound and measure."""
    mix = fs.Workload([fs.RequestType("mix", 1.0, 20, fs.lengths.empirical([4, 10], [0.7, 0.3]))])
    servers = [fs.Server(c, fs.IterationTime.affine(0.05, 1e-4, 1e-4, 1e-6)) for c in (simulated, judged_for)]
    offered = mix.at_load(0.5, servers[0])
    segments = (Segment(3, 40), Segment(9, 20, 30.0))
    row = TableType("*", threshold=40, gate=40)
    table = fs.PolicyTable(
        "nested", "nested-wait", (row,), segments=segments, block_iterations=1, freeze=True
    )
    runs = fs.simulate(offered, servers[0], table, horizon=100.0, replications=12, seed=3)
    as_if = dataclasses.replace(runs, server=servers[1])
    return {(r.bound, r.measure): r for r in fs.compare(as_if, fs.solve_fluid(offered, servers[1])).bounds}


def test_nested_wait_overflows_no_more_often_than_promised() -> None:
    """Preemption means overflow: none in the memory the bound asks for; in half of it the bound does not hold."""
    overflow = ("Nested WAIT overflow", "overflow_share")
    enough = nested_rows(8000.0, 8000.0)[overflow]
    assert (enough.verdict, enough.estimate) == ("respects", 0.0)
    assert 0.0 < enough.value < enough.high
    assert nested_rows(4000.0, 4000.0)[overflow].verdict == "not applicable"
    lying = nested_rows(4000.0, 8000.0)[overflow]  # runs on less memory than they are said to have
    assert lying.verdict == "violates"


NESTED_THEOREM = {
    ("Nested WAIT theorem", "mean_ttft"),
    ("Nested WAIT theorem", "mean_e2e"),
    ("Nested WAIT theorem", "effective_throughput"),
    ("Nested WAIT entry queue", "mean_waiting"),
}


def test_nested_wait_is_held_against_its_theorem() -> None:
    """Queue, latencies and throughput of runs without a preemption; each bound says by how much it is not attained."""
    rows = nested_rows(8000.0, 8000.0)
    assert {key for key in rows if key in NESTED_THEOREM} == NESTED_THEOREM
    for key in NESTED_THEOREM:
        row = rows[key]
        assert row.verdict == "respects", row
        beyond = row.ratio if row.direction == "upper" else 1.0 / row.ratio
        assert 0.1 < beyond < 1.0, row  # inside the bound, which is not vacuous
    wait = {row.why for key, row in rows.items() if key[0] in ("WAIT theorem", "embedded queue")}
    assert wait == {"the table is of kind 'nested-wait', not 'wait'"}


def test_nested_theorem_is_not_held_against_runs_with_preemptions() -> None:
    rows = nested_rows(4000.0, 8000.0)
    for key in NESTED_THEOREM:
        assert rows[key].verdict == "not applicable"
        assert "in which nobody is preempted; there were" in rows[key].why
    tight = nested_rows(7300.0, 7300.0)
    assert all("base memory and buffers take" in tight[key].why for key in NESTED_THEOREM)
    runs = overdriven()
    assert runs.server is not None
    other = fs.compare(runs, fs.solve_fluid(FIXED.at_load(3.0, runs.server), runs.server)).bounds
    why = {row.why for row in other if (row.bound, row.measure) in NESTED_THEOREM}
    assert why == {"the table is of kind 'vllm', not 'nested-wait'"}


def overdriven() -> fs.SimulationResult:
    """Runs on a server four times as fast as the one the bounds are asked for, under its name."""
    fast = fs.Server(4000, fs.IterationTime.affine(0.025, 0.0, 0.0, 0.0), name="constant")
    offered = FIXED.at_load(3.0, fs.Server(4000, MODELS["constant"], name="constant"))
    runs = fs.simulate(offered, fast, fs.baselines.vllm(), horizon=100.0, replications=4, seed=1)
    return dataclasses.replace(runs, server=fs.Server(4000, MODELS["constant"], name="constant"))


def test_a_violation_is_called_one() -> None:
    """A run faster than its server could be breaks the optimum in the mean and the floor for single requests."""
    runs = overdriven()
    assert runs.server is not None
    offered = FIXED.at_load(3.0, runs.server)
    comparison = fs.compare(runs, bound=fs.solve_fluid(offered, runs.server))
    broken = {(row.bound, row.measure) for row in comparison.violations}
    assert ("fluid optimum", "request_throughput") in broken
    assert {("no-wait floor", "mean_ttft"), ("no-wait floor", "mean_e2e")} <= broken
    assert ("critical rate (Dong-Cao)", "request_throughput") in broken
    assert "violates" in repr(comparison)


def test_one_replication_cannot_violate_a_mean() -> None:
    runs = overdriven()
    assert runs.server is not None
    offered = FIXED.at_load(3.0, runs.server)
    measured = Measured(runs.tables, runs.server, warmup=runs.warmup)
    measured.add(0, runs.paths[:1], runs.engine_runs[0][:1])
    first = fs.SimulationResult.collect(
        measured,
        runs.paths[:1],
        [runs.engine_runs[0][:1]],
        horizon=runs.horizon,
        seed=None,
        engine=runs.engine,
        workload=runs.workload,
    )
    rows = {
        (row.bound, row.measure): row
        for row in fs.compare(first, fs.solve_fluid(offered, runs.server)).bounds
    }
    optimum = rows["fluid optimum", "request_throughput"]
    assert (optimum.verdict, optimum.ratio > 1.5) == ("not applicable", True)
    assert "one replication" in optimum.why
    assert rows["no-wait floor", "mean_e2e"].verdict == "violates"  # holds for every request: no statistics


def test_floor_without_records_is_the_mean_over_the_lengths() -> None:
    server = fs.Server(4000, MODELS["affine"])
    offered = RANDOM.at_load(0.5, server)
    runs = fs.simulate(offered, server, fs.baselines.vllm(), horizon=200.0, replications=3)
    back = fs.SimulationResult.from_dict(json.loads(json.dumps(runs.to_dict())))
    row = next(r for r in fs.compare(back, fs.solve_fluid(offered, server)).bounds if r.measure == "mean_e2e")
    path = offered.sample(horizon=40_000.0, seed=5)
    floors = no_wait_floor(path, server).e2e_s
    # The mean over a large sample: within 4.5 standard errors, which errs with probability below 1e-5.
    assert abs(row.value - floors.mean()) <= 4.5 * floors.std() / math.sqrt(len(path))
    assert row.verdict == "respects"


def test_tables_of_a_result_from_a_file_are_given() -> None:
    server = fs.Server(4000, MODELS["paper"])
    offered = FIXED.at_load(0.5, server)
    fluid = fs.solve_fluid(offered, server)
    table = fs.compile_policy(fluid, "wait", overflow_probability=0.0)
    runs = fs.simulate(offered, server, table, horizon=100.0, replications=3)
    back = fs.SimulationResult.from_dict(runs.to_dict())
    without = {r.measure: r for r in fs.compare(back, fluid).bounds if r.bound == "WAIT theorem"}
    given = {
        r.measure: r for r in fs.compare(back, fluid, tables=[table]).bounds if r.bound == "WAIT theorem"
    }
    assert "not at hand" in without["mean_ttft"].why
    assert given["peak_kv"].verdict == "respects"
    assert given["mean_ttft[chat]"].why == "not measured without the records of the runs"


def test_bounds_on_who_stays_are_not_held_against_runs_that_requests_leave() -> None:
    """Aborts let short requests through: optimum, critical rates and WAIT's theorem say they do not apply."""
    server = fs.Server(4000, MODELS["paper"], name="paper")
    fluid = fs.solve_fluid(FIXED, server)
    hasty = FIXED.with_types(dataclasses.replace(t, abort_after=1.0, patience=0.5) for t in FIXED.types)
    tables = [fs.compile_policy(fluid, "wait"), fs.baselines.vllm()]
    runs = fs.simulate(hasty, server, tables, horizon=60.0, replications=2, seed=1)
    rows = fs.compare(runs, bound=fluid).bounds
    verdicts = {(row.policy, row.bound): row.verdict for row in rows}
    assert verdicts["wait", "fluid optimum"] == verdicts["wait", "WAIT theorem"] == "not applicable"
    assert verdicts["vllm", "no-wait floor"] == "respects"


def test_hindsight_bounds_the_path_that_was_run() -> None:
    rng = np.random.default_rng(3)
    path = fs.ArrivalPath.from_arrays(
        np.sort(rng.integers(0, 8, 14)).astype(float), rng.integers(1, 6, 14), rng.integers(1, 12, 14)
    )
    server = fs.Server(40, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    table = fs.baselines.orca(12)
    bounds = [hindsight_optimum(path, server), hindsight_bound(path, server, method="combinatorial")]
    comparison = fs.compare(fs.simulate(path, server, table), bound=bounds)
    assert [row.bound for row in comparison.bounds] == [
        "hindsight (integer program)",
        "hindsight (combinatorial)",
    ]
    assert all(row.verdict == "respects" and row.ratio >= 1.0 for row in comparison.bounds)
    assert comparison.bounds[0].ratio <= comparison.bounds[1].ratio
    cut = fs.compare(fs.simulate(path, server, table, horizon=9.0, warmup=0.0), bound=bounds)
    assert all("finished requests" in row.why for row in cut.bounds)


def test_prints_within_100_columns_and_reads_back() -> None:
    comparison = judged(FIXED, "paper", 0.9, 3, 200, 0.95)
    assert max(map(len, repr(comparison).splitlines())) <= 100
    assert "≥ at least" in repr(comparison)
    back = fs.Comparison.from_dict(json.loads(json.dumps(comparison.to_dict())))
    assert repr(back) == repr(comparison)
    frame = comparison.bounds_frame()
    assert list(frame.columns[:3]) == ["policy", "bound", "measure"]
    assert frame.groupby("bound").policy.nunique().min() == len(comparison.policies)
    data = comparison.to_dict()
    data["bounds"][0]["verdict"] = "perhaps"
    with pytest.raises(InputError, match=r"bounds\[0\].verdict"):
        fs.Comparison.from_dict(data)


def test_a_varying_rate_is_not_held_against_its_mean() -> None:
    """Regression: the second half of a rising profile brings more than the mean rate, and no policy violates that."""
    rising = fs.arrivals.time_varying([0.5, 1.5], step=50.0)
    workload = fs.Workload([fs.RequestType("a", 4.0, 10, 5)]).with_arrivals(rising)
    server = fs.Server(10_000, fs.IterationTime.affine(0.01, 1e-5, 1e-5, 1e-7))
    runs = fs.simulate(
        workload, server, fs.baselines.vllm(), horizon=100.0, warmup=50.0, replications=8, seed=1
    )
    frame = fs.compare(runs, bound=fs.solve_fluid(workload, server)).bounds_frame()
    row = frame[frame["bound"] == "fluid optimum"].iloc[0]
    assert row["estimate"] > 5.0
    assert row["verdict"] == "not applicable"
    assert "varies" in row["why"]


def test_what_is_no_bound_is_refused() -> None:
    server = fs.Server(4000, MODELS["paper"])
    runs = fs.simulate(FIXED.at_load(0.3, server), server, fs.baselines.vllm(), horizon=20.0, replications=2)
    with pytest.raises(InputError, match="bound"):
        fs.compare(runs, bound=[3.0])  # type: ignore[list-item]
    other = fs.Server(4001, MODELS["paper"])
    with pytest.raises(InputError, match="of the server that was simulated"):
        fs.compare(runs, bound=fs.solve_fluid(FIXED, other))
    with pytest.raises(InputError, match="confidence"):
        fs.compare(runs, confidence=1.0)
