"""Compiled Nested WAIT tables: identities, cuts against brute force, errors, and overflow observed in simulation."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.policy import segment_curve
from fluidsched.policy.nested_wait import NestedOptions, Stream, nested_exists, shortest_cuts
from fluidsched.policy.problem import Problem
from fluidsched.queues import exact_buffer, lundberg_buffer, lundberg_exponent, lundberg_exponents
from fluidsched.queues.lundberg import exponents_at_most

TIME = fs.IterationTime.affine(0.05, 1e-4, 1e-4, 1e-6)


def solved(workload: fs.Workload, capacity: float = 40_000, **limits: object) -> fs.FluidSolution:
    return fs.solve_fluid(workload, fs.Server(capacity, TIME, **limits))


def mix(rate: float = 100.0, outputs: tuple[int, ...] = (4, 10, 30)) -> fs.Workload:
    law = fs.lengths.empirical(list(outputs), [0.6, 0.3, 0.1][: len(outputs)])
    return fs.Workload([fs.RequestType("mix", rate, 7, law)])


def test_base_memory_is_the_flow_times_the_work_where_lengths_end_at_boundaries() -> None:
    """M(n) = β Σ λ_j W_j for n_k = βΛ_k and ℓ = 1."""
    types = [fs.RequestType(str(o), rate, 11, o) for o, rate in ((3, 5.0), (8, 2.0), (20, 1.0))]
    workload = fs.Workload(types)
    stream = Stream(Problem.of(solved(workload), 0.01), 1)
    first = np.array([0, 3, 8])
    beta = 1.7
    threshold = beta * np.array([8.0, 3.0, 1.0])
    memory = stream.memory(first, threshold, np.zeros(3), 1.0)
    assert memory.base == pytest.approx(beta * float(workload.arrival_rate @ workload.kv_work), rel=1e-12)
    assert memory.needed == memory.certain == memory.base


def test_cycle_time_is_the_theorem_s_where_lengths_end_at_boundaries() -> None:
    """T(n) = c0 + n_1 (c_pf p) + c_dec (n_1 r_1 + Σ n_k δ_k) + c_kv (M(n) − n_1 p)."""
    stream = Stream(Problem.of(solved(mix()), 0.01), 1)
    first, n = np.array([0, 4, 10]), np.array([50.0, 21.0, 6.0])
    base = stream.memory(first, n, np.zeros(3), 1.0).base
    assert base == 50 * sum(7 + s for s in range(4)) + 21 * sum(7 + s for s in range(4, 10)) + 6 * sum(
        7 + s for s in range(10, 30)
    )
    expected = 0.05 + 50 * 1e-4 * 7 + 1e-4 * (50 * 3 + 21 * 6 + 6 * 20) + 1e-6 * (base - 50 * 7)
    assert stream.times(first, n).sum() == pytest.approx(expected, rel=1e-12)
    assert stream.longest_times(first, n).sum() == pytest.approx(expected, rel=1e-12)


def test_blocks_hold_what_their_last_iteration_holds() -> None:
    stream = Stream(Problem.of(solved(mix(outputs=(4, 12))), 0.01), 4)
    assert stream.blocks == 3
    base = stream.memory(np.array([0, 1]), np.array([9.0, 4.0]), np.zeros(2), 1.0).base
    assert base == 9 * (7 + 3) + 4 * (7 + 7) + 4 * (7 + 11)


@pytest.mark.parametrize(
    ("trials", "threshold", "p", "value"),
    [
        (10, 4, 0.3, 0.871061),
        (21, 9, 0.3, 1.104776),
        (100, 35, 0.3, 0.451427),
        (66, 43, 0.619, 0.282819),
        (20, 19, 0.5, 13.8629),
    ],
)
def test_exponents_of_many_are_the_published(trials: int, threshold: int, p: float, value: float) -> None:
    assert float(lundberg_exponents(p, threshold / trials)) == pytest.approx(value, rel=3e-6)


def test_exponents_of_many_are_those_of_one() -> None:
    """Random queues, from nearly unstable to nearly never full."""
    rng = np.random.default_rng(5)
    trials = rng.integers(2, 3000, 400)
    threshold = rng.integers(1, trials)
    p = threshold / trials * rng.uniform(1e-4, 0.9999, 400)
    many = lundberg_exponents(p, threshold / trials)
    one = [lundberg_exponent(int(n), float(q), int(k)) for n, q, k in zip(trials, p, threshold, strict=True)]
    np.testing.assert_allclose(many, one, rtol=1e-9)


def test_quick_exponents_are_upper_bounds() -> None:
    """What prunes edges never exceeds the truth: over all of 0 < p < q < 1, and close where θ is small."""
    grid = np.concatenate(
        [np.geomspace(1e-8, 0.02, 60), np.linspace(0.03, 0.97, 60), 1 - np.geomspace(1e-6, 0.02, 60)]
    )
    p, q = (x.ravel() for x in np.meshgrid(grid, grid))
    p, q = p[p < q * (1 - 1e-6)], q[p < q * (1 - 1e-6)]
    ratio = lundberg_exponents(p, q) / exponents_at_most(p, q)
    assert ratio.max() <= 1.0 + 1e-12
    assert ratio[lundberg_exponents(p, q) < 0.3].min() > 0.95


@pytest.mark.parametrize("seed", range(6))
def test_cuts_are_the_best_of_all_subsets(seed: int) -> None:
    """Dynamic programming against all 2^8 sets of cuts, for each number of segments and for any."""
    rng = np.random.default_rng(seed)
    outputs = np.arange(1, 10)
    law = fs.lengths.empirical(outputs, rng.dirichlet(np.ones(9)))
    workload = fs.Workload([fs.RequestType("a", 50.0, 20, law)])
    stream = Stream(Problem.of(solved(workload), 0.01), 1)
    threshold = stream.thresholds(40, 1.0)
    best = dict.fromkeys(range(1, 10), math.inf)
    for count in best:
        for chosen in itertools.combinations(range(1, 9), count - 1):
            first = [0, *chosen]
            total = 0.0
            for i, j in zip(first, [*chosen, 9], strict=True):
                total += threshold[i] * stream.held[i:j].sum()
                if j < 9:
                    p = stream.share[j] / stream.share[i]
                    if not (p * threshold[i] < threshold[j] < threshold[i]):
                        total = math.inf
                        break
                    theta = lundberg_exponent(int(threshold[i]), float(p), int(threshold[j]))
                    total += stream.entry_held[j] * (threshold[j] + (5.0 + math.log(count)) / theta)
            best[count] = min(best[count], total)
    cuts = np.arange(9)
    for count, value in best.items():
        assert shortest_cuts(stream, threshold, cuts, 5.0, count)[0] == pytest.approx(value, rel=1e-9)
    value, first = shortest_cuts(stream, threshold, cuts, 5.0)
    assert value == pytest.approx(min(best.values()), rel=1e-9)
    assert best[len(first)] == pytest.approx(value, rel=1e-9)


def test_pruned_search_finds_what_the_whole_search_finds() -> None:
    """More cuts than are searched at once: the same value as over all edges."""
    law = fs.lengths.geometric(mean=150, maximum=600)
    stream = Stream(Problem.of(solved(fs.Workload([fs.RequestType("a", 5.0, 100, law)]), 1e9), 0.01), 1)
    threshold = stream.thresholds(60, 1.0)
    cuts = np.arange(600)
    value, first = shortest_cuts(stream, threshold, cuts, 12.0)
    counts = range(max(1, len(first) - 1), len(first) + 2)
    exact = [shortest_cuts(stream, threshold, cuts, 12.0, count)[0] for count in counts]
    assert value == pytest.approx(min(exact), rel=1e-9)


def test_a_compiled_table_keeps_its_conditions_and_survives_files(tmp_path: object) -> None:
    table = fs.compile_policy(solved(mix(200.0)), "nested-wait", slack=0.2, block_iterations=1)
    assert fs.PolicyTable.from_dict(table.to_dict()) == table
    table.to_json(tmp_path / "t.json")  # type: ignore[operator]
    assert fs.PolicyTable.from_json(tmp_path / "t.json") == table  # type: ignore[operator]
    table.to_csv(tmp_path / "t.csv")  # type: ignore[operator]
    assert fs.PolicyTable.from_csv(tmp_path / "t.csv").segments == table.segments  # type: ignore[operator]
    certificate = table.certificate
    assert len(table.segments) > 1
    assert table.segments[-1].boundary == 29
    assert certificate["slack"]["value"] >= 0.2
    assert certificate["memory"]["value"] <= 40_000
    queue = certificate["boundary_queue"]
    cycles = 1 + math.floor(3600 / 0.05)
    for before, segment, p in zip(table.segments, table.segments[1:], queue["share"][1:], strict=False):
        assert p * before.threshold < segment.threshold < before.threshold
        delta = 0.01 / len(table.segments)
        args = (before.threshold, float(p), segment.threshold, cycles, delta)
        assert segment.buffer == exact_buffer(*args) <= lundberg_buffer(*args)
    assert "freezing" in " ".join(table.to_vllm_args().lost)


def test_large_queues_take_the_exponential_buffer_and_say_so() -> None:
    """Thousands of requests per run: the exact chain would be too large, and the certificate names what is used."""
    server = fs.Server(4e7, fs.IterationTime.affine(0.05, 1e-6, 1e-6, 1e-9))
    fluid = fs.solve_fluid(mix(50_000.0), server)
    table = fs.compile_policy(fluid, "nested-wait", slack=0.2, block_iterations=1)
    buffer = table.certificate["buffer"]
    assert buffer["method"][0] == "none"
    for size, method in zip(table.certificate["buffer"]["value"][1:], buffer["method"][1:], strict=True):
        assert method == ("lundberg" if size > 512 else "exact")
    assert "lundberg" in buffer["method"]
    assert "ln(L b/δ)/θ_k" in buffer["formula"]


def test_the_largest_slack_fills_memory_and_a_larger_server_gives_more() -> None:
    small, large = (
        fs.compile_policy(solved(mix(200.0), capacity), "nested-wait", block_iterations=1)
        for capacity in (5_000, 20_000)
    )
    assert small.certificate["memory"]["value"] <= 5_000
    assert large.certificate["slack"]["value"] > small.certificate["slack"]["value"]


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_the_largest_slack_is_no_less_than_any_asked_for(seed: int) -> None:
    """No table keeps up with .01 % more than the one of largest slack, whose cuts and reserve are found otherwise."""
    rng = np.random.default_rng(seed)
    types = [
        fs.RequestType(str(j), 1 + rng.random(), int(rng.integers(20, 2000)), int(rng.integers(2, 200)))
        for j in range(30)
    ]
    server = fs.Server(1e7, fs.IterationTime.affine(0.01, 1e-5, 4e-5, 3e-8))
    fluid = fs.solve_fluid(fs.Workload(types).at_load(0.5, server), server)
    largest = fs.compile_policy(fluid, "nested-wait", block_iterations=3).certificate
    assert 0.97e7 <= largest["memory"]["value"] <= 1e7
    plain = NestedOptions(0.0, 3, 3600.0, "optimal", None, "exact")
    problem = Problem.of(fluid, largest["overflow_probability"]["value"])
    asked = [
        dataclasses.replace(plain, slack=slack)
        for slack in (0.9, 1.0001 * (1 + largest["slack"]["value"]) - 1)
    ]
    assert [nested_exists(problem, options, 3) for options in asked] == [True, False]


def test_a_queue_that_only_rounding_makes_stable_is_no_cut() -> None:
    """With shares 7/9 and 6/9 and thresholds 7 and 6 the queue is critical: its exponent would be 0 or none."""
    types = [fs.RequestType(str(o), rate, 11, o) for o, rate in ((1, 0.2), (2, 0.1), (3, 0.6))]
    stream = Stream(Problem.of(solved(fs.Workload(types)), 0.01), 1)
    for rounding in np.linspace(-1e-15, 1e-15, 21):
        threshold = np.array([10.0, 7.0 * (1 + rounding), 6.0])
        value, first = shortest_cuts(stream, threshold, np.arange(3), 10.0)
        assert first.tolist() == [0]
        assert value == pytest.approx(10.0 * stream.held.sum(), rel=1e-12)


def test_observed_overflow_is_at_most_delta_and_some_happens_without_buffers() -> None:
    """100 runs of 400 s with exactly the certified memory, saturated; null: P(overflow) ≤ δ = 0.2, error 1e-4.

    With the base memory alone most runs overflow, so that the test can fail.
    """
    from scipy.stats import binomtest

    workload, horizon, delta = mix(150.0), 400.0, 0.2
    options = {"slack": 0.05, "block_iterations": 1, "horizon": horizon, "overflow_probability": delta}
    table = fs.compile_policy(solved(workload), "nested-wait", **options)
    assert len(table.segments) > 1
    overflowed = {}
    for capacity in (table.certificate["memory"]["value"], table.certificate["memory"]["base"]):
        server = fs.Server(capacity, TIME)
        runs = fs.simulate(workload, server, [table], horizon=horizon, warmup=0.0, replications=100, seed=4)
        overflowed[capacity] = int((runs.measures(table.name)["preemptions"] > 0).sum())
    enough, base = overflowed.values()
    assert binomtest(enough, 100, delta, alternative="greater").pvalue > 1e-4
    assert base > 2 * delta * 100


def test_one_segment_is_certain() -> None:
    """No boundary queue: nothing is ever preempted in exactly the certified memory."""
    workload = mix(100.0)
    table = fs.compile_policy(
        solved(workload),
        "nested-wait",
        slack=0.1,
        block_iterations=2,
        segments=[29],
        overflow_probability=0.2,
    )
    assert table.certificate["memory"]["guarantee"] == "certain"
    server = fs.Server(table.certificate["memory"]["value"], TIME)
    runs = fs.simulate(workload, server, [table], horizon=200.0, replications=4, seed=1)
    assert (runs.measures(table.name)["preemptions"] == 0).all()


def test_prompts_that_differ_are_bounded_by_their_law_or_their_maximum() -> None:
    """Few long prompts: the law's bound is smaller; the longest stands beside it. With one prompt they agree."""
    prompts = fs.lengths.empirical([100, 4000], [0.95, 0.05])
    workload = fs.Workload([fs.RequestType("a", 20.0, prompts, fs.lengths.uniform(1, 40))])
    server = fs.Server(2_000_000, fs.IterationTime.affine(0.05, 1e-5, 1e-4, 1e-8))
    table = fs.compile_policy(fs.solve_fluid(workload, server), "nested-wait", slack=0.1, block_iterations=10)
    memory = table.certificate["memory"]
    assert memory["prompts"] == "law"
    assert memory["value"] < memory["longest_prompts"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": [3, 29, 39]}, "segment 3 begins there"),
        ({"segments": [3, 9]}, "end at 29 at least"),
        ({"segments": [0, 29]}, "nobody finishes in it"),
        ({"segments": [9, 3, 29]}, "above the one before"),
        ({"segments": [3, 29], "block_iterations": 3}, "one less than a multiple"),
        ({"segments": [29], "segment_count": 2}, "segment_count"),
        ({"segments": "best"}, "optimal"),
        ({"segments": "quantiles"}, "segment_count"),
        ({"buffer": "none"}, "buffer"),
        ({"overflow_probability": 0.0}, "boundary queues have no upper bound"),
        ({"rate_error": 0.1}, "slack of every segment"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fs.compile_policy(solved(mix()), "nested-wait", **{"slack": 0.1, **options})  # type: ignore[arg-type]


def test_segments_are_for_nested_tables_and_lengths_need_a_bound() -> None:
    with pytest.raises(InputError, match="have no segments"):
        fs.compile_policy(solved(mix()), "wait", segments=[29])
    unbounded = fs.Workload([fs.RequestType("a", 1.0, 5, fs.lengths.geometric(mean=3.0))])
    with pytest.raises(InputError, match="no upper bound"):
        fs.compile_policy(solved(unbounded), "nested-wait", slack=0.1)


@pytest.mark.parametrize(
    ("fluid", "options", "reason"),
    [
        (solved(mix(400.0), 3_000), {"slack": 0.1, "block_iterations": 1}, "memory"),
        (solved(mix(200.0)), {"slack": 10_000.0}, "time"),
        (solved(mix(30.0), max_batch_size=20), {"slack": 0.1, "block_iterations": 1}, "batch"),
        (solved(mix(1.0), 500), {"slack": 0.1, "segments": [3, 9, 29], "block_iterations": 1}, "rounding"),
    ],
)
def test_without_a_table_the_reason_is_named(
    fluid: fs.FluidSolution, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(InfeasibleError) as caught:
        fs.compile_policy(fluid, "nested-wait", **options)  # type: ignore[arg-type]
    assert caught.value.reason == reason


def test_memory_against_the_number_of_segments_is_u_shaped_and_drawn() -> None:
    """Least in between; each point is what a table of so many segments certifies; the picture has its lines."""
    law = fs.lengths.geometric(mean=30, maximum=300)
    server = fs.Server(2_000_000, fs.IterationTime.affine(0.05, 1e-5, 5e-5, 1e-8))
    fluid = fs.solve_fluid(fs.Workload([fs.RequestType("chat", 100.0, 50, law)]), server)
    curve = segment_curve(fluid, slack=0.1, block_iterations=5, segment_counts=[1, 2, 3, 5, 9])
    assert curve.best not in (1, 9)
    table = fs.compile_policy(fluid, "nested-wait", slack=0.1, block_iterations=5, segment_count=3)
    assert table.certificate["memory"]["value"] == pytest.approx(curve.memory[2], rel=1e-12)
    assert (curve.base <= curve.memory).all()
    assert list(curve.to_frame().index) == [1, 2, 3, 5, 9]
    axes = curve.plot()
    assert f"least: L = {curve.best}" in [text.get_text() for text in axes.get_legend().get_texts()]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), curve.memory)
    none = segment_curve(fluid, slack=99.0, block_iterations=5, segment_counts=[2])
    assert none.reason == ("time",)
    assert none.best is None


def test_thresholds_that_cannot_keep_a_boundary_queue_stable_have_a_reason_of_their_own() -> None:
    """Three in a hundred leave between the cuts: no whole n_1 up to its limit leaves room for p n_1 < n_2 < n_1."""
    law = fs.lengths.empirical([4, 10, 30], [0.003, 0.003, 0.994])
    fluid = solved(fs.Workload([fs.RequestType("a", 1.0, 7, law)]))
    with pytest.raises(InfeasibleError, match=r"p_k n_\(k−1\) < n_k") as caught:
        fs.compile_policy(fluid, "nested-wait", slack=0.1, block_iterations=1, segments=[3, 9, 29])
    assert caught.value.reason == "segments"
