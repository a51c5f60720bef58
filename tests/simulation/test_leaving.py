"""Leaving before the end: patience, aborts and timeouts (rules 35 to 38), on both engines."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import stdtrit
from simulation_cases import engine_table, server_of, typed_table

from fluidsched import patience
from fluidsched.errors import InputError
from fluidsched.policy.table import Lookahead, PolicyTable, Segment, TableType
from fluidsched.server import IterationTime, Server
from fluidsched.simulation import simulate
from fluidsched.simulation.laws import check_laws
from fluidsched.simulation.records import STATUSES, EngineRun
from fluidsched.workload import ArrivalPath, RequestType, Workload

INF = math.inf
ONE_AT_A_TIME = engine_table("capped", max_in_service=1)


def words(run: EngineRun) -> list[str]:
    return [STATUSES[code] for code in run.status]


@pytest.fixture(params=["kernel", "reference"])
def run(request: Any) -> Any:
    """Run a path on one of the engines, with the laws checked."""

    def of(path: ArrivalPath, server: Server, table: PolicyTable, **options: Any) -> EngineRun:
        result = simulate(path, server, table, engine=request.param, check=True, **options)
        return result.run(table.name)

    return of


def test_patience_ends_in_the_queue_at_its_own_instant(run: Any) -> None:
    """Three at once, one at a time, 2 s each: the second's patience of 3 s suffices, the third's of 3.5 s not."""
    path = ArrivalPath.from_arrays([0.0] * 3, [1] * 3, [2] * 3, patience_s=[INF, 3.0, 3.5])
    one = run(path, server_of(), ONE_AT_A_TIME)
    assert words(one) == ["finished", "finished", "abandoned"]
    assert one.left_s.tolist() == [2.0, 4.0, 3.5]
    assert one.verdict == "finished"
    assert one.waiting_s == 2.0 + 3.5


def test_whoever_could_be_admitted_at_its_deadline_leaves(run: Any) -> None:
    """A patience that ends at the very decision is over; a patience of 0 admits nobody, even to an idle server."""
    path = ArrivalPath.from_arrays([0.0, 0.0, 9.0], [1] * 3, [2] * 3, patience_s=[INF, 2.0, 0.0])
    one = run(path, server_of(), ONE_AT_A_TIME)
    assert words(one) == ["finished", "abandoned", "abandoned"]
    assert one.left_s.tolist() == [2.0, 2.0, 9.0]


def test_a_resident_is_served_until_the_end_of_its_iteration(run: Any) -> None:
    """Hanging up at 1.5 s of a request served until 5: it leaves at 2 with its two tokens, and the next enters."""
    path = ArrivalPath.from_arrays([0.0, 0.0], [3, 3], [5, 1], abort_after_s=[1.5, INF])
    one = run(path, server_of(), ONE_AT_A_TIME)
    assert words(one) == ["aborted", "finished"]
    assert one.left_s.tolist() == [2.0, 3.0]
    assert one.first_token_s.tolist() == [1.0, 3.0]
    assert np.isnan(one.finish_s[0])
    assert one.dropped_tokens == 3 + 1
    assert one.emitted_tokens == 3


def test_whoever_has_the_last_token_has_finished(run: Any) -> None:
    """An abort at the instant of the last token comes too late."""
    path = ArrivalPath.from_arrays([0.0, 0.0], [3, 3], [5, 5], abort_after_s=[5.0, 4.0])
    one = run(path, server_of(), engine_table())
    assert words(one) == ["finished", "aborted"]


def test_memory_of_a_leaver_is_free_in_the_same_decision(run: Any) -> None:
    """10 of 12 tokens are held; the second enters when the first hangs up, not before."""
    path = ArrivalPath.from_arrays([0.0, 0.0], [8, 6], [4, 2], abort_after_s=[1.25, INF])
    one = run(path, server_of(12), engine_table())
    assert one.admitted_s.tolist() == [0.0, 2.0]
    assert one.left_s.tolist() == [2.0, 4.0]


def test_patience_is_over_with_the_first_admission(run: Any) -> None:
    """Preempted at 2 s and waiting again, the second request stays, though its patience was 0.5 s."""
    path = ArrivalPath.from_arrays([0.0, 0.0], [3, 3], [4, 4], patience_s=[0.5, 0.5])
    one = run(path, server_of(8), engine_table())
    assert one.preemptions.tolist() == [0, 1]
    assert words(one) == ["finished", "finished"]


def test_preempted_requests_hang_up_where_they_wait(run: Any) -> None:
    """Preempted at 2 s, the second waits, and leaves at its own 2.5 s; what it held was wasted, not dropped."""
    path = ArrivalPath.from_arrays([0.0, 0.0], [3, 3], [5, 5], abort_after_s=[INF, 2.5])
    one = run(path, server_of(8), engine_table())
    assert words(one) == ["finished", "aborted"]
    assert one.left_s.tolist() == [5.0, 2.5]
    assert (one.wasted_tokens, one.dropped_tokens) == (4, 0)


def test_swapped_out_tokens_are_dropped(run: Any) -> None:
    """As above with KV in the host's memory: it is dropped there."""
    path = ArrivalPath.from_arrays([0.0, 0.0], [3, 3], [5, 5], abort_after_s=[INF, 2.5])
    one = run(path, server_of(8, swap_bandwidth=8.0), engine_table(preemption="swap"))
    assert words(one) == ["finished", "aborted"]
    assert (one.swapped_tokens, one.dropped_tokens, one.stored_end) == (4, 4, 0)


def test_timeouts_abort(run: Any) -> None:
    """The server's limits on waiting (2.5 s) and in all (4.5 s), the client's patience first where both end."""
    path = ArrivalPath.from_arrays([0.0] * 4, [1] * 4, [9, 2, 2, 2], patience_s=[INF, INF, 2.5, 2.0])
    server = server_of(waiting_timeout=2.5, total_timeout=4.5)
    one = run(path, server, ONE_AT_A_TIME)
    assert words(one) == ["aborted", "aborted", "abandoned", "abandoned"]
    assert one.left_s.tolist() == [5.0, 2.5, 2.5, 2.0]


def test_the_horizon_keeps_deadlines(run: Any) -> None:
    """At a horizon that cuts an iteration whoever's deadline has passed is gone, residents too."""
    path = ArrivalPath.from_arrays(
        [0.0] * 4, [1] * 4, [5] * 4, patience_s=[INF, 1.25, 2.0, INF], abort_after_s=[1.25, INF, INF, INF]
    )
    one = run(path, server_of(), ONE_AT_A_TIME, horizon=1.5, warmup=0.0)
    assert words(one) == ["aborted", "abandoned", "unfinished", "unfinished"]
    assert one.left_s.tolist()[:2] == [1.5, 1.25]
    assert one.kv_end == 0
    assert one.dropped_tokens == 1


def test_frozen_residents_leave_an_idle_server(run: Any) -> None:
    """Literal WAIT with an odd request out: stuck for ever, unless the clients hang up, at 7 s and 6 s."""
    rows = {"A": {"threshold": 2, "gate": 2}}
    table = typed_table("wait", rows, block_iterations=1)
    path = ArrivalPath.from_arrays(
        [0.0] * 3, [2] * 3, [3] * 3, [0] * 3, type_names=("A",), abort_after_s=[INF, 7.0, 6.0]
    )
    one = run(path, server_of(), table)
    assert one.verdict == "stuck"
    assert words(one) == ["unfinished", "aborted", "aborted"]
    assert one.left_s.tolist()[1:] == [7.0, 6.0]
    assert one.end_s == 7.0


def test_those_before_a_segment_leave(run: Any) -> None:
    """Nested WAIT: the one that stands before the second segment hangs up there."""
    table = PolicyTable(
        "nested", "nested-wait", (TableType("*", threshold=1, gate=1),), (Segment(0, 1), Segment(1, 2)),
        freeze=True, block_iterations=1,
    )  # fmt: skip
    path = ArrivalPath.from_arrays([0.0] * 2, [2] * 2, [3] * 2, abort_after_s=[INF, 1.5])
    one = run(path, server_of(), table)
    assert words(one)[1] == "aborted"


def test_gates_count_those_who_are_there(run: Any) -> None:
    """A gate of 2 opens at the third arrival, as the first client is gone by then."""
    rows = {"A": {"threshold": 2, "gate": 2, "period": 1}}
    path = ArrivalPath.from_arrays(
        [0.0, 2.0, 3.0], [2] * 3, [1] * 3, [0] * 3, type_names=("A",), patience_s=[1.0, INF, INF]
    )
    one = run(path, server_of(), typed_table("gated", rows))
    assert one.admitted_s.tolist()[1:] == [3.0, 3.0]
    assert words(one) == ["abandoned", "finished", "finished"]


def test_leavers_are_in_the_frame_and_the_summary() -> None:
    """Statuses, times of leaving and counts are shown; latencies are those of the served."""
    path = ArrivalPath.from_arrays([0.0] * 3, [1] * 3, [2] * 3, patience_s=[INF, 3.0, 3.5])
    result = simulate(path, server_of(), ONE_AT_A_TIME)
    frame = result.requests("capped")
    assert frame["status"].tolist() == ["finished", "finished", "abandoned"]
    assert frame["left_s"].tolist() == [2.0, 4.0, 3.5]
    measured = result.measures("capped")
    assert (measured["abandoned"], measured["aborted"], measured["unfinished"]) == (1.0, 0.0, 0.0)
    assert measured["mean_ttft"] == 2.0  # of 1 and 3 s
    assert "abandoned" in repr(result)
    assert result.to_serve_summary()[0]["failed"] == 1.0
    assert "left_s" not in simulate(path, server_of(), engine_table()).requests("vllm")


def test_a_broken_deadline_is_found() -> None:
    """A record in which nobody left although patience ended breaks a law."""
    import dataclasses

    from fluidsched.errors import SimulationError

    path = ArrivalPath.from_arrays([0.0] * 2, [1] * 2, [2] * 2)
    run = simulate(path, server_of(), ONE_AT_A_TIME).run("capped")
    impatient = dataclasses.replace(path, patience_s=[INF, 1.0])
    with pytest.raises(SimulationError, match="admitted after its patience"):
        check_laws(impatient, server_of(), run, warmup=0.0)


def erlang_a(offered: float, service: float, mean_patience: float) -> tuple[float, float]:
    """M/M/1+M: probability of abandonment and mean number waiting, from the birth-and-death chain.

    Births λ, deaths μ + (n - 1)θ in state n ≥ 1; π by the ratios, cut where they are below 1e-18.
    """
    mu, theta = 1.0 / service, 1.0 / mean_patience
    weights = [1.0]
    n = 0
    while weights[-1] > 1e-18 * max(weights):
        n += 1
        weights.append(weights[-1] * offered / (mu + (n - 1) * theta))
    probability = np.array(weights) / math.fsum(weights)
    waiting = float(probability @ np.maximum(np.arange(len(weights)) - 1, 0))
    return theta * waiting / offered, waiting


@pytest.mark.parametrize("engine", ["kernel", "reference"])
def test_erlang_a(engine: Any) -> None:
    """One at a time, T ≡ 0.02 s, geometric outputs of mean 50: M/M/1+M in the limit of short iterations.

    λ = 1.2/s, service 1 s, patience 2 s on average; overloaded without it. Service is geometric, so its cv² is
    1 - 1/50: with the arrivals that must wait for an iteration's end the bias is taken as 2 %. Fixed seed; two t
    intervals at 10⁻⁴ each.
    """
    lam, tick, mean = 1.2, 0.02, 50
    from fluidsched import lengths

    kind = RequestType(
        "one", lam, prompt_tokens=1, output_tokens=lengths.geometric(mean=mean, maximum=2000),
        patience=patience.exponential(2.0),
    )  # fmt: skip
    server = Server(INF, IterationTime.affine(tick, 0.0, 0.0, 0.0))
    horizon = 4000.0 if engine == "kernel" else 800.0
    runs = simulate(
        Workload([kind]), server, ONE_AT_A_TIME, horizon=horizon, warmup=50.0, replications=12, seed=5,
        engine=engine,
    )  # fmt: skip
    share, waiting = erlang_a(lam, tick * mean, 2.0)
    measured = runs.measures("capped")
    arrived = [np.count_nonzero(path.arrival_s >= 50.0) for path in runs.paths]
    for values, expected in ((measured["abandoned"] / arrived, share), (measured["mean_waiting"], waiting)):
        half = stdtrit(11, 1 - 0.5e-4) * values.std(ddof=1) / math.sqrt(12)
        assert abs(values.mean() - expected) <= half + 0.02 * expected
        assert half < 0.25 * expected


def test_deterministic_patience_and_the_workload_equation() -> None:
    """o = 1, one at a time, T ≡ 1, patience τ: who finds more unfinished work than τ leaves (M/D/1 + D).

    With fixed patience a request abandons exactly if the virtual wait at its arrival, of those who will be
    served, is at least τ; the recursion over arrivals is an independent witness, request by request.
    """
    rng = np.random.default_rng(4)
    arrival = np.cumsum(rng.exponential(0.8, 4000))
    tau = 2.7
    path = ArrivalPath.from_arrays(arrival, np.ones(4000), np.ones(4000), patience_s=np.full(4000, tau))
    run = simulate(path, Server(INF, IterationTime.affine(1.0, 0, 0, 0)), ONE_AT_A_TIME).run("capped")
    free = 0.0
    abandons = np.zeros(4000, dtype=bool)
    for i, at in enumerate(arrival):
        start = max(free, at)
        abandons[i] = start >= at + tau
        if not abandons[i]:
            free = start + 1.0
    assert 0.1 < abandons.mean() < 0.4
    np.testing.assert_array_equal(run.status == STATUSES.index("abandoned"), abandons)
    assert_allclose(run.left_s[abandons], arrival[abandons] + tau)


def test_runs_without_records_refuse_leavers() -> None:
    """Runs in pieces know no deadlines: types, columns and timeouts are named."""
    kind = RequestType("one", 1.0, 1, 1, patience=1.0)
    with pytest.raises(InputError, match="patience of type 'one' must be None for runs without records"):
        simulate(Workload([kind]), server_of(), engine_table(), horizon=9.0, records=False)
    plain = Workload([RequestType("one", 1.0, 1, 1)])
    with pytest.raises(InputError, match=r"server\.total_timeout must be None"):
        simulate(plain, server_of(total_timeout=1.0), engine_table(), horizon=9.0, records=False)


@pytest.mark.parametrize(
    "table",
    [
        engine_table("capped", max_in_service=1, order="shortest_first", predictor="exact"),
        engine_table("capped", max_in_service=1, lookahead=Lookahead("known"), predictor="exact"),
    ],
    ids=["order by length", "look-ahead"],
)
@pytest.mark.parametrize("engine", ["kernel", "reference"])
def test_leavers_are_passed_over_where_lengths_decide(
    engine: Literal["kernel", "reference"], table: PolicyTable
) -> None:
    """One at a time, 2 s each, and the second is gone after 1 s, so the third begins when the first ends."""
    path = ArrivalPath.from_arrays([0.0] * 3, [1] * 3, [2] * 3, patience_s=[INF, 1.0, INF])
    run = simulate(path, server_of(), table, engine=engine).run(table.name)
    assert words(run) == ["finished", "abandoned", "finished"]
    assert run.left_s.tolist() == [2.0, 1.0, 4.0]
