r"""The no-wait floor: no scheduler serves a request faster than an empty server would.

TTFT and E2E latency are at least the times of the request alone, its prompt cut in the cheapest way and every
further token an iteration of its own: `fluidsched.server.alone` has the arithmetic.

**Condition.** Coefficients other than bases are non-negative, and emitting a token by recomputing L tokens
costs no less than decoding it, c_pf·L + c_attn·L²/2 ≥ c_dec + c_kv·L: otherwise preemption could pay. No
prefix caching.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fluidsched.errors import InputError
from fluidsched.server.alone import times_alone

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
    server.iteration_time.require_coefficients("the no-wait floor")
    cached = path.most_cached_tokens
    violated = floor_violated(server, path.prompt_tokens, 0 if cached is None else cached)
    if violated is not None:
        raise InputError(
            "iteration_time",
            server.iteration_time,
            "make recomputing a request cost no less than the decode it replaces",
            "The floor does not hold for this model.",
        )
    return NoWaitFloor(*times_alone(path.prompt_tokens, path.output_tokens, server, cached))


def floor_violated(
    server: Server, prompt_tokens: npt.NDArray[np.int64], cached_tokens: npt.NDArray[np.int64] | int
) -> str | None:
    """Which condition of the floor, and of the fluid optimum as a bound, a server fails; None if none.

    Parameters
    ----------
    server : Server
    prompt_tokens, cached_tokens : (N,) int64 arrays
        Of the requests in question.
    """
    rows = server.iteration_time.coefficients
    if rows is None:
        return "the iteration time is a function, not a maximum of affine pieces"
    _, per_prefill, per_decode, per_kv, per_attention = rows.T
    # Linear in L against quadratic: checked at each prompt's shortest recompute, where it can fail first.
    least, cached = prompt_tokens[:, None] + 1.0, np.atleast_1d(cached_tokens)[:, None].astype(np.float64)
    recompute = per_prefill * (least - cached) + per_attention * (least**2 - cached**2) / 2
    if np.any(per_prefill < per_kv) or np.any(recompute < per_decode + per_kv * least):
        return "recomputing a request can cost less than the decode it replaces"
    return None
