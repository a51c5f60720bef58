"""The multi-period program: witnesses, closed forms, laws, certificate, and what it says when it cannot."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fluid_cases import logarithmic, program, servers, workloads
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.fluid import TransientSolution, demand_rates, sinusoidal_rates

INSTANT = fs.IterationTime.affine(1e-9, 1e-3, 0.0, 0.0)
"""A millisecond a prompt token and next to nothing an iteration: with p tokens 1000/p req/s are served."""


def one_type(prompt_tokens: int = 250) -> fs.Workload:
    return fs.Workload([fs.RequestType("only", 1.0, prompt_tokens, 1)])


def two_types(rates: tuple[float, float] = (1.0, 1.0)) -> fs.Workload:
    return fs.Workload([fs.RequestType("a", rates[0], 250, 1), fs.RequestType("b", rates[1], 500, 1)])


def two_piece_server(kv_capacity: float = 60_000) -> fs.Server:
    iteration_time = fs.IterationTime.two_piece(0.01, 2e-5, 256, 4e-5, 1e-7, 1e-9)
    return fs.Server(kv_capacity, iteration_time, max_batch_size=64, token_budget=2048)


# Witness: the program written down again in cvxpy.


def by_cvxpy(workload: fs.Workload, server: fs.Server, demand: NDArray[np.float64], **asked: Any) -> float:
    """Optimal cost of the multi-period program, from rows written down a second time."""
    import cvxpy as cp

    h, reward = asked["step"], asked["reward"]
    _, rows, right = program(workload, server, reward)
    size = np.abs(rows).max(axis=1)
    periods, types = demand.shape
    a = cp.Variable((periods, types), nonneg=True)
    q = cp.Variable((periods + 1, types), nonneg=True)
    u, n = cp.Variable(periods, nonneg=True), cp.Variable(periods)
    constraints = [q[0] == asked["initial_backlog"]]
    for t in range(periods):
        constraints += [
            q[t + 1] == q[t] + h * (demand[t] - a[t]),
            (rows[:, :-1] @ a[t] + rows[:, -1] * u[t] - right * n[t]) / size <= 0,
            u[t] >= n[t] / asked["max_iteration_time"],
            n[t] >= asked["min_replicas"],
            n[t] <= asked["replicas"],
        ]
        before = asked["initial_replicas"] if t == 0 else n[t - 1]
        constraints += [n[t] - before <= h * asked["ramp_up"], before - n[t] <= h * asked["ramp_down"]]
    waiting = h * cp.sum((q[1:] + q[:-1]) / 2 @ asked["holding_cost"])
    cost = waiting - h * cp.sum(a @ reward) + h * asked["replica_cost"] * cp.sum(n)
    problem = cp.Problem(cp.Minimize(cost), constraints)
    problem.solve(solver=cp.HIGHS)
    return float(problem.value)


@pytest.mark.parametrize("seed", range(6))
def test_cvxpy_agrees(seed: int) -> None:
    """Everything at once: ramps, replicas with a cost, rewards, backlog at the start, two pieces, all limits."""
    rng = np.random.default_rng(seed)
    types = [
        fs.RequestType(f"type {j}", 1.0, int(rng.integers(20, 3000)), int(rng.integers(1, 300)))
        for j in range(3)
    ]
    workload, server = fs.Workload(types), two_piece_server()
    rate = rng.uniform(0, 2, (6, 3)) / fs.FluidProgram(workload, server).model.load(np.eye(3)).max(axis=-1)
    asked: dict[str, Any] = {
        "step": 30.0,
        "holding_cost": rng.uniform(0.1, 1, 3),
        "reward": rng.uniform(0, 100, 3),
        "initial_backlog": rng.uniform(0, 50, 3),
        "replicas": 3.0,
        "min_replicas": 0.5,
        "replica_cost": 10.0 ** rng.uniform(-1, 1),
        "ramp_up": 0.02,
        "ramp_down": 0.01,
        "initial_replicas": 1.0,
        "max_iteration_time": 0.03,
    }
    solution = fs.solve_transient(workload, server, rate, **asked)
    assert solution.certificate.ok, solution.certificate
    expected = by_cvxpy(workload, server, rate, **asked)
    assert solution.cost == pytest.approx(expected, rel=1e-7, abs=1e-7 * asked["replica_cost"])


@settings(max_examples=60)
@given(
    workloads(max_types=3, rates=logarithmic(1e-6, 1e6)),
    servers(),
    st.lists(st.floats(0.0, 3.0), min_size=1, max_size=6),
    logarithmic(1.0, 3600.0),
    st.booleans(),
)
def test_certificate_holds_at_any_scale(
    workload: fs.Workload, server: fs.Server, profile: list[float], step: float, chosen: bool
) -> None:
    """Rates 1e-6 … 1e6 and lengths 1 … 8000 in one program: optimal to 1e-9, or it says imprecise."""
    total = workload.total_arrival_rate
    solution = fs.solve_transient(
        workload,
        server,
        np.array(profile) * total,
        step=step,
        replicas=2.0,
        min_replicas=0.5 if chosen else None,
        replica_cost=1.0,
        ramp_up=0.1,
    )
    assert solution.certificate.ok, solution.certificate
    assert solution.lower_bound <= solution.cost + 1e-9 * abs(solution.cost) + 1e-9


# Closed forms.


def test_fluid_queue() -> None:
    """One type at 4 req/s against 7, 0, 5, 9, 0, 0: the reflected walk, its integral, its prices."""
    demand = np.array([7.0, 0.0, 5.0, 9.0, 0.0, 0.0])
    solution = fs.solve_transient(one_type(), fs.Server(math.inf, INSTANT), demand, step=10.0)
    backlog = np.zeros(7)
    for t, rate in enumerate(demand):
        backlog[t + 1] = max(backlog[t] + 10 * (rate - 4), 0.0)
    np.testing.assert_allclose(solution.backlog[:, 0], [0, 30, 0, 10, 60, 20, 0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(solution.backlog[:, 0], backlog, rtol=1e-9, atol=1e-9)
    assert solution.cost == pytest.approx(10 * (15 + 15 + 5 + 35 + 40 + 10))
    assert solution.mean_wait[0] == pytest.approx(1200 / 210)
    assert solution.peak_backlog == pytest.approx(60.0)
    # One more arrival delays everything behind it to the end of its busy period: seconds until then.
    np.testing.assert_allclose(solution.arrival_price[:, 0], [10, 0, 30, 20, 10, 0], atol=1e-9)


def test_shorter_work_first() -> None:
    """Two types with equal holding cost: the one with less work waits not at all, the other takes the rest."""
    demand = [[4.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    solution = fs.solve_transient(two_types(), fs.Server(math.inf, INSTANT), demand, step=10.0)
    np.testing.assert_allclose(solution.backlog, [[0, 0], [0, 20], [0, 0], [0, 0]], atol=1e-9)
    dear = fs.solve_transient(
        two_types(), fs.Server(math.inf, INSTANT), demand, step=10.0, holding_cost=[1.0, 2.5]
    )
    np.testing.assert_allclose(dear.backlog, [[0, 0], [40, 0], [0, 0], [0, 0]], atol=1e-9)


@settings(max_examples=40)
@given(workloads(max_types=4), servers(), st.floats(0.2, 5.0), st.integers(1, 5))
def test_constant_demand_is_the_one_period_optimum(
    workload: fs.Workload, server: fs.Server, load: float, periods: int
) -> None:
    """Rewards alone earn T·h times the optimum; waiting alone is T·h/2 times what it must leave waiting."""
    if workload.total_arrival_rate == 0.0 or not math.isfinite(
        fs.solve_fluid(workload, server).critical_rate
    ):
        return
    workload = workload.at_load(load, server)
    demand = np.tile(workload.arrival_rate, (periods, 1))
    fluid = fs.solve_fluid(workload, server, "output_tokens")
    earning = fs.solve_transient(
        workload, server, demand, step=60.0, holding_cost=0.0, reward="output_tokens"
    )
    assert -earning.cost == pytest.approx(60.0 * periods * fluid.objective_value, rel=1e-9)
    waiting = fs.solve_transient(
        workload, server, demand, step=60.0, holding_cost=workload.mean_output_tokens
    )
    offered = float(workload.mean_output_tokens @ workload.arrival_rate)
    refused = max(offered - fluid.objective_value, 0.0)
    horizon = 60.0 * periods
    assert waiting.cost == pytest.approx(refused * horizon**2 / 2, rel=1e-8, abs=1e-8 * offered * horizon)


def test_chunks_and_iteration_times_are_those_of_the_program() -> None:
    """With constant demand the options of `solve_fluid` mean the same in every period."""
    workload = two_types((40.0, 20.0))
    server = two_piece_server(600)
    options: dict[str, Any] = {"chunk_tokens": 64, "max_iteration_time": 0.03}
    fluid = fs.solve_fluid(workload, server, "output_tokens", **options)
    demand = np.tile(workload.arrival_rate, (3, 1))
    plan = fs.solve_transient(
        workload, server, demand, step=9.0, holding_cost=0.0, reward="output_tokens", **options
    )
    assert -plan.cost == pytest.approx(27.0 * fluid.objective_value, rel=1e-9)
    assert np.all(plan.iteration_time <= 0.03 * (1 + 1e-9))
    whole = fs.solve_fluid(workload, server, "output_tokens")
    assert whole.objective_value > fluid.objective_value


def test_ramps_reach_the_peak_in_time() -> None:
    """Nobody may wait and replicas cost: N is the smallest ramp-limited curve above the need."""
    demand = np.array([1, 1, 1, 1, 9, 1, 1, 1, 5, 1.0])
    rise, fall = 2.0, 1.0
    solution = fs.solve_transient(
        one_type(),
        fs.Server(math.inf, INSTANT),
        4 * demand,
        step=10.0,
        holding_cost=1e6,
        replicas=20.0,
        min_replicas=0.0,
        replica_cost=1.0,
        ramp_up=rise / 10,
        ramp_down=fall / 10,
    )
    lag = np.arange(10)[:, None] - np.arange(10)
    need = np.maximum(demand[:, None] - np.where(lag > 0, lag * rise, -lag * fall), 0).max(axis=0)
    np.testing.assert_allclose(solution.replicas, need, rtol=1e-9)
    assert solution.peak_backlog == pytest.approx(0.0, abs=1e-9)
    assert solution.certificate.ok


def test_dear_replicas_let_requests_wait() -> None:
    """A replica pays when the waiting it saves costs more: one cost below, one above what it saves."""
    server = fs.Server(math.inf, INSTANT)

    def replicas(cost: float) -> float:
        return float(
            fs.solve_transient(
                one_type(),
                server,
                [8.0],
                step=10.0,
                replicas=2.0,
                min_replicas=1.0,
                replica_cost=cost,
            ).replicas[0]
        )

    # A second replica for 10 s serves 40 more requests, each of which waits 5 s on average.
    assert replicas(0.99 * 40 * 5 / 10) == pytest.approx(2.0)
    assert replicas(1.01 * 40 * 5 / 10) == pytest.approx(1.0)


# Laws.

demands = st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=1, max_size=6).map(np.array)


def solve(demand: NDArray[np.float64], **asked: Any) -> TransientSolution:
    asked = {"step": 10.0, "holding_cost": [1.0, 3.0], "reward": [2.0, 0.0]} | asked
    return fs.solve_transient(two_types(), two_piece_server(2_000), demand, **asked)


@settings(max_examples=30)
@given(demands, st.floats(1.0, 3.0))
def test_more_capacity_never_costs_more(demand: NDArray[np.float64], factor: float) -> None:
    """More replicas, or more memory in each, never raise the cost."""
    cost = solve(demand).cost
    assert solve(demand, replicas=factor).cost <= cost + 1e-7 * (1 + abs(cost))
    roomy = two_piece_server(2_000 * factor)
    bigger = fs.solve_transient(
        two_types(), roomy, demand, step=10.0, holding_cost=[1.0, 3.0], reward=[2.0, 0.0]
    )
    assert bigger.cost <= cost + 1e-7 * (1 + abs(cost))


@settings(max_examples=20)
@given(demands, st.integers(1, 4))
def test_time_shift(demand: NDArray[np.float64], shift: int) -> None:
    """Quiet periods in front change nothing but the clock."""
    later = np.vstack([np.zeros((shift, 2)), demand])
    now, then = solve(demand), solve(later)
    assert then.cost == pytest.approx(now.cost, rel=1e-9, abs=1e-9)
    assert np.all(then.backlog[: shift + 1] == 0.0)


@settings(max_examples=20)
@given(demands, logarithmic(1e-3, 1e3))
def test_scale(demand: NDArray[np.float64], scale: float) -> None:
    """Demand and replicas times s: cost and backlog times s; all costs times s: cost times s, same backlog."""
    once = solve(demand)
    larger = solve(scale * demand, replicas=scale)
    assert larger.cost == pytest.approx(scale * once.cost, rel=1e-8, abs=1e-8 * scale)
    dearer = solve(demand, holding_cost=[scale, 3 * scale], reward=[2 * scale, 0.0])
    assert dearer.cost == pytest.approx(scale * once.cost, rel=1e-8, abs=1e-8 * scale)


@settings(max_examples=20)
@given(demands)
def test_finer_periods_never_cost_more(demand: NDArray[np.float64]) -> None:
    """Halving the periods with the same demand leaves every plan possible, and prices it alike."""
    coarse, fine = solve(demand), solve(np.repeat(demand, 2, axis=0), step=5.0)
    assert fine.cost <= coarse.cost + 1e-8 * (1 + abs(coarse.cost))
    assert fine.certificate.ok


@settings(max_examples=20)
@given(demands)
def test_requests_are_conserved(demand: NDArray[np.float64]) -> None:
    """What arrives is admitted or waits; nobody is admitted before arriving."""
    solution = solve(demand, initial_backlog=[3.0, 0.0])
    entered = np.array([3.0, 0.0]) + 10.0 * demand.sum(axis=0)
    left = 10.0 * solution.admitted_rate.sum(axis=0) + solution.backlog[-1]
    np.testing.assert_allclose(left, entered, rtol=1e-12, atol=1e-12)
    assert solution.backlog.min() >= 0.0
    assert solution.admitted_rate.min() >= 0.0


@settings(max_examples=20)
@given(demands, st.integers(0, 5), st.integers(0, 1))
def test_prices_are_slopes(demand: NDArray[np.float64], period: int, member: int) -> None:
    """The cost after one more arrival rises at least by its price (the cost is convex in the demand)."""
    period = min(period, len(demand) - 1)
    solution = solve(demand)
    more = demand.copy()
    more[period, member] += 0.1
    rise = solve(more).cost - solution.cost
    assert rise >= solution.arrival_price[period, member] - 1e-6


# The certificate.


def loaded() -> TransientSolution:
    """A peak that ramps and limits leave partly waiting."""
    return fs.solve_transient(
        two_types(),
        two_piece_server(2_000),
        [[50.0, 20.0], [90.0, 10.0], [20.0, 5.0], [5.0, 5.0]],
        step=10.0,
        replicas=3.0,
        min_replicas=0.5,
        replica_cost=2.0,
        ramp_up=0.05,
        ramp_down=0.05,
        initial_replicas=0.5,
    )


@pytest.mark.parametrize(
    ("field", "condition"),
    [
        ("admitted_rate", "primal_feasibility"),
        ("backlog", "primal_feasibility"),
        ("replicas", "primal_feasibility"),
        ("iteration_rate", "primal_feasibility"),
        ("row_dual", "gap"),
        ("ramp_dual", "gap"),
    ],
)
def test_certificate_sees_tampering(field: str, condition: str) -> None:
    """One number off by a part in a thousand and the certificate fails, on the condition that broke."""
    solution = loaded()
    assert solution.certificate.ok
    assert np.any(solution.ramp_dual != 0.0)
    wrong = np.array(getattr(solution, field)) * 1.001
    tampered = dataclasses.replace(solution, **{field: wrong})
    assert getattr(tampered.certificate, condition) > 1e-6
    assert tampered.status == "imprecise"
    assert "imprecise" in repr(tampered)


def test_any_multipliers_bound_the_cost() -> None:
    """Weak duality: made-up prices of time and memory never promise more than the optimum costs."""
    solution = loaded()
    model = solution.problem.model
    rng = np.random.default_rng(5)
    for _ in range(50):
        dual = rng.exponential(size=solution.row_dual.shape) * solution.row_dual.max(axis=0)
        # More weight on time until one more iteration per second is worth nothing or more.
        need = -np.minimum(dual @ model.rate_coefficient, 0.0)
        dual[:, 0] += need / model.base[0]
        made_up = dataclasses.replace(
            solution, row_dual=dual, ramp_dual=solution.ramp_dual * rng.exponential(size=4)
        )
        assert made_up.lower_bound <= solution.cost * (1 + 1e-9)


# Demand.


def test_path_is_counted_by_type_and_period() -> None:
    """Counts over the step; an arrival on an edge opens the next period; requests are conserved."""
    path = fs.ArrivalPath.from_arrays(
        [0.0, 1.0, 9.9, 10.0, 30.0],
        [250, 500, 250, 250, 500],
        [1] * 5,
        [0, 1, 0, 0, 1],
        type_names=("a", "b"),
    )
    rates = demand_rates(path, two_types(), 10.0)
    np.testing.assert_allclose(rates * 10, [[2, 1], [1, 0], [0, 0], [0, 1]])
    reordered = fs.Workload(two_types().types[::-1])
    unlabelled = fs.ArrivalPath.from_arrays(path.arrival_s, path.prompt_tokens, path.output_tokens)
    with pytest.raises(InputError):
        demand_rates(unlabelled, reordered, 10.0)


def test_horizon_of_a_drawn_path_counts() -> None:
    """A path drawn for 60 s covers six periods of 10 s, however late its last request comes."""
    path = two_types().sample(60.0, seed=3)
    rates = demand_rates(path, two_types(), 10.0)
    assert rates.shape == (6, 2)
    assert rates.sum() * 10 == pytest.approx(len(path))


def test_sinusoidal_profile() -> None:
    """Averages over the periods are exact: the mean is kept, and finer periods average to coarser ones."""
    fine = sinusoidal_rates(4.0, amplitude=0.7, periods=240, peak=0.6)
    assert fine.mean() == pytest.approx(4.0)
    assert fine.argmax() in (143, 144)
    np.testing.assert_allclose(
        fine.reshape(24, 10).mean(axis=1), sinusoidal_rates(4.0, amplitude=0.7, periods=24, peak=0.6)
    )


@pytest.mark.data
def test_azure_hour(data_root: Path) -> None:
    """The trace's 5-minute rates: five periods above load 1, and all is served by the end of the hour."""
    path = fs.read_trace(data_root / "traces" / "AzureLLMInferenceTrace_conv.csv")
    workload = path.to_workload(types=12)
    server = fs.catalog.server("a100-80gb", "llama-2-7b", 1)
    solution = fs.solve_transient(workload, server, path, step=300.0)
    rates = [4.8, 4.7, 5.2, 5.2, 6.3, 7.5, 7.4, 6.1, 5.7, 4.8, 4.3, 2.6]
    np.testing.assert_allclose(solution.problem.arrival_rate.sum(axis=1), rates, atol=0.06)
    assert solution.certificate.ok
    assert solution.backlog[-1].sum() == pytest.approx(0.0, abs=1e-6)
    assert solution.peak_backlog > 100.0
    more = fs.solve_transient(workload, server, path, step=300.0, replicas=1.2)
    assert more.peak_backlog < 1e-6


def test_a_day_of_five_minute_periods() -> None:
    """A made-up sinusoidal day, 288 periods, with replicas that follow it slowly."""
    workload = fs.workloads.azure_conv()
    server = fs.catalog.server("a100-80gb", "llama-2-7b", 1)
    day = sinusoidal_rates(60.0, amplitude=0.5, periods=288)
    solution = fs.solve_transient(
        workload,
        server,
        day,
        step=300.0,
        holding_cost=0.01,
        replicas=30.0,
        min_replicas=1.0,
        replica_cost=1.0,
        ramp_up=1 / 1800,
        ramp_down=1 / 1800,
    )
    assert solution.certificate.ok, solution.certificate
    assert solution.replicas.max() - solution.replicas.min() > 5.0
    assert np.abs(np.diff(solution.replicas)).max() <= 300 / 1800 * (1 + 1e-9)


# How it is shown.


def test_frame_and_repr() -> None:
    """A row for each period and type; the text names what matters and its units."""
    solution = loaded()
    frame = solution.to_frame()
    assert len(frame) == 8
    assert frame["type"].tolist() == ["a", "b"] * 4
    np.testing.assert_allclose(frame["backlog"].to_numpy().reshape(4, 2), solution.backlog[1:])
    text = repr(solution)
    for word in ("4 of 10 s", "replicas", "left waiting", "mean wait"):
        assert word in text
    assert "<table>" in solution._repr_html_()


def test_plot() -> None:
    """Three rates over the periods and the backlog at their ends, with units."""
    from matplotlib import pyplot

    solution = loaded()
    axes = solution.plot()
    labels = {patch.get_label(): patch.get_data() for patch in axes.patches}
    assert list(labels) == ["offered", "admitted", "possible"]
    np.testing.assert_allclose(labels["offered"].values, [70, 100, 25, 10])
    np.testing.assert_allclose(labels["offered"].edges, solution.time / 60)
    assert axes.get_xlabel() == "time (min)"
    assert axes.get_ylabel() == "rate (req/s)"
    figure = axes.figure
    assert [other.get_ylabel() for other in figure.axes[1:]] == ["backlog, shaded (requests)"]
    figure.canvas.draw()
    pyplot.close(figure)


# What it says when it cannot.


def test_contradictory_ramps_are_named() -> None:
    """The period, the ramp at fault and the ramp that would do."""
    with pytest.raises(InfeasibleError, match=r"ramp_up to 0\.4 ") as caught:
        solve(np.ones((3, 2)), replicas=[1, 1, 5], min_replicas=[1, 1, 5], ramp_up=0.1)
    assert caught.value.reason == "ramp_up"
    assert "period 2" in str(caught.value)
    with pytest.raises(InfeasibleError, match=r"ramp_down to 0\.6 "):
        solve(np.ones((3, 2)), replicas=2.0, initial_replicas=8.0, ramp_down=0.1)
    # The suggestions work.
    solve(np.ones((3, 2)), replicas=[1, 1, 5], min_replicas=[1, 1, 5], ramp_up=0.4)
    solve(np.ones((3, 2)), replicas=2.0, initial_replicas=8.0, ramp_down=0.6)


@pytest.mark.parametrize(
    ("asked", "argument"),
    [
        ({"step": 0.0}, "step"),
        ({"demand": [[1.0, -1.0]]}, "demand of type 'b' in period 0"),
        ({"demand": [[1.0, math.nan]]}, "demand of type 'b' in period 0"),
        ({"demand": [[1.0, 1.0, 1.0]]}, "demand"),
        ({"demand": []}, "demand"),
        ({"demand": "many"}, "demand"),
        ({"holding_cost": [1.0]}, "holding_cost"),
        ({"holding_cost": -1.0}, "holding_cost"),
        ({"initial_backlog": [1.0, math.inf]}, "initial_backlog of type 'b'"),
        ({"replicas": 0.0}, "replicas"),
        ({"replicas": [1.0, 2.0]}, "replicas"),
        ({"min_replicas": 2.0}, "min_replicas in period 0"),
        ({"ramp_up": -1.0}, "ramp_up"),
        ({"replica_cost": math.nan}, "replica_cost"),
        ({"reward": "revenue"}, "objective"),
        ({"max_iteration_time": -0.001}, "max_iteration_time"),
    ],
)
def test_wrong_input_is_named(asked: dict[str, Any], argument: str) -> None:
    """The argument at fault, with the type or period where there is one."""
    asked = {"demand": [[1.0, 1.0]], "step": 10.0} | asked
    demand = asked.pop("demand")
    with pytest.raises(InputError) as caught:
        fs.solve_transient(two_types(), two_piece_server(), demand, **asked)
    assert caught.value.argument == argument
