"""Look-ahead admission and order by length: the rules by hand, and what they promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
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


def test_the_kernel_refuses_what_it_does_not_do() -> None:
    """Orders by length and look-ahead are for the reference engine; the error says so."""
    reserve = engine_table(lookahead=Lookahead("reserve", 4.0))
    for table in (_ahead(), reserve, engine_table(order="shortest_first", predictor="exact")):
        with pytest.raises(InputError, match="reference"):
            run_kernel(path_of((0.0, 1, 5)), server_of(9), table, horizon=None)
        started: list[str] = []
        with pytest.raises(InputError, match="reference"):
            fs.simulate(
                path_of((0.0, 1, 5)),
                server_of(9),
                [fs.baselines.vllm(), table.renamed("second")],
                progress=lambda stage, done, total, seen=started: seen.append(stage),
            )
        assert started == []  # nothing runs before the error
