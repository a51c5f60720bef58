r"""Fluid trajectories: a threshold table followed by real-valued cohorts, one step per iteration.

Requests of type j arrive at rate λ_j as a fluid. A decision admits x_j of them, and with M the KV that residents
hold and R their number,

    n_pf = Σ x (p − c),   n_dec = R,   k_dec = M + R,   ΔT = T(n_pf, n_dec, k_dec, Σ x (p² − c²)/2),
    M ← (M + R) + Σ x p − Σ finishers·(p + o − 1),   R ← R + Σ x − Σ finishers,   q_j ← q_j − x_j + λ_j ΔT.

Finishers are known when they are admitted, so a ring of finishing times makes an iteration cost O(types) (for types
with length laws, O(output lengths); with chunks times those in prefill, O(prompts × outputs)), however long they stay.
Lengths enter by E[p | o], and E[p − c | o] and E[p² − c² | o], c what is cached of a prompt, alone.

Rules with a fluid version, numbered as in `reference`: 9a (swapping), 10 (a request is infinitesimal, so a token budget
only bounds how much is admitted, and whole prompts or first chunks fit alike; `chunk_tokens` cuts prompts into ⌈p/c⌉
iterations), 11 and 12, 13 (first come, first served is a common arrival time θ up to which every row of one priority is
served), 14, 15, 16 (`prefill_interval`), 17, 18. Preemption takes the newest cohort first, all requests of a cohort
alike (the engines take its latest arrivals first). A server with nobody to serve, and no gate that keeps it, runs an
iteration of T(nothing) and serves what arrived in it.

WAIT, rules 20 to 23: a row j is open when at least `gate` wait in it, a real number now, or its hold has expired; a
block admits min(threshold, waiting) of every open row and runs their residents for `block_iterations` iterations, while
the rows that are not open stand still with their KV. With no row open the server idles until the first one is, at
t + (gate − waiting)/λ_j or when a hold expires. A row's residents move together, so each row has a clock of its own and
a ring of finishing times on it, and M, R above are sums over rows of which only the open ones grow.

Nested WAIT, rules 27 to 29: the same with segments of positions in place of rows. Inside a segment all move together;
before each but the first a fluid pauses with its KV, and the first min(n_k, paused) of it go on when segment k runs, if
at least n_1, …, n_k stand before the segments 1, …, k. So an iteration costs O(types + segments).

Waiting at the start counts, for holds, from time 0. Kinds "vllm", "capped", "gated", "wait" and "nested-wait" are
covered; other kinds, chunks of prompts of which part is cached, beside prefill intervals or swapping, residents' chunks
beyond the token budget, blocks of KV, orders by length, look-ahead, and holds under Nested WAIT are refused.

**Verdicts.** The second half of the run is looked at where decisions are taken: at iterations that are not held (rule
16), with WAIT at the starts of blocks. The queue grows if its drift, by thirds of that half, is above 1e-3 of the
arrivals both times. Otherwise the run repeats itself with the smallest period for which KV, residents and queue do so,
to 1e-6 of their largest values, over three periods and at least the longest output; period 1 is an equilibrium. Rows of
WAIT open in cycles of their own, n_j/λ_j, which may have no common period: a run that does not repeat itself, but whose
queue, residents and KV have the same means in all thirds to 5 %, is bounded. Under Nested WAIT those who pause can fill
the memory, so that whoever enters is preempted at once, for ever: the run is stuck, and ends there.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_count, check_real
from fluidsched._display import Tabular
from fluidsched.errors import InputError
from fluidsched.policy.table import PolicyTable
from fluidsched.server import Server
from fluidsched.simulation.limits import effective_limits
from fluidsched.workload import ArrivalPath

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.workload import Workload

__all__ = ["FluidTrajectory", "fluid_trajectory"]


@dataclass(frozen=True, repr=False)
class FluidTrajectory(Tabular):
    """What a fluid following a table did, one entry per iteration (I of them).

    Attributes
    ----------
    time_s : numpy.ndarray, shape (I,)
        Start of each iteration, s.
    idle_s : numpy.ndarray, shape (I,)
        How long the server idled before it, s.
    iteration_time, resident_kv, residents, waiting, admitted, completed, preempted : numpy.ndarray, shape (I,)
        Its duration (s); KV tokens and requests held during it; requests waiting at its start, after the
        decision; requests admitted, completed and preempted.
    verdict : str
        "equilibrium", "limit cycle", "bounded", "eviction collapse", "overload", "stuck" or "undecided".
    evidence : mapping
        The numbers the verdict rests on.
    policy : str
    """

    policy: str
    time_s: NDArray[np.float64]
    idle_s: NDArray[np.float64]
    iteration_time: NDArray[np.float64]
    resident_kv: NDArray[np.float64]
    residents: NDArray[np.float64]
    waiting: NDArray[np.float64]
    admitted: NDArray[np.float64]
    completed: NDArray[np.float64]
    preempted: NDArray[np.float64]
    verdict: str
    evidence: Mapping[str, float]

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {value:.6g}" for name, value in self.evidence.items())
        return (
            f"FluidTrajectory of {self.policy!r}: {len(self.time_s):,} iterations, {self.verdict}\n  {facts}"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per iteration."""
        import pandas as pd

        return pd.DataFrame({name: getattr(self, name) for name in _SERIES})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the KV held over time; see `fluidsched.plots.trajectory`."""
        from fluidsched import plots

        return plots.trajectory(self, ax=ax)


_SERIES = (
    "time_s", "idle_s", "iteration_time", "resident_kv", "residents", "waiting", "admitted", "completed", "preempted",
)  # fmt: skip


Floats = NDArray[np.float64]
Residents = Mapping[tuple[str, int], float]


@dataclass
class _Cohort:
    """Requests that entered together: `mass` per class, `produced` tokens each when step `entered` began.

    With chunks both may differ by class: of residents at the start, and of those preempted among prefills.
    WAIT: of one `row`, on whose clock `entered` is, with `left` classes in it; preempted ones were last `served`
    then, s.
    """

    mass: Floats
    produced: Any
    entered: Any
    row: int = 0
    served: float = 0.0
    left: int = 0


class _Stuck(Exception):
    """Those in service stand still, whoever enters is preempted at once, and nothing that comes will change it."""


class _Step(NamedTuple):
    """One iteration: the series' entries, whether a decision began it, and the KV held while the server idled."""

    entries: tuple[float, ...]
    decided: bool
    idle_kv: float


class _Demand:
    """Who comes and waits. A class is what one (type, row of the table, output length) have in common.

    With chunks also one prompt length, which says how many iterations a prefill takes.

    Requests waiting at the start count as having arrived at a constant rate in [-1, 0); `since` is the arrival
    time up to which a row has been admitted.
    """

    def __init__(self, workload: Workload, server: Server, table: PolicyTable):
        self.server, self.table = server, table
        self.limits = effective_limits(server, table)
        self.chunk = math.inf if table.chunk_tokens is None else float(table.chunk_tokens)
        self.capacity = float(server.kv_capacity)
        classes = _classes(workload, table)
        self.kind, self.row, self.output, self.rate, self.prompt, self.computed, self.attention = classes
        self.backlog = np.zeros_like(self.rate)
        self.since = np.full(len(table.types), -1.0)
        self.hold = np.array([math.inf if row.max_hold_s is None else row.max_hold_s for row in table.types])
        priority = [math.inf if row.priority is None else float(row.priority) for row in table.types]
        self.priority = np.array(priority)
        self.now = 0.0

    def arrived(self, until: Floats) -> Floats:
        """Newcomers per class that arrived up to a time given per row."""
        time = until[self.row]
        newcomers: Floats = self.backlog * np.minimum(time + 1.0, 1.0) + self.rate * np.maximum(time, 0.0)
        return newcomers

    def per_row(self, mass: Floats) -> Floats:
        return np.bincount(self.row, mass, minlength=len(self.since)).astype(np.float64)

    def newcomers(self) -> Floats:
        """Waiting newcomers per row."""
        return self.per_row(self.arrived(np.full_like(self.since, self.now)) - self.arrived(self.since))

    def latest(self, row: int, number: float) -> float:
        """Arrival time of the last of the next `number` newcomers of a row, of whom more wait."""
        stock, rate = self.per_row(self.backlog)[row], self.per_row(self.rate)[row]
        start = float(self.since[row])
        number += stock * min(start + 1.0, 1.0) + rate * max(start, 0.0)
        return float(number / stock - 1.0 if number < stock else (number - stock) / rate)

    def expiries(self) -> Floats:
        """When the hold of each row's first newcomer in line expires; while nobody waits, of one who comes now."""
        first = np.where(self.newcomers() > 0.0, np.maximum(self.since, 0.0), self.now)
        return np.asarray(first + self.hold)

    def needs(self, mass: Floats, produced: Any) -> Floats:
        """Memory, tokens of the iteration and slots that requests with so many tokens produced take to enter."""
        number = float(mass.sum())
        if self.chunk < math.inf:
            first = float(mass @ np.minimum(self.prompt + produced, self.chunk))
            return np.array([first, first, number])
        more = number * produced
        return np.array([float(mass @ self.prompt) + more, float(mass @ self.computed) + more, number])

    def prefill(self, entering: Iterable[_Cohort]) -> Floats:
        """Memory, tokens, number and attention (squared tokens) of those that enter."""
        total = np.zeros(4)
        for cohort in entering:
            total[:3] += self.needs(cohort.mass, cohort.produced)
            if self.chunk < math.inf:
                total[3] += float(cohort.mass @ np.minimum(self.prompt + cohort.produced, self.chunk) ** 2)
                continue
            again = cohort.produced * (2 * self.prompt + cohort.produced)
            total[3] += float(cohort.mass @ (self.attention + again))
        return total

    def _arrives(self, row: int) -> bool:
        """Whether a row can ever open again by itself."""
        return bool(self.per_row(self.rate)[row] > 0.0) and self.table.types[row].threshold != 0

    def gates_open(self) -> Floats:
        """When each row's gate is met, or its hold expires, if nobody is admitted before."""
        waiting, rates = self.stock(), self.per_row(self.rate)
        expiries = self.expiries()
        opens = [
            min(self.now + max(0.0, (row.gate - waiting[j]) / rates[j]), expiries[j])
            if self._arrives(j)
            else math.inf
            for j, row in enumerate(self.table.types)
        ]
        return np.array(opens)

    def stock(self) -> Floats:
        """Who counts towards the gates, per row."""
        return self.newcomers()

    def place_waiting(self, index: Mapping[str, int], waiting: Mapping[str, float]) -> None:
        """Who waits at the start."""
        for name, number in waiting.items():
            mine = self.kind == index[name]
            self.backlog[mine] += number * self.rate[mine] / self.rate[mine].sum()

    def share(self, kind: int, produced: int, number: float) -> Floats:
        """So many requests of a type that have produced so many tokens, by class."""
        mass = np.where((self.kind == kind) & (self.output > produced), self.rate, 0.0)
        return np.asarray(number * mass / mass.sum())

    def opened(self) -> NDArray[np.bool_]:
        """Which rows' gates are met or holds expired, to within the rounding of time."""
        return np.asarray(self.gates_open() <= self.now * (1 + 1e-12))


class _Engine(_Demand):
    """Residents run in every iteration: `vllm`, `capped`, `gated`."""

    def __init__(self, workload: Workload, server: Server, table: PolicyTable):
        super().__init__(workload, server, table)
        self.windows: list[deque[tuple[int, float]]] = [deque() for _ in table.types]
        self.kv = self.count = 0.0
        self.step = 0
        self.swaps = table.preemption == "swap"
        self.moved = 0.0  # tokens out to the host by this decision
        self.prefilled = -math.inf  # the last step that did
        self.queue_left = False
        self.cohorts: deque[_Cohort] = deque()
        self.filling: list[tuple[_Cohort, NDArray[Any]]] = []  # with the steps at which its prefills end
        self.stack: list[_Cohort] = []
        self.finishing: dict[int, list[tuple[_Cohort, int]]] = {}

    def waiting(self) -> float:
        return float(self.newcomers().sum()) + sum(float(cohort.mass.sum()) for cohort in self.stack)

    # -------------------------------------------------------------- decision

    def prefill_steps(self, produced: Any) -> Any:
        """Iterations of a prefill, per class; 1 without chunks."""
        return (
            1 if self.chunk == math.inf else np.ceil((self.prompt + produced) / self.chunk).astype(np.int64)
        )

    def standing(self, cohort: _Cohort) -> tuple[Any, Any, Any]:
        """KV held by each request of a cohort, tokens of its next iteration, and tokens produced, per class."""
        served = self.step - cohort.entered
        if self.chunk == math.inf:
            produced = cohort.produced + served
            return self.prompt + (produced - 1), 1, produced
        steps, target = self.prefill_steps(cohort.produced), self.prompt + cohort.produced
        fills = served < steps
        produced = cohort.produced + np.maximum(served - steps + 1, 0)
        held = np.where(fills, self.chunk * served, self.prompt + (produced - 1))
        return held, np.where(fills, np.minimum(target - held, self.chunk), 1.0), produced

    def prefills_go_on(self) -> Floats:
        """Number of residents that prefill, KV they hold, tokens of their next chunks, and attention of these."""
        total = np.zeros(4)
        for cohort, ends in self.filling:
            mass = np.where(self.step <= ends, cohort.mass, 0.0)
            held, chunk, _ = self.standing(cohort)
            columns = (np.ones_like(mass), held, chunk, chunk * (2.0 * held + chunk))
            total += [float(mass @ column) for column in columns]
        return total

    def make_room(self) -> float:
        """Rules 8 and 11: preempt the newest until what those left compute fits; returns how many."""
        preempted = 0.0
        number, _, chunks, _ = self.prefills_go_on().tolist()
        shortage = self.kv + (self.count - number) + chunks - self.capacity
        while shortage > 1e-9 * self.capacity:
            cohort = self.cohorts[-1]
            held, more, produced = self.standing(cohort)
            frees = float(cohort.mass @ (held + more))
            share = 1.0 if frees <= shortage else shortage / frees
            lost = cohort.mass * share
            if share < 1.0:
                cohort.mass -= lost
            else:
                cohort.mass[:] = 0.0
                self.cohorts.pop()
            self.kv -= float(lost @ held)
            self.count -= float(lost.sum())
            if self.swaps:
                self.moved += float(lost @ held)
            shortage -= share * frees
            preempted += float(lost.sum())
            if lost.any():
                kept = 0 if self.table.preemption == "restart" else produced
                self.stack.append(_Cohort(lost, kept, self.step))
        return preempted

    def admit(self, growth: float) -> list[_Cohort]:
        """Rules 13 to 15 and 17: the stack, then newcomers up to a common arrival time; residents grow by `growth`."""
        limit = min(self.capacity, float(self.limits.admission))
        left = np.array(  # memory, tokens of the iteration, slots
            [limit - self.kv - growth, self.limits.budget - growth, self.limits.slots - self.count]
        )
        entering = []
        while self.stack and (left > 0.0).all():
            piece = self.stack[-1]
            need = self.needs(piece.mass, piece.produced)
            if self.swaps:
                need[1] = need[2]  # one token each: it goes on decoding
            share = min(1.0, float((left / need).min()))
            entering.append(_Cohort(piece.mass * share, piece.produced, self.step))
            left -= share * need
            if share == 1.0:
                self.stack.pop()
            else:
                piece.mass = piece.mass * (1.0 - share)
                return entering
        if not self.stack and (left > 0.0).all():
            mass, self.since = self.cut(left)
            for window, number in zip(self.windows, self.per_row(mass), strict=True):
                window.append((self.step, float(number)))
            if mass.any():
                entering.append(_Cohort(mass, 0, self.step))
        return entering

    def row_limits(self) -> Floats:
        """Latest arrival time that the threshold and gate of each row let in (rule 17)."""
        until = np.full_like(self.since, self.now)
        if self.table.kind != "gated":
            return until
        waiting, opened = self.newcomers(), self.opened()
        for j, row in enumerate(self.table.types):
            window, period = self.windows[j], row.period or 1
            while window and window[0][0] <= self.step - period:
                window.popleft()
            if row.threshold is None:
                continue
            allowed = row.threshold - sum(number for _, number in window)
            if not opened[j] or allowed <= 0.0:
                until[j] = self.since[j]
            elif allowed < waiting[j]:
                until[j] = self.latest(j, allowed)
        return until

    def cut(self, left: Floats) -> tuple[Floats, Floats]:
        """Newcomers that enter, and per row the arrival time up to which they do (rule 13).

        The scan goes through the rows of one priority after the other, and ends where one limit binds.
        """
        rows = self.row_limits()
        entered = self.arrived(self.since)
        until = self.since
        for priority in np.unique(self.priority):
            reached = self._cut_level(left, until, rows, self.priority == priority)
            ended = (reached < rows)[self.priority == priority].any()
            until = reached
            if ended:
                break
        return self.arrived(until) - entered, until

    def _cut_level(self, left: Floats, before: Floats, rows: Floats, level: NDArray[np.bool_]) -> Floats:
        """The same for the rows of one level, given those of the levels before."""
        entered = self.arrived(self.since)

        def until(time: float) -> Floats:
            return np.where(level, np.minimum(np.maximum(time, before), rows), before)

        def use(time: float) -> Floats:
            return self.needs(self.arrived(until(time)) - entered, 0)

        here = {*before[level].tolist(), *rows[level].tolist()}
        points = sorted({min(here), *here, *((0.0,) if self.now > 0.0 else ())})

        def over(time: float) -> bool:
            return bool((use(time) > left).any())

        first = bisect_right(points, False, key=over)
        if first == len(points):
            return until(points[-1])
        if first == 0:
            return before
        low, high = use(points[first - 1]), use(points[first])
        share = min((limit - a) / (b - a) for limit, a, b in zip(left, low, high, strict=True) if b > limit)
        return until(points[first - 1] + share * (points[first] - points[first - 1]))

    def held(self) -> bool:
        """Rule 16: whether this iteration is for decodes only."""
        interval = self.table.prefill_interval or 1
        return self.step - self.prefilled < interval and not self.queue_left and self.count > 0.0

    # -------------------------------------------------------------- one iteration

    def iterate(self) -> _Step:
        """Decide and run one iteration."""
        preempted = self.make_room()
        filling, filled, chunks, of_chunks = self.prefills_go_on().tolist()
        decodes, ended = self.count - filling, self.now
        read, growth = self.kv - filled + decodes, decodes + chunks
        _check_budget(self, growth)
        held_back = self.held()
        entering = [] if preempted or held_back else self.admit(growth)
        if not entering and self.count <= 0.0 and self.table.kind == "gated":
            for window in self.windows:
                window.clear()
            entering = self.admit(growth)
            opens = float(self.gates_open().min())
            if not entering and opens > self.now:
                self.now = _in_time(opens, self.table)
                entering = self.admit(growth)
        entered, prefill, admitted, attention = self.prefill(
            cohort for cohort in entering if not (self.swaps and cohort.produced)
        ).tolist()
        for cohort in entering:
            if self.swaps and cohort.produced:  # rule 9a: back from the host, and decodes
                memory, _, number = self.needs(cohort.mass, cohort.produced).tolist()
                self.moved += memory - number
                entered, admitted = entered + memory, admitted + number
                decodes, read = decodes + number, read + memory
        for cohort in entering:
            self.cohorts.append(cohort)
            first = self.step + self.prefill_steps(cohort.produced) - 1  # the iteration of its next token
            ends = np.broadcast_to(first + self.output - cohort.produced - 1, self.output.shape)
            for c in np.flatnonzero(cohort.mass).tolist():
                self.finishing.setdefault(int(ends[c]), []).append((cohort, c))
            if (
                (first > self.step)
                if isinstance(first, int)
                else (first[cohort.mass > 0.0] > self.step).any()
            ):
                self.filling.append((cohort, first))
        attention = (attention + of_chunks) / 2
        duration = float(self.server.iteration_time(prefill + chunks, decodes, read, attention))
        if self.moved:
            assert self.server.swap_bandwidth is not None
            duration += self.moved / self.server.swap_bandwidth
            self.moved = 0.0
        start, waiting = self.now, self.waiting()
        if not held_back:
            self.queue_left = waiting > 0.0
        if prefill > 0.0:
            self.prefilled = self.step
        self.kv += growth + entered
        self.count += admitted
        held, residents, completed = self.kv, self.count, 0.0
        for cohort, c in self.finishing.pop(self.step, ()):
            mass = float(cohort.mass[c])
            cohort.mass[c] = 0.0
            completed += mass
            self.count -= mass
            self.kv -= mass * float(self.prompt[c] + self.output[c] - 1)
        while self.cohorts and not self.cohorts[0].mass.any():
            self.cohorts.popleft()
        if not self.cohorts:
            self.kv = self.count = 0.0
        self.step += 1
        self.filling = [(cohort, ends) for cohort, ends in self.filling if (ends >= self.step).any()]
        self.now += duration
        entries = (
            start, start - ended, duration, held, residents, waiting, admitted, completed, preempted,
        )  # fmt: skip
        return _Step(entries, not held_back, 0.0)

    def place(self, index: Mapping[str, int], waiting: Mapping[str, float], residents: Residents) -> None:
        """The initial state."""
        self.place_waiting(index, waiting)
        for (name, produced), number in sorted(residents.items(), key=lambda item: -item[0][1]):
            entered = -(self.prefill_steps(0) + produced - 1)
            cohort = _Cohort(self.share(index[name], produced, number), 0, entered)
            self.cohorts.append(cohort)
            self.kv += float(cohort.mass @ (self.prompt + (produced - 1)))
            self.count += number
            for c in np.flatnonzero(cohort.mass).tolist():
                end = int(self.output[c]) - produced - 1
                self.finishing.setdefault(end, []).append((cohort, c))


class _Blocks(_Demand):
    """Rows stand still or run for a block: `wait`. Arrays are per row of the table (J)."""

    def __init__(self, workload: Workload, server: Server, table: PolicyTable):
        super().__init__(workload, server, table)
        rows = len(table.types)
        self.kv, self.count, self.last = np.zeros(rows), np.zeros(rows), np.zeros(rows)
        self.clock = [0] * rows
        self.left = 0
        self.open: list[int] = []
        self.entering: list[_Cohort] = []
        self.cohorts: deque[_Cohort] = deque()  # in order of admission
        self.members = [0] * rows  # cohorts with somebody in them
        self.stacks: list[list[_Cohort]] = [[] for _ in range(rows)]
        self.finishing: list[dict[int, list[tuple[_Cohort, int]]]] = [{} for _ in range(rows)]
        self.order = np.argsort(self.priority, kind="stable").tolist()

    def stock(self) -> Floats:
        returned = [sum(float(piece.mass.sum()) for piece in stack) for stack in self.stacks]
        return np.asarray(self.newcomers() + np.array(returned))

    # -------------------------------------------------------------- decision

    def expiries(self) -> Floats:
        """Rule 23: residents and preempted requests hold too."""
        first: Floats = super().expiries()
        for j, stack in enumerate(self.stacks):
            if self.count[j] > 0.0:
                first[j] = min(first[j], self.last[j] + self.hold[j])
            first[j] = min([float(first[j]), *(piece.served + float(self.hold[j]) for piece in stack)])
        return first

    def start_block(self) -> None:
        """Rule 20: which rows open, and who enters."""
        waiting = self.stock()
        self.open = np.flatnonzero(self.opened()).tolist()
        assert self.table.block_iterations is not None
        self.left = self.table.block_iterations
        slots = float(self.limits.slots) - float(self.count.sum())
        for j in self.order:
            if j in self.open:
                number = min(float(self.table.types[j].threshold or 0), float(waiting[j]), slots)
                slots -= number
                self.enter(j, number)

    def enter(self, j: int, number: float) -> None:
        """So many enter from the front of a row's queue."""
        stack = self.stacks[j]
        while stack and number > 0.0:
            piece = stack[-1]
            mass = float(piece.mass.sum())
            share = min(1.0, number / mass)
            self.entering.append(_Cohort(piece.mass * share, piece.produced, self.clock[j], j, piece.served))
            number -= share * mass
            if share == 1.0:
                stack.pop()
            else:
                piece.mass = piece.mass * (1.0 - share)
        if stack or number <= 0.0:
            return
        before = self.arrived(self.since)
        waiting = float(self.newcomers()[j])
        self.since[j] = self.now if number >= waiting * (1 - 1e-12) else self.latest(j, number)
        mass_in = self.arrived(self.since) - before
        if mass_in.any():
            self.entering.append(_Cohort(mass_in, 0, self.clock[j], j, self.now))

    def make_room(self) -> Floats:
        """Rule 21: preempt the newest, whatever its row, until the next iteration fits.

        Returns how many were preempted, and how many of them had been admitted in this decision.
        """
        growing = float(self.count[self.open].sum())
        needed = float(self.kv.sum()) + growing + float(self.prefill(self.entering)[0])
        shortage, preempted = needed - self.capacity, np.zeros(2)
        while shortage > 1e-9 * self.capacity:
            line: list[_Cohort] | deque[_Cohort] = self.entering or self.cohorts
            cohort = line[-1]
            if line is self.cohorts and cohort.left == 0:
                line.pop()
                continue
            j, resident = cohort.row, line is self.cohorts
            produced = cohort.produced + (self.clock[j] - cohort.entered if resident else 0)
            more = produced if not resident or j in self.open else produced - 1
            frees = float(self.needs(cohort.mass, more)[0])
            share = 1.0 if frees <= shortage else shortage / frees
            lost = cohort.mass * share
            cohort.mass -= lost
            if share == 1.0:
                cohort.mass[:] = 0.0
                cohort.left = 0
                self.members[j] -= resident
                line.pop()
            if resident:
                self.kv[j] -= float(self.needs(lost, produced - 1)[0])
                self.count[j] -= float(lost.sum())
            shortage -= share * frees
            preempted += float(lost.sum()) * np.array([1.0, not resident])
            if lost.any():
                kept = 0 if self.table.preemption == "restart" else produced
                served = float(self.last[j]) if resident else cohort.served
                self.stacks[j].append(_Cohort(lost, kept, 0, j, served))
        return preempted

    # -------------------------------------------------------------- one iteration

    def iterate(self) -> _Step:
        """Decide, if no block runs, and run one iteration; rules 20 to 22."""
        ended, idle_kv, preempted, decided = self.now, self.held_kv(), np.zeros(2), False
        if self.left > 0:
            preempted = self.make_room()
        while self.left == 0 or not (self.entering or self.count[self.open].any()):
            if decided:  # nobody is left to serve: wait until another row opens, or holds expire
                opens = self.gates_open()
                later = opens[opens > self.now * (1 + 1e-12)]
                if not later.size and self.residents() > 0.0:
                    raise _Stuck
                self.now = _in_time(float(later.min(initial=math.inf)), self.table)
            self.start_block()
            decided = True
            preempted += self.make_room()
        decodes, read = float(self.count[self.open].sum()), float((self.kv + self.count)[self.open].sum())
        _, prefill, admitted, attention = self.prefill(self.entering).tolist()
        _check_budget(self, decodes + prefill)
        duration = float(self.server.iteration_time(prefill, decodes, read, attention / 2))
        start, waiting = self.now, float(self.stock().sum())
        self.kv[self.open] += self.count[self.open]
        for cohort in self.entering:
            self.join(cohort)
        self.entering = []
        held, residents, completed = self.held_kv(), self.residents(), 0.0
        self.now += duration
        for j in self.open:
            completed += self.advance(j)
            if self.is_empty(j):
                self.kv[j] = self.count[j] = 0.0  # nobody: rounding aside
            self.last[j] = self.now
        while self.cohorts and self.cohorts[0].left == 0:
            self.cohorts.popleft()
        self.left = self.left - 1 if self.count[self.open].any() else 0
        entries = (
            start, start - ended, duration, held, residents, waiting, admitted + preempted[1], completed,
            preempted[0],
        )  # fmt: skip
        return _Step(entries, decided, idle_kv)

    def held_kv(self) -> float:
        return float(self.kv.sum())

    def residents(self) -> float:
        return float(self.count.sum())

    def is_empty(self, j: int) -> bool:
        return self.members[j] == 0

    def join(self, cohort: _Cohort) -> None:
        """A cohort that entered is served with its row from now on."""
        j = cohort.row
        memory, _, number = self.needs(cohort.mass, cohort.produced).tolist()
        self.kv[j] += memory
        self.count[j] += number
        for c in np.flatnonzero(cohort.mass).tolist():
            end = self.clock[j] + int(self.output[c]) - cohort.produced - 1
            self.finishing[j].setdefault(end, []).append((cohort, c))
            cohort.left += 1
        self.members[j] += 1
        self.cohorts.append(cohort)

    def advance(self, j: int) -> float:
        """The row's clock goes on; returns how many finish."""
        completed = 0.0
        for cohort, c in self.finishing[j].pop(self.clock[j], ()):
            mass = float(cohort.mass[c])
            cohort.mass[c] = 0.0
            completed += mass
            self.count[j] -= mass
            self.kv[j] -= mass * float(self.prompt[c] + self.output[c] - 1)
            if cohort.left > 0:
                cohort.left -= 1
                self.members[cohort.row] -= cohort.left == 0
        self.clock[j] += 1
        return completed

    def place(self, index: Mapping[str, int], waiting: Mapping[str, float], residents: Residents) -> None:
        """The initial state: residents of a type are spread over its rows, none of which has run yet."""
        self.place_waiting(index, waiting)
        for (name, produced), number in sorted(residents.items(), key=lambda item: -item[0][1]):
            mass = self.share(index[name], produced, number)
            for j in np.unique(self.row[mass > 0.0]).tolist():
                cohort = _Cohort(np.where(self.row == j, mass, 0.0), produced, 0, j)
                self.cohorts.append(cohort)
                memory, _, count = self.needs(cohort.mass, produced - 1).tolist()
                self.kv[j] += memory
                self.count[j] += count
                for c in np.flatnonzero(cohort.mass).tolist():
                    end = int(self.output[c]) - produced - 1
                    self.finishing[j].setdefault(end, []).append((cohort, c))
                    cohort.left += 1
                self.members[j] += cohort.left > 0


class _Segments(_Blocks):
    """Segments of positions stand still or run for a block: `nested-wait`. Arrays are per segment (L).

    A request waits without KV before segment 1 and with it, `paused`, before each other one. Inside a segment all
    move together, at most its threshold at a position (so those who paused first go on first), on a clock of its
    own. Who is further on was admitted earlier: the newest are at the end of the first segment's line.
    """

    def __init__(self, workload: Workload, server: Server, table: PolicyTable):
        super().__init__(workload, server, table)
        count = len(table.segments)
        self.kv, self.count, self.last = np.zeros(count), np.zeros(count), np.zeros(count)
        self.paused_kv, self.paused_count = np.zeros(count), np.zeros(count)
        self.clock = [0] * count
        self.lines: list[deque[_Cohort]] = [deque() for _ in range(count)]
        self.paused: list[deque[_Cohort]] = [deque() for _ in range(count)]
        self.finishing = [{} for _ in range(count)]
        self.leaving: list[dict[int, list[_Cohort]]] = [{} for _ in range(count)]
        self.first = [0, *(segment.boundary + 1 for segment in table.segments[:-1])]
        self.positions = [*map(float, np.diff(self.first)), math.inf]

    # -------------------------------------------------------------- decision

    def start_block(self) -> None:
        """Rule 28: how many segments run, and who enters them."""
        self.open = []
        assert self.table.block_iterations is not None
        self.left = self.table.block_iterations
        if not self.opened()[0]:
            return
        for j, segment in enumerate(self.table.segments):
            if j and self.paused_count[j] < segment.threshold * (1 - 1e-12):
                break
            self.open.append(j)
        for j in self.open[1:]:
            self.resume(j)
        free = float(self.limits.slots) - float(self.count.sum() + self.paused_count.sum())
        self.enter(0, min(float(self.table.segments[0].threshold), float(self.stock()[0]), free))

    def resume(self, j: int) -> None:
        """The first of those paused before a segment go on, as many as its threshold."""
        left = float(self.table.segments[j].threshold)
        while self.paused[j] and left > 0.0:
            piece = self.paused[j][0]
            mass = float(piece.mass.sum())
            share = 1.0 if mass <= left else left / mass
            moved = piece.mass * share
            left = left - float(moved.sum()) if share == 1.0 else 0.0
            if share == 1.0:
                self.paused[j].popleft()
            else:
                piece.mass = piece.mass - moved
            self._add(self.paused_kv, self.paused_count, j, moved, 1 - piece.produced, -1.0)
            self.run(j, _Cohort(moved, piece.produced, self.clock[j], j))
        if not self.paused[j]:
            self.paused_kv[j] = self.paused_count[j] = 0.0  # nobody: rounding aside

    def _add(self, kv: Floats, count: Floats, j: int, mass: Floats, less: int, sign: float = 1.0) -> None:
        """Count residents that hold their prompt and -`less` tokens in, or out."""
        memory, _, number = self.needs(mass, -less).tolist()
        kv[j] += sign * memory
        count[j] += sign * number

    def run(self, j: int, cohort: _Cohort, done: int = 0) -> None:
        """Residents join those that move through a segment, with `done` of its positions behind them."""
        self._add(self.kv, self.count, j, cohort.mass, 1 - cohort.produced)
        self.follow(j, cohort, done)

    def follow(self, j: int, cohort: _Cohort, done: int = 0) -> None:
        """Note when a cohort's classes finish, and when the rest of it leaves the segment."""
        self.lines[j].append(cohort)
        last = self.clock[j] + self.positions[j] - 1 - done
        for c in np.flatnonzero(cohort.mass).tolist():
            end = self.clock[j] + int(self.output[c]) - cohort.produced - 1
            if end <= last:
                self.finishing[j].setdefault(end, []).append((cohort, c))
        if math.isfinite(last):
            self.leaving[j].setdefault(int(last), []).append(cohort)

    def make_room(self) -> Floats:
        """Rule 21: preempt the newest until the next iteration fits; see `_Blocks.make_room`."""
        growing = float(self.count[self.open].sum())
        needed = float((self.kv + self.paused_kv).sum()) + growing + float(self.prefill(self.entering)[0])
        shortage, preempted = needed - self.capacity, np.zeros(2)
        for j in range(len(self.clock)):
            shortage -= self._preempt(self.paused[j], j, shortage, preempted) if j else 0.0
            if not j:
                shortage -= self._preempt(self.entering, j, shortage, preempted)
            shortage -= self._preempt(self.lines[j], j, shortage, preempted)
        return preempted

    def _preempt(
        self, line: list[_Cohort] | deque[_Cohort], j: int, shortage: float, preempted: Floats
    ) -> float:
        """Preempt from the end of a line up to a shortage; returns what that frees."""
        freed, moving = 0.0, line is self.lines[j]
        while line and shortage - freed > 1e-9 * self.capacity:
            cohort = line[-1]
            if not cohort.mass.any():
                line.pop()
                continue
            produced = cohort.produced + (self.clock[j] - cohort.entered if moving else 0)
            serves = line is self.entering or (moving and j in self.open)
            frees = float(self.needs(cohort.mass, produced if serves else produced - 1)[0])
            share = 1.0 if frees <= shortage - freed else (shortage - freed) / frees
            lost = cohort.mass * share
            cohort.mass -= lost
            if share == 1.0:
                cohort.mass[:] = 0.0
                line.pop()
            if line is not self.entering:
                kv, count = (self.kv, self.count) if moving else (self.paused_kv, self.paused_count)
                self._add(kv, count, j, lost, 1 - produced, -1.0)
            freed += share * frees
            preempted += float(lost.sum()) * np.array([1.0, line is self.entering])
            if lost.any():
                kept = 0 if self.table.preemption == "restart" else produced
                self.stacks[0].append(_Cohort(lost, kept, 0))
        return freed

    # -------------------------------------------------------------- one iteration

    def held_kv(self) -> float:
        return float((self.kv + self.paused_kv).sum())

    def residents(self) -> float:
        return float((self.count + self.paused_count).sum())

    def join(self, cohort: _Cohort) -> None:
        self._add(self.kv, self.count, 0, cohort.mass, -cohort.produced)
        self.follow(0, cohort)

    def advance(self, j: int) -> float:
        """Who finishes leaves; who has run all positions of the segment pauses before the next."""
        completed = super().advance(j)
        for cohort in self.leaving[j].pop(self.clock[j] - 1, ()):
            mass, produced = cohort.mass.copy(), cohort.produced + self.clock[j] - cohort.entered
            cohort.mass[:] = 0.0
            if mass.any():
                self._add(self.kv, self.count, j, mass, 1 - produced, -1.0)
                self._add(self.paused_kv, self.paused_count, j + 1, mass, 1 - produced)
                self.paused[j + 1].append(_Cohort(mass, produced, 0, j + 1))
        while self.lines[j] and not self.lines[j][0].mass.any():
            self.lines[j].popleft()
        return completed

    def is_empty(self, j: int) -> bool:
        return not self.lines[j]

    def place(self, index: Mapping[str, int], waiting: Mapping[str, float], residents: Residents) -> None:
        """The initial state, between blocks: all residents at whole blocks of iterations."""
        self.place_waiting(index, waiting)
        assert self.table.block_iterations is not None
        for (name, produced), number in sorted(residents.items(), key=lambda item: -item[0][1]):
            if produced % self.table.block_iterations:
                raise InputError(
                    f"residents[{(name, produced)!r}]",
                    f"{produced} tokens produced",
                    f"be at a multiple of the table's block_iterations, {self.table.block_iterations}",
                )
            mass = self.share(index[name], produced, number)
            j = bisect_right(self.first, produced) - 1
            done = produced - self.first[j]
            cohort = _Cohort(mass, produced, self.clock[j], j)
            if j and not done:
                self._add(self.paused_kv, self.paused_count, j, mass, 1 - produced)
                self.paused[j].append(cohort)
            else:
                self.run(j, cohort, done)


def _check_budget(fluid: _Demand, tokens: float) -> None:
    """Refuse what tokens per iteration forbid: for those that must run there is no fluid version then."""
    if tokens > fluid.limits.budget * (1 + 1e-12):
        raise InputError(
            f"table {fluid.table.name!r}: token_budget",
            fluid.limits.budget,
            f"cover decodes and chunks of all residents, and with WAIT all that enter, {tokens:,.0f} at "
            f"{fluid.now:g} s: beyond it there is no fluid version",
        )


def _in_time(instant: float, table: PolicyTable) -> float:
    """An instant at which something happens; without any the table admits nobody who comes."""
    if math.isinf(instant):
        raise InputError("table", table.name, "admit a type that arrives")
    return instant


def _classes(workload: Workload, table: PolicyTable) -> tuple[NDArray[Any], ...]:
    """Type, row, output length, rate, E[p], E[p − c], E[p² − c²] of every class with arrivals."""
    parts = []
    for j, kind in enumerate(workload.types):
        prompt, output, weight = kind.law.atoms()
        path = ArrivalPath.from_arrays(
            np.zeros(len(prompt)),
            prompt,
            output,
            np.zeros(len(prompt), dtype=np.int64),
            type_names=(kind.name,),
        )
        row = table.classify(path)
        of_class = [row, output] if table.chunk_tokens is None else [row, output, prompt]
        keys, which = np.unique(np.stack(of_class), axis=1, return_inverse=True)
        which = which.reshape(-1)
        share = np.bincount(which, weight)
        first, second = kind.cached_moments()[:, np.searchsorted(kind.law.prompt_law.values, prompt)]
        means = (
            np.bincount(which, weight * values) / share
            for values in (prompt, prompt - first, prompt.astype(np.float64) ** 2 - second)
        )
        parts.append((np.full(len(share), j), *keys[:2], kind.arrival_rate * share, *means))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def fluid_trajectory(
    workload: Workload,
    server: Server,
    table: PolicyTable,
    *,
    iterations: int | None = None,
    waiting: Mapping[str, float] | None = None,
    residents: Residents | None = None,
) -> FluidTrajectory:
    """Follow a threshold table with a fluid of requests.

    Parameters
    ----------
    workload : Workload
        Types with arrival rates above 0 and their length laws.
    server : Server
        With coefficients for its iteration time and without a block size.
    table : PolicyTable
        Kind "vllm", "capped", "gated", "wait" or "nested-wait"; see the module for what it must not use.
    iterations : int, optional
        How many; by default 40 times the longest output, at least 400.
    waiting : mapping, optional
        Type name -> requests waiting at the start.
    residents : mapping, optional
        (type name, tokens already produced ≥ 1) -> requests in service at the start; the fewer tokens, the more
        recently admitted.

    Returns
    -------
    FluidTrajectory

    Raises
    ------
    InputError
        For a rule without a fluid version, or an impossible initial state.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 12.0, prompt_tokens=512, output_tokens=21)])
    >>> server = fs.Server(137_000, fs.IterationTime.paper(d0=0.010042382503853812, d1=3.342175435455382e-7))
    >>> run = fs.fluid_trajectory(workload, server, fs.baselines.vllm())
    >>> run.verdict, round(run.resident_kv[-1])
    ('equilibrium', 1382)
    """
    _check_rules(server, table)
    if table.chunk_tokens is not None and any(member.cached_prefix_fraction for member in workload.types):
        raise InputError(
            f"table {table.name!r}: chunk_tokens",
            table.chunk_tokens,
            "be None where part of the prompts is cached",
            "Simulate it.",
        )
    index = {name: j for j, name in enumerate(workload.type_names)}
    waiting, residents = dict(waiting or {}), dict(residents or {})
    for j, rate in enumerate(workload.arrival_rate):
        check_real(f"workload.types[{j}].arrival_rate", float(rate), above=0.0)
    for name, number in waiting.items():
        _check_type(name, index)
        check_real(f"waiting[{name!r}]", number, minimum=0.0)
    for key, number in residents.items():
        _check_type(key[0], index)
        longest = int(workload.max_output_tokens[index[key[0]]])
        check_count(f"residents[{key!r}] tokens produced", key[1], minimum=1, maximum=longest - 1)
        check_real(f"residents[{key!r}]", number, minimum=0.0)
    longest = int(workload.max_output_tokens.max())
    count = check_count("iterations", max(400, 40 * longest) if iterations is None else iterations, minimum=8)
    largest = float((workload.max_prompt_tokens + workload.max_output_tokens).max()) - 1.0
    if largest > server.kv_capacity:
        raise InputError(
            "server.kv_capacity", server.kv_capacity, f"hold the longest request, {largest:,.0f}"
        )
    engines = {"wait": _Blocks, "nested-wait": _Segments}
    fluid = engines.get(table.kind, _Engine)(workload, server, table)
    fluid.place(index, waiting, residents)
    steps: list[_Step] = []
    stuck = False
    try:
        for _ in range(count):
            steps.append(fluid.iterate())
    except _Stuck:
        stuck = True
    if not steps:
        raise InputError("residents", "a state in which nobody can be served", "leave memory for newcomers")
    series = np.array([step.entries for step in steps]).T.copy()
    for array in series:
        array.setflags(write=False)
    decided, idle_kv = (np.array([getattr(step, name) for step in steps]) for name in ("decided", "idle_kv"))
    arrival_rate = float(workload.arrival_rate.sum())
    if stuck:
        verdict, evidence = "stuck", _state(fluid, series, arrival_rate)
    else:
        verdict, evidence = _judge(series, decided, idle_kv, arrival_rate, longest)
    named: dict[str, Any] = dict(zip(_SERIES, series, strict=True))
    return FluidTrajectory(policy=table.name, verdict=verdict, evidence=evidence, **named)


def _check_type(name: str, index: Mapping[str, int]) -> None:
    if name not in index:
        raise InputError("initial state", name, f"name types of the workload: {', '.join(index)}")


def _check_rules(server: Server, table: PolicyTable) -> None:
    place = f"table {table.name!r}: "
    kinds = ("vllm", "capped", "gated", "wait", "nested-wait")
    if table.kind not in kinds:
        raise InputError(f"{place}kind", table.kind, f"be one of {', '.join(kinds)}", "Simulate it instead.")
    refused = [
        ("chunk_tokens", table.freeze and table.chunk_tokens is not None),
        ("prefill_interval", table.freeze and table.prefill_interval is not None),
        ("chunk_tokens beside prefill_interval", bool(table.chunk_tokens and table.prefill_interval)),
        ("preemption", table.freeze and table.preemption == "swap"),
        ("chunk_tokens beside swapping", bool(table.chunk_tokens) and table.preemption == "swap"),
        ("order", table.order != "fcfs"),
        ("lookahead", table.lookahead.mode != "none"),
        ("types[0].max_hold_s", table.kind == "nested-wait" and table.types[0].max_hold_s is not None),
    ]
    for name, wrong in refused:
        if wrong:
            raise InputError(
                f"{place}{name}", "a rule without a fluid version", "not be used", "Simulate it."
            )
    if table.preemption == "swap" and server.swap_bandwidth is None:
        raise InputError(
            "server.swap_bandwidth",
            "nothing",
            f"be given, tokens/s: table {table.name!r} preempts by swapping",
        )
    if server.block_size is not None:
        raise InputError("server.block_size", server.block_size, "be None: a fluid has no blocks")
    if server.iteration_time.coefficients is None:
        raise InputError("server.iteration_time", "a function", "have coefficients")


def _state(fluid: _Engine | _Blocks, series: Floats, arrival_rate: float) -> dict[str, float]:
    """Where a stuck trajectory stands."""
    assert isinstance(fluid, _Blocks)
    return {
        "time": fluid.now,
        "arrival_rate": arrival_rate,
        "completed": float(series[7].sum()),
        "resident_kv": fluid.held_kv(),
        "residents": fluid.residents(),
        "waiting": float(fluid.stock().sum()),
    }


def _judge(
    series: Floats, decided: NDArray[np.bool_], idle_kv: Floats, arrival_rate: float, longest: int
) -> tuple[str, dict[str, float]]:
    """Name what the second half of the run does; see the module."""
    half = series.shape[1] // 2
    time, idle, duration, kv, residents, queue, _, completed, preempted = series[:, half:]
    span = float(time[-1] + duration[-1] - time[0] + idle[0])
    evidence = {
        "completion_rate": float(completed.sum()) / span,
        "arrival_rate": arrival_rate,
        "preempted_per_completion": float(preempted.sum() / max(float(completed.sum()), 1e-300)),
        "resident_kv": float(kv @ duration + idle_kv[half:] @ idle) / span,
        "iteration_time": float(duration.mean()),
        "busy_fraction": float(duration.sum()) / span,
    }
    thirds = np.array_split(np.arange(len(time)), 3)
    mean_queue = [float(queue[part].mean()) for part in thirds]
    mean_time = [float(time[part].mean()) for part in thirds]
    drift = np.diff(mean_queue) / np.diff(mean_time)
    evidence["queue_drift"] = float(drift.mean())
    if (drift > 1e-3 * arrival_rate).all():
        return ("eviction collapse" if preempted.any() else "overload"), evidence
    state = np.stack([kv, residents, queue])[:, decided[half:]]
    scale = 1e-6 * (np.abs(state).max(axis=1, keepdims=True) + 1e-12)
    scale[2] = 1e-6 * (np.abs(state[1:]).max() + 1e-12)
    count = state.shape[1]
    for period in range(1, count // 4):
        window = max(3 * period, min(longest, count - period))
        if (np.abs(state[:, -window:] - state[:, -window - period : -period]) <= scale).all():
            evidence["period"] = float(period)
            return ("equilibrium" if period == 1 else "limit cycle"), evidence
    if count >= 30:
        means = np.array([part.mean(axis=1) for part in np.array_split(state, 3, axis=1)])
        if (np.ptp(means, axis=0) <= 0.05 * means.max(axis=0)).all():
            return "bounded", evidence
    return "undecided", evidence
