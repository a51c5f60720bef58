"""Traces in: files of arrivals and lengths read as an `ArrivalPath`.

The format is recognised by the first bytes of the file:

====================  ===================================================  =====================================
format                recognised by                                        arrival times
====================  ===================================================  =====================================
plain CSV             ``arrival_s,prompt_tokens,output_tokens``            seconds, kept as they are
plain Parquet         the bytes ``PAR1``; columns as in the plain CSV      seconds, kept as they are
Azure LLM inference   ``TIMESTAMP,ContextTokens,GeneratedTokens``          date and time (UTC); 0 = first arrival
BurstGPT CSV          ``Timestamp,Request tokens,Response tokens``         seconds, kept as they are
Mooncake JSONL        ``{"timestamp": .., "input_length": .., ..}``        milliseconds, kept as they are (in s)
vLLM bench JSON       ``{.. "input_lens": [..] ..}``                       seconds; 0 = first request
ShareGPT-style JSON   ``[{"conversations": [..]}, ..]``, or                none: all requests at time 0
                      ``[{"prompt_tokens": .., "output_tokens": ..}, ..]``
====================  ===================================================  =====================================

Columns may come in any order and further columns are ignored, but for ``predicted_output_tokens``,
``predicted_output_minimum``, ``cached_prompt_tokens`` (0 or more), ``patience_s``, ``abort_after_s`` (seconds from
the arrival; inf: for ever) and ``type`` (a label) of the plain forms, which `ArrivalPath.to_csv` and `to_parquet`
write, and BurstGPT's ``Model``, which becomes the label. Mooncake's ``hash_ids`` name blocks of 512 tokens, of which
`read_trace(..., prefix_cache_tokens=…)` makes ``cached_prompt_tokens`` (`fluidsched.workload.prefix_cache`); otherwise
they are ignored. Lines may end with LF or CRLF; empty lines at the end are ignored.

Rows are sorted by arrival time; rows of equal time keep the order of the file. Every request needs at least
one prompt and one output token (so have all rows of the published Azure 2023 and Mooncake files): a row with
zero tokens is an error like any other bad row, because leaving it out would change the rate unseen. Two formats
*define* zero output tokens as a request that failed, BurstGPT and vLLM's results: those requests are left out, and
their number goes to the log as a warning.

ShareGPT-style lengths: one request per conversation, its first turn the prompt and its second the answer, as
``vllm bench`` takes them, where ``"value"`` is the *number of tokens* of the turn (text needs the model's
tokenizer, and is refused). Conversations of fewer than two turns are left out, with a warning. Such a path has
lengths but no rate: use it all at once, or build a type with ``lengths.joint(path.prompt_tokens,
path.output_tokens)`` and the rate you want.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fluidsched._files import read_text
from fluidsched.errors import InputError
from fluidsched.workload.lengths import FloatArray
from fluidsched.workload.path import LEAST_TOKENS, STAY_COLUMNS, TOKEN_COLUMNS, ArrivalPath
from fluidsched.workload.prefix_cache import PromptBlocks, lru_cached_tokens
from fluidsched.workload.trace_json import BLOCKS, MOONCAKE_BLOCK, is_trace, read_json
from fluidsched.workload.trace_parquet import MAGIC, read_parquet
from fluidsched.workload.trace_rows import Columns, Rows

__all__ = ["is_json_trace", "read_trace"]

_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d(?:\.\d{1,9})?)(?:Z|\+00:00)?", re.ASCII)


def read_trace(
    path: str | os.PathLike[str], *, prefix_cache_tokens: float | Literal["shared"] | None = None
) -> ArrivalPath:
    """Read a trace file as a path to replay, or to turn into a workload.

    Parameters
    ----------
    path : path of the file
        Azure LLM inference CSV, BurstGPT CSV, plain ``arrival_s,prompt_tokens,output_tokens`` CSV or Parquet,
        Mooncake JSONL, vLLM bench JSON, or ShareGPT-style JSON lengths; recognised by its beginning. See
        `fluidsched.workload.traces` for the rules.
    prefix_cache_tokens : float or "shared", optional
        Size of a prefix cache of its own, tokens, possibly infinite: of a Mooncake trace with ``hash_ids`` the path
        then says how much of every prompt it holds; see `fluidsched.workload.prefix_cache`. "shared": the path names
        the blocks (`ArrivalPath.prompt_blocks`), and they are kept in the memory that the residents leave free, from
        when a run has computed them. None: nothing is cached.

    Returns
    -------
    ArrivalPath
        Named after the file, with no horizon. Time 0 is the first arrival of an Azure trace or a vLLM result, and
        the file's own zero of the others.

    Raises
    ------
    InputError
        No such file, an empty one, an unknown beginning, no rows, or a bad row (named by its number); a cache's size
        for a trace that does not name its blocks.

    Notes
    -----
    The public traces: Azure LLM inference 2023, CC-BY-4.0, Patel et al., *Splitwise*, ISCA 2024; Mooncake,
    Apache-2.0, Qin et al., *Mooncake*, FAST 2025; BurstGPT, CC-BY-4.0, Wang et al., arXiv 2401.17644.
    """
    place = str(path)
    columns = (
        read_parquet(place, path) if _is_parquet(path) else _text_columns(place, read_text("path", path))
    )
    order = np.argsort(columns["arrival_s"], kind="stable")
    blocks = columns.pop(BLOCKS, None)
    named = None
    if prefix_cache_tokens is not None:
        if blocks is None:
            raise InputError(
                "prefix_cache_tokens",
                prefix_cache_tokens,
                f"be left out: {place} does not name the blocks of its prompts",
                "Give a path cached_prompt_tokens, or types a cached_prefix_fraction.",
            )
        for i, (ids, prompt) in enumerate(zip(blocks, columns["prompt_tokens"].tolist(), strict=True)):
            numbers = isinstance(ids, list) and all(type(block) is int for block in ids)
            if not numbers or len(ids) < prompt // MOONCAKE_BLOCK:
                raise InputError(
                    f"{place}, line {i + 1}",
                    f"{BLOCKS} {str(ids)[:60]}",
                    f"name {prompt // MOONCAKE_BLOCK:,} blocks of {MOONCAKE_BLOCK} tokens by whole numbers",
                    "Correct the line, or leave prefix_cache_tokens out.",
                )
        chosen = [blocks[i] for i in order]
        if prefix_cache_tokens == "shared":
            named = PromptBlocks.from_lists(chosen, block_tokens=MOONCAKE_BLOCK)
        else:
            columns["cached_prompt_tokens"] = np.empty(len(order), dtype=np.int64)
            columns["cached_prompt_tokens"][order] = lru_cached_tokens(
                columns["prompt_tokens"][order],
                chosen,
                block_tokens=MOONCAKE_BLOCK,
                cache_tokens=prefix_cache_tokens,
            )
    names: tuple[str, ...] = ()
    if "type" in columns:
        labels = columns["type"].tolist()
        names = tuple(dict.fromkeys(labels))
        index = {name: i for i, name in enumerate(names)}
        columns["type"] = np.array([index[label] for label in labels])
    sorted_columns: dict[str, Any] = {name: column[order] for name, column in columns.items()}
    return ArrivalPath(**sorted_columns, type_names=names, name=Path(path).stem, prompt_blocks=named)


def is_json_trace(path: str | os.PathLike[str]) -> bool:
    """Whether a JSON file is a trace for `read_trace`, not a workload for `Workload.from_json`."""
    return is_trace(read_text("path", path))


def _is_parquet(path: str | os.PathLike[str]) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):  # missing or unreadable: reading it as text says so
        return False


def _text_columns(place: str, text: str) -> Columns:
    if not text.strip():
        raise InputError(place, "an empty file", "hold a header and at least one request")
    if text.partition("\n")[0].lstrip()[:1] in ("{", "["):
        return read_json(place, text)
    return _csv(place, text)


def _azure_times(rows: Rows, column: str, texts: Sequence[str]) -> FloatArray:
    """Seconds since the earliest time stamp, from differences in whole nanoseconds."""
    stamps: list[str] = []
    for index, text in enumerate(texts):
        match = _TIMESTAMP.fullmatch(text.strip())
        if match is None:
            rows.refuse(index, f"{column} {text!r}", "be a UTC time like 2023-11-16 18:15:46.6805900")
        stamps.append(f"{match[1]}T{match[2]}")
    try:
        times = np.array(stamps, dtype="datetime64[ns]")
    except ValueError:  # no such day or hour: find it
        for index, stamp in enumerate(stamps):
            try:
                np.datetime64(stamp, "ns")
            except ValueError:
                rows.refuse(index, f"{column} {stamp!r}", "be a time that exists")
        raise
    nanoseconds = times.astype(np.int64)
    seconds: FloatArray = (nanoseconds - nanoseconds.min()) / 1e9
    return seconds


def _seconds(rows: Rows, column: str, texts: Sequence[str]) -> FloatArray:
    return rows.times(column, texts)


@dataclass(frozen=True)
class _Format:
    """A CSV format: its columns, how its times are read, whether an output of 0 is a request that failed."""

    time: str
    prompt: str
    output: str
    times: Callable[[Rows, str, Sequence[str]], FloatArray] = _seconds
    label: str | None = None
    optional: tuple[str, ...] = ()
    has_failures: bool = False

    @property
    def required(self) -> tuple[str, str, str]:
        return self.time, self.prompt, self.output


_FORMATS = (
    _Format("TIMESTAMP", "ContextTokens", "GeneratedTokens", _azure_times),
    _Format(
        "arrival_s",
        "prompt_tokens",
        "output_tokens",
        label="type",
        optional=(*TOKEN_COLUMNS[2:], *STAY_COLUMNS),
    ),
    _Format("Timestamp", "Request tokens", "Response tokens", label="Model", has_failures=True),
)


def _csv(place: str, text: str) -> Columns:
    first = text.partition("\n")[0].strip()
    header = [name.strip() for name in first.split(",")]
    known = next((f for f in _FORMATS if set(f.required) <= set(header)), None)
    if known is None:
        headers = ", or ".join(",".join(f.required) for f in _FORMATS)
        raise InputError(
            f"{place}, line 1",
            repr(first[:120]) if first else "an empty line",
            f"be the header {headers}, or JSON",
            "Rename the columns, or build the path with ArrivalPath.from_arrays.",
        )
    repeated = [name for name in header if header.count(name) > 1]
    if repeated:
        raise InputError(f"{place}, line 1", f"column {repeated[0]!r} twice", "name each column once")
    cells, rows = _cells(place, text, len(header))
    if known.has_failures:
        output = header.index(known.output)
        kept = rows.answered([row[output] for row in cells])
        cells, rows = [cells[i] for i in kept], rows.at(kept)
    by_name = dict(zip(header, zip(*cells, strict=True), strict=True))
    columns: Columns = {
        "arrival_s": known.times(rows, known.time, by_name[known.time]),
        "prompt_tokens": rows.tokens(known.prompt, by_name[known.prompt], _count),
        "output_tokens": rows.tokens(known.output, by_name[known.output], _count),
    }
    for name in known.optional:
        if name in by_name:
            columns[name] = (
                rows.times(name, by_name[name], allow_inf=True)
                if name in STAY_COLUMNS
                else rows.tokens(name, by_name[name], _count, LEAST_TOKENS.get(name, 1))
            )
    if known.label in by_name:
        columns["type"] = rows.labels(known.label, by_name[known.label])
    return columns


def _cells(place: str, text: str, width: int) -> tuple[list[list[str]], Rows]:
    """The cells after the header and the lines they end on; empty lines at the end are dropped."""
    reader = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), strict=True)
    cells: list[list[str]] = []
    lines: list[int] = []
    try:
        next(reader)
        for row in reader:
            if len(row) != width:
                shown = f"{len(row)} columns" if row else "an empty line"
                raise InputError(
                    f"{place}, line {reader.line_num}", shown, f"have {width} columns like the header"
                )
            cells.append(row)
            lines.append(reader.line_num)
    except csv.Error as error:
        raise InputError(f"{place}, line {reader.line_num}", str(error), "be valid CSV") from None
    if not cells:
        raise InputError(place, "a header without rows", "hold at least one request")
    return cells, Rows(place, "line", lines)


def _count(text: str) -> int:
    """A whole number written with digits only (a final .0 is allowed), else -1."""
    whole = text if text.isdigit() else text.strip().removesuffix(".0")
    return int(whole) if whole.isdigit() and whole.isascii() and len(whole) < 20 else -1
