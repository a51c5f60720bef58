"""A run as a timeline for trace viewers: Chrome's Trace Event Format, which Perfetto opens too.

Three processes stand below each other. *Requests* (1): one nestable asynchronous slice per request from arrival to
finish, and inside it, end to end, ``waiting`` (to the first admission), ``prefill`` (to the first token) and
``decode``; what had not ended by the end of the run, or lies beyond the window shown, ends there. *Server* (2):
one slice per iteration, with its tokens, its batch and whom it admitted and preempted. *Occupancy* (3): KV
tokens, residents and waiting as counters, from the decimated series of the run, so of bounded size.

Engines keep requests, not iterations. Iterations are those of the reference engine, which is run again up to the
end of the window and which the kernel equals; their times agree with the requests' up to rounding. Times
in the file are microseconds since the path's origin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidsched.simulation.records import STATUSES, EngineRun, IterationSummary
from fluidsched.simulation.reference import run_reference

if TYPE_CHECKING:
    from fluidsched.policy.table import PolicyTable
    from fluidsched.server import Server
    from fluidsched.workload import ArrivalPath

__all__ = ["EVENTS", "chrome_trace"]

EVENTS = 200_000
"""Most events of a file by default, some 25 MB."""

REQUESTS, SERVER, OCCUPANCY = 1, 2, 3
_NAMES = {REQUESTS: "requests", SERVER: "server", OCCUPANCY: "occupancy"}
_PER_REQUEST = 8  # events: the request and three phases, begin and end each

Event = dict[str, Any]


def chrome_trace(
    path: ArrivalPath,
    run: EngineRun,
    server: Server,
    table: PolicyTable,
    *,
    horizon: float | None,
    start: float = 0.0,
    stop: float = math.inf,
    iterations: bool = True,
    events: int = EVENTS,
) -> dict[str, Any]:
    """Return the timeline of a run as the object of a trace file.

    Parameters
    ----------
    path, run, server, table, horizon
        What ran and what came out.
    start, stop : float
        Window shown, s: requests in the system and iterations that begin in it.
    iterations : bool
        Whether to run the reference engine again for the iterations.
    events : int
        Most events. Of a longer window only its beginning is shown; `otherData` says up to when.

    Returns
    -------
    dict
        ``traceEvents`` in order of time, ``displayTimeUnit`` and ``otherData``.
    """
    stop = min(stop, run.end_s)
    of_server: list[Event] = []
    if iterations:
        found: list[IterationSummary] = []
        limit = events // 2

        def observe(iteration: IterationSummary) -> None:
            if iteration.start_s >= start and len(found) <= limit:
                found.append(iteration)

        end = stop if horizon is None or stop < horizon else horizon
        run_reference(path, server, table, horizon=end if end > 0.0 else horizon, on_iteration=observe)
        if len(found) > limit:
            stop = min(stop, found.pop().start_s)
        of_server = [
            event for iteration in found if iteration.start_s < stop for event in _iteration(iteration)
        ]
    left = np.where(np.isnan(run.left_s), math.inf, run.left_s)
    rejected = run.status == STATUSES.index("rejected")
    shown = np.flatnonzero((path.arrival_s < stop) & (left > start) & ~rejected)
    most = max((events - len(of_server)) // (2 * _PER_REQUEST), 1)
    if len(shown) > most:
        stop = float(path.arrival_s[shown[most]])
        shown = shown[:most]
        of_server = [event for event in of_server if event["ts"] < _micro(stop)]
    of_requests = [event for i in shown.tolist() for event in _request(path, run, i, start, stop)]
    of_counters = list(_counters(run, start, stop))
    named: list[Event] = [
        {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "ts": 0.0, "args": {"name": name}}
        for pid, name in _NAMES.items()
    ]
    timed = sorted(of_requests + of_server + of_counters, key=lambda event: event["ts"])
    return {
        "traceEvents": named + timed,
        "displayTimeUnit": "ms",
        "otherData": {
            "policy": table.name,
            "workload": path.name,
            "server": server.name,
            "shown_from_s": start,
            "shown_until_s": stop,
            "run_end_s": run.end_s,
            "iterations": iterations,
        },
    }


def _micro(seconds: float) -> float:
    return round(1e6 * seconds, 3)


def _request(path: ArrivalPath, run: EngineRun, i: int, start: float, stop: float) -> Iterator[Event]:
    """Begin and end of the request and of its phases, clipped to the window; inner ones end before outer ones."""
    marks = [path.arrival_s[i], run.admitted_s[i], run.first_token_s[i], run.finish_s[i]]
    known = [float(mark) for mark in marks if not math.isnan(mark)]
    left = math.inf if math.isnan(run.left_s[i]) else float(run.left_s[i])
    ends = [*known[1:], *([] if len(known) == len(marks) else [left])]
    common = {"cat": "request", "id": i, "pid": REQUESTS, "tid": 0}
    label = path.label(i)
    about = {
        "prompt_tokens": int(path.prompt_tokens[i]),
        "output_tokens": int(path.output_tokens[i]),
        "preemptions": int(run.preemptions[i]),
        "status": STATUSES[run.status[i]],
        **({} if label is None else {"type": label}),
    }

    def clipped(instant: float) -> float:
        return _micro(min(max(instant, start), stop))

    name = f"request {i}"
    yield {"name": name, "ph": "b", "ts": clipped(known[0]), "args": about, **common}
    for phase, begin, end in zip(("waiting", "prefill", "decode"), known, ends, strict=False):
        if end > start and begin < stop and end > begin:
            yield {"name": phase, "ph": "b", "ts": clipped(begin), **common}
            yield {"name": phase, "ph": "e", "ts": clipped(end), **common}
    yield {"name": name, "ph": "e", "ts": clipped(ends[-1]), **common}


def _iteration(iteration: IterationSummary) -> Iterator[Event]:
    """One slice per iteration."""
    begin = _micro(iteration.start_s)
    yield {
        "name": "prefill + decode"
        if iteration.prefill and iteration.decode
        else "prefill"
        if iteration.prefill
        else "decode",
        "cat": "iteration",
        "ph": "X",
        "ts": begin,
        "dur": max(_micro(iteration.end_s) - begin, 0.0),
        "pid": SERVER,
        "tid": 0,
        "args": {
            "iteration": iteration.index,
            "prefill_tokens": iteration.prefill_tokens,
            "decode_tokens": iteration.decode_tokens,
            "kv_tokens": iteration.kv_tokens,
            "held_tokens": iteration.held_tokens,
            "residents": iteration.residents,
            "waiting": iteration.waiting,
            "admitted": list(iteration.admitted),
            "preempted": list(iteration.preempted),
        },
    }


def _counters(run: EngineRun, start: float, stop: float) -> Iterator[Event]:
    """The occupancy series."""
    if run.occupancy is None:
        return
    for instant, *values in run.occupancy.tolist():
        if start <= instant <= stop:
            for name, value in zip(("KV tokens", "residents", "waiting"), values, strict=True):
                yield {
                    "name": name,
                    "ph": "C",
                    "ts": _micro(instant),
                    "pid": OCCUPANCY,
                    "tid": 0,
                    "args": {name: value},
                }
