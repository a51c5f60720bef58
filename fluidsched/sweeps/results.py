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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
ROWS_PER_GROUP = 4096  # of a Parquet file; also how many rows are in memory at a time


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


def _rows(spec: SweepSpec, journal: Journal) -> Iterator[dict[str, Any]]:
    for cell, done, values in journal.results():
        yield {
            "cell": cell,
            **spec.labels(cell),
            "status": "done" if done else "failed",
            "diagnosis": None if done else values["diagnosis"],
            **(values if done else {}),
        }


def _columns(rows: Iterator[dict[str, Any]]) -> dict[str, set[type]]:
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


def _write_csv(path: Path, columns: dict[str, set[type]], rows: Iterator[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(map(row.get, columns) for row in rows)


def _write_parquet(path: Path, columns: dict[str, set[type]], rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def arrow_type(types: set[type]) -> Any:
        if types <= {float, int} and types != {int}:
            return pa.float64()
        return {int: pa.int64(), bool: pa.bool_()}.get(next(iter(types))) if len(types) == 1 else pa.string()

    schema = pa.schema([(name, arrow_type(types) or pa.string()) for name, types in columns.items()])

    def cast(value: Any, field: Any) -> Any:
        return value if value is None or field.type != pa.string() else str(value)

    with pq.ParquetWriter(path, schema) as writer:
        while group := list(itertools.islice(rows, ROWS_PER_GROUP)):
            arrays = [
                pa.array([cast(row.get(field.name), field) for row in group], field.type) for field in schema
            ]
            writer.write_table(pa.table(arrays, schema=schema))


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_result(
    spec: SweepSpec, journal: Journal, directory: Path, format: Literal["parquet", "csv"]
) -> Path:
    """Write the table and the manifest of a finished sweep, each whole or not at all; return the table."""
    columns = _columns(_rows(spec, journal))
    path = directory / f"cells.{format}"
    with whole_file(path) as temporary:
        (_write_csv if format == "csv" else _write_parquet)(temporary, columns, _rows(spec, journal))
    manifest = {
        "schema": "fluidsched.manifest/1",
        "library": {"name": "fluidsched", "version": fluidsched.__version__},
        "inputs": {"sweep": spec.fingerprint},
        "settings": spec.to_dict(),
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}},
    }
    write_whole(directory / "manifest.json", dumps(manifest))
    return path
