r"""The policy table: thresholds, gates and limits an online scheduler follows, and nothing else.

A table says, per request type j, how many requests may enter at a time (the *threshold* n_j), how many must
wait before any enters (the *gate* g_j ≤ n_j), within how many consecutive iterations the threshold counts
(the *period* k_j), and for the server as a whole how long a block of iterations is, whether a type whose gate
is shut is frozen, and how much may be in service. One schema holds the whole family:

======================  ======================================================  ===========================
kind                    rule                                                    rows
======================  ======================================================  ===========================
``vllm``                running requests first, then FCFS under a token budget  one, named ``*``
``capped``              ``vllm`` with a cap on the requests in service          one, named ``*``
``sarathi``             decodes, then chunks of prompts up to a token budget    one, named ``*``
``vllm_v0``             whole prompts in a batch of their own, before decodes   one, named ``*``
``orca``                FCFS, room for the longest output reserved              one, named ``*``
``faster_transformer``  ``orca`` in batches that run to their end               one, named ``*``
``wait``                blocks of iterations, gate = threshold, freezing        one per request type
``gated``               at most n_j in any k_j iterations, no freezing          one per request type
``nested-wait``         thresholds per segment of iterations done               one, named ``*``, segments
======================  ======================================================  ===========================

A threshold of 0 means that requests of the type are never admitted and never open a block: that is how an
overloaded server's optimum refuses a type. ``None`` means the server's own limit, or that a field does not
apply; the effective limit is the smaller of the table's and the server's. The request's type is the first row
whose match holds.

JSON is the format that round-trips. CSV is an export for reading and editing by hand; it carries neither
certificate nor provenance, because what a hand may have changed they no longer cover.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import LARGEST_COUNT, check_choice, check_count, check_real
from fluidsched._display import Tabular
from fluidsched._files import dumps, fingerprint, loads, read_text, to_jsonable, write_whole
from fluidsched._toml import locating
from fluidsched.errors import InputError
from fluidsched.policy.csv_form import csv_to_rows, rows_to_csv
from fluidsched.policy.export import EngineArguments, sglang_arguments, vllm_arguments

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.workload import ArrivalPath

__all__ = ["KINDS", "SCHEMA", "Lookahead", "Match", "PolicyTable", "Segment", "TableType"]

SCHEMA = "fluidsched.policy/1"


def _other_schema(version: object) -> str:
    """What to do about a table of another schema."""
    name, _, number = str(version).partition("/")
    own, _, current = SCHEMA.partition("/")
    if name == own and re.fullmatch("[0-9]{1,9}", number) and int(number) > int(current):
        return "A newer version of fluidsched wrote this table: upgrade, or compile it again with this one."
    return "This is no policy table, or an older version of fluidsched wrote it: compile it again."


Kind = Literal[
    "vllm", "capped", "sarathi", "vllm_v0", "orca", "faster_transformer", "wait", "gated", "nested-wait"
]
LookaheadMode = Literal["none", "known", "law", "reserve"]
Predictor = Literal["exact", "lower"]
Order = Literal["fcfs", "shortest_first"]
Preemption = Literal["recompute", "restart", "swap"]

KINDS: tuple[str, ...] = get_args(Kind)
ONE_ROW_KINDS = frozenset(KINDS) - {"wait", "gated"}
RESERVING_KINDS = frozenset({"orca", "faster_transformer"})
MOST_LENGTHS = 16  # of a law: shares are multiples of 1/lcm(1..m), which stays a small integer
FREEZING_KINDS = frozenset({"wait", "nested-wait"})


@contextmanager
def _inside(place: str) -> Iterator[None]:
    """Prefix the argument of an `InputError` raised inside with its place in the table."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}.{error.argument}", error.received, error.required, error.remedy) from None


def _check_name(argument: str, value: Any) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise InputError(argument, value, "be a non-empty, printable string")
    return value


def _check_flag(argument: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(argument, value, "be true or false")
    return bool(value)


def _check_interval(argument: str, value: Any) -> tuple[int, int | None]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise InputError(argument, value, "be a pair (lowest, highest or None)")
    lowest = check_count(f"{argument}[0]", value[0], minimum=0)
    highest = None if value[1] is None else check_count(f"{argument}[1]", value[1], minimum=lowest)
    return lowest, highest


def _check_keys(argument: str, value: Any, fields: Iterable[str]) -> dict[str, Any]:
    """Return `value` if it is an object with exactly the given fields; name the first offender."""
    if not isinstance(value, Mapping):
        raise InputError(argument, value, "be an object with named fields")
    expected = list(fields)
    dot = f"{argument}." if argument else ""
    for name in expected:
        if name not in value:
            raise InputError(f"{dot}{name}", "nothing", "be present", "Write null where it does not apply.")
    for name in value:
        if name not in expected:
            raise InputError(f"{dot}{name}", "an unknown field", f"be one of {', '.join(expected)}")
    return dict(value)


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


@dataclass(frozen=True)
class Match:
    """Which requests a row is for: closed intervals of lengths, a label, or both.

    Parameters
    ----------
    prompt : (int, int or None)
        Lowest and highest prompt length, tokens; None: no upper end.
    output : (int, int or None), optional
        The same for the output length: the predicted one, or the true one if the table's predictor is
        "exact". None: the output length is not looked at.
    label : str, optional
        Name of the request's type as the path gives it. None: not looked at.
    """

    prompt: tuple[int, int | None] = (0, None)
    output: tuple[int, int | None] | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", _check_interval("prompt", self.prompt))
        if self.output is not None:
            object.__setattr__(self, "output", _check_interval("output", self.output))
        if self.label is not None:
            _check_name("label", self.label)

    def __str__(self) -> str:
        parts = [] if self.label is None else [f"label {self.label!r}"]
        for word, interval in (("prompt", self.prompt), ("output", self.output)):
            if interval is not None and interval != (0, None):
                low, high = interval
                parts.append(f"{word} {low:,}–{high:,}" if high is not None else f"{word} ≥ {low:,}")
        return ", ".join(parts) or "any"


_ANY = Match()


@dataclass(frozen=True)
class TableType:
    """One row of a table: a request type and what the policy does with it.

    Parameters
    ----------
    name : str
        Name of the type, unique in the table; ``*`` for the single row of an engine-like table.
    match : Match
        Which requests are of this type.
    arrival_rate, admitted_rate : float, optional
        Offered rate λ_j and the fluid decision a_j ≤ λ_j, requests/s; None where unknown.
    threshold : int, optional
        n_j, requests admitted at a time (0: never any). None: no threshold.
    gate : int
        Requests that must be waiting before any is admitted, at most `threshold`; 0: no gate.
    period : int, optional
        k_j, iterations; at most `threshold` requests enter in any so many consecutive iterations.
    max_hold_s : float, optional
        Seconds after which an unserved request counts as a met gate. None: never.
    priority : float, optional
        Smaller first across types; None: after every row that has one, in order of arrival.
    """

    name: str
    match: Match = Match()
    arrival_rate: float | None = None
    admitted_rate: float | None = None
    threshold: int | None = None
    gate: int = 0
    period: int | None = None
    max_hold_s: float | None = None
    priority: float | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        _check_name("name", self.name)
        if not isinstance(self.match, Match):
            raise InputError("match", self.match, "be a Match")
        if self.arrival_rate is not None:
            put(self, "arrival_rate", check_real("arrival_rate", self.arrival_rate, minimum=0.0))
        if self.admitted_rate is not None:
            put(self, "admitted_rate", check_real("admitted_rate", self.admitted_rate, minimum=0.0))
            if self.arrival_rate is not None and self.admitted_rate > self.arrival_rate * (1 + 1e-9):
                raise InputError(
                    "admitted_rate", self.admitted_rate, f"be at most arrival_rate, {self.arrival_rate:g}"
                )
        if self.threshold is not None:
            put(self, "threshold", check_count("threshold", self.threshold, maximum=LARGEST_COUNT))
        put(
            self,
            "gate",
            check_count(
                "gate", self.gate, maximum=LARGEST_COUNT if self.threshold is None else self.threshold
            ),
        )
        if self.period is not None:
            put(self, "period", check_count("period", self.period, minimum=1, maximum=LARGEST_COUNT))
        if self.max_hold_s is not None:
            put(self, "max_hold_s", check_real("max_hold_s", self.max_hold_s, above=0.0))
        if self.priority is not None:
            put(self, "priority", check_real("priority", self.priority))


@dataclass(frozen=True)
class Segment:
    """One segment of a ``nested-wait`` table: positions up to `boundary`, at most `threshold` served at each.

    Parameters
    ----------
    boundary : int
        r_k, the last position of the segment (iterations done); strictly increasing over the segments.
    threshold : int
        n_k, requests served at each position, and needed at the segment's entry before it runs.
    buffer : float
        Requests the memory bound allows for in the segment's entry queue beyond n_k; 0 for the first.
    """

    boundary: int
    threshold: int
    buffer: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundary", check_count("boundary", self.boundary, maximum=LARGEST_COUNT))
        object.__setattr__(
            self, "threshold", check_count("threshold", self.threshold, minimum=1, maximum=LARGEST_COUNT)
        )
        object.__setattr__(self, "buffer", check_real("buffer", self.buffer, minimum=0.0))


@dataclass(frozen=True)
class Lookahead:
    """Look-ahead admission: the KV of residents and newcomer must fit at every future iteration.

    Parameters
    ----------
    mode : {"none", "known", "law", "reserve"}
        "known": true or predicted lengths; "law": the conditional law of the remaining length;
        "reserve": every request is taken to produce `headroom_tokens` tokens; "none": no look-ahead.
    headroom_tokens : float
        "known", "law": tokens of the capacity kept free. "reserve": output tokens reserved per request, so
        that its KV counts as prompt + headroom_tokens − 1. 0 with "none".
    lengths : sequence of int
        "law" only: o_1 ≤ … ≤ o_m, m from 1 to 16, output tokens: a request's length is taken to be each of
        them with probability 1/m, and, with s tokens produced, each of those above s equally likely.
    """

    mode: LookaheadMode = "none"
    headroom_tokens: float = 0.0
    lengths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(LookaheadMode))
        least = 1.0 if self.mode == "reserve" else 0.0
        most = 0.0 if self.mode == "none" else math.inf
        headroom = check_real("headroom_tokens", self.headroom_tokens, minimum=least, maximum=most)
        object.__setattr__(self, "headroom_tokens", headroom)
        if not isinstance(self.lengths, (tuple, list)):
            raise InputError("lengths", self.lengths, "be a list of output lengths, tokens")
        lengths: list[int] = []
        for k, tokens in enumerate(self.lengths):
            least_tokens = max([1, *lengths[-1:]])
            lengths.append(check_count(f"lengths[{k}]", tokens, minimum=least_tokens, maximum=LARGEST_COUNT))
        if (len(lengths) > 0) != (self.mode == "law") or len(lengths) > MOST_LENGTHS:
            raise InputError(
                "lengths",
                f"{len(lengths)} of them",
                f'be 1 to {MOST_LENGTHS} with mode "law", none with another',
            )
        object.__setattr__(self, "lengths", tuple(lengths))


@dataclass(frozen=True, repr=False)
class PolicyTable(Tabular):
    """What a scheduler does, as numbers: schema "fluidsched.policy/1", validated when made and when read.

    Parameters
    ----------
    name : str
        Unique in a run.
    kind : str
        One of `KINDS`; the module's docstring says what each means.
    types : sequence of TableType
        One row per request type, or the one row ``*``. Shape letter J.
    segments : sequence of Segment
        Only with kind "nested-wait".
    block_iterations : int, optional
        k, iterations per decision; kinds "wait" and "nested-wait" only.
    freeze : bool
        Whether types whose gate is shut pause with their KV kept; true for "wait" and "nested-wait".
    max_in_service : int, optional
        Most residents, partly prefilled ones included. None: the server's limit.
    token_budget : int, optional
        Most tokens processed per iteration. None: the server's limit. Always None for "wait", whose cohorts
        prefill whole.
    chunk_tokens : int, optional
        Most prompt tokens of one request per iteration.
    prefill_interval : int, optional
        Admit prefills only every so many iterations.
    kv_limit_tokens : float, optional
        Tokens of KV that admission may fill. None: the server's capacity.
    watermark : float
        Fraction of the KV blocks that admission leaves free unless nothing runs, in [0, 1).
    whole_prompt_admission : bool
        Whether admission needs room for the whole prompt and the tokens already generated, or only for the
        first chunk.
    lookahead : Lookahead
        Room that admission needs for the future of those in service.
    order : {"fcfs", "shortest_first"}
        Order of the waiting requests within a priority: by arrival, or by believed output length.
    predictor : {"exact", "lower", None}
        Which output lengths the table believes, where it looks at any: "exact": the path's true ones; None:
        its predicted ones (the upper ends of predicted intervals); "lower": the intervals' lower ends.
    preemption : {"recompute", "restart", "swap"}
        What happens to a request whose KV no longer fits.
    certificate : mapping
        Bounds the table comes with, name → {value, unit, formula, guarantee, …}; empty for baselines.
    provenance : mapping
        inputs (fingerprints), version, seed.

    Raises
    ------
    InputError
        Naming the field that is wrong and what it must be.

    Examples
    --------
    >>> table = PolicyTable("mine", "vllm", [TableType("*")], token_budget=2048)
    >>> table
    PolicyTable 'mine': kind vllm, 1 type, token budget 2,048
    >>> PolicyTable.from_dict(table.to_dict()) == table
    True
    """

    name: str
    kind: str
    types: tuple[TableType, ...]
    segments: tuple[Segment, ...] = ()
    block_iterations: int | None = None
    freeze: bool = False
    max_in_service: int | None = None
    token_budget: int | None = None
    chunk_tokens: int | None = None
    prefill_interval: int | None = None
    kv_limit_tokens: float | None = None
    watermark: float = 0.0
    whole_prompt_admission: bool = True
    lookahead: Lookahead = Lookahead()
    order: str = "fcfs"
    predictor: str | None = None
    preemption: str = "recompute"
    certificate: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        put = object.__setattr__
        _check_name("name", self.name)
        if "/" in self.name or "\\" in self.name or self.name in (".", ".."):
            raise InputError("name", self.name, "be fit for the name of a file, policies/NAME.json")
        check_choice("kind", self.kind, KINDS)
        for argument, row_type in (("types", TableType), ("segments", Segment)):
            rows = getattr(self, argument)
            if not isinstance(rows, (tuple, list)) or not all(isinstance(row, row_type) for row in rows):
                raise InputError(argument, rows, f"be a sequence of {row_type.__name__}")
            put(self, argument, tuple(rows))
        for argument in (
            "block_iterations", "max_in_service", "token_budget", "chunk_tokens", "prefill_interval",
        ):  # fmt: skip
            if getattr(self, argument) is not None:
                put(
                    self,
                    argument,
                    check_count(argument, getattr(self, argument), minimum=1, maximum=LARGEST_COUNT),
                )
        for argument in ("freeze", "whole_prompt_admission"):
            put(self, argument, _check_flag(argument, getattr(self, argument)))
        if self.kv_limit_tokens is not None:
            put(self, "kv_limit_tokens", check_real("kv_limit_tokens", self.kv_limit_tokens, above=0.0))
        put(self, "watermark", check_real("watermark", self.watermark, minimum=0.0))
        if self.watermark >= 1.0:
            raise InputError("watermark", self.watermark, "be a fraction in [0, 1)")
        if not isinstance(self.lookahead, Lookahead):
            raise InputError("lookahead", self.lookahead, "be a Lookahead")
        check_choice("order", self.order, get_args(Order))
        if self.predictor is not None:
            check_choice("predictor", self.predictor, get_args(Predictor))
        check_choice("preemption", self.preemption, get_args(Preemption))
        for argument in ("certificate", "provenance"):
            value = getattr(self, argument)
            if not isinstance(value, Mapping):
                raise InputError(argument, value, "be an object with named fields")
            try:
                plain = to_jsonable(value)  # JSON values only, so that equality survives a file
            except TypeError as error:
                raise InputError(argument, str(error), "hold JSON values only") from None
            put(self, argument, _with_infinities(plain) if argument == "certificate" else plain)
        self._check_rows()
        self._check_kind()

    def _check_rows(self) -> None:
        if not self.types:
            raise InputError("types", "no row", "have at least one row")
        seen: set[str] = set()
        for j, row in enumerate(self.types):
            if row.name in seen:
                raise InputError(f"types[{j}].name", row.name, "be unique in the table")
            seen.add(row.name)
        last = -1
        for i, segment in enumerate(self.segments):
            if segment.boundary <= last:
                raise InputError(
                    f"segments[{i}].boundary", segment.boundary, f"be above the one before, {last}"
                )
            last = segment.boundary

    def _check_kind(self) -> None:
        """Fields that the kind fixes: a table that says two different things is refused."""

        def require(argument: str, holds: bool, required: str) -> None:
            if not holds:
                value: Any = self
                for part in argument.replace("[", ".").replace("]", "").split("."):
                    value = value[int(part)] if part.isdigit() else getattr(value, part)
                raise InputError(argument, value, f"{required} in a table of kind {self.kind!r}")

        require("freeze", self.freeze == (self.kind in FREEZING_KINDS), "be true only for WAIT policies, as")
        require(
            "block_iterations",
            (self.block_iterations is not None) == (self.kind in FREEZING_KINDS),
            "be given for WAIT policies and for no other",
        )
        require("segments", bool(self.segments) == (self.kind == "nested-wait"), "be non-empty exactly")
        for i, segment in enumerate(self.segments):
            block = self.block_iterations or 1
            whole = (segment.boundary + 1) % block == 0
            require(
                f"segments[{i}].boundary", whole, f"be one less than a multiple of block_iterations, {block},"
            )
        if self.kind in ONE_ROW_KINDS:
            require("types", len(self.types) == 1 and self.types[0].name == "*", "have one row, named '*',")
        for j, row in enumerate(self.types):
            place = f"types[{j}]"
            if self.kind in ("wait", "gated"):
                require(f"{place}.threshold", row.threshold is not None, "be given")
            elif self.kind == "nested-wait":
                require(f"{place}.threshold", row.threshold == self.segments[0].threshold, "be segment 1's")
            else:
                require(f"{place}.threshold", row.threshold is None, "be null")
            if self.kind == "wait":
                low = min(1, row.threshold or 0)
                require(f"{place}.gate", row.gate >= low, "be at least 1 (0 where threshold is)")
            elif self.kind == "nested-wait":
                require(f"{place}.gate", row.gate == row.threshold, "equal threshold")
            elif self.kind != "gated":
                require(f"{place}.gate", row.gate == 0, "be 0")
            given = row.period is not None
            require(f"{place}.period", given == (self.kind == "gated"), "be given for 'gated' only, not")
        if self.kind in FREEZING_KINDS:
            require("token_budget", self.token_budget is None, "be null: cohorts prefill whole")
            require("lookahead", self.lookahead.mode == "none", "have mode 'none'")
        if self.kind in RESERVING_KINDS:
            require("lookahead", self.lookahead.mode == "reserve", "have mode 'reserve'")

    # ------------------------------------------------------------------ what it says

    @property
    def type_names(self) -> tuple[str, ...]:
        """Names of the rows, in order. Shape (J,)."""
        return tuple(row.name for row in self.types)

    @property
    def thresholds(self) -> NDArray[np.int64]:
        """Thresholds n_j, requests. Shape (J,); `InputError` where a row has none."""
        for row in self.types:
            if row.threshold is None:
                raise InputError("thresholds", f"type {row.name!r} without one", "be given in every row")
        values = np.array([row.threshold for row in self.types], dtype=np.int64)
        values.flags.writeable = False
        return values

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the table: equal tables, equal fingerprints."""
        return fingerprint(self.to_dict())

    def renamed(self, name: str) -> PolicyTable:
        """Return the same table under another name."""
        return dataclasses.replace(self, name=name)

    def believed_output(self, path: ArrivalPath) -> NDArray[np.int64] | None:
        """Return the output lengths the table believes, tokens, shape (N,); None if the path lacks them.

        Which ones `predictor` says: the true ones, the predicted ones, or the lower ends of the predicted
        intervals.
        """
        if self.predictor == "exact":
            return path.output_tokens
        if self.predictor == "lower":
            return path.predicted_output_minimum
        return path.predicted_output_tokens

    def classify(self, path: ArrivalPath) -> NDArray[np.int64]:
        """Return the row of every request of a path: the first whose match holds.

        Parameters
        ----------
        path : ArrivalPath
            N requests.

        Returns
        -------
        int64 array, shape (N,)
            Indices into `types`.

        Raises
        ------
        InputError
            If a request matches no row (the request is named), or if rows look at labels or output lengths
            that the path does not carry.
        """
        count = len(path)
        if self.types[0].match == _ANY:
            return np.zeros(count, dtype=np.int64)
        rows = np.full(count, -1, dtype=np.int64)
        output = self.believed_output(path)
        open_requests = np.arange(count)
        for j, row in enumerate(self.types):
            if not open_requests.size:
                break
            match = row.match
            if match == _ANY:  # whoever is left
                rows[open_requests] = j
                return rows
            hit = _within(path.prompt_tokens[open_requests], match.prompt)
            if match.output is not None:
                if output is None:
                    raise InputError(
                        "predicted_output_tokens",
                        "a path without them",
                        f"be given: type {row.name!r} of table {self.name!r} is recognised by output length",
                        'Give the path predictions, or the table predictor="exact".',
                    )
                hit &= _within(output[open_requests], match.output)
            if match.label is not None:
                if path.type is None:
                    raise InputError(
                        "type",
                        "a path without types",
                        f"name each request's type: table {self.name!r} recognises {row.name!r} by label",
                        "Give the path types, or make the workload from the path with to_workload().",
                    )
                code = path.type_names.index(match.label) if match.label in path.type_names else -1
                hit &= path.type[open_requests] == code if code >= 0 else False
            rows[open_requests[hit]] = j
            open_requests = open_requests[~hit]
        if open_requests.size:
            i = int(open_requests[0])
            label = path.label(i)
            raise InputError(
                f"request {i}",
                f"prompt {int(path.prompt_tokens[i]):,}, output {int(path.output_tokens[i]):,} tokens"
                + (f", type {label!r}" if label is not None else ""),
                f"match a type of table {self.name!r} ({', '.join(self.type_names[:8])}"
                + (", …)" if len(self.types) > 8 else ")"),
                "Compile the table for the workload the path comes from.",
            )
        return rows

    def certified(self, entry: str, field: str = "value") -> float | None:
        """Return a number of the certificate, None where it does not state one.

        Examples
        --------
        >>> from fluidsched.policy import baselines
        >>> baselines.vllm().certified("memory", "capacity") is None
        True
        """
        stated = self.certificate.get(entry)
        number = stated.get(field) if isinstance(stated, Mapping) else None
        return float(number) if isinstance(number, (int, float)) and not isinstance(number, bool) else None

    # ------------------------------------------------------------------ JSON

    def to_dict(self) -> dict[str, Any]:
        """Return the table as plain JSON values, every field of the schema present."""
        plain: dict[str, Any] = to_jsonable(self)
        return {"schema": SCHEMA, **plain}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PolicyTable:
        """Make a table from `to_dict`'s form; anything missing, unknown or out of range is named."""
        if not isinstance(data, Mapping):
            raise InputError("policy table", data, "be an object with named fields")
        version = data.get("schema", "nothing")
        if version != SCHEMA:
            raise InputError(
                "schema",
                version,
                f"be {SCHEMA!r}",
                _other_schema(version),
            )
        values = _check_keys("", data, ["schema", *_names(cls)])
        del values["schema"]
        for argument in ("types", "segments"):
            if not isinstance(values[argument], (list, tuple)):
                raise InputError(argument, values[argument], "be a list")
        types = []
        for j, raw in enumerate(values["types"]):
            place = f"types[{j}]"
            row = _check_keys(place, raw, _names(TableType))
            match = _check_keys(f"{place}.match", row["match"], _names(Match))
            with _inside(f"{place}.match"):
                row["match"] = Match(**match)
            with _inside(place):
                types.append(TableType(**row))
        segments = []
        for i, raw in enumerate(values["segments"]):
            segment = _check_keys(f"segments[{i}]", raw, _names(Segment))
            with _inside(f"segments[{i}]"):
                segments.append(Segment(**segment))
        ahead = _check_keys("lookahead", values["lookahead"], _names(Lookahead))
        with _inside("lookahead"):
            values["lookahead"] = Lookahead(**ahead)
        return cls(**{**values, "types": tuple(types), "segments": tuple(segments)})

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the table as JSON text; with `path`, write it there too (whole or not at all)."""
        text = dumps(self.to_dict())
        if path is not None:
            write_whole(path, text)
        return text

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> PolicyTable:
        """Read a table from a JSON file; the error names the file and its field that is wrong."""
        data = loads(str(path), read_text("policy table", path))
        with locating(path):
            return cls.from_dict(data)

    # ------------------------------------------------------------------ CSV

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the table as CSV, one row per type, then per segment; with `path`, write it there too.

        Certificate and provenance stay behind: edited by hand, the table would no longer be what they cover.
        """
        text = rows_to_csv(self.to_dict())
        if path is not None:
            write_whole(path, text)
        return text

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> PolicyTable:
        """Read a table from `to_csv`'s form, with the same validation; the certificate is empty."""
        return cls.from_dict(csv_to_rows(str(path), read_text("policy table", path)))

    # ------------------------------------------------------------------ to engines

    def to_vllm_args(self) -> EngineArguments:
        """Return vLLM's arguments for this table, and what they lose.

        Examples
        --------
        >>> from fluidsched.policy import baselines
        >>> args = baselines.sarathi(512).to_vllm_args()
        >>> dict(args.arguments)
        {'max_num_batched_tokens': 512}
        >>> args.lost
        ('Decodes before chunks: running requests are served in the order of their admission.',)
        """
        return vllm_arguments(self)

    def to_sglang_args(self) -> EngineArguments:
        """Return SGLang's arguments for this table, and what they lose."""
        return sglang_arguments(self)

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """Return the JSON Schema (draft 2020-12) of the JSON form, as shipped in ``policy-1.schema.json``.

        It states names, types and ranges. What one field means for another (a WAIT table has blocks, an
        interval is not empty) is checked by `from_dict` alone.
        """
        text = files("fluidsched.policy").joinpath("policy-1.schema.json").read_text(encoding="utf-8")
        schema: dict[str, Any] = loads("policy-1.schema.json", text)
        return schema

    # ------------------------------------------------------------------ to look at

    def to_frame(self) -> pd.DataFrame:
        """Return one row per type: match, rates (requests/s), threshold, gate, period, hold, priority."""
        import pandas as pd

        numbers = [name for name in _names(TableType) if name not in ("name", "match")]
        rows = [[str(row.match), *(getattr(row, name) for name in numbers)] for row in self.types]
        index = pd.Index(self.type_names, name="type")
        return pd.DataFrame(rows, columns=["match", *numbers], index=index)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw thresholds or segments; see `fluidsched.plots.thresholds`."""
        from fluidsched import plots

        return plots.thresholds(self, ax=ax)

    def _headline(self) -> str:
        count = len(self.types)
        parts = [f"kind {self.kind}", f"{count} type{'s' if count > 1 else ''}"]
        if self.segments:
            parts.append(f"{len(self.segments)} segments")
        if self.block_iterations is not None:
            plural = "" if self.block_iterations == 1 else "s"
            parts.append(f"blocks of {self.block_iterations:,} iteration{plural}")
        if self.max_in_service is not None:
            parts.append(f"at most {self.max_in_service:,} in service")
        if self.token_budget is not None:
            parts.append(f"token budget {self.token_budget:,}")
        if self.lookahead.mode != "none":
            parts.append(f"look-ahead {self.lookahead.mode} {self.lookahead.headroom_tokens:,.0f} tokens")
        if self.order != "fcfs":
            parts.append(self.order.replace("_", " "))
        return f"PolicyTable {self.name!r}: {', '.join(parts)}"

    def __repr__(self) -> str:
        lines = [self._headline()]
        if self.kind in ("wait", "gated"):
            width = max(4, *(len(name) for name in self.type_names))
            lines.append(
                f"  {'type':<{width}} {'req/s':>9} {'threshold':>9} {'gate':>6} {'period':>7}  match"
            )
            for row in self.types:
                rate = "" if row.admitted_rate is None else f"{row.admitted_rate:.4g}"
                period = "" if row.period is None else f"{row.period:,}"
                numbers = f"{rate:>9} {row.threshold:>9,} {row.gate:>6,} {period:>7}"
                lines.append(f"  {row.name:<{width}} {numbers}  {row.match}")
        for k, segment in enumerate(self.segments, start=1):
            lines.append(
                f"  segment {k}: up to {segment.boundary:,} iterations done, "
                f"threshold {segment.threshold:,}, buffer {segment.buffer:,.1f}"
            )
        return "\n".join(lines)


def _with_infinities(value: Any) -> Any:
    """Turn the spelling "inf" of JSON back into the number, in a certificate's values."""
    if isinstance(value, dict):
        return {name: _with_infinities(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_infinities(item) for item in value]
    return {"inf": math.inf, "-inf": -math.inf}.get(value, value) if isinstance(value, str) else value


def _within(lengths: NDArray[np.int64], interval: tuple[int, int | None]) -> NDArray[np.bool_]:
    low, high = interval
    return lengths >= low if high is None else (lengths >= low) & (lengths <= high)
