"""Numbers inside compiled tables by hand or by enumeration: where a small error in a compiler would go unseen."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.policy import wait_curve
from fluidsched.policy.gated import _evaluate, _Found, _spacing
from fluidsched.policy.nested_wait import Stream
from fluidsched.policy.problem import Problem, boundary_problem, largest_share

SERVER = fs.Server(8000, fs.IterationTime.affine(0.25, 2**-14, 2**-14, 2**-18))


def workload(*rates: float) -> fs.Workload:
    return fs.Workload([fs.RequestType("chat", rates[0], 24, 15), fs.RequestType("code", rates[1], 200, 4)])


def test_spaced_requests_hold_what_their_ages_add_up_to() -> None:
    """One request every k iterations, the last to stay a lag longer: KV tokens added up age by age."""
    problem = Problem.of(fs.solve_fluid(workload(1.0, 0.5), SERVER), 0.01)
    last = np.array([14, 3])
    for k in ([1, 1], [2, 3], [5, 2], [40, 40]):
        for lag in ([0, 0], [1, 4], [7, 2]):
            held = problem.worst_profile.spaced(np.array(lag)).of_fixed(np.array(k))[1]
            for j, prompt in enumerate((24, 200)):
                ages = range(int(last[j]) + lag[j], -1, -k[j])
                expected = sum(prompt + problem.padding + min(age, int(last[j])) for age in ages)
                assert held[j] == expected


def test_the_refused_are_as_uncertain_as_the_worst_of_the_admitted() -> None:
    """Along the offered mix types refused at the optimum come back, with the largest error stated for the others."""
    crowded = workload(60.0, 5.0)
    fluid = fs.solve_fluid(crowded, SERVER)
    refused = fluid.admitted_rate == 0.0
    assert refused.tolist() == [False, True]
    problem = Problem.of(fluid, 0.01, rate_error=[0.2, 0.1])
    boundary = boundary_problem(fluid, problem)
    assert boundary.rate_error is not None
    assert boundary.rate_error.tolist() == [0.2, 0.2]
    np.testing.assert_allclose(boundary.rate, crowded.at_load(1.0, SERVER).arrival_rate, rtol=1e-12)


@pytest.mark.parametrize("kind", ["wait", "nested-wait", "gated", "capped", "lookahead"])
def test_every_line_of_a_certificate_is_a_number_with_a_unit(kind: str) -> None:
    """Values are numbers, units and formulas texts; the throughput certified is what is admitted."""
    fluid = fs.solve_fluid(workload(1.0, 0.5), SERVER)
    asked: dict[str, Any] = {"horizon": 3600.0} if kind == "nested-wait" else {}
    certificate = fs.compile_policy(fluid, kind, **asked).certificate  # type: ignore[arg-type]
    assert certificate
    for name, line in certificate.items():
        values = np.atleast_1d(np.asarray(line["value"], dtype=np.float64))
        assert not np.isnan(values).any(), name
        assert isinstance(line["unit"], str)
        assert len(line["formula"]) > 3
    if "throughput" in certificate:
        assert certificate["throughput"]["value"] == pytest.approx(1.5, rel=1e-9)


def test_every_boundary_queue_is_certified_by_its_own_law() -> None:
    """E[V_k] of a Nested WAIT table is that of n_k, n_(k−1) trials and the share that goes on, for every segment."""
    lengths = fs.lengths.geometric(mean=40, maximum=160)
    fluid = fs.solve_fluid(
        fs.Workload([fs.RequestType("chat", 20.0, 24, lengths)]), fs.Server(60_000, SERVER.iteration_time)
    )
    table = fs.compile_policy(fluid, "nested-wait", horizon=3600.0, segment_count=3)
    n = [segment.threshold for segment in table.segments]
    line = table.certificate["boundary_queue"]
    assert len(line["value"]) == len(n) == 3
    assert line["value"][0] == 0.0
    assert line["share"][0] == 1.0  # everybody enters the first segment
    for k in (1, 2):
        share = line["share"][k]
        assert 0.0 < share < 1.0
        mean = fs.bounds.embedded_queue_mean(n[k], n[k - 1] * share, n[k - 1])
        assert line["value"][k] == pytest.approx(mean, rel=1e-9)
        assert line["slack"][k] == pytest.approx(n[k] / (share * n[k - 1]) - 1, rel=1e-9)


def test_unlimited_memory_needs_no_headroom() -> None:
    """Look-ahead by the law of the lengths keeps nothing free where memory never ends, and takes prompts whole."""
    free = dataclasses.replace(SERVER, kv_capacity=math.inf)
    table = fs.compile_policy(fs.solve_fluid(workload(1.0, 0.5), free), "lookahead")
    assert table.lookahead.mode == "law"
    assert table.lookahead.headroom_tokens == 0.0
    assert table.certificate["memory"]["guarantee"] == "certain"


def test_a_bound_is_from_above_or_from_below() -> None:
    """Any other direction is refused by name."""
    with pytest.raises(InputError, match="direction"):
        fs.bounds.Bound("mean_ttft", 1.0, "s", "sideways", "1", "none", "always")  # type: ignore[arg-type]


def test_a_gate_where_rows_have_none_is_named() -> None:
    """Engine-like tables have gate 0; another is refused with the place it stands at."""
    data = fs.baselines.vllm().to_dict()
    data["types"][0]["gate"] = 2
    with pytest.raises(InputError, match=r"types\[0\]\.gate must be 0"):
        fs.PolicyTable.from_dict(data)


def test_a_table_that_does_not_look_ahead_keeps_nothing_free() -> None:
    """Headroom, even of one token, belongs to a mode."""
    with pytest.raises(InputError, match="headroom_tokens"):
        fs.policy.Lookahead("none", 1.0)


def test_fingerprints_tell_tables_apart() -> None:
    """Equal tables have one fingerprint, whatever made them; another cap has another."""
    table = fs.baselines.vllm()
    again = fs.PolicyTable.from_dict(table.to_dict())
    assert table.fingerprint == again.fingerprint
    assert len({table.fingerprint, dataclasses.replace(table, max_in_service=7).fingerprint}) == 2
    assert all(isinstance(one.fingerprint, str) and one.fingerprint for one in (table, again))


def test_random_prompts_and_those_in_buffers_add_their_variances() -> None:
    """Nested WAIT by hand: Bernstein's L v/3 + sqrt((L v/3)² + 2 V L) over the mean, V of places and buffers."""
    prompts = fs.lengths.empirical([100, 300], [0.5, 0.5])
    fluid = fs.solve_fluid(
        fs.Workload([fs.RequestType("chat", 1.0, prompts, fs.lengths.empirical([2, 4], [0.5, 0.5]))]), SERVER
    )
    stream = Stream(Problem.of(fluid, 0.01), 1)
    log = 2.0
    memory = stream.memory(np.array([0, 2]), np.array([400.0, 200.0]), np.array([0.0, 50.0]), log)
    tokens = [200 + stage for stage in range(4)]  # at the end of an iteration
    base = 400 * (tokens[0] + tokens[1]) + 200 * (tokens[2] + tokens[3])
    variance = (400 + 400 + 200 + 200 + 50) * 100.0**2
    third = log * 100.0 / 3.0
    assert memory.base == pytest.approx(base, rel=1e-12)
    assert memory.prompts == "law"
    mean = base + 50 * (200 + 1)  # who waits at the boundary has had two tokens
    assert memory.needed == pytest.approx(mean + third + math.sqrt(third**2 + 2 * variance * log), rel=1e-12)
    assert memory.certain == pytest.approx(mean + 1250 * 100.0, rel=1e-12)


def test_a_budget_of_tokens_may_be_used_up() -> None:
    """One request of 64 tokens every second iteration: a budget of 32 an iteration does, one of 31 does not."""
    fluid = fs.solve_fluid(fs.Workload([fs.RequestType("p", 1.0, 64, 1)]), SERVER)
    problem = Problem.of(fluid, 0.01)

    def plan(budget: float) -> object:
        return _evaluate(problem, _spacing(problem, budget), budget, window=1, stretch=1.5)

    assert plan(31.0) == "tokens"
    enough = plan(32.0)
    assert isinstance(enough, _Found)
    assert (enough.threshold.tolist(), enough.period.tolist()) == ([1.0], [2.0])


@pytest.mark.parametrize(
    ("outputs", "cached", "timing"),
    [(4, 0.0, "certain"), (4, 0.5, "certain"), (4, 0.3, "expectation"), ((4, 8), 0.5, "expectation")],
)
def test_times_are_certain_where_nothing_in_a_batch_is_random(
    outputs: int | tuple[int, int], cached: float, timing: str
) -> None:
    """Fixed lengths, of which whole tokens are cached; a half of 24 is whole, three tenths of it are not."""
    law = outputs if isinstance(outputs, int) else fs.lengths.empirical(list(outputs))
    types = [fs.RequestType("chat", 1.0, 24, law, cached_prefix_fraction=cached)]
    table = fs.compile_policy(fs.solve_fluid(fs.Workload(types), SERVER), "wait", slack=0.1)
    assert table.certificate["cycle_time"]["guarantee"] == timing


def test_the_largest_share_is_in_whole_thousandths_and_none_is_zero() -> None:
    """Whatever the order of the lengths; a share that exists nowhere is 0."""
    problem = Problem.of(fs.solve_fluid(workload(1.0, 0.5), SERVER), 0.01)
    for most in (0.0, 0.0005, 0.001, 0.4567, 1.0, 2.0):
        for good in (3, 11):
            share = largest_share(
                problem,
                lambda at, k, most=most, good=good: bool(k == good and at.rate[0] <= most + 1e-12),
                list(range(1, 14)),
            )
            assert share == pytest.approx(min(math.floor(most * 1000 + 1e-9) / 1000, 1.0))


def test_the_curve_s_wait_is_little_s_law_of_the_certified_queue() -> None:
    """Requests before admission over their rate, within the estimate's tenth of a request a type."""
    fluid = fs.solve_fluid(workload(1.0, 0.5), SERVER)
    curve = wait_curve(fluid, slack=0.1, block_iterations=[1, 3, 8])
    for k, wait in zip(curve.block_iterations, curve.wait, strict=True):
        queue = fs.compile_policy(fluid, "wait", slack=0.1, block_iterations=int(k)).certificate["queue"]
        assert wait == pytest.approx(queue["value"] / 1.5, abs=0.2 / 1.5)


def test_a_cap_says_by_what_it_was_found() -> None:
    """By the law of the lengths where a probability is asked for, by the longest request where none is allowed."""
    fluid = fs.solve_fluid(workload(1.0, 0.5), SERVER)
    by_law, certain = (
        fs.compile_policy(fluid, "capped", overflow_probability=delta).certificate["cap"]
        for delta in (0.01, 0.0)
    )
    assert "P(KV of N residents > C) ≤ δ" in by_law["formula"]
    assert certain["formula"].startswith("⌊N⌋")
    assert certain["value"] == 8000 // 203


def test_quantile_segments_have_equal_shares_of_those_who_leave() -> None:
    """Four segments of outputs 1 to 100, equally likely: a quarter leaves in each, so they begin at 25, 50 and 75."""
    lengths = fs.lengths.uniform(1, 100)
    fluid = fs.solve_fluid(
        fs.Workload([fs.RequestType("chat", 5.0, 24, lengths)]), fs.Server(200_000, SERVER.iteration_time)
    )
    table = fs.compile_policy(
        fluid, "nested-wait", slack=0.1, block_iterations=1, segments="quantiles", segment_count=4
    )
    assert [segment.boundary for segment in table.segments] == [24, 49, 74, 99]


def test_the_slack_asked_for_is_in_the_refusal() -> None:
    """And it is left out where none was asked for."""
    for slack, said in ((0.25, "iterations with slack 0.25 exists"), (0.0, "iterations exists")):
        fluid = fs.solve_fluid(workload(1.0, 0.5).at_load(0.999, SERVER), SERVER)
        with pytest.raises(InfeasibleError, match=said):
            fs.compile_policy(fluid, "wait", slack=slack)


def test_a_row_of_a_table_is_matched_by_a_match() -> None:
    """A name in its place is refused."""
    with pytest.raises(InputError, match="match must be a Match; got chat"):
        fs.policy.TableType("chat", "chat")  # type: ignore[arg-type]
