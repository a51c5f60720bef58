"""Paths as Parquet files, through pyarrow (extra `parquet`), which is imported when first needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidsched._files import whole_file
from fluidsched.errors import InputError
from fluidsched.workload.path import LEAST_TOKENS, MAX_REQUESTS, STAY_COLUMNS, TOKEN_COLUMNS
from fluidsched.workload.trace_rows import Cells, Columns, Rows, whole_number

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["MAGIC", "read_parquet", "write_parquet"]

MAGIC = b"PAR1"
"""First bytes of every Parquet file."""

REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")


def read_parquet(place: str, path: str | os.PathLike[str]) -> Columns:
    """Columns of a Parquet file with the names of the plain CSV; others are ignored."""
    parquet = _pyarrow("path", place)
    from pyarrow import ArrowException, types

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in REQUIRED if name not in names]
            if missing:
                raise InputError(
                    place, f"columns {', '.join(names)}", f"hold {', '.join(REQUIRED)}", "Rename the columns."
                )
            repeated = [name for name in names if names.count(name) > 1]
            if repeated:
                raise InputError(place, f"column {repeated[0]!r} twice", "name each column once")
            wanted = [
                name for name in (*REQUIRED, *TOKEN_COLUMNS[2:], *STAY_COLUMNS, "type") if name in names
            ]
            sorts = {name: file.schema_arrow.field(name).type for name in wanted}
            nested = [name for name, sort in sorts.items() if types.is_nested(sort)]
            if nested:
                raise InputError(place, f"column {nested[0]!r} of lists", "hold one value per row")
            # strings are kept once each, however many rows repeat them
            texts = [name for name, sort in sorts.items() if types.is_string(sort) or types.is_binary(sort)]
            # a few kilobytes of repeated values may say any number
            if file.metadata.num_rows > MAX_REQUESTS:
                raise InputError(
                    place, f"{file.metadata.num_rows:,} rows", f"hold at most {MAX_REQUESTS:,} requests"
                )
        with parquet.ParquetFile(path, read_dictionary=texts) as file:
            table = file.read(columns=wanted)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(place, str(error).partition("\n")[0], "be a whole Parquet file") from None
    if table.num_rows == 0:
        raise InputError(place, "no rows", "hold at least one request")
    rows = Rows(place, "row", range(1, table.num_rows + 1))
    cells = {name: _cells(table.column(name)) for name in wanted}
    columns: Columns = {}
    for name, given in cells.items():
        if name == "type":
            columns[name] = rows.labels(name, given)
        elif name == "arrival_s" or name in STAY_COLUMNS:
            columns[name] = rows.times(name, given, allow_inf=name in STAY_COLUMNS)
        else:
            columns[name] = rows.tokens(name, given, whole_number, LEAST_TOKENS.get(name, 1))
    return columns


def _cells(column: Any) -> Cells:
    """A column as an array: of numbers, or of values kept once each (None: none); else a list."""
    from pyarrow import types

    if types.is_dictionary(column.type):
        chunks = [np.zeros(0, dtype=object)]
        for chunk in column.chunks:
            values = np.array([*chunk.dictionary.to_pylist(), None], dtype=object)
            chunks.append(values[chunk.indices.fill_null(len(values) - 1).to_numpy(zero_copy_only=False)])
        return np.concatenate(chunks)
    whole = not column.null_count and (types.is_integer(column.type) or types.is_floating(column.type))
    cells: Cells = column.to_numpy() if whole else column.to_pylist()
    return cells


def write_parquet(columns: Mapping[str, NDArray[Any]], path: str | os.PathLike[str]) -> None:
    """Write columns whole to `path`; labels as a dictionary column."""
    parquet = _pyarrow("path", str(path))
    import pyarrow

    arrays = {
        name: pyarrow.array(column.tolist(), pyarrow.string()).dictionary_encode()
        if column.dtype == np.dtype(object)
        else pyarrow.array(column)
        for name, column in columns.items()
    }
    with whole_file(path) as temporary:
        parquet.write_table(pyarrow.table(arrays), temporary)


def _pyarrow(argument: str, place: str) -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            argument,
            f"{place}, a Parquet file, where pyarrow is not installed",
            "be a CSV file without pyarrow",
            "Install fluidsched[parquet].",
        ) from None
    module: ModuleType = pyarrow.parquet
    return module
