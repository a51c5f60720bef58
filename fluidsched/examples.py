r"""Two counter-examples: what goes wrong when first come, first served admits until the memory is full.

Both run the rule of today's engines (`baselines.vllm`): admit in order of arrival while the KV of those in
service and the newcomer fit *now*; when growth overflows the memory, preempt the most recently admitted, which
goes back to the head of the queue. A preempted request either restarts, its tokens lost, or keeps them.

**The cascade.** Unit iterations, one prompt token, two output tokens, C = 12, four arrivals per round. A request
holds 1 token in its first round and 2 in its second, W = 3, so the fluid model carries exactly C/W = 4 per
round. Once twelve are admitted into an empty memory they need 24 a round later: six are preempted, six finish,
the memory is empty again, and twelve are admitted. From 6 in their first round and 3 in their second on,
completions are

    3, 6, 0, 6, 0, 6, …      with restart: 3 per round of the 4 offered, for ever;
    3, 6, 0, 6, 2, 6, …      with tokens kept: 4 per round.

Admitting at most 4 per round (*spaced*) instead of all that fit: 4 in every round from the second on.

**FCFS at C = M\*.** Two types, (p, o) = (1, 2) and (1, 3), one request/s of each, T = d0 + d1·KV with d0 = 1 −
9 d1. The fluid equilibrium has iterations of 1 s and M* = 3 + 6 = 9 tokens; C = 9. With restarts a share of the
throughput is lost that does not vanish on longer horizons. If newcomers fill what a preemption leaves, the
memory is always full, T = 1 and .874 and .873 of the two types are completed per second, whatever d1. vLLM
admits nobody in an iteration that preempts, so its iterations are shorter and emptier: .830, .843, .857 of each
type at d1 = 0, .05, .1. With tokens kept nearly all is completed (.98 to 1.00 over 60 000 s, .990 and .989 for
the first rule: at C = M* the queue is critical).

**Source**: Ao, Luo, Simchi-Levi, Wang, arXiv 2504.11320, on why fluid-blind admission is not optimal; instances and
figures recomputed here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from fluidsched._checks import check_count, check_real
from fluidsched.policy import PolicyTable, TableType, baselines
from fluidsched.server import IterationTime, Server
from fluidsched.workload import ArrivalPath, RequestType, Workload

__all__ = ["Example", "cascade", "fcfs_at_capacity"]


@dataclass(frozen=True)
class Example:
    """What `simulate` needs to show one of the module's findings.

    Attributes
    ----------
    requests : Workload or ArrivalPath
    server : Server
    tables : tuple of PolicyTable
        "restart" and "kept" (tokens kept when preempted), and a remedy where there is an exact one.
    """

    requests: Workload | ArrivalPath
    server: Server
    tables: tuple[PolicyTable, ...]


def _fill_until_full() -> tuple[PolicyTable, PolicyTable]:
    kept = baselines.vllm(name="kept", token_budget=None)
    return dataclasses.replace(kept, name="restart", preemption="restart"), kept


def cascade(rounds: int = 100) -> Example:
    """The cascade, as a path of `rounds` rounds of 1 s.

    Examples
    --------
    >>> import fluidsched as fs
    >>> example = fs.examples.cascade(rounds=20)
    >>> runs = fs.simulate(example.requests, example.server, example.tables, horizon=20.0, engine="reference")
    >>> for policy in runs.policies:
    ...     finish = runs.requests(policy)["finish_s"].dropna().astype(int)
    ...     print(f"{policy:8}", *np.bincount(finish, minlength=12)[2:12])
    restart  3 6 0 6 0 6 0 6 0 6
    kept     3 6 0 6 2 6 2 6 2 6
    spaced   3 4 4 4 4 4 4 4 4 4
    """
    last = check_count("rounds", rounds, minimum=3)
    # Three in round 0 and six in round 1 put the system where the cascade starts, 6 and 3 in their rounds.
    arrival = np.repeat(np.arange(last), [3, 6] + [4] * (last - 2)).astype(np.float64)
    ones = np.ones(len(arrival), dtype=np.int64)
    path = ArrivalPath.from_arrays(arrival, ones, 2 * ones, name="cascade")
    server = Server(12, IterationTime.affine(1.0, 0.0, 0.0, 0.0), name="unit iterations")
    spaced = PolicyTable("spaced", "gated", (TableType("*", threshold=4, period=1),))
    return Example(path, server, (*_fill_until_full(), spaced))


def fcfs_at_capacity(d1: float = 0.05) -> Example:
    """First come, first served at C = M*.

    Parameters
    ----------
    d1 : float
        Seconds per KV token, 0 ≤ d1 < 1/9.

    Examples
    --------
    >>> import fluidsched as fs
    >>> example = fs.examples.fcfs_at_capacity()
    >>> fluid = fs.solve_fluid(example.requests, example.server)
    >>> round(fluid.iteration_time, 9), round(fluid.resident_kv, 9), example.server.kv_capacity
    (1.0, 9.0, 9.0)
    """
    slope = check_real("d1", d1, minimum=0.0, maximum=0.111)
    workload = Workload(
        [RequestType("short", 1.0, prompt_tokens=1, output_tokens=2), RequestType("long", 1.0, 1, 3)],
        name="fcfs at capacity",
    )
    server = Server(9, IterationTime.paper(d0=1.0 - 9.0 * slope, d1=slope), name="C = M*")
    return Example(workload, server, _fill_until_full())
