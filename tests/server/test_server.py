"""Server: limits, blocks, validation, files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from fluidsched.errors import InputError
from fluidsched.server import IterationTime, Server

PAPER = IterationTime.paper(0.01, 3e-7)


def test_blocks_round_capacity_down_and_requests_up() -> None:
    """⌊C/b⌋ blocks, ⌈tokens/b⌉ per request."""
    server = Server(1_000, PAPER, block_size=16)
    assert server.kv_blocks == 62
    assert server.usable_kv_capacity == 992
    assert server.block_rounded([0, 1, 16, 17]).tolist() == [0, 16, 16, 32]
    plain = Server(1_000, PAPER)
    assert plain.kv_blocks is None
    assert plain.usable_kv_capacity == 1_000
    assert plain.block_rounded(17) == 17


def test_unlimited_memory() -> None:
    """Infinite capacity is legal, has no count of blocks and survives a file."""
    server = Server(math.inf, PAPER, block_size=16)
    assert server.kv_blocks is None
    assert server.usable_kv_capacity == math.inf
    assert Server.from_dict(server.to_dict()) == server
    assert server.to_dict()["kv_capacity"] == "inf"


def test_file_round_trip(tmp_path: Path) -> None:
    """What is written is what is read; equal servers have equal fingerprints, others have others."""
    server = Server(137_000, PAPER, 256, 2048, 16, name="mine", source="measured")
    path = tmp_path / "server.json"
    server.to_json(path)
    assert Server.from_json(path) == server
    assert Server.from_json(path).fingerprint == server.fingerprint
    assert Server(137_001, PAPER).fingerprint != Server(137_000, PAPER).fingerprint


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kv_capacity": 0}, "kv_capacity"),
        ({"kv_capacity": math.nan}, "kv_capacity"),
        ({"kv_capacity": "137000"}, "kv_capacity"),
        ({"kv_capacity": 8, "block_size": 16}, "kv_capacity"),
        ({"iteration_time": 0.01}, "iteration_time"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"token_budget": 2.5}, "token_budget"),
        ({"block_size": -16}, "block_size"),
        ({"name": None}, "name"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], named: str) -> None:
    """Every wrong argument is refused by name."""
    with pytest.raises(InputError) as caught:
        Server(**{"kv_capacity": 1_000, "iteration_time": PAPER, **changes})
    assert caught.value.argument == named


def test_reading_names_the_field() -> None:
    """A wrong file says which field is wrong."""
    data = Server(1_000, PAPER).to_dict()
    for change, named in [
        ({"schema": "fluidsched.server/9"}, "server.schema"),
        ({"kv_capacity": None}, "kv_capacity"),
        ({"iteration_time": {}}, "server.iteration_time.schema"),
    ]:
        with pytest.raises(InputError) as caught:
            Server.from_dict({**data, **change})
        assert caught.value.argument == named
    with pytest.raises(InputError, match="block_size"):
        Server.from_dict({k: v for k, v in data.items() if k != "block_size"})


def test_repr_shows_limits_with_units() -> None:
    """Only the limits that exist are shown."""
    shown = repr(Server(137_000, PAPER, token_budget=2048, name="mine", source="measured"))
    assert "137,000 tokens" in shown
    assert "token_budget=2,048 tokens" in shown
    assert "max_batch_size" not in shown
    assert "measured" in shown


def test_capacity_from_a_model_config() -> None:
    """Keys and values of every layer and KV head; tensor parallelism pools memory and shares the weights."""
    config = {"layers": 32, "kv_heads": 8, "head_dim": 128, "parameters": 8e9, "gpu_memory_bytes": 80e9}
    one, two = (Server.from_model_config(PAPER, **config, tensor_parallel=n) for n in (1, 2))
    per_token = 2 * 32 * 8 * 128 * 2
    assert one.kv_capacity == (0.9 * 80e9 - 16e9) // per_token
    assert two.kv_capacity == (0.9 * 160e9 - 16e9) // per_token
    eight_bit = Server.from_model_config(PAPER, **config, kv_bytes_per_element=1, block_size=16, name="mine")
    assert eight_bit.kv_capacity == (0.9 * 80e9 - 16e9) // (per_token / 2)
    assert (eight_bit.block_size, eight_bit.name) == (16, "mine")
    with pytest.raises(InputError, match="leave room for KV"):
        Server.from_model_config(PAPER, **{**config, "parameters": 70e9})
    with pytest.raises(InputError, match="kv_heads"):
        Server.from_model_config(PAPER, **{**config, "kv_heads": 0})


def test_bandwidth_and_model_length_are_written_where_known() -> None:
    """Files without them keep their form and their fingerprint; with them they come back equal."""
    time = IterationTime.affine(0.01, 1e-5, 1e-4, 1e-7)
    plain, swapping = Server(100, time), Server(100, time, swap_bandwidth=2e4, max_model_len=4096)
    assert "max_model_len" not in plain.to_dict()
    assert "swap_bandwidth" not in plain.to_dict()
    assert Server.from_dict(swapping.to_dict()) == swapping
    assert plain.fingerprint != swapping.fingerprint
    with pytest.raises(InputError, match="swap_bandwidth must be a finite number above 0"):
        Server(100, time, swap_bandwidth=0.0)
