"""What cannot be simulated is refused before it runs, by name; what gets stuck says where it stands.

The same list is walked on the kernel, on the reference, in pieces without records, in clusters and from the command
line.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from simulation_cases import engine_table, nested_table, path_of, server_of, typed_table
from typer.testing import CliRunner

import fluidsched as fs
from fluidsched.cli import app
from fluidsched.errors import InputError, SimulationError
from fluidsched.policy.table import Lookahead
from fluidsched.simulation import SimulationResult, simulate
from fluidsched.simulation.cluster import simulate_cluster

CHAT = fs.Workload([fs.RequestType("chat", 2.0, 20, 8)])
SERVER = server_of(400, fs.IterationTime.affine(0.05, 1e-4, 1e-3, 1e-5))
OTHER = typed_table("gated", {"other": {"threshold": 1, "period": 1}})
WAYS = ("kernel", "reference", "pieces", "cluster kernel", "cluster reference")


def run(way: str, **given: Any) -> Any:
    """One of the ways to simulate; of a path, without a horizon where the way needs none."""
    options: dict[str, Any] = {"workload": CHAT, "server": SERVER, "policies": engine_table(), **given}
    workload, server, policies = (options.pop(name) for name in ("workload", "server", "policies"))
    if isinstance(workload, fs.Workload) or way == "pieces":
        options = {"horizon": 30.0, **options}
    if isinstance(workload, fs.Workload):
        options = {"replications": 1, **options}
    if way.startswith("cluster"):
        pools = fs.Pool(server, 2, name="pool")
        router = fs.routers.join_shortest_queue()
        return simulate_cluster(workload, pools, policies, router, engine=way.split()[1], **options)
    options |= {"records": False} if way == "pieces" else {"engine": way}
    return simulate(workload, server, policies, **options)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "requests that never fit": (
        {"server": server_of(20)},
        r"request 0.* must fit alone .*20 prompt and 8 output tokens.*oversize=\"reject\"",
    ),
    "types not in the table": (
        {"policies": OTHER},
        r"request 0 must match a type of table 'gated' \(other\); got .*'chat'",
    ),
    "a NaN horizon": ({"horizon": math.nan}, r"horizon must be a finite number above 0; got nan"),
    "an infinite horizon": ({"horizon": math.inf}, r"horizon must be a finite number above 0; got inf"),
    "a NaN warm-up": ({"warmup": math.nan}, r"warmup must be a finite number of at least 0; got nan"),
    "no policies": ({"policies": None}, r"policies must be a PolicyTable, .*got None"),
    "a name for a policy": ({"policies": "vllm"}, r"policies must be a PolicyTable, .*got vllm"),
    "a clock that stands still": (
        {"server": server_of(400, fs.IterationTime.affine(1e-18, 0.0, 0.0, 0.0))},
        r"horizon must be a time, s, that is known to 0.001 of an iteration: .*steps of 3.55e-15 s.* lasts 1e-18 s",
    ),
    "a fraction of a replication": (
        {"replications": 1.5},
        r"replications must be a whole number of at least 1; got 1.5",
    ),
    "predictions an order needs": (
        {"policies": engine_table(order="shortest_first")},
        r"predicted_output_tokens must be given|records must be True",
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_named_with_the_way_out(way, case):
    """The argument, what it was, what is required; never a bare Python error, never a run."""
    changes, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        run(way, **changes)


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"arrival_s": [0.0, math.nan]}, r"arrival_s\[1\] must be finite"),
        ({"prompt_tokens": [1, math.nan]}, r"prompt_tokens\[1\] must be a whole number"),
        ({"output_tokens": [1, 2**31]}, r"output_tokens\[1\] must be a whole number in 1..2,147,483,647"),
        ({"predicted_output_tokens": [1, math.nan]}, r"predicted_output_tokens\[1\]"),
        ({"patience_s": [math.nan, 1.0]}, r"patience_s\[0\]"),
        ({"type": [0, 1], "type_names": ("a",)}, r"type\[1\] must index one of the 1 type_names"),
    ],
)
def test_paths_with_nan_or_too_much_are_refused_at_the_first_offender(columns, named):
    given = {"arrival_s": [0.0, 1.0], "prompt_tokens": [1, 1], "output_tokens": [1, 1], **columns}
    with pytest.raises(InputError, match=named):
        fs.ArrivalPath.from_arrays(**given)


def test_late_times_are_refused_where_the_clock_cannot_tell_iterations_apart():
    """Not times of today in seconds since 1970: they are known to a microsecond."""
    late = path_of((1e17, 4, 2), (1e17, 4, 2))
    with pytest.raises(
        InputError, match=r"arrival_s\[1\] must be a time, s, that is known to .*steps of 16 s"
    ):
        simulate(late, server_of(), engine_table())
    today = path_of((1.7e9, 4, 2), (1.7e9, 4, 2))
    assert simulate(today, server_of(), engine_table()).run("vllm").finish_s.tolist() == [1.7e9 + 2] * 2


def test_an_iteration_time_that_is_no_time_is_shown_with_its_batch():
    def time(batch: Any) -> float:
        return 1.0 if batch.decode_tokens == 0 else math.nan

    server = server_of(time=fs.IterationTime.function(time))
    with pytest.raises(SimulationError, match=r"returned nan s for BatchSummary\(.*decode_tokens=1"):
        simulate(path_of((0.0, 4, 3)), server, engine_table(), engine="reference")


@pytest.mark.parametrize("way", WAYS)
def test_nobody_to_serve_is_an_answer(way):
    """No request, or none that fits: nothing is served, latencies are undefined, the print says who was rejected."""
    oversize, empty = path_of((0.0, 900, 1), (1.0, 900, 1)), fs.ArrivalPath.from_arrays([], [], [])
    for path, rejected in ((oversize, 2.0), (empty, 0.0)):
        found = run(way, workload=path, oversize="reject", warmup=0.0)
        name = found.policies[0]
        measures = found.measures(name)
        assert (measures["rejected"][0], measures["completed"][0]) == (rejected, 0.0)
        assert math.isnan(measures["mean_ttft"][0])
        assert ("rejected" in repr(found)) == (rejected > 0.0)


class TestDeadlock:
    """A stuck run names who waits for what, and what is held, in print and in files."""

    PATH = path_of((0.0, 4, 2, "a"), (0.0, 16, 2, "a"), (1.0, 3, 2, "b"))

    @pytest.mark.parametrize("way", ["kernel", "reference"])
    def test_wait_below_its_gate(self, way):
        """Of b one iteration is done; its decode and both of a wait for company that never comes."""
        rows = {"a": {"threshold": 3, "gate": 3}, "b": {"threshold": 1, "gate": 1}}
        runs = run(way, workload=self.PATH, server=server_of(200), policies=typed_table("wait", rows))
        state = "at 2 s: a has 2 waiting, gate 3; b has 1 admitted before, gate 1; 3 of 200 KV tokens held"
        assert runs.outcome("wait").deadlock == state
        assert f"wait is stuck {state}" in repr(runs).splitlines()
        back = SimulationResult.from_dict(json.loads(runs.to_json()))
        assert repr(back) == repr(runs)

    @pytest.mark.parametrize("way", ["cluster kernel", "cluster reference"])
    def test_a_cluster_is_stuck_where_a_replica_is(self, way):
        """One request goes to each replica, both below their gates of 2."""
        row = fs.policy.TableType("*", threshold=2, gate=2)
        table = fs.PolicyTable("wait", "wait", (row,), freeze=True, block_iterations=1)
        runs = run(way, workload=path_of((0.0, 4, 2), (0.0, 4, 2)), policies=table)
        assert runs.whole.outcomes[0].deadlock == "at 0 s: * has 2 waiting, gate 2; 0 of 800 KV tokens held"

    def test_a_gated_row_that_admits_nobody(self):
        rows = {"a": {"threshold": 0, "gate": 0, "period": 1}, "b": {"threshold": 1, "gate": 0, "period": 1}}
        runs = run("kernel", workload=self.PATH, server=server_of(200), policies=typed_table("gated", rows))
        assert (
            runs.outcome("gated").deadlock == "at 3 s: a has 2 waiting, threshold 0; 0 of 200 KV tokens held"
        )

    def test_segments_of_nested_wait(self):
        table = nested_table([(0, 2), (1, 1)])
        runs = run("kernel", workload=path_of((0.0, 4, 2)), policies=table)
        assert (
            "* has 1 waiting, segments of 2, 1; 0 of 400 KV tokens held"
            in runs.outcome("nested-wait").deadlock
        )


@pytest.mark.parametrize(
    "table",
    [
        engine_table(token_budget=None),
        engine_table("sarathi", token_budget=10**6),
        engine_table("vllm_v0"),
        engine_table(lookahead=Lookahead("known", 0.0), predictor="exact"),
    ],
    ids=lambda table: f"{table.kind} {table.lookahead.mode}",
)
def test_counters_do_not_overflow(table):
    """300 requests of 2^31 - 1 prompt and output tokens: batches of 6·10^11 tokens, integrals of 10^21, exactly known.

    In its last iterations all run at one token a second, so the KV held at time t is n (p + t - 1) less what prompts
    still lacked in the beginning.
    """
    n, longest = 300, 2**31 - 1
    path = fs.ArrivalPath.from_arrays(np.zeros(n), np.full(n, longest), np.full(n, longest))
    begun = n * longest / 1e6 + n if table.token_budget else 1.0  # chunks of a million tokens, one per second
    found = simulate(path, server_of(), table, horizon=1e9, warmup=5e8).run(table.kind)
    held = n * (longest * 5e8 + (1e9**2 - 5e8**2) / 2)
    assert_allclose(found.kv_token_s, held, rtol=3 * begun / 1e9 + 1e-8)
    assert found.peak_kv <= n * (longest + 10**9)
    assert found.batch_token_sum == found.kv_end
    assert found.kv_end > n * longest


class TestMemory:
    """What would not fit is refused before it is allocated, with what it takes and the way out."""

    def test_records(self):
        with pytest.raises(
            InputError, match=r"records take about [\d,.]+ GiB, .* are free; got 2e\+13 requests"
        ):
            run("kernel", horizon=1e13)

    def test_clusters(self):
        def cluster(pool: fs.Pool, router: Any, horizon: float) -> Any:
            return simulate_cluster(CHAT, pool, engine_table(), router, horizon=horizon)

        with pytest.raises(InputError, match=r"1,000,000,000 replicas.*Use fewer replicas"):
            cluster(fs.Pool(SERVER, 10**9, name="pool"), fs.routers.round_robin(), 30.0)
        with pytest.raises(InputError, match="fit into memory"):
            cluster(fs.Pool(server_of(), 10**6, name="pool"), fs.routers.join_shortest_queue(), 1e5)


class TestCommandLine:
    """Exit status 2 and one sentence on standard error, for the same mistakes."""

    @pytest.fixture
    def trace(self, tmp_path):
        path = tmp_path / "trace.csv"
        path.write_text("arrival_s,prompt_tokens,output_tokens\n0.0,4,2\n1.0,999999,2\n")
        return str(path)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--horizon", "nan"], "horizon must be a finite number above 0; got nan"),
            (["--horizon", "1e30"], "horizon must"),
            (["--warmup", "nan"], "warmup must be a finite number"),
            (["--replications", "0"], "replications must be a whole number of at least 1"),
            (["--load", "nan"], "load"),
        ],
    )
    def test_numbers(self, options, message):
        done = CliRunner().invoke(app, ["simulate", "vllm", *options])
        assert done.exit_code == 2
        assert message in " ".join(done.stderr.split())

    def test_a_replay_says_what_it_rejected(self, trace):
        done = CliRunner().invoke(app, ["simulate", "vllm", "--workload", trace, "--replay"])
        assert done.exit_code == 0
        assert "rejected" in done.stdout

    @pytest.mark.parametrize(
        "other",
        [["--engine", "reference"], ["--records", "out"], ["--warmup", "mser5"], ["--replay"]],
    )
    def test_no_records_refuses_what_looks_at_requests(self, other):
        done = CliRunner().invoke(app, ["simulate", "vllm", "--no-records", *other])
        assert done.exit_code == 2
        assert "records" in done.stderr

    def test_no_records_has_the_rates_of_a_run_with_them(self):
        """The same paths: throughput equal, the p99 within 0.8 %."""
        command = ["simulate", "vllm", "--horizon", "120", "--replications", "1", "--load", "0.5", "--json"]
        measures = []
        for more in ([], ["--no-records", "--check"]):
            done = CliRunner().invoke(app, [*command, *more])
            assert done.exit_code == 0
            measures.append(json.loads(done.stdout)["policies"][0]["measures"])
        kept, counted = measures
        assert counted["request_throughput"] == kept["request_throughput"]
        assert_allclose(counted["p99_ttft"]["values"], kept["p99_ttft"]["values"], rtol=0.008)
