r"""The hindsight optimum: the least total latency of a finite path, known in advance.

**Setting.** Every iteration lasts ΔT (*unit iterations*), so time counts in rounds. Request i arrives at
round a_i and is served in o_i rounds, in its k-th holding p_i + k − 1 tokens of at most C. Without
preemption a schedule is a start round t_i ≥ a_i per request; its latency is t_i + o_i − a_i rounds.

**Integer program** (Jaillet et al., arXiv 2502.07115). Requests with equal (p, o) are interchangeable, so
let x_{c,t} be how many of class c start at round t and y_{c,t} how many still wait after it:

    min  Σ_{c,t} y_{c,t} + Σ_i o_i
    s.t. x_{c,t} + y_{c,t} = y_{c,t−1} + (arrivals of c at t)
         Σ_c Σ_{k=1..o_c} (p_c + k − 1) x_{c,t−k+1} ≤ C                       in every round t
         x ≥ 0 integer, y ≥ 0.

In the LP relaxation a window of H rounds is used; those that wait at its end cost nothing further and take no
memory, which can only lower the value.

**LP relaxation and its certificate.** For any prices π_t ≥ 0 on memory,

    L(π) = Σ_i ( o_i + min( H − a_i, min_{a_i≤t<H} { t − a_i + Σ_k π_{t+k−1} (p_i + k − 1) } ) ) − C Σ_t π_t

is a lower bound, equal to the LP's value at its duals. The bound returned is L at the duals that an interior-point
method finds (`_prices`), evaluated afresh: its tolerance cannot overstate it.

**How the optimum is found and proved.** L(π) splits over requests and rounds, so what a decision costs beyond it
is known at once: a start at t costs its excess over the request's best start, a token left unused in round t costs
π_t. Latencies are whole rounds; with a schedule of total F at hand only starts whose excess is at most F − 1 − L(π)
can be part of a better one. A search over rounds (`_layers`) that keeps the most promising states finds F, and proves
it if it had to drop none. Otherwise the integer program is solved over the remaining starts (`_starts`), often a tenth
of all, asking for a target or less: a better schedule, a proof that there is none, or a bound when the time is up. The
target is F − 1 if the proof seems in reach. Else it begins near L(π) and rises, since a small target leaves few starts
and is refuted in seconds: each refutation is a bound, where the search for F − 1 would be far from one when stopped.

**What is covered.** A request that pauses and keeps its KV holds at every round at least what it would if
its whole service were moved back against its end; so pausing (WAIT) never helps, nor does restarting from
nothing. Preemption that drops the KV and keeps the tokens can help: there only the next bound holds.

**Combinatorial bound**, for every policy and any length of path. Request i needs W_i = Σ_k (p_i + k − 1)
token·rounds of memory; C are there per round. Its mean busy time M_i, weighted by what it holds, is at
least d_i before its end, d_i = Σ_k (p_i + k − 1)(o_i − k + 1/2)/W_i. A machine of speed C that may split
jobs anyhow minimises Σ M_i by always working on the smallest W_i present (Goemans 1997). Hence

    Σ latency ≥ max( Σ_i (M_i + d_i − a_i), Σ_i o_i ),

in O(N log N).
"""

from __future__ import annotations

import heapq
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from fluidsched._checks import check_choice, check_real
from fluidsched.bounds.bound import Bound
from fluidsched.errors import InputError

if TYPE_CHECKING:
    from fluidsched.server import Server
    from fluidsched.workload import ArrivalPath

__all__ = ["Hindsight", "hindsight_bound", "hindsight_optimum"]

_Int = npt.NDArray[np.int64]
_Real = npt.NDArray[np.float64]

_SOURCE = "arXiv 2502.07115"
_MOST_ROUNDS = 2**53
_MOST_HELD = 10**8  # entries of (K, longest)
_MOST_STARTS = 3 * 10**7  # of (K, H), of which a search for prices holds a dozen arrays
_GRID = 1e-9  # relative distance from whole rounds that counts as rounding of the arrival times
_BEAMS = ((2_000, 0.5, 0.5), (20_000, 0.5, 0.5), (20_000, 0.3, 0.65), (20_000, 0.5, 0.3))
# (width, weight, decay) of the searches, tuned on the named family: no ranking is the best on all instances.
_BEAM_BYTES = 64e6  # of the states of one search
_PROOF_TOLERANCE = 1e-3  # rounds; the solver's own feasibility tolerance is 1e-6 per row
_FIRST_PROOF, _PROOF_GROWTH = (
    1.0,
    1.5,
)  # s, and per round of the target: measured on the named family, load near one
_COVERS = {
    "integer program": "no preemption that keeps tokens; unit iterations",
    "LP relaxation": "no preemption that keeps tokens; unit iterations",
    "combinatorial": "any policy; unit iterations",
}


@dataclass(frozen=True, repr=False)
class Hindsight:
    """What is known of the least total latency of a path.

    Attributes
    ----------
    lower : float
        No schedule has a smaller total E2E latency, s.
    upper : float or None
        Total E2E latency of the schedule `start`, s; equal to `lower` when it is optimal.
    start : int64[N] or None
        Rounds after the first arrival in which the requests of that schedule start.
    method : str
        "integer program", "LP relaxation" or "combinatorial".
    requests : int
        N.
    iteration_time : float
        ΔT, s.
    """

    lower: float
    upper: float | None
    start: _Int | None
    method: str
    requests: int
    iteration_time: float

    def __post_init__(self) -> None:
        if self.start is not None:
            self.start.setflags(write=False)

    @property
    def is_optimal(self) -> bool:
        """Whether the schedule is proved best."""
        return self.upper is not None and self.upper <= self.lower

    @property
    def covers(self) -> str:
        """Which schedules the lower bound holds for."""
        return _COVERS[self.method]

    def gap_of(self, total_latency: float) -> float:
        """Certified gap of a policy: how far its total E2E latency (s) can be above the optimum, relatively."""
        return check_real("total_latency", total_latency, minimum=0.0) / self.lower - 1.0

    def to_bound(self) -> Bound:
        """Lower bound on the mean E2E latency over the path's requests."""
        formula = (
            f"min Σ latency / N by the {self.method}"
            if self.method != "combinatorial"
            else "Σ (M + d − a) / N"
        )
        return Bound("mean_e2e", self.lower / self.requests, "s", "lower", formula, _SOURCE, self.covers)

    def __repr__(self) -> str:
        found = ""
        if self.is_optimal:
            found = ", attained"
        elif self.upper is not None:
            found = f", {self.upper:,.6g} s found ({self.gap_of(self.upper):.2%} above)"
        return f"Hindsight: {self.requests:,} requests, total latency ≥ {self.lower:,.6g} s by {self.method}{found}"


@dataclass(frozen=True)
class _Instance:
    """A path in rounds: class of each request, what a class holds per iteration, and the capacity.

    `arrival` (N,), `kind` (N,), `held` (K, longest), zero beyond a class's `length` (K,).
    """

    arrival: _Int
    kind: _Int
    held: _Real
    length: _Int
    capacity: float
    round_s: float

    @property
    def output(self) -> _Int:
        return np.asarray(self.length[self.kind])

    def total(self, start: _Int) -> int:
        """Σ latency of a schedule, rounds; it is checked to be one."""
        used = np.zeros(int(start.max()) + self.held.shape[1])
        for k in range(self.held.shape[1]):
            np.add.at(used, start + k, self.held[self.kind, k])
        assert (start >= self.arrival).all()
        assert used.max() <= self.capacity
        return int((start + self.output - self.arrival).sum())


def hindsight_optimum(path: ArrivalPath, server: Server, *, time_limit: float = 50.0) -> Hindsight:
    """Best schedule of a short path in hindsight, by the integer program.

    A search over rounds finds a schedule, and proves those of short paths best; else the solver is asked for a
    better one. If its limit is reached before the proof is complete, the best schedule and the proved lower bound
    are returned; their distance is `gap_of(upper)`. The search takes seconds, whatever the limit.

    Parameters
    ----------
    path : ArrivalPath
        Tens of requests, arriving at whole multiples of the iteration time after the first.
    server : Server
        Constant iteration time, finite KV capacity, no other limit.
    time_limit : float
        Seconds given to the solver.

    Returns
    -------
    Hindsight

    Examples
    --------
    Two requests that do not fit together: the short one first.

    >>> import fluidsched as fs
    >>> server = fs.Server(kv_capacity=8, iteration_time=fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    >>> path = fs.ArrivalPath.from_arrays([0.0, 0.0], prompt_tokens=[4, 4], output_tokens=[5, 2])
    >>> best = hindsight_optimum(path, server)
    >>> best, best.start.tolist()
    (Hindsight: 2 requests, total latency ≥ 9 s by integer program, attained, [2, 0])
    """
    limit = check_real("time_limit", time_limit, above=0.0)
    case = _instance(path, server)
    start = _first_fit(case)
    program = _Program(case, int((start + case.output).max()) + 1)
    price, relaxed = program.relaxed(limit)
    found, least = case.total(start), _whole(relaxed)
    for width, weight, decay in _BEAMS:
        if least >= found:
            break
        better, dropped = _beam(case, price, relaxed, found, width, weight, decay)
        if better is not None:
            start, found = better, case.total(better)
        least = max(least, min(_whole(dropped), found))
    if least < found:
        start, least = program.proved(price, relaxed, start, least, limit)
        found = case.total(start)
    return Hindsight(
        least * case.round_s, found * case.round_s, start, "integer program", len(path), case.round_s
    )


def hindsight_bound(
    path: ArrivalPath,
    server: Server,
    *,
    method: Literal["lp", "combinatorial"] = "lp",
    time_limit: float = 600.0,
) -> Hindsight:
    """Lower bound on the total latency of a path in hindsight.

    Parameters
    ----------
    path : ArrivalPath
        Hundreds to a few thousand requests for "lp", any number for "combinatorial".
    server : Server
        Constant iteration time, finite KV capacity, no other limit.
    method : {"lp", "combinatorial"}
        Relaxation of the integer program, or the mean-busy-time bound, which holds for preemption too.
    time_limit : float
        Seconds given to the search for prices; those at that time still give a bound.

    Returns
    -------
    Hindsight
        `upper` and `start` are None.

    Examples
    --------
    >>> import fluidsched as fs
    >>> server = fs.Server(kv_capacity=8, iteration_time=fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    >>> path = fs.ArrivalPath.from_arrays([0.0, 0.0], prompt_tokens=[4, 4], output_tokens=[5, 2])
    >>> hindsight_bound(path, server, method="combinatorial")
    Hindsight: 2 requests, total latency ≥ 7 s by combinatorial
    """
    check_choice("method", method, ("lp", "combinatorial"))
    limit = check_real("time_limit", time_limit, above=0.0)
    case = _instance(path, server)
    if method == "combinatorial":
        rounds, name = _mean_busy_bound(case), "combinatorial"
    else:
        window = int((_first_fit(case) + case.output).max()) + 1
        rounds, name = _Program(case, window).relaxed(limit)[1], "LP relaxation"
    return Hindsight(rounds * case.round_s, None, None, name, len(path), case.round_s)


def _instance(path: ArrivalPath, server: Server) -> _Instance:
    """Check that the path is one of unit iterations and write it in rounds."""
    rows = server.iteration_time.coefficients
    if rows is None or np.any(rows[:, 1:]):
        raise InputError(
            "server.iteration_time",
            server.iteration_time,
            "be constant",
            "Use IterationTime.affine(base, 0.0, 0.0, 0.0): hindsight optima are computed for unit iterations.",
        )
    for name in ("max_batch_size", "token_budget"):
        if getattr(server, name) is not None:
            raise InputError(
                f"server.{name}", getattr(server, name), "be None", "Only memory is modelled here."
            )
    if math.isinf(server.kv_capacity):
        raise InputError(
            "server.kv_capacity", server.kv_capacity, "be finite", "Nobody ever waits without a limit."
        )
    if len(path) == 0:
        raise InputError("path", "no requests", "hold at least one request")
    if path.prompt_blocks is not None:
        raise InputError(
            "path.prompt_blocks", "given", "be None", "Memory that requests share is not modelled."
        )
    round_s = server.iteration_time.empty
    exact = (path.arrival_s - path.arrival_s[0]) / round_s
    if exact[-1] > _MOST_ROUNDS:
        raise InputError(
            "path.arrival_s[-1]",
            float(path.arrival_s[-1]),
            f"lie at most {_MOST_ROUNDS:,} iterations of {round_s:g} s after the first arrival",
        )
    arrival = np.rint(exact).astype(np.int64)
    off = np.abs(exact - arrival) > _GRID * np.maximum(exact, 1.0)
    if np.any(off):
        i = int(np.argmax(off))
        raise InputError(
            f"path.arrival_s[{i}]",
            float(path.arrival_s[i]),
            f"be a whole number of iterations of {round_s:g} s after the first arrival",
            "Round the arrival times to the iteration time.",
        )
    pairs = np.stack([path.prompt_tokens, path.output_tokens], axis=1)
    classes, kind = np.unique(pairs, axis=0, return_inverse=True)
    longest = int(classes[:, 1].max())
    if len(classes) * longest > _MOST_HELD:
        raise InputError(
            "path",
            f"{len(classes):,} pairs of lengths, the longest output {longest:,} tokens",
            f"have at most {_MOST_HELD:,} pairs times longest output",
        )
    k = np.arange(longest)
    served = k < classes[:, 1:]
    held = np.where(served, server.block_rounded(classes[:, :1] + k), 0.0)
    capacity = server.usable_kv_capacity
    too_long = held.max(axis=1)[kind.ravel()] > capacity
    if np.any(too_long):
        i = int(np.argmax(too_long))
        raise InputError(
            f"path request {i}",
            f"{path.prompt_tokens[i]:,} + {path.output_tokens[i]:,} tokens",
            f"fit into the KV capacity of {capacity:,.0f} tokens",
        )
    return _Instance(
        arrival, kind.ravel().astype(np.int64), held, classes[:, 1].astype(np.int64), capacity, round_s
    )


def _whole(rounds: float) -> float:
    """Totals are whole rounds, so a lower bound may be rounded up, rounding errors aside."""
    return rounds if math.isinf(rounds) else float(math.ceil(rounds - _PROOF_TOLERANCE))


def _first_fit(case: _Instance) -> _Int:
    """A schedule to begin with: its end is the window of the LP."""
    from fluidsched.bounds._layers import first_fit

    return first_fit(case.arrival, case.kind, case.held, case.length, case.capacity)


def _start_costs(case: _Instance, price: _Real) -> _Real:
    """(K, H): t + Σ_k π_{t+k} held for a start at t; the part of a service beyond H is free."""
    rounds = np.arange(len(price))
    costs = np.empty((len(case.length), len(price)))
    for c, o in enumerate(case.length):
        padded = np.append(price, np.zeros(o))
        costs[c] = rounds + np.correlate(padded, case.held[c, :o], mode="valid")[: len(price)]
    return costs


def _best_costs(costs: _Real) -> _Real:
    """(K, H): the least cost of a start at t or later; it is at most H, the cost of any start beyond."""
    capped = np.append(costs, np.full((len(costs), 1), float(costs.shape[1])), axis=1)
    return np.asarray(np.minimum.accumulate(capped[:, ::-1], axis=1)[:, ::-1][:, :-1])


def _beam(
    case: _Instance, price: _Real, bound: float, found: int, width: int, weight: float, decay: float
) -> tuple[_Int | None, float]:
    """A schedule better than `found` in total, if the search meets one; the least bound of what it dropped."""
    from fluidsched.bounds._layers import search

    # Nobody in a better schedule starts later than this, since a start at t ≥ H exceeds its best by t − H.
    rounds = len(price) + math.ceil(found - bound) + 1
    longer = np.append(price, np.zeros(rounds - len(price)))
    costs = _start_costs(case, longer)
    costs = np.append(costs, np.full((len(costs), 1), float(rounds)), axis=1)
    state = 4 * len(case.length) + 8 * case.held.shape[1] + 4 * len(case.arrival)
    width = max(min(width, int(_BEAM_BYTES / (4 * state))), 1)
    return search(
        case.arrival,
        case.kind,
        case.held,
        case.length,
        case.capacity,
        longer,
        costs,
        _best_costs(costs),
        bound,
        found - 1.0 + _PROOF_TOLERANCE,
        width,
        weight,
        decay,
    )


class _Program:
    """The start-time program of an instance over a window of H rounds; `arrivals` (K, H) of each class."""

    def __init__(self, case: _Instance, window: int) -> None:
        size = len(case.length) * window
        if size > _MOST_STARTS:
            raise InputError(
                "path",
                f"{len(case.length):,} pairs of lengths over {window:,} rounds",
                f"have at most {_MOST_STARTS:,} possible starts, one per pair and round",
                'Take hindsight_bound(method="combinatorial"), or a shorter path.',
            )
        self.case, self.window = case, window
        self.arrivals = np.zeros((len(case.length), window))
        np.add.at(self.arrivals, (case.kind, case.arrival), 1.0)

    def relaxed(self, time_limit: float) -> tuple[_Real, float]:
        """Memory prices (H,), the duals of the LP relaxation, and L at them, in rounds."""
        from fluidsched.bounds._prices import memory_prices

        case = self.case
        price = memory_prices(self.arrivals, case.held, case.length, case.capacity, time_limit)
        value = self.lagrangian(price)
        if not value >= float(
            case.output.sum()
        ):  # cut short, or lost to rounding: no prices at all are better
            price = np.zeros(self.window)
            value = self.lagrangian(price)
        return price, value

    def lagrangian(self, price: _Real) -> float:
        """L(π) of the module's text for prices (H,), in rounds."""
        case = self.case
        total = float(case.output.sum()) - case.capacity * float(price.sum())
        best = _best_costs(_start_costs(case, price))
        return total + float(np.sum(self.arrivals * (best - np.arange(self.window))))

    def proved(
        self, price: _Real, bound: float, start: _Int, least: float, time_limit: float
    ) -> tuple[_Int, float]:
        """A schedule as good as `start` or better, and the least total that is proved; at first that is `least`."""
        case, found, deadline = self.case, self.case.total(start), time.monotonic() + time_limit
        took = _FIRST_PROOF
        rise = 1.0  # how far beyond what is proved the target may lie
        while least < found and (left := deadline - time.monotonic()) > 0.0:
            in_reach = took * _PROOF_GROWTH ** (found - least) <= left
            target = found - 1 if in_reach else min(int(least + rise) - 1, found - 1)
            began = time.monotonic()
            better, proved = self.within(
                price, bound, target, left if in_reach or rise == 1.0 else left / 2.0
            )
            if better is not None:
                start, found = better, case.total(better)
            least = min(max(least, min(_whole(proved), target + 1.0)), found)
            if least > target:
                took = max(time.monotonic() - began, _FIRST_PROOF)
                left = deadline - time.monotonic()
                rise = max(1.0, math.log(max(left / (2.0 * took), 1.0), _PROOF_GROWTH) // 1.0)
            else:
                rise = max(1.0, rise // 2.0)
        return start, least

    def within(self, price: _Real, bound: float, target: int, time_limit: float) -> tuple[_Int | None, float]:
        """A schedule of at most `target` rounds in total, from the starts that can be part of one; a lower bound.

        The bound is infinite if there is proved to be none.
        """
        from fluidsched.bounds._starts import best_starts

        case, budget = self.case, target - bound + _PROOF_TOLERANCE
        longer = np.append(price, np.zeros(math.ceil(max(budget, 0.0)) + 1))
        costs = _start_costs(case, longer)
        best = _best_costs(costs)
        excess = np.full(
            costs.shape, np.inf
        )  # of a start at t over the best of a request that may start then
        for c, a in zip(case.kind, case.arrival, strict=True):
            np.minimum(excess[c, a:], costs[c, a:] - best[c, a], out=excess[c, a:])
        kinds, rounds = np.nonzero(excess <= budget)
        return best_starts(
            case.arrival, case.kind, case.held, case.length, case.capacity, kinds, rounds, target, time_limit
        )  # fmt: skip


def _mean_busy_bound(case: _Instance) -> float:
    """max( Σ (M_i + d_i − a_i), Σ o_i ) in rounds; the machine works at speed C on the smallest W_i present."""
    work = case.held.sum(axis=1)
    k = np.arange(case.held.shape[1])
    after = np.maximum(case.length[:, None] - k - 0.5, 0.0)
    offset = (case.held * after).sum(axis=1) / work
    arrival, kind = case.arrival.astype(np.float64), case.kind
    order = np.argsort(arrival, kind="stable")
    waiting: list[tuple[float, float]] = []  # (W, rounds of work left)
    now, busy, next_one = 0.0, 0.0, 0
    while next_one < len(order) or waiting:
        if not waiting:
            now = max(now, float(arrival[order[next_one]]))
        while next_one < len(order) and arrival[order[next_one]] <= now:
            size = float(work[kind[order[next_one]]])
            heapq.heappush(waiting, (size, size / case.capacity))
            next_one += 1
        size, left = heapq.heappop(waiting)
        until = math.inf if next_one == len(order) else float(arrival[order[next_one]])
        span = min(left, until - now)
        busy += (now + span / 2.0) * span * case.capacity / size  # this stretch's share of M
        now += span
        if left > span:
            heapq.heappush(waiting, (size, left - span))
    return max(busy + float((offset[kind] - arrival).sum()), float(case.output.sum()))
