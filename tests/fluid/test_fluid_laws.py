"""Laws every solution obeys: scaling, relabelling, monotonicity, idempotence, warm equals cold."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from fluid_cases import logarithmic, servers, workloads
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError

LAW = settings(max_examples=25)


@LAW
@given(workloads(), servers(), logarithmic(1e-3, 1e3))
def test_scaling_time(workload: fs.Workload, server: fs.Server, factor: float) -> None:
    """A server `factor` times slower with demand `factor` times smaller: same loads, times times `factor`."""
    coefficients = server.iteration_time.coefficients
    assert coefficients is not None
    slower = dataclasses.replace(
        server, iteration_time=fs.IterationTime.pieces((coefficients * factor).tolist())
    )
    before, after = fs.solve_fluid(workload, server), fs.solve_fluid(workload.scaled(1 / factor), slower)
    np.testing.assert_allclose(after.load, before.load, rtol=1e-9)
    assert after.objective_value * factor == pytest.approx(before.objective_value, rel=1e-8)
    assert after.iteration_time == pytest.approx(before.iteration_time * factor, rel=1e-7)
    assert after.is_stable == before.is_stable


@LAW
@given(workloads(), servers(), st.randoms(use_true_random=False))
def test_relabelling(workload: fs.Workload, server: fs.Server, random: object) -> None:
    """Types in another order: the same value, loads and prices, in that order."""
    order = list(range(len(workload)))
    random.shuffle(order)  # type: ignore[attr-defined]
    before = fs.solve_fluid(workload, server, "output_tokens")
    after = fs.solve_fluid(fs.Workload([workload.types[j] for j in order]), server, "output_tokens")
    assert after.objective_value == pytest.approx(before.objective_value, rel=1e-9)
    np.testing.assert_allclose(after.load, before.load, rtol=1e-12)


@LAW
@given(workloads(), servers(), logarithmic(1.0, 100.0))
def test_more_memory_never_hurts(workload: fs.Workload, server: fs.Server, factor: float) -> None:
    """The value does not fall and no load rises when memory grows."""
    assume(math.isfinite(server.kv_capacity))
    larger = dataclasses.replace(server, kv_capacity=server.kv_capacity * factor)
    before, after = fs.solve_fluid(workload, server), fs.solve_fluid(workload, larger)
    assert after.objective_value >= before.objective_value * (1 - 1e-9)
    assert np.all(after.load <= before.load * (1 + 1e-12))


@LAW
@given(workloads(), servers())
def test_a_type_without_arrivals_changes_nothing(workload: fs.Workload, server: fs.Server) -> None:
    """Adding a type of rate zero leaves rates, loads and prices of the others alone."""
    silent = fs.RequestType("silent", 0.0, 700, 70)
    before = fs.solve_fluid(workload, server)
    after = fs.solve_fluid(fs.Workload([silent, *workload.types]), server)
    assert after.objective_value == pytest.approx(before.objective_value, rel=1e-9)
    assert after.admitted_rate[0] == 0.0
    assert after.admitted_fraction[0] == 1.0
    assert after.decision[0] == "no demand"
    np.testing.assert_allclose(after.load, before.load, rtol=1e-12)


@LAW
@given(workloads(), servers(), logarithmic(0.01, 20.0))
def test_at_load_sets_the_largest_load(workload: fs.Workload, server: fs.Server, x: float) -> None:
    """at_load(x) then load.max() is x, and stability says which side of 1 it is."""
    assume(math.isfinite(fs.solve_fluid(workload, server).critical_rate))
    fluid = fs.solve_fluid(workload.at_load(x, server), server)
    assert fluid.load.max() == pytest.approx(x, rel=1e-12)
    if abs(x - 1.0) > 1e-8:
        assert fluid.is_stable == (x < 1.0)


@LAW
@given(workloads(), servers())
def test_solving_from_the_solution_moves_nothing(workload: fs.Workload, server: fs.Server) -> None:
    """Offer what was admitted: all of it is admitted again, at the same iteration time."""
    fluid = fs.solve_fluid(workload, server)
    again = fs.solve_fluid(workload.with_rates(fluid.admitted_rate), server)
    np.testing.assert_allclose(again.admitted_rate, fluid.admitted_rate, rtol=1e-9, atol=1e-12)
    assert again.iteration_time == pytest.approx(fluid.iteration_time, rel=1e-6)
    assert again.is_stable


@LAW
@given(workloads(), servers(), st.lists(logarithmic(0.1, 100.0), min_size=2, max_size=5))
def test_warm_equals_cold(workload: fs.Workload, server: fs.Server, factors: list[float]) -> None:
    """Re-solves through one program agree with fresh programs, whatever came before."""
    program = fs.FluidProgram(workload, server)
    for i, factor in enumerate(factors):
        rate = np.roll(workload.arrival_rate, i) * factor
        warm, cold = program.solve(rate), fs.solve_fluid(workload.with_rates(rate), server)
        assert warm.objective_value == pytest.approx(cold.objective_value, rel=1e-9)
        assert warm.certificate.ok
        np.testing.assert_array_equal(warm.load, cold.load)
        assert warm.workload == workload.with_rates(rate)


@LAW
@given(workloads(), servers(), st.floats(0.05, 1.0), st.floats(1.05, 50.0))
def test_floors_and_iteration_time(
    workload: fs.Workload, server: fs.Server, floor: float, slowest: float
) -> None:
    """Floors are met or refused with the factor that repairs them; the mean iteration is at most T_max."""
    limit = slowest * server.iteration_time.empty
    options = {"max_iteration_time": limit}
    floors = fs.FluidProgram(workload, server, **options).model.load(floor * workload.arrival_rate).max()
    if floors > 1 + 1e-9:
        with pytest.raises(InfeasibleError, match="floors alone") as caught:
            fs.solve_fluid(workload, server, fairness_floor=floor, **options)
        repair = float(str(caught.value).rpartition("multiplied by ")[2].split()[0])
        assert repair == pytest.approx(1 / floors, rel=1e-2)
        fs.solve_fluid(workload, server, fairness_floor=floor * repair * 0.99, **options)
        return
    fluid = fs.solve_fluid(workload, server, fairness_floor=floor, **options)
    assert fluid.certificate.ok
    assert np.all(fluid.admitted_rate >= floor * workload.arrival_rate * (1 - 1e-12))
    assert fluid.iteration_time <= limit * (1 + 1e-9)
    free = fs.solve_fluid(workload, server)
    assert fluid.objective_value <= free.objective_value * (1 + 1e-9)
    if free.iteration_time <= limit and np.all(free.admitted_fraction >= floor):
        assert fluid.objective_value == pytest.approx(free.objective_value, rel=1e-9)


def test_zero_workload() -> None:
    """Nothing offered: nothing admitted, empty batches back to back, no load, no critical rate."""
    workload = fs.Workload([fs.RequestType("a", 0.0, 100, 10), fs.RequestType("b", 0.0, 10, 10)])
    server = fs.Server(10_000, fs.IterationTime.paper(0.01, 1e-6), 8, 512)
    fluid = fs.solve_fluid(workload, server)
    assert fluid.is_stable
    assert fluid.iteration_time == pytest.approx(0.01)
    assert fluid.resident_kv == fluid.batch_size == fluid.batch_tokens == fluid.objective_value == 0
    assert fluid.load.tolist() == [0, 0, 0, 0]
    assert math.isnan(fluid.critical_rate)
    assert fluid.certificate.ok
    assert fluid.binding_constraints == ()


def test_unlimited_memory_in_overload() -> None:
    """Without memory, batch or token limits the optimum in overload is an endless batch: u = 0."""
    workload = fs.Workload([fs.RequestType("a", 50.0, 1000, 100)])
    fluid = fs.solve_fluid(workload, fs.Server(math.inf, fs.IterationTime.affine(0.01, 5e-5, 5e-5, 3e-7)))
    assert fluid.iteration_rate == 0.0
    assert fluid.iteration_time == fluid.resident_kv == fluid.batch_size == math.inf
    assert fluid.resources == ("time",)
    assert fluid.binding_constraints == ("time",)
    assert fluid.certificate.ok
    assert not fluid.is_stable


def test_overload_says_who_is_refused_and_by_how_much() -> None:
    """Requests are worth the same, so the expensive type goes first; tokens reward it more but not enough."""
    workload = fs.Workload([fs.RequestType("chat", 40.0, 512, 128), fs.RequestType("sum", 5.0, 4000, 200)])
    fluid = fs.solve_fluid(workload, fs.catalog.server("a100", "llama-2-7b"))
    assert fluid.decision == ("rationed", "refused")
    assert fluid.bid_price[0] == pytest.approx(1.0)
    assert fluid.bid_price[1] > 1.0
    assert fluid.binding_constraints == ("time", "kv")
    assert fluid.objective_value == pytest.approx(16.49254, rel=1e-6)
    loved = fs.solve_fluid(workload, fs.catalog.server("a100", "llama-2-7b"), [1.0, 20.0])
    assert loved.decision[1] == "rationed"
    assert loved.decision[0] == "refused"


def test_a_floor_that_bites_is_a_binding_constraint() -> None:
    """A type kept only by its floor is named, with a bid price above its reward."""
    workload = fs.Workload([fs.RequestType("chat", 40.0, 512, 128), fs.RequestType("sum", 5.0, 4000, 200)])
    fluid = fs.solve_fluid(workload, fs.catalog.server("a100", "llama-2-7b"), fairness_floor=[0.0, 0.1])
    assert fluid.admitted_rate[1] == pytest.approx(0.5)
    assert fluid.decision == ("rationed", "floor")
    assert fluid.binding_constraints == ("time", "kv", "fairness_floor[sum]")


def test_block_rounding_costs_memory() -> None:
    """Blocks of 16 take 7.5 tokens more per resident on average; the last partial block is lost."""
    workload = fs.Workload([fs.RequestType("a", 5.0, fs.lengths.uniform(1, 160), 160)])
    time = fs.IterationTime.affine(0.01, 5e-5, 5e-5, 3e-7)
    plain = fs.solve_fluid(workload, fs.Server(10_007, time))
    paged = fs.solve_fluid(workload, fs.Server(10_007, time, block_size=16))
    assert paged.batch_size == pytest.approx(plain.batch_size)
    assert paged.resident_kv == pytest.approx(plain.resident_kv + 7.5 * plain.batch_size, rel=1e-9)
    assert paged.load[1] > plain.load[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"objective": "tokens"}, "objective"),
        ({"objective": [1.0]}, "objective"),
        ({"objective": [1.0, -1.0]}, "objective of type 'b'"),
        ({"objective": [1.0, math.nan]}, "objective of type 'b'"),
        ({"objective": ["x", "y"]}, "objective"),
        ({"fairness_floor": 1.5}, "fairness_floor of type 'a'"),
        ({"max_iteration_time": 0.0}, "max_iteration_time"),
        ({"workload": None}, "workload"),
        ({"server": None}, "server"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], named: str) -> None:
    """Every wrong argument is refused by name."""
    good = {
        "workload": fs.Workload([fs.RequestType("a", 1.0, 100, 10), fs.RequestType("b", 1.0, 10, 10)]),
        "server": fs.Server(10_000, fs.IterationTime.paper(0.01, 1e-6)),
    }
    with pytest.raises(InputError) as caught:
        fs.solve_fluid(**{**good, **arguments})  # type: ignore[arg-type]
    assert caught.value.argument == named


def test_bad_rates_are_named() -> None:
    """Re-solves refuse rates that are not finite, negative, or not one per type."""
    workload = fs.Workload([fs.RequestType("a", 1.0, 100, 10), fs.RequestType("b", 1.0, 10, 10)])
    program = fs.FluidProgram(workload, fs.Server(10_000, fs.IterationTime.paper(0.01, 1e-6)))
    for rate, named in (([1.0], "arrival_rate"), ([1.0, math.nan], "'b'"), ([-1.0, 1.0], "'a'")):
        with pytest.raises(InputError, match=named):
            program.solve(rate)


def test_time_has_its_price_where_requests_take_none() -> None:
    """Requests that add nothing to an iteration, one at a time: the iterations' base is what limits them.

    The price of time was lost on the iteration rate's own bound.
    """
    workload = fs.Workload([fs.RequestType("one token", 100.0, 1, 1)])
    server = fs.Server(1000, fs.IterationTime.affine(0.05, 0.0, 0.0, 1e-6), max_batch_size=1)
    fluid = fs.solve_fluid(workload, server)
    assert fluid.status == "optimal"
    np.testing.assert_allclose(fluid.admitted_rate, [20.0])
    assert fluid.shadow_price["time"] == pytest.approx(20.0)


def test_types_that_use_nothing_are_carried_at_any_rate() -> None:
    """One token in and out where only KV reads cost time and memory is unlimited: the bound is the demand."""
    workload = fs.Workload([fs.RequestType("one token", 1e6, 1, 1), fs.RequestType("chat", 1.0, 10, 10)])
    server = fs.Server(math.inf, fs.IterationTime.affine(0.05, 0.0, 0.0, 1e-6))
    fluid = fs.solve_fluid(workload, server)
    assert fluid.status == "optimal"
    assert fluid.upper_bound == pytest.approx(1e6 + 1.0)
