"""How a solution is shown, stored and read; that nothing reaches standard output."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fluid_cases import servers, workloads
from hypothesis import given, settings

import fluidsched as fs
from fluidsched.errors import InputError


def overloaded() -> fs.FluidSolution:
    workload = fs.Workload([fs.RequestType("<chat>", 40.0, 512, 128), fs.RequestType("sum", 5.0, 4000, 200)])
    return fs.solve_fluid(workload, fs.catalog.server("a100", "llama-2-7b"), "output_tokens")


@settings(max_examples=40)
@given(workloads(), servers())
def test_json_round_trip(workload: fs.Workload, server: fs.Server) -> None:
    """Strict JSON out, the same solution in, infinities and zero demand included."""
    fluid = fs.solve_fluid(workload, server)
    text = fluid.to_json()
    json.loads(text, parse_constant=lambda word: pytest.fail(word))
    again = fs.FluidSolution.from_dict(json.loads(text))
    assert again.to_json() == text
    np.testing.assert_array_equal(again.admitted_rate, fluid.admitted_rate)
    assert again.certificate == fluid.certificate


def test_json_keeps_rewards_floors_and_limits(tmp_path: Path) -> None:
    """Everything that defines the program survives a file."""
    fluid = overloaded()
    custom = fs.solve_fluid(
        fluid.workload,
        fluid.server,
        [1.0, 7.5],
        fairness_floor=[0.01, 0.02],
        max_iteration_time=0.05,
        chunk_tokens=256,
    )
    path = tmp_path / "fluid.json"
    custom.to_json(path)
    again = fs.FluidSolution.from_json(path)
    assert again.objective == "rewards"
    assert again.reward.tolist() == [1.0, 7.5]
    assert again.model.fairness_floor.tolist() == [0.01, 0.02]
    assert again.model.max_iteration_time == 0.05
    assert again.model.chunk_tokens == 256
    assert again.shadow_price == custom.shadow_price


def test_reading_is_strict() -> None:
    """A wrong field is named."""
    data = json.loads(overloaded().to_json())
    for change, named in [
        ({"schema": "fluidsched.fluid-solution/2"}, "fluid.schema"),
        ({"objective": "money"}, "fluid.objective"),
        ({"admitted_rate": [1.0]}, "fluid.admitted_rate"),
        ({"admitted_rate": [1.0, None]}, "fluid.admitted_rate[1]"),
        ({"iteration_rate": -1.0}, "fluid.iteration_rate"),
        ({"row_dual": [0.0]}, "fluid.row_dual"),
        ({"effort": 1.5}, "fluid.effort"),
        ({"reward": [1.0, 1.0]}, "fluid.reward"),
        ({"surplus": 1}, "fluid.surplus"),
    ]:
        with pytest.raises(InputError) as caught:
            fs.FluidSolution.from_dict({**data, **change})
        assert caught.value.argument == named
    del data["effort"]
    with pytest.raises(InputError, match="effort"):
        fs.FluidSolution.from_dict(data)


def test_repr_reads_like_a_page() -> None:
    """Server, rates, loads, times with units, what binds, and the types with their prices."""
    shown = repr(overloaded())
    for words in [
        "llama-2-7b on a100-80gb",
        "45 req/s in 2 types",
        "load            time",
        "ms",
        "of 121,728 tokens",
        "output tokens/s",
        "binding         time, kv",
        "rationed",
        "refused",
        "bid price",
    ]:
        assert words in shown
    stable = repr(fs.solve_fluid(overloaded().workload.scaled(0.01), overloaded().server))
    assert "demand alone" in stable
    assert "shadow prices" not in stable


def test_requests_beyond_the_memory_are_pointed_out() -> None:
    """p + o − 1 = 1000 fits 1000 tokens and not 999; in blocks of 16 only 992; unbounded laws are not judged."""
    law = fs.lengths.joint([900, 10], [101, 500])
    types = [
        fs.RequestType("joint", 1.0, lengths=law),
        fs.RequestType("open", 1.0, 100, fs.lengths.geometric(50)),
    ]
    time = fs.IterationTime.paper(d0=0.01, d1=3.3e-7)

    def holds(capacity: int, block: int | None = None) -> list[bool]:
        fluid = fs.solve_fluid(fs.Workload(types), fs.Server(capacity, time, block_size=block))
        assert ("too long" in repr(fluid)) is not bool(fluid.holds_longest.all())
        return [bool(held) for held in fluid.holds_longest]

    assert holds(1000) == [True, True]
    assert holds(999) == [False, True]
    assert holds(1000, block=16) == [False, True]


def test_long_lists_of_types_are_cut() -> None:
    """Twenty types are shown, the rest counted."""
    workload = fs.Workload([fs.RequestType(f"type {j}", 0.01, 10, 10) for j in range(25)])
    shown = repr(fs.solve_fluid(workload, fs.Server(10_000, fs.IterationTime.paper(0.01, 1e-6))))
    assert "type 19" in shown
    assert "type 20" not in shown
    assert "5 more types" in shown


def test_html_escapes_names() -> None:
    """Names come from the user; a page shows them, it does not run them."""
    page = overloaded()._repr_html_()
    assert "<table>" in page
    assert "&lt;chat&gt;" in page
    assert "<chat>" not in page


def test_frame_has_one_row_per_type() -> None:
    """Rates, decisions and prices by type."""
    frame = overloaded().to_frame()
    assert frame["type"].tolist() == ["<chat>", "sum"]
    assert frame["decision"].tolist() == ["rationed", "refused"]
    assert (frame["bid_price"] * frame["admitted_rate"]).sum() == pytest.approx(overloaded().objective_value)


def test_arrays_are_read_only() -> None:
    """A frozen answer cannot be edited."""
    fluid = overloaded()
    for array in (
        fluid.admitted_rate,
        fluid.row_dual,
        fluid.load,
        fluid.bid_price,
        fluid.admitted_fraction,
        fluid.reward,
        fluid.model.matrix,
    ):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0


def test_solving_prints_nothing() -> None:
    """HiGHS's banner and log stay away from standard output, in a fresh process too."""
    code = (
        "import fluidsched as fs\n"
        "w = fs.Workload([fs.RequestType('a', 1.0, 10, 10)])\n"
        "s = fs.Server(1000, fs.IterationTime.paper(0.01, 1e-6))\n"
        "for _ in range(2): fs.solve_fluid(w, s)\n"
        "print('{}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{}\n"
    assert done.stderr == ""


def test_solving_without_standard_output() -> None:
    """A process whose standard output is closed solves all the same."""
    code = (
        "import os, sys\n"
        "os.close(1)\n"
        "import fluidsched as fs\n"
        "w = fs.Workload([fs.RequestType('a', 1.0, 10, 10)])\n"
        "f = fs.solve_fluid(w, fs.Server(1000, fs.IterationTime.paper(0.01, 1e-6)))\n"
        "os._exit(0 if f.is_stable else 1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_users_highs_threads_are_tolerated() -> None:
    """HiGHS's threads are shared by the process; whoever started more of them does not break us."""
    code = (
        "import highspy\n"
        "h = highspy.Highs()\n"
        "h.setOptionValue('output_flag', False)\n"
        "h.setOptionValue('threads', 2)\n"
        "h.addVar(0, 1)\n"
        "h.run()\n"
        "import fluidsched as fs\n"
        "w = fs.Workload([fs.RequestType('a', 1.0, 10, 10)])\n"
        "s = fs.Server(1000, fs.IterationTime.paper(0.01, 1e-6))\n"
        "assert fs.solve_fluid(w, s).is_stable\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_import_stays_light() -> None:
    """Solving loads neither cvxpy, matplotlib, pandas nor numba."""
    code = (
        "import sys, fluidsched as fs\n"
        "w = fs.Workload([fs.RequestType('a', 1.0, 10, 10)])\n"
        "repr(fs.solve_fluid(w, fs.Server(1000, fs.IterationTime.paper(0.01, 1e-6))))\n"
        "assert not {'cvxpy', 'matplotlib', 'pandas', 'numba'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unlimited_memory_is_spelled_inf() -> None:
    """Infinite capacity and iteration time go through JSON as the word inf."""
    workload = fs.Workload([fs.RequestType("a", 500.0, 1000, 100)])
    server = fs.Server(math.inf, fs.IterationTime.affine(0.01, 5e-5, 5e-5, 3e-7))
    data = json.loads(fs.solve_fluid(workload, server).to_json())
    assert data["server"]["kv_capacity"] == data["derived"]["iteration_time_s"] == "inf"
