"""The two counter-examples: completions exactly, throughputs within their intervals."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest

import fluidsched as fs


@pytest.mark.parametrize("engine", ["reference", "kernel"])
def test_cascade_completions_are_exact(engine: str) -> None:
    """Restart: 3, 6, 0, 6, 0, … of 4 offered; kept and spaced: 4 in the long run."""
    example = fs.examples.cascade(rounds=100)
    runs = fs.simulate(example.requests, example.server, example.tables, horizon=100.0, engine=engine)
    counts = {
        policy: np.bincount(runs.requests(policy)["finish_s"].dropna().astype(int), minlength=101)[2:]
        for policy in runs.policies
    }
    assert counts["restart"].tolist() == [3] + [6, 0] * 49
    assert counts["kept"][:6].tolist() == [3, 6, 0, 6, 2, 6]
    assert counts["kept"][3:99].mean() == 4.0
    assert counts["spaced"].tolist() == [3] + [4] * 98


def plain_rule(seed: int, horizon: float, warmup: float, d1: float) -> np.ndarray:
    """Completions per second of the rule without vLLM's clause, one iteration at a time, restarting."""
    rng = np.random.default_rng(seed)
    count = int(2.2 * horizon)
    arrival, output = np.cumsum(rng.exponential(0.5, count)), rng.integers(2, 4, count)
    queue: deque[int] = deque()
    served: list[list[int]] = []  # [request, tokens produced]
    now, seen, done = 0.0, 0, np.zeros(2)
    while now < horizon:
        while arrival[seen] <= now:
            queue.append(seen)
            seen += 1
        if not queue and not served:
            now = arrival[seen]
            continue
        while sum(1 + produced for _, produced in served) > 9:
            queue.appendleft(served.pop()[0])
        used = sum(1 + produced for _, produced in served)
        while queue and used + 1 <= 9:
            served.append([queue.popleft(), 0])
            used += 1
        now += 1.0 - 9.0 * d1 + d1 * used
        for entry in served:
            entry[1] += 1
            if entry[1] == output[entry[0]] and now > warmup:
                done[entry[1] - 2] += 1
        served = [entry for entry in served if entry[1] < output[entry[0]]]
    return done / (horizon - warmup)


def test_plain_fcfs_loses_an_eighth_at_capacity() -> None:
    """.874 and .873 of 1 per second; 8 runs, each two-sided test errs with probability below 0.1 %."""
    rates = np.array([plain_rule(seed, 3000.0, 500.0, d1=0.05) for seed in range(8)])
    error = rates.std(axis=0, ddof=1) / math.sqrt(len(rates))
    assert np.all(np.abs(rates.mean(axis=0) - [0.874, 0.873]) <= 5.4 * error + 5e-4)


@pytest.mark.parametrize(("d1", "restart"), [(0.0, 0.830), (0.1, 0.857)])
def test_engine_rule_loses_more_with_restart_and_little_with_tokens_kept(d1: float, restart: float) -> None:
    """Per type and second; 4 runs, the two-sided test errs with probability below 1 % (5.9 standard errors)."""
    example = fs.examples.fcfs_at_capacity(d1)
    runs = fs.simulate(
        example.requests,
        example.server,
        example.tables,
        horizon=60_000.0,
        warmup=20_000.0,
        replications=4,
        seed=4,
    )
    rates = runs.measures("restart")["request_throughput"] / 2.0
    assert abs(rates.mean() - restart) <= 5.9 * rates.std(ddof=1) / 2.0 + 1e-3
    assert (runs.measures("kept")["request_throughput"] / 2.0).min() > 0.96


def test_gap_of_the_counter_example_is_certified_by_the_fluid_bound() -> None:
    example = fs.examples.fcfs_at_capacity()
    assert fs.solve_fluid(example.requests, example.server).upper_bound == pytest.approx(2.0)
