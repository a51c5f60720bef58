"""Rules of your own: a function of what a scheduler can see, run by the reference engine.

At every decision instant (the end of an iteration; while idle an arrival, or the time the rule asked to be
woken at) with anybody waiting or resident the function is handed a read-only `View` and returns a `Decision`:

1. the residents in `preempt` lose their KV and wait at the front of the queue, the last named first;
2. the waiting requests in `admit` become residents, in that order;
3. `serve` says how many tokens each resident gets in the iteration: 1 for one that decodes, a chunk of what
   is `missing` for one whose prompt is not complete. Residents that are not named pause with their KV kept.
   If `serve` is empty the server idles until the next arrival or `wake_s`.

The engine keeps the accounts and refuses a decision that breaks a limit of the server; the rule keeps its
own memory, if it needs any, in its closure or object. It may look at true output lengths: whether that is
fair is for the author to say.

Examples
--------
One at a time, shortest prompt first:

>>> def shortest_first(view):
...     if view.residents:
...         (request,) = view.residents
...         return Decision({request.index: request.next_tokens})
...     request = min(view.waiting, key=lambda r: r.prompt_tokens)
...     return Decision({request.index: request.next_tokens}, admit=[request.index])
>>> import fluidsched as fs
>>> path = fs.ArrivalPath.from_arrays([0.0, 0.0, 0.0], [9, 4, 2], [1, 1, 1])
>>> server = fs.Server(100, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
>>> runs = fs.simulate(path, server, UserRule("shortest first", shortest_first), engine="reference")
>>> runs.requests("shortest first")["finish_s"].tolist()
[3.0, 2.0, 1.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from fluidsched.errors import InputError, SimulationError
from fluidsched.policy.table import PolicyTable, TableType

if TYPE_CHECKING:
    from fluidsched.simulation.reference import _Request, _System
    from fluidsched.workload import ArrivalPath

__all__ = ["Decision", "RequestView", "UserRule", "View", "follow"]


class RequestView:
    """One request, read-only.

    Attributes
    ----------
    index : int
        Its position in the path.
    arrival_s : float
    prompt_tokens, output_tokens : int
        True lengths.
    predicted_output_tokens : int or None
        The path's prediction, if it has one.
    label : str or None
        The path's type, if it has types.
    """

    __slots__ = (
        "_request", "arrival_s", "index", "label", "output_tokens", "predicted_output_tokens", "prompt_tokens",
    )  # fmt: skip

    def __init__(self, request: _Request, label: str | None, predicted_output_tokens: int | None):
        self._request = request
        self.index = request.index
        self.arrival_s = request.arrival_s
        self.prompt_tokens = request.prompt
        self.output_tokens = request.output
        self.label = label
        self.predicted_output_tokens = predicted_output_tokens

    @property
    def produced(self) -> int:
        """Output tokens emitted."""
        return self._request.produced

    @property
    def computed(self) -> int:
        """KV tokens held."""
        return self._request.computed

    @property
    def preemptions(self) -> int:
        """How often it lost its place."""
        return self._request.preemptions

    @property
    def served_s(self) -> float:
        """End of the last iteration that served it; its arrival before that."""
        return self._request.served_s

    @property
    def missing(self) -> int:
        """Tokens to prefill before the next output token; 0 if it decodes.

        Of a waiting request all but what is stored in the host's memory or cached.
        """
        request = self._request
        if request.target == 0:
            return request.prompt + request.produced - (request.stored or request.cached)
        return max(request.target - request.computed, 0)

    @property
    def next_tokens(self) -> int:
        """What finishes its next output token: `missing`, or 1."""
        return self.missing or 1


class View:
    """What a rule sees at a decision instant, read-only."""

    __slots__ = ("_system", "_views")

    def __init__(self, system: _System, views: Sequence[RequestView]):
        self._system = system
        self._views = views

    @property
    def now(self) -> float:
        """The instant, s."""
        return self._system.now

    @property
    def iterations(self) -> int:
        """Iterations run so far."""
        return self._system.iterations

    @property
    def waiting(self) -> Sequence[RequestView]:
        """Preempted requests, the last preempted in front, then the others by arrival."""
        return _Line(self._system, self._views)

    @property
    def residents(self) -> Sequence[RequestView]:
        """In order of admission."""
        return [self._views[request.index] for request in self._system.residents]

    @property
    def kv_held(self) -> int:
        """KV tokens held by residents."""
        return self._system.held


class _Line(Sequence[RequestView]):
    """The waiting requests in line, walked only as far as the rule looks."""

    def __init__(self, system: _System, views: Sequence[RequestView]):
        self._system = system
        self._views = views

    def __len__(self) -> int:
        return self._system.waiting_count()

    def __iter__(self) -> Iterator[RequestView]:
        for request in chain(reversed(self._system.preempted), self._system.queues[0]):
            yield self._views[request.index]

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return list(islice(self, *key.indices(len(self))))
        return self[key : key + 1 or None][0]


@dataclass(frozen=True)
class Decision:
    """What a rule wants done; see the module.

    Parameters
    ----------
    serve : mapping of int to int
        Request index → tokens in this iteration; empty: idle.
    admit, preempt : sequence of int
        Request indices.
    wake_s : float, optional
        While idle, decide again at this time at the latest, s.
    """

    serve: Mapping[int, int]
    admit: Sequence[int] = ()
    preempt: Sequence[int] = ()
    wake_s: float | None = None


@dataclass(frozen=True)
class UserRule:
    """A policy given as a function; use it where `simulate` takes a table, with ``engine="reference"``.

    Parameters
    ----------
    name : str
        Unique in a run.
    decide : callable
        View → Decision. Called once per decision instant, in order of time; a rule with memory must be
        made anew for every run, because runs share nothing: with several replications it sees them one
        after another.
    preemption : {"recompute", "restart", "swap"}
        What a preempted request keeps.
    """

    name: str
    decide: Callable[[View], Decision]
    preemption: str = "recompute"
    table: PolicyTable = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.decide):
            raise InputError("decide", self.decide, "be a function of a View")
        plain = PolicyTable(self.name, "vllm", (TableType("*"),), preemption=self.preemption)
        object.__setattr__(self, "table", plain)


def follow(rule: UserRule, path: ArrivalPath, requests: list[_Request]) -> Callable[[_System], None]:
    """Return what the reference engine calls at a decision instant: ask the rule, carry out its decision."""
    predicted = path.predicted_output_tokens
    views = [
        RequestView(request, path.label(i), None if predicted is None else int(predicted[i]))
        for i, request in enumerate(requests)
    ]

    def require(holds: bool, what: str, system: _System) -> None:
        if not holds:
            raise SimulationError(f"rule {rule.name!r} {what}, at {system.now!r} s")

    def named(index: int, system: _System) -> _Request:
        require(0 <= index < len(requests), f"named request {index!r}, which is not in the path", system)
        return requests[index]

    def move(decision: Decision, system: _System) -> None:
        for index in decision.preempt:
            request = named(index, system)
            require(request.target > 0, f"preempted request {index}, which is not resident", system)
            system.preempt(request)
            system.preempted.append(request)
        for index in decision.admit:
            request = named(index, system)
            line = system.preempted if request in system.preempted else system.queues[0]
            require(request in line, f"admitted request {index}, which does not wait", system)
            line.remove(request)
            system.admit(request)

    def serve(decision: Decision, system: _System) -> None:
        limits = system.limits
        system.budget = limits.budget
        for index, tokens in decision.serve.items():
            request = named(index, system)
            most = max(request.target - request.computed, 1)
            require(request.target > 0, f"served request {index}, which is not resident", system)
            require(1 <= tokens <= most, f"gave request {index} {tokens} tokens, not 1 to {most}", system)
            system.schedule(request, tokens)
        require(system.budget >= 0, f"filled more than the token budget, {limits.budget:,}", system)
        require(system.used <= limits.capacity, f"filled more than the memory, {limits.capacity:,}", system)
        require(len(system.residents) <= limits.slots, f"filled more than {limits.slots:,} slots", system)

    def decide(system: _System) -> None:
        system.wake_s = math.inf
        if not system.residents and not system.waiting_count():
            return
        decision = rule.decide(View(system, views))
        if not isinstance(decision, Decision):
            raise SimulationError(f"rule {rule.name!r} returned {decision!r}, not a Decision")
        move(decision, system)
        serve(decision, system)
        if decision.wake_s is not None:
            system.wake_s = decision.wake_s

    return decide
