"""The CSV form of a policy table, for reading and editing by hand: one line per type, then per segment.

What holds for the whole table is repeated in every line and must agree. An empty cell is null. Both
directions go through the dictionary form of the table, so that validation happens in one place.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from fluidsched.errors import InputError

__all__ = ["csv_to_rows", "rows_to_csv"]

TYPE_FIELDS = [
    "name", "arrival_rate", "admitted_rate", "threshold", "gate", "period", "max_hold_s", "priority",
]  # fmt: skip
MATCH_COLUMNS = ["label", "prompt_min", "prompt_max", "output_min", "output_max"]
SEGMENT_FIELDS = ["boundary", "threshold", "buffer"]
SHARED_FIELDS = [
    "kind", "block_iterations", "freeze", "max_in_service", "token_budget", "chunk_tokens",
    "prefill_interval", "kv_limit_tokens", "watermark", "whole_prompt_admission", "order", "predictor",
    "preemption",
]  # fmt: skip
LOOKAHEAD_FIELDS = ["mode", "headroom_tokens", "lengths"]
SHARED_COLUMNS = ["schema", "policy", *SHARED_FIELDS, *(f"lookahead_{name}" for name in LOOKAHEAD_FIELDS)]
COLUMNS = ["row", "name", *MATCH_COLUMNS, *TYPE_FIELDS[1:], "boundary", "buffer", *SHARED_COLUMNS]
FLAGS = {"freeze", "whole_prompt_admission"}
TEXTS = {
    "row", "name", "label", "schema", "policy", "kind", "order", "predictor", "preemption", "lookahead_mode",
}  # fmt: skip
LISTS = {"lookahead_lengths"}


def rows_to_csv(table: Mapping[str, Any]) -> str:
    """CSV text of a table's dictionary form; certificate and provenance are left out."""
    shared = {name: table[name] for name in ("schema", *SHARED_FIELDS)}
    shared["policy"] = table["name"]
    shared |= {f"lookahead_{name}": value for name, value in table["lookahead"].items()}
    lines: list[dict[str, Any]] = []
    for row in table["types"]:
        match = row["match"]
        output = match["output"] or (None, None)
        cells = {name: row[name] for name in TYPE_FIELDS}
        places = (match["label"], *match["prompt"], *output)
        lines.append({"row": "type", **cells, **dict(zip(MATCH_COLUMNS, places, strict=True))})
    lines += [{"row": "segment", **segment} for segment in table["segments"]]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: _to_cell(value) for name, value in (line | shared).items()})
    return stream.getvalue()


def csv_to_rows(argument: str, text: str) -> dict[str, Any]:
    """Dictionary form of a table from its CSV text, values unchecked but for the form of the file."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(f"{argument}, line {reader.line_num}", line) for line in reader]
    except csv.Error as error:
        raise InputError(f"{argument}, line {reader.line_num}", str(error), "be valid CSV") from None
    header = list(reader.fieldnames or [])
    if sorted(header) != sorted(COLUMNS):
        wrong = sorted(set(COLUMNS).symmetric_difference(header)) or header
        raise InputError(
            f"{argument}, line 1",
            f"column {wrong[0]!r} missing, unknown or twice",
            "be the header to_csv writes",
        )
    if not lines:
        raise InputError(argument, "no row", "have at least one row of a type")
    types, segments = [], []
    first = lines[0][1]
    for place, line in lines:
        if None in line or None in line.values():
            raise InputError(place, "a row of another length", f"have {len(COLUMNS)} cells")
        for name in SHARED_COLUMNS:
            if line[name] != first[name]:
                raise InputError(f"{place}, {name}", line[name], f"repeat the first row's {first[name]!r}")
        values = {name: _from_cell(name, cell) for name, cell in line.items()}
        if values["row"] == "type":
            output = [values["output_min"], values["output_max"]]
            match = {
                "prompt": [values["prompt_min"], values["prompt_max"]],
                "output": None if output == [None, None] else output,
                "label": values["label"],
            }
            types.append({"match": match, **{name: values[name] for name in TYPE_FIELDS}})
        elif values["row"] == "segment":
            segments.append({name: values[name] for name in SEGMENT_FIELDS})
        else:
            raise InputError(f"{place}, row", values["row"] or "nothing", "be 'type' or 'segment'")
    shared = {name: _from_cell(name, first[name]) for name in SHARED_COLUMNS}
    return {
        "schema": shared["schema"],
        "name": shared["policy"],
        "types": types,
        "segments": segments,
        **{name: shared[name] for name in SHARED_FIELDS},
        "lookahead": {name: shared[f"lookahead_{name}"] for name in LOOKAHEAD_FIELDS},
        "certificate": {},
        "provenance": {},
    }


def _to_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return " ".join(map(repr, value))
    return value if isinstance(value, str) else repr(value)


def _from_cell(column: str, cell: str) -> Any:
    """Undo `_to_cell`; what is no number or flag is handed on as text, for the validation to name."""
    if column in LISTS:
        return [_number(word) for word in cell.split()]
    if cell == "":
        return None
    if column in FLAGS:
        return {"true": True, "false": False}.get(cell.lower(), cell)
    if column in TEXTS:
        return cell
    return _number(cell)


def _number(cell: str) -> Any:
    for convert in (int, float):
        try:
            return convert(cell)
        except ValueError:
            continue
    return cell
