"""Closed forms that the simulator must meet: a lone request, queues of one server, the fluid equilibrium."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import stdtrit
from simulation_cases import engine_table, path_of, run_checked, server_of, typed_table

from fluidsched.policy import baselines
from fluidsched.policy.table import Lookahead
from fluidsched.queues.embedded import embedded_queue_mean
from fluidsched.server import IterationTime, Server
from fluidsched.simulation import simulate
from fluidsched.simulation.measures import interval
from fluidsched.workload import RequestType, Workload, lengths

TIME = IterationTime.affine(0.01, 2e-5, 1e-4, 3e-7, 1e-9)
ALONE = {
    "vllm": engine_table(),
    "sarathi": engine_table("sarathi"),
    "orca": engine_table("orca", lookahead=Lookahead("reserve", 100)),
    "gated": typed_table("gated", {"A": {"threshold": 1, "period": 7}}),
    "wait": typed_table("wait", {"A": {"threshold": 1, "gate": 1, "max_hold_s": 1e-9}}, block_iterations=3),
}


@pytest.mark.parametrize("kind", ALONE)
def test_a_request_alone(kind):
    """TTFT = T(p prefilled), E2E = TTFT + Σ_{k=2..o} T(one decode reading p + k - 1), for every rule.

    Under `wait` a lone request is released by a hold shorter than anything else, o/k times.
    """
    p, o = 300, 50
    run, _ = run_checked(path_of((0.5, p, o, "A")), server_of(time=TIME), ALONE[kind])
    ttft = 0.01 + 2e-5 * p + 1e-9 * p * p / 2
    decodes = (o - 1) * (0.01 + 1e-4) + 3e-7 * sum(p + k - 1 for k in range(2, o + 1))
    assert_allclose(run.first_token_s[0] - 0.5, ttft, rtol=1e-12)
    assert_allclose(run.finish_s[0] - 0.5, ttft + decodes, rtol=1e-6 if kind == "wait" else 1e-12)
    assert run.iterations == o


def test_one_at_a_time_is_a_lindley_recursion():
    """max_in_service 1: finish_i = max(arrival_i, finish_{i-1}) + service_i, first come, first served."""
    rng = np.random.default_rng(5)
    arrivals = np.cumsum(rng.exponential(0.5, 60))
    prompts, outputs = rng.integers(1, 200, 60), rng.integers(1, 40, 60)
    path = path_of(*zip(arrivals, prompts, outputs, strict=True))
    run, _ = run_checked(path, server_of(time=TIME), engine_table("capped", max_in_service=1))
    finish = 0.0
    for i, (p, o) in enumerate(zip(prompts, outputs, strict=True)):
        service = 0.01 + 2e-5 * p + 1e-9 * p * p / 2
        service += (o - 1) * (0.01 + 1e-4) + 3e-7 * sum(p + k - 1 for k in range(2, o + 1))
        finish = max(arrivals[i], finish) + service
        assert_allclose(run.finish_s[i], finish, rtol=1e-12)


@pytest.mark.parametrize("engine", ["kernel", "reference"])
def test_md1_against_pollaczek_khinchine(engine):
    """o = 1, one at a time, T ≡ 1: M/D/1, mean wait ρ/(2(1 - ρ)) and ρ busy.

    Fixed seed; under the null a fresh seed fails with probability 2·10⁻⁴ (two t tests at 10⁻⁴ each). Warm-up
    bias is below 10⁻³ of the mean after 500 s at ρ = 0.6.
    """
    rho = 0.6
    workload = Workload([RequestType("one", rho, prompt_tokens=1, output_tokens=1)])
    server = Server(10, IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    table = engine_table("capped", max_in_service=1)
    runs = simulate(
        workload, server, table, horizon=8000.0, warmup=500.0, replications=12, seed=11, engine=engine
    )
    measured = runs.measures("capped")
    for values, expected in (
        (measured["mean_scheduling_delay"], rho / (2 * (1 - rho))),
        (measured["busy_fraction"], rho),
    ):
        error = values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - expected) <= stdtrit(len(values) - 1, 1 - 0.5e-4) * error
        assert error < 0.03 * expected


def test_one_at_a_time_with_geometric_lives_is_almost_mm1():
    """Lives of o iterations of d, o geometric of mean m: the M/M/1 queue but for a term of order 1/m.

    Mean wait ρ/(1 - ρ)·m d·(1 - 1/(2m)), by Pollaczek and Khinchine; time in system exponential of mean
    m d/(1 - ρ), so its 90 % quantile is ln 10 times that. t tests at 10⁻⁴ each, with 1 % for o's grid, the cut
    of its law (e⁻²⁰) and the warm-up.
    """
    m, d, rho = 100, 0.01, 0.6
    law = lengths.geometric(m, maximum=2_000)
    workload = Workload([RequestType("one", rho / (m * d), prompt_tokens=1, output_tokens=law)])
    server = Server(10_000, IterationTime.affine(d, 0.0, 0.0, 0.0))
    table = engine_table("capped", max_in_service=1)
    runs = simulate(workload, server, table, horizon=20_000.0, warmup=500.0, replications=16, seed=12)
    measured = runs.measures("capped")
    for name, expected in (
        ("mean_scheduling_delay", rho / (1 - rho) * m * d * (1 - 1 / (2 * m))),
        ("p90_e2e", np.log(10) * m * d / (1 - rho)),
        ("busy_fraction", rho),
    ):
        values = measured[name]
        half = stdtrit(len(values) - 1, 1 - 0.5e-4) * values.std(ddof=1) / np.sqrt(len(values))
        assert abs(values.mean() - expected) <= half + 0.01 * expected, name
        assert half < 0.1 * expected, name


@pytest.mark.parametrize("law", ["fixed", "geometric"])
def test_iterations_as_long_as_their_batch_share_the_processor(law):
    """T = c·residents, everybody admitted: processor sharing, E[time in system] = c E[o]/(1 - ρ) for any law of o.

    The wait for the next iteration adds about one of 200 shares. t test at 10⁻⁴, with 2 % for it and the warm-up.
    """
    m, c, rho = 200, 0.01, 0.6
    output = m if law == "fixed" else lengths.geometric(m, maximum=4_000)
    workload = Workload([RequestType("one", rho / (m * c), prompt_tokens=1, output_tokens=output)])
    server = Server(1_000_000, IterationTime.affine(1e-9, c, c, 0.0))
    table = engine_table("capped", max_in_service=10_000, token_budget=None)
    runs = simulate(workload, server, table, horizon=20_000.0, warmup=1_000.0, replications=16, seed=13)
    values = runs.measures("capped")["mean_e2e"]
    expected = m * c / (1 - rho)
    half = stdtrit(len(values) - 1, 1 - 0.5e-4) * values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean() - expected) <= half + 0.02 * expected
    assert half < 0.1 * expected


@pytest.mark.parametrize("engine", ["kernel", "reference"])
def test_resident_kv_meets_the_fluid_equilibrium(engine):
    """At half the fluid boundary mean KV is M* = ΔT* Σ λ_j W_j, ΔT* = d0/(1 - d1 Σ λ_j W_j).

    ζ-scaled (λ = 200/s, 80 residents): what remains of the fluctuations' bias is O(1/ζ), taken as 1 %. The t
    interval at 10⁻⁴ widened by it must cover M*.
    """
    p, o, rate, d0 = 20, 20, 200.0, 0.01
    work = o * p + o * (o - 1) / 2
    d1 = 0.5 / (rate * work)
    equilibrium = d0 / (1 - 0.5) * rate * work
    workload = Workload([RequestType("one", rate, prompt_tokens=p, output_tokens=o)])
    server = Server(10 * equilibrium, IterationTime.paper(d0, d1))
    table = engine_table("capped", max_in_service=1000)
    runs = simulate(workload, server, table, horizon=20.0, warmup=2.0, replications=12, seed=3, engine=engine)
    values = runs.measures("capped")["mean_kv"]
    half = stdtrit(len(values) - 1, 1 - 0.5e-4) * values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean() - equilibrium) <= half + 0.01 * equilibrium
    assert half < 0.08 * equilibrium


def test_batching_beats_one_at_a_time():
    """With base cost only, a batch costs what one request costs: vLLM's throughput is the offered one."""
    workload = Workload([RequestType("one", 5.0, prompt_tokens=5, output_tokens=3)])
    server = Server(10_000, IterationTime.affine(0.25, 0.0, 0.0, 0.0))
    runs = simulate(
        workload,
        server,
        [baselines.vllm(), engine_table("capped", max_in_service=1)],
        horizon=200.0,
        warmup=50.0,
        replications=4,
    )
    _, low, _ = interval(runs.measures("vllm")["request_throughput"])
    assert low > 4.0
    assert_allclose(runs.measures("capped")["request_throughput"], 1 / 0.75, rtol=0.02)


@pytest.mark.parametrize(("preemption", "per_second"), [("restart", 3.0), ("recompute", 4.0)])
def test_eviction_collapse(preemption, per_second):
    """The cascade of p = 1, o = 2, C = 12 with 4 arrivals per iteration and a backlog.

    Restart: 12 enter, 6 of them finish and 6 lose everything, so 3 of 4 are served for ever. With tokens kept
    the six come back to finish in one iteration: 12 in three iterations, the 4 offered.
    """
    arrivals = [(0.0, 1, 2)] * 20 + [(float(t), 1, 2) for t in range(1, 240) for _ in range(4)]
    run, _ = run_checked(
        path_of(*arrivals), server_of(12), engine_table(preemption=preemption), horizon=240.0, warmup=0.0
    )
    assert run.count("finished") == per_second * 240.0
    assert run.wasted_tokens == run.preempted


@pytest.mark.parametrize(
    ("threshold", "ratio", "literal"), [(4, 0.9, 5.23), (20, 0.95, 16.8), (20, 0.7, 9.6)]
)
def test_literal_wait_queue(threshold, ratio, literal):
    """One type, T ≡ 1, λ = ratio·n: the time-average entry queue of Algorithm 1, independently simulated.

    The figures are given to two or three digits, hence 1 % beside the t interval at 10⁻⁴; and the exact mean of
    the embedded recursion plus half a cycle of arrivals bounds it.
    """
    rate = ratio * threshold
    workload = Workload([RequestType("A", rate, prompt_tokens=1, output_tokens=1)])
    table = typed_table("wait", {"A": {"threshold": threshold, "gate": threshold}})
    runs = simulate(
        workload, server_of(), table, horizon=80_000.0 / threshold, warmup=500.0, replications=8, seed=2
    )
    queue = runs.measures("wait")["mean_waiting"]
    half = stdtrit(len(queue) - 1, 1 - 0.5e-4) * queue.std(ddof=1) / np.sqrt(len(queue))
    assert abs(queue.mean() - literal) <= half + 0.01 * literal
    assert queue.mean() <= embedded_queue_mean(threshold, rate) + rate / 2 + half
