"""Traces in: files of arrivals and lengths read as an `ArrivalPath`.

Three formats, recognised by the first line:

===================  =============================================  =========================================
format               first line                                     arrival times
===================  =============================================  =========================================
Azure LLM inference  ``TIMESTAMP,ContextTokens,GeneratedTokens``    date and time (UTC); 0 = first arrival
plain CSV            ``arrival_s,prompt_tokens,output_tokens``      seconds, kept as they are
Mooncake JSONL       ``{"timestamp": .., "input_length": .., ..}``  milliseconds, kept as they are (but in s)
===================  =============================================  =========================================

Columns may come in any order and further columns are ignored, but for ``predicted_output_tokens`` and
``type`` (a label) of the plain form, which `ArrivalPath.to_csv` writes. Mooncake's ``hash_ids`` are ignored.
Lines may end with LF or CRLF; empty lines at the end are ignored.

Rows are sorted by arrival time; rows of equal time keep the order of the file. Every request needs at least
one prompt and one output token (so have all rows of the published Azure 2023 and Mooncake files): a row with
zero tokens is an error like any other bad row, because leaving it out would change the rate unseen.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fluidsched._files import read_text
from fluidsched.errors import InputError
from fluidsched.workload.lengths import MAX_TOKENS, FloatArray, IntArray
from fluidsched.workload.path import ArrivalPath

__all__ = ["read_trace"]

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
PLAIN = ("arrival_s", "prompt_tokens", "output_tokens")
MOONCAKE = ("timestamp", "input_length", "output_length")

_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:Z|\+00:00)?", re.ASCII)


def read_trace(path: str | os.PathLike[str]) -> ArrivalPath:
    """Read a trace file as a path to replay, or to turn into a workload.

    Parameters
    ----------
    path : path of the file
        Azure LLM inference CSV, plain ``arrival_s,prompt_tokens,output_tokens`` CSV, or Mooncake JSONL;
        recognised by its first line. See `fluidsched.workload.traces` for the rules.

    Returns
    -------
    ArrivalPath
        Named after the file, with no horizon. Time 0 is the first arrival of an Azure trace, and the file's
        own zero of the others.

    Raises
    ------
    InputError
        No such file, an empty one, an unknown first line, no rows, or a bad row (named by its line number).

    Notes
    -----
    The public traces: Azure LLM inference 2023, CC-BY-4.0, Patel et al., *Splitwise*, ISCA 2024; Mooncake,
    Apache-2.0, Qin et al., *Mooncake*, FAST 2025.
    """
    text = read_text("path", path)
    place = str(path)
    first = text.partition("\n")[0].strip()
    if not text.strip():
        raise InputError(place, "an empty file", "hold a header and at least one request")
    if first.startswith("{"):
        columns = _mooncake(place, text)
    else:
        columns = _csv(place, text, first)
    order = np.argsort(columns["arrival_s"], kind="stable")
    names: tuple[str, ...] = ()
    if "type" in columns:
        labels = columns["type"].tolist()
        names = tuple(dict.fromkeys(labels))
        index = {name: i for i, name in enumerate(names)}
        columns["type"] = np.array([index[label] for label in labels])
    sorted_columns: dict[str, Any] = {name: column[order] for name, column in columns.items()}
    return ArrivalPath(**sorted_columns, type_names=names, name=Path(path).stem)


def _csv(place: str, text: str, first: str) -> dict[str, np.ndarray[Any, Any]]:
    header = [name.strip() for name in first.split(",")]
    required = next((names for names in (AZURE, PLAIN) if set(names) <= set(header)), None)
    if required is None:
        raise InputError(
            f"{place}, line 1",
            repr(first[:120]) if first else "an empty line",
            f"be the header {','.join(AZURE)} or {','.join(PLAIN)}, or JSON with {', '.join(MOONCAKE)}",
            "Rename the columns, or build the path with ArrivalPath.from_arrays.",
        )
    repeated = [name for name in header if header.count(name) > 1]
    if repeated:
        raise InputError(f"{place}, line 1", f"column {repeated[0]!r} twice", "name each column once")
    rows, lines = _rows(place, text, len(header))
    by_name = dict(zip(header, zip(*rows, strict=True), strict=True))
    time, prompt, output = required
    parse_times = _azure_times if required == AZURE else _plain_times
    columns: dict[str, np.ndarray[Any, Any]] = {
        "arrival_s": parse_times(place, time, by_name[time], lines),
        "prompt_tokens": _tokens(place, prompt, by_name[prompt], lines),
        "output_tokens": _tokens(place, output, by_name[output], lines),
    }
    for name in ("predicted_output_tokens", "predicted_output_minimum"):
        if required == PLAIN and name in by_name:
            columns[name] = _tokens(place, name, by_name[name], lines)
    if required == PLAIN and "type" in by_name:
        labels = by_name["type"]
        if not all(labels):
            _refuse(place, lines[labels.index("")], "type", "", "be a label")
        columns["type"] = np.array(labels, dtype=object)
    return columns


def _rows(place: str, text: str, width: int) -> tuple[list[list[str]], list[int]]:
    """The rows after the header with their line numbers; empty lines at the end are dropped."""
    reader = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), strict=True)
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        next(reader)
        for row in reader:
            if len(row) != width:
                shown = f"{len(row)} columns" if row else "an empty line"
                raise InputError(
                    f"{place}, line {reader.line_num}", shown, f"have {width} columns like the header"
                )
            rows.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"{place}, line {reader.line_num}", str(error), "be valid CSV") from None
    if not rows:
        raise InputError(place, "a header without rows", "hold at least one request")
    return rows, lines


def _refuse(place: str, line: int, column: str, text: str, required: str) -> NoReturn:
    raise InputError(f"{place}, line {line}", f"{column} {text!r}", required, "Correct or remove the row.")


def _tokens(place: str, column: str, texts: Sequence[str], lines: Sequence[int]) -> IntArray:
    """Whole numbers of at least 1; the error names the first bad line."""

    def count(text: str) -> int:
        digits = text.strip()
        whole = digits.removesuffix(".0")
        return int(whole) if whole.isascii() and whole.isdigit() else 0

    return _checked(place, column, texts, lines, count)


def _checked(
    place: str, column: str, given: Sequence[Any], lines: Sequence[int], count: Callable[[Any], int]
) -> IntArray:
    values = [count(value) for value in given]
    if min(values) < 1 or max(values) > MAX_TOKENS:
        index = next(i for i, value in enumerate(values) if not 1 <= value <= MAX_TOKENS)
        _refuse(
            place, lines[index], column, given[index], f"be a whole number of tokens in 1..{MAX_TOKENS:,}"
        )
    return np.array(values, dtype=np.int64)


def _plain_times(place: str, column: str, texts: Sequence[str], lines: Sequence[int]) -> FloatArray:
    times = np.empty(len(texts))
    for index, text in enumerate(texts):
        try:
            times[index] = float(text)
        except ValueError:
            times[index] = np.nan
    bad = ~(np.isfinite(times) & (times >= 0))
    if bad.any():
        index = int(np.argmax(bad))
        _refuse(place, lines[index], column, texts[index], "be a number of seconds, finite and at least 0")
    return times


def _azure_times(place: str, column: str, texts: Sequence[str], lines: Sequence[int]) -> FloatArray:
    """Seconds since the earliest time stamp, from differences in whole nanoseconds."""
    stamps: list[str] = []
    for text, line in zip(texts, lines, strict=True):
        match = _TIMESTAMP.fullmatch(text.strip())
        if match is None:
            _refuse(place, line, column, text, "be a UTC time like 2023-11-16 18:15:46.6805900")
        stamps.append(f"{match[1]}T{match[2]}")
    try:
        times = np.array(stamps, dtype="datetime64[ns]")
    except ValueError:  # no such day or hour: find it
        for stamp, line in zip(stamps, lines, strict=True):
            try:
                np.datetime64(stamp, "ns")
            except ValueError:
                _refuse(place, line, column, stamp, "be a time that exists")
        raise
    nanoseconds = times.astype(np.int64)
    seconds: FloatArray = (nanoseconds - nanoseconds.min()) / 1e9
    return seconds


def _mooncake(place: str, text: str) -> dict[str, np.ndarray[Any, Any]]:
    rows: list[tuple[Any, ...]] = []
    lines: list[int] = []
    for line, row in enumerate(text.rstrip().split("\n"), start=1):
        try:
            record = json.loads(row)
            rows.append(tuple(record[name] for name in MOONCAKE))
        except json.JSONDecodeError as error:
            raise InputError(f"{place}, line {line}", error.msg, "be one JSON object per line") from None
        except (KeyError, TypeError):
            raise InputError(
                f"{place}, line {line}", repr(row[:120]), f"be a JSON object with {', '.join(MOONCAKE)}"
            ) from None
        lines.append(line)
    times, prompts, outputs = zip(*rows, strict=True)

    def count(value: Any) -> int:
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    for time, line in zip(times, lines, strict=True):
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not 0 <= time < np.inf:
            _refuse(place, line, "timestamp", time, "be a number of milliseconds, finite and at least 0")
    return {
        "arrival_s": np.array(times, dtype=np.float64) / 1000,
        "prompt_tokens": _checked(place, "input_length", prompts, lines, count),
        "output_tokens": _checked(place, "output_length", outputs, lines, count),
    }
