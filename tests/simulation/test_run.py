"""`simulate`, the measures, the result and its files: what a user of the library sees."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from simulation_cases import MIXED, engine_table, path_of, server_of, typed_table

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.simulation import SimulationResult, simulate
from fluidsched.simulation.measures import UNITS, interval, latencies, measure_run, quantile
from fluidsched.simulation.reference import run_reference
from fluidsched.workload import RequestType, Workload, read_trace

CHAT = Workload([RequestType("chat", 2.0, prompt_tokens=20, output_tokens=8)], name="chat")
SERVER = server_of(400, fs.IterationTime.affine(0.05, 1e-4, 1e-3, 1e-5))
TABLES = [engine_table(), engine_table("sarathi", token_budget=64)]


@pytest.fixture(scope="module")
def runs() -> SimulationResult:
    return simulate(CHAT, SERVER, TABLES, horizon=40.0, warmup=10.0, replications=4, seed=1, check=True)


class TestSimulate:
    def test_paths_are_common_and_follow_the_seed(self, runs):
        """Same seed, same paths, whatever the policies and their number; other seed, other paths."""
        again = simulate(CHAT, SERVER, TABLES[1], horizon=40.0, warmup=10.0, replications=2, seed=1)
        assert runs.paths[:2] == again.paths
        assert_array_equal(
            runs.run("sarathi", 1).finish_s[runs.run("sarathi", 1).status == 0],
            again.run("sarathi", 1).finish_s[again.run("sarathi", 1).status == 0],
        )
        other = simulate(CHAT, SERVER, TABLES[1], horizon=40.0, replications=1, seed=2)
        assert other.paths[0] != runs.paths[0]

    def test_a_path_is_replayed_once_until_empty(self):
        path = path_of((0.0, 4, 3), (0.5, 2, 1))
        runs = simulate(path, server_of(time=MIXED), engine_table())
        assert (runs.replications, runs.horizon, runs.warmup, runs.seed) == (1, None, 0.0, None)
        assert runs.verdict("vllm") == "finished"

    def test_a_sampled_path_ends_at_its_horizon(self):
        path = CHAT.sample(20.0, seed=4)
        runs = simulate(path, SERVER, TABLES)
        assert runs.run("vllm").end_s == 20.0
        shorter = simulate(path, SERVER, TABLES, horizon=5.0)
        assert len(shorter.paths[0]) == np.count_nonzero(path.arrival_s <= 5.0)

    def test_several_paths_are_replications(self):
        """The workload's own paths, given one by one, make the same runs; mixed horizons are named."""
        paths = [CHAT.sample(20.0, seed) for seed in (1, 2, 3)]
        runs = simulate(paths, SERVER, TABLES[0], warmup=5.0)
        assert (runs.replications, runs.horizon, runs.seed) == (3, 20.0, None)
        for r, path in enumerate(paths):
            alone = simulate(path, SERVER, TABLES[0], warmup=5.0)
            assert_array_equal(runs.run("vllm", r).finish_s, alone.run("vllm").finish_s)
        with pytest.raises(InputError, match=r"workload\[1\].horizon"):
            simulate([paths[0], CHAT.sample(30.0, 4)], SERVER, TABLES[0])
        with pytest.raises(InputError, match="replications"):
            simulate(paths, SERVER, TABLES[0], replications=2)
        with pytest.raises(InputError, match=r"workload\[1\]"):
            simulate([paths[0], CHAT], SERVER, TABLES[0])

    def test_progress(self):
        calls = []
        simulate(CHAT, SERVER, TABLES, horizon=5.0, replications=2, progress=lambda *call: calls.append(call))
        assert calls[0] == ("simulate vllm", 1, 4)
        assert calls[-1] == ("simulate sarathi", 4, 4)

    def test_engines_agree_and_only_the_reference_follows_a_function(self):
        runs = simulate(CHAT, SERVER, TABLES, horizon=20.0, replications=2, check=True)
        reference = simulate(CHAT, SERVER, TABLES, horizon=20.0, replications=2, engine="reference")
        for name, values in runs.measures("sarathi").items():
            assert_allclose(values, reference.measures("sarathi")[name], rtol=1e-9, err_msg=name)
        any_function = server_of(time=fs.IterationTime.function(lambda batch: 0.25))
        with pytest.raises(InputError, match="iteration_time"):
            simulate(CHAT, any_function, TABLES, horizon=20.0)
        runs = simulate(CHAT, any_function, TABLES, horizon=20.0, replications=1, engine="reference")
        assert SimulationResult.from_dict(json.loads(runs.to_json())).server is None

    @pytest.mark.parametrize("engine", ["kernel", "reference"])
    def test_who_arrives_in_a_cut_iteration_waits_until_the_horizon(self, engine):
        """Arrival at 1.5 during the iteration 1–2, horizon 1.75 (the kernel once forgot this quarter second)."""
        path = path_of((0.0, 2, 4), (1.5, 2, 1), horizon=1.75)
        runs = simulate(path, server_of(), engine_table(), warmup=0.0, engine=engine, check=True)
        assert runs.run("vllm").waiting_s == 0.25

    def test_replications_use_the_seeds_children(self):
        runs = simulate(CHAT, SERVER, TABLES, horizon=5.0, replications=2, seed=3)
        for path, child in zip(runs.paths, np.random.SeedSequence(3).spawn(2), strict=True):
            assert path == CHAT.sample(5.0, child)

    @pytest.mark.parametrize(
        ("changes", "argument"),
        [
            ({"replications": 0}, "replications"),
            ({"horizon": 0.0}, "horizon"),
            ({"horizon": None}, "horizon"),
            ({"warmup": 5.0}, "warmup"),
            ({"warmup": -1.0}, "warmup"),
            ({"engine": "abacus"}, "engine"),
            ({"oversize": "drop"}, "oversize"),
            ({"policies": []}, "policies"),
            ({"policies": [TABLES[0], TABLES[0]]}, r"policies\[1\].name"),
            ({"policies": ["vllm"]}, r"policies\[0\]"),
            ({"server": 3}, "server"),
            ({"workload": "chat"}, "workload"),
            ({"seed": -1}, "seed"),
            ({"workload": path_of((0.0, 1, 1)), "replications": 2}, "replications"),
            ({"policies": typed_table("gated", {"other": {"threshold": 1, "period": 1}})}, "request 0"),
        ],
    )
    def test_wrong_input_is_named_before_anything_runs(self, changes, argument):
        given = {"workload": CHAT, "server": SERVER, "policies": TABLES, "horizon": 5.0, "replications": 2}
        given.update(changes)
        started = []
        with pytest.raises(InputError, match=f"^{argument}"):
            simulate(**given, progress=lambda *call: started.append(call))
        assert not started

    def test_oversize_requests(self):
        """An error naming the first and how many more, or status rejected."""
        path = path_of((0.0, 4, 2), (0.0, 40, 2), (1.0, 50, 2))
        with pytest.raises(
            InputError, match=r"request 1 .* got 40 prompt and 2 output tokens \(and 1 more\)"
        ):
            simulate(path, server_of(20), engine_table())
        runs = simulate(path, server_of(20), engine_table(), oversize="reject", check=True)
        assert runs.requests("vllm")["status"].tolist() == ["finished", "rejected", "rejected"]
        assert runs.measures("vllm")["rejected"].tolist() == [2.0]
        assert runs.measures("vllm")["mean_e2e"].tolist() == [2.0]

    @pytest.mark.parametrize("engine", ["kernel", "reference"])
    def test_waiting_with_restarts_needs_a_horizon(self, engine):
        """Requests that lose their tokens can displace each other for ever: refused, not looped."""
        table = typed_table(
            "wait", {"a": {"threshold": 2, "gate": 2}}, block_iterations=1, freeze=True, preemption="restart"
        )
        path = path_of((0.0, 3, 6, "a"), (0.0, 3, 6, "a"))
        with pytest.raises(InputError, match="horizon"):
            simulate(path, server_of(8, MIXED), table, engine=engine)
        assert simulate(path, server_of(8, MIXED), table, engine=engine, horizon=200.0).verdict("wait")

    def test_stuck_is_a_verdict(self):
        table = typed_table("wait", {"A": {"threshold": 2, "gate": 2}})
        runs = simulate(path_of((0.0, 1, 2, "A"), (1.0, 1, 2, "A")), server_of(), table)
        assert runs.verdict("wait") == "stuck (A)"
        assert runs.measures("wait")["unfinished"].tolist() == [2.0]

    @pytest.mark.parametrize(("rate", "verdict"), [(1.0, "stable"), (6.0, "unstable")])
    def test_backlog_growth_tells_stable_from_unstable(self, rate, verdict):
        """One at a time, 0.25 s each: 4 requests/s fit; one replication alone decides nothing."""
        workload = Workload([RequestType("one", rate, prompt_tokens=1, output_tokens=1)])
        server = server_of(time=fs.IterationTime.affine(0.25, 0.0, 0.0, 0.0))
        table = engine_table("capped", max_in_service=1)
        runs = simulate(workload, server, table, horizon=600.0, replications=6, seed=5)
        assert runs.verdict("capped") == verdict
        alone = simulate(workload, server, table, horizon=600.0, replications=1, seed=5)
        assert alone.verdict("capped") == "undecided"


class TestMeasures:
    """Three requests with known times: iterations 0–2, 2–4, 4–7.5 and 7.5–9 (see test_hand_traces)."""

    PATH = path_of((0.0, 4, 3), (0.5, 2, 1), (2.5, 8, 2))
    SERVER = server_of(40, MIXED)

    def measured(self, warmup=0.0, horizon=None, slo=None):
        run = run_reference(self.PATH, self.SERVER, engine_table(), horizon=horizon, warmup=warmup)
        return measure_run(self.PATH, run, warmup=warmup, kv_capacity=40.0, slo=slo)

    def test_by_hand(self):
        values, bounds = self.measured()
        assert not bounds
        assert_allclose(values["mean_ttft"], (2.0 + 3.5 + 5.0) / 3)
        assert values["p50_ttft"] == 3.5
        assert_allclose(values["p90_ttft"], 3.5 + 0.8 * 1.5)
        assert_allclose(values["mean_tpot"], ((7.5 - 2.0) / 2 + 1.5) / 2)
        assert_allclose(values["mean_e2e"], (7.5 + 3.5 + 6.5) / 3)
        assert_allclose(values["mean_scheduling_delay"], (0.0 + 1.5 + 1.5) / 3)
        assert_allclose(values["request_throughput"], 3 / 9)
        assert values["output_throughput"] == values["effective_throughput"] == 6 / 9
        assert_allclose(values["total_token_throughput"], 20 / 9)
        assert_allclose(values["mean_kv"], 84.5 / 9)
        assert_allclose(values["kv_utilization"], 84.5 / 9 / 40)
        assert_allclose([values["mean_residents"], values["mean_waiting"]], [14.5 / 9, 3.0 / 9])
        assert values["mean_batch_size"] == 6 / 4
        assert set(values) == set(UNITS) - {"goodput"}

    def test_warmup_leaves_out_early_arrivals_and_early_finishes(self):
        """Latencies look at who arrived since, throughput at who finished since; 4.0 is not after 4."""
        values, _ = self.measured(warmup=2.25)
        assert values["mean_ttft"] == 5.0
        assert values["completed"] == 3.0
        values, _ = self.measured(warmup=4.0)
        assert math.isnan(values["mean_ttft"])
        assert values["completed"] == 2.0
        assert values["effective_throughput"] == 5 / 5
        assert values["output_throughput"] == 3 / 5

    def test_backlog_growth(self):
        """Cut at 6: three in the system at 3, two at the end."""
        values, _ = self.measured(horizon=6.0)
        assert values["backlog_growth"] == (2 - 3) / 3.0

    def test_goodput_needs_every_slo(self):
        assert self.measured(slo={"ttft": 4.0})[0]["goodput"] == 2 / 9
        assert self.measured(slo={"ttft": 4.0, "tpot": 2.0})[0]["goodput"] == 1 / 9
        assert self.measured(slo={"tpot": 2.75})[0]["goodput"] == 3 / 9

    def test_censored_requests_make_lower_bounds(self):
        """Cut at 6: the third request has waited 3.5 s for its first token; nobody knows the rest."""
        values, bounds = self.measured(horizon=6.0)
        assert_allclose(values["mean_ttft"], (2.0 + 3.5 + 3.5) / 3)
        assert_allclose(values["mean_e2e"], (6.0 + 3.5 + 3.5) / 3)
        assert_allclose(values["mean_tpot"], (6.0 - 2.0) / 2)
        assert {"mean_ttft", "mean_e2e", "mean_tpot", "p90_ttft", "p99_ttft"} <= bounds
        assert "p50_ttft" not in bounds
        assert values["unfinished"] == 2.0
        observed, at_least = latencies(
            self.PATH, run_reference(self.PATH, self.SERVER, engine_table(), horizon=6.0), 0.0, "tpot"
        )
        assert (observed.tolist(), at_least.tolist()) == ([], [2.0])

    def test_a_quantile_is_never_above_the_truth_when_marked(self):
        """Marked quantiles are at most, unmarked ones at least, those of the uncensored sample."""
        rng = np.random.default_rng(2)
        for _ in range(200):
            truth = rng.exponential(size=rng.integers(1, 30))
            limit = rng.exponential(size=len(truth)) * 2
            seen = truth <= limit
            for level in (0.5, 0.9, 0.99):
                value, marked = quantile(np.sort(truth[seen]), limit[~seen], level)
                true = float(np.quantile(truth, level))
                assert value <= true + 1e-12 if marked else value >= true - 1e-12

    def test_intervals(self):
        """Student t across replications; undefined replications are left out; one has no interval."""
        values = np.array([1.0, 2.0, 3.0, 4.0])
        estimate, low, high = interval(np.append(values, np.nan))
        assert_allclose([estimate, high - low], [2.5, 2 * 3.182446305 * values.std(ddof=1) / 2])
        assert_array_equal(interval(values[:1]), [1.0, np.nan, np.nan])
        assert_array_equal(interval(np.array([np.nan])), [np.nan] * 3)


class TestResult:
    def test_summary_is_tidy(self, runs):
        frame = runs.summary()
        assert list(frame.columns) == [
            "policy", "measure", "unit", "estimate", "low", "high", "replications", "lower_bound",
        ]  # fmt: skip
        assert len(frame) == 2 * (len(UNITS) - 1)
        assert frame["lower_bound"].dtype == bool
        rows = frame.set_index(["policy", "measure"])
        throughput = rows.loc[("vllm", "request_throughput")]
        assert throughput["low"] < throughput["estimate"] < throughput["high"]

    def test_requests(self, runs):
        frame = runs.requests("vllm", 2)
        assert list(frame.columns) == [
            "arrival_s", "prompt_tokens", "output_tokens", "type", "admitted_s", "first_token_s", "finish_s",
            "preemptions", "status",
        ]  # fmt: skip
        assert set(frame["type"]) == {"chat"}
        assert len(frame) == len(runs.paths[2])
        unlabelled = simulate(path_of((0.0, 1, 1)), server_of(), engine_table())
        assert unlabelled.requests("vllm")["type"].tolist() == ["*"]

    def test_latencies_and_occupancy(self, runs):
        for replication, path in enumerate(runs.paths):
            values, censored = runs.latencies("vllm", "ttft", replication)
            assert len(values) + censored == np.count_nonzero(path.arrival_s >= 10.0)
        series = runs.occupancy("vllm", 1)
        assert series.shape[1] == 4
        assert series.shape[0] <= 1024

    def test_file_keeps_the_measures(self, runs, tmp_path):
        runs.to_json(tmp_path / "result.json")
        back = SimulationResult.from_json(tmp_path / "result.json")
        assert back.to_json() == runs.to_json()
        assert repr(back) == repr(runs)
        assert back.server == runs.server
        for call in (
            lambda: back.requests("vllm"),
            lambda: back.latencies("vllm", "ttft"),
            lambda: back.with_slo({"ttft": 1.0}),
        ):
            with pytest.raises(InputError, match="request records"):
                call()

    @pytest.mark.parametrize(
        ("place", "value", "named"),
        [
            (["schema"], "fluidsched.simulation/9", "schema"),
            (["replications"], 5, "verdicts"),
            (["policies", 0, "verdicts", 0], "lost", r"verdicts\[0\]"),
            (["policies", 0, "measures", "mean_ttft", "values", 1], "1", r"mean_ttft.values\[1\]"),
            (["policies", 1, "measures", "mean_ttft", "lower_bounds", 0], 1, "lower_bounds"),
            (["policies", 1, "measures", "speed"], {}, "speed"),
            (["policies"], [], "policies"),
            (["warmup_s"], -1.0, "warmup_s"),
        ],
    )
    def test_a_wrong_file_is_named(self, runs, place, value, named):
        data = json.loads(runs.to_json())
        inner = data
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        with pytest.raises(InputError, match=named):
            SimulationResult.from_dict(data)

    def test_a_missing_measure_is_named(self, runs):
        data = json.loads(runs.to_json())
        del data["policies"][1]["measures"]["mean_ttft"]
        with pytest.raises(InputError, match="mean_ttft must be present"):
            SimulationResult.from_dict(data)

    def test_serve_summary(self, runs):
        row = runs.to_serve_summary()[0]
        assert row["policy"] == "vllm"
        assert_allclose(row["mean_ttft_ms"], 1e3 * runs.measures("vllm")["mean_ttft"].mean())
        assert_allclose(row["duration"], 30.0, rtol=1e-12)
        assert math.isnan(row["request_goodput"])
        assert runs.with_slo({"ttft": 9.0}).to_serve_summary()[0]["request_goodput"] > 0.0

    def test_prints(self, runs):
        text = repr(runs)
        assert text.startswith("chat over 40 s, measured from 10 s on, 4 replications, kernel engine")
        assert "throughput [req/s]" in text
        assert "sarathi" in runs._repr_html_()


class TestCompare:
    def test_differences_are_paired(self, runs):
        """Each replication's difference, not the difference of two intervals."""
        comparison = fs.compare(runs)
        row = comparison.row("sarathi", "mean_ttft")
        differences = runs.measures("sarathi")["mean_ttft"] - runs.measures("vllm")["mean_ttft"]
        assert_allclose(
            [row.difference, row.difference_low, row.difference_high], interval(differences), rtol=1e-12
        )
        assert math.isnan(comparison.row("vllm", "mean_ttft").difference)

    def test_share_of_the_bound(self, runs):
        fluid = fs.solve_fluid(CHAT, SERVER)
        comparison = fs.compare(runs, bound=fluid)
        throughput = runs.measures("vllm")["request_throughput"].mean()
        assert_allclose(comparison.row("vllm", "request_throughput").share_of_bound, throughput / 2.0)
        assert math.isnan(comparison.row("vllm", "mean_ttft").share_of_bound)
        tokens = fs.compare(runs, bound=fs.solve_fluid(CHAT, SERVER, objective="output_tokens"))
        assert_allclose(
            tokens.row("vllm", "output_throughput").share_of_bound,
            runs.measures("vllm")["output_throughput"].mean() / 16.0,
        )

    def test_baseline(self, runs):
        assert fs.compare(runs).baseline == "vllm"
        assert fs.compare(runs, baseline="sarathi").baseline == "sarathi"
        with pytest.raises(InputError, match="baseline"):
            fs.compare(runs, baseline="lottery")

    def test_file_and_text(self, runs, tmp_path):
        comparison = fs.compare(runs)
        comparison.to_json(tmp_path / "comparison.json")
        back = fs.Comparison.from_json(tmp_path / "comparison.json")
        assert repr(back) == repr(comparison)
        assert back.to_json() == comparison.to_json()
        assert comparison.to_csv(tmp_path / "comparison.csv").startswith("policy,measure,unit,estimate")
        assert "baseline vllm, differences paired by path" in repr(comparison)
        assert "E2E [s]" in repr(comparison)
        assert "sarathi" in comparison._repr_html_()
        data = json.loads(comparison.to_json())
        data["rows"][0]["estimate"] = "much"
        with pytest.raises(InputError, match=r"rows\[0\].estimate"):
            fs.Comparison.from_dict(data)

    def test_a_result_read_from_a_file_can_be_compared(self, runs):
        back = SimulationResult.from_dict(json.loads(runs.to_json()))
        assert repr(fs.compare(back)) == repr(fs.compare(runs))


@pytest.mark.data
@pytest.mark.parametrize(("name", "count"), [("conv", 19_366), ("code", 8_819)])
def test_the_azure_traces_replay_whole(data_root, name, count):
    """Every request is served, none lost, and the laws hold."""
    path = read_trace(data_root / "traces" / f"AzureLLMInferenceTrace_{name}.csv")
    server = fs.catalog.server("a100-80gb", "llama-2-7b")
    runs = simulate(path, server, fs.baselines.vllm())
    assert runs.verdict("vllm") == "finished"
    assert runs.measures("vllm")["completed"].tolist() == [count]
    from fluidsched.simulation.laws import check_laws

    check_laws(path, server, runs.run("vllm"), warmup=0.0)


def test_a_table_for_more_memory_is_remarked_on_and_runs(caplog: pytest.LogCaptureFixture) -> None:
    """The log names the table and both capacities; on the server it was compiled for nothing is said."""
    import fluidsched as fs

    times = fs.IterationTime.paper(d0=0.01, d1=1e-6)
    large, small = (fs.Server(capacity, times, name=f"of {capacity}") for capacity in (20_000, 5_000))
    workload = fs.Workload([fs.RequestType("chat", 2.0, 100, 50)])
    table = fs.compile_policy(fs.solve_fluid(workload, large), "capped")
    for server, said in ((large, ""), (small, "compiled for 20,000 tokens of KV, 'of 5000' has 5,000")):
        caplog.clear()
        with caplog.at_level("WARNING"):
            fs.simulate(workload, server, table, horizon=5.0, replications=1)
        assert said in caplog.text
        assert bool(said) == bool(caplog.text)
