"""The published schedules of arXiv 2504.11320's experiments, batch by batch, with their tabulated iteration times."""

from __future__ import annotations

import csv
import gzip
import math
from collections import defaultdict
from pathlib import Path

import pytest
from simulation_cases import engine_table, server_of

from fluidsched.server import IterationTime
from fluidsched.server.iteration import BatchSummary
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


def test_sarathi(published):
    """Chunks of 512, at most 200 in service, memory without limit: all 6 004 batches, in order."""
    with gzip.open(published / "batches_test10_sarathi_200.csv.gz", "rt") as stream:
        expected = [
            tuple(int(row[name]) for name in row if name != "iteration") for row in csv.DictReader(stream)
        ]
    batches = []
    run = run_reference(
        requests(published / "requests_test10.csv.gz"),
        server_of(time=tabulated_time(published / "iteration_times.csv")),
        engine_table("sarathi", token_budget=512, max_in_service=200),
        horizon=None,
        on_iteration=lambda batch: batches.append(
            (
                len(batch.decode) + len(batch.prefill),
                batch.decode_tokens + batch.prefill_tokens,
                len(batch.decode),
                len(batch.prefill),
                batch.prefill_tokens,
            )
        ),
    )
    assert run.verdict == "finished"
    assert len(batches) == 6004
    assert batches == expected
