r"""Laws every run keeps, whatever the policy: what `check=True` verifies.

With [w, e] the measured window and, of request i, arrival A_i, admission D_i, first token F_i, finish E_i:

- *time order*: A ≤ D < F ≤ E ≤ e, F = E exactly when o = 1;
- *requests are conserved*: each has one status, which its times agree with; a "finished" run leaves none;
- *deadlines are kept*: who abandoned was never admitted and left when patience ended; who was aborted left at its
  deadline, or at the end of the iteration that ran then; nobody stays beyond both;
- *tokens are conserved*: Σ tokens of all batches + cached = Σ_{finished} (p + o - 1) + wasted + dropped by those
  who left unfinished + held and stored at the end;
- *gaps are conserved*: every token in the window that is not its request's first ends one gap; in a run
  measured to its empty end, Σ gaps = Σ_i (E_i - F_i) (neither is asked of restarts, which lose tokens, nor this
  one where anybody left with tokens);
- *Little's law for requests*: ∫ (residents + waiting) dt = Σ_i |[A_i, E_i] ∩ [w, e]|, E_i when i left, e if it
  did not;
- *KV is held by residents*: ∫ KV dt ≤ Σ_i (p_i + o_i - 1) |[D_i, E_i] ∩ [w, e]|;
- *Little's law for KV*: ∫ KV dt = Σ_i ∫ (KV held by i) dt.

All but the last are read off an `EngineRun`; runs without records keep them too, their requests being added up
piece by piece before they are forgotten (`Accounts`). That one, and the limits on every batch, need the batches: an
`Audit` rebuilds each request's KV from what the reference engine shows of its iterations, by its own
accounts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fluidsched.errors import SimulationError
from fluidsched.simulation.limits import deadlines, effective_limits
from fluidsched.simulation.measures import Requests
from fluidsched.simulation.records import STATUSES, EngineRun, IterationSummary

if TYPE_CHECKING:
    from fluidsched.policy.table import PolicyTable
    from fluidsched.server import Server
    from fluidsched.workload import ArrivalPath

__all__ = ["TOLERANCE", "Accounts", "Audit", "check_agreement", "check_laws"]

TOLERANCE = 1e-9
"""Relative tolerance where sums of floats are compared."""


def _hold(law: str, holds: bool | np.bool_, found: str) -> None:
    if not holds:
        raise SimulationError(f"a run broke a law it must keep: {law}; found {found}")


def _close(first: float, second: float, scale: float) -> bool:
    return math.isclose(first, second, rel_tol=TOLERANCE, abs_tol=TOLERANCE * max(scale, 1e-300))


class Accounts:
    """Laws of single requests, verified as these come in, and sums for the laws of the whole, verified at the end.

    A run's requests come once each, in any number of parts; so the laws hold for runs that forget requests too.

    Parameters
    ----------
    server : Server
    warmup : float
        Start of the run's window, s.
    lossless : bool
        Whether no token is ever lost: false where preemption restarts.
    handed_over : bool
        Whether requests came with their first token and the KV of their prompt, computed elsewhere.
    """

    def __init__(
        self, server: Server, *, warmup: float, lossless: bool = True, handed_over: bool = False
    ) -> None:
        self.server = server
        self.warmup = warmup
        self.lossless = lossless
        self.handed_over = handed_over
        self.requests = self.staying = 0
        self.processed = self.brought = self.first_tokens = self.preempted = 0
        self.decoding_s = self.sojourn_s = self.most_kv_s = 0.0
        self.left_with_tokens = False

    def add(self, requests: Requests, preemptions: NDArray[np.int64], end: float) -> None:
        """Verify what holds for each request, and add them up; `end` is the end of the run, s."""
        finished = requests.status == STATUSES.index("finished")
        rejected = requests.status == STATUSES.index("rejected")
        gone = np.isin(requests.status, [STATUSES.index("abandoned"), STATUSES.index("aborted")])
        arrival, admitted, first = requests.arrival, requests.admitted, requests.first_token
        finish, left, output = requests.finish, requests.left, requests.output
        shown = f"{len(arrival):,} requests, {np.count_nonzero(finished):,} of them finished"
        _hold("finished = has a finish time", np.array_equal(finished, ~np.isnan(finish)), shown)
        _hold("rejected requests are never admitted", np.isnan(admitted[rejected]).all(), shown)
        started = ~np.isnan(first)
        _hold("arrival ≤ admission", not (admitted < arrival).any(), "an earlier admission")
        if self.handed_over and self.lossless:
            _hold("the first token came before", (first <= arrival).all(), "a later first token")
        elif not self.handed_over:
            _hold(
                "admission < first token",
                (admitted[started] < first[started]).all(),
                "an earlier first token",
            )
        _hold("first token ≤ finish", not (finish < first).any(), "an earlier finish")
        single = (output == 1)[finished]
        _hold(
            "first token = finish exactly with one output token",
            np.array_equal(single, first[finished] == finish[finished]),
            "otherwise",
        )
        _hold("who left has a time of leaving", np.array_equal(finished | gone, ~np.isnan(left)), shown)
        _hold("who finished left then", np.array_equal(left[finished], finish[finished]), "another time")
        for times in (admitted, first, left):
            _hold("nothing happens after the end", not (times > end).any(), "a later time")

        self.requests += len(arrival)
        self.staying += int(np.count_nonzero(~(finished | rejected | gone)))
        self.processed += int((requests.prompt + output - 1)[finished].sum())
        self.brought += int(requests.prompt[~np.isnan(admitted)].sum())
        self.first_tokens += int(np.count_nonzero(first > self.warmup))
        self.preempted += int(preemptions.sum())
        self.decoding_s += float((finish - first)[finished].sum())
        self.left_with_tokens |= not np.isnan(first[gone]).all()
        until = np.where(np.isnan(left), end, left)
        inside = (np.minimum(until, end) - np.maximum(arrival, self.warmup))[~rejected]
        self.sojourn_s += float(np.maximum(inside, 0.0).sum())
        served = np.fmax(
            np.minimum(until, end) - np.maximum(admitted, self.warmup), 0.0
        )  # NaN: never admitted
        self.most_kv_s += float(((requests.prompt + output - 1) * served).sum())

    def check(self, run: EngineRun) -> None:
        """Verify the laws of the whole."""
        if run.verdict == "finished":
            _hold("a finished run leaves nobody", self.staying == 0, f"{self.staying:,} staying, {run!r}")
        accounted = self.processed + run.wasted_tokens + run.dropped_tokens + run.kv_end + run.stored_end
        found = run.batch_token_sum + run.cached_tokens + (self.brought if self.handed_over else 0)
        _hold("tokens are conserved", found == accounted, f"{found:,} and {accounted:,}")
        if self.lossless:
            gaps = int(run.gap_counts.sum())
            continued = run.emitted_tokens - (0 if self.handed_over else self.first_tokens)
            _hold("every token but the first ends a gap", gaps == continued, f"{gaps:,} and {continued:,}")
        whole = run.verdict == "finished" and self.warmup == 0.0 and not self.left_with_tokens
        if self.lossless and whole:
            decoding = self.decoding_s
            _hold("gaps add up", _close(run.gap_s, decoding, decoding), f"{run.gap_s!r} and {decoding!r} s")
        _hold(
            "preemptions add up", run.preempted == self.preempted, f"{run.preempted:,} and {self.preempted:,}"
        )
        spent = run.resident_s + run.waiting_s
        _hold(
            "Little's law for requests",
            _close(spent, self.sojourn_s, self.requests * run.end_s),
            f"{spent!r} and {self.sojourn_s!r} request·s",
        )
        most = self.most_kv_s * (1 + TOLERANCE)
        _hold("no request holds more than at its end", run.kv_token_s <= most, f"{run.kv_token_s!r} token·s")
        window = max(run.end_s - self.warmup, 0.0)
        _hold("busy time within the window", run.busy_s <= window * (1 + TOLERANCE), f"{run.busy_s!r} s")


def check_laws(
    path: ArrivalPath,
    server: Server,
    run: EngineRun,
    *,
    warmup: float,
    lossless: bool = True,
    handed_over: bool = False,
) -> None:
    """Verify the laws that a run's own records can show.

    Parameters
    ----------
    path, server, run
        The run, and what it was made from.
    warmup, lossless, handed_over
        See `Accounts`.

    Raises
    ------
    SimulationError
        Naming the law and what was found.
    """
    accounts = Accounts(server, warmup=warmup, lossless=lossless, handed_over=handed_over)
    accounts.add(Requests.of(path, run), run.preemptions, run.end_s)
    _check_deadlines(path, server, run)
    if path.prompt_blocks is None:  # else a block may count for several residents
        check_memory_kept(server, run)
    accounts.check(run)


def check_memory_kept(server: Server, run: EngineRun) -> None:
    """Verify that no more KV was held than the server has."""
    _hold("KV within capacity", run.peak_kv <= server.kv_capacity, f"{run.peak_kv:,} tokens")


def _check_deadlines(path: ArrivalPath, server: Server, run: EngineRun) -> None:
    """Rule 35 to 38 as far as the records show them."""
    given = deadlines(path, server)
    abandoned = run.status == STATUSES.index("abandoned")
    aborted = run.status == STATUSES.index("aborted")
    if not given:
        _hold("nobody leaves without a deadline", not (abandoned | aborted).any(), repr(run))
        return
    waiting, ever = given
    never = np.isnan(run.admitted_s)
    _hold("who abandons was never admitted", never[abandoned].all(), "an admission")
    _hold("patience is kept", np.array_equal(run.left_s[abandoned], waiting.at_s[abandoned]), "another time")
    _hold("who abandons had patience to lose", waiting.by_client[abandoned].all(), "a timeout")
    least = np.where(never, np.minimum(waiting.at_s, ever.at_s), ever.at_s)
    _hold("nobody is aborted before its deadline", not (run.left_s < least)[aborted].any(), "an earlier time")
    overdue = (least <= run.end_s) & (run.status == STATUSES.index("unfinished"))
    _hold("nobody stays beyond its deadline", not overdue.any(), f"request {np.flatnonzero(overdue)}")
    _hold("nobody is admitted after its patience", not (run.admitted_s >= waiting.at_s).any(), "an admission")


def _neighbours(ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> bool:
    """Whether two histograms count equally many, with none further off than the next bucket."""
    first, second = np.cumsum(ours), np.cumsum(theirs)
    apart = (first[:-1] > second[1:]) | (second[:-1] > first[1:])
    return bool(first[-1] == second[-1] and not apart.any())


def check_agreement(run: EngineRun, reference: EngineRun) -> None:
    """Verify that a run of the kernel is the reference's: same decisions, times equal up to rounding.

    An arrival within rounding of a decision instant may be seen by one engine only; that is refused too.

    Raises
    ------
    SimulationError
        Naming the first field that differs.
    """
    scale = max(reference.end_s, 1e-300)
    for field in fields(EngineRun):
        ours, theirs = getattr(run, field.name), getattr(reference, field.name)
        if isinstance(ours, np.ndarray) and ours.dtype.kind == "f":
            same = field.name == "occupancy" or np.allclose(
                ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True
            )
        elif field.name == "gap_counts":
            same = _neighbours(ours, theirs)
        elif isinstance(ours, np.ndarray):
            same = np.array_equal(ours, theirs)
        elif isinstance(ours, float):
            same = _close(ours, theirs, max(abs(theirs), scale))
        else:
            same = ours == theirs
        _hold(f"the kernel's {field.name} is the reference's", same, f"{ours!r} and {theirs!r}")


class Audit:
    """Independent accounts of a reference run: give `observe` as `on_iteration` and `observe_idle` as `on_idle`,
    then call `check`."""

    def __init__(
        self,
        path: ArrivalPath,
        server: Server,
        table: PolicyTable,
        *,
        horizon: float | None,
        warmup: float,
        handed_over: bool = False,
    ):
        self.limits = effective_limits(server, table)
        self.horizon = math.inf if horizon is None else horizon
        self.warmup = warmup
        self.held: dict[int, int] = {}
        self.swaps = table.preemption == "swap"
        self.stored = dict(enumerate(path.prompt_tokens.tolist())) if handed_over else {}
        self.kv_s = dict.fromkeys(range(len(path)), 0.0)
        self.last_s = 0.0
        self.final_kv = (path.prompt_tokens + path.output_tokens - 1).tolist()
        cached = path.cached_prompt_tokens
        self.cached = [0] * len(path) if cached is None else cached.tolist()
        self.blocks = path.prompt_blocks
        self.whole = [] if self.blocks is None else (path.prompt_tokens // self.blocks.block_tokens).tolist()
        self.computed: set[int] = set()

    def observe(self, batch: IterationSummary) -> None:
        """Check one batch against the limits and add its KV to the accounts."""
        self.observe_idle(batch.start_s, batch.admitted, batch.preempted, batch.departed)
        for i, found in zip(batch.admitted, batch.found, strict=True):
            if i not in self.held:
                continue  # preempted at once
            if self.blocks is not None:
                names = self._names(i, found)
                _hold(
                    "what is found is whole blocks",
                    len(names) * self.blocks.block_tokens == found,
                    repr(batch),
                )
                _hold("what is found was computed before", self.computed.issuperset(names), repr(batch))
                self.held[i] = found
            _hold("what is found is cached, or was stored", self.held[i] == found, repr(batch))
        before = dict(self.held)
        for i, chunk in batch.prefill:
            self.held[i] += chunk
        for i in batch.decode:
            self.held[i] += 1
        limits = self.limits
        tokens = batch.prefill_tokens + batch.decode_tokens
        memory = sum(map(limits.units, self.held.values())) - self._shared()
        served = [*batch.decode, *(i for i, _ in batch.prefill)]
        shown = repr(batch)
        _hold("residents are served at most once", len(set(served)) == len(served), shown)
        _hold("batch within the token budget", tokens <= limits.budget, shown)
        _hold("residents within the slots", len(self.held) == batch.residents <= limits.slots, shown)
        _hold("memory within capacity", memory <= limits.capacity, f"{memory:,} units in {shown}")
        _hold("KV held is what was computed", sum(self.held.values()) == batch.held_tokens, shown)
        self._pass(batch.end_s)
        if batch.end_s > self.horizon:
            self.held = before
            return
        for i in (chunk[0] for chunk in batch.prefill):
            self.computed.update(self._names(i, self.held[i]))
        self.held = {i: tokens for i, tokens in self.held.items() if tokens < self.final_kv[i]}

    def _names(self, i: int, held: int) -> list[int]:
        """Names of the whole blocks of a prompt of which so many tokens are held."""
        if self.blocks is None:
            return []
        whole = min(held // self.blocks.block_tokens, self.whole[i])
        names: list[int] = self.blocks.of(i)[:whole].tolist()
        return names

    def _shared(self) -> int:
        """Units that residents save at most by holding equal blocks once."""
        if self.blocks is None:
            return 0
        names = [name for i, held in self.held.items() for name in self._names(i, held)]
        return (len(names) - len(set(names))) * (self.blocks.block_tokens // self.limits.block)

    def observe_idle(
        self,
        now: float,
        admitted: tuple[int, ...],
        preempted: tuple[int, ...],
        departed: tuple[tuple[int, float], ...],
    ) -> None:
        """Add what a decision did to the accounts."""
        self._withdraw(departed)
        self._pass(now)
        for i in {*preempted, *admitted}:
            times_in = (i in self.held) + admitted.count(i) - preempted.count(i)
            _hold("admissions and preemptions alternate", times_in in (0, 1), f"request {i} at {now!r} s")
            if i in self.held and self.swaps:
                self.stored[i] = self.held[i]
            self.held.pop(i, None)
            if times_in:
                self.held[i] = self.stored.pop(i, self.cached[i])

    def _withdraw(self, departed: Iterable[tuple[int, float]]) -> None:
        """Drop from the accounts those who left, each when it did."""
        for i, left_s in departed:
            if i in self.held:
                self._pass(left_s)
            self.held.pop(i, None)
            self.stored.pop(i, None)

    def _pass(self, until: float) -> None:
        until = min(until, self.horizon)
        duration = until - max(self.last_s, self.warmup)
        if duration > 0.0:
            for i, tokens in self.held.items():
                self.kv_s[i] += tokens * duration
        self.last_s = until

    def check(self, run: EngineRun) -> None:
        """Compare the accounts with the run's."""
        gone = np.flatnonzero(np.isnan(run.finish_s) & ~np.isnan(run.left_s))
        self._withdraw((i, run.left_s[i]) for i in gone[np.argsort(run.left_s[gone])].tolist())
        self._pass(run.end_s)
        total = math.fsum(self.kv_s.values())
        _hold(
            "Little's law for KV",
            _close(total, run.kv_token_s, total),
            f"{run.kv_token_s!r} and {total!r} token·s",
        )
        _hold("KV at the end", sum(self.held.values()) == run.kv_end, f"{run.kv_end:,} tokens")
