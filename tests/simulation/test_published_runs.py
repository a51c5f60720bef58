"""The published schedules of arXiv 2504.11320's experiments, batch by batch, with their tabulated iteration times."""

from __future__ import annotations

import csv
import gzip
import math
from collections import defaultdict
from pathlib import Path

import pytest
from simulation_cases import engine_table, server_of

from fluidsched.policy import baselines
from fluidsched.server import IterationTime
from fluidsched.server.iteration import BatchSummary
from fluidsched.simulation.booking import booking_limit
from fluidsched.simulation.reference import run_reference
from fluidsched.workload import ArrivalPath

pytestmark = pytest.mark.data


@pytest.fixture
def published(data_root: Path) -> Path:
    return data_root / "published_runs"


def requests(file: Path) -> ArrivalPath:
    with gzip.open(file, "rt") as stream:
        rows = [tuple(map(float, row.values())) for row in csv.DictReader(stream)]
    return ArrivalPath.from_arrays(*zip(*sorted(rows), strict=True))


def tabulated_time(file: Path) -> IterationTime:
    """Their latency function: keyed by decodes, their mean KV rounded up to 64, and the prefill chunks.

    Their mean counts one token less per decode than k_dec. Where the root of the summed squared chunks tells
    durations apart the nearest one is taken.
    """
    table = defaultdict(list)
    with open(file) as stream:
        for row in csv.DictReader(stream):
            key = tuple(
                int(row[name]) for name in ("n_decode", "kv_avg_ceil64", "n_prefill", "prefill_tokens")
            )
            table[key].append((float(row["prefill_agg_rms"]), float(row["dt_ms"]) / 1e3))

    def duration(batch: BatchSummary) -> float:
        if not batch.prefill_tokens + batch.decode_tokens:
            return 0.01  # the empty batch, which never runs
        mean_kv = batch.kv_tokens / batch.decode_tokens - 1 if batch.decode_tokens else 0.0
        key = (
            batch.decode_tokens,
            64 * math.ceil(mean_kv / 64 - 1e-9),
            len(batch.prefill_chunks),
            batch.prefill_tokens,
        )
        root = math.hypot(*batch.prefill_chunks)
        return min(table[key], key=lambda entry: abs(entry[0] - root))[1]

    return IterationTime.function(duration)


def bounds_of_durations(file: Path) -> dict[tuple[int, ...], tuple[float, float]]:
    """Shortest and longest duration, s, of iterations with so many decodes, mean KV, prefills, prefill tokens."""
    bounds: dict[tuple[int, ...], tuple[float, float]] = {}
    with open(file) as stream:
        for row in csv.DictReader(stream):
            key = tuple(
                int(row[name]) for name in ("n_decode", "kv_avg_ceil64", "n_prefill", "prefill_tokens")
            )
            time, spread = float(row["dt_ms"]) / 1e3, float(row["spread_ms"]) / 1e3
            low, high = bounds.get(key, (math.inf, -math.inf))
            bounds[key] = min(low, time - spread), max(high, time + spread)
    return bounds


def batches_of(file: Path) -> list[tuple[int, ...]]:
    """(batch size, tokens, decodes, prefills, prefill tokens) of every iteration."""
    with gzip.open(file, "rt") as stream:
        return [
            tuple(int(row[name]) for name in row if name != "iteration") for row in csv.DictReader(stream)
        ]


def replay(published: Path, policy, time: IterationTime | None = None):
    """Replay test10 without a memory limit; return the run and its batches.

    The server never idles, so the end is the sum of all durations: it lies within what the table leaves open, less
    than a thousandth.
    """
    batches: list[tuple[int, ...]] = []
    bounds = bounds_of_durations(published / "iteration_times.csv")
    earliest = latest = end = 0.0

    def observe(batch):
        nonlocal earliest, latest, end
        mean_kv = batch.kv_tokens / batch.decode_tokens - 1 if batch.decode_tokens else 0.0
        rounded = 64 * math.ceil(mean_kv / 64 - 1e-9)
        low, high = bounds[batch.decode_tokens, rounded, len(batch.prefill), batch.prefill_tokens]
        assert not batches or batch.start_s == end
        if not batches:  # the run begins here; the first duration may be the caller's own
            earliest = latest = batch.start_s
            low, high = min(low, batch.end_s - batch.start_s), max(high, batch.end_s - batch.start_s)
        earliest, latest, end = earliest + low, latest + high, batch.end_s
        prefills, decodes = len(batch.prefill), len(batch.decode)
        tokens = batch.prefill_tokens + batch.decode_tokens
        batches.append((prefills + decodes, tokens, decodes, prefills, batch.prefill_tokens))

    run = run_reference(
        requests(published / "requests_test10.csv.gz"),
        server_of(time=time or tabulated_time(published / "iteration_times.csv")),
        policy,
        horizon=None,
        on_iteration=observe,
    )
    assert earliest - 1e-6 <= end <= latest + 1e-6
    assert latest - earliest < 1e-3 * end
    return run, batches


def test_sarathi(published):
    """Chunks of 512, at most 200 in service: all 6 004 batches, in order."""
    run, batches = replay(published, engine_table("sarathi", token_budget=512, max_in_service=200))
    assert run.verdict == "finished"
    assert len(batches) == 6004
    assert batches == batches_of(published / "batches_test10_sarathi_200.csv.gz")


def test_vllm_v0(published):
    """Prompts before decodes, at most 200 in service: all 6 314 batches, in order.

    The first iteration must last 10.763 ms: the table's 10.851 ms, which belongs to other iterations with the
    same key, would let in the arrival at 10.827 ms.
    """
    tabulated = tabulated_time(published / "iteration_times.csv").function
    assert tabulated is not None
    calls = iter([0.010763])  # the first such batch only

    def duration(batch: BatchSummary) -> float:
        first = batch.prefill_chunks == (20,) and not batch.decode_tokens
        return next(calls, tabulated(batch)) if first else tabulated(batch)

    time = IterationTime.function(duration)
    run, batches = replay(published, baselines.vllm_v0(max_in_service=200), time)
    assert run.verdict == "finished"
    assert len(batches) == 6314
    assert batches == batches_of(published / "batches_test10_vllm_v0_200.csv.gz")


def test_booking_limit(published):
    """The rule their code runs under the name WAIT: 6 003 batches, then 79 stay in service."""
    run, batches = replay(published, booking_limit(200, {100: 2000.0, 200: 4000.0, 300: 6000.0}))
    assert len(batches) == 6003
    assert batches == batches_of(published / "batches_test10_booking_limit_200.csv.gz")
    assert (run.verdict, run.count("unfinished")) == ("stuck", 79)
