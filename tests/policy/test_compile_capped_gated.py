"""The cap of theory's figures, and spaced admission: what they hold, carry, refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fluidsched as fs
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.policy import compile_policy, largest_load
from fluidsched.policy.capped import carried, resident_kv_law
from fluidsched.policy.problem import Problem, expected_largest
from fluidsched.queues import embedded_queue_mean
from fluidsched.simulation.reference import run_reference

PAPER = fs.IterationTime.paper(d0=0.010042382503853812, d1=3.342175435455382e-7)


@pytest.fixture(scope="module")
def a100():
    return fs.catalog.server("a100-80gb", "llama-2-7b")


def value(table, name):
    return table.certificate[name]["value"]


# ------------------------------------------------------------------ capped


def check_conv_cap(fluid, tolerance):
    """κ̄ = 1226.479, σ = 712.879, N = 99.25 at z = 0 and 86.66 at z = 2.3263, for C = 121 728."""
    mean, deviation = resident_kv_law(Problem.of(fluid, 0.01))
    assert mean == pytest.approx(1226.479, abs=tolerance)
    assert deviation == pytest.approx(712.879, abs=tolerance)
    half, hundredth = (compile_policy(fluid, "capped", overflow_probability=d) for d in (0.5, 0.01))
    assert half.certificate["cap"]["real"] == pytest.approx(99.25, abs=0.01)
    assert hundredth.certificate["cap"]["real"] == pytest.approx(86.66, abs=0.01)
    assert (half.max_in_service, hundredth.max_in_service) == (99, 85)  # by the actual law's tail
    assert hundredth.token_budget == 2048


def test_cap_of_the_embedded_conversations(a100):
    check_conv_cap(fs.solve_fluid(fs.workloads.azure_conv().at_load(0.8, a100), a100), 0.01)


@pytest.mark.data
def test_cap_of_the_conversation_trace(a100, data_root):
    """From the trace itself, as one type."""
    path = fs.read_trace(data_root / "traces" / "AzureLLMInferenceTrace_conv.csv")
    check_conv_cap(fs.solve_fluid(path.to_workload(types=1).at_load(0.8, a100), a100), 0.001)


def test_cap_carries_0986_of_the_boundary(a100):
    """86 in service carry .987 of the LP's boundary and 85 .986: compiled at .98, refused at .99 with that figure."""
    conv = fs.workloads.azure_conv()
    fluid = fs.solve_fluid(conv.at_load(0.98, a100), a100)
    table = compile_policy(fluid, "capped")
    assert carried(Problem.of(fluid, 0.01), 86, math.inf) * 0.98 == pytest.approx(0.987, abs=0.0005)
    assert value(table, "carried") * 0.98 == pytest.approx(0.986, abs=0.0005)
    with pytest.raises(InfeasibleError, match=r"85.*below 0\.986 of the fluid boundary") as caught:
        compile_policy(fs.solve_fluid(conv.at_load(0.99, a100), a100), "capped")
    assert caught.value.reason == "time"
    overloaded = fs.solve_fluid(conv.at_load(1.3, a100), a100)
    with pytest.raises(InfeasibleError, match=r"below 0\.986"):
        compile_policy(overloaded, "capped")


def test_cap_by_hand():
    """One length: κ̄ = W/S = 522, σ² = (o² − 1)/12; δ = 0 counts 532 tokens for each."""
    fluid = fs.solve_fluid(fs.Workload([fs.RequestType("p", 12.0, 512, 21)]), fs.Server(60_000, PAPER))
    table = compile_policy(fluid, "capped", overflow_probability=0.5)
    memory = table.certificate["memory"]
    assert memory["mean_per_resident"] == 522.0
    assert memory["sd_per_resident"] == pytest.approx(math.sqrt(440 / 12))
    assert table.max_in_service == 114  # 60 000 / 522 = 114.9
    certain = compile_policy(fluid, "capped", overflow_probability=0.0)
    assert certain.max_in_service == 112  # 60 000 / 532 = 112.8
    assert certain.certificate["memory"]["guarantee"] == "certain"
    assert value(certain, "memory") == 112 * 532


def test_without_memory_limit_the_cap_is_the_batch_or_none():
    workload = fs.Workload([fs.RequestType("p", 12.0, 512, 21)])
    fluids = [fs.solve_fluid(workload, fs.Server(math.inf, PAPER, max_batch_size=b)) for b in (64, None)]
    assert [compile_policy(f, "capped").max_in_service for f in fluids] == [64, None]


def test_largest_batch_below_the_cap_wins(a100):
    server = fs.Server(121_728, a100.iteration_time, max_batch_size=40)
    fluid = fs.solve_fluid(fs.workloads.azure_conv().at_load(0.5, server), server)
    assert compile_policy(fluid, "capped").max_in_service == 40


@pytest.mark.slow
def test_carried_load_is_where_the_simulated_queue_turns(a100):
    """Saturated, the cap completes what `carried` says, within 3 %: the mean batch stands for all batches."""
    conv = fs.workloads.azure_conv()
    table = compile_policy(fs.solve_fluid(conv.at_load(0.9, a100), a100), "capped")
    flooded = conv.at_load(1.3, a100)
    runs = fs.simulate(flooded, a100, [table], horizon=900.0, warmup=300.0, replications=2, seed=5)
    completed = runs.measures("capped")["request_throughput"].mean()
    boundary = conv.at_load(1.0, a100).total_arrival_rate
    assert completed == pytest.approx(0.986 * boundary, rel=0.03)


def test_cap_refuses_blocks():
    fluid = fs.solve_fluid(fs.Workload([fs.RequestType("p", 12.0, 512, 21)]), fs.Server(60_000, PAPER))
    with pytest.raises(InputError, match="block_iterations"):
        compile_policy(fluid, "capped", block_iterations=4)
    with pytest.raises(InputError, match="horizon must be left out: what tables of kind 'capped'"):
        compile_policy(fluid, "capped", horizon=60.0)


def test_ages_vary_also_where_lengths_do_not():
    """One length: the cap leaves room for residents that happen to be old (z σ √N), unlike at δ = 1/2."""
    fluid = fs.solve_fluid(fs.Workload([fs.RequestType("p", 1.0, 10, 200)]), fs.Server(4000, PAPER))
    careful, even = (compile_policy(fluid, "capped", overflow_probability=d) for d in (0.01, 0.5))
    assert careful.max_in_service < even.max_in_service
    assert value(careful, "memory") <= 4000


def test_no_room_for_one_request_at_that_probability():
    fluid = fs.solve_fluid(fs.Workload([fs.RequestType("p", 0.01, 10, 200)]), fs.Server(220, PAPER))
    with pytest.raises(InfeasibleError, match="not one request fits") as caught:
        compile_policy(fluid, "capped", overflow_probability=0.001)
    assert caught.value.reason == "memory"


@pytest.mark.parametrize("kind", ["capped", "gated", "wait"])
def test_a_reserve_is_left_free(a100, kind):
    """Compiled for C − reserve: the bound respects it, and admission is told where it can be."""
    fluid = fs.solve_fluid(fs.workloads.azure_conv().merged(1).at_load(0.6, a100), a100)
    table = compile_policy(fluid, kind, kv_reserve=21_728)
    assert value(table, "memory") <= 100_000
    assert table.certificate["memory"]["capacity"] == 100_000
    assert table.kv_limit_tokens == (None if kind == "wait" else 100_000)
    for wrong in (-1.0, 121_728):
        with pytest.raises(InputError, match="kv_reserve"):
            compile_policy(fluid, kind, kv_reserve=wrong)


def test_robustness_lines(a100):
    """WAIT and gated keep up with every rate within its margin at once; a cap states the worst mix 30 % off."""
    workload = fs.workloads.azure_conv().at_load(0.7, a100)
    fluid = fs.solve_fluid(workload, a100)
    for kind in ("wait", "gated"):
        line = compile_policy(fluid, kind).certificate["robustness"]
        assert line["value"] == pytest.approx(min(line["per_type"]))
        assert line["all_rates_30_percent_up"] == (line["value"] >= 0.3)
    table = compile_policy(fluid, "capped")
    line = table.certificate["robustness"]
    assert line["memory_mix_30_percent_off"] > value(table, "memory")
    rng = np.random.default_rng(2)
    for _ in range(20):
        off = fluid.admitted_rate * rng.uniform(0.7, 1.3, len(workload))
        mean, deviation = resident_kv_law(Problem.of(fluid, 0.01, rate=off))
        held = 85 * mean + 2.3263479 * deviation * math.sqrt(85)
        assert held <= line["memory_mix_30_percent_off"] * (1 + 1e-9)
    assert line["carried_mix_30_percent_off"] == pytest.approx(value(table, "carried") / 1.3, rel=1e-6)


def test_priorities_reach_the_table():
    types = [fs.RequestType("a", 2.0, 100, 10, priority=1), fs.RequestType("b", 2.0, 100, 10, priority=0.5)]
    fluid = fs.solve_fluid(fs.Workload(types), fs.Server(50_000, PAPER))
    for kind in ("wait", "gated"):
        assert [row.priority for row in compile_policy(fluid, kind).types] == [1.0, 0.5]


# ------------------------------------------------------------------ gated


def test_gated_by_hand():
    """Window 1, ε = .5, w = W d1: T = d0/(1 − 36 w) = 11.57 ms, 36 T = .4165 → 1 in ⌊1/.4165⌋ = 2 iterations."""
    server = fs.Server(137_000, PAPER)
    fluid = fs.solve_fluid(fs.Workload([fs.RequestType("p", 24.0, 512, 21)]), server)
    table = compile_policy(fluid, "gated", slack=0.5, block_iterations=1)
    work = 10962 * 3.342175435455382e-7
    time = 0.010042382503853812 / (1 - 1.5 * 24 * work)
    period = math.floor(1 / (1.5 * 24 * time))
    assert (table.thresholds.tolist(), table.types[0].period) == ([1], period)
    full = 0.010042382503853812 + work / period
    assert value(table, "iteration_time") == pytest.approx(full)
    assert value(table, "slack") == pytest.approx(1 / period / (24 * full) - 1)
    mean = embedded_queue_mean(1, 24 * period * full, wait=False)
    assert value(table, "queue") == pytest.approx(mean)
    assert table.certificate["memory"]["guarantee"] == "certain"
    assert table.types[0].gate == 0
    assert not table.freeze
    assert table.token_budget == 2048


RATES = st.lists(
    st.tuples(st.floats(0.02, 6.0), st.integers(1, 300), st.integers(1, 30)), min_size=1, max_size=4
)


@given(RATES, st.integers(1, 40), st.floats(0.0, 0.5))
@settings(max_examples=50)
def test_gated_windows_keep_up_and_are_as_long_as_they_can_be(types, window, slack):
    workload = fs.Workload([fs.RequestType(f"t{i}", *t) for i, t in enumerate(types)])
    server = fs.Server(30_000, fs.IterationTime.two_piece(0.01, 1e-5, 50, 4e-5, 3e-7, 3e-9))
    fluid = fs.solve_fluid(workload, server)
    try:
        table = compile_policy(fluid, "gated", slack=slack, block_iterations=window)
    except InfeasibleError:
        assume(False)
    n = table.thresholds
    period = np.array([row.period for row in table.types])
    time = value(table, "iteration_time")
    assert np.all(n / period >= (1 + slack) * workload.arrival_rate * time * (1 - 1e-9))
    assert np.all(period >= window)
    assert value(table, "memory") <= 30_000
    assert value(table, "slack") >= slack * (1 - 1e-9)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=3),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
@settings(max_examples=25)
def test_gated_table_never_overflows_for_fixed_lengths(lengths, window, random):
    """Simulated on bursts, prompts cut by a small server budget: KV never above the certified bound."""
    time = fs.IterationTime.affine(2**-7, 2**-14, 2**-14, 2**-18)
    workload = fs.Workload([fs.RequestType(f"t{i}", 2.0, p, o) for i, (p, o) in enumerate(lengths)])
    budget = random.choice([None, 24, 40])
    try:
        table = compile_policy(
            fs.solve_fluid(workload, fs.Server(1e9, time, max_batch_size=12, token_budget=budget)),
            "gated",
            slack=0.3,
            block_iterations=window,
        )
    except InfeasibleError:
        assume(False)
    count = 60
    arrival = np.sort([random.choice([0.0, 0.5, 1.0, 2.0, 3.0]) + random.random() / 4 for _ in range(count)])
    kind = np.array([random.randrange(len(lengths)) for _ in range(count)])
    path = fs.ArrivalPath.from_arrays(
        arrival,
        np.array([lengths[j][0] for j in kind]),
        np.array([lengths[j][1] for j in kind]),
        type=kind,
        type_names=workload.type_names,
    )
    server = fs.Server(1e9, time, max_batch_size=12, token_budget=budget)
    run = run_reference(path, server, table, horizon=None)
    assert run.peak_kv <= value(table, "memory")


def test_gated_reach_and_wait_on_the_azure_mix(a100):
    """12 types reach about .95 of the boundary; the best window's wait falls with the load."""
    conv = fs.workloads.azure_conv()
    waits = []
    for x in (0.5, 0.7, 0.9):
        table = compile_policy(fs.solve_fluid(conv.at_load(x, a100), a100), "gated")
        waits.append(value(table, "ttft"))
        assert value(table, "memory") <= a100.kv_capacity
    assert waits == sorted(waits)
    with pytest.raises(InfeasibleError, match=r"up to 0\.9[0-9]+ of the fluid boundary") as caught:
        compile_policy(fs.solve_fluid(conv.at_load(0.999, a100), a100), "gated")
    assert caught.value.reason == "memory"


def test_refused_types_are_never_admitted_in_overload():
    """The optimum serves the short type alone; the long one has threshold 0 in the gated table."""
    workload = fs.Workload([fs.RequestType("short", 20.0, 100, 10), fs.RequestType("long", 20.0, 4000, 400)])
    server = fs.Server(20_000, PAPER)
    fluid = fs.solve_fluid(workload, server)
    assert fluid.admitted_rate[0] == pytest.approx(20.0)
    rationed = fs.solve_fluid(workload.with_rates([20.0, 0.0]), server)
    table = compile_policy(rationed, "gated", slack=0.1)
    assert table.thresholds[0] > 0
    assert table.thresholds[1] == 0
    path = fs.ArrivalPath.from_arrays(
        [0.0, 0.0], [100, 4000], [10, 400], type=[0, 1], type_names=("short", "long")
    )
    run = run_reference(path, server, table, horizon=None)
    assert math.isfinite(run.finish_s[0])
    assert run.verdict == "stuck"
    assert run.starved_types == ("long",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "types", "load"),
    [(None, 12, 0.8), (None, 1, 0.93), ("vidur-recon", 1, 0.86), ("vidur-recon", 3, 0.86)],
)
def test_waiting_bound_holds_in_simulation(source, types, load):
    """Mean TTFT of gated and WAIT under Poisson arrivals stays below the certificate's bound.

    Also where a knee makes batches with a prompt dearer than the mean batch says (vidur-recon): there a table
    compiled with mean batches would be unstable.
    """
    server = fs.catalog.server("a100-80gb", "llama-2-7b", source=source)
    conv = fs.workloads.azure_conv().merged(types).at_load(load, server)
    fluid = fs.solve_fluid(conv, server)
    tables = [compile_policy(fluid, kind) for kind in ("gated", "wait")]
    runs = fs.simulate(conv, server, tables, horizon=3600.0, warmup=600.0, replications=4, seed=11)
    for table in tables:
        assert np.mean(runs.measures(table.name)["mean_ttft"]) <= value(table, "ttft")


def test_prompts_apart_carry_less_than_the_mean_batch_says():
    """Beyond a knee `at_least` < `carried`; with one piece they agree."""
    conv = fs.workloads.azure_conv()
    server = fs.catalog.server("a100-80gb", "llama-2-7b", source="vidur-recon")
    table = compile_policy(fs.solve_fluid(conv.at_load(0.9, server), server), "capped")
    carried = table.certificate["carried"]
    assert carried["at_least"] < 0.99 * carried["value"]
    near = compile_policy(fs.solve_fluid(conv.at_load(0.97, server), server), "capped")
    assert near.certificate["carried"]["at_least"] < 1.0 < value(near, "carried")
    assert value(near, "throughput") < conv.at_load(0.97, server).total_arrival_rate
    plain = fs.Server(121_728, fs.IterationTime.affine(0.01, 5e-5, 5e-5, 3e-7))
    table = compile_policy(fs.solve_fluid(conv.at_load(0.9, plain), plain), "capped")
    carried = table.certificate["carried"]
    assert carried["at_least"] == pytest.approx(carried["value"])


def test_expected_largest_of_normals():
    """Drawn: exact for two, an upper bound for three."""
    rng = np.random.default_rng(0)
    mean = np.array([0.3, 0.0, -0.5])
    draws = mean + rng.standard_normal((200_000, 3)) * [1.0, 0.5, 2.0]
    variance = np.add.outer([1.0, 0.25, 4.0], [1.0, 0.25, 4.0]) * (1 - np.eye(3))
    error = 4 * draws.max(axis=1).std() / math.sqrt(len(draws))
    two = expected_largest(mean[:2], variance[:2, :2])
    assert float(two) == pytest.approx(draws[:, :2].max(axis=1).mean(), abs=error)
    assert float(expected_largest(mean, variance)) >= draws.max(axis=1).mean() - error
    assert float(expected_largest(mean, np.zeros((3, 3)))) == 0.3


@pytest.mark.parametrize("kind", ["capped", "wait", "gated"])
def test_largest_load_is_where_tables_end(a100, kind):
    """A table exists just below it and none just above; overload or not, the boundary is the same."""
    conv = fs.workloads.azure_conv().merged(3)
    share = largest_load(fs.solve_fluid(conv.at_load(0.5, a100), a100), kind)
    assert largest_load(fs.solve_fluid(conv.at_load(1.4, a100), a100), kind) == pytest.approx(share, abs=1e-9)
    compile_policy(fs.solve_fluid(conv.at_load(share - 0.001, a100), a100), kind)
    with pytest.raises(InfeasibleError):
        compile_policy(fs.solve_fluid(conv.at_load(share + 0.002, a100), a100), kind)
    assert largest_load(fs.solve_fluid(conv.at_load(0.5, a100), a100), kind, slack=0.2) < share
