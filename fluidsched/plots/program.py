"""The fluid program: its region, what it admits, how it shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidsched.errors import InputError
from fluidsched.plots.frame import COLOURS, legend_above, look, new_axes, picture, second_scale, type_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fluidsched.fluid import (
        FairSolution,
        FluidSolution,
        RateSweep,
        StabilityRegion,
        TransientSolution,
    )


@picture
def stability_boundary(
    region: StabilityRegion, first: str, second: str, *, others: Any = None, ax: Axes | None = None
) -> Axes:
    """Offered rates of two types that the server can carry, shaded up to the exact boundary.

    Parameters
    ----------
    region : StabilityRegion
        From `stability_region`.
    first, second : str
        Types on the horizontal and the vertical axis.
    others : array_like of shape (J,), optional
        Rates of the other types, req/s; default 0.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    outline = region.boundary(first, second, others)
    axes = new_axes(ax)
    axes.fill(*np.vstack([outline, [0.0, 0.0]]).T, color=COLOURS[0], alpha=0.2, lw=0)
    axes.plot(*outline.T, color=COLOURS[0], marker=".")
    axes.set_xlabel(f"{first} (req/s)")
    axes.set_ylabel(f"{second} (req/s)")
    axes.set_xlim(left=0.0)
    axes.set_ylim(bottom=0.0)
    return axes


@picture
def rate_sweep(sweep: RateSweep, *, ax: Axes | None = None) -> Axes:
    """Admitted rate of each type along a line of offered rates, exact between the marks at its breakpoints.

    Parameters
    ----------
    sweep : RateSweep
        From `fluid.sweep_load` or `fluid.sweep_rates`.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    axes = new_axes(ax)
    names = sweep.solutions[0].model.workload.type_names
    for position, name in enumerate(names):
        axes.plot(
            sweep.parameter, sweep.admitted_rate[:, position], ".", ls="", color=look(position)["color"]
        )
        axes.plot(sweep.parameter, sweep.admitted_rate[:, position], label=name, **look(position))
    is_load = sweep.parameter_name == "load"
    if is_load:
        axes.axvline(1.0, color="black", lw=0.8, ls=":")
    axes.set_xlabel("load (1: the fluid boundary)" if is_load else "position on the line of offered rates")
    axes.set_ylabel("admitted rate (req/s)")
    axes.set_ylim(bottom=0.0)
    legend_above(axes)
    return axes


@picture
def fair_shares(solutions: Sequence[FairSolution], *, ax: Axes | None = None) -> Axes:
    """Admitted rates by type, one bar for each degree of fairness, inside the offered rate's outline.

    Parameters
    ----------
    solutions : sequence of FairSolution
        Of one workload, with different α or weights.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If there is no solution, or the types differ.
    """
    names = _common_types(solutions)
    axes = new_axes(ax)
    bars = {
        "α = ∞" if np.isinf(solution.alpha) else f"α = {solution.alpha:g}": solution.admitted_rate
        for solution in solutions
    }
    return _bars_in_outline(axes, names, solutions[0].fluid.arrival_rate, bars)


@picture
def admitted_rates(solution: FluidSolution, *, ax: Axes | None = None) -> Axes:
    """Admitted rate of each type inside the outline of its offered rate.

    Parameters
    ----------
    solution : FluidSolution
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    bars = {"admitted": solution.admitted_rate}
    return _bars_in_outline(new_axes(ax), solution.workload.type_names, solution.arrival_rate, bars)


def _common_types(solutions: Sequence[FairSolution]) -> tuple[str, ...]:
    """The types of the one workload that all solutions are of."""
    kinds = {solution.fluid.workload.type_names for solution in solutions}
    if len(kinds) != 1:
        raise InputError(
            "solutions", f"{len(kinds)} sets of types", "be of one workload, at least one solution"
        )
    (names,) = kinds
    return names


def _bars_in_outline(
    axes: Axes, names: Sequence[str], offered: NDArray[np.float64], bars: Mapping[str, NDArray[np.float64]]
) -> Axes:
    """Rates by type, one bar for each label, inside the outline of what is offered."""
    place, width = np.arange(len(names)), 0.8 / len(bars)
    axes.bar(place, offered, 0.86, fill=False, edgecolor="black", linewidth=0.8, label="offered")
    for position, (label, rate) in enumerate(bars.items()):
        left = place - 0.4 + (position + 0.5) * width
        axes.bar(left, rate, width, color=COLOURS[position % len(COLOURS)], label=label)
    type_ticks(axes, names)
    axes.set_ylabel("rate (req/s)")
    legend_above(axes)
    return axes


@picture
def fair_curve(solutions: Sequence[FairSolution], *, ax: Axes | None = None) -> Axes:
    """Share of each type against the degree of fairness α, on the scale α/(1 + α) that has room for infinity.

    Parameters
    ----------
    solutions : sequence of FairSolution
        Of one workload, with different α; drawn by α.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If there is no solution, or the types differ.
    """
    names = _common_types(solutions)
    ordered = sorted(solutions, key=lambda solution: solution.alpha)
    place = [1.0 if np.isinf(one.alpha) else one.alpha / (1.0 + one.alpha) for one in ordered]
    share = np.stack([solution.share for solution in ordered])
    axes = new_axes(ax)
    for position, name in enumerate(names):
        axes.plot(place, share[:, position], marker=".", label=name, **look(position))
    axes.set_xticks([0.0, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0], ["0", "½", "1", "2", "5", "∞"])
    axes.set_xlabel("degree of fairness α")
    axes.set_ylabel("share (per second)")
    axes.set_ylim(bottom=0.0)
    legend_above(axes)
    return axes


@picture
def transient(solution: TransientSolution, *, ax: Axes | None = None) -> Axes:
    """Offered, admitted and possible rates over time, with the backlog behind them on its own axis.

    The possible rate is what the period's replicas carry of the period's mix: backlog grows where the offered
    rate lies above it.

    Parameters
    ----------
    solution : TransientSolution
        A plan against demand that varies in time.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes of the rates; the backlog is drawn on a twin of it.
    """
    axes = new_axes(ax)
    unit, name = (3600.0, "h") if solution.time[-1] >= 7200.0 else (60.0, "min")
    time = solution.time / unit
    offered = solution.problem.arrival_rate.sum(axis=1)
    possible = np.divide(offered, solution.load, out=np.full_like(offered, np.nan), where=solution.load > 0.0)
    behind = second_scale(axes, "backlog, shaded (requests)")
    behind.fill_between(time, solution.backlog.sum(axis=1), color=COLOURS[5], alpha=0.3, lw=0)
    behind.set_ylim(bottom=0.0)
    behind.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    lines = {
        "offered": offered,
        "admitted": solution.admitted_rate.sum(axis=1),
        "possible": possible,
    }
    for position, (label, rate) in enumerate(lines.items()):
        axes.stairs(rate, time, baseline=None, label=label, **look(position))
    axes.set_xlabel(f"time ({name})")
    axes.set_ylabel("rate (req/s)")
    axes.set_ylim(bottom=0.0)
    legend_above(axes)
    return axes
