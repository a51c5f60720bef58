"""Sparse programs put together from blocks, for everything larger than one pool in one period."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import NamedTuple

import highspy
import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched.errors import InfeasibleError, SolverError
from fluidsched.fluid._highs import new_highs, run
from fluidsched.fluid.certificate import Certificate, SparseRows, certify_minimum

__all__ = ["ASSEMBLY_TOLERANCE", "Assembly", "Minimum"]

#: Tolerance of certificates of scaled programs; HiGHS itself works to 1e-10.
ASSEMBLY_TOLERANCE = 1e-7

_INFEASIBLE = (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible)


class Minimum(NamedTuple):
    """What `Assembly.minimise` returns.

    Attributes
    ----------
    value : ndarray of shape (columns,)
        Optimal values.
    row_dual : ndarray of shape (rows,)
        d cost/d right-hand side, divided by `cost_scale`; of no use with integer columns.
    cost_scale : float
        By which the cost was divided.
    effort : int
        Simplex iterations.
    bound : float
        No solution costs less, in the cost's own units: from the multipliers, or HiGHS's own for a MILP.
    certificate : Certificate or None
        Checked on the scaled program; None with integer columns, whose optimality only the solver's tree
        proves.
    """

    value: NDArray[np.float64]
    row_dual: NDArray[np.float64]
    cost_scale: float
    effort: int
    bound: float
    certificate: Certificate | None


class Assembly:
    """A sparse linear or mixed-integer program put together from blocks of columns, rows and coefficients."""

    def __init__(self) -> None:
        self._column: list[tuple[NDArray[np.float64], ...]] = []
        self._row: list[tuple[NDArray[np.float64], ...]] = []
        self._entry: list[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]] = []
        self._columns = self._rows = 0
        self._integer: list[NDArray[np.intp]] = []
        self._named: list[tuple[int, Callable[[int], str]]] = []
        self._fixed: list[tuple[NDArray[np.intp], NDArray[np.float64]]] = []

    def columns(
        self, count: int, lower: ArrayLike, upper: ArrayLike, cost: ArrayLike, *, integer: bool = False
    ) -> NDArray[np.intp]:
        """Add columns; return their indices."""
        bounds = (np.broadcast_to(x, count).astype(np.float64) for x in (lower, upper, cost))
        self._column.append(tuple(bounds))
        self._columns += count
        added = np.arange(self._columns - count, self._columns)
        if integer:
            self._integer.append(added)
        return added

    def fix(self, columns: NDArray[np.intp], values: NDArray[np.float64]) -> None:
        """Fix columns at these values."""
        self._fixed.append((columns, values))

    def rows(
        self, lower: NDArray[np.float64], upper: NDArray[np.float64], name: Callable[[int], str]
    ) -> NDArray[np.intp]:
        """Add rows lower ≤ · ≤ upper; return their indices. `name` says what the i-th of them demands."""
        self._named.append((self._rows, name))
        self._row.append((lower, upper))
        self._rows += len(lower)
        return np.arange(self._rows - len(lower), self._rows)

    def add(self, rows: NDArray[np.intp], columns: NDArray[np.intp], values: ArrayLike) -> None:
        """Add coefficients at (rows, columns), arrays of one shape; none twice."""
        coefficients = np.broadcast_to(np.asarray(values, dtype=np.float64), rows.shape)
        self._entry.append((rows.ravel(), columns.ravel(), coefficients.ravel()))

    def program(self) -> tuple[highspy.HighsLp, SparseRows, float]:
        """Return the program as HiGHS takes it, its entries, and what the cost was divided by."""
        lower, upper, cost = (np.concatenate(part) for part in zip(*self._column, strict=True))
        for columns, values in self._fixed:
            lower[columns] = upper[columns] = values
        row_lower, row_upper = (np.concatenate(part) for part in zip(*self._row, strict=True))
        row, column, value = (np.concatenate(part) for part in zip(*self._entry, strict=True))
        order = np.argsort(column, kind="stable")
        order = order[value[order] != 0.0]
        scale = float(np.abs(cost).max()) or 1.0
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = self._columns, self._rows
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost / scale, lower, upper
        lp.row_lower_, lp.row_upper_ = row_lower, row_upper
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        starts = np.searchsorted(column[order], np.arange(self._columns + 1))
        lp.a_matrix_.start_ = starts.astype(np.int32)
        lp.a_matrix_.index_ = row[order].astype(np.int32)
        lp.a_matrix_.value_ = value[order]
        if self._integer:
            kinds = np.full(self._columns, highspy.HighsVarType.kContinuous)
            kinds[np.concatenate(self._integer)] = highspy.HighsVarType.kInteger
            lp.integrality_ = kinds.tolist()
        return lp, SparseRows(row, column, value), scale

    def contradiction(self) -> tuple[str, ...]:
        """Return the names of an irreducible set of rows that contradict each other; () where nothing does.

        Bounds of columns hold throughout and are not named; integer columns may take any value between theirs. Rows
        are dropped in halves and for good where the rest still contradicts; a row that has to stay once has to stay
        among fewer. (HiGHS's own search gave up on a third of programs whose floors a few pools cannot meet.)
        """
        lp, _, _ = self.program()
        lp.col_cost_, lp.integrality_ = np.zeros(self._columns), []
        lower, upper = np.array(lp.row_lower_), np.array(lp.row_upper_)
        highs = new_highs()
        highs.passModel(lp)

        def contradicts(without: range) -> bool:
            for row in without:
                highs.changeRowBounds(row, -highspy.kHighsInf, highspy.kHighsInf)
            highs.setOptionValue("presolve", "off")
            run(highs)
            if highs.getModelStatus() not in (highspy.HighsModelStatus.kOptimal, *_INFEASIBLE):
                highs.clearSolver()  # the simplex method did not come to an end from there
                highs.setOptionValue("presolve", "on")
                run(highs)
            if highs.getModelStatus() in _INFEASIBLE:
                return True
            for row in without:
                highs.changeRowBounds(row, lower[row], upper[row])
            return False

        def needed(rows: range) -> list[int]:
            if contradicts(rows):
                return []
            if len(rows) == 1:
                return [rows[0]]
            half = len(rows) // 2
            return needed(rows[:half]) + needed(rows[half:])

        if not contradicts(range(0)):
            return ()
        starts = [first for first, _ in self._named]
        names = []
        for row in needed(range(self._rows)):
            first, name = self._named[bisect.bisect_right(starts, row) - 1]
            names.append(name(row - first))
        return tuple(dict.fromkeys(names))

    def minimise(self, what: str, *, presolve: bool = False, relative_gap: float = 0.0) -> Minimum:
        """Solve; `what` names the program in errors.

        Raises
        ------
        InfeasibleError
            If nothing satisfies the rows; names an irreducible set of them where columns need not be whole.
        SolverError
            If HiGHS ends without an optimum for another reason.
        """
        lp, (row, column, value), scale = self.program()
        lower, upper, cost = np.array(lp.col_lower_), np.array(lp.col_upper_), np.array(lp.col_cost_)
        row_lower, row_upper = np.array(lp.row_lower_), np.array(lp.row_upper_)
        highs = new_highs(presolve="choose" if presolve else "off", mip_rel_gap=relative_gap)
        if highs.passModel(lp) == highspy.HighsStatus.kError:
            raise SolverError(f"HiGHS refused {what}")
        run(highs)
        status = highs.getModelStatus()
        if status in _INFEASIBLE:
            names = self.contradiction()
            together = f"; these contradict each other: {', '.join(names)}" if names else ""
            raise InfeasibleError(f"{what} has no solution{together}")
        if status != highspy.HighsModelStatus.kOptimal:
            raise SolverError(f"HiGHS ended with status {highs.modelStatusToString(status)!r} on {what}")
        answer, info = highs.getSolution(), highs.getInfo()
        x, effort = np.array(answer.col_value), int(info.simplex_iteration_count)
        if self._integer:
            unknown = np.full(self._rows, np.nan)
            return Minimum(x, unknown, scale, effort, float(info.mip_dual_bound) * scale, None)
        y = np.array(answer.row_dual)
        certificate, bound = certify_minimum(
            cost,
            SparseRows(row, column, value),
            (row_lower, row_upper),
            (lower, upper),
            x,
            y,
            ASSEMBLY_TOLERANCE,
        )
        return Minimum(x, y, scale, effort, bound * scale, certificate)
