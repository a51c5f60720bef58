"""Other ways to the same answer: closed forms, scipy, cvxpy with two solvers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
from fluid_cases import iteration_times, logarithmic, program, servers, workloads
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.fluid.closed_forms import boundary_rate, equilibrium, knapsack, resource_load

ONE_PIECE = iteration_times(max_pieces=1)


@settings(max_examples=60)
@given(workloads(), servers(), st.sampled_from(["requests", "output_tokens", "total_tokens"]))
def test_scipy_agrees(workload: fs.Workload, server: fs.Server, objective: str) -> None:
    """scipy on the program written down a second time: same optimum, and our point is feasible in it."""
    fluid = fs.solve_fluid(workload, server, objective)
    cost, rows, right = program(workload, server, fluid.reward)
    bounds = [(0, rate) for rate in workload.arrival_rate.tolist()] + [(0, None)]
    witness = scipy.optimize.linprog(-cost, rows, right, bounds=bounds, method="highs")
    assert witness.status == 0
    assert fluid.certificate.ok, fluid.certificate
    assert fluid.objective_value == pytest.approx(-witness.fun, rel=1e-6, abs=1e-9)
    assert fluid.upper_bound == pytest.approx(fluid.objective_value, rel=1e-9, abs=1e-15)
    point = np.append(fluid.admitted_rate, fluid.iteration_rate)
    scale = np.abs(rows) @ np.abs(point) + right
    assert np.all(rows @ point <= right + 1e-9 * scale)


@pytest.mark.parametrize("seed", range(5))
def test_cvxpy_agrees(seed: int) -> None:
    """cvxpy with HiGHS and, independently, with the interior-point solver Clarabel, in overload."""
    import cvxpy as cp

    rng = np.random.default_rng(seed)
    types = [
        fs.RequestType(f"type {j}", rng.uniform(1, 9), int(rng.integers(1, 4000)), int(rng.integers(1, 900)))
        for j in range(12)
    ]
    workload = fs.Workload(types)
    entry = fs.catalog.entries()[30 * seed]
    server = fs.Server(entry.kv_capacity_tokens, entry.iteration_time(), 64 * (seed + 1), 256 * (seed + 1))
    fluid = fs.solve_fluid(workload, server, rng.uniform(0.1, 1, 12) * workload.mean_output_tokens)
    cost, rows, right = program(workload, server, fluid.reward)
    unit = np.append(fluid.model.rate_alone, 1.0 / server.iteration_time.empty)
    scaled = rows * unit
    size = np.abs(scaled).max(axis=1)
    x = cp.Variable(len(cost), nonneg=True)
    constraints = [
        (scaled / size[:, None]) @ x <= right / size,
        x[:-1] <= workload.arrival_rate / unit[:-1],
    ]
    problem = cp.Problem(cp.Maximize((cost * unit) @ x), constraints)
    for solver, precision in ((cp.HIGHS, 1e-7), (cp.CLARABEL, 1e-6)):
        problem.solve(solver=solver)
        assert problem.value == pytest.approx(fluid.objective_value, rel=precision)
    assert fluid.certificate.ok
    # The independent solver's multipliers, unscaled, give our bid prices (two equal pieces may share theirs).
    multipliers = constraints[0].dual_value / size
    np.testing.assert_allclose(rows[:, :-1].T @ multipliers, fluid.bid_price, rtol=1e-4)


@settings(max_examples=60)
@given(workloads(), iteration_times(), logarithmic(1e3, 1e7))
def test_underload_closed_form(workload: fs.Workload, time: fs.IterationTime, capacity: float) -> None:
    """Where all demand fits, the solution is the equilibrium: same iteration time, same resident KV."""
    server = fs.Server(math.floor(capacity), time)
    assume(math.isfinite(fs.solve_fluid(workload, server).critical_rate))
    workload = workload.at_load(0.9, server)
    fluid = fs.solve_fluid(workload, server)
    assert time.coefficients is not None
    busy = fs.fluid.busy_work(workload, time) @ workload.arrival_rate
    closed = equilibrium(
        time.coefficients[:, 0], busy, workload.arrival_rate @ workload.kv_work, server.kv_capacity
    )
    assert fluid.is_stable
    assert bool(closed.is_feasible)
    np.testing.assert_array_equal(fluid.admitted_rate, workload.arrival_rate)
    assert fluid.iteration_time == pytest.approx(float(closed.iteration_time), rel=1e-9)
    assert fluid.resident_kv == pytest.approx(float(closed.resident_kv), rel=1e-9)


@settings(max_examples=60)
@given(workloads(), servers())
def test_feasible_exactly_up_to_load_one(workload: fs.Workload, server: fs.Server) -> None:
    """The closed form of the load is the boundary: a hair below all is admitted, a hair above not all."""
    assume(math.isfinite(fs.solve_fluid(workload, server).critical_rate))
    below, above = (workload.at_load(x, server) for x in (1 - 1e-6, 1 + 1e-6))
    assert fs.solve_fluid(below, server).admitted_fraction.min() == 1.0
    over = fs.solve_fluid(above, server)
    assert not over.is_stable
    assert over.objective_value < above.total_arrival_rate
    assert over.binding_constraints


@settings(max_examples=60)
@given(workloads(), ONE_PIECE, logarithmic(1e3, 1e6), logarithmic(0.5, 20), st.booleans())
def test_overload_is_a_fractional_knapsack(
    workload: fs.Workload, time: fs.IterationTime, capacity: float, load: float, tokens: bool
) -> None:
    """One piece, time and memory only: types in decreasing r/κ, one rationed, the rest refused."""
    server = fs.Server(math.floor(capacity), time)
    assume(math.isfinite(fs.solve_fluid(workload, server).critical_rate))
    workload = workload.at_load(load, server)
    fluid = fs.solve_fluid(workload, server, "output_tokens" if tokens else "requests")
    assert time.coefficients is not None
    base = time.coefficients[0, 0]
    kappa = base * workload.kv_work + server.kv_capacity * fs.fluid.busy_work(workload, time)[0]
    greedy = knapsack(fluid.reward, kappa, workload.arrival_rate, server.kv_capacity)
    assert fluid.objective_value == pytest.approx(float(fluid.reward @ greedy), rel=1e-9)
    density = fluid.reward / kappa
    if (
        len(np.unique(density)) == len(density)
        and np.diff(np.sort(density)).min(initial=1) > 1e-9 * density.max()
    ):
        np.testing.assert_allclose(fluid.admitted_rate, greedy, rtol=1e-7, atol=1e-9)
        refused = [word for word, rate in zip(fluid.decision, workload.arrival_rate, strict=True) if rate > 0]
        assert refused.count("rationed") <= 1


@settings(max_examples=60)
@given(workloads(), servers())
@example(
    fs.Workload([fs.RequestType("a", 1.0, 10, 10)]),
    fs.Server(math.inf, fs.IterationTime.pieces([(0.01, 0, 1e-4, 1e-6, 0), (-0.05, 0, 1e-3, 1e-6, 0)])),
)
def test_load_against_the_program_along_the_ray(workload: fs.Workload, server: fs.Server) -> None:
    """Every resource's load is 1/x of the two-variable program max x over (x, u), solved by scipy."""
    assume(workload.total_arrival_rate > 0)
    fluid = fs.solve_fluid(workload, server)
    _, rows, right = program(workload, server, fluid.reward)
    use, by_rate = rows[:, :-1] @ workload.arrival_rate, rows[:, -1]
    pieces = int((right > 0).sum())
    speed = 1.0 / by_rate[:pieces].max()
    for position, resource in enumerate(fluid.resources):
        chosen = [*range(pieces)] + ([pieces + position - 1] if position else [])
        if fluid.load[position] == 0.0:  # a mix that uses nothing can grow without bound
            assert not use[chosen].any()
            continue
        # In units of the answer, so that the witness's absolute tolerances are relative ones.
        x = 1.0 / fluid.load[position]
        matrix = np.column_stack([use[chosen] * x, by_rate[chosen] * speed])
        size = np.abs(matrix).max(axis=1, keepdims=True)
        size[size == 0.0] = 1.0  # a piece that no request of the mix works on and without a base
        witness = scipy.optimize.linprog(
            [-1.0, 0.0],
            matrix / size,
            right[chosen] / size[:, 0],
            bounds=[(0, None), (0, None)],
            method="highs",
        )
        assert witness.status == 0, resource
        assert -witness.fun == pytest.approx(1.0, rel=1e-5), resource


def test_closed_forms_are_vectorised() -> None:
    """A million (rate, capacity) points at once, equal to single calls."""
    rng = np.random.default_rng(3)
    base, work, kv_work = np.array([0.01, -0.002]), np.array([1e-3, 2e-3]), 5e4
    rate, capacity = rng.uniform(1, 1e3, 1_000_000), rng.uniform(1e4, 1e6, 1_000_000)
    answer = equilibrium(base, rate[:, None] * work, rate * kv_work, capacity)
    load = resource_load(base, rate[:, None] * work, rate * kv_work / capacity)
    assert answer.iteration_time.shape == load.shape == (1_000_000,)
    for i in (0, 17, 999_999):
        single = equilibrium(base, rate[i] * work, rate[i] * kv_work, capacity[i])
        assert float(single.iteration_time) == answer.iteration_time[i]
        assert bool(single.is_feasible) == answer.is_feasible[i]
        assert 1 / float(boundary_rate(base, work, kv_work, capacity[i])) * rate[i] == pytest.approx(
            load[i], rel=1e-12
        )
    # Feasible exactly where the load is at most 1.
    clear = np.abs(load - 1) > 1e-9
    np.testing.assert_array_equal(answer.is_feasible[clear], load[clear] <= 1)


def test_knapsack_needs_a_capacity() -> None:
    """Unlimited memory has no κ."""
    with pytest.raises(InputError, match="kv_capacity"):
        knapsack([1.0], [1.0], [1.0], math.inf)
