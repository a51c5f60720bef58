"""The plan as an object: what it answers, how it recommends, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import fluidsched as fs
from fluidsched import planning
from fluidsched.errors import InputError


@pytest.fixture(scope="module")
def result() -> planning.Plan:
    """The default question over a short time, load curve included."""
    return fs.plan(horizon=120.0, warmup=20.0, replications=4)


def test_default_is_08_of_the_boundary(result: planning.Plan) -> None:
    assert float(result.fluid.load.max()) == pytest.approx(0.8, rel=1e-12)
    assert result.fluid.critical_rate == pytest.approx(
        5.83, abs=0.005
    )  # theory: two-piece fit, aiconfigurator


def test_a_sixth_of_the_horizon_is_warm_up_unless_said() -> None:
    quick = fs.plan(horizon=90.0, replications=1, curve=False)
    assert quick.settings["warmup_s"] == 15.0


def test_latencies_in_a_sentence_have_no_exponents() -> None:
    assert [planning._seconds(x) for x in (0.1544, 7.338, 3056.6)] == ["0.154 s", "7.34 s", "3,057 s"]


def test_all_five_policies_are_compared_on_common_paths(result: planning.Plan) -> None:
    assert [table.name for table in result.tables] == ["wait", "gated", "capped", "vllm", "sarathi"]
    assert result.comparison.baseline == "vllm"
    assert result.runs.policies == tuple(table.name for table in result.tables)


def test_the_curve_holds_the_same_tables_at_every_load(result: planning.Plan) -> None:
    """Every policy has a point at every load, the present one among them, which is the comparison's own."""
    assert result.curve is not None
    expected = [*({*planning.CURVE_LOADS} - {0.8}), float(result.fluid.load.max())]
    for name, rows in result.curve.groupby("policy"):
        assert sorted(set(rows["load"])) == pytest.approx(sorted(expected)), name
    now = result.curve[np.isclose(result.curve["load"], 0.8) & (result.curve["measure"] == "mean_ttft")]
    for name, estimate in zip(now["policy"], now["estimate"], strict=True):
        assert estimate == pytest.approx(result.comparison.row(name, "mean_ttft").estimate)


def test_the_same_seed_gives_the_same_plan(result: planning.Plan) -> None:
    again = fs.plan(horizon=120.0, warmup=20.0, replications=4)
    assert again.to_dict() == result.to_dict()


def test_a_missing_table_has_its_reason_and_reach() -> None:
    """Just below the boundary no compiled table exists; the plan says why, how far one reaches, and goes on."""
    server = fs.catalog.server("a100-80gb", "llama-2-7b")
    tables, missing = planning.policy_tables(
        fs.solve_fluid(fs.workloads.azure_conv().at_load(0.999, server), server)
    )
    assert [table.name for table in tables] == ["vllm", "sarathi"]
    assert set(missing) == {"wait", "gated", "capped"}
    assert all("One exists up to" in reason or "carries" in reason for reason in missing.values())


def test_beyond_the_boundary_tables_are_compiled_a_little_inside_what_is_admitted() -> None:
    fluid = fs.solve_fluid(
        fs.workloads.azure_conv().at_load(1.2, server := fs.catalog.server("a100-80gb", "llama-2-7b")), server
    )
    tables, missing = planning.policy_tables(fluid)
    assert [table.name for table in tables] == ["wait", "gated", "capped", "vllm", "sarathi"]
    assert not missing
    for table in tables[:3]:
        assert 0.85 < table.certified("admitted_share") < 1.0


@pytest.mark.parametrize("kind", ["wait", "gated"])
def test_typed_tables_take_the_number_of_types_with_the_lowest_certified_ttft(kind: str) -> None:
    server = fs.catalog.server("a100-80gb", "llama-2-7b")
    workload = fs.workloads.azure_conv().at_load(0.7, server)
    tables, _ = planning.policy_tables(fs.solve_fluid(workload, server))
    certified = []
    for types in (1, 3, 12):
        fluid = fs.solve_fluid(workload.merged(types), server)
        certified.append(fs.compile_policy(fluid, kind).certificate["ttft"]["value"])
    table = next(table for table in tables if table.kind == kind)
    assert table.certificate["ttft"]["value"] == min(certified)


def test_the_workloads_own_types_are_tried_too() -> None:
    """Types with priorities do not merge into one; the table then has them all."""
    server = fs.catalog.server("a100-80gb", "llama-2-7b")
    types = [fs.RequestType(n, 1.0, 100, 50, priority=k) for k, n in enumerate("ab")]
    tables, missing = planning.policy_tables(fs.solve_fluid(fs.Workload(types), server))
    assert not missing
    assert [len(table.types) for table in tables if table.kind in planning.TYPED_KINDS] == [2, 2]


def test_a_server_without_limits_has_every_table() -> None:
    """Nothing bounds the slack there, so the plan chooses one."""
    server = fs.Server(math.inf, fs.IterationTime.affine(0.01, 1e-5, 1e-5, 1e-7))
    workload = fs.Workload([fs.RequestType("chat", 2.0, 100, 50)])
    tables, missing = planning.policy_tables(fs.solve_fluid(workload, server))
    assert [table.name for table in tables] == ["wait", "gated", "capped", "vllm", "sarathi"], missing


def test_runs_without_a_request_are_said_to_tell_nothing(tmp_path: Path) -> None:
    workload = fs.Workload([fs.RequestType("rare", 1e-6, 100, 50)])
    result = fs.plan(workload, horizon=10.0, replications=2, curve=False)
    assert "longer horizon" in result.recommendation.reason
    written = result.write(tmp_path / "rare")  # pictures of nothing, without a warning
    assert (written / "latency.png").exists()


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"replications": 0}, "replications"),
        ({"horizon": 0.0}, "horizon"),
        ({"horizon": math.nan}, "horizon"),
        ({"warmup": 3600.0}, "warmup"),
        ({"load": -1.0}, "load"),
        ({"replay": True}, "replay"),
        ({"objective": "profit"}, "objective"),
        ({"targets": {"p99_ttfs": 1.0}}, "targets"),
        ({"targets": {"p99_ttft": 0.0}}, "targets"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], argument: str) -> None:
    with pytest.raises(InputError, match=argument):
        fs.plan(**arguments)  # type: ignore[arg-type]


def test_requests_longer_than_memory_are_rejected_by_a_replay_and_in_no_rate() -> None:
    """The fluid answer is about the requests that can be served, the comparison accounts for all."""
    arrivals = np.arange(60.0)
    prompts, outputs = np.full(60, 100), np.arange(60) % 7 + 5
    prompts[30] = 900_000
    path = fs.ArrivalPath.from_arrays(arrivals, prompts, outputs, name="long")
    result = fs.plan(path, replay=True)
    kept = np.delete(np.arange(60), 30)
    alone = fs.plan(fs.ArrivalPath.from_arrays(arrivals[kept], prompts[kept], outputs[kept]), replay=True)
    np.testing.assert_allclose(result.fluid.load, alone.fluid.load)
    assert result.fluid.is_stable
    row = next(row for row in result.runs.to_serve_summary() if row["policy"] == "vllm")
    assert (row["completed"], row["failed"]) == (59, 1)
    assert any("1 request is longer than the KV cache" in remark for remark in result.remarks)
    with pytest.raises(InputError, match="request 31 of 'long'"):
        fs.plan(path)


def test_a_replay_of_which_nothing_fits_is_an_input_error() -> None:
    path = fs.ArrivalPath.from_arrays([0.0, 1.0], [900_000, 900_001], [5, 6])
    with pytest.raises(InputError, match=r"request 1 of .* \(and 1 more of 2 requests\)"):
        fs.plan(path, replay=True)


def test_a_tiny_path_gets_as_many_types_as_it_can_carry() -> None:
    path = fs.ArrivalPath.from_arrays([0.0, 1.0], [5, 6], [2, 3])
    assert planning.types_for(path) == 1
    path = fs.ArrivalPath.from_arrays(np.arange(40.0), np.arange(1, 41), np.arange(1, 41) % 9 + 1)
    assert planning.types_for(path) == 12
    alike = fs.ArrivalPath.from_arrays(np.arange(40.0), np.full(40, 100), np.arange(40) % 9 + 1)
    assert planning.types_for(alike) == 3  # one length of prompts has no three ranges of them


def test_a_plan_keeps_few_records_of_many_replications(
    result: planning.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every measure is the same; pictures and bounds on each request look at those that were kept."""
    monkeypatch.setattr(planning, "KEPT_BYTES", 1.0)
    few = fs.plan(horizon=120.0, warmup=20.0, replications=4, curve=False)
    assert (len(few.runs.paths), len(result.runs.paths)) == (1, 4)
    assert few.runs.to_dict() == result.runs.to_dict()
    assert few.runs.plot("ttft") is not None
