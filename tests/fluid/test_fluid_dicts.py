"""Every answer of the fluid toolkit as plain JSON values, with a schema first and the same numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest

import fluidsched as fs

SERVER = fs.catalog.server("l40s", "llama-3-8b")
WORKLOAD = fs.Workload([fs.RequestType("chat", 20.0, 500, 100), fs.RequestType("long", 2.0, 6000, 100)])


def answers() -> dict[str, tuple[Any, str, Any]]:
    """Kind → object, a key of its dictionary, what must stand there."""
    pools = fs.fluid.solve_pools(WORKLOAD, [fs.Pool(SERVER, 2)])
    plan = fs.plan_capacity(WORKLOAD, [SERVER], [2.0])
    fair = fs.solve_fair(WORKLOAD, SERVER)
    region = fs.stability_region(WORKLOAD, SERVER)
    transient = fs.solve_transient(WORKLOAD, SERVER, [5.0, 90.0, 2.0], step=60.0)
    sweep = fs.fluid.sweep_load(fs.FluidProgram(WORKLOAD, SERVER))
    return {
        "pools-solution/1": (pools, "routed_rate", pools.routed_rate.tolist()),
        "capacity-plan/1": (plan, "total_cost", plan.total_cost),
        "fair-solution/1": (fair, "share", fair.share.tolist()),
        "stability-region/1": (region, "normals_s", region.normals.tolist()),
        "transient-solution/1": (transient, "backlog", transient.backlog.tolist()),
        "rate-sweep/1": (sweep, "parameter", sweep.parameter.tolist()),
    }


@pytest.mark.parametrize("schema", list(answers()))
def test_dictionaries_are_json_with_the_objects_numbers(schema: str) -> None:
    """Strict JSON both ways, the schema first, numbers unchanged."""
    answer, key, expected = answers()[schema]
    data = answer.to_dict()
    assert next(iter(data.items())) == ("schema", f"fluidsched.{schema}")
    again = json.loads(json.dumps(data, allow_nan=False))
    assert again == data
    assert again[key] == expected
    assert len(answer.to_frame()) > 0
