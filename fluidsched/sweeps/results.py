"""The result of a sweep as one table: a row per cell, in the order of the cells.

Columns are ``cell``, the parameters that vary, ``status`` (done or failed), ``diagnosis`` (of a failed
cell), then every value a cell returned, in the order in which the cells name them; a row lacks what its
cell did not return. The file is a function of the spec alone: two runs of one sweep write the same bytes,
whatever happened on the way.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import fluidsched
from fluidsched._display import Tabular
from fluidsched._files import dumps, whole_file, write_whole
from fluidsched.errors import InputError
from fluidsched.sweeps.journal import Journal
from fluidsched.sweeps.spec import SweepSpec

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Format", "SweepResult", "choose_format", "write_result"]

Format = Literal["auto", "parquet", "csv"]
Row: TypeAlias = dict[str, Any]

ROWS_PER_GROUP = 4096  # of a Parquet file; also how many rows are in memory at a time
FORESEEN = 256  # the columns are those of so many cells, unless a later one has others

_NUMBERS = json.JSONDecoder(parse_constant={"NaN": None, "Infinity": math.inf, "-Infinity": -math.inf}.get)
_TEXTS = json.JSONDecoder(
    parse_float=str, parse_constant={"NaN": None, "Infinity": "inf", "-Infinity": "-inf"}.get
)
"""Real numbers as the journal has them, which is how CSV has them too: `repr` of the number, found once."""


@dataclass(frozen=True, repr=False)
class SweepResult(Tabular):
    """A finished sweep: where its table lies, and how many cells it has.

    Parameters
    ----------
    spec : SweepSpec
        What was asked.
    path : Path
        The table: cells.parquet or cells.csv.
    cells, failed : int
        Cells, and how many of them ended in an error. ``to_frame().query("status == 'failed'")`` has their
        diagnoses; running the sweep again with ``retry_failed=True`` gives them another chance.
    """

    spec: SweepSpec
    path: Path
    cells: int
    failed: int

    def to_frame(self) -> pd.DataFrame:
        """Read the table: one row per cell, indexed by the cell."""
        import pandas as pd

        if self.path.suffix == ".parquet":
            return pd.read_parquet(self.path).set_index("cell")
        return pd.read_csv(self.path, index_col="cell", dtype={"status": str, "diagnosis": str})

    def __repr__(self) -> str:
        failures = f", {self.failed:,} failed" if self.failed else ""
        return f"<SweepResult {self.spec.name!r}: {self.cells:,} cells{failures}, in {self.path}>"


def choose_format(format: Format) -> Literal["parquet", "csv"]:
    """Return "parquet" or "csv"; "auto" is Parquet where the extra `parquet` is installed."""
    available = importlib.util.find_spec("pyarrow") is not None
    if format == "auto":
        return "parquet" if available else "csv"
    if format == "parquet" and not available:
        raise InputError("format", format, 'be "csv" without pyarrow', "Install fluidsched[parquet].")
    if format not in ("parquet", "csv"):
        raise InputError("format", format, 'be "auto", "parquet" or "csv"')
    return format


def _rows(spec: SweepSpec, journal: Journal, decoder: json.JSONDecoder) -> Iterator[Row]:
    for cell, done, values in journal.results(decoder):
        yield {
            "cell": cell,
            **spec.labels(cell),
            "status": "done" if done else "failed",
            "diagnosis": None if done else values["diagnosis"],
            **(values if done else {}),
        }


def _columns(rows: Iterable[Row]) -> dict[str, set[type]]:
    """Column names in order of appearance, with the types of what they hold."""
    columns: dict[str, set[type]] = {}
    last: tuple[list[str], list[type]] | None = None
    for row in rows:
        shape = list(row), list(map(type, row.values()))
        if shape == last:
            continue
        last = shape
        for name, value_type in zip(*shape, strict=True):
            types = columns.setdefault(name, {str} if name in ("status", "diagnosis") else set())
            types.update({value_type} - {type(None)})
    return columns


class _Unforeseen(Exception):
    """A row has a column, or a type of value, that the columns do not have."""


def _write_csv(path: Path, columns: dict[str, set[type]], rows: Iterator[Row]) -> None:
    names = list(columns)
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            if list(row) == names:
                values: Iterable[Any] = row.values()
            elif row.keys() <= columns.keys():
                values = map(row.get, names)
            else:
                raise _Unforeseen
            fields = [
                value if type(value) is str else "" if value is None else str(value) for value in values
            ]
            line = ",".join(fields)
            if line.count(",") >= len(names) or any(mark in line for mark in '"\r\n'):
                writer.writerow(fields)  # something to quote, which it looks for in every field
            else:
                stream.write(line + "\n")


def _write_parquet(path: Path, columns: dict[str, set[type]], rows: Iterator[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def arrow_type(types: set[type]) -> Any:
        if types <= {float, int} and types != {int}:
            return pa.float64()
        return {int: pa.int64(), bool: pa.bool_()}.get(next(iter(types))) if len(types) == 1 else pa.string()

    names = list(columns)
    schema = pa.schema([(name, arrow_type(columns[name]) or pa.string()) for name in names])
    converted = [
        str if field.type == pa.string() else float if int in columns[field.name] != {int} else None
        for field in schema
    ]

    with pq.ParquetWriter(path, schema) as writer:
        while group := list(itertools.islice(rows, ROWS_PER_GROUP)):
            for name, types in _columns(group).items():
                if name not in columns or not types <= columns[name]:
                    raise _Unforeseen
            by_column = zip(*(map(row.get, names) for row in group), strict=True)
            arrays = [
                pa.array(
                    [None if value is None else to(value) for value in values] if to else values, field.type
                )
                for values, to, field in zip(by_column, converted, schema, strict=True)
            ]
            writer.write_table(pa.table(arrays, schema=schema))


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_result(
    spec: SweepSpec, journal: Journal, directory: Path, format: Literal["parquet", "csv"]
) -> Path:
    """Write the table and the manifest of a finished sweep, each whole or not at all; return the table."""
    path = directory / f"cells.{format}"
    write, decoder = (_write_csv, _TEXTS) if format == "csv" else (_write_parquet, _NUMBERS)
    with whole_file(path) as temporary:
        rows = _rows(spec, journal, decoder)
        first = list(itertools.islice(rows, FORESEEN))
        try:
            write(temporary, _columns(first), itertools.chain(first, rows))
        except _Unforeseen:
            write(temporary, _columns(_rows(spec, journal, decoder)), _rows(spec, journal, decoder))
    manifest = {
        "schema": "fluidsched.manifest/1",
        "library": {"name": "fluidsched", "version": fluidsched.__version__},
        "inputs": {"sweep": spec.fingerprint},
        "settings": spec.to_dict(),
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}},
    }
    write_whole(directory / "manifest.json", dumps(manifest))
    return path
