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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fluidsched.errors import InputError
from fluidsched.policy.table import PolicyTable, TableType

__all__ = ["Decision", "RequestView", "UserRule", "View"]


class RequestView(Protocol):
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
    produced, computed : int
        Output tokens emitted, KV tokens held.
    missing : int
        Tokens to prefill before the next output token (waiting: prompt + produced); 0 if it decodes.
    next_tokens : int
        What finishes its next output token: `missing`, or 1.
    preemptions : int
    served_s : float
        End of the last iteration that served it; its arrival before that.
    """

    @property
    def index(self) -> int: ...
    @property
    def arrival_s(self) -> float: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def predicted_output_tokens(self) -> int | None: ...
    @property
    def label(self) -> str | None: ...
    @property
    def produced(self) -> int: ...
    @property
    def computed(self) -> int: ...
    @property
    def missing(self) -> int: ...
    @property
    def next_tokens(self) -> int: ...
    @property
    def preemptions(self) -> int: ...
    @property
    def served_s(self) -> float: ...


class View(Protocol):
    """What a rule sees at a decision instant, read-only.

    Attributes
    ----------
    now : float
        s.
    iterations : int
        Iterations run so far.
    waiting : sequence of RequestView
        Preempted ones first, the last preempted in front, then by arrival.
    residents : sequence of RequestView
        In order of admission.
    kv_held : int
        KV tokens held by residents.
    """

    @property
    def now(self) -> float: ...
    @property
    def iterations(self) -> int: ...
    @property
    def waiting(self) -> Sequence[RequestView]: ...
    @property
    def residents(self) -> Sequence[RequestView]: ...
    @property
    def kv_held(self) -> int: ...


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
    preemption : {"recompute", "restart"}
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
