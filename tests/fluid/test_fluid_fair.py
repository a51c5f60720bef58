"""α-fair sharing: closed forms, scalar search, cvxpy, limits, laws, certificate, errors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from fluid_cases import logarithmic, servers, workloads
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError

INSTANT = fs.IterationTime.affine(1e-9, 1e-3, 0.0, 0.0)
"""A millisecond a prompt token and next to nothing an iteration: with p tokens 1000/p req/s are served."""

alphas = st.one_of(st.just(1.0), logarithmic(0.1, 20.0))


def one_row(work: list[float], rate: float = 1e6) -> tuple[fs.Workload, fs.Server]:
    """Types that use given shares of a server per req/s, demand out of the way."""
    types = [fs.RequestType(f"type {j}", rate, round(1000 * w), 1) for j, w in enumerate(work)]
    return fs.Workload(types), fs.Server(math.inf, INSTANT)


def two_piece_server(kv_capacity: float = 60_000) -> fs.Server:
    iteration_time = fs.IterationTime.two_piece(0.01, 2e-5, 256, 4e-5, 1e-7, 1e-9)
    return fs.Server(kv_capacity, iteration_time, max_batch_size=64, token_budget=2048)


def mixed() -> fs.Workload:
    return fs.Workload(
        [
            fs.RequestType("chat", 40.0, 300, 200),
            fs.RequestType("long prompts", 9.0, 3000, 20),
            fs.RequestType("long answers", 5.0, 50, 1500),
            fs.RequestType("rare", 0.01, 500, 100),
        ]
    )


def utility(share: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    return np.log(share) if alpha == 1.0 else share ** (1 - alpha) / (1 - alpha)


# Closed forms.


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 900), logarithmic(0.1, 10)), min_size=1, max_size=5),
    alphas,
    st.sampled_from(["requests", "total_tokens"]),
)
def test_knapsack(types: list[tuple[int, float]], alpha: float, share: str) -> None:
    """One resource, demand out of the way: a_j ∝ (ω_j r_j^{1−α}/g_j)^{1/α}, filling it."""
    work = np.array([tokens for tokens, _ in types]) / 1000
    weights = np.array([weight for _, weight in types])
    worth = np.ones(len(work)) if share == "requests" else 1000 * work + 1
    fair = fs.solve_fair(*one_row(work.tolist()), alpha, share, weights=weights)
    wanted = (weights * worth ** (1 - alpha) / work) ** (1 / alpha)
    np.testing.assert_allclose(fair.admitted_rate, wanted / (wanted @ work), rtol=1e-9)
    assert fair.certificate.ok


def test_proportional_fairness_splits_the_server() -> None:
    """α = 1: every type gets the same part of the server's time, in proportion to its weight."""
    work = np.array([0.1, 0.2, 0.7])
    fair = fs.solve_fair(*one_row(work.tolist()), weights=[1.0, 2.0, 5.0])
    np.testing.assert_allclose(fair.admitted_rate * work, np.array([1, 2, 5]) / 8, rtol=1e-9)
    # d utility / d capacity = 8 weights over one server: the price of a second of server time.
    np.testing.assert_allclose(fair.bid_price, 8 * work, rtol=1e-9)


@settings(max_examples=25)
@given(st.floats(0.5, 5.0), st.floats(0.5, 5.0), alphas)
def test_two_types_by_scalar_search(first: float, second: float, alpha: float) -> None:
    """All along the boundary of the region of two types no point has a larger utility."""
    types = [fs.RequestType("a", first, 300, 200), fs.RequestType("b", second, 2000, 20)]
    workload, server = fs.Workload(types), two_piece_server(20_000)
    fair = fs.solve_fair(workload, server, alpha)
    assert fair.certificate.ok
    load = fair.fluid.model.load
    a = np.linspace(0, first, 4001)[1:]
    low, high = np.zeros_like(a), np.full_like(a, second)
    for _ in range(60):
        middle = (low + high) / 2
        fits = load(np.stack([a, middle], axis=1)).max(axis=1) <= 1
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    b = np.where(load(np.stack([a, np.full_like(a, second)], axis=1)).max(axis=1) <= 1, second, low)
    kept = b > 0
    best = (utility(a[kept], alpha) + utility(b[kept], alpha)).max()
    reached = utility(fair.admitted_rate, alpha).sum()
    assert fair.utility == pytest.approx(reached, rel=1e-9, abs=1e-9)
    assert reached >= best - 1e-9 * abs(best)
    assert reached <= best + 1e-3 * max(1.0, abs(best))


def test_max_min_by_hand() -> None:
    """Demand stops one type, the full server the others: 1 = 0.1·2 + (0.2 + 0.6)·x."""
    workload, server = one_row([0.1, 0.2, 0.6])
    fair = fs.solve_fair(workload.with_rates([0.5, 9.0, 9.0]), server, math.inf)
    np.testing.assert_allclose(fair.admitted_rate, [0.5, 0.95 / 0.8, 0.95 / 0.8])
    floors = fs.solve_fair(
        workload.with_rates([0.5, 9.0, 9.0]), server, math.inf, fairness_floor=[0, 0.25, 0]
    )
    np.testing.assert_allclose(floors.admitted_rate, [0.5, 2.25, 0.5 / 0.6])


# Witness and limits.


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 3.0])
def test_cvxpy_agrees(alpha: float) -> None:
    """A cone solver on the rows with u kept, all limits, floors and two pieces."""
    import cvxpy as cp

    # Demand of one size: a rare type's utility would drown the others' in the cone solver's tolerance.
    workload, server = mixed().with_rates([40.0, 9.0, 5.0, 2.0]), two_piece_server()
    weights = np.array([1.0, 3.0, 0.5, 2.0])
    floor = np.array([0.02, 0.1, 0.0, 0.0])
    fair = fs.solve_fair(workload, server, alpha, weights=weights, fairness_floor=floor)
    model = fair.fluid.model
    unit = np.minimum(model.rate_alone, workload.arrival_rate)
    size = np.abs(model.matrix * unit).max(axis=1)
    x, u = cp.Variable(4), cp.Variable()
    a = cp.multiply(unit, x)
    if alpha == 1.0:
        objective = cp.sum(cp.multiply(weights, cp.log(a)))
    else:
        objective = cp.sum(cp.multiply(weights / (1 - alpha), cp.power(a, 1 - alpha)))
    rows = (model.matrix * unit / size[:, None]) @ x + model.rate_coefficient / size * u
    problem = cp.Problem(
        cp.Maximize(objective),
        [
            rows <= model.limit / size,
            u >= 0,
            a <= workload.arrival_rate,
            a >= floor * workload.arrival_rate,
        ],
    )
    problem.solve(solver=cp.CLARABEL)
    np.testing.assert_allclose(fair.admitted_rate, a.value, rtol=2e-4)
    assert fair.utility == pytest.approx(problem.value, rel=1e-6)
    assert fair.utility >= problem.value - 1e-6 * abs(problem.value)
    assert fair.certificate.ok


@pytest.mark.parametrize("load", [1.5, 6.0])
@pytest.mark.parametrize("seed", range(3))
def test_filling_is_max_min_by_its_definition(seed: int, load: float) -> None:
    """Raise the common level by a linear program, freeze who cannot rise, again and again."""
    rng = np.random.default_rng(seed)
    types = [
        fs.RequestType(
            f"type {j}", rng.uniform(0.5, 5), int(rng.integers(10, 3000)), int(rng.integers(2, 500))
        )
        for j in range(5)
    ]
    entries = [entry for entry in fs.catalog.entries() if entry.kv_capacity_tokens > 20_000]
    server = entries[int(rng.integers(len(entries)))].server()
    workload = fs.Workload(types).at_load(load, server)
    normals, rate = fs.FluidProgram(workload, server).model.halfspaces, workload.arrival_rate
    fixed = np.full(5, math.nan)
    while np.isnan(fixed).any():
        free = np.isnan(fixed)
        room = 1 - normals @ np.where(free, 0.0, fixed)
        # One variable, the level: every free rate is at it.
        bounds = [(0, rate[free].min())]
        answer = scipy.optimize.linprog([-1.0], normals[:, free].sum(axis=1)[:, None], room, bounds=bounds)
        reached = np.where(free, -answer.fun, fixed)
        full = 1 - normals @ reached < 1e-7
        stuck = free & ((reached >= rate * (1 - 1e-7)) | (normals[full] > 0).any(axis=0))
        fixed[stuck] = reached[stuck]
    fair = fs.solve_fair(workload, server, math.inf)
    np.testing.assert_allclose(fair.admitted_rate, fixed, rtol=1e-6)


@settings(max_examples=25)
@given(workloads(max_types=5), servers())
def test_no_fairness_is_the_linear_program(workload: fs.Workload, server: fs.Server) -> None:
    """α = 0 is `solve_fluid`; small α comes close in total."""
    fluid = fs.solve_fluid(workload, server, "output_tokens")
    fair = fs.solve_fair(workload, server, 0.0, "output_tokens")
    assert fair.total == pytest.approx(fluid.objective_value, rel=1e-9)
    near = fs.solve_fair(workload, server, 0.01, "output_tokens")
    assert near.total >= 0.9 * fair.total


@settings(max_examples=25)
@given(workloads(max_types=5), servers())
def test_large_alpha_is_max_min(workload: fs.Workload, server: fs.Server) -> None:
    """The least share of a 200-fair allocation is nearly the max-min one, and never more."""
    most = fs.solve_fair(workload, server, math.inf)
    near = fs.solve_fair(workload, server, 200.0)
    assert near.certificate.ok
    active = workload.arrival_rate > 0
    if active.any():
        least, reached = most.share[active].min(), near.share[active].min()
        assert reached <= least * (1 + 1e-9)
        assert reached >= 0.9 * least


# Laws.


@settings(max_examples=60)
@given(
    workloads(max_types=5, rates=logarithmic(1e-6, 1e6)),
    servers(),
    st.one_of(st.just(0.0), st.just(math.inf), logarithmic(0.05, 50)),
    st.sampled_from(["requests", "output_tokens"]),
)
def test_certificate_holds_at_any_scale(
    workload: fs.Workload, server: fs.Server, alpha: float, share: str
) -> None:
    """Rates 1e-6 … 1e6, lengths 1 … 8000, any limits: optimal to 1e-9, within capacity and demand."""
    fair = fs.solve_fair(workload, server, alpha, share)
    assert fair.certificate.ok, fair.certificate
    assert fair.fluid.model.load(fair.admitted_rate).max() <= 1 + 1e-9
    assert np.all(fair.admitted_rate <= workload.arrival_rate)


@settings(max_examples=20)
@given(workloads(max_types=4), servers(), st.one_of(alphas, st.just(math.inf)))
def test_all_demand_that_fits_is_admitted(workload: fs.Workload, server: fs.Server, alpha: float) -> None:
    """Inside the stable region every α admits everything."""
    if not math.isfinite(fs.solve_fluid(workload, server).critical_rate):
        return
    workload = workload.at_load(0.9, server)
    fair = fs.solve_fair(workload, server, alpha)
    np.testing.assert_array_equal(fair.admitted_rate, workload.arrival_rate)
    assert fair.status == "optimal"


def test_fairness_costs_total_and_raises_the_least() -> None:
    """From α = 0 to ∞ the total falls and the least share rises."""
    workload = fs.workloads.azure_conv()
    server = fs.catalog.server("a100-80gb", "llama-2-7b", 1)
    workload = workload.at_load(2.0, server)
    fairs = [fs.solve_fair(workload, server, alpha) for alpha in (0.0, 0.5, 1.0, 2.0, 5.0, math.inf)]
    totals, least = [fair.total for fair in fairs], [fair.share.min() for fair in fairs]
    assert totals == sorted(totals, reverse=True)
    assert least == sorted(least)
    assert totals[-1] < 0.8 * totals[0]


def test_fractions_as_shares() -> None:
    """With r_j = 1/λ_j max-min fairness admits the same fraction of every type's demand."""
    workload, server = mixed(), two_piece_server()
    fair = fs.solve_fair(workload, server, math.inf, 1 / workload.arrival_rate)
    fraction = fair.fluid.admitted_fraction
    np.testing.assert_allclose(fraction, fraction[0], rtol=1e-9)
    assert fraction[0] == pytest.approx(1 / fair.fluid.load.max(), rel=1e-9)


@settings(max_examples=20)
@given(workloads(max_types=4), servers(), alphas, logarithmic(1e-3, 1e3))
def test_weights_and_units_of_shares(
    workload: fs.Workload, server: fs.Server, alpha: float, factor: float
) -> None:
    """All weights, or all shares per request, times a factor: the same admission."""
    once = fs.solve_fair(workload, server, alpha).admitted_rate
    weighted = fs.solve_fair(workload, server, alpha, weights=factor).admitted_rate
    scaled = fs.solve_fair(workload, server, alpha, np.full(len(workload), factor)).admitted_rate
    np.testing.assert_allclose(weighted, once, rtol=1e-7)
    np.testing.assert_allclose(scaled, once, rtol=1e-7)


def test_types_without_demand_take_no_part() -> None:
    """A type of rate zero changes nothing, even at α = ∞ where the least share would be its 0."""
    workload, server = mixed(), two_piece_server()
    without = fs.Workload(workload.types[:3])
    for alpha in (0.5, 1.0, math.inf):
        fair = fs.solve_fair(workload.with_rates([40.0, 9.0, 5.0, 0.0]), server, alpha)
        np.testing.assert_allclose(
            fair.admitted_rate[:3], fs.solve_fair(without, server, alpha).admitted_rate, rtol=1e-12
        )
        assert fair.admitted_rate[3] == 0.0
        assert fair.certificate.ok
    nobody = fs.solve_fair(workload.with_rates(np.zeros(4)), server)
    assert nobody.certificate.ok
    assert "no demand" in repr(nobody)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_iteration_time_and_floors_are_kept(alpha: float) -> None:
    """Fairness inside a limit on the iteration time, with floors for all."""
    workload, server = mixed(), two_piece_server()
    fair = fs.solve_fair(workload, server, alpha, fairness_floor=0.01, max_iteration_time=0.015)
    assert fair.certificate.ok, fair.certificate
    assert fair.fluid.iteration_time <= 0.015 * (1 + 1e-9)
    assert np.all(fair.fluid.admitted_fraction >= 0.01 * (1 - 1e-12))


# The certificate.


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0, math.inf])
def test_certificate_sees_tampering(alpha: float) -> None:
    """Moving capacity from one type to another, at the same total load, is noticed."""
    fair = fs.solve_fair(mixed(), two_piece_server(), alpha)
    row = int(np.argmax(fair.fluid.model.halfspaces @ fair.admitted_rate))
    work = fair.fluid.model.halfspaces[row]
    moved = np.array(fair.admitted_rate)
    moved[:2] += np.array([1.0, -1.0]) * 1e-4 / work[:2]
    fluid = dataclasses.replace(
        fair.fluid, admitted_rate=moved, iteration_rate=fair.fluid.model.iteration_rate(moved)
    )
    wrong = dataclasses.replace(fair, fluid=fluid)
    assert fair.certificate.ok
    assert wrong.certificate.complementary_slackness > 1e-6
    assert wrong.status == "imprecise"
    assert "imprecise" in repr(wrong)


def test_embedded_solution_is_one_like_any_other() -> None:
    """Certified by itself, written and read."""
    fluid = fs.solve_fair(mixed(), two_piece_server()).fluid
    assert fluid.certificate.ok
    again = fs.FluidSolution.from_dict(fluid.to_dict())
    np.testing.assert_array_equal(again.admitted_rate, fluid.admitted_rate)
    assert again.certificate.ok


# How it is shown.


def test_frame_repr_and_plot() -> None:
    """One row per type, the name of the fairness, bars inside the offered outline."""
    from matplotlib import pyplot

    fairs = [fs.solve_fair(mixed(), two_piece_server(), alpha) for alpha in (1.0, math.inf)]
    frame = fairs[0].to_frame()
    assert frame["type"].tolist() == list(mixed().type_names)
    np.testing.assert_allclose(frame["share"], fairs[0].admitted_rate)
    assert "proportional" in repr(fairs[0])
    assert "max-min" in fairs[1]._repr_html_()
    axes = fs.plots.fair_shares(fairs)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["offered", "α = 1", "α = ∞"]
    heights = [bar.get_height() for bar in axes.containers[1]]
    np.testing.assert_allclose(heights, fairs[0].admitted_rate)
    pyplot.close(axes.figure)
    pyplot.close(fairs[0].plot().figure)
    with pytest.raises(InputError):
        fs.plots.fair_shares([])


# What it says when it cannot.


@pytest.mark.parametrize(
    ("asked", "argument"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"weights": 0.0}, "weights of type 'chat'"),
        ({"weights": [1.0, 2.0]}, "weights"),
        ({"weights": [1.0, 1.0, -1.0, 1.0]}, "weights of type 'long answers'"),
        ({"share": [1.0, 0.0, 1.0, 1.0]}, "share of type 'long prompts'"),
        ({"share": "revenue"}, "objective"),
        ({"max_iteration_time": -0.001}, "max_iteration_time"),
    ],
)
def test_wrong_input_is_named(asked: dict[str, Any], argument: str) -> None:
    """The argument at fault, with the type where there is one."""
    with pytest.raises(InputError) as caught:
        fs.solve_fair(mixed(), two_piece_server(), **asked)
    assert caught.value.argument == argument


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0, math.inf])
def test_floors_that_fill_the_server(alpha: float) -> None:
    """Floors at the boundary leave nothing to share: every α admits them and no more."""
    workload, server = mixed(), two_piece_server()
    most = 1 / fs.solve_fluid(workload, server).load.max()
    fair = fs.solve_fair(workload, server, alpha, fairness_floor=most)
    np.testing.assert_allclose(fair.fluid.admitted_fraction, most, rtol=1e-8)


def test_infeasible_floors_are_named() -> None:
    """Floors beyond the server: the resources they overload and the factor that would do."""
    with pytest.raises(InfeasibleError, match="feasible when multiplied by"):
        fs.solve_fair(mixed(), two_piece_server(), 1.0, fairness_floor=0.9)


def test_fair_curve_draws_every_share_by_alpha() -> None:
    """One line per type, ordered by α whatever the order given, infinity at the right end."""
    workload = fs.Workload([fs.RequestType("a", 9.0, 125, 1), fs.RequestType("b", 9.0, 500, 1)])
    server = fs.Server(float("inf"), fs.IterationTime.affine(1e-9, 1e-3, 0.0, 0.0))
    axes = fs.plots.fair_curve([fs.solve_fair(workload, server, a) for a in (float("inf"), 0.0, 1.0)])
    lines = [np.asarray(line.get_xydata()) for line in axes.get_lines()]
    assert lines[0] == pytest.approx(np.array([[0.0, 8.0], [0.5, 4.0], [1.0, 1.6]]), abs=1e-6)
    assert lines[1] == pytest.approx(np.array([[0.0, 0.0], [0.5, 1.0], [1.0, 1.6]]), abs=1e-6)
    with pytest.raises(InputError, match="solutions"):
        fs.plots.fair_curve([])
