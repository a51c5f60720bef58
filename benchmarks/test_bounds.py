"""Closed-form bounds of 100 types (target 10 ms) and first-passage probabilities over 1e9 cycles (target 50 ms)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import fluidsched as fs
from fluidsched.policy import Match, Segment, TableType
from fluidsched.queues import exact_buffer, first_passage_probability, lundberg_buffer


def test_bounds_of_100_types(benchmark: Any, note: Callable[..., None]) -> None:
    """Every theorem's number for a WAIT and a Nested WAIT table of 100 types, and the stability conditions."""
    workload = fs.Workload([fs.RequestType(f"t{j}", 0.5 + 0.01 * j, 100 + j, 10 + j % 7) for j in range(100)])
    server = fs.Server(1e9, fs.IterationTime.affine(0.01, 1e-5, 1e-5, 1e-8))
    rows = [
        TableType(
            kind.name,
            Match(label=kind.name),
            arrival_rate=kind.arrival_rate,
            admitted_rate=kind.arrival_rate,
            threshold=3 + j % 20,
            gate=3 + j % 20,
        )
        for j, kind in enumerate(workload.types)
    ]
    table = fs.PolicyTable("wait", "wait", tuple(rows), block_iterations=1, freeze=True)

    star, segments = TableType("*", threshold=60, gate=60), (Segment(11, 60), Segment(15, 45, 60.0))
    nested = fs.PolicyTable(
        "nested", "nested-wait", (star,), segments=segments, block_iterations=1, freeze=True
    )

    def bounds() -> tuple[Any, ...]:
        return (
            *fs.bounds.wait_bounds(table, workload, server, horizon=3600.0),
            *fs.bounds.nested_wait_bounds(nested, workload, server, horizon=3600.0),
            fs.bounds.nested_wait_overflow(nested, workload, server, horizon=3600.0),
            *fs.bounds.stability_conditions(workload, server),
        )

    found = benchmark(bounds)
    right = all(bound.applies or bound.condition for bound in found)
    note(seed=None, types=100, numbers=sum(bound.applies for bound in found), right=right)
    assert right


@pytest.mark.parametrize(("trials", "threshold", "probability"), [(10, 4, 0.3), (21, 9, 0.3), (100, 35, 0.3)])
def test_first_passage_of_1e9_cycles(
    trials: int, threshold: int, probability: float, benchmark: Any, note: Callable[..., None]
) -> None:
    """The chance that a boundary queue ever exceeds its exact buffer for δ = 0.01."""
    level = exact_buffer(trials, probability, threshold, 10**9, 0.01)
    chance = benchmark(first_passage_probability, trials, probability, threshold, level, 10**9)
    right = chance <= 0.01 and level <= lundberg_buffer(trials, probability, threshold, 10**9, 0.01)
    note(seed=None, right=bool(right))
    assert right
