r"""The fast kernel: the reference simulator's schedule without stepping through tokens.

Between two events the composition of the batch is constant, so k iterations with b decodes that read M tokens
of KV in the first last k c0 + k c_dec b + c_kv (k M + b k(k - 1)/2) seconds on each affine piece, and cost a
handful of operations whatever k is. `compiled` has the loops and explains them; this module prepares flat
arrays for them, runs paths in parallel threads (the loops release the interpreter's lock), and returns what
`fluidsched.simulation.reference` returns: the same admissions, order, preemptions and statuses, times equal
up to rounding.

Only affine pieces have sums in closed form: a server whose iteration time is any other function of the batch
is for the reference engine.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_count, check_real
from fluidsched.errors import InputError
from fluidsched.policy.table import PolicyTable
from fluidsched.server import Server
from fluidsched.simulation import compiled, histogram
from fluidsched.simulation.limits import (
    UNLIMITED,
    beliefs,
    check_handed_over,
    check_run,
    deadlines,
    effective_limits,
    forecasts,
    never_fits,
    shortest_iteration,
    within_model_length,
)
from fluidsched.simulation.records import STATUSES, VERDICTS, EngineRun
from fluidsched.simulation.threads import in_threads

if TYPE_CHECKING:
    from fluidsched.workload import ArrivalPath
    from fluidsched.workload.prefix_cache import PromptBlocks

__all__ = ["choose_replicas", "run_closed", "run_kernel", "run_many"]


def run_kernel(
    path: ArrivalPath,
    server: Server,
    table: PolicyTable,
    *,
    horizon: float | None,
    warmup: float = 0.0,
    occupancy_points: int = 0,
    first_token_s: NDArray[np.float64] | None = None,
) -> EngineRun:
    """Run one table on one path, from event to event.

    Parameters
    ----------
    path : ArrivalPath
        N requests. Those that arrive after the horizon stay `unfinished`.
    server : Server
        Its iteration time must be affine or the largest of affine pieces.
    table : PolicyTable
        Of a kind simulated (`limits.KINDS`).
    horizon : float or None
        End of the run, s; None: until empty or stuck.
    warmup : float
        Start of the measured window, s.
    occupancy_points : int
        Points of the occupancy series; 0: none.
    first_token_s : (N,) float array, optional
        When each request emitted token 1 elsewhere, s: all requests are handed over, with the KV of their prompt.

    Returns
    -------
    EngineRun
        Equal to `run_reference`'s up to rounding.

    Raises
    ------
    InputError
        See `limits.check_run`; also for an iteration time without affine pieces, and for a path that names the blocks
        of its prompts with deadlines, or under WAIT, Nested WAIT and vLLM v0.

    Examples
    --------
    >>> from fluidsched import ArrivalPath, IterationTime, Server, baselines
    >>> path = ArrivalPath.from_arrays([0.0, 0.5], [4, 2], [2, 1])
    >>> server = Server(10, IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    >>> run = run_kernel(path, server, baselines.vllm(), horizon=None)
    >>> run.finish_s.tolist(), run.kv_token_s
    ([2.0, 2.0], 11.0)
    """
    coefficients = server.iteration_time.require_coefficients("the kernel")
    path = within_model_length(path, server)
    classes = check_run(path, server, table, horizon)
    end = np.inf if horizon is None else check_real("horizon", horizon, above=0.0)
    warmup = check_real("warmup", warmup, minimum=0.0)
    points = check_count("occupancy_points", occupancy_points)

    rejected = never_fits(path, server, table)
    joins = np.flatnonzero(~rejected) if rejected.any() else slice(None)
    if first_token_s is not None:
        check_handed_over(path, table)
        first_token_s = first_token_s[joins]
    run = _prepare(path, classes, joins, server, table, coefficients, end, warmup, points, first_token_s)
    ahead = _ahead(path, joins, server, table, run)
    store = None
    if path.prompt_blocks is not None:
        run, store = _with_store(run, path.prompt_blocks[joins], server, table)
    _follow(table, run, ahead, store, handed=first_token_s is not None)
    return _engine_run(run, table, rejected, joins, points, _abandons(path, server))


def loop_of(table: PolicyTable, *, rare: bool) -> int:
    """Place in `compiled.LOOPS` of the table's loop; rare: requests may leave, or are handed over."""
    rare = rare or table.preemption == "swap" or table.kind == "vllm_v0"
    if table.kind == "wait":
        return compiled.WAIT_RARE if rare else compiled.WAIT
    if table.kind == "nested-wait":
        return compiled.NESTED_RARE if rare else compiled.NESTED
    return compiled.CONTINUOUS_RARE if rare else compiled.CONTINUOUS


def run_many(
    paths: Sequence[ArrivalPath],
    server: Server,
    table: PolicyTable,
    *,
    horizon: float | None,
    warmup: float = 0.0,
    occupancy_points: int = 0,
    threads: int | None = None,
) -> list[EngineRun]:
    """Run one table on every path, in parallel threads.

    Parameters
    ----------
    paths : sequence of ArrivalPath
        R paths, one per replication.
    server, table, horizon, warmup, occupancy_points
        See `run_kernel`.
    threads : int, optional
        Threads to use; None: one per processor this process may use, at most `FLUIDSCHED_THREADS` of the
        environment. The results do not depend on it.

    Returns
    -------
    list of EngineRun
        R runs, in the order of `paths`.
    """

    def run(path: ArrivalPath) -> EngineRun:
        return run_kernel(
            path, server, table, horizon=horizon, warmup=warmup, occupancy_points=occupancy_points
        )

    if threads is not None:
        check_count("threads", threads, minimum=1)
    return list(in_threads(run, paths, threads))


def choose_replicas(
    path: ArrivalPath,
    servers: Sequence[Server],
    table: PolicyTable,
    *,
    horizon: float | None,
    rule: int,
    fits: NDArray[np.bool_],
    draws: NDArray[np.float64],
    first_token_s: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    """Follow a router that looks at the replicas: stop each at the arrivals it may be chosen for.

    Parameters
    ----------
    path : ArrivalPath
        N requests.
    servers : sequence of Server
        P replicas, each with affine pieces and checked by `limits.check_run`.
    table : PolicyTable
        The rule all replicas follow.
    horizon : float or None
        End of the run, s.
    rule : int
        `compiled.SHORTEST_QUEUE`, `LEAST_KV` or `TWO_CHOICES`.
    fits : (N, P) bool array
        Which requests each replica could ever serve.
    draws : (N, 2) float array
        Uniform numbers of two choices.
    first_token_s : (N,) float array, optional
        Of requests that are handed over; see `run_kernel`.

    Returns
    -------
    (N,) int64 array
        The replica of each request; -1 where it fits nowhere.
    """
    if path.prompt_blocks is not None:
        raise InputError(
            "engine",
            "kernel",
            "be 'reference' for a router that looks at replicas whose prefix caches fill with the run",
        )
    end = np.inf if horizon is None else horizon
    classes = table.classify(path)
    parts = {}
    for server in servers:
        if id(server) not in parts:
            coefficients = server.iteration_time.require_coefficients("the kernel")
            run = _prepare(
                path, classes, slice(None), server, table, coefficients, end, 0.0, 0, first_token_s
            )
            parts[id(server)] = run, _ahead(path, slice(None), server, table, run)
    runs = [parts[id(server)][0] for server in servers]
    forecasts = [parts[id(server)][1] for server in servers]
    pieces = max(len(run.coefficients) for run in runs)

    def joined(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(run, name) for run in runs])

    calendars = runs[0].calendars._replace(
        heads=np.concatenate([run.calendars.heads for run in runs]),
        bits=np.concatenate([run.calendars.bits for run in runs]),
    )
    names = ("rules", "state", "order", "rows", "recent", "slots", "groups", "segments", "deadline", "leaver")
    chosen = np.full(len(path), compiled.UNROUTED)
    leaving = any(run.deadline.size for run in runs)
    stacked = runs[
        0
    ]._replace(
        calendars=calendars,
        coefficients=np.concatenate(  # the first piece again, where another server has more: it changes nothing
            [
                run.coefficients[np.maximum(np.arange(pieces) - (pieces - len(run.coefficients)), 0)]
                for run in runs
            ]
        ),
        owner=chosen,
        left=np.full(len(path) if leaving else 0, np.nan),
        fate=np.zeros(len(path) if leaving else 0, dtype=np.int64),
        **{name: joined(name) for name in names},
    )
    stacked.rules["replica"] = np.arange(len(runs))
    stacked.coefficients.flags.writeable = False  # as a server's own: see `column` in `_prepare`
    stacked.state["arrived"] = len(path)  # nobody comes by itself
    slots = np.cumsum([0] + [len(run.slots) for run in runs])
    phases = np.cumsum([0] + [run.calendars.phase.size for run in runs])
    layout = np.zeros(len(runs), dtype=compiled.REPLICA)
    layout["first_slot"], layout["last_slot"], layout["first_phase"] = slots[:-1], slots[1:], phases[:-1]
    layout["block"] = [run.calendars.phase.shape[1] for run in runs]
    dates = np.cumsum([0] + [run.deadline.size for run in runs])
    layout["first_deadline"], layout["last_deadline"] = dates[:-1], dates[1:]
    phase = np.concatenate([run.calendars.phase.ravel() for run in runs])
    ahead = _stacked_ahead(forecasts, layout)
    route = compiled.ROUTES[loop_of(table, rare=leaving or first_token_s is not None)]
    route(stacked, ahead, phase, layout, rule, fits.astype(np.int64), draws)
    return chosen


def run_closed(
    path: ArrivalPath,
    user: NDArray[np.int64],
    think_s: NDArray[np.float64],
    server: Server,
    table: PolicyTable,
    *,
    horizon: float | None,
    warmup: float = 0.0,
    occupancy_points: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.float64], EngineRun]:
    """Run users who wait for their answers; rules of `fluidsched.simulation.closed`.

    The loop is stopped where somebody could come who is not known yet, and goes on from there. Of a request that had
    been sent when i iterations had been run, o tokens long, token o is emitted in iteration i + o at the earliest; so
    before any request is sent that is not known at a time t, when n iterations have been run, there pass

        min over requests in the system of  (max(i + o - n, 1) · (shortest iteration) + think time after it).

    Until then the loop needs no stop. Requests are numbered in the order in which they are sent, as the loops expect.

    Parameters
    ----------
    path : ArrivalPath
        N requests, user by user, all of which can be served; their times are not looked at.
    user, think_s : (N,) arrays
        Who asks, and how long the user thinks before, s.
    server, table, horizon, warmup, occupancy_points
        See `run_kernel`.

    Raises
    ------
    InputError
        See `run_kernel`; also for an order by length, and where memory leaves WAIT nobody to run.

    Returns
    -------
    index : (M,) int64 array
        Requests sent, in the order of being sent.
    arrival_s : (M,) float array
        When, s.
    EngineRun
        The run, of these M.
    """
    coefficients = server.iteration_time.require_coefficients("the kernel")
    if table.order == "shortest_first":
        raise InputError(
            "engine",
            "kernel",
            f"be 'reference' for table {table.name!r} with users who wait: its order is by length",
        )
    classes = check_run(path, server, table, horizon)
    end = np.inf if horizon is None else horizon
    run = _prepare(path, classes, slice(None), server, table, coefficients, end, warmup, occupancy_points)
    ahead = _ahead(path, slice(None), server, table, run)
    believed = None if ahead is None else ahead.believed.copy()
    count = len(path)
    own = {name: np.zeros(count, dtype=np.int64) for name in ("prompt", "output", "row")}
    arrival = np.full(count, np.inf)
    views = {name: column.view() for name, column in (*own.items(), ("arrival", arrival))}
    for view in views.values():
        view.flags.writeable = False  # as in `_prepare`; what they show is written below
    run = run._replace(
        arrival=views["arrival"], prompt=views["prompt"], output=views["output"], row=views["row"]
    )
    place = run.rows["head"].copy()  # where in `order` the next request of each row goes
    state = run.state
    least = shortest_iteration(coefficients) * (1.0 - 1e-9)  # rounding of sums must not make it too long
    hold = max((row.max_hold_s for row in table.types if row.max_hold_s is not None), default=-1.0)

    users = int(user[-1]) + 1 if count else 0
    after = np.searchsorted(user, np.arange(users), side="right")
    first = np.searchsorted(user, np.arange(users))
    think_after = np.append(think_s[1:], np.inf)
    think_after[after[after > first] - 1] = np.inf  # the last turn
    pending = [(float(think_s[i]), int(i)) for i in first[after > first]]
    heapq.heapify(pending)
    # of each user the request in the system (its number; -1: none), the first iteration that can be its last, and what
    # the user thinks after it
    number = np.full(users, -1)
    last_iteration = np.zeros(users, dtype=np.int64)
    thinks = np.full(users, np.inf)
    sent: list[int] = []

    def send(at: float, i: int) -> None:
        k = len(sent)
        sent.append(i)
        arrival[k], own["prompt"][k], own["output"][k] = at, path.prompt_tokens[i], path.output_tokens[i]
        own["row"][k] = row = classes[i]
        if believed is not None and ahead is not None:
            ahead.believed[k] = believed[i]
        run.order[place[row]] = k
        place[row] += 1
        number[user[i]] = k
        last_iteration[user[i]] = state["iterations"][0] + path.output_tokens[i]
        thinks[user[i]] = think_after[i]

    # Only such tables leave requests in the system while nobody runs. They take one decision per call while nobody is
    # about to come, or where the loop was stopped; once no timer is left, they go on from where they began to be idle.
    starves = table.freeze or table.kind == "gated" or table.kv_limit_tokens is not None
    idle, before, rows_before = False, state.copy(), run.occupancy
    while True:
        over = idle and state["now"][0] > before["now"][0] + hold
        if over:
            state[:], run.occupancy[:] = before, rows_before
        now, iterations, arrived, preempted = (
            state[name][0].item() for name in ("now", "iterations", "arrived", "preempted")
        )
        stopped_at = state["until"][0]
        until = pending[0][0] if over and pending else np.inf
        inside = np.flatnonzero(number >= 0)
        if inside.size and not over:
            to_come = np.maximum(last_iteration[inside] - iterations, 1) * least + thinks[inside]
            until = now + float(to_come.min())
        while pending and pending[0][0] <= min(until, end):
            at, i = heapq.heappop(pending)
            send(at, i)
            until = min(until, max(at, now) + float(path.output_tokens[i]) * least + think_after[i])
        if starves and (not pending or now == stopped_at) and not over:
            until = min(until, now + least, *np.maximum(arrival[arrived : len(sent)][:1], now).tolist())
        if starves and not idle:
            before, rows_before = state.copy(), run.occupancy.copy()
        state["until"] = min(until, end)
        _follow(table, run, ahead)
        stood = state["iterations"][0] == iterations
        if table.freeze and stood and state["preempted"][0] > preempted:
            # rule 22: it would do so again at every instant at which the loop is stopped
            raise InputError(
                "engine",
                "kernel",
                f"be 'reference' for table {table.name!r}, which at {now:g} s preempted all that it would have run",
                "Or use a server with more memory: its cohorts do not fit into this one.",
            )
        idle = starves and bool(stood and state["arrived"][0] == arrived == len(sent))
        now = float(state["now"][0])
        inside = np.flatnonzero(number >= 0)
        for u in inside[~np.isnan(run.finish[number[inside]])].tolist():
            k = number[u]
            if thinks[u] < np.inf:
                heapq.heappush(pending, (float(run.finish[k] + thinks[u]), sent[k] + 1))
            number[u], thinks[u] = -1, np.inf
        if until >= end or now >= end:
            break
    while pending and pending[0][0] <= end:
        send(*heapq.heappop(pending))  # during the iteration that the horizon cut
    index = np.array(sent, dtype=np.int64)
    those = slice(len(sent))
    done = run._replace(**{name: getattr(run, name)[those] for name in _PER_REQUEST})
    nobody = np.zeros(len(sent), dtype=np.bool_)
    return (
        index,
        arrival[those].copy(),
        _engine_run(done, table, nobody, slice(None), occupancy_points, nobody),
    )


def _stacked_ahead(
    forecasts: Sequence[compiled.Ahead | None], layout: NDArray[np.void]
) -> compiled.Ahead | None:
    """Those of all replicas one after the other, and in `layout` where each lies; what is shared once."""
    parts = [part for part in forecasts if part is not None]
    if not parts:
        return None
    days = np.cumsum([0] + [part.days.size for part in parts])
    words = np.cumsum([0] + [part.bits.size for part in parts])
    nodes = np.cumsum([0] + [part.tree.size for part in parts])
    layout["first_day"], layout["last_day"] = days[:-1], days[1:]
    layout["first_word"], layout["last_word"] = words[:-1], words[1:]
    layout["first_node"], layout["last_node"] = nodes[:-1], nodes[1:]
    names = ("state", "forecasts", "days", "bits", "tree", "heaps", "heap")
    return parts[0]._replace(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    )


# ------------------------------------------------------------------ flat arrays for the loops, and back


def _follow(
    table: PolicyTable,
    run: compiled.Run,
    ahead: compiled.Ahead | None,
    store: compiled.Store | None = None,
    *,
    handed: bool = False,
) -> None:
    """Run the compiled loop that follows the table; handed: requests come with their prompt's KV."""
    loop = loop_of(table, rare=handed or run.deadline.size > 0)
    if table.freeze:
        compiled.LOOPS[loop](run)
    else:
        compiled.LOOPS[loop](run, ahead, store)


_PER_REQUEST = (
    "arrival",
    "prompt",
    "output",
    "row",
    "admitted",
    "first_token",
    "finish",
    "preemptions",
    "returned",
)  # arrays of a run with an element per request
_NOTHING = np.zeros(0, dtype=np.int64)
_NOTHING.flags.writeable = False  # as a path's own columns are


def _prepare(
    path: ArrivalPath,
    classes: NDArray[np.int64],
    joins: slice | NDArray[np.int64],
    server: Server,
    table: PolicyTable,
    coefficients: NDArray[np.float64],
    horizon: float,
    warmup: float,
    points: int,
    first_token_s: NDArray[np.float64] | None = None,
) -> compiled.Run:
    """Everything a loop reads and writes, empty system; the loops allocate nothing."""
    rules = _rules(server, table)
    rules["horizon"], rules["warmup"] = horizon, warmup

    def column(values: NDArray[Any]) -> NDArray[Any]:
        """Read-only, as a path's own arrays are: another kind of array would be compiled for anew."""
        contiguous = np.ascontiguousarray(values[joins]).view()
        contiguous.flags.writeable = False
        return contiguous

    output = column(path.output_tokens)
    of_request = column(classes)
    count = len(output)
    rows, order = _rows(table, of_request)
    segments = _segments(table)
    standing = len(rows) if table.kind == "wait" else len(segments)
    groups = np.zeros(max(standing, 1), dtype=compiled.GROUP)
    groups["top"] = compiled.NOBODY
    groups["chosen"] = 1
    days = compiled.calendar_days(int(output.max(initial=1)), len(groups))
    size = min(count, int(rules["slots"][0]))
    if not table.freeze:  # admission looks at memory, and a resident takes one unit at least
        size = min(size, int(rules["capacity"][0]))
    slots = np.zeros(max(size, 1), dtype=compiled.SLOT)
    slots["newer"] = np.arange(1, len(slots) + 1)
    returned = np.zeros(count, dtype=compiled.RETURNED)
    if rules["swap"][0]:  # else these records take no memory where nobody is preempted
        returned["turned"] = compiled.AT_ONCE
    first_token = np.full(count, np.nan)
    if first_token_s is not None:
        rules["handed"] = 1
        returned["served"] = first_token[:] = first_token_s
    deadline, leaver = _deadlines(path, server, joins)
    return compiled.Run(
        rules=rules,
        state=_initial_state(path, points, horizon),
        coefficients=coefficients,
        arrival=column(path.arrival_s),
        prompt=column(path.prompt_tokens),
        output=output,
        cached=_NOTHING if path.cached_prompt_tokens is None else column(path.cached_prompt_tokens),
        row=of_request,
        order=order,
        rows=rows,
        recent=np.zeros(int(rows["ring"].sum()), dtype=np.int64),
        slots=slots,
        groups=groups,
        segments=segments,
        calendars=compiled.Calendars(
            days=days,
            heads=np.full(len(groups) * days, compiled.NOBODY, dtype=np.int64),
            bits=np.zeros(len(groups) * compiled.calendar_words(days), dtype=np.int64),
            phase=np.zeros((len(groups), int(rules["block"][0])), dtype=np.int64),
        ),
        returned=returned,
        admitted=np.full(count, np.nan),
        first_token=first_token,
        finish=np.full(count, np.nan),
        preemptions=np.zeros(count, dtype=np.int64),
        gaps=np.zeros(histogram.BUCKETS, dtype=np.int64),
        occupancy=np.zeros((2 * points, 4)),
        deadline=deadline,
        leaver=leaver,
        left=np.full(count if deadline.size else 0, np.nan),
        fate=np.zeros(count if deadline.size else 0, dtype=np.int64),
        owner=np.zeros(0, dtype=np.int64),
    )


def _ahead(
    path: ArrivalPath,
    joins: slice | NDArray[np.int64],
    server: Server,
    table: PolicyTable,
    run: compiled.Run,
) -> compiled.Ahead | None:
    """What look-ahead and an order by length need, empty system; None if the table has neither."""
    limits = effective_limits(server, table)
    by_length = table.order == "shortest_first"
    if not forecasts(table):
        return None
    believed = beliefs(path, table)
    count = len(run.output)
    lengths = np.array(table.lookahead.lengths, dtype=np.int64)
    mine = np.zeros(count, dtype=np.int64) if believed is None else np.array(believed[joins])
    requests = np.lexsort((np.arange(count), mine)) if by_length else np.arange(count)
    place = np.empty(count, dtype=np.int64)
    place[requests] = np.arange(count)

    state = np.zeros(1, dtype=compiled.AHEAD)
    state["shortest"], state["shares"] = by_length, limits.shares
    nodes = days = 0
    if limits.shares:
        longest = int(mine.max(initial=1))
        if lengths.size:
            longest = int(lengths[-1])
        else:  # beliefs are cut where one request alone exceeds the limit
            longest = min(longest, max(limits.admission * limits.block, 0) + 1)
        days = compiled.calendar_days(longest + 1, 1)
        leaves = 1
        while leaves * limits.block <= 2 * longest + 2:
            leaves *= 2
        nodes = 2 * leaves * limits.block
        state["limit"], state["longest"], state["leaves"] = limits.admission, longest + 1, leaves
    heaps = np.zeros(len(run.rows), dtype=compiled.HEAP)
    heaps["start"] = run.rows["head"]
    return compiled.Ahead(
        state=state,
        believed=mine,
        lengths=lengths,
        forecasts=np.zeros(len(run.slots), dtype=compiled.FORECAST),
        days=np.full(days, compiled.NOBODY, dtype=np.int64),
        bits=np.zeros(compiled.calendar_words(days) if days else 0, dtype=np.int64),
        tree=np.zeros(nodes, dtype=compiled.NODE),
        place=place,
        requests=requests,
        heaps=heaps,
        heap=np.zeros(count if by_length else 0, dtype=np.int64),
    )


def _with_store(
    run: compiled.Run, blocks: PromptBlocks, server: Server, table: PolicyTable
) -> tuple[compiled.Run, compiled.Store]:
    """The run with a prefix cache that it fills, empty; what a request finds in it goes into `run.cached`."""
    if run.deadline.size or loop_of(table, rare=False) != compiled.CONTINUOUS:
        raise InputError(
            "engine",
            "kernel",
            "be 'reference' for a prefix cache that the run fills (`prompt_blocks`) if requests may leave unfinished"
            " or the table is of kind wait, nested-wait or vllm_v0",
            "Or read the trace with the size of a prefix cache of its own.",
        )
    count = len(run.output)
    whole = np.minimum(np.diff(blocks.first), run.prompt // blocks.block_tokens)
    kept = np.arange(len(blocks.names)) - np.repeat(blocks.first[:-1], np.diff(blocks.first))
    names = blocks.names[kept < np.repeat(whole, np.diff(blocks.first))]
    distinct, place = np.unique(names, return_inverse=True)
    state = np.zeros(1, dtype=compiled.STORE)
    state["tokens"] = blocks.block_tokens
    state["units"] = blocks.block_tokens // effective_limits(server, table).block
    state["oldest"] = state["newest"] = compiled.NOBODY
    store = compiled.Store(
        state=state,
        blocks=np.zeros(len(distinct), dtype=compiled.BLOCK),
        first=np.concatenate([[0], np.cumsum(whole)]),
        names=place.reshape(-1).astype(np.int64),
        used=np.zeros(len(names), dtype=np.int64),
        entered=np.zeros(count, dtype=np.int64),
        turn=np.zeros(count, dtype=np.int64),
        leavers=np.zeros(len(run.slots), dtype=np.int64),
    )
    return run._replace(cached=np.zeros(count, dtype=np.int64)), store


def _deadlines(
    path: ArrivalPath, server: Server, joins: slice | NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The finite deadlines of those who join, in order, and whose and which they are (`compiled.Run`)."""
    given = deadlines(path, server)
    if not given:
        return np.zeros(0), np.zeros(0, dtype=np.int64)
    at = np.stack([deadline.at_s[joins] for deadline in given])
    leaver = 2 * np.arange(at.shape[1]) + np.arange(2)[:, None]
    finite = np.isfinite(at)
    order = np.argsort(at[finite], kind="stable")
    return at[finite][order], leaver[finite][order]


def _abandons(path: ArrivalPath, server: Server) -> NDArray[np.bool_]:
    """Who leaves by itself at the first of its deadlines, (N,); none where there are no deadlines."""
    given = deadlines(path, server)
    return given[0].by_client if given else np.zeros(len(path), dtype=np.bool_)


def _rules(server: Server, table: PolicyTable) -> NDArray[np.void]:
    limits = effective_limits(server, table)
    rules = np.zeros(1, dtype=compiled.RULES)
    for name in ("capacity", "admission", "block", "slots", "budget", "chunk", "reserve", "whole_prompts"):
        rules[name] = getattr(limits, name)
    rules["interval"] = table.prefill_interval or 1
    rules["block_iterations"] = table.block_iterations or 1
    rules["whole_prompt"] = table.whole_prompt_admission
    rules["decodes_first"] = table.kind in ("sarathi", "orca", "faster_transformer")
    rules["prompts_alone"] = table.kind == "vllm_v0"
    rules["by_length"] = table.order == "shortest_first"
    rules["swap"] = table.preemption == "swap"
    rules["swap_bandwidth"] = server.swap_bandwidth or np.inf
    rules["static"] = table.kind == "faster_transformer"
    rules["gated"] = table.kind == "gated"
    rules["restart"] = table.preemption == "restart"
    rules["gap_shift"], rules["gap_first"] = histogram.SHIFT, histogram.FIRST
    rules["gap_last"] = histogram.BUCKETS - 1
    return rules


def _rows(table: PolicyTable, of_request: NDArray[np.int64]) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """The table's rows, and the requests sorted by row, oldest first."""
    rows = np.zeros(len(table.types), dtype=compiled.ROW)
    for name in ("threshold", "gate", "period"):
        values = [getattr(row, name) for row in table.types]
        rows[name] = [UNLIMITED if value is None else value for value in values]
    rows["hold"] = [np.inf if row.max_hold_s is None else row.max_hold_s for row in table.types]
    priority = np.array([np.inf if row.priority is None else row.priority for row in table.types])
    rows["rank"] = np.searchsorted(np.sort(priority), priority)
    rows["turn"] = np.argsort(priority, kind="stable")
    if len(rows) == 1:
        counts = np.array([len(of_request)])
        order = np.arange(len(of_request))
    else:
        counts = np.bincount(of_request, minlength=len(rows))
        order = np.argsort(of_request, kind="stable")
    rows["head"] = rows["tail"] = np.cumsum(counts) - counts
    if table.kind == "gated":
        rows["ring"] = np.minimum(rows["threshold"], counts)
        rows["first"] = np.cumsum(rows["ring"]) - rows["ring"]
    return rows, order


def _segments(table: PolicyTable) -> NDArray[np.void]:
    """The table's segments, nobody before any; the last one has no end."""
    segments = np.zeros(len(table.segments), dtype=compiled.SEGMENT)
    if len(segments):
        segments["threshold"] = [segment.threshold for segment in table.segments]
        ends = [-1, *(segment.boundary for segment in table.segments[:-1]), UNLIMITED]
        segments["positions"] = np.diff(ends)
        segments["head"] = segments["tail"] = compiled.NOBODY
    return segments


def _initial_state(path: ArrivalPath, points: int, horizon: float) -> NDArray[np.void]:
    state = np.zeros(1, dtype=compiled.STATE)
    state["oldest"] = state["newest"] = compiled.NOBODY
    state["since_prefill"] = UNLIMITED
    state["until"] = horizon
    span = horizon if horizon < np.inf else float(path.arrival_s[-1]) if len(path) else 0.0
    state["sample_at"] = 0.0 if points else np.inf
    state["sample_step"] = span / points if points and span > 0.0 else np.inf
    return state


#: Fields of `EngineRun` and of the loops' state that are the same numbers.
COUNTERS = {
    "iterations": "iterations",
    "batch_size_sum": "batch_sizes",
    "batch_token_sum": "batch_tokens",
    "emitted_tokens": "emitted",
    "preempted": "preempted",
    "wasted_tokens": "wasted",
    "cached_tokens": "cached",
    "peak_kv": "peak_kv",
    "kv_end": "kv_end",
    "swapped_tokens": "swapped",
    "stored_end": "stored",
    "dropped_tokens": "dropped",
}


def _engine_run(
    run: compiled.Run,
    table: PolicyTable,
    rejected: NDArray[np.bool_],
    joins: slice | NDArray[np.int64],
    points: int,
    abandons: NDArray[np.bool_],
) -> EngineRun:
    state = run.state[0]
    end = float(state["end"])
    verdict = VERDICTS[state["verdict"]]
    gone = run.fate > 0 if run.fate.size else np.zeros(len(run.finish), dtype=np.bool_)
    unfinished = np.isnan(run.finish) & ~gone
    # by the end, not by the last decision: arrivals during an iteration that the horizon cuts wait too
    newcomers = run.arrival[(run.arrival <= end) & np.isnan(run.admitted) & ~gone]
    waited = np.maximum(0.0, end - np.maximum(newcomers, run.rules["warmup"])).sum()
    starved = np.unique(run.row[unfinished]) if verdict == "stuck" else ()

    def spread(values: NDArray[Any], elsewhere: float) -> NDArray[Any]:
        if len(values) == len(rejected):
            return values
        whole = np.full(len(rejected), elsewhere, dtype=values.dtype)
        whole[joins] = values
        return whole

    status = np.where(unfinished, STATUSES.index("unfinished"), STATUSES.index("finished")).astype(np.int8)
    finish = left = spread(run.finish, np.nan)
    if gone.any():
        status[gone] = STATUSES.index("aborted")
        status[(run.fate == compiled.GAVE_UP) & abandons[joins]] = STATUSES.index("abandoned")
        left = spread(np.where(gone, run.left, run.finish), np.nan)
    return EngineRun(
        admitted_s=spread(run.admitted, np.nan),
        first_token_s=spread(run.first_token, np.nan),
        finish_s=finish,
        left_s=left,
        preemptions=spread(run.preemptions, 0),
        status=spread(status, STATUSES.index("rejected")),
        end_s=end,
        verdict=verdict,
        starved_types=tuple(table.types[j].name for j in starved),
        busy_s=float(state["busy"]),
        kv_token_s=float(state["kv_area"]),
        resident_s=float(state["resident_area"]),
        waiting_s=float(state["waiting_area"] + waited),
        gap_s=float(state["gap_s"]),
        gap_counts=run.gaps,
        occupancy=run.occupancy[: state["samples"]].copy() if points else None,
        **{field: int(state[name]) for field, name in COUNTERS.items()},
    )
