"""Fleets against enumeration of all smaller ones."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.fluid.capacity import plan_capacity, plan_load
from fluidsched.fluid.pools import Pool, largest_factor, pools_model


def offers(seed: int) -> tuple[fs.Workload, list[fs.Server], np.ndarray]:  # type: ignore[type-arg]
    """Four types, three catalog servers and costs."""
    rng = np.random.default_rng(seed)
    types = [
        fs.RequestType(f"type {j}", rng.uniform(1, 12), int(rng.integers(1, 3000)), int(rng.integers(1, 400)))
        for j in range(4)
    ]
    entries = [e for e in fs.catalog.entries() if e.kv_capacity_tokens > 20_000]
    servers = [entries[i].server() for i in rng.choice(len(entries), 3, replace=False)]
    return fs.Workload(types), servers, rng.uniform(0.5, 4, 3).round(2)


def carried(workload: fs.Workload, servers: list[fs.Server], replicas: tuple[int, ...]) -> float:
    """The largest factor on the workload that this fleet carries."""
    pools = [Pool(server, count) for server, count in zip(servers, replicas, strict=True)]
    return largest_factor(pools_model(workload, pools), workload.arrival_rate)


@pytest.mark.parametrize("seed", range(4))
def test_no_cheaper_fleet_carries_the_demand(seed: int) -> None:
    """Of all fleets that cost less none carries the demand with headroom; the chosen one does."""
    workload, servers, cost = offers(seed)
    plan = plan_capacity(workload, servers, cost, headroom=0.1)
    demand = workload.scaled(1.1)
    assert carried(demand, servers, tuple(plan.replicas.tolist())) >= 1 - 1e-6
    assert plan.gap <= 1e-6
    assert plan.bound <= plan.total_cost * (1 + 1e-9)
    most = [range(int(plan.total_cost / price) + 1) for price in cost]
    for fleet in itertools.product(*most):
        if np.array(fleet) @ cost < plan.total_cost * (1 - 1e-9):
            assert carried(demand, servers, fleet) < 1, fleet
    routing = plan.routing
    assert routing.admitted_fraction.min() == pytest.approx(1.0, abs=1e-5)
    assert routing.certificate.ok


@pytest.mark.parametrize("seed", range(3))
def test_no_fleet_within_the_budget_carries_more(seed: int) -> None:
    """The largest load for a budget is the largest over all fleets it buys, and buys itself back."""
    workload, servers, cost = offers(seed)
    budget = 3.5 * float(cost.max())
    plan = plan_load(workload, servers, cost, budget)
    assert plan.total_cost <= budget * (1 + 1e-9)
    most = [range(int(budget / price) + 1) for price in cost]
    best = max(
        carried(workload, servers, fleet)
        for fleet in itertools.product(*most)
        if any(fleet) and np.array(fleet) @ cost <= budget
    )
    total = workload.total_arrival_rate
    assert plan.workload.total_arrival_rate == pytest.approx(best * total, rel=1e-6)
    assert plan.bound == pytest.approx(best * total, rel=1e-6)
    back = plan_capacity(plan.workload.scaled(1 - 1e-6), servers, cost)
    assert back.total_cost <= plan.total_cost * (1 + 1e-9)


def test_an_iteration_target_costs_servers() -> None:
    """A mean time between tokens needs more replicas, and is kept by every server used."""
    workload = fs.Workload([fs.RequestType("chat", 80.0, 500, 200)])
    servers = [fs.catalog.server(gpu, "llama-3-8b") for gpu in ("a100", "h100")]
    free, quick = (plan_capacity(workload, servers, [1.0, 2.5], itl_target=t) for t in (None, 0.012))
    assert quick.total_cost > free.total_cost
    used = quick.replicas > 0
    assert np.all(quick.routing.iteration_time[used] <= 0.012 * (1 + 1e-9))
    with pytest.raises(InfeasibleError, match="itl_target"):
        plan_capacity(workload, servers, [1.0, 2.5], itl_target=0.001)


def test_prefill_and_decode_fleets() -> None:
    """Disaggregated machines are planned in pairs: both kinds are bought, and together carry the demand."""
    workload = fs.Workload([fs.RequestType("chat", 80.0, 900, 100)])
    server = fs.catalog.server("h100", "llama-3-8b")
    pair = [Pool(server, stage="prefill", name="prefill"), Pool(server, stage="decode", name="decode")]
    plan = plan_capacity(workload, pair, [1.0, 1.0])
    assert plan.replicas.min() >= 1
    assert plan.routing.is_stable
    both = plan_capacity(workload, [*pair, Pool(server, name="whole")], [1.0, 1.0, 1.0])
    assert both.total_cost <= plan.total_cost


def test_no_demand_needs_no_servers() -> None:
    """Nothing offered: nothing bought."""
    workload, servers, cost = offers(0)
    plan = plan_capacity(workload.scaled(0.0), servers, cost)
    assert plan.total_cost == 0
    assert plan.routing.is_stable
    with pytest.raises(InputError, match="workload"):
        plan_load(workload.scaled(0.0), servers, cost, 10.0)


def test_catalog_entries_are_servers() -> None:
    """Entries can be given as they come, by name and price."""
    entries = [e for e in fs.catalog.entries() if e.model == "llama-3-8b" and e.tensor_parallel == 1]
    workload = fs.Workload([fs.RequestType("chat", 10.0, 500, 100)])
    plan = plan_capacity(workload, entries, np.ones(len(entries)))
    assert plan.total_cost == 1.0


def test_bad_arguments_are_named() -> None:
    """Costs, headroom, budgets, servers."""
    workload, servers, cost = offers(1)
    with pytest.raises(InputError, match="cost must have one number"):
        plan_capacity(workload, servers, [1.0])
    with pytest.raises(InputError, match="cost of"):
        plan_capacity(workload, servers, cost * [0, 1, 1])
    with pytest.raises(InputError, match="headroom"):
        plan_capacity(workload, servers, cost, headroom=-0.1)
    with pytest.raises(InputError, match=r"servers\[1\]"):
        plan_capacity(workload, [servers[0], "h100"], [1.0, 1.0])  # type: ignore[list-item]
    with pytest.raises(InfeasibleError, match="The cheapest costs"):
        plan_load(workload, servers, cost, 0.01)
    with pytest.raises(InputError, match="budget"):
        plan_load(workload, servers, cost, math.inf)
    small = [dataclasses.replace(servers[0], kv_capacity=100)]
    with pytest.raises(InfeasibleError, match="longest request"):
        plan_capacity(workload, small, [1.0])


def test_frame_and_repr() -> None:
    """Replicas with their cost, one row per server offered."""
    workload, servers, cost = offers(2)
    plan = plan_capacity(workload, servers, cost)
    frame = plan.to_frame()
    assert frame["replicas"].tolist() == plan.replicas.tolist()
    assert frame["cost"].sum() == pytest.approx(plan.total_cost)
    assert "total cost" in repr(plan)
    assert "×" in repr(plan)
