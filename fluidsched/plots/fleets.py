"""Fleets: who serves what, what it costs, how it was checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fluidsched.errors import InputError
from fluidsched.plots.frame import (
    COLOURS,
    SMALL,
    legend_above,
    new_axes,
    picture,
    plain_logarithms,
    second_scale,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fluidsched.fleets import VerifiedCapacity
    from fluidsched.fluid import (
        CapacityPlan,
        PoolsSolution,
    )


@picture
def routing(solution: PoolsSolution, *, ax: Axes | None = None) -> Axes:
    """Which pool serves how much of each type: one bar a pool, stacked by type, with its load written above.

    Parameters
    ----------
    solution : PoolsSolution
        From `fluid.solve_pools`, or the `routing` of a `CapacityPlan`; pools without replicas are left out.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    model = solution.model
    used = np.flatnonzero(model.replicas > 0.0)
    axes = new_axes(ax)
    place, below = np.arange(len(used)), np.zeros(len(used))
    names = model.workload.type_names
    busiest = np.argsort(-solution.routed_rate.sum(axis=0), kind="stable")
    shown = busiest[: len(COLOURS) - 1]
    parts = [(names[j], solution.routed_rate[used, j]) for j in shown.tolist()]
    if len(busiest) > len(shown):
        rest = busiest[len(shown) :]
        parts.append((f"{len(rest)} more types", solution.routed_rate[np.ix_(used, rest)].sum(axis=1)))
    for position, (name, rate) in enumerate(parts):
        colour = COLOURS[position] if position < len(shown) else "0.7"
        axes.bar(place, rate, 0.7, bottom=below, color=colour, label=name)
        below = below + rate
    for x, k in enumerate(used.tolist()):
        axes.annotate(
            f"load {solution.load[k]:.2f}",
            (x, below[x]),
            (0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=SMALL,
        )
    labels = [_pool_label(model.pools[k].name, model.pools[k].replicas) for k in used.tolist()]
    axes.set_xticks(place, labels)
    axes.set_ylabel("routed rate (req/s)")
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
    legend_above(axes)
    return axes


def _pool_label(name: str, replicas: float | None = None) -> str:
    """A pool's name broken into lines, at the commas of the catalog's long names."""
    from textwrap import fill

    lines = [fill(part.strip(), 24) for part in name.partition(" (")[0].split(",")]
    head = "" if replicas is None else f"{replicas:g} × "
    return head + "\n".join(lines)


@picture
def capacity_curve(plans: Sequence[CapacityPlan], *, ax: Axes | None = None) -> Axes:
    """Cost of the cheapest fleet against the load it carries, with the replicas of each server beneath.

    The cost is in the unit of the costs given.

    Parameters
    ----------
    plans : sequence of CapacityPlan
        For one set of servers at different loads, from `plan_capacity`; drawn by carried rate.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The axes of the replicas; the cost is drawn on a twin of it.

    Raises
    ------
    InputError
        If there are no plans, or their servers differ.
    """
    kinds = {tuple(pool.name for pool in plan.pools) for plan in plans}
    if len(kinds) != 1:
        raise InputError(
            "plans", f"{len(kinds)} sets of servers", "be for one set of servers, at least one plan"
        )
    (names,) = kinds
    ordered = sorted(plans, key=lambda plan: plan.workload.total_arrival_rate)
    load = np.array([plan.workload.total_arrival_rate for plan in ordered])
    replicas = np.array([plan.replicas for plan in ordered])
    axes = new_axes(ax)
    below = np.zeros(len(load))
    for position, name in enumerate(names):
        if replicas[:, position].any():
            above = below + replicas[:, position]
            axes.fill_between(
                load,
                below,
                above,
                step="pre",
                lw=0,
                alpha=0.45,
                color=COLOURS[position % len(COLOURS)],
                label=_pool_label(name).replace("\n", " "),
            )
            below = above
    dear = second_scale(axes, "cost of the fleet")
    dear.step(load, [plan.total_cost for plan in ordered], where="pre", color="black", label="cost (right)")
    dear.set_ylim(bottom=0.0)
    axes.set_xlabel("load carried (req/s)")
    axes.set_ylabel("replicas, shaded")
    axes.set_ylim(bottom=0.0)
    legend_above(axes, [*axes.get_legend_handles_labels()[0], *dear.get_legend_handles_labels()[0]])
    return axes


@picture
def fleet_checks(verified: VerifiedCapacity, *, ax: Axes | None = None) -> Axes:
    """What `verify_capacity` tried: each measure over its target, against the replicas of its pool.

    Below 1 a target is met. Bars reach from the lower to the upper limit of the check; one whose upper end is
    unknown, because requests were still waiting, ends in an arrow. Filled: the confirmation.

    Parameters
    ----------
    verified : VerifiedCapacity
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    from matplotlib.ticker import MaxNLocator

    axes = new_axes(ax)
    series = list(dict.fromkeys((check.pool, check.measure) for check in verified.checks))
    several = len({pool for pool, _ in series}) > 1
    for position, (pool, measure) in enumerate(series):
        checks = sorted(
            (
                c
                for c in verified.checks
                if (c.pool, c.measure) == (pool, measure) and not np.isnan(c.estimate)
            ),
            key=lambda c: c.replicas,
        )
        if not checks:
            continue
        colour = COLOURS[position % len(COLOURS)]
        shift = 0.06 * (position - (len(series) - 1) / 2)
        label = f"{measure} ≤ {checks[0].target:g} s" + (
            f", {_pool_label(pool)}".replace("\n", " ") if several else ""
        )
        axes.plot([], [], "o", color=colour, label=label)
        for check in checks:
            x, y = check.replicas + shift, check.estimate / check.target
            high = check.high / check.target
            low = max(check.low / check.target, y / 10.0)
            axes.plot([x, x], [low, high if np.isfinite(high) else y], color=colour, lw=1.2)
            if not np.isfinite(high):
                axes.annotate("", (x, 1.6 * y), (x, y), arrowprops={"arrowstyle": "->", "color": colour})
            fill = colour if check.step == "confirmation" else "white"
            axes.plot(x, y, "o", ms=5, color=colour, markerfacecolor=fill)
    axes.axhline(1.0, color="black", lw=0.8, ls=":")
    plain_logarithms(axes, "y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("replicas of the pool")
    axes.set_ylabel("measure / target")
    legend_above(axes)
    return axes
