"""Random small systems for the equality of kernel and reference: paths, servers and tables with every knob.

Two kinds. *Dyadic*: times and coefficients are multiples of 2^-13, so that all sums are exact in both engines
and ties (an arrival at an iteration's end, a hold that expires there) really happen. *Real*: the same times
irrational factors, so that they do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from fluidsched.policy.table import Lookahead, Match, PolicyTable, Segment, TableType
from fluidsched.server import IterationTime, Server
from fluidsched.simulation.limits import SWAPPING, deadlines
from fluidsched.simulation.records import EngineRun, IterationSummary
from fluidsched.simulation.reference import run_reference
from fluidsched.workload import ArrivalPath

KINDS = (
    "vllm", "capped", "sarathi", "vllm_v0", "orca", "faster_transformer", "gated", "wait", "nested-wait",
)  # fmt: skip
NEAR = 1e-9


@dataclass(frozen=True)
class Case:
    path: ArrivalPath
    server: Server
    table: PolicyTable
    horizon: float | None
    warmup: float
    points: int
    dyadic: bool

    def run(self, engine: Any, **options: Any) -> EngineRun:
        return engine(
            self.path,
            self.server,
            self.table,
            horizon=self.horizon,
            warmup=self.warmup,
            occupancy_points=self.points,
            **options,
        )


IRRATIONAL = {
    "time": math.pi / 3,
    "coefficient": math.e / 2.5,
    "hold": math.sqrt(2),
    "window": math.sqrt(3),
    "patience": math.sqrt(5) / 2,
    "abort": math.sqrt(7) / 3,
    "timeout": math.sqrt(11) / 3,
}


def _number(draw: st.DrawFn, dyadic: bool, low: int, high: int, unit: float, what: str) -> float:
    """A multiple of `unit`, stretched in real cases by a factor of its own, so that ties are accidents."""
    return draw(st.integers(low, high)) * unit * (1.0 if dyadic else IRRATIONAL[what])


def _maybe(draw: st.DrawFn, strategy: st.SearchStrategy[Any]) -> Any:
    return draw(st.none() | strategy)


@st.composite
def cases(draw: st.DrawFn, kind: str, dyadic: bool) -> Case:
    count = draw(st.integers(0, 40))
    longest_prompt = draw(st.sampled_from([1, 4, 30]))
    longest_output = draw(st.sampled_from([1, 5, 25, 100]))
    burst = draw(st.sampled_from([0, 1, 8, 64]))
    gaps = [_number(draw, dyadic, 0, burst, 0.25, "time") for _ in range(count)]
    prompts = [draw(st.integers(1, longest_prompt)) for _ in range(count)]
    outputs = [draw(st.integers(1, longest_output)) for _ in range(count)]
    cached = [draw(st.integers(0, p - 1)) for p in prompts] if draw(st.booleans()) else None
    types = draw(st.integers(1, 3)) if kind in ("gated", "wait") else 1
    believed = [max(1, output + draw(st.integers(-6, 6))) for output in outputs]
    path = ArrivalPath.from_arrays(
        np.cumsum(np.array(gaps, dtype=np.float64)),
        np.array(prompts, dtype=np.int64),
        np.array(outputs, dtype=np.int64),
        np.array([draw(st.integers(0, types - 1)) for _ in range(count)], dtype=np.int64),
        cached_prompt_tokens=cached,
        type_names=tuple("abc"[:types]),
        predicted_output_tokens=np.array(believed, dtype=np.int64),
        **_stays(draw, dyadic, count),
    )
    server = draw(servers(kind, dyadic, longest_prompt + longest_output))
    table = draw(tables(kind, dyadic, types, longest_output))
    horizon = _maybe(draw, st.just(_number(draw, dyadic, 1, 400, 0.25, "window")))
    if table.preemption == "restart" and horizon is None:
        horizon = 25.0  # requests that lose their tokens can displace each other for ever
    warmup = draw(st.just(0.0) | st.just(_number(draw, dyadic, 0, 100, 0.25, "window")))
    return Case(path, server, table, horizon, warmup, draw(st.sampled_from([0, 3, 50])), dyadic)


def _stays(draw: st.DrawFn, dyadic: bool, count: int) -> dict[str, Any]:
    """Half of the cases have clients that leave, some of whom never would."""
    columns = {}
    for column, what in (("patience_s", "patience"), ("abort_after_s", "abort")):
        if draw(st.sampled_from([False, False, True])):
            stays = [_number(draw, dyadic, 0, 60, 0.25, what) for _ in range(count)]
            columns[column] = [math.inf if draw(st.booleans()) else stay for stay in stays]
    return columns


@st.composite
def servers(draw: st.DrawFn, kind: str, dyadic: bool, longest: int) -> Server:
    unit = 2.0**-10
    pieces = [
        [
            _number(draw, dyadic, 1 if i == 0 else -200, 300, unit, "coefficient"),
            *(_number(draw, dyadic, 0, top, unit / 8, "coefficient") for top in (40, 40, 9, 2)),
        ]
        for i in range(draw(st.integers(1, 3)))
    ]
    capacity = draw(st.sampled_from([math.inf, longest, 1.5 * longest, 3 * longest, 10 * longest]))
    block = _maybe(draw, st.sampled_from([1, 2, 5, 16]))
    if block is not None and capacity < block:
        block = 1
    return Server(
        capacity,
        IterationTime.pieces(pieces),
        max_batch_size=_maybe(draw, st.integers(1, 12)),
        token_budget=_maybe(draw, st.integers(1, 60)) if kind not in ("wait", "nested-wait") else None,
        block_size=block,
        max_model_len=_maybe(draw, st.integers(2, longest)) if draw(st.booleans()) else None,
        swap_bandwidth=draw(st.sampled_from([0.5, 8.0, 64.0]))
        * (1.0 if dyadic else IRRATIONAL["coefficient"]),
        waiting_timeout=_timeout(draw, dyadic),
        total_timeout=_timeout(draw, dyadic),
    )


def _timeout(draw: st.DrawFn, dyadic: bool) -> float | None:
    some = draw(st.sampled_from([False] * 5 + [True]))
    return _number(draw, dyadic, 1, 100, 0.25, "timeout") if some else None


@st.composite
def tables(draw: st.DrawFn, kind: str, dyadic: bool, types: int, longest_output: int) -> PolicyTable:
    modes = ["recompute", "recompute", "restart", *(["swap"] if kind in SWAPPING else [])]
    restart = st.sampled_from(modes)
    shared: dict[str, Any] = {"max_in_service": _maybe(draw, st.integers(1, 10)), "preemption": draw(restart)}
    if kind not in ("wait", "nested-wait"):
        shared["token_budget"] = _maybe(draw, st.integers(1, 60))
        shared["watermark"] = draw(st.sampled_from([0.0, 0.0, 0.1, 0.5]))
        shared["kv_limit_tokens"] = _maybe(draw, st.integers(1, 300))
    if kind in ("vllm", "capped", "sarathi", "gated"):
        shared["chunk_tokens"] = _maybe(draw, st.integers(1, 20))
        shared["prefill_interval"] = _maybe(draw, st.integers(1, 9))
        shared["whole_prompt_admission"] = draw(st.booleans())
        shared["order"] = draw(st.sampled_from(["fcfs", "fcfs", "shortest_first"]))
        shared["predictor"] = draw(st.sampled_from([None, "exact"]))
        shared["lookahead"] = draw(lookaheads(longest_output, shared["preemption"] == "swap"))
    if kind in ("orca", "faster_transformer"):
        shared["lookahead"] = Lookahead("reserve", longest_output + draw(st.integers(0, 3)))
    if kind in ("wait", "nested-wait"):
        shared.update(freeze=True, block_iterations=draw(st.integers(1, 9)))
    if kind == "nested-wait":
        block = shared["block_iterations"]
        ends = np.cumsum(draw(st.lists(st.sampled_from([1, 1, 2, 5]), min_size=1, max_size=4)))
        segments = [Segment(int(end) * block - 1, draw(st.integers(1, 6))) for end in ends]
        hold = _maybe(draw, st.just(_number(draw, dyadic, 1, 40, 0.25, "hold")))
        most = segments[0].threshold
        row = TableType("*", threshold=most, gate=most, max_hold_s=hold)
        return PolicyTable("table", kind, (row,), tuple(segments), **shared)
    if kind not in ("gated", "wait"):
        return PolicyTable("table", kind, (TableType("*"),), **shared)
    rows = []
    for name in "abc"[:types]:
        threshold = draw(st.integers(0, 6))
        least = min(1, threshold) if kind == "wait" else 0
        rows.append(
            TableType(
                name,
                Match(label=name),
                threshold=threshold,
                gate=draw(st.integers(least, threshold)),
                period=draw(st.integers(1, 12)) if kind == "gated" else None,
                max_hold_s=None
                if "order" in shared and shared["order"] != "fcfs"
                else _maybe(draw, st.just(_number(draw, dyadic, 1, 40, 0.25, "hold"))),
                priority=_maybe(draw, st.integers(0, 2)),
            )
        )
    return PolicyTable("table", kind, tuple(rows), **shared)


@st.composite
def lookaheads(draw: st.DrawFn, longest_output: int, swaps: bool) -> Lookahead:
    mode = draw(st.sampled_from(["none", "reserve", *([] if swaps else ["none", "known", "known", "law"])]))
    if mode == "reserve":
        return Lookahead(mode, float(draw(st.integers(1, longest_output + 3))))
    if mode == "none":
        return Lookahead()
    lengths = (
        draw(st.lists(st.integers(1, longest_output + 2), min_size=1, max_size=5)) if mode == "law" else []
    )
    return Lookahead(mode, float(draw(st.sampled_from([0, 0, 3, 20]))), tuple(sorted(lengths)))


def run_reference_and_judge(case: Case) -> tuple[EngineRun, bool]:
    """The reference's run, and whether rounding may decide: real numbers, and an instant that matters within
    NEAR of an iteration's end."""
    iterations: list[IterationSummary] = []
    run = case.run(run_reference, on_iteration=iterations.append)
    horizon = [] if case.horizon is None else [case.horizon]
    ends = [deadline.at_s for deadline in deadlines(case.path, case.server)]
    wanted = np.concatenate(
        [case.path.arrival_s, [case.warmup], horizon, _holds_that_expire(case, run, iterations), *ends]
    )
    wanted = wanted[(wanted > 0.0) & np.isfinite(wanted)]
    at = np.unique([0.0, *(iteration.end_s for iteration in iterations)])
    place = np.searchsorted(at, wanted)
    distance = np.minimum(
        np.abs(wanted - at[np.minimum(place, len(at) - 1)]), np.abs(wanted - at[np.maximum(place - 1, 0)])
    )
    near = distance <= NEAR * np.maximum(wanted, 1.0)
    return run, bool(near.any()) and not case.dyadic


def _holds_that_expire(case: Case, run: EngineRun, iterations: list[IterationSummary]) -> list[float]:
    """The instants at which a request has gone unserved for its type's `max_hold_s`."""
    if all(row.max_hold_s is None for row in case.table.types):
        return []
    holds = [case.table.types[row].max_hold_s for row in case.table.classify(case.path)]
    since = case.path.arrival_s.tolist()
    instants = []
    for iteration in iterations:
        for i in (*(chunk[0] for chunk in iteration.prefill), *iteration.decode):
            hold = holds[i]
            if hold is not None and since[i] + hold <= iteration.start_s * (1.0 + NEAR):
                instants.append(since[i] + hold)
            since[i] = iteration.end_s
    for i in np.flatnonzero(np.isnan(run.finish_s)):
        if (hold := holds[i]) is not None:
            instants.append(since[i] + hold)
    return instants


def assert_same_gaps(kernel: Any, reference: Any, *, exact: bool) -> None:
    """Equally many gaps, in the same buckets; but for dyadic times rounding may move one to the next bucket."""
    if exact:
        np.testing.assert_array_equal(kernel, reference, err_msg="gap_counts")
        return
    ours, theirs = np.cumsum(kernel), np.cumsum(reference)
    assert ours[-1] == theirs[-1], "number of gaps"
    assert (ours[:-1] <= theirs[1:]).all(), "gap_counts"
    assert (theirs[:-1] <= ours[1:]).all(), "gap_counts"


def assert_same_run(kernel: EngineRun, reference: EngineRun, *, exact: bool = False) -> None:
    """Everything discrete equal; everything measured within 1e-9 relative; `exact`: gaps in equal buckets."""
    for name in ("verdict", "starved_types", "iterations", "batch_size_sum", "batch_token_sum",
                 "emitted_tokens", "preempted", "wasted_tokens", "swapped_tokens", "stored_end", "cached_tokens",
                 "dropped_tokens", "peak_kv", "kv_end"):  # fmt: skip
        assert getattr(kernel, name) == getattr(reference, name), name
    for name in ("preemptions", "status"):
        np.testing.assert_array_equal(getattr(kernel, name), getattr(reference, name), err_msg=name)
    for name in ("admitted_s", "first_token_s", "finish_s", "left_s", "end_s", "busy_s", "kv_token_s", "resident_s",
                 "waiting_s", "gap_s"):  # fmt: skip
        np.testing.assert_allclose(
            getattr(kernel, name), getattr(reference, name), rtol=1e-9, atol=1e-12, err_msg=name
        )
    assert_same_gaps(kernel.gap_counts, reference.gap_counts, exact=exact)
    if reference.occupancy is None:
        assert kernel.occupancy is None
    else:
        assert kernel.occupancy is not None
        np.testing.assert_allclose(kernel.occupancy, reference.occupancy, rtol=1e-9)
