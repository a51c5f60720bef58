"""`fluidsched capacity`: the library's answers, and the exit statuses where there is none."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import fluidsched as fs
from fluidsched.cli import app

OFFERS = ["--model", "llama-3-8b", "--cost", "l40s=1", "--cost", "h100=2.5", "--scale", "20"]


def test_the_cheapest_fleet_and_the_largest_load_are_the_librarys() -> None:
    """Replicas, cost and carried rate are those of `plan_capacity` and `plan_load`."""
    servers = [fs.catalog.server(gpu, "llama-3-8b") for gpu in ("l40s", "h100")]
    demand = fs.workloads.azure_conv().scaled(20.0)
    done = CliRunner().invoke(app, ["capacity", *OFFERS, "--headroom", "0.1", "--json"])
    assert done.exit_code == 0, done.output
    plan = fs.plan_capacity(demand, servers, [1.0, 2.5], headroom=0.1)
    assert json.loads(done.stdout)["replicas"] == {
        pool.name: count for pool, count in zip(plan.pools, plan.replicas.tolist(), strict=True)
    }
    done = CliRunner().invoke(app, ["capacity", *OFFERS, "--budget", "7", "--json"])
    best = fs.fluid.plan_load(demand, servers, [1.0, 2.5], 7.0)
    assert json.loads(done.stdout)["carried_rate"] == pytest.approx(
        best.workload.total_arrival_rate, rel=1e-6
    )


def test_a_fleet_is_verified_against_a_percentile() -> None:
    """At least the fluid plan's replicas, every confirmation below its target."""
    asked = ["capacity", "--model", "llama-3-8b", "--cost", "h100=2", "--verify", "--ttft-p99", "1"]
    done = CliRunner().invoke(app, [*asked, "--horizon", "300", "--replications", "4", "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert all(added >= 0 for added in data["added"].values())
    assert data["checks"][-1]["step"] == "confirmation"
    assert data["checks"][-1]["high"] <= 1.0


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ([*OFFERS, "--itl-target", "0.0001"], 1),
        ([*OFFERS, "--budget", "0.5"], 1),
        ([*OFFERS, "--budget", "5", "--headroom", "0.1"], 2),
        ([*OFFERS, "--verify"], 2),
        ([*OFFERS, "--ttft-p99", "1"], 2),
        (["--cost", "h100"], 2),
        (["--cost", "h100=-1"], 2),
        (["--cost", "h100:x=1"], 2),
    ],
)
def test_no_answer_is_1_and_wrong_input_is_2(options: list[str], status: int) -> None:
    """The exit statuses tell a question without an answer from a wrong one."""
    assert CliRunner().invoke(app, ["capacity", *options]).exit_code == status
