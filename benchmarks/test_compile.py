"""Compiling tables for 1 000 types (the aim is 0.1 s of processor time) and what Nested WAIT is made of.

Segments by dynamic programming over 4 096 cuts (aim: 2 s), first-passage probabilities for 1e9 cycles (50 ms), and a
Nested WAIT table that does not exist, found out and explained (1 s).

Two workloads: 1 000 types of one length each, outputs up to 400, and 1 000 boxes of random lengths. Both are
harsh: with so many types the thresholds are nearly all 1, and what a table holds is mostly rounding. A block
length or window of 8 iterations given, or searched.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.errors import InfeasibleError
from fluidsched.policy import compile_policy
from fluidsched.policy.nested_wait import Stream, shortest_cuts
from fluidsched.policy.problem import Problem
from fluidsched.queues import first_passage_probability

TYPES = 1_000


@functools.cache
def fluid(lengths: str) -> fs.FluidSolution:
    rng = np.random.default_rng(3)
    types = []
    for j in range(TYPES):
        rate, prompt, output = (
            0.001 + 0.01 * rng.random(),
            int(rng.integers(20, 2000)),
            int(rng.integers(2, 400)),
        )
        if lengths == "fixed":
            types.append(fs.RequestType(f"t{j}", rate, prompt, output))
        else:
            prompts, outputs = (
                rng.integers(1, prompt + 1, 8),
                np.append(rng.integers(1, output + 1, 7), output),
            )
            law = fs.lengths.joint(prompts.tolist(), outputs.tolist(), [0.125] * 8)
            types.append(fs.RequestType(f"t{j}", rate, lengths=law))
    server = fs.Server(2e8, fs.IterationTime.affine(0.01, 1e-5, 4e-5, 3e-8))
    return fs.solve_fluid(fs.Workload(types).at_load(0.5, server), server)


@pytest.mark.parametrize("lengths", ["fixed", "random"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("capped", {}),
        ("wait", {"slack": 0.05, "block_iterations": 8}),
        ("wait", {"slack": 0.05}),
        ("wait", {"slack": "auto", "block_iterations": 8}),
        ("wait", {"slack": "auto"}),
        ("gated", {"slack": 0.05, "block_iterations": 8}),
        ("gated", {"slack": 0.05}),
        ("gated", {"slack": "auto"}),
        ("nested-wait", {"slack": 0.05, "block_iterations": 8}),
        ("nested-wait", {"slack": 0.05}),
        ("nested-wait", {"slack": "auto"}),
        ("lookahead", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "plain",
)
def test_compile_1000_types(
    kind: str, options: dict[str, Any], lengths: str, benchmark: Any, note: Callable[..., None]
) -> None:
    """One table, lengths and fluid solution given."""
    if kind == "gated" and lengths == "random":
        pytest.skip(
            "no such table exists: one resident per type and their spread exceed half the token budget"
        )
    solution = fluid(lengths)
    start = time.process_time()
    table = benchmark.pedantic(compile_policy, (solution, kind), options, rounds=1)
    processor_s = time.process_time() - start
    right = table.certificate["memory"]["value"] <= 2e8 and len(table.types) in (1, TYPES)
    if kind not in ("capped", "lookahead"):
        right = right and table.certificate["slack"]["value"] >= (0.0 if options["slack"] == "auto" else 0.05)
    note(seed=3, types=TYPES, processor_s=processor_s, right=bool(right))
    assert right


@pytest.mark.parametrize("first", [20, 200, 3_000])
def test_segments_over_4096_cuts(first: int, benchmark: Any, note: Callable[..., None]) -> None:
    """Cuts of least memory for a geometric law; right: no better than all are the cuts of a coarser grid."""
    law = fs.lengths.geometric(mean=1000, maximum=4096)
    server = fs.Server(1e7, fs.IterationTime.affine(0.05, 1e-4, 1e-4, 1e-8))
    workload = fs.Workload([fs.RequestType("a", 0.5, 100, law)])
    stream = Stream(Problem.of(fs.solve_fluid(workload, server), 0.01), 1)
    threshold, log = stream.thresholds(first, 1.0), math.log(72_001 / 0.01)
    coarse, _ = shortest_cuts(stream, threshold, np.arange(0, 4096, 8), log)
    start = time.process_time()
    value, cuts = benchmark.pedantic(shortest_cuts, (stream, threshold, np.arange(4096), log), rounds=1)
    note(processor_s=time.process_time() - start, segments=len(cuts), right=bool(value <= coarse))
    assert value <= coarse


@pytest.mark.parametrize(
    "queue", [(10, 0.3, 4, 29), (100, 0.3, 35, 200), (1000, 0.3, 310, 450), (1000, 0.3, 310, 600)]
)
def test_first_passage_for_1e9_cycles(
    queue: tuple[Any, ...], benchmark: Any, note: Callable[..., None]
) -> None:
    """N, p, n, level; right: twice the cycles, twice the (small) probability, but for the cycles of the start."""
    trials, p, n, level = queue
    value = benchmark.pedantic(first_passage_probability, (trials, p, n, level, 10**9), rounds=3)
    more = first_passage_probability(trials, p, n, level, 2 * 10**9)
    right = value < more <= 2.0 * value * (1.0 + 1e-6)
    note(probability=value, right=bool(right))
    assert right


def test_a_nested_table_that_does_not_exist(benchmark: Any, note: Callable[..., None]) -> None:
    """The Azure mix at 0.8 of the boundary: the reason, and the largest load at which a table exists."""
    server = fs.catalog.server("a100-80gb", "llama-2-7b")
    solution = fs.solve_fluid(fs.workloads.azure_conv().at_load(0.8, server), server)

    def refused() -> str:
        try:
            compile_policy(solution, "nested-wait")
        except InfeasibleError as error:
            return error.reason
        return "none"

    start = time.process_time()
    reason = benchmark.pedantic(refused, rounds=1)
    note(processor_s=time.process_time() - start, right=reason == "memory")
    assert reason == "memory"
