"""How far tables reach against the number of types, its picture, and the benchmark that tabulates the catalog."""

from __future__ import annotations

import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.policy import compile_policy, largest_load, reach_curve, wait_curve

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "reach.py"


@pytest.fixture(scope="module")
def a100():
    return fs.catalog.server("a100-80gb", "llama-2-7b")


@pytest.fixture(scope="module")
def curve(a100):
    return reach_curve(fs.workloads.azure_code(), a100)


def test_reach_of_one_server_and_one_type(a100):
    script = runpy.run_path(str(SCRIPT))
    lines = list(script["reach"]([a100], ["azure_conv"], [1]))
    assert [line[3] for line in lines] == ["wait", "gated", "capped"]
    assert all(0.9 < line[4] < 1.0 for line in lines)
    assert [line[5] for line in lines] == ["rounding", "memory", "time"]


def test_tables_exist_at_the_reach_and_not_above_for_the_reason_named(curve, a100):
    """Share and reason are those of `largest_load` and of `compile_policy`'s refusal above."""
    workload = fs.workloads.azure_code()
    for types, kind, share, reason in zip(curve.types, curve.kind, curve.share, curve.reason, strict=True):
        if types not in (1, 12):
            continue
        merged = workload.merged(int(types))
        below = fs.solve_fluid(merged.at_load(share - 0.001, a100), a100)
        assert largest_load(below, kind) == pytest.approx(share, abs=1.1e-3)
        assert compile_policy(below, kind, slack=0.0).kind == kind
        with pytest.raises(InfeasibleError) as refused:
            compile_policy(fs.solve_fluid(merged.at_load(share + 0.002, a100), a100), kind, slack=0.0)
        assert refused.value.reason == reason


def test_curve_takes_the_numbers_of_types_a_workload_merges_into(curve):
    assert sorted(set(curve.types.tolist())) == list(fs.workloads.azure_code().merge_sizes)
    assert len(curve.to_frame()) == len(curve.types) == 3 * len(fs.workloads.azure_code().merge_sizes)
    assert "12 types  wait" in repr(curve)


def test_more_memory_never_shortens_the_reach(a100):
    """More KV: every kind reaches as far or farther (one type, share to within 0.001)."""
    mix = fs.workloads.azure_conv().merged(1)
    small, large = (
        reach_curve([mix], fs.Server(capacity, a100.iteration_time), kinds=["wait", "gated"])
        for capacity in (100_000, 1_000_000)
    )
    # the boundary itself grows with memory: compare loads, not shares
    loads = []
    for server, reached in ((small, small.share), (large, large.share)):
        capacity = 100_000 if server is small else 1_000_000
        fluid = fs.solve_fluid(mix, fs.Server(capacity, a100.iteration_time))
        loads.append(reached / fluid.load.max())
    assert np.all(loads[1] >= loads[0] * 0.998)


def test_bad_arguments_are_named(a100):
    with pytest.raises(InputError, match="workload"):
        reach_curve([], a100)
    with pytest.raises(InputError, match=r"kinds\[1\]"):
        reach_curve(fs.workloads.azure_code(), a100, kinds=["wait", "vllm"])


def test_pictures(curve, a100):
    axes = fs.plots.reach_curve(curve)
    drawn = {str(line.get_label()): line.get_ydata() for line in axes.get_lines()}
    for position, kind in enumerate(("capped", "wait", "gated")):
        assert np.array_equal(drawn[kind], curve.share[position::3])
    assert {f"ends by {reason}" for reason in curve.reason} <= set(drawn)
    fluid = fs.solve_fluid(fs.workloads.azure_conv().merged(1).at_load(0.8, a100), a100)
    blocks = wait_curve(fluid, block_iterations=[2, 8, 32, 128])
    left = blocks.plot()
    right = left.figure.axes[1]
    assert np.array_equal(left.get_lines()[0].get_ydata(), blocks.kv, equal_nan=True)
    assert np.array_equal(right.get_lines()[0].get_ydata(), blocks.wait, equal_nan=True)
    plt.close("all")
