"""Readers of traces in JSON: Mooncake, results of ``vllm bench serve``, ShareGPT-style lengths."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np

from fluidsched._files import loads
from fluidsched.errors import InputError
from fluidsched.workload.trace_rows import Columns, Rows, whole_number

__all__ = ["is_trace", "read_json"]

MOONCAKE = ("timestamp", "input_length", "output_length")
BLOCKS = "hash_ids"
MOONCAKE_BLOCK = 512
"""Tokens of the blocks that `BLOCKS` names."""

BENCH = ("input_lens", "output_lens", "start_times")
LENGTHS = ("prompt_tokens", "output_tokens")

_log = logging.getLogger(__name__)


def is_trace(text: str) -> bool:
    """Whether JSON text is a trace, not a description of a workload."""
    return text.lstrip().startswith("[") or '"input_length"' in text or _is_bench(text)


def _is_bench(text: str) -> bool:
    return any(f'"{name}"' in text for name in ("input_lens", "output_lens", "ttfts", "request_throughput"))


def read_json(place: str, text: str) -> Columns:
    """Columns of a JSON trace; which of the formats is seen from the first character and the keys."""
    if text.lstrip().startswith("["):
        return _lengths(place, loads(place, text, strict=False))
    if _is_bench(text):
        return _bench(place, loads(place, text, strict=False))
    return _mooncake(place, text)


def _mooncake(place: str, text: str) -> Columns:
    """One object per line, times in milliseconds."""
    cells: list[tuple[Any, ...]] = []
    blocks: list[Any] = []
    for line, row in enumerate(text.rstrip().split("\n"), start=1):
        try:
            record = json.loads(row)
            cells.append(tuple(record[name] for name in MOONCAKE))
            blocks.append(record.get(BLOCKS))
        except json.JSONDecodeError as error:
            raise InputError(f"{place}, line {line}", error.msg, "be one JSON object per line") from None
        except (KeyError, TypeError, RecursionError, ValueError):
            raise InputError(
                f"{place}, line {line}", repr(row[:120]), f"be a JSON object with {', '.join(MOONCAKE)}"
            ) from None
    rows = Rows(place, "line", range(1, len(cells) + 1))
    times, prompts, outputs = zip(*cells, strict=True)
    _refuse_text(rows, "timestamp", times, "milliseconds")
    columns: Columns = {
        "arrival_s": rows.times("timestamp", times, "milliseconds") / 1000,
        "prompt_tokens": rows.tokens("input_length", prompts, whole_number),
        "output_tokens": rows.tokens("output_length", outputs, whole_number),
    }
    if any(ids is not None for ids in blocks):
        columns[BLOCKS] = np.empty(len(blocks), dtype=object)
        columns[BLOCKS][:] = blocks
    return columns


def _bench(place: str, result: Any) -> Columns:
    """A result with details: one array per column; times from the clock of the client, 0 = first request."""
    missing = [name for name in BENCH if result.get(name) is None]
    if missing:
        raise InputError(
            place,
            f"a vLLM bench result without {missing[0]}",
            f"hold {', '.join(BENCH)}",
            "Run vllm bench serve with --save-result --save-detailed.",
        )
    lists = {name: result[name] for name in (*BENCH, "errors") if result.get(name) is not None}
    for name, column in lists.items():
        if not isinstance(column, list):
            raise InputError(f"{place}, {name}", column, "be a list")
    if len({len(column) for column in lists.values()}) > 1:
        sizes = ", ".join(f"{len(column)} {name}" for name, column in lists.items())
        raise InputError(place, sizes, "hold one entry per request in each list")
    prompts, outputs, starts = (result[name] for name in BENCH)
    if not prompts:
        raise InputError(place, "a result without requests", "hold at least one request")
    errors = lists.get("errors", [""] * len(prompts))
    rows = Rows(place, "record", range(1, len(prompts) + 1))
    kept = rows.answered([0 if error else output for output, error in zip(outputs, errors, strict=True)])
    rows = rows.at(kept)
    prompts, outputs, starts = ([column[i] for i in kept] for column in (prompts, outputs, starts))
    _refuse_text(rows, "start_times", starts, "seconds")
    times = rows.times("start_times", starts)
    return {
        "arrival_s": times - times.min(),
        "prompt_tokens": rows.tokens("input_lens", prompts, whole_number),
        "output_tokens": rows.tokens("output_lens", outputs, whole_number),
    }


def _lengths(place: str, records: list[Any]) -> Columns:
    """A list of records with token counts, without times: all requests at time 0."""
    if not records:
        raise InputError(place, "an empty list", "hold at least one record")
    rows = Rows(place, "record", range(1, len(records) + 1))
    pairs = [_pair(rows, index, record) for index, record in enumerate(records)]
    kept = [index for index, pair in enumerate(pairs) if pair is not None]
    if not kept:
        raise InputError(place, "conversations of less than two turns", "hold a prompt and its answer")
    if len(kept) < len(records):
        message = "%s: %d of %d conversations have less than two turns and are left out"
        _log.warning(message, place, len(records) - len(kept), len(records))
    prompts, outputs = zip(*(pair for pair in pairs if pair is not None), strict=True)
    rows = rows.at(kept)
    return {
        "arrival_s": np.zeros(len(kept)),
        "prompt_tokens": rows.tokens("prompt", prompts, whole_number),
        "output_tokens": rows.tokens("output", outputs, whole_number),
    }


def _pair(rows: Rows, index: int, record: Any) -> tuple[Any, Any] | None:
    """Prompt and output length of a record; None for a conversation without an answer."""
    if isinstance(record, dict) and all(name in record for name in LENGTHS):
        if "arrival_s" in record:
            rows.refuse(
                index, "arrival_s too", "hold lengths only (a path with times comes as CSV or Parquet)"
            )
        return record["prompt_tokens"], record["output_tokens"]
    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        rows.refuse(index, repr(record)[:120], f'hold {" and ".join(LENGTHS)}, or "conversations"')
    if len(turns) < 2:
        return None
    values = [turn.get("value") for turn in turns[:2]]
    if any(isinstance(value, str) for value in values):
        raise InputError(
            f"{rows.place}, record {index + 1}",
            "text in place of lengths",
            'hold the number of tokens as "value" of each turn',
            "Count tokens with the model's tokenizer first: fluidsched has none.",
        )
    return values[0], values[1]


def _refuse_text(rows: Rows, column: str, given: Any, unit: str) -> None:
    """JSON numbers must be numbers: "1" is none."""
    for index, value in enumerate(given):
        if isinstance(value, str):
            rows.refuse(index, f"{column} {value!r}", f"be a number of {unit}, finite and at least 0")
