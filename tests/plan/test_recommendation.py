"""The recommendation: which policy, what it gains over the engines as they come, when one more server is needed."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched import planning
from fluidsched.errors import InfeasibleError
from fluidsched.policy.table import PolicyTable, TableType
from fluidsched.recommendation import (
    GAINS,
    RESOLUTION,
    Reach,
    Recommendation,
    bracket,
    choose,
    gains_over,
    judge,
    settled_until,
)
from fluidsched.simulation.measures import Settled

SERVER = fs.Server(20_000, fs.IterationTime.affine(0.02, 1e-5, 1e-5, 1e-7), max_batch_size=16)
WORKLOAD = fs.Workload([fs.RequestType("chat", 4.0, 100, 50)])


class _Runs:
    """Runs with given end-to-end latencies and whether each policy keeps up: all that a choice reads."""

    def __init__(self, latency: dict[str, list[float]], behind: tuple[str, ...] = ()) -> None:
        self.policies = tuple(latency)
        self._latency = latency
        self._behind = behind

    def measures(self, name: str) -> dict[str, np.ndarray]:
        values = np.array(self._latency[name])
        return {"mean_e2e": values, "p99_ttft": values / 10.0}

    def outcome(self, name: str) -> object:
        flag = np.array([name in self._behind])
        return type("Outcome", (), {"lower_bounds": {"p99_ttft": flag}})


@pytest.mark.parametrize(
    ("latency", "behind", "expected"),
    [
        ({"vllm": [9.0, 9.1], "sarathi": [5.0, 5.1]}, (), "sarathi"),  # clearly best
        ({"vllm": [5.0, 5.1], "capped": [5.1, 5.2]}, (), "capped"),  # within 5 %: simpler
        ({"vllm": [5.0, 5.1], "capped": [5.5, 5.6]}, (), "vllm"),  # more than 5 % above
        ({"vllm": [3.0, 3.0], "capped": [7.0, 7.1]}, ("vllm",), "capped"),  # does not keep up
        ({"vllm": [3.0, 3.0], "sarathi": [2.0, 2.1]}, ("vllm", "sarathi"), "sarathi"),  # nobody keeps up
    ],
)
def test_choice(latency: dict[str, list[float]], behind: tuple[str, ...], expected: str) -> None:
    assert choose(_Runs(latency, behind)) == expected  # type: ignore[arg-type]


def test_policies_that_miss_a_target_are_passed_over_while_others_meet_it() -> None:
    runs = _Runs({"capped": [5.2, 5.2], "vllm": [5.0, 5.0]})  # p99 TTFT 0.52 and 0.50 s
    assert choose(runs, {"p99_ttft": 0.51}) == "vllm"  # type: ignore[arg-type]
    assert choose(runs, {"p99_ttft": 0.1}) == "capped"  # type: ignore[arg-type]  # nobody, and equally near


def test_where_no_policy_meets_the_targets_the_nearest_is_chosen() -> None:
    """p99 TTFT 0.52, 0.70 and 0.90 s: within 5 % of the nearest only the first, whatever the preference."""
    runs = _Runs({"sarathi": [5.2, 5.2], "vllm": [7.0, 7.0], "capped": [9.0, 9.0]})
    assert choose(runs, {"p99_ttft": 0.1}) == "sarathi"  # type: ignore[arg-type]
    assert choose(runs, {"p99_ttft": 0.6}) == "sarathi"  # type: ignore[arg-type]
    runs = _Runs({"vllm": [math.nan, 1.0], "capped": [math.nan, 1.0]})  # a run without requests: all are left
    assert choose(runs, {"p99_ttft": 0.1}) == "capped"  # type: ignore[arg-type]


def test_a_gain_is_the_paired_difference_signed_so_that_positive_is_better() -> None:
    """Recomputed from the replications: one policy starves with two in service, the engine does not."""
    starved = fs.baselines.vllm(max_in_service=2).renamed("starved")
    runs = fs.simulate(
        WORKLOAD, SERVER, [starved, fs.baselines.vllm()], horizon=120.0, replications=6, seed=3
    )
    gains = {gain.measure: gain for gain in gains_over(runs, "starved", 0.5, 4.0)}
    assert list(gains) == list(GAINS)
    ours, theirs = runs.measures("starved")["mean_ttft"], runs.measures("vllm")["mean_ttft"]
    assert gains["mean_ttft"].gain == pytest.approx(np.mean(theirs - ours))
    spread = np.std(theirs - ours, ddof=1) / math.sqrt(6)
    assert gains["mean_ttft"].high - gains["mean_ttft"].gain == pytest.approx(
        2.570581836 * spread
    )  # t, 5 d.f.
    assert gains["mean_ttft"].verdict == gains["request_throughput"].verdict == "worse"
    assert gains["request_throughput"].gain < 0.0
    assert gains["mean_ttft"].of_engine == pytest.approx(theirs.mean())


def test_equal_policies_are_within_noise_and_one_run_tells_nothing() -> None:
    same = fs.baselines.vllm().renamed("same")
    for replications, verdict in ((4, "within noise"), (1, "one run")):
        runs = fs.simulate(
            WORKLOAD, SERVER, [same, fs.baselines.vllm()], horizon=60.0, replications=replications, seed=3
        )
        gains = gains_over(runs, "same", 0.5, 4.0)
        assert {gain.verdict for gain in gains} == {verdict}
        assert all(gain.gain == 0.0 for gain in gains)
        reach = Reach(8.0, 0.5, math.nan, math.inf, math.nan, {})
        found = Recommendation(same, "", tuple(gains), reach, replications)
        assert found.stock_within_noise is (True if replications > 1 else None)
        assert ("within noise" if replications > 1 else "single run") in repr(found)


@given(st.floats(0.31, 1.5), st.floats(0.0, 0.1))
def test_a_bracket_encloses_where_the_answer_changes(edge: float, unsure: float) -> None:
    """A judge that is sure below `edge` and above `edge + unsure`: both ends are found to the resolution."""

    def at(load: float) -> bool | None:
        return True if load < edge else False if load > edge + unsure else None

    holds, fails = bracket({load: at(load) for load in (0.3, 0.8, 1.0, 1.7)}, at)
    assert edge - RESOLUTION <= holds < edge
    assert edge + unsure < fails <= edge + unsure + RESOLUTION


def test_a_bracket_without_an_answer_says_so_and_tries_nothing() -> None:
    def never(load: float) -> bool | None:
        raise AssertionError(load)

    assert bracket({0.5: None, 1.0: None}, never) == (0.0, math.inf)
    assert bracket({0.5: True, 1.0: True}, never) == (1.0, math.inf)
    assert bracket({0.5: False}, never) == (0.0, 0.5)


def test_a_verdict_that_a_higher_load_contradicts_counts_for_nothing() -> None:
    """One in forty stable systems is called growing; the loads above it tell."""

    def at(load: float) -> bool | None:
        return load < 0.95

    holds, fails = bracket({0.5: True, 0.7: False, 0.8: True, 0.9: True, 1.0: False}, at)
    assert 0.95 - RESOLUTION <= holds < 0.95 <= fails <= 0.95 + RESOLUTION


def test_what_a_capped_server_carries_is_its_closed_form() -> None:
    """One type, N in service: N requests leave in the time of 50 iterations, so it carries N/(50·T(N)).

    At 0.9 of that the table holds, at 1.1 it fails, whatever the seed (20 and 80 standard deviations away).
    """
    cap, output = 4, 50
    prefills = cap / output  # requests that enter an iteration
    time = 0.02 + 1e-5 * (prefills * 100 + cap - prefills) + 1e-7 * cap * (100 + output / 2)
    capacity = cap / (output * time)
    table = fs.baselines.vllm(max_in_service=cap)
    for share, expected in ((0.9, True), (1.1, False)):
        offered = fs.Workload([fs.RequestType("chat", share * capacity, 100, output)])
        start = 20_000.0 / 6
        settled = Settled(["p99_ttft"], start, settled_until(20_000.0, start))
        options: dict[str, Any] = {"kept_replications": 0, "on_run": settled.seen, "seed": 5}
        runs = fs.simulate(offered, SERVER, table, horizon=20_000.0, replications=8, **options)
        assert judge(runs, "vllm", {}, settled) is expected
        assert judge(runs, "vllm", {"p99_ttft": 1e-6}, settled) is False
        assert judge(runs, "vllm", {"p99_ttft": 1e9}, settled) is expected


@pytest.mark.parametrize(
    ("load", "holds", "servers"),
    [(0.8, 0.95, 1), (0.96, 0.95, 2), (1.9, 0.95, 2), (2.0, math.nan, 2), (0.5, 0.0, 1)],
)
def test_servers_needed_by_hand(load: float, holds: float, servers: int) -> None:
    assert Reach(5.0, load, holds, math.inf, math.nan, {}).servers == servers


def test_where_no_load_is_known_to_hold_the_least_that_fails_bounds_what_one_server_carries() -> None:
    """Found to fail from 0.4 on, and at nothing to hold: 0.9 needs 3 servers at least, 0.3 may need more soon."""
    words = " ".join(Reach(5.0, 0.9, 0.0, 0.4, math.nan, {"p99_ttft": 1.0}).lines("vllm"))
    assert "needs at least 3 servers" in words
    assert "with p99 TTFT ≤ 1 s cannot be told" in words
    words = " ".join(Reach(5.0, 0.3, 0.0, 0.4, math.nan, {}).lines("vllm"))
    assert "beyond 2.00 req/s at the latest" in words
    assert "at the latest" not in " ".join(Reach(5.0, 0.3, 0.35, 0.4, math.nan, {}).lines("vllm"))


def test_targets_missed_at_every_load_of_the_curve_are_sought_below_it() -> None:
    """p99 TTFT is 0.0399 s on an idle server and 0.0424 s at half the boundary: the reach lies between."""
    result = fs.plan(WORKLOAD, SERVER, load=0.6, horizon=600.0, replications=8, targets={"p99_ttft": 0.0415})
    reach = result.recommendation.reach
    assert planning.IDLE_LOAD <= reach.holds < reach.fails <= planning.CURVE_LOADS[0]
    assert reach.servers >= 2
    assert result.recommendation.reason.startswith(
        "No policy meets the targets at this load. Nearest to them:"
    )
    assert "p99 TTFT" in result.recommendation.reason


@pytest.fixture(scope="module")
def result() -> planning.Plan:
    """A server near its boundary, where a cap in service is compiled: gains and reach from real runs."""
    return fs.plan(WORKLOAD, SERVER, load=0.6, horizon=900.0, replications=8)


def test_a_plan_recommends_with_gains_at_every_load_and_a_reach(result: planning.Plan) -> None:
    found = result.recommendation
    assert found.policy == result.recommended
    loads = sorted({gain.load for gain in found.gains})
    assert loads == pytest.approx(sorted([*planning.CURVE_LOADS, 0.6]))
    assert {gain.engine for gain in found.gains} == {"vllm", "sarathi"} - {found.policy}
    reach = found.reach
    assert 0.6 < reach.holds <= reach.fails
    assert reach.holds <= 1.0 + 2 * RESOLUTION  # no policy carries more than the fluid boundary
    assert reach.overload_rate <= 1.01 * reach.critical_rate
    assert reach.servers == 1
    assert reach.next_rate > result.workload.total_arrival_rate


def test_the_printed_recommendation_and_the_summary_say_the_same(result: planning.Plan) -> None:
    """The page ends with the recommendation; JSON has the same numbers."""
    printed = repr(result)
    tail = printed[printed.index("\nRecommendation\n") :]
    assert max(map(len, tail[: tail.index("As arguments of vLLM")].splitlines())) <= 100
    for words in ("as it comes", "One more server is needed", "By the linear program", "By simulation"):
        assert words in tail
    written = json.loads(json.dumps(result.to_dict()))["recommendation"]
    assert written["policy"] == result.recommended
    assert f"{written['next_rate']:.2f} req/s" in tail
    assert written["engine_command"] in tail
    assert len(written["gains"]) == len(result.recommendation.to_frame())


def test_targets_nobody_can_meet_are_no_answer_and_show_the_nearest_miss() -> None:
    """A first token takes at least an iteration, 20 ms: no number of servers brings it in 1 ms."""
    with pytest.raises(
        InfeasibleError, match=r"nearest, \w+, has p99 TTFT 0\.\d+ s \(at most 0\.001 s\)"
    ) as caught:
        fs.plan(WORKLOAD, SERVER, load=0.6, horizon=300.0, replications=4, targets={"p99_ttft": 0.001})
    assert caught.value.reason == "slo"


def test_a_target_that_binds_lowers_the_load_one_server_carries(result: planning.Plan) -> None:
    """p99 TTFT rises with the load; the target lies between its values at 0.7 and 0.98, so does the reach."""
    free = result
    assert free.curve is not None
    rows = free.curve[(free.curve["measure"] == "p99_ttft") & (free.curve["policy"] == free.recommended)]
    low, high = (float(rows[np.isclose(rows["load"], load)]["estimate"].iloc[0]) for load in (0.7, 0.98))
    bound = fs.plan(
        WORKLOAD, SERVER, load=0.6, horizon=900.0, replications=8, targets={"p99_ttft": (low + high) / 2}
    )
    assert 0.5 <= bound.recommendation.reach.holds < free.recommendation.reach.holds
    assert "p99 TTFT ≤" in repr(bound.recommendation)


def test_an_overloaded_server_needs_more_of_its_kind() -> None:
    result = fs.plan(WORKLOAD, SERVER, load=1.9, horizon=300.0, replications=4)
    assert result.recommendation.reach.servers in (2, 3)  # 1.9 by the program, more where 0.95 is not carried
    assert "servers of this kind" in repr(result)


def test_arguments_of_both_engines_are_shown_with_what_each_loses() -> None:
    """A cap with a budget and a watermark: vLLM has all three names, SGLang no watermark, and says so."""
    table = fs.baselines.vllm(max_in_service=8, token_budget=512)
    table = dataclasses.replace(table, watermark=0.1)
    found = Recommendation(table, "", (), Reach(8.0, 0.5, math.nan, math.inf, math.nan, {}), 1)
    commands = found.engine_commands()
    assert list(commands) == ["vLLM", "SGLang"]
    assert "--watermark 0.1" in commands["vLLM"][0]
    assert "--max-running-requests 8" in commands["SGLang"][0]
    assert any("watermark" in sentence for sentence in commands["SGLang"][2])
    assert all(command in repr(found) for command, _, _ in commands.values())
    written = found.to_dict()["engine_commands"]
    assert written["SGLang"]["command"] == commands["SGLang"][0]
    plain = dataclasses.replace(found, table=PolicyTable("plain", "vllm", (TableType("*"),)))
    assert plain.engine_commands() == {}
