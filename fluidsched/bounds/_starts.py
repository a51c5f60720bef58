r"""The integer program of the hindsight optimum over a given set of starts (class, round).

With z_{c,t} the number of requests of class c that start by round t, A_c(t) those of the class that have arrived by t,
and x_{c,t} = z_{c,t} − z_{c,t'}, t' the start of the class before t:

    min  Σ (t + o_c) x_{c,t} − Σ_i a_i
    s.t. 0 ≤ x_{c,t},    z_{c,t} ≤ A_c(t),    z_{c,last} = N_c
         Σ_c Σ_{k=1..o_c} (p_c + k − 1) x_{c,t−k+1} ≤ C       in every round
         Σ (t + o_c) x_{c,t} − Σ_i a_i ≤ target
         z integer.

The relaxation is that in x. But a branch on z_{c,t} says "by t or later" and halves the starts of a class, while
one on x_{c,t} says "at t or not", and "not" says next to nothing: hard proofs take half of the nodes, or a sixth.
The target lets the solver's propagation work from the outset, and makes infeasibility the proof that it cannot be
met. With proofs as the aim the solver's own searches for schedules are left out.
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

_TOLERANCES = {
    "primal_feasibility_tolerance": 1e-7,
    "dual_feasibility_tolerance": 1e-7,
    "mip_feasibility_tolerance": 1e-6,
}  # of whole numbers: what is violated is violated by 1


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
    row = rounds[which] + age
    memory = sparse.csr_matrix((held[kinds[which], age], (row, which)), shape=(int(row.max()) + 1, columns))
    follows = np.flatnonzero(np.diff(kinds) == 0) + 1  # starts that are not the first of their class
    starting = sparse.identity(columns, format="csr") - sparse.csr_matrix(
        (np.ones(len(follows)), (follows, follows - 1)), shape=(columns, columns)
    )  # x of z
    total = np.asarray(starting.T @ (rounds + duration).astype(np.float64))
    matrix = sparse.vstack([memory @ starting, starting[follows], sparse.csr_matrix(total)]).tocsc()
    matrix.eliminate_zeros()
    present, last = np.empty(columns), np.append(np.diff(kinds) != 0, True)
    for c in range(len(length)):
        mine = kinds == c
        present[mine] = np.searchsorted(np.sort(arrival[kind == c]), rounds[mine], side="right")
    everybody = np.bincount(kind, minlength=len(length))[kinds]
    if np.any(last & (present < everybody)):
        return None, math.inf  # the last request of a class is left without a start

    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = columns, matrix.shape[0]
    model.col_cost_, model.offset_ = total, -float(arrival.sum())
    model.col_lower_, model.col_upper_ = np.where(last, everybody, 0.0), present
    limits = [(-math.inf, float(math.floor(capacity)))] * memory.shape[0] + [(0.0, math.inf)] * len(follows)
    limits.append((-math.inf, float(target + arrival.sum())))
    model.row_lower_, model.row_upper_ = np.array(limits).T
    model.integrality_ = [highspy.HighsVarType.kInteger] * columns
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_, model.a_matrix_.index_ = matrix.indptr, matrix.indices
    model.a_matrix_.value_ = matrix.data
    solver = new_highs(
        presolve="choose",
        time_limit=float(time_limit),
        mip_rel_gap=0.0,
        mip_abs_gap=0.999,  # totals are whole rounds
        mip_heuristic_effort=0.0,
        **_TOLERANCES,
    )
    solver.passModel(model)
    run(solver)
    if solver.getModelStatus() == highspy.HighsModelStatus.kInfeasible:
        return None, math.inf
    info = solver.getInfo()
    bound = float(info.mip_dual_bound)
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return None, bound
    chosen = starting @ np.rint(np.asarray(solver.getSolution().col_value))
    start = np.empty(len(arrival), dtype=np.int64)
    for c in range(len(length)):
        members = np.flatnonzero(kind == c)
        members = members[np.argsort(arrival[members], kind="stable")]
        mine = kinds == c
        start[members] = np.repeat(rounds[mine], chosen[mine].astype(np.int64))
    return start, bound
