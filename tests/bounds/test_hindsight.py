"""Hindsight optimum: exact dynamic programs on tiny instances, order of the bounds, named families."""

from __future__ import annotations

import functools
import itertools
import math
from unittest import mock

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.bounds import hindsight_bound, hindsight_optimum
from fluidsched.bounds.hindsight import _beam, _first_fit, _instance, _Program
from fluidsched.errors import InputError

UNIT = fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0)

Requests = list[tuple[int, int, int]]  # arrival round, prompt, output


def to_path(requests: Requests) -> fs.ArrivalPath:
    arrival, prompt, output = zip(*sorted(requests), strict=True)
    return fs.ArrivalPath.from_arrays(np.array(arrival, dtype=float), prompt, output)


def optimum_by_dynamic_program(requests: Requests, capacity: int, *, preemption: bool) -> int:
    """Least total latency over every choice in every round; state: the round and the tokens of each request.

    Without preemption a request once started is served in every round. With it any subset is served, a request
    keeping its tokens for free when left out (memory dropped): unit iterations make recomputing free.
    """
    shift = min(a for a, _, _ in requests)

    @functools.cache
    def cost(now: int, done: tuple[int, ...]) -> float:
        present = [i for i, (a, _, o) in enumerate(requests) if a <= now and done[i] < o]
        if all(d == o for d, (_, _, o) in zip(done, requests, strict=True)):
            return 0.0
        must = [] if preemption else [i for i in present if done[i] > 0]
        free = [i for i in present if i not in must]
        best = math.inf
        for size in range(len(free) + 1):
            for extra in itertools.combinations(free, size):
                served = (*must, *extra)
                if not served and len(present) > 0 and preemption:
                    continue
                if not served and all(a <= now for a, _, _ in requests):
                    continue  # idling with everybody here never helps
                if sum(requests[i][1] + done[i] for i in served) > capacity:
                    continue
                after = list(done)
                for i in served:
                    after[i] += 1
                best = min(best, len(present) + cost(now + 1, tuple(after)))
        return best

    return int(cost(shift, (0,) * len(requests)))


TINY = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=5)


@settings(max_examples=40)
@given(TINY, st.integers(8, 14))
def test_integer_program_equals_the_dynamic_program(requests: Requests, capacity: int) -> None:
    best = hindsight_optimum(to_path(requests), fs.Server(capacity, UNIT))
    assert best.is_optimal
    assert best.upper == optimum_by_dynamic_program(requests, capacity, preemption=False)


@settings(max_examples=40)
@given(TINY, st.integers(8, 14), st.integers(1, 4))
def test_program_over_the_remaining_starts_is_exact(requests: Requests, capacity: int, above: int) -> None:
    """Asked for less than the optimum it proves there is nothing; asked for more it finds the optimum."""
    case = _instance(to_path(requests), fs.Server(capacity, UNIT))
    start = _first_fit(case)
    program = _Program(case, int((start + case.output).max()) + 1)
    price, bound = program.relaxed(10.0)
    optimum = optimum_by_dynamic_program(requests, capacity, preemption=False)
    assert program.within(price, bound, optimum - 1, 10.0) == (None, math.inf)
    better, proved = program.within(price, bound, optimum + above - 1, 10.0)
    assert better is not None
    assert case.total(better) == optimum
    assert optimum - 1 < proved <= optimum + 1e-6


@settings(max_examples=40)
@given(TINY, st.integers(8, 14), st.sampled_from([0.0, 1e9]))
def test_rising_targets_end_at_the_optimum(requests: Requests, capacity: int, first_proof: float) -> None:
    """Whether the proof is thought to be in reach at once (0 s) or never (1e9 s)."""
    case = _instance(to_path(requests), fs.Server(capacity, UNIT))
    start = _first_fit(case)
    program = _Program(case, int((start + case.output).max()) + 1)
    price, bound = program.relaxed(10.0)
    with mock.patch("fluidsched.bounds.hindsight._FIRST_PROOF", first_proof):
        start, least = program.proved(price, bound, start, math.ceil(bound - 1e-3), 10.0)
    assert case.total(start) == least == optimum_by_dynamic_program(requests, capacity, preemption=False)


def test_a_proof_cut_short_leaves_a_bound() -> None:
    case = _instance(family(0, requests=25, spread=0), SERVER)
    start = _first_fit(case)
    program = _Program(case, int((start + case.output).max()) + 1)
    price, bound = program.relaxed(10.0)
    same, least = program.proved(price, bound, start, math.ceil(bound), 1e-9)
    assert math.ceil(bound) <= least < case.total(start)
    assert case.total(same) == case.total(start)


@settings(max_examples=40)
@given(TINY, st.integers(8, 14), st.integers(1, 6), st.integers(0, 9))
def test_search_proves_no_more_than_it_may(requests: Requests, capacity: int, width: int, seed: int) -> None:
    """Whatever prices and width: what was dropped bounds the optimum; where nothing was, the optimum was met."""
    case = _instance(to_path(requests), fs.Server(capacity, UNIT))
    start = _first_fit(case)
    program = _Program(case, int((start + case.output).max()) + 1)
    price = np.random.default_rng(seed).exponential(0.2, program.window)
    price[-1] = 0.0
    found = case.total(start)
    optimum = optimum_by_dynamic_program(requests, capacity, preemption=False)
    better, dropped = _beam(case, price, program.lagrangian(price), found, width, 0.5, 0.5)
    reached = found if better is None else case.total(better)
    assert min(reached, dropped) <= optimum + 1e-6
    if math.isinf(dropped):
        assert reached == optimum


@settings(max_examples=40)
@given(TINY, st.integers(8, 14))
def test_bounds_are_in_order(requests: Requests, capacity: int) -> None:
    """Combinatorial ≤ optimum with preemption; combinatorial, LP ≤ optimum without."""
    path, server = to_path(requests), fs.Server(capacity, UNIT)
    without = optimum_by_dynamic_program(requests, capacity, preemption=False)
    combinatorial = hindsight_bound(path, server, method="combinatorial").lower
    assert combinatorial <= optimum_by_dynamic_program(requests, capacity, preemption=True) + 1e-9
    assert hindsight_bound(path, server).lower <= without + 1e-6


def family(seed: int, requests: int = 60, spread: int = 60) -> fs.ArrivalPath:
    """Prompts 1–5, outputs 1–20, arrivals uniform over `spread` rounds."""
    rng = np.random.default_rng(seed)
    prompts, outputs = rng.integers(1, 6, requests), rng.integers(1, 21, requests)
    return fs.ArrivalPath.from_arrays(
        np.sort(rng.integers(0, spread + 1, requests)).astype(float), prompts, outputs
    )


SERVER = fs.Server(100, UNIT)


def test_schedule_is_feasible_and_costs_what_it_says() -> None:
    path = family(0, requests=25, spread=10)
    best = hindsight_optimum(path, SERVER, time_limit=5.0)
    assert best.start is not None
    assert np.all(best.start >= path.arrival_s - path.arrival_s[0])
    used = np.zeros(200)
    for t, p, o in zip(best.start, path.prompt_tokens, path.output_tokens, strict=True):
        used[t : t + o] += p + np.arange(o)
    assert used.max() <= 100
    total = float((best.start + path.arrival_s[0] + path.output_tokens - path.arrival_s).sum())
    assert best.upper == total
    assert best.lower <= total
    assert not best.start.flags.writeable


def test_same_input_same_schedule_up_to_the_units() -> None:
    """Iterations of 1/2 s at arrivals half as far apart: the same rounds, half the latency."""
    path = family(1, requests=12, spread=6)
    half = fs.ArrivalPath.from_arrays(path.arrival_s / 2, path.prompt_tokens, path.output_tokens)
    slow, fast = fs.Server(60, UNIT), fs.Server(60, fs.IterationTime.affine(0.5, 0.0, 0.0, 0.0))
    one, two = hindsight_optimum(path, slow), hindsight_optimum(half, fast)
    assert one.is_optimal
    assert two.lower == pytest.approx(one.lower / 2)


def test_every_price_gives_a_bound_and_the_duals_the_best() -> None:
    path = family(2, requests=30, spread=15)
    case = _instance(path, SERVER)
    program = _Program(case, 60)
    value = program.relaxed(60.0)[1]
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert program.lagrangian(rng.exponential(0.02, 60)) <= value + 1e-6
    assert program.lagrangian(np.zeros(60)) == float(path.output_tokens.sum())


def value_by_highs(path: fs.ArrivalPath, capacity: float, window: int) -> float:
    """The relaxation request by request, rounds: starts at each round of the window, or never."""
    columns, cost, rows = [], [], len(path) + window
    for i, (a, p, o) in enumerate(zip(path.arrival_s, path.prompt_tokens, path.output_tokens, strict=True)):
        for t in range(int(a), window + 1):
            column = np.zeros(rows)
            column[i] = 1.0
            used = p + np.arange(o)[: window - t]
            column[len(path) + t : len(path) + t + len(used)] = used
            columns.append(column)
            cost.append(t - a + o)
    matrix = np.array(columns).T
    found = scipy.optimize.linprog(
        cost,
        A_ub=matrix[len(path) :],
        b_ub=np.full(window, capacity),
        A_eq=matrix[: len(path)],
        b_eq=np.ones(len(path)),
        method="highs",
    )
    return float(found.fun)


@pytest.mark.parametrize(
    ("requests", "spread", "capacity"), [(1, 0, 30), (20, 0, 40), (25, 60, 30), (30, 25, 100)]
)
def test_prices_reach_the_value_of_the_relaxation(requests: int, spread: int, capacity: int) -> None:
    """HiGHS on the program of single requests is the witness: equal to 1e-7, never below."""
    path = family(5, requests, spread)
    path = fs.ArrivalPath.from_arrays(
        path.arrival_s - path.arrival_s[0], path.prompt_tokens, path.output_tokens
    )
    case = _instance(path, fs.Server(capacity, UNIT))
    window = int((_first_fit(case) + case.output).max()) + 1
    value = _Program(case, window).relaxed(60.0)[1]
    assert value == pytest.approx(value_by_highs(path, capacity, window), rel=1e-7)


def test_prices_cut_short_still_give_a_bound() -> None:
    """Without time the bound is that of no prices, or better."""
    path = family(2, requests=30, spread=15)
    program = _Program(_instance(path, SERVER), 60)
    hurried, value = program.relaxed(1e-9)[1], program.relaxed(60.0)[1]
    assert path.output_tokens.sum() <= hurried <= value + 1e-6


def test_policies_lie_above_the_bounds() -> None:
    """No preemption here (the reservation of orca): every bound holds; vllm may preempt: the combinatorial one."""
    path = family(3, spread=30)
    table = fs.baselines.orca(max_output_tokens=20)
    runs = fs.simulate(path, SERVER, [table, fs.baselines.vllm()], engine="reference")
    combinatorial = hindsight_bound(path, SERVER, method="combinatorial")
    relaxed = hindsight_bound(path, SERVER)
    totals = {}
    for name in runs.policies:
        requests = runs.requests(name)
        totals[name] = float((requests["finish_s"] - requests["arrival_s"]).sum())
    assert all(combinatorial.gap_of(total) >= 0.0 for total in totals.values())
    assert relaxed.gap_of(totals[table.name]) >= 0.0


def test_bound_value_says_what_it_covers() -> None:
    bound = hindsight_bound(family(0), SERVER, method="combinatorial").to_bound()
    assert (bound.name, bound.direction, bound.unit) == ("mean_e2e", "lower", "s")
    assert "any policy" in bound.condition
    assert "no preemption" in hindsight_bound(family(0), SERVER).covers


@pytest.mark.parametrize(
    ("path", "server", "match"),
    [
        (family(0), fs.Server(100, fs.IterationTime.paper(1.0, 0.1)), "be constant"),
        (family(0), fs.Server(100, UNIT, max_batch_size=4), "max_batch_size"),
        (family(0), fs.Server(math.inf, UNIT), "be finite"),
        (family(0), fs.Server(20, UNIT), "fit into the KV capacity"),
        (fs.ArrivalPath.from_arrays([0.0, 0.3], [1, 1], [1, 1]), SERVER, r"arrival_s\[1\]"),
        (fs.ArrivalPath.from_arrays([], [], []), SERVER, "at least one request"),
    ],
)
def test_what_is_not_an_instance_is_named(path: fs.ArrivalPath, server: fs.Server, match: str) -> None:
    with pytest.raises(InputError, match=match):
        hindsight_bound(path, server)


def test_long_paths_have_the_combinatorial_bound() -> None:
    path = family(4, requests=50_000, spread=50_000)
    assert hindsight_bound(path, SERVER, method="combinatorial").lower >= path.output_tokens.sum()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("spread", "gap", "limit"), [(0, 0.05, 10.0), (60, 0.02, 50.0), (90, 0.0, 50.0)])
def test_named_family_of_60(seed: int, spread: int, gap: float, limit: float) -> None:
    """Proved optimal when requests come over 90 rounds; else within a gap, most of those over 60 proved as well."""
    best = hindsight_optimum(family(seed, spread=spread), SERVER, time_limit=limit)
    assert best.upper is not None
    assert best.gap_of(best.upper) <= gap
    assert best.is_optimal or spread < 90


@pytest.mark.slow
def test_lp_bound_of_2_000_requests() -> None:
    path = family(0, requests=2000, spread=2000)
    combinatorial = hindsight_bound(path, SERVER, method="combinatorial")
    assert hindsight_bound(path, SERVER).lower > combinatorial.lower
