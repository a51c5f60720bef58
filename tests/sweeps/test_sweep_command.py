"""`fluidsched sweep`: its answers, its exit statuses, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from sweep_processes import Start

SPEC = """
seed = 3
[base]
seconds = 0.01
[grid]
x = [1, 2, 3, 4, 5, 6, 7, 8]
y = ["a", "b"]
"""

REAL = """
[base]
workload = "azure_conv"
horizon = 20
warmup = 5
replications = 2
[base.server]
gpu = "a100-80gb"
model = "llama-2-7b"
[grid]
workload.load = [0.3, 0.6]
policy = ["vllm", {kind = "capped", overflow_probability = 0.05}]
server.max_batch_size = [64, 256]
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.toml"
    path.write_text(SPEC)
    return path


OWN = ("--function", "sweep_cells:draw")


def command(start: Start, *arguments: object) -> tuple[int, str, str]:
    process = start("-m", "fluidsched", "sweep", *arguments)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def test_sweep_answers_for_people_and_programs(start: Start, spec: Path, tmp_path: Path) -> None:
    status, output, errors = command(start, *OWN, spec, "--out", tmp_path / "o", "--format", "csv")
    assert (status, errors) == (0, "")
    assert output == f"<SweepResult 'sweep': 16 cells, in {tmp_path / 'o' / 'cells.csv'}>\n"
    status, output, _ = command(
        start, *OWN, spec, "-o", tmp_path / "o", "--format", "csv", "--json", "--workers", 2
    )
    assert status == 0
    assert json.loads(output) == {"table": str(tmp_path / "o" / "cells.csv"), "cells": 16, "failed": 0}


def test_simulations_from_toml(start: Start, tmp_path: Path) -> None:
    (tmp_path / "real.toml").write_text(REAL)
    status, _, errors = command(start, tmp_path / "real.toml", "-o", tmp_path / "o", "--format", "csv")
    assert status == 0, errors
    lines = (tmp_path / "o" / "cells.csv").read_text().splitlines()
    assert len(lines) == 9
    assert lines[0].startswith(
        "cell,workload.load,policy,server.max_batch_size,status,diagnosis,offered_rate,"
    )
    assert all(",done,," in line for line in lines[1:])


def test_dask_cluster_by_address(start: Start, spec: Path, tmp_path: Path, dask_address: str) -> None:
    status, _, errors = command(
        start, *OWN, spec, "-o", tmp_path / "d", "--dask", dask_address, "--format", "csv"
    )
    assert status == 0, errors
    assert command(start, *OWN, spec, "-o", tmp_path / "here", "--format", "csv")[0] == 0
    assert (tmp_path / "d" / "cells.csv").read_bytes() == (tmp_path / "here" / "cells.csv").read_bytes()


def test_wrong_input_is_status_2(start: Start, spec: Path, tmp_path: Path) -> None:
    status, _, errors = command(start, tmp_path / "none.toml", "-o", tmp_path / "o")
    assert (status, "must name an existing file" in errors) == (2, True)
    status, _, errors = command(
        start, *OWN, spec, "-o", tmp_path / "o", "--workers", 1, "--dask", "tcp://x:1"
    )
    assert (status, "--workers must be left out with --dask" in errors) == (2, True)
    status, _, errors = command(start, *OWN, spec, "-o", tmp_path / "o", "--format", "xlsx")
    assert (status, "format must be" in errors) == (2, True)


def test_a_scheduler_that_does_not_answer_is_status_2(start: Start, spec: Path, tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="needs the extra dask")
    status, _, errors = command(start, *OWN, spec, "-o", tmp_path / "o", "--dask", "tcp://127.0.0.1:9")
    assert status == 2
    assert "--dask must be the address of a Dask scheduler that answers" in errors


def test_a_sweep_without_one_good_cell_is_status_1(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[grid]\nz = [1, 2]\n")
    status, output, errors = command(start, *OWN, path, "-o", tmp_path / "o", "--format", "csv")
    assert status == 1
    assert "2 cells, 2 failed" in output
    assert "--retry-failed" in errors
    assert "KeyError: 'x'" in (tmp_path / "o" / "cells.csv").read_text()


def test_interrupt_is_status_130_and_says_how_to_go_on(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "slow.toml"
    path.write_text(SPEC.replace("0.01", "0.3"))
    process = start(
        "-m", "fluidsched", "sweep", *OWN, path, "-o", tmp_path / "o", "--workers", 2, start_new_session=True
    )
    journal = tmp_path / "o" / "journal.txt"
    deadline = time.monotonic() + 60
    while not journal.exists() or b" done " not in journal.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.endswith(f"the same command goes on in {tmp_path / 'o'} with the rest.\n")
    assert command(start, *OWN, path, "-o", tmp_path / "o", "--format", "csv")[0] == 0
