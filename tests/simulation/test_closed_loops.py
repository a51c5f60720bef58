"""Users who wait for their answers: hand traces, the machine-repair queue, Little's law for users, both engines."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import KINDS, assert_same_run, servers, tables
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import stdtrit
from simulation_cases import engine_table, nested_table, server_of, typed_table

import fluidsched as fs
from fluidsched.errors import InputError, SimulationError
from fluidsched.policy.table import Lookahead
from fluidsched.simulation import closed
from fluidsched.simulation.limits import never_fits, within_model_length
from fluidsched.workload import UserSequences

ENGINES = ("kernel", "reference")
SERVER = fs.Server(40_000, fs.IterationTime.paper(d0=0.01, d1=3.3e-7), max_batch_size=12)
TWO = fs.Workload(
    [
        fs.RequestType("chat", 3.0, fs.lengths.geometric(200), fs.lengths.geometric(40)),
        fs.RequestType("code", 1.0, fs.lengths.geometric(800), fs.lengths.geometric(10)),
    ]
)


def drawn(users: int = 20, *, think_mean: float = 1.0, seed: int = 1, **options: float) -> UserSequences:
    options = options or {"horizon": 60.0}
    return UserSequences.draw(TWO, users, think_mean=think_mean, seed=seed, **options)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_users_by_hand(engine):
    """One at a time, a second per token; at 3 both ask, and the first user's request stands first."""
    asked = UserSequences([0, 0, 1, 1], [0.0, 1.0, 1.0, 0.0], [4, 4, 4, 4], [2, 1, 1, 2])
    runs = fs.simulate_closed(
        asked, server_of(), engine_table("capped", max_in_service=1), engine=engine, check=True
    )
    frame = runs.requests("capped")
    assert frame["user"].tolist() == [0, 1, 0, 1]
    assert frame["turn"].tolist() == [0, 0, 1, 1]
    assert frame["arrival_s"].tolist() == [0.0, 1.0, 3.0, 3.0]
    assert frame["admitted_s"].tolist() == [0.0, 2.0, 3.0, 4.0]
    assert frame["finish_s"].tolist() == [2.0, 3.0, 4.0, 6.0]
    assert runs.verdict("capped") == "finished"


@pytest.mark.parametrize("engine", ENGINES)
def test_nobody_asks_after_the_horizon(engine):
    """The same users to 3.5 s: the answer of 4 is cut, the last question has come, nothing else is sent."""
    asked = UserSequences([0, 0, 0, 1, 1], [0.0, 1.0, 0.0, 1.0, 0.0], [4] * 5, [2, 1, 9, 1, 2])
    runs = fs.simulate_closed(
        asked, server_of(), engine_table("capped", max_in_service=1), horizon=3.5, warmup=0.0, engine=engine
    )
    frame = runs.requests("capped")
    assert frame["arrival_s"].tolist() == [0.0, 1.0, 3.0, 3.0]
    assert frame["status"].tolist() == ["finished", "finished", "unfinished", "unfinished"]
    assert runs.result("capped").run("capped").end_s == 3.5
    late = fs.simulate_closed(asked, server_of(), engine_table(), horizon=0.5, warmup=0.0, engine=engine)
    assert late.requests("vllm")["user"].tolist() == [0]  # user 1 still thinks


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_kernel_is_the_reference(data):
    """Random users, servers and tables of every kind: the same requests at the same times, the same runs, exact.

    But where memory leaves WAIT nobody to run, which the kernel refuses and names.
    """
    kind = data.draw(st.sampled_from(KINDS))
    count = data.draw(st.integers(1, 25))
    outputs = [data.draw(st.integers(1, 30)) for _ in range(count)]
    asked = UserSequences(
        np.sort([data.draw(st.integers(0, 5)) for _ in range(count)]),
        [data.draw(st.sampled_from([0.0, 0.0, 0.25, 1.0, 7.5])) for _ in range(count)],
        [data.draw(st.integers(1, 20)) for _ in range(count)],
        outputs,
        [data.draw(st.integers(0, 1)) for _ in range(count)],
        ("a", "b"),
    )
    server = dataclasses.replace(data.draw(servers(kind, True, 50)), waiting_timeout=None, total_timeout=None)
    table = data.draw(tables(kind, True, 2 if kind in ("gated", "wait") else 1, 30))
    if kind in ("vllm", "capped", "sarathi", "gated"):
        table = dataclasses.replace(table, order="fcfs", predictor="exact")
    fit = ~never_fits(within_model_length(asked.as_columns(), server), server, table)
    if not fit.any():
        return
    columns = {
        name: getattr(asked, name)[fit] for name in ("user", "think_s", "prompt_tokens", "output_tokens")
    }
    asked = dataclasses.replace(asked, **columns, type=asked.type[fit], users=6)
    horizon = 25.0 if table.preemption == "restart" else data.draw(st.sampled_from([None, 6.25, 40.0]))
    options = {"horizon": horizon, "warmup": 0.0}
    theirs = fs.simulate_closed(asked, server, table, engine="reference", **options)
    refused = "preempted all that it would have run"
    try:
        ours = fs.simulate_closed(asked, server, table, **options)
    except InputError as error:
        if refused not in str(error) or not table.freeze:
            raise
        assert theirs.results[0].run(table.name).preempted > 0
        return
    assert_array_equal(ours.sent[0][0], theirs.sent[0][0])
    assert_allclose(ours.results[0].paths[0].arrival_s, theirs.results[0].paths[0].arrival_s, rtol=1e-12)
    run, defined = (runs.results[0].run(table.name) for runs in (ours, theirs))
    assert_same_run(*(dataclasses.replace(one, occupancy=None) for one in (run, defined)))


@pytest.mark.parametrize(
    "table",
    [
        fs.baselines.vllm(),
        fs.baselines.sarathi(),
        engine_table("vllm", name="ahead", lookahead=Lookahead("known", 10.0), predictor="exact"),
        typed_table(
            "gated",
            {
                "chat": {"threshold": 3, "gate": 2, "period": 4, "max_hold_s": 0.3},
                "code": {"threshold": 5, "gate": 0, "period": 1},
            },
        ),
        nested_table([(9, 3), (99, 2)], max_hold_s=0.7),
    ],
    ids=lambda table: table.name,
)
def test_a_closed_run_is_the_open_run_on_its_path(table):
    """`check=True` compares both engines and replays the path with every batch audited; so do we, in full."""
    runs = fs.simulate_closed(drawn(), SERVER, table, horizon=60.0, check=True)
    again = fs.simulate(runs.results[0].paths[0], SERVER, table, horizon=60.0)
    assert_same_run(
        *(dataclasses.replace(one.run(table.name), occupancy=None) for one in (again, runs.results[0]))
    )


def test_broken_users_are_found():
    """The law that `check` adds sees a request sent too early and one that was never sent."""
    runs = fs.simulate_closed(drawn(), SERVER, fs.baselines.vllm(), horizon=60.0)
    path, run, sent = runs.results[0].paths[0], runs.results[0].run("vllm"), runs.sent[0][0]
    closed._check_users(runs.sequences[0], sent, path, run)
    early = dataclasses.replace(path, arrival_s=path.arrival_s * (1 - 1e-12))
    fewer = dataclasses.replace(run, finish_s=run.finish_s[:-1])
    for wrong in ((sent, early, run), (sent[:-1], path.selected(slice(-1)), fewer)):
        with pytest.raises(SimulationError, match="think time after the answer before"):
            closed._check_users(runs.sequences[0], *wrong)


def test_machine_repair():
    """M/M/1//N: N exponential thinkers (mean Z), one server (mean S), X = (1 - π₀)/S, 1/π₀ = Σ_n N!/(N-n)! (S/Z)^n.

    Outputs are geometric with mean 100, so the service's squared coefficient of variation is 1 - 1/100; that moves X
    by less than a two-hundredth. 12 replications: t at 1e-4, so one of 10 000 seeds would fail.
    """
    users, think, service, mean = 6, 4.0, 1.0, 100
    workload = fs.Workload([fs.RequestType("job", 1.0, 1, fs.lengths.geometric(mean))])
    server = server_of(time=fs.IterationTime.affine(service / mean, 0.0, 0.0, 0.0))
    asked = [
        UserSequences.draw(workload, users, think_mean=think, horizon=1500.0, seed=seed) for seed in range(12)
    ]
    runs = fs.simulate_closed(
        asked, server, engine_table("capped", max_in_service=1), horizon=1500.0, warmup=50.0
    )
    found = runs.measures("capped")["request_throughput"]
    idle = 1.0 / sum(math.perm(users, n) * (service / think) ** n for n in range(users + 1))
    error = stdtrit(11, 1 - 0.5e-4) * found.std(ddof=1) / math.sqrt(12)
    assert error < 0.06
    assert abs(found.mean() - (1.0 - idle) / service) < error + 0.005


@pytest.mark.parametrize("table", [fs.baselines.vllm(), engine_table("capped", max_in_service=3)])
def test_interactive_response_time_law(table):
    """U = X (R + Z) whatever the policy, within a t interval at 1e-4 over 10 replications, plus the ends' U/(X T)."""
    users, think, horizon = 25, 1.5, 150.0
    asked = [drawn(users, think_mean=think, seed=seed, horizon=horizon) for seed in range(10)]
    runs = fs.simulate_closed(asked, SERVER, table, horizon=horizon)
    found = runs.measures(table.name)
    counted = found["request_throughput"] * (found["mean_e2e"] + think)
    error = stdtrit(9, 1 - 0.5e-4) * counted.std(ddof=1) / math.sqrt(10)
    ends = users / (found["request_throughput"].mean() * horizon)
    assert error < 0.1 * users
    assert abs(counted.mean() - users) < error + ends * users


def test_every_user_waits_or_thinks():
    """The law behind it, exact: Σ waiting + Σ thinking = U × horizon, of users who never run out of questions."""
    horizon, asked = 60.0, drawn()
    frame = fs.simulate_closed(asked, SERVER, fs.baselines.vllm(), horizon=horizon, warmup=0.0).requests(
        "vllm"
    )
    inside = frame["finish_s"].fillna(horizon) - frame["arrival_s"]
    last = frame.drop_duplicates("user", keep="last")
    thinking = frame["think_s"].sum() + (horizon - last["finish_s"].fillna(horizon)).sum()
    silent = asked.users - len(last)
    assert_allclose(inside.sum() + thinking + silent * horizon, asked.users * horizon, rtol=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_users_who_do_not_think_are_always_inside(engine):
    """Zero think time: exactly U in the system at every instant, every question asked at the answer's own instant."""
    asked = drawn(15, think_mean=0.0, turns=80)
    runs = fs.simulate_closed(asked, SERVER, fs.baselines.vllm(), horizon=20.0, engine=engine, check=True)
    run = runs.results[0].run("vllm")
    assert_allclose(run.resident_s + run.waiting_s, 15 * (20.0 - 20.0 / 6), rtol=1e-9)
    assert_array_equal(run.occupancy[:, 2:].sum(axis=1), 15)
    assert len(run) - run.count("finished") == 15


def test_all_policies_meet_the_same_users():
    """What is asked, by whom and after how much thought is common; when, is each policy's own."""
    slow = engine_table("capped", max_in_service=2)
    runs = fs.simulate_closed(drawn(), SERVER, [fs.baselines.vllm(), slow], horizon=60.0)
    ours, theirs = (runs.requests(name).set_index(["user", "turn"]) for name in runs.policies)
    both = ours.index.intersection(theirs.index)
    columns = ["think_s", "prompt_tokens", "output_tokens", "type"]
    assert len(theirs) < len(ours)
    assert set(theirs.index) <= set(ours.index)
    assert ours.loc[both, columns].equals(theirs.loc[both, columns])
    assert (ours.loc[both, "arrival_s"] <= theirs.loc[both, "arrival_s"]).mean() > 0.9
    alone = fs.simulate_closed(drawn(), SERVER, slow, horizon=60.0)
    assert alone.requests("capped").equals(runs.requests("capped"))


def test_names_of_users_do_not_matter():
    """Numbering users anew changes nothing for any of them."""
    asked = drawn()
    order = np.random.default_rng(3).permutation(asked.users)
    frame = asked.to_frame().assign(user=order[asked.user], code=asked.type).sort_values(["user", "turn"])
    renamed = UserSequences(
        *(frame[name].to_numpy() for name in ("user", "think_s", "prompt_tokens", "output_tokens", "code")),
        asked.type_names,
        asked.users,
    )
    first, second = (
        fs.simulate_closed(one, SERVER, fs.baselines.vllm(), horizon=60.0).requests("vllm")
        for one in (asked, renamed)
    )
    first["user"] = order[first["user"]]
    assert first.equals(second)


@pytest.mark.parametrize("engine", ENGINES)
def test_users_behind_a_gate(engine):
    """One user before a gate of two is stuck, named as in any run; a hold lets each question through."""
    asked = UserSequences([0, 0], [1.0, 0.5], [4, 4], [2, 2], [0, 0], ("A",))
    gate = {"threshold": 2, "gate": 2}
    stuck = fs.simulate_closed(asked, server_of(), typed_table("wait", {"A": gate}), engine=engine)
    assert stuck.verdict("wait") == "stuck (A)"
    assert stuck.requests("wait")["arrival_s"].tolist() == [1.0]
    held = typed_table("wait", {"A": {**gate, "max_hold_s": 2.0}})
    frame = fs.simulate_closed(asked, server_of(), held, engine=engine).requests("wait")
    assert frame["arrival_s"].tolist() == [1.0, 7.5]
    assert frame["finish_s"].tolist() == [7.0, 13.5]  # held 2 s before each of two tokens of 1 s


def test_replications_and_progress():
    """One replication per sequences, in order, and reports of each."""
    said: list[tuple[str, int, int]] = []
    asked = [drawn(5, seed=seed, turns=3) for seed in range(2)]
    tables = [fs.baselines.vllm(), fs.baselines.orca(400)]
    runs = fs.simulate_closed(asked, SERVER, tables, progress=lambda *what: said.append(what))
    assert said == [
        (f"simulate {name}", i, 4) for i, name in enumerate(("vllm", "vllm", "orca", "orca"), start=1)
    ]
    assert runs.measures("orca")["completed"].tolist() == [15, 15]
    second = fs.simulate_closed(asked[1], SERVER, tables[0])
    assert runs.requests("vllm", 1).equals(second.requests("vllm"))
    assert len(fs.simulate_closed(UserSequences([], [], [], []), SERVER, tables).requests("vllm")) == 0


def test_what_cannot_be_run_is_named():
    asked, vllm = drawn(2, turns=1), fs.baselines.vllm()
    long = UserSequences([0, 0], [0.0, 1.0], [4, 90_000], [3, 5])
    shortest = engine_table(order="shortest_first", predictor="exact")
    for match, arguments, options in (
        ("sequences must be UserSequences", (TWO, SERVER, vllm), {}),
        ("sequences must be UserSequences", ([], SERVER, vllm), {}),
        (r"sequences\[1\] must be UserSequences", ([asked, TWO], SERVER, vllm), {}),
        ("server must be a Server", (asked, vllm, vllm), {}),
        (
            r"server.total_timeout must be None for users who wait",
            (asked, dataclasses.replace(SERVER, total_timeout=9.0), vllm),
            {},
        ),
        (r"policies\[0\] must be a PolicyTable", (asked, SERVER, fs.simulation.sorted_f(40_000)), {}),
        ("request 1 must fit alone", (long, SERVER, vllm), {}),
        ("warmup must be below the horizon", (asked, SERVER, vllm), {"horizon": 5.0, "warmup": 6.0}),
        ("horizon must be", (asked, SERVER, vllm), {"horizon": -1.0}),
        ("engine must be 'reference'", (asked, SERVER, shortest), {}),
        ("engine must be", (asked, SERVER, vllm), {"engine": "fast"}),
        (
            "predicted_output_tokens must be given",
            (asked, SERVER, dataclasses.replace(shortest, predictor=None)),
            {},
        ),
    ):
        with pytest.raises(InputError, match=match):
            fs.simulate_closed(*arguments, **options)
    assert len(fs.simulate_closed(asked, SERVER, shortest, engine="reference").requests("vllm")) == 2
    with pytest.raises(InputError, match="policy must be"):
        fs.simulate_closed(asked, SERVER, vllm).result("orca")
