"""Fair sharing against its definitions, closed forms and scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.fluid.fair import fluid_variables, solve_fair


def case(seed: int, load: float = 4.0) -> tuple[fs.Workload, fs.Server]:
    """Five types in overload on a catalog server."""
    rng = np.random.default_rng(seed)
    types = [
        fs.RequestType(
            f"type {j}", rng.uniform(0.5, 5), int(rng.integers(10, 3000)), int(rng.integers(2, 500))
        )
        for j in range(5)
    ]
    entries = [e for e in fs.catalog.entries() if e.kv_capacity_tokens > 20_000]
    server = entries[int(rng.integers(len(entries)))].server()
    return fs.Workload(types).at_load(load, server), server


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_certified_and_within_the_program(alpha: float, seed: int) -> None:
    """Every answer is feasible and its utility within the certificate's gap of the bound."""
    workload, server = case(seed)
    fair = solve_fair(workload, server, alpha)
    assert fair.certificate is not None
    assert fair.certificate.ok, fair.certificate
    assert fair.load.max() <= 1 + 1e-9
    assert np.all(fair.admitted_rate <= workload.arrival_rate)
    taken = fs.solve_fluid(workload.with_rates(fair.admitted_rate), server)
    assert taken.is_stable


def test_alpha_zero_is_the_largest_total() -> None:
    """α = 0 has the value of the fluid program."""
    workload, server = case(1)
    total = fs.solve_fluid(workload, server).objective_value
    assert solve_fair(workload, server, 0.0).admitted_rate.sum() == pytest.approx(total, rel=1e-7)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_one_half_space_has_a_closed_form(alpha: float) -> None:
    """With one constraint g·a ≤ 1 and ample demand, a_j is proportional to (ω_j/g_j)^(1/α)."""
    types = [fs.RequestType("a", 1e4, 300, 50), fs.RequestType("b", 1e4, 900, 200)]
    workload = fs.Workload(types)
    server = fs.Server(50_000, fs.IterationTime.paper(0.01, 3e-7))
    weight = np.array([1.0, 2.5])
    g = fs.FluidProgram(workload, server).model.halfspaces.max(axis=0)
    shape = (weight / g) ** (1 / alpha)
    fair = solve_fair(workload, server, alpha, weight=weight)
    np.testing.assert_allclose(fair.admitted_rate, shape / (g @ shape), rtol=1e-4)
    assert fair.price is not None
    np.testing.assert_allclose(fair.price, weight * fair.admitted_rate**-alpha, rtol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_scipy_agrees(seed: int) -> None:
    """A general-purpose optimiser finds no better α = 2 utility over the half-spaces."""
    workload, server = case(seed)
    normals = fs.FluidProgram(workload, server).model.halfspaces
    fair = solve_fair(workload, server, 2.0)
    scale = fair.admitted_rate
    answer = scipy.optimize.minimize(
        lambda x: float((1 / (x * scale)).sum()),
        np.full(5, 0.3),
        bounds=[(1e-3, rate / s) for rate, s in zip(workload.arrival_rate, scale, strict=True)],
        constraints=[{"type": "ineq", "fun": lambda x: 1 - normals @ (x * scale)}],
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert float((1 / scale).sum()) <= answer.fun * (1 + 1e-5)


def max_min(workload: fs.Workload, server: fs.Server, weight: Any) -> Any:
    """Max-min by its definition: raise the common level by a linear program, freeze who cannot rise alone."""
    normals = fs.FluidProgram(workload, server).model.halfspaces
    rate = workload.arrival_rate
    fixed = np.full(len(rate), math.nan)
    while np.isnan(fixed).any():
        free = np.isnan(fixed)
        base = np.where(free, 0.0, fixed)
        # Columns: t and the free rates, a_j ≥ ω_j t.
        size = int(free.sum())
        cost = np.zeros(size + 1)
        cost[0] = -1.0
        level = np.hstack([weight[free][:, None], -np.eye(size)])
        room = np.hstack([np.zeros((len(normals), 1)), normals[:, free]])
        bounds = [(0, None), *((0, r) for r in rate[free])]
        answer = scipy.optimize.linprog(
            cost,
            np.vstack([level, room]),
            np.concatenate([np.zeros(size), 1 - normals @ base]),
            bounds=bounds,
        )
        t = -answer.fun
        reached = np.where(free, weight * t, fixed)
        slack = 1 - normals @ reached
        stuck = free & (
            (reached >= rate * (1 - 1e-7)) | ((normals > 0) & (slack < 1e-7)[:, None]).any(axis=0)
        )
        fixed[stuck] = reached[stuck]
    return fixed


@pytest.mark.parametrize("load", [0.7, 1.5, 6.0])
@pytest.mark.parametrize("seed", range(3))
def test_filling_is_max_min(seed: int, load: float) -> None:
    """Filling all rates together is max-min by its definition, weights included."""
    workload, server = case(seed, load)
    weight = np.random.default_rng(seed).uniform(0.5, 2, 5)
    fair = solve_fair(workload, server, math.inf, weight=weight)
    np.testing.assert_allclose(fair.admitted_rate, max_min(workload, server, weight), rtol=1e-5)


def test_alpha_grows_towards_max_min() -> None:
    """The smallest rate rises with α up to the max-min one, the total falls."""
    workload, server = case(2)
    answers = [solve_fair(workload, server, a).admitted_rate for a in (0.0, 0.5, 1.0, 2.0, 4.0, math.inf)]
    smallest, total = ([f(a) for a in answers] for f in (np.min, np.sum))
    assert np.all(np.diff(smallest) >= -1e-6)
    assert np.all(np.diff(total) <= 1e-6 * total[0])


def test_everything_is_admitted_where_it_fits() -> None:
    """Below the boundary every α admits all; a type without arrivals has no part in it."""
    workload, server = case(0, 0.8)
    silent = fs.Workload([*workload.types, fs.RequestType("silent", 0.0, 10, 10)])
    for alpha in (0.0, 1.0, 2.0, math.inf):
        fair = solve_fair(silent, server, alpha)
        np.testing.assert_allclose(fair.admitted_fraction, 1.0, rtol=1e-6)
    assert solve_fair(workload.scaled(0.0), server).admitted_rate.sum() == 0.0
    assert solve_fair(workload.scaled(0.0), server, math.inf).admitted_rate.sum() == 0.0


@pytest.mark.parametrize("alpha", [1.0, math.inf])
def test_floors_hold(alpha: float) -> None:
    """Floors are kept beside fairness; floors beyond the server's reach are refused with the repair."""
    workload, server = case(1)
    floor = np.array([0.6, 0.0, 0.0, 0.0, 0.0])
    fair = solve_fair(workload, server, alpha, fairness_floor=floor)
    assert fair.admitted_fraction[0] >= 0.6 * (1 - 1e-9)
    assert fair.load.max() <= 1 + 1e-6
    with pytest.raises(InfeasibleError, match="floors"):
        solve_fair(workload, server, alpha, fairness_floor=0.9)


def test_constraints_of_your_own() -> None:
    """A further constraint is kept; contradictory ones are named, and only those."""
    workload, server = case(0)

    def equal(fluid: Any) -> list[Any]:
        return [fluid.admitted_rate[0] == fluid.admitted_rate[1]]

    fair = solve_fair(workload, server, constraints=equal)
    assert fair.admitted_rate[0] == pytest.approx(fair.admitted_rate[1], rel=1e-5)
    assert fair.certificate is None

    def contradictory(fluid: Any) -> list[Any]:
        a = fluid.admitted_rate
        return [a[2] >= 0.01, a[0] >= 2 * workload.arrival_rate[0], a[1] >= 0.0]

    with pytest.raises(InfeasibleError, match=r"constraints\[1\]") as caught:
        solve_fair(workload, server, constraints=contradictory)
    assert "constraints[0]" not in str(caught.value)
    assert "constraints[2]" not in str(caught.value)
    with pytest.raises(InputError, match="alpha inf"):
        solve_fair(workload, server, math.inf, constraints=equal)


def test_variables_carry_the_whole_program() -> None:
    """Maximising the total over the hook's variables is the fluid program."""
    import cvxpy as cp

    workload, server = case(2)
    program = fs.FluidProgram(workload, server, max_iteration_time=server.iteration_time.empty * 2)
    fluid = fluid_variables(program.model)
    problem = cp.Problem(cp.Maximize(cp.sum(fluid.admitted_rate)), fluid.constraints)
    problem.solve(solver=cp.HIGHS)
    assert problem.value == pytest.approx(program.solve().objective_value, rel=1e-6)


def test_bad_arguments_are_named() -> None:
    """α and weights."""
    workload, server = case(0)
    for options, named in [
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"weight": 0.0}, "weight of type"),
        ({"weight": [1.0]}, "weight"),
    ]:
        with pytest.raises(InputError, match=named):
            solve_fair(workload, server, **options)  # type: ignore[arg-type]


def test_frame_and_repr() -> None:
    """One row per type; a page for people."""
    workload, server = case(0)
    fair = solve_fair(workload, server)
    assert len(fair.to_frame()) == 5
    assert "alpha 1" in repr(fair)
    assert fair.iteration_time >= server.iteration_time.empty
