"""`fluidsched simulate --records`: what ran, as files other tools read."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from test_cli import fluidsched


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.csv"
    rows = "\n".join(f"{0.1 * i:.1f},{10 + i % 7},{3 + i % 5}" for i in range(50))
    file.write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}\n")
    return file


def test_records_of_every_policy(tmp_path: Path, trace: Path) -> None:
    """One file of requests, one of occupancy and one timeline per policy; a directory in use is refused first."""
    import fluidsched as fs

    server = tmp_path / "server.json"
    fs.Server(400, fs.IterationTime.affine(0.05, 1e-4, 1e-3, 1e-5)).to_json(server)
    command = (
        "simulate",
        "vllm",
        "sarathi",
        "-w",
        str(trace),
        "--replay",
        "--server",
        str(server),
        "--quiet",
    )
    done = fluidsched(*command, "--records", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        f"{policy}.{kind}"
        for policy in ("sarathi", "vllm")
        for kind in ("occupancy.csv", "requests.csv", "trace.json")
    ]
    frame = pd.read_csv(tmp_path / "out" / "vllm.requests.csv")
    assert (frame.status == "finished").all()
    assert len(frame) == 50
    timeline = json.loads((tmp_path / "out" / "vllm.trace.json").read_text())
    assert (
        sum(event["ph"] == "b" and event["name"].startswith("request") for event in timeline["traceEvents"])
        == 50
    )
    again = fluidsched(*command, "--records", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert "--records" in again.stderr
