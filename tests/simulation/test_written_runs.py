"""Runs written out: requests, occupancy and the timeline for trace viewers."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from simulation_cases import MIXED, engine_table, path_of, server_of

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.simulation import SimulationResult, simulate

COLUMNS = [
    "arrival_s", "prompt_tokens", "output_tokens", "type", "admitted_s", "first_token_s", "finish_s",
    "preemptions", "status",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs() -> SimulationResult:
    """Twenty tokens of memory for requests of up to twelve: preemptions, waiting, an unfinished rest."""
    rng = np.random.default_rng(1)
    path = fs.ArrivalPath.from_arrays(
        np.sort(rng.uniform(0, 20, 60)), rng.integers(1, 6, 60), rng.integers(1, 7, 60), horizon=40.0
    )
    return simulate(path, server_of(20, MIXED), engine_table(), warmup=0.0)


def nested(trace: dict) -> None:
    """Every event has its keys; asynchronous slices of an id nest; iterations do not overlap; times are sorted."""
    assert json.loads(json.dumps(trace, allow_nan=False)) == trace
    stacks: dict[int, list[str]] = {}
    busy_until = before = 0.0
    for event in trace["traceEvents"]:
        assert {"name", "ph", "ts", "pid", "tid"} <= event.keys()
        assert event["ts"] >= before or event["ph"] == "M"
        before = event["ts"]
        if event["ph"] in "be":
            assert {"cat", "id"} <= event.keys()  # by both of which viewers join begin and end
        if event["ph"] == "b":
            stacks.setdefault(event["id"], []).append(event["name"])
            assert len(stacks[event["id"]]) <= 2
        elif event["ph"] == "e":
            assert stacks[event["id"]].pop() == event["name"]
        elif event["ph"] == "X":
            assert event["ts"] >= busy_until - 1e-2  # microseconds, rounded to a thousandth
            busy_until = event["ts"] + event["dur"]
        elif event["ph"] == "C":  # a series per argument, and numbers only
            assert all(isinstance(value, (int, float)) for value in event["args"].values())
        else:
            assert (event["ph"], event["name"], [*event["args"]]) == ("M", "process_name", ["name"])
    assert not any(stacks.values())


def test_the_timeline_is_valid_and_nests(runs):
    trace = runs.chrome_trace("vllm")
    nested(trace)
    run = runs.run("vllm")
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(slices) >= run.iterations
    assert sum(
        event["args"]["prefill_tokens"] + event["args"]["decode_tokens"] for event in slices[: run.iterations]
    ) == (run.batch_token_sum)
    assert sum(len(event["args"]["preempted"]) for event in slices) == run.preempted > 0
    ends = {event["id"]: event["ts"] for event in trace["traceEvents"] if event["ph"] == "e"}
    assert_allclose(
        [ends[i] for i in range(60)], 1e6 * np.where(np.isnan(run.finish_s), run.end_s, run.finish_s)
    )


def test_phases_are_the_records_by_hand():
    """Admitted at 0 and 2, first tokens at 2 and 4: phases meet end to end."""
    runs = simulate(path_of((0.0, 4, 3), (0.5, 2, 1)), server_of(40, MIXED), engine_table())
    events = [
        e
        for e in runs.chrome_trace("vllm", iterations=False)["traceEvents"]
        if e["ph"] in "be" and e["id"] == 1
    ]
    assert [(e["name"], e["ph"], e["ts"]) for e in events] == [
        ("request 1", "b", 0.5e6), ("waiting", "b", 0.5e6), ("waiting", "e", 2e6), ("prefill", "b", 2e6),
        ("prefill", "e", 4e6), ("request 1", "e", 4e6),
    ]  # fmt: skip


def test_a_window_clips_what_reaches_beyond(runs):
    trace = runs.chrome_trace("vllm", start=5.0, stop=10.0)
    nested(trace)
    times = [event["ts"] for event in trace["traceEvents"] if event["ph"] != "M"]
    assert 5e6 <= min(times) <= max(times) <= 10e6
    run, path = runs.run("vllm"), runs.paths[0]
    here = (path.arrival_s < 10.0) & ~(run.finish_s <= 5.0)
    assert {e["id"] for e in trace["traceEvents"] if e["ph"] == "b"} == set(np.flatnonzero(here).tolist())


def test_the_number_of_events_is_bounded_and_the_end_shown_is_said(runs):
    trace = runs.chrome_trace("vllm", events=200)
    nested(trace)
    counters = sum(event["ph"] in "CM" for event in trace["traceEvents"])
    assert len(trace["traceEvents"]) - counters <= 200
    assert trace["otherData"]["shown_until_s"] < trace["otherData"]["run_end_s"]


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    """Equal columns; words may be stored as categories or strings."""
    for name in COLUMNS:
        if name in ("type", "status"):
            assert one[name].astype(str).tolist() == other[name].astype(str).tolist()
        else:
            np.testing.assert_array_equal(one[name].to_numpy(), other[name].to_numpy())


def test_requests_out_have_the_columns_of_the_contract(runs, tmp_path):
    """CSV and Parquet give back the frame; another suffix is refused."""
    frame = runs.requests("vllm")
    runs.write_requests(tmp_path / "requests.csv", "vllm")
    back = pd.read_csv(tmp_path / "requests.csv")
    assert list(back.columns) == COLUMNS
    same(back, frame)
    with pytest.raises(InputError, match=r"\.csv or \.parquet"):
        runs.write_requests(tmp_path / "requests.json", "vllm")
    pytest.importorskip("pyarrow")
    runs.write_requests(tmp_path / "requests.parquet", "vllm")
    stored = pd.read_parquet(tmp_path / "requests.parquet")
    assert list(stored.columns) == COLUMNS
    same(stored, frame)


def test_occupancy_frame(runs):
    frame = runs.occupancy_frame("vllm")
    assert list(frame.columns) == ["time_s", "kv_tokens", "residents", "waiting"]
    assert (frame.kv_tokens <= 20).all()
    assert len(frame) <= 1024
