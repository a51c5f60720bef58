"""Every reader of files, with valid files to start from, for the fuzz tests and `scripts/fuzz.py`."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tomllib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import fluidsched as fs
from fluidsched._files import dumps
from fluidsched.cli.inputs import load_server, load_workload, read_as
from fluidsched.errors import FluidschedError
from fluidsched.fluid import FluidSolution
from fluidsched.measured import compare_measured
from fluidsched.server.calibration import Calibration
from fluidsched.simulation import SimulationResult
from fluidsched.sweeps import sweep
from fluidsched.sweeps.cells import simulate_cell
from fluidsched.sweeps.spec import SweepSpec

MIX = fs.Workload(
    [
        fs.RequestType("chat", 3.0, 600, fs.lengths.geometric(200, maximum=2048)),
        fs.RequestType(
            "sum",
            0.5,
            fs.lengths.uniform(10, 20),
            8,
            arrivals=fs.arrivals.renewal(2.0),
            patience=fs.patience.lognormal(20.0, 1.5),
        ),
        fs.RequestType("pairs", 0.5, lengths=fs.lengths.joint([5, 9], [2, 30], [1, 3])),
    ]
)
SERVER = fs.Server(
    100_000, fs.IterationTime.affine(0.01, 1e-5, 1e-5, 3e-7, 3e-9), max_batch_size=64, block_size=16
)
PATH = MIX.sample(3.0, seed=1)


@dataclass(frozen=True)
class Reader:
    """How a kind of file is read, its suffix, valid texts of it, and what is done next with what was read.

    `seal` puts checksums right again, so that damage gets past them.
    """

    read: Callable[[Path], Any]
    suffix: str
    seeds: tuple[bytes, ...]
    use: Callable[[Any], Any] | None = None
    seal: Callable[[bytes], bytes] | None = None


def _csv(*rows: str) -> bytes:
    return ("\n".join(rows) + "\n").encode()


def _json(value: Any) -> bytes:
    return dumps(value).encode()


def _traces() -> Iterator[bytes]:
    yield _csv("arrival_s,prompt_tokens,output_tokens,type", "0,10,20,a", "0.5,7,1,b", "1e1,3,2,a")
    yield _csv(
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
    )
    yield _csv(
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,1,2.0,ChatGPT,472,18,490,API log",
        "45,2,1.0,GPT-4,1087,0,1087,Conversation log",
        "50,1,2.0,ChatGPT,47,9,56,API log",
    )
    rows = [
        {"timestamp": 1000 * i, "input_length": 900, "output_length": 5, "hash_ids": [0, i]} for i in range(3)
    ]
    yield b"\n".join(json.dumps(row).encode() for row in rows)
    yield _json(
        {
            "input_lens": [5, 6],
            "output_lens": [7, 8],
            "start_times": [1.5, 2.5],
            "errors": ["", ""],
            "date": "x",
        }
    )
    yield _json([{"conversations": [{"from": "human", "value": 12}, {"from": "gpt", "value": 40}]}])
    yield _json([{"prompt_tokens": 12, "output_tokens": 40}])


def _tables() -> list[fs.PolicyTable]:
    fluid = fs.solve_fluid(MIX.scaled(0.5), SERVER)
    kinds = ("wait", "gated", "capped", "lookahead")
    short = fs.Workload([fs.RequestType("short", 50.0, 30, fs.lengths.uniform(1, 6))])
    nested = fs.compile_policy(fs.solve_fluid(short, SERVER), "nested-wait", segments=[2, 5], slack=0.2)
    return [fs.baselines.vllm(), *(fs.compile_policy(fluid, kind) for kind in kinds), nested]


def _points() -> bytes:
    lines = ["kind,batch_decode,avg_kv,chunk,chunk_ctx,n_tok,kv_tok,pre_attn,t_s"]
    lines += [
        f"decode,{n},100,0,0,{n},{100 * n},0,{0.01 + 1e-5 * n + 3e-7 * 100 * n:.9f}" for n in range(1, 40)
    ]
    lines += [
        f"prefill,0,0,{c},0,{c},0,{c * c / 2},{0.01 + 1e-5 * c + 3e-9 * c * c / 2:.9f}"
        for c in (64, 256, 900)
    ]
    return _csv(*lines)


MIX_TOML = b"""
[[types]]
name = "chat"
arrival_rate = 3.0
prompt_tokens = { law = "lognormal", mean = 600, cv = 1.0, maximum = 8192 }
output_tokens = { law = "truncated", of = { law = "geometric", mean = 200 }, lo = 2, hi = 900 }
[[types]]
name = "classify"
arrival_rate = 5.0
prompt_tokens = 1500
output_tokens = { law = "empirical", values = [1, 8], weights = [0.5, 0.5] }
arrivals = { process = "renewal", cv = 2.0 }
"""
SERVER_TOML = b"""
kv_capacity = 100_000
max_batch_size = 256
[[iteration_time.pieces]]
base = 0.010
per_prefill_token = 1.2e-5
per_decode_token = 1.2e-5
per_kv_token = 3.3e-7
per_prefill_attention = 3.0e-9
"""
SWEEP_TOMLS = (
    b"""
seed = 7
[base]
workload = "azure_conv"
horizon = 60.0
replications = 2
[base.server]
gpu = "a100-80gb"
model = "llama-2-7b"
[grid]
"workload.load" = [0.5, 0.8]
policy = ["vllm", "sarathi"]
""",
    b"""
cells = [{workload.scale = 0.5, slo.e2e = 9.0}, {workload.scale = 2.0}]
[base.server]
kv_capacity = 50_000
iteration_time.paper = {d0 = 0.02, d1 = 1e-6}
[base.workload]
schema = "fluidsched.workload/1"
types = [{name = "chat", arrival_rate = 3.0, prompt_tokens = 60, output_tokens = 40}]
[grid]
policy = [{kind = "capped", overflow_probability = 0.05}, {kind = "vllm"}]
"server.max_batch_size" = [64]
""",
)


def _workload(path: Path) -> Any:
    return load_workload(str(path))


def _server(path: Path) -> Any:
    return load_server(None, None, None, path)


def _use_workload(workload: Any) -> None:
    if isinstance(workload, fs.Workload):
        repr(fs.solve_fluid(workload, SERVER))
        workload.sample(1e-16, seed=1)


def _use_server(server: fs.Server) -> None:
    fluid = fs.solve_fluid(MIX, server)
    repr(fluid)
    fs.simulate(PATH, server, fs.baselines.vllm(), engine="reference", oversize="reject")


def _use_table(table: fs.PolicyTable) -> None:
    repr(table), table.to_frame(), table.to_vllm_args()
    fs.simulate(PATH, SERVER, table, engine="reference", oversize="reject")


def _use_trace(path: fs.ArrivalPath) -> None:
    repr(path)
    path.to_csv()
    if len(path) > 1:
        repr(path.to_workload(types=1))


def _use_spec(spec: SweepSpec) -> None:
    repr(spec)
    if len(spec) < 100:  # so short a time that no rate below 1e30 asks for many requests
        for cell in {0, len(spec) - 1}:
            spec.labels(cell)
            parameters = spec.parameters(cell) | {"horizon": 1e-26, "replications": 1, "engine": "reference"}
            simulate_cell(parameters, spec.seed_sequence(cell))


MEASURED = {
    "input_lens": [50, 60, 70],
    "output_lens": [7, 8, 1],
    "start_times": [1.5, 2.5, 2.75],
    "ttfts": [0.02, 0.03, 0.04],
    "itls": [[0.02] * 6, [0.03] * 7, []],
    "errors": ["", "", ""],
}


def _measured(path: Path) -> Any:
    return compare_measured(path, fs.Server(100_000, fs.IterationTime.affine(0.01, 1e-5, 0.0, 0.0)))


PRODUCTS = {
    "grid": {"x": [1, 2], "y": [10, 20]},
    "function": "fluidsched.sweeps.sweeping:example_cell",
}


def _sweep_in(path: Path) -> Any:
    """Go on with the sweep whose journal the file is."""
    place = path.parent / "sweep"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    path.rename(place / "journal.txt")
    return sweep(PRODUCTS, place, format="csv")


def _journal(folder: Path) -> bytes:
    sweep(PRODUCTS, folder, format="csv")
    return (folder / "journal.txt").read_bytes()


def _sealed(journal: bytes) -> bytes:
    bodies = (line.partition(b" ")[2] for line in journal.splitlines())
    return b"".join(b"%08x %s\n" % (zlib.crc32(body), body) for body in bodies)


def readers(folder: Path) -> dict[str, Reader]:
    """Every kind of file the library or its command line reads; `folder` is for what cannot be made in memory."""
    fluid = fs.solve_fluid(MIX, SERVER)
    runs = fs.simulate(
        MIX, SERVER, [fs.baselines.vllm()], horizon=20.0, replications=2, seed=1, engine="reference"
    )
    tables = _tables()
    points = _points()
    return {
        "trace": Reader(fs.read_trace, "", tuple(_traces()), _use_trace),
        "workload-json": Reader(_workload, ".json", (_json(MIX.to_dict()),), _use_workload),
        "workload-toml": Reader(_workload, ".toml", (MIX_TOML,), _use_workload),
        "server-json": Reader(_server, ".json", (_json(SERVER.to_dict()),), _use_server),
        "server-toml": Reader(_server, ".toml", (SERVER_TOML,), _use_server),
        "table-json": Reader(
            fs.PolicyTable.from_json, ".json", tuple(t.to_json().encode() for t in tables), _use_table
        ),
        "table-csv": Reader(fs.PolicyTable.from_csv, ".csv", tuple(t.to_csv().encode() for t in tables)),
        "solution": Reader(
            lambda path: read_as("solution", path, FluidSolution.from_dict),
            ".json",
            (_json(fluid.to_dict()),),
        ),
        "result": Reader(SimulationResult.from_json, ".json", (runs.to_json().encode(),)),
        "comparison": Reader(
            fs.Comparison.from_json, ".json", (_json(fs.compare(runs, fluid).to_dict()),), repr
        ),
        "measured": Reader(_measured, ".json", (_json(MEASURED),), repr),
        "sweep-toml": Reader(SweepSpec.from_toml, ".toml", SWEEP_TOMLS, _use_spec),
        "journal": Reader(_sweep_in, ".txt", (_journal(folder),), seal=_sealed),
        "points": Reader(_calibrate, ".csv", (points,), repr),
        "calibration": Reader(Calibration.from_json, ".json", (_calibration(points, folder),), repr),
        "trace-parquet": Reader(fs.read_trace, ".parquet", (_parquet(),), _use_trace),
    }


def _calibrate(path: Path) -> Any:
    return fs.calibrate(path, kv_capacity=1000.0)


def _calibration(points: bytes, folder: Path) -> bytes:
    (folder / "points.csv").write_bytes(points)
    return _json(_calibrate(folder / "points.csv").to_dict())


def _parquet() -> bytes:
    """A Parquet trace."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    columns = {"arrival_s": [0.0, 1.5], "prompt_tokens": [5, 6], "output_tokens": np.array([7, 8])}
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def survives(reader: Reader, path: Path, data: bytes) -> bool:
    """Write `data` to `path` and read it; True if it was accepted. Anything but our own errors is raised."""
    path.write_bytes(data)
    with contextlib.suppress(FluidschedError):
        thing = reader.read(path)
        if reader.use is not None:
            reader.use(thing)
        return True
    return False


#: Values that readers tend to stumble over, put in the place of any other.
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**53 + 1, 2**63, 10**30, 10**400, "inf", "-inf",
    "nan", "", " ", "1", "0x10", "1_000", "٣", "²", "a" * 300, "\x00", "../../x", "/etc/passwd", "__class__", "\ud800",
    [], {}, [[]], [None], [1, "a"], {"schema": 1}, {"law": "geometric", "mean": 1e300}, [0.0] * 20,
)  # fmt: skip


def mutated(value: Any, rng: np.random.Generator) -> Any:
    """A JSON value with one thing in it replaced, removed, repeated or renamed, at a random place."""
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            spots.append((node, key))
            walk(node[key])

    value = json.loads(json.dumps(value))
    walk(value)
    if not spots:
        return HOSTILE[rng.integers(len(HOSTILE))]
    node, key = spots[rng.integers(len(spots))]
    choice = rng.integers(8)
    if choice == 0:
        del node[key]
    elif choice == 1 and isinstance(node, list):
        node.extend([node[key]] * int(rng.integers(1, 4)))
    elif choice == 2 and isinstance(node, dict):
        node[str(HOSTILE[rng.integers(len(HOSTILE))])] = node.pop(key)
    elif choice == 3:
        other, another = spots[rng.integers(len(spots))]
        node[key] = json.loads(json.dumps(other.get(another) if isinstance(other, dict) else None))
    elif choice == 4 and isinstance(node[key], (int, float)) and abs(node[key]) < 1e300:
        node[key] *= min(10.0 ** float(rng.integers(-320, 309)), 1e308 / max(abs(node[key]), 1.0))
    else:
        node[key] = HOSTILE[rng.integers(len(HOSTILE))]
    return value


TOKENS = tuple(
    token.encode("utf-8", "surrogatepass")
    for token in (
        ",", "\n", '"', "-1", "0", "1e999", "nan", "inf", "9" * 25, "9" * 5000, "é", "\x00", "٣", "²", "\r", "\ufeff",
        " ", "[", "{", "]]", "}", "=", "null", "true", "2023-02-30 18:15:46.1", "0000-01-01 00:00:00", "\ud800",
        "[" * 2000, "1_0", ".5", "1e5", "0x1", "'", "#", ";", "\\", "\\u0000",
    )
)  # fmt: skip


def scrambled(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes with a piece removed, repeated, overwritten, or a token put in."""
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(len(data) + 1))
        end = min(len(data), at + int(rng.integers(1, 20)))
        choice = rng.integers(5)
        if choice == 0:
            data = data[:at] + data[end:]
        elif choice == 1:
            data = data[:end] + data[at:end] * int(rng.integers(1, 4)) + data[end:]
        elif choice == 2:
            data = data[:at] + bytes(rng.integers(256, size=end - at).tolist()) + data[end:]
        elif choice == 3:
            data = data[:at] + TOKENS[rng.integers(len(TOKENS))] + data[at:]
        else:
            data = data[:at] + TOKENS[rng.integers(len(TOKENS))] + data[end:]
    return data


def to_toml(value: Any) -> str:
    """TOML of a JSON value, tables inside written inline; null becomes "null"."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {to_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return '"null"' if value is None else json.dumps(value)


def hostile_input(reader: Reader, rng: np.random.Generator) -> bytes:
    """A damaged version of one of the reader's valid files."""
    seed = reader.seeds[rng.integers(len(reader.seeds))]
    if seed[:1] in (b"{", b"[") and rng.random() < 0.7:
        with contextlib.suppress(json.JSONDecodeError):  # JSON lines are damaged as bytes only
            value = json.loads(seed)
            for _ in range(int(rng.integers(1, 3))):
                value = mutated(value, rng)
            return json.dumps(value).encode("utf-8", "surrogatepass")
    if reader.seal is not None and rng.random() < 0.7:
        return reader.seal(scrambled(seed, rng))
    if reader.suffix == ".toml" and rng.random() < 0.7:
        value = mutated(tomllib.loads(seed.decode()), rng)
        if isinstance(value, dict):
            lines = (f"{json.dumps(key)} = {to_toml(item)}\n" for key, item in value.items())
            return "".join(lines).encode("utf-8", "surrogatepass")
    return scrambled(seed, rng)
