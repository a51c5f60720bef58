r"""Fluid trajectories: a threshold table followed by real-valued cohorts, one step per iteration.

Requests of type j arrive at rate λ_j as a fluid. A decision admits x_j of them, and with M the KV that residents
hold and R their number,

    n_pf = Σ x (p − c),   n_dec = R,   k_dec = M + R,   ΔT = T(n_pf, n_dec, k_dec, Σ x (p² − c²)/2),
    M ← (M + R) + Σ x p − Σ finishers·(p + o − 1),   R ← R + Σ x − Σ finishers,   q_j ← q_j − x_j + λ_j ΔT.

Finishers are known when they are admitted, so a ring of finishing times makes an iteration cost O(types) (for types
with length laws, O(output lengths)), however long requests stay. Lengths enter by E[p | o], and E[p − c | o] and
E[p² − c² | o], c what is cached of a prompt, alone.

Rules with a fluid version, numbered as in `reference`: 10 (whole prompts; a request is infinitesimal, so a token budget
only bounds how much is admitted), 11 and 12, 13 without priorities (first come, first served is a common arrival
time θ up to which every row is served), 14, 15, 17 without holds, 18. Preemption takes the newest cohort first, all
requests of a cohort alike (the engines take its latest arrivals first). A server with nobody to serve, and no gate that
keeps it, runs an iteration of T(nothing) and serves what arrived in it. Kinds "vllm", "capped" and "gated" are covered;
other kinds, chunks, prefill intervals, priorities, holds, blocks of KV, swapping and admission by first chunk are
refused.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    iteration_time, resident_kv, residents, waiting, admitted, completed, preempted : numpy.ndarray, shape (I,)
        Its duration (s); KV tokens and requests held during it; requests waiting at its start, after the
        decision; requests admitted, completed and preempted.
    verdict : str
        "equilibrium", "limit cycle", "eviction collapse", "overload" or "undecided".
    evidence : mapping
        The numbers the verdict rests on.
    policy : str
    """

    policy: str
    time_s: NDArray[np.float64]
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
            f"FluidTrajectory of {self.policy!r}: {len(self.time_s):,} iterations, {self.verdict} ({facts})"
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
    "time_s", "iteration_time", "resident_kv", "residents", "waiting", "admitted", "completed", "preempted",
)  # fmt: skip


Floats = NDArray[np.float64]
Residents = Mapping[tuple[str, int], float]


@dataclass
class _Cohort:
    """Requests that entered together: `mass` per class, `produced` tokens each when step `entered` began."""

    mass: Floats
    produced: int
    entered: int


class _Fluid:
    """State and mechanism. A class is what one (type, row of the table, output length) have in common.

    Requests waiting at the start count as having arrived at a constant rate in [-1, 0); `since` is the arrival
    time up to which a row has been admitted.
    """

    def __init__(self, workload: Workload, server: Server, table: PolicyTable):
        self.server, self.table = server, table
        self.limits = effective_limits(server, table)
        self.capacity = float(server.kv_capacity)
        classes = _classes(workload, table)
        self.kind, self.row, self.output, self.rate, self.prompt, self.computed, self.attention = classes
        self.backlog = np.zeros_like(self.rate)
        rows = len(table.types)
        self.since = np.full(rows, -1.0)
        self.windows: list[deque[tuple[int, float]]] = [deque() for _ in range(rows)]
        self.now = self.kv = self.count = 0.0
        self.step = 0
        self.cohorts: deque[_Cohort] = deque()
        self.stack: list[_Cohort] = []
        self.finishing: dict[int, list[tuple[_Cohort, int]]] = {}

    # -------------------------------------------------------------- queue

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

    def waiting(self) -> float:
        return float(self.newcomers().sum()) + sum(float(cohort.mass.sum()) for cohort in self.stack)

    # -------------------------------------------------------------- decision

    def make_room(self) -> float:
        """Rules 8 and 11: preempt the newest until one token each of those left fits; returns how many."""
        preempted = 0.0
        shortage = self.kv + self.count - self.capacity
        while shortage > 1e-9 * self.capacity:
            cohort = self.cohorts[-1]
            produced = cohort.produced + self.step - cohort.entered
            frees = float(cohort.mass @ (self.prompt + produced))
            share = 1.0 if frees <= shortage else shortage / frees
            lost = cohort.mass * share
            if share < 1.0:
                cohort.mass -= lost
            else:
                cohort.mass[:] = 0.0
                self.cohorts.pop()
            self.kv -= float(lost @ (self.prompt + (produced - 1)))
            self.count -= float(lost.sum())
            shortage -= share * frees
            preempted += float(lost.sum())
            if lost.any():
                kept = 0 if self.table.preemption == "restart" else produced
                self.stack.append(_Cohort(lost, kept, self.step))
        return preempted

    def admit(self) -> list[_Cohort]:
        """Rules 13 to 15 and 17: the stack, then newcomers up to a common arrival time."""
        limit = min(self.capacity, float(self.limits.admission))
        left = np.array(  # memory, tokens of the iteration, slots
            [limit - self.kv - self.count, self.limits.budget - self.count, self.limits.slots - self.count]
        )
        entering = []
        while self.stack and (left > 0.0).all():
            piece = self.stack[-1]
            need = self.needs(piece.mass, piece.produced)
            share = min(1.0, float((left / need).min()))
            entering.append(_Cohort(piece.mass * share, piece.produced, self.step))
            left -= share * need
            if share == 1.0:
                self.stack.pop()
            else:
                piece.mass = piece.mass * (1.0 - share)
                return entering
        if not self.stack and (left > 0.0).all():
            until = self.cut(left)
            mass = self.arrived(until) - self.arrived(self.since)
            self.since = until
            for window, number in zip(self.windows, self.per_row(mass), strict=True):
                window.append((self.step, float(number)))
            if mass.any():
                entering.append(_Cohort(mass, 0, self.step))
        return entering

    def needs(self, mass: Floats, produced: int) -> Floats:
        """Memory, tokens of the iteration and slots that requests with so many tokens produced take to enter."""
        number = float(mass.sum())
        more = number * produced
        return np.array([float(mass @ self.prompt) + more, float(mass @ self.computed) + more, number])

    def row_limits(self) -> Floats:
        """Latest arrival time that the threshold and gate of each row let in (rule 17)."""
        until = np.full_like(self.since, self.now)
        if self.table.kind != "gated":
            return until
        waiting = self.newcomers()
        stock, rates = self.per_row(self.backlog), self.per_row(self.rate)
        for j, row in enumerate(self.table.types):
            window, period = self.windows[j], row.period or 1
            while window and window[0][0] <= self.step - period:
                window.popleft()
            if row.threshold is None:
                continue
            allowed = row.threshold - sum(number for _, number in window)
            if waiting[j] < row.gate * (1 - 1e-12) or allowed <= 0.0:
                until[j] = self.since[j]
            elif allowed < waiting[j]:
                start = float(self.since[j])
                allowed += stock[j] * min(start + 1.0, 1.0) + rates[j] * max(start, 0.0)
                until[j] = allowed / stock[j] - 1.0 if allowed < stock[j] else (allowed - stock[j]) / rates[j]
        return until

    def cut(self, left: Floats) -> Floats:
        """Per row, the arrival time up to which newcomers enter: rule 13's scan ends where one limit binds."""
        rows = self.row_limits()
        entered = self.arrived(self.since)

        def until(time: float) -> Floats:
            cuts: Floats = np.minimum(np.maximum(time, self.since), rows)
            return cuts

        def use(time: float) -> Floats:
            return self.needs(self.arrived(until(time)) - entered, 0)

        points = sorted({*self.since.tolist(), *rows.tolist(), *((0.0,) if self.now > 0.0 else ())})

        def over(time: float) -> bool:
            return bool((use(time) > left).any())

        first = bisect_right(points, False, key=over)
        if first == len(points):
            return rows
        low, high = use(points[first - 1]), use(points[first])
        share = min((limit - a) / (b - a) for limit, a, b in zip(left, low, high, strict=True) if b > limit)
        return until(points[first - 1] + share * (points[first] - points[first - 1]))

    def idle_until(self) -> float:
        """Nothing runs and no gate is met: when the first one is."""
        waiting, rates = self.newcomers(), self.per_row(self.rate)
        waits = [
            (row.gate - waiting[j]) / rates[j]
            for j, row in enumerate(self.table.types)
            if rates[j] > 0.0 and row.threshold != 0
        ]
        return self.now + max(0.0, min(waits, default=math.inf))

    # -------------------------------------------------------------- one iteration

    def iterate(self) -> tuple[float, ...]:
        preempted = self.make_room()
        decodes, read = self.count, self.kv + self.count
        if decodes > self.limits.budget * (1 + 1e-12):
            raise InputError(
                f"table {self.table.name!r}: token_budget",
                self.limits.budget,
                f"cover all decodes, {decodes:,.0f} at {self.now:g} s: beyond it there is no fluid version",
            )
        entering = [] if preempted else self.admit()
        if not entering and self.count <= 0.0 and self.table.kind == "gated":
            for window in self.windows:
                window.clear()
            entering = self.admit()
            if not entering and self.idle_until() > self.now:
                self.now = self.idle_until()
                if math.isinf(self.now):
                    raise InputError("table", self.table.name, "admit a type that arrives")
                entering = self.admit()
        prefill = attention = admitted = entered = 0.0
        for cohort in entering:
            memory, tokens, _ = self.needs(cohort.mass, cohort.produced)
            entered += memory
            prefill += tokens
            again = cohort.produced * (2 * self.prompt + cohort.produced)
            attention += float(cohort.mass @ (self.attention + again))
            admitted += float(cohort.mass.sum())
            self.cohorts.append(cohort)
            for c in np.flatnonzero(cohort.mass).tolist():
                end = self.step + int(self.output[c]) - cohort.produced - 1
                self.finishing.setdefault(end, []).append((cohort, c))
        duration = float(self.server.iteration_time(prefill, decodes, read, attention / 2))
        start, waiting = self.now, self.waiting()
        self.kv = read + entered
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
        self.now += duration
        return start, duration, held, residents, waiting, admitted, completed, preempted

    def place(self, index: Mapping[str, int], waiting: Mapping[str, float], residents: Residents) -> None:
        """The initial state."""
        for name, number in waiting.items():
            mine = self.kind == index[name]
            self.backlog[mine] += number * self.rate[mine] / self.rate[mine].sum()
        for (name, produced), number in sorted(residents.items(), key=lambda item: -item[0][1]):
            mine = (self.kind == index[name]) & (self.output > produced)
            mass = np.where(mine, self.rate, 0.0)
            cohort = _Cohort(number * mass / mass.sum(), produced, 0)
            self.cohorts.append(cohort)
            self.kv += float(cohort.mass @ (self.prompt + (produced - 1)))
            self.count += number
            for c in np.flatnonzero(cohort.mass).tolist():
                end = int(self.output[c]) - produced - 1
                self.finishing.setdefault(end, []).append((cohort, c))


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
        keys, which = np.unique(np.stack([row, output]), axis=1, return_inverse=True)
        which = which.reshape(-1)
        share = np.bincount(which, weight)
        first, second = kind.cached_moments()[:, np.searchsorted(kind.law.prompt_law.values, prompt)]
        means = (
            np.bincount(which, weight * values) / share
            for values in (prompt, prompt - first, prompt.astype(np.float64) ** 2 - second)
        )
        parts.append((np.full(len(share), j), *keys, kind.arrival_rate * share, *means))
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
        Kind "vllm", "capped" or "gated"; see the module for what it must not use.
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
    fluid = _Fluid(workload, server, table)
    fluid.place(index, waiting, residents)
    series = np.array([fluid.iterate() for _ in range(count)]).T.copy()
    for array in series:
        array.setflags(write=False)
    verdict, evidence = _judge(series, float(workload.arrival_rate.sum()), longest)
    named: dict[str, Any] = dict(zip(_SERIES, series, strict=True))
    return FluidTrajectory(policy=table.name, verdict=verdict, evidence=evidence, **named)


def _check_type(name: str, index: Mapping[str, int]) -> None:
    if name not in index:
        raise InputError("initial state", name, f"name types of the workload: {', '.join(index)}")


def _check_rules(server: Server, table: PolicyTable) -> None:
    place = f"table {table.name!r}: "
    if table.kind not in ("vllm", "capped", "gated"):
        raise InputError(f"{place}kind", table.kind, "be 'vllm', 'capped' or 'gated'", "Simulate it instead.")
    refused = [
        ("chunk_tokens", table.chunk_tokens is not None),
        ("prefill_interval", table.prefill_interval not in (None, 1)),
        ("preemption", table.preemption == "swap"),
        ("order", table.order != "fcfs"),
        ("lookahead", table.lookahead.mode != "none"),
        ("whole_prompt_admission", not table.whole_prompt_admission),
        ("priority", any(row.priority is not None for row in table.types)),
        ("max_hold_s", any(row.max_hold_s is not None for row in table.types)),
    ]
    for name, wrong in refused:
        if wrong:
            raise InputError(
                f"{place}{name}", "a rule without a fluid version", "not be used", "Simulate it."
            )
    if server.block_size is not None:
        raise InputError("server.block_size", server.block_size, "be None: a fluid has no blocks")
    if server.iteration_time.coefficients is None:
        raise InputError("server.iteration_time", "a function", "have coefficients")


def _judge(series: Floats, arrival_rate: float, longest: int) -> tuple[str, dict[str, float]]:
    """Name what the second half of the run does.

    The queue grows if its drift, by thirds of that half, is above 1e-3 of the arrivals both times. Otherwise the
    run repeats itself with the smallest period for which KV, residents and queue do so, to 1e-6 of their
    largest values, over three periods and at least the longest output; period 1 is an equilibrium.
    """
    time, duration, kv, residents, queue, _, completed, preempted = series[:, series.shape[1] // 2 :]
    span = float(duration.sum())
    evidence = {
        "completion_rate": float(completed.sum()) / span,
        "arrival_rate": arrival_rate,
        "preempted_per_completion": float(preempted.sum() / max(float(completed.sum()), 1e-300)),
        "resident_kv": float(kv @ duration) / span,
        "iteration_time": float(duration.mean()),
    }
    thirds = np.array_split(np.arange(len(time)), 3)
    mean_queue = [float(queue[part].mean()) for part in thirds]
    mean_time = [float(time[part].mean()) for part in thirds]
    drift = np.diff(mean_queue) / np.diff(mean_time)
    evidence["queue_drift"] = float(drift.mean())
    if (drift > 1e-3 * arrival_rate).all():
        return ("eviction collapse" if preempted.any() else "overload"), evidence
    state = np.stack([kv, residents, queue])
    scale = 1e-6 * (np.abs(state).max(axis=1, keepdims=True) + 1e-12)
    scale[2] = 1e-6 * (np.abs(state[1:]).max() + 1e-12)
    for period in range(1, len(time) // 4):
        window = max(3 * period, min(longest, len(time) - period))
        if (np.abs(state[:, -window:] - state[:, -window - period : -period]) <= scale).all():
            evidence["period"] = float(period)
            return ("equilibrium" if period == 1 else "limit cycle"), evidence
    return "undecided", evidence
