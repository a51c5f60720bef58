"""Runs whose requests are not kept: pieces of a path through the kernel, one after another.

The kernel stops at the first decision at or after the first arrival of the next piece, when all requests of this
one have arrived, and keeps its state outside the loop. That is a decision of the whole run too: an arrival if the
server is idle, the end of an iteration if not. (Waking an idle server for nothing could let a WAIT table preempt
once more.) Requests that have finished are folded into a `Tally` and dropped; those still in the system move to the
front of the next piece's arrays, and whatever refers to a request by its place (residents' slots, stacks of the
preempted, queues) is told the new one. So the run is the one the kernel makes of the whole path: the same admissions,
order and preemptions, times equal up to the rounding of sums that are cut at pieces. Memory is two pieces and what is
in the system, whatever the number of requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fluidsched.policy.table import PolicyTable
from fluidsched.server import Server
from fluidsched.simulation import compiled
from fluidsched.simulation.kernel import _NOTHING, _PER_REQUEST, _engine_run, _follow, _prepare
from fluidsched.simulation.laws import Accounts, check_memory_kept
from fluidsched.simulation.limits import check_run, never_fits, within_model_length
from fluidsched.simulation.measures import Requests, alone_s
from fluidsched.simulation.records import STATUSES, EngineRun
from fluidsched.simulation.tally import Tally

if TYPE_CHECKING:
    from fluidsched.workload import ArrivalPath

__all__ = ["run_pieces"]

_WHOLE_RING = 2**32


def run_pieces(
    pieces: Iterable[ArrivalPath],
    server: Server,
    table: PolicyTable,
    tally: Tally,
    *,
    horizon: float,
    warmup: float,
    occupancy_points: int,
    accounts: Accounts | None = None,
) -> EngineRun:
    """Run one table on a path that comes in pieces.

    Parameters
    ----------
    pieces : iterable of ArrivalPath
        At least one; all requests of a piece arrive before those of the next.
    server, table, warmup, occupancy_points
        As for `kernel.run_kernel`.
    tally : Tally
        Takes all requests.
    horizon : float
        End of the run, s.
    accounts : Accounts, optional
        Takes all requests that joined too, and verifies the laws of the run.

    Returns
    -------
    EngineRun
        Of the whole run, but with the rows of only those requests that were in the system at the end.
    """
    parts = _parts(pieces, server, table, tally, horizon)
    part = next(parts)
    run = _first(part, server, table, horizon, warmup, occupancy_points)
    types, alone = part.types, part.alone
    while True:
        coming = next(parts, None)
        if run.state["end"][0] == 0.0:  # else the horizon cut an iteration that began in an earlier piece
            run.state["until"] = horizon if coming is None else min(coming.arrival_s[0], horizon)
            _follow(table, run, None)
        finished = ~np.isnan(run.finish)
        _fold(tally, accounts, run, types, alone, finished, horizon)
        if coming is None:
            break
        staying = ~finished
        run = _go_on(run, staying, coming, table)
        types = np.concatenate([types[staying], coming.types])
        alone = np.concatenate([alone[staying], coming.alone])
    left = ~finished
    _fold(tally, accounts, run, types, alone, left, horizon)
    rest = run._replace(**{name: getattr(run, name)[left] for name in _PER_REQUEST})
    nobody = np.zeros(len(rest.finish), dtype=np.bool_)
    whole = _engine_run(rest, table, nobody, slice(None), occupancy_points, nobody)
    if accounts is not None:
        accounts.check(whole)
        check_memory_kept(server, whole)
    return whole


class _Part(NamedTuple):
    """The requests of a piece that join: rows of the table, types and times alone beside the path's columns."""

    path: ArrivalPath
    row: NDArray[np.int64]
    types: NDArray[np.int64]
    alone: NDArray[np.float64]

    @property
    def arrival_s(self) -> NDArray[np.float64]:
        return self.path.arrival_s


def _parts(
    pieces: Iterable[ArrivalPath], server: Server, table: PolicyTable, tally: Tally, horizon: float
) -> Iterator[_Part]:
    """The pieces that bring anybody, without those turned away, whom the tally gets; one at least."""
    some = False
    empty: _Part | None = None
    for piece in pieces:
        piece = within_model_length(piece, server)
        row = check_run(piece, server, table, horizon)
        types = piece.type if piece.type is not None else row
        alone = alone_s(piece, [server])
        assert alone is not None  # the iteration time has pieces
        rejected = never_fits(piece, server, table)
        if rejected.any():
            nobody = np.full(len(piece), np.nan)
            word = np.full(len(piece), STATUSES.index("rejected"), dtype=np.int8)
            columns = (
                piece.arrival_s,
                piece.prompt_tokens,
                piece.output_tokens,
                nobody,
                nobody,
                nobody,
                nobody,
                word,
                alone,
            )
            tally.fold(Requests(*columns).at(rejected), types[rejected], horizon)
            joins = ~rejected
            piece, row, types, alone = piece.selected(joins), row[joins], types[joins], alone[joins]
        part = _Part(piece, row, types, alone)
        if len(piece):
            some = True
            yield part
        else:
            empty = part
    if not some:
        assert empty is not None
        yield empty


def _fold(
    tally: Tally,
    accounts: Accounts | None,
    run: compiled.Run,
    types: NDArray[Any],
    alone: NDArray[np.float64],
    chosen: NDArray[np.bool_],
    horizon: float,
) -> None:
    """Fold the chosen requests, which have all finished or all not."""
    finish = run.finish[chosen]
    word = "unfinished" if len(finish) and np.isnan(finish[0]) else "finished"
    requests = Requests(
        run.arrival[chosen],
        run.prompt[chosen],
        run.output[chosen],
        run.admitted[chosen],
        run.first_token[chosen],
        finish,
        finish,
        np.full(len(finish), STATUSES.index(word), dtype=np.int8),
        alone[chosen],
    )
    tally.fold(requests, types[chosen], horizon)
    if accounts is not None:
        accounts.add(requests, run.preemptions[chosen], horizon)


def _first(
    part: _Part, server: Server, table: PolicyTable, horizon: float, warmup: float, points: int
) -> compiled.Run:
    """An empty system before the first piece, with room for a path of any length."""
    coefficients = server.iteration_time.require_coefficients("the kernel")
    run = _prepare(part.path, part.row, slice(None), server, table, coefficients, horizon, warmup, points)
    if table.kind == "gated":  # rings as long as they can ever be; a row without a threshold needs none
        rows = run.rows
        rows["ring"] = np.where(rows["threshold"] < _WHOLE_RING, rows["threshold"], 1)
        rows["first"] = np.cumsum(rows["ring"]) - rows["ring"]
        run = run._replace(recent=np.zeros(int(rows["ring"].sum()), dtype=np.int64))
    return run


def _go_on(run: compiled.Run, staying: NDArray[np.bool_], part: _Part, table: PolicyTable) -> compiled.Run:
    """The same system with only the requests that stay, followed by those of the next piece."""
    piece = part.path
    kept = int(staying.sum())
    count = kept + len(piece)
    place = np.full(len(staying) + 1, compiled.NOBODY, dtype=np.int64)  # the last one for NOBODY
    place[:-1][staying] = np.arange(kept)

    def column(old: NDArray[Any], new: NDArray[Any]) -> NDArray[Any]:
        joined = np.concatenate([old[staying], new])
        joined.flags.writeable = False  # as in `_prepare`
        return joined

    def with_new(old: NDArray[Any], value: float) -> NDArray[Any]:
        return np.concatenate([old[staying], np.full(count - kept, value, dtype=old.dtype)])

    returned = np.zeros(count, dtype=compiled.RETURNED)
    returned[:kept] = run.returned[staying]
    returned["below"][:kept] = place[returned["below"][:kept]]
    run.groups["top"] = place[run.groups["top"]]
    run.slots["request"] = place[run.slots["request"]]
    admitted = with_new(run.admitted, np.nan)
    row = column(run.row, part.row)
    waiting = np.flatnonzero(np.isnan(admitted))
    rows = run.rows
    of_waiting = row[waiting]
    counts = np.bincount(of_waiting, minlength=len(rows))
    rows["head"] = np.cumsum(counts) - counts
    rows["tail"] = rows["head"] + np.bincount(of_waiting[waiting < kept], minlength=len(rows))
    run.state["arrived"] = kept
    limit = int(run.rules["slots"][0])
    if not table.freeze:
        limit = min(limit, int(run.rules["capacity"][0]))
    return run._replace(
        arrival=column(run.arrival, piece.arrival_s),
        prompt=column(run.prompt, piece.prompt_tokens),
        output=column(run.output, piece.output_tokens),
        cached=_NOTHING
        if piece.cached_prompt_tokens is None
        else column(run.cached, piece.cached_prompt_tokens),
        row=row,
        order=waiting[np.argsort(of_waiting, kind="stable")],
        slots=_with_room(run, min(count, limit)),
        returned=returned,
        admitted=admitted,
        first_token=with_new(run.first_token, np.nan),
        finish=with_new(run.finish, np.nan),
        preemptions=with_new(run.preemptions, 0),
    )


def _with_room(run: compiled.Run, size: int) -> NDArray[np.void]:
    """Slots for `size` residents; new ones are the next to be taken."""
    slots = run.slots
    have = len(slots)
    if size <= have:
        return slots
    more = np.zeros(size, dtype=compiled.SLOT)
    more[:have] = slots
    more["newer"][have:] = np.arange(have + 1, size + 1)
    more["newer"][-1] = run.state["vacant"][0]
    run.state["vacant"] = have
    return more
