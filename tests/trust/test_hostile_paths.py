"""Paths that cannot be written or read: the library's own error names each, and nothing is left behind."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fluidsched as fs
from fluidsched import cli
from fluidsched._files import make_directory, read_text, write_whole
from fluidsched.errors import InputError, SimulationError
from fluidsched.fluid import export
from fluidsched.sweeps import sweep
from fluidsched.sweeps.sweeping import example_cell

WORKLOAD = fs.Workload([fs.RequestType("chat", 1.0, 30, 20)])
SERVER = fs.Server(4000, fs.IterationTime.affine(0.02, 0.0, 0.0, 1e-6))

#: Places where no file can be written, whoever asks.
IMPOSSIBLE = {
    "too long": "a" * 300 + ".json",
    "no such folder": "missing/table.json",
    "inside a file": "a file/table.json",
    "a folder itself": "a folder",
    "no folder of files": "/proc/self/fdinfo/table.json",
}
#: Names that are odd and good.
ODD = (
    "a b\tc\n.json",
    "-x.json",
    "ü\u200b…{}%s$(x).json",
    "a" * 250 + ".json",
    ".json",
    "b" * 200 + "." + "c" * 50,
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("kept")
    (tmp_path / "a folder").mkdir()


def nothing_happened(folder: Path) -> bool:
    """Only what the fixture made is there, as it was."""
    names = sorted(path.name for path in folder.rglob("*"))
    return names == ["a file", "a folder"] and (folder / "a file").read_text() == "kept"


WRITERS: dict[str, Callable[[str], object]] = {
    "text": lambda path: write_whole(path, "text"),
    "table": lambda path: fs.baselines.vllm().to_json(path),
    "server": lambda path: SERVER.to_json(path),
    "trace": lambda path: WORKLOAD.sample(5.0, seed=1).to_csv(path),
    "parquet": lambda path: WORKLOAD.sample(5.0, seed=1).to_parquet(path),
    "program": lambda path: export.write_program(fs.FluidProgram(WORKLOAD, SERVER).model, path + ".lp"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", [*IMPOSSIBLE, "a null"])
def test_what_cannot_be_written_is_named(tmp_path: Path, writer: str, name: str) -> None:
    """An `InputError` with the path, and neither the file nor a temporary one."""
    path = IMPOSSIBLE.get(name, "a\0b")
    if writer == "program" and name == "a folder itself":
        path = "a file/x"
    with pytest.raises(InputError) as caught:
        WRITERS[writer](path)
    assert repr(path)[1:-1] in str(caught.value) or path in str(caught.value)
    assert nothing_happened(tmp_path)


@pytest.mark.parametrize("name", ODD)
def test_any_name_that_the_system_takes_is_written_and_read(tmp_path: Path, name: str) -> None:
    """Up to its 255 bytes, with blanks, line ends, signs of shells and of formats; and nothing else appears."""
    table = fs.baselines.vllm()
    table.to_json(name)
    assert fs.PolicyTable.from_json(name) == table
    assert sorted(os.listdir(tmp_path)) == sorted(["a file", "a folder", name])


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the bytes do not fit the old file stays, whole."""

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="a file must be a file that can be written; got No space left"):
        write_whole("a file", "new")
    monkeypatch.undo()
    assert nothing_happened(tmp_path)


@pytest.mark.parametrize("path", ["a" * 300, "a file/x", "a file", "a\0b", "/proc/self/fdinfo/x/y"])
def test_directories_that_cannot_be_made_are_named(tmp_path: Path, path: str) -> None:
    for parents in (False, True):
        with pytest.raises(InputError, match="place must name a directory"):
            make_directory("place", path, parents=parents)
    with pytest.raises((InputError, SimulationError)):
        sweep({"grid": {"x": [1], "y": [2]}, "function": "fluidsched.sweeps.sweeping:example_cell"}, path)
    assert example_cell.__module__ in sys.modules
    assert nothing_happened(tmp_path)


@pytest.mark.parametrize("path", ["a" * 300, "a file/x", "a folder", "a\0b", "missing", "/proc/self/mem"])
def test_what_cannot_be_read_is_named(path: str) -> None:
    with pytest.raises(InputError, match="it must name"):
        read_text("it", path)
    for read in (fs.read_trace, fs.PolicyTable.from_json, fs.Server.from_json):
        with pytest.raises(InputError):
            read(path)


ASKED = ["--workload", "azure_conv", "--gpu", "a100-80gb", "--model", "llama-2-7b"]
COMMANDS = {
    "solve": ["solve", *ASKED, "--out"],
    "program": ["solve", *ASKED, "--export"],
    "compile": ["compile", "SOLUTION", "--out"],
    "simulate": ["simulate", "vllm", *ASKED, "--load", "0.5", "--horizon", "1", "--replications", "1", "--warmup", "0",
                 "--engine", "reference", "--records"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_leave_with_status_2_where_they_cannot_write(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sentence on standard error, no traceback; with --force too."""
    solution = tmp_path_factory.mktemp("solved") / "solution.json"
    fs.solve_fluid(WORKLOAD, SERVER).to_json(solution)
    words = [str(solution) if word == "SOLUTION" else word for word in COMMANDS[command]]
    for name, path in IMPOSSIBLE.items():
        if command == "simulate" and name in ("no such folder", "a folder itself"):
            continue  # folders of records are made, or used if empty
        given = "x/" + path + ".lp" if command == "program" and name != "no folder of files" else path
        monkeypatch.setattr(sys, "argv", ["fluidsched", *words, given, "--force"])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr().err
        assert left.value.code == 2, (name, said)
        assert said.startswith("fluidsched: ")
        assert given in said
    assert nothing_happened(tmp_path)
