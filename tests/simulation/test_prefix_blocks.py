"""A prefix cache that fills with the run: what is found, shared and dropped, by hand and by laws (rules 39 to 42)."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import assert_same_run
from numpy.testing import assert_array_equal
from simulation_cases import MIXED, UNIT, engine_table, run_checked, server_of, typed_table

import fluidsched as fs
from fluidsched.bounds import no_wait_floor
from fluidsched.errors import InputError
from fluidsched.policy.table import Lookahead, PolicyTable, TableType
from fluidsched.simulation.cluster import simulate_cluster
from fluidsched.simulation.kernel import run_kernel
from fluidsched.simulation.reference import run_reference
from fluidsched.simulation.rules import Decision, UserRule
from fluidsched.workload.prefix_cache import PromptBlocks, lru_cached_tokens


def named_path(
    *requests: tuple[float, int, int, str], block_tokens: int = 4, **columns: Any
) -> fs.ArrivalPath:
    """A path of (arrival, prompt, output, blocks) tuples; blocks is one letter per block."""
    arrival, prompt, output, names = zip(*requests, strict=True)
    blocks = PromptBlocks.from_lists(
        [[ord(name) for name in text] for text in names], block_tokens=block_tokens
    )
    return fs.ArrivalPath.from_arrays(arrival, prompt, output, prompt_blocks=blocks, **columns)


def computed_of(batches: list[Any], index: int) -> list[int]:
    """The chunks that a request computed."""
    return [tokens for batch in batches for i, tokens in batch.prefill if i == index]


# ---- the rules, by hand


def test_a_block_is_found_from_the_end_of_the_iteration_that_computed_it() -> None:
    """b = 4, iterations of 1 s: who comes with the first finds nothing, who comes at 1 s finds two blocks of three.

    The third block of its 12 tokens holds the last token, which is always computed.
    """
    path = named_path((0.0, 12, 3, "abc"), (0.0, 12, 3, "abc"), (1.0, 12, 3, "abc"), (1.0, 9, 1, "ax"))
    run, batches = run_checked(path, server_of(), engine_table())
    assert [computed_of(batches, i) for i in range(4)] == [[12], [12], [4], [5]]
    assert batches[1].found == (8, 4)
    assert run.cached_tokens == 12


def test_residents_share_blocks_but_not_those_computed_twice() -> None:
    """b = 4: with outputs of 3 the first ends with 14 tokens; the second finds 8 of its 12 and adds 4 + 2.

    19 tokens of memory are enough for both, whose KV counts 27; with 18 the second must give way.
    """
    path = named_path((0.0, 12, 3, "abc"), (1.0, 12, 3, "abc"))
    run, batches = run_checked(path, server_of(19), engine_table())
    assert (run.preempted, run.peak_kv) == (0, 14 + 13)
    assert [batch.held_tokens for batch in batches] == [12, 13 + 12, 14 + 13, 14]
    assert run_checked(path, server_of(18), engine_table())[0].preempted == 1


def test_who_is_preempted_finds_its_own_blocks_again() -> None:
    """C = 18 at 2 s: the second, with 8 prompt tokens found and 4 computed, gives way and then computes 1 of 13.

    All three blocks of its prompt end before the token it still has to compute, and the first has left them there.
    """
    path = named_path((0.0, 12, 3, "abc"), (1.0, 12, 3, "abc"))
    run, batches = run_checked(path, server_of(18), engine_table())
    assert [batch.preempted for batch in batches] == [(), (), (1,), (), ()]
    assert computed_of(batches, 1) == [4, 1]
    assert (run.wasted_tokens, run.cached_tokens) == (4, 12)


def test_the_last_block_is_dropped_first() -> None:
    """b = 4, C = 20: three blocks stay of the first, the second needs 12 tokens: "c" is dropped, "ab" is found."""
    path = named_path((0.0, 12, 1, "abc"), (2.0, 11, 2, "xy"), (5.0, 12, 1, "abc"), (7.0, 12, 1, "abc"))
    _, batches = run_checked(path, server_of(20), engine_table())
    assert computed_of(batches, 2) == [4]
    _, batches = run_checked(path, server_of(16), engine_table())
    assert computed_of(batches, 2) == [8]
    assert computed_of(batches, 3) == [4]


def test_found_again_is_used_again() -> None:
    """C = 12: "a" found at 2 s is younger than "x" of 1 s, so that "x" goes when "p" needs its room."""
    requests = [(0.0, 5, 1, "a"), (1.0, 5, 1, "x"), (2.0, 5, 1, "a"), (3.0, 5, 1, "p")]
    found_a = named_path(*requests, (4.0, 5, 1, "a"))
    found_x = named_path(*requests, (4.0, 5, 1, "x"))
    assert computed_of(run_checked(found_a, server_of(12), engine_table())[1], 4) == [1]
    assert computed_of(run_checked(found_x, server_of(12), engine_table())[1], 4) == [5]


def test_memory_is_free_for_admission_but_for_blocks_in_use() -> None:
    """C = 20, outputs of 5: beside the 13 tokens of the first, 12 more fit only because 8 of them are its own."""
    shared = named_path((0.0, 12, 5, "abc"), (1.0, 12, 1, "abz"))
    other = named_path((0.0, 12, 5, "abc"), (1.0, 12, 1, "xyz"))
    assert run_checked(shared, server_of(20), engine_table())[0].admitted_s[1] == 1.0
    assert run_checked(other, server_of(20), engine_table())[0].admitted_s[1] == 5.0


def test_blocks_of_the_server_divide_those_of_the_path() -> None:
    """Named blocks of 4 are two of a server's blocks of 2: 3 + 3 - 2 blocks hold prompts of 6 and 6 tokens."""
    path = named_path((0.0, 6, 2, "a"), (1.0, 6, 1, "a"))
    server = server_of(10, block_size=2)
    run, _ = run_checked(path, server, engine_table())
    assert run.admitted_s[1] == 1.0
    assert run_checked(path, server_of(8, block_size=2), engine_table())[0].admitted_s[1] == 2.0


def test_a_cohort_of_wait_computes_what_its_rows_do_not_find() -> None:
    """Two at once compute all their prompts; the next two find what these computed, whatever their row."""
    path = named_path(
        (0.0, 5, 1, "a"), (0.0, 5, 1, "b"), (1.0, 5, 1, "b"), (1.0, 5, 1, "b"),
        type=[0, 1, 0, 0], type_names=("u", "v"),
    )  # fmt: skip
    rows = {"u": {"threshold": 2, "gate": 1}, "v": {"threshold": 2, "gate": 1}}
    _, batches = run_checked(path, server_of(40), typed_table("wait", rows))
    assert [batch.prefill_tokens for batch in batches] == [10, 2]


def test_a_pool_has_one_cache_per_replica() -> None:
    """Round robin over two replicas: the third request finds what the first left, the fourth what the second did."""
    path = named_path((0.0, 5, 1, "a"), (0.0, 5, 1, "b"), (2.0, 5, 1, "a"), (2.0, 5, 1, "a"))
    pools, router = [fs.Pool(server_of(40), 2)], fs.routers.round_robin()
    for engine in ("kernel", "reference"):
        runs = simulate_cluster(path, pools, engine_table(), router, engine=engine, check=True)
        assert [run.batch_token_sum for run in runs.replica_runs[0][0]] == [5 + 1, 5 + 5]


# ---- laws and witnesses


@st.composite
def cases(draw: st.DrawFn) -> tuple[fs.ArrivalPath, fs.Server, PolicyTable]:
    """Trees of prompts: each request goes on from a prefix of an earlier one."""
    block = draw(st.sampled_from([1, 2, 4]))
    count = draw(st.integers(1, 20))
    chains: list[list[int]] = [[]]
    prompts = []
    for i in range(count):
        parent = chains[draw(st.integers(0, len(chains) - 1))]
        kept = draw(st.integers(0, len(parent)))
        own = draw(st.integers(0 if block > 1 else 1, 4))
        chains.append([*parent[:kept], *(100 * i + k for k in range(own))][:8])
        prompts.append(max(block * len(chains[-1]) + draw(st.integers(0, block - 1)), 1))
    gaps = [draw(st.integers(0, 8)) * 0.25 for _ in range(count)]
    outputs = [draw(st.integers(1, 8)) for _ in range(count)]
    path = fs.ArrivalPath.from_arrays(
        np.cumsum(gaps),
        prompts,
        outputs,
        prompt_blocks=PromptBlocks.from_lists(chains[1:], block_tokens=block),
        patience_s=draw(st.none() | st.just([2.0] * count)),
        abort_after_s=draw(st.none() | st.just([6.0] * count)),
    )
    kind = draw(st.sampled_from(["vllm", "sarathi", "vllm_v0", "orca", "wait"]))
    fields: dict[str, Any] = {"preemption": draw(st.sampled_from(["recompute", "restart"]))}
    if kind == "wait":
        row = TableType("*", threshold=3, gate=1)
        return (
            path,
            draw(_servers(block)),
            PolicyTable("wait", kind, (row,), freeze=True, block_iterations=2, **fields),
        )
    if kind == "orca":
        fields["lookahead"] = Lookahead("reserve", 8)
    elif kind in ("vllm", "sarathi"):
        fields["token_budget"] = draw(st.sampled_from([None, 3, 9]))
        fields["whole_prompt_admission"] = draw(st.booleans())
    return path, draw(_servers(block)), engine_table(kind, **fields)


def _servers(block: int) -> st.SearchStrategy[fs.Server]:
    capacities = st.sampled_from([40, 48, 80, math.inf])
    sizes = st.sampled_from([None, *(size for size in (1, 2, 4) if block % size == 0)])
    return st.builds(lambda capacity, size: server_of(capacity, MIXED, block_size=size), capacities, sizes)


@st.composite
def kernel_cases(draw: st.DrawFn, looking_ahead: bool) -> tuple[fs.ArrivalPath, fs.Server, PolicyTable]:
    """Those of them that the kernel runs, with knobs that decide how much of a prompt fits, and little memory."""
    path, server, table = draw(cases())
    kind = draw(st.sampled_from(["vllm", "capped", "sarathi", "gated"]))
    fields: dict[str, Any] = {
        "preemption": table.preemption,
        "token_budget": draw(st.sampled_from([None, 3, 9])),
        "chunk_tokens": draw(st.sampled_from([None, None, 2, 5])),
        "whole_prompt_admission": draw(st.booleans()),
        "watermark": draw(st.sampled_from([0.0, 0.0, 0.1])),
        "max_in_service": draw(st.sampled_from([None, 3])),
    }
    if kind in ("vllm", "capped"):
        fields["prefill_interval"] = draw(st.sampled_from([None, None, 3]))
    if looking_ahead:
        fields |= {"lookahead": draw(st.sampled_from([Lookahead("known"), Lookahead("law", 0.0, (2, 5, 8))]))}
        fields["predictor"] = "exact"
    if kind == "gated":
        table = PolicyTable(
            "gated", kind, (TableType("*", threshold=2, gate=2, period=3, max_hold_s=1.5),), **fields
        )
    elif table.kind != "orca":
        table = engine_table(kind, **fields)
    capacity = draw(st.sampled_from([server.kv_capacity, 44]))
    return (
        dataclasses.replace(path, patience_s=None, abort_after_s=None),
        dataclasses.replace(server, kv_capacity=capacity),
        table,
    )


def _compare(looking_ahead: bool) -> None:
    """The same times, preemptions and tokens found: instants are dyadic, so exactly."""

    @settings(max_examples=200)
    @given(kernel_cases(looking_ahead))
    def compare(case: tuple[fs.ArrivalPath, fs.Server, PolicyTable]) -> None:
        path, server, table = case
        reference = run_reference(path, server, table, horizon=None)
        assert_same_run(run_kernel(path, server, table, horizon=None), reference, exact=True)

    compare()


def test_the_kernel_fills_its_cache_as_the_reference_does() -> None:
    """200 random trees of prompts under vllm, capped, sarathi, orca and gated tables of any knob."""
    _compare(looking_ahead=False)


@pytest.mark.slow
def test_the_kernel_fills_its_cache_and_looks_ahead_as_the_reference_does() -> None:
    """The same with known lengths and laws of lengths."""
    _compare(looking_ahead=True)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_law_holds_with_shared_blocks(case: tuple[fs.ArrivalPath, fs.Server, PolicyTable]) -> None:
    """Tokens, gaps, Little's laws; what is found was computed before, and distinct blocks fit the memory."""
    path, server, table = case
    run_checked(path, server, table, horizon=60.0)


def test_without_pressure_it_finds_what_the_list_of_arrivals_finds() -> None:
    """One after the other in unlimited memory: every request finds what an unlimited cache of its own holds."""
    rng = np.random.default_rng(3)
    lists = [[int(rng.integers(0, 3)) for _ in range(int(rng.integers(0, 6)))] for _ in range(60)]
    names = [[hash(tuple(names[: k + 1])) for k in range(len(names))] for names in lists]
    prompts = np.array([4 * len(chain) + int(rng.integers(0, 4)) or 1 for chain in names])
    path = fs.ArrivalPath.from_arrays(
        100.0 * np.arange(60),
        prompts,
        np.full(60, 5),
        prompt_blocks=PromptBlocks.from_lists(names, block_tokens=4),
    )
    expected = lru_cached_tokens(prompts, names, block_tokens=4, cache_tokens=math.inf)
    _, batches = run_checked(path, server_of(time=UNIT), engine_table())
    assert [batch.found[0] for batch in batches if batch.admitted] == expected.tolist()
    assert expected.sum() > 100


def test_names_that_are_all_different_change_nothing() -> None:
    """Nothing shared, nothing found: the records of a path without names."""
    workload = fs.Workload(
        [fs.RequestType("chat", 3.0, fs.lengths.uniform(4, 40), fs.lengths.uniform(1, 20))]
    )
    path = workload.sample(40.0, seed=2)
    chains = [
        [100 * i + k for k in range(prompt // 4)] for i, prompt in enumerate(path.prompt_tokens.tolist())
    ]
    named = fs.ArrivalPath.from_arrays(
        path.arrival_s,
        path.prompt_tokens,
        path.output_tokens,
        prompt_blocks=PromptBlocks.from_lists(chains, block_tokens=4),
    )
    server = server_of(400, MIXED, max_batch_size=8)
    plain, with_names = (
        run_checked(given, server, engine_table(token_budget=16))[0] for given in (path, named)
    )
    assert plain.preempted == with_names.cached_tokens == 0
    assert (plain.admitted_s > path.arrival_s + 1.0).any()
    assert_array_equal(plain.finish_s, with_names.finish_s)


@pytest.mark.data
def test_a_trace_shares_memory(data_root: Path) -> None:
    """300 requests of the Mooncake trace on a server that holds a few: much of what an unlimited store finds."""
    file = data_root / "traces" / "mooncake_synthetic_trace.jsonl"
    path = fs.read_trace(file, prefix_cache_tokens="shared").selected(slice(300))
    server = fs.Server(400_000, fs.IterationTime.affine(0.02, 5e-5, 1e-4, 5e-8), max_batch_size=128)
    run, _ = run_checked(path, server, fs.baselines.vllm(token_budget=8192))
    most = fs.read_trace(file, prefix_cache_tokens=math.inf).selected(slice(300)).cached_prompt_tokens
    assert most is not None
    assert run.count("finished") == 300
    assert 0.2 * most.sum() < run.cached_tokens < most.sum()
    assert_same_run(run_kernel(path, server, fs.baselines.vllm(token_budget=8192), horizon=None), run)


# ---- the column


def test_names_travel_with_their_requests() -> None:
    """Selections keep them, fingerprints tell them apart, files and bootstraps do without or say so."""
    path = named_path((0.0, 8, 1, "ab"), (1.0, 5, 1, "a"), (2.0, 9, 1, "cd"))
    kept = path.selected(np.array([True, False, True]))
    assert kept.prompt_blocks is not None
    assert [kept.prompt_blocks.of(i).tolist() for i in range(2)] == [[0, 1], [2, 3]]
    assert path.fingerprint != named_path((0.0, 8, 1, "ab"), (1.0, 5, 1, "c"), (2.0, 9, 1, "cd")).fingerprint
    assert "block" not in path.to_csv()
    assert_array_equal(path.most_cached_tokens, [4, 4, 8])
    floor = no_wait_floor(path, fs.Server(100, fs.IterationTime.affine(1.0, 1.0, 0.0, 0.0)))
    assert_array_equal(floor.ttft_s, [5.0, 2.0, 2.0])
    with pytest.raises(InputError, match="name their blocks"):
        path.bootstrapped(10.0, seed=1)


def test_what_cannot_be_is_refused() -> None:
    """Too few names, another column beside them, blocks that do not divide, swapping, rules in Python; on the kernel
    requests that leave, WAIT, and routers that look."""
    with pytest.raises(InputError, match=r"request 0 must name the 2 whole blocks.*got 1 names"):
        named_path((0.0, 8, 1, "a"))
    with pytest.raises(InputError, match="be None with prompt_blocks"):
        named_path((0.0, 8, 1, "ab"), cached_prompt_tokens=[4])
    with pytest.raises(InputError, match="rise from 0"):
        PromptBlocks(4, np.array([0, 2, 1]), np.array([5]))
    path = named_path((0.0, 8, 2, "ab"))
    with pytest.raises(InputError, match=r"server\.block_size.*divide the 4 tokens"):
        run_reference(path, server_of(30, block_size=3), engine_table(), horizon=None)
    with pytest.raises(InputError, match="preemption"):
        run_reference(path, server_of(30, swap_bandwidth=1.0), engine_table(preemption="swap"), horizon=None)
    rule = UserRule("mine", lambda view: Decision({}))
    with pytest.raises(InputError, match="a rule in Python"):
        run_reference(path, server_of(30), rule, horizon=None)
    leaving = dataclasses.replace(path, patience_s=np.array([1.0]))
    wait = typed_table("wait", {"a": {"threshold": 1, "gate": 1}})
    for other, table in (
        (leaving, engine_table()),
        (path, engine_table("vllm_v0")),
        (named_path((0.0, 8, 2, "ab"), type=[0], type_names=("a",)), wait),
    ):
        with pytest.raises(InputError, match="be 'reference' for a prefix cache"):
            run_kernel(other, server_of(30), table, horizon=None)
    with pytest.raises(InputError, match="be 'reference' for a router that looks"):
        simulate_cluster(path, [fs.Pool(server_of(30), 2)], engine_table(), fs.routers.least_kv())
