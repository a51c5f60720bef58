"""Several pools against one pool, scipy, and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.fluid.pools import Pool, PoolsSolution, pools_model, solve_pools


def random_pools(seed: int, disaggregated: bool) -> tuple[fs.Workload, list[Pool]]:
    """A workload of six types and two or four pools of catalog servers."""
    rng = np.random.default_rng(seed)
    types = [
        fs.RequestType(f"type {j}", rng.uniform(1, 30), int(rng.integers(1, 3000)), int(rng.integers(1, 600)))
        for j in range(6)
    ]
    entries = [e for e in fs.catalog.entries() if e.kv_capacity_tokens > 20_000]
    chosen = [entries[i].server() for i in rng.choice(len(entries), 4, replace=False)]
    pools = [Pool(chosen[0], 2, name="a"), Pool(chosen[1], rng.uniform(0.5, 3), name="b")]
    if disaggregated:
        slowest = chosen[3].iteration_time.empty * 3
        pools.append(Pool(chosen[2], 1, "prefill", name="p"))
        pools.append(Pool(chosen[3], 2, "decode", max_iteration_time=slowest, name="d"))
    return fs.Workload(types), pools


def scipy_value(workload: fs.Workload, pools: list[Pool], reward: np.ndarray) -> float:  # type: ignore[type-arg]
    """The program of the pools in its own units, written out pool by pool."""
    model = pools_model(workload, pools)
    size, count = len(workload), len(pools)
    width = count * (size + 1)
    rows, right, equal = [], [], np.zeros((size, width))
    cost, demand = np.zeros(width), np.zeros((size, width))
    bounds: list[tuple[float, float | None]] = []
    for k, (pool, one) in enumerate(zip(pools, model.models, strict=True)):
        first = k * (size + 1)
        for use, by_rate, limit in zip(one.matrix, one.rate_coefficient, one.limit, strict=True):
            row = np.zeros(width)
            row[first : first + size], row[first + size] = use, by_rate
            rows.append(row)
            right.append(limit * pool.replicas)
        own = range(first, first + size)
        for j, column in enumerate(own):
            if pool.stage != "decode":
                cost[column], demand[j, column] = -reward[j], 1.0
            equal[j, column] = {"whole": 0.0, "prefill": 1.0, "decode": -1.0}[pool.stage]
        bounds += [(0, None)] * size + [(pool.replicas / one.max_iteration_time, None)]
    scale = np.abs(rows).max(axis=1)
    answer = scipy.optimize.linprog(
        cost,
        np.vstack([np.array(rows) / scale[:, None], demand]),
        np.concatenate([np.array(right) / scale, workload.arrival_rate]),
        equal,
        np.zeros(size),
        bounds,
        method="highs",
    )
    assert answer.status == 0
    return float(-answer.fun)


@pytest.mark.parametrize("disaggregated", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_scipy_agrees(seed: int, disaggregated: bool) -> None:
    """Same optimum as the program written out, certified, with every rate and limit kept."""
    workload, pools = random_pools(seed, disaggregated)
    workload = workload.scaled(2.0 ** (seed - 1))
    solution = solve_pools(workload, pools, "output_tokens")
    assert solution.certificate.ok, solution.certificate
    witness = scipy_value(workload, pools, workload.mean_output_tokens)
    assert solution.objective_value == pytest.approx(witness, rel=1e-6)
    assert solution.upper_bound == pytest.approx(solution.objective_value, rel=1e-7)
    assert np.all(solution.admitted_rate <= workload.arrival_rate * (1 + 1e-9))
    assert np.all(solution.load <= 1 + 1e-7)
    prefill, decode = (
        solution.routed_rate[solution.model.stage(stage)].sum(axis=0) for stage in ("prefill", "decode")
    )
    np.testing.assert_allclose(prefill, decode, rtol=1e-7, atol=1e-9)
    if disaggregated:
        assert solution.iteration_time[3] <= pools[3].max_iteration_time * (1 + 1e-9)


@pytest.mark.parametrize("load", [0.5, 3.0])
def test_one_pool_is_the_one_pool_program(load: float) -> None:
    """One pool of one replica answers as `solve_fluid`; of three, as with a third of the demand."""
    workload, pools = random_pools(1, False)
    server = pools[0].server
    workload = workload.at_load(load, server)
    single = fs.solve_fluid(workload, server)
    one = solve_pools(workload, [Pool(server)])
    three = solve_pools(workload.scaled(3.0), [Pool(server, 3)])
    for solution, factor in ((one, 1.0), (three, 3.0)):
        assert solution.objective_value == pytest.approx(single.objective_value * factor, rel=1e-8)
        assert solution.critical_rate == pytest.approx(single.critical_rate * factor, rel=1e-8)
        assert solution.iteration_time[0] == pytest.approx(single.iteration_time, rel=1e-6)
        assert solution.resident_kv[0] == pytest.approx(single.resident_kv, rel=1e-6)
        assert solution.batch_size[0] == pytest.approx(single.batch_size, rel=1e-6)
        assert solution.is_stable == single.is_stable
        np.testing.assert_allclose(solution.bid_price[0], single.bid_price, rtol=1e-6, atol=1e-9)


def test_splitting_a_pool_changes_nothing() -> None:
    """Five replicas are two and three of the same server; no replicas are no pool."""
    workload, pools = random_pools(2, False)
    workload, server = workload.scaled(30.0), pools[0].server
    whole = solve_pools(workload, [Pool(server, 5)])
    parts = solve_pools(
        workload, [Pool(server, 2, name="x"), Pool(server, 3, name="y"), Pool(server, 0, name="z")]
    )
    assert parts.objective_value == pytest.approx(whole.objective_value, rel=1e-8)
    assert parts.load[2] == 0.0
    assert parts.routed_rate[2].max() == 0.0


def test_critical_rate_is_the_boundary() -> None:
    """A hair below it all demand is admitted, a hair above not."""
    for disaggregated in (False, True):
        workload, pools = random_pools(3, disaggregated)
        factor = solve_pools(workload, pools).critical_rate / workload.total_arrival_rate
        below, above = (solve_pools(workload.scaled(factor * x), pools) for x in (1 - 1e-5, 1 + 1e-5))
        assert below.is_stable
        assert below.admitted_fraction.min() == pytest.approx(1.0, abs=1e-7)
        assert not above.is_stable
        assert above.admitted_rate.sum() < above.model.workload.total_arrival_rate * (1 - 1e-6)


def test_replica_price_is_the_gain_of_one_more() -> None:
    """Central differences in the number of replicas, T_max included."""
    workload, pools = random_pools(4, True)
    workload = workload.scaled(20.0)
    solution = solve_pools(workload, pools)
    for k, pool in enumerate(pools):
        values = []
        for step in (1e-4, -1e-4):
            changed = list(pools)
            changed[k] = Pool(
                pool.server,
                pool.replicas + step,
                pool.stage,
                max_iteration_time=pool.max_iteration_time,
                name=pool.name,
            )
            values.append(solve_pools(workload, changed).objective_value)
        slope = (values[0] - values[1]) / 2e-4
        assert solution.replica_price[k] == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_disaggregation_adds_up() -> None:
    """Prefill and decode on two machines cost, together, the work of one request and no more."""
    workload = fs.Workload([fs.RequestType("a", 5.0, 800, 100), fs.RequestType("b", 2.0, 90, 1)])
    server = fs.Server(100_000, fs.IterationTime.affine(0.01, 5e-5, 4e-5, 3e-7, 1e-9), block_size=16)
    split = [Pool(server, 1, stage, name=stage) for stage in ("prefill", "decode")]  # type: ignore[arg-type]
    (whole,), (prefill, decode) = (pools_model(workload, pools).models for pools in ([Pool(server)], split))
    np.testing.assert_allclose(prefill.matrix + decode.matrix, whole.matrix, rtol=1e-12)
    assert prefill.iterations.tolist() == [1.0, 1.0]
    assert decode.iterations.tolist() == [99.0, 0.0]
    assert decode.matrix[:, 1].tolist() == [0.0] * len(decode.matrix)
    solution = solve_pools(workload, split)
    assert solution.is_stable
    assert solution.routed_rate[0].tolist() == pytest.approx([5.0, 2.0])


def test_types_go_only_where_they_fit() -> None:
    """A pool too small for a type's longest request gets none of it; if all are, the error says what is needed."""
    time = fs.IterationTime.affine(0.01, 5e-5, 5e-5, 3e-7)
    small, large = Pool(fs.Server(2_000, time), 5, name="small"), Pool(fs.Server(50_000, time), name="large")
    workload = fs.Workload([fs.RequestType("short", 9.0, 100, 50), fs.RequestType("long", 1.0, 3000, 50)])
    solution = solve_pools(workload, [small, large])
    assert solution.model.routable.tolist() == [[True, False], [True, True]]
    assert solution.routed_rate[0, 1] == 0.0
    assert solution.bid_price[0, 1] == math.inf
    with pytest.raises(InfeasibleError, match="'long': it needs 3,049 tokens"):
        solve_pools(workload, [small])


def test_infeasible_floors_say_how_to_repair_them() -> None:
    """Floors beyond what the pools carry name the factor that makes them feasible."""
    workload, pools = random_pools(5, True)
    workload = workload.scaled(100.0)
    factor = solve_pools(workload, pools).critical_rate / workload.total_arrival_rate
    with pytest.raises(InfeasibleError, match=f"multiplied by {factor / 0.9:.3g}"):
        solve_pools(workload, pools, fairness_floor=0.9)
    held = solve_pools(workload, pools, fairness_floor=0.9 * factor)
    assert held.admitted_fraction.min() >= 0.9 * factor * (1 - 1e-7)
    assert held.certificate.ok


def test_bad_pools_are_named() -> None:
    """Empty lists, things that are no pools, equal names, halves without the other half, wrong stages."""
    workload, pools = random_pools(0, True)
    for given, named in [
        ([], "pools"),
        ([pools[0], "b"], r"pools\[1\]"),
        ([pools[0], pools[0]], r"pools\[1\].name"),
        ([pools[2]], "pair prefill"),
        ([pools[3]], "pair prefill"),
    ]:
        with pytest.raises(InputError, match=named):
            solve_pools(workload, given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="stage"):
        Pool(pools[0].server, 1, "middle")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="replicas"):
        Pool(pools[0].server, -1)
    with pytest.raises(InputError, match="server"):
        Pool(None)  # type: ignore[arg-type]


def shown() -> PoolsSolution:
    workload, pools = random_pools(2, True)
    return solve_pools(workload.scaled(10.0), pools)


def test_frames_and_repr() -> None:
    """One row per pool and type, one per pool; a page for people."""
    solution = shown()
    frame, pools = solution.to_frame(), solution.pool_frame()
    assert len(frame) == 24
    admitting = frame[frame["admits"]]
    assert admitting.groupby("type")["routed_rate"].sum().sum() == pytest.approx(solution.admitted_rate.sum())
    assert pools["pool"].tolist() == ["a", "b", "p", "d"]
    assert "2 × a (whole)" in repr(solution)
    assert "critical rate" in repr(solution)


def test_nothing_offered() -> None:
    """No demand, nothing routed, stable, no critical rate."""
    workload, pools = random_pools(2, True)
    solution = solve_pools(workload.scaled(0.0), pools)
    assert solution.objective_value == 0.0
    assert solution.is_stable
    assert math.isnan(solution.critical_rate)
    assert solution.certificate.ok
