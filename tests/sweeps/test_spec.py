"""The spec: which cells there are, what they are called, what their randomness depends on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fluidsched import IterationTime, Server
from fluidsched.errors import InputError
from fluidsched.sweeps import SweepSpec

FUNCTION = "sweep_cells:draw"


def make(**fields: object) -> SweepSpec:
    return SweepSpec(**{"function": FUNCTION, **fields})


def test_cells_are_the_product_of_list_and_axes_the_last_axis_fastest() -> None:
    spec = make(cells=[{"x": 1}, {"x": 2, "z": 5}], grid={"y": ["a", "b", "c"], "w": np.array([0.5, 1.5])})
    assert len(spec) == 12
    assert spec.columns == ("x", "z", "y", "w")
    assert spec.labels(0) == {"x": 1, "z": None, "y": "a", "w": 0.5}
    assert spec.labels(1) == {"x": 1, "z": None, "y": "a", "w": 1.5}
    assert spec.labels(11) == {"x": 2, "z": 5, "y": "c", "w": 1.5}
    with pytest.raises(IndexError):
        spec.labels(12)


def test_parameters_are_laid_over_the_base_and_groups_are_dotted_names() -> None:
    spec = make(
        base={"server": {"gpu": "a100-80gb", "max_batch_size": 64}, "horizon": 10},
        grid={"server": {"max_batch_size": [128]}, "policy": ["vllm", {"kind": "capped", "slack": 0.1}]},
    )
    assert spec.parameters(0) == {
        "server.gpu": "a100-80gb",
        "server.max_batch_size": 128,
        "horizon": 10,
        "policy": "vllm",
    }
    assert spec.parameters(1)["policy.slack"] == 0.1
    assert spec.labels(1)["policy"] == '{"kind": "capped", "slack": 0.1}'


def test_objects_of_the_pipeline_are_values_named_in_the_result() -> None:
    servers = [
        Server(kv, IterationTime.paper(d0=0.01, d1=3e-7), name=name)
        for kv, name in ((1000, "small"), (2000, "large"))
    ]
    spec = make(grid={"server": servers})
    assert spec.labels(1) == {"server": "large"}
    assert Server.from_dict(spec.parameters(1)["server"]) == servers[1]
    with pytest.raises(InputError, match=r"grid\.server must have distinct values"):
        make(grid={"server": [servers[0], servers[0]]})


def test_seed_depends_on_what_the_cell_is_not_on_where_it_stands() -> None:
    one = make(grid={"x": [1, 2], "policy": ["vllm", "sarathi"]}, seed=5)
    other = make(cells=[{"policy": "sarathi", "x": 2.0}, {"policy": "vllm", "x": 3}], seed=5)
    key = [one.seed_sequence(i).spawn_key for i in range(4)]
    assert key[2] == key[3] == other.seed_sequence(0).spawn_key, "policies meet the same arrivals; 2 is 2.0"
    assert len({key[0], key[2], other.seed_sequence(1).spawn_key}) == 3
    assert one.seed_sequence(0).entropy == 5
    unpaired = make(grid={"x": [1, 2], "policy": ["vllm", "sarathi"]}, paired=())
    assert unpaired.seed_sequence(2).spawn_key != unpaired.seed_sequence(3).spawn_key


def test_fingerprint_notices_every_change() -> None:
    fields = {"grid": {"x": [1, 2]}, "base": {"h": 1}, "seed": 1, "name": "n", "paired": ("a",)}
    changed = [{"grid": {"x": [2, 1]}}, {"base": {"h": 2}}, {"seed": 2}, {"name": "m"}, {"paired": ()}]
    changed += [{"grid": {"x": [1, 2], "y": [0]}}, {"cells": [{"c": 1}]}, {"function": "sweep_cells:busy"}]
    specs = [make(**fields), *(make(**(fields | change)) for change in changed)]
    assert len({spec.fingerprint for spec in specs}) == len(specs)
    assert make(**fields).fingerprint == specs[0].fingerprint


def test_files_count_by_their_contents(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "trace.csv").write_text("one")
    toml = '[base]\nworkload.file = "trace.csv"\n[grid]\nx = [1, 2]\n'
    (tmp_path / "a" / "spec.toml").write_text(toml)
    (tmp_path / "b" / "spec.toml").write_text(toml)
    a, b = (SweepSpec.from_toml(tmp_path / folder / "spec.toml", FUNCTION) for folder in "ab")
    assert a.parameters(0)["workload.file"] == str(tmp_path / "a" / "trace.csv")
    assert a.fingerprint == b.fingerprint
    assert a.seed_sequence(1).spawn_key == b.seed_sequence(1).spawn_key
    (tmp_path / "b" / "trace.csv").write_text("two")
    assert SweepSpec.from_toml(tmp_path / "b" / "spec.toml", FUNCTION).fingerprint != a.fingerprint


def test_spec_round_trips_through_its_dictionary() -> None:
    spec = make(
        cells=[{"x": 1}], grid={"y": [{"kind": "capped"}, "vllm"]}, base={"server": {"gpu": "h100"}}, seed=3
    )
    again = SweepSpec.from_dict(spec.to_dict())
    assert again == spec
    assert again.fingerprint == spec.fingerprint
    assert repr(spec) == "SweepSpec('sweep', 2 cells: 1 listed × 2 y)"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "spec must say what varies"),
        ({"grid": {"x": []}}, r"grid\.x must be a list of at least one value"),
        ({"grid": {"x": "ab"}}, r"grid\.x must be a list"),
        ({"grid": {"x": [1, 1.0]}}, r"grid\.x must have distinct values; got 1 2 times"),
        ({"grid": {"x": [float("nan")]}}, r"grid\.x\[0\] must be a number"),
        ({"grid": {"x": [object()]}}, r"grid\.x\[0\] must be a number"),
        ({"grid": [1]}, "grid must be a mapping"),
        ({"cells": {"x": 1}}, "cells must be a list of mappings"),
        ({"cells": [{"x": 1}], "grid": {"x": [2]}}, r"grid\.x must be set once"),
        ({"grid": {"p": [{"a": 1}], "p.a": [2]}}, r"must be set once; got p\.a"),
        ({"grid": {"status": [1]}}, "must use other names"),
        ({"grid": {"x": [1]}, "seed": -1}, "seed must be a whole number"),
        ({"grid": {"x": [1]}, "paired": "server"}, "paired must be a list"),
        ({"grid": {"x": [1]}, "function": "nowhere"}, 'function must be "simulate" or "module:name"'),
        ({"grid": {"x": [1]}, "function": "sweep_cells:nothing"}, "has no attribute 'nothing'"),
        (
            {"grid": {"x": [1]}, "function": lambda p, s: {}},
            "function must be found again by its module and name",
        ),
        ({"grid": {"workload.file": ["no such file"]}}, r"workload\.file must name a readable file"),
        ({"grid": {f"x{i}": range(100) for i in range(5)}}, "number of cells must be"),
    ],
)
def test_wrong_specs_are_refused_by_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(**fields)


def test_toml_errors_name_the_file_and_unknown_fields(tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text("grid = [")
    with pytest.raises(InputError, match=r"s\.toml, line 1 must be valid TOML"):
        SweepSpec.from_toml(path)
    path.write_text("girdle = 1")
    with pytest.raises(InputError, match=r"spec\.girdle must be left out"):
        SweepSpec.from_toml(path)
    path.write_text('function = "os:remove"\n[grid]\nx = [1]')
    with pytest.raises(InputError, match=r"function must be \"simulate\" or left out: .*; got os:remove"):
        SweepSpec.from_toml(path)
    with pytest.raises(InputError, match="must name an existing file"):
        SweepSpec.from_toml(tmp_path / "none.toml")
