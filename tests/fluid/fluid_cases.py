"""Random workloads and servers for the tests of the fluid program, and the program written down once more."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from fluidsched.server import IterationTime, Server
from fluidsched.workload import RequestType, Workload

seconds = st.floats(1e-4, 0.1)


def logarithmic(low: float, high: float) -> st.SearchStrategy[float]:
    """Floats spread evenly over orders of magnitude."""
    return st.floats(math.log(low), math.log(high)).map(math.exp)


@st.composite
def workloads(draw: Any, max_types: int = 5, rates: st.SearchStrategy[float] | None = None) -> Workload:
    """1 to `max_types` types of fixed lengths; now and then one without arrivals."""
    rate = rates if rates is not None else st.one_of(st.just(0.0), logarithmic(0.01, 100.0))
    types = [
        RequestType(
            f"type {j}",
            draw(rate),
            int(draw(logarithmic(1, 8000))),
            int(draw(logarithmic(1, 2000))),
        )
        for j in range(draw(st.integers(1, max_types)))
    ]
    return Workload(types)


@st.composite
def iteration_times(draw: Any, max_pieces: int = 3) -> IterationTime:
    """1 to `max_pieces` pieces; all but the first may start below zero."""
    coefficient = st.one_of(st.just(0.0), logarithmic(1e-9, 1e-4))
    rows = [
        [
            draw(seconds) if i == 0 else draw(st.integers(-100, 100)) * 1e-3,
            draw(coefficient),
            draw(coefficient),
            draw(logarithmic(1e-9, 1e-5)),
            draw(st.one_of(st.just(0.0), logarithmic(1e-12, 1e-8))),
        ]
        for i in range(draw(st.integers(1, max_pieces)))
    ]
    return IterationTime.pieces(rows)


@st.composite
def servers(draw: Any, max_pieces: int = 3) -> Server:
    """Any combination of limits, unlimited memory included."""
    return Server(
        draw(st.one_of(logarithmic(1e3, 1e7).map(math.floor), st.just(math.inf))),
        draw(iteration_times(max_pieces)),
        max_batch_size=draw(st.one_of(st.none(), st.integers(1, 512))),
        token_budget=draw(st.one_of(st.none(), st.integers(16, 8192))),
        block_size=draw(st.one_of(st.none(), st.sampled_from([1, 16, 128]))),
    )


def kv_blocks_held(prompt: int, output: int, block: int) -> float:
    """KV work of a request rounded to blocks, summed step by step."""
    return float(sum(block * math.ceil((prompt + k - 1) / block) for k in range(1, output + 1)))


def program(
    workload: Workload, server: Server, reward: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """The program over (a, u), written down again from fixed lengths: cost, rows, right-hand sides."""
    coefficients = server.iteration_time.coefficients
    assert coefficients is not None
    p = np.array([t.law.minimum_prompt for t in workload.types], float)
    o = np.array([t.law.minimum_output for t in workload.types], float)
    kv_work = np.array([sum(range(int(a), int(a + b))) for a, b in zip(p, o, strict=True)], float)
    held, capacity = kv_work, server.kv_capacity
    if server.block_size is not None:
        held = np.array(
            [kv_blocks_held(int(a), int(b), server.block_size) for a, b in zip(p, o, strict=True)]
        )
        if math.isfinite(capacity):
            capacity = capacity // server.block_size * server.block_size
    rows, right = [], []
    for base, c_pf, c_dec, c_kv, c_attn in coefficients.tolist():
        rows.append([*(c_pf * p + c_dec * (o - 1) + c_kv * (kv_work - p) + c_attn * p**2 / 2), base])
        right.append(1.0)
    for use, limit in ((held, capacity), (o, server.max_batch_size), (p + o - 1, server.token_budget)):
        if limit is not None and math.isfinite(limit):
            rows.append([*use, -limit])
            right.append(0.0)
    return np.append(reward, 0.0), np.array(rows), np.array(right)
