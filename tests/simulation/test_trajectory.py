"""Fluid trajectories: equilibria, the cascade, balance, and the limit that the simulator approaches."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.policy import PolicyTable, TableType
from fluidsched.policy.table import Match
from fluidsched.simulation.reference import run_reference


@pytest.mark.parametrize(("rate", "kv"), [(12, 1382), (18, 2121), (22, 2634), (24, 2897)])
def test_equilibrium_is_the_fluid_solution(rate: float, kv: int) -> None:
    """The paper's model, 512 prompt tokens and 20 decodes: published M*, and n*, ΔT*, M* of the program."""
    server = fs.Server(137_000, fs.IterationTime.paper(d0=0.010042382503853812, d1=3.342175435455382e-7))
    workload = fs.Workload([fs.RequestType("chat", rate, prompt_tokens=512, output_tokens=21)])
    run = fs.fluid_trajectory(workload, server, fs.baselines.vllm())
    ideal = fs.solve_fluid(workload, server)
    assert run.verdict == "equilibrium"
    assert round(run.resident_kv[-1]) == kv
    assert run.resident_kv[-1] == pytest.approx(ideal.resident_kv, rel=1e-9)
    assert run.iteration_time[-1] == pytest.approx(ideal.iteration_time, rel=1e-9)
    assert run.admitted[-1] == pytest.approx(rate * ideal.iteration_time, rel=1e-9)


def test_cascade() -> None:
    example = fs.examples.cascade()
    workload = fs.Workload([fs.RequestType("*", 4.0, prompt_tokens=1, output_tokens=2)])
    runs = {
        table.name: fs.fluid_trajectory(
            workload, example.server, table, waiting={"*": 6.0}, residents={("*", 1): 3.0}
        )
        for table in example.tables
    }
    assert {name: run.verdict for name, run in runs.items()} == {
        "restart": "eviction collapse",
        "kept": "limit cycle",
        "spaced": "equilibrium",
    }
    np.testing.assert_allclose(runs["restart"].completed[:9], [3, 6, 0, 6, 0, 6, 0, 6, 0], atol=1e-9)
    np.testing.assert_allclose(runs["kept"].completed[:8], [3, 6, 0, 6, 2, 6, 2, 6], atol=1e-9)
    np.testing.assert_allclose(runs["spaced"].completed[:4], [3, 4, 4, 4], atol=1e-9)
    assert runs["restart"].completed[200:].mean() == pytest.approx(3.0, rel=1e-9)
    assert runs["kept"].completed[200:].mean() == pytest.approx(4.0, rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    rates=st.tuples(st.floats(0.1, 4.0), st.floats(0.1, 4.0)),
    capacity=st.integers(20, 80),
    preemption=st.sampled_from(["restart", "recompute"]),
    gated=st.booleans(),
    waiting=st.floats(0.0, 30.0),
    residents=st.floats(0.0, 3.0),
)
def test_requests_and_memory_balance(
    rates: tuple[float, float],
    capacity: int,
    preemption: str,
    gated: bool,
    waiting: float,
    residents: float,
) -> None:
    """Arrivals are completed, resident or waiting; residents never hold more than the capacity."""
    workload = fs.Workload(
        [fs.RequestType("a", rates[0], 2, 5), fs.RequestType("b", rates[1], 4, fs.lengths.uniform(1, 6))]
    )
    server = fs.Server(capacity, fs.IterationTime.affine(1.0, 0.01, 0.01, 0.001))
    table = fs.baselines.vllm()
    if gated:
        rows = tuple(
            TableType(name, match=Match(label=name), threshold=4, gate=gate, period=2)
            for name, gate in [("a", 2), ("b", 0)]
        )
        table = PolicyTable("gated", "gated", rows)
    table = dataclasses.replace(table, preemption=preemption)
    run = fs.fluid_trajectory(
        workload, server, table, iterations=120, waiting={"a": waiting}, residents={("b", 2): residents}
    )
    in_service = residents + np.cumsum(run.admitted - run.completed - run.preempted)
    np.testing.assert_allclose(run.residents - run.completed, in_service, atol=1e-8)
    offered = waiting + residents + sum(rates) * run.time_s
    served = np.cumsum(run.completed) - run.completed
    np.testing.assert_allclose(served + run.residents + run.waiting, offered, rtol=1e-9, atol=1e-8)
    assert (run.resident_kv <= capacity * (1 + 1e-8)).all()
    assert min(run.resident_kv.min(), run.waiting.min(), run.completed.min()) >= -1e-8


def test_law_of_large_numbers() -> None:
    """Rates, capacity and cap times ζ, per-token times over ζ: fluctuations fall as ζ^(-1/2) around the fluid."""
    spread = []
    for scale in (1, 10, 100):
        workload = fs.Workload([fs.RequestType("a", 4.0 * scale, 3, 5)])
        server = fs.Server(200 * scale, fs.IterationTime.paper(d0=1.0, d1=0.002 / scale))
        table = fs.baselines.vllm(token_budget=None)
        path = workload.sample(300.0, seed=7)
        run = run_reference(path, server, table, horizon=300.0, occupancy_points=300)
        fluid = fs.fluid_trajectory(workload, server, table)
        assert run.occupancy is not None
        held = run.occupancy[run.occupancy[:, 0] > 30.0, 1]
        ideal = fluid.resident_kv[-1] - fluid.completed[-1] * 7  # between iterations finishers have left
        assert held.mean() == pytest.approx(ideal, rel=0.1 / scale**0.5)
        spread.append(held.std() / held.mean())
    slope = np.polyfit(np.log10([1, 10, 100]), np.log10(spread), 1)[0]
    assert -0.62 < slope < -0.38


@pytest.mark.parametrize(
    ("change", "word"),
    [({"chunk_tokens": 4}, "chunk_tokens"), ({"prefill_interval": 3}, "prefill_interval")],
)
def test_rules_without_a_fluid_version_are_refused(change: dict[str, Any], word: str) -> None:
    workload = fs.Workload([fs.RequestType("a", 1.0, 3, 5)])
    server = fs.Server(200, fs.IterationTime.paper(d0=1.0, d1=0.002))
    with pytest.raises(InputError, match=word):
        fs.fluid_trajectory(workload, server, dataclasses.replace(fs.baselines.vllm(), **change))
    with pytest.raises(InputError, match="kind"):
        fs.fluid_trajectory(workload, server, fs.baselines.sarathi())


def test_plot_and_frame() -> None:
    workload = fs.Workload([fs.RequestType("a", 1.0, 3, 5)])
    server = fs.Server(200, fs.IterationTime.paper(d0=1.0, d1=0.002))
    run = fs.fluid_trajectory(workload, server, fs.baselines.vllm())
    assert len(run.to_frame()) == len(run.time_s)
    assert "equilibrium" in repr(run)
    assert fs.plots.trajectory(run, capacity=200.0).get_xlabel() == "time (s)"
