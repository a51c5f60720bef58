"""The fluid program in cvxpy: objectives and constraints of your own.

`fluid_variables` gives the admitted rates a and the iteration rate u as cvxpy expressions, in req/s and
1/s, and the program's constraints by label. Underneath are variables scaled as in
`fluidsched.fluid.program`, so that solvers see numbers of order one whatever the units.

Use the pieces in a `cvxpy.Problem`, or `FluidVariables.maximise`, which takes a concave objective and
constraints under names of your own, and where these contradict names an irreducible set: together
impossible, possible without any one of them (deletion filter). Optimality is then the solver's word; what is
checked here is that the rates keep every constraint.

Linear programs go to HiGHS, others to Clarabel, whose answers are good to about 1e-6 of the objective.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched._checks import check_real
from fluidsched.errors import InfeasibleError, InputError, SolverError
from fluidsched.fluid.model import FluidModel

__all__ = ["FluidVariables", "VariablesOptimum", "fluid_variables"]


@dataclass(frozen=True, eq=False)
class VariablesOptimum:
    """What maximising over `FluidVariables` gave. J types.

    Attributes
    ----------
    admitted_rate : ndarray of shape (J,)
        a, req/s.
    iteration_rate : float
        u, 1/s, as the solver left it: it may be below the largest that time allows.
    value : float
        The objective.
    dual : dict of str to ndarray
        Multipliers by label, of the program's rows as scaled and of your constraints as written.
    violation : dict of str to float
        By how much each constraint is missed, in its own units as written; about 0.
    status : str
        The solver's word.
    """

    admitted_rate: NDArray[np.float64]
    iteration_rate: float
    value: float
    dual: dict[str, NDArray[np.float64]]
    violation: dict[str, float]
    status: str


@dataclass(frozen=True, eq=False, repr=False)
class FluidVariables:
    """The fluid program as cvxpy expressions. J types.

    Attributes
    ----------
    model : FluidModel
        The program's data.
    admitted_rate : cvxpy expression of shape (J,)
        a, req/s.
    iteration_rate : cvxpy expression
        u, 1/s.
    constraints : dict of str to cvxpy constraint
        "time" (or "time[0]", …), "kv", "batch", "tokens", "iteration_time", "fairness_floor", "demand".
    """

    model: FluidModel
    admitted_rate: Any
    iteration_rate: Any
    constraints: dict[str, Any]

    def rate(self, name: str) -> Any:
        """Return the expression of one type's admitted rate, req/s."""
        names = self.model.workload.type_names
        if name not in names:
            raise InputError("name", name, "be one of " + ", ".join(map(repr, names)))
        return self.admitted_rate[names.index(name)]

    def utility(self, alpha: float = 1.0, weights: ArrayLike = 1.0) -> Any:
        """Return Σ ω_j U_α(r_j a_j) over the types with demand, r the program's reward, as an expression.

        Parameters
        ----------
        alpha : float
            0 ≤ α < ∞; see `fluidsched.fluid.fair`.
        weights : float or array_like of shape (J,)
            ω_j > 0.
        """
        cp = _cvxpy()

        alpha = check_real("alpha", alpha, minimum=0.0)
        rate = self.model.workload.arrival_rate
        active = np.flatnonzero(rate > 0.0)
        weight = np.broadcast_to(np.asarray(weights, dtype=np.float64), rate.shape)[active]
        share = cp.multiply(self.model.reward[active], self.admitted_rate[active])
        if alpha == 1.0:
            return weight @ cp.log(share)
        if alpha == 0.0:
            return weight @ share
        return weight @ cp.power(share, 1.0 - alpha) / (1.0 - alpha)

    def maximise(self, objective: Any, constraints: Mapping[str, Any] | None = None) -> VariablesOptimum:
        """Maximise a concave cvxpy expression over the program and constraints of your own.

        Parameters
        ----------
        objective : cvxpy expression
            Concave in the rates.
        constraints : mapping of str to cvxpy constraint, optional
            Under labels that are not the program's.

        Raises
        ------
        InputError
            If a label is taken, or the problem is not convex by cvxpy's rules.
        InfeasibleError
            If the constraints contradict; names an irreducible set of labels.
        SolverError
            If the objective is unbounded or the solver fails.
        """
        cp = _cvxpy()

        own = dict(constraints or {})
        for label in own:
            if label in self.constraints:
                raise InputError("constraints", f"the label {label!r}", "leave the program's labels alone")
        every = {**self.constraints, **own}
        problem = cp.Problem(cp.Maximize(objective), list(every.values()))
        if not problem.is_dcp():
            raise InputError(
                "objective and constraints",
                str(problem),
                "be a concave objective and convex constraints by cvxpy's rules",
            )
        _run(problem)
        if problem.status in ("infeasible", "infeasible_inaccurate"):
            raise InfeasibleError(_contradiction(self.constraints, own), "constraints")
        if problem.status != "optimal":
            raise SolverError(f"cvxpy ended with status {problem.status!r}")
        return VariablesOptimum(
            admitted_rate=np.maximum(np.asarray(self.admitted_rate.value, dtype=np.float64), 0.0),
            iteration_rate=float(self.iteration_rate.value),
            value=float(problem.value),
            dual={label: np.asarray(row.dual_value, dtype=np.float64) for label, row in every.items()},
            violation={label: float(np.max(row.violation(), initial=0.0)) for label, row in every.items()},
            status=str(problem.status),
        )

    def __repr__(self) -> str:
        return (
            f"FluidVariables: rates of {len(self.model.workload)} types and the iteration rate,"
            f" constraints {', '.join(self.constraints)}"
        )


def fluid_variables(model: FluidModel) -> FluidVariables:
    """Return a program's variables and constraints for cvxpy; the workload's rates are the demand.

    Parameters
    ----------
    model : FluidModel
        `FluidProgram.model`.

    Examples
    --------
    The largest total that admits "chat" at three times the rate of "code":

    >>> import fluidsched as fs
    >>> types = [fs.RequestType("chat", 9.0, 500, 100), fs.RequestType("code", 9.0, 500, 100)]
    >>> program = fs.FluidProgram(fs.Workload(types), fs.catalog.server("a100", "llama-2-7b"))
    >>> fluid = fluid_variables(program.model)
    >>> chat, code = fluid.rate("chat"), fluid.rate("code")
    >>> best = fluid.maximise(chat + code, {"three to one": chat == 3 * code})
    >>> float((best.admitted_rate[0] / best.admitted_rate[1]).round(6))
    3.0
    """
    cp = _cvxpy()

    rate = model.workload.arrival_rate
    unit = np.where(rate > 0.0, np.minimum(rate, model.rate_alone), model.rate_alone)
    fastest = 1.0 / float(model.base.max())
    share, speed = cp.Variable(len(rate), name="a"), cp.Variable(name="u")
    matrix = np.column_stack([model.matrix * unit, model.rate_coefficient * fastest])
    size = np.abs(matrix).max(axis=1)
    constraints = {
        name: row[:-1] / most @ share + row[-1] / most * speed <= right / most
        for name, row, right, most in zip(model.row_names, matrix, model.limit, size, strict=True)
    }
    constraints["iteration_time"] = speed >= 1.0 / (model.max_iteration_time * fastest)
    constraints["fairness_floor"] = share >= model.fairness_floor * rate / unit
    constraints["demand"] = share <= np.minimum(rate / unit, 100.0 * model.rate_alone / unit)
    return FluidVariables(model, cp.multiply(unit, share), fastest * speed, constraints)


def _cvxpy() -> Any:
    import cvxpy

    return cvxpy


def _run(problem: Any) -> None:
    cp = _cvxpy()

    try:
        problem.solve(solver=cp.HIGHS if problem.is_lp() else cp.CLARABEL)
    except cp.SolverError as error:
        raise SolverError(f"cvxpy could not solve the program: {error}") from None


def _contradiction(program: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Name an irreducible set of constraints: each dropped in turn, for good where the rest still contradicts."""
    cp = _cvxpy()

    def contradicts(rows: Mapping[str, Any]) -> bool:
        problem = cp.Problem(cp.Minimize(0.0), list(rows.values()))
        _run(problem)
        return str(problem.status) in ("infeasible", "infeasible_inaccurate")

    kept = {**program, **own}
    for label in [*own, *program]:  # blame as few of the user's as possible
        rest = {name: row for name, row in kept.items() if name != label}
        if contradicts(rest):
            kept = rest
    named = "; ".join(f"{label!r}: {kept[label]}" if label in own else repr(label) for label in kept)
    blame = [label for label in kept if label in own] or list(kept)
    return (
        f"these constraints contradict each other: {named}. Dropping or relaxing any one of them repairs that;"
        f" of your own: {', '.join(map(repr, blame))}."
    )
