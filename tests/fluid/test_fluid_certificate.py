"""Optimality by certificate: made-to-measure programs, bad scaling, wrong answers caught, sensitivities."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from fluid_cases import logarithmic, servers, workloads
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.fluid.closed_forms import knapsack
from fluidsched.fluid.model import FluidModel, build_model
from fluidsched.fluid.program import solve_model


def manufactured(
    rng: np.random.Generator, tight: list[bool], magnitude: float
) -> tuple[FluidModel, np.ndarray[Any, Any], float, np.ndarray[Any, Any]]:
    """A program around a chosen optimal pair: returns it with the offered and optimal rates and the value.

    Types are admitted in full, rationed or refused at will; `tight` says which of kv, batch, tokens carry
    a multiplier. Rows and columns are then scaled by up to `magnitude` either way.
    """
    types = 6
    workload = fs.Workload([fs.RequestType(f"{j}", 1.0, 10, 10) for j in range(types)])
    server = fs.Server(1e6, fs.IterationTime.pieces([(0.01, 0, 0, 0, 0), (0.01, 0, 0, 0, 0)]), 10, 10)
    blank = build_model(workload, server)
    unit = np.exp(rng.uniform(-1, 1, types) * np.log(magnitude))
    admitted = rng.uniform(0.5, 2, types)
    role = rng.permutation(["full", "full", "rationed", "rationed", "refused", "refused"])
    admitted[role == "refused"] = 0.0
    speed = rng.uniform(1, 10)
    matrix = rng.uniform(0, 1, (5, types))
    matrix[:2] *= 0.5 / (matrix[:2] @ admitted)[:, None]
    busy, use = matrix[:2] @ admitted, matrix[2:] @ admitted
    base = (1 - busy) / speed * np.array([1.0, 0.5])
    capacity = use / speed * np.where(tight, 1.0, 2.0)
    dual = np.concatenate([[0.0, 0.0], np.where(tight, rng.uniform(0.1, 1, 3), 0.0)])
    dual[0] = dual[2:] @ capacity / base[0]
    price = dual @ matrix
    reward = price * np.select([role == "full", role == "refused"], [1.5, 0.5], 1.0)
    rate = np.select([role == "full", role == "rationed"], [admitted, 2 * admitted], 1.0)
    # Scale: one request becomes 1/unit requests, rows in other units.
    rows = np.concatenate([[1.0, 1.0], np.exp(rng.uniform(-1, 1, 3) * np.log(magnitude))])
    model = dataclasses.replace(
        blank,
        matrix=matrix / unit * rows[:, None],
        rate_coefficient=np.concatenate([base, -capacity]) * rows,
        reward=reward / unit,
        objective="rewards",
    )
    return model, rate * unit, admitted * unit, float(reward @ admitted)


@pytest.mark.parametrize("magnitude", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("tight", [[True, False, False], [True, True, False], [True, True, True]])
def test_chosen_optimal_pairs_are_found(tight: list[bool], magnitude: float) -> None:
    """Programs built around a chosen optimum: found and certified, degenerate or badly scaled."""
    rng = np.random.default_rng([sum(tight), int(np.log10(magnitude))])
    for _ in range(10):
        model, rate, _, value = manufactured(rng, tight, magnitude)
        fluid = solve_model(model, rate)
        assert fluid.status == "optimal"
        assert fluid.certificate.ok, fluid.certificate
        assert fluid.objective_value == pytest.approx(value, rel=1e-9)
        assert fluid.upper_bound == pytest.approx(value, rel=1e-9)


def test_redundant_rows_change_nothing() -> None:
    """A piece given twice and a batch limit that repeats the memory's leave the optimum alone."""
    workload = fs.Workload([fs.RequestType("a", 9.0, 100, 1), fs.RequestType("b", 9.0, 100, 1)])
    piece = (0.01, 1e-3, 1e-3, 1e-6, 0.0)
    once = fs.Server(500, fs.IterationTime.pieces([piece]))
    twice = fs.Server(500, fs.IterationTime.pieces([piece, piece]), max_batch_size=5)
    for x in (0.5, 1.0, 3.0):
        answers = [fs.solve_fluid(workload.at_load(x, once), server) for server in (once, twice)]
        assert all(answer.certificate.ok for answer in answers)
        assert answers[1].objective_value == pytest.approx(answers[0].objective_value, rel=1e-12)
        # Both limits bind at once; the price is the same however it is shared.
        np.testing.assert_allclose(answers[1].bid_price, answers[0].bid_price, rtol=1e-9)


extreme = st.tuples(logarithmic(1e-6, 1e6), logarithmic(1, 1e7), logarithmic(1, 1e7))


@settings(max_examples=150)
@example([(1.0, 22026.5, 1.0)], 65659969.1, (1.234e-4, 7.485e-5, 4.54e-5, 6.144e-6))  # 1 − Σ a w is 2e-8
@given(
    st.lists(extreme, min_size=1, max_size=6),
    logarithmic(1e3, 1e8),
    st.tuples(
        logarithmic(1e-4, 0.1), logarithmic(1e-8, 1e-4), logarithmic(1e-8, 1e-4), logarithmic(1e-9, 1e-5)
    ),
)
def test_extreme_scales_are_right(
    given_types: list[tuple[float, float, float]], capacity: float, piece: tuple[float, ...]
) -> None:
    """Rates 1e-6 to 1e6 and lengths 1 to 1e7 in one program: every type's share is the knapsack's."""
    workload = fs.Workload(
        [fs.RequestType(f"{j}", rate, int(p), int(o)) for j, (rate, p, o) in enumerate(given_types)]
    )
    time = fs.IterationTime.affine(*piece)
    server = fs.Server(capacity, time)
    fluid = fs.solve_fluid(workload, server)
    assert fluid.status == "optimal"
    assert fluid.certificate.ok
    kappa = piece[0] * workload.kv_work + capacity * fs.fluid.busy_work(workload, time)[0]
    density = np.sort(1 / kappa)
    assume(np.all(np.diff(density) > 1e-9 * density[1:]))
    greedy = knapsack(fluid.reward, kappa, workload.arrival_rate, capacity)
    np.testing.assert_allclose(fluid.admitted_fraction, greedy / workload.arrival_rate, rtol=1e-6, atol=1e-9)


def test_what_floats_cannot_carry_is_called_imprecise() -> None:
    """Rewards ten and demands seven orders of magnitude apart: the answer is marked, in its words too."""
    types = [fs.RequestType("rare", 2.9e-6, 525_285, 442_579), fs.RequestType("common", 17.0, 272, 4)]
    time = fs.IterationTime.affine(1e-3, 1e-6, 1e-6, 1e-8)
    fluid = fs.solve_fluid(fs.Workload(types), fs.Server(2.7e10, time, 64), [0.016, 1.7e8])
    assert fluid.status == "imprecise"
    assert not fluid.certificate.ok
    assert "do not rely on these numbers" in repr(fluid)
    # What matters for the objective is still right: the common type is worth all but 1e-17 of it.
    assert fluid.objective_value == pytest.approx(17.0 * 1.7e8, rel=1e-9)


def test_status_is_the_certificate() -> None:
    """Over many extreme programs the status says what the certificate says, and the bound is a bound."""
    rng = np.random.default_rng(5)
    for _ in range(150):
        types = [
            fs.RequestType(f"{j}", rate, int(p), int(o))
            for j, (rate, p, o) in enumerate(10 ** rng.uniform([-6, 0, 0], [6, 7, 7], (8, 3)))
        ]
        server = fs.Server(10 ** rng.uniform(3, 12), fs.IterationTime.affine(1e-3, 1e-6, 1e-6, 1e-8), 64, 512)
        fluid = fs.solve_fluid(fs.Workload(types), server, 10 ** rng.uniform(-8, 8, 8))
        assert fluid.certificate.ok == (fluid.status == "optimal")
        assert ("imprecise" in repr(fluid)) == (fluid.status == "imprecise")
        assert fluid.upper_bound >= fluid.objective_value * (1 - 1e-9)


@settings(max_examples=40)
@given(workloads(), servers(), st.data())
def test_wrong_answers_fail_the_certificate(workload: fs.Workload, server: fs.Server, data: Any) -> None:
    """Admit less, admit beyond demand, or change the duals: at least one condition breaks."""
    fluid = fs.solve_fluid(workload, server)
    assume(fluid.certificate.ok and fluid.objective_value > 0)
    j = int(np.argmax(fluid.admitted_rate))
    admitted = fluid.admitted_rate.copy()
    admitted[j] *= data.draw(st.sampled_from([0.0, 0.5, 0.99, 1.01, 2.0]))
    assert not dataclasses.replace(fluid, admitted_rate=admitted).certificate.ok
    if fluid.row_dual.max() > 0:
        factor = data.draw(st.sampled_from([-1.0, 0.0, 0.9, 1.1]))
        assert not dataclasses.replace(fluid, row_dual=fluid.row_dual * factor).certificate.ok
    assert not dataclasses.replace(fluid, iteration_rate=1.01 / server.iteration_time.empty).certificate.ok


def sensitivity(model: FluidModel, rate: np.ndarray[Any, Any], row: int, step: float) -> float:
    """(value with the row's right-hand side raised by `step` − value lowered by it) / 2 step."""
    values = []
    for sign in (1.0, -1.0):
        limit = model.limit.copy()
        limit[row] += sign * step
        values.append(solve_model(dataclasses.replace(model, limit=limit), rate).objective_value)
    return (values[0] - values[1]) / (2 * step)


def test_duals_are_derivatives() -> None:
    """Sign convention: μ = d objective/d right-hand side ≥ 0, row by row, by central differences."""
    rng = np.random.default_rng(0)
    for tight in ([True, False, False], [True, True, False]):
        model, rate, _, value = manufactured(rng, tight, 1.0)
        model = dataclasses.replace(model, limit=model.limit + np.array([0, 0, 1e-3, 2e-3, 1e-3]))
        fluid = solve_model(model, rate)
        for row, dual in enumerate(fluid.dual.values()):
            assert sensitivity(model, rate, row, 1e-7 * value) == pytest.approx(dual, rel=1e-4, abs=1e-6)
            assert dual >= 0


@pytest.mark.parametrize("objective", ["requests", "output_tokens"])
def test_shadow_prices_are_worth_per_unit(objective: str) -> None:
    """One more token of memory, or second of T_max: the value grows by the shadow price."""
    workload = fs.Workload([fs.RequestType("chat", 40.0, 512, 128), fs.RequestType("sum", 5.0, 400, 600)])
    time = fs.catalog.server("a100", "llama-2-7b").iteration_time

    def value(capacity: float, slowest: float | None) -> float:
        server = fs.Server(capacity, time)
        return fs.solve_fluid(workload, server, objective, max_iteration_time=slowest).objective_value

    fluid = fs.solve_fluid(workload, fs.Server(60_000, time), objective)
    slope = (value(60_060, None) - value(59_940, None)) / 120
    assert fluid.shadow_price["kv"] == pytest.approx(slope, rel=1e-5)
    limited = fs.solve_fluid(workload, fs.Server(120_000, time), objective, max_iteration_time=0.03)
    assert limited.binding_constraints[-1] == "iteration_time"
    slope = (value(120_000, 0.03003) - value(120_000, 0.02997)) / 6e-5
    assert limited.shadow_price["iteration_time"] == pytest.approx(slope, rel=1e-5)
    assert limited.shadow_price["kv"] == 0.0

    # All of time scaled by 1 + ε is 1 + ε of every piece's right-hand side.
    model = fluid.model
    faster = dataclasses.replace(model, limit=model.limit * (1 + 1e-6))
    gain = solve_model(faster, fluid.arrival_rate).objective_value - fluid.objective_value
    assert fluid.shadow_price["time"] == pytest.approx(gain / 1e-6, rel=1e-4)


def test_counted_limits_are_priced_like_continuous_ones() -> None:
    """Batch size and token budget: the price of one more lies between the gains of the next and last step."""
    workload = fs.Workload([fs.RequestType("chat", 400.0, 12, 128), fs.RequestType("sum", 500.0, 400, 6)])
    time = fs.IterationTime.affine(0.01, 5e-6, 5e-6, 3e-8)
    limits = {"batch": ("max_batch_size", 64), "tokens": ("token_budget", 128)}
    for resource, (argument, limit) in limits.items():
        low, middle, high = (
            fs.solve_fluid(workload, fs.Server(1e9, time, **{argument: limit + step})) for step in (-1, 0, 1)
        )
        price = middle.shadow_price[resource]
        assert price > 0
        assert high.objective_value - middle.objective_value <= price * (1 + 1e-9)
        assert price <= (middle.objective_value - low.objective_value) * (1 + 1e-9)
