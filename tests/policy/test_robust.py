"""Rates that may be off: protected thresholds against every vertex of the uncertainty set."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.policy import compile_policy, largest_load
from fluidsched.policy.capped import overflow, plan_cap, resident_kv_law
from fluidsched.policy.problem import Problem
from fluidsched.policy.profiles import normal_quantile
from fluidsched.policy.robust import largest_kv, protected_rates, top_sum
from fluidsched.policy.wait import _Block


def vertices(errors, budget, signs=(1.0,)):
    """All vertices of {|e| ≤ d, Σ|e|/d ≤ Γ} with the given signs: ⌊Γ⌋ full, one at the fraction, the rest 0."""
    count = len(errors)
    full = min(int(budget), count)
    part = budget - int(budget) if full < count else 0.0
    found = []
    for chosen in itertools.combinations(range(count), full):
        rest = [None] if full == count or part == 0.0 else [j for j in range(count) if j not in chosen]
        for extra in rest:
            size = np.zeros(count)
            size[list(chosen)] = 1.0
            if extra is not None:
                size[extra] = part
            for sign in itertools.product(signs, repeat=count):
                found.append(size * errors * np.array(sign))
    return found


CASES = st.integers(1, 4).flatmap(
    lambda a: st.tuples(
        *(st.lists(st.floats(lo, hi), min_size=a, max_size=a) for lo, hi in ((0.1, 4), (0.0, 0.06), (0, 0.9)))
    )
)


@given(CASES, st.floats(0.0, 5.0))
@settings(max_examples=300)
def test_protected_rates_are_the_worst_vertex(case, budget):
    """a_j / x_j = max over vertices of a_j (1 + e_j) / (1 − Σ a_i (1 + e_i) v_i), infinite where a vertex saturates."""
    a, v, d = map(np.array, case)
    worst = np.zeros(len(a))
    for e in [*vertices(d, budget), np.zeros(len(a))]:
        idle = 1.0 - float((a * (1 + e)) @ v)
        worst = np.maximum(worst, a * (1 + e) / idle if idle > 0.0 else np.inf)
    assert protected_rates(a, v, d, budget) == pytest.approx(worst, rel=1e-9)


@given(st.lists(st.floats(0.0, 9.0), min_size=1, max_size=6), st.floats(0.0, 7.0))
def test_top_sum_is_the_best_vertex(values, budget):
    values = np.array(values)
    best = max(float(e @ values) for e in vertices(np.ones(len(values)), budget))
    assert float(top_sum(values, budget)) == pytest.approx(best)


@given(
    st.lists(
        st.tuples(st.floats(0.1, 5), st.floats(10, 900), st.floats(0, 300), st.floats(0, 0.8)),
        min_size=1,
        max_size=3,
    ),
    st.floats(0.0, 3.0),
    st.floats(0.0, 1.0),
)
@settings(max_examples=30, deadline=None)
def test_largest_kv_bounds_every_mix_and_is_reached(types, budget, deviations):
    """Never below the held KV at any vertex or between two; within 1e-3 of the best on a fine search."""
    weight, mean, spread, errors = map(np.array, zip(*types, strict=True))
    square = mean**2 + spread**2
    bound = largest_kv(weight, mean, square, deviations, errors, budget)
    corners = [*vertices(errors, budget, (1.0, -1.0)), np.zeros(len(weight))]
    best = 0.0
    for first, second in itertools.combinations_with_replacement(corners, 2):
        for t in np.linspace(0.0, 1.0, 21):
            w = weight * (1.0 + (1 - t) * first + t * second)
            centre = w @ mean / w.sum()
            best = max(best, centre + deviations * np.sqrt(max(w @ square / w.sum() - centre**2, 0.0)))
    assert best <= bound * (1 + 1e-9)
    assert bound <= best * 1.005


def fluid_of(time, rates=(4.0, 2.0, 1.0), capacity=1e6):
    lengths = [(300, 20), (800, 60), (150, 120)]
    types = [fs.RequestType(f"t{i}", r, *x) for i, (r, x) in enumerate(zip(rates, lengths, strict=True))]
    return fs.solve_fluid(fs.Workload(types), fs.Server(capacity, time))


TIMES = [
    fs.IterationTime.affine(0.01, 2e-5, 4e-5, 3e-7, 1e-9),
    fs.IterationTime.two_piece(0.01, 1e-5, 50, 4e-5, 3e-7, 3e-9),
]


@pytest.mark.parametrize("time", TIMES, ids=["affine", "two-piece"])
@pytest.mark.parametrize("budget", [0.5, 1.0, 1.7, None])
def test_wait_thresholds_hold_at_every_vertex(time, budget):
    """n_j (1 − Σ a_i(1+e_i) v_i) ≥ a_j (1+e_j) B at all of them, and the smallest such n: lowering one breaks it."""
    fluid, error, k = fluid_of(time), 0.4, 5
    table = compile_policy(
        fluid, "wait", slack=0.0, block_iterations=k, rate_error=error, error_budget=budget
    )
    block = _Block(Problem.of(fluid, 0.01), k)
    a, slope = block.rate, block._lengths.work.min(axis=0).sum(axis=1)
    errors = vertices(np.full(3, error), 3.0 if budget is None else budget)

    def holds(n):
        keeps_up = a * block.cycle_time(n) <= n * (1 + 1e-9)
        spare = block.cycle_time(n) - n @ slope
        for e in errors:
            keeps_up &= n * (1.0 - (a * (1 + e)) @ slope) >= a * (1 + e) * spare * (1 - 1e-9)
        return keeps_up

    n = table.thresholds.astype(float)
    assert holds(n).all()
    for j in range(3):
        fewer = n - (np.arange(3) == j)
        assert fewer[j] == 0.0 or not holds(fewer)[j]


def test_price_rises_with_the_budget_from_nothing_to_that_of_the_box():
    """Γ = 0 costs nothing; more types wrong at once cost more; Γ ≥ the number of types is the box."""
    fluid = fluid_of(TIMES[0])
    for kind in ("wait", "gated", "capped"):
        prices = []
        for budget in (0.0, 1.0, 2.0, 3.0, None):
            table = compile_policy(fluid, kind, rate_error=0.3, error_budget=budget, block_iterations=None)
            line = table.certificate["robust"]
            assert line["value"] == [0.3] * 3
            prices.append(line["price"])
        assert prices[0] == 0.0
        assert prices == sorted(prices)
        assert 0.0 < prices[1] < prices[3]
        assert prices[3] == prices[4]
        assert prices[4] <= 1 - 1 / 1.3 + 0.03, kind


def test_no_errors_change_nothing():
    fluid = fluid_of(TIMES[1])
    for kind in ("wait", "gated", "capped"):
        assert compile_policy(fluid, kind, rate_error=0.0) == compile_policy(fluid, kind)
        assert "robust" not in compile_policy(fluid, kind).certificate


@pytest.mark.parametrize(("capacity", "delta"), [(30_000.0, 0.01), (30_000.0, 1e-4), (90_000.0, 0.2)])
def test_a_cap_fits_memory_in_every_mix(capacity, delta):
    """At every vertex N κ̄ + z σ √N ≤ C and P(KV > C) ≤ δ by the actual law, and one more breaks one of the two."""
    fluid = fluid_of(TIMES[0], capacity=capacity)
    errors, budget = np.array([0.4, 0.3, 0.5]), 1.5
    asked = {"overflow_probability": delta, "rate_error": errors.tolist(), "error_budget": budget}
    table = compile_policy(fluid, "capped", **asked)
    line = table.certificate["overflow_probability"]
    known, problem = Problem.of(fluid, delta), Problem.of(fluid, delta, 0.0, None, errors.tolist(), budget)
    worst = []
    for cap in (table.max_in_service, table.max_in_service + 1):
        held = over = 0.0
        for e in vertices(errors, budget, (1.0, -1.0)):
            mix = known.at_rate(known.rate * (1 + e))
            mean, deviation = resident_kv_law(mix)
            held = max(held, cap * mean + normal_quantile(delta) * deviation * np.sqrt(cap))
            tail = overflow(mix, cap)
            over = max(over, tail.probability)
            assert tail.probability <= overflow(problem, cap).chernoff
        worst.append((held, over))
    assert table.max_in_service < plan_cap(known)[1]
    assert worst[0][0] <= capacity
    assert worst[0][1] == pytest.approx(line["value"], rel=1e-9)
    assert line["value"] <= delta < line["chernoff"]
    assert worst[1][0] > capacity or worst[1][1] > delta


def test_beyond_the_robust_reach_the_error_says_how_far():
    fluid = fluid_of(TIMES[0])
    crowded = fs.solve_fluid(fluid.workload.at_load(0.9, fluid.server), fluid.server)
    assert compile_policy(crowded, "wait", slack=0.0).kind == "wait"
    reach = largest_load(crowded, "wait", rate_error=0.5)
    assert 0.5 < reach < 0.7
    with pytest.raises(InfeasibleError, match=f"up to {reach:.3f} of the fluid boundary") as refused:
        compile_policy(crowded, "wait", slack=0.0, rate_error=0.5)
    assert refused.value.reason == "time"


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"rate_error": -0.1}, "rate_error"),
        ({"rate_error": 1.0}, "rate_error"),
        ({"rate_error": [0.1, 0.2]}, "rate_error"),
        ({"rate_error": [0.1, float("nan"), 0.1]}, r"rate_error\[1\]"),
        ({"rate_error": "much"}, "rate_error"),
        ({"error_budget": 1.0}, "error_budget"),
        ({"rate_error": 0.1, "error_budget": -1.0}, "error_budget"),
    ],
)
def test_bad_errors_are_named(arguments, argument):
    with pytest.raises(InputError, match=argument):
        compile_policy(fluid_of(TIMES[0]), "wait", **arguments)
