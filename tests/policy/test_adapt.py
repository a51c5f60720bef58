"""Adapting a table to recent arrivals: error rate, power, the change point, and when the table is kept."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.policy.adaptation import _change_point, _weighted_rate


@pytest.fixture(scope="module")
def fluid():
    types = [
        fs.RequestType("short", 3.0, prompt_tokens=200, output_tokens=20),
        fs.RequestType("long", 1.0, prompt_tokens=600, output_tokens=150),
    ]
    server = fs.Server(200_000, fs.IterationTime.affine(0.01, 2e-5, 4e-5, 1e-7, 0.0))
    return fs.solve_fluid(fs.Workload(types), server)


@pytest.fixture(scope="module", params=["wait", "gated", "capped"])
def table(request, fluid):
    return fs.compile_policy(fluid, request.param)


def joined(first, second, at):
    """The first path until `at`, then the second."""
    columns = [np.concatenate([x, y]) for x, y in (
        (first.arrival_s, second.arrival_s + at),
        (first.prompt_tokens, second.prompt_tokens),
        (first.output_tokens, second.output_tokens),
        (first.type, second.type),
    )]  # fmt: skip
    return fs.ArrivalPath(*columns, type_names=first.type_names, horizon=at + second.horizon)


def test_right_rates_are_left_alone_at_the_stated_error_rate(fluid):
    """Null: P(changed) ≤ α = 0.1 with rates as in the table. 300 windows; this test errs with probability 1e-4."""
    table = fs.compile_policy(fluid, "capped")
    changed = sum(
        fs.adapt(table, fluid.workload.sample(60.0, seed), fluid, error_rate=0.1).is_changed
        for seed in range(300)
    )
    assert binomtest(changed, 300, 0.1, alternative="greater").pvalue > 1e-4


def test_new_rates_make_the_table_of_those_rates(table, fluid):
    """One type twice as fast for 10 minutes: found, estimated within 5 sd, and compiled for exactly that estimate."""
    path = fluid.workload.with_rates([3.0, 2.0]).sample(600.0, 1)
    adapted = fs.adapt(table, path, fluid, options={"overflow_probability": 0.02})
    assert adapted.is_changed
    assert adapted.rate[0] == adapted.rate_before[0] == 3.0
    assert adapted.rate[1] == pytest.approx(2.0, abs=5 * np.sqrt(2.0 / 600))
    solution = fs.solve_fluid(fluid.workload.with_rates(adapted.rate), fluid.server)
    assert adapted.table == fs.compile_policy(solution, table.kind, overflow_probability=0.02)
    assert "long 1 → " in adapted.reason
    again = fs.adapt(adapted.table, path, adapted.fluid)
    assert not again.is_changed
    assert again.table is adapted.table


def test_the_same_arguments_give_the_same_answer(table, fluid):
    path = fluid.workload.with_rates([6.0, 1.0]).sample(300.0, 5)
    first, second = (fs.adapt(table, path, fluid) for _ in range(2))
    assert first.table == second.table
    assert np.array_equal(first.rate, second.rate)


def test_what_came_before_the_change_is_not_used(fluid):
    """Rate 3, then 9 from 300 s on: the change is put within 10 s, and the estimate is of what follows."""
    table = fs.compile_policy(fluid, "gated")
    before, after = (fluid.workload.with_rates(r).sample(300.0, 2) for r in ([3.0, 1.0], [9.0, 1.0]))
    adapted = fs.adapt(table, joined(before, after, 300.0), fluid)
    assert adapted.change_s[0] == pytest.approx(300.0, abs=10.0)
    assert np.isnan(adapted.change_s[1])
    assert adapted.rate[0] == pytest.approx(9.0, abs=5 * np.sqrt(9.0 / 200))
    frame = adapted.to_frame()
    assert list(frame.index) == ["short", "long"]
    assert frame.loc["long", "rate"] == 1.0


def test_change_point_and_weights_by_hand():
    times = np.array([1.0, 6.0, 6.5, 7.0, 7.5, 8.0, 8.5, 9.0, 9.5])
    assert _change_point(times, 10.0) == 6.0
    decay = 4.0 / np.log(2.0)
    weighted = _weighted_rate(np.array([6.0, 10.0]), 2.0, 10.0, decay)
    assert weighted == pytest.approx((0.5 + 0.5 + 1.0) / (decay * 0.75))


def test_weighted_rate_is_unbiased_but_for_the_half():
    """Null: the mean of 4 000 estimates is λ + ½ / exposure, within 5 standard errors (p < 1e-6)."""
    rng, rate, window, decay = np.random.default_rng(3), 2.0, 50.0, 15.0
    estimates = [
        _weighted_rate(rng.uniform(0.0, window, rng.poisson(rate * window)), 0.0, window, decay)
        for _ in range(4000)
    ]
    exposure = decay * (1.0 - np.exp(-window / decay))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert np.mean(estimates) - 0.5 / exposure == pytest.approx(rate, abs=5 * error)


def test_a_silent_type_keeps_a_rate_above_zero(fluid):
    table = fs.compile_policy(fluid, "wait")
    path = fluid.workload.with_rates([3.0, 0.0]).sample(300.0, 7)
    adapted = fs.adapt(table, path, fluid)
    assert 0.0 < adapted.rate[1] < 0.01
    assert adapted.table.thresholds[1] >= 1


def test_kept_for_too_little_data(table, fluid):
    adapted = fs.adapt(table, fluid.workload.sample(2.0, 1), fluid)
    assert adapted.table is table
    assert "too little data" in adapted.reason
    silent = fluid.workload.with_rates([0.0, 0.0]).sample(60.0, 1)
    assert fs.adapt(table, silent, fluid).is_changed  # 240 expected and none came: that is data


def test_kept_for_requests_of_no_known_type(table, fluid):
    other = fs.Workload([fs.RequestType("other", 3.0, prompt_tokens=200, output_tokens=20)])
    adapted = fs.adapt(table, other.sample(60.0, 1), fluid)
    assert adapted.table is table
    assert "no known type" in adapted.reason


def test_kept_where_no_table_exists_at_the_new_rates(fluid):
    """A slack that the new rates leave no room for."""
    table = fs.compile_policy(fluid, "wait", slack=0.5)
    assert fluid.load.max() < 0.5
    path = fluid.workload.with_rates(np.array([3.0, 1.0]) * 0.95 / fluid.load.max()).sample(300.0, 3)
    adapted = fs.adapt(table, path, fluid, options={"slack": 0.5})
    assert adapted.table is table
    assert adapted.fluid is fluid
    assert "the rates changed, but no WAIT table" in adapted.reason
    assert "kept" in repr(adapted)


def test_bad_arguments_are_named(fluid):
    table, path = fs.compile_policy(fluid, "capped"), fluid.workload.sample(60.0, 1)
    trace = fs.ArrivalPath(path.arrival_s, path.prompt_tokens, path.output_tokens, path.type, path.type_names)
    faster = fs.solve_fluid(fluid.workload.scaled(1.1), fluid.server)
    for arguments, argument in (
        ((fs.baselines.vllm(), path, fluid, {}), "table"),
        ((table, path, faster, {}), "fluid"),
        ((table, trace, fluid, {}), "window"),
        ((table, path, fluid, {"window": 1.0}), "window"),
        ((table, path, fluid, {"half_life": 0.0}), "half_life"),
        ((table, path, fluid, {"error_rate": 1.0}), "error_rate"),
        ((table, path, fluid, {"minimum_requests": 0}), "minimum_requests"),
    ):
        *positional, named = arguments
        with pytest.raises(InputError, match=argument):
            fs.adapt(*positional, **named)
