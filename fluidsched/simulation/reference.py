r"""The reference simulator: what a policy table means, step by step, in plain Python.

The server runs one iteration at a time. Before each, at a *decision instant*, the table's rule preempts,
admits and fixes the batch; the iteration then lasts

    T(n_pf, n_dec, k_dec, q_pf)     (`IterationTime`: prompt tokens, decodes, KV they read, prefill attention)

and takes effect at its end. This module *is* the definition; the compiled kernel equals it request by
request. What follows numbers every rule; where a choice was open it is made here.

Time
  1. Decision instants: the end of an iteration; while idle, an arrival, a timer (rule 23) or a deadline
     (rule 35). Arrivals up to and at the instant have joined the queue. Requests that never fit
     (`limits.never_fits`) are `rejected` and never join it. With a server's `max_model_len` m, a request's
     output below means min(output, m - prompt); prompts of m tokens or more never fit.
  2. A run with a horizon H takes no decision at or after H. An iteration that would end after H is cut:
     nothing of it takes effect, but its decision (admissions, preemptions) stands and time integrals count it
     up to H. One that ends at H takes effect. An idle server waits for H, so the verdict is always "horizon".
  3. A run without a horizon ends "finished" when nobody is waiting, resident or to come; "stuck" when the
     server is idle, somebody is waiting or resident, and neither an arrival, a timer nor a deadline is to
     come. It ends at its last decision instant.

Requests
  4. A request has `computed` KV tokens, `produced` output tokens, and a `target`. Waiting: computed = 0. On
     admission target = prompt + produced, and computed is what is found in the prefix cache: the path's
     `cached_prompt_tokens`, else 0. The cache keeps its copy, so a request that enters again after a preemption
     finds as much as before; and a resident holds its whole prompt, found or computed, whoever else holds the
     same prefix. While computed < target it *prefills*: a chunk of n tokens raises
     computed by n, and the chunk that reaches target emits one token. After that it *decodes*: computed and
     produced rise by one. So a resident holds prompt + produced - 1 tokens once its prompt is done. It leaves
     at the end of the iteration in which produced = output.
  5. n_pf counts tokens of chunks, recomputed ones too; n_dec decodes; k_dec is the sum over decodes of
     computed after the iteration (p + k - 1 in iteration k); q_pf = Σ chunk·(computed before + chunk/2).
  6. Residents are ordered by (latest) admission, in the order in which one decision admits them.

  6a. Requests that are *handed over* (`first_token_s` given, as decode machines of a cluster get them) come with
     the KV of their prompt, computed elsewhere, and with token 1, emitted there: they wait with produced = 1, enter
     as rule 9a says of their prompt's tokens, but without any time for moving, and decode at once. Once preempted
     they are like all others, and recompute. Who leaves before it enters has held no KV here.

Memory
  7. Memory is counted in units (`limits`). Scheduling a request in an iteration allocates units(computed + n)
     for it at once; other residents keep units(computed).
  8. Preemption takes the most recently admitted resident: its memory is freed, its computed tokens are wasted
     (rule 4's computed before this iteration, less what came from the prefix cache; tokens already scheduled
     for it in this decision are withdrawn and go back to the budget), and it waits. `recompute` keeps produced;
     `restart` sets it to 0 and forgets the first-token time. `swap` wastes nothing: produced is kept and the
     computed tokens move to the host's memory, which has no limit. A request may be preempted in the same
     decision that admitted it only under `wait`.
  9. Preempted requests wait in one stack, last preempted first, ahead of all others and whatever their type;
     under `wait` at the front of their own type's queue.

  9a. `swap`: a request that enters again holds the tokens it had when it was preempted, and they move back;
     target is its prompt, so it goes on decoding, or prefilling, where it stopped (what came from the prefix
     cache moves with the rest, and nothing is looked for there again). It takes 1 token, or a chunk of what is
     missing of its prompt, as rule 13 says of min(target, …); and by rule 14 it fits if
     units(prompt + produced), or without `whole_prompt_admission` units(tokens held + those it takes), do.
     Moving takes the GPU's time, as no part of the batch is computed meanwhile: an iteration lasts T plus
     (tokens moved out + tokens moved in since the one before)/swap_bandwidth, in which KV counts as it does
     in the rest of the iteration. A request that comes back and is preempted, or the other way round,
     in one decision has not moved. Under these two one that comes back goes on decoding at stage
     (position) 0.

Engine-like rules: `vllm`, `capped` (the same), `gated`, `sarathi`
 10. The budget of the iteration is min(table, server). Residents first, in order (rule 6); `sarathi`: all
     that decode, then all that prefill, each in order. Each takes 1 token (decode) or min(target - computed,
     budget left, chunk_tokens). When the budget is used up the scan ends.
 11. If its tokens do not fit in memory, residents are preempted until they do (rule 8). If it was itself the
     one preempted, the scan goes on with the next that is still resident.
 12. If anybody was preempted in this decision, nobody is admitted. If moreover the batch is empty, the
     decision is taken again at once (this happens when a decode gives way while prefills are held, rule 16).
 13. Otherwise waiting requests are admitted while budget and slots are left: first the preempted stack, then
     by (priority, arrival, index); rows without priority come after all that have one. The scan ends at the
     first request that does not fit. An admitted request takes its first chunk, min(target - found, budget
     left, chunk_tokens), found in the prefix cache (rule 4).
 14. A request fits if memory in use + units(target), or units(found + first chunk) without
     `whole_prompt_admission`, is at most the admission limit; the limit is the whole capacity if there is no
     resident, else ⌊min(capacity - watermark·capacity, kv_limit)⌋. Memory in use is that of rule 7 in this
     iteration.
 15. Slots: residents ≤ min(max_in_service, max_batch_size), partly prefilled ones included.
 16. `prefill_interval` N: an iteration is *held* if fewer than N - 1 iterations have run since the last one
     that prefilled a token, some resident decodes, and the last decision that was not held left nobody
     waiting. In a held iteration residents that prefill get nothing and nobody is admitted. Before the first
     prefill, and with N = 1, nothing is held. A decision that is not held notes, when its batch is fixed,
     whether anybody waits.

`gated` adds
 17. At a decision a row may admit newcomers (never preempted before) if at least `gate` of them wait in it
     when the decision begins, or the longest-waiting of them has waited max_hold_s. It then admits at most
     threshold - (newcomers it admitted in the last period - 1 iterations run, and in this one). A row that
     may not admit, or no longer may, is skipped in rule 13. Preempted requests are exempt and not counted.
 18. If the batch would be empty, the windows of all rows are cleared and rule 13 is tried once more; if it is
     still empty the server idles.

Orders and look-ahead, with every rule that scans the queue as rule 13 does
 31. Beliefs: the output length b of a request is what the table's predictor says (the path's true lengths,
     predicted ones, or lower ends of predicted intervals). With order "shortest_first" the scan of rule 13
     goes by (priority, b, arrival, index); preempted requests still come first.
 32. A request that fits by rule 14 must, while anybody is resident, also fit what is ahead. "reserve": Σ over
     the residents and it of units(prompt + R - 1) is at most the limit of rule 14, R = ⌈headroom_tokens⌉.
     "known", "law": the limit of rule 14 is lowered by units(⌈headroom_tokens⌉), and in every iteration after
     this one the memory forecast for the residents and it is at most the lowered limit. Nobody resident: only
     rule 14 is asked, so that a request believed too long is not kept out for ever.
 33. Forecast of one request with k tokens produced so far, whose length is o, u iterations after this one, as
     far as it is known that o > k. If this iteration computes the last token of its target, or decodes: it
     holds units(h + u) for 1 ≤ u ≤ o - k - 1, h what it holds after this iteration, and nothing later. If
     its prompt is still incomplete after this iteration: units(target + o - k - 1), its peak, for all u ≥ 1,
     because how long the rest of the prompt takes is not known. "known": o = b; once k ≥ b the belief is
     refuted, and the request is taken to leave after the token it gets next. "law": the mean of the forecast
     over those o of the law's lengths with o > k, equally likely; where none is left, as a refuted belief.
     Memory forecast is a multiple of 1/shares (`limits`), so everything is compared in whole numbers.
 34. It follows that with b the true length, whole capacity in the limit and decodes that never pause for
     budget, nobody is ever preempted: no forecast is later exceeded, and each admission kept its sum in the
     limit. (A decode never pauses under `sarathi` with slots ≤ budget, nor under the others if chunk_tokens
     is null as well.)

`orca`
 19. Every resident decodes. The scan of rule 13 (preempted stack always empty) admits while the slots, at
     most min(max_in_service, max_batch_size, budget), last; a request fits if Σ over residents and it of
     units(prompt + R - 1) is at most the limit of rule 14, and what is to compute of its prompt fits in the
     budget left after the decodes and earlier newcomers. It prefills whole. R = ⌈lookahead.headroom_tokens⌉.

`faster_transformer`
 19a. As `orca`, but the scan admits only if nobody is resident.

`vllm_v0`
 19b. First the scan of rule 13, which here ends also at a request whose target - found is more than the budget
     left: whoever enters prefills its whole target. If anybody entered, the newcomers are the batch; all other
     residents pause. Otherwise every resident decodes, with rule 11 and nobody admitted. With `swap` the scan
     is left out while anybody is swapped out; instead, if nobody was preempted, requests are brought back
     after the residents got their tokens, by the scan over the stack alone, and decode with them.

`wait`
 20. With no block running: J = the rows with threshold > 0 in which at least `gate` wait (preempted ones
     count), or in which the hold has expired (rule 23). The rows of J, by (priority, row), each admit
     min(threshold, waiting, slots left), from the front of their queue. All residents of the rows of J are
     selected (at most `threshold` of them are ever at one stage, because one block admits at most that many
     and a row's residents all move together). If nobody is selected the server idles. Otherwise a block
     starts.
 21. Each iteration of a block serves every selected request still resident: its whole prompt (target) first,
     then a token each. Before it, while the memory of all residents, the served ones after their tokens,
     exceeds the capacity, the most recently admitted resident, selected or not, is preempted. A request
     preempted in a block is not admitted again before the next.
 22. A block ends after block_iterations iterations or when no selected request is left. If preemption leaves
     nobody to serve in a block's first iteration, the server idles until the next instant (anything else
     would repeat itself); in a later iteration, the next decision is taken at once.
 23. Hold: a row with max_hold_s h has expired at t if t ≥ s + h for one of its requests, waiting or (under
     `wait` and `nested-wait`) resident, where s is the end of the last iteration that served it, or its
     arrival. Under `gated` only newcomers count. An idle server wakes at the smallest s + h later than now,
     over the rows with threshold > 0.

`nested-wait` (L segments; the one row has threshold = gate = n_1)
 27. The *position* of a resident is the number of iterations that served it since its last admission; that of
     a waiting request is 0. Segment 1 has the positions 0..r_1, segment k the positions r_{k-1} + 1..r_k; the
     last has no end, so a request longer than the table expects stays in it. Blocks divide every r_k + 1, so
     at a decision without a block all positions are multiples of the block length.
 28. With no block running: K is the largest number such that each segment k ≤ K has at least n_k requests at
     its first position (k = 1: waiting, preempted ones included), or the segment of a request whose hold has
     expired (rule 23), if that is larger. min(n_1, waiting, slots left) are admitted from the front of the
     queue; they and min(n_k, present) residents of every position of the segments k ≤ K, oldest first by
     (arrival, index), are selected. All others pause with their KV kept. If K = 0 or nobody is selected the
     server idles.
 29. The selected run as a block under rules 21 and 22; preempted requests come to the front of the queue.

A user's rule (`rules`)
 24. is asked at a decision instant if anybody waits or is resident. It preempts, admits and serves as its
     `Decision` says, in that order, within the server's capacity, slots and token budget. An idle server also
     wakes at `wake_s`. Preempted requests join the stack of rule 9. Only this engine follows such a rule.

Leaving before the end
 35. A request has two deadlines (`limits.deadlines`), both counted from its arrival and each possibly infinite.
     The first is the smaller of its client's patience and the server's `waiting_timeout`, and holds only until
     its first admission: patience is for service to begin, so whoever was admitted once, even if preempted
     since, has none to lose. The second is the smaller of `abort_after_s` and the server's `total_timeout`, and
     always holds.
 36. At a decision instant, after its arrivals have joined (and, at the end of an iteration, after its effects:
     whoever has got its last token has finished), every deadline up to and at the instant is kept, the earliest
     first, before anything is decided; also at the horizon. So a request that could be admitted at its very
     deadline leaves, and a patience of 0 admits nobody.
 37. A waiting request leaves at its deadline itself: it holds no memory, so nothing but the time it waited
     depends on it. Its KV in the host's memory, if any, is dropped. A resident leaves at the decision instant:
     an iteration that runs at the deadline serves it to the end, and tokens it emits then are emitted. Its
     memory is free in that instant's decision. What a leaver held is counted in `dropped_tokens`.
 38. Status: `abandoned` at the end of patience, `aborted` at any other deadline; of a patience and a timeout at
     one instant patience counts, and the first deadline before the second. Windows of `gated` still count
     whoever left since its admission; a block goes on with the others (rule 22).

A prefix cache that fills with the run, for paths that name the blocks of their prompts (`prompt_blocks`; without
`swap`, and for tables only)
 39. A block has b tokens, a multiple of the server's own block size, and a name; the cache has blocks by name.
     Residents use blocks of it, each held once however many use it: memory in use is that of rule 7 with every
     block in use counted once, and of each resident what it holds but for those. Other counts of tokens (KV held,
     k_dec, wasted) are each resident's own, shared blocks included.
 40. What rule 4 calls found is b·m tokens, where the first m whole blocks of the prompt are in the cache, and m is the
     most with b·m < target. It is looked up when rule 13 (or 19, 20, 28) considers the request, and again after a
     preemption; it uses these blocks from its admission on. For rule 14 those that others use already take no
     memory. Reservations and forecasts (rules 19, 32, 33) count whole prompts.
 41. At the end of an iteration, in the order of the batch: whole blocks of its prompt that a request has computed by
     then enter the cache, and it uses them; but where the name is in the cache already, it keeps its own besides.
     So requests with one prompt that are computed in the same iteration find nothing of each other.
 42. Who leaves, or is preempted, uses its blocks no more: the last of its prompt first, and in the order in which
     requests leave, they become idle if nobody else uses them. Idle blocks stay in the memory that is not in use;
     when it is needed, the one that has been idle longest is dropped.
 42a. vLLM's own cache (0.33) finds, shares and drops the same blocks, tested iteration by iteration, but for two
     differences. It names a block when it schedules it, so a request that is admitted later in the same iteration
     finds it: the forward pass writes all KV of a layer before it reads any. Here the end of the iteration counts,
     since what a request finds should not hang on its place in the batch. And it names blocks with generated tokens
     too, which a preempted request or the next turn of a conversation finds, and which stand in the same line to be
     dropped. No trace names these.

Records
 25. admitted_s is the first admission; first_token_s the end of the iteration that produced token 1 (under
     `restart` of the last start). A token other than token 1 ends a gap that began with the token before, also
     if a preemption that kept tokens lies between. The counters and integrals are those of `EngineRun`.
 26. Occupancy rows are taken at decision instants, after arrivals join and before the decision, at the first
     instant at or after each point of a grid of step horizon/points, or (without a horizon) last
     arrival/points; when 2·points rows exist every second one is dropped and the step doubles. After a row at
     t the next grid point is the smallest multiple of the step above t.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_count, check_real
from fluidsched.errors import InputError, SimulationError
from fluidsched.policy.table import PolicyTable
from fluidsched.server import Server
from fluidsched.server.iteration import BatchSummary
from fluidsched.simulation.histogram import BUCKETS, bucket
from fluidsched.simulation.limits import (
    UNLIMITED,
    beliefs,
    check_handed_over,
    check_run,
    deadlines,
    effective_limits,
    never_fits,
    within_model_length,
)
from fluidsched.simulation.prefix_blocks import PrefixCache
from fluidsched.simulation.records import STATUSES, EngineRun, IterationSummary, Status, Verdict
from fluidsched.simulation.rules import UserRule, follow

if TYPE_CHECKING:
    from fluidsched.workload import ArrivalPath
    from fluidsched.workload.prefix_cache import PromptBlocks

__all__ = ["Engine", "run_reference"]

Observer = Callable[[IterationSummary], Any]
IdleObserver = Callable[[float, tuple[int, ...], tuple[int, ...], tuple[tuple[int, float], ...]], Any]


class _Request:
    """One request. `scheduled`: tokens it gets in the iteration being planned; `served_s`: see rule 23;
    `position`: see rule 27; `token_s`: when it emitted its latest token; `stored`: its KV tokens in the host's
    memory; `handed`: these came from another machine (rule 6a); `cached`: those of its prompt in the prefix cache;
    `left_s`, `fate`: when and how it left unfinished, `fate` None if it did not; `names`: of the whole blocks of its
    prompt; `entered`: how many of them it has found or computed; `uses`: those it uses in the cache."""

    __slots__ = (
        "admitted_s", "arrival_s", "believed", "cached", "computed", "entered", "fate", "finish_s", "first_token_s",
        "handed", "index", "key", "left_s", "names", "output", "position", "preemptions", "produced", "prompt", "row",
        "scheduled", "served_s", "stored", "target", "token_s", "uses", "waiting_since",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        row: int,
        rank: tuple[float, ...],
        arrival_s: float,
        prompt: int,
        output: int,
        cached: int,
    ):
        self.index = index
        self.row = row
        self.key = (*rank, arrival_s, index)
        self.arrival_s = self.served_s = self.waiting_since = arrival_s
        self.prompt = prompt
        self.output = self.believed = output
        self.cached = cached
        self.computed = self.produced = self.target = self.scheduled = self.preemptions = self.position = 0
        self.stored = 0
        self.handed = False
        self.admitted_s = self.first_token_s = self.finish_s = self.left_s = self.token_s = math.nan
        self.fate: Status | None = None
        self.names: list[int] = []
        self.entered = 0
        self.uses: list[int] = []


class _System:
    """The whole state of a run, and the mechanism every rule shares: queue, memory, preemption.

    Attributes
    ----------
    now : float
        The current decision instant, s.
    queues : list of deque
        Waiting requests per row of the table, first in line first.
    preempted : list
        Preempted requests in stack order, the next in line last (not used by `wait`).
    residents : list
        Requests holding KV, in order of admission.
    used : int
        Memory in use, units, this decision's allocations included.
    held : int
        KV tokens held by residents between iterations.
    batch : list
        Requests scheduled by this decision, in order; those withdrawn have `scheduled` 0.
    budget : int
        Tokens left in the iteration being planned.
    admitted, victims : list
        Requests admitted and preempted by this decision, in order.
    since_prefill, queue_left : int, bool
        Iterations since the last that prefilled; whether the last decision not held left anybody waiting
        (rule 16).
    windows : list of deque
        `gated`: (iteration, newcomers admitted) per row, the last `period` iterations.
    wake_s : float
        A user's rule: when to decide again at the latest while idle; infinite if it does not say.
    block_left, selected : int, set
        `wait`, `nested-wait`: iterations left in the block, 0 if none runs, and the requests it serves.
    iterations, wasted_tokens, preemption_count, swapped_tokens, dropped_tokens : int
        Counters of the run.
    cached_tokens : int
        KV tokens of residents, finished and swapped out requests that came from the prefix cache.
    departed : list
        Requests that left unfinished since an observer was told.
    stored, moved : int
        KV tokens in the host's memory; tokens that moved there or back since the last iteration (rule 9a).
    moving : set
        Requests whose tokens move by this decision.
    cache : PrefixCache or None
        The prefix cache that fills with the run (rules 39 to 42).
    """

    def __init__(self, server: Server, table: PolicyTable, warmup: float, blocks: PromptBlocks | None = None):
        self.table = table
        self.limits = effective_limits(server, table)
        self.cache: PrefixCache | None = None
        if blocks is not None:
            units = blocks.block_tokens // self.limits.block
            self.cache = PrefixCache(blocks.block_tokens, units, self.limits.capacity)
        self.rows = table.types
        self.warmup = warmup
        self.now = 0.0
        self.queues: list[deque[_Request]] = [deque() for _ in table.types]
        self.preempted: list[_Request] = []
        self.residents: list[_Request] = []
        self.used = 0
        self.held = 0
        self.batch: list[_Request] = []
        self.budget = 0
        self.admitted: list[_Request] = []
        self.victims: list[_Request] = []
        self.since_prefill = UNLIMITED
        self.queue_left = False
        self.windows: list[deque[tuple[int, int]]] = [deque() for _ in table.types]
        self.wake_s = math.inf
        self.block_left = 0
        self.selected: set[_Request] = set()
        self.iterations = 0
        self.wasted_tokens = 0
        self.preemption_count = 0
        self.swapped_tokens = self.stored = self.moved = self.cached_tokens = self.dropped_tokens = 0
        self.moving: set[_Request] = set()
        self.departed: list[_Request] = []
        self.waiting_s = 0.0

    def waiting_count(self) -> int:
        return len(self.preempted) + sum(map(len, self.queues))

    def schedule(self, request: _Request, tokens: int) -> None:
        """Give `request` this many tokens of the iteration and allocate their memory (rule 7)."""
        self.used += self.growth(request, tokens)
        if self.cache is not None:
            self.cache.make_room(self.used)
        request.scheduled = tokens
        self.budget -= tokens
        self.batch.append(request)

    def growth(self, request: _Request, tokens: int) -> int:
        """Units that `tokens` more tokens of a resident take."""
        if self.limits.block == 1:
            return tokens
        return self.limits.units(request.computed + tokens) - self.limits.units(request.computed)

    def admit(self, request: _Request) -> None:
        request.target = request.prompt + request.produced
        if request.stored:
            self._bring_back(request)
        else:
            self._start_from_cache(request)
        if math.isnan(request.admitted_s):
            request.admitted_s = self.now
        self.waiting_s += max(0.0, self.now - max(request.waiting_since, self.warmup))
        self.residents.append(request)
        self.admitted.append(request)

    def found(self, request: _Request) -> int:
        """Rules 4 and 40: tokens of a waiting request that are in the prefix cache."""
        if self.cache is None:
            return request.cached
        return self.cache.block_tokens * self.cache.find(self._may_find(request))

    def _may_find(self, request: _Request) -> list[int]:
        """Names of the blocks that end before the last token to compute."""
        assert self.cache is not None
        return request.names[: (request.prompt + request.produced - 1) // self.cache.block_tokens]

    def units_to_add(self, request: _Request, found: int, tokens: int) -> int:
        """Memory that a waiting request takes to hold this many tokens, `found` of which it finds (rules 14, 40)."""
        units = self.limits.units(tokens)
        if self.cache is not None:
            units -= self.cache.units * self.cache.in_use(request.names[: found // self.cache.block_tokens])
        return units

    def _start_from_cache(self, request: _Request) -> None:
        found = self.found(request)
        self.used += self.units_to_add(request, found, found)
        if self.cache is not None:
            request.entered = found // self.cache.block_tokens
            request.uses = request.names[: request.entered]
            self.cache.take(request.uses)
            self.cache.make_room(self.used)
        request.computed = request.cached = found
        self.held += found
        self.cached_tokens += found

    def enter_blocks(self, request: _Request) -> None:
        """Rule 41."""
        if self.cache is None:
            return
        whole = min(request.computed // self.cache.block_tokens, len(request.names))
        for name in request.names[request.entered : whole]:
            if self.cache.enter(name):
                request.uses.append(name)
        request.entered = max(request.entered, whole)

    def free(self, request: _Request) -> None:
        """The memory of a resident is in use no more, what is scheduled for it included (rules 8, 42)."""
        self.used -= self.limits.units(request.computed + request.scheduled)
        if self.cache is not None:
            shared = len(request.uses) - self.cache.release(reversed(request.uses))
            self.used += self.cache.units * shared
            request.uses = []

    def _bring_back(self, request: _Request) -> None:
        """Rules 9a and 6a: the KV of a request comes back from the host, or from where it was computed."""
        request.target = request.prompt
        request.computed, request.stored = request.stored, 0
        self.used += self.limits.units(request.computed)
        self.held += request.computed
        if request.handed:
            request.handed = False
            return
        self.stored -= request.computed
        self.swapped_tokens += min(self._move(request, request.computed), 0)

    def _move(self, request: _Request, tokens: int) -> int:
        """Rule 9a: tokens move, or those that were to move in this decision do not; what that adds."""
        if request in self.moving:
            self.moving.remove(request)
            tokens = -tokens
        else:
            self.moving.add(request)
        self.moved += tokens
        return tokens

    def preempt(self, victim: _Request) -> None:
        """Rule 8: a resident loses its place; the caller puts it in its queue."""
        if victim is self.residents[-1]:
            self.residents.pop()
        else:
            self.residents.remove(victim)
        self.free(victim)
        self.held -= victim.computed
        self.budget += victim.scheduled
        if self.table.preemption == "swap":
            victim.stored = victim.computed
            self.stored += victim.computed
            self.swapped_tokens += max(self._move(victim, victim.computed), 0)
        else:
            self.wasted_tokens += victim.computed - victim.cached
            self.cached_tokens -= victim.cached
        self.preemption_count += 1
        victim.computed = victim.scheduled = victim.target = victim.position = 0
        victim.preemptions += 1
        victim.waiting_since = self.now
        if self.table.preemption == "restart":
            victim.produced = 0
            victim.first_token_s = math.nan
        self.victims.append(victim)

    def withdraw(self, request: _Request, deadline: float, fate: Status) -> None:
        """Rule 37: a request leaves unfinished."""
        request.fate = fate
        if request.target:
            request.left_s = self.now
            self.residents.remove(request)
            self.selected.discard(request)
            self.free(request)
            self.held -= request.computed
            self._drop(request, request.computed)
        else:
            request.left_s = deadline
            self.waiting_s += max(0.0, deadline - max(request.waiting_since, self.warmup))
            if request in self.preempted:
                self.preempted.remove(request)
            else:
                self.queues[request.row].remove(request)
            if request.stored and not request.handed:
                self.stored -= request.stored
                self._drop(request, request.stored)
        self.departed.append(request)

    def _drop(self, request: _Request, tokens: int) -> None:
        self.dropped_tokens += tokens - request.cached
        self.cached_tokens -= request.cached

    def take_departed(self) -> tuple[tuple[int, float], ...]:
        """Who left unfinished and when, since this was last asked."""
        departed, self.departed = self.departed, []
        return tuple((request.index, request.left_s) for request in departed)

    def on_hold(self, row: int) -> Iterator[_Request]:
        """The requests of a row whose hold counts (rule 23)."""
        yield from self.queues[row]
        if self.table.freeze:
            yield from (request for request in self.residents if request.row == row)

    def expired(self, row: int) -> Iterator[_Request]:
        """The requests of a row that have not been served for its hold (rule 23)."""
        hold = self.rows[row].max_hold_s
        if hold is not None:
            yield from (request for request in self.on_hold(row) if self.now >= request.served_s + hold)

    def hold_expired(self, row: int) -> bool:
        return any(True for _ in self.expired(row))


# ------------------------------------------------------------------ the rules: each fixes system.batch


def _serve_residents(system: _System, order: list[_Request], held: bool) -> None:
    """Rules 10 and 11: tokens for residents, preempting the most recently admitted on shortage."""
    chunk_tokens = system.limits.chunk
    capacity = system.limits.capacity
    for request in order:
        if system.budget == 0:
            break
        if request.target == 0:  # preempted in this decision
            continue
        missing = request.target - request.computed
        if missing <= 0:
            tokens = 1
        elif held:
            continue
        else:
            tokens = min(missing, system.budget, chunk_tokens)
        while system.used + system.growth(request, tokens) > capacity:
            victim = system.residents[-1]
            system.preempt(victim)
            system.preempted.append(victim)
            if victim is request:
                break
        else:
            system.schedule(request, tokens)


def _next_waiting(system: _System, may_admit: list[int]) -> _Request | None:
    """Rule 13: the stack, then the smallest (priority, arrival, index) among the rows that may admit."""
    if system.preempted:
        return system.preempted[-1]
    heads = [queue[0] for queue, left in zip(system.queues, may_admit, strict=True) if queue and left > 0]
    return min(heads, key=lambda request: request.key, default=None)


def _fits(system: _System, request: _Request, in_use: int, units: int) -> bool:
    """Rule 14."""
    limit = system.limits.admission if system.residents else system.limits.capacity
    return in_use + units <= limit


def _admit_waiting(system: _System, may_admit: list[int]) -> None:
    """Rules 13 to 15; lowers `may_admit` of a row by every newcomer it admits."""
    limits = system.limits
    while system.budget > 0 and len(system.residents) < limits.slots:
        request = _next_waiting(system, may_admit)
        if request is None:
            return
        target = request.prompt + request.produced
        held = request.stored or system.found(request)  # as soon as it enters
        chunk = min(target - held, system.budget, limits.chunk)
        needed = target if system.table.whole_prompt_admission else held + chunk
        if limits.whole_prompts and target - held > system.budget:
            return
        if not _fits(system, request, system.used, system.units_to_add(request, held, needed)):
            return
        if system.residents and not _fits_ahead(system, request, held + chunk):
            return
        if system.preempted:
            system.preempted.pop()
        else:
            system.queues[request.row].popleft()
            may_admit[request.row] -= 1
        system.admit(request)
        system.schedule(request, chunk)


def _fits_ahead(system: _System, newcomer: _Request, held: int) -> bool:
    """Rule 32, somebody being resident; the newcomer would hold `held` tokens after this iteration."""
    limits = system.limits
    if limits.reserve:
        everybody = [*system.residents, newcomer]
        return (
            sum(limits.units(request.prompt + limits.reserve - 1) for request in everybody)
            <= limits.admission
        )
    return not limits.shares or _forecast(system, newcomer, held) <= limits.shares * limits.admission


def _forecast(system: _System, newcomer: _Request, held_by_it: int) -> int:
    """Rule 33: the largest memory forecast for an iteration after this one, in units / shares.

    Between two ends what is held only grows, so that the iterations at which somebody ends are enough.
    """
    limits = system.limits
    incomplete = 0
    last, held, share = [], [], []
    residents = [(request, request.computed + request.scheduled) for request in system.residents]
    for request, after in [*residents, (newcomer, held_by_it)]:
        lengths = system.table.lookahead.lengths or (request.believed,)
        ahead = [length - request.produced - 1 for length in lengths if length > request.produced]
        weight = limits.shares // max(len(ahead), 1)
        target = request.prompt + request.produced
        if after < target:
            incomplete += sum(weight * limits.units(target + u) for u in ahead) or (
                limits.shares * limits.units(target)
            )
            continue
        last += ahead
        held += [after] * len(ahead)
        share += [weight] * len(ahead)
    ends = np.array(last, dtype=np.int64)
    at = np.unique(ends[ends >= 1])[:, None]
    memory = -(-(np.array(held, dtype=np.int64) + at) // limits.block) * np.array(share, dtype=np.int64)
    return incomplete + int((memory * (ends >= at)).sum(axis=1).max(initial=0))


def _prefills_held(system: _System) -> bool:
    """Rule 16."""
    interval = system.table.prefill_interval
    return (
        interval is not None
        and system.since_prefill < interval - 1
        and not system.queue_left
        and any(request.computed >= request.target for request in system.residents)
    )


def _token_budget_rule(system: _System, may_admit: list[int]) -> None:
    """`vllm`, `capped`, `sarathi`, and `gated` but for its windows (rules 10 to 16)."""
    while True:
        preempted_before = len(system.victims)
        system.budget = system.limits.budget
        order = list(system.residents)
        if system.table.kind == "sarathi":
            order.sort(key=lambda request: request.computed < request.target)
        held = _prefills_held(system)
        _serve_residents(system, order, held)
        system.batch = [request for request in system.batch if request.scheduled]
        anybody_preempted = len(system.victims) > preempted_before
        if not held:
            if not anybody_preempted:
                _admit_waiting(system, may_admit)
            system.queue_left = system.waiting_count() > 0
        if system.batch or not anybody_preempted:
            return


def _decide_engine(system: _System) -> None:
    _token_budget_rule(system, [UNLIMITED] * len(system.rows))


def _decide_gated(system: _System) -> None:
    """Rules 17 and 18."""
    _token_budget_rule(system, _allowances(system))
    if not system.batch:
        for window in system.windows:
            window.clear()
        _admit_waiting(system, _allowances(system))
        system.queue_left = system.waiting_count() > 0
    for j, window in enumerate(system.windows):
        newcomers = sum(request.row == j and request.preemptions == 0 for request in system.admitted)
        if newcomers:
            window.append((system.iterations, newcomers))


def _allowances(system: _System) -> list[int]:
    """Rule 17: how many newcomers each row may admit in this decision."""
    allowances = []
    for j, (row, queue, window) in enumerate(zip(system.rows, system.queues, system.windows, strict=True)):
        assert row.threshold is not None
        assert row.period is not None
        while window and window[0][0] <= system.iterations - row.period:
            window.popleft()
        is_open = len(queue) >= row.gate or system.hold_expired(j)
        allowances.append(row.threshold - sum(count for _, count in window) if is_open else 0)
    return allowances


def _decide_vllm_v0(system: _System) -> None:
    """Rule 19b."""
    system.budget = system.limits.budget
    swapped_out = bool(system.stored)
    if not swapped_out:
        _admit_waiting(system, [UNLIMITED])
    if not system.batch:
        _serve_residents(system, list(system.residents), held=False)
        system.batch = [request for request in system.batch if request.scheduled]
        if swapped_out and not system.victims:
            _admit_waiting(system, [0])


def _decide_orca(system: _System) -> None:
    """Rules 19 and 19a."""
    limits = system.limits
    system.budget = limits.budget
    for request in system.residents:
        system.schedule(request, 1)
    reserved = sum(limits.units(request.prompt + limits.reserve - 1) for request in system.residents)
    (queue,) = system.queues
    if system.table.kind == "faster_transformer" and system.residents:
        return
    while queue and len(system.residents) < limits.slots:
        request = queue[0]
        needed = limits.units(request.prompt + limits.reserve - 1)
        missing = request.prompt - system.found(request)
        if missing > system.budget or not _fits(system, request, reserved, needed):
            return
        queue.popleft()
        system.admit(request)
        system.schedule(request, missing)
        reserved += needed


def _decide_wait(system: _System) -> None:
    _decide_blocks(system, _start_cohorts)


def _decide_nested(system: _System) -> None:
    _decide_blocks(system, _start_segments)


def _decide_blocks(system: _System, start: Callable[[_System], set[_Request]]) -> None:
    """Rules 21 and 22; `start` admits for a block and says whom it serves."""
    if system.block_left == 0 or not _serve_block(system):
        assert system.table.block_iterations is not None
        system.block_left = system.table.block_iterations
        system.selected = start(system)
        if not _serve_block(system):
            system.block_left = 0


def _start_cohorts(system: _System) -> set[_Request]:
    """Rule 20."""
    rows = _open_rows(system)
    _admit_cohorts(system, rows)
    return {request for request in system.residents if request.row in rows}


def _open_rows(system: _System) -> set[int]:
    """Rule 20's J."""
    return {
        j
        for j, (row, queue) in enumerate(zip(system.rows, system.queues, strict=True))
        if row.threshold and (len(queue) >= row.gate or system.hold_expired(j))
    }


def _admit_cohorts(system: _System, rows: set[int]) -> None:
    for j in sorted(rows, key=lambda j: (_priority(system.table, j), j)):
        threshold = system.rows[j].threshold
        assert threshold is not None
        free_slots = system.limits.slots - len(system.residents)
        for _ in range(min(threshold, len(system.queues[j]), free_slots)):
            system.admit(system.queues[j].popleft())


def _start_segments(system: _System) -> set[_Request]:
    """Rule 28."""
    segments = system.table.segments
    first = [0, *(segment.boundary + 1 for segment in segments[:-1])]
    (queue,) = system.queues
    present: dict[int, list[_Request]] = {0: list(queue)}
    for request in sorted(system.residents, key=lambda request: request.key):
        present.setdefault(request.position, []).append(request)

    last = 0
    while last < len(segments) and len(present.get(first[last], ())) >= segments[last].threshold:
        last += 1
    for request in system.expired(0):
        last = max(last, bisect.bisect_right(first, request.position))
    if last == 0:
        return set()

    del present[0]
    selected: set[_Request] = set()
    for position, requests in present.items():
        k = bisect.bisect_right(first, position)
        if k <= last:
            selected.update(requests[: segments[k - 1].threshold])
    _admit_cohorts(system, {0})
    return selected.union(system.admitted)


def _serve_block(system: _System) -> bool:
    """Rule 21: one iteration of the block for every selected resident; False if nobody is left to serve."""
    tokens = {
        request: max(1, request.target - request.computed)
        for request in system.residents
        if request in system.selected
    }
    growth = sum(system.growth(request, count) for request, count in tokens.items())
    while tokens and system.used + growth > system.limits.capacity:
        newest = system.residents[-1]
        if newest in tokens:
            growth -= system.growth(newest, tokens.pop(newest))
        system.preempt(newest)
        system.queues[newest.row].appendleft(newest)
    for request, count in tokens.items():
        system.schedule(request, count)
    system.block_left -= 1
    return bool(tokens)


_RULES: dict[str, Callable[[_System], None]] = {
    "vllm": _decide_engine,
    "capped": _decide_engine,
    "sarathi": _decide_engine,
    "gated": _decide_gated,
    "vllm_v0": _decide_vllm_v0,
    "orca": _decide_orca,
    "faster_transformer": _decide_orca,
    "wait": _decide_wait,
    "nested-wait": _decide_nested,
}


# ------------------------------------------------------------------ time


def run_reference(
    path: ArrivalPath,
    server: Server,
    table: PolicyTable | UserRule,
    *,
    horizon: float | None,
    warmup: float = 0.0,
    occupancy_points: int = 0,
    on_iteration: Observer | None = None,
    first_token_s: NDArray[np.float64] | None = None,
    on_idle: IdleObserver | None = None,
) -> EngineRun:
    """Run one table on one path, one iteration at a time.

    Parameters
    ----------
    path : ArrivalPath
        N requests. Those that arrive after the horizon stay `unfinished`.
    server : Server
        Its iteration time may be any function of the batch.
    table : PolicyTable or UserRule
        Of a kind simulated (`limits.KINDS`); or a rule of the user's own.
    horizon : float or None
        End of the run, s; None: until empty or stuck.
    warmup : float
        Start of the measured window, s: only the time integrals look at it.
    occupancy_points : int
        Points of the occupancy series; 0: none.
    on_iteration : callable, optional
        Called with the `IterationSummary` of every iteration when its batch is fixed.
    first_token_s : (N,) float array, optional
        When each request emitted token 1 elsewhere, s: all requests are handed over (rule 6a). For kinds in
        `limits.SCANNING_KINDS`.
    on_idle : callable, optional
        Called for every decision that preempts and leaves the server idle, with its instant, the requests
        admitted and preempted, in order, and (request, when) of those that left unfinished since the last call
        of either.

    Returns
    -------
    EngineRun

    Raises
    ------
    InputError
        See `limits.check_run`.
    SimulationError
        If a user's iteration-time function returns anything but a positive, finite time, or a user's rule
        decides what the server cannot do.

    Examples
    --------
    >>> from fluidsched import ArrivalPath, IterationTime, Server, baselines
    >>> path = ArrivalPath.from_arrays([0.0, 0.5], [4, 2], [2, 1])
    >>> server = Server(10, IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    >>> run = run_reference(path, server, baselines.vllm(), horizon=None)
    >>> run.finish_s.tolist(), run.kv_token_s
    ([2.0, 2.0], 11.0)
    """
    engine = Engine(
        path,
        server,
        table,
        horizon=horizon,
        warmup=warmup,
        occupancy_points=occupancy_points,
        on_iteration=on_iteration,
        first_token_s=first_token_s,
        on_idle=on_idle,
    )
    engine.join_all()
    engine.advance(math.inf)
    return engine.record()


class Engine:
    """A run that can be stopped at any instant and go on from there; arguments as for `run_reference`.

    Nobody comes by itself: `join_all` lets every request of the path come when it arrives, `join` one now.

    Attributes
    ----------
    system : _System
        The state at `system.now`, the next decision instant.
    """

    def __init__(
        self,
        path: ArrivalPath,
        server: Server,
        table: PolicyTable | UserRule,
        *,
        horizon: float | None,
        warmup: float = 0.0,
        occupancy_points: int = 0,
        on_iteration: Observer | None = None,
        first_token_s: NDArray[np.float64] | None = None,
        on_idle: IdleObserver | None = None,
    ):
        rule, table = (table, table.table) if isinstance(table, UserRule) else (None, table)
        path = within_model_length(path, server)
        rows = check_run(path, server, table, horizon)
        if horizon is not None:
            horizon = check_real("horizon", horizon, above=0.0)
        warmup = check_real("warmup", warmup, minimum=0.0)
        points = check_count("occupancy_points", occupancy_points)
        self.rejected = never_fits(path, server, table).tolist()
        self.deadlines = deadlines(path, server)
        self.to_come: list[tuple[float, int, int, Status]] = []
        believed = beliefs(path, table)
        self.by_length = table.order == "shortest_first"

        def rank(i: int, j: int) -> tuple[float, ...]:
            priority = _priority(table, j)
            return (priority, int(believed[i])) if self.by_length and believed is not None else (priority,)

        cached = path.cached_prompt_tokens
        columns = (
            rows,
            path.arrival_s,
            path.prompt_tokens,
            path.output_tokens,
            np.zeros_like(path.prompt_tokens) if cached is None else cached,
        )
        self.requests = [
            _Request(i, row, rank(i, row), *others)
            for i, (row, *others) in enumerate(zip(*(column.tolist() for column in columns), strict=True))
        ]
        if believed is not None:
            for request, length in zip(self.requests, believed.tolist(), strict=True):
                request.believed = length
        if first_token_s is not None:
            check_handed_over(path, table)
            for request, instant in zip(self.requests, first_token_s.tolist(), strict=True):
                request.produced, request.stored, request.handed = 1, request.prompt, True
                request.first_token_s = request.token_s = instant
        self.arrivals: deque[_Request] = deque()
        if path.prompt_blocks is not None:
            if rule is not None:
                raise InputError(
                    "path.prompt_blocks",
                    "given",
                    f"be None with {rule.name!r}, a rule in Python",
                    "Read the trace with the size of a prefix cache of its own.",
                )
            for request in self.requests:
                request.names = path.prompt_blocks.of(request.index)[
                    : request.prompt // path.prompt_blocks.block_tokens
                ].tolist()
        self.system = _System(server, table, warmup, path.prompt_blocks)
        self.horizon = math.inf if horizon is None else horizon
        self.clock = _Clock(server, self.horizon, warmup, on_iteration)
        self.on_idle = on_idle
        last_arrival = self.requests[-1].arrival_s if self.requests else 0.0
        self.occupancy = _Occupancy(points, last_arrival if horizon is None else horizon)
        self.decide = _RULES[table.kind] if rule is None else follow(rule, path, self.requests)
        self.verdict: Verdict | None = None

    def join_all(self) -> None:
        """Every request that can be served at all joins when it arrives."""
        self.arrivals.extend(request for request in self.requests if not self.rejected[request.index])

    def join(self, index: int) -> None:
        """The request of this index joins now; the engine must not be before its arrival."""
        self._queue(self.requests[index])

    def send(self, index: int, arrival_s: float) -> None:
        """The request of this index will come at `arrival_s`, not before `system.now`, whatever the path says."""
        request = self.requests[index]
        request.arrival_s = request.served_s = request.waiting_since = arrival_s
        request.key = (*request.key[:-2], arrival_s, index)
        bisect.insort(self.arrivals, request, key=lambda coming: (coming.arrival_s, coming.index))

    def _queue(self, request: _Request) -> None:
        """The request joins its row's queue: last, or in its place by length (rule 31)."""
        queue = self.system.queues[request.row]
        if self.by_length:
            bisect.insort(queue, request, key=lambda waiting: waiting.key)
        else:
            queue.append(request)
        for turn, deadline in enumerate(self.deadlines):
            at = float(deadline.at_s[request.index])
            if at < math.inf:
                heapq.heappush(self.to_come, (at, turn, request.index, deadline.fate(request.index)))

    def _next_deadline(self) -> float:
        """The first deadline to come that still holds (rule 35), s; infinite if there is none."""
        while self.to_come:
            at, turn, index, _ = self.to_come[0]
            if self._holds(turn, index):
                return at
            heapq.heappop(self.to_come)
        return math.inf

    def _holds(self, turn: int, index: int) -> bool:
        """Whether the first (0) or second (1) deadline of a request still holds (rule 35)."""
        request = self.requests[index]
        here = request.fate is None and math.isnan(request.finish_s)
        return here and (turn == 1 or math.isnan(request.admitted_s))

    def _depart(self) -> None:
        """Rule 36."""
        while self._next_deadline() <= self.system.now:
            at, _, index, fate = heapq.heappop(self.to_come)
            self.system.withdraw(self.requests[index], at, fate)

    def advance(self, until: float, *, to_finish: bool = False) -> None:
        """Take every decision before `until`, or all to the end of the run.

        Afterwards `system.now` is at least `until`: the end of the iteration that runs then, or `until`
        itself if the server idles. With `to_finish` it stops also at the end of the first iteration in which a
        request of `system.batch` finishes, before anybody joins who comes at this instant.
        """
        system = self.system
        while self.verdict is None:
            while self.arrivals and self.arrivals[0].arrival_s <= system.now:
                self._queue(self.arrivals.popleft())
            if until <= system.now < self.horizon:
                return
            self._depart()
            if system.now >= self.horizon:
                self.verdict = "horizon"
            else:
                self.occupancy.sample(system)
                system.batch, system.admitted, system.victims = [], [], []
                system.moving.clear()
                self.decide(system)
                if system.batch:
                    self.clock.run_iteration(system)
                    if to_finish and any(not math.isnan(request.finish_s) for request in system.batch):
                        return
                    continue
                if self.on_idle is not None and system.victims:
                    admitted, victims = (
                        tuple(request.index for request in requests)
                        for requests in (system.admitted, system.victims)
                    )
                    self.on_idle(system.now, admitted, victims, system.take_departed())
                if not self.clock.idle(system, self.arrivals, min(until, self._next_deadline())):
                    waiting = system.residents or system.waiting_count()
                    self.verdict = "stuck" if waiting else "finished"

    def seen(self, instant: float) -> tuple[int, int]:
        """Return what a router sees at an instant to which `advance` has led: two numbers.

        Requests in the system; KV tokens held, and needed at admission by those that wait. During an
        iteration it is what that holds, with those who will leave at its end. Nobody waits past a deadline.
        """
        system = self.system
        residents, held = len(system.residents), system.held
        if system.now > instant:
            residents, held = self.clock.residents_before, self.clock.held_before
        gone = {index for at, turn, index, _ in self.to_come if at <= instant and self._holds(turn, index)}
        waiting = [*system.preempted, *(request for queue in system.queues for request in queue)]
        waiting = [request for request in waiting if request.index not in gone]
        needed = sum(request.prompt + request.produced for request in waiting)
        return len(waiting) + residents, held + needed

    def record(self) -> EngineRun:
        """What the run, which has ended, leaves behind."""
        assert self.verdict is not None
        return _records(self.requests, self.rejected, self.system, self.clock, self.verdict, self.occupancy)


def _priority(table: PolicyTable, j: int) -> float:
    priority = table.types[j].priority
    return math.inf if priority is None else float(priority)


class _Clock:
    """Moves time through an iteration or an idle spell, and keeps the integrals of the measured window."""

    def __init__(self, server: Server, horizon: float, warmup: float, on_iteration: Observer | None):
        self.server = server
        coefficients = server.iteration_time.coefficients
        self.pieces: list[list[float]] | None = None if coefficients is None else coefficients.tolist()
        self.horizon = horizon
        self.warmup = warmup
        self.on_iteration = on_iteration
        self.busy_s = self.kv_token_s = self.resident_s = self.gap_s = 0.0
        self.gap_counts = np.zeros(BUCKETS, dtype=np.int64)
        self.batch_size_sum = self.batch_token_sum = self.emitted_tokens = self.peak_kv = 0
        self.residents_before = self.held_before = 0  # during the iteration that ended last

    def run_iteration(self, system: _System) -> None:
        """One iteration with the batch decided, and its effects unless the horizon cuts it (rules 2 to 5)."""
        summary = self._summarise(system)
        self.residents_before, self.held_before = summary.residents, summary.held_tokens
        self._pass_time(system, summary.end_s, summary.held_tokens, busy=True)
        if summary.end_s > self.horizon:
            system.now = self.horizon
            return
        system.now = summary.end_s
        system.moved = 0
        self.batch_size_sum += len(system.batch)
        self.batch_token_sum += summary.prefill_tokens + summary.decode_tokens
        self.peak_kv = max(self.peak_kv, summary.held_tokens)
        system.iterations += 1
        system.since_prefill = 0 if summary.prefill else system.since_prefill + 1
        emitted, gaps = _take_effect(system)
        if system.now > self.warmup:
            self.emitted_tokens += emitted
            for gap in gaps:
                self.gap_s += gap
                self.gap_counts[bucket(gap)] += 1

    def _summarise(self, system: _System) -> IterationSummary:
        prefill_attention = 0.0
        kv_tokens = 0
        prefill: list[tuple[int, int]] = []
        decode: list[int] = []
        for request in system.batch:
            if request.computed < request.target:
                chunk = request.scheduled
                prefill.append((request.index, chunk))
                prefill_attention += chunk * (request.computed + chunk / 2)
            else:
                decode.append(request.index)
                kv_tokens += request.computed + 1
        prefill_tokens = sum(chunk for _, chunk in prefill)
        chunks = tuple(chunk for _, chunk in prefill)
        duration = self._duration(
            BatchSummary(prefill_tokens, len(decode), kv_tokens, prefill_attention, chunks)
        )
        if system.moved:
            assert self.server.swap_bandwidth is not None
            duration += system.moved / self.server.swap_bandwidth
        summary = IterationSummary(
            index=system.iterations,
            start_s=system.now,
            end_s=system.now + duration,
            prefill=tuple(prefill),
            decode=tuple(decode),
            admitted=tuple(request.index for request in system.admitted),
            preempted=tuple(request.index for request in system.victims),
            prefill_tokens=prefill_tokens,
            decode_tokens=len(decode),
            kv_tokens=kv_tokens,
            prefill_attention=prefill_attention,
            held_tokens=system.held + prefill_tokens + len(decode),
            residents=len(system.residents),
            waiting=system.waiting_count(),
            departed=system.take_departed(),
            found=tuple(request.computed for request in system.admitted),
        )
        if self.on_iteration is not None:
            self.on_iteration(summary)
        return summary

    def _duration(self, batch: BatchSummary) -> float:
        if self.pieces is not None:
            return max(
                c0
                + c_pf * batch.prefill_tokens
                + c_dec * batch.decode_tokens
                + c_kv * batch.kv_tokens
                + c_attn * batch.prefill_attention
                for c0, c_pf, c_dec, c_kv, c_attn in self.pieces
            )
        function = self.server.iteration_time.function
        assert function is not None
        duration = float(function(batch))
        if not (0.0 < duration < math.inf):
            raise SimulationError(f"the iteration-time function returned {duration!r} s for {batch}")
        return duration

    def idle(self, system: _System, arrivals: deque[_Request], until: float) -> bool:
        """Move to the next arrival or timer, the horizon or `until`; False if nothing can ever change (rule 3)."""
        instants = [*_timers(system), self.horizon, until]
        if arrivals:
            instants.append(arrivals[0].arrival_s)
        wake = min(instants)
        if wake == math.inf:
            return False
        self._pass_time(system, wake, system.held, busy=False)
        system.now = wake
        return True

    def _pass_time(self, system: _System, until: float, kv_tokens: int, *, busy: bool) -> None:
        duration = min(until, self.horizon) - max(system.now, self.warmup)
        if duration > 0.0:
            self.kv_token_s += duration * kv_tokens
            self.resident_s += duration * len(system.residents)
            if busy:
                self.busy_s += duration


def _take_effect(system: _System) -> tuple[int, list[float]]:
    """Rule 4 at the end of an iteration: progress, tokens, departures.

    Returns the number of output tokens emitted, and of each that is not its request's first the time since
    the one before, s (rule 25).
    """
    emitted = 0
    gaps = []
    finished = False
    for request in system.batch:
        tokens = request.scheduled
        request.scheduled = 0
        request.position += 1
        request.computed += tokens
        request.served_s = system.now
        system.held += tokens
        system.enter_blocks(request)
        if request.computed < request.target:
            continue
        emitted += 1
        request.produced += 1
        if request.produced == 1:
            request.first_token_s = system.now
        else:
            gaps.append(system.now - request.token_s)
        request.token_s = system.now
        if request.produced == request.output:
            request.finish_s = system.now
            request.target = 0
            system.held -= request.computed
            system.free(request)
            finished = True
    if finished:
        system.residents = [request for request in system.residents if request.produced < request.output]
    return emitted, gaps


def _timers(system: _System) -> list[float]:
    """The instants later than now at which a hold expires (rule 23) or a user's rule wakes (rule 24)."""
    instants = [system.wake_s] if system.wake_s < math.inf else []
    for j, row in enumerate(system.rows):
        if row.max_hold_s is None or not row.threshold:
            continue
        instants += [request.served_s + row.max_hold_s for request in system.on_hold(j)]
    return [instant for instant in instants if instant > system.now]


# ------------------------------------------------------------------ records


class _Occupancy:
    """Rule 26: a series of at most 2·points rows."""

    def __init__(self, points: int, span: float):
        self.points = points
        self.step = span / points if points and span > 0.0 else math.inf
        self.next_s = 0.0 if points else math.inf
        self.rows: list[tuple[float, int, int, int]] = []

    def sample(self, system: _System) -> None:
        if system.now < self.next_s:
            return
        self.rows.append((system.now, system.held, len(system.residents), system.waiting_count()))
        if len(self.rows) == 2 * self.points:
            self.rows = self.rows[::2]
            self.step *= 2.0
        self.next_s = math.inf if math.isinf(self.step) else (system.now // self.step + 1) * self.step

    def array(self) -> np.ndarray | None:
        return np.array(self.rows, dtype=np.float64).reshape(-1, 4) if self.points else None


def _records(
    requests: list[_Request],
    rejected: list[bool],
    system: _System,
    clock: _Clock,
    verdict: Verdict,
    occupancy: _Occupancy,
) -> EngineRun:
    waiting = [*system.preempted, *(request for queue in system.queues for request in queue)]
    for request in waiting:
        system.waiting_s += max(0.0, system.now - max(request.waiting_since, system.warmup))
    starved: set[int] = set()
    if verdict == "stuck":
        starved = {request.row for request in [*waiting, *system.residents]}
    status = [
        request.fate
        or ("rejected" if refused else "unfinished" if math.isnan(request.finish_s) else "finished")
        for request, refused in zip(requests, rejected, strict=True)
    ]
    finish = np.array([request.finish_s for request in requests], dtype=np.float64)
    left = np.array([request.left_s for request in requests], dtype=np.float64)
    return EngineRun(
        admitted_s=np.array([request.admitted_s for request in requests], dtype=np.float64),
        first_token_s=np.array([request.first_token_s for request in requests], dtype=np.float64),
        finish_s=finish,
        left_s=np.where(np.isnan(left), finish, left),
        preemptions=np.array([request.preemptions for request in requests], dtype=np.int64),
        status=np.array([STATUSES.index(word) for word in status], dtype=np.int8),
        end_s=system.now,
        verdict=verdict,
        starved_types=tuple(system.rows[j].name for j in sorted(starved)),
        iterations=system.iterations,
        batch_size_sum=clock.batch_size_sum,
        batch_token_sum=clock.batch_token_sum,
        busy_s=clock.busy_s,
        kv_token_s=clock.kv_token_s,
        resident_s=clock.resident_s,
        waiting_s=system.waiting_s,
        emitted_tokens=clock.emitted_tokens,
        gap_s=clock.gap_s,
        gap_counts=clock.gap_counts,
        preempted=system.preemption_count,
        wasted_tokens=system.wasted_tokens,
        peak_kv=clock.peak_kv,
        kv_end=system.held,
        swapped_tokens=system.swapped_tokens,
        stored_end=system.stored,
        cached_tokens=system.cached_tokens,
        dropped_tokens=system.dropped_tokens,
        occupancy=occupancy.array(),
    )
