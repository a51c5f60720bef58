"""Replaying the real traces whole: every recorded request is accounted for under every policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.planning import CURVE_LOADS

TRACES = {"AzureLLMInferenceTrace_conv.csv": 19_366, "AzureLLMInferenceTrace_code.csv": 8_819}


@pytest.mark.data
@pytest.mark.parametrize(("name", "requests"), TRACES.items(), ids=["conv", "code"])
def test_replay_accounts_for_every_request(data_root: Path, tmp_path: Path, name: str, requests: int) -> None:
    """Engines finish all; literal WAIT may end stuck, and then says which types starve and leaves the rest finished."""
    path = fs.read_trace(data_root / "traces" / name)
    assert len(path) == requests
    result = fs.plan(path, replay=True, curve=False)
    rows = {row["policy"]: row for row in result.runs.to_serve_summary()}
    assert {"vllm", "sarathi"} <= set(rows)
    for policy, row in rows.items():
        assert row["completed"] + row["unfinished"] + row["failed"] == requests
        outcome = result.runs.outcome(policy)
        if outcome.verdicts == ("finished",):
            assert row["completed"] == requests
            assert not outcome.starved_types
        else:
            assert policy == "wait"
            assert outcome.verdicts == ("stuck",)
            assert outcome.starved_types
            assert 0 < row["unfinished"] < 0.01 * requests
    written = result.write(tmp_path / "replay")
    assert {p.name for p in written.glob("*.png")} == {"kv_occupancy.png", "latency.png"}


@pytest.mark.data
def test_replay_of_the_conversation_hour_near_its_boundary(data_root: Path) -> None:
    """At 0.95 of the boundary the cap prevents nearly all preemptions of the stock rule, on the trace's own order."""
    path = fs.read_trace(data_root / "traces" / "AzureLLMInferenceTrace_conv.csv")
    result = fs.plan(path, replay=True, curve=False)
    assert float(result.fluid.load.max()) == pytest.approx(5.530 / 5.827, rel=1e-3)
    preemptions = {name: result.runs.measures(name)["preemptions"][0] for name in ("capped", "vllm")}
    assert preemptions["capped"] < 0.1 * preemptions["vllm"]
    assert result.recommended == "capped"
    assert "keep up" not in result.recommendation.reason  # the replay ends when all are served, at any load


def test_other_loads_and_intervals_of_a_replay_come_from_its_pieces() -> None:
    """Arrivals forty at a time: at every load they still come so, which Poisson arrivals of the same types do not."""
    server = fs.Server(20_000, fs.IterationTime.affine(0.02, 1e-5, 1e-5, 1e-7), max_batch_size=16)
    arrivals = np.repeat(np.arange(0.0, 304.0, 16.0), 40)
    path = fs.ArrivalPath.from_arrays(arrivals, np.full(760, 100), 40 + np.arange(760) % 21, horizon=304.0)
    result = fs.plan(path, server, replay=True, replications=4)
    assert result.runs.replications == 1
    assert result.curve is not None
    load = float(result.fluid.load.max())
    assert sorted(set(result.curve["load"])) == pytest.approx(sorted({*CURVE_LOADS, load}))
    reach = result.recommendation.reach
    assert ("more than one server carries for long" in result.recommendation.reason) is (reach.fails <= load)
    offered = result.curve[result.curve["measure"] == "request_throughput"]
    assert (offered["replications"] == 4).all()
    gains = [gain for gain in result.recommendation.gains if gain.load == load]
    assert gains
    assert all(gain.verdict != "one run" for gain in gains)
    page = fs.report(result)
    assert "replayed once, whole. Gains and other loads: 4 paths made of pieces of the recorded one" in page
    low = result.curve[(result.curve["load"] == 0.5) & (result.curve["measure"] == "mean_ttft")]
    sampled = fs.plan(path, server, load=0.5, replications=4, horizon=304.0, curve=False)
    plain = float(np.mean(sampled.runs.measures("vllm")["mean_ttft"]))
    assert float(low[low["policy"] == "vllm"]["estimate"].iloc[0]) > 1.5 * plain
    assert "Whom to turn away" not in page
