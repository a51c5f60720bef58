"""The policy table inside vLLM's real scheduler: batches equal the reference simulator's, and nothing is stranded."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="vLLM is not installed; scripts/make_vllm_environment.sh makes a place for it"
)

from vllm_engine import make_scheduler, request_of, serve

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.integrations.vllm import FluidScheduler
from fluidsched.policy.table import Lookahead, Match, PolicyTable, Segment, TableType
from fluidsched.simulation.records import IterationSummary
from fluidsched.simulation.reference import run_reference

pytestmark = pytest.mark.vllm

WORKLOAD = fs.Workload(
    [
        fs.RequestType(
            "a", arrival_rate=1.7, prompt_tokens=16, output_tokens=fs.lengths.geometric(mean=12, maximum=60)
        ),
        fs.RequestType("b", arrival_rate=0.9, prompt_tokens=fs.lengths.uniform(8, 64), output_tokens=20),
    ]
)
# dyadic coefficients: times are exact, so arrivals never fall within rounding of a decision
TIME = fs.IterationTime.affine(0.125, 2**-10, 2**-8, 2**-14)
HORIZON = 300.0


def wait(block_iterations: int, **changes: Any) -> PolicyTable:
    rows = [
        TableType("a", Match(label="a"), threshold=3, gate=3),
        TableType("b", Match(label="b"), threshold=2, gate=2),
    ]
    rows = [dataclasses.replace(row, **changes) for row in rows]
    return PolicyTable("wait", "wait", tuple(rows), block_iterations=block_iterations, freeze=True)


def nested_wait(block_iterations: int) -> PolicyTable:
    """Segments of positions 0..5, 6..11, 12..; every last position + 1 a multiple of the block."""
    segments = (Segment(5, 5), Segment(11, 4), Segment(59, 3))
    row = TableType("*", threshold=5, gate=5)
    return PolicyTable(
        "nested", "nested-wait", (row,), segments=segments, block_iterations=block_iterations, freeze=True
    )


GATED = PolicyTable(
    "gated",
    "gated",
    (
        TableType("a", Match(label="a"), threshold=3, gate=2, period=4),
        TableType("b", Match(label="b"), threshold=2, gate=0, period=7, priority=1.0),
    ),
)
VLLM = fs.baselines.vllm(token_budget=48)


def compare(
    tmp_path: Path,
    table: PolicyTable,
    *,
    blocks: int = 4000,
    block_size: int = 1,
    depth: int = 1,
    budget: int = 8192,
    slots: int = 256,
    horizon: float = HORIZON,
    seed: int = 3,
    settings: Mapping[str, Any] | None = None,
) -> tuple[list[IterationSummary], int]:
    """Assert that vLLM's batches are the reference's, one by one; return the reference's and preemptions."""
    server = fs.Server(
        blocks * block_size,
        TIME,
        max_batch_size=slots,
        token_budget=budget,
        block_size=None if block_size == 1 else block_size,
    )
    path = WORKLOAD.sample(horizon, seed=seed)
    settings = {"max_hold_s": None, **(settings or {})}
    scheduler = make_scheduler(
        tmp_path, table, blocks=blocks, block_size=block_size, budget=budget, slots=slots, settings=settings
    )
    run = serve(scheduler, path, server, depth=depth, horizon=horizon)
    summaries: list[IterationSummary] = []
    run_reference(path, server, table, horizon=horizon, on_iteration=summaries.append)
    assert run.starts_s == [summary.start_s for summary in summaries]
    for number, (summary, batch) in enumerate(zip(summaries, run.iterations, strict=True)):
        assert batch == (dict(summary.prefill), set(summary.decode)), f"iteration {number}"
    return summaries, run.preemptions


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("block_iterations", [1, 3])
def test_wait_has_the_references_batches(tmp_path: Path, block_iterations: int, depth: int) -> None:
    """Literal WAIT and blocks, synchronous and with the next iteration scheduled ahead, as vLLM does."""
    horizon = 1500.0 if block_iterations == 1 else 600.0
    summaries, _ = compare(tmp_path, wait(block_iterations), depth=depth, horizon=horizon)
    assert len(summaries) >= 1500


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("block_iterations", [1, 3])
def test_nested_wait_has_the_references_batches(tmp_path: Path, block_iterations: int, depth: int) -> None:
    """Output lengths unknown to the engine: only iterations done are looked at."""
    horizon = 3200.0 if block_iterations == 1 else 1100.0
    summaries, _ = compare(
        tmp_path, nested_wait(block_iterations), blocks=40_000, slots=1024, depth=depth, horizon=horizon
    )
    assert len(summaries) >= 1500


@pytest.mark.parametrize("depth", [1, 2])
def test_gated_has_the_references_batches(tmp_path: Path, depth: int) -> None:
    summaries, _ = compare(tmp_path, GATED, depth=depth)
    assert len(summaries) >= 1500


@pytest.mark.parametrize(
    ("table", "blocks", "block_size", "budget", "slots"),
    [
        pytest.param(GATED, 130, 1, 40, 40, id="gated"),
        pytest.param(
            PolicyTable("capped", "capped", (TableType("*"),), max_in_service=6, token_budget=32),
            300, 1, 8192, 256, id="capped",
        ),
        pytest.param(VLLM, 140, 1, 8192, 256, id="vllm"),
        pytest.param(VLLM, 12, 16, 8192, 256, id="vllm-blocks"),
        pytest.param(dataclasses.replace(VLLM, watermark=0.1), 160, 1, 8192, 256, id="watermark"),
        pytest.param(
            dataclasses.replace(VLLM, token_budget=24, whole_prompt_admission=False),
            140, 1, 8192, 256, id="first-chunk",
        ),
        pytest.param(dataclasses.replace(VLLM, kv_limit_tokens=120.0), 160, 1, 8192, 256, id="kv-limit"),
    ],
)  # fmt: skip
def test_tight_memory_preempts_as_the_reference_does(
    tmp_path: Path, table: PolicyTable, blocks: int, block_size: int, budget: int, slots: int
) -> None:
    """Chunked prefill, blocks, watermark and preemption: vLLM itself is the witness of our reference."""
    summaries, preemptions = compare(
        tmp_path, table, blocks=blocks, block_size=block_size, budget=budget, slots=slots
    )
    assert len(summaries) >= 1500
    assert preemptions == sum(len(summary.preempted) for summary in summaries) > 0


LAW = (4, 8, 12, 20, 20, 20, 30, 60)


@pytest.mark.parametrize("order", ["fcfs", "shortest_first"])
@pytest.mark.parametrize(
    ("lookahead", "blocks", "block_size"),
    [
        pytest.param(Lookahead("known"), 160, 1, id="known"),
        pytest.param(Lookahead("known", 20.0), 12, 16, id="known-blocks"),
        pytest.param(Lookahead("law", 10.0, LAW), 180, 1, id="law"),
        pytest.param(Lookahead("law", 20.0, LAW), 14, 16, id="law-blocks"),
        pytest.param(Lookahead("reserve", 30.0), 14, 16, id="reserve"),
    ],
)
def test_look_ahead_has_the_references_batches(
    tmp_path: Path, lookahead: Lookahead, blocks: int, block_size: int, order: Any
) -> None:
    """Memory that binds, chunked prompts: admitted when the forecast of the reference simulator fits."""
    table = dataclasses.replace(VLLM, lookahead=lookahead, order=order, predictor="exact")
    summaries, preemptions = compare(tmp_path, table, blocks=blocks, block_size=block_size)
    assert len(summaries) >= 1500
    assert preemptions == sum(len(summary.preempted) for summary in summaries)
    plain, more = compare(tmp_path, VLLM, blocks=blocks, block_size=block_size)
    assert more > preemptions
    assert [summary.admitted for summary in plain] != [summary.admitted for summary in summaries]


def test_gated_tables_look_ahead(tmp_path: Path) -> None:
    table = dataclasses.replace(GATED, lookahead=Lookahead("known"), predictor="exact")
    summaries, _ = compare(tmp_path, table, blocks=130, budget=40, slots=40)
    assert len(summaries) >= 1500


@pytest.mark.parametrize("table", [VLLM, GATED], ids=["vllm", "gated"])
def test_look_ahead_with_an_iteration_in_flight(tmp_path: Path, table: PolicyTable) -> None:
    """Requests that have all their tokens coming are in no forecast. Their KV is free one iteration later than in the
    reference, so all are believed longer than they are: the forecast binds and memory does not."""
    table = dataclasses.replace(table, lookahead=Lookahead("law", 0.0, (60, 120)))
    summaries, _ = compare(tmp_path, table, blocks=400, budget=40, slots=40, depth=2, horizon=600.0)
    assert len(summaries) >= 1500
    plain = dataclasses.replace(table, lookahead=Lookahead("none"))
    more, _ = compare(tmp_path, plain, blocks=400, budget=40, slots=40, horizon=600.0)
    assert [summary.admitted for summary in more] != [summary.admitted for summary in summaries]


@pytest.mark.parametrize(("stated", "believed"), [(7, 7), (400, 40), (None, 40), ("many", 40)])
def test_a_request_that_states_nothing_is_believed_to_use_up_its_limit(
    tmp_path: Path, stated: Any, believed: int
) -> None:
    """It never exceeds max_tokens, so neither is it believed to when it states more."""
    table = dataclasses.replace(VLLM, lookahead=Lookahead("known"))
    scheduler = make_scheduler(tmp_path, table, blocks=100)
    request = request_of(fs.ArrivalPath.from_arrays([0.0], [16], [40]), 0)
    request.sampling_params.extra_args = {"fluidsched_output_tokens": stated}
    scheduler.add_request(request)
    assert scheduler._believed == {"0": believed}


def test_prefill_interval_is_vllms(tmp_path: Path) -> None:
    compare(tmp_path, dataclasses.replace(VLLM, token_budget=24, prefill_interval=4), blocks=1000)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "table",
    [
        wait(1),
        wait(4),
        nested_wait(2),
        GATED,
        VLLM,
        dataclasses.replace(VLLM, lookahead=Lookahead("law", 0.0, (4, 12))),
    ],
    ids=["wait", "blocks", "nested", "gated", "vllm", "law"],
)
def test_everybody_is_served_and_memory_drains(tmp_path: Path, table: PolicyTable, depth: int) -> None:
    """Tight memory, preemption, clients that leave while waiting or running: the rest get all their tokens."""
    server = fs.Server(150, TIME)
    path = WORKLOAD.sample(200.0, seed=5)
    abort_at = {i: float(path.arrival_s[i]) + 1.5 * (i % 5) for i in range(0, len(path), 7)}
    scheduler = make_scheduler(tmp_path, table, blocks=150, settings={"max_hold_s": 2.0})
    run = serve(scheduler, path, server, depth=depth, abort_at=abort_at)
    assert run.preemptions > 0
    assert scheduler.kv_cache_manager.usage == 0.0
    assert not scheduler.has_unfinished_requests()
    assert not scheduler._rows  # nothing remembered of requests that left
    assert not scheduler._believed
    stayed = set(range(len(path))) - set(abort_at)
    assert {i: run.tokens[i] for i in stayed} == {i: int(path.output_tokens[i]) for i in stayed}


def test_hold_releases_the_last_requests(tmp_path: Path) -> None:
    """Nobody comes after the second request, so literal WAIT would wait for ever: the default hold ends it."""
    path = fs.ArrivalPath.from_arrays([0.0, 1.0], [16, 16], [4, 4], type=[0, 0], type_names=["a"])
    scheduler = make_scheduler(tmp_path, wait(1), blocks=1000, settings={})
    run = serve(scheduler, path, fs.Server(1000, TIME), wake_s=0.5)
    assert run.starts_s[0] == 10.0  # the first has waited max_hold_s; both go, at most a threshold of them
    assert set(run.finish_s) == {0, 1}


def test_unmatched_requests_are_served_as_stock(tmp_path: Path) -> None:
    path = fs.ArrivalPath.from_arrays([0.0], [16], [4], type=[0], type_names=["unheard of"])
    scheduler = make_scheduler(tmp_path, wait(1), blocks=1000)
    run = serve(scheduler, path, fs.Server(1000, TIME))
    assert run.starts_s[0] == 0.0
    assert scheduler.counters["unmatched"] == 1


def test_rows_by_prompt_by_stated_output_and_by_limit(tmp_path: Path) -> None:
    """Nothing stated: prompt length. `fluidsched_output_tokens`, or max_tokens where the settings say so."""
    rows = (
        TableType("short", Match((0, None), (0, 10)), threshold=1, period=1),
        TableType("long", Match((0, None), (11, None)), threshold=1, period=1),
    )
    table = PolicyTable("lengths", "gated", rows, predictor="exact")
    scheduler = make_scheduler(tmp_path, table, blocks=1000, settings={"output_tokens": "max_tokens"})
    path = fs.ArrivalPath.from_arrays([0.0, 0.0], [16, 16], [4, 40])
    serve(scheduler, path, fs.Server(1000, TIME), most=1)
    assert [scheduler._rows[name] for name in ("0", "1")] == [0, 1]


def test_counters_add_up(tmp_path: Path) -> None:
    path = WORKLOAD.sample(60.0, seed=1)
    scheduler = make_scheduler(tmp_path, wait(2), blocks=4000, settings={"max_hold_s": 5.0})
    run = serve(scheduler, path, fs.Server(4000, TIME))
    assert scheduler.counters["admitted"] == len(path)
    assert scheduler.counters["iterations"] == len(run.iterations)
    assert scheduler.counters["waiting"] == 0
    assert scheduler.counters["paused"] > 0
    prometheus = pytest.importorskip("prometheus_client")
    exported = prometheus.REGISTRY.get_sample_value("fluidsched_admitted", {"policy": "wait"})
    assert exported == len(path)


def test_counters_are_logged_at_the_interval_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line each ten seconds of the scheduler's clock, with every counter."""
    lines: list[str] = []
    monkeypatch.setattr(
        "fluidsched.integrations.vllm._logger.info", lambda text, *values: lines.append(text % values)
    )
    scheduler = make_scheduler(tmp_path, GATED, blocks=4000, settings={"log_interval_s": 10.0})
    assert any("following policy 'gated'" in line for line in lines)
    scheduler._next_log_s = 10.0  # the engine here has a clock of its own, which starts at 0
    serve(scheduler, WORKLOAD.sample(60.0, seed=1), fs.Server(4000, TIME))
    counted = [line for line in lines if "iterations" in line]
    assert 5 <= len(counted) <= 8
    assert all(f"{name} " in counted[-1] for name in scheduler.counters)


# ------------------------------------------------------------------ what stops vLLM at start


def refused(tmp_path: Path, table: PolicyTable, **arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        make_scheduler(tmp_path, table, **{"blocks": 4000, **arguments})
    return str(caught.value)


def test_a_policy_for_more_memory_is_refused(tmp_path: Path) -> None:
    table = dataclasses.replace(wait(1), certificate={"memory": {"value": 1.0, "capacity": 9000.0}})
    assert "kv_capacity=4,000" in refused(tmp_path, table)


def test_a_budget_below_a_cohort_is_refused(tmp_path: Path) -> None:
    table = dataclasses.replace(wait(1), certificate={"largest_cohort": {"value": 9001}})
    assert "max-num-batched-tokens" in refused(tmp_path, table)


def test_policies_no_engine_can_follow_are_refused(tmp_path: Path) -> None:
    assert "preemption" in refused(tmp_path, dataclasses.replace(GATED, preemption="restart"))
    assert "kind" in refused(tmp_path, fs.baselines.sarathi())


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    assert "an unknown key" in refused(tmp_path, GATED, settings={"policies": "x"})
    assert "max_hold_s" in refused(tmp_path, GATED, settings={"max_hold_s": -1})
    assert "output_tokens" in refused(tmp_path, GATED, settings={"output_tokens": "guess"})


def test_a_damaged_policy_file_stops_the_engine(tmp_path: Path) -> None:
    broken = json.loads(GATED.to_json())
    broken["types"][0]["threshold"] = -1
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(broken))
    message = refused(tmp_path, GATED, settings={"policy": str(file)})
    assert "threshold" in message
    assert str(file) in message


@pytest.mark.parametrize("version", ["0.32.1", "0.34.0", "1.0.0"])
def test_other_versions_are_refused_by_name(
    tmp_path: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    message = refused(tmp_path, GATED)
    assert version in message
    assert "0.33" in message
    scheduler = make_scheduler(tmp_path, GATED, blocks=4000, settings={"any_version": True})
    assert isinstance(scheduler, FluidScheduler)
    assert math.isfinite(scheduler.clock())
