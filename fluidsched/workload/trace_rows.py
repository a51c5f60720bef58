"""Rows of a trace file: where each stands, what it must hold, which are left out.

Shared by the readers of `fluidsched.workload.traces`. A bad row is an `InputError` that names the file and the row
in the file's own unit (line, record, row), counted from 1.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from fluidsched.errors import InputError
from fluidsched.workload.lengths import MAX_TOKENS, FloatArray, IntArray

__all__ = ["Cells", "Columns", "Rows", "whole_number"]

Columns = dict[str, np.ndarray[Any, Any]]
"""Columns of a path by name, rows in the order of the file; "type" holds labels."""

Cells = Sequence[Any] | np.ndarray[Any, Any]
"""What a file holds in one column."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Where the rows of a file stand.

    Parameters
    ----------
    place : str
        The file.
    unit : str
        "line", "record" or "row".
    numbers : sequence of int
        Number of each row kept.
    """

    place: str
    unit: str
    numbers: Sequence[int]

    def refuse(self, index: int, received: str, required: str) -> NoReturn:
        """Raise the error of the row at `index`."""
        remedy = f"Correct or remove the {'row' if self.unit == 'line' else self.unit}."
        raise InputError(f"{self.place}, {self.unit} {self.numbers[index]}", received, required, remedy)

    def tokens(self, column: str, given: Cells, count: Callable[[Any], int], minimum: int = 1) -> IntArray:
        """Whole numbers from `minimum` on; `count` turns a cell into one, -1 if none. (Arrays of numbers: at once.)"""
        if isinstance(given, np.ndarray) and given.dtype != object:
            if np.all((given >= minimum) & (given <= MAX_TOKENS) & (given == np.floor(given))):
                return given.astype(np.int64)
            given = given.tolist()
        values = [count(value) for value in given]
        if min(values) < minimum or max(values) > MAX_TOKENS:
            index = next(i for i, value in enumerate(values) if not minimum <= value <= MAX_TOKENS)
            required = f"be a whole number of tokens in {minimum}..{MAX_TOKENS:,}"
            self.refuse(index, f"{column} {given[index]!r}", required)
        return np.array(values, dtype=np.int64)

    def times(
        self, column: str, given: Cells, unit: str = "seconds", *, allow_inf: bool = False
    ) -> FloatArray:
        """Finite (or, if allowed, infinite) numbers of at least 0, from numbers or text, in the unit they have."""
        numbers = isinstance(given, np.ndarray) and given.dtype != object
        times = np.array(given, dtype=np.float64) if numbers else np.empty(len(given))
        for index, value in enumerate(() if numbers else given):
            try:
                times[index] = np.nan if isinstance(value, bool) or "_" in str(value) else float(value)
            except (TypeError, ValueError, OverflowError):
                times[index] = np.nan
        bad = ~(times >= 0) if allow_inf else ~(np.isfinite(times) & (times >= 0))
        if bad.any():
            index = int(np.argmax(bad))
            shown = times[index].item() if numbers else given[index]
            sort = "at least 0 or inf" if allow_inf else "finite and at least 0"
            self.refuse(index, f"{column} {shown!r}", f"be a number of {unit}, {sort}")
        return times

    def labels(self, column: str, given: Cells) -> np.ndarray[Any, Any]:
        """Non-empty strings."""
        for index, label in enumerate(given):
            if not isinstance(label, str) or not label:
                self.refuse(index, f"{column} {label!r}", "be a label")
        return np.array(given, dtype=object)

    def answered(self, outputs: Sequence[Any]) -> list[int]:
        """Indices of the rows whose output is not 0; the others, requests that failed, are left out and logged."""
        kept = [i for i, output in enumerate(outputs) if str(output).strip() not in ("0", "0.0")]
        if not kept:
            raise InputError(self.place, "only requests that failed", "hold a request with an answer")
        if len(kept) < len(outputs):
            message = "%s: %d of %d requests failed (no output) and are left out"
            _log.warning(message, self.place, len(outputs) - len(kept), len(outputs))
        return kept

    def at(self, kept: Sequence[int]) -> Rows:
        """The rows at these indices."""
        return Rows(self.place, self.unit, [self.numbers[i] for i in kept])


def whole_number(value: Any) -> int:
    """The value if it is a whole number (of any numeric type but bool), else -1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        return -1
    return int(value) if abs(value) <= MAX_TOKENS else -1
