"""Replaying the real traces whole: every recorded request is accounted for under every policy."""

from __future__ import annotations

from pathlib import Path

import pytest

import fluidsched as fs

TRACES = {"AzureLLMInferenceTrace_conv.csv": 19_366, "AzureLLMInferenceTrace_code.csv": 8_819}


@pytest.mark.data
@pytest.mark.parametrize(("name", "requests"), TRACES.items(), ids=["conv", "code"])
def test_replay_accounts_for_every_request(data_root: Path, tmp_path: Path, name: str, requests: int) -> None:
    """Engines finish all; literal WAIT may end stuck, and then says which types starve and leaves the rest finished."""
    path = fs.read_trace(data_root / "traces" / name)
    assert len(path) == requests
    result = fs.plan(path, replay=True)
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
    result = fs.plan(path, replay=True)
    assert float(result.fluid.load.max()) == pytest.approx(5.530 / 5.827, rel=1e-3)
    preemptions = {name: result.runs.measures(name)["preemptions"][0] for name in ("capped", "vllm")}
    assert preemptions["capped"] < 0.1 * preemptions["vllm"]
    assert result.recommended == "capped"
