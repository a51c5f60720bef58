r"""How long a request takes alone on a server: what no scheduler can beat, given its arithmetic.

**First token.** Cut a prompt of p tokens into K chunks. Chunk by chunk the counts add up to p tokens and p²/2
units of attention, however it is cut; an iteration lasts max_i(c0_i + c_pf_i·tokens + c_attn_i·attention),
a convex function that more work in the batch never lowers. By convexity K iterations last at least K times
the time of the mean chunk:

    first ≥ min_{K ≥ ⌈p/N⌉} max_i ( K·c0_i + c_pf_i·p + c_attn_i·p²/2 ),

N the server's token budget. Of a prompt of which c tokens are cached, p − c are cut and have (p² − c²)/2 units of
attention. If every base c0_i ≥ 0 the minimum is at the smallest K: T(p) without a budget.
A negative base (the piece beyond a knee) can make two chunks cheaper than one; the expression is then
convex and piecewise linear in K, so its minimum over whole K lies next to a crossing of two pieces or at an
end of the range.

**Last token.** Each further token needs an iteration of its own that reads the tokens before it:

    last ≥ first + Σ_{k=2..o} max_i ( c0_i + c_dec_i + c_kv_i (p + k − 1) ).

On the upper envelope of the lines in p + k − 1 this is a few arithmetic series.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fluidsched.server.server import Server

__all__ = ["times_alone"]

_Real = npt.NDArray[np.float64]


def times_alone(
    prompt_tokens: npt.NDArray[np.int64],
    output_tokens: npt.NDArray[np.int64],
    server: Server,
    cached_tokens: npt.NDArray[np.int64] | None = None,
) -> tuple[_Real, _Real]:
    """Least times from start to first and to last token of requests alone on the server, s.

    Parameters
    ----------
    prompt_tokens, output_tokens : (N,) int64 arrays
    server : Server
        Its iteration time, in affine pieces, and token budget.
    cached_tokens : (N,) int64 array, optional
        c, of every prompt; none by default.

    Returns
    -------
    first_s, last_s : (N,) float arrays

    Raises
    ------
    InputError
        If the iteration time is a function.

    Examples
    --------
    >>> from fluidsched import IterationTime
    >>> server = Server(kv_capacity=1000, iteration_time=IterationTime.paper(d0=0.5, d1=0.25))
    >>> first, last = times_alone(np.array([4]), np.array([3]), server)
    >>> float(first[0]), float(last[0])       # 0.5 + 1; then 0.5 + 5/4 and 0.5 + 6/4
    (1.5, 5.25)
    """
    rows = server.iteration_time.require_coefficients("the time of a request alone")
    base, per_prefill, per_decode, per_kv, per_attention = rows.T
    p, o = prompt_tokens.astype(np.float64), output_tokens.astype(np.float64)
    c = np.zeros_like(p) if cached_tokens is None else cached_tokens.astype(np.float64)
    work = np.outer(per_prefill, p - c)
    if per_attention.any():
        work += np.outer(per_attention, (p * p - c * c) / 2.0)
    first = _cheapest_prefill(base, work, p - c, server)
    return first, first + _decodes_alone(base + per_decode, per_kv, p + 1.0, o - 1.0)


def _cheapest_prefill(base: _Real, work: _Real, prompt: _Real, server: Server) -> _Real:
    """min over whole K in [⌈p/N⌉, p] of max_i (K·base_i + work_i); `work` is (I, N)."""

    def time(chunks: _Real) -> _Real:
        longest: _Real = chunks * base[0] + work[0]
        for i in range(1, len(base)):
            np.maximum(longest, chunks * base[i] + work[i], out=longest)
        return longest

    budget = np.inf if server.token_budget is None else server.token_budget
    least = np.maximum(np.ceil(prompt / budget), 1.0)
    shortest = time(least)
    for i in range(len(base)):
        for j in range(len(base)):
            if base[i] > 0.0 > base[j]:
                crossing = np.floor((work[j] - work[i]) / (base[i] - base[j]))
                for k in (0.0, 1.0):
                    chunks = np.minimum(np.maximum(crossing + k, least), np.maximum(prompt, least))
                    np.minimum(shortest, time(chunks), out=shortest)
    return shortest


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
