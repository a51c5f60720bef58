"""Solving the fluid program: `solve_fluid` once, `FluidProgram` again and again.

HiGHS's dual simplex finds the optimal basis of a scaled copy of the program: rates in units of what the
server could carry of the type alone, u in units of 1/T(empty batch), each row divided by its capacity, so
that every coefficient lies in [0, 1] but for negative bases. From the basis the rates and the duals are
computed again in floating point, free of the solver's tolerances, and u is set to the largest value the
time rows allow. The answer is accepted when its certificate holds in the original units. If it does not
(demand and rewards many orders of magnitude apart), the program is solved once more with columns scaled by
demand; if that fails too the solution's `status` says "imprecise".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched.errors import InputError, SolverError
from fluidsched.fluid._highs import Basis, Simplex
from fluidsched.fluid.model import FluidModel, build_model
from fluidsched.fluid.solution import FluidSolution
from fluidsched.server import Server
from fluidsched.workload import Workload

__all__ = ["FluidProgram", "solve_fluid"]


class FluidProgram:
    """The fluid program of a workload on a server, for many solves with changing rates.

    Parameters
    ----------
    workload : Workload
        J request types with their offered rates.
    server : Server
        With a piecewise-affine iteration time.
    objective : {"requests", "output_tokens", "total_tokens"} or array_like of shape (J,)
        What to maximise, per second; an array is the reward of one request of each type, non-negative.
    fairness_floor : float or array_like of shape (J,), optional
        Fractions f_j of every type's demand that must be admitted, in [0, 1].
    max_iteration_time : float, optional
        Upper limit on the mean iteration time, s: decodes then get a token at least that often on average.

    Raises
    ------
    InputError
        If an argument is wrong; `max_iteration_time` must exceed the empty batch's.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 12.0, prompt_tokens=512, output_tokens=21)])
    >>> server = fs.Server(137_000, fs.IterationTime.paper(d0=0.01, d1=3.3e-7))
    >>> program = fs.FluidProgram(workload, server)
    >>> program.solve().is_stable, program.solve([500.0]).is_stable
    (True, False)
    """

    def __init__(
        self,
        workload: Workload,
        server: Server,
        objective: str | ArrayLike = "requests",
        *,
        fairness_floor: ArrayLike | None = None,
        max_iteration_time: float | None = None,
    ) -> None:
        self.model: FluidModel = build_model(
            workload,
            server,
            objective,
            fairness_floor=fairness_floor,
            max_iteration_time=max_iteration_time,
        )
        self._scaled = _Scaled(self.model, self.model.rate_alone)

    def solve(self, arrival_rate: ArrayLike | None = None) -> FluidSolution:
        """Solve for the workload's rates, or for others; starts from the last solve's basis.

        Parameters
        ----------
        arrival_rate : array_like of shape (J,), optional
            Offered rates, req/s.

        Raises
        ------
        InputError
            If the rates are not finite and non-negative.
        InfeasibleError
            If the fairness floors cannot be met.
        SolverError
            If HiGHS fails.
        """
        rate = self._checked(arrival_rate)
        return _solve(self.model, self._scaled, rate)

    def _checked(self, arrival_rate: ArrayLike | None) -> NDArray[np.float64]:
        workload = self.model.workload
        if arrival_rate is None:
            return workload.arrival_rate
        rate = np.array(arrival_rate, dtype=np.float64)
        if rate.shape != (len(workload),):
            raise InputError(
                "arrival_rate", f"shape {rate.shape}", f"have one rate per type, {len(workload)}"
            )
        if not (np.isfinite(rate).all() and (rate >= 0.0).all()):
            worst = int(np.argmin(np.isfinite(rate) & (rate >= 0.0)))
            raise InputError(
                f"arrival_rate of type {workload.type_names[worst]!r}",
                float(rate[worst]),
                "be finite and non-negative",
            )
        rate.setflags(write=False)
        return rate


def solve_fluid(
    workload: Workload,
    server: Server,
    objective: str | ArrayLike = "requests",
    *,
    fairness_floor: ArrayLike | None = None,
    max_iteration_time: float | None = None,
) -> FluidSolution:
    """Solve the fluid program once; arguments and errors as for `FluidProgram`.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 12.0, prompt_tokens=512, output_tokens=21)])
    >>> fluid = fs.solve_fluid(workload, fs.Server(137_000, fs.IterationTime.paper(d0=0.01, d1=3.3e-7)))
    >>> fluid.is_stable, round(fluid.resident_kv)
    (True, 1375)
    """
    program = FluidProgram(
        workload,
        server,
        objective,
        fairness_floor=fairness_floor,
        max_iteration_time=max_iteration_time,
    )
    return program.solve()


def solve_model(model: FluidModel, arrival_rate: NDArray[np.float64]) -> FluidSolution:
    """Solve an assembled program for offered rates of shape (J,), req/s; errors as `FluidProgram.solve`."""
    return _solve(model, _Scaled(model, model.rate_alone), arrival_rate)


def _solve(model: FluidModel, scaled: _Scaled, rate: NDArray[np.float64]) -> FluidSolution:
    if model.fairness_floor.any():
        model.check_floors(rate)
    solution = scaled.solve(rate)
    if solution.certificate.ok:
        return solution
    alone = model.rate_alone
    again = _Scaled(model, np.where(rate > 0.0, np.minimum(rate, alone), alone)).solve(rate)
    return again if again.certificate.ok else solution.as_imprecise()


class _Scaled:
    """The program with columns in units of `unit` (req/s), u in units of 1/T(empty), rows per capacity."""

    def __init__(self, model: FluidModel, unit: NDArray[np.float64]) -> None:
        self._model = model
        self._unit = unit
        self._fastest = fastest = 1.0 / float(model.base.max())
        self._row_scale = np.where(model.limit > 0.0, 1.0, -model.rate_coefficient * fastest)
        matrix = np.column_stack([model.matrix * unit, model.rate_coefficient * fastest])
        self._matrix = matrix / self._row_scale[:, None]
        cost = model.reward * unit
        self._cost_scale = float(cost.max()) or 1.0
        self._cost = np.append(cost / self._cost_scale, 0.0)
        self._lower = np.zeros(len(unit) + 1)
        self._upper = np.ones(len(unit) + 1)
        self._lower[-1] = 1.0 / (model.max_iteration_time * fastest)
        # More than the type could use alone never binds; a hundredfold keeps the numbers small.
        self._never = 100.0 * model.rate_alone / unit
        self._simplex = Simplex(self._cost, self._matrix, model.limit)

    def solve(self, rate: NDArray[np.float64]) -> FluidSolution:
        model = self._model
        floor = model.fairness_floor * rate
        self._lower[:-1] = floor / self._unit
        self._upper[:-1] = np.minimum(rate / self._unit, self._never)
        status, basis = self._simplex.solve(self._lower, self._upper)
        if status != "optimal":
            raise SolverError(f"HiGHS ended with status {status!r} on the fluid program")
        value, dual = self._vertex(basis)
        admitted = np.where(basis.at_upper[:-1], rate, floor)
        rationed = basis.basic[basis.basic < len(rate)]
        admitted[rationed] = np.clip(value[rationed] * self._unit[rationed], floor[rationed], rate[rationed])
        return FluidSolution(
            model=model,
            arrival_rate=rate,
            admitted_rate=admitted,
            # Equal up to rounding where u is determined; the vertex's is then the more accurate one.
            iteration_rate=max(model.iteration_rate(admitted), float(value[-1]) * self._fastest),
            row_dual=np.maximum(dual, 0.0) * self._cost_scale / self._row_scale,
            status="optimal",
            effort=basis.iterations,
        )

    def _vertex(self, basis: Basis) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the basic solution and the duals of a basis, scaled."""
        value = np.where(basis.at_upper, self._upper, self._lower)
        value[basis.basic] = 0.0
        tight = self._matrix[basis.tight]
        square = tight[:, basis.basic]
        dual = np.zeros(len(self._matrix))
        value[basis.basic] = np.linalg.solve(square, self._model.limit[basis.tight] - tight @ value)
        dual[basis.tight] = np.linalg.solve(square.T, self._cost[basis.basic])
        return value, dual
