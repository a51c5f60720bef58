"""Fleets against percentiles of latency: the search, the confirmation and its error rate, how it fails."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

import fluidsched as fs
from fluidsched import fleets
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.simulation.measures import latency_statistic

WORKLOAD = fs.Workload([fs.RequestType("chat", 15.0, 500, 60), fs.RequestType("long", 0.6, 5000, 60)])
SERVER = fs.catalog.server("l40s", "llama-3-8b")
QUICK: dict[str, Any] = {"horizon": 300.0, "replications": 6}


@pytest.fixture(scope="module")
def plan() -> fs.fluid.CapacityPlan:
    return fs.plan_capacity(WORKLOAD, [SERVER], [2.0], headroom=0.1)


@pytest.fixture(scope="module")
def verified(plan: fs.fluid.CapacityPlan) -> fleets.VerifiedCapacity:
    return fs.verify_capacity(plan, {"p99_ttft": 0.9, "p99_tpot": 0.1}, **QUICK)


def test_the_fleet_found_meets_the_targets_and_one_fewer_did_not(
    plan: fs.fluid.CapacityPlan, verified: fleets.VerifiedCapacity
) -> None:
    """On paths drawn here the verified fleet keeps both targets; the largest smaller one tried was refused."""
    assert verified.replicas[0] > plan.replicas[0]
    assert verified.total_cost == 2.0 * verified.replicas[0]
    share = plan.workload.scaled(1 / verified.replicas[0])
    runs = fs.simulate(share, SERVER, fs.baselines.vllm(), horizon=600.0, replications=8, seed=123)
    for measure, target in verified.targets.items():
        assert float(np.mean(runs.measures("vllm")[measure])) < target
    last = verified.confirmed
    assert [c.verdict for c in last] == ["met", "met"]
    assert all(c.high <= c.target and c.replicas == verified.replicas[0] for c in last)
    fewer = [c for c in verified.checks if c.replicas == verified.replicas[0] - 1]
    assert any(c.verdict != "met" for c in fewer)


def test_one_seed_one_answer(plan: fs.fluid.CapacityPlan, verified: fleets.VerifiedCapacity) -> None:
    """The same call gives the same checks; a confirmation never runs on the search's paths."""
    again = fs.verify_capacity(plan, verified.targets, **QUICK)
    assert again.checks == verified.checks
    by_step = {(c.step, c.measure): c.estimate for c in verified.checks if c.replicas == verified.replicas[0]}
    assert by_step["search", "p99_ttft"] != by_step["confirmation", "p99_ttft"]


def test_limits_are_students(verified: fleets.VerifiedCapacity) -> None:
    """Mean, lower and upper limit of a check are the one-sided Student limits of the values."""
    values = np.array([1.0, 1.3, 0.9, 1.1, math.nan])
    check = fleets._check(("pool", 3, "search"), "p99_ttft", 1.2, values, False, 0.01)
    known = values[:4]
    half = stats.t.ppf(0.99, 3) * known.std(ddof=1) / 2
    assert (check.low, check.high) == pytest.approx((known.mean() - half, known.mean() + half))
    assert check.verdict == "undecided"
    bound = fleets._check(("pool", 3, "search"), "p99_ttft", 99.0, values, True, 0.01)
    assert (bound.high, bound.verdict) == (math.inf, "undecided")
    assert fleets._check(("pool", 3, "search"), "p99_ttft", 0.5, values, True, 0.01).verdict == "missed"
    nothing = np.full(4, math.nan)
    assert fleets._check(("pool", 1, "search"), "p99_tpot", 0.1, nothing, False, 0.01).verdict == "met"
    assert fleets._check(("pool", 1, "search"), "p99_ttft", 0.1, nothing, False, 0.01).verdict == "undecided"


def give_normal_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of five replications whose p99 TTFT is normal about 1 s, whatever the number of replicas."""

    def measured(_: Any, __: int, seed: np.random.SeedSequence) -> Any:
        return {"p99_ttft": np.random.default_rng(seed).normal(1.0, 0.2, 5)}, {"p99_ttft": False}, False

    monkeypatch.setattr(fleets._PoolTrial, "_measured", measured)


def test_a_fleet_that_misses_is_seldom_reported(
    plan: fs.fluid.CapacityPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Null: the measure's mean is the target itself, with any number of replicas; at most 5 % may be reported.

    Of 300 fleets, each given up to 40 chances, more than 27 reports have probability 0.002 at 5 %.
    """
    give_normal_measures(monkeypatch)
    reported = 0
    for seed in range(300):
        try:
            fs.verify_capacity(
                plan, {"p99_ttft": 1.0}, horizon=1.0, replications=5, seed=seed, most_replicas=40
            )
            reported += 1
        except InfeasibleError:
            pass
    assert reported <= 27


def test_a_fleet_that_meets_is_found_at_once(
    plan: fs.fluid.CapacityPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Well below the target the fluid plan's own replicas pass search and confirmation."""
    give_normal_measures(monkeypatch)
    verified = fs.verify_capacity(plan, {"p99_ttft": 3.0}, horizon=1.0, replications=5)
    assert verified.added.tolist() == [0]
    assert [c.step for c in verified.checks] == ["search", "confirmation"]


@pytest.mark.parametrize("measure", ["mean_ttft", "mean_e2e", "p99_tpot"])
def test_requests_unfinished_at_the_end_buy_no_replicas(measure: str) -> None:
    """Regression: of 140 requests in 20 s the last 10 are in service at the end; one replica keeps 5 s by far."""
    workload = fs.Workload([fs.RequestType("chat", 7.0, prompt_tokens=500, output_tokens=100)])
    plan = fs.plan_capacity(workload, [SERVER], cost=[1.0])
    fleet = fs.verify_capacity(plan, {measure: 5.0}, horizon=20.0, warmup=5.0, replications=6)
    assert fleet.replicas.tolist() == [1]
    assert all(math.isfinite(check.high) for check in fleet.checks)


def test_judged_are_the_requests_of_the_window() -> None:
    """Witness: the mean over those that arrived in it, from the frame of requests of a longer run."""
    path = WORKLOAD.sample(60.0, seed=5)
    runs = fs.simulate(path, SERVER, fs.baselines.vllm(), warmup=10.0)
    frame = runs.requests("vllm")
    window = frame[(frame.arrival_s >= 10.0) & (frame.arrival_s < 40.0)]
    run = runs.run("vllm")
    value, is_bound = latency_statistic(path, run, 10.0, 40.0, "mean_e2e")
    assert (value, is_bound) == (pytest.approx((window.finish_s - window.arrival_s).mean()), False)
    value, is_bound = latency_statistic(path, run, 10.0, 40.0, "p90_ttft")
    ttft = window.first_token_s - window.arrival_s
    assert (value, is_bound) == (pytest.approx(ttft.quantile(0.9)), False)


def test_targets_nobody_meets_show_the_nearest_miss(plan: fs.fluid.CapacityPlan) -> None:
    """No number of replicas computes a prompt faster: no answer, with the last try beside the target."""
    with pytest.raises(InfeasibleError, match=r"6 replicas of .* do not meet .* against 0\.001 s") as caught:
        fs.verify_capacity(plan, {"p99_ttft": 0.001}, most_replicas=6, **QUICK)
    assert caught.value.reason == "slo"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"targets": {}}, "targets"),
        ({"targets": {"p98_ttft": 1.0}}, "p98_ttft"),
        ({"targets": {"p99_ttft": 0.0}}, "p99_ttft"),
        ({"confidence": 1.0}, "confidence"),
        ({"replications": 1}, "replications"),
        ({"seed": -1}, "seed"),
        ({"horizon": 60.0, "warmup": 60.0}, "warmup"),
    ],
)
def test_wrong_input_is_named(plan: fs.fluid.CapacityPlan, asked: dict[str, Any], words: str) -> None:
    """The argument at fault."""
    with pytest.raises(InputError, match=words):
        fs.verify_capacity(plan, **({"targets": {"p99_ttft": 1.0}} | asked))


def pair_plan(rate: float = 24.0) -> fs.fluid.CapacityPlan:
    """Prefill and decode machines of one kind for prompts of 500 and outputs of 100."""
    pair = [fs.Pool(SERVER, stage=stage, name=stage) for stage in ("prefill", "decode")]
    workload = fs.Workload([fs.RequestType("chat", rate, prompt_tokens=500, output_tokens=100)])
    return fs.plan_capacity(workload, pair, [1.0, 1.0])


def test_prefill_and_decode_machines_are_checked_each_for_its_latencies() -> None:
    """TTFT is the prefill pool's and TPOT the decode pool's; what is confirmed holds in a simulation of the fleet."""
    plan = pair_plan()
    transfer = {"transfer_bandwidth": 2e6, "transfer_latency": 0.005}
    targets = {"p99_ttft": 0.15, "p99_tpot": 0.035}
    fleet = fs.verify_capacity(plan, targets, horizon=60.0, replications=4, **transfer)
    assert {(c.pool, c.measure) for c in fleet.checks} == {("prefill", "p99_ttft"), ("decode", "p99_tpot")}
    assert (fleet.added >= 0).all()
    assert fleet.added.any()
    pools = [
        dataclasses.replace(pool, replicas=count)
        for pool, count in zip(plan.pools, fleet.replicas.tolist(), strict=True)
    ]
    runs = fs.simulate_cluster(
        plan.workload, pools, fs.baselines.vllm(), fs.routers.random(), horizon=60.0, replications=4, seed=99,
        **transfer,
    )  # fmt: skip
    for measure, limit in targets.items():
        assert runs.measures("vllm, random")[measure].mean() < limit
    with pytest.raises(InfeasibleError, match=r"of 'decode' do not meet"):
        fs.verify_capacity(plan, {"p99_tpot": 0.001}, horizon=20.0, replications=2, most_replicas=3)


def test_whole_lives_may_need_more_prefill_machines() -> None:
    """E2E alone, one prefill machine at 0.97 of what it can do: no number of decode machines makes up for its queue."""
    time = fs.IterationTime.affine(0.01, 1e-4, 1e-5, 1e-8)
    pair = [fs.Pool(fs.Server(100_000, time), stage=stage, name=stage) for stage in ("prefill", "decode")]
    workload = fs.Workload([fs.RequestType("chat", 1.0, prompt_tokens=2000, output_tokens=20)])
    rate = 0.97 * fs.fluid.solve_pools(workload, pair).critical_rate
    plan = fs.plan_capacity(workload.with_rates([rate]), pair, [1.0, 1.0])
    assert plan.replicas.tolist() == [1, 1]
    fleet = fs.verify_capacity(plan, {"mean_e2e": 0.7}, horizon=300.0, replications=4, most_replicas=3)
    assert fleet.replicas.tolist()[0] == 2
    assert {c.pool for c in fleet.checks} == {"decode"}


def test_several_pools_of_one_stage_are_refused() -> None:
    """Which decode machine a prefill goes to is then the plan's, which independent trials do not follow."""
    time = fs.IterationTime.affine(0.01, 1e-4, 1e-4, 1e-7)
    pools = [
        fs.Pool(fs.Server(capacity, time), stage=stage, name=name)
        for name, stage, capacity in (("p", "prefill", 1e6), ("big", "decode", 1e6), ("small", "decode", 3e4))
    ]
    workload = fs.Workload([fs.RequestType("chat", 1.0, 200, 200)])
    one = fs.fluid.solve_pools(workload, pools[:2]).critical_rate
    crowd = fs.plan_capacity(workload.with_rates([1.2 * one]), pools, [1.0, 10.0, 6.0])
    assert (crowd.replicas > 0).all()
    with pytest.raises(InputError, match="one pool that prefills and one that decodes"):
        fs.verify_capacity(crowd, {"p99_ttft": 1.0}, horizon=10.0)
    with pytest.raises(InputError, match="transfer_latency"):
        fs.verify_capacity(
            fs.plan_capacity(WORKLOAD, [SERVER], [1.0]), {"p99_ttft": 1.0}, horizon=10.0, transfer_latency=0.1
        )


def test_it_shows_itself(verified: fleets.VerifiedCapacity) -> None:
    """Frame, JSON, repr and picture say the same."""
    frame = verified.to_frame()
    assert len(frame) == len(verified.checks)
    data = json.loads(json.dumps(verified.to_dict()))
    assert data["schema"] == "fluidsched.verified-capacity/1"
    assert list(data["replicas"].values()) == verified.replicas.tolist()
    assert "0.95 confidence" in repr(verified)
    from matplotlib import pyplot

    axes = verified.plot()
    assert axes.get_ylabel() == "measure / target"
    pyplot.close(axes.figure)
