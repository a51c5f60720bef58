"""Damaged and malicious files: every reader refuses them by the library's own errors, naming the place.

`scripts/fuzz.py` feeds the same readers from a coverage-guided fuzzer; what it found stands here.
"""

from __future__ import annotations

import ast
import gzip
import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
from hostile_readers import HOSTILE, Reader, hostile_input, parquet_seed, readers, survives

import fluidsched as fs
from fluidsched import _files
from fluidsched._toml import read_toml
from fluidsched.errors import FluidschedError, InputError

PACKAGE = Path(fs.__file__).parent


@pytest.fixture(scope="module")
def known() -> dict[str, Reader]:
    return readers()


NAMES = (
    "trace", "workload-json", "workload-toml", "server-json", "server-toml", "table-json", "table-csv", "solution",
    "result", "sweep-toml", "points",
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
    assert damage(reader, tmp_path / f"file{reader.suffix}", 250, seed=1) > 50


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_damaged_files(known: dict[str, Reader], name: str, tmp_path: Path) -> None:
    """The same, longer."""
    reader = known[name]
    assert damage(reader, tmp_path / f"file{reader.suffix}", 8_000, seed=2) > 1_000


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    """Bytes of a Parquet trace overwritten or cut off: pyarrow's complaints come out as ours."""
    reader = Reader(fs.read_trace, ".parquet", (parquet_seed(),))
    path = tmp_path / "trace.parquet"
    assert survives(reader, path, reader.seeds[0])
    assert damage(reader, path, 250, seed=3) > 50


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
