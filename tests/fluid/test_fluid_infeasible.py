"""It fails well: no answer is `InfeasibleError`, which names an irreducible set of constraints and a repair that works.

A set is irreducible when its constraints contradict each other and any of them dropped leaves the others satisfiable:
both halves are asked of SciPy's solver, on the program written down from the model's labelled rows.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from fluid_cases import servers, workloads
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import fluidsched as fs
from fluidsched.errors import InfeasibleError
from fluidsched.fluid._assembly import Assembly
from fluidsched.fluid.model import FluidModel, build_model


def can_be_met(model: FluidModel, floors: np.ndarray, names: list[str]) -> bool:  # type: ignore[type-arg]
    """Whether these constraints alone can be met together, all others left out."""
    types, rows, right = len(floors), [], []
    lower = [
        floors[j] if f"fairness_floor[{model.workload.type_names[j]}]" in names else 0.0 for j in range(types)
    ]
    unit = np.where(floors > 0.0, floors, 1.0)
    for name, row, by_rate, limit in zip(
        model.row_names, model.matrix, model.rate_coefficient, model.limit, strict=True
    ):
        if re.sub(r"\[\d+\]", "", name) in names:
            size = max(float((row * unit).max()), abs(float(by_rate)))
            rows.append([*(row * unit / size), by_rate / size])
            right.append(limit / size)
    if not rows:
        return True
    least = 1.0 / model.max_iteration_time if "iteration_time" in names else 0.0
    bounds = [(low / one, None) for low, one in zip(lower, unit, strict=True)] + [(least, None)]
    answer = linprog(np.zeros(types + 1), A_ub=rows, b_ub=right, bounds=bounds, method="highs")
    assert answer.status in (0, 2), answer.message
    return bool(answer.status == 0)


@settings(max_examples=60)
@given(workloads(), servers(), st.floats(1.01, 20.0), st.booleans())
def test_floors_beyond_a_server_name_an_irreducible_set(
    workload: fs.Workload, server: fs.Server, factor: float, slow: bool
) -> None:
    """The named floors and resources contradict each other; dropping any one of them repairs that."""
    limit = server.iteration_time.empty * 3 if slow else None
    model = build_model(workload, server, max_iteration_time=limit)
    load = float(model.load(workload.arrival_rate).max())
    assume(1e-6 < load < math.inf)
    floors = workload.arrival_rate * factor / load
    names = list(model.floor_contradiction(floors))
    assert names[0] == "time"
    assert not can_be_met(model, floors * (1 + 1e-6), names)
    for name in names:
        assert can_be_met(model, floors * (1 - 1e-6), [other for other in names if other != name]), name
    assert model.floor_contradiction(floors / factor * (1 - 1e-6)) == ()


def test_floors_of_one_server_name_the_types_at_fault() -> None:
    """The message names the floors that are too much, not those that would fit, and a factor that repairs."""
    workload = fs.Workload(
        [
            fs.RequestType("small", 1.0, 100, 10),
            fs.RequestType("long", 90.0, 6000, 300),
            fs.RequestType("none", 0, 9, 9),
        ]
    )
    server = fs.catalog.server("l40s", "llama-3-8b")
    with pytest.raises(InfeasibleError) as caught:
        fs.solve_fluid(workload, server, fairness_floor=0.9)
    text = str(caught.value)
    assert "fairness_floor[long]" in text
    assert "fairness_floor[small]" not in text
    factor = float(text.rpartition("multiplied by ")[2].split()[0])
    fs.solve_fluid(workload, server, fairness_floor=0.9 * factor * 0.99)


@pytest.mark.parametrize("seed", range(12))
def test_floors_beyond_the_pools_name_an_irreducible_set(seed: int) -> None:
    """Without any one of its floors the pools carry the others; both repairs work."""
    rng = np.random.default_rng(seed)
    types = [
        fs.RequestType(
            f"type {j}", rng.uniform(5, 20), int(rng.integers(100, 3000)), int(rng.integers(1, 400))
        )
        for j in range(4)
    ]
    workload = fs.Workload(types)
    entries = [e for e in fs.catalog.entries() if e.kv_capacity_tokens > 20_000]
    pools = [
        fs.Pool(entries[i].server(), 1.0, name=f"pool {i}")
        for i in rng.choice(len(entries), 2, replace=False)
    ]
    carried = fs.fluid.solve_pools(workload, pools).critical_rate / workload.total_arrival_rate
    workload = workload.scaled(1.5 / carried)
    with pytest.raises(InfeasibleError) as caught:
        fs.fluid.solve_pools(workload, pools, fairness_floor=1.0)
    assert caught.value.reason == "fairness_floor"
    text = str(caught.value)
    blamed = re.findall(r"fairness_floor\[(type \d)\]", text)
    assert blamed
    assert re.search(r"(time|kv|batch|tokens) of pool", text)
    floor = np.array([float(name in blamed) for name in workload.type_names])
    with pytest.raises(InfeasibleError):
        fs.fluid.solve_pools(workload, pools, fairness_floor=floor)
    for name in blamed:
        without = np.where(np.array(workload.type_names) == name, 0.0, floor)
        fs.fluid.solve_pools(workload, pools, fairness_floor=without)
    factor = float(re.search(r"multiplied by ([\d.e+-]+) or less", text)[1])  # type: ignore[index]
    more = float(re.search(r"with ([\d.e+-]+) times", text)[1])  # type: ignore[index]
    fs.fluid.solve_pools(workload, pools, fairness_floor=factor * 0.99)
    larger = [fs.Pool(pool.server, more * 1.01, name=pool.name) for pool in pools]
    fs.fluid.solve_pools(workload, larger, fairness_floor=1.0)


def test_an_assembled_program_names_its_rows() -> None:
    """x ≥ 1, y ≥ 1, x + y ≤ 1 contradict each other; z ≤ 5 and x + z ≤ 9 have no part in it."""
    lp = Assembly()
    x = lp.columns(3, 0.0, np.inf, 1.0)
    least = lp.rows(np.ones(2), np.full(2, np.inf), lambda i: f"least {'xy'[i]}")
    lp.add(least, x[:2], 1.0)
    most = lp.rows(np.full(3, -np.inf), np.array([5.0, 1.0, 9.0]), lambda i: ("z", "together", "x and z")[i])
    lp.add(most[[0, 1, 1, 2, 2]], x[[2, 0, 1, 0, 2]], 1.0)
    assert lp.contradiction() == ("least x", "least y", "together")
    with pytest.raises(InfeasibleError, match=r"the test has no solution; .*: least x, least y, together"):
        lp.minimise("the test")


WORKLOAD = fs.Workload([fs.RequestType("chat", 9.0, 500, 100)])
SERVER = fs.catalog.server("l40s", "llama-3-8b")


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: fs.solve_fluid(WORKLOAD, SERVER, max_iteration_time=1e-3), "empty iteration"),
        (lambda: fs.plan_capacity(WORKLOAD, [SERVER], [1.0], itl_target=1e-3), "itl_target of 0.001 s"),
        (lambda: fs.fluid.plan_load(WORKLOAD, [SERVER], [2.0], 1.0), "The cheapest costs 2"),
        (
            lambda: fs.fluid.solve_pools(
                WORKLOAD, [fs.Pool(fs.Server(100, fs.IterationTime.paper(0.01, 1e-6)))]
            ),
            "longest request of type 'chat'",
        ),
        (
            lambda: fs.fluid.plan_load(
                WORKLOAD, [fs.Pool(SERVER, stage=s, name=s) for s in ("prefill", "decode")], [2.0, 2.0], 3.0
            ),
            "prefill needs decode",
        ),
    ],
)
def test_questions_without_an_answer_are_infeasible_not_wrong_input(ask: object, words: str) -> None:
    """Well-formed numbers that nothing satisfies are `InfeasibleError` (exit status 1), with the numbers at odds."""
    with pytest.raises(InfeasibleError, match=re.escape(words)):
        ask()  # type: ignore[operator]
