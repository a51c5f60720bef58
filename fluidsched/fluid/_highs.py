"""HiGHS as the simplex solver of small dense programs that are solved again and again.

One object holds one program max c·x, A x ≤ b, l ≤ x ≤ h; only l and h change between solves, so the dual
simplex starts from the last optimal basis. What comes back is the optimal *basis*, not the numbers: the
caller computes these from its own unscaled data, free of the solver's tolerances.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import Literal, NamedTuple

import highspy
import numpy as np
from numpy.typing import NDArray

from fluidsched.errors import SolverError

__all__ = ["Basis", "Simplex", "SolveStatus", "column_wise", "new_highs", "run"]

SolveStatus = Literal["optimal", "infeasible", "unbounded", "limit", "failed"]

#: HiGHS's words in ours; anything else is "failed".
_STATUS: dict[highspy.HighsModelStatus, SolveStatus] = {
    highspy.HighsModelStatus.kOptimal: "optimal",
    highspy.HighsModelStatus.kInfeasible: "infeasible",
    highspy.HighsModelStatus.kUnbounded: "unbounded",
    highspy.HighsModelStatus.kUnboundedOrInfeasible: "infeasible",
    highspy.HighsModelStatus.kTimeLimit: "limit",
    highspy.HighsModelStatus.kIterationLimit: "limit",
}

_OPTIONS: dict[str, bool | int | float | str] = {
    "output_flag": False,
    "threads": 1,
    "solver": "simplex",
    "presolve": "off",  # would drop columns with tiny demand, and the basis
    "primal_feasibility_tolerance": 1e-10,
    "dual_feasibility_tolerance": 1e-10,
    "small_matrix_value": 1e-12,
    "mip_feasibility_tolerance": 1e-9,
    # crashes on some programs, up to HiGHS 1.15.1 at least (its issue 3262)
    "mip_heuristic_run_feasibility_jump": False,
    "time_limit": 600.0,
}

_BASIC = int(highspy.HighsBasisStatus.kBasic)
_AT_UPPER = int(highspy.HighsBasisStatus.kUpper)

_log = logging.getLogger(__name__)


class Basis(NamedTuple):
    """An optimal basis.

    Attributes
    ----------
    basic : ndarray of int
        Basic columns.
    tight : ndarray of int
        Nonbasic rows, as many as basic columns.
    at_upper : ndarray of bool, shape (columns,)
        Nonbasic columns at their upper bound.
    iterations : int
        Simplex iterations this solve took.
    """

    basic: NDArray[np.intp]
    tight: NDArray[np.intp]
    at_upper: NDArray[np.bool_]
    iterations: int


def _construct() -> highspy.Highs:
    return highspy.Highs()  # type: ignore[no-untyped-call]


_first = threading.Lock()
_silenced = False


def _silence_banner() -> None:
    """Construct the process's first Highs, which writes a banner to file descriptor 1, in silence."""
    global _silenced
    with _first:  # two threads at once would give each other's null device back as standard output
        if not _silenced:
            _construct_in_silence()
            _silenced = True


def _construct_in_silence() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        saved = os.dup(1)
    except OSError:  # no standard output at all: nothing to protect
        os.close(null)
        _construct()
        return
    try:
        os.dup2(null, 1)
        _construct()
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)


def new_highs(**options: bool | int | float | str) -> highspy.Highs:
    """Return a silent Highs with our options, or these where given; each object has options of its own."""
    _silence_banner()
    highs = _construct()
    for option, value in {**_OPTIONS, **options}.items():
        if highs.setOptionValue(option, value) != highspy.HighsStatus.kOk:
            raise SolverError(f"HiGHS {highs.version()} refused its option {option} = {value!r}")
    return highs


def run(highs: highspy.Highs) -> None:
    """Run HiGHS; its model status says how that went.

    HiGHS's threads are the process's. Whoever else started them first, with another number, makes our run end in an
    error: then it is run with theirs.
    """
    if highs.run() == highspy.HighsStatus.kError:
        highs.setOptionValue("threads", 0)
        highs.run()


def column_wise(program: highspy.HighsLp, matrix: NDArray[np.float64]) -> None:
    """Give `program` the entries of a dense matrix that are not zero."""
    keep = matrix.T != 0.0
    program.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    program.a_matrix_.start_ = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.int32)
    program.a_matrix_.index_ = np.nonzero(keep)[1].astype(np.int32)
    program.a_matrix_.value_ = matrix.T[keep]


class Simplex:
    """A program max c·x, A x ≤ b, l ≤ x ≤ h, solved again for other bounds l, h."""

    def __init__(
        self, cost: NDArray[np.float64], matrix: NDArray[np.float64], row_upper: NDArray[np.float64]
    ) -> None:
        rows, columns = matrix.shape
        self._index = np.arange(columns, dtype=np.int32)
        self._highs = new_highs()
        program = highspy.HighsLp()
        program.num_col_, program.num_row_ = columns, rows
        program.col_cost_ = cost
        program.col_lower_ = np.zeros(columns)
        program.col_upper_ = np.zeros(columns)
        program.row_lower_ = np.full(rows, -np.inf)
        program.row_upper_ = row_upper
        program.sense_ = highspy.ObjSense.kMaximize
        column_wise(program, matrix)
        # kWarning: entries below small_matrix_value were dropped.
        if self._highs.passModel(program) == highspy.HighsStatus.kError:
            raise SolverError("HiGHS refused the program")

    def solve(
        self, lower: NDArray[np.float64], upper: NDArray[np.float64], *, cold: bool = False
    ) -> tuple[SolveStatus, Basis]:
        """Solve with these column bounds, from the last basis unless `cold`."""
        highs = self._highs
        highs.changeColsBounds(len(self._index), self._index, lower, upper)
        if cold:
            highs.clearSolver()
        status = self._run()
        if status in ("failed", "limit") and not cold:
            _log.info("HiGHS ended with %s from a warm start; solving from scratch", status)
            highs.clearSolver()
            status = self._run()
        basis = highs.getBasis()
        columns = np.fromiter(map(int, basis.col_status), np.int8)
        rows = np.fromiter(map(int, basis.row_status), np.int8)
        return status, Basis(
            (columns == _BASIC).nonzero()[0],
            (rows != _BASIC).nonzero()[0],
            columns == _AT_UPPER,
            int(highs.getInfo().simplex_iteration_count),
        )

    def _run(self) -> SolveStatus:
        run(self._highs)
        return _STATUS.get(self._highs.getModelStatus(), "failed")
