"""Plans for more than a server carries: whom to turn away, and the table that serves the others."""

from __future__ import annotations

import json

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.overload import Admission, offer

WORKLOAD = fs.Workload([fs.RequestType("short", 2.0, 50, 10), fs.RequestType("long", 1.0, 200, 80)])
SERVER = fs.Server(40_000, fs.IterationTime.affine(0.02, 1e-5, 2e-4, 1e-7))


@pytest.fixture(scope="module")
def result() -> fs.planning.Plan:
    return fs.plan(WORKLOAD, SERVER, load=1.5, horizon=900.0, replications=6, curve=False)


def test_the_table_recommended_is_one_for_whom_the_door_lets_in(result: fs.planning.Plan) -> None:
    """Its rows have the rates the door lets in: the optimum's, times the share its certificate states."""
    found = result.admission
    assert isinstance(found, Admission)
    assert result.recommended == found.table.name in ("capped", "gated", "wait")
    assert not result.missing
    np.testing.assert_allclose(found.admitted_rate, found.share * np.asarray(result.fluid.admitted_rate))
    assert sum(row.admitted_rate for row in found.table.types) == pytest.approx(found.admitted_rate.sum())
    assert found.turned_away == pytest.approx(result.workload.total_arrival_rate - found.admitted_rate.sum())


def test_behind_the_door_nothing_is_left_over_and_before_it_much(result: fs.planning.Plan) -> None:
    """The stream let in is carried whole; the offered one leaves its excess behind, whatever the table."""
    found = result.admission
    assert found is not None
    name, let_in = found.table.name, float(found.admitted_rate.sum())
    carried = found.runs.measures(name)["request_throughput"]
    assert np.mean(carried) == pytest.approx(let_in, abs=5 * np.sqrt(let_in / 750.0 / 6))  # 5 sd of arrivals
    assert not found.runs.outcome(name).lower_bounds["p99_ttft"].any()
    assert result.runs.outcome(name).lower_bounds["p99_ttft"].all()


def test_text_page_and_summary_say_whom_to_turn_away(result: fs.planning.Plan) -> None:
    found = result.admission
    assert found is not None
    text, page = repr(result), fs.report(result)
    for shown in (text, page):
        assert "Whom to turn away" in shown
        assert "let in [req/s]" in shown
        assert "Turn away" in shown
    written = json.loads(json.dumps(result.to_dict()))["admission"]
    assert written["table"] == result.recommended
    assert [row["admitted_fraction"] for row in written["types"]] == pytest.approx(found.admitted_fraction)


def test_of_two_tables_the_one_that_carries_more_is_offered() -> None:
    """Half the admitted rates against nearly all: the difference is beyond the 1 % that counts as none."""
    fluid = fs.solve_fluid(WORKLOAD.at_load(1.5, SERVER), SERVER)
    little = fs.compile_policy(fluid, "capped", admitted_share=0.5).renamed("little")
    most = fs.compile_policy(fluid, "gated", admitted_share="auto")
    paths = [fluid.workload.sample(600.0, seed=k) for k in range(3)]
    found = offer(fluid, [little, most, fs.baselines.vllm()], paths, seed=1, horizon=600.0)
    assert found is not None
    assert found.table.name == "gated"
    assert offer(fluid, [most], paths, seed=1, horizon=600.0, targets={"mean_ttft": 1e-6}) is None
    assert offer(fluid, [fs.baselines.vllm()], paths, seed=1, horizon=600.0) is None


def test_where_everything_fits_nobody_is_turned_away() -> None:
    result = fs.plan(WORKLOAD, SERVER, load=0.5, horizon=120.0, replications=2, curve=False)
    assert result.admission is None
    assert result.to_dict()["admission"] is None
    assert "turn away" not in repr(result)


def test_a_replay_in_overload_thins_the_trace_itself() -> None:
    """The door lets in requests of the recorded path, each with the fraction of its type."""
    path = WORKLOAD.at_load(1.6, SERVER).sample(600.0, seed=2)
    recorded = fs.ArrivalPath.from_arrays(path.arrival_s, path.prompt_tokens, path.output_tokens)
    result = fs.plan(recorded, SERVER, replay=True, curve=False)
    found = result.admission
    assert found is not None
    count = len(found.runs.paths[0])
    expected = float(found.admitted_fraction @ found.offered_rate) * path.duration
    assert count == pytest.approx(expected, abs=5 * np.sqrt(expected))
    assert set(found.runs.paths[0].arrival_s) <= set(path.arrival_s)
