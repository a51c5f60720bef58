"""The command line: what each command answers, where it writes, and how it fails.

Exit statuses: 0 an answer, 1 no answer, 2 wrong input, 3 failure, 130 interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

LONG = "arrival_s,prompt_tokens,output_tokens\n0.0,10,5\n1.0,900000,5\n2.0,10,6\n3.0,11,7\n"
QUICK = ["--replications", "2", "--horizon", "120", "--warmup", "20", "--no-curve"]
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def fluidsched(*arguments: str, cwd: Path, timeout: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, in `cwd`."""
    return subprocess.run(
        [sys.executable, "-m", "fluidsched", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "120"},
        check=False,
    )


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A plain trace of 200 requests, one every half second on average."""
    rng = np.random.default_rng(1)
    arrivals = np.cumsum(rng.exponential(0.5, 200))
    prompts = rng.integers(20, 400, 200)
    outputs = rng.integers(1, 120, 200)
    rows = [f"{a:.6f},{p},{o}" for a, p, o in zip(arrivals, prompts, outputs, strict=True)]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens", *rows]) + "\n")
    return path


class TestPlan:
    def test_writes_every_file_and_a_manifest_that_names_them(self, tmp_path: Path) -> None:
        """Every promised file is there, the pictures are pictures, and the manifest's digests hold."""
        done = fluidsched("plan", *QUICK, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        directory = tmp_path / "fluidsched-plan-1"
        manifest = json.loads((directory / "manifest.json").read_text())
        assert manifest["schema"] == "fluidsched.manifest/1"
        expected = {"policy.json", "summary.json", "comparison.csv", "kv_occupancy.png", "latency.png"}
        expected.add("report.html")
        assert expected <= set(manifest["files"])
        on_disk = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
        assert on_disk == {*manifest["files"], "manifest.json"}
        for name, entry in manifest["files"].items():
            data = (directory / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == entry["sha256"]
            assert len(data) == entry["bytes"]
            if name.endswith(".json"):
                assert entry["schema"] == json.loads(data)["schema"]
            if name.endswith(".png"):
                assert data.startswith(PNG_MAGIC)
        summary = json.loads((directory / "summary.json").read_text())
        assert summary["stable"] is True
        recommended = json.loads((directory / "policy.json").read_text())
        assert recommended == json.loads(
            (directory / "policies" / f"{summary['recommended']}.json").read_text()
        )
        assert str(directory.name) in done.stderr

    def test_output_names_what_the_reader_asked_for(self, tmp_path: Path) -> None:
        """Standard output holds the answer alone: load, critical rate, the policies, the trace's own rate."""
        done = fluidsched("plan", *QUICK, cwd=tmp_path)
        for words in ("critical rate", "vllm", "sarathi", "capped", "5.53"):
            assert words in done.stdout, words

    def test_json_on_stdout_is_json_alone(self, tmp_path: Path) -> None:
        """`--json` prints one JSON document and nothing else, whatever the solver says on start-up."""
        done = fluidsched("plan", *QUICK, "--json", "--quiet", cwd=tmp_path)
        assert json.loads(done.stdout)["schema"] == "fluidsched.plan/1"
        assert done.stderr == ""

    def test_second_run_takes_the_next_free_directory(self, tmp_path: Path) -> None:
        """Without --out an earlier run's files are never touched."""
        (tmp_path / "fluidsched-plan-1").mkdir()
        assert fluidsched("plan", *QUICK, cwd=tmp_path).returncode == 0
        assert (tmp_path / "fluidsched-plan-2" / "manifest.json").exists()
        assert not list((tmp_path / "fluidsched-plan-1").iterdir())

    def test_same_seed_same_bytes(self, tmp_path: Path) -> None:
        """Two runs with one seed write byte-equal tables and results."""
        for name in ("a", "b"):
            assert fluidsched("plan", *QUICK, "--seed", "3", "--out", name, cwd=tmp_path).returncode == 0
        first = json.loads((tmp_path / "a" / "manifest.json").read_text())
        second = json.loads((tmp_path / "b" / "manifest.json").read_text())
        assert first == second

    def test_trace_keeps_its_own_rate(self, tmp_path: Path, trace: Path) -> None:
        """A trace is planned for at its own rate unless --load is given."""
        done = fluidsched("plan", "--workload", str(trace), *QUICK, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        arrivals = np.loadtxt(trace, delimiter=",", skiprows=1)[:, 0]
        assert summary["offered_rate"] == pytest.approx(200 / (arrivals[-1] - arrivals[0]), rel=1e-9)

    def test_replay_serves_every_request_of_the_trace(self, tmp_path: Path, trace: Path) -> None:
        """A replay runs until empty: vLLM's rule finishes all 200 requests."""
        done = fluidsched(
            *("plan", "--workload", str(trace), "--replay", "--no-curve", "--json", "--out", "r"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        rows = {row["policy"]: row for row in json.loads(done.stdout)["policies"]}
        assert rows["vllm"]["completed"] == 200

    def test_overload_is_an_answer(self, tmp_path: Path) -> None:
        """At 1.3 of the boundary: status 0, stable false, by how much, and whom the optimum refuses."""
        done = fluidsched("plan", "--load", "1.3", *QUICK, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        summary = json.loads(done.stdout)
        assert summary["stable"] is False
        assert max(summary["load"].values()) == pytest.approx(1.3, rel=1e-9)
        answer = " ".join(summary["remarks"])
        assert "1.3" in answer
        assert "refuse" in answer
        assert summary["recommended"] == (summary["admission"] or {"table": summary["recommended"]})["table"]


class TestFailsWell:
    """Wrong input: exit status 2, a sentence naming argument, value and way out, nothing left behind."""

    def check(self, done: subprocess.CompletedProcess[str], *words: str, status: int = 2) -> None:
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        for word in words:
            assert word in done.stderr, done.stderr

    def test_missing_file(self, tmp_path: Path) -> None:
        self.check(
            fluidsched("plan", "-w", "nowhere.csv", cwd=tmp_path), "--workload", "nowhere.csv", "azure_conv"
        )
        assert not list(tmp_path.iterdir())

    def test_misspelt_workload_suggests_the_nearest(self, tmp_path: Path) -> None:
        self.check(fluidsched("plan", "-w", "azure_cnov", cwd=tmp_path), "Did you mean azure_conv")

    def test_empty_trace(self, tmp_path: Path) -> None:
        (tmp_path / "empty.csv").write_text("")
        self.check(fluidsched("plan", "-w", "empty.csv", cwd=tmp_path), "empty.csv")

    def test_bad_line_is_named_by_number(self, tmp_path: Path) -> None:
        (tmp_path / "bad.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0.0,10,5\n1.0,ten,5\n")
        self.check(fluidsched("plan", "-w", "bad.csv", cwd=tmp_path), "line 3")

    def test_request_longer_than_the_capacity(self, tmp_path: Path) -> None:
        """Named by its place in the trace by `plan`, by its type where it was sampled."""
        (tmp_path / "long.csv").write_text(LONG)
        self.check(
            fluidsched("plan", "-w", "long.csv", cwd=tmp_path), "request 2 of 'long'", "900,000", "replay"
        )
        assert [p.name for p in tmp_path.iterdir()] == ["long.csv"]
        self.check(
            fluidsched("simulate", "vllm", "-w", "long.csv", "--quiet", cwd=tmp_path),
            *("of type", "900,000", "KV tokens"),
        )

    def test_nan_rate_in_a_spec(self, tmp_path: Path) -> None:
        (tmp_path / "spec.toml").write_text(
            'schema = "fluidsched.workload/1"\n[[types]]\nname = "a"\narrival_rate = nan\n'
            "prompt_tokens = 10\noutput_tokens = 5\n"
        )
        self.check(fluidsched("solve", "-w", "spec.toml", cwd=tmp_path), "arrival_rate", "nan")

    def test_unknown_gpu_suggests_the_nearest(self, tmp_path: Path) -> None:
        self.check(fluidsched("plan", "--gpu", "a1000", cwd=tmp_path), "gpu", "a100")
        assert not list(tmp_path.iterdir())

    def test_a_file_of_another_kind_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "table.json").write_text('{"schema": "fluidsched.policy/1"}')
        self.check(fluidsched("compile", "table.json", cwd=tmp_path), "table.json", "schema")

    def test_a_model_the_catalog_lacks_on_this_gpu(self, tmp_path: Path) -> None:
        done = fluidsched("catalog", "--gpu", "a40", "--model", "qwen2.5-7b", cwd=tmp_path)
        self.check(done, "--model", "qwen2.5-7b", "a40")

    def test_output_directory_in_use(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("keep")
        self.check(fluidsched("plan", *QUICK, "--out", "mine", cwd=tmp_path), "mine", "--force")
        assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]

    def test_force_writes_beside_what_is_there(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("keep")
        assert fluidsched("plan", *QUICK, "--out", "mine", "--force", cwd=tmp_path).returncode == 0
        assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
        assert (tmp_path / "mine" / "manifest.json").exists()

    def test_load_with_replay(self, tmp_path: Path, trace: Path) -> None:
        self.check(
            fluidsched("plan", "-w", str(trace), "--replay", "--load", "0.5", cwd=tmp_path), "load", "replay"
        )

    def test_tables_that_do_not_fit_path_or_server(self, tmp_path: Path) -> None:
        """A table for other types than the path's, and a cohort above the server's token budget."""
        spec = (
            'schema = "fluidsched.workload/1"\n[[types]]\nname = "%s"\narrival_rate = 1.0\n'
            "prompt_tokens = 100\noutput_tokens = 5\n"
        )
        for name in ("chat", "code"):
            (tmp_path / f"{name}.toml").write_text(spec % name)
        done = fluidsched("solve", "-w", "chat.toml", "--out", "s.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        done = fluidsched("compile", "s.json", "--kind", "wait", "--out", "wait.json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        short = ("--horizon", "10", "--replications", "1")
        self.check(
            fluidsched("simulate", "wait.json", "-w", "code.toml", *short, cwd=tmp_path), "chat", "code"
        )
        server = json.loads((tmp_path / "s.json").read_text())["server"]
        (tmp_path / "server.json").write_text(json.dumps({**server, "token_budget": 64}))
        self.check(
            fluidsched(
                *("simulate", "wait.json", "-w", "chat.toml", "--server", "server.json", *short), cwd=tmp_path
            ),
            *("token_budget", "64", "cohort"),
        )

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--workload", "azure_code"), ("--load", "0.5"), ("--gpu", "h200"), ("--model", "phi-2"), ("--tp", "2"),
         ("--server", "server.toml"), ("--replay", None)],
    )  # fmt: skip
    def test_a_solution_brings_its_own_workload_and_server(
        self, tmp_path: Path, option: str, value: str | None
    ) -> None:
        """An option that would have no effect beside --solution is refused, not ignored."""
        given = (option,) if value is None else (option, value)
        self.check(
            fluidsched("simulate", "vllm", "--solution", "s.json", *given, cwd=tmp_path), option, "solution"
        )

    def test_simulated_replay_takes_a_trace_and_no_load(self, tmp_path: Path, trace: Path) -> None:
        self.check(fluidsched("simulate", "vllm", "--replay", cwd=tmp_path), "--replay", "--workload")
        self.check(
            fluidsched("simulate", "vllm", "-w", str(trace), "--replay", "--load", "0.5", cwd=tmp_path),
            *("--load", "0.5", "--replay"),
        )

    @pytest.mark.parametrize(
        ("given", "named"),
        [
            (("inf",), ("--prefix-cache-tokens", "--replay")),
            (("much", "--replay"), ("--prefix-cache-tokens", "much", "shared")),
            (("inf", "--replay"), ("--prefix-cache-tokens", "does not name the blocks")),
        ],
    )
    def test_a_prefix_cache_needs_a_replayed_trace_with_blocks(
        self, tmp_path: Path, trace: Path, given: tuple[str, ...], named: tuple[str, ...]
    ) -> None:
        done = fluidsched("simulate", "vllm", "-w", str(trace), "--prefix-cache-tokens", *given, cwd=tmp_path)
        self.check(done, *named)

    @pytest.mark.parametrize("command", [("plan", "--no-curve"), ("simulate", "vllm")])
    def test_sampling_options_with_replay(
        self, tmp_path: Path, trace: Path, command: tuple[str, ...]
    ) -> None:
        """What a replay would ignore is refused."""
        done = fluidsched(*command, "-w", str(trace), "--replay", "--horizon", "60", cwd=tmp_path)
        self.check(done, "--horizon", "--replay")

    def test_replay_without_a_trace(self, tmp_path: Path) -> None:
        self.check(fluidsched("plan", "--replay", cwd=tmp_path), "replay")

    @pytest.mark.parametrize(
        ("option", "value"),
        [("--replications", "0"), ("--horizon", "0"), ("--horizon", "nan"), ("--warmup", "-1")],
    )
    def test_numbers_out_of_range(self, tmp_path: Path, option: str, value: str) -> None:
        self.check(fluidsched("plan", option, value, cwd=tmp_path), option.strip("-"))
        assert not list(tmp_path.iterdir())

    def test_unknown_option_is_an_input_error(self, tmp_path: Path) -> None:
        done = fluidsched("plan", "--lood", "0.5", cwd=tmp_path)
        assert done.returncode == 2
        assert "--lood" in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "option"),
        [
            (("plan", "--gpu", "a10"), "--gpu"),
            (("plan", "--tp", "3"), "--tp"),
            (("plan", "--replay"), "--replay"),
            (("solve", "--objective", "money"), "--objective"),
            (("simulate", "vllm", "--engine", "fast"), "--engine"),
            (("simulate", "vllm", "--warmup", "1e9"), "--warmup"),
            (("compare", "RESULT", "--bound", "no.json"), "--bound"),
            (("compare", "RESULT", "--table", "no.json"), "--table"),
            (("capacity", "--cost", "a10=1"), "--cost a10=1: gpu"),
            (("capacity", "--cost", "a100=1", "--itl-target", "-1"), "--itl-target"),
            (("capacity", "--cost", "a100=1", "--verify", "--ttft-p99", "-1"), "--ttft-p99"),
            (("sweep", "no.toml", "--out", "s"), "spec"),
            (("tune", "goodput"), "--slo"),
            (("tune", "mean_ttft", "--knob", "speed=1:2"), "--knob"),
            (("tune", "mean_ttft", "--knob", "gate=0:1"), "--knob gate"),
            (("tune", "mean_ttft", "--knob", "boundary=0.5:2"), "--knob boundary"),
            (("tune", "mean_ttft", "--knob", "watermark=0.2:0.1"), "--knob watermark"),
            (("tune", "mean_ttft", "--workers", "0"), "--workers"),
            (("calibrate", "POINTS", "--kv-capacity", "9", "--form", "cubic"), "--form"),
            (("catalog", "--model", "gpt-9"), "--model"),
        ],
    )
    def test_the_sentence_names_the_option(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], option: str
    ) -> None:
        """What the library calls by its argument, the command line calls by the option as it is typed."""
        import fluidsched as fs
        from fluidsched.cli import app

        server = fs.Server(1000, fs.IterationTime.paper(0.01, 1e-7))
        workload = fs.Workload([fs.RequestType("a", 1.0, 10, 5)])
        vllm = fs.baselines.vllm()
        result = fs.simulate(workload, server, [vllm], horizon=5.0, replications=1, engine="reference")
        places = {"RESULT": tmp_path / "result.json", "POINTS": tmp_path / "points.csv"}
        places["RESULT"].write_text(json.dumps(result.to_dict()))
        places["POINTS"].write_text("n_tok,batch_decode,kv_tok,pre_attn,t_s\n1,1,10,0,0.01\n")
        with pytest.raises(SystemExit) as left:
            app([str(places.get(word, word)) for word in arguments])
        assert left.value.code == 2
        assert capsys.readouterr().err.startswith(f"fluidsched: {option} ")

    def test_two_tables_of_one_name(self, tmp_path: Path) -> None:
        """Refused with the way out, which works."""
        assert fluidsched("solve", "--out", "s.json", cwd=tmp_path).returncode == 0
        for file, name in (("a.json", ()), ("b.json", ()), ("c.json", ("--name", "other"))):
            done = fluidsched("compile", "s.json", *name, "--out", file, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
        short = ("--solution", "s.json", "--horizon", "5", "--replications", "1")
        self.check(
            fluidsched("simulate", "a.json", "b.json", *short, cwd=tmp_path), "capped", "compile --name"
        )
        done = fluidsched("simulate", "a.json", "c.json", *short, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert re.search("^other ", done.stdout, flags=re.MULTILINE)

    def test_tune_looks_at_its_files_before_the_search(self, tmp_path: Path) -> None:
        """A search of minutes does not end in "the file exists"."""
        (tmp_path / "best.json").write_text("{}")
        done = fluidsched("tune", "mean_ttft", "--out", "best.json", cwd=tmp_path, timeout=30.0)
        self.check(done, "--out", "best.json", "--force")

    def test_interrupt_while_the_command_line_loads(self, tmp_path: Path) -> None:
        """Ctrl-C during an import: 130 and a sentence. The module that stands in for typer presses it."""
        (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
        self.check(fluidsched("--help", cwd=tmp_path), "interrupted", status=130)

    def test_interrupt_leaves_whole_files_and_status_130(self, tmp_path: Path) -> None:
        """Ctrl-C in the middle of the simulation: 130, no traceback, nothing half-written."""
        process = subprocess.Popen(
            [sys.executable, "-m", "fluidsched", "plan", "--replications", "2000", "--out", "run"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
        )
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "run").exists() and time.monotonic() < deadline:
                time.sleep(0.05)  # wait for the run to start, then a little into the simulation
            time.sleep(3.0)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 130, errors
        assert "interrupted" in errors
        assert "Traceback" not in errors
        left = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert not left, left


class TestChain:
    def test_the_chain_one_step_at_a_time(self, tmp_path: Path) -> None:
        """solve → compile → simulate → compare through files gives what the library gives in one process."""
        import fluidsched as fs

        assert fluidsched("solve", "--load", "0.7", "--out", "solution.json", cwd=tmp_path).returncode == 0
        done = fluidsched(
            "compile", "solution.json", "--kind", "capped", "--out", "capped.json", cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        done = fluidsched(
            *("simulate", "capped.json", "vllm", "--solution", "solution.json", "--out", "result.json"),
            *("--horizon", "120", "--warmup", "20", "--replications", "3", "--seed", "5", "--quiet"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        done = fluidsched(
            *("compare", "result.json", "--bound", "solution.json", "--baseline", "vllm", "--json"),
            *("--table", "capped.json", "--table", "vllm"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr

        server = fs.catalog.server("a100-80gb", "llama-2-7b")
        workload = fs.workloads.azure_conv().at_load(0.7, server)
        fluid = fs.solve_fluid(workload, server)
        tables = [fs.compile_policy(fluid, "capped"), fs.baselines.vllm()]
        runs = fs.simulate(workload, server, tables, horizon=120.0, warmup=20.0, replications=3, seed=5)
        from_file = fs.SimulationResult.from_dict(runs.to_dict())  # without the records of the requests
        comparison = fs.compare(from_file, bound=fluid, baseline="vllm", tables=tables)
        assert json.loads(done.stdout) == json.loads(json.dumps(comparison.to_dict()))
        assert {row.verdict for row in comparison.bounds} == {"respects", "not applicable"}

    def test_a_compiled_table_goes_through_csv(self, tmp_path: Path) -> None:
        """`compile --out x.csv` writes the CSV form, which `simulate` reads to the same result as JSON."""
        assert fluidsched("solve", "--load", "0.7", "--out", "s.json", cwd=tmp_path).returncode == 0
        answers = []
        for name in ("gated.csv", "gated.json"):
            done = fluidsched("compile", "s.json", "--kind", "gated", "--out", name, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            done = fluidsched(
                *("simulate", name, "--solution", "s.json", "--horizon", "60", "--warmup", "10"),
                *("--replications", "1", "--json"),
                cwd=tmp_path,
            )
            assert done.returncode == 0, done.stderr
            answers.append(json.loads(done.stdout)["policies"])
        assert answers[0] == answers[1]

    def test_a_stuck_replay_is_an_answer_that_names_who_starves(self, tmp_path: Path) -> None:
        (tmp_path / "three.csv").write_text(
            "arrival_s,prompt_tokens,output_tokens\n0.0,10,5\n1.0,10,5\n2.0,10,5\n"
        )
        import fluidsched as fs
        from fluidsched.policy.table import Match, TableType

        table = fs.PolicyTable(
            *("pairs", "wait", (TableType("short", Match(), threshold=2, gate=2),)),
            freeze=True,
            block_iterations=1,
        )
        table.to_json(tmp_path / "pairs.json")
        done = fluidsched("simulate", "pairs.json", "-w", "three.csv", "--replay", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "stuck (short)" in done.stdout

    def test_a_replayed_trace_finds_its_blocks(self, tmp_path: Path) -> None:
        """Of two equal prompts of two blocks the second finds none, one, or both, in a store or in free memory."""
        row = '{"timestamp": %d, "input_length": 1028, "output_length": 1, "hash_ids": [7, 8, 9]}\n'
        (tmp_path / "pair.jsonl").write_text("".join(row % (1000 * i) for i in range(2)))
        command = ("simulate", "vllm", "-w", "pair.jsonl", "--replay", "--json")
        ttft = []
        for given in ((), ("512",), ("inf",), ("shared", "--engine", "reference")):
            cache = ("--prefix-cache-tokens", *given) if given else ()
            done = fluidsched(*command, *cache, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            ttft.append(json.loads(done.stdout)["policies"][0]["measures"]["mean_ttft"]["values"][0])
        assert ttft[0] > ttft[1] > ttft[2] == ttft[3]

    def test_compile_without_an_answer_is_status_1(self, tmp_path: Path) -> None:
        """An overloaded server carries no stable cap: status 1 with the reason."""
        assert fluidsched("solve", "--load", "1.2", "--out", "s.json", cwd=tmp_path).returncode == 0
        done = fluidsched("compile", "s.json", "--kind", "wait", cwd=tmp_path)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        inside = ("compile", "s.json", "--kind", "wait", "--json", "--admitted-share")
        done = fluidsched(*inside, "auto", cwd=tmp_path)
        assert 0.8 < json.loads(done.stdout)["certificate"]["admitted_share"]["value"] < 1.0
        assert fluidsched(*inside, "most", cwd=tmp_path).returncode == 2

    def test_catalog_lists_and_filters(self, tmp_path: Path) -> None:
        everything = json.loads(fluidsched("catalog", "--json", cwd=tmp_path).stdout)
        assert len(everything) == 153
        some = json.loads(fluidsched("catalog", "--gpu", "h200", "--json", cwd=tmp_path).stdout)
        assert 0 < len(some) < 153
        assert {entry["gpu"] for entry in some} == {"h200"}


class TestHelp:
    """What a new user reads first."""

    def test_every_command_shows_examples_with_options_it_has_and_answers_json_quietly(self) -> None:
        """An option in an example is an option of that command; --json and --quiet are everywhere."""
        import typer.main

        from fluidsched.cli import COMMANDS, app

        group = typer.main.get_group(app)
        for name in COMMANDS:
            command = group.get_command(None, name)  # type: ignore[arg-type]  # the context is not used
            assert command is not None
            known = {word for parameter in command.params for word in parameter.opts}
            assert {"--json", "--quiet"} <= known, name
            examples = re.findall(rf"^fluidsched {name} (.+)$", command.help or "", flags=re.MULTILINE)
            assert examples, name
            for example in examples:
                assert set(re.findall(r"--[a-z0-9-]+", example)) <= known, example

    def test_the_sweep_its_help_shows_runs(self, tmp_path: Path) -> None:
        """Every cell of the spec in the help is carried out, as it stands."""
        from fluidsched.cli import COMMANDS

        lines = re.findall(
            r"^ *((?:base|grid)\S* = .+)$", COMMANDS["sweep"].__doc__ or "", flags=re.MULTILINE
        )
        assert len(lines) == 4
        assert max(map(len, lines)) < 79  # not wrapped: to be copied
        (tmp_path / "loads.toml").write_text("\n".join(lines))
        done = fluidsched("sweep", "loads.toml", "--out", "loads", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["cells"] == 4
        assert json.loads(done.stdout)["failed"] == 0

    def test_no_colour_where_there_is_no_terminal(self, tmp_path: Path) -> None:
        for arguments in (("--help",), ("plan", "--help"), ("plan", "--lood", "1")):
            done = fluidsched(*arguments, cwd=tmp_path)
            assert "\x1b" not in done.stdout + done.stderr


class TestSpecs:
    """What the documentation shows as files of one's own."""

    def test_the_documented_specs_are_read(self, tmp_path: Path) -> None:
        pages = Path(__file__).parents[2] / "docs" / "howto"
        text = "".join(
            (pages / name).read_text(encoding="utf-8") for name in ("own_traffic.md", "own_server.md")
        )
        mix, server = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
        (tmp_path / "mix.toml").write_text(mix)
        (tmp_path / "mine.toml").write_text(server)
        done = fluidsched("solve", "-w", "mix.toml", "--server", "mine.toml", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert [member["name"] for member in found["workload"]["types"]] == ["chat", "classify"]
        assert found["server"]["name"] == "mine"
        assert found["server"]["kv_capacity"] == 100_000

    @pytest.mark.parametrize(
        ("text", "named"),
        [
            ("kv_capacity = 1000", "iteration_time"),
            ("kv_capacity = 1000\niteration_time = 3", "iteration_time"),
            ("kv_capacty = 1000", "kv_capac"),
        ],
    )
    def test_a_wrong_server_spec_names_the_field(self, tmp_path: Path, text: str, named: str) -> None:
        (tmp_path / "mine.toml").write_text(text)
        done = fluidsched("solve", "--server", "mine.toml", cwd=tmp_path)
        assert done.returncode == 2
        assert named in done.stderr
        assert "Traceback" not in done.stderr


def test_help_names_every_embedded_workload(tmp_path: Path) -> None:
    from fluidsched import workloads

    text = fluidsched("solve", "--help", cwd=tmp_path).stdout
    assert all(name in text for name in workloads.names())


def test_compile_bears_errors_of_rates_and_leaves_memory_free(tmp_path: Path) -> None:
    """The same table as Python's, with fewer in service for the memory and a price for the errors."""
    import fluidsched as fs

    assert fluidsched("solve", "--load", "0.7", "--out", "s.json", cwd=tmp_path).returncode == 0
    options = ("--kv-reserve", "20000", "--rate-error", "0.1", "--error-budget", "1")
    done = fluidsched("compile", "s.json", *options, "--json", cwd=tmp_path)
    server = fs.catalog.server("a100-80gb", "llama-2-7b", tensor_parallel=1)
    fluid = fs.solve_fluid(fs.workloads.azure_conv().at_load(0.7, server), server)
    table = fs.compile_policy(fluid, "capped", kv_reserve=20_000, rate_error=0.1, error_budget=1)
    assert done.stdout.strip() == table.to_json().strip()
    assert (table.max_in_service or 0) < (fs.compile_policy(fluid, "capped").max_in_service or 0)
    done = fluidsched("compile", "s.json", "--error-budget", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert "--error-budget must come with" in done.stderr


def test_compile_merges_types(tmp_path: Path) -> None:
    """The table that `plan` keeps can be made step by step."""
    assert fluidsched("solve", "--out", "solution.json", cwd=tmp_path).returncode == 0
    done = fluidsched("compile", "solution.json", "--kind", "wait", "--types", "1", "--json", cwd=tmp_path)
    assert len(json.loads(done.stdout)["types"]) == 1


def test_a_load_that_is_none_is_named(tmp_path: Path) -> None:
    done = fluidsched("solve", "--load", "-1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--load" in done.stderr


def test_output_that_cannot_be_encoded_is_no_traceback(tmp_path: Path) -> None:
    """As on a terminal or in a pipe whose encoding lacks ± and ≥."""
    done = subprocess.run(
        [sys.executable, "-m", "fluidsched", "plan", *QUICK],
        cwd=tmp_path,
        capture_output=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"vllm" in done.stdout
    assert b"As arguments of vLLM" in done.stdout
