"""Tables for admitted rates in overload: a little inside the boundary, and stable for the stream they admit."""

from __future__ import annotations

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.policy import compile_policy


@pytest.fixture(scope="module")
def overloaded() -> fs.FluidSolution:
    """Two types, 1.5 times what the server carries: the dear one is rationed."""
    workload = fs.Workload([fs.RequestType("short", 2.0, 50, 10), fs.RequestType("long", 1.0, 200, 80)])
    server = fs.Server(40_000, fs.IterationTime.affine(0.02, 1e-5, 2e-4, 1e-7))
    fluid = fs.solve_fluid(workload.at_load(1.5, server), server)
    assert not fluid.is_stable
    return fluid


@pytest.mark.parametrize("kind", ["capped", "wait", "gated", "nested-wait"])
def test_inside_the_boundary_a_table_exists_and_says_how_far(overloaded, kind):
    """At the optimum's own rates no table has slack; with "auto" one has, for nearly those rates."""
    options = {} if kind == "capped" else {"block_iterations": 8}
    with pytest.raises(InfeasibleError, match='admitted_share="auto"'):
        compile_policy(overloaded, kind, slack=0.05, **options)
    table = compile_policy(overloaded, kind, slack=0.05, admitted_share="auto", **options)
    share = table.certificate["admitted_share"]["value"]
    assert 0.3 < share < 1.0
    rates = sum(row.admitted_rate for row in table.types)
    assert rates == pytest.approx(share * float(np.sum(overloaded.admitted_rate)), rel=1e-9)
    with pytest.raises(InfeasibleError):
        compile_policy(overloaded, kind, slack=0.05, admitted_share=share + 0.005, **options)


def test_the_stream_it_admits_is_stable(overloaded):
    """The path thinned by the rows' admitted over arrival rates keeps no growing backlog; the path itself does."""
    table = compile_policy(overloaded, "wait", admitted_share="auto")
    offered = overloaded.workload.sample(1500.0, seed=3)
    fraction = [row.admitted_rate / row.arrival_rate for row in table.types]
    thinned = offered.thinned(fraction, seed=4)
    growth = []
    for path in (thinned, offered):
        runs = fs.simulate(path, overloaded.server, [table], horizon=1500.0, warmup=300.0)
        growth.append(float(runs.measures("wait")["backlog_growth"][0]))
    excess = float(np.sum(overloaded.workload.arrival_rate) - sum(row.admitted_rate for row in table.types))
    assert growth[0] < 0.1 * excess
    assert growth[1] > 0.6 * excess


def test_shares_are_checked(overloaded):
    for share in (0.0, 1.5, "most"):
        with pytest.raises(InputError, match="admitted_share"):
            compile_policy(overloaded, "wait", admitted_share=share)
    with pytest.raises(InputError, match="look-ahead"):
        compile_policy(overloaded, "lookahead", admitted_share=0.9)
