"""The decisions an engine's scheduler takes from a table, without an engine."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from random import Random

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from fluidsched.errors import InputError
from fluidsched.integrations.holding import HeldQueue, Resident, match_row, rule_of
from fluidsched.policy import baselines
from fluidsched.policy.forecast import Forecast, Served
from fluidsched.policy.table import Lookahead, Match, PolicyTable, Segment, TableType

PRIORITIES = (1.0, 0.0, math.inf)


@given(
    joins=st.lists(st.integers(0, 3), max_size=20),
    allowances=st.dictionaries(st.integers(0, 2), st.integers(0, 4), max_size=3),
    put_back=st.sets(st.integers(0, 5)),
    row_by_row=st.booleans(),
)
def test_the_queue_shows_what_a_sort_would(
    joins: list[int], allowances: dict[int, int], put_back: set[int], row_by_row: bool
) -> None:
    """Law: the visible order is (priority, arrival) among the oldest so many of each row; nobody is lost."""
    queue: HeldQueue[int] = HeldQueue(PRIORITIES, row_by_row=row_by_row)
    for request, row in enumerate(joins):
        queue.join(request, row, float(request))
    visible = []
    for row in range(4):
        mine = [request for request, of in enumerate(joins) if of == row]
        visible += mine if row == 3 else mine[: allowances.get(row, 0)]
    priorities = [*PRIORITIES, math.inf]
    visible.sort(key=lambda i: (priorities[joins[i]], joins[i] if row_by_row else 0, i))

    queue.open(allowances)
    taken = []
    while (front := queue.front()) is not None:
        assert queue.take() == front
        taken.append(front)
    assert taken == visible
    for place in sorted(put_back, reverse=True):  # as vLLM does: what it skipped, newest first
        if place < len(taken):
            queue.put_back(taken[place])
    kept = {taken[place] for place in put_back if place < len(taken)}
    counts = queue.shut()
    assert sum(counts.values()) == len(taken) - len(kept)
    assert queue.front() is None
    assert sorted(queue) == sorted(set(range(len(joins))) - set(taken) | kept)
    assert len(queue) == len(joins) - len(taken) + len(kept)


def test_put_back_newcomers_keep_their_place() -> None:
    queue: HeldQueue[str] = HeldQueue([math.inf])
    for name in "abc":
        queue.join(name, 0, 0.0)
    queue.open({0: 2})
    assert queue.take() == "a"
    queue.put_back("a")
    assert [queue.take(), queue.take()] == ["a", "b"]
    assert queue.front() is None


def test_preempted_requests_are_visible_whatever_is_shut() -> None:
    queue: HeldQueue[str] = HeldQueue([math.inf])
    queue.join("new", 0, 0.0)
    queue.put_back("older")
    queue.put_back("oldest")
    queue.open({})
    assert [queue.take(), queue.take()] == ["oldest", "older"]
    assert queue.front() is None
    assert len(queue) == 1


def test_discarded_requests_are_gone_from_everywhere() -> None:
    queue: HeldQueue[str] = HeldQueue([math.inf])
    queue.join("a", 0, 0.0)
    queue.join("b", 0, 1.0)
    queue.put_back("preempted")
    queue.open({0: 5})
    for name in ("a", "preempted", "never seen"):
        queue.discard(name)
    assert queue.front() == "b"
    assert queue.oldest_since(0) == 1.0


def wait(block_iterations: int, hold: float | None = None) -> PolicyTable:
    row = TableType("a", threshold=2, gate=2, max_hold_s=hold)
    return PolicyTable("w", "wait", (row,), block_iterations=block_iterations, freeze=True)


def test_wait_freezes_until_its_gate_is_met_and_runs_blocks() -> None:
    """Two wait: a block of two iterations. Then one waits: everybody stands still, until the hold ends it."""
    queue: HeldQueue[int] = HeldQueue([math.inf])
    rule = rule_of(wait(2, hold=5.0), None)
    queue.join(0, 0, 0.0)
    assert dict(rule.decide(0.0, queue, list).allowances) == {}
    rule.ran({}, False, 0.0)
    queue.join(1, 0, 1.0)
    assert dict(rule.decide(1.0, queue, list).allowances) == {0: 2}
    queue.discard(0)
    queue.discard(1)
    rule.ran({0: 2}, True, 1.0)
    queue.join(2, 0, 1.5)
    residents = [Resident(i, 0, 0.0, 1, True) for i in range(2)]
    decision = rule.decide(
        2.0, queue, lambda: residents
    )  # inside the block nobody enters and all selected run
    assert (dict(decision.allowances), list(decision.paused)) == ({}, [])
    rule.ran({}, True, 2.0)
    decision = rule.decide(3.0, queue, lambda: residents)  # the block is over, one waits, gate 2
    assert (dict(decision.allowances), list(decision.paused)) == ({}, [0, 1])
    rule.ran({}, False, 3.0)
    assert list(rule.decide(6.4, queue, lambda: residents).paused) == [0, 1]
    rule.ran({}, False, 6.4)
    decision = rule.decide(6.5, queue, lambda: residents)  # request 2 has waited 5 s
    assert (dict(decision.allowances), list(decision.paused)) == ({0: 2}, [])


def test_gated_counts_iterations_and_clears_its_window_when_idle() -> None:
    """One newcomer in any three iterations run; an idle engine starts afresh."""
    table = PolicyTable("g", "gated", (TableType("a", threshold=1, period=3),))
    queue: HeldQueue[int] = HeldQueue([math.inf])
    rule = rule_of(table, None)
    for i in range(3):
        queue.join(i, 0, 0.0)
    busy = [Resident(0, 0, 0.0, 1, True)]
    assert dict(rule.decide(0.0, queue, list).allowances) == {0: 1}
    rule.ran({0: 1}, True, 0.0)
    for _ in range(2):
        assert dict(rule.decide(0.0, queue, lambda: busy).allowances) == {}
        rule.ran({}, True, 0.0)
    assert dict(rule.decide(0.0, queue, lambda: busy).allowances) == {0: 1}
    rule.ran({0: 1}, True, 0.0)
    done = [Resident(0, 0, 0.0, 1, False)]  # its last token is in flight: nobody is left to run
    assert dict(rule.decide(0.0, queue, lambda: done).allowances) == {0: 1}


def test_rows_are_found_by_prompt_output_and_label() -> None:
    rows = (
        TableType("chat", Match(label="chat"), threshold=1, period=1),
        TableType("short", Match((1, 99), (1, 10)), threshold=1, period=1),
        TableType("any", Match((1, 99)), threshold=1, period=1),
    )
    table = PolicyTable("t", "gated", rows, predictor="exact")
    assert match_row(table, 500, None, "chat") == 0
    assert match_row(table, 50, 10, None) == 1
    assert match_row(table, 50, 11, None) == 2
    assert match_row(table, 50, None, None) == 2
    assert match_row(table, 100, 5, "other") is None


@pytest.mark.parametrize("table", [baselines.sarathi(), baselines.orca(100)])
def test_tables_an_engine_cannot_follow_are_refused(table: PolicyTable) -> None:
    with pytest.raises(InputError, match="kind"):
        rule_of(table, None)


def test_what_an_engine_cannot_know_is_refused() -> None:
    """Blocks do not look ahead, and requests state one length, not an interval."""
    table = PolicyTable("t", "vllm", (TableType("*"),), lookahead=Lookahead("known"), predictor="lower")
    with pytest.raises(InputError, match="predictor"):
        rule_of(table, None)
    rule_of(replace(table, predictor=None), None)
    with pytest.raises(InputError, match="lookahead"):
        rule_of(replace(nested(), lookahead=Lookahead("law", 0.0, (3,))), None)


@given(
    requests=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3)), max_size=20),
    gone=st.sets(st.integers(0, 19)),
    kept=st.integers(0, 4),
)
def test_shortest_first_is_a_sort_by_length(
    requests: list[tuple[int, int]], gone: set[int], kept: int
) -> None:
    """Law: (priority, length, arrival), also after some left the queue and some were put back into it."""
    queue: HeldQueue[int] = HeldQueue(PRIORITIES, length_of=lambda i: requests[i][1])
    for i, (row, _) in enumerate(requests):
        queue.join(i, row, float(i))
    for i in gone & set(range(len(requests))):
        queue.discard(i)
    there = [i for i in range(len(requests)) if i not in gone]
    expected = sorted(there, key=lambda i: (PRIORITIES[requests[i][0]], requests[i][1], i))
    allowances = dict.fromkeys(range(3), len(requests))
    for _ in range(2):  # the second time without those who were taken and not put back
        queue.open(allowances)
        taken = []
        while queue.front() is not None:
            taken.append(queue.take())
        assert taken == expected
        for i in reversed(taken[:kept]):
            queue.put_back(i)
        queue.shut()
        expected = expected[:kept]


def _forecast_by_hand(lookahead: Lookahead, block: int, served: list[Served]) -> Fraction:
    """Rule 33 as it reads: every request's forecast at every later iteration, added up."""
    longest = max([*lookahead.lengths, *(request.believed for request in served)])
    most = Fraction(0)
    for u in range(1, longest + 1):
        memory = Fraction(0)
        for request in served:
            lengths = [o for o in lookahead.lengths or (request.believed,) if o > request.produced]
            target = request.prompt + request.produced
            if request.after < target:
                peaks = [target + o - request.produced - 1 for o in lengths] or [target]
                memory += Fraction(sum(math.ceil(Fraction(peak, block)) for peak in peaks), len(peaks))
            elif lengths:
                holds = [request.after + u if u <= o - request.produced - 1 else 0 for o in lengths]
                memory += Fraction(sum(math.ceil(Fraction(tokens, block)) for tokens in holds), len(lengths))
        most = max(most, memory)
    return most


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 6), st.booleans(), st.integers(1, 9)),
        min_size=1,
        max_size=6,
    ),
    lengths=st.lists(st.integers(1, 9), max_size=4),
    block=st.integers(1, 4),
)
def test_the_forecast_is_rule_33(
    requests: list[tuple[int, int, bool, int]], lengths: list[int], block: int
) -> None:
    """Witness: the largest memory ahead, added up iteration by iteration in fractions; one block less does not fit."""
    served = [
        Served(prompt, produced, prompt + produced - partly, believed)
        for prompt, produced, partly, believed in requests
    ]
    mode = "law" if lengths else "known"
    lookahead = Lookahead(mode, 0.0, tuple(sorted(lengths)))
    peak = math.ceil(_forecast_by_hand(lookahead, block, served))
    for limit in (peak, peak - 1):
        ahead = Forecast(lookahead, block, limit, served[:-1])
        assert ahead.fits(served[-1]) == (limit == peak)
        ahead.add(served[-1])
        assert ahead.fits(Served(1, 9, 10, 1)) == (limit == peak)  # refuted: it adds nothing


def test_a_reserve_is_set_aside_for_everybody() -> None:
    """R = 4 and blocks of 2: prompts of 2 set ⌈5/2⌉ = 3 blocks aside each, so seven hold two of them."""
    ahead = Forecast(Lookahead("reserve", 4.0), 2, 7, [Served(2, 1, 3, 9)])
    newcomer = Served(2, 0, 2, 9)
    assert ahead.fits(newcomer)
    ahead.add(newcomer)
    assert not ahead.fits(newcomer)


def nested(hold: float | None = None) -> PolicyTable:
    segments = (Segment(1, 3), Segment(9, 2))
    row = TableType("*", threshold=3, gate=3, max_hold_s=hold)
    return PolicyTable("n", "nested-wait", (row,), segments=segments, block_iterations=1, freeze=True)


def test_nested_wait_runs_a_later_segment_only_with_the_earlier_ones() -> None:
    """Segment 2 begins at position 2 with threshold 2: two survivors run on only when three newcomers wait."""
    queue: HeldQueue[int] = HeldQueue([math.inf])
    rule = rule_of(nested(), None)
    for i in range(3):
        queue.join(i, 0, 0.0)
    assert dict(rule.decide(0.0, queue, list).allowances) == {0: 3}
    for i in range(3):
        queue.discard(i)
    rule.ran({0: 3}, True, 0.0)

    def at(tokens: int, count: int = 3) -> list[Resident]:
        return [Resident(i, 0, float(i), tokens, True) for i in range(count)]

    decision = rule.decide(1.0, queue, lambda: at(1))  # nobody waits: K = 0
    assert (dict(decision.allowances), list(decision.paused)) == ({0: 0}, [0, 1, 2])
    rule.ran({}, False, 1.0)
    for i in (3, 4, 5):
        queue.join(i, 0, 2.0)
    decision = rule.decide(2.0, queue, lambda: at(1))  # segment 1 runs: position 1 moves to position 2
    assert (dict(decision.allowances), list(decision.paused)) == ({0: 3}, [])
    rule.ran({0: 0}, True, 2.0)
    decision = rule.decide(3.0, queue, lambda: at(2))  # K = 2: the two oldest of three survivors run
    assert (dict(decision.allowances), list(decision.paused)) == ({0: 3}, [2])


def test_nested_wait_lets_a_held_survivor_go() -> None:
    """A lone survivor in segment 2 stands still until its hold ends, with nobody waiting."""
    queue: HeldQueue[int] = HeldQueue([math.inf])
    rule = rule_of(nested(hold=4.0), None)
    survivor = [Resident(0, 0, 0.0, 1, True)]
    rule.decide(0.0, queue, lambda: survivor)
    rule.ran({}, False, 0.0)
    assert list(rule.decide(3.9, queue, lambda: survivor).paused) == [0]
    rule.ran({}, False, 3.9)
    assert list(rule.decide(4.0, queue, lambda: survivor).paused) == []


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    lookahead=st.sampled_from(
        [Lookahead("known"), Lookahead("law", 0.0, (2, 5, 9)), Lookahead("reserve", 6.0)]
    ),
    block=st.sampled_from([1, 4]),
    limit=st.integers(4, 60),
)
def test_one_forecast_kept_answers_as_a_new_one_each_time(
    seed: int, lookahead: Lookahead, block: int, limit: int
) -> None:
    """Law: whatever entered, left, was passed over or computed part of its prompt since the last refusal."""
    random, kept = Random(seed), Forecast(lookahead, block, limit)
    served: list[Served] = []
    refused = again = 0
    for _ in range(12):
        served = [
            Served(r.prompt, r.produced + 1, r.prompt + r.produced + 1, r.believed)
            if random.random() < 0.9
            else Served(r.prompt, r.produced, max(1, r.after - random.randint(0, 2)), r.believed)
            for r in served
            if r.produced + 1 < r.believed or random.random() < 0.2
        ]
        kept.start(list(zip(*served, strict=True)) or [[]] * 4)
        while True:
            prompt, believed = random.randint(1, 12), random.randint(1, 12)
            newcomer = Served(prompt, 0, prompt, believed)
            fits = kept.fits(newcomer)
            assert fits == Forecast(lookahead, block, limit, served).fits(newcomer)
            if not fits:
                again += refused > 0
                refused += 1
                break
            kept.add(newcomer)
            served.append(newcomer)
    event(f"refused more than once: {again > 0}")
