r"""Stability conditions from the literature, as largest total rates on a workload's mix.

Each is stated for its own model of a server. Where the server at hand is of that model the condition gives
a rate that equals (or bounds) the fluid boundary; elsewhere it is not applicable and says why. f_j is the
share of type j, W the KV work, τ the tokens processed, T the iteration time.

- **Nie, Si, Zhou** (arXiv 2605.04595): time grows with the KV in the batch alone, T = d0 + d1·KV. A server
  with full memory spends b̄ = d0 + d1·C per iteration and C of KV work, so r = C/(b̄ Σ f_j W_j).
- **Li, Dai, Peng** (arXiv 2504.07347): no memory limit, a budget of N tokens per iteration, time a function
  of the tokens in the batch. Work-conserving rules are stable below r = N/(T(N) Σ f_j τ_j), and no rule is
  above it where a full batch is the fastest per token (no negative base).
- **Dong, Cao** (arXiv 2604.11001): every iteration lasts ΔT. Memory alone binds: r = C/(ΔT Σ f_j W_j).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fluidsched.bounds.bound import Bound
from fluidsched.errors import InputError

if TYPE_CHECKING:
    from fluidsched.server import Server
    from fluidsched.workload import Workload

__all__ = ["stability_conditions"]


def stability_conditions(workload: Workload, server: Server) -> tuple[Bound, Bound, Bound]:
    """Critical total rates after Nie–Si–Zhou, Li–Dai–Peng and Dong–Cao, in that order.

    Parameters
    ----------
    workload : Workload
        Its mix; the level of the rates does not matter.
    server : Server

    Returns
    -------
    tuple of Bound
        Upper bounds on the stable total rate, requests/s; not applicable outside each paper's model.

    Examples
    --------
    >>> import fluidsched as fs
    >>> chat = fs.Workload([fs.RequestType("chat", arrival_rate=1.0, prompt_tokens=512, output_tokens=21)])
    >>> server = fs.Server(137_000, fs.IterationTime.paper(d0=0.010042382503853812, d1=3.342175435455382e-7))
    >>> for bound in stability_conditions(chat, server):
    ...     print(bound)
    critical_rate[Nie-Si-Zhou] ≤ 223.852 requests/s (time d0 + d1·KV, no batch or token limit)
    critical_rate[Li-Dai-Peng]: not applicable, the KV capacity is finite (137,000 tokens)
    critical_rate[Dong-Cao]: not applicable, the iteration time depends on the batch
    """
    if workload.total_arrival_rate <= 0.0:
        raise InputError(
            "workload", "a total rate of 0", "have a mix", "Give at least one type a positive rate."
        )
    share = workload.arrival_rate / workload.total_arrival_rate
    kv_work = float(share @ workload.kv_work)
    tokens = float(share @ workload.processed_tokens)
    return (
        _nie_si_zhou(server, kv_work, cached=bool(workload.cached_prefix_fraction.any())),
        _li_dai_peng(server, tokens),
        _dong_cao(server, kv_work),
    )


def _rate(
    author: str, formula: str, source: str, condition: str, value: float, violated: str | None
) -> Bound:
    name = f"critical_rate[{author}]"
    if violated is not None:
        return Bound.not_applicable(name, "requests/s", "upper", formula, source, violated)
    return Bound(name, value, "requests/s", "upper", formula, source, condition)


def _one_piece(server: Server) -> tuple[float, ...] | None:
    rows = server.iteration_time.coefficients
    return None if rows is None or len(rows) != 1 else tuple(float(c) for c in rows[0])


_NOT_ONE_PIECE = "the iteration time is not one affine piece"


def _limit(server: Server) -> str | None:
    """The first limit besides time and memory, or None."""
    if server.max_batch_size is not None:
        return f"the batch size is limited ({server.max_batch_size:,})"
    if server.token_budget is not None:
        return f"the tokens per iteration are limited ({server.token_budget:,})"
    return None


def _nie_si_zhou(server: Server, kv_work: float, *, cached: bool) -> Bound:
    piece, violated, value = _one_piece(server), None, math.nan
    if piece is None:
        violated = _NOT_ONE_PIECE
    else:
        base, per_prefill, per_decode, per_kv, per_attention = piece
        if per_decode or per_attention or per_prefill != per_kv:
            violated = "the iteration time is not d0 + d1·KV"
        elif math.isinf(server.kv_capacity):
            violated = "the KV capacity is infinite"
        elif cached:
            violated = "prefixes are cached: prompts take less time than their KV"
        else:
            violated = _limit(server)
            capacity = server.usable_kv_capacity
            value = capacity / ((base + per_kv * capacity) * kv_work)
    return _rate(
        "Nie-Si-Zhou",
        "C/(b̄ Σ f_j W_j), b̄ = d0 + d1 C",
        "arXiv 2605.04595",
        "time d0 + d1·KV, no batch or token limit",
        value,
        violated,
    )


def _li_dai_peng(server: Server, tokens: float) -> Bound:
    rows, violated, value = server.iteration_time.coefficients, None, math.nan
    if math.isfinite(server.kv_capacity):
        violated = f"the KV capacity is finite ({server.kv_capacity:,.0f} tokens)"
    elif server.token_budget is None:
        violated = "there is no token budget"
    elif server.max_batch_size is not None:
        violated = f"the batch size is limited ({server.max_batch_size:,})"
    elif rows is None or np.any(rows[:, 1] != rows[:, 2]) or np.any(rows[:, 3:]):
        violated = "the iteration time is not a function of the tokens in the batch"
    elif np.any(rows[:, 0] < 0.0):
        violated = "a piece has a negative base: full batches are not the fastest per token"
    else:
        budget = float(server.token_budget)
        value = budget / (float(np.max(rows[:, 0] + rows[:, 1] * budget)) * tokens)
    return _rate(
        "Li-Dai-Peng",
        "N/(T(N) Σ f_j τ_j)",
        "arXiv 2504.07347",
        "no memory or batch limit, time a function of the tokens in the batch",
        value,
        violated,
    )


def _dong_cao(server: Server, kv_work: float) -> Bound:
    rows, violated, value = server.iteration_time.coefficients, None, math.nan
    if rows is None or np.any(rows[:, 1:]):
        violated = "the iteration time depends on the batch"
    elif math.isinf(server.kv_capacity):
        violated = "the KV capacity is infinite"
    else:
        violated = _limit(server)
        value = server.usable_kv_capacity / (server.iteration_time.empty * kv_work)
    return _rate(
        "Dong-Cao",
        "C/(ΔT Σ f_j W_j)",
        "arXiv 2604.11001",
        "constant iteration time, no batch or token limit",
        value,
        violated,
    )
