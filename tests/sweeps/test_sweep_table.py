"""The table of a sweep: what the csv module and pyarrow would make of all cells at once, whatever cells return."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from fluidsched.sweeps import SweepSpec, results
from fluidsched.sweeps.journal import Journal, record

RETURNED: list[dict[str, Any]] = [
    {"a": 1.5, "b": 1},
    {"a": math.nan, "b": 2, "text": "plain"},
    {"a": math.inf, "b": 2**60, "text": 'quoted "so", with\na line\r\nbreak'},
    {"b": 0.1, "a": -math.inf, "late": True},
    {"a": 1e300, "b": None, "text": "", "late": False},
    {"text": 3.0, "late": "word", "later": None},
    {},
]
"""Columns and types that only later cells have, another order, and every kind of value."""


def written(directory: Path, format: Any) -> Path:
    spec = SweepSpec(grid={"x": ["plain", 'a "b", c'], "y": list(range(len(RETURNED)))}, function="simulate")
    with Journal(directory, {"fingerprint": "f"}, len(spec), join=False, retry_failed=False) as journal:
        for cell in reversed(range(len(spec))):
            journal.claim(1)
            journal.append([record("done", cell, json.dumps(RETURNED[cell % len(RETURNED)]))])
        return results.write_result(spec, journal, directory, format)


@pytest.mark.parametrize("foreseen", [1, 2, 3, 100])
def test_csv_is_what_the_csv_module_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreseen: int
) -> None:
    """However many cells are looked at before the first is written."""
    monkeypatch.setattr(results, "FORESEEN", foreseen)
    expected = io.StringIO()
    names = ("cell", "x", "y", "status", "diagnosis", "a", "b", "text", "late", "later")
    table = csv.DictWriter(expected, names, lineterminator="\n")
    table.writeheader()
    for cell in range(2 * len(RETURNED)):
        x, y = divmod(cell, len(RETURNED))
        row = {name: None if value != value else value for name, value in RETURNED[y].items()}
        table.writerow({"cell": cell, "x": ("plain", 'a "b", c')[x], "y": y, "status": "done"} | row)
    assert written(tmp_path, "csv").read_bytes() == expected.getvalue().encode()


@pytest.mark.parametrize("foreseen", [1, 2, 3, 100])
def test_parquet_has_the_types_of_all_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreseen: int
) -> None:
    """Whole and real numbers together are real; values of several kinds are text."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra parquet")
    monkeypatch.setattr(results, "FORESEEN", foreseen)
    monkeypatch.setattr(results, "ROWS_PER_GROUP", 3)
    table = parquet.read_table(written(tmp_path, "parquet"))
    assert {field.name: str(field.type) for field in table.schema} == {
        "cell": "int64", "x": "string", "y": "int64", "status": "string", "diagnosis": "string",
        "a": "double", "b": "double", "text": "string", "late": "string", "later": "double",
    }  # fmt: skip
    columns = table.to_pydict()
    half = len(RETURNED)
    assert all(
        column[:half] == column[half:] for name, column in columns.items() if name not in ("cell", "x")
    )
    assert columns["a"][:half] == [1.5, None, math.inf, -math.inf, 1e300, None, None]
    assert columns["b"][:half] == [1.0, 2.0, 2.0**60, 0.1, None, None, None]
    assert columns["text"][:half] == [None, "plain", RETURNED[2]["text"], None, "", "3.0", None]
    assert columns["late"][:half] == [None, None, None, "True", "False", "word", None]
    assert columns["later"] == [None] * (2 * half)
