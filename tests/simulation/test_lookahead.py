"""Look-ahead admission and order by length: the rules by hand, and what they promise."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernel_cases import assert_same_run
from numpy.testing import assert_array_equal
from simulation_cases import engine_table, path_of, run_checked, server_of, typed_table

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.policy import Lookahead
from fluidsched.server import IterationTime, Server
from fluidsched.simulation.kernel import run_kernel
from fluidsched.simulation.reference import run_reference
from fluidsched.workload import ArrivalPath

# ------------------------------------------------------------------ by hand; one second an iteration


def _ahead(mode: str = "known", headroom: float = 0.0, lengths: tuple[int, ...] = (), **fields: Any) -> Any:
    return engine_table(lookahead=Lookahead(mode, headroom, lengths), predictor="exact", **fields)


class TestByHand:
    def test_known_waits_until_both_peaks_fit(self):
        """C = 7. A (1 prompt, 5 out) holds 1, 2, …, 5, B (2, 3) 2, 3, 4. One iteration behind A they hold 4 + 4
        at t = 3, two behind 5 + 4 at t = 4, three behind 5 + 3, four behind 5 + 2 = 7, and then B is alone."""
        path = path_of((0.0, 1, 5), (1.0, 2, 3))
        plain, _ = run_checked(path, server_of(7), engine_table())
        assert (plain.admitted_s[1], plain.preempted) == (1.0, 1)
        run, _ = run_checked(path, server_of(7), _ahead())
        assert_array_equal(run.admitted_s, [0.0, 4.0])
        assert_array_equal(run.finish_s, [5.0, 7.0])
        assert run.preempted == 0
        roomy, _ = run_checked(path, server_of(8), _ahead())
        assert_array_equal(roomy.admitted_s, [0.0, 1.0])

    def test_headroom_is_kept_free(self):
        """The same with C = 9 and 2 tokens of headroom; alone, a request may use the headroom."""
        path = path_of((0.0, 1, 5), (1.0, 2, 3))
        run, _ = run_checked(path, server_of(9), _ahead(headroom=2.0))
        assert_array_equal(run.admitted_s, [0.0, 4.0])
        alone, _ = run_checked(path_of((0.0, 6, 5)), server_of(10), _ahead(headroom=2.0))
        assert_array_equal(alone.finish_s, [5.0])

    def test_blocks_are_counted_as_they_are_taken(self):
        """Blocks of 2: A takes 1, 1, 2, 2, 3 of them and B 1, 2, 2. One behind A they need 2 + 2 at most; with 3
        blocks B waits for A's end (2 + 2 at t = 3, 3 + 2 at t = 4, 3 + 1 at t = 4)."""
        path = path_of((0.0, 1, 5), (1.0, 2, 3))
        run, _ = run_checked(path, server_of(8, block_size=2), _ahead())
        assert_array_equal(run.admitted_s, [0.0, 1.0])
        run, _ = run_checked(path, server_of(6, block_size=2), _ahead())
        assert_array_equal(run.admitted_s, [0.0, 5.0])

    def test_incomplete_prompt_counts_its_peak(self):
        """Budget 3: B's prompt of 4 takes two iterations, so with A it counts 4 + 2 − 1 = 5 at every later one.

        C = 10: A (2, 4) is still to hold 4 and 5 when B asks at t = 1 (5 + 5 ≤ 10); C = 9 makes B wait for A's
        last iteration, after which A holds nothing ahead."""
        path = path_of((0.0, 2, 4), (1.0, 4, 2))
        run, _ = run_checked(path, server_of(10), _ahead(token_budget=3))
        assert_array_equal(run.admitted_s, [0.0, 1.0])
        run, _ = run_checked(path, server_of(9), _ahead(token_budget=3))
        assert_array_equal(run.admitted_s, [0.0, 3.0])

    def test_law_weighs_what_may_be_left(self):
        """Law: 2 or 6 tokens, evenly. At t = 1 A (3 prompt) holds 4 and u iterations on, u ≤ 4, 4 + u or nothing;
        B (2) would hold 2 + u for u ≤ 1 surely, for u ≤ 5 if it is long: 5.5 at u = 1, 4 + 3 = 7 at u = 4.

        A limit of 7 lets B in at t = 1. With 6, B waits for the end of A, which outlives the 2 at t = 2 and then
        surely holds more."""
        path = path_of((0.0, 3, 6), (1.0, 2, 2))
        run, _ = run_checked(path, server_of(9), _ahead("law", 2.0, (2, 6)))
        assert_array_equal(run.admitted_s, [0.0, 1.0])
        run, _ = run_checked(path, server_of(8), _ahead("law", 2.0, (2, 6)))
        assert_array_equal(run.admitted_s, [0.0, 6.0])

    def test_reserve_sets_room_aside_for_everybody(self):
        """R = 4, C = 12: prompts of 2 reserve 5 each, so two are in service, though three would fit."""
        path = path_of((0.0, 2, 2), (0.0, 2, 2), (0.0, 2, 2))
        run, _ = run_checked(path, server_of(12), engine_table(lookahead=Lookahead("reserve", 4.0)))
        assert_array_equal(run.admitted_s, [0.0, 0.0, 2.0])

    def test_refuted_belief_leaves_with_its_next_token(self):
        """A (1, 5) believed to be 2 long is expected to end at t = 2, so B enters at t = 1, and the two outgrow
        C = 7 at t = 3: B is preempted."""
        path = path_of((0.0, 1, 5), (1.0, 2, 3))
        wrong = replace(path, predicted_output_tokens=np.array([2, 3]))
        run, _ = run_checked(wrong, server_of(7), replace(_ahead(), predictor=None))
        assert run.admitted_s[1] == 1.0
        assert_array_equal(run.preemptions, [0, 1])

    def test_shortest_first(self):
        """One slot: after the first, by believed length, then by arrival; the lower ends where it says so."""
        path = path_of((0.0, 1, 2), (0.5, 1, 3), (0.5, 1, 1), (0.5, 1, 1))
        table = engine_table(order="shortest_first", predictor="exact", max_in_service=1)
        run, _ = run_checked(path, server_of(), table)
        assert_array_equal(run.admitted_s, [0.0, 4.0, 2.0, 3.0])
        lower = replace(
            path,
            predicted_output_tokens=np.array([9, 9, 9, 9]),
            predicted_output_minimum=np.array([1, 1, 2, 2]),
        )
        run, _ = run_checked(lower, server_of(), replace(table, predictor="lower"))
        assert_array_equal(run.admitted_s, [0.0, 2.0, 5.0, 6.0])


def test_known_lengths_never_preempt() -> None:
    """60 random systems with true lengths and decodes that never pause: nobody is ever preempted."""
    rng = np.random.default_rng(5)
    preempted_without = 0
    for _ in range(60):
        count = int(rng.integers(1, 60))
        path = ArrivalPath.from_arrays(
            np.cumsum(rng.exponential(1.0, count)), rng.integers(1, 30, count), rng.integers(1, 60, count)
        )
        block = int(rng.choice([1, 2, 5]))
        server = Server(
            int(rng.integers(100, 400)), IterationTime.affine(1.0, 0.01, 0.01, 0.0), block_size=block
        )
        plain = engine_table(max_in_service=20, token_budget=int(rng.integers(20, 60)))
        preempted_without += run_reference(path, server, plain, horizon=None).preempted
        table = replace(
            plain,
            lookahead=Lookahead("known"),
            predictor="exact",
            order=str(rng.choice(["fcfs", "shortest_first"])),
        )
        run = run_reference(path, server, table, horizon=None)
        assert run.verdict == "finished"
        assert run.preempted == 0
    assert preempted_without > 60


def test_paths_without_predictions_are_refused() -> None:
    """What a table believes must be in the path; the error says how to put it there."""
    path = path_of((0.0, 1, 5))
    for predictor, word in ((None, "predicted_output_tokens"), ("lower", "predicted_output_minimum")):
        for table in (_ahead(), engine_table(order="shortest_first")):
            with pytest.raises(InputError, match=word):
                run_reference(path, server_of(9), replace(table, predictor=predictor), horizon=None)
    gated = typed_table(
        "gated",
        {"A": {"threshold": 1, "period": 1, "max_hold_s": 1.0}},
        order="shortest_first",
        predictor="exact",
    )
    with pytest.raises(InputError, match="max_hold_s"):
        run_reference(path_of((0.0, 1, 1, "A")), server_of(), gated, horizon=None)


def _long_system(seed: int, block: int) -> tuple[ArrivalPath, Server]:
    """250 requests that fill memory, a dozen at a time, with predictions up to twice too long or too short."""
    rng = np.random.default_rng(seed)
    count = 250
    output = rng.geometric(1 / 30, count).clip(1, 60)
    path = ArrivalPath.from_arrays(
        np.cumsum(rng.exponential(1.2, count)),
        rng.integers(1, 80, count),
        output,
        predicted_output_tokens=np.maximum(1, output * 2.0 ** rng.uniform(-1.0, 1.0, count)).astype(np.int64),
    )
    return path, Server(1000, IterationTime.affine(1.0, math.pi / 400, 0.01, 1e-5), block_size=block)


@pytest.mark.parametrize("order", ["fcfs", "shortest_first"])
@pytest.mark.parametrize("mode", ["known", "predicted", "law", "reserve"])
def test_the_kernel_equals_the_reference_where_memory_is_full(mode: str, order: str) -> None:
    """Many in service, clocks that pass the forecasts' span many times, lengths cut at the limit, blocks of 3."""
    for seed, block in ((1, 1), (2, 3)):
        path, server = _long_system(seed, block)
        lengths = (2, 4, 7, 10, 13, 17, 21, 26, 31, 38, 46, 60) if mode == "law" else ()
        ahead = Lookahead("known" if mode == "predicted" else mode, 100.0, lengths)
        table = engine_table(
            lookahead=ahead, order=order, predictor="exact" if mode == "known" else None, token_budget=200
        )
        reference = run_reference(path, server, table, horizon=None)
        kernel = run_kernel(path, server, table, horizon=None)
        assert_same_run(kernel, reference)
        assert (reference.admitted_s > path.arrival_s + 30.0).any()  # they do wait for memory
        assert reference.iterations > 400


def test_requests_handed_over_are_forecast_like_others() -> None:
    """They enter with their prompt's KV and one token, and decode at once: 20 random systems, in both engines."""
    rng = np.random.default_rng(0)
    for trial in range(20):
        count = 30
        arrival = np.cumsum(rng.exponential(2.0, count))
        path = ArrivalPath.from_arrays(arrival, rng.integers(1, 20, count), rng.integers(2, 25, count))
        server = Server(
            int(rng.integers(60, 120)),
            IterationTime.affine(1.0, 0.013, 0.017, 0.0001),
            block_size=int(rng.choice([1, 3])),
            swap_bandwidth=1e3,
        )
        ahead = Lookahead("known") if trial % 2 else Lookahead("law", 0.0, (3, 9, 20))
        table = engine_table(
            lookahead=ahead, order=str(rng.choice(["fcfs", "shortest_first"])), predictor="exact"
        )
        runs = [
            run(path, server, table, horizon=None, first_token_s=arrival - 0.5)
            for run in (run_kernel, run_reference)
        ]
        assert_same_run(*runs)


def test_a_request_that_can_never_fit_ahead_does_not_slow_the_kernel() -> None:
    """Believed to need all of memory, it waits until it is alone, and all behind it with it."""
    path = path_of((0.0, 1, 600), (1.0, 4, 5), (2.0, 1, 1))
    believed = replace(path, predicted_output_tokens=np.array([600, 1_000_000, 1]))
    for headroom in (0.0, 30.0):
        table = replace(_ahead(headroom=headroom), predictor=None)
        run = run_kernel(believed, server_of(1000), table, horizon=None)
        assert_array_equal(run.admitted_s, [0.0, 600.0, 605.0])
        assert_same_run(run, run_reference(believed, server_of(1000), table, horizon=None))


def test_a_fresh_process_loads_look_ahead_from_the_cache() -> None:
    """The loop compiled with look-ahead is kept on disk beside the one without, and runs when loaded from there."""
    path = path_of((0.0, 1, 5), (1.0, 2, 3))
    run_kernel(path, server_of(7), _ahead(), horizon=None)  # compiled now, if not before
    script = """
from fluidsched import ArrivalPath, IterationTime, Server
from fluidsched.policy import Lookahead, PolicyTable, TableType
from fluidsched.simulation import compiled
from fluidsched.simulation.kernel import run_kernel

path = ArrivalPath.from_arrays([0.0, 1.0], [1, 2], [5, 3])
server = Server(7, IterationTime.affine(1.0, 0.0, 0.0, 0.0))
table = PolicyTable("t", "vllm", (TableType("*"),), lookahead=Lookahead("known"), predictor="exact")
print(run_kernel(path, server, table, horizon=None).admitted_s.tolist())
print(sum(compiled.continuous.stats.cache_hits.values()), sum(compiled.continuous.stats.cache_misses.values()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[0.0, 4.0]", "1 0"]


def test_runs_without_records_are_refused() -> None:
    """Beliefs are not carried from piece to piece of a path that is drawn while it runs; the error says so."""
    workload = fs.Workload([fs.RequestType("chat", 4.0, prompt_tokens=16, output_tokens=8)])
    for table in (_ahead(), engine_table(order="shortest_first", predictor="exact")):
        with pytest.raises(InputError, match="goes by output lengths"):
            fs.simulate(workload, server_of(100), table, horizon=9.0, replications=1, records=False)


def test_reserve_admits_nobody_whom_memory_cannot_hold_to_the_end():
    """C = 20: the first (3 prompt, 30 out) comes to 32 tokens, whatever is set aside, and would start over for ever."""
    path = path_of((0.0, 3, 30), (0.0, 3, 5))
    run, _ = run_checked(path, server_of(20), engine_table(lookahead=Lookahead("reserve", 4)))
    assert_array_equal(run.finish_s, [math.nan, 5.0])
