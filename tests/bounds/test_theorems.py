"""Theorem constants of tables: conditions, values, and simulated WAIT below them."""

from __future__ import annotations

import math

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.bounds import (
    Bound,
    embedded_queue_mean,
    exact_buffer,
    first_passage_probability,
    nested_wait_bounds,
    nested_wait_overflow,
    wait_bounds,
)
from fluidsched.errors import InputError
from fluidsched.policy import Match, Segment, TableType

TIME = fs.IterationTime.affine(0.5, 0.01, 0.01, 0.001)


def wait_table(workload: fs.Workload, thresholds: list[int], k: int = 1, **row: object) -> fs.PolicyTable:
    rows = [
        TableType(name, Match(label=name), threshold=n, **{"gate": n, **row})  # type: ignore[arg-type]
        for name, n in zip(workload.type_names, thresholds, strict=True)
    ]
    return fs.PolicyTable("wait", "wait", rows, block_iterations=k, freeze=True)


def by_name(bounds: tuple[Bound, ...]) -> dict[str, Bound]:
    named = {bound.name: bound for bound in bounds}
    assert len(named) == len(bounds)
    return named


TWO = fs.Workload([fs.RequestType("a", 2.0, 5, 3), fs.RequestType("b", 1.0, 2, 6)])


def test_cycle_queue_and_delays_by_hand() -> None:
    """n = (4, 3): one iteration does n_j of every stage; T from its tokens, KV from its stages."""
    bounds = by_name(wait_bounds(wait_table(TWO, [4, 3]), TWO, fs.Server(1000, TIME), horizon=100.0))
    prefill, decodes = 4 * 5 + 3 * 2, 4 * 2 + 3 * 5
    read = 4 * (6 + 7) + 3 * (3 + 4 + 5 + 6 + 7)
    cycle = 0.5 + 0.01 * (prefill + decodes) + 0.001 * read
    assert bounds["memory"].value == 4 * (5 + 6 + 7) + 3 * (2 + 3 + 4 + 5 + 6 + 7)
    queue = embedded_queue_mean(4, 2.0 * cycle)
    assert bounds["entry_queue[a]"].value == pytest.approx(queue)
    assert bounds["mean_ttft[a]"].value == pytest.approx(queue / 2.0 + 2.5 * cycle)
    assert bounds["mean_e2e[a]"].value == pytest.approx(queue / 2.0 + 2.5 * cycle + 2 * 4 / 2.0)
    other = embedded_queue_mean(3, cycle)
    assert bounds["mean_ttft"].value == pytest.approx((queue + other) / 3.0 + 2.5 * cycle)
    lost = 3 * (queue + 2 * cycle + 4 * 4) + 6 * (other + cycle + 7 * 3)
    assert bounds["output_throughput_gap"].value == pytest.approx(lost / 100.0)


def test_a_block_lasts_as_long_as_its_iterations_by_hand() -> None:
    """Blocks of two: first tokens and even stages, then odd stages; the entry queue is that of their sum."""
    bounds = by_name(wait_bounds(wait_table(TWO, [4, 3], 2), TWO, fs.Server(1000, TIME), horizon=100.0))
    even = 0.5 + 0.01 * (4 * 5 + 3 * 2 + 4 + 3 * 2) + 0.001 * (4 * 7 + 3 * (4 + 6))
    odd = 0.5 + 0.01 * (4 + 3 * 3) + 0.001 * (4 * 6 + 3 * (3 + 5 + 7))
    assert bounds["entry_queue[a]"].value == pytest.approx(embedded_queue_mean(4, 2.0 * (even + odd)))
    assert bounds["entry_queue[b]"].value == pytest.approx(embedded_queue_mean(3, even + odd))


@pytest.mark.parametrize(("thresholds", "k"), [([4, 3], 1), ([4, 3], 2), ([12, 6], 1)])
def test_simulated_wait_respects_its_bounds(thresholds: list[int], k: int) -> None:
    """Means of 8 runs of 2 000 s; a bound is violated only if the lower 95 % end lies above it."""
    table, server = wait_table(TWO, thresholds, k), fs.Server(1000, TIME)
    bounds = by_name(wait_bounds(table, TWO, server, horizon=2000.0))
    runs = fs.simulate(
        TWO, server, [table], horizon=2000.0, warmup=200.0, replications=8, seed=3, engine="reference"
    )
    frames = [runs.requests("wait", r) for r in range(8)]
    means = {name: [] for name in ("mean_ttft[a]", "mean_ttft[b]", "mean_e2e[a]", "mean_e2e[b]", "mean_ttft")}
    for frame in frames:
        done = frame[(frame["arrival_s"] > 200.0) & (frame["arrival_s"] < 1800.0)]
        ttft, e2e = done["first_token_s"] - done["arrival_s"], done["finish_s"] - done["arrival_s"]
        means["mean_ttft"].append(ttft.mean())
        for name in "ab":
            means[f"mean_ttft[{name}]"].append(ttft[done["type"] == name].mean())
            means[f"mean_e2e[{name}]"].append(e2e[done["type"] == name].mean())
    for name, values in means.items():
        low = np.mean(values) - 2.4 * np.std(values, ddof=1) / math.sqrt(len(values))
        bound = bounds[name].value
        assert bound is not None
        assert low <= bound
        assert np.mean(values) > 0.2 * bound  # not vacuous


def test_critical_threshold_needs_a_horizon() -> None:
    one = fs.Workload([fs.RequestType("a", 2.0, 1, 1)])
    server, table = fs.Server(1000, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0)), wait_table(one, [2])
    assert "critical" in by_name(wait_bounds(table, one, server))["mean_ttft[a]"].condition
    bound = by_name(wait_bounds(table, one, server, horizon=9.5))["entry_queue[a]"]
    assert bound.value == pytest.approx(2 + math.sqrt(2) * sum(i**-0.5 for i in range(1, 11)))


@pytest.mark.parametrize(
    ("table", "server", "reason"),
    [
        (fs.baselines.vllm(), fs.Server(1000, TIME), "kind 'vllm'"),
        (wait_table(TWO, [4, 3]), fs.Server(150, TIME), "exceeds the capacity of 150"),
        (
            wait_table(TWO, [4, 3]),
            fs.Server(1000, TIME, max_batch_size=29),
            "up to 30 requests are in service",
        ),
        (
            wait_table(TWO, [4, 3]),
            fs.Server(1000, TIME, token_budget=48),
            "takes 49 tokens, the budget is 48",
        ),
        (wait_table(TWO, [4, 3], gate=2), fs.Server(1000, TIME), "gate below its threshold"),
        (wait_table(TWO, [4, 3], max_hold_s=5.0), fs.Server(1000, TIME), "hold limit"),
        (wait_table(TWO, [1, 3]), fs.Server(1000, TIME), "λT = "),
        (wait_table(TWO, [4, 0]), fs.Server(1000, TIME), "refuses the type"),
    ],
)
def test_outside_the_conditions_no_number_is_given(
    table: fs.PolicyTable, server: fs.Server, reason: str
) -> None:
    bounds = wait_bounds(table, TWO, server, horizon=10.0)
    assert {b.name for b in bounds} == {
        b.name for b in wait_bounds(wait_table(TWO, [4, 3]), TWO, fs.Server(1e4, TIME))
    }
    missing = [b for b in bounds if not b.applies]
    assert any(reason in b.condition for b in missing)
    assert not by_name(bounds)["mean_ttft"].applies


def test_unbounded_lengths_have_no_certain_bound() -> None:
    long = fs.Workload([fs.RequestType("a", 1.0, 5, fs.lengths.geometric(mean=3.0))])
    bounds = wait_bounds(wait_table(long, [4]), long, fs.Server(1e9, TIME))
    assert all("unbounded" in b.condition and not b.applies for b in bounds)


def test_a_table_for_other_types_is_an_error() -> None:
    with pytest.raises(InputError, match="one row per type"):
        wait_bounds(wait_table(TWO, [4, 3]), TWO.merged(1), fs.Server(1000, TIME))


def nested(
    buffers: tuple[float, float], block: int = 1, thresholds: tuple[int, int] = (10, 4)
) -> fs.PolicyTable:
    segments = [
        Segment(4 * block - 1, thresholds[0], buffers[0]),
        Segment(10 * block - 1, thresholds[1], buffers[1]),
    ]
    row = TableType("*", threshold=thresholds[0], gate=thresholds[0])
    return fs.PolicyTable(
        "nested", "nested-wait", [row], segments=segments, block_iterations=block, freeze=True
    )


def two_ends(block: int = 1, share: float = 0.3) -> fs.Workload:
    outputs = fs.lengths.empirical([4 * block, 10 * block], [1 - share, share])
    return fs.Workload([fs.RequestType("mix", 5.0, 7, outputs)])


def test_nested_overflow_is_first_passage_of_the_boundary_queue() -> None:
    horizon, c0 = 1000.0, 0.5
    buffer = exact_buffer(10, 0.3, 4, 2001, 0.01)
    bound = nested_wait_overflow(nested((0.0, float(buffer))), two_ends(), fs.Server(10_000, TIME), horizon)
    assert bound.value == pytest.approx(
        first_passage_probability(10, 0.3, 4, buffer, 1 + int(horizon / c0)), rel=1e-9
    )
    assert bound.value <= 0.01


def test_nested_memory_is_the_published_sum() -> None:
    """M(n) = Σ_k n_k (p + s̄_k) δ_k plus the buffers: the table applies at exactly that capacity."""
    base = 10 * (7 + 1.5) * 4 + 4 * (7 + (4 + 9) / 2) * 6
    need = base + (7 + 3) * 12
    table, workload = nested((0.0, 12.0)), two_ends()
    assert nested_wait_overflow(table, workload, fs.Server(need, TIME), 100.0).applies
    short = nested_wait_overflow(table, workload, fs.Server(need - 1, TIME), 100.0)
    assert not short.applies
    assert f"{need:,.0f} tokens" in short.condition


def test_nested_overflow_with_blocks_counts_fewer_cycles() -> None:
    server = fs.Server(100_000, TIME)
    single = nested_wait_overflow(nested((0.0, 12.0)), two_ends(), server, 1000.0)
    blocks = nested_wait_overflow(nested((0.0, 12.0), block=3), two_ends(3), server, 1000.0)
    assert blocks.value == pytest.approx(first_passage_probability(10, 0.3, 4, 12, 1 + 666), rel=1e-9)
    assert blocks.value < single.value  # type: ignore[operator]


@pytest.mark.parametrize(
    ("table", "workload", "reason"),
    [
        (fs.baselines.vllm(), two_ends(), "kind 'vllm'"),
        (nested((0.0, 12.0)), two_ends(2), "19 decodes are possible"),
        (nested((0.0, 12.0)), two_ends(share=0.4), "p·n_(k−1) = 4 ≥ n_k = 4"),
    ],
)
def test_nested_overflow_outside_its_conditions(
    table: fs.PolicyTable, workload: fs.Workload, reason: str
) -> None:
    bound = nested_wait_overflow(table, workload, fs.Server(10_000, TIME), 10.0)
    assert not bound.applies
    assert reason in bound.condition


def test_other_than_poisson_arrivals_have_memory_but_no_queue_bound() -> None:
    bursty = TWO.with_arrivals(fs.arrivals.renewal(cv=3.0))
    bounds = by_name(wait_bounds(wait_table(bursty, [4, 3]), bursty, fs.Server(1000, TIME), horizon=10.0))
    assert bounds["memory"].applies
    assert "not Poisson" in bounds["mean_ttft[a]"].condition
    assert not bounds["mean_ttft"].applies
    assert not bounds["output_throughput_gap"].applies


def test_nested_wait_stepped_through_keeps_its_memory_and_overflow_probability() -> None:
    """Plain definition of Nested WAIT, two segments, requests always waiting, 4 000 runs of 300 iterations.

    Certain: KV never exceeds M(n) + (p + r_1)·(queue left at the boundary). Statistical: the share of runs whose
    boundary queue ever exceeds x is the first-passage probability (4.5 standard errors: errs below 1e-5).
    """
    rng = np.random.default_rng(8)
    runs, iterations, prompt, share, x = 4000, 300, 7, 0.3, 10
    (n1, n2), (r1, r2) = (10, 4), (3, 9)
    base = n1 * sum(prompt + s for s in range(r1 + 1)) + n2 * sum(prompt + s for s in range(r1 + 1, r2 + 1))
    count = np.zeros((runs, r2 + 1), dtype=np.int64)  # requests at each position; 0 is the waiting room
    position = np.arange(r2 + 1)
    worst = np.zeros(runs, dtype=np.int64)
    for _ in range(iterations):
        count[:, 0] = n1
        served = np.minimum(count, n1)
        running = count[:, r1 + 1] >= n2
        served[:, r1 + 1 :] = np.where(running[:, None], np.minimum(count[:, r1 + 1 :], n2), 0)
        kept = count - served
        left = kept[:, r1 + 1]
        paused_queue = np.where(running, left, np.maximum(left - n2, 0))  # beyond what M(n) provides for
        kv = (served * (prompt + position)).sum(axis=1) + (kept[:, 1:] * (prompt + position[1:] - 1)).sum(
            axis=1
        )
        assert np.all(kv <= base + (prompt + r1) * paused_queue)
        worst = np.maximum(worst, left)
        moved = served[:, :-1].copy()
        moved[:, r1] = rng.binomial(moved[:, r1], share)  # the others leave after position r_1
        count = kept
        count[:, 1:] += moved
    # Cohorts reach the boundary from iteration r_1 on, and are first decided upon in the next.
    expected = first_passage_probability(n1, share, n2, x, iterations - r1 - 1)
    error = math.sqrt(expected * (1 - expected) / runs)
    assert abs(float((worst > x).mean()) - expected) <= 4.5 * error
    assert 0.005 < expected < 0.5


def nested_case(rate: float = 60.0, **limits: object) -> tuple[fs.PolicyTable, fs.Workload, fs.Server]:
    law = fs.lengths.empirical([4, 10, 30], [0.6, 0.3, 0.1])
    workload = fs.Workload([fs.RequestType("mix", rate, 7, law)])
    server = fs.Server(60_000, fs.IterationTime.affine(0.05, 1e-4, 1e-4, 1e-6), **limits)  # type: ignore[arg-type]
    fluid = fs.solve_fluid(workload, server)
    options = {"slack": 0.15, "segments": [3, 9, 29], "block_iterations": 2}
    return fs.compile_policy(fluid, "nested-wait", **options), workload, server  # type: ignore[arg-type]


def test_nested_constants_by_hand() -> None:
    """T from the tokens of a full run, queues from the exact laws, and the formulas put together."""
    table, workload, server = nested_case()
    n1, n2, n3 = (s.threshold for s in table.segments)
    bounds = by_name(nested_wait_bounds(table, workload, server, horizon=1000.0))
    places = [n1] * 2 + [n2] * 3 + [n3] * 10
    cycle = first = 0.0
    for r in range(2):
        decodes = sum(places) - (n1 if r == 0 else 0)
        reads = sum(n * (7 + 2 * b + r) for b, n in enumerate(places) if b or r)
        time = 0.05 + (1e-4 * n1 * 7 if r == 0 else 0.0) + 1e-4 * decodes + 1e-6 * reads
        cycle += time
        first = first or time
    queue = embedded_queue_mean(n1, 60.0 * cycle)
    residents = sum(places) + sum(s.buffer for s in table.segments)
    expected = {
        "entry_queue": queue,
        "boundary_queue[2]": embedded_queue_mean(n2, 0.4 * n1, n1),
        "boundary_queue[3]": embedded_queue_mean(n3, 0.25 * n2, n2),
        "mean_ttft": queue / 60.0 + cycle / 2 + first,
        "mean_e2e": (queue + residents) / 60.0 + cycle / 2,
        "mean_waiting": queue + 30.0 * cycle,
        "output_throughput_gap": (8.4 * (queue + 60.0 * cycle) + 30 * residents) / 1000.0,
    }
    assert set(bounds) == set(expected)
    for name, value in expected.items():
        assert bounds[name].value == pytest.approx(value, rel=1e-9), name


def test_simulated_nested_wait_respects_its_bounds() -> None:
    """8 runs of 600 s without a preemption; a bound is violated only if the lower 95 % end lies above it."""
    table, workload, server = nested_case()
    bounds = by_name(nested_wait_bounds(table, workload, server, horizon=600.0))
    runs = fs.simulate(workload, server, [table], horizon=600.0, warmup=60.0, replications=8, seed=3)
    assert (runs.measures(table.name)["preemptions"] == 0).all()
    means: dict[str, list[float]] = {"mean_ttft": [], "mean_e2e": []}
    for r in range(8):
        frame = runs.requests(table.name, r)
        done = frame[(frame["arrival_s"] > 60.0) & (frame["arrival_s"] < 500.0)]
        means["mean_ttft"].append((done["first_token_s"] - done["arrival_s"]).mean())
        means["mean_e2e"].append((done["finish_s"] - done["arrival_s"]).mean())
    for name, values in means.items():
        bound = bounds[name].value
        assert bound is not None
        assert np.mean(values) - 2.4 * np.std(values, ddof=1) / math.sqrt(8) <= bound
        assert np.mean(values) > 0.1 * bound  # not vacuous


def test_nested_constants_outside_their_conditions() -> None:
    """Not applicable names what fails: kind, memory, slots, arrivals, load; without a horizon only the gap has none."""
    table, workload, server = nested_case()
    small = fs.Server(500, server.iteration_time)
    few = fs.Server(60_000, server.iteration_time, max_batch_size=10)
    bursts = workload.with_arrivals(fs.arrivals.renewal(cv=3.0))
    for arguments, message in (
        ((fs.baselines.vllm(), workload, server), "is of kind 'vllm'"),
        ((table, workload, small), "base memory and buffers take"),
        ((table, workload, few), "requests are in service, the limit is 10"),
    ):
        found = nested_wait_bounds(*arguments, horizon=10.0)
        assert all(not b.applies and message in b.condition for b in found)
    by_kind = by_name(nested_wait_bounds(table, bursts, server, horizon=10.0))
    assert by_kind["boundary_queue[2]"].applies
    assert "not Poisson" in by_kind["mean_ttft"].condition
    fast = by_name(nested_wait_bounds(table, workload.scaled(3.0), server, horizon=10.0))
    assert "ΛT = " in fast["mean_ttft"].condition
    assert not fast["mean_ttft"].applies
    without = by_name(nested_wait_bounds(table, workload, server))
    assert [name for name, b in without.items() if not b.applies] == ["output_throughput_gap"]
