"""Laws for every rule over random paths, servers and tables: conservation, order, Little, invariances."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from simulation_cases import engine_table, path_of, run_checked, server_of, typed_table

from fluidsched.errors import SimulationError
from fluidsched.policy.table import Lookahead, PolicyTable
from fluidsched.server import IterationTime, Server
from fluidsched.simulation.laws import check_laws
from fluidsched.simulation.limits import SWAPPING
from fluidsched.simulation.records import EngineRun
from fluidsched.workload import ArrivalPath

eighths = st.integers(0, 80).map(lambda n: n / 8)


@st.composite
def paths(draw: Any, labels: str = "AB") -> ArrivalPath:
    """Up to 12 requests at dyadic times, at most 9 prompt and 7 output tokens."""
    requests = draw(
        st.lists(
            st.tuples(eighths, st.integers(1, 9), st.integers(1, 7), st.sampled_from(labels)),
            min_size=1,
            max_size=12,
        )
    )
    first, *rest = sorted(requests, key=lambda request: request[0])
    path = path_of(first, *rest)
    stays = st.lists(eighths | st.just(math.inf), min_size=len(requests), max_size=len(requests)).map(
        np.array
    )
    return dataclasses.replace(
        path,
        patience_s=draw(st.none() | st.none() | stays),
        abort_after_s=draw(st.none() | st.none() | stays),
    )


@st.composite
def servers(draw: Any, unlimited: bool = False) -> Server:
    """Memory from barely enough for one request; two affine pieces with a knee; optional blocks and slots."""
    time = IterationTime.pieces(
        [(1.0, 0.125, 0.25, 0.0625, 0.0), (-1.0, draw(st.sampled_from([0.125, 0.5])), 0.5, 0.0625, 0.03125)]
    )
    if unlimited:
        return server_of(time=time, swap_bandwidth=4.0)
    return server_of(
        draw(st.integers(15, 60)),
        time,
        max_batch_size=draw(st.sampled_from([None, 1, 3, 5])),
        block_size=draw(st.sampled_from([None, 2, 4])) if draw(st.booleans()) else None,
        swap_bandwidth=4.0,
    )


@st.composite
def tables(
    draw: Any,
    kinds: tuple[str, ...] = ("vllm", "sarathi", "vllm_v0", "orca", "faster_transformer", "gated", "wait"),
    horizon: float | None = None,
) -> PolicyTable:
    """A table of any kind with every knob its kind has; `wait` restarts only where a horizon ends it."""
    kind = draw(st.sampled_from(kinds))
    modes = ["recompute", "restart", *(["swap"] if kind in SWAPPING else [])]
    preemption = draw(st.sampled_from(modes))
    if kind in ("orca", "faster_transformer"):
        budget = draw(st.sampled_from([None, 9, 12]))
        return engine_table(kind, lookahead=Lookahead("reserve", 7), token_budget=budget)
    shared = {
        "token_budget": draw(st.sampled_from([None, 1, 4, 9])),
        "chunk_tokens": draw(st.sampled_from([None, 2, 5])),
        "prefill_interval": draw(st.sampled_from([None, 1, 2, 4])),
        "max_in_service": draw(st.sampled_from([None, 1, 4])),
        "watermark": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "kv_limit_tokens": draw(st.sampled_from([None, 10.0])),
        "whole_prompt_admission": draw(st.booleans()),
        "preemption": preemption,
    }
    if kind in ("vllm", "sarathi"):
        return engine_table(kind, **shared)
    if kind == "vllm_v0":
        own = ("max_in_service", "watermark", "kv_limit_tokens", "preemption")
        budget = draw(st.sampled_from([None, 15, 30]))
        return engine_table(kind, token_budget=budget, **{name: shared[name] for name in own})
    rows = {}
    for position, label in enumerate("AB"):
        threshold = draw(st.integers(1, 3))
        rows[label] = {
            "threshold": threshold,
            "gate": draw(st.integers(1 if kind == "wait" else 0, threshold)),
            "max_hold_s": draw(st.sampled_from([None, 2.0, 5.0])),
            "priority": draw(st.sampled_from([None, position, 1 - position])),
        }
        if kind == "gated":
            rows[label]["period"] = draw(st.integers(1, 5))
    if kind == "gated":
        return typed_table("gated", rows, **shared)
    return typed_table(
        "wait",
        rows,
        block_iterations=draw(st.integers(1, 4)),
        preemption="recompute" if horizon is None else preemption,
        max_in_service=shared["max_in_service"],
    )


def assert_same(first: EngineRun, second: EngineRun) -> None:
    for field in dataclasses.fields(EngineRun):
        if field.name != "starved_types":
            assert_array_equal(getattr(first, field.name), getattr(second, field.name), err_msg=field.name)


@st.composite
def timed_tables(draw: Any) -> tuple[PolicyTable, float | None]:
    """A table and the horizon of its run."""
    horizon = draw(st.sampled_from([None, 3.0, 20.0]))
    return draw(tables(horizon=horizon)), horizon


@settings(max_examples=300)
@given(paths(), servers(), timed_tables(), st.sampled_from([0.0, 2.5]))
def test_every_run_keeps_the_laws(path, server, timed_table, warmup):
    """Conservation of requests and tokens, time order, limits, Little's law for requests and KV."""
    table, horizon = timed_table
    run_checked(path, server, table, horizon=horizon, warmup=warmup)


@given(paths(), servers(), tables(("vllm", "sarathi", "vllm_v0", "orca", "faster_transformer")))
def test_engine_rules_never_get_stuck(path, server, table):
    """Without gates everything that fits is served, in any memory."""
    run, _ = run_checked(path, server, table)
    assert run.verdict == "finished"


@given(paths(), servers(), tables())
def test_scaling_time_scales_times(path, server, table):
    """Arrivals, holds and coefficients doubled: every time doubles exactly, everything else stays."""
    run, _ = run_checked(path, server, table)
    slow_path = dataclasses.replace(
        path,
        arrival_s=2.0 * path.arrival_s,
        patience_s=None if path.patience_s is None else 2.0 * path.patience_s,
        abort_after_s=None if path.abort_after_s is None else 2.0 * path.abort_after_s,
    )
    slow_server = dataclasses.replace(
        server,
        iteration_time=IterationTime.pieces((2.0 * server.iteration_time.coefficients).tolist()),
        swap_bandwidth=2.0,
    )
    rows = tuple(
        row if row.max_hold_s is None else dataclasses.replace(row, max_hold_s=2.0 * row.max_hold_s)
        for row in table.types
    )
    slow, _ = run_checked(slow_path, slow_server, dataclasses.replace(table, types=rows))
    for name in ("admitted_s", "first_token_s", "finish_s", "end_s", "busy_s", "kv_token_s", "waiting_s"):
        assert_array_equal(2.0 * np.asarray(getattr(run, name)), getattr(slow, name), err_msg=name)
    for name in ("preemptions", "status", "iterations", "wasted_tokens", "batch_token_sum"):
        assert_array_equal(getattr(run, name), getattr(slow, name), err_msg=name)


@given(paths(), servers(), tables(("gated",)))
def test_the_order_of_rows_does_not_matter(path, server, table):
    """Rows only name types: `gated` orders requests by priority and arrival, never by row."""
    reversed_rows = dataclasses.replace(table, types=table.types[::-1])
    assert_same(run_checked(path, server, table)[0], run_checked(path, server, reversed_rows)[0])


@given(paths(), servers(unlimited=True), tables(("wait",)))
def test_the_order_of_rows_does_not_matter_to_wait(path, server, table):
    """Under `wait` the row breaks ties of admission only, which no time shows while slots and memory last."""
    table = dataclasses.replace(table, max_in_service=None)
    reversed_rows = dataclasses.replace(table, types=table.types[::-1])
    assert_same(run_checked(path, server, table)[0], run_checked(path, server, reversed_rows)[0])


@given(paths(), servers(), tables(("gated", "wait")))
def test_a_type_without_arrivals_changes_nothing(path, server, table):
    idle = dataclasses.replace(
        table.types[0], name="C", match=dataclasses.replace(table.types[0].match, label="C")
    )
    wider = dataclasses.replace(table, types=(idle, *table.types))
    assert_same(run_checked(path, server, table)[0], run_checked(path, server, wider)[0])


@given(paths(), servers(unlimited=True))
def test_without_limits_sarathi_is_vllm(path, server):
    """The rules differ only in whom they serve first; with room for all they are one."""
    vllm, _ = run_checked(path, server, engine_table("vllm"))
    sarathi, _ = run_checked(path, server, engine_table("sarathi"))
    gated, _ = run_checked(
        path, server, typed_table("gated", {label: {"threshold": 99, "period": 1} for label in "AB"})
    )
    assert_same(vllm, sarathi)
    assert_same(vllm, gated)


@given(paths(), servers(), tables(("vllm", "sarathi", "gated")))
def test_occupancy_stays_within_twice_its_points(path, server, table):
    run, _ = run_checked(path, server, table, occupancy_points=3)
    assert run.occupancy.shape[0] <= 6
    assert (np.diff(run.occupancy[:, 0]) > 0).all()


@pytest.mark.parametrize(
    ("field", "value", "law"),
    [
        ("batch_token_sum", 1, "tokens are conserved"),
        ("waiting_s", 0.5, "Little's law for requests"),
        ("finish_s", np.array([1.0, 2.0]), "earlier finish|exactly with one output token"),
        ("admitted_s", np.array([5.0, 0.0]), "admission < first token"),
        ("preempted", 3, "preemptions add up"),
    ],
)
def test_a_broken_record_is_found(field, value, law):
    """Each law notices a record that breaks it."""
    path, server = path_of((0.0, 2, 3), (0.0, 2, 3)), server_of(50)
    run, _ = run_checked(path, server, engine_table())
    with pytest.raises(SimulationError, match=law):
        check_laws(path, server, dataclasses.replace(run, **{field: value}), warmup=0.0)
