"""Where a stuck run stands: who waits for what, and what the others hold.

A run is *stuck* when requests are left and nothing that can still come, no arrival and no timer, will ever let the
table act again. Under the rules simulated that takes gates: `wait` and `nested-wait` idle until enough wait together
(residents stand still with their KV), `gated` admits nobody of a type below its gate or with threshold 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fluidsched.simulation.records import STATUSES, EngineRun

if TYPE_CHECKING:
    from fluidsched.policy.table import PolicyTable
    from fluidsched.workload import ArrivalPath

__all__ = ["describe_deadlock"]


def describe_deadlock(
    path: ArrivalPath, run: EngineRun, table: PolicyTable | None, kv_capacity: float
) -> str:
    """Return one line on the state of a stuck run, empty for any other.

    Per starved row of the table: how many never admitted wait, how many were admitted before (resident, or
    preempted and waiting again), and the gate they stand before; then time and KV held.

    Parameters
    ----------
    path, run, table
        The run, and what it was made from; no table where replicas follow different ones, whose rows then stand
        together.
    kv_capacity : float
        C, tokens.

    Examples
    --------
    >>> from fluidsched import ArrivalPath, IterationTime, Server
    >>> from fluidsched.policy import PolicyTable, TableType
    >>> from fluidsched.simulation.reference import run_reference
    >>> table = PolicyTable("wait", "wait", (TableType("*", threshold=2, gate=2),), freeze=True, block_iterations=1)
    >>> path = ArrivalPath.from_arrays([0.0, 0.0, 1.0], [4, 4, 4], [2, 2, 2])
    >>> server = Server(50, IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    >>> describe_deadlock(path, run_reference(path, server, table, horizon=None), table, 50)
    'at 1 s: * has 1 waiting and 2 admitted before, gate 2; 8 of 50 KV tokens held'
    """
    if run.verdict != "stuck":
        return ""
    left = run.status == STATUSES.index("unfinished")

    def counts(mine: NDArray[np.bool_]) -> str:
        waiting = int(np.count_nonzero(mine & np.isnan(run.admitted_s)))
        before = int(np.count_nonzero(mine)) - waiting
        words = ((waiting, "waiting"), (before, "admitted before"))
        return " and ".join(f"{count:,} {word}" for count, word in words if count)

    if table is None:
        parts = [f"{', '.join(run.starved_types)} have {counts(left)}"]
    else:
        rows = table.classify(path)
        parts = [
            f"{row.name} has {counts(left & (rows == j))}, {_condition(table, j)}"
            for j, row in enumerate(table.types)
            if (left & (rows == j)).any()
        ]
    capacity = "" if math.isinf(kv_capacity) else f" of {kv_capacity:,.0f}"
    return f"at {run.end_s:.6g} s: {'; '.join(parts)}; {run.kv_end:,}{capacity} KV tokens held"


def _condition(table: PolicyTable, j: int) -> str:
    """What a row's requests stand before."""
    row = table.types[j]
    if table.segments:
        return f"segments of {', '.join(f'{segment.threshold:,}' for segment in table.segments)}"
    if row.threshold == 0:
        return "threshold 0"
    return f"gate {row.gate or 0:,}"
