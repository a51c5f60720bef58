"""Prefill and decode on machines of their own, and a table per pool: by hand, both engines, the program's boundary."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, assert_same_run, cases, servers, tables
from numpy.testing import assert_array_equal
from simulation_cases import MIXED, engine_table, path_of, server_of

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.server import IterationTime, Pool, Server
from fluidsched.simulation.cluster import ClusterResult, simulate_cluster
from fluidsched.simulation.kernel import run_kernel
from fluidsched.simulation.laws import Audit
from fluidsched.simulation.limits import SCANNING_KINDS
from fluidsched.simulation.records import STATUSES
from fluidsched.simulation.reference import run_reference

ROUTERS = (
    fs.routers.round_robin(),
    fs.routers.random(),
    fs.routers.join_shortest_queue(),
    fs.routers.least_kv(),
    fs.routers.power_of_two(),
)
ENGINES = pytest.mark.parametrize("engine", ["reference", "kernel"])


def apart(prefill: Server, decode: Server, counts: tuple[int, int] = (1, 1)) -> list[Pool]:
    return [Pool(prefill, counts[0], "prefill", name="P"), Pool(decode, counts[1], "decode", name="D")]


def run_apart(path: fs.ArrivalPath, decode: Server, engine: str, **options: object) -> ClusterResult:
    return simulate_cluster(
        path,
        apart(server_of(100, MIXED), decode),
        engine_table(),
        fs.routers.round_robin(),
        engine=engine,  # type: ignore[arg-type]
        check=True,
        **options,  # type: ignore[arg-type]
    )


@ENGINES
def test_a_request_goes_through_both_machines(engine: str) -> None:
    """T = 1 + n_pf/4 + n_dec/2; 4 tokens at 8 tokens/s and half a second more arrive a second after the prefill."""
    path = path_of((0.0, 4, 3), (0.0, 8, 1))
    runs = run_apart(path, server_of(100, MIXED), engine, transfer_bandwidth=8.0, transfer_latency=0.5)
    (name,) = runs.policies
    run = runs.whole.run(name, 0)
    assert_array_equal(run.first_token_s, [4.0, 4.0])  # 12 prompt tokens
    assert_array_equal(run.finish_s, [8.0, 4.0])  # KV there at 5 s, decodes of 1.5 s each
    assert run.gap_s == (6.5 - 4.0) + 1.5
    assert run.kv_token_s == 4.0 * 12 + 1.5 * 5 + 1.5 * 6
    assert (run.waiting_s, run.emitted_tokens, run.batch_token_sum, run.end_s) == (0.0, 4, 14, 8.0)
    frame = runs.requests(name)
    assert frame["ready_s"].tolist()[0] == frame["decode_admitted_s"].tolist()[0] == 5.0
    assert frame["decode_replica"].tolist() == [1, -1]
    parts = runs.replicas(name)
    assert parts["completed"].tolist() == [2.0, 1.0]
    assert math.isnan(parts["mean_ttft"][1])
    assert parts["mean_tpot"][1] == 2.0


@ENGINES
def test_a_preempted_decode_is_computed_anew_where_it_decodes(engine: str) -> None:
    """C = 8 on the decode machine: the later one loses 4 tokens at 4.5 s and prefills its 5 there at 7.5 s."""
    runs = run_apart(path_of((0.0, 3, 4), (0.0, 3, 3)), server_of(8, MIXED), engine)
    run = runs.whole.run(runs.policies[0], 0)
    assert_array_equal(run.first_token_s, [2.5, 2.5])
    assert_array_equal(run.finish_s, [7.5, 9.75])
    assert run.gap_s == (4.5 - 2.5) * 2 + 1.5 + 1.5 + (9.75 - 4.5)
    assert (run.wasted_tokens, run.preempted, run.batch_token_sum) == (4, 1, 6 + 2 + 1 + 1 + 5)


@ENGINES
def test_waiting_for_a_decode_slot_counts_in_the_gap(engine: str) -> None:
    """One slot: the second request's KV is there at 2.5 s and its next token at 5.5 s."""
    runs = run_apart(path_of((0.0, 3, 2), (0.0, 3, 2)), server_of(100, MIXED, max_batch_size=1), engine)
    run = runs.whole.run(runs.policies[0], 0)
    assert_array_equal(run.finish_s, [4.0, 5.5])
    assert run.waiting_s == 1.5
    assert run.gap_counts.sum() == 2
    assert runs.measures(runs.policies[0])["mean_scheduling_delay"][0] == 0.0


@ENGINES
def test_what_never_fits_a_decode_machine_is_not_prefilled(engine: str) -> None:
    """5 + 5 - 1 tokens do not fit into 8; with one output token the decode machine does not matter."""
    path = path_of((0.0, 5, 5), (0.0, 5, 1))
    with pytest.raises(InputError, match="request 0"):
        run_apart(path, server_of(8, MIXED), engine)
    runs = run_apart(path, server_of(8, MIXED), engine, oversize="reject")
    assert runs.requests(runs.policies[0])["status"].tolist() == ["rejected", "finished"]


@ENGINES
def test_who_hangs_up_leaves_where_it_is(engine: str) -> None:
    """Four prompts are computed by 4 s and their KV is there at 5 s; then a decode of one lasts 1.5 s.

    Who hangs up at 3 s is served to 4 s, has its first token, and leaves on the way, as those do who hang up at 4.5 s
    and when the KV arrives; at 6 s the last one decodes, and leaves at the end of that iteration.
    """
    path = dataclasses.replace(path_of(*[(0.0, 3, 4)] * 4), abort_after_s=np.array([3.0, 4.5, 5.0, 6.0]))
    runs = run_apart(path, server_of(100, MIXED), engine, transfer_latency=1.0)
    run = runs.whole.run(runs.policies[0], 0)
    assert [STATUSES[code] for code in run.status] == ["aborted"] * 4
    assert_array_equal(run.first_token_s, [4.0] * 4)
    assert_array_equal(run.left_s, [4.0, 4.5, 5.0, 6.5])
    (handover,) = runs.handed_over[0]
    assert (handover.request.tolist(), handover.lost.tolist()) == ([3], [0, 1, 2])
    assert run.dropped_tokens == 3 + 3 + 3 + 4


@ENGINES
def test_patience_is_for_the_prefill_and_timeouts_for_their_server(engine: str) -> None:
    """One decode slot and a waiting timeout of 2 s there: the second, ready at 2.5 s, is gone at 4.5 s."""
    path = dataclasses.replace(path_of((0.0, 3, 4), (0.0, 3, 4)), patience_s=np.array([1.0, 1.0]))
    decode = server_of(100, MIXED, max_batch_size=1, waiting_timeout=2.0)
    runs = run_apart(path, decode, engine)
    run = runs.whole.run(runs.policies[0], 0)
    assert run.left_s.tolist() == [7.0, 4.5]
    assert run.status.tolist() == [0, STATUSES.index("aborted")]


@pytest.mark.parametrize("kind", SCANNING_KINDS)
def test_kernel_equals_reference(kind: str) -> None:
    """Random fleets of 2 + 2 machines of three kinds, every router, a table per pool: all records and all choices."""

    @settings(max_examples=12)
    @given(data=st.data())
    def compare(data: st.DataObject) -> None:
        case = data.draw(cases(kind, dyadic=True))
        first = data.draw(tables(data.draw(st.sampled_from(["vllm", "sarathi", "vllm_v0"])), True, 1, 100))
        prefill, decode = (
            dataclasses.replace(server, max_model_len=None)
            for server in (data.draw(servers("vllm", True, 130)), case.server)
        )
        pools = [Pool(prefill, 2, "prefill", name="P"), Pool(decode, 2, "decode", name="D")]
        if len(case.path) == 0 and any(math.isinf(pool.server.kv_capacity) for pool in pools):
            return
        results = [
            simulate_cluster(
                case.path,
                pools,
                {"P": first.renamed("first"), "D": case.table},
                ROUTERS,
                horizon=100.0 if first.preemption == "restart" and case.horizon is None else case.horizon,
                warmup=0.0,
                engine=engine,  # type: ignore[arg-type]
                transfer_bandwidth=16.0,
                transfer_latency=0.25,
                oversize="reject",
                check=engine == "reference",
            )
            for engine in ("kernel", "reference")
        ]
        for k, policy in enumerate(results[0].policies):
            ours, theirs = (result.whole.run(policy, 0) for result in results)
            assert_same_run(ours, theirs, exact=True)
            assert_array_equal(*(result.chosen[k][0] for result in results))
            assert_array_equal(*(result.handed_over[k][0].replica for result in results))
            assert_array_equal(*(result.handed_over[k][0].lost_s for result in results))
            for part, same in zip(*(result.replica_runs[k][0] for result in results), strict=True):
                assert_same_run(part, same, exact=True)

    compare()


def test_memory_and_batches_of_a_decode_machine_are_audited() -> None:
    """Independent accounts of every batch: KV comes with the requests, and is theirs from the admission on."""
    rng = np.random.default_rng(8)
    path = fs.ArrivalPath.from_arrays(
        np.sort(rng.uniform(0, 8, 80)), rng.integers(1, 400, 80), rng.integers(2, 200, 80)
    )
    server = Server(2_500, IterationTime.affine(0.01, 1e-5, 1e-4, 1e-7), block_size=16)
    first = path.arrival_s - rng.uniform(0.0, 0.5, 80)
    for preemption in ("recompute", "swap", "restart"):
        table = engine_table(preemption=preemption)
        server = dataclasses.replace(server, swap_bandwidth=1e6)
        audit = Audit(path, server, table, horizon=40.0, warmup=0.0, handed_over=True)
        run = run_reference(
            path, server, table, horizon=40.0, on_iteration=audit.observe, first_token_s=first
        )
        audit.check(run)
        assert run.preempted > 0
        assert_same_run(run_kernel(path, server, table, horizon=40.0, first_token_s=first), run)


# ---- limits


@pytest.mark.parametrize(
    ("prefill", "decode"), [(2e-4, 1e-5), (2e-5, 4e-4)], ids=["prefill binds", "decode binds"]
)
def test_the_boundary_is_the_programs(prefill: float, decode: float) -> None:
    """Two prefill and three decode machines under the program's rates: stable at 0.85, not at 1.2 of its critical rate.

    Backlog growth over 6 replications; 99.9 % one-sided (t_5 = 5.89) of growth above 0 in overload, below 5 % of the
    arrivals under the boundary.
    """
    pools = apart(
        Server(40_000, IterationTime.affine(0.01, prefill, decode, 1e-7), name="a"),
        Server(30_000, IterationTime.affine(0.008, prefill, decode, 4e-7), name="b"),
        (2, 3),
    )
    workload = fs.Workload([fs.RequestType("chat", 1.0, 300, 60), fs.RequestType("long", 0.2, 1500, 120)])
    critical = fs.fluid.solve_pools(workload, pools).critical_rate
    assert math.isfinite(critical)
    mix = workload.scaled(critical / workload.total_arrival_rate)
    routed = fs.fluid.solve_pools(mix.scaled(0.99), pools).routed_rate
    for load, stable in ((0.85, True), (1.2, False)):
        runs = simulate_cluster(
            mix.scaled(load), pools, fs.baselines.vllm(token_budget=None), fs.routers.split(routed),
            transfer_bandwidth=1e6, transfer_latency=0.01, horizon=400.0, warmup=100.0, replications=6, seed=9,
        )  # fmt: skip
        growth = runs.measures("vllm, split")["backlog_growth"]
        error = 5.89 * growth.std(ddof=1) / math.sqrt(6)
        if stable:
            assert growth.mean() + error < 0.05 * critical
        else:
            assert growth.mean() - error > 0.0


def test_resident_kv_is_the_programs() -> None:
    """Far below the boundary both machines hold what Little's law and the program say: λ E[W] ΔT, W split by stage.

    Null: mean KV of each pool is the program's; 12 replications, 99.9 % interval (t_11 = 4.44), and the program's
    iteration counts batches as if they were never empty, which adds less than 6 % here.
    """
    server = Server(10_000_000, IterationTime.affine(0.01, 2e-6, 1e-5, 1e-8), name="gpu")
    pools = apart(server, server)
    workload = fs.Workload([fs.RequestType("chat", 400.0, 100, 50)])
    ideal = fs.fluid.solve_pools(workload, pools)
    runs = simulate_cluster(
        workload, pools, fs.baselines.vllm(token_budget=None), fs.routers.round_robin(),
        horizon=25.0, warmup=5.0, replications=12, seed=1,
    )  # fmt: skip
    held = np.array([[run.kv_token_s / 20.0 for run in parts] for parts in runs.replica_runs[0]])
    for k in range(2):
        error = 4.44 * held[:, k].std(ddof=1) / math.sqrt(12)
        assert abs(held[:, k].mean() - ideal.resident_kv[k]) < error + 0.06 * ideal.resident_kv[k]
        assert error < 0.02 * ideal.resident_kv[k]


def test_a_transfer_delays_all_but_the_first_token() -> None:
    """A second of latency moves every finish by a second where decodes are never crowded, and no first token."""
    server = Server(math.inf, IterationTime.affine(0.5, 0.0, 0.0, 0.0))
    path = fs.ArrivalPath.from_arrays(np.arange(20) * 4.0, [100] * 20, [4] * 20)
    runs = [
        simulate_cluster(
            path, apart(Server(1000, server.iteration_time), Server(1000, server.iteration_time)),
            engine_table(), fs.routers.round_robin(), transfer_latency=latency,
        ).whole.run("vllm, round-robin", 0)
        for latency in (0.0, 1.0)
    ]  # fmt: skip
    assert_array_equal(runs[0].first_token_s, runs[1].first_token_s)
    assert_array_equal(runs[0].finish_s + 1.0, runs[1].finish_s)


# ---- a table per pool


@ENGINES
def test_every_pool_follows_its_own_table(engine: str) -> None:
    """Each replica's run is that of its own table alone on what the router sent it."""
    server = Server(3_000, IterationTime.affine(0.01, 1e-5, 1e-4, 1e-7), name="gpu")
    pools = [Pool(server, 2, name="capped"), Pool(server, 1, name="free")]
    by_pool = {"free": fs.baselines.vllm(), "capped": engine_table("capped", max_in_service=4)}
    path = fs.Workload([fs.RequestType("chat", 60.0, 100, 40)]).sample(6.0, seed=3)
    runs = simulate_cluster(path, pools, by_pool, fs.routers.random(), engine=engine, check=True)  # type: ignore[arg-type]
    assert runs.policies == ("capped + vllm, random",)
    for p, pool in enumerate(["capped", "capped", "free"]):
        part = path.selected(runs.chosen[0][0] == p)
        alone = run_kernel(part, server, by_pool[pool], horizon=6.0)
        np.testing.assert_allclose(runs.replica_runs[0][0][p].finish_s, alone.finish_s)


def test_looking_routers_over_different_tables_need_the_reference() -> None:
    """The compiled router runs one rule; the reference looks at replicas of any."""
    server = Server(3_000, MIXED, name="gpu")
    pools = [Pool(server, 1, name="a"), Pool(server, 1, name="b")]
    by_pool = {"a": fs.baselines.vllm(), "b": engine_table("capped", max_in_service=1)}
    path = path_of((0.0, 4, 4), (0.0, 4, 4), (0.5, 4, 4), (0.5, 4, 4))
    with pytest.raises(InputError, match=r"'reference'.*'capped'.*beside table 'vllm'"):
        simulate_cluster(path, pools, by_pool, fs.routers.least_kv())
    runs = simulate_cluster(path, pools, by_pool, fs.routers.join_shortest_queue(), engine="reference")
    assert runs.chosen[0][0].tolist() == [0, 1, 0, 1]


# ---- refusals

GPU = Server(3_000, MIXED, name="gpu")
WAIT = fs.PolicyTable(
    "wait", "wait", (fs.policy.TableType("*", threshold=1, gate=1),), freeze=True, block_iterations=1
)


@pytest.mark.parametrize(
    ("pools", "options", "match"),
    [
        ([Pool(GPU, 1, "prefill")], {}, "replicas that prefill and that decode"),
        (apart(GPU, GPU, (1, 0)), {}, "replicas that prefill and that decode"),
        ([*apart(GPU, GPU), Pool(GPU, 1, name="whole")], {}, "all be 'whole'"),
        ([Pool(GPU)], {"transfer_latency": 0.1}, "transfer_latency.*be left out"),
        ([Pool(GPU)], {"transfer_bandwidth": 10.0}, "transfer_bandwidth.*be left out"),
        (apart(GPU, GPU), {"transfer_bandwidth": 0.0}, "transfer_bandwidth"),
        (apart(GPU, GPU), {"transfer_latency": -1.0}, "transfer_latency"),
        (apart(GPU, GPU), {"policies": {"P": engine_table()}}, "have one for each of the pools 'P', 'D'"),
        (apart(GPU, GPU), {"policies": {"P": engine_table(), "D": WAIT}}, "kind must be one of vllm"),
        (
            apart(GPU, GPU),
            {"policies": [engine_table(), {"P": engine_table(), "D": engine_table()}]},
            "unique",
        ),
        (apart(GPU, GPU), {"policies": [3]}, "PolicyTable"),
        (apart(GPU, GPU), {"routers": fs.routers.split([[1.0], [0.0]])}, "no rate for type 'chat'"),
    ],
)
def test_wrong_fleets_are_refused(pools: list[Pool], options: dict[str, object], match: str) -> None:
    workload = fs.Workload([fs.RequestType("chat", 1.0, 10, 10)])
    asked: dict[str, object] = {"policies": engine_table(), "routers": fs.routers.random(), **options}
    with pytest.raises(InputError, match=match):
        simulate_cluster(workload, pools, horizon=1.0, **asked)  # type: ignore[arg-type]


def test_requests_done_at_the_prefill_cannot_be_handed_over() -> None:
    """The engines say so themselves, and which rules can take requests over."""
    for engine in (run_reference, run_kernel):
        with pytest.raises(InputError, match="request 1 must have more"):
            engine(
                path_of((0.0, 3, 2), (0.0, 3, 1)),
                GPU,
                engine_table(),
                horizon=None,
                first_token_s=np.zeros(2),
            )
    assert set(SCANNING_KINDS) < set(KINDS)
