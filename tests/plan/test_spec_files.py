"""Errors in people's TOML files name the file, the line and the key; what is right is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluidsched._toml import locating, read_toml
from fluidsched.cli import app
from fluidsched.errors import InputError
from fluidsched.server import Server
from fluidsched.sweeps import SweepSpec
from fluidsched.workload import Workload, arrivals, lengths

WORKLOAD = """# what is asked
[[types]]
name = "chat"
arrival_rate = 3.0
prompt_tokens = { law = "lognormal", mean = 600, cv = 1.0, maximum = 8192 }
output_tokens = { law = "geometric", mean = 200, maximum = 2048 }

[[types]]
name = "classify"
arrival_rate = 5.0
prompt_tokens = 1500
output_tokens = { law = "uniform", lo = 1, hi = 8 }
arrivals = { process = "renewal", cv = 2.0 }
"""

SERVER = """kv_capacity = 100_000
max_batch_size = 256
[[iteration_time.pieces]]
base = 0.010
per_prefill_token = 1.2e-5
per_decode_token = 1.2e-5
per_kv_token = 3.3e-7
per_prefill_attention = 3.0e-9
"""

SWEEP = """base.workload = "azure_conv"
base.server = { gpu = "a100-80gb", model = "llama-2-7b" }
base.horizon = 60

[grid]
policy = ["vllm"]
workload.load = [
    0.6,
    0.8,
]
"""


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        app(list(arguments))
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("arrival_rate = 5.0", "arrival_rate = -5.0", 10, ("arrival_rate", "-5.0")),
        ("arrival_rate = 5.0", "arrival_rte = 5.0", 10, ("types[1].arrival_rte", "arrival_rate")),
        ("arrival_rate = 5.0", "arrival_rate =", 10, ("TOML",)),
        ("lo = 1", "low = 1", 12, ("types[1].output_tokens.low", "'lo'")),
        ("cv = 2.0", "cvv = 2.0", 13, ("types[1].arrivals.cvv", "'cv'")),
        ('name = "classify"\n', "", 8, ("types[1].name",)),
        ("maximum = 2048", "maximum = 0", 6, ("maximum", "0")),
    ],
)
def test_a_wrong_workload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, line: int, words: tuple[str, ...]
) -> None:
    assert old in WORKLOAD
    (tmp_path / "mix.toml").write_text(WORKLOAD.replace(old, new))
    said = refused(capsys, "solve", "-w", str(tmp_path / "mix.toml"))
    for word in (f"mix.toml, line {line}", *words):
        assert word in said


@pytest.mark.parametrize(
    ("old", "new", "line", "word"),
    [
        ("max_batch_size = 256", "max_batch_size = 0", 2, "max_batch_size"),
        ("max_batch_size", "max_batch_sz", 2, "'max_batch_size'"),
        ("per_kv_token = 3.3e-7", "per_kv_token = -3.3e-7", 7, "per_kv_token"),
        ("kv_capacity = 100_000", "kv_capacity = true", 1, "kv_capacity"),
    ],
)
def test_a_wrong_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, line: int, word: str
) -> None:
    (tmp_path / "mine.toml").write_text(SERVER.replace(old, new))
    said = refused(capsys, "solve", "--server", str(tmp_path / "mine.toml"))
    assert f"mine.toml, line {line}" in said
    assert word in said


@pytest.mark.parametrize(
    ("old", "new", "line", "word"),
    [
        ("[grid]", "[grids]", 5, "spec.grids"),
        ("    0.6,\n    0.8,\n", "", 7, "grid.workload.load"),
        ("base.horizon = 60", "base.horizon = 60\nseed = -1", 4, "seed"),
        ('policy = ["vllm"]', 'policy = ["vllm"', 7, "TOML"),
    ],
)
def test_a_wrong_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, line: int, word: str
) -> None:
    """Also of a key whose value runs over several lines: the line it begins on."""
    assert old in SWEEP
    (tmp_path / "loads.toml").write_text(SWEEP.replace(old, new))
    said = refused(capsys, "sweep", str(tmp_path / "loads.toml"), "--out", str(tmp_path / "out"))
    assert f"loads.toml, line {line}" in said
    assert word in said
    assert not (tmp_path / "out").exists()


@given(st.lists(st.sampled_from(["", "# note", "\t", "x = 1  # one"]), max_size=6), st.integers(0, 3))
def test_the_line_is_that_of_the_key_whatever_stands_around_it(before: list[str], tables: int) -> None:
    """Comments, blank lines, other keys and tables before it: the error names the line `wanted` stands on."""
    import tempfile

    lines = [text if "x = 1" not in text else f"x{k} = 1" for k, text in enumerate(before)]
    lines += [f"[[rows]]\nvalue = {k}" for k in range(tables)]
    lines += ["[last]", 'wanted = """', "two", 'lines"""']
    text = "\n".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.toml"
        path.write_text(text)
        document = read_toml("spec", path)
        with pytest.raises(InputError) as caught, locating(path):
            raise InputError("last.wanted", document["last"]["wanted"], "be one line")
    expected = text[: text.index("wanted")].count("\n") + 1
    assert caught.value.argument == f"{path}, line {expected}: last.wanted"


def test_of_equal_keys_the_one_with_the_value_at_fault_is_named(tmp_path: Path) -> None:
    """The library names a coefficient, not the piece it stands in."""
    path = tmp_path / "mine.toml"
    path.write_text("[[pieces]]\nbase = 1\n\n[[pieces]]\nbase = -2\n")
    with pytest.raises(InputError, match="line 5: base"), locating(path):
        raise InputError("base", -2, "be positive")


def test_right_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "loads.toml").write_text(SWEEP)
    assert len(SweepSpec.from_toml(tmp_path / "loads.toml")) == 2
    (tmp_path / "mix.toml").write_text(WORKLOAD)
    (tmp_path / "mine.toml").write_text(SERVER)
    with pytest.raises(SystemExit) as left:
        app(["solve", "-w", str(tmp_path / "mix.toml"), "--server", str(tmp_path / "mine.toml"), "--quiet"])
    assert left.value.code == 0


def _known(said: str) -> set[str]:
    """Field names that an error about an unknown field lists."""
    return set(re.findall(r"\w+", said[said.index("Known are ") + len("Known are ") :]))


def test_every_field_that_is_read_is_documented(tmp_path: Path) -> None:
    """The readers' own lists of fields, from their errors, against the page of fields."""
    page = (Path(__file__).parents[2] / "docs" / "howto" / "spec_files.md").read_text(encoding="utf-8")
    sections = page.split("\n## ")
    workload, server, sweep = (
        next(text for text in sections if text.startswith(f"{name}, "))
        for name in ("Workload", "Server", "Sweep")
    )
    one = {"name": "a", "arrival_rate": 1.0, "prompt_tokens": 5, "output_tokens": 5}
    schema = {"schema": "fluidsched.workload/1"}
    wrong: list[tuple[str, Callable[[], object]]] = [
        (workload, lambda: Workload.from_dict({**schema, "name": "w", "types": [one], "qqqq": 1})),
        (workload, lambda: Workload.from_dict({**schema, "name": "w", "types": [{**one, "qqqq": 1}]})),
        (server, lambda: Server.from_dict({"schema": "fluidsched.server/1", "qqqq": 1})),
    ]
    for text, read in wrong:
        with pytest.raises(InputError) as caught:
            read()
        fields = _known(str(caught.value))
        assert len(fields) >= 4
        assert all(f"`{field}`" in text for field in fields), fields
    with pytest.raises(InputError) as caught:
        SweepSpec.from_dict({"qqqq": 1})
    for field in SweepSpec.__dataclass_fields__:
        assert f"`{field}`" in sweep or field == "folder"
    for makers in (lengths._MAKERS, arrivals._MAKERS):
        for kind, (_, required, optional) in makers.items():
            (line,) = re.findall(rf"^\| `{kind}` \| (.*) \|$", workload, flags=re.MULTILINE)
            assert set(re.findall(r"`(\w+)`", line)) == {*required, *optional}, kind
