"""Rules of the user's own: a second writing of the built-in ones as witness, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from simulation_cases import engine_table, path_of, run_checked, server_of
from test_laws import assert_same, paths, servers

from fluidsched.errors import InputError, SimulationError
from fluidsched.policy.table import Lookahead
from fluidsched.simulation import simulate
from fluidsched.simulation.laws import Audit, check_laws
from fluidsched.simulation.reference import run_reference
from fluidsched.simulation.rules import Decision, UserRule


def run_rule(path, server, decide, preemption="recompute"):
    rule = UserRule("mine", decide, preemption)
    audit = Audit(path, server, rule.table, horizon=None, warmup=0.0)
    run = run_reference(
        path, server, rule, horizon=None, on_iteration=audit.observe, on_idle=audit.observe_idle
    )
    audit.check(run)
    check_laws(path, server, run, warmup=0.0, lossless=preemption != "restart")
    return run


@given(paths(), servers(), st.sampled_from(["recompute", "restart"]))
def test_vllm_written_again(path, server, preemption):
    """FCFS with whole prompts and preemption of the latest, from the page and not from the engine."""
    block = server.block_size or 1
    capacity = int(server.kv_capacity) // block
    slots = server.max_batch_size or 10**9

    def decide(view):
        kept, gone = list(view.residents), []

        def memory(requests):
            return sum(-(-(r.computed + r.next_tokens) // block) for r in requests)

        position = 0
        while position < len(kept):  # serve one after the other; those behind hold what they hold
            behind = sum(-(-r.computed // block) for r in kept[position + 1 :])
            if memory(kept[: position + 1]) + behind > capacity:
                gone.append(kept.pop())
            else:
                position += 1
        admitted = []
        for r in [] if gone else view.waiting:
            if len(kept) + len(admitted) == slots or memory([*kept, *admitted, r]) > capacity:
                break
            admitted.append(r)
        return Decision(
            {r.index: r.next_tokens for r in [*kept, *admitted]},
            admit=[r.index for r in admitted],
            preempt=[r.index for r in gone],
        )

    built_in, _ = run_checked(path, server, engine_table(preemption=preemption))
    assert_same(built_in, run_rule(path, server, decide, preemption))


@given(paths(), servers())
def test_orca_written_again(path, server):
    """Room for 7 output tokens set aside per request, so nothing is ever preempted."""
    block = server.block_size or 1
    capacity = int(server.kv_capacity) // block

    def decide(view):
        running = list(view.residents)
        admitted = []
        for r in view.waiting:
            reserved = sum(-(-(q.prompt_tokens + 6) // block) for q in [*running, *admitted, r])
            if reserved > capacity or len(running) + len(admitted) == (server.max_batch_size or 10**9):
                break
            admitted.append(r)
        return Decision(
            {r.index: r.next_tokens for r in [*running, *admitted]}, admit=[r.index for r in admitted]
        )

    table = engine_table("orca", lookahead=Lookahead("reserve", 7))
    assert_same(run_checked(path, server, table)[0], run_rule(path, server, decide))


def test_what_a_rule_sees():
    """Progress, labels, the queue with preempted requests in front, and a wake-up while idle."""
    seen = []

    def decide(view):
        line = [r.index for r in view.waiting]
        seen.append((view.now, view.iterations, line, [r.index for r in view.residents], view.kv_held))
        assert [view.waiting[k].index for k in range(len(line))] == line
        if view.now == 0.0:
            return Decision({}, wake_s=0.5)
        if view.now == 2.5:
            (first,) = view.residents
            assert (first.label, first.produced, first.computed, first.missing) == ("A", 2, 4, 0)
            return Decision({1: 2}, preempt=[0], admit=[1])
        admit = [] if view.residents else line[:1]
        index = admit[0] if admit else view.residents[0].index
        views = {r.index: r for r in [*view.residents, *view.waiting]}
        return Decision({index: views[index].next_tokens}, admit=admit)

    run = run_rule(path_of((0.0, 3, 3, "A"), (1.0, 2, 1, "B")), server_of(9), decide)
    assert seen == [
        (0.0, 0, [0], [], 0),
        (0.5, 0, [0], [], 0),
        (1.5, 1, [1], [0], 3),
        (2.5, 2, [1], [0], 4),
        (3.5, 3, [0], [], 0),
    ]
    assert_array_equal(run.finish_s, [4.5, 3.5])
    assert run.wasted_tokens == 4


@pytest.mark.parametrize(
    ("decision", "what"),
    [
        (Decision({0: 3}), "served request 0, which is not resident"),
        (Decision({0: 4}, admit=[0]), "gave request 0 4 tokens, not 1 to 3"),
        (Decision({0: 0}, admit=[0]), "gave request 0 0 tokens"),
        (Decision({}, admit=[2]), "admitted request 2, which does not wait"),
        (Decision({}, admit=[7]), "named request 7, which is not in the path"),
        (Decision({}, preempt=[0]), "preempted request 0, which is not resident"),
        (Decision({0: 3, 1: 9}, admit=[0, 1]), "filled more than the memory, 10"),
        (Decision({0: 3}, admit=[0, 1]), "filled more than 1 slots"),
        (None, "not a Decision"),
    ],
)
def test_a_decision_the_server_cannot_carry_out(decision, what):
    path = path_of((0.0, 3, 3), (0.0, 9, 2), (5.0, 1, 1))
    slots = 1 if "slots" in what else None
    with pytest.raises(SimulationError, match=what):
        run_rule(path, server_of(10, max_batch_size=slots), lambda view: decision)


def test_token_budget():
    with pytest.raises(SimulationError, match="token budget, 2"):
        run_rule(path_of((0.0, 3, 1)), server_of(token_budget=2), lambda view: Decision({0: 3}, admit=[0]))


def test_a_rule_that_never_serves_is_stuck():
    run = run_rule(path_of((0.0, 3, 1), (1.0, 3, 1)), server_of(), lambda view: Decision({}))
    assert (run.verdict, run.starved_types, run.end_s) == ("stuck", ("*",), 1.0)


def test_simulate_follows_rules_on_the_reference_only():
    path = path_of((0.0, 3, 1))
    rule = UserRule("mine", lambda view: Decision({r.index: 3 for r in view.waiting}, admit=[0]))
    with pytest.raises(InputError, match="engine must be 'reference'"):
        simulate(path, server_of(), rule)
    runs = simulate(path, server_of(), [rule, engine_table()], engine="reference", check=True)
    assert runs.policies == ("mine", "vllm")
    assert runs.measures("mine")["mean_e2e"] == runs.measures("vllm")["mean_e2e"]
    with pytest.raises(InputError, match="decide"):
        UserRule("mine", 3)
