"""Ties, boundaries and degenerate cases of the fluid room, by hand: where a comparison off by one would show."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.errors import InfeasibleError
from fluidsched.fluid.capacity import plan_load
from fluidsched.fluid.certificate import SparseRows, certify_minimum
from fluidsched.fluid.closed_forms import equilibrium
from fluidsched.fluid.pools import Pool, solve_pools
from fluidsched.fluid.region import _outline, stability_region

SERVER = fs.Server(60_000, fs.IterationTime.affine(0.01, 2e-5, 1e-4, 1e-7))


def two_types(*rates: float) -> fs.Workload:
    return fs.Workload(
        [fs.RequestType("chat", rates[0], 500, 100), fs.RequestType("code", rates[1], 2000, 20)]
    )


def arrays(value: Any, depth: int = 3) -> Iterator[np.ndarray[Any, Any]]:
    """Arrays held by an object of the library, inside tuples and other objects too."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from arrays(part, depth)
    elif dataclasses.is_dataclass(value) and depth:
        for field in dataclasses.fields(value):
            yield from arrays(getattr(value, field.name), depth - 1)


def test_results_cannot_be_written_to() -> None:
    """Every array a result of the fluid program holds, or computes on request, is read-only."""
    workload = two_types(5.0, 2.0)
    pools = [Pool(SERVER, 2)]
    transient = fs.solve_transient(workload, SERVER, np.ones((3, 2)), step=10.0)
    results = [
        fs.solve_fluid(workload, SERVER),
        fs.solve_fair(workload, SERVER, 1.0, weights=np.array([1.0, 2.0])),
        transient,
        solve_pools(workload, pools),
        fs.plan_capacity(workload, [SERVER], cost=np.array([1.0])),
        stability_region(workload, SERVER),
    ]
    for result in results:
        held = list(arrays(result))
        assert held
        assert not any(array.flags.writeable for array in held), type(result).__name__
    assert not transient.time.flags.writeable


def test_the_boundary_belongs_to_the_region() -> None:
    """A load of one is stable, to rounding; a millionth more is not."""
    workload = two_types(5.0, 2.0)
    region = stability_region(workload, SERVER)
    edge = workload.at_load(1.0, SERVER).arrival_rate
    assert bool(region.contains(edge))
    assert not bool(region.contains(edge * (1 + 1e-6)))


def test_a_corner_of_three_lines_is_one_corner() -> None:
    """x + y/2, y + x/2 and 3(x + y)/4 are all 1 at (2/3, 2/3), which the outline names once."""
    planes = np.array([[1.0, 0.5], [0.5, 1.0], [0.75, 0.75]])
    np.testing.assert_allclose(_outline(planes), [[1, 0], [2 / 3, 2 / 3], [0, 1]], atol=1e-12)


def test_an_equilibrium_at_one_point_counts() -> None:
    """β ≥ 1 + β/2 and β ≥ 3β/2 − 1 leave β = 2 alone; a little more work leaves nothing."""
    one = equilibrium(np.array([1.0, -1.0]), np.array([0.5, 1.5]), 10.0, 100.0)
    assert bool(one.is_feasible)
    assert float(one.iteration_time) == 2.0
    assert float(one.resident_kv) == 20.0
    none = equilibrium(np.array([1.0, -1.0]), np.array([0.5, 1.5 + 1e-9]), 10.0, 100.0)
    assert not bool(none.is_feasible)


def test_a_certificate_by_hand() -> None:
    """min x over x ≥ 1 at x = 2 with y = 1/2: gap (2 − 1/2)/2, slack 1 at price 1/2, nothing violated."""
    rows = SparseRows(np.array([0]), np.array([0]), np.array([1.0]))
    bounds = (np.array([1.0]), np.array([np.inf])), (np.array([0.0]), np.array([np.inf]))
    cost = np.array([1.0])
    certificate, bound = certify_minimum(cost, rows, *bounds, np.array([2.0]), np.array([0.5]), 1e-9)
    assert bound == 0.5
    assert certificate.gap == 0.75
    assert not certificate.ok
    fields = dataclasses.asdict(certificate)
    assert sorted(v for v in fields.values() if v == 0.5) == [0.5]  # min(price, slack) of the row
    best, bound = certify_minimum(cost, rows, *bounds, np.array([1.0]), np.array([1.0]), 1e-9)
    assert best.ok
    assert bound == 1.0


def test_only_the_mix_matters_to_a_budget() -> None:
    """Rates a thousand times lower, all below one a second, buy the same servers and the same load."""
    plans = [
        plan_load(two_types(5.0, 2.0).scaled(factor), [SERVER], cost=[1.0], budget=3.0)
        for factor in (1.0, 1e-3)
    ]
    assert [plan.replicas.tolist() for plan in plans] == [[3], [3]]
    loads = [plan.workload.arrival_rate for plan in plans]
    np.testing.assert_allclose(loads[1], loads[0], rtol=1e-9)
    for plan in (
        plans
    ):  # one kind of server: what three carry is three times what one carries, and no more is possible
        total = plan.workload.total_arrival_rate
        assert total == pytest.approx(
            3 * two_types(5.0, 2.0).at_load(1.0, SERVER).total_arrival_rate, rel=1e-9
        )
        assert plan.bound == pytest.approx(total, rel=1e-6)
        assert plan.gap == pytest.approx(1.0 - total / plan.bound, abs=1e-12)


def test_a_limit_on_iteration_times_binds_in_every_period() -> None:
    """Swamped by prompts, every period admits what one period does at the limit, and keeps it."""
    workload, limit = two_types(500.0, 200.0), 0.03
    fluid = fs.solve_fluid(workload, SERVER, max_iteration_time=limit)
    free = fs.solve_fluid(workload, SERVER)
    assert fluid.objective_value < 0.999 * free.objective_value  # it does bind
    demand = np.tile(workload.arrival_rate, (3, 1))
    answer = fs.solve_transient(
        workload, SERVER, demand, step=60.0, holding_cost=0.0, reward="requests", max_iteration_time=limit
    )
    assert answer.certificate.ok
    assert -answer.cost == pytest.approx(180.0 * fluid.objective_value, rel=1e-9)
    assert (answer.iteration_rate >= 1 / limit * (1 - 1e-9)).all()


def test_a_type_without_demand_changes_nothing_where_floats_run_out() -> None:
    """The second attempt at a program floats can hardly carry takes types that nobody asks for."""
    types = [fs.RequestType("rare", 2.9e-6, 525_285, 442_579), fs.RequestType("common", 17.0, 272, 4)]
    server = fs.Server(2.7e10, fs.IterationTime.affine(1e-3, 1e-6, 1e-6, 1e-8), 64)
    without = fs.solve_fluid(fs.Workload(types), server, [0.016, 1.7e8])
    more = fs.Workload([*types, fs.RequestType("none", 0.0, 300, 30)])
    fluid = fs.solve_fluid(more, server, [0.016, 1.7e8, 1.0])
    assert fluid.admitted_rate[2] == 0.0
    np.testing.assert_allclose(fluid.admitted_rate[:2], without.admitted_rate, rtol=1e-6)


def test_nothing_to_share_fairly_is_shared_fairly() -> None:
    """Max-min shares of no demand are zero, certified."""
    fair = fs.solve_fair(two_types(0.0, 0.0), SERVER, math.inf)
    assert fair.fluid.admitted_rate.tolist() == [0.0, 0.0]
    assert fair.certificate.ok


def test_prompts_that_fit_need_decodes_that_fit() -> None:
    """A prefill pool that holds a prompt is of no use where no decode pool holds the whole request."""
    workload = fs.Workload([fs.RequestType("long", 1.0, 500, 600)])
    small = dataclasses.replace(SERVER, kv_capacity=1000)
    pools = [Pool(small, 1, stage="prefill", name="p"), Pool(small, 1, stage="decode", name="d")]
    with pytest.raises(InfeasibleError, match="no pool can hold the longest request of type 'long'"):
        solve_pools(workload, pools)
    idle = workload.with_rates([0.0])  # nobody asks for it: nothing to hold
    assert solve_pools(idle, pools).admitted_rate.tolist() == [0.0]
