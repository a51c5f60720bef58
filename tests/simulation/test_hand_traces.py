"""Hand-computed traces: two to four requests, every time asserted exactly, for every rule."""

from __future__ import annotations

import math

import pytest
from numpy.testing import assert_array_equal
from simulation_cases import (
    MIXED,
    engine_table,
    nested_table,
    path_of,
    run_checked,
    server_of,
    typed_table,
)

from fluidsched.errors import InputError, SimulationError
from fluidsched.policy.table import Lookahead
from fluidsched.server import IterationTime
from fluidsched.simulation import simulate
from fluidsched.simulation.reference import run_reference

nan = math.nan


def _reserve(tokens):
    return Lookahead("reserve", tokens)


class TestVllm:
    def test_running_first_then_fcfs(self):
        """Three requests, T = 1 + n_pf/4 + n_dec/2: prefill and decode share iterations."""
        path = path_of((0.0, 4, 3), (0.5, 2, 1), (2.5, 8, 2))
        run, batches = run_checked(path, server_of(time=MIXED), engine_table())
        assert_array_equal(run.admitted_s, [0.0, 2.0, 4.0])
        assert_array_equal(run.first_token_s, [2.0, 4.0, 7.5])
        assert_array_equal(run.finish_s, [7.5, 4.0, 9.0])
        assert (run.verdict, run.end_s, run.busy_s, run.iterations) == ("finished", 9.0, 9.0, 4)
        assert run.kv_token_s == 4 * 2.0 + (5 + 2) * 2.0 + (6 + 8) * 3.5 + 9 * 1.5
        assert (run.resident_s, run.waiting_s) == (2.0 + 4.0 + 7.0 + 1.5, 1.5 + 1.5)
        assert (run.batch_size_sum, run.batch_token_sum, run.peak_kv, run.kv_end) == (6, 17, 14, 0)
        assert run.emitted_tokens == 6
        assert [batch.kv_tokens for batch in batches] == [0, 5, 6, 9]
        assert [batch.held_tokens for batch in batches] == [4, 7, 14, 9]

    def test_prompts_are_chunked_to_the_budget(self):
        """Budget 4: chunks 4 and 2 of a prompt of 6; attention work adds up to p²/2 for each prompt."""
        path = path_of((0.0, 6, 2), (0.0, 3, 1))
        run, batches = run_checked(path, server_of(time=MIXED), engine_table(token_budget=4))
        assert [batch.prefill for batch in batches] == [((0, 4),), ((0, 2), (1, 2)), ((1, 1),)]
        assert [batch.prefill_attention for batch in batches] == [8.0, 12.0, 2.5]
        assert sum(batch.prefill_attention for batch in batches) == 6**2 / 2 + 3**2 / 2
        assert_array_equal(run.admitted_s, [0.0, 2.0])
        assert_array_equal(run.first_token_s, [4.0, 5.75])
        assert_array_equal(run.finish_s, [5.75, 5.75])

    def test_the_smaller_budget_binds_and_chunk_tokens_caps_one_request(self):
        """Table budget 9, server budget 4, chunk_tokens 3: the first takes 3, the second what is left."""
        path = path_of((0.0, 6, 2), (0.0, 3, 1))
        table = engine_table(token_budget=9, chunk_tokens=3)
        _, batches = run_checked(path, server_of(token_budget=4), table)
        assert [batch.prefill for batch in batches] == [((0, 3), (1, 1)), ((0, 3), (1, 1)), ((1, 1),)]

    def test_preemption_by_recompute(self):
        """C = 8: the later of two loses 4 tokens, re-prefills prompt + 2 and emits its third token."""
        path = path_of((0.0, 3, 4), (0.0, 3, 3))
        run, batches = run_checked(path, server_of(8, MIXED), engine_table())
        assert_array_equal(run.first_token_s, [2.5, 2.5])
        assert_array_equal(run.finish_s, [7.5, 9.75])
        assert_array_equal(run.preemptions, [0, 1])
        assert_array_equal(run.admitted_s, [0.0, 0.0])
        assert (run.preempted, run.wasted_tokens) == (1, 4)
        assert [batch.preempted for batch in batches] == [(), (), (1,), (), ()]
        assert batches[-1].prefill == ((1, 5),)
        assert run.waiting_s == 7.5 - 4.5

    def test_preemption_by_restart(self):
        """The same, tokens lost: the first-token time is that of the last start."""
        path = path_of((0.0, 3, 4), (0.0, 3, 3))
        run, _ = run_checked(path, server_of(8, MIXED), engine_table(preemption="restart"))
        assert_array_equal(run.first_token_s, [2.5, 9.25])
        assert_array_equal(run.finish_s, [7.5, 12.25])
        assert run.emitted_tokens == 4 + 2 + 3

    def test_nobody_enters_in_an_iteration_that_preempts(self):
        """Memory freed by a preemption is not given to a waiting request in the same iteration."""
        path = path_of((0.0, 3, 4), (0.0, 3, 3), (1.0, 1, 1))
        run, batches = run_checked(path, server_of(8), engine_table(max_in_service=2))
        assert batches[2].preempted == (1,)
        assert batches[2].admitted == ()
        assert run.admitted_s[2] > 3.0

    def test_preempted_requests_return_before_newcomers(self):
        """Preempted by successive iterations, the last preempted returns first; a newcomer comes after."""
        path = path_of((0.0, 2, 8), (0.0, 2, 4), (0.0, 2, 4), (0.5, 1, 1))
        run, batches = run_checked(path, server_of(9), engine_table(max_in_service=3))
        assert [i for batch in batches for i in batch.preempted] == [2, 1]
        assert [i for batch in batches for i in batch.admitted] == [0, 1, 2, 1, 2, 3]
        assert run.admitted_s[3] == 9.0

    def test_whole_prompt_admission(self):
        """On: prompt + tokens must be free now. Off: only the first chunk must be."""
        path = path_of((0.0, 4, 3), (0.0, 8, 1))
        strict, _ = run_checked(path, server_of(10), engine_table(token_budget=6))
        loose, _ = run_checked(
            path, server_of(10), engine_table(token_budget=6, whole_prompt_admission=False)
        )
        assert_array_equal(strict.admitted_s, [0.0, 3.0])
        assert_array_equal(loose.admitted_s, [0.0, 0.0])

    def test_watermark_and_kv_limit_bind_only_while_somebody_is_resident(self):
        """Watermark 0.2 of 10 leaves 8 to admission; a lone request of 9 enters all the same."""
        path = path_of((0.0, 4, 2), (0.0, 5, 1))
        for fields in ({"watermark": 0.2}, {"kv_limit_tokens": 8.5}):
            run, _ = run_checked(path, server_of(10), engine_table(**fields))
            assert_array_equal(run.admitted_s, [0.0, 2.0])
            alone, _ = run_checked(path_of((0.0, 9, 2)), server_of(10), engine_table(**fields))
            assert_array_equal(alone.finish_s, [2.0])

    def test_blocks(self):
        """Blocks of 2: 3 tokens take 2 blocks, so two requests need C = 8 though they hold 6 tokens."""
        path = path_of((0.0, 3, 2), (0.0, 3, 2))
        both, _ = run_checked(path, server_of(8, block_size=2), engine_table())
        one, _ = run_checked(path, server_of(7, block_size=2), engine_table())
        assert_array_equal(both.finish_s, [2.0, 2.0])
        assert_array_equal(one.finish_s, [2.0, 4.0])

    def test_slots_count_partly_prefilled_requests(self):
        """max_in_service 1: the second waits until the first has left; the server's limit binds alike."""
        path = path_of((0.0, 4, 2), (0.0, 1, 1))
        for table, limits in (
            (engine_table("capped", max_in_service=1, token_budget=3), {}),
            (engine_table(token_budget=3), {"max_batch_size": 1}),
        ):
            run, _ = run_checked(path, server_of(**limits), table)
            assert_array_equal(run.admitted_s, [0.0, 3.0])

    def test_prefill_interval(self):
        """N = 3: prefills are at least three iterations apart while the queue empties at each release."""
        path = path_of((0.0, 2, 9), (0.5, 2, 2))
        run, _ = run_checked(path, server_of(), engine_table(prefill_interval=3))
        assert_array_equal(run.admitted_s, [0.0, 3.0])

    def test_prefill_interval_is_off_while_the_queue_was_left_full(self):
        """With a third request kept out by the slots at the release, its admission is not held."""
        path = path_of((0.0, 2, 9), (0.5, 2, 2), (0.75, 2, 2))
        run, _ = run_checked(path, server_of(), engine_table(prefill_interval=3, max_in_service=2))
        assert_array_equal(run.admitted_s, [0.0, 3.0, 5.0])

    def test_prefill_interval_holds_chunks_of_residents(self):
        """A partly prefilled resident waits for the release while the other decodes."""
        path = path_of((0.0, 1, 9), (0.5, 4, 1))
        run, batches = run_checked(path, server_of(), engine_table(prefill_interval=2, token_budget=3))
        assert [batch.prefill for batch in batches[:5]] == [((0, 1),), (), ((1, 2),), (), ((1, 2),)]
        assert run.first_token_s[1] == 5.0


class TestSarathi:
    def test_decodes_come_first(self):
        """A younger decode is scheduled before an older prompt's chunk."""
        path = path_of((0.0, 7, 2), (0.0, 1, 3))
        _, batches = run_checked(path, server_of(), engine_table("sarathi", token_budget=4, chunk_tokens=3))
        assert batches[1].decode == (1,)
        assert batches[1].prefill == ((0, 3),)

    def test_a_chunk_takes_back_the_memory_of_a_younger_decode(self):
        """C = 9: a chunk preempts the decode already in the batch, whose token is withdrawn."""
        path = path_of((0.0, 7, 2), (0.0, 1, 5))
        table = engine_table("sarathi", token_budget=4, chunk_tokens=3)
        run, batches = run_checked(path, server_of(9, MIXED), table)
        assert (batches[2].decode, batches[2].prefill, batches[2].preempted) == ((), ((0, 1),), (1,))
        assert_array_equal(run.first_token_s, [5.5, 2.0])
        assert_array_equal(run.finish_s, [7.0, 11.75])
        assert run.wasted_tokens == 2


class TestOrca:
    def test_room_for_the_longest_output_is_set_aside(self):
        """R = 3, C = 10: prompts of 3 reserve 5 each, so the third enters when the first leaves."""
        path = path_of((0.0, 3, 1), (0.0, 3, 3), (0.0, 3, 2))
        table = engine_table("orca", lookahead=_reserve(3))
        run, _ = run_checked(path, server_of(10), table)
        assert_array_equal(run.admitted_s, [0.0, 0.0, 1.0])
        assert_array_equal(run.finish_s, [1.0, 3.0, 3.0])
        assert run.preempted == 0

    def test_prompts_run_whole_within_the_budget(self):
        """Budget 5: prompts of 3 enter one per iteration; nothing is chunked."""
        path = path_of((0.0, 3, 2), (0.0, 3, 1))
        table = engine_table("orca", lookahead=_reserve(3), token_budget=5)
        _, batches = run_checked(path, server_of(), table)
        assert [batch.prefill for batch in batches] == [((0, 3),), ((1, 3),)]

    def test_a_longer_output_than_reserved_is_an_error(self):
        with pytest.raises(InputError, match="4 output tokens"):
            run_reference(
                path_of((0.0, 3, 4)), server_of(), engine_table("orca", lookahead=_reserve(3)), horizon=None
            )


class TestSwap:
    def test_a_decode_moves_out_and_back(self):
        """C = 8, 2 tokens/s: 4 tokens moved out and back take 2 s each time, and nothing is recomputed."""
        path = path_of((0.0, 3, 4), (0.0, 3, 3))
        server = server_of(8, MIXED, swap_bandwidth=2.0)
        run, batches = run_checked(path, server, engine_table(preemption="swap"))
        assert [batch.end_s for batch in batches] == [2.5, 4.5, 8.0, 9.5, 13.0]
        assert [batch.preempted for batch in batches] == [(), (), (1,), (), ()]
        assert (batches[-1].prefill, batches[-1].decode, batches[-1].kv_tokens) == ((), (1,), 5)
        assert_array_equal(run.finish_s, [9.5, 13.0])
        assert (run.wasted_tokens, run.swapped_tokens, run.stored_end) == (0, 4, 0)
        assert run.waiting_s == 9.5 - 4.5
        assert run.gap_s == (4.5 - 2.5) * 2 + (8.0 - 4.5) + (9.5 - 8.0) + (13.0 - 4.5)

    def test_a_prompt_goes_on_where_it_stopped(self):
        """T = 1, 6 tokens/s: 6 of 8 prompt tokens move out at 2 s and back at 9 s, then 2 are computed."""
        path = path_of((0.0, 2, 8), (0.0, 8, 1))
        table = engine_table(preemption="swap", chunk_tokens=3, whole_prompt_admission=False)
        run, batches = run_checked(path, server_of(10, swap_bandwidth=6.0), table)
        assert [batch.prefill for batch in batches if batch.prefill] == [
            ((0, 2), (1, 3)),
            ((1, 3),),
            ((1, 2),),
        ]
        assert_array_equal(run.finish_s, [9.0, 11.0])

    def test_what_is_stored_at_the_horizon(self):
        """Cut at 7 s, while the later request's 4 tokens are with the host."""
        path = path_of((0.0, 3, 4), (0.0, 3, 3))
        server = server_of(8, MIXED, swap_bandwidth=2.0)
        run, _ = run_checked(path, server, engine_table(preemption="swap"), horizon=7.0)
        assert (run.kv_end, run.stored_end) == (4, 4)

    def test_refusals(self):
        """No bandwidth; a rule that does not swap."""
        path, table = path_of((0.0, 3, 4)), engine_table(preemption="swap")
        with pytest.raises(InputError, match=r"server\.swap_bandwidth must be given"):
            run_reference(path, server_of(8), table, horizon=None)
        orca = engine_table("orca", preemption="swap", lookahead=Lookahead("reserve", 4))
        with pytest.raises(InputError, match="preemption must be 'recompute' or 'restart'"):
            run_reference(path, server_of(8, swap_bandwidth=1.0), orca, horizon=None)

    def test_vllm_v0_brings_back_before_it_takes_anybody_new(self):
        """Two of 3 prompt tokens in 8; the second is swapped out at 2 s with 4 tokens, 2 s away at 2 tokens/s.

        The first has its third token at 1 + 1 + 1 + 2 = 5 s and its last at 6. The second comes back then, in 2 s
        more, and decodes its tokens 3 and 4; a newcomer of 5.5 s waits until nobody is swapped out, then prefills
        alone.
        """
        path = path_of((0.0, 3, 4), (0.0, 3, 4), (5.5, 1, 1))
        table = engine_table("vllm_v0", preemption="swap")
        run, batches = run_checked(path, server_of(8, swap_bandwidth=2.0), table)
        assert [batch.end_s for batch in batches] == [1.0, 2.0, 5.0, 6.0, 9.0, 10.0, 11.0]
        assert [batch.decode for batch in batches] == [(), (0, 1), (0,), (0,), (1,), (), (1,)]
        assert_array_equal(run.finish_s, [6.0, 11.0, 10.0])
        assert (run.swapped_tokens, run.wasted_tokens) == (4, 0)

    def test_wait_swaps(self):
        """A cohort of two in 8 tokens: the second is swapped out at 2 s, and comes back with the next block.

        With blocks of 2 iterations: 0-1 prompts, 1-2 both decode (4 tokens each); then 9 > 8. A block starts with
        the hold (0.5 s) of the row; it takes the second back, whose next token does not fit, so nothing moves but
        out: 3 s of iteration. The first is served to its end at 5 + 1 s.
        """
        rows = {"A": {"threshold": 2, "gate": 2, "max_hold_s": 0.5}}
        table = typed_table("wait", rows, block_iterations=2, preemption="swap")
        path = path_of((0.0, 3, 4, "A"), (0.0, 3, 4, "A"))
        run, batches = run_checked(path, server_of(8, swap_bandwidth=2.0), table)
        assert run.preemptions[1] >= 1
        assert run.swapped_tokens == 4
        assert run.wasted_tokens == 0
        assert run.verdict == "finished"
        decodes = [len(batch.decode) for batch in batches]
        assert sum(decodes) == 6  # three tokens each after the prompt: none is computed twice


class TestModelLength:
    def test_outputs_end_there_and_prompts_must_leave_room(self):
        """7 tokens: outputs of 3 and 9 become 3 and 2 after prompts of 4 and 5; a prompt of 7 is rejected."""
        path = path_of((0.0, 4, 3), (0.0, 5, 9), (0.0, 7, 1))
        server = server_of(100, max_model_len=7)
        runs = simulate(path, server, engine_table(), oversize="reject", check=True)
        frame = runs.requests("vllm")
        assert frame["finish_s"].tolist()[:2] == [3.0, 2.0]
        assert frame["status"].tolist() == ["finished", "finished", "rejected"]
        assert frame["output_tokens"].tolist() == [3, 2, 1]
        assert run_reference(path, server, engine_table(), horizon=None).batch_token_sum == 6 + 6
        with pytest.raises(InputError, match=r"request 2 .*prompt below max_model_len, 7 tokens"):
            simulate(path, server, engine_table())

    def test_an_output_that_just_fits_is_not_cut(self):
        path = path_of((0.0, 4, 3), (0.0, 6, 1))
        whole = run_reference(path, server_of(100), engine_table(), horizon=None)
        limited = run_reference(path, server_of(100, max_model_len=7), engine_table(), horizon=None)
        assert_array_equal(limited.finish_s, whole.finish_s)


class TestVllmV0:
    def test_prompts_run_alone_and_first(self):
        """T = 1 + n_pf/4 + n_dec/2: who decodes pauses while a newcomer's prompt runs."""
        path = path_of((0.0, 4, 3), (0.5, 2, 2))
        run, batches = run_checked(path, server_of(time=MIXED), engine_table("vllm_v0"))
        assert [batch.prefill for batch in batches] == [((0, 4),), ((1, 2),), (), ()]
        assert [batch.decode for batch in batches] == [(), (), (0, 1), (0,)]
        assert_array_equal(run.first_token_s, [2.0, 3.5])
        assert_array_equal(run.finish_s, [7.0, 5.5])

    def test_preemption_happens_when_all_decode(self):
        """C = 8: the later of two is recomputed as one prompt when the other has left."""
        path = path_of((0.0, 3, 4), (0.0, 3, 3))
        run, batches = run_checked(path, server_of(8, MIXED), engine_table("vllm_v0"))
        assert [batch.preempted for batch in batches] == [(), (), (1,), (), ()]
        assert batches[-1].prefill == ((1, 5),)
        assert_array_equal(run.finish_s, [7.5, 9.75])

    def test_prompts_are_not_cut(self):
        """Budget 5: 4 and 3 tokens do not run together; 5 tokens and 2 outputs may need 6, which never fit."""
        table = engine_table("vllm_v0", token_budget=5)
        run, _ = run_checked(path_of((0.0, 4, 1), (0.0, 3, 1)), server_of(time=MIXED), table)
        assert_array_equal(run.finish_s, [2.0, 3.75])
        assert run_reference(path_of((0.0, 5, 2)), server_of(), table, horizon=None).count("rejected") == 1


class TestFasterTransformer:
    def test_a_batch_runs_to_its_end(self):
        """Two who come during the first batch wait for its end, then enter together."""
        path = path_of((0.0, 4, 3), (0.5, 2, 1), (0.5, 2, 2))
        table = engine_table("faster_transformer", lookahead=Lookahead("reserve", 3))
        run, _ = run_checked(path, server_of(time=MIXED), table)
        assert_array_equal(run.admitted_s, [0.0, 5.0, 5.0])
        assert_array_equal(run.finish_s, [5.0, 7.0, 8.5])

    def test_memory_is_set_aside(self):
        """C = 10 holds 4 + 2 and 2 + 2 tokens and not 2 + 2 more, although the outputs are short."""
        path = path_of((0.0, 4, 1), (0.0, 2, 1), (0.0, 2, 1))
        table = engine_table("faster_transformer", lookahead=Lookahead("reserve", 3))
        run, _ = run_checked(path, server_of(10), table)
        assert_array_equal(run.finish_s, [1.0, 1.0, 2.0])


class TestWait:
    ROWS = {"A": {"threshold": 2, "gate": 2}, "B": {"threshold": 1, "gate": 1}}  # noqa: RUF012
    PATH = path_of((0.0, 2, 3, "A"), (1.0, 2, 3, "A"), (1.5, 3, 2, "B"), (2.0, 2, 3, "A"))

    def test_blocks_freeze_and_stuck(self):
        """Blocks of 2: A starts at its second arrival, is frozen in B's block, never reaches its gate."""
        run, batches = run_checked(self.PATH, server_of(), typed_table("wait", self.ROWS, block_iterations=2))
        assert_array_equal(run.admitted_s, [1.0, 1.0, 3.0, nan])
        assert_array_equal(run.first_token_s, [2.0, 2.0, 4.0, nan])
        assert_array_equal(run.finish_s, [nan, nan, 5.0, nan])
        assert (run.verdict, run.starved_types, run.end_s, run.kv_end) == ("stuck", ("A",), 5.0, 6)
        assert [batch.decode for batch in batches] == [(), (0, 1), (), (2,)]
        assert run.kv_token_s == 4 + 6 + (6 + 3) + (6 + 4)
        assert run.count("unfinished") == 3

    def test_hold_releases(self):
        """max_hold_s 4: the waiting A opens the gate at 6 for all of A, and the last one at 12."""
        rows = {**self.ROWS, "A": {**self.ROWS["A"], "max_hold_s": 4.0}}
        run, _ = run_checked(self.PATH, server_of(), typed_table("wait", rows, block_iterations=2))
        assert_array_equal(run.admitted_s, [1.0, 1.0, 3.0, 6.0])
        assert_array_equal(run.first_token_s, [2.0, 2.0, 4.0, 7.0])
        assert_array_equal(run.finish_s, [7.0, 7.0, 5.0, 13.0])
        assert run.verdict == "finished"

    def test_algorithm_1(self):
        """k = 1, one type, threshold 2: a cohort advances only when the next one is complete."""
        path = path_of(*[(float(t), 1, 2, "A") for t in range(5)])
        table = typed_table("wait", {"A": {"threshold": 2, "gate": 2}})
        run, _ = run_checked(path, server_of(), table)
        assert_array_equal(run.admitted_s, [1.0, 1.0, 3.0, 3.0, nan])
        assert_array_equal(run.finish_s, [4.0, 4.0, nan, nan, nan])
        assert run.verdict == "stuck"

    def test_a_row_with_threshold_zero_is_never_served(self):
        """An optimum that refuses a type: its requests starve, and the verdict names them."""
        path = path_of((0.0, 1, 1, "A"), (0.0, 1, 1, "B"))
        table = typed_table(
            "wait", {"A": {"threshold": 1, "gate": 1}, "B": {"threshold": 0, "max_hold_s": 1.0}}
        )
        run, _ = run_checked(path, server_of(), table)
        assert_array_equal(run.finish_s, [1.0, nan])
        assert (run.verdict, run.starved_types) == ("stuck", ("B",))

    def test_overflow_preempts_the_most_recently_admitted(self):
        """C = 6, two of (2, 3): the third iteration needs 8, so the second is preempted holding 3."""
        path = path_of((0.0, 2, 3, "A"), (0.0, 2, 3, "A"))
        rows = {"A": {"threshold": 2, "gate": 2}}
        run, _ = run_checked(path, server_of(6), typed_table("wait", rows, block_iterations=3))
        assert_array_equal(run.finish_s, [3.0, nan])
        assert (run.verdict, run.preempted, run.wasted_tokens) == ("stuck", 1, 3)
        rows["A"]["gate"] = 1
        run, batches = run_checked(path, server_of(6), typed_table("wait", rows, block_iterations=3))
        assert_array_equal(run.finish_s, [3.0, 4.0])
        assert batches[-1].prefill == ((1, 4),)

    def test_a_block_preempted_away_leaves_the_server_idle(self):
        """B cannot fit beside the frozen A: admitted and preempted at each arrival, then stuck."""
        path = path_of((0.0, 5, 3, "A"), (2.0, 4, 1, "B"), (3.0, 4, 1, "B"))
        table = typed_table("wait", {"A": {"threshold": 1, "gate": 1}, "B": {"threshold": 1, "gate": 1}})
        run, _ = run_checked(path, server_of(8), table)
        assert_array_equal(run.preemptions, [0, 2, 0])
        assert_array_equal(run.admitted_s, [0.0, 2.0, nan])
        assert (run.verdict, run.starved_types, run.end_s) == ("stuck", ("A", "B"), 3.0)

    def test_a_cohort_above_the_token_budget_is_an_error(self):
        """Two prompts of 2 and a decode block need 5 tokens in one iteration."""
        table = typed_table("wait", {"A": {"threshold": 2, "gate": 2}}, block_iterations=2)
        path = path_of((0.0, 2, 3, "A"))
        with pytest.raises(InputError, match="6 tokens of the largest cohort"):
            run_reference(path, server_of(token_budget=5), table, horizon=None)
        run_reference(path, server_of(token_budget=6), table, horizon=None)


class TestNestedWait:
    def test_segments_wait_for_their_thresholds_and_holds_release_them(self):
        """Positions 0–1 need two waiting, 2–3 one at position 2; after 3 s unserved a segment runs anyway.

        A and B start at 0; C and D push them on at 1, where B and C finish at 2. At 5 the hold of A, at the
        second segment's entry, opens both segments for E alone; at 9 it opens them for F, D and A.
        """
        path = path_of((0.0, 2, 4), (0.0, 2, 2), (1.0, 2, 1), (1.0, 2, 3), (5.0, 2, 1), (6.0, 2, 1))
        table = nested_table([(1, 2), (3, 1)], max_hold_s=3.0)
        run, batches = run_checked(path, server_of(), table)
        assert_array_equal(run.admitted_s, [0.0, 0.0, 1.0, 1.0, 5.0, 9.0])
        assert_array_equal(run.finish_s, [10.0, 2.0, 2.0, 10.0, 6.0, 10.0])
        assert [batch.decode for batch in batches] == [(), (0, 1), (0, 3), (0, 3)]
        assert [batch.start_s for batch in batches] == [0.0, 1.0, 5.0, 9.0]
        without, _ = run_checked(path, server_of(), nested_table([(1, 2), (3, 1)]))
        assert_array_equal(without.finish_s, [nan, 2.0, 2.0, nan, 7.0, 7.0])
        assert (without.verdict, without.starved_types, without.kv_end) == ("stuck", ("*",), 4 + 3)

    def test_at_most_the_threshold_leaves_a_boundary_queue_oldest_first(self):
        """Four of two tokens, n = (2, 1): the second iteration takes one of the two at position 1."""
        path = path_of(*[(0.0, 3, 2)] * 4)
        run, batches = run_checked(path, server_of(), nested_table([(0, 2), (1, 1)]))
        assert_array_equal(run.finish_s, [2.0, nan, nan, nan])
        assert [(batch.prefill, batch.decode) for batch in batches] == [
            (((0, 3), (1, 3)), ()),
            (((2, 3), (3, 3)), (0,)),
        ]
        assert run.verdict == "stuck"

    def test_blocks(self):
        """Blocks of 2, n = (2, 1): who comes inside a block waits for its end; one of two goes on."""
        path = path_of((0.0, 2, 4), (0.0, 2, 3), (1.0, 2, 1), (1.0, 2, 2))
        run, batches = run_checked(path, server_of(), nested_table([(1, 2), (3, 1)], block_iterations=2))
        assert_array_equal(run.admitted_s, [0.0, 0.0, 2.0, 2.0])
        assert_array_equal(run.finish_s, [4.0, nan, 3.0, 4.0])
        assert [batch.decode for batch in batches] == [(), (0, 1), (0,), (0, 3)]

    def test_all_segments_up_to_the_last_that_is_ready_run(self):
        """n = (2, 2, 1): A and B stand at the third segment while the second has 0 and 1, and A goes on with 2."""
        path = path_of((0.0, 1, 3), (0.0, 1, 3), (1.0, 1, 1), (1.0, 1, 1), (2.0, 1, 2), (2.0, 1, 1),
                       (3.0, 1, 2), (3.0, 1, 1), (4.0, 1, 1), (4.0, 1, 1))  # fmt: skip
        run, batches = run_checked(path, server_of(), nested_table([(0, 2), (1, 2), (2, 1)]))
        assert [batch.decode for batch in batches] == [(), (0, 1), (), (), (0, 4, 6)]
        assert_array_equal(run.finish_s, [5.0, nan, 2.0, 2.0, 5.0, 3.0, 5.0, 4.0, 5.0, 5.0])

    def test_requests_longer_than_the_last_boundary_stay_in_the_last_segment(self):
        """Somebody is at the first position of the second segment, so it runs, at every iteration."""
        path = path_of((0.0, 1, 6), *[(float(t), 1, 2) for t in range(6)])
        run, _ = run_checked(path, server_of(), nested_table([(0, 1), (2, 1)]))
        assert run.finish_s[0] == 6.0

    def test_overflow_preempts_the_most_recently_admitted(self):
        """C = 6, two of (2, 4): before the third iteration, which needs 8, the second loses 3 tokens."""
        path = path_of((0.0, 2, 4), (0.0, 2, 4))
        run, _ = run_checked(path, server_of(6), nested_table([(3, 2)], block_iterations=4))
        assert_array_equal(run.finish_s, [4.0, nan])
        assert (run.verdict, run.preempted, run.wasted_tokens) == ("stuck", 1, 3)
        held = nested_table([(3, 2)], block_iterations=4, max_hold_s=2.0)
        run, batches = run_checked(path, server_of(6), held)
        assert_array_equal(run.finish_s, [4.0, 6.0])
        assert batches[-2].prefill == ((1, 4),)

    def test_a_cohort_above_the_token_budget_is_an_error(self):
        """Two prompts of 5, two decodes at position 1, one at each of 2 and 3."""
        path = path_of((0.0, 5, 4))
        with pytest.raises(InputError, match="14 tokens of the largest cohort"):
            run_reference(path, server_of(token_budget=13), nested_table([(1, 2), (3, 1)]), horizon=None)
        run_reference(path, server_of(token_budget=14), nested_table([(1, 2), (3, 1)]), horizon=None)


class TestGated:
    def test_spaced_admission(self):
        """At most one in three consecutive iterations; decodes run always."""
        path = path_of(*[(0.0, 1, 5, "A")] * 3)
        table = typed_table("gated", {"A": {"threshold": 1, "period": 3}})
        run, _ = run_checked(path, server_of(), table)
        assert_array_equal(run.admitted_s, [0.0, 3.0, 6.0])
        assert_array_equal(run.finish_s, [5.0, 8.0, 11.0])

    def test_the_window_is_cleared_when_the_server_would_idle(self):
        path = path_of((0.0, 1, 1, "A"), (0.0, 1, 1, "A"))
        table = typed_table("gated", {"A": {"threshold": 1, "period": 3}})
        run, _ = run_checked(path, server_of(), table)
        assert_array_equal(run.finish_s, [1.0, 2.0])

    def test_gate_and_hold(self):
        """Gate 2 opens at the second arrival; a lone request goes after max_hold_s."""
        path = path_of((0.0, 1, 1, "A"), (1.5, 1, 1, "A"), (5.0, 1, 1, "A"))
        table = typed_table("gated", {"A": {"threshold": 2, "gate": 2, "period": 1, "max_hold_s": 4.0}})
        run, _ = run_checked(path, server_of(), table)
        assert_array_equal(run.admitted_s, [1.5, 1.5, 9.0])

    def test_gate_without_hold_gets_stuck(self):
        path = path_of((0.0, 1, 1, "A"))
        table = typed_table("gated", {"A": {"threshold": 2, "gate": 2, "period": 1}})
        run, _ = run_checked(path, server_of(), table)
        assert (run.verdict, run.starved_types, run.end_s) == ("stuck", ("A",), 0.0)

    def test_priority_and_skipping(self):
        """B goes first by priority; A, whose window is used, is skipped, not waited for."""
        path = path_of((0.0, 1, 4, "A"), (0.0, 1, 4, "A"), (0.0, 1, 4, "B"), (0.0, 1, 4, "B"))
        rows = {
            "A": {"threshold": 1, "period": 2, "priority": 1},
            "B": {"threshold": 9, "period": 1, "priority": 0},
        }
        _, batches = run_checked(path, server_of(), typed_table("gated", rows))
        assert batches[0].admitted == (2, 3, 0)
        assert (batches[1].admitted, batches[2].admitted) == ((), (1,))

    def test_preempted_requests_are_exempt(self):
        """A preempted request returns though its row's gate is shut."""
        path = path_of((0.0, 3, 4, "A"), (0.0, 3, 3, "A"))
        table = typed_table("gated", {"A": {"threshold": 2, "gate": 2, "period": 50}})
        run, _ = run_checked(path, server_of(8), table)
        assert_array_equal(run.preemptions, [0, 1])
        assert run.verdict == "finished"


class TestTime:
    def test_the_horizon_cuts_an_iteration(self):
        """Of the iteration cut at 2.5 only the decision and its share of the integrals count."""
        path = path_of((0.0, 2, 4), (1.5, 3, 1), horizon=2.5)
        run, batches = run_checked(path, server_of(), engine_table(), horizon=2.5)
        assert_array_equal(run.admitted_s, [0.0, 2.0])
        assert_array_equal(run.first_token_s, [1.0, nan])
        assert (run.verdict, run.end_s, run.iterations, run.busy_s) == ("horizon", 2.5, 2, 2.5)
        assert run.kv_token_s == 2 + 3 + (4 + 3) * 0.5
        assert (run.kv_end, run.batch_token_sum, run.peak_kv, run.emitted_tokens) == (3, 3, 3, 2)
        assert len(batches) == 3

    def test_an_iteration_that_ends_at_the_horizon_counts(self):
        run, _ = run_checked(path_of((0.0, 2, 2)), server_of(), engine_table(), horizon=2.0)
        assert_array_equal(run.finish_s, [2.0])

    def test_the_window_starts_at_the_warmup(self):
        """Integrals from 1.5 on; an arrival at a decision instant is visible to it."""
        path = path_of((0.0, 2, 2), (2.0, 2, 1), (4.0, 2, 1))
        run, _ = run_checked(path, server_of(), engine_table(), horizon=6.0, warmup=1.5)
        assert_array_equal(run.finish_s, [2.0, 3.0, 5.0])
        assert (run.busy_s, run.resident_s) == (0.5 + 1.0 + 1.0, 2.5)
        assert run.kv_token_s == 3 * 0.5 + 2 + 2
        assert run.emitted_tokens == 3

    def test_iteration_time_may_be_any_function(self):
        """The function sees the batch, chunk lengths included."""
        seen = []

        def duration(batch):
            seen.append(batch.prefill_chunks)
            return 2.0 if batch.prefill_tokens else 1.0

        path = path_of((0.0, 3, 2), (0.0, 4, 1))
        run, _ = run_checked(path, server_of(time=IterationTime.function(duration)), engine_table())
        assert_array_equal(run.finish_s, [3.0, 2.0])
        assert seen[-2:] == [(3, 4), ()]

    def test_a_function_that_stops_time_is_an_error(self):
        server = server_of(time=IterationTime.function(lambda batch: 0.0 if batch.prefill_tokens else 1.0))
        with pytest.raises(SimulationError, match=r"returned 0\.0 s"):
            run_reference(path_of((0.0, 3, 2)), server, engine_table(), horizon=None)

    def test_an_empty_path(self):
        run, _ = run_checked(path_of(), server_of(), engine_table())
        assert (run.verdict, run.end_s, len(run)) == ("finished", 0.0, 0)

    def test_rejected_requests_never_join(self):
        run, _ = run_checked(path_of((0.0, 9, 3), (0.0, 3, 2)), server_of(10), engine_table())
        assert [run.count("rejected"), run.count("finished")] == [1, 1]
        assert_array_equal(run.finish_s, [nan, 2.0])

    def test_occupancy_rows(self):
        """One row at the first decision instant at or after each grid point, before the decision."""
        path = path_of((0.0, 2, 8), (2.0, 3, 2))
        run, _ = run_checked(path, server_of(), engine_table(), horizon=8.0, occupancy_points=4)
        assert_array_equal(run.occupancy, [[0, 0, 0, 1], [2, 3, 1, 1], [4, 5, 1, 0], [6, 7, 1, 0]])


class TestRefusals:
    @pytest.mark.parametrize(
        ("table", "word"),
        [
            (engine_table(preemption="swap"), "preemption"),
            (engine_table("orca", lookahead=_reserve(3), order="shortest_first"), "order"),
            (typed_table("wait", {"A": {"threshold": 1, "gate": 1}}, order="shortest_first"), "order"),
            (typed_table("wait", {"A": {"threshold": 1, "gate": 1}}, watermark=0.1), "watermark"),
            (typed_table("wait", {"A": {"threshold": 1, "gate": 1}}, chunk_tokens=4), "chunk_tokens"),
            (nested_table([(3, 1)], kv_limit_tokens=9), "kv_limit_tokens"),
        ],
    )
    def test_what_the_engines_do_not_do_is_refused(self, table, word):
        with pytest.raises(InputError, match=word):
            run_reference(path_of((0.0, 1, 1, "A")), server_of(), table, horizon=None)
