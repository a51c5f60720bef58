"""Requests per second routed by looking at replicas that run in the kernel; checked against stepped references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fluidsched import Pool, RequestType, Workload, catalog
from fluidsched.policy import baselines
from fluidsched.simulation import routers
from fluidsched.simulation.cluster import simulate_cluster
from fluidsched.simulation.kernel import choose_replicas

RULES = ("join_shortest_queue", "least_kv", "power_of_two")
CHECKED = 200  # requests that the reference routes too


@pytest.mark.parametrize("replicas", [4, 16])
@pytest.mark.parametrize("rule", RULES)
def test_requests_routed_per_second(
    benchmark: Any, note: Callable[..., None], rule: str, replicas: int
) -> None:
    """20 000 requests at 4 per second and replica, Llama-2-7B on A100, `vllm`."""
    server, table = catalog.server("a100-80gb", "llama-2-7b"), baselines.vllm()
    rate = 4.0 * replicas
    path = Workload([RequestType("chat", rate, 512, 128)]).sample(20_000 / rate, 1)

    few = path.selected(slice(CHECKED))
    results = [
        simulate_cluster(few, [Pool(server, replicas)], table, getattr(routers, rule)(), engine=engine)
        for engine in ("kernel", "reference")
    ]
    np.testing.assert_array_equal(results[0].chosen[0][0], results[1].chosen[0][0])

    servers = [server] * replicas
    fits = np.ones((len(path), replicas), dtype=np.bool_)
    draws = np.random.default_rng(1).random((len(path), 2))

    def choose() -> np.ndarray[Any, Any]:
        return choose_replicas(
            path, servers, table, horizon=None, rule=RULES.index(rule), fits=fits, draws=draws
        )

    chosen = benchmark(choose)
    assert np.bincount(chosen, minlength=replicas).min() > 0
    note(seed=1, requests=len(path), right=True)
