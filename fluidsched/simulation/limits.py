"""What a table and a server allow together, and what must hold before a run starts.

A limit that the table leaves null is the server's; otherwise the smaller of the two binds. Memory is counted
in *units*: KV tokens, or blocks of b tokens where the server has a block size,

    units(m) = m   or   ⌈m/b⌉,        capacity = ⌊C⌋   or   ⌊C/b⌋.

Both engines take their limits and their checks from here.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fluidsched.errors import InputError
from fluidsched.policy.table import RESERVING_KINDS, PolicyTable
from fluidsched.server import Server
from fluidsched.simulation.records import Status

if TYPE_CHECKING:
    from fluidsched.workload import ArrivalPath

__all__ = [
    "UNLIMITED",
    "Deadline",
    "Limits",
    "beliefs",
    "check_handed_over",
    "check_run",
    "deadlines",
    "effective_limits",
    "never_fits",
    "remark_on_memory",
    "shortest_iteration",
    "within_model_length",
]

_log = logging.getLogger(__name__)

SWAPPING = ("vllm", "capped", "sarathi", "gated", "vllm_v0", "wait", "nested-wait")
"""Kinds that may preempt by swapping."""

UNLIMITED = 2**62
"""Stands for a limit that does not bind, in integer arithmetic."""

KINDS = ("vllm", "capped", "sarathi", "vllm_v0", "orca", "faster_transformer", "gated", "wait", "nested-wait")
WHOLE_PROMPTS = ("vllm_v0", "orca", "faster_transformer")
"""Kinds that run prompts whole within the token budget."""
SCANNING_KINDS = ("vllm", "capped", "sarathi", "gated")
"""Kinds that admit by the scan of rule 13: they know orders and look-ahead."""


@dataclass(frozen=True)
class Limits:
    """Effective limits of a table on a server; `UNLIMITED` where nothing binds.

    Attributes
    ----------
    capacity : int
        Memory, units.
    admission : int
        Memory that admission may fill while anybody is resident, units:
        ⌊min(capacity - watermark·capacity, kv_limit)⌋, kv_limit counted in whole units; less the headroom
        of look-ahead "known" or "law", rounded up to whole units.
    block : int
        Tokens per unit.
    slots : int
        Most residents; with kinds in `WHOLE_PROMPTS` also at most the token budget, so that every decode has
        its token.
    budget : int
        Most tokens in an iteration.
    chunk : int
        Most prompt tokens of one request in an iteration.
    reserve : int
        R of look-ahead "reserve" (of `orca` and `faster_transformer` always): output tokens set aside per
        request; else 0.
    whole_prompts : bool
        Whether a prompt must fit whole into what is left of the budget.
    shares : int
        Look-ahead "known" or "law": shares of a request that forecasts count in, 1 or lcm(1..m) for a law of
        m lengths; else 0.
    """

    capacity: int
    admission: int
    block: int
    slots: int
    budget: int
    chunk: int
    reserve: int
    whole_prompts: bool
    shares: int

    def units(self, tokens: int) -> int:
        """Memory that this many KV tokens of one request take."""
        return -(-tokens // self.block)


def effective_limits(server: Server, table: PolicyTable) -> Limits:
    """Return the smaller of each limit of `table` and `server`."""
    block = server.block_size or 1
    capacity = UNLIMITED if math.isinf(server.kv_capacity) else math.floor(server.kv_capacity) // block
    admission = capacity
    if capacity < UNLIMITED:
        admission = math.floor(capacity - table.watermark * capacity)
    if table.kv_limit_tokens is not None:
        admission = min(admission, math.floor(table.kv_limit_tokens) // block)
    budget = _smaller(table.token_budget, server.token_budget)
    slots = _smaller(table.max_in_service, server.max_batch_size)
    reserve = shares = 0
    whole_prompts = table.kind in WHOLE_PROMPTS
    if whole_prompts:
        slots = min(slots, budget)
    if table.lookahead.mode == "reserve":
        reserve = math.ceil(table.lookahead.headroom_tokens)
    elif table.lookahead.mode != "none" and admission < UNLIMITED:
        admission -= -(-math.ceil(table.lookahead.headroom_tokens) // block)
        shares = math.lcm(*range(1, len(table.lookahead.lengths) + 1))
    chunk = table.chunk_tokens or UNLIMITED
    return Limits(capacity, admission, block, slots, budget, chunk, reserve, whole_prompts, shares)


def _smaller(first: int | None, second: int | None) -> int:
    return min(UNLIMITED if first is None else first, UNLIMITED if second is None else second)


def within_model_length(path: ArrivalPath, server: Server) -> ArrivalPath:
    """Return the path as the server answers it: outputs end at `max_model_len` tokens, prompt included.

    A prompt of `max_model_len` tokens or more leaves no room for a token; it never fits, and stays as it is.
    Rules and measures know the shorter outputs only.

    Examples
    --------
    >>> from fluidsched import ArrivalPath, IterationTime, Server
    >>> path = ArrivalPath.from_arrays([0.0, 0.0, 0.0], [4, 9, 12], [3, 3, 3])
    >>> server = Server(100, IterationTime.affine(1.0, 0.0, 0.0, 0.0), max_model_len=10)
    >>> within_model_length(path, server).output_tokens
    array([3, 1, 3])
    """
    longest = server.max_model_len
    if longest is None:
        return path
    room = longest - path.prompt_tokens
    cut = (room >= 1) & (path.output_tokens > room)
    if not cut.any():
        return path
    return dataclasses.replace(path, output_tokens=np.where(cut, room, path.output_tokens))


class Deadline(NamedTuple):
    """One deadline of every request (rule 35 of the reference).

    Attributes
    ----------
    at_s : (N,) float array
        When, s from the path's origin; infinite: never.
    by_client : (N,) bool array
        Whether it is the end of patience, not a timeout or a client's abort.
    """

    at_s: NDArray[np.float64]
    by_client: NDArray[np.bool_]

    def fate(self, index: int) -> Status:
        """Status of the request if it leaves at this deadline."""
        return "abandoned" if self.by_client[index] else "aborted"


def deadlines(path: ArrivalPath, server: Server) -> tuple[Deadline, ...]:
    """Return the deadline that holds until a request's first admission, and the one that always holds.

    Without any of patience, aborts and timeouts there is none at all: an empty tuple.

    Examples
    --------
    >>> from fluidsched import ArrivalPath, IterationTime, Server
    >>> path = ArrivalPath.from_arrays([0.0, 1.0], [4, 4], [3, 3], patience_s=[2.0, 9.0])
    >>> server = Server(100, IterationTime.affine(1.0, 0.0, 0.0, 0.0), waiting_timeout=5.0)
    >>> waiting, ever = deadlines(path, server)
    >>> waiting.at_s, waiting.by_client, ever.at_s
    (array([2., 6.]), array([ True, False]), array([inf, inf]))
    """
    given = (path.patience_s, path.abort_after_s, server.waiting_timeout, server.total_timeout)
    if all(limit is None for limit in given):
        return ()

    def least(stay: NDArray[np.float64] | None, timeout: float | None) -> tuple[Any, Any]:
        client = np.full(len(path), np.inf) if stay is None else stay
        limit = math.inf if timeout is None else timeout
        return path.arrival_s + np.minimum(client, limit), client <= limit

    waiting, by_client = least(path.patience_s, server.waiting_timeout)
    ever, _ = least(path.abort_after_s, server.total_timeout)
    return Deadline(waiting, by_client), Deadline(ever, np.zeros(len(path), dtype=np.bool_))


def never_fits(path: ArrivalPath, server: Server, table: PolicyTable) -> NDArray[np.bool_]:
    """Return which requests can never be served, shape (N,); the engines give them status `rejected`.

    A request never fits if its prompt has the server's `max_model_len` tokens or more, or if its KV at its
    last token, prompt + output - 1 tokens, exceeds the capacity. Look-ahead "reserve" sets R output tokens aside,
    so with it prompt + R - 1 must fit too. Where prompts run whole, what is not cached of them must be within
    the token budget; with `vllm_v0` so must what a recompute can run as one prompt at most, output - 1 tokens more.
    """
    limits = effective_limits(server, table)
    prompt, output = path.prompt_tokens, path.output_tokens
    longest_prompt = prompt + output - 1 if table.kind == "vllm_v0" else prompt
    if limits.reserve:
        output = np.maximum(output, limits.reserve)
    most = min(limits.capacity * limits.block, UNLIMITED)  # tokens in whole units
    too_long = prompt + output - 1 > most
    if limits.whole_prompts:
        too_long |= longest_prompt - _cached(path) > limits.budget
    if server.max_model_len is not None:
        too_long |= prompt >= server.max_model_len
    return np.asarray(too_long, dtype=np.bool_)


def _cached(path: ArrivalPath) -> NDArray[np.int64] | int:
    """Prompt tokens found in the prefix cache, (N,); 0 where the path has none."""
    return 0 if path.cached_prompt_tokens is None else path.cached_prompt_tokens


def check_run(
    path: ArrivalPath, server: Server, table: PolicyTable, horizon: float | None
) -> NDArray[np.int64]:
    """Check that the table can be run on this path and server; return every request's row, shape (N,).

    Raises
    ------
    InputError
        For a rule the engines do not have, a field the table's kind does not use, times so late that the clock
        cannot tell iterations apart, a path that names blocks which the server's do not divide or which
        swapping would move, a path without the output
        lengths that an order or look-ahead believes, a request no row matches or longer than the table
        reserves for, a `wait` or `nested-wait` cohort above the server's token budget, or either rule with
        restarts and no horizon: there the newest admitted may be all that runs, so requests that lose their
        tokens can displace each other for ever.
    """
    _check_table(table)
    if table.preemption == "swap" and server.swap_bandwidth is None:
        raise InputError(
            "server.swap_bandwidth",
            "nothing",
            f"be given, tokens/s: table {table.name!r} preempts by swapping",
            'Give it, or use a table with preemption "recompute".',
        )
    if table.freeze and table.preemption == "restart" and horizon is None:
        raise InputError(
            "horizon",
            "nothing",
            f"be given for table {table.name!r}: under {table.kind!r} restarts can go on for ever",
            'Give a horizon, s, or a table with preemption "recompute".',
        )
    _check_clock(path, server, horizon)
    if path.prompt_blocks is not None:
        _check_blocks(path.prompt_blocks.block_tokens, server, table)
    rows = table.classify(path)
    beliefs(path, table)
    if table.kind in RESERVING_KINDS:
        _check_reserve(path, table)
    if table.freeze and server.token_budget is not None:
        _check_cohort(path, rows, server.token_budget, table)
    return rows


RESOLUTION = 2.0**-10
"""Largest share of the shortest iteration that the rounding of a time may be."""

_LEAST_BATCHES = np.array([[1.0, 1.0, 0.0, 0.0, 0.5], [1.0, 0.0, 1.0, 2.0, 0.0]])
"""One token of a prompt; one decode that reads two: 1, prefill, decode, KV, attention, as coefficients have it."""


def shortest_iteration(coefficients: NDArray[np.float64]) -> float:
    """Return how long an iteration of affine pieces lasts at least, s."""
    return float((_LEAST_BATCHES @ coefficients.T).max(axis=1).min())


def _check_clock(path: ArrivalPath, server: Server, horizon: float | None) -> None:
    """Refuse times at which floating point cannot tell the end of the shortest iteration from its start."""
    coefficients = server.iteration_time.coefficients
    if coefficients is None:
        return  # a function is asked batch by batch
    latest = horizon if horizon is not None else float(path.arrival_s[-1]) if len(path) else 0.0
    shortest = shortest_iteration(coefficients)
    if math.ulp(latest) > RESOLUTION * shortest:
        raise InputError(
            "horizon" if horizon is not None else f"arrival_s[{len(path) - 1}]",
            latest,
            f"be a time, s, that is known to {RESOLUTION:.1g} of an iteration: floating point has steps of "
            f"{math.ulp(latest):.3g} s there, and the shortest iteration of {server.name!r} lasts {shortest:.3g} s",
            "Count seconds from the start of the run; check the units of times and of the iteration time.",
        )


def remark_on_memory(server: Server, table: PolicyTable) -> None:
    """Log where a table was certified for more KV memory than the server has: its certificate does not hold here."""
    made_for = table.certified("memory", "capacity")
    if made_for is not None and made_for > server.kv_capacity:
        _log.warning(
            "table %r was compiled for %s tokens of KV, %r has %s: its certificate does not hold there; compile it "
            "for this server",
            table.name,
            f"{made_for:,.0f}",
            server.name,
            f"{server.kv_capacity:,.0f}",
        )


def _check_blocks(tokens: int, server: Server, table: PolicyTable) -> None:
    """Refuse what does not go with a prefix cache that fills with the run."""
    if tokens % (server.block_size or 1):
        raise InputError(
            "server.block_size",
            server.block_size,
            f"divide the {tokens} tokens of the blocks that the path names",
            "A named block is then whole blocks of the server.",
        )
    if table.preemption == "swap":
        raise InputError(
            f"table {table.name!r}: preemption",
            "swap",
            "be 'recompute' or 'restart' where the path names the blocks of its prompts",
            "What moves to the host would leave the prefix cache.",
        )


def check_handed_over(path: ArrivalPath, table: PolicyTable) -> None:
    """Refuse what requests that come with their prompt's KV (rule 6a of the reference) cannot go with.

    Tables whose rule does not know how to take KV in; requests of one output token, which have it already.
    """
    if table.kind not in SCANNING_KINDS:
        raise InputError(
            f"table {table.name!r}: kind",
            table.kind,
            f"be one of {', '.join(SCANNING_KINDS)}, the rules that decode what another machine has prefilled",
        )
    if path.prompt_blocks is not None:
        raise InputError(
            "path.prompt_blocks",
            "given",
            "be None for requests that are handed over",
            "What decodes only has no prefix cache.",
        )
    done = np.flatnonzero(path.output_tokens == 1)
    if done.size:
        raise InputError(
            f"request {int(done[0])}", "1 output token", "have more: it was finished where it was prefilled"
        )


def _check_table(table: PolicyTable) -> None:
    place = f"table {table.name!r}: "
    if table.kind not in KINDS:
        raise InputError(f"{place}kind", table.kind, f"be one of {', '.join(KINDS)}, the rules simulated")
    if table.preemption == "swap" and table.kind not in SWAPPING:
        raise InputError(
            f"{place}preemption",
            table.preemption,
            f"be 'recompute' or 'restart' in a table of kind {table.kind!r}",
            f"Swapping is simulated for {', '.join(SWAPPING)}.",
        )
    if table.preemption == "swap" and table.lookahead.mode in ("known", "law"):
        raise InputError(
            f"{place}preemption",
            table.preemption,
            f"not be 'swap' with look-ahead {table.lookahead.mode!r}: forecasts do not know what is swapped out",
            "Use preemption 'recompute'.",
        )
    unused: list[tuple[str, float | str | None]] = []
    if table.kind not in SCANNING_KINDS:
        unused.append(("order", None if table.order == "fcfs" else table.order))
        if table.kind not in RESERVING_KINDS or table.lookahead.mode != "reserve":
            unused.append(("lookahead", None if table.lookahead.mode == "none" else table.lookahead.mode))
    elif table.order != "fcfs":
        unused += [(f"types[{j}].max_hold_s", row.max_hold_s) for j, row in enumerate(table.types)]
    if table.kind in WHOLE_PROMPTS or table.freeze:
        unused += [("chunk_tokens", table.chunk_tokens), ("prefill_interval", table.prefill_interval)]
    if table.freeze:
        unused += [("kv_limit_tokens", table.kv_limit_tokens), ("watermark", table.watermark or None)]
    for name, value in unused:
        if value is not None:
            what = table.kind if table.order == "fcfs" else f"{table.kind}, {table.order}"
            raise InputError(f"{place}{name}", value, f"not be set: a {what!r} table does not use it")


def forecasts(table: PolicyTable) -> bool:
    """Whether the table's admissions or order go by lengths of outputs, known, predicted or by their law."""
    return table.order != "fcfs" or table.lookahead.mode in ("known", "law")


def beliefs(path: ArrivalPath, table: PolicyTable) -> NDArray[np.int64] | None:
    """Return the output lengths that the table's order or look-ahead goes by, (N,); None if by none.

    `InputError` if the path does not carry them.
    """
    by_length = table.order == "shortest_first"
    if not by_length and table.lookahead.mode != "known":
        return None
    believed = table.believed_output(path)
    if believed is None:
        lower = table.predictor == "lower"
        raise InputError(
            "predicted_output_minimum" if lower else "predicted_output_tokens",
            "a path without them",
            f"be given: table {table.name!r} {'orders' if by_length else 'looks ahead'} by output length",
            "Give the path predictions, e.g. path.with_predictions(fluidsched.predictions."
            + ("interval(2), seed=1)." if lower else 'exact(), seed=1), or the table predictor="exact".'),
        )
    return believed


def _check_reserve(path: ArrivalPath, table: PolicyTable) -> None:
    reserve = math.ceil(table.lookahead.headroom_tokens)
    longer = np.flatnonzero(path.output_tokens > reserve)
    if longer.size:
        i = int(longer[0])
        raise InputError(
            f"request {i}",
            f"{int(path.output_tokens[i]):,} output tokens",
            f"produce at most the {reserve:,} tokens that table {table.name!r} reserves per request",
            f"Reserve {int(path.output_tokens.max()):,}.",
        )


def _check_cohort(path: ArrivalPath, rows: NDArray[np.int64], budget: int, table: PolicyTable) -> None:
    """Refuse a server whose token budget is below the largest first iteration a block can have.

    All types at once, each with `threshold` newcomers of its longest prompt (less what is cached) in this path,
    and the decodes of the earlier blocks: at most threshold per block, ⌈o_max/k⌉ - 1 blocks; under `nested-wait`
    the threshold of the segment that the block lies in.
    """
    assert table.block_iterations is not None
    largest = 0
    computed = path.prompt_tokens - _cached(path)
    starts = [segment.boundary + 1 for segment in table.segments[:-1]]
    for j, row in enumerate(table.types):
        mine = rows == j
        if mine.any() and row.threshold:
            blocks = -(-int(path.output_tokens[mine].max()) // table.block_iterations)
            largest += row.threshold * (int(computed[mine].max()) + blocks - 1)
            for start, before, segment in zip(starts, table.segments, table.segments[1:], strict=False):
                beyond = max(blocks - start // table.block_iterations, 0)
                largest += beyond * (segment.threshold - before.threshold)
    if largest > budget:
        raise InputError(
            "server.token_budget",
            budget,
            f"be at least the {largest:,} tokens of the largest cohort of table {table.name!r}, "
            "whose prompts run whole in one iteration",
            "Use a server without a token budget, or a table compiled for this one.",
        )
