"""What one run of an engine leaves behind: one row per request, and integrals over time.

Letters: N requests of the path, K rows of the occupancy series. Times are seconds from the path's origin,
NaN where the thing did not happen. Both engines (the reference simulator and the compiled kernel) return an
`EngineRun`; everything that measures reads only this.

Four sets of numbers, kept apart:

- *per request*: over the whole run;
- *counters* (`iterations`, `batch_token_sum`, `batch_size_sum`, `preempted`, `wasted_tokens`, `peak_kv`):
  over the whole run, counting the iterations that ended by `end_s`;
- *in the window*: `emitted_tokens`, output tokens of the iterations that ended in (warmup, end_s], and
  `gap_counts`, `gap_s`, the times that passed since the token before of the same request (none for a first
  token, and none for the first after a restart, which begins anew);
- *integrals over time* (the fields `*_s` with a measure of time: `busy_s`, `kv_token_s`, `resident_s`,
  `waiting_s`): over the measured window [warmup, end_s], with the part of an iteration cut by the horizon.

Between instants the state is constant in this sense: during an iteration every request served in it holds
the KV it has after the iteration's write (prompt + k - 1 tokens in its iteration k, unchunked), every other
resident what it holds; between iterations residents hold what they hold. A waiting request holds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = ["STATUSES", "VERDICTS", "EngineRun", "IterationSummary", "Status", "Verdict"]

Status = Literal["finished", "unfinished", "rejected", "aborted", "abandoned"]
Verdict = Literal["finished", "horizon", "stuck"]

STATUSES: tuple[str, ...] = get_args(Status)
"""Status words in the order of the codes in `EngineRun.status`."""

VERDICTS: tuple[str, ...] = get_args(Verdict)
"""How a run can end: everything served, the horizon reached, or nothing can ever change again."""


@dataclass(frozen=True)
class EngineRun:
    """One run of one policy on one path. Arrays are made read-only.

    Parameters
    ----------
    admitted_s, first_token_s, finish_s : (N,) float arrays
        First admission, end of the iteration that produced the first token, end of the last one; NaN if
        never.
    left_s : (N,) float array
        When the request left the system: finish_s, or when it abandoned the queue or was aborted; NaN if it
        did not.
    preemptions : (N,) int64 array
        How often the request lost its place.
    status : (N,) int8 array
        Index into `STATUSES`.
    end_s : float
        The horizon; or, for a run until empty, its last decision instant. 0 for an empty path.
    verdict : {"finished", "horizon", "stuck"}
    starved_types : tuple of str
        Names of the table's rows with requests in the system when the run got stuck, in the table's order.
    iterations, batch_size_sum, batch_token_sum : int
        Iterations that ended by `end_s`; requests and tokens (prefill and decode) summed over them.
    busy_s : float
        Time in the window during which an iteration ran.
    kv_token_s, resident_s, waiting_s : float
        Integrals over the window of KV tokens held, of the number of residents, of the number waiting.
    emitted_tokens : int
        Output tokens produced in the window, those that a later restart loses included.
    gap_s : float
        Sum of the gaps between consecutive tokens of a request that ended in the window, s.
    gap_counts : (B,) int64 array
        How many of these gaps lie in each bucket of `fluidsched.simulation.histogram`.
    preempted : int
        Number of preemptions.
    wasted_tokens : int
        KV tokens computed and dropped by preemptions: work to be done again.
    peak_kv : int
        Largest KV held during an iteration, in tokens. Like all KV here it counts a block that residents
        share once for each of them.
    kv_end : int
        KV tokens held at `end_s` (by what an iteration cut off by the horizon had found). Every token pushed
        through the model is accounted for: batch_token_sum + cached_tokens = Σ finished (p + o - 1)
        + wasted_tokens + dropped_tokens + kv_end + stored_end.
    occupancy : (K, 4) float array or None
        Columns time (s), KV tokens, residents, waiting: the state at decision instants (finishers gone,
        arrivals in, nothing decided yet), at the first one at or after each point of an even grid.
    swapped_tokens, stored_end : int
        KV tokens moved to the host's memory by preemptions, and those that are there at `end_s`.
    cached_tokens : int
        Prompt tokens that requests, finished or with KV at `end_s`, found in the prefix cache and so did not
        compute.
    dropped_tokens : int
        KV tokens, but for those found in the prefix cache, that requests held, or had in the
        host's memory, when they left unfinished.
    """

    admitted_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    left_s: NDArray[np.float64]
    preemptions: NDArray[np.int64]
    status: NDArray[np.int8]
    end_s: float
    verdict: Verdict
    starved_types: tuple[str, ...]
    iterations: int
    batch_size_sum: int
    batch_token_sum: int
    busy_s: float
    kv_token_s: float
    resident_s: float
    waiting_s: float
    emitted_tokens: int
    gap_s: float
    gap_counts: NDArray[np.int64]
    preempted: int
    wasted_tokens: int
    peak_kv: int
    kv_end: int
    occupancy: NDArray[np.float64] | None = None
    swapped_tokens: int = 0
    stored_end: int = 0
    cached_tokens: int = 0
    dropped_tokens: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                value.flags.writeable = False

    def __len__(self) -> int:
        return len(self.status)

    def count(self, status: Status) -> int:
        """Number of requests that ended with `status`."""
        return int(np.count_nonzero(self.status == STATUSES.index(status)))

    def __repr__(self) -> str:
        tail = f": {', '.join(self.starved_types)}" if self.starved_types else ""
        return (
            f"<EngineRun {self.verdict}{tail} at {self.end_s:.6g} s: {self.count('finished'):,} of "
            f"{len(self):,} requests finished, {self.iterations:,} iterations, "
            f"{self.preempted:,} preemptions>"
        )


@dataclass(frozen=True)
class IterationSummary:
    """One iteration as the reference engine shows it to an observer, when its batch is fixed.

    Attributes
    ----------
    index : int
        0, 1, 2, … over the iterations run.
    start_s, end_s : float
        Start and end; with a horizon in between the iteration's effects do not happen.
    prefill : tuple of (int, int)
        (request, tokens) for every chunk, in the order scheduled.
    decode : tuple of int
        Requests that decode, in the order scheduled.
    admitted, preempted : tuple of int
        Requests admitted and preempted by this decision, in order.
    prefill_tokens, decode_tokens, kv_tokens : int
        n_pf, n_dec, k_dec of the iteration-time model (k_dec: KV the decodes read, p + k - 1 in iteration k).
    prefill_attention : float
        q_pf, the sum over chunks of chunk·(already computed + chunk/2).
    held_tokens : int
        KV held by all residents during the iteration.
    residents, waiting : int
        Counts during the iteration.
    departed : tuple of (int, float)
        (request, when, s) of those that left unfinished since the iteration before.
    found : tuple of int
        KV tokens that each of the admitted had at once: from the prefix cache, the host, or another machine.
    """

    index: int
    start_s: float
    end_s: float
    prefill: tuple[tuple[int, int], ...]
    decode: tuple[int, ...]
    admitted: tuple[int, ...]
    preempted: tuple[int, ...]
    prefill_tokens: int
    decode_tokens: int
    kv_tokens: int
    prefill_attention: float
    held_tokens: int
    residents: int
    waiting: int
    departed: tuple[tuple[int, float], ...] = ()
    found: tuple[int, ...] = ()
