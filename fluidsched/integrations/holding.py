r"""A policy table as decisions of an engine's scheduler, one per iteration, in time proportional to who moves.

An engine with a scheduler of its own cannot be handed a batch. What it can be told is *whom to look at*: which
waiting requests it may admit in this iteration, and which running ones stand still, their KV kept. That is all
a table asks for, so a rule here answers just that:

    decide(now, queue, residents) -> Decision(how many newcomers each row may admit, which rows or residents run)
    ran(newcomers admitted per row, whether anything ran)

and the engine's adaptor (`fluidsched.integrations.vllm`) does it. Rule numbers are those of
`fluidsched.simulation.reference`, whose batches these decisions reproduce in an engine that schedules running
requests first, in the order of their admission, then waiting ones.

Look-ahead, which asks of one request at a time whether it may enter, is the queue's `may_admit`, an order by length
its `length_of`; both are the adaptor's to give (`fluidsched.policy.forecast` has the forecast).

Two things differ, because the engine goes on serving people. Preempted requests are never held: they are
visible at once, ahead of all others, whatever their row (rule 9's queue fronts under `wait`). And a table
without `max_hold_s` gets one, or the last requests of a quiet evening would wait for ever.

The queue keeps newcomers per row, so that a decision costs the rows and the admitted, never those who wait.
"""

from __future__ import annotations

import bisect
import heapq
import math
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fluidsched.errors import InputError
from fluidsched.policy.table import Match, PolicyTable

__all__ = ["Decision", "HeldQueue", "Resident", "Rule", "match_row", "rule_of"]

T = TypeVar("T")

UNLIMITED = 2**62
"""Stands for an allowance that does not bind."""


def match_row(
    table: PolicyTable, prompt_tokens: int, output_tokens: int | None, label: str | None
) -> int | None:
    """Return the first row whose match holds, or None.

    Parameters
    ----------
    table : PolicyTable
    prompt_tokens : int
        Prompt length, tokens.
    output_tokens : int or None
        Predicted output length, tokens; None: unknown, and no row that looks at it matches.
    label : str or None
        The request's label; None: it has none, and no row that looks at it matches.

    Examples
    --------
    >>> from fluidsched.policy.table import Match, PolicyTable, TableType
    >>> rows = [TableType("short", Match((1, 99)), threshold=2, gate=1, period=4),
    ...         TableType("long", Match((100, None)), threshold=1, gate=0, period=8)]
    >>> table = PolicyTable("two", "gated", rows)
    >>> match_row(table, 50, None, None), match_row(table, 0, None, None)
    (0, None)
    """

    def holds(match: Match) -> bool:
        if match.label is not None and match.label != label:
            return False
        if match.output is not None and (output_tokens is None or not _within(output_tokens, match.output)):
            return False
        return _within(prompt_tokens, match.prompt)

    return next((j for j, row in enumerate(table.types) if holds(row.match)), None)


def _within(tokens: int, interval: tuple[int, int | None]) -> bool:
    low, high = interval
    return tokens >= low and (high is None or tokens <= high)


class HeldQueue(Generic[T]):
    """Waiting requests in rows, of which the engine sees only those that may be admitted now.

    Newcomers stand in their row, oldest first; a row of index J, beyond the table's, holds those the table
    does not know, and is always open. Preempted requests stand apart, ahead of everybody, and are always
    visible. `open` sets how many of each row may be taken; the visible front is then the preempted, and after
    them the smallest (priority, order of arrival) among the rows with something left to take (rule 13), or
    (priority, length, order of arrival) where lengths are given (rule 31).

    Parameters
    ----------
    priorities : sequence of float
        Priority of each row of the table, smaller first; infinite where it has none. Shape (J,).
    row_by_row : bool
        Within a priority, whether all of one row come before the next row (rule 20) instead of by arrival.
    length_of : callable, optional
        Believed output length of a request, the same whenever asked; with it the shortest come first.
    """

    def __init__(
        self,
        priorities: Sequence[float],
        *,
        row_by_row: bool = False,
        length_of: Callable[[T], int] | None = None,
    ):
        self.rows: list[OrderedDict[T, tuple[int, float]]] = [OrderedDict() for _ in (*priorities, 0.0)]
        self._priorities = [*priorities, math.inf]
        self._row_by_row = row_by_row
        self._length_of = length_of
        self._shortest: list[list[tuple[int, int, T]]] = [[] for _ in self.rows]  # heaps, with some who left
        self.preempted: deque[T] = deque()
        self.may_admit: Callable[[T], bool] | None = None
        self._row_of: dict[T, int] = {}
        self._left: dict[int, int] = {}
        self._heads: list[tuple[float, int, int, int, int]] = []
        self._taken: dict[T, tuple[int, int, float]] = {}
        self._next_number = 0

    # ------------------------------------------------------------------ joining and leaving

    def join(self, request: T, row: int, now: float) -> None:
        """Put a newcomer at the end of its row; `now`, s, is when its wait begins."""
        self.rows[row][request] = (self._next_number, now)
        self._row_of[request] = row
        if self._length_of is not None:
            heapq.heappush(self._shortest[row], (self._length_of(request), self._next_number, request))
        self._next_number += 1

    def put_back(self, request: T) -> None:
        """Put a request in front again: a newcomer taken and not admitted at its old place, others ahead."""
        if request in self._taken:
            row, number, since = self._taken.pop(request)
            self.rows[row][request] = (number, since)
            self.rows[row].move_to_end(request, last=False)
            self._row_of[request] = row
            if self._length_of is not None:
                heapq.heappush(self._shortest[row], (self._length_of(request), number, request))
            if row in self._left:
                self._left[row] += 1
                heapq.heappush(self._heads, self._key(row))
        else:
            self.preempted.appendleft(request)

    def discard(self, request: T) -> None:
        """Forget a request, wherever it stands; one that is not here is no error."""
        row = self._row_of.pop(request, None)
        if row is not None:
            del self.rows[row][request]
        elif request in self.preempted:
            self.preempted.remove(request)

    # ------------------------------------------------------------------ what the engine sees

    def open(self, allowances: Mapping[int, int]) -> None:
        """Let the engine take so many newcomers of each row; rows not named stay shut."""
        self._left = {**allowances, len(self.rows) - 1: UNLIMITED}
        self._taken.clear()
        self._heads = []
        self._heads = [self._key(row) for row, left in self._left.items() if left > 0 and self.rows[row]]
        heapq.heapify(self._heads)

    def shut(self) -> dict[int, int]:
        """Shut every row; return how many newcomers were taken from each since `open`."""
        taken: dict[int, int] = {}
        for row, _, _ in self._taken.values():
            taken[row] = taken.get(row, 0) + 1
        self._left = {}
        self._heads = []
        self._taken.clear()
        return taken

    def front(self) -> T | None:
        """The request the engine should look at next, or None."""
        if self.preempted:
            request = self.preempted[0]
        else:
            row = self._front_row()
            if row is None:
                return None
            _, _, request = self._first(row)
        if self.may_admit is not None and not self.may_admit(request):
            return None
        return request

    def take(self) -> T:
        """Remove and return the front."""
        if self.preempted:
            return self.preempted.popleft()
        row = self._front_row()
        if row is None:
            raise IndexError("take from a queue that shows nobody")
        heapq.heappop(self._heads)
        _, _, request = self._first(row)
        number, since = self.rows[row].pop(request)
        del self._row_of[request]
        self._taken[request] = (row, number, since)
        self._left[row] -= 1
        if self._left[row] > 0 and self.rows[row]:
            heapq.heappush(self._heads, self._key(row))
        return request

    def _first(self, row: int) -> tuple[int, int, T]:
        """The length (0 if nobody asks), number and self of the newcomer that comes first in a row with any."""
        if self._length_of is None:
            request, (number, _) = next(iter(self.rows[row].items()))
            return 0, number, request
        heap, waiting = self._shortest[row], self.rows[row]
        while heap[0][2] not in waiting or waiting[heap[0][2]][0] != heap[0][1]:
            heapq.heappop(heap)  # taken or gone
        return heap[0]

    def _key(self, row: int) -> tuple[float, int, int, int, int]:
        """Place of a row's first newcomer among the heads; its last entry is the row."""
        length, number, _ = self._first(row)
        return self._priorities[row], row if self._row_by_row else 0, length, number, row

    def _front_row(self) -> int | None:
        """The row whose oldest newcomer is next; heads that moved meanwhile are corrected."""
        while self._heads:
            row = self._heads[0][-1]
            if self._left[row] > 0 and self.rows[row] and self._heads[0] == self._key(row):
                return row
            if self._left[row] > 0 and self.rows[row]:
                heapq.heapreplace(self._heads, self._key(row))
            else:
                heapq.heappop(self._heads)
        return None

    # ------------------------------------------------------------------ what rules see

    def waiting(self, row: int) -> int:
        """Newcomers that wait in a row."""
        return len(self.rows[row])

    def oldest_since(self, row: int) -> float:
        """When the wait of a row's oldest newcomer began, s; infinite if nobody waits."""
        return next(iter(self.rows[row].values()))[1] if self.rows[row] else math.inf

    def __len__(self) -> int:
        return len(self._row_of) + len(self.preempted)

    def __iter__(self) -> Iterator[T]:
        yield from self.preempted
        for row in self.rows:
            yield from row


@dataclass(slots=True)
class Resident:
    """What a rule sees of a request in service.

    Attributes
    ----------
    request : hashable
        Who it is; the same between decisions.
    row : int
        Its row of the table; J if the table does not know it.
    arrival_s : float
        When it arrived, s.
    tokens : int
        Output tokens produced, those in flight included.
    can_run : bool
        Whether an iteration could still serve it; False once its last token is in flight.
    """

    request: Hashable
    row: int
    arrival_s: float
    tokens: int
    can_run: bool


Residents = Callable[[], Sequence[Resident]]
"""The residents in order of admission, made when a rule asks: those that do not look cost nothing."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Whom the engine may admit and whom it serves.

    Attributes
    ----------
    allowances : mapping
        Newcomers each row may admit; rows not named admit nobody.
    paused : sequence of int
        Indices of the residents that stand still, KV kept.
    """

    allowances: Mapping[int, int]
    paused: Sequence[int] = ()


class Rule(ABC):
    """A table's decisions; see the module's docstring for the protocol.

    Attributes
    ----------
    table : PolicyTable
    holds_s : list of float
        Longest hold of each row, s; infinite where nothing bounds it. Shape (J,).
    """

    def __init__(self, table: PolicyTable, max_hold_s: float | None):
        self.table = table
        default = math.inf if max_hold_s is None else max_hold_s
        self.holds_s = [default if row.max_hold_s is None else row.max_hold_s for row in table.types]

    @abstractmethod
    def decide(self, now: float, queue: HeldQueue[T], residents: Residents) -> Decision:
        """Return whom to look at in the next iteration."""

    def ran(self, admitted: Mapping[int, int], anything: bool, now: float) -> None:  # noqa: B027
        """Take note of what the engine did: newcomers admitted per row, and whether an iteration runs."""


class Continuous(Rule):
    """`vllm` and `capped`: everybody runs, everybody may enter; caps and budgets are the engine's own."""

    def decide(self, now: float, queue: HeldQueue[T], residents: Residents) -> Decision:
        return Decision(dict.fromkeys(range(len(self.table.types)), UNLIMITED))


class Gated(Rule):
    """`gated` (rules 17 and 18): at most threshold newcomers of a row in any period of iterations run."""

    def __init__(self, table: PolicyTable, max_hold_s: float | None):
        super().__init__(table, max_hold_s)
        self.iterations = 0
        self.windows: list[deque[tuple[int, int]]] = [deque() for _ in table.types]

    def decide(self, now: float, queue: HeldQueue[T], residents: Residents) -> Decision:
        allowances = self._allowances(now, queue)
        if any(queue.waiting(j) for j in allowances) or not any(self.windows) or queue.preempted:
            return Decision(allowances)
        if not any(resident.can_run for resident in residents()):  # the engine would idle (rule 18)
            for window in self.windows:
                window.clear()
            allowances = self._allowances(now, queue)
        return Decision(allowances)

    def _allowances(self, now: float, queue: HeldQueue[T]) -> dict[int, int]:
        allowances = {}
        for j, (row, window) in enumerate(zip(self.table.types, self.windows, strict=True)):
            assert row.threshold is not None
            assert row.period is not None
            while window and window[0][0] <= self.iterations - row.period:
                window.popleft()
            if queue.waiting(j) >= row.gate or now >= queue.oldest_since(j) + self.holds_s[j]:
                left = row.threshold - sum(count for _, count in window)
                if left > 0:
                    allowances[j] = left
        return allowances

    def ran(self, admitted: Mapping[int, int], anything: bool, now: float) -> None:
        for j, count in admitted.items():
            if j < len(self.windows) and count:
                self.windows[j].append((self.iterations, count))
        self.iterations += anything


class Wait(Rule):
    """`wait` (rules 20 to 23): blocks of iterations for the rows whose gate is met; the others stand still."""

    def __init__(self, table: PolicyTable, max_hold_s: float | None):
        super().__init__(table, max_hold_s)
        self.left = 0
        self.selected: set[int] = set()
        self.served_s = [-math.inf] * len(table.types)
        self.serving = False

    def decide(self, now: float, queue: HeldQueue[T], residents: Residents) -> Decision:
        if self.serving:  # an iteration ends where the next decision is taken (rule 23)
            for j in self.selected - {len(self.served_s)}:
                self.served_s[j] = now
        allowances: dict[int, int] = {}
        present = residents()
        running = self.left > 0 and any(
            resident.can_run and resident.row in self.selected for resident in present
        )
        if not running:
            assert self.table.block_iterations is not None
            self.left = self.table.block_iterations
            rows = {resident.row for resident in present}
            self.selected = {j for j in range(len(self.table.types)) if self._is_open(j, now, queue, rows)}
            for j in self.selected:
                allowances[j] = self.table.types[j].threshold or 0
            self.selected.add(len(self.table.types))  # whom the table does not know, it does not pause
        paused = [i for i, resident in enumerate(present) if resident.row not in self.selected]
        return Decision(allowances, paused)

    def _is_open(self, j: int, now: float, queue: HeldQueue[T], present: set[int]) -> bool:
        row = self.table.types[j]
        if not row.threshold:
            return False
        unserved = self.served_s[j] if j in present else math.inf
        unserved = min(unserved, queue.oldest_since(j))
        return queue.waiting(j) >= row.gate or now >= unserved + self.holds_s[j]

    def ran(self, admitted: Mapping[int, int], anything: bool, now: float) -> None:
        self.serving = anything
        self.left = self.left - 1 if anything else 0


class NestedWait(Rule):
    """`nested-wait` (rules 27 to 29): thresholds over the iterations done since admission, in blocks.

    A resident first seen at a decision was admitted by the iteration before, so it stands at position 1; from
    then on every token is one position. Whoever joins a block by recovering from a preemption runs with it.
    """

    def __init__(self, table: PolicyTable, max_hold_s: float | None):
        super().__init__(table, max_hold_s)
        self.first = [0, *(segment.boundary + 1 for segment in table.segments[:-1])]
        self.left = 0
        self.serving = False
        self.paused: set[Hashable] = set()
        self.tokens_before: dict[Hashable, int] = {}
        self.served_s: dict[Hashable, float] = {}

    def decide(self, now: float, queue: HeldQueue[T], residents: Residents) -> Decision:
        present = residents()
        known = self.tokens_before
        self.tokens_before = {
            resident.request: known.get(resident.request, resident.tokens - 1) for resident in present
        }
        self.served_s = {
            resident.request: now
            if self.serving and resident.request not in self.paused
            else self.served_s.get(resident.request, now)
            for resident in present
        }
        allowances: dict[int, int] = {}
        running = self.left > 0 and any(
            resident.can_run and resident.request not in self.paused for resident in present
        )
        if not running:
            assert self.table.block_iterations is not None
            self.left = self.table.block_iterations
            selected, newcomers = self._start_segments(now, queue, present)
            allowances[0] = newcomers
            unknown = len(self.table.types)
            self.paused = {
                resident.request
                for resident in present
                if resident.row != unknown and resident.request not in selected
            }
        return Decision(allowances, [i for i, r in enumerate(present) if r.request in self.paused])

    def _start_segments(
        self, now: float, queue: HeldQueue[T], present: Sequence[Resident]
    ) -> tuple[set[Hashable], int]:
        """Rule 28: which residents run, and how many newcomers may enter."""
        segments, first = self.table.segments, self.first
        at: dict[int, list[Resident]] = {}
        for resident in sorted(present, key=lambda resident: resident.arrival_s):
            if resident.row < len(self.table.types) and resident.can_run:
                position = resident.tokens - self.tokens_before[resident.request]
                at.setdefault(position, []).append(resident)
        waiting = queue.waiting(0) + len(queue.preempted)
        last = 0
        while last < len(segments):
            count = len(at.get(first[last], ())) if last else waiting
            if count < segments[last].threshold:
                break
            last += 1
        if now >= queue.oldest_since(0) + self.holds_s[0]:
            last = max(last, 1)
        for position, group in at.items():
            if any(now >= self.served_s[resident.request] + self.holds_s[0] for resident in group):
                last = max(last, bisect.bisect_right(first, position))
        selected: set[Hashable] = set()
        for position, group in at.items():
            k = bisect.bisect_right(first, position)
            if k <= last:
                selected.update(resident.request for resident in group[: segments[k - 1].threshold])
        newcomers = segments[0].threshold - len(queue.preempted) if last else 0
        return selected, max(newcomers, 0)

    def ran(self, admitted: Mapping[int, int], anything: bool, now: float) -> None:
        self.serving = anything
        self.left = self.left - 1 if anything else 0


_RULES: dict[str, type[Rule]] = {
    "vllm": Continuous,
    "capped": Continuous,
    "gated": Gated,
    "wait": Wait,
    "nested-wait": NestedWait,
}


def rule_of(table: PolicyTable, max_hold_s: float | None) -> Rule:
    """Return the rule of a table.

    Parameters
    ----------
    table : PolicyTable
    max_hold_s : float or None
        Longest hold, s, of rows that state none; None: they may hold for ever.

    Raises
    ------
    InputError
        If an engine cannot be made to follow the table; the message says what of it.
    """
    place = f"policy {table.name!r}: "
    _require(table.kind in _RULES, f"{place}kind", table.kind, f"be one of {', '.join(_RULES)}")
    _require(
        table.preemption == "recompute",
        f"{place}preemption",
        table.preemption,
        "be 'recompute', which is what the engine does",
    )
    believes = table.order != "fcfs" or table.lookahead.mode == "known"
    if table.freeze:
        _require(table.order == "fcfs", f"{place}order", table.order, f"be 'fcfs' in a {table.kind!r} table")
        mode = table.lookahead.mode
        _require(mode == "none", f"{place}lookahead", mode, f"have mode 'none' in a {table.kind!r} table")
    _require(
        not believes or table.predictor != "lower",
        f"{place}predictor",
        table.predictor,
        "not be 'lower': requests state one length, not an interval",
    )
    return _RULES[table.kind](table, max_hold_s)


def _require(holds: bool, argument: str, received: object, required: str) -> None:
    if not holds:
        raise InputError(argument, received, required, "Compile another kind of table for this server.")
