"""The kernel equals the reference, request by request, for every rule and knob."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from kernel_cases import KINDS, Case, assert_same_run, cases, run_reference_and_judge

from fluidsched.errors import InputError
from fluidsched.policy import baselines
from fluidsched.policy.table import Lookahead, PolicyTable, Segment, TableType
from fluidsched.server import IterationTime, Server, catalog
from fluidsched.simulation import compiled, kernel
from fluidsched.simulation.kernel import run_kernel, run_many
from fluidsched.simulation.records import EngineRun
from fluidsched.simulation.reference import run_reference
from fluidsched.workload import ArrivalPath, read_trace


def _compare_many(kind: str, dyadic: bool, examples: int) -> None:
    counts = {"run": 0, "discarded": 0}

    @settings(max_examples=examples)
    @given(case=cases(kind, dyadic))
    def compare(case: Case) -> None:
        counts["run"] += 1
        reference, doubtful = run_reference_and_judge(case)
        if doubtful:
            counts["discarded"] += 1
            return
        assert_same_run(case.run(run_kernel), reference, exact=dyadic)

    compare()
    assert counts["discarded"] < 0.01 * counts["run"]


@pytest.mark.parametrize("dyadic", [True, False], ids=["dyadic", "real"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_equals_reference(kind: str, dyadic: bool) -> None:
    """200 random systems per rule with exact ties (dyadic), and 200 with none (real)."""
    _compare_many(kind, dyadic, 200)


@pytest.mark.slow
@pytest.mark.parametrize("dyadic", [True, False], ids=["dyadic", "real"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_equals_reference_on_many(kind: str, dyadic: bool) -> None:
    """The same on 2 000 random systems of each kind per rule."""
    _compare_many(kind, dyadic, 2000)


def _steady_path(count: int, seed: int) -> ArrivalPath:
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.exponential(0.1, count))
    return ArrivalPath.from_arrays(arrival, rng.integers(1, 200, count), rng.integers(1, 100, count))


def _bytes(run: EngineRun) -> bytes:
    return b"".join(np.asarray(getattr(run, field.name)).tobytes() for field in fields(run))


SERVER = Server(3000, IterationTime.affine(0.01, 1e-5, 1e-4, 1e-7), max_batch_size=32)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """Same paths, same bytes, in the order of the paths, for one thread, two and more than paths."""
    paths = [_steady_path(300, seed) for seed in range(5)]
    expected = [
        _bytes(run_kernel(path, SERVER, baselines.vllm(), horizon=20.0, occupancy_points=10))
        for path in paths
    ]
    for threads in (1, 2, 9, None):
        runs = run_many(paths, SERVER, baselines.vllm(), horizon=20.0, occupancy_points=10, threads=threads)
        assert [_bytes(run) for run in runs] == expected


def test_no_path_gives_no_run() -> None:
    assert run_many([], SERVER, baselines.vllm(), horizon=None) == []


def test_interrupt_stops_after_the_replications_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception in one replication ends the call; those not begun never run."""
    begun: list[ArrivalPath] = []

    def interrupted(path: ArrivalPath, *_: object, **__: object) -> EngineRun:
        begun.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel, "run_kernel", interrupted)
    paths = [_steady_path(1, seed) for seed in range(200)]
    with pytest.raises(KeyboardInterrupt):
        run_many(paths, SERVER, baselines.vllm(), horizon=None, threads=2)
    assert len(begun) < 200


@pytest.mark.parametrize("run", [run_kernel, lambda path, *a, **k: run_many([path], *a, **k)])
def test_iteration_time_without_pieces_is_refused(run: Callable[..., object]) -> None:
    """Closed forms need affine pieces; any other function is for the reference engine."""
    server = Server(100, IterationTime.function(lambda batch: 0.01))
    with pytest.raises(InputError, match=r"iteration.time"):
        run(_steady_path(3, 0), server, baselines.vllm(), horizon=None)


def test_every_rule_is_compiled_once() -> None:
    """Rejected requests, several rows, occupancy: never another specialisation of a loop."""
    path = ArrivalPath.from_arrays([0.0, 1.0, 2.0], [5, 5000, 5], [3, 3, 3])
    run = run_kernel(path, SERVER, baselines.vllm(), horizon=None)
    assert run.count("rejected") == 1
    run_kernel(_steady_path(5, 0), SERVER, baselines.orca(100), horizon=9.0, occupancy_points=4)
    wait = PolicyTable(
        "wait", "wait", (TableType("*", threshold=2, gate=1),), freeze=True, block_iterations=2
    )
    nested = PolicyTable(
        "nested",
        "nested-wait",
        (TableType("*", threshold=2, gate=2),),
        (Segment(1, 2), Segment(5, 1)),
        freeze=True,
        block_iterations=2,
    )
    for some in (path, _steady_path(5, 0)):
        run_kernel(some, SERVER, wait, horizon=None)
        run_kernel(some, SERVER, nested, horizon=None)
    ahead = PolicyTable(
        "ahead", "vllm", (TableType("*"),), lookahead=Lookahead("law", 0.0, (2, 4)), order="shortest_first",
        predictor="exact",
    )  # fmt: skip
    known = replace(ahead, lookahead=Lookahead("known"), order="fcfs")
    for some in (path, _steady_path(5, 0)):
        run_kernel(some, SERVER, ahead, horizon=None)
        run_kernel(some, SERVER, known, horizon=None)
    features = [tuple(map(str, signature[1:])) for signature in compiled.continuous.signatures]
    assert len(set(features)) == len(features)  # once with and once without look-ahead, or a cache to fill
    assert len(compiled.wait.signatures) == 1
    assert len(compiled.nested.signatures) == 1


def test_lengths_beyond_one_calendar() -> None:
    """Outputs longer than the calendar has days (2^17) finish when they should."""
    output = np.array([3, 140_000, 300_000, 131_072 + 3])
    path = ArrivalPath.from_arrays([0.0, 0.0, 1.0, 1.0], [5, 5, 5, 5], output)
    server = Server(math.inf, IterationTime.affine(0.5, 0.0, 0.0, 0.0))
    run = run_kernel(path, server, baselines.vllm(), horizon=None)
    start = np.array([0.0, 0.0, 1.0, 1.0])
    np.testing.assert_array_equal(run.finish_s, start + 0.5 * output)
    assert run.iterations == 300_002


def test_completions_far_apart_and_gaps_that_grow() -> None:
    """Ends in the same word of the calendar, in later words and thousands of days away; runs across no, one and many
    buckets of gaps, with one bend."""
    output = np.array([1, 2, 60, 63, 64, 65, 700, 4_090, 4_100, 4_101, 9_000])
    path = ArrivalPath.from_arrays(np.zeros(len(output)), np.full(len(output), 3), output)
    time = IterationTime.pieces([[0.25, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0**-15, 0.0]])
    server = Server(math.inf, time)
    kernel_run = run_kernel(path, server, baselines.vllm(), horizon=None)
    assert np.count_nonzero(kernel_run.gap_counts) > 10
    assert_same_run(kernel_run, run_reference(path, server, baselines.vllm(), horizon=None), exact=True)


def test_counters_beyond_32_bits() -> None:
    """The longest output a path can have: token counters pass 2^31 exactly."""
    output = 2**31 - 1
    path = ArrivalPath.from_arrays([0.0], [7], [output])
    server = Server(math.inf, IterationTime.affine(2.0**-10, 0.0, 0.0, 0.0))
    run = run_kernel(path, server, baselines.vllm(), horizon=None)
    assert run.iterations == output
    assert run.batch_token_sum == output + 6
    assert run.peak_kv == output + 6
    assert run.finish_s[0] == output * 2.0**-10


@pytest.mark.data
def test_azure_hour_equals_reference(data_root: Path) -> None:
    """The first 3 000 requests of the conversation trace, two pieces, memory binding: the same in both engines."""
    whole = read_trace(data_root / "traces" / "AzureLLMInferenceTrace_conv.csv")
    first = slice(0, 3000)
    path = ArrivalPath.from_arrays(
        whole.arrival_s[first] * 0.8, whole.prompt_tokens[first], whole.output_tokens[first]
    )
    server = catalog.server("a100-80gb", "llama-2-7b")
    for table in (baselines.vllm(), baselines.sarathi()):
        reference = run_reference(path, server, table, horizon=None, warmup=100.0)
        assert reference.preempted > 0
        assert_same_run(run_kernel(path, server, table, horizon=None, warmup=100.0), reference)


def test_kernel_swaps() -> None:
    """The kernel lost the switch once: requests then vanished from its accounts, recomputed at no cost."""
    path = ArrivalPath.from_arrays([0.0, 0.0], [3, 3], [4, 3])
    server = Server(8, IterationTime.affine(1.0, 0.25, 0.5, 0.0), swap_bandwidth=2.0)
    table = PolicyTable("swap", "vllm", (TableType("*"),), preemption="swap")
    run = run_kernel(path, server, table, horizon=None)
    np.testing.assert_array_equal(run.finish_s, [9.5, 13.0])
    assert (run.swapped_tokens, run.wasted_tokens, run.stored_end) == (4, 0, 0)


def test_what_swaps_at_time_zero_is_counted() -> None:
    """Regression: six admitted at time 0 into room for five; the last, with a cached token, goes out and is counted."""
    path = ArrivalPath.from_arrays(
        np.zeros(12), [1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1], np.ones(12, dtype=int),
        cached_prompt_tokens=[0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
    )  # fmt: skip
    server = Server(5.0, IterationTime.affine(0.001, 0, 0, 0), swap_bandwidth=0.5)
    star = TableType("*", threshold=6, gate=6)
    table = PolicyTable(
        "nested",
        "nested-wait",
        [star],
        segments=[Segment(0, 6)],
        block_iterations=1,
        freeze=True,
        preemption="swap",
    )
    kernel, reference = (run(path, server, table, horizon=None) for run in (run_kernel, run_reference))
    assert reference.swapped_tokens == 1
    assert_same_run(kernel, reference)
