"""The simulation cell: every parameter reaches the object it names, the row is what `simulate` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fluidsched as fs
from fluidsched.errors import InputError
from fluidsched.sweeps import SweepSpec, cells, sweep
from fluidsched.sweeps.cells import simulate_cell

SEED = np.random.SeedSequence(3)
WORKLOAD = fs.Workload(
    [
        fs.RequestType("chat", 4.0, prompt_tokens=256, output_tokens=32),
        fs.RequestType("long", 0.5, 2000, 100),
    ],
    name="mine",
)
SERVER = fs.Server(20_000, fs.IterationTime.paper(d0=0.01, d1=3e-7), max_batch_size=64, name="small")
RUN = {"horizon": 20.0, "warmup": 5.0, "replications": 2}
BASE = {"workload": WORKLOAD.to_dict(), "server": SERVER.to_dict(), "policy": "vllm", **RUN}


def test_row_is_what_simulate_measured() -> None:
    row = simulate_cell(BASE, SEED)
    runs = fs.simulate(WORKLOAD, SERVER, fs.baselines.vllm(), seed=np.random.SeedSequence(3), **RUN)
    summary = runs.summary().set_index("measure")
    fluid = fs.solve_fluid(WORKLOAD, SERVER)
    assert row["offered_rate"] == 4.5
    assert row["critical_rate"] == fluid.critical_rate
    assert row["fluid_load"] == fluid.load.max()
    columns = {"mean_ttft": "mean_ttft_s", "mean_kv": "mean_kv_tokens", "wasted_tokens": "wasted_tokens"}
    for measure, column in columns.items():
        found = [row[column], row[f"{column}_low"], row[f"{column}_high"]]
        np.testing.assert_array_equal(found, summary.loc[measure, ["estimate", "low", "high"]].astype(float))
    assert row["verdict"] == runs.verdict("vllm")


def built(parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the cell hands to `simulate`, and the workload or path it draws from or replays."""
    handed: dict[str, Any] = {}
    simulate, demand = cells.simulate, cells._demand

    def seen(*texts: str) -> Any:
        handed["demand"] = demand(*texts)
        return handed["demand"]

    def spy(workload: Any, server: Any, policies: Any, **options: Any) -> Any:
        handed.update(server=server, table=policies, **options)
        return simulate(workload, server, policies, **options)

    monkeypatch.setattr(cells, "simulate", spy)
    monkeypatch.setattr(
        cells, "_arguments", lambda f, *w, real=cells._arguments: real(simulate if f is spy else f, *w)
    )
    monkeypatch.setattr(cells, "_demand", seen)
    simulate_cell(parameters, SEED)
    monkeypatch.undo()
    workload, path = handed.pop("demand")
    return handed | {"workload": workload if path is None else path}


def test_cells_that_differ_in_the_policy_share_their_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn once, and the rows are those of cells run alone."""
    cells._paths.cache_clear()
    alone = [simulate_cell(BASE | {"policy": policy}, SEED) for policy in ("vllm", "sarathi")]
    assert cells._paths.cache_info().misses == 1
    for policy, row in zip(("vllm", "sarathi"), alone, strict=True):
        cells._paths.cache_clear()
        np.testing.assert_equal(simulate_cell(BASE | {"policy": policy}, SEED), row)
    other = simulate_cell(BASE, np.random.SeedSequence(4))
    assert other["mean_ttft_s"] != alone[0]["mean_ttft_s"]


def test_workload_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rates(**parameters: Any) -> list[float]:
        given = {f"workload.{name.replace('__', '.')}": value for name, value in parameters.items()}
        return built(BASE | given, monkeypatch)["workload"].arrival_rate.tolist()  # type: ignore[no-any-return]

    assert rates(scale=0.5) == [2.0, 0.25]
    assert rates(chat__arrival_rate=3.0, long__output_tokens=50) == [3.0, 0.5]
    np.testing.assert_allclose(rates(load=0.5), WORKLOAD.at_load(0.5, SERVER).arrival_rate, rtol=1e-12)
    file = tmp_path / "w.json"
    WORKLOAD.to_json(file)
    without = {name: value for name, value in BASE.items() if name != "workload"}
    assert built(without | {"workload.file": str(file)}, monkeypatch)["workload"].name == "mine"
    named = built(BASE | {"workload": "azure_conv", "workload.scale": 0.1}, monkeypatch)["workload"]
    assert named.total_arrival_rate == pytest.approx(0.1 * fs.workloads.azure_conv().total_arrival_rate)


def test_traces_are_binned_or_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "trace.csv"
    path = WORKLOAD.sample(30.0, 5)
    path.to_csv(file)
    trace = {name: value for name, value in BASE.items() if name != "workload"} | {"workload.file": str(file)}
    assert len(built(trace | {"workload.types": 2}, monkeypatch)["workload"]) == 2
    replay = {name: value for name, value in trace.items() if name not in RUN}
    replay |= {"workload.replay": True, "workload.types": 2}
    replayed = built(replay, monkeypatch)["workload"]
    assert isinstance(replayed, fs.ArrivalPath)
    assert len(replayed) == len(path)


def test_server_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = {name: value for name, value in BASE.items() if name != "server"}

    def server(base: dict[str, Any], **parameters: Any) -> fs.Server:
        given = {f"server.{name.replace('__', '.')}": value for name, value in parameters.items()}
        return built(base | given, monkeypatch)["server"]  # type: ignore[no-any-return]

    assert server(BASE, max_batch_size=8).max_batch_size == 8
    assert server(BASE, kv_capacity=np.inf).kv_capacity == np.inf
    catalogued = server(without, gpu="a100-80gb", model="llama-2-7b", iteration_time="paper", block_size=16)
    expected = fs.catalog.server("a100-80gb", "llama-2-7b", iteration_time="paper")
    np.testing.assert_array_equal(
        catalogued.iteration_time.coefficients, expected.iteration_time.coefficients
    )
    assert catalogued.block_size == 16
    own = server(without, kv_capacity=9000, iteration_time__paper__d0=0.02, iteration_time__paper__d1=1e-7)
    assert own.iteration_time(0, 0, 0) == 0.02
    slower = server(BASE, iteration_time__paper__d0=0.02, iteration_time__paper__d1=3e-7)
    assert (slower.name, slower.iteration_time.empty) == ("small", 0.02)
    SERVER.to_json(tmp_path / "s.json")
    assert server(without, file=str(tmp_path / "s.json")).fingerprint == SERVER.fingerprint


def test_policy_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = {name: value for name, value in BASE.items() if name != "policy"}

    def table(base: dict[str, Any], **parameters: Any) -> fs.PolicyTable:
        given = {f"policy.{name.replace('__', '.')}": value for name, value in parameters.items()}
        return built(base | given, monkeypatch)["table"]  # type: ignore[no-any-return]

    assert table(BASE, token_budget=1024).token_budget == 1024
    assert table(without, kind="sarathi", max_in_service=10).max_in_service == 10, "a field, not an argument"
    fluid = fs.solve_fluid(WORKLOAD, SERVER)
    capped = fs.compile_policy(fluid, "capped", overflow_probability=0.1)
    assert table(without, kind="capped", overflow_probability=0.1).max_in_service == capped.max_in_service
    assert table(BASE | {"policy": "gated"}, chat__threshold=3).types[0].threshold == 3
    capped.to_json(tmp_path / "t.json")
    assert table(without, file=str(tmp_path / "t.json")) == capped
    assert table(BASE | {"policy": capped.to_dict()}) == capped


def test_slos_add_goodput_and_the_seed_parameter_is_a_label() -> None:
    row = simulate_cell(BASE | {"slo.ttft": 0.5, "seed": 4}, SEED)
    assert 0 < row["goodput"] <= row["request_throughput"]
    assert "goodput" not in simulate_cell(BASE, SEED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizn": 3}, "horizn must be left out: known are objective, horizon, warmup"),
        ({"horizon.x": 3}, r"horizon\.x must be left out"),
        ({"workload.bogus": 3}, r"workload\.bogus must be left out: known are name"),
        ({"workload.chat.bogus": 3}, r"workload\.chat\.bogus must be left out: known are name, arrival_rate"),
        ({"workload.load": 0.5, "workload.scale": 2}, "workload must be given at most one of them"),
        ({"workload.replay": True}, r"workload\.replay must come with a trace"),
        ({"workload": None}, "workload must be given by one of value, file"),
        ({"workload": "nowhere"}, "nowhere"),
        ({"server": None}, "server must be given by one of value, file, catalog, fields"),
        ({"server.gpu": "a100-80gb"}, "server must be given by one of .* got value and catalog"),
        ({"server.bogus": 1}, r"server\.bogus must be left out"),
        ({"server.iteration_time.paper": 1}, r"be the arguments of one form"),
        (
            {"server.iteration_time.cubic.a": 1},
            r"iteration_time\.cubic must be left out: known are affine, paper",
        ),
        ({"policy": "bogus"}, "bogus"),
        ({"policy.kind": "vllm"}, "policy must be given by one of .* got name and kind"),
        ({"policy.bogus": 1}, r"policy\.bogus must be left out"),
        ({"slo.bogus": 1}, "bogus"),
    ],
)
def test_wrong_parameters_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulate_cell({name: value for name, value in (BASE | changes).items() if value is not None}, SEED)


def real_spec() -> SweepSpec:
    return SweepSpec(
        base={"server": SERVER, **RUN},
        grid={
            "workload": [WORKLOAD],
            "workload.load": [0.2, 0.4, 0.6],
            "policy": [
                "vllm",
                {"kind": "vllm", "name": "twin"},
                "sarathi",
                {"kind": "capped"},
                "no such policy",
            ],
        },
        seed=9,
    )


def test_simulations_are_the_same_bytes_in_workers_and_policies_share_their_arrivals(tmp_path: Path) -> None:
    here = sweep(real_spec(), tmp_path / "here", format="csv")
    workers = sweep(real_spec(), tmp_path / "workers", workers=2, format="csv")
    assert here.path.read_bytes() == workers.path.read_bytes()
    frame = here.to_frame()
    assert here.failed == 3
    assert frame[frame.status == "failed"].policy.tolist() == ["no such policy"] * 3
    assert frame[frame.status == "failed"].diagnosis.str.startswith("InputError: kind must be one of").all()
    measures = frame.columns[frame.columns.get_loc("offered_rate") :]
    of = frame.set_index("policy")[measures]
    assert of.loc["vllm"].reset_index(drop=True).equals(of.loc["twin"].reset_index(drop=True))


def test_simulations_on_a_dask_cluster_are_the_same_bytes(tmp_path: Path, dask_address: str) -> None:
    from distributed import Client

    here = sweep(real_spec(), tmp_path / "here", format="csv")
    with Client(dask_address) as client:
        executor = client.get_executor(pure=False)
        cluster = sweep(real_spec(), tmp_path / "cluster", executor=executor, workers=2, format="csv")
    assert here.path.read_bytes() == cluster.path.read_bytes()
