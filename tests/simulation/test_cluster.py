"""Clusters: routers by hand and by chance, kernel against reference, limits that queueing theory knows."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, cases, servers

import fluidsched as fs
from fluidsched.errors import InputError, SimulationError
from fluidsched.server import IterationTime, Pool, Server
from fluidsched.simulation import kernel as kernel_module
from fluidsched.simulation.cluster import GOLDEN, ClusterResult, simulate_cluster
from fluidsched.simulation.records import EngineRun
from fluidsched.simulation.reference import Engine, run_reference
from fluidsched.workload import ArrivalPath

UNIT = IterationTime.affine(1.0, 0.0, 0.0, 0.0)
ROUTERS = (
    fs.routers.round_robin(),
    fs.routers.random(),
    fs.routers.join_shortest_queue(),
    fs.routers.least_kv(),
    fs.routers.power_of_two(),
)
LOOKING = tuple(router for router in ROUTERS if router.looks)


def _chosen(path: ArrivalPath, pools: list[Pool], router: fs.routers.Router, **options: object) -> list[int]:
    runs = simulate_cluster(path, pools, fs.baselines.vllm(), router, engine="reference", **options)  # type: ignore[arg-type]
    return runs.chosen[0][0].tolist()


def test_shortest_queue_by_hand() -> None:
    """Ties go to the lowest index; who leaves at the instant is gone, who leaves later still counts."""
    # 0 → replica 0 until 2 s; 1 → replica 1 until 3 s; 2 at 2 s: replica 0 is empty; 3 at 2.5 s: one each, tie
    path = ArrivalPath.from_arrays([0.0, 0.0, 2.0, 2.5], [4, 4, 4, 4], [2, 3, 5, 1])
    assert _chosen(path, [Pool(Server(100, UNIT), 2)], fs.routers.join_shortest_queue()) == [0, 1, 0, 0]


def test_least_kv_by_hand() -> None:
    """KV held during the iteration, and the prompts of those that wait, at the same instant too."""
    # at 0 s: 10 tokens wait at replica 0, so 1 and 2 go to replica 1 (3 + 3 < 10), and 3 as well (6 < 10)
    # at 1.5 s replica 0 holds 11, replica 1 holds 3 · 4 = 12
    path = ArrivalPath.from_arrays([0.0, 0.0, 0.0, 0.0, 1.5], [10, 3, 3, 3, 1], [5] * 5)
    assert _chosen(path, [Pool(Server(100, UNIT), 2)], fs.routers.least_kv()) == [0, 1, 1, 1, 0]


def test_round_robin_passes_over_replicas_that_are_too_small() -> None:
    path = ArrivalPath.from_arrays([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [4, 40, 4, 40, 400, 4], [2] * 6)
    pools = [Pool(Server(10, UNIT), 1, name="small"), Pool(Server(100, UNIT), 2, name="large")]
    options = {"oversize": "reject"}
    assert _chosen(path, pools, fs.routers.round_robin(), **options) == [0, 1, 2, 1, -1, 2]
    with pytest.raises(InputError, match="request 4"):
        _chosen(path, pools, fs.routers.round_robin())


def test_a_limit_on_outputs_is_refused() -> None:
    """What a request produces must not depend on where it is served."""
    path = fs.ArrivalPath.from_arrays([0.0], [4], [3])
    pools = [Pool(Server(100, UNIT, max_model_len=6), 2, name="short")]
    with pytest.raises(InputError, match="max_model_len of pool 'short'"):
        _chosen(path, pools, fs.routers.round_robin())


def test_split_follows_the_shares_of_each_type() -> None:
    """Every prefix of a type's requests is split within a few requests; replicas of a pool take turns."""
    count = 4000
    rng = np.random.default_rng(1)
    types = rng.integers(0, 2, count)
    path = ArrivalPath.from_arrays(
        np.arange(count) * 10.0, [4] * count, [1] * count, types, type_names=("a", "b")
    )
    pools = [Pool(Server(100, UNIT), 1, name="x"), Pool(Server(100, UNIT), 2, name="y")]
    chosen = np.array(_chosen(path, pools, fs.routers.split([[3.0, 1.0], [1.0, 4.0]])))
    for j, share in ((0, 0.75), (1, 0.2)):
        first = np.cumsum(chosen[types == j] == 0)
        number = np.arange(1, len(first) + 1)
        # discrepancy of the golden sequence: at most 1 + log(n) / log(golden ratio) · 1/2, far below this
        assert np.abs(first - share * number).max() < 1.0 + math.log(count) / -math.log(GOLDEN)
    second = chosen[chosen > 0]
    np.testing.assert_array_equal(second, 1 + np.arange(len(second)) % 2)


@pytest.mark.parametrize("dyadic", [True, False], ids=["dyadic", "real"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_chooses_as_the_reference(kind: str, dyadic: bool) -> None:
    """Random systems of three replicas on two servers: the same replica for every request, by every router that
    looks. Real cases meet no arrival at the end of an iteration but by an accident of rounding."""

    @settings(max_examples=15)
    @given(data=st.data())
    def compare(data: st.DataObject) -> None:
        case = data.draw(cases(kind, dyadic))
        other = data.draw(servers(kind, dyadic, 60))
        first, other = (dataclasses.replace(server, max_model_len=None) for server in (case.server, other))
        pools = [Pool(first, 2, name="one"), Pool(other, 1, name="other")]
        if math.isinf(case.server.kv_capacity + other.kv_capacity) and len(case.path) == 0:
            return
        results = [
            simulate_cluster(
                case.path,
                pools,
                case.table,
                LOOKING,
                horizon=case.horizon,
                warmup=0.0,
                engine=engine,
                oversize="reject",
            )
            for engine in ("kernel", "reference")
        ]
        for ours, theirs in zip(*(result.chosen for result in results), strict=True):
            np.testing.assert_array_equal(ours[0], theirs[0])

    compare()


def _chat(rate: float, output: int = 40) -> fs.Workload:
    return fs.Workload([fs.RequestType("chat", rate, prompt_tokens=100, output_tokens=output)])


SERVER = Server(3_000, IterationTime.affine(0.01, 1e-5, 1e-4, 1e-7), name="gpu")


def test_replicas_stepped_together_run_as_on_their_own_part() -> None:
    """The claim the cluster's records rest on: stopped at every arrival, a replica runs as it does in one go."""
    path = _chat(60.0).sample(5.0, 3)
    engine = Engine(path, SERVER, fs.baselines.vllm(), horizon=5.0)
    mine = np.arange(len(path)) % 3 == 0
    for i, arrival in enumerate(path.arrival_s):
        engine.advance(arrival)
        if mine[i]:
            engine.join(i)
    engine.advance(math.inf)
    stepped, alone = (
        engine.record(),
        run_reference(path.selected(mine), SERVER, fs.baselines.vllm(), horizon=5.0),
    )
    np.testing.assert_array_equal(stepped.finish_s[mine], alone.finish_s)
    assert (stepped.iterations, stepped.batch_token_sum) == (alone.iterations, alone.batch_token_sum)
    assert (stepped.kv_token_s, stepped.waiting_s) == (alone.kv_token_s, alone.waiting_s)


def test_a_cluster_of_one_is_its_server() -> None:
    """Whatever the router, one replica is the plain simulation, measure by measure."""
    plain = fs.simulate(_chat(20.0), SERVER, fs.baselines.vllm(), horizon=8.0, replications=2, seed=5)
    runs = simulate_cluster(
        _chat(20.0),
        [Pool(SERVER)],
        fs.baselines.vllm(),
        ROUTERS,
        horizon=8.0,
        replications=2,
        seed=5,
        check=True,
    )
    for policy in runs.policies:
        for name, values in plain.measures("vllm").items():
            np.testing.assert_allclose(runs.measures(policy)[name], values, err_msg=name)


def _cluster(rate: float, routers: object, **options: object) -> ClusterResult:
    return simulate_cluster(_chat(rate), [Pool(SERVER, 3)], fs.baselines.vllm(), routers, **options)  # type: ignore[arg-type]


def test_a_kernel_that_differs_from_the_reference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """`check=True` runs the reference beside the kernel: another choice and another run are both named."""
    choose = kernel_module.choose_replicas

    def other_way(*arguments: Any, **options: Any) -> np.ndarray:
        return (choose(*arguments, **options) + 1) % 3

    monkeypatch.setattr(kernel_module, "choose_replicas", other_way)
    with pytest.raises(SimulationError, match="other ones chosen"):
        _cluster(60.0, fs.routers.join_shortest_queue(), horizon=2.0, replications=1, check=True)
    run = kernel_module.run_kernel

    def later(*arguments: Any, **options: Any) -> EngineRun:
        found = run(*arguments, **options)
        return dataclasses.replace(found, iterations=found.iterations + 1)

    monkeypatch.setattr(kernel_module, "run_kernel", later)
    with pytest.raises(SimulationError, match="the kernel's iterations"):
        _cluster(60.0, fs.routers.round_robin(), horizon=2.0, replications=1, check=True)


def test_relabelled_replicas_and_conservation() -> None:
    """Replica runs add up to the cluster; every request has the replica whose run holds it."""
    runs = _cluster(60.0, ROUTERS, horizon=4.0, replications=2, check=True)
    for k, policy in enumerate(runs.policies):
        for r in range(2):
            whole, parts = runs.whole.run(policy, r), runs.replica_runs[k][r]
            assert whole.iterations == sum(part.iterations for part in parts)
            assert len(whole) == sum(map(len, parts))
            assert whole.kv_end == sum(part.kv_end for part in parts)
            for p, part in enumerate(parts):
                mine = runs.chosen[k][r] == p
                np.testing.assert_array_equal(whole.finish_s[mine], part.finish_s)
            last = runs.whole.occupancy(policy, r)[-1]
            assert last[0] == max(part.occupancy[-1, 0] for part in parts)  # type: ignore[index]
        frame = runs.requests(policy)
        assert frame["replica"].between(0, 2).all()
    assert len(runs.to_frame()) == 3 * len(ROUTERS)


def _single_file(count: int) -> list[Pool]:
    """Replicas that serve one request at a time, a second per output token."""
    return [Pool(Server(10_000, UNIT, max_batch_size=1), count)]


def test_random_split_of_poisson_arrivals_is_independent_queues() -> None:
    """Two replicas, one request at a time, geometric lives: M/G/1 queues of half the rate.

    Null: the mean wait is that of Pollaczek and Khinchine. 24 replications, 99.9 % interval (t_{23} = 3.77).
    """
    law = fs.lengths.geometric(10.0)
    workload = fs.Workload([fs.RequestType("x", 0.12, 1, law)])
    runs = simulate_cluster(
        workload, _single_file(2), fs.baselines.vllm(), fs.routers.random(),
        horizon=20_000.0, warmup=2_000.0, replications=24, seed=11,
    )  # fmt: skip
    second = 10.0**2 * (2.0 - 0.1)
    expected = 0.06 * second / (2.0 * (1.0 - 0.6))
    waits = runs.measures("vllm, random")["mean_scheduling_delay"]
    half = 3.77 * waits.std(ddof=1) / math.sqrt(len(waits))
    assert abs(waits.mean() - expected) < half < 0.15 * expected


def test_looking_routers_wait_less() -> None:
    """On the same paths: join the shortest queue < two choices < random in mean waits.

    Null: no difference. Paired over 16 replications, one-sided t of each pair above 3.73 (0.1 %).
    """
    workload = fs.Workload([fs.RequestType("x", 0.34, 1, fs.lengths.geometric(10.0))])
    routers = (fs.routers.join_shortest_queue(), fs.routers.power_of_two(), fs.routers.random())
    runs = simulate_cluster(
        workload, _single_file(4), fs.baselines.vllm(), routers,
        horizon=8_000.0, warmup=1_000.0, replications=16, seed=2,
    )  # fmt: skip
    waits = [runs.measures(policy)["mean_scheduling_delay"] for policy in runs.policies]
    for less, more in itertools.pairwise(waits):
        paired = more - less
        assert paired.mean() / (paired.std(ddof=1) / math.sqrt(len(paired))) > 3.73
    # no router can do better than one line in front of all servers: M/M/4 of the same load
    load, c = 3.4, 4
    terms = [load**k / math.factorial(k) for k in range(c)]
    tail = load**c / math.factorial(c) * c / (c - load)
    erlang = tail / (sum(terms) + tail)
    assert waits[0].mean() > 0.9 * erlang * 10.0 / (c - load) * 0.95


def test_the_programs_split_carries_what_the_program_says() -> None:
    """Two unlike pools at the rates the linear program routes: stable below its critical rate, not above.

    Backlog growth over 8 replications; 99.9 % one-sided (t_7 = 4.79) of growth above 0 for the overloaded one,
    below 5 % of the arrivals for the other.
    """
    small = Server(6_000, IterationTime.affine(0.01, 2e-5, 1e-4, 1e-6), name="small")
    large = Server(20_000, IterationTime.affine(0.012, 1e-5, 5e-5, 4e-7), name="large")
    pools = [Pool(small, 2), Pool(large, 1)]
    workload = fs.Workload([fs.RequestType("chat", 1.0, 100, 40), fs.RequestType("long", 0.25, 800, 40)])
    critical = fs.fluid.solve_pools(workload, pools).critical_rate / workload.total_arrival_rate
    for load, stable in ((0.8, True), (1.25, False)):
        offered = workload.scaled(load * critical)
        # the split of what fits: shares of the largest stable multiple of the mix, for both loads
        routed = fs.fluid.solve_pools(workload.scaled(0.99 * critical), pools).routed_rate
        runs = simulate_cluster(
            offered, pools, fs.baselines.vllm(token_budget=None), fs.routers.split(routed),
            horizon=120.0, warmup=40.0, replications=8, seed=4,
        )  # fmt: skip
        growth = runs.measures("vllm, split")["backlog_growth"]
        error = 4.79 * growth.std(ddof=1) / math.sqrt(8)
        if stable:
            assert growth.mean() + error < 0.05 * offered.total_arrival_rate
        else:
            assert growth.mean() - error > 0.0


@pytest.mark.parametrize(
    ("pools", "options", "match"),
    [
        ([Pool(SERVER, 1.5)], {}, "replicas"),
        ([Pool(SERVER, 0)], {}, "at least one replica"),
        ([Pool(SERVER, 1, "prefill")], {}, "that decode"),
        ([Pool(SERVER), Pool(SERVER)], {}, "unique"),
        ([Pool(SERVER)], {"routers": fs.routers.split([[1.0], [2.0]])}, "1 rows"),
        ([Pool(SERVER)], {"routers": []}, "at least one"),
        ([Pool(SERVER)], {"engine": "fast"}, "engine"),
    ],
)
def test_wrong_clusters_are_refused(pools: list[Pool], options: dict[str, object], match: str) -> None:
    given_options: dict[str, object] = {
        "policies": fs.baselines.vllm(),
        "routers": fs.routers.random(),
        "horizon": 1.0,
        **options,
    }
    with pytest.raises(InputError, match=match):
        simulate_cluster(_chat(1.0), pools, **given_options)  # type: ignore[arg-type]
