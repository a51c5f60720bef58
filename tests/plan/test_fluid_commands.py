"""`fluidsched solve` in its forms, `region`, `transient`: the library's answers, and statuses where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import fluidsched as fs
from fluidsched.cli import app
from fluidsched.fluid import Pool, ranging, solve_pools, sweep_load

TYPES = [fs.RequestType("chat", 3.0, 500, 100), fs.RequestType("long", 1.0, 4000, 100)]
WORKLOAD = fs.Workload(TYPES)
SERVER = fs.catalog.server("a100-80gb", "llama-2-7b")


@pytest.fixture
def spec(tmp_path: Path) -> str:
    """Two types as a spec file."""
    path = tmp_path / "two.json"
    path.write_text(json.dumps(WORKLOAD.to_dict()))
    return str(path)


def answer(*arguments: str) -> dict[str, Any]:
    """The JSON document of a command that succeeds."""
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_floors_rewards_target_and_chunk_reach_the_program(spec: str) -> None:
    """Admitted rates and value are `solve_fluid`'s with the same arguments, and each option changes them."""
    workload = WORKLOAD.at_load(2.0, SERVER)
    asked = ["solve", "-w", spec, "--load", "2"]
    limited = [*asked, "--floor", "0.1", "--floor", "long=0.3", "--itl-target", "0.05", "--chunk", "128"]
    want = fs.solve_fluid(
        workload,
        SERVER,
        [1.0, 30.0],
        fairness_floor=[0.1, 0.3],
        max_iteration_time=0.05,
        chunk_tokens=128,
    )
    rewarded = answer(*limited, "--reward", "1", "--reward", "long=30")
    assert rewarded["admitted_rate"] == pytest.approx(want.admitted_rate.tolist(), rel=1e-9)
    others = [answer(*asked), answer(*limited)]
    assert all(abs(other["admitted_rate"][1] - want.admitted_rate[1]) > 1e-3 for other in others)


@pytest.mark.parametrize("alpha", ["0", "1", "inf"])
def test_fair_shares(spec: str, alpha: str) -> None:
    """`--alpha` is `solve_fair`, from the largest total to max-min."""
    found = answer("solve", "-w", spec, "--load", "2", "--alpha", alpha)
    want = fs.solve_fair(WORKLOAD.at_load(2.0, SERVER), SERVER, float(alpha))
    assert found["admitted_rate"] == pytest.approx(want.admitted_rate.tolist(), rel=1e-9)


def test_ranging_and_sweep(spec: str) -> None:
    """The ranges and the exact breakpoints of the library."""
    workload = WORKLOAD.at_load(1.5, SERVER)
    found = answer("solve", "-w", spec, "--load", "1.5", "--ranging")
    want = ranging(fs.solve_fluid(workload, SERVER))
    assert [row["type"] for row in found["types"]] == ["chat", "long"]
    assert [float(row["reward_low"]) for row in found["types"]] == pytest.approx(want.reward_low.tolist())
    sweep = answer("solve", "-w", spec, "--sweep-to", "9")
    exact = sweep_load(fs.FluidProgram(WORKLOAD, SERVER), 9.0)
    assert sweep["parameter"] == pytest.approx(exact.parameter.tolist())
    assert len(sweep["parameter"]) > 3


def test_disaggregated_pools(spec: str) -> None:
    """Prefill and decode pools of one kind of server get the routing of `solve_pools`."""
    one, other = (fs.catalog.server(gpu, "llama-2-7b") for gpu in ("h100", "a100"))
    found = answer("solve", "-w", spec, "--pool", "h100=0.05@prefill", "--pool", "a100=0.1@decode")
    want = solve_pools(WORKLOAD, [Pool(one, 0.05, "prefill"), Pool(other, 0.1, "decode")])
    assert not want.is_stable
    assert found["admitted_rate"] == pytest.approx(want.admitted_rate.tolist(), rel=1e-6)
    twice = answer("solve", "-w", spec, "--pool", "a100=1", "--pool", "a100=2")
    assert len({pool["pool"] for pool in twice["pools"]}) == 2


@pytest.mark.parametrize("ending", [".lp", ".mps"])
def test_exported_program_has_the_optimum(spec: str, tmp_path: Path, ending: str) -> None:
    """Witness: HiGHS reads the file back and reaches the value of the command."""
    import highspy

    path = tmp_path / f"program{ending}"
    found = answer("solve", "-w", spec, "--load", "1.5", "--export", str(path))
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.readModel(str(path))
    highs.run()
    assert abs(highs.getObjectiveValue()) == pytest.approx(sum(found["admitted_rate"]), rel=1e-6)
    again = CliRunner().invoke(app, ["solve", "-w", spec, "--load", "1.5", "--export", str(path)])
    assert again.exit_code == 2


def test_exported_frames_name_rows_and_columns(spec: str, tmp_path: Path) -> None:
    path = tmp_path / "program.json"
    answer("solve", "-w", spec, "--load", "1.5", "--export", str(path))
    program = json.loads(path.read_text())
    assert len(program["columns"]) == 3
    assert any("kv" in str(row.values()) for row in program["rows"])


def test_region(spec: str) -> None:
    """Load, critical rate, distance and outline agree with each other and with the library."""
    found = answer("region", "-w", spec, "--load", "0.9", "--boundary", "chat", "long")
    assert max(found["load"].values()) == pytest.approx(0.9)
    assert found["critical_rate"] == pytest.approx(sum(found["arrival_rate"]) / 0.9)
    slack = 1.0 - np.array(found["normals_s"]) @ found["arrival_rate"]
    assert found["distance"] == pytest.approx((slack / np.linalg.norm(found["normals_s"], axis=1)).min())
    loads = np.array(found["boundary"]["vertices"]) @ np.array(found["normals_s"]).T
    assert loads.max(axis=1) == pytest.approx(1.0)
    assert len(found["conditions"]) == 3


def test_transient_follows_the_embedded_profile() -> None:
    """Twelve periods with the trace's mean rate; the backlog balances arrivals and admissions."""
    found = answer("transient", "--scale", "1.5")
    rates = np.array(found["arrival_rate"])
    lengths = [300.0] * 11 + [201.721937]
    mean = np.average(rates.sum(axis=1), weights=lengths)
    assert mean == pytest.approx(1.5 * fs.workloads.azure_conv().total_arrival_rate, rel=1e-6)
    change = np.diff(np.array(found["backlog"]), axis=0)
    assert change == pytest.approx(300.0 * (rates - np.array(found["admitted_rate"])), abs=1e-4)
    assert max(map(sum, found["backlog"])) > 100.0


def test_transient_day_chooses_replicas(spec: str) -> None:
    """A day of periods; the replicas' growth keeps its ramp."""
    found = answer(
        *("transient", "-w", spec, "--day", "0.8", "--step", "1800", "--scale", "9", "--replicas", "9"),
        *("--min-replicas", "0.1", "--replica-cost", "5", "--ramp-up", "0.0002", "--holding-cost", "long=2"),
    )
    replicas = np.array(found["replicas"])
    assert len(replicas) == 48
    assert np.ptp(replicas) > 0.1
    assert np.diff(replicas).max() <= 0.0002 * 1800 + 1e-6


@pytest.mark.parametrize(
    ("options", "status", "named"),
    [
        (["solve", "--floor", "1", "--load", "2"], 1, "floor"),
        (["solve", "--itl-target", "0.0001"], 1, "empty iteration"),
        (["solve", "--alpha", "1", "--ranging"], 2, "--ranging"),
        (["solve", "--reward", "chat=1"], 2, "--reward"),
        (["solve", "--floor", "x"], 2, "--floor"),
        (["solve", "--pool", "a100"], 2, "--pool"),
        (["solve", "--pool", "a100=1@sideways"], 2, "sideways"),
        (["solve", "--pool", "a100=1@prefill"], 2, "decode"),
        (["solve", "--export", "program.xls"], 2, "--export"),
        (["region", "--boundary", "one", "two"], 2, "one"),
        (["transient", "--step", "60"], 2, "--step"),
        (["transient", "--replicas", "1", "--min-replicas", "2"], 2, "min_replicas"),
    ],
)
def test_what_cannot_be_answered_says_why(options: list[str], status: int, named: str) -> None:
    """Exit status 1 where no answer exists, 2 where the input is wrong; the message names the culprit."""
    done = CliRunner().invoke(app, options)
    assert done.exit_code == status, done.output
    assert named in done.output
