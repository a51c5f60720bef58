r"""The no-wait floor: no scheduler serves a request faster than an empty server would.

**TTFT.** Cut a prompt of p tokens into K chunks. Chunk by chunk the counts add up to p tokens and p²/2
units of attention, however it is cut; an iteration lasts max_i(c0_i + c_pf_i·tokens + c_attn_i·attention),
a convex function that more work in the batch never lowers. By convexity K iterations last at least K times
the time of the mean chunk:

    TTFT ≥ min_{K ≥ ⌈p/N⌉} max_i ( K·c0_i + c_pf_i·p + c_attn_i·p²/2 ),

N the server's token budget. If every base c0_i ≥ 0 the minimum is at the smallest K: T(p) without a budget.
A negative base (the piece beyond a knee) can make two chunks cheaper than one; the expression is then
convex and piecewise linear in K, so its minimum over whole K lies next to a crossing of two pieces or at an
end of the range.

**E2E.** Each further token needs an iteration of its own that reads the tokens before it:

    E2E ≥ TTFT floor + Σ_{k=2..o} max_i ( c0_i + c_dec_i + c_kv_i (p + k − 1) ).

On the upper envelope of the lines in p + k − 1 this is a few arithmetic series.

**Condition.** Coefficients other than bases are non-negative, and emitting a token by recomputing L tokens
costs no less than decoding it, c_pf·L + c_attn·L²/2 ≥ c_dec + c_kv·L: otherwise preemption could pay. No
prefix caching.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fluidsched.errors import InputError

if TYPE_CHECKING:
    from fluidsched.server import Server
    from fluidsched.workload import ArrivalPath

__all__ = ["NoWaitFloor", "floor_violated", "no_wait_floor"]

_Real = npt.NDArray[np.float64]


class NoWaitFloor(NamedTuple):
    """Per request, seconds, shape (N,): least time to the first token and to the last."""

    ttft_s: _Real
    e2e_s: _Real


def no_wait_floor(path: ArrivalPath, server: Server) -> NoWaitFloor:
    """Least TTFT and E2E latency of every request of a path on a server, whatever the policy.

    Parameters
    ----------
    path : ArrivalPath
        N requests; only their lengths matter.
    server : Server
        Its iteration time, in affine pieces, and token budget.

    Returns
    -------
    NoWaitFloor
        `ttft_s` and `e2e_s`, lower bounds in seconds.

    Raises
    ------
    InputError
        If the iteration time is a function, or recomputing is cheaper than decoding (see the module).

    Examples
    --------
    >>> import fluidsched as fs
    >>> server = fs.Server(kv_capacity=1000, iteration_time=fs.IterationTime.paper(d0=0.5, d1=0.25))
    >>> path = fs.ArrivalPath.from_arrays([0.0], prompt_tokens=[4], output_tokens=[3])
    >>> floor = no_wait_floor(path, server)
    >>> float(floor.ttft_s[0]), float(floor.e2e_s[0])       # 0.5 + 1; then 0.5 + 5/4 and 0.5 + 6/4
    (1.5, 5.25)
    """
    rows = server.iteration_time.require_coefficients("the no-wait floor")
    base, per_prefill, per_decode, per_kv, per_attention = rows.T
    p = path.prompt_tokens.astype(np.float64)
    o = path.output_tokens.astype(np.float64)
    violated = floor_violated(server, int(p.min(initial=np.inf))) if len(path) else None
    if violated is not None:
        raise InputError(
            "iteration_time",
            server.iteration_time,
            "make recomputing a request cost no less than the decode it replaces",
            "The floor does not hold for this model.",
        )
    ttft = _cheapest_prefill(base, np.outer(p, per_prefill) + np.outer(p * p / 2.0, per_attention), p, server)
    return NoWaitFloor(ttft, ttft + _decodes_alone(base + per_decode, per_kv, p + 1.0, o - 1.0))


def floor_violated(server: Server, shortest_prompt: int) -> str | None:
    """Which condition of the floor, and of the fluid optimum as a bound, a server fails; None if none.

    Parameters
    ----------
    server : Server
    shortest_prompt : int
        Of the requests in question, tokens.
    """
    rows = server.iteration_time.coefficients
    if rows is None:
        return "the iteration time is a function, not a maximum of affine pieces"
    _, per_prefill, per_decode, per_kv, per_attention = rows.T
    # Linear in L against quadratic: checked at the shortest recompute, where it can fail first.
    least = shortest_prompt + 1.0
    cheaper = per_prefill * least + per_attention * least**2 / 2 < per_decode + per_kv * least
    if np.any((per_prefill < per_kv) | cheaper):
        return "recomputing a request can cost less than the decode it replaces"
    return None


def _cheapest_prefill(base: _Real, work: _Real, prompt: _Real, server: Server) -> _Real:
    """min over whole K in [⌈p/N⌉, p] of max_i (K·base_i + work_i); `work` is (N, I)."""
    budget = np.inf if server.token_budget is None else server.token_budget
    least = np.maximum(np.ceil(prompt / budget), 1.0)
    candidates = [least]
    for i in range(len(base)):
        for j in range(len(base)):
            if base[i] > 0.0 > base[j]:
                crossing = np.floor((work[:, j] - work[:, i]) / (base[i] - base[j]))
                candidates += [np.clip(crossing + k, least, np.maximum(prompt, least)) for k in (0.0, 1.0)]
    times = [np.max(k[:, None] * base + work, axis=1, initial=-np.inf) for k in candidates]
    return np.asarray(np.min(times, axis=0))


def _decodes_alone(intercept: _Real, slope: _Real, first: _Real, count: _Real) -> _Real:
    """Σ over `count` whole L from `first` on of max_i (intercept_i + slope_i·L), per request."""
    total = np.zeros_like(first)
    last = first + count - 1.0
    start = -np.inf
    for line, end in _upper_envelope(intercept, slope):
        low, high = np.maximum(first, start), np.minimum(last, end)
        terms = np.maximum(high - low + 1.0, 0.0)
        total += terms * (intercept[line] + slope[line] * (low + high) / 2.0 * (terms > 0))
        start = end + 1.0
    return total


def _upper_envelope(intercept: _Real, slope: _Real) -> list[tuple[int, float]]:
    """Lines of the maximum from left to right, each with the last whole L where it is the largest."""
    order = sorted(range(len(slope)), key=lambda i: (slope[i], intercept[i]))
    line = max(order, key=lambda i: (intercept[i], slope[i]))
    pieces: list[tuple[int, float]] = []
    while True:
        steeper = [i for i in order if slope[i] > slope[line]]
        if not steeper:
            return [*pieces, (line, np.inf)]
        crossing = {i: (intercept[line] - intercept[i]) / (slope[i] - slope[line]) for i in steeper}
        nearest = min(steeper, key=lambda i: (crossing[i], -slope[i]))
        pieces.append((line, float(np.floor(crossing[nearest]))))
        line = nearest
