"""How the optimum moves: along a line of offered rates, and before a single number changes the answer.

*Along a line.* For offered rates λ(t) = λ₀ + t(λ₁ − λ₀), 0 ≤ t ≤ 1, only bounds of the program move,
linearly in t. Its value v(t) is then concave and piecewise linear, and between two breakpoints the
admitted rates are linear too. A solution at t gives v(t) and, from its duals, a slope

    v'(t) = Σ_j (λ₁ − λ₀)_j ( d_j⁺ − f_j d_j⁻ ),      d_j = reward − bid price.

Two tangents meet above the graph; solving where they meet either finds the graph there, which makes the
meeting point a breakpoint, or a new tangent (Eisner, Severance 1976). Every breakpoint is found, exactly,
by about two solves each.

*One number at a time.* HiGHS's ranging of the optimal basis: the interval in which one reward may lie
before the admitted rates change, and one offered rate before the bid prices change, everything else fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import highspy
import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched import _files
from fluidsched._checks import check_real
from fluidsched._display import Tabular
from fluidsched.errors import InputError, SolverError
from fluidsched.fluid._highs import run
from fluidsched.fluid.export import to_highs
from fluidsched.fluid.program import FluidProgram
from fluidsched.fluid.solution import FluidSolution

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["RateSweep", "ranging", "sweep_load", "sweep_rates"]

SCHEMA = "fluidsched.rate-sweep/1"

#: Relative difference in value below which a point lies on a line.
_ON_LINE = 1e-10


@dataclass(frozen=True, eq=False, repr=False)
class RateSweep(Tabular):
    """The optimum along a line of offered rates, exact between its K points.

    Attributes
    ----------
    parameter : ndarray of shape (K,)
        Ends and breakpoints, ascending: the load factor of `sweep_load`, or t of `sweep_rates`.
    solutions : tuple of FluidSolution
        At each of them.
    parameter_name : str
        "load" or "t".
    """

    parameter: NDArray[np.float64]
    solutions: tuple[FluidSolution, ...]
    parameter_name: str

    @cached_property
    def arrival_rate(self) -> NDArray[np.float64]:
        """Offered rates, shape (K, J), req/s."""
        return np.stack([solution.arrival_rate for solution in self.solutions])

    @cached_property
    def admitted_rate(self) -> NDArray[np.float64]:
        """Admitted rates, shape (K, J), req/s."""
        return np.stack([solution.admitted_rate for solution in self.solutions])

    @cached_property
    def objective_value(self) -> NDArray[np.float64]:
        """Optimal reward/s, shape (K,): concave, linear between the points."""
        return np.array([solution.objective_value for solution in self.solutions])

    def value_at(self, parameter: ArrayLike) -> NDArray[np.float64]:
        """Return the optimal reward/s anywhere between the ends, exactly, by interpolation."""
        wanted = np.asarray(parameter, dtype=np.float64)
        low, high = self.parameter[0], self.parameter[-1]
        if not np.all((wanted >= low) & (wanted <= high)):
            raise InputError("parameter", parameter, f"lie between {low:g} and {high:g}")
        return np.asarray(np.interp(wanted, self.parameter, self.objective_value))

    def to_frame(self) -> pd.DataFrame:
        """Return one row per point and type: rates in req/s, fraction, decision, bid price, value in reward/s."""
        import pandas as pd

        frames = []
        for parameter, solution in zip(self.parameter.tolist(), self.solutions, strict=True):
            frame = solution.to_frame()
            frame.insert(0, self.parameter_name, parameter)
            frame.insert(1, "objective_value", solution.objective_value)
            frame.insert(2, "iteration_time_s", solution.iteration_time)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, schema first: the points, with value, rates (K, J) and bid prices (K, J) there."""
        answer: dict[str, Any] = _files.to_jsonable(
            {
                "schema": SCHEMA,
                "types": list(self.solutions[0].model.workload.type_names),
                "parameter_name": self.parameter_name,
                "parameter": self.parameter,
                "objective_value": self.objective_value,
                "arrival_rate": self.arrival_rate,
                "admitted_rate": self.admitted_rate,
                "bid_price": [solution.bid_price for solution in self.solutions],
                "decision": [list(solution.decision) for solution in self.solutions],
            }
        )
        return answer

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw every type's admitted rate; see `fluidsched.plots.rate_sweep`."""
        from fluidsched import plots

        return plots.rate_sweep(self, ax=ax)

    def __repr__(self) -> str:
        lines = [f"RateSweep: {len(self.parameter)} points, linear between", "  at        value  changes"]
        before: tuple[str, ...] | None = None
        for parameter, solution in zip(self.parameter.tolist(), self.solutions, strict=True):
            decision = solution.decision
            if before is None:
                note = ""
            else:
                moved = zip(solution.model.workload.type_names, before, decision, strict=True)
                note = ", ".join(f"{name} {new}" for name, old, new in moved if new != old)
            lines.append(f"  {parameter:<9.6g} {solution.objective_value:<.6g}  {note}".rstrip())
            before = decision
        return "\n".join(lines)


def sweep_load(program: FluidProgram, largest: float = 2.0) -> RateSweep:
    """Return the optimum as the workload's mix grows from nothing to `largest` times its fluid boundary.

    Parameters
    ----------
    program : FluidProgram
        Workload and server.
    largest : float
        Largest load; 1 is the boundary up to which everything is admitted.

    Raises
    ------
    InputError
        If the workload has no demand or uses nothing.

    Examples
    --------
    >>> import fluidsched as fs
    >>> types = [fs.RequestType("chat", 1.0, 500, 100), fs.RequestType("long", 1.0, 4000, 100)]
    >>> server = fs.Server(100_000, fs.IterationTime.affine(0.01, 5e-5, 5e-5, 3e-7))
    >>> sweep = sweep_load(fs.FluidProgram(fs.Workload(types), server), largest=10.0)
    >>> [round(x, 3) for x in sweep.parameter.tolist()]  # all admitted, then "long" rationed, then refused
    [0.0, 1.0, 8.063, 10.0]
    """
    largest = check_real("largest", largest, above=0.0)
    rate = program.model.workload.arrival_rate
    load = float(program.model.load(rate).max())
    if load == 0.0:
        raise InputError("program", "a workload of load 0", "have demand that uses the server")
    points, solutions = _breakpoints(program, np.zeros_like(rate), rate * (largest / load))
    return RateSweep(points * largest, solutions, "load")


def sweep_rates(program: FluidProgram, start: ArrayLike, end: ArrayLike) -> RateSweep:
    """Return the optimum as the offered rates go from `start` (t = 0) to `end` (t = 1) in a straight line.

    Parameters
    ----------
    program : FluidProgram
        Types and server; its workload's own rates do not matter.
    start, end : array_like of shape (J,)
        Offered rates, req/s.

    Raises
    ------
    InputError
        If the rates are not finite and non-negative.
    InfeasibleError
        If the fairness floors cannot be met at an end.
    """
    ends = [program.solve(rate).arrival_rate for rate in (start, end)]
    points, solutions = _breakpoints(program, *ends)
    return RateSweep(points, solutions, "t")


def ranging(solution: FluidSolution) -> pd.DataFrame:
    """Return, per type, how far its reward and its offered rate may move alone before the basis changes.

    Parameters
    ----------
    solution : FluidSolution
        An optimum.

    Returns
    -------
    DataFrame
        One row per type: ``reward``, ``reward_low``, ``reward_high`` (admitted rates stay the same in
        between) and ``arrival_rate``, ``arrival_rate_low``, ``arrival_rate_high`` (bid prices stay the
        same in between).

    Raises
    ------
    SolverError
        If HiGHS cannot range the program, as where it is scaled too badly.
    """
    import pandas as pd

    model = solution.model
    highs = to_highs(model, solution.arrival_rate)
    run(highs)
    status, ranges = highs.getRanging()
    if status != highspy.HighsStatus.kOk or not ranges.valid:
        raise SolverError("HiGHS could not range the fluid program")
    types = len(model.workload)
    reward_low, reward_high, bound_low, bound_high = (
        np.array(record.value_)[:types] + 0.0
        for record in (ranges.col_cost_dn, ranges.col_cost_up, ranges.col_bound_dn, ranges.col_bound_up)
    )
    # HiGHS moves the bound a rate rests on: the demand of types admitted in full, the floor of refused ones.
    admitted = np.array([word in ("admitted", "no demand") for word in solution.decision])
    floor = model.fairness_floor
    with np.errstate(divide="ignore", invalid="ignore"):
        by_floor = np.where(floor > 0.0, bound_high / floor, np.inf)
    rationed = np.array([word == "rationed" for word in solution.decision])
    rate_low = np.select([admitted, rationed], [bound_low, solution.admitted_rate], 0.0)
    rate_high = np.select([admitted, rationed], [bound_high, np.inf], by_floor)
    return pd.DataFrame(
        {
            "type": model.workload.type_names,
            "reward": model.reward,
            "reward_low": reward_low,
            "reward_high": reward_high,
            "arrival_rate": solution.arrival_rate,
            "arrival_rate_low": rate_low,
            "arrival_rate_high": rate_high,
        }
    )


def _breakpoints(
    program: FluidProgram, start: NDArray[np.float64], end: NDArray[np.float64]
) -> tuple[NDArray[np.float64], tuple[FluidSolution, ...]]:
    """Ends and breakpoints of the value from `start` to `end`, with the solutions there."""
    direction = end - start
    solved: dict[float, FluidSolution] = {}

    def solve(t: float) -> FluidSolution:
        if t not in solved:
            solved[t] = program.solve(start + t * direction)
        return solved[t]

    def slope(t: float) -> float:
        reduced = solve(t).reward - solve(t).bid_price
        return float(direction @ np.where(reduced > 0.0, reduced, program.model.fairness_floor * reduced))

    scale = max(abs(solve(0.0).objective_value), abs(solve(1.0).objective_value), 1e-300)
    found = {0.0, 1.0}
    stack = [(0.0, 1.0)]
    while stack:
        a, b = stack.pop()
        value_a, value_b = solve(a).objective_value, solve(b).objective_value
        slope_a, slope_b = slope(a), slope(b)
        chord = value_b - value_a
        flat = _ON_LINE * scale
        # By concavity, a tangent through both ends is the graph between them.
        if slope_a * (b - a) - chord <= flat or chord - slope_b * (b - a) <= flat:
            continue
        middle = a + (chord - slope_b * (b - a)) / (slope_a - slope_b)
        if not a < middle < b:
            continue
        found.add(middle)
        tangent = value_a + slope_a * (middle - a)
        if tangent - solve(middle).objective_value > flat:
            stack += [(a, middle), (middle, b)]
    points = np.array(sorted(found))
    values = np.array([solve(t).objective_value for t in points.tolist()])
    keep = np.ones(len(points), dtype=bool)
    if len(points) > 2:
        left, right = points[:-2], points[2:]
        weight = (points[1:-1] - left) / (right - left)
        on_chord = (1.0 - weight) * values[:-2] + weight * values[2:]
        keep[1:-1] = values[1:-1] - on_chord > _ON_LINE * scale
    return points[keep], tuple(solve(t) for t in points[keep].tolist())
