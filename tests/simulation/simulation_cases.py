"""Small paths, servers and tables for the simulation tests; all times dyadic, so exact in floating point."""

from __future__ import annotations

from typing import Any

from fluidsched.policy.table import Match, PolicyTable, Segment, TableType
from fluidsched.server import IterationTime, Server
from fluidsched.simulation.laws import Audit, check_laws
from fluidsched.simulation.records import EngineRun, IterationSummary
from fluidsched.simulation.reference import run_reference
from fluidsched.workload import ArrivalPath

UNIT = IterationTime.affine(1.0, 0.0, 0.0, 0.0)
"""Every iteration lasts one second."""

MIXED = IterationTime.affine(1.0, 0.25, 0.5, 0.0)
"""One second, a quarter per prompt token, half per decode."""


def path_of(*requests: tuple[Any, ...], horizon: float | None = None) -> ArrivalPath:
    """A path of (arrival, prompt, output[, label]) tuples."""
    labels = [request[3] for request in requests if len(request) > 3]
    names = tuple(dict.fromkeys(labels))
    return ArrivalPath.from_arrays(
        [request[0] for request in requests],
        [request[1] for request in requests],
        [request[2] for request in requests],
        [names.index(label) for label in labels] if labels else None,
        type_names=names,
        horizon=horizon,
    )


def server_of(capacity: float = float("inf"), time: IterationTime = UNIT, **limits: Any) -> Server:
    return Server(capacity, time, **limits)


def engine_table(kind: str = "vllm", **fields: Any) -> PolicyTable:
    return PolicyTable(fields.pop("name", kind), kind, (TableType("*"),), **fields)


def typed_table(kind: str, rows: dict[str, dict[str, Any]], **fields: Any) -> PolicyTable:
    """A `wait` or `gated` table with one row per label."""
    if kind == "wait":
        fields = {"freeze": True, "block_iterations": 1, **fields}
    types = tuple(TableType(name, Match(label=name), **row) for name, row in rows.items())
    return PolicyTable(fields.pop("name", kind), kind, types, **fields)


def nested_table(
    segments: list[tuple[int, int]], *, max_hold_s: float | None = None, **fields: Any
) -> PolicyTable:
    """A `nested-wait` table with segments (boundary, threshold)."""
    most = segments[0][1]
    row = TableType("*", threshold=most, gate=most, max_hold_s=max_hold_s)
    fields = {"block_iterations": 1, **fields}
    parts = tuple(Segment(*segment) for segment in segments)
    return PolicyTable("nested-wait", "nested-wait", (row,), parts, freeze=True, **fields)


def run_checked(
    path: ArrivalPath,
    server: Server,
    table: PolicyTable,
    *,
    horizon: float | None = None,
    warmup: float = 0.0,
    occupancy_points: int = 0,
) -> tuple[EngineRun, list[IterationSummary]]:
    """Run the reference with every law checked; also return its batches."""
    audit = Audit(path, server, table, horizon=horizon, warmup=warmup)
    batches: list[IterationSummary] = []

    def observe(batch: IterationSummary) -> None:
        batches.append(batch)
        audit.observe(batch)

    run = run_reference(
        path,
        server,
        table,
        horizon=horizon,
        warmup=warmup,
        occupancy_points=occupancy_points,
        on_iteration=observe,
        on_idle=audit.observe_idle,
    )
    audit.check(run)
    check_laws(path, server, run, warmup=warmup, lossless=table.preemption != "restart")
    return run, batches
