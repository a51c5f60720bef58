"""Fair sharing of an overloaded server, and the fluid program's variables for your own cvxpy objectives.

Instead of the largest reward, the admitted rates a over the same polyhedron may maximise Σ_j ω_j U_α(a_j)
with

    U_α(a) = a^(1−α)/(1−α)   (α ≠ 1),        U_1(a) = log a,

which is the total rate at α = 0, proportional fairness at α = 1 and, as α → ∞, max-min fairness: no type
can be given more without taking from one that has no more (each counted in units of ω_j). A type without
arrivals has no part in it. Finite α > 0 is a cone program (cvxpy, Clarabel); max-min is filled by raising
all rates together, a type dropping out when its demand is met or a half-space {g·a ≤ 1} of the stability
region that it uses is full.

At an optimum with prices p_j = Σ_h μ_h g_hj of the half-spaces, each rate maximises ω_j U_α(a) − p_j a
over [f_j λ_j, λ_j] by itself. Summing these maxima and Σ_h μ_h bounds the utility of every feasible point:
that is the certificate's gap.

Source: Mo, Walrand (2000) for α-fairness; Bertsekas, Gallager for filling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched._checks import check_real
from fluidsched.errors import InfeasibleError, InputError, SolverError
from fluidsched.fluid.certificate import TOLERANCE, Certificate
from fluidsched.fluid.model import FluidModel, build_model
from fluidsched.server import Server
from fluidsched.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FairSolution", "FluidVariables", "fluid_variables", "solve_fair"]

#: Relative tolerance of the certificate; the interior-point solver works to about 1e-8 on the scaled program.
FAIR_TOLERANCE = 1e-5


@dataclass(frozen=True)
class FluidVariables:
    """The fluid program as cvxpy expressions, in its own units.

    Attributes
    ----------
    admitted_rate : cvxpy expression of shape (J,)
        a, req/s.
    iteration_rate : cvxpy expression
        u, 1/s.
    constraints : list of cvxpy constraints
        All of the program: time, memory, batch, tokens, iteration time, floors and demand.
    """

    admitted_rate: Any
    iteration_rate: Any
    constraints: list[Any]


@dataclass(frozen=True, eq=False, repr=False)
class FairSolution:
    """Fairly shared admitted rates. J types, H half-spaces.

    Attributes
    ----------
    model : FluidModel
        The program.
    alpha : float
        0 to inf.
    weight : ndarray of shape (J,)
        ω.
    admitted_rate : ndarray of shape (J,)
        a, req/s.
    price : ndarray of shape (J,) or None
        p_j, utility per req/s; None for max-min and with constraints of the user's own, which have prices
        too.
    certificate : Certificate or None
        None where `price` is.
    """

    model: FluidModel
    alpha: float
    weight: NDArray[np.float64]
    admitted_rate: NDArray[np.float64]
    price: NDArray[np.float64] | None
    certificate: Certificate | None

    @property
    def admitted_fraction(self) -> NDArray[np.float64]:
        """a/λ, shape (J,); 1 for a type without arrivals."""
        offered = self.model.workload.arrival_rate
        fraction = np.ones_like(offered)
        np.divide(self.admitted_rate, offered, out=fraction, where=offered > 0.0)
        return fraction

    @property
    def load(self) -> NDArray[np.float64]:
        """Load of each of `model.resources` by the *admitted* rates."""
        return self.model.load(self.admitted_rate)

    @property
    def iteration_time(self) -> float:
        """Mean iteration time, s."""
        speed = self.model.iteration_rate(self.admitted_rate)
        return math.inf if speed == 0.0 else 1.0 / speed

    def to_frame(self) -> pd.DataFrame:
        """Return one row per type: offered and admitted rate in req/s, fraction, weight."""
        import pandas as pd

        workload = self.model.workload
        return pd.DataFrame(
            {
                "type": workload.type_names,
                "arrival_rate": workload.arrival_rate,
                "admitted_rate": self.admitted_rate,
                "admitted_fraction": self.admitted_fraction,
                "weight": self.weight,
            }
        )

    def __repr__(self) -> str:
        workload = self.model.workload
        lines = [f"FairSolution (alpha {self.alpha:g}): {self.admitted_rate.sum():.4g} req/s admitted"]
        rates = zip(workload.type_names, workload.arrival_rate, self.admitted_rate, strict=True)
        lines += [f"  {name}: {admitted:.4g} of {offered:.4g} req/s" for name, offered, admitted in rates]
        return "\n".join(lines)


def fluid_variables(model: FluidModel) -> FluidVariables:
    """Return the program's variables and constraints, for objectives and constraints of your own.

    Parameters
    ----------
    model : FluidModel
        `FluidProgram.model`; the workload's rates are the demand.

    Examples
    --------
    >>> import cvxpy as cp
    >>> import fluidsched as fs
    >>> types = [fs.RequestType("a", 9.0, 500, 100), fs.RequestType("b", 9.0, 500, 100)]
    >>> program = fs.FluidProgram(fs.Workload(types), fs.catalog.server("a100", "llama-2-7b"))
    >>> fluid = fluid_variables(program.model)
    >>> a = fluid.admitted_rate
    >>> problem = cp.Problem(cp.Maximize(cp.sum(a)), [*fluid.constraints, a[0] == 3 * a[1]])
    >>> _ = problem.solve(solver=cp.HIGHS)
    >>> float(round(a.value[0] / a.value[1], 6))
    3.0
    """
    cp = _cvxpy()
    rate = model.workload.arrival_rate
    unit = np.where(rate > 0.0, np.minimum(rate, model.rate_alone), model.rate_alone)
    fastest = 1.0 / float(model.base.max())
    share, speed = cp.Variable(len(rate)), cp.Variable()
    matrix = np.column_stack([model.matrix * unit, model.rate_coefficient * fastest])
    size = np.abs(matrix).max(axis=1)
    constraints = [
        (matrix[:, :-1] / size[:, None]) @ share + (matrix[:, -1] / size) * speed <= model.limit / size,
        share >= model.fairness_floor * rate / unit,
        share <= rate / unit,
        speed >= 1.0 / (model.max_iteration_time * fastest),
    ]
    return FluidVariables(cp.multiply(unit, share), fastest * speed, constraints)


def solve_fair(
    workload: Workload,
    server: Server,
    alpha: float = 1.0,
    *,
    weight: ArrayLike = 1.0,
    fairness_floor: ArrayLike | None = None,
    max_iteration_time: float | None = None,
    chunk_tokens: int | None = None,
    constraints: Callable[[FluidVariables], Sequence[Any]] | None = None,
) -> FairSolution:
    """Share the server α-fairly among the types.

    Parameters
    ----------
    workload, server, fairness_floor, max_iteration_time, chunk_tokens
        As for `FluidProgram`.
    alpha : float
        0 (largest total), 1 (proportional), up to inf (max-min).
    weight : array_like of shape (J,)
        ω, positive.
    constraints : callable, optional
        Given the program's variables, returns further cvxpy constraints. Not with max-min.

    Raises
    ------
    InputError
        If an argument is wrong.
    InfeasibleError
        If the floors, or the constraints of your own, cannot be met; the latter are named by their
        position.
    SolverError
        If the solver fails.

    Examples
    --------
    >>> import fluidsched as fs
    >>> types = [fs.RequestType("short", 40.0, 500, 100), fs.RequestType("long", 40.0, 2000, 100)]
    >>> workload, server = fs.Workload(types), fs.catalog.server("a100", "llama-2-7b")
    >>> [solve_fair(workload, server, a).admitted_rate.round(2).tolist() for a in (1.0, float("inf"))]
    [[9.73, 2.64], [4.15, 4.15]]
    """
    alpha = check_real("alpha", alpha, minimum=0.0, allow_inf=True)
    model = build_model(
        workload,
        server,
        fairness_floor=fairness_floor,
        max_iteration_time=max_iteration_time,
        chunk_tokens=chunk_tokens,
    )
    weights = np.array(weight, dtype=np.float64)
    if weights.ndim == 0:
        weights = np.full(len(workload), weights)
    if weights.shape != (len(workload),):
        raise InputError("weight", f"shape {weights.shape}", f"have one number per type, {len(workload)}")
    for name, value in zip(workload.type_names, weights.tolist(), strict=True):
        check_real(f"weight of type {name!r}", value, above=0.0)
    model.check_floors(workload.arrival_rate)
    if math.isinf(alpha):
        if constraints is not None:
            raise InputError("constraints", constraints, "be left out with max-min fairness (alpha inf)")
        return FairSolution(model, alpha, weights, _filled(model, weights), None, None)
    return _alpha_fair(model, alpha, weights, constraints)


def _filled(model: FluidModel, weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Raise a_j = max(f_j λ_j, min(λ_j, ω_j t)) with t until nothing can grow."""
    rate, normals = model.workload.arrival_rate, model.halfspaces
    floor = model.fairness_floor * rate
    admitted = floor.copy()
    free = rate > floor
    level = 0.0
    while free.any():
        # Along one stretch of t the rates that grow are fixed; it ends at the next floor, demand or full half-space.
        growing = free & (weight * level >= floor * (1.0 - TOLERANCE))
        starts = floor[free & ~growing] / weight[free & ~growing]
        ends = rate[growing] / weight[growing]
        use = normals[:, growing] @ weight[growing]
        left = 1.0 - normals @ np.where(growing, weight * level, admitted)
        with np.errstate(divide="ignore", invalid="ignore"):
            until = np.where(use > 0.0, level + np.maximum(left, 0.0) / use, math.inf)
        level = float(min(starts.min(initial=math.inf), ends.min(initial=math.inf), until.min()))
        admitted[growing] = np.minimum(weight[growing] * level, rate[growing])
        full = until <= level * (1.0 + TOLERANCE)
        free &= admitted < rate * (1.0 - TOLERANCE)
        free &= ~((normals[full] > 0.0).any(axis=0))
    return np.minimum(admitted, rate)


def _alpha_fair(
    model: FluidModel,
    alpha: float,
    weight: NDArray[np.float64],
    constraints: Callable[[FluidVariables], Sequence[Any]] | None,
) -> FairSolution:
    cp = _cvxpy()
    rate = model.workload.arrival_rate
    offered = rate > 0.0
    if not offered.any():
        return FairSolution(model, alpha, weight, np.zeros_like(rate), None, None)
    floor = model.fairness_floor * rate
    unit = np.where(offered, np.minimum(rate, model.rate_alone), 1.0)
    fluid = fluid_variables(model)
    share = cp.multiply(1.0 / unit, fluid.admitted_rate)
    normals = model.halfspaces * unit
    region = normals @ share <= 1.0
    # U_α(unit·x) = unit^(1−α) U_α(x) up to a constant; the largest factor is put to 1.
    exponent = np.log(weight) + (1.0 - alpha) * np.log(unit)
    scaled = np.where(offered, np.exp(exponent - exponent[offered].max()), 0.0)
    chosen = np.flatnonzero(offered)
    if alpha == 0.0:
        utility = scaled[chosen] @ share[chosen]
    elif alpha == 1.0:
        utility = scaled[chosen] @ cp.log(share[chosen])
    else:
        utility = scaled[chosen] @ cp.power(share[chosen], 1.0 - alpha) / (1.0 - alpha)
    own = [] if constraints is None else list(constraints(fluid))
    # The half-spaces repeat the program's rows with u eliminated; their multipliers are the prices.
    demand = fluid.constraints[1:3] if not own else fluid.constraints
    problem = cp.Problem(cp.Maximize(utility), [region, *demand, *own])
    try:
        problem.solve(solver=cp.HIGHS if alpha == 0.0 else cp.CLARABEL)
    except cp.SolverError as error:
        raise SolverError(f"cvxpy could not solve the fair program: {error}") from None
    if problem.status in ("infeasible", "infeasible_inaccurate"):
        raise InfeasibleError(_contradiction(cp, [region, *fluid.constraints], own), "constraints")
    if problem.status != "optimal":
        raise SolverError(f"cvxpy ended with status {problem.status!r} on the fair program")
    admitted = np.where(offered, np.clip(fluid.admitted_rate.value, floor, rate), 0.0)
    # Back into the region where the interior point left it by its tolerance.
    admitted = np.maximum(admitted / max(float(model.load(admitted).max()), 1.0), floor)
    if own:
        return FairSolution(model, alpha, weight, admitted, None, None)
    multiplier = np.maximum(np.asarray(region.dual_value, dtype=np.float64), 0.0)
    certificate = _certificate(
        alpha, scaled, normals, multiplier, (floor / unit, rate / unit), admitted / unit
    )
    factor = math.exp(exponent[offered].max())
    return FairSolution(model, alpha, weight, admitted, multiplier @ normals / unit * factor, certificate)


def _certificate(
    alpha: float,
    weight: NDArray[np.float64],
    normals: NDArray[np.float64],
    multiplier: NDArray[np.float64],
    bounds: tuple[NDArray[np.float64], NDArray[np.float64]],
    share: NDArray[np.float64],
) -> Certificate:
    """Weak duality: each share maximises weight·U(x) − price·x within its bounds by itself."""
    low, high = bounds
    price = multiplier @ normals
    active = weight > 0.0
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        if alpha == 0.0:
            best = np.where(weight > price, high, low)
        else:
            best = np.clip((weight / price) ** (1.0 / alpha), low, high)
    terms = _utility(alpha, best[active]) - _utility(alpha, share[active])
    gap = float(weight[active] @ terms - price[active] @ (best - share)[active])
    gap += float(multiplier @ (1.0 - normals @ share))
    size = float(weight[active] @ np.abs(share[active] ** (1.0 - alpha)))
    primal = max(
        float((normals @ share).max()) - 1.0, float((share - high).max()), float((low - share).max()), 0.0
    )
    used = np.minimum(multiplier / max(float(multiplier.max()), 1e-300), 1.0 - normals @ share)
    return Certificate(primal, 0.0, max(float(used.max()), 0.0), abs(gap) / size, FAIR_TOLERANCE)


def _utility(alpha: float, rate: NDArray[np.float64]) -> NDArray[np.float64]:
    if alpha == 1.0:
        return np.log(rate)
    return np.asarray(rate ** (1.0 - alpha) / (1.0 - alpha))


def _cvxpy() -> Any:
    import cvxpy

    return cvxpy


def _contradiction(cp: Any, program: list[Any], own: list[Any]) -> str:
    """Name an irreducible set of the user's constraints that contradicts the program."""
    kept = list(range(len(own)))
    for position in list(kept):
        rest = [own[i] for i in kept if i != position]
        problem = cp.Problem(cp.Minimize(0.0), [*program, *rest])
        problem.solve(solver=cp.CLARABEL)
        if problem.status in ("infeasible", "infeasible_inaccurate"):
            kept.remove(position)
    named = "; ".join(f"constraints[{i}]: {own[i]}" for i in kept)
    return f"these constraints contradict the fluid program together: {named}. Drop or relax one of them."
