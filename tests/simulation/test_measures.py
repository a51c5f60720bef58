"""Measures beyond latency and throughput: ITL, slowdown, fairness, types; by hand and against the records."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from simulation_cases import MIXED, UNIT, engine_table, path_of, server_of, typed_table

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.server.alone import times_alone
from fluidsched.simulation import SimulationResult, simulate
from fluidsched.simulation.histogram import RELATIVE_ERROR
from fluidsched.simulation.measures import (
    LATENCIES,
    QUANTILES,
    alone_s,
    intervals,
    jain_index,
    measure_run,
)
from fluidsched.simulation.records import STATUSES
from fluidsched.workload import RequestType, Workload

TWO = Workload(
    [RequestType("chat", 2.0, prompt_tokens=20, output_tokens=8), RequestType("long", 0.5, 60, 30)],
    name="two",
)
SERVER = server_of(400, fs.IterationTime.affine(0.05, 1e-4, 1e-3, 1e-5), max_batch_size=8)

WITHIN = RELATIVE_ERROR * (1.0 + 1e-9)


@pytest.fixture(scope="module")
def runs() -> SimulationResult:
    tables = [engine_table(), engine_table("sarathi", token_budget=64)]
    return simulate(TWO, SERVER, tables, horizon=60.0, warmup=10.0, replications=3, seed=1)


class TestByHand:
    """Three requests with known times: iterations 0–2, 2–4, 4–7.5 and 7.5–9 (see test_hand_traces)."""

    PATH = path_of((0.0, 4, 3, "a"), (0.5, 2, 1, "b"), (2.5, 8, 2, "a"))

    @pytest.fixture(params=["kernel", "reference"])
    def values(self, request):
        runs = simulate(
            self.PATH, server_of(40, MIXED, max_batch_size=4), engine_table(), engine=request.param
        )
        return {name: value.item() for name, value in runs.measures("vllm").items()}

    def test_itl(self, values):
        """Tokens of the first at 2, 4, 7.5, of the third at 7.5 and 9: gaps 2, 3.5 and 1.5."""
        assert_allclose(values["mean_itl"], 7.0 / 3)
        assert_allclose(values["p50_itl"], 2.0, rtol=WITHIN)
        assert_allclose(values["p99_itl"], 2.0 + 0.98 * 1.5, rtol=WITHIN)

    def test_slowdown(self, values):
        """Alone: 1 + p/4 for the prompt and 1.5 for each further token: 5, 1.5 and 4.5 s."""
        assert_allclose(values["mean_slowdown"], np.mean([7.5 / 5.0, 3.5 / 1.5, 6.5 / 4.5]))
        assert_allclose(values["p50_slowdown"], 7.5 / 5.0)

    def test_slot_utilization(self, values):
        assert_allclose(values["slot_utilization"], 14.5 / 9 / 4)

    def test_fairness(self, values):
        """All demand is served, so service is even; slowdowns are 53/36 on average for a, 7/3 for b."""
        assert values["service_fairness"] == 1.0
        a, b = (1.5 + 6.5 / 4.5) / 2, 3.5 / 1.5
        assert_allclose(values["slowdown_fairness"], (a + b) ** 2 / (2 * (a * a + b * b)))

    def test_a_cut_run_is_at_least_as_slow(self):
        """Cut at 6 only b has finished: slowdowns of a are at least 6/5 and 3.5/4.5, its service 0 of 17 tokens."""
        runs = simulate(self.PATH, server_of(40, MIXED), engine_table(), horizon=6.0, warmup=0.0)
        outcome = runs.outcome("vllm")
        assert_allclose(outcome.values["mean_slowdown"], np.mean([6 / 5, 3.5 / 1.5, 3.5 / 4.5]))
        assert outcome.lower_bounds["mean_slowdown"].all()
        assert outcome.values["service_fairness"] == [0.5]
        assert math.isnan(outcome.values["slot_utilization"].item())


def test_jain_index_leaves_out_the_undefined():
    assert jain_index(np.array([1.0, math.nan, 1.0])) == 1.0
    assert math.isnan(jain_index(np.array([1.0, math.nan])))
    assert math.isnan(jain_index(np.zeros(3)))


def test_priority_is_unfair_where_order_of_arrival_is_not():
    """Eight of b come with eight of a and always behind them; in order of arrival none is slowed more."""
    path = path_of(*((float(i // 2), 1, 2, "ab"[i % 2]) for i in range(16)))
    even = {name: {"threshold": 1, "period": 1, "priority": 1} for name in "ab"}
    ranked = {
        "a": {"threshold": 1, "period": 1, "priority": 1},
        "b": {"threshold": 1, "period": 1, "priority": 2},
    }
    server = server_of(time=UNIT, max_batch_size=1)
    fair, unfair = (
        simulate(path, server, typed_table("gated", rows)).measures("gated")["slowdown_fairness"].item()
        for rows in (even, ranked)
    )
    assert fair > 0.97
    assert unfair < 0.9


def test_histogram_quantiles_of_itl_are_those_of_the_gaps():
    """Constant iterations of a second: every gap is one second, as the histogram says within its error."""
    path = path_of(*((0.3 * i, 1, 5) for i in range(20)))
    values = simulate(path, server_of(time=UNIT), engine_table()).measures("vllm")
    assert values["mean_itl"].item() == 1.0
    for word in QUANTILES:
        assert abs(values[f"{word}_itl"].item() - 1.0) <= WITHIN


def test_slowdown_is_at_least_one(runs):
    """No scheduler beats the time alone."""
    for policy in runs.policies:
        for replication in range(3):
            frame = runs.requests(policy, replication)
            first = frame[frame.status == "finished"]
            alone = times_alone(first.prompt_tokens.to_numpy(), first.output_tokens.to_numpy(), SERVER)[1]
            assert ((first.finish_s - first.arrival_s) / alone >= 1.0 - 1e-9).all()
        assert (runs.measures(policy)["mean_slowdown"] >= 1.0).all()


class TestByType:
    def test_types_add_up(self, runs):
        """Counts and rates of types sum to the whole's, means weigh by requests."""
        rows = runs.by_type().set_index(["policy", "type", "measure"])["estimate"]
        for policy in runs.policies:
            whole = runs.measures(policy)
            for measure in ("request_throughput", "effective_throughput", "completed", "unfinished"):
                total = sum(rows[policy, name, measure] for name in TWO.type_names)
                assert_allclose(total, whole[measure].mean())

    def test_a_type_is_measured_as_if_alone_in_the_frame(self, runs):
        frame = runs.requests("vllm", 0)
        alone = simulate(runs.paths[0], SERVER, engine_table(), horizon=60.0, warmup=10.0).by_type()
        own = frame[(frame.type == "long") & (frame.arrival_s >= 10.0)]
        value = alone.set_index(["type", "measure"])["estimate"]["long", "p50_ttft"]
        assert_allclose(value, np.median(own.first_token_s.dropna() - own.arrival_s))

    def test_rows_of_the_table_stand_in_for_labels(self):
        runs = simulate(path_of((0.0, 1, 1)), server_of(), engine_table())
        assert set(runs.by_type()["type"]) == {"*"}

    def test_goodput_needs_slos(self, runs):
        assert "goodput" not in set(runs.by_type()["measure"])
        assert "goodput" in set(runs.with_slo({"ttft": 1.0}).by_type()["measure"])


def test_intervals_of_many_measures_are_those_of_each():
    """Undefined values are left out row by row."""
    values = np.array([[1.0, 2.0, 4.0], [5.0, math.nan, 6.0], [math.nan] * 3, [7.0, math.nan, math.nan]])
    estimate, low, high = intervals(values)
    assert_allclose(estimate, [7 / 3, 5.5, math.nan, 7.0])
    assert_allclose(high[:2] - low[:2], [2 * 4.302652730 * math.sqrt(7 / 9), 2 * 12.70620474 * 0.5])
    assert np.isnan(low[2:]).all()


class TestWarmup:
    def test_mser5_is_common_to_all_policies(self):
        """The latest end of any policy's start; the title and the file say by what rule."""
        tables = [engine_table(), engine_table("sarathi", token_budget=64)]
        runs = simulate(TWO, SERVER, tables, horizon=60.0, warmup="mser5", replications=3, seed=1)
        assert set(runs.transients) == {"vllm", "sarathi"}
        assert runs.warmup == max(runs.transients.values()) < 30.0
        assert "(MSER-5)" in runs.title
        fixed = simulate(TWO, SERVER, tables, horizon=60.0, warmup=runs.warmup, replications=3, seed=1)
        assert_allclose(fixed.measures("vllm")["mean_kv"], runs.measures("vllm")["mean_kv"])
        back = SimulationResult.from_dict(runs.to_dict())
        assert back.transients == runs.transients

    def test_overload_has_no_end_of_the_start(self):
        """One request at a time of 0.25 s, twelve a second: the half of the run, and it is said."""
        workload = Workload([RequestType("one", 12.0, prompt_tokens=1, output_tokens=1)])
        server = server_of(time=fs.IterationTime.affine(0.25, 0.0, 0.0, 0.0))
        table = engine_table("capped", max_in_service=1)
        runs = simulate(workload, server, table, horizon=100.0, warmup="mser5", replications=2, seed=5)
        assert runs.warmup == 50.0
        assert math.isnan(runs.transients["capped"])
        assert "no end of the start seen for capped" in runs.title
        assert math.isnan(SimulationResult.from_dict(runs.to_dict()).transients["capped"])

    def test_another_word_is_named(self):
        with pytest.raises(InputError, match="warmup"):
            simulate(TWO, SERVER, engine_table(), horizon=60.0, warmup="mser")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def long() -> SimulationResult:
    tables = [engine_table(), engine_table("sarathi", token_budget=64)]
    return simulate(TWO, SERVER, tables, horizon=4000.0, warmup=100.0, replications=1, seed=2)


class TestBatchMeans:
    def test_the_whole_run_is_in_the_middle(self, long):
        frame = long.batch_means("vllm").set_index("measure")
        for measure in ("mean_ttft", "p99_e2e", "request_throughput", "mean_slowdown"):
            row = frame.loc[measure]
            assert_allclose(row.estimate, long.measures("vllm")[measure].item())
            assert_allclose(row.high - row.estimate, row.estimate - row.low)
            assert row.independence >= 0.1
        assert "completed" not in frame.index

    def test_throughput_varies_as_arrivals_do(self, long):
        """2.5 Poisson arrivals/s over 3 900 s: the half width is near 1.96 √(2.5/3900), as far as χ² with K - 1 ≥ 15
        degrees of freedom can be from its mean (a factor 0.5 to 1.6 in all but one of a thousand)."""
        row = long.batch_means("vllm").set_index("measure").loc["request_throughput"]
        expected = 1.96 * math.sqrt(2.5 / 3900)
        assert 0.5 * expected < row.high - row.estimate < 1.75 * expected

    def test_differences_are_paired_by_batch(self, long):
        """Busy batches are busy for both policies: the difference is known better than either."""
        paired = long.batch_means("sarathi", baseline="vllm").set_index("measure").loc["request_throughput"]
        alone = long.batch_means("vllm").set_index("measure").loc["request_throughput"]
        assert paired.high - paired.low < 0.3 * (alone.high - alone.low)

    def test_a_growing_backlog_has_no_interval(self):
        """Overload: neighbouring batches are alike at every length."""
        workload = Workload([RequestType("one", 6.0, prompt_tokens=1, output_tokens=1)])
        server = server_of(time=fs.IterationTime.affine(0.25, 0.0, 0.0, 0.0))
        table = engine_table("capped", max_in_service=1)
        runs = simulate(workload, server, table, horizon=600.0, replications=1, seed=5)
        row = runs.batch_means("capped").set_index("measure").loc["mean_e2e"]
        assert row.batches == 8
        assert math.isnan(row.low)


def test_serve_fields_have_every_token_gap_and_total(runs):
    """As in the files of ``vllm bench serve``, so that a simulated row stands next to a measured one."""
    row = runs.to_serve_summary()[0]
    for metric in ("ttft", "tpot", "itl", "e2el"):
        for word in ("mean", "median", "p90", "p99", "p99.9"):
            assert row[f"{word}_{metric}_ms"] > 0.0
    assert_allclose(
        row["total_output_tokens"] / row["duration"], runs.measures("vllm")["effective_throughput"].mean()
    )
    assert_allclose(
        row["total_input_tokens"] + row["total_output_tokens"],
        row["total_token_throughput"] * row["duration"],
    )


def by_the_definition(path, run, start, alone, type_of):
    """Latencies, quantiles and fairness request by request in plain Python, as the module's text has them."""
    values, bounds = {}, set()
    samples = {name: ([], []) for name in (*LATENCIES, "slowdown")}
    served, asked = {}, {}
    shares = {}
    for i, (arrival, prompt, output) in enumerate(
        zip(path.arrival_s.tolist(), path.prompt_tokens.tolist(), path.output_tokens.tolist(), strict=True)
    ):
        status = STATUSES[run.status[i]]
        of_type = int(type_of[i])
        if status == "finished" and run.finish_s[i] > start:
            served[of_type] = served.get(of_type, 0) + prompt + output
        if arrival < start or status == "rejected":
            continue
        asked[of_type] = asked.get(of_type, 0) + prompt + output
        spent = (run.end_s if math.isnan(run.left_s[i]) else run.left_s[i]) - arrival
        shares.setdefault(of_type, []).append(max(spent, 0.0) / alone[i])
        for name, (observed, at_least) in samples.items():
            begin = run.first_token_s[i] if name == "tpot" else arrival
            event = {"ttft": run.first_token_s, "scheduling_delay": run.admitted_s}.get(name, run.finish_s)[i]
            divisor = {"tpot": output - 1, "slowdown": alone[i]}.get(name, 1)
            if math.isnan(begin) or divisor == 0:
                continue
            if not math.isnan(event):
                observed.append((event - begin) / divisor)
            elif status == "unfinished":
                at_least.append(max(run.end_s - begin, 0.0) / divisor)
    for name, (observed, at_least) in samples.items():
        together = sorted(observed) + [math.inf] * len(at_least)
        values[f"mean_{name}"] = np.mean(observed + at_least) if together else math.nan
        if at_least:
            bounds.add(f"mean_{name}")
        for word, level in QUANTILES.items():
            rank = (len(together) - 1) * level
            if together and math.ceil(rank) >= len(observed):
                bounds.add(f"{word}_{name}")
                together = sorted(observed + at_least)
            values[f"{word}_{name}"] = (
                np.interp(rank, np.arange(len(together)), together) if together else math.nan
            )
    types = range(int(type_of.max()) + 1)
    values["service_fairness"] = jain_index(
        np.array([served.get(j, 0) / asked[j] if asked.get(j) else math.nan for j in types])
    )
    values["slowdown_fairness"] = jain_index(np.array([np.mean(shares.get(j, [math.nan])) for j in types]))
    return values, bounds


@pytest.mark.parametrize("seed", range(40))
def test_measures_follow_their_definition_whatever_happened(seed):
    """Requests without a first token or a last one, rejected, gone, of one token; few and many; all or none left."""
    random = np.random.default_rng(seed)
    count = int(random.choice([1, 2, 3, 10, 200]))
    path = fs.ArrivalPath.from_arrays(
        np.sort(random.uniform(0.0, 50.0, count)),
        random.integers(1, 50, count),
        random.integers(1, 4, count),
        random.integers(0, 3, count),
        type_names=("a", "b", "c"),
    )
    odds = np.append(random.dirichlet(np.ones(len(STATUSES))) if seed % 4 else [1.0], np.zeros(9))
    status = random.choice(len(STATUSES), count, p=odds[: len(STATUSES)]).astype(np.int8)
    times = np.minimum(np.cumsum(random.exponential(4.0, (3, count)), axis=0) + path.arrival_s, 60.0)
    reached = random.integers(0, 3, count)
    finished, waits = status == STATUSES.index("finished"), status == STATUSES.index("rejected")
    reached = np.where(finished, 3, np.where(waits, 0, reached))
    times[2] = np.where(finished & (path.output_tokens == 1), times[1], times[2])
    admitted, first, finish = np.where(reached > np.arange(3)[:, None], times, math.nan)
    gone = np.isin(status, [STATUSES.index(word) for word in ("abandoned", "aborted")])
    run = replace(
        simulate(TWO, SERVER, engine_table(), horizon=5.0, replications=1).run("vllm"),
        admitted_s=admitted,
        first_token_s=first,
        finish_s=finish,
        left_s=np.where(gone, 60.0, finish),
        preemptions=np.zeros(count, dtype=np.int64),
        status=status,
        end_s=60.0,
    )
    alone, start = random.uniform(0.1, 2.0, count), float(random.choice([0.0, 12.0, 45.0]))
    expected, bounds = by_the_definition(path, run, start, alone, path.type)
    found, found_bounds = measure_run(
        path, run, warmup=start, kv_capacity=400.0, alone=alone, type_of=path.type
    )
    assert_allclose([found[name] for name in expected], list(expected.values()), rtol=1e-12)
    assert found_bounds == bounds


def test_times_alone_are_found_once_for_a_path_and_its_servers():
    """Kept with the path, which the next policies and SLOs meet again; other servers have other times."""
    path = TWO.sample(20.0, seed=3)
    slower = server_of(400, fs.IterationTime.affine(0.1, 1e-4, 1e-3, 1e-5))
    mine, its = alone_s(path, [SERVER]), alone_s(path, [slower])
    assert_allclose(mine, times_alone(path.prompt_tokens, path.output_tokens, SERVER)[1])
    assert (its > mine).all()
    assert_allclose(alone_s(path, [slower, SERVER]), mine)
    again = alone_s(path, [SERVER])
    assert_allclose(again, mine)
    assert alone_s(path, [SERVER]) is again
