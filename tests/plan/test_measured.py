"""A measured benchmark beside its simulation. The files here are written by us from simulations, not measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import fluidsched as fs
from fluidsched.cli import app
from fluidsched.errors import InputError
from fluidsched.measured import compare_measured

TIME = (0.02, 1e-4, 2e-4, 2e-7, 0.0)
SERVER = fs.Server(60_000, fs.IterationTime.affine(*TIME), max_batch_size=64)
WORKLOAD = fs.Workload(
    [fs.RequestType("a", arrival_rate=6.0, prompt_tokens=300, output_tokens=fs.lengths.uniform(10, 90))]
)


def bench(folder: Path, server: fs.Server, **changes: Any) -> Path:
    """A result in the format of ``vllm bench serve --save-detailed``, made up by simulating `server`."""
    path = dataclasses.replace(WORKLOAD.sample(120.0, seed=2), horizon=None)
    run = fs.simulate(path, server, fs.baselines.vllm()).run("vllm")
    data = {
        "backend": "vllm", "label": "made up by a simulation",
        "input_lens": path.prompt_tokens.tolist(), "output_lens": path.output_tokens.tolist(),
        "start_times": (path.arrival_s + 1000.0).tolist(),
        "ttfts": (run.first_token_s - path.arrival_s).tolist(),
        "latencies": (run.finish_s - path.arrival_s).tolist(),
        "errors": [""] * len(path),
    }  # fmt: skip
    file = folder / "bench.json"
    file.write_text(json.dumps({name: v for name, v in {**data, **changes}.items() if v is not None}))
    return file


def test_the_same_server_agrees(tmp_path: Path) -> None:
    found = compare_measured(bench(tmp_path, SERVER), SERVER)
    assert found.error < 1e-3  # arrivals count from the first request's
    assert not found.explanations
    assert found.to_frame()["ratio"].to_numpy() == pytest.approx(1.0, rel=1e-2)
    assert "agree" in found.verdict()


@pytest.mark.parametrize(("name", "column"), [("base", 0), ("per_prefill_token", 1)])
def test_names_the_coefficient_that_was_changed(tmp_path: Path, name: str, column: int) -> None:
    """Measured on a machine whose one coefficient is 1.6 times ours: it is found, with its factor."""
    changed = list(TIME)
    changed[column] *= 1.6
    machine = dataclasses.replace(SERVER, iteration_time=fs.IterationTime.affine(*changed))
    found = compare_measured(bench(tmp_path, machine), SERVER)
    best = found.explanations[0]
    assert best.coefficient == name
    assert best.factor == pytest.approx(1.6, rel=0.02)
    assert best.left < 0.01
    others = [e.coefficient for e in found.explanations[1:] if e.left < 0.05]
    assert f"{name} × 1.6" in found.verdict()
    assert all(f"{other} × " in found.verdict() for other in others)
    assert ("that coefficient alone explains it" in found.verdict()) is (not others)
    assert all(a.left <= b.left for a, b in zip(found.explanations, found.explanations[1:], strict=False))


def test_says_when_no_coefficient_explains_it(tmp_path: Path) -> None:
    """First tokens twice as late as they should be, everything after as simulated: a queue before the engine."""
    file = bench(tmp_path, SERVER)
    data = json.loads(file.read_text())
    data["latencies"] = [latency + 3.0 for latency in data["latencies"]]
    data["ttfts"] = [ttft + 3.0 for ttft in data["ttfts"]]
    file.write_text(json.dumps(data))
    found = compare_measured(file, SERVER)
    assert found.explanations[0].left > 0.05
    assert "no single coefficient" in found.verdict()


def test_failed_requests_are_left_out_on_both_sides(tmp_path: Path) -> None:
    file = bench(tmp_path, SERVER)
    data = json.loads(file.read_text())
    data["errors"][3] = "timed out"
    data["output_lens"][5] = 0
    file.write_text(json.dumps(data))
    assert compare_measured(file, SERVER).requests == len(data["errors"]) - 2


def test_latencies_are_the_sum_of_gaps_where_they_are_not_given(tmp_path: Path) -> None:
    file = bench(tmp_path, SERVER)
    data = json.loads(file.read_text())
    several = [[latency - ttft] for latency, ttft in zip(data["latencies"], data["ttfts"], strict=True)]
    data["itls"] = several
    del data["latencies"]
    file.write_text(json.dumps(data))
    assert compare_measured(file, SERVER).error < 1e-3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ttfts": None}, "ttfts"),
        ({"latencies": None}, "latencies"),
        ({"ttfts": ["soon"]}, "ttfts"),
        ({"latencies": [-1.0] * 5000}, "latencies"),
        ({"start_times": None}, "start_times"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        compare_measured(bench(tmp_path, SERVER, **changes), SERVER)


def test_a_file_of_something_else_says_what_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match=r"ttfts must be a list.*--save-detailed"):
        compare_measured(tmp_path / "other.json", SERVER)


def test_command_and_json(tmp_path: Path) -> None:
    server = tmp_path / "server.json"
    server.write_text(json.dumps(SERVER.to_dict()))
    file = bench(tmp_path, SERVER)
    run = CliRunner().invoke(app, ["compare", "--measured", str(file), "--server", str(server), "--json"])
    assert run.exit_code == 0, run.output
    answer = json.loads(run.stdout)
    assert answer["schema"] == "fluidsched.measured/1"
    assert np.isclose(answer["measured"]["mean_ttft_ms"], answer["simulated"]["mean_ttft_ms"], rtol=0.01)
    both = CliRunner().invoke(app, ["compare", "x.json", "--measured", str(file)])
    assert isinstance(both.exception, InputError) or both.exit_code == 2


def test_says_what_is_off_and_lists_what_each_coefficient_would_leave(tmp_path: Path) -> None:
    """One request cannot tell what made its decodes slow: every coefficient that explains them is named."""
    machine = dataclasses.replace(SERVER, iteration_time=fs.IterationTime.affine(0.03, *TIME[1:]))
    found = compare_measured(bench(tmp_path, machine), SERVER)
    ratio = found.measured["mean_tpot_ms"] / found.simulated["mean_tpot_ms"]
    assert f"TPOT × {ratio:.3g}" in found.verdict()
    assert all(f"{one.coefficient} " in repr(found) for one in found.explanations)
    data = json.loads(bench(tmp_path, machine).read_text())
    one = {name: value[:1] if isinstance(value, list) else value for name, value in data.items()}
    (tmp_path / "one.json").write_text(
        json.dumps(one | {"ttfts": [0.05], "latencies": [9.0], "output_lens": [60]})
    )
    found = compare_measured(tmp_path / "one.json", SERVER)
    assert repr(found).startswith("1 request of")
    told = [e for e in found.explanations if e.left < 0.05]
    assert ("at another load" in found.verdict()) is (len(told) > 1)


def test_requests_the_server_cannot_hold_and_times_in_milliseconds_are_named(tmp_path: Path) -> None:
    long = [100_000, *json.loads(bench(tmp_path, SERVER).read_text())["input_lens"][1:]]
    with pytest.raises(
        InputError, match=r"100,000 prompt .* name the server and the table that were measured"
    ):
        compare_measured(bench(tmp_path, SERVER, input_lens=long), SERVER)
    data = json.loads(bench(tmp_path, SERVER).read_text())
    late = {name: [1000.0 * value for value in data[name]] for name in ("ttfts", "latencies")}
    found = compare_measured(bench(tmp_path, SERVER, **late), SERVER)
    assert "in milliseconds?" in found.verdict()


@pytest.mark.parametrize("missing", ["input_lens", "output_lens", "start_times", "ttfts", "latencies"])
def test_a_result_without_one_of_its_lists_is_told_how_to_come_by_it(tmp_path: Path, missing: str) -> None:
    with pytest.raises(InputError, match=rf"{missing}.*--save-detailed"):
        compare_measured(bench(tmp_path, SERVER, **{missing: None}), SERVER)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_result_cut_short_is_seen_as_such(tmp_path: Path, share: float) -> None:
    file = bench(tmp_path, SERVER)
    text = file.read_text()
    file.write_text(text[: int(share * len(text))])
    with pytest.raises(InputError, match=r"ends too early .* Is the file whole\?"):
        compare_measured(file, SERVER)
