"""Compiling tables for 1 000 types; the aim is 0.1 s of processor time.

Two workloads: 1 000 types of one length each, outputs up to 400, and 1 000 boxes of random lengths. Both are
harsh: with so many types the thresholds are nearly all 1, and what a table holds is mostly rounding. A block
length or window of 8 iterations given, or searched.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.policy import compile_policy

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
    if kind != "capped":
        right = right and table.certificate["slack"]["value"] >= (0.0 if options["slack"] == "auto" else 0.05)
    note(seed=3, types=TYPES, processor_s=processor_s, right=bool(right))
    assert right
