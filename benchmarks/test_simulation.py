"""Requests per second of the kernel, per policy, and the Azure hour; each answer is checked on the reference."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fluidsched.policy import baselines
from fluidsched.policy.table import Lookahead, Match, PolicyTable, TableType
from fluidsched.server import IterationTime, Server, catalog
from fluidsched.simulation import compiled, simulate
from fluidsched.simulation.kernel import run_kernel, run_many
from fluidsched.simulation.records import EngineRun
from fluidsched.simulation.reference import run_reference
from fluidsched.workload import ArrivalPath, read_trace, workloads

SEED = 1
CHECKED = 300  # requests that the reference simulates too
OUTPUTS = {"short": 100, "middle": 200, "long": 300}

# Decode times published for Llama-3-8B on an A100 (10.381 ms + 0.03267 ms per decode + 8.998e-5 ms per KV token).
SERVER = Server(
    math.inf, IterationTime.affine(0.010381, 0.0, 3.267e-5, 8.998e-8), max_batch_size=128, name="cap 128"
)


def backlog_file(arrivals: str, count: int = 5000) -> ArrivalPath:
    """5 000 requests: prompt 20, output 100/200/300 in shares 1:2:3, Poisson 20/s or all at once."""
    rng = np.random.default_rng(SEED)
    output = rng.choice(list(OUTPUTS.values()), 5000, p=[1 / 6, 2 / 6, 3 / 6])[:count]
    times = np.cumsum(rng.exponential(1 / 20, 5000))[:count]
    return ArrivalPath.from_arrays(
        times if arrivals == "poisson" else np.zeros(count), np.full(count, 20), output
    )


def _rows(gate: bool, period: int | None) -> tuple[TableType, ...]:
    thresholds = {"short": 6, "middle": 12, "long": 18}
    return tuple(
        TableType(
            name,
            Match(output=(tokens, tokens)),
            threshold=thresholds[name],
            gate=thresholds[name] if gate else 0,
            period=period,
        )
        for name, tokens in OUTPUTS.items()
    )


TABLES = {
    "vllm": baselines.vllm(),
    "capped": PolicyTable("capped", "capped", (TableType("*"),), max_in_service=100, token_budget=2048),
    "sarathi": baselines.sarathi(),
    "orca": baselines.orca(max_output_tokens=300),
    "gated": PolicyTable(
        "gated", "gated", _rows(gate=False, period=30), token_budget=2048, predictor="exact"
    ),
    "wait": PolicyTable(
        "wait", "wait", _rows(gate=True, period=None), freeze=True, block_iterations=30, predictor="exact"
    ),
}


def agrees(path: ArrivalPath, server: Server, table: PolicyTable) -> bool:
    """Whether kernel and reference finish the same requests at the same times."""
    kernel: EngineRun = run_kernel(path, server, table, horizon=None)
    reference = run_reference(path, server, table, horizon=None)
    return bool(
        np.array_equal(kernel.status, reference.status)
        and np.allclose(kernel.finish_s, reference.finish_s, rtol=1e-9, equal_nan=True)
    )


@pytest.mark.parametrize("arrivals", ["poisson", "at-once"])
@pytest.mark.parametrize("policy", TABLES)
def test_five_thousand_requests(
    policy: str, arrivals: str, benchmark: Any, note: Callable[..., None]
) -> None:
    """One run on one processor, records and preemption on."""
    path, table = backlog_file(arrivals), TABLES[policy]
    run = benchmark(run_kernel, path, SERVER, table, horizon=None)
    right = agrees(backlog_file(arrivals, CHECKED), SERVER, table)
    note(seed=SEED, requests=len(path), iterations=run.iterations, right=right)
    assert right


def _looking_ahead(mode: str, lengths: tuple[int, ...] = (), headroom: float = 0.0) -> PolicyTable:
    ahead = Lookahead(mode, headroom, lengths)  # type: ignore[arg-type]
    return replace(baselines.vllm(), name=mode, lookahead=ahead, predictor="exact")


AHEAD = {
    "vllm": baselines.vllm(),
    "known": _looking_ahead("known"),
    "law": _looking_ahead("law", tuple(range(100, 301, 20)), 500.0),
    "reserve": _looking_ahead("reserve", headroom=300.0),
    "mc_sf": baselines.mc_sf(),
}


@pytest.mark.parametrize("arrivals", ["poisson", "at-once"])
@pytest.mark.parametrize("policy", AHEAD)
def test_five_thousand_requests_and_little_memory(
    policy: str, arrivals: str, benchmark: Any, note: Callable[..., None]
) -> None:
    """The same file with 16 000 tokens of KV, which 128 of these requests exceed: look-ahead beside vllm."""
    path, table = backlog_file(arrivals), AHEAD[policy]
    server = replace(SERVER, kv_capacity=16_000)
    run = benchmark(run_kernel, path, server, table, horizon=None)
    right = agrees(backlog_file(arrivals, CHECKED), server, table)
    note(seed=SEED, requests=len(path), iterations=run.iterations, preempted=run.preempted, right=right)
    assert right


class _Watched:
    """A tree over ends that notes the nodes looked at."""

    def __init__(self, leaves: int) -> None:
        self.tree, self.looked = np.zeros(2 * leaves, compiled.NODE), set[int]()

    def __getitem__(self, node: int) -> Any:
        self.looked.add(node)
        return self.tree[node]


@pytest.mark.parametrize("leaves", [1 << k for k in range(6, 14)])
@pytest.mark.parametrize("ends", ["drawn", "level"])
def test_nodes_that_looking_ahead_visits(
    ends: str, leaves: int, benchmark: Any, note: Callable[..., None]
) -> None:
    """Of one update and of one check that ends in admission, the limit at the very maximum of the forecast.

    drawn: 128 residents of about 1 000 tokens, lengths uniform up to the leaves. level: a quarter as many residents as
    leaves, whose ends keep the forecast at the limit: the worst case. Interpreted, so the time says nothing.
    """
    plant = getattr(compiled._plant, "py_func", compiled._plant)
    first_excess = getattr(compiled._first_excess, "py_func", compiled._first_excess)
    if ends == "drawn":
        rng = np.random.default_rng(SEED)
        output = rng.integers(3, leaves + 1, 128)
        done = (rng.random(128) * (output - 2)).astype(np.int64)
        readings, held = output - done - 1, rng.integers(500, 1_500, 128) + done
    else:  # each holds at its end what the others grow by until the next
        still = leaves // 8 + np.arange(leaves // 8)
        readings = np.append(np.full(leaves // 8, leaves - 1), np.arange(leaves - 9, 0, -8))
        held = np.append(np.ones(leaves // 8, np.int64), 8 * still[: len(readings) - leaves // 8])
        held[leaves // 8 :] -= readings[leaves // 8 :]
    tree, path = _Watched(leaves), 0
    for reading, tokens in zip(readings.tolist(), held.tolist(), strict=True):
        tree.looked.clear()
        plant(tree, 0, leaves, reading, 1, tokens, compiled.NOBODY)
        path = max(path, len(tree.looked))
    limit = max(int((held[readings >= t] + t).sum()) for t in set(readings.tolist()))
    ahead = SimpleNamespace(state=[SimpleNamespace(leaves=leaves, origin=0)], tree=tree)
    tree.looked.clear()
    found, _ = benchmark.pedantic(first_excess, (ahead, 1, -1, limit), rounds=1)
    looked = len(tree.looked)
    right = found == compiled.NOBODY and first_excess(ahead, 1, -1, limit - 1)[0] != compiled.NOBODY
    note(
        seed=SEED, leaves=leaves, residents=len(readings), of_update=path, of_check=looked, right=bool(right)
    )
    assert right


@pytest.mark.parametrize("policy", ["vllm", "capped"])
def test_cost_per_request_from_100_to_10_000_output_tokens(
    policy: str, benchmark: Any, note: Callable[..., None]
) -> None:
    """At equal batch a request's cost goes by the events it causes, not by its tokens.

    Lengths spread by ±20 %, in two readings. Stretched, they are multiples of output/50, so that whatever the output
    the same requests finish together, and between two completions there is time for the iteration with the next
    prompts: as many events. Drawn from all integers, long requests hardly ever finish together, or while others'
    prompts are computed: more events. All six runs take turns, so that what else the machine does falls on all.

    An event is an instant at which a run of decodes ends, or an iteration with prompts: here the distinct instants of
    first tokens and ends. Fitted over the six runs: nanoseconds per request = other + per event x events per request.
    """
    rng = np.random.default_rng(SEED)
    count = 5000
    paths = {}
    for lengths in ("stretched", "drawn"):
        for output in (100, 1_000, 10_000):
            unit = output // 50 if lengths == "stretched" else 1
            drawn = unit * rng.integers(4 * output // (5 * unit), 6 * output // (5 * unit), count)
            # 128 prompts are the token budget: all start in the first iteration
            paths[lengths, output] = ArrivalPath.from_arrays(np.zeros(count), np.full(count, 16), drawn)
    best = dict.fromkeys(paths, math.inf)
    runs = {}

    def all_six() -> None:
        for case, path in paths.items():
            start = time.perf_counter()
            runs[case] = run_kernel(path, SERVER, TABLES[policy], horizon=None)
            best[case] = min(best[case], 1e9 * (time.perf_counter() - start) / count)

    benchmark(all_six)
    events = {
        case: len(np.unique(np.concatenate([run.first_token_s, run.finish_s]))) / count
        for case, run in runs.items()
    }
    per_event, other = np.polyfit(list(events.values()), list(best.values()), 1)
    right = all(
        bool((run.status == 0).all())
        and run.batch_token_sum == int(paths[case].output_tokens.sum()) + 15 * count
        for case, run in runs.items()
    )
    note(
        seed=SEED,
        requests=len(paths) * count,
        nanoseconds_per_request={f"{lengths} {output}": best[lengths, output] for lengths, output in paths},
        events_per_request={f"{lengths} {output}": events[lengths, output] for lengths, output in paths},
        longest_over_shortest={
            lengths: best[lengths, 10_000] / best[lengths, 100] for lengths in ("stretched", "drawn")
        },
        nanoseconds_per_event=float(per_event),
        nanoseconds_otherwise=float(other),
        right=right,
    )
    assert right


@pytest.mark.data
@pytest.mark.parametrize("policy", ["vllm", "sarathi"])
def test_azure_hour(policy: str, benchmark: Any, note: Callable[..., None], data_root: Path) -> None:
    """19 366 requests of the conversation trace at its own rate, Llama-2-7B on an A100: under 0.2 s."""
    path = read_trace(data_root / "traces" / "AzureLLMInferenceTrace_conv.csv")
    server = catalog.server("a100-80gb", "llama-2-7b")
    run = benchmark(run_kernel, path, server, TABLES[policy], horizon=None)
    first = ArrivalPath.from_arrays(
        path.arrival_s[:CHECKED], path.prompt_tokens[:CHECKED], path.output_tokens[:CHECKED]
    )
    right = agrees(first, server, TABLES[policy])
    note(requests=len(path), iterations=run.iterations, preempted=run.preempted, right=right)
    assert right


@pytest.mark.data
def test_azure_hour_sixty_four_replications(
    benchmark: Any, note: Callable[..., None], data_root: Path
) -> None:
    """64 replications of the hour under one policy on all processors."""
    path = read_trace(data_root / "traces" / "AzureLLMInferenceTrace_conv.csv")
    server = catalog.server("a100-80gb", "llama-2-7b")
    runs = benchmark(run_many, [path] * 64, server, TABLES["vllm"], horizon=None)
    right = all(np.array_equal(run.finish_s, runs[0].finish_s) for run in runs)
    note(requests=64 * len(path), right=right)
    assert right


@pytest.mark.slow
def test_ten_million_requests(benchmark: Any, note: Callable[..., None]) -> None:
    """One run of ten million requests (memory: under 1.5 GB, path included)."""
    count = 10_000_000
    rng = np.random.default_rng(SEED)
    path = ArrivalPath.from_arrays(
        np.cumsum(rng.exponential(1 / 20, count)),
        np.full(count, 20),
        rng.choice(list(OUTPUTS.values()), count, p=[1 / 6, 2 / 6, 3 / 6]),
    )
    run = benchmark.pedantic(run_kernel, (path, SERVER, TABLES["vllm"]), {"horizon": None}, rounds=1)
    right = bool((run.status == 0).all()) and run.batch_token_sum == int((path.output_tokens + 19).sum())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    note(seed=SEED, requests=count, iterations=run.iterations, peak_memory_bytes=peak, right=right)
    assert right


@pytest.mark.slow
@pytest.mark.parametrize("count", [1_000_000, 10_000_000])
def test_without_records(count: int, benchmark: Any, note: Callable[..., None]) -> None:
    """The Azure mix at 0.8 in pieces: memory of the process does not grow with the number of requests."""
    server = catalog.server("a100-80gb", "llama-2-7b")
    workload = workloads.azure_conv().at_load(0.8, server)
    options = {"horizon": count / workload.total_arrival_rate, "replications": 1, "seed": SEED, "warmup": 0.0}
    runs = benchmark.pedantic(
        simulate, (workload, server, TABLES["vllm"]), {**options, "records": False}, rounds=1
    )
    values = {name: value.item() for name, value in runs.measures("vllm").items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    right = abs(values["completed"] + values["unfinished"] - count) < 5 * math.sqrt(count)
    note(
        seed=SEED,
        requests=count,
        peak_memory_bytes=peak,
        right=right,
    )
    assert right
