"""The fluid program of 20 types: under 2 ms to solve, solution and certificate included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fluidsched.fluid import FluidProgram, solve_fluid
from fluidsched.server import catalog
from fluidsched.workload import RequestType, Workload

SEED = 1


def twenty_types() -> Workload:
    """Twenty types of random lengths at random rates, half again what the server carries."""
    rng = np.random.default_rng(SEED)
    types = [
        RequestType(
            f"type {j}",
            arrival_rate=float(rng.uniform(0.1, 1.0)),
            prompt_tokens=int(rng.integers(50, 4000)),
            output_tokens=int(rng.integers(10, 800)),
        )
        for j in range(20)
    ]
    return Workload(types).at_load(1.5, catalog.server("a100-80gb", "llama-2-7b"))


@pytest.mark.parametrize("way", ["cold", "warm"])
def test_program_of_twenty_types(way: str, benchmark: Any, note: Callable[..., None]) -> None:
    """Cold: build, solve, certify. Warm: the same program again at other rates."""
    workload, server = twenty_types(), catalog.server("a100-80gb", "llama-2-7b")
    if way == "cold":
        solution = benchmark(solve_fluid, workload, server)
    else:
        program = FluidProgram(workload, server)
        solution = benchmark(program.solve, workload.arrival_rate * 0.9)
    right = bool(solution.certificate.ok)
    note(seed=SEED, types=len(workload), right=right)
    assert right
