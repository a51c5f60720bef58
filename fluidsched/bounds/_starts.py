r"""The integer program of the hindsight optimum over a given set of starts (class, round).

With x_{c,t} the number of requests of class c that start at round t and A_c(t) those of the class arrived by t:

    min  Σ (t + o_c) x_{c,t} − Σ_i a_i
    s.t. Σ_t x_{c,t} = N_c,    Σ_{s<t} x_{c,s} ≤ A_c(t − 1)  where somebody of the class arrives at t
         Σ_c Σ_{k=1..o_c} (p_c + k − 1) x_{c,t−k+1} ≤ C       in every round
         Σ (t + o_c) x_{c,t} − Σ_i a_i ≤ target
         x ≥ 0 integer.

The target lets the solver's propagation work from the outset, and makes infeasibility the proof that the target
cannot be met.
"""

from __future__ import annotations

import math

import highspy
import numpy as np
import numpy.typing as npt

from fluidsched.fluid._highs import new_highs, run

__all__ = ["best_starts"]

_Int = npt.NDArray[np.int64]
_Real = npt.NDArray[np.float64]


def best_starts(
    arrival: _Int,
    kind: _Int,
    held: _Real,
    length: _Int,
    capacity: float,
    kinds: _Int,
    rounds: _Int,
    target: int,
    time_limit: float,
) -> tuple[_Int | None, float]:
    """Best schedule that uses only the given starts and does not exceed a target; a lower bound on its total.

    Parameters
    ----------
    arrival, kind : (N,)
        Round and class of each request.
    held : (K, longest)
        KV held in each iteration of a request of the class.
    length : (K,)
        Iterations.
    capacity : float
    kinds, rounds : (V,)
        The starts, ascending by (class, round).
    target : int
        Largest total latency of interest, rounds.
    time_limit : float
        Seconds.

    Returns
    -------
    start : (N,) or None
        First come, first served within a class; None if no schedule was found.
    bound : float
        No schedule of these starts has a smaller total latency, rounds; infinite if none meets the target.
    """
    from scipy import sparse

    if len(np.unique(kinds)) < len(length):
        return None, math.inf  # a class is left without a start
    columns, duration = len(kinds), length[kinds]
    which = np.repeat(np.arange(columns), duration)
    age = np.arange(len(which)) - np.repeat(np.cumsum(duration) - duration, duration)
    row, memory = rounds[which] + age, held[kinds[which], age]
    horizon = int(row.max()) + 1
    rows, entries, coefficients = [row], [which], [memory]
    lower, upper = [np.full(horizon, -math.inf)], [np.full(horizon, capacity)]
    count = horizon
    for c in range(len(length)):
        times = np.sort(arrival[kind == c])
        mine = np.flatnonzero(kinds == c)
        later = np.unique(times)[1:]
        for limit in (*later, math.inf):  # whoever starts before `limit` has arrived before it
            early = mine[rounds[mine] < limit]
            rows.append(np.full(len(early), count))
            entries.append(early)
            coefficients.append(np.ones(len(early)))
            present = int(np.searchsorted(times, limit))
            lower.append(np.array([float(present) if math.isinf(limit) else -math.inf]))
            upper.append(np.array([float(present)]))
            count += 1
    cost = (rounds + duration).astype(np.float64)
    rows.append(np.full(columns, count))
    entries.append(np.arange(columns))
    coefficients.append(cost)
    lower.append(np.array([-math.inf]))
    upper.append(np.array([float(target + arrival.sum())]))
    matrix = sparse.csc_matrix(
        (np.concatenate(coefficients), (np.concatenate(rows), np.concatenate(entries))),
        shape=(count + 1, columns),
    )

    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = columns, count + 1
    model.col_cost_, model.offset_ = cost, -float(arrival.sum())
    model.col_lower_, model.col_upper_ = np.zeros(columns), np.full(columns, math.inf)
    model.row_lower_, model.row_upper_ = np.concatenate(lower), np.concatenate(upper)
    model.integrality_ = [highspy.HighsVarType.kInteger] * columns
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_, model.a_matrix_.index_ = matrix.indptr, matrix.indices
    model.a_matrix_.value_ = matrix.data
    # totals are whole rounds
    solver = new_highs(presolve="choose", time_limit=float(time_limit), mip_rel_gap=0.0, mip_abs_gap=0.999)
    solver.passModel(model)
    run(solver)
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None, math.inf
    info = solver.getInfo()
    bound = float(info.mip_dual_bound)
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None, bound
    chosen = np.rint(np.asarray(solver.getSolution().col_value)).astype(np.int64)
    start = np.empty(len(arrival), dtype=np.int64)
    for c in range(len(length)):
        members = np.flatnonzero(kind == c)
        members = members[np.argsort(arrival[members], kind="stable")]
        mine = kinds == c
        start[members] = np.repeat(rounds[mine], chosen[mine])
    return start, bound
