r"""What the theorems promise for a given table, workload, server and horizon: numbers, or why there are none.

**WAIT.** Let T be the longest a block of k iterations can last: every type open and full, every request as
long as its type allows, p_max and o_max. With lengths fixed per type this is the T_k(n) of the compiler.
The embedded queue of type j sees at most m_j = λ_j T Poisson arrivals per cycle
(`fluidsched.queues.guarantees` has the derivations):

    queue after decisions  E[W_j]                                  exact law of W' = W + X − n_j 1{W + X ≥
    n_j} TTFT                   E[W_j]/λ_j + T/2 + T_1                  (+ T when other types share the
    server) E2E                    TTFT − T_1 + (B_j − 1) n_j/λ_j + T      B_j = ⌈o_max/k⌉ blocks in service
    throughput gap         (1/H) Σ_j ( E[o_j] (E[W_j] + m_j) + o_max (B_j + 1) n_j )    over H seconds

T_1 is the first iteration of a full block. The second line counts a batch as started at the next decision
after it is complete; the third uses that consecutive batches of a type start n_j/λ_j apart in the mean, and
that a batch is served once per start of its type until it leaves.

**Conditions**, checked in this order: the table is literal WAIT (kind "wait", every gate its threshold, no hold
limit); lengths are bounded; the certain memory bound max_r Σ_j n_j max(f_j(r), g_j) is within the capacity, so that
nobody is ever preempted, the residents Σ_j n_j B_j within the largest batch, and a full block's first iteration
within the token budget; the type's arrivals are Poisson; it is not refused (n_j ≥ 1); and m_j < n_j. At m_j = n_j
the queue is bounded over a horizon only, by n + √n Σ k^{−1/2}, and delays follow with that in place of E[W_j].

**Nested WAIT.** A cohort of exactly n_{k−1} enters segment k − 1 at each of its runs, and each of its
requests reaches segment k with probability p_k = Λ_k/Λ_{k−1}: the boundary queue of segment k *is* the
chain of `fluidsched.queues.first_passage`, one step per run. At most 1 + H/(ℓ c0) runs fit into H seconds
(c0 the empty batch, ℓ the block length). If the base memory and all buffers fit, memory overflows only if a
boundary queue exceeds its buffer:

    P(overflow within H) ≤ Σ_{k≥2} P(queue k exceeds buffer k within 1 + H/(ℓ c0) cycles).

The rest is stated for runs in which no queue exceeds its buffer x_k, so that nobody is preempted. No run of segments
lasts longer than T, that of all of them with every place full and prompts of p_max; runs start as soon as n_1 wait and
the server is free, as batches of literal WAIT with one type of rate Λ do. So with m = ΛT < n_1 the entry queue is at
most that of WAIT, and of the residents there are at most N = Σ_b n_k(b) + Σ_k x_k, b the blocks of all segments:

    queue after decisions  E[W]                 exact law of W' = W + X − n_1 1{W + X ≥ n_1}, X ~ Poisson(ΛT)
    boundary queues        E[V_k]               exact law of V' = V + Y − n_k 1{V + Y ≥ n_k} after decisions, one
                                                step per run of segment k − 1, Y ~ Binomial(n_{k−1}, p_k)
    TTFT                   E[W]/Λ + T/2 + T_1
    E2E                    (E[W] + N)/Λ + T/2   by Little's law for all requests in the system
    throughput gap         (1/H) ( E[o] (E[W] + ΛT) + o_max N )

**Source**: Ao, Luo, Simchi-Levi, Wang, arXiv 2504.11320, Theorems 1 and 2; exact queues and delays are
derived here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fluidsched._checks import check_real
from fluidsched.bounds.bound import Bound
from fluidsched.errors import InputError
from fluidsched.policy.profiles import worst_profile
from fluidsched.queues import (
    critical_queue_bound,
    embedded_queue_mean,
    first_passage_probability,
)
from fluidsched.workload.arrivals import poisson

if TYPE_CHECKING:
    from fluidsched.policy import PolicyTable
    from fluidsched.server import Server
    from fluidsched.workload import Workload

__all__ = ["nested_wait_bounds", "nested_wait_overflow", "wait_bounds"]

_Real = npt.NDArray[np.float64]

_SOURCE = "arXiv 2504.11320, Theorem 1"
_WAITING = "Σ_j ( E[W_j] + λ_j T/2 (+ λ_j T) )"
_CRITICAL = 1e-12  # relative: m counts as equal to n within this


_NO_PIECES = "the iteration time is a function, not a maximum of affine pieces"


def wait_bounds(
    table: PolicyTable, workload: Workload, server: Server, horizon: float | None = None
) -> tuple[Bound, ...]:
    """Bounds on queue, TTFT and E2E latency per type, and on the throughput gap, of a WAIT table.

    Parameters
    ----------
    table : PolicyTable
        One row per type of the workload, in its order.
    workload : Workload
        J types with the offered rates, Poisson.
    server : Server
    horizon : float, optional
        H, seconds: needed by the throughput gap and at critical thresholds.

    Returns
    -------
    tuple of Bound
        "memory", then "entry_queue[j]", "mean_ttft[j]", "mean_e2e[j]" for each type, then "mean_ttft" over
        all requests, "mean_waiting" (requests waiting, on average over time) and "output_throughput_gap".
        Latencies in seconds are long-run means over a type's requests.

    Raises
    ------
    InputError
        If the table's rows are not the workload's types.

    Examples
    --------
    >>> import fluidsched as fs
    >>> chat = fs.Workload([fs.RequestType("chat", 3.6, prompt_tokens=1, output_tokens=1)])
    >>> server = fs.Server(100, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    >>> from fluidsched.policy import Match, TableType
    >>> rows = [TableType("chat", Match(label="chat"), threshold=4, gate=4)]
    >>> table = fs.PolicyTable("wait", "wait", rows, block_iterations=1, freeze=True)
    >>> wait_bounds(table, chat, server)[2]
    mean_ttft[chat] ≤ 2.91663 s (literal WAIT, certain memory, λT = 3.6 < n = 4)
    """
    if horizon is not None:
        horizon = check_real("horizon", horizon, above=0.0)
    rate = workload.arrival_rate
    if table.kind != "wait":
        return _nothing(workload, f"the table is of kind {table.kind!r}, not 'wait'")
    if server.iteration_time.coefficients is None:
        return _nothing(workload, _NO_PIECES)
    if table.type_names != workload.type_names:
        raise InputError(
            "table",
            f"rows {', '.join(table.type_names)}",
            f"have one row per type of the workload: {', '.join(workload.type_names)}",
            "Give the (merged) workload the table was compiled from.",
        )
    loose = [row.name for row in table.types if row.gate != row.threshold or row.max_hold_s is not None]
    if loose:
        return _nothing(workload, f"type {loose[0]!r} has a gate below its threshold, or a hold limit")
    unbounded = [t.name for t in workload.types if not t.law.is_bounded]
    if unbounded:
        return _nothing(workload, f"the lengths of type {unbounded[0]!r} are unbounded")

    n = np.array([row.threshold for row in table.types], dtype=np.float64)
    k = table.block_iterations or 1
    memory, times = _full_block(n, k, workload, server)
    formula = "max_r Σ_j n_j max(f_j(r), g_j) at the largest lengths"
    capacity = server.usable_kv_capacity
    if memory > capacity:
        violated = (
            f"the largest KV of the table, {memory:,.0f} tokens, exceeds the capacity of {capacity:,.0f}"
        )
        return _nothing(workload, violated)
    blocks = -(-workload.max_output_tokens // k)
    residents, limits = float(n @ blocks), (server.max_batch_size, table.max_in_service)
    slots = min((limit for limit in limits if limit is not None), default=math.inf)
    if residents > slots:
        return _nothing(workload, f"up to {residents:,.0f} requests are in service, the limit is {slots:,}")
    tokens = float(n @ (workload.max_prefill_tokens + blocks - 1))
    if server.token_budget is not None and tokens > server.token_budget:
        violated = f"a full block's first iteration takes {tokens:,.0f} tokens, the budget is {server.token_budget:,}"
        return _nothing(workload, violated)
    cycle, first = float(times.sum()), float(times[0])
    arrivals = rate * cycle
    shared = cycle if np.count_nonzero(n) > 1 else 0.0

    bounds = [
        Bound("memory", memory, "tokens", "upper", formula, _SOURCE, "literal WAIT from an empty start")
    ]
    queue, delay = np.full(len(n), math.nan), np.full(len(n), math.nan)
    for j, name in enumerate(workload.type_names):
        if workload.types[j].arrivals != poisson():
            bounds += _none_for(name, f"arrivals are not Poisson but {workload.types[j].arrivals!r}")
            continue
        queue[j], how, condition = _entry_queue(n[j], arrivals[j], cycle, horizon)
        if math.isnan(queue[j]):
            bounds += _none_for(name, condition)
            continue
        if rate[j] == 0.0:
            bounds += _none_for(name, "no requests arrive")
            queue[j] = 0.0
            continue
        delay[j] = queue[j] / rate[j] + cycle / 2.0 + shared
        extra = " + T" if shared else ""
        e2e = delay[j] + (blocks[j] - 1) * n[j] / rate[j] + cycle
        bounds += [
            Bound(f"entry_queue[{name}]", queue[j], "requests", "upper", how, _SOURCE, condition),
            Bound(
                f"mean_ttft[{name}]",
                delay[j] + first,
                "s",
                "upper",
                f"E[W]/λ + T/2{extra} + T_1",
                _SOURCE,
                condition,
            ),
            Bound(
                f"mean_e2e[{name}]",
                e2e,
                "s",
                "upper",
                f"E[W]/λ + T/2{extra} + (B − 1) n/λ + T",
                _SOURCE,
                condition,
            ),
        ]
    present = rate > 0.0
    failing = [
        name
        for name, d, here in zip(workload.type_names, delay, present, strict=True)
        if here and math.isnan(d)
    ]
    condition = f"literal WAIT, certain memory, λT ≤ n for all {len(n)} types"
    violated_all = (
        f"no bound for type {failing[0]!r}"
        if failing
        else "no requests arrive"
        if not present.any()
        else None
    )
    formula = "Σ_j λ_j TTFT_j / Σ_j λ_j"
    if violated_all is not None:
        bounds.append(Bound.not_applicable("mean_ttft", "s", "upper", formula, _SOURCE, violated_all))
        bounds.append(
            Bound.not_applicable("mean_waiting", "requests", "upper", _WAITING, _SOURCE, violated_all)
        )
    else:
        waiting = float(rate[present] @ delay[present])  # by Little's law
        mean = waiting / float(rate.sum()) + first
        bounds.append(Bound("mean_ttft", mean, "s", "upper", formula, _SOURCE, condition))
        bounds.append(Bound("mean_waiting", waiting, "requests", "upper", _WAITING, _SOURCE, condition))
    bounds.append(_gap(workload, queue, arrivals, blocks, n, horizon, violated_all, condition))
    return tuple(bounds)


def _full_block(n: _Real, k: int, workload: Workload, server: Server) -> tuple[float, _Real]:
    """Largest KV and the k iteration times of a block, every type open, full and of the largest lengths."""
    rows = server.iteration_time.require_coefficients("the theorem constants")
    base, per_prefill, per_decode, per_kv, per_attention = rows.T
    padding = 0 if server.block_size is None else server.block_size - 1
    profile = worst_profile(workload, padding)
    k = min(k, profile.stages)
    block = profile.block(k)
    times = base[:, None] + np.outer(per_decode, n @ block.decodes) + np.outer(per_kv, n @ block.decode_kv)
    times[:, 0] += per_prefill * (n @ workload.max_prefill_tokens)
    times[:, 0] += per_attention * (n @ workload.max_prefill_attention)
    return float((n @ block.mean).max()), np.asarray(times.max(axis=0))


def _entry_queue(n: float, m: float, cycle: float, horizon: float | None) -> tuple[float, str, str]:
    """Bound on the mean entry queue, its formula and condition; or NaN and the violated condition."""
    if n == 0.0:
        return math.nan, "", "the table refuses the type (threshold 0)"
    comparison = f"λT = {m:.6g} {{}} n = {n:.0f}"
    prefix = "literal WAIT, certain memory, "
    if abs(m - n) <= _CRITICAL * n:
        if horizon is None:
            return math.nan, "", comparison.format("=") + ": critical, bounded over a horizon only"
        cycles = 1 + math.floor(horizon / cycle)
        value = critical_queue_bound(int(n), cycles)
        return value, "n + √n Σ_{i≤b} i^(−1/2)", prefix + comparison.format("=") + f", b = {cycles:,} cycles"
    if m > n:
        return math.nan, "", comparison.format(">")
    if m == 0.0:
        return 0.0, "", "no requests arrive"
    return (
        embedded_queue_mean(int(n), m),
        "E[W], W' = W + X − n·1{W + X ≥ n}",
        prefix + comparison.format("<"),
    )


def _gap(
    workload: Workload,
    queue: _Real,
    arrivals: _Real,
    blocks: npt.NDArray[np.int64],
    n: _Real,
    horizon: float | None,
    violated: str | None,
    condition: str,
) -> Bound:
    name, unit = "output_throughput_gap", "tokens/s"
    formula = "(1/H) Σ_j ( E[o_j] (E[W_j] + λ_j T) + o_max (B_j + 1) n_j )"
    if violated is None and horizon is None:
        violated = "no horizon is given"
    if violated is not None or horizon is None:
        return Bound.not_applicable(name, unit, "upper", formula, _SOURCE, violated or "")
    # Those waiting are a fair sample of the lengths; those in service are biased to the long.
    lost = workload.mean_output_tokens @ (queue + arrivals)
    lost += workload.max_output_tokens @ ((blocks + 1.0) * n)
    value = float(lost) / horizon
    return Bound(name, value, unit, "upper", formula, _SOURCE, condition)


def _none_for(name: str, violated: str) -> list[Bound]:
    return [
        Bound.not_applicable(f"entry_queue[{name}]", "requests", "upper", "E[W]", _SOURCE, violated),
        Bound.not_applicable(f"mean_ttft[{name}]", "s", "upper", "E[W]/λ + T/2 + T_1", _SOURCE, violated),
        Bound.not_applicable(
            f"mean_e2e[{name}]", "s", "upper", "E[W]/λ + T/2 + (B − 1) n/λ + T", _SOURCE, violated
        ),
    ]


def _nothing(workload: Workload, violated: str) -> tuple[Bound, ...]:
    """All bounds of `wait_bounds`, not applicable for one reason."""
    whole = [
        Bound.not_applicable("mean_ttft", "s", "upper", "Σ_j λ_j TTFT_j / Σ_j λ_j", _SOURCE, violated),
        Bound.not_applicable("mean_waiting", "requests", "upper", _WAITING, _SOURCE, violated),
        Bound.not_applicable("output_throughput_gap", "tokens/s", "upper", "(1/H) Σ_j …", _SOURCE, violated),
    ]
    memory = Bound.not_applicable(
        "memory", "tokens", "upper", "max_r Σ_j n_j max(f_j(r), g_j)", _SOURCE, violated
    )
    return (memory, *(b for name in workload.type_names for b in _none_for(name, violated)), *whole)


def nested_wait_overflow(table: PolicyTable, workload: Workload, server: Server, horizon: float) -> Bound:
    """Probability that a Nested WAIT table ever overflows memory within a horizon, from its buffers.

    Parameters
    ----------
    table : PolicyTable
        Kind "nested-wait": L segments with boundary, threshold and buffer.
    workload : Workload
        Its types make one stream of requests; the longest prompt counts for memory.
    server : Server
    horizon : float
        H, seconds.

    Returns
    -------
    Bound
        "overflow_probability", upper.
    """
    duration = check_real("horizon", horizon, above=0.0)
    name, source = "overflow_probability", "arXiv 2504.11320, Theorem 2, with exact first passage"
    formula = "Σ_{k≥2} P(queue k exceeds its buffer within 1 + H/(ℓ c0) cycles)"

    def none(violated: str) -> Bound:
        return Bound.not_applicable(name, "", "upper", formula, source, violated)

    violated = _nested_violation(table, workload, server)
    if violated is not None:
        return none(violated)
    total = 0.0
    cycles = 1 + math.floor(duration / ((table.block_iterations or 1) * server.iteration_time.empty))
    reach = _reach(table, workload)
    for k in range(1, len(table.segments)):
        before, segment = table.segments[k - 1], table.segments[k]
        if reach[k] > 0.0:
            total += first_passage_probability(
                before.threshold,
                reach[k] / reach[k - 1],
                segment.threshold,
                math.floor(segment.buffer),
                cycles,
            )
    needed = _nested_memory(table, workload, server)
    condition = f"Nested WAIT from an empty start, {needed:,.0f} tokens within capacity"
    return Bound(name, min(total, 1.0), "", "upper", formula, source, condition)


def _nested_violation(table: PolicyTable, workload: Workload, server: Server) -> str | None:
    """The first condition on table, lengths and memory that fails; None if all hold."""
    if table.kind != "nested-wait":
        return f"the table is of kind {table.kind!r}, not 'nested-wait'"
    if server.iteration_time.coefficients is None:
        return _NO_PIECES
    if any(row.max_hold_s is not None for row in table.types):
        return "the table has a hold limit"
    last = table.segments[-1].boundary
    longest = int(workload.max_output_tokens.max()) - 1
    unbounded = [t.name for t in workload.types if not t.law.is_bounded]
    if unbounded or longest > last:
        who = f"type {unbounded[0]!r} is unbounded" if unbounded else f"{longest:,} decodes are possible"
        return f"the last segment ends at {last:,} decodes, but {who}"
    reach = _reach(table, workload)
    for k in range(1, len(table.segments)):
        expected = table.segments[k - 1].threshold * reach[k] / reach[k - 1] if reach[k] else 0.0
        if expected >= table.segments[k].threshold:
            return f"segment {k + 1}: p·n_(k−1) = {expected:.6g} ≥ n_k = {table.segments[k].threshold}"
    needed, capacity = _nested_memory(table, workload, server), server.usable_kv_capacity
    if needed > capacity:
        return f"base memory and buffers take {needed:,.0f} tokens of {capacity:,.0f}"
    return None


def _nested_memory(table: PolicyTable, workload: Workload, server: Server) -> float:
    """Base memory and all buffers, every prompt the longest, tokens."""
    padding = 0 if server.block_size is None else server.block_size - 1
    prompt = int(workload.max_prompt_tokens.max()) + padding
    needed = _nested_base(table, prompt, table.block_iterations or 1)
    for before, segment in itertools.pairwise(table.segments):
        needed += (prompt + before.boundary) * segment.buffer
    return needed


def nested_wait_bounds(
    table: PolicyTable, workload: Workload, server: Server, horizon: float | None = None
) -> tuple[Bound, ...]:
    """Bounds on queues, TTFT, E2E latency and the throughput gap of a Nested WAIT table, no queue above its buffer.

    Parameters
    ----------
    table : PolicyTable
        Kind "nested-wait": L segments with boundary, threshold and buffer.
    workload : Workload
        Its types make one stream of requests, all Poisson.
    server : Server
    horizon : float, optional
        H, seconds: needed by the throughput gap and at a critical first threshold. How likely a queue exceeds its
        buffer within it, `nested_wait_overflow` says.

    Returns
    -------
    tuple of Bound
        "entry_queue", "boundary_queue[2]" … "boundary_queue[L]", "mean_ttft", "mean_e2e", "mean_waiting" (requests
        waiting for their first service, on average over time) and "output_throughput_gap".

    Examples
    --------
    >>> import fluidsched as fs
    >>> law = fs.lengths.empirical([4, 10], [0.6, 0.4])
    >>> chat = fs.Workload([fs.RequestType("chat", 40.0, prompt_tokens=10, output_tokens=law)])
    >>> server = fs.Server(20_000, fs.IterationTime.affine(0.05, 1e-5, 1e-5, 1e-7))
    >>> table = fs.compile_policy(fs.solve_fluid(chat, server), "nested-wait", slack=0.2, segments=[3, 9])
    >>> nested_wait_bounds(table, chat, server)[0]  # doctest: +ELLIPSIS
    entry_queue ≤ ... requests (Nested WAIT, no boundary queue above its buffer, ΛT = ...)
    """
    if horizon is not None:
        horizon = check_real("horizon", horizon, above=0.0)
    formulas = {
        "entry_queue": ("requests", "E[W], W' = W + X − n_1·1{W + X ≥ n_1}, X ~ Poisson(ΛT)"),
        **{
            f"boundary_queue[{k}]": (
                "requests",
                "E[V_k], V' = V + Y − n_k·1{V + Y ≥ n_k}, Y ~ Binomial(n_(k−1), p_k)",
            )
            for k in range(2, len(table.segments) + 1)
        },
        "mean_ttft": ("s", "E[W]/Λ + T/2 + T_1"),
        "mean_e2e": ("s", "(E[W] + Σ_b n_k(b) + Σ_k x_k)/Λ + T/2"),
        "mean_waiting": ("requests", "E[W] + ΛT/2"),
        "output_throughput_gap": ("tokens/s", "(1/H) ( E[o] (E[W] + ΛT) + o_max (Σ_b n_k(b) + Σ_k x_k) )"),
    }
    source = "arXiv 2504.11320, Theorem 2; constants derived here"

    def none(names: Iterable[str], violated: str) -> tuple[Bound, ...]:
        return tuple(
            Bound.not_applicable(name, formulas[name][0], "upper", formulas[name][1], source, violated)
            for name in names
        )

    violated = _nested_violation(table, workload, server)
    if violated is not None:
        return none(formulas, violated)
    block = table.block_iterations or 1
    sizes = np.diff([0, *((s.boundary + 1) // block for s in table.segments)])
    threshold = np.array([s.threshold for s in table.segments], dtype=np.float64)
    places = np.repeat(threshold, sizes)
    residents = float(places.sum()) + sum(s.buffer for s in table.segments[1:])
    limits = (server.max_batch_size, table.max_in_service)
    slots = min((limit for limit in limits if limit is not None), default=math.inf)
    if residents > slots:
        return none(formulas, f"up to {residents:,.0f} requests are in service, the limit is {slots:,}")
    prompt = float(workload.max_prompt_tokens.max())
    tokens = float(threshold[0] * prompt + places[1:].sum())
    if server.token_budget is not None and tokens > server.token_budget:
        return none(
            formulas,
            f"a run's first iteration takes {tokens:,.0f} tokens, the budget is {server.token_budget:,}",
        )
    reach = _reach(table, workload)
    result: list[Bound] = []
    prefix = "Nested WAIT, no boundary queue above its buffer"
    for k in range(1, len(threshold)):
        p, name = reach[k] / reach[k - 1] if reach[k] else 0.0, f"boundary_queue[{k + 1}]"
        unit, formula = formulas[name]
        trials, n = int(threshold[k - 1]), int(threshold[k])
        value = embedded_queue_mean(n, trials * p, trials) if p > 0.0 else 0.0
        result.append(
            Bound(
                name,
                value,
                unit,
                "upper",
                formula,
                source,
                f"{prefix}, p n_(k−1) = {trials * p:.6g} < n_k = {n}",
            )
        )
    rest = ("mean_ttft", "mean_e2e", "mean_waiting", "output_throughput_gap")
    other = [t for t in workload.types if t.arrivals != poisson()]
    if other:
        violated = f"arrivals of type {other[0].name!r} are not Poisson but {other[0].arrivals!r}"
        return (*none(("entry_queue",), violated), *result, *none(rest, violated))
    times = _nested_times(places, block, prompt, server)
    cycle, first = float(times.sum()), float(times[0])
    rate = workload.total_arrival_rate
    arrivals = rate * cycle
    queue, how, condition = _entry_queue(threshold[0], arrivals, cycle, horizon)
    condition = (
        condition.replace("literal WAIT, certain memory", prefix).replace("λT", "ΛT").replace("n =", "n_1 =")
    )
    if math.isnan(queue):
        return (*none(("entry_queue",), condition), *result, *none(rest, condition))
    outputs = float(workload.arrival_rate @ workload.mean_output_tokens) / rate if rate > 0.0 else 0.0
    lost = outputs * (queue + arrivals) + float(workload.max_output_tokens.max()) * residents
    values = {
        "mean_ttft": queue / rate + cycle / 2.0 + first,
        "mean_e2e": (queue + residents) / rate + cycle / 2.0,
        "mean_waiting": queue + arrivals / 2.0,
    }
    if horizon is not None:
        values["output_throughput_gap"] = lost / horizon
    ends = [
        Bound(n, v, formulas[n][0], "upper", formulas[n][1], source, condition) for n, v in values.items()
    ]
    if horizon is None:
        ends += none(("output_throughput_gap",), "no horizon is given")
    return (Bound("entry_queue", queue, "requests", "upper", how, source, condition), *result, *ends)


def _nested_times(places: _Real, block: int, prompt: float, server: Server) -> _Real:
    """Durations of the ℓ iterations of a run of all segments, every place full, prompts of p_max; s."""
    rows = server.iteration_time.require_coefficients("the theorem constants")
    base, per_prefill, per_decode, per_kv, per_attention = rows.T
    r = np.arange(block)
    decodes = np.full(block, places.sum())
    decodes[0] -= places[0]
    reads = places @ (prompt + block * np.arange(len(places))) + r * places.sum()
    reads[0] -= places[0] * prompt
    times = base[:, None] + np.outer(per_decode, decodes) + np.outer(per_kv, reads)
    times[:, 0] += per_prefill * places[0] * prompt + per_attention * places[0] * prompt**2 / 2.0
    return np.asarray(times.max(axis=0))


def _reach(table: PolicyTable, workload: Workload) -> _Real:
    """Share of the requests that get to each segment, in decodes: P(o − 1 > r_{k−1})."""
    laws = [member.law.output_law for member in workload.types]
    sizes = [len(law.values) for law in laws]
    shares = np.repeat(workload.arrival_rate / workload.total_arrival_rate, sizes)
    shares = shares * np.concatenate([law.weights for law in laws])
    decodes = np.concatenate([law.values for law in laws]) - 1
    return np.array([shares[decodes > r].sum() for r in (-1, *(s.boundary for s in table.segments))])


def _nested_base(table: PolicyTable, prompt: int, block: int) -> float:
    """max_r Σ_b n_{k(b)} max(p + bℓ + r, [b ≥ 1](p + bℓ − 1)), tokens."""
    ends = [(s.boundary + 1) // block for s in table.segments]
    served = np.repeat([float(s.threshold) for s in table.segments], np.diff([0, *ends]))
    position = np.arange(len(served)) * block
    paused = np.where(position > 0, prompt + position - 1, 0)
    return max(float(served @ np.maximum(prompt + position + r, paused)) for r in range(block))
