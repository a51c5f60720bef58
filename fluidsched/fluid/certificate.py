"""Optimality proved from the numbers alone, without the solver.

For min c·x over rows lo ≤ A x ≤ hi and columns l ≤ x ≤ h, any multipliers y of the rows leave the reduced
cost z = c − Aᵀy, and

    Σ_i ( y_i⁺ lo_i − y_i⁻ hi_i ) + Σ_j ( z_j⁺ l_j − z_j⁻ h_j )

is at most the cost of every feasible x (weak duality), provided no sign presses against an infinite bound,
which is dual feasibility. At an optimum both costs agree, and of each pair slack and multiplier one is
zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["TOLERANCE", "Certificate", "SparseRows", "certify_minimum"]

#: Relative tolerance within which a constraint counts as met, or as binding.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Certificate:
    """Largest relative violation of each optimality condition.

    Attributes
    ----------
    primal_feasibility, dual_feasibility, complementary_slackness, gap : float
        Dimensionless; 0 is perfect.
    tolerance : float
        What each may be at most.
    """

    primal_feasibility: float
    dual_feasibility: float
    complementary_slackness: float
    gap: float
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        """Whether every condition holds within the tolerance (NaN does not)."""
        violations = (self.primal_feasibility, self.dual_feasibility, self.complementary_slackness, self.gap)
        return all(violation <= self.tolerance for violation in violations)


class SparseRows(NamedTuple):
    """A sparse matrix by its entries, none twice."""

    row: NDArray[np.intp]
    column: NDArray[np.intp]
    value: NDArray[np.float64]

    def times(self, x: NDArray[np.float64], rows: int) -> NDArray[np.float64]:
        """Return A x."""
        return np.asarray(np.bincount(self.row, self.value * x[self.column], rows), dtype=np.float64)

    def transposed_times(self, y: NDArray[np.float64], columns: int) -> NDArray[np.float64]:
        """Return Aᵀ y."""
        return np.asarray(np.bincount(self.column, self.value * y[self.row], columns), dtype=np.float64)


def certify_minimum(
    cost: NDArray[np.float64],
    matrix: SparseRows,
    row_bounds: tuple[NDArray[np.float64], NDArray[np.float64]],
    column_bounds: tuple[NDArray[np.float64], NDArray[np.float64]],
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    tolerance: float,
) -> tuple[Certificate, float]:
    """Return the certificate of x and y for min cost·x, and the dual bound on the cost.

    The program must be scaled so that columns, rows and costs are of order one where they matter:
    violations are taken as they are, the gap relative to the cost.
    """
    activity = matrix.times(x, len(y))
    reduced = cost - matrix.transposed_times(y, len(x))
    primal, dual, slackness, bound = 0.0, 0.0, 0.0, 0.0
    sides = []
    for at, multiplier, (low, high) in ((activity, y, row_bounds), (x, reduced, column_bounds)):
        sides.append((np.maximum(multiplier, 0.0), at - low, low, 1.0))
        sides.append((np.maximum(-multiplier, 0.0), high - at, high, -1.0))
    for price, slack, limit, sign in sides:
        finite = np.isfinite(limit)
        primal = max(primal, float((-slack).max(initial=0.0)))
        dual = max(dual, float(price[~finite].max(initial=0.0)))
        slackness = max(slackness, float(np.minimum(price[finite], slack[finite]).max(initial=0.0)))
        bound += sign * float(price[finite] @ limit[finite])
    value = float(cost @ x)
    size = max(abs(value), abs(bound))
    gap = abs(value - bound) / size if size > tolerance else 0.0
    return Certificate(primal, dual, slackness, gap, tolerance), bound
