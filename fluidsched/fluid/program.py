"""Solving the fluid program: `solve_fluid` once, `FluidProgram` again and again.

HiGHS's dual simplex finds the optimal basis of a scaled copy of the program: rates in units of what the
server could carry of the type alone, u in units of 1/T(empty batch), each row divided by its capacity, so
that every coefficient lies in [0, 1] but for negative bases. From the basis the rates and the duals are
computed again in floating point, free of the solver's tolerances, and u is set to the largest value the
time rows allow.

Where rates change, one of the last few bases is often optimal again; HiGHS is then not called at all.

The basis must be optimal in floating point: values within bounds, rows met, signs of duals and
reduced rewards right, each relative to its own size. Where it is not (demand, rewards and uses many orders
of magnitude apart) the program is solved once more with columns in units of their demand. The solution's
certificate, in the original units, has the last word: where it fails the `status` says "imprecise".
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched.errors import InputError, SolverError
from fluidsched.fluid._highs import Basis, Simplex
from fluidsched.fluid.model import TOLERANCE, FluidModel, build_model
from fluidsched.fluid.solution import FluidSolution
from fluidsched.server import Server
from fluidsched.workload import Workload

__all__ = ["FluidProgram", "solve_fluid", "solve_model"]

_UP = 1.0 + TOLERANCE

#: Optimal bases kept between solves. Trying one costs a tenth of a solve by HiGHS.
_REMEMBERED = 6


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
    chunk_tokens : int, optional
        Prompts are prefilled in chunks of so many tokens, which keeps requests in the batch, and their KV
        in memory, for longer. The optimum then bounds what servers reach that chunk this way, not others.

    Raises
    ------
    InputError
        If an argument is wrong.
    InfeasibleError
        If `max_iteration_time` does not exceed the empty iteration's.

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
        chunk_tokens: int | None = None,
    ) -> None:
        self.model: FluidModel = build_model(
            workload,
            server,
            objective,
            fairness_floor=fairness_floor,
            max_iteration_time=max_iteration_time,
            chunk_tokens=chunk_tokens,
        )
        self._scaled = _Scaled(self.model, self.model.rate_alone)

    def __getstate__(self) -> dict[str, FluidModel]:
        """The model alone: a solver cannot be pickled, and is made again."""
        return {"model": self.model}

    def __setstate__(self, state: dict[str, FluidModel]) -> None:
        self.model = state["model"]
        self._scaled = _Scaled(self.model, self.model.rate_alone)

    def __repr__(self) -> str:
        workload, rows = self.model.workload, ", ".join(self.model.row_names)
        types = f"{len(workload.types)} type{'s' if len(workload.types) != 1 else ''}"
        return f"FluidProgram of {workload.name!r} on {self.model.server.name!r}: {types}, rows {rows}"

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
        if not (rate.min() >= 0.0 and rate.max() < np.inf):
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
    chunk_tokens: int | None = None,
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
        chunk_tokens=chunk_tokens,
    )
    return program.solve()


def solve_model(model: FluidModel, arrival_rate: NDArray[np.float64]) -> FluidSolution:
    """Solve an assembled program for offered rates of shape (J,), req/s; errors as `FluidProgram.solve`."""
    return _solve(model, _Scaled(model, model.rate_alone), arrival_rate)


def _solve(model: FluidModel, scaled: _Scaled, rate: NDArray[np.float64]) -> FluidSolution:
    if model.has_floors:
        model.check_floors(rate)
    solution, is_vertex_optimal = scaled.solve(rate)
    if not is_vertex_optimal:
        alone = model.rate_alone
        solution, _ = _Scaled(model, np.where(rate > 0.0, np.minimum(rate, alone), alone)).solve(rate)
    return solution


class _Scaled:
    """The program with columns in units of `unit` (req/s), u in units of 1/T(empty), rows per capacity."""

    def __init__(self, model: FluidModel, unit: NDArray[np.float64]) -> None:
        self._model = model
        self._unit = unit
        self._fastest = fastest = 1.0 / float(model.base.max())
        row_scale = np.where(model.limit > 0.0, 1.0, -model.rate_coefficient * fastest)
        matrix = np.column_stack([model.matrix * unit, model.rate_coefficient * fastest])
        self._matrix = matrix / row_scale[:, None]
        cost = model.reward * unit
        cost_scale = float(cost.max()) or 1.0
        self._cost = np.append(cost / cost_scale, 0.0)
        self._dual_unit = cost_scale / row_scale
        self._rounding = 1e-14 / float(model.base[model.base > 0.0].min())
        self._lower, self._upper = np.zeros(len(unit) + 1), np.ones(len(unit) + 1)
        # The rows keep u at most 1; a looser bound leaves the price of time on them, never on the bound.
        self._upper[-1] = 2.0
        self._lower[-1] = 1.0 / (model.max_iteration_time * fastest)
        # More than the type could use alone never binds; a hundredfold keeps the numbers small.
        self._never = 100.0 * model.rate_alone / unit
        self._simplex = Simplex(self._cost, self._matrix, model.limit)
        self._vertices: list[_Vertex] = []  # the last ones, most recently optimal first
        self._in_use = threading.Lock()

    def solve(self, rate: NDArray[np.float64]) -> tuple[FluidSolution, bool]:
        """Return the solution, and whether its basis is optimal in floating point, not only to the solver."""
        with self._in_use:  # bounds, basis and solver are shared by the threads that share the program
            return self._solve(rate)

    def _solve(self, rate: NDArray[np.float64]) -> tuple[FluidSolution, bool]:
        floor = self._model.fairness_floor * rate
        lower, upper = self._lower, self._upper
        np.divide(floor, self._unit, out=lower[:-1])
        np.minimum(rate / self._unit, self._never, out=upper[:-1])
        # Duals do not depend on the rates: where an earlier basis is feasible again it is optimal again.
        for vertex in self._vertices:
            value = vertex.value(lower, upper)
            if vertex.is_optimal(lower, upper, value):
                self._remember(vertex)
                return self._solution(vertex, value, rate, floor, 0), True
        status, basis = self._simplex.solve(lower, upper)
        if status != "optimal":
            raise SolverError(f"HiGHS ended with status {status!r} on the fluid program")
        vertex = _Vertex(basis, self._cost, self._matrix, self._model.limit)
        value = vertex.value(lower, upper)
        solution = self._solution(vertex, value, rate, floor, basis.iterations)
        is_optimal = vertex.is_optimal(lower, upper, value)
        if is_optimal:
            self._remember(vertex)
        return solution, is_optimal

    def _remember(self, vertex: _Vertex) -> None:
        others = [other for other in self._vertices if other is not vertex]
        self._vertices = [vertex, *others[: _REMEMBERED - 1]]

    def _solution(
        self,
        vertex: _Vertex,
        value: NDArray[np.float64],
        rate: NDArray[np.float64],
        floor: NDArray[np.float64],
        effort: int,
    ) -> FluidSolution:
        admitted = np.where(vertex.at_upper[:-1], rate, floor)
        for j in vertex.basic.tolist():
            if j < len(rate):
                admitted[j] = min(max(float(value[j] * self._unit[j]), float(floor[j])), float(rate[j]))
        # Where u is determined both agree up to the rounding of 1 − Σ a w, and the vertex's is the accurate one.
        speed, largest = float(value[-1]) * self._fastest, self._model.iteration_rate(admitted)
        return FluidSolution(
            model=self._model,
            arrival_rate=rate,
            admitted_rate=admitted,
            iteration_rate=largest if largest > speed + self._rounding else speed,
            row_dual=np.maximum(vertex.dual, 0.0) * self._dual_unit,
            effort=effort,
        )


class _Vertex:
    """A basis of max c·x, A x ≤ b, l ≤ x ≤ h with its duals, for any bounds l, h."""

    def __init__(
        self,
        basis: Basis,
        cost: NDArray[np.float64],
        matrix: NDArray[np.float64],
        limit: NDArray[np.float64],
    ) -> None:
        self.basic, self.at_upper = basis.basic, basis.at_upper
        self._matrix, self._limit = matrix, limit
        self._tight, self._tight_limit = matrix[basis.tight], limit[basis.tight]
        self._square = self._tight[:, basis.basic]
        self.dual = np.zeros(len(matrix))
        try:
            self.dual[basis.tight] = np.linalg.solve(self._square.T, cost[basis.basic])
        except np.linalg.LinAlgError:
            raise SolverError("the optimal basis of HiGHS is singular in floating point") from None
        price = self.dual @ matrix
        self._fair = np.where(self.at_upper, price <= cost * _UP, cost <= price * _UP)
        self._fair[self.basic] = True
        self._signs = bool(self.dual.min(initial=0.0) >= -TOLERANCE)

    def value(self, lower: NDArray[np.float64], upper: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the basic solution."""
        value = np.where(self.at_upper, upper, lower)
        value[self.basic] = 0.0
        value[self.basic] = np.linalg.solve(self._square, self._tight_limit - self._tight @ value)
        return value

    def is_optimal(
        self, lower: NDArray[np.float64], upper: NDArray[np.float64], value: NDArray[np.float64]
    ) -> bool:
        """Whether values lie within bounds, rows hold and no sign of a dual or reduced reward is wrong."""
        basic = value[self.basic] * _UP
        return bool(
            self._signs
            and (lower[self.basic] <= basic).all()
            and (value[self.basic] <= upper[self.basic] * _UP).all()
            and (self._matrix @ value <= self._limit + TOLERANCE).all()
            and (self._fair | (lower == upper)).all()
        )
