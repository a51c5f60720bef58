"""Cached prefixes from the path to the plan: what a prefill skips, what a resident holds, what tables make of it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import assert_same_run
from numpy.testing import assert_array_equal
from simulation_cases import MIXED, engine_table, run_checked, server_of

import fluidsched as fs
from fluidsched.bounds import no_wait_floor, wait_bounds
from fluidsched.errors import InputError
from fluidsched.policy import PolicyTable, TableType, wait_curve
from fluidsched.policy.table import Lookahead
from fluidsched.simulation.kernel import run_kernel
from fluidsched.simulation.laws import check_laws

AFFINE = fs.Server(50_000, fs.IterationTime.affine(0.01, 1e-4, 1e-5, 1e-8, 1e-9), max_batch_size=256)


def cached_path(*requests: tuple[float, int, int, int]) -> fs.ArrivalPath:
    """A path of (arrival, prompt, output, cached) tuples."""
    arrival, prompt, output, cached = zip(*requests, strict=True)
    return fs.ArrivalPath.from_arrays(arrival, prompt, output, cached_prompt_tokens=cached)


def chat(fraction: float, rate: float = 2.0) -> fs.Workload:
    return fs.Workload([fs.RequestType("chat", rate, 1000, 101, cached_prefix_fraction=fraction)])


# ---- the rule, by hand


def test_a_prefill_computes_and_attends_from_the_cached_part_on() -> None:
    """T = 1 + n_pf/4 + n_dec/2: 4 of 8 tokens cached, 4 of 4 not; KV counts whole prompts from the admission on."""
    run, batches = run_checked(
        cached_path((0.0, 8, 2, 4), (0.0, 4, 2, 0)), server_of(14, MIXED), engine_table()
    )
    assert [batch.prefill for batch in batches] == [((0, 4), (1, 4)), ()]
    assert batches[0].prefill_attention == 4 * (4 + 2) + 4 * 2
    assert [batch.held_tokens for batch in batches] == [12, 14]
    assert_array_equal(run.first_token_s, [3.0, 3.0])
    assert_array_equal(run.finish_s, [5.0, 5.0])
    assert (run.batch_token_sum, run.cached_tokens, run.kv_token_s) == (10, 4, 3.0 * 12 + 2.0 * 14)


def test_a_recompute_finds_the_prefix_again() -> None:
    """C = 8: the later request gives way at 4 s with 4 tokens, 2 of them cached, and recomputes 3 of 5."""
    run, batches = run_checked(
        cached_path((0.0, 3, 4, 0), (0.0, 3, 3, 2)), server_of(8, MIXED), engine_table()
    )
    assert [batch.end_s for batch in batches] == [2.0, 4.0, 5.5, 7.0, 8.75]
    assert [batch.preempted for batch in batches] == [(), (), (1,), (), ()]
    assert batches[-1].prefill == ((1, 3),)
    assert (run.wasted_tokens, run.cached_tokens, run.batch_token_sum) == (2, 2, 11)


def test_swapping_moves_the_prefix_with_the_rest() -> None:
    """2 tokens/s: all 4 tokens move out and back, and nothing is looked for in the cache again."""
    run, _ = run_checked(
        cached_path((0.0, 3, 4, 0), (0.0, 3, 3, 2)),
        server_of(8, MIXED, swap_bandwidth=2.0),
        engine_table(preemption="swap"),
    )
    assert_array_equal(run.finish_s, [9.0, 12.5])
    assert (run.swapped_tokens, run.cached_tokens, run.wasted_tokens) == (4, 2, 0)


def test_budgets_count_what_is_computed() -> None:
    """Orca runs a prompt of 9 of which 6 are cached in a budget of 3; without the cache it never fits."""
    table = engine_table("orca", token_budget=3, lookahead=Lookahead("reserve", 2))
    server = server_of(100, MIXED)
    run, batches = run_checked(cached_path((0.0, 9, 2, 6)), server, table)
    assert batches[0].prefill == ((0, 3),)
    assert run.count("finished") == 1
    assert run_checked(cached_path((0.0, 9, 2, 5)), server, table)[0].count("rejected") == 1


def test_a_cohort_of_wait_counts_what_is_computed() -> None:
    """A block of two newcomers of 9 prompt tokens, 6 cached, takes 6 tokens, and a server's budget of 6 suffices."""
    row = TableType("*", threshold=2, gate=2)
    table = PolicyTable("wait", "wait", (row,), freeze=True, block_iterations=1)
    path = cached_path((0.0, 9, 1, 6), (0.0, 9, 1, 6))
    run, batches = run_checked(path, server_of(18, MIXED, token_budget=6), table)
    assert batches[0].prefill_tokens == 6
    assert_array_equal(run.finish_s, [2.5, 2.5])
    with pytest.raises(InputError, match="token_budget"):
        run_checked(path, server_of(18, MIXED, token_budget=5), table)


def test_nothing_cached_is_a_path_without_the_column() -> None:
    """A column of zeros changes no byte of a run, in either engine."""
    path = chat(0.0).sample(20.0, seed=3)
    zeros = dataclasses.replace(path, cached_prompt_tokens=np.zeros(len(path), dtype=np.int64))
    table = fs.baselines.vllm(token_budget=512)
    runs = [run_kernel(p, AFFINE, table, horizon=20.0) for p in (path, zeros)]
    assert_array_equal(runs[0].finish_s, runs[1].finish_s)
    assert runs[0].iterations == runs[1].iterations
    assert runs[1].cached_tokens == 0


# ---- paths and workloads


def test_samples_carry_whole_tokens_with_the_stated_mean() -> None:
    """c is ⌊f p⌋ or one more; its mean lies within 4.5 standard errors of f p (10^-5 by chance)."""
    workload = fs.Workload(
        [
            fs.RequestType("a", 40.0, fs.lengths.uniform(1, 30), 5, cached_prefix_fraction=0.37),
            fs.RequestType("b", 5.0, 10, 5),
        ]
    )
    path = workload.sample(100.0, seed=11)
    plain = workload.with_cached_prefixes(0).sample(100.0, seed=11)
    assert plain.cached_prompt_tokens is None
    assert_array_equal(plain.arrival_s, path.arrival_s)
    assert_array_equal(plain.prompt_tokens, path.prompt_tokens)
    assert path.cached_prompt_tokens is not None
    mean = np.where(path.type == 0, np.minimum(0.37 * path.prompt_tokens, path.prompt_tokens - 1), 0.0)
    more = path.cached_prompt_tokens - np.floor(mean)
    assert set(np.unique(more)) <= {0.0, 1.0}
    chance = mean - np.floor(mean)
    assert abs((more - chance).sum()) < 4.5 * math.sqrt((chance * (1 - chance)).sum())


def test_the_column_travels(tmp_path: Path) -> None:
    """Files, pieces, bootstraps and fingerprints keep it; types made of a path have the path's share."""
    path = cached_path((0.0, 8, 2, 4), (1.0, 4, 2, 0), (2.0, 8, 3, 7))
    file = tmp_path / "path.csv"
    path.to_csv(file)
    again = fs.read_trace(file)
    assert_array_equal(again.cached_prompt_tokens, [4, 0, 7])
    assert (
        again.fingerprint
        == path.fingerprint
        != cached_path((0.0, 8, 2, 4), (1.0, 4, 2, 0), (2.0, 8, 3, 6)).fingerprint
    )
    assert_array_equal(path.selected(np.array([True, False, True])).cached_prompt_tokens, [4, 7])
    assert path.bootstrapped(10.0, seed=1).cached_prompt_tokens is not None
    (member,) = path.to_workload(types=1).types
    assert member.cached_prefix_fraction == 11 / 20
    bad = tmp_path / "bad.csv"
    bad.write_text("arrival_s,prompt_tokens,output_tokens,cached_prompt_tokens\n0,4,1,x\n")
    with pytest.raises(InputError, match=r"line 2 .* in 0\.\..*cached_prompt_tokens 'x'"):
        fs.read_trace(bad)


@pytest.mark.parametrize(
    ("cached", "word"), [([4], "below prompt_tokens, 4"), ([-1], "in 0.."), ([0, 1], "one per")]
)
def test_impossible_columns_are_named(cached: list[int], word: str) -> None:
    """The last token of a prompt is always computed."""
    with pytest.raises(InputError, match=word):
        fs.ArrivalPath.from_arrays([0.0], [4], [1], cached_prompt_tokens=cached)


# ---- the fluid limit, tables, bounds, the plan


def test_a_trajectory_settles_at_the_program() -> None:
    """Fluid of prompts of which 0.3 · 1001 = 300.3 tokens are cached: M*, ΔT* and n* of the program."""
    workload = fs.Workload([fs.RequestType("chat", 3.0, 1001, 101, cached_prefix_fraction=0.3)])
    run = fs.fluid_trajectory(workload, AFFINE, fs.baselines.vllm())
    ideal = fs.solve_fluid(workload, AFFINE)
    assert run.verdict == "equilibrium"
    assert run.resident_kv[-1] == pytest.approx(ideal.resident_kv, rel=1e-9)
    assert run.iteration_time[-1] == pytest.approx(ideal.iteration_time, rel=1e-9)
    limited = dataclasses.replace(fs.baselines.vllm(), token_budget=1001)
    assert fs.fluid_trajectory(workload, AFFINE, limited).verdict == "equilibrium"


def test_a_wait_table_takes_time_from_what_is_computed_and_memory_from_all() -> None:
    """T = c0 + n w with 400 of 1000 tokens computed, M = n W of whole prompts; both hold in the simulation."""
    server = fs.Server(math.inf, AFFINE.iteration_time)
    table = fs.compile_policy(fs.solve_fluid(chat(0.6), server), "wait", slack=0.1, block_iterations=1)
    (n,) = table.thresholds.tolist()
    work = 1e-4 * 400 + 1e-9 * 400 * 800 + 1e-5 * 100 + 1e-8 * (106_050 - 1000)
    assert table.certificate["cycle_time"]["value"] == pytest.approx(0.01 + n * work, rel=1e-12)
    assert table.certificate["cycle_time"]["guarantee"] == "certain"
    assert table.certificate["memory"]["value"] == n * 106_050
    assert table.certificate["largest_cohort"]["value"] == n * (400 + 100)
    runs = fs.simulate(chat(0.6), server, table, horizon=60.0, replications=2, seed=5, check=True)
    assert runs.measures("wait")["peak_kv"].max() <= n * 106_050
    bounds = {b.name: b for b in wait_bounds(table, chat(0.6), server)}
    assert bounds["memory"].value == n * 106_050
    assert runs.measures("wait")["mean_ttft"].max() < bounds["mean_ttft"].value
    part = fs.compile_policy(fs.solve_fluid(chat(0.6005), server), "wait", slack=0.1, block_iterations=1)
    assert part.certificate["cycle_time"]["guarantee"] == "expectation"  # 600 or 601 tokens


def test_every_kind_reaches_further_with_a_cache() -> None:
    """At a load that no table carries without the cache, WAIT, gated, capped and Nested WAIT exist with it."""
    server = fs.Server(400_000, AFFINE.iteration_time, max_batch_size=256)
    rate = 0.9 * fs.solve_fluid(chat(0.8), server).critical_rate
    without = fs.solve_fluid(chat(0.0), server).critical_rate
    fluid = fs.solve_fluid(chat(0.8, rate), server)
    assert fluid.is_stable
    tables = [
        fs.compile_policy(fluid, kind, slack=0.0) for kind in ("wait", "gated", "nested-wait", "lookahead")
    ]
    tables.append(fs.compile_policy(fluid, "capped"))
    runs = fs.simulate(chat(0.8, rate), server, tables[:2], horizon=90.0, replications=2, seed=1, check=True)
    for table in tables[:2]:
        assert runs.verdict(table.name) != "unstable"
        assert runs.measures(table.name)["request_throughput"].min() > without
    curve = wait_curve(fluid, slack=0.0, block_iterations=[7])
    assert curve.reason == (None,)


@pytest.mark.parametrize("kind", ["vllm", "sarathi"])
def test_the_kernel_agrees_where_prompts_are_long(kind: str) -> None:
    """A crowded server with preemptions, prefixes of every length: kernel and reference in all records."""
    rng = np.random.default_rng(4)
    prompts = rng.integers(1, 3000, 150)
    path = fs.ArrivalPath.from_arrays(
        np.cumsum(rng.exponential(0.05, 150)),
        prompts,
        rng.integers(1, 200, 150),
        cached_prompt_tokens=(rng.random(150) * prompts).astype(np.int64),
    )
    server = fs.Server(9_000, AFFINE.iteration_time, block_size=16)
    table = engine_table(kind, token_budget=512)
    run = run_kernel(path, server, table, horizon=None)
    reference, _ = run_checked(path, server, table)
    assert reference.preempted > 3
    assert_same_run(run, reference)
    check_laws(path, server, run, warmup=0.0)


def test_the_floor_is_met_by_a_request_alone() -> None:
    """One request with half of its prompt cached takes exactly the floor; nobody is faster in a crowd."""
    path = cached_path((0.0, 1000, 20, 500))
    floor = no_wait_floor(path, AFFINE)
    run = run_kernel(path, AFFINE, engine_table(), horizon=None)
    np.testing.assert_allclose([floor.ttft_s[0], floor.e2e_s[0]], [run.first_token_s[0], run.finish_s[0]])
    cheap = fs.Server(1000, fs.IterationTime.affine(0.01, 1e-6, 0.0, 1e-6))
    with pytest.raises(InputError, match="recomputing"):
        no_wait_floor(cached_path((0.0, 100, 5, 99)), cheap)


def test_a_plan_takes_cached_prefixes() -> None:
    """The main job from a workload that states them: tables, runs and comparison."""
    plan = fs.plan(chat(0.6), AFFINE, load=0.6, horizon=40.0, replications=2, curve=False)
    assert plan.runs.paths[0].cached_prompt_tokens is not None
    assert plan.fluid.load.max() == pytest.approx(0.6)
