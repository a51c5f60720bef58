"""Numbers far from the usual: a right answer or an error of our own, no NaN, no warning, nothing overflown in silence.

Witnesses are other solvers, decimal arithmetic with 50 digits, closed forms in fractions, and units: numbers that are
powers of two change floating point's exponents only, so an answer in other units is the same answer to the last digit.
"""

from __future__ import annotations

import decimal
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scipy import stats

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.fluid import fluid_variables
from fluidsched.policy import tails
from fluidsched.policy.problem import Problem
from fluidsched.queues.lundberg import exponents_at_most
from fluidsched.workload.prefix_cache import PromptBlocks, lru_cached_tokens

# --------------------------------------------------------------------------- the linear program


def extreme_program(rng: np.random.Generator) -> tuple[fs.Workload, fs.Server]:
    """Rates over 2 or 18 orders of magnitude, lengths over 7, memory over 12; ties now and then."""
    count, span = int(rng.choice([1, 2, 5, 40])), float(rng.choice([1.0, 9.0]))
    rate = 10 ** rng.uniform(-span, span, count)
    prompt, output = (10 ** rng.uniform(0, float(rng.choice([3, 7])), (2, count))).astype(int)
    if rng.random() < 0.3:  # types that cannot be told apart: the optimum is a face
        rate[:], prompt[:], output[:] = rate[0], prompt[0], output[0]
    pieces = [
        (10 ** rng.uniform(-6, 0), *10 ** rng.uniform(-9, -3, 3), 10 ** rng.uniform(-14, -8))
        for _ in range(rng.integers(1, 3))
    ]
    batch, budget = (None, 1, 256)[rng.integers(3)], (None, 512)[rng.integers(2)]
    types = zip(rate.tolist(), prompt.tolist(), output.tolist(), strict=True)
    workload = fs.Workload([fs.RequestType(f"{j}", *each) for j, each in enumerate(types)])
    time = fs.IterationTime.pieces(pieces)
    return workload, fs.Server(10 ** rng.uniform(0, 12), time, max_batch_size=batch, token_budget=budget)


@pytest.mark.parametrize("objective", ["requests", "output_tokens"])
def test_three_solvers_agree_on_extreme_programs(objective: str) -> None:
    """Simplex and interior point of HiGHS, and Clarabel's cones, come to our value within 1e-6 of it."""
    import cvxpy as cp

    rng = np.random.default_rng([7, len(objective)])
    for _ in range(30):
        workload, server = extreme_program(rng)
        fluid = fs.solve_fluid(workload, server, objective)
        assert fluid.status == "optimal"
        assert fluid.certificate.ok
        pieces = fluid_variables(fluid.model)
        worth = fluid.model.reward / fluid.objective_value @ pieces.admitted_rate
        problem = cp.Problem(cp.Maximize(worth), list(pieces.constraints.values()))
        for solver in ({"solver": "simplex"}, {"solver": "ipm"}, None):
            if solver is None:
                problem.solve(solver=cp.CLARABEL)
            else:
                problem.solve(solver=cp.HIGHS, highs_options=solver)
            assert problem.value == pytest.approx(1.0, abs=1e-6), solver


def test_floors_just_within_and_just_beyond_a_server() -> None:
    """Floors that ask for all of the server but a billionth are met; for a millionth more they are refused."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        workload, server = extreme_program(rng)
        workload = workload.at_load(1.0, server)
        for floor in (1 - 1e-9, 1.0):
            fluid = fs.solve_fluid(workload, server, fairness_floor=floor)
            assert fluid.certificate.ok
            assert (fluid.admitted_rate >= floor * workload.arrival_rate * (1 - 1e-9)).all()
        with pytest.raises(InfeasibleError, match="fairness_floor"):
            fs.solve_fluid(workload.scaled(1 + 1e-6), server, fairness_floor=1.0)


def test_demand_beyond_all_bounds_stays_bounded_for_cones() -> None:
    """Demand 1e12 times what the server carries: the cone solver called such programs unbounded."""
    server = fs.Server(60_000, fs.IterationTime.affine(0.01, 2e-5, 1e-4, 1e-7))
    types = [fs.RequestType("a", 1e14, 300, 200), fs.RequestType("b", 1e-3, 100, 50)]
    fluid = fs.FluidProgram(fs.Workload(types), server, "output_tokens")
    pieces = fluid_variables(fluid.model)
    best = pieces.maximise(pieces.utility(0.5))
    fair = fs.solve_fair(fs.Workload(types), server, 0.5, "output_tokens")
    assert best.value == pytest.approx(fair.utility, rel=1e-5)


# --------------------------------------------------------------------------- queues


@pytest.mark.parametrize("threshold", [1, 2, 7, 100, 1000, 10_000])
@pytest.mark.parametrize("load", [1e-9, 0.3, 0.9, 1 - 1e-6])
def test_queues_at_any_load(threshold: int, load: float) -> None:
    """Light loads by Spitzer's identity, heavy ones between Kingman's bound and n below it; waiting adds (n − 1)/2."""
    m = threshold * load
    plain = fs.bounds.embedded_queue_mean(threshold, m, wait=False)
    waiting = fs.bounds.embedded_queue_mean(threshold, m)
    assert waiting == pytest.approx(plain + (threshold - 1) / 2, rel=1e-12)
    assert waiting <= fs.bounds.slack_queue_bound(threshold, m) * (1 + 1e-9)
    for wait in (True, False):
        assert fs.bounds.embedded_queue_variance(threshold, m, wait=wait) >= 0.0
    kingman = m / (2 * (threshold - m))
    if load <= 0.3:  # E V = Σ_k E(S_k − kn)⁺/k, S_k ~ Poisson(km)
        k = np.arange(1, 60)
        over = k * m * stats.poisson.sf(k * threshold - 1, k * m)
        over -= k * threshold * stats.poisson.sf(k * threshold, k * m)
        spitzer = float((over / k).sum())
        assert plain == pytest.approx(spitzer, rel=1e-7, abs=1e-15 * threshold)
    else:
        assert kingman - threshold <= plain <= kingman * (1 + 1e-9)


def exponent(trials: int, probability: float, threshold: int) -> float:
    """The positive root of N log(1 − p + p e^θ) = nθ, bisected in decimals of 50 digits."""
    with decimal.localcontext(decimal.Context(prec=50)):
        p, q = decimal.Decimal(probability), decimal.Decimal(threshold) / trials
        low, high = (q * (1 - p) / (p * (1 - q))).ln(), -p.ln() / (1 - q)
        while high - low > high * decimal.Decimal("1e-18"):
            middle = (low + high) / 2
            if (1 - p + p * middle.exp()).ln() < q * middle:
                low = middle
            else:
                high = middle
        return float(low)


def test_exponents_against_decimals() -> None:
    """Shares down to 1e-17, loads from 1e-12 to 1 − 1e-6: to rounding one by one, 1e-7 in bulk, bounded from above."""
    rng = np.random.default_rng(3)
    for _ in range(80):
        trials = int(10 ** rng.uniform(0.4, 6))
        threshold = int(np.clip(10 ** rng.uniform(0, math.log10(trials)), 1, trials - 1))
        slack = 10 ** rng.uniform(-6, -0.1)
        load = 10 ** rng.uniform(-12, 0) if rng.random() < 0.5 else 1 - slack
        p = threshold * load / trials
        exact = exponent(trials, p, threshold)
        # Rounding p moves the root by that over the distance from the critical load.
        digits = 1e-14 / (1 - load)
        assert fs.bounds.lundberg_exponent(trials, p, threshold) == pytest.approx(exact, rel=digits)
        assert float(fs.bounds.lundberg_exponents(p, threshold / trials)) == pytest.approx(exact, rel=1e-7)
        assert exponents_at_most(np.array([p]), np.array([threshold / trials]))[0] >= exact * (1 - digits)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("embedded_queue_mean", (10**12, 1.0)),
        ("embedded_queue_variance", (10**12, 1.0)),
        ("embedded_queue_transient", (4, 1e13, 3)),
        ("first_passage_probability", (10, 0.3, 4, 10**7, 10)),
        ("first_passage_probability", (10**12, 1e-12, 4, 10, 10)),
        ("exact_buffer", (10**9, 0.5, 500_000_001, 10**6, 0.01)),
    ],
)
def test_queues_too_long_to_compute_are_refused(name: str, arguments: tuple[Any, ...]) -> None:
    """What would take the memory of the machine is an error that says the limit."""
    with pytest.raises(InputError, match="at most"):
        getattr(fs.bounds, name)(*arguments)


# --------------------------------------------------------------------------- compilers


def test_the_tail_of_huge_prompts_is_a_number() -> None:
    """160 000 prompts of six million tokens overflow a memory at their mean every second time (to 1/sd)."""
    time = fs.IterationTime.affine(0.01, 1e-5, 1e-5, 1e-6)
    workload = fs.Workload([fs.RequestType("a", 1.0, 6_158_541, 7)])
    fluid = fs.solve_fluid(workload, fs.Server(1e13, time))
    transform, largest = tails.resident_transform(Problem.of(fluid, 0.01))
    cap, mean, deviation = 160_001, 6_158_541 + 3.0, 2.0  # p + k − 1 for k = 1..7: uniform on 7 numbers
    tail = tails.tail_of(
        lambda z: cap * transform(z), cap * mean, cap * mean, math.sqrt(cap) * deviation, cap * largest
    )
    assert tail.probability == pytest.approx(0.5, abs=1 / (math.sqrt(cap) * deviation))


def test_a_memory_far_below_the_mean_is_certain_to_overflow() -> None:
    """A million fair tosses exceed 400 000 heads: 200 standard deviations below the mean."""
    tosses = tails.tail_of(lambda z: 1e6 * np.log((1 + np.exp(z)) / 2), 4e5, 5e5, 500.0, 1e6)
    assert tosses.probability == 1.0
    near = tails.tail_of(lambda z: 100 * np.log((1 + np.exp(z)) / 2), 40, 50.0, 5.0, 100.0)
    assert near.probability == pytest.approx(stats.binom.sf(40, 100, 0.5), rel=1e-9)


KINDS = ("wait", "nested-wait", "gated", "capped", "lookahead")


def compiled(unit: float, kind: str) -> fs.PolicyTable:
    """A table of two types with all times in units of so many seconds."""
    time = fs.IterationTime.affine(0.25 * unit, 2**-14 * unit, 2**-14 * unit, 2**-18 * unit)
    types = [fs.RequestType("a", 3.0 / unit, 24, 15), fs.RequestType("b", 0.5 / unit, 200, 3)]
    fluid = fs.solve_fluid(fs.Workload(types), fs.Server(40_000, time))
    asked: dict[str, Any] = {"slack": 0.25} if kind in ("wait", "nested-wait", "gated") else {}
    if kind == "nested-wait":
        asked["horizon"] = 2.0**12 * unit
    return fs.compile_policy(fluid, kind, **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_tables_do_not_depend_on_the_unit_of_time(kind: str) -> None:
    """Iterations of a quarter of a nanosecond or of eight years: the same table."""
    here, small, large = (compiled(2.0**power, kind) for power in (0, -30, 30))
    for other in (small, large):
        assert [t.threshold for t in other.types] == [t.threshold for t in here.types]
        assert [t.gate for t in other.types] == [t.gate for t in here.types]
        assert other.segments == here.segments
        for field in ("block_iterations", "max_in_service", "token_budget"):
            assert getattr(other, field) == getattr(here, field)


@pytest.mark.parametrize("kind", ["wait", "capped", "lookahead"])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 7), (9, 1), (5_000_000, 2)])
def test_memory_for_one_request_and_one_token_less(kind: str, lengths: tuple[int, int]) -> None:
    """Memory for one request: tables that cannot overflow serve one at a time. A token less: no table, or no run."""
    prompt, output = lengths
    need = prompt + output - 1
    time = fs.IterationTime.affine(0.25, 2**-30, 2**-14, 2**-30)
    workload = fs.Workload([fs.RequestType("a", 1e-3, prompt, output)])
    server = fs.Server(need, time)
    table = fs.compile_policy(fs.solve_fluid(workload, server), kind, overflow_probability=0.0)  # type: ignore[arg-type]
    lengths_of_three = np.full(3, prompt), np.full(3, output)
    path = fs.ArrivalPath.from_arrays(np.zeros(3), *lengths_of_three, type=[0, 0, 0], type_names=["a"])
    records = fs.simulate(path, server, [table], horizon=1e5, warmup=0.0).requests(table.name)
    assert (records["status"] == "finished").all()
    assert (records["preemptions"] == 0).all()
    assert (np.diff(records["finish_s"]) >= output * 0.25).all()  # no two at once
    if need > 1:
        short = fs.Server(need - 1, time)
        fluid = fs.solve_fluid(workload, short)
        if kind == "lookahead":  # admits by what is free, whoever comes
            with pytest.raises(InputError, match="fit alone"):
                fs.simulate(path, short, [table], horizon=1e5, warmup=0.0)
        else:
            with pytest.raises(InfeasibleError):
                fs.compile_policy(fluid, kind, overflow_probability=0.0)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- bounds


def test_bounds_do_not_depend_on_the_unit_of_time() -> None:
    """Floors, stability conditions and theorem constants scale with the unit, by powers of two exactly."""

    def all_of(unit: float) -> dict[str, float]:
        time = fs.IterationTime.affine(0.25 * unit, 2**-14 * unit, 2**-14 * unit, 2**-18 * unit)
        types = [fs.RequestType("a", 3.0 / unit, 24, 15), fs.RequestType("b", 0.5 / unit, 200, 3)]
        workload, server = fs.Workload(types), fs.Server(40_000, time)
        table = compiled(unit, "wait")
        bounds = fs.bounds.wait_bounds(table, workload, server, horizon=2.0**12 * unit)
        return {bound.name: bound.value for bound in bounds}

    here = all_of(1.0)
    assert all(math.isfinite(value) and value > 0.0 for value in here.values())
    for power in (-30, 30):
        unit = 2.0**power
        for name, value in all_of(unit).items():
            inherent = value / unit if name.startswith(("mean_ttft", "mean_e2e")) else value
            inherent = value * unit if "throughput" in name else inherent
            assert inherent == pytest.approx(here[name], rel=1e-12), name


def test_floors_of_late_huge_and_short_requests() -> None:
    """The no-wait floor of a request is its own iterations, whenever it comes and however long it is."""
    top = 2**31 - 1
    path = fs.ArrivalPath.from_arrays([0.0, 1e12, 1e12], [1, top, top], [1, 1, top])
    floor = fs.bounds.no_wait_floor(
        path, fs.Server(math.inf, fs.IterationTime.affine(2**-10, 2**-40, 0, 2**-50))
    )
    prompts, decodes = Fraction(top, 2**40), top - 1
    alone = Fraction(1, 2**10) + prompts
    read = decodes * top + Fraction(decodes * (decodes + 1), 2)
    expected = [Fraction(1, 2**10) + Fraction(1, 2**40), alone, alone]
    np.testing.assert_allclose(floor.ttft_s, [float(x) for x in expected], rtol=1e-12)
    last = alone + Fraction(decodes, 2**10) + read / 2**50
    np.testing.assert_allclose(floor.e2e_s[1:], [float(alone), float(last)], rtol=1e-12)


# --------------------------------------------------------------------------- the kernel

ENGINES = ("kernel", "reference")
TABLES = [fs.baselines.vllm(), fs.baselines.vllm_v0(), fs.baselines.sarathi(), fs.baselines.orca(64)]


def spread(start: float, unit: float) -> fs.ArrivalPath:
    """20 requests at quarters of a unit, some at once."""
    rng = np.random.default_rng(1)
    arrival = start + np.sort(rng.integers(0, 24, 20)) / 4 * unit
    return fs.ArrivalPath.from_arrays(arrival, rng.integers(1, 50, 20), rng.integers(1, 20, 20))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
@pytest.mark.parametrize(
    ("start", "unit"), [(2.0**40, 1.0), (0.0, 2.0**-40), (0.0, 2.0**40)], ids=["late", "tiny", "huge"]
)
def test_runs_do_not_depend_on_the_clock(table: fs.PolicyTable, start: float, unit: float) -> None:
    """From second 10¹² on, in iterations of a trillionth of a second, of 8 000 years: the same run."""

    def run(start: float, unit: float, engine: str) -> Any:
        time = fs.IterationTime.affine(0.25 * unit, 2**-8 * unit, 2**-8 * unit, 2**-10 * unit)
        path, horizon = spread(start, unit), start + 4096.0 * unit
        server = fs.Server(200, time)
        runs = fs.simulate(path, server, [table], horizon=horizon, warmup=0.0, engine=engine)  # type: ignore[arg-type]
        return runs.requests(table.name)

    here = run(0.0, 1.0, "kernel")
    assert (here["status"] == "finished").all()
    for engine in ENGINES:
        there = run(start, unit, engine)
        assert there["status"].tolist() == here["status"].tolist()
        assert there["preemptions"].tolist() == here["preemptions"].tolist()
        for column in ("admitted_s", "first_token_s", "finish_s"):
            # Rows of a block of 2⁻¹⁸ s or less are lost beyond 2⁴⁰ s, where floats step by 2⁻¹².
            np.testing.assert_allclose(
                (there[column] - start) / unit, here[column], rtol=0, atol=2**-6 if start else 1e-12
            )


def test_a_clock_too_coarse_for_its_iterations_is_refused() -> None:
    """A trillionth of a second cannot be told from nothing at second 10¹²."""
    server = fs.Server(2000, fs.IterationTime.affine(1e-12, 1e-15, 1e-15, 1e-17))
    path = fs.ArrivalPath.from_arrays([1e12], [5], [5])
    for engine in ENGINES:
        with pytest.raises(InputError, match=r"known to 0\.001 of an iteration"):
            fs.simulate(path, server, [TABLES[0]], horizon=1e12 + 1, warmup=0.0, engine=engine)  # type: ignore[arg-type]


@pytest.mark.parametrize(("prompt", "output"), [(2**31 - 1, 3), (5, 2**31 - 1), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("count", [1, 64])
def test_counters_of_tokens_do_not_overflow(prompt: int, output: int, count: int) -> None:
    """64 requests of 2³¹ − 1 and 2³¹ − 1 tokens, 2⁶⁹ KV tokens read in all: the closed form in fractions."""
    base, per_prefill, per_decode, per_kv, per_square = (Fraction(1, 2**k) for k in (10, 40, 20, 50, 80))
    path = fs.ArrivalPath.from_arrays(np.zeros(count), np.full(count, prompt), np.full(count, output))
    time = fs.IterationTime.affine(*map(float, (base, per_prefill, per_decode, per_kv, per_square)))
    table = fs.baselines.vllm_v0()
    runs = fs.simulate(path, fs.Server(math.inf, time), [table], horizon=1e9, warmup=0.0)
    records = runs.requests(table.name)
    assert (records["status"] == "finished").all()
    read = (output - 1) * prompt + Fraction((output - 1) * output, 2)
    first = base + count * (per_prefill * prompt + per_square * prompt**2 / 2)
    last = first + (output - 1) * base + count * ((output - 1) * per_decode + per_kv * read)
    np.testing.assert_allclose(records["first_token_s"], float(first), rtol=1e-12)
    np.testing.assert_allclose(records["finish_s"], float(last), rtol=1e-12)


# --------------------------------------------------------------------------- hindsight


def identical(count: int, prompt: int, output: int, at_once: int) -> tuple[fs.ArrivalPath, fs.Server, int]:
    """Requests of one length that come together, memory for `at_once`, and their total time batch after batch."""
    path = fs.ArrivalPath.from_arrays(np.zeros(count), [prompt] * count, [output] * count)
    server = fs.Server(at_once * (prompt + output - 1), fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    return path, server, sum(output * (i // min(at_once, count) + 1) for i in range(count))


@pytest.mark.parametrize("method", ["lp", "combinatorial"])
@pytest.mark.parametrize("prompt", [1, 2**31 - 1])
@pytest.mark.parametrize("at_once", [1, 7, 20, 10**6])
def test_hindsight_bounds_of_identical_requests(method: Any, prompt: int, at_once: int) -> None:
    """Never above batch after batch; equal to it where a request has one token, or all fit at once."""
    for output in (1, 12):
        path, server, total = identical(20, prompt, output, at_once)
        lower = fs.bounds.hindsight_bound(path, server, method=method).lower
        assert 20 * output * (1 - 1e-12) <= lower <= total * (1 + 1e-12)
        if at_once >= 20 or (method == "lp" and output == 1):
            assert lower == pytest.approx(total, rel=1e-6)


def test_hindsight_bounds_of_lengths_over_nine_orders() -> None:
    """Prompts of 1 to 2e9 tokens; in memory that holds all of them nobody waits, and units do not matter."""
    rng = np.random.default_rng(1)
    arrival = np.sort(rng.integers(0, 60, 25)).astype(np.float64)
    prompt, output = (10 ** rng.uniform(0, 9.3, 25)).astype(int), rng.integers(1, 20, 25)
    largest = int((prompt + output).max())
    bounds = []
    for capacity in (largest, 3 * largest, 10**15):
        scaled = [
            fs.bounds.hindsight_bound(
                fs.ArrivalPath.from_arrays(arrival * unit, prompt, output),
                fs.Server(capacity, fs.IterationTime.affine(unit, 0.0, 0.0, 0.0)),
            ).lower
            / unit
            for unit in (1.0, 2.0**-20)
        ]
        assert scaled[0] == scaled[1]
        bounds.append(scaled[0])
    assert bounds[0] > bounds[1] >= bounds[2] * (1 - 1e-9)
    assert bounds[2] == pytest.approx(float(output.sum()), rel=1e-9)


@pytest.mark.parametrize(
    ("arrival", "output", "message"),
    [
        ([0.0, 1e8], 3, "possible starts"),
        ([0.0, 1e17], 3, "iterations of 1 s after the first"),
        ([0.0, 1.0], 2**31 - 1, "times longest output"),
    ],
)
def test_hindsight_of_what_takes_the_machine_is_refused(
    arrival: list[float], output: int, message: str
) -> None:
    """Windows and outputs of hundreds of millions of rounds: an error that says the limit, and no array of them."""
    path = fs.ArrivalPath.from_arrays(arrival, [5, 5], [output, 3])
    server = fs.Server(10**12, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    with pytest.raises(InputError, match=message):
        fs.bounds.hindsight_bound(path, server)


# --------------------------------------------------------------------------- first passages


def test_first_passages_of_tiny_shares_against_fractions() -> None:
    """Shares of 1e-3, 1e-15 and 1e-100: every cycle stepped through in fractions, to 1e-10 of values down to 1e-300."""
    for share in (Fraction(1, 1000), Fraction(1, 10**15), Fraction(1, 10**100)):
        trials, threshold, level = 3, 2, 2
        law = [math.comb(trials, y) * share**y * (1 - share) ** (trials - y) for y in range(trials + 1)]
        alive = {0: Fraction(1)}
        for _ in range(12):
            after: dict[int, Fraction] = {}
            for v, mass in alive.items():
                for y, chance in enumerate(law):
                    left = v + y - threshold if v + y >= threshold else v + y
                    if left <= level:
                        after[left] = after.get(left, Fraction(0)) + mass * chance
            alive = after
        exact = 1 - sum(alive.values())
        found = fs.bounds.first_passage_probability(trials, float(share), threshold, level=level, cycles=12)
        assert found == pytest.approx(float(exact), rel=1e-10)


def test_first_passages_of_endless_runs() -> None:
    """1e18 cycles, loads up to 1 − 1e-9: probabilities that rise with the cycles, fall with the level, end at 1."""
    for trials, share, threshold in (
        (10, 0.3, 4),
        (100, 0.00999, 1),
        (50, 0.499999999, 25),
        (1000, 1e-12, 2),
    ):
        found = np.array(
            [
                [
                    fs.bounds.first_passage_probability(trials, share, threshold, level=level, cycles=cycles)
                    for cycles in (1, 10**6, 10**12, 10**18)
                ]
                for level in (1, 20, 60)
            ]
        )
        assert np.all((found >= 0.0) & (found <= 1.0))
        assert np.all(np.diff(found, axis=1) >= -1e-12)
        assert np.all(np.diff(found, axis=0) <= 1e-12)
    assert found[0, 3] < 1.0  # of shares of 1e-12 three in one cycle hardly ever come


# --------------------------------------------------------------------------- prefix caches


def test_caches_of_any_size_find_no_more_than_all_but_a_token() -> None:
    """Prompts of 2³¹ − 1 tokens in blocks of 2²⁹ to 2⁵³, caches from nothing to without end."""
    prompt = np.array([2**31 - 1, 2**31 - 1, 5])
    for block in (2**29, 2**30, 2**31 - 1, 2**53):
        for size in (0.0, 0.5, 2.0**29, 2.0**30, 2.0**31, 1e300, math.inf):
            found = lru_cached_tokens(
                prompt, [[1, 2, 3], [1, 2, 3], [4]], block_tokens=block, cache_tokens=size
            )
            kept = min(size // block if size < math.inf else 3, (2**31 - 2) // block)
            assert found.tolist() == [0, block * int(kept), 0]


@pytest.mark.parametrize("names", [[2**70], [2**63], [1.5], [math.nan], ["a"]])
def test_names_of_blocks_are_whole_numbers(names: list[Any]) -> None:
    """Rounded or cut names would make two prompts share what they do not."""
    with pytest.raises(InputError, match="names"):
        PromptBlocks(16, [0, 1], names)  # type: ignore[arg-type]
