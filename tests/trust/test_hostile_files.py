"""Damaged and malicious files: every reader refuses them by the library's own errors, naming the place.

`scripts/fuzz.py` feeds the same readers from a coverage-guided fuzzer; what it found stands here.
"""

from __future__ import annotations

import ast
import gzip
import resource
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_readers import HOSTILE, MEASURED, SERVER, Reader, hostile_input, readers, survives
from typer.testing import CliRunner

import fluidsched as fs
from fluidsched import _files
from fluidsched._toml import read_toml
from fluidsched.cli import app
from fluidsched.errors import FluidschedError, InputError
from fluidsched.sweeps import sweep
from fluidsched.sweeps.cells import simulate_cell
from fluidsched.workload import trace_parquet

PACKAGE = Path(fs.__file__).parent


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return readers(tmp_path_factory.mktemp("readers"))


NAMES = (
    "trace", "workload-json", "workload-toml", "server-json", "server-toml", "table-json", "table-csv", "solution",
    "result", "comparison", "measured", "sweep-toml", "journal", "points", "calibration", "trace-parquet",
)  # fmt: skip


def test_every_reader_takes_its_own_files(known: dict[str, Reader], tmp_path: Path) -> None:
    """The files that are damaged below are whole: all are read, and what was read is of use."""
    assert tuple(known) == NAMES
    for name, reader in known.items():
        for number, seed in enumerate(reader.seeds):
            path = tmp_path / f"{name}{number}{reader.suffix}"
            assert survives(reader, path, seed), (name, seed[:200])


def damage(reader: Reader, path: Path, count: int, seed: int) -> int:
    """Read `count` damaged files; return how many were refused. Any other exception or warning is raised."""
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(count):
            data = hostile_input(reader, np.random.default_rng([seed, number]))
            try:
                refused += not survives(reader, path, data)
            except BaseException as error:
                error.add_note(f"input: {data!r}")
                raise
    return refused


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_refused_by_our_own_errors(
    known: dict[str, Reader], name: str, tmp_path: Path
) -> None:
    """Keys and values replaced, bytes lost: an answer or an error of ours, never another exception or a warning."""
    reader = known[name]
    count = 100 if name == "measured" else 250  # each of those that are accepted is simulated many times
    assert damage(reader, tmp_path / f"file{reader.suffix}", count, seed=1) > count // 5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_damaged_files(known: dict[str, Reader], name: str, tmp_path: Path) -> None:
    """The same, longer."""
    reader = known[name]
    count = 800 if name == "measured" else 8_000
    assert damage(reader, tmp_path / f"file{reader.suffix}", count, seed=2) > count // 8


@pytest.mark.parametrize("value", HOSTILE, ids=[ascii(value)[:30] for value in HOSTILE])
@pytest.mark.parametrize("field", ["arrival_rate", "name", "prompt_tokens", "arrivals"])
def test_hostile_values_name_the_field(field: str, value: object, tmp_path: Path) -> None:
    """In place of any one field of a type: accepted, or refused by a message that names the type's field."""
    spec = {"name": "chat", "arrival_rate": 1.0, "prompt_tokens": 100, "output_tokens": 10} | {field: value}
    message = field
    try:
        fs.Workload.from_dict({"schema": "fluidsched.workload/1", "types": [spec]})
    except FluidschedError as error:
        message = str(error)
    assert field in message or "types[0]" in message


# What the fuzzers found.


def test_integers_beyond_floats_are_refused() -> None:
    """10^400 fits no float: it used to end in OverflowError."""
    with pytest.raises(InputError, match=r"kv_capacity must .*; got an integer of more than 308 digits"):
        fs.Server(10**400, fs.IterationTime.paper(0.01, 1e-7))


@pytest.mark.parametrize(
    ("text", "words"),
    [("9" * 5000, "number of thousands of digits"), ("[" * 100_000, "nested too deeply")],
)
def test_what_python_cannot_parse_is_refused(text: str, words: str, tmp_path: Path) -> None:
    """Digits beyond Python's limit and brackets beyond its stack end in our errors, in JSON and in TOML."""
    with pytest.raises(InputError, match=words):
        _files.loads("file", text)
    (tmp_path / "spec.toml").write_text(f"a = {text}")
    with pytest.raises(InputError, match=words):
        read_toml("spec", tmp_path / "spec.toml")


def test_single_surrogates_are_refused() -> None:
    """A name that cannot be written or hashed as UTF-8 is refused where it comes in."""
    with pytest.raises(InputError, match="surrogate"):
        _files.loads("file", '{"name": "\\ud800"}')
    assert _files.loads("file", '{"name": "\\ud83d\\ude00"}') == {"name": "😀"}
    with pytest.raises(InputError, match="surrogates"):
        fs.RequestType("\ud800", 1.0, 10, 10)


@pytest.mark.parametrize("rate", [1e-320, 1e-51, 1e51, 1e308])
def test_magnitudes_that_arithmetic_cannot_carry_are_refused(rate: float) -> None:
    """Rates, times and capacities lie between 1e-50 and 1e50, or are 0: their products and quotients are floats."""
    with pytest.raises(InputError, match="between 1e-50 and 1e\\+50"):
        fs.RequestType("chat", rate, 10, 10)
    with pytest.raises(InputError, match="between 1e-50 and 1e\\+50"):
        fs.IterationTime.affine(0.01, rate, 0.0, 0.0)


def test_ragged_lists_are_refused() -> None:
    """A list of lists of unequal length is no list of numbers."""
    with pytest.raises(InputError, match="unequal lists"):
        fs.lengths.empirical([[1], [2, 3]])  # type: ignore[list-item]


def test_a_packed_table_may_not_unpack_to_any_size(tmp_path: Path) -> None:
    """A megabyte of gzip that unpacks to a gigabyte is refused before it takes the memory."""
    path = tmp_path / "bomb.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for _ in range(300):
            stream.write(b"\0" * (1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="unpack to at most"):
        fs.calibrate(path, kv_capacity=1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 900 * 1024


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("ttfts", [0.02, 0.03], "ttfts must have one per request, 3; got 2 entries"),
        ("ttfts", [0.02, "soon", 0.04], r"record 2 must be a number of seconds.*got ttfts 'soon'"),
        ("ttfts", [0.02, 10**400, 0.04], "record 2 must be a number of seconds"),
        ("latencies", [0.1, 0.01, 0.1], "record 2 must have a latency above 0, at least its TTFT"),
        ("itls", [[0.02], None, []], "record 2 must be a list of seconds; got itls None"),
        ("itls", [[0.02], [0.1, None], []], "record 2, gap 2 must be a number of seconds"),
        ("itls", [[0.02], [1e308] * 3, []], "record 2 must have a latency above 0"),
        ("output_lens", 7, "output_lens must be a list"),
        ("start_times", ["/etc/passwd", 2.0, 3.0], "record 1 must be a number of seconds"),
    ],
)
def test_a_measured_result_names_the_request_at_fault(
    field: str, value: object, words: str, tmp_path: Path
) -> None:
    """Lists of unequal length, text and times that are none used to end in Python's own errors."""
    path = tmp_path / "result.json"
    path.write_text(_files.dumps(MEASURED | {field: value}))
    with pytest.raises(InputError, match=words):
        fs.compare_measured(path, SERVER)


def test_a_measured_result_may_send_all_tokens_at_once(tmp_path: Path) -> None:
    """Gaps of 0 s, of an engine that does not stream, have no ratio to the simulated ones; the rest is compared."""
    path = tmp_path / "result.json"
    path.write_text(_files.dumps(MEASURED | {"itls": [[0.0] * 6, [0.0] * 7, []]}))
    found = fs.compare_measured(path, SERVER)
    ratios = [found.measured[name] / found.simulated[name] for name in ("mean_ttft_ms", "mean_e2el_ms")]
    assert found.error == pytest.approx(float(np.sqrt(np.mean(np.log(ratios) ** 2))))


@pytest.mark.parametrize("time", [10**400, 1e200, 1e-200])
def test_measured_points_have_times_that_can_be_squared(time: float) -> None:
    """Such times used to end in overflow."""
    points = {
        "n_tok": [1, 2],
        "batch_decode": [1, 2],
        "kv_tok": [5, 9],
        "pre_attn": [0, 0],
        "t_s": [0.01, time],
    }
    with pytest.raises(InputError, match="t_s, row 2"):
        fs.calibrate(points, kv_capacity=1000)


def test_a_table_of_a_version_without_end_is_refused(tmp_path: Path) -> None:
    """The number of a schema may have more digits than Python converts, or be a superscript."""
    for version in ("9" * 5000, "²"):
        with pytest.raises(InputError, match="schema"):
            fs.PolicyTable.from_dict(
                fs.baselines.vllm().to_dict() | {"schema": f"fluidsched.policy/{version}"}
            )


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("prompt_tokens", [[1], [2]], "lists"),
        ("type", [["a"], ["b"]], "lists"),
        ("type", [b"\xff", b"a"], "label"),
    ],
)
def test_parquet_columns_hold_single_values(
    column: str, value: list[object], words: str, tmp_path: Path
) -> None:
    """Lists in a column, whose number the number of rows does not bound, are refused before they are read."""
    path = parquet(tmp_path, {column: value})
    with pytest.raises(InputError, match=words):
        fs.read_trace(path)


def test_parquet_names_that_are_not_unicode_are_refused(tmp_path: Path) -> None:
    """The name of a column with a byte overwritten: pyarrow raises Python's own error there."""
    path = parquet(tmp_path, {})
    path.write_bytes(path.read_bytes().replace(b"arrival_s", b"arriv\xa0l_s"))
    with pytest.raises(InputError, match="be a whole Parquet file"):
        fs.read_trace(path)


def test_a_parquet_file_may_not_unpack_to_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label of a megabyte said ten thousand times stays one; more rows than can be meant are refused."""
    import pyarrow as pa

    n = 10_000
    label = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, dtype=np.int32)), pa.array(["x" * 1_000_000]))
    columns = {"arrival_s": np.arange(n), "prompt_tokens": np.ones(n, int), "output_tokens": np.ones(n, int)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(fs.read_trace(parquet(tmp_path, columns | {"type": label}))) == n
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 900 * 1024
    monkeypatch.setattr(trace_parquet, "MAX_REQUESTS", n - 1)
    with pytest.raises(InputError, match="at most 9,999 requests"):
        fs.read_trace(parquet(tmp_path, columns))


def parquet(folder: Path, columns: dict[str, Any]) -> Path:
    """A trace of two requests, some columns replaced."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain: dict[str, Any] = {"arrival_s": [0.0, 1.0], "prompt_tokens": [5, 6], "output_tokens": [7, 8]}
    pq.write_table(pa.table(plain | columns), folder / "trace.parquet")
    return folder / "trace.parquet"


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"gpu": "a100-80gb"}, "server.model must be given"),
        ({"max_batch_size": 8}, "server.kv_capacity must be given"),
        (
            {"kv_capacity": 100, "iteration_time.paper.d1": 1e-6},
            "server.iteration_time.paper.d0 must be given",
        ),
        ({"kv_capacity": 100, "iteration_time.affine.base": "x"}, "iteration_time.affine.* must"),
        (
            {"kv_capacity": 100, "iteration_time.paper.d0": 1.0, "iteration_time.paper.d1": [0]},
            "per_prefill_token",
        ),
    ],
)
def test_a_cell_names_what_its_server_lacks(group: dict[str, Any], words: str) -> None:
    """Arguments left out used to end in Python's TypeError."""
    parameters = {"workload": "azure_conv", "policy": "vllm"}
    parameters |= {f"server.{name}": value for name, value in group.items()}
    with pytest.raises(InputError, match=words):
        simulate_cell(parameters, np.random.SeedSequence(1))


PRODUCTS = {"grid": {"x": [1, 2]}, "base": {"y": 3}, "function": "fluidsched.sweeps.sweeping:example_cell"}


def journal_of(folder: Path, *lines: bytes) -> Path:
    """The directory of a finished sweep whose journal got these lines too, with checksums that are right."""
    sweep(PRODUCTS, folder / "sweep", format="csv")
    journal = folder / "sweep" / "journal.txt"
    sealed = (b"%08x %s\n" % (zlib.crc32(line), line) for line in lines)
    journal.write_bytes(journal.read_bytes() + b"".join(sealed))
    return folder / "sweep"


@pytest.mark.parametrize(
    "line",
    [b"done", b"done x {}", b"done -1 {}", b"done 7 {}", b"done 99999999999 {}", b"claim 0:999999999 a",
     b"claim 0 \xff", b"wish 0 {}", b"header 1 {}"],
)  # fmt: skip
def test_lines_of_a_journal_that_no_sweep_writes_are_no_records(line: bytes, tmp_path: Path) -> None:
    """Even with a checksum that is right; they used to end in errors of Python, or in loops over all they named."""
    directory = journal_of(tmp_path, line)
    assert sweep(PRODUCTS, directory, format="csv").path.read_text().endswith("0,1,done,,3\n1,2,done,,6\n")


@pytest.mark.parametrize(
    "line",
    [b"done 0 [1]", b"done 0 {", b'done 0 {"product": [1]}', b'done 0 {"product": 9223372036854775808}',
     b'done 0 {"product": "\\ud800"}', b'failed 0 {"diagnosis": 1}', b"done 0 " + b"[" * 50_000],
)  # fmt: skip
def test_a_record_that_no_table_can_hold_is_refused(line: bytes, tmp_path: Path) -> None:
    """What a cell is said to have returned must be plain values; the message names the file and the cell."""
    directory = journal_of(tmp_path, line)
    with pytest.raises(InputError, match=r"journal.txt, record of cell 0 must hold what a sweep writes"):
        sweep(PRODUCTS, directory, format="csv")


def test_a_claim_names_no_file_outside(tmp_path: Path) -> None:
    """Lock files of dead processes are removed; what a journal calls a process leads to no other file."""
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "member-").mkdir()
    victim = tmp_path / "victim.lock"
    victim.write_text("kept")
    directory = journal_of(
        tmp_path, b"claim 0:1 /../../victim", b"claim 0:1 a\0b", b"claim 0:1 " + b"a" * 300
    )
    sweep(PRODUCTS, directory, format="csv")
    assert victim.read_text() == "kept"


def enormous_cell(parameters: dict[str, Any], seed: object) -> dict[str, int]:
    """Returns what no column holds, or fails with what no file holds."""
    if parameters["x"] == 1:
        return {"atoms": 10**80}
    raise ValueError("\ud800")


def test_what_cells_return_can_be_written_down(tmp_path: Path) -> None:
    """An integer beyond 64 bits or a message that is not Unicode is a failed cell, not the end of the sweep."""
    result = sweep({"grid": {"x": [1, 2]}, "function": enormous_cell}, tmp_path / "sweep", format="csv")
    first, second = result.to_frame()["diagnosis"]
    assert "64 bits" in first
    assert second == r"ValueError: \ud800"


# No code from files, no files outside the paths given.


def test_nothing_read_is_run() -> None:
    """No eval, exec or pickle anywhere; modules are imported by the caller's or our own names."""
    importers = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                bare = isinstance(node.func, ast.Name)
                assert not (bare and name in {"eval", "exec", "compile", "__import__"}), file
                if name == "import_module":
                    importers.add(file.relative_to(PACKAGE).as_posix())
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "marshal", "shelve", "dill"} & set(names), file
    assert importers == {"__init__.py", "sweeps/spec.py", "reporting/installation.py"}


@pytest.mark.parametrize("name", ["../escaped", "a/b", "/etc/x", "..", "con\x00"])
def test_table_names_make_no_paths(name: str, tmp_path: Path) -> None:
    """A plan's files lie in its directory, whatever a table is called: such names are refused."""
    table = fs.baselines.vllm().to_dict() | {"name": name}
    with pytest.raises(InputError, match="name"):
        fs.PolicyTable.from_dict(table)


@pytest.mark.parametrize("command", ["solve", "simulate", pytest.param("plan", marks=pytest.mark.slow)])
def test_names_of_types_and_servers_lead_to_no_other_files(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a workload's types, the workload and the server are called, a command writes where it was told to."""
    names = ("../../escaped", str(tmp_path / "absolute"), "a/b", "..\\c", "-o", "%s{0}$HOME")
    types = [{"name": name, "arrival_rate": 0.3, "prompt_tokens": 60, "output_tokens": 40} for name in names]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "mix.json").write_text(_files.dumps({"name": "../mix", "types": types}))
    server = SERVER.to_dict() | {"name": "../../server"}
    (tmp_path / "in" / "server.json").write_text(_files.dumps(server))
    monkeypatch.chdir(tmp_path / "in")
    options = {
        "plan": ["--replications", "2", "--horizon", "30", "--warmup", "5", "--no-curve"],
        "solve": ["--export", str(tmp_path / "out" / "program.lp")],
        "simulate": [
            "vllm",
            "--horizon",
            "30",
            "--replications",
            "2",
            "--records",
            str(tmp_path / "out" / "r.csv"),
        ],
    }
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "here"
    asked = [
        command,
        *options[command],
        "-w",
        "mix.json",
        "--server",
        "server.json",
        "--quiet",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, (done.output, done.exception)
    written = {file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*")}
    assert written == {"in", "out"}
    assert {file.name for file in (tmp_path / "in").iterdir()} == {"mix.json", "server.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} <= {"here", "program.lp", "r.csv"}
    assert not (tmp_path.parent / "escaped").exists()
