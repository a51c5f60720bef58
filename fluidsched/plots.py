"""Figures: one function a picture, each taking `ax=None` and returning the Axes it drew on.

Colours are the Okabe-Ito set, told apart by readers with any common colour vision; policies also differ by line
style, so a figure survives a grey print. Units stand on every axis. Global Matplotlib settings are left alone:
the style applies inside `matplotlib.rc_context` while a figure is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidsched._checks import check_choice
from fluidsched.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.fleets import VerifiedCapacity
    from fluidsched.fluid import (
        CapacityPlan,
        FairSolution,
        FluidSolution,
        PoolsSolution,
        RateSweep,
        StabilityRegion,
        TransientSolution,
    )
    from fluidsched.policy import ReachCurve, WaitCurve
    from fluidsched.recommendation import Recommendation
    from fluidsched.server import Calibration
    from fluidsched.simulation import FluidTrajectory, SimulationResult

__all__ = [
    "COLOURS",
    "calibration",
    "capacity_curve",
    "fair_curve",
    "fair_shares",
    "fleet_checks",
    "gains",
    "kv_occupancy",
    "latency_distribution",
    "load_curve",
    "rate_sweep",
    "reach_curve",
    "routing",
    "stability_boundary",
    "style",
    "trajectory",
    "transient",
    "wait_curve",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1, 1, 1)), "-")

_LATENCIES = {
    "ttft": "time to first token (s)",
    "tpot": "time per output token (s)",
    "e2e": "end-to-end latency (s)",
}

_GAIN_NAMES = {
    "request_throughput": "throughput",
    "mean_ttft": "mean TTFT",
    "p99_ttft": "p99 TTFT",
    "mean_e2e": "mean E2E latency",
}

#: Axes made by others get the same legend: a framed one in their larger type can be wider than the figure.
_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8.0}

_REASON_MARKERS = {"rounding": "o", "tokens": "^", "batch": "s", "memory": "D", "time": "v", None: "*"}

_STYLE: dict[Any, Any] = {  # Matplotlib types its keys as one long literal
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.4,
    "figure.dpi": 110.0,
    "savefig.dpi": 160.0,
}


@contextmanager
def style() -> Iterator[None]:
    """Context in which new figures have the library's look; Matplotlib's own settings return afterwards."""
    import matplotlib as mpl

    interactive = mpl.is_interactive()
    try:
        with mpl.rc_context(_STYLE):
            try:
                yield
            finally:
                interactive = mpl.is_interactive()
    finally:  # a notebook's backend, loaded by the first figure, makes Matplotlib interactive, and must stay so
        mpl.interactive(interactive)


def _axes(ax: Axes | None, size: tuple[float, float] = (6.4, 3.6)) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot

    with style():
        _, new = pyplot.subplots(figsize=size, layout="constrained")
    return new


def _look(position: int) -> dict[str, Any]:
    return {"color": COLOURS[position % len(COLOURS)], "linestyle": LINES[position % len(LINES)]}


def kv_occupancy(
    runs: SimulationResult,
    *,
    policies: Sequence[str] | None = None,
    bound: FluidSolution | None = None,
    ax: Axes | None = None,
) -> Axes:
    """KV tokens held over time in the first replication, one line a policy, against the capacity C and M*.

    Parameters
    ----------
    runs : SimulationResult
        What happened; its decimated occupancy series are drawn.
    policies : sequence of str, optional
        Which policies, in drawing order; all by default.
    bound : FluidSolution, optional
        Adds the fluid equilibrium's resident KV, M*.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    axes = _axes(ax)
    for name in policies or runs.policies:
        series = runs.occupancy(name)
        axes.plot(series[:, 0], series[:, 1], label=name, alpha=0.85, **_look(runs.policies.index(name)))
    assert runs.server is not None  # a result that has occupancy series has its server
    capacity = runs.server.kv_capacity
    if np.isfinite(capacity):
        axes.axhline(capacity, color="black", linewidth=1.2, label=f"capacity C = {capacity:,.0f}")
    if bound is not None:
        label = f"fluid equilibrium M* = {bound.resident_kv:,.0f}"
        axes.axhline(bound.resident_kv, color="black", linewidth=1.2, linestyle=":", label=label)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("KV cache held (tokens)")
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, **_LEGEND)
    return axes


def latency_distribution(
    runs: SimulationResult,
    measure: str = "ttft",
    *,
    policies: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Empirical distribution of a latency after the warm-up, all replications pooled, one line a policy.

    Requests still without the event at the horizon are counted in the denominator, so a curve that ends below 1
    shows how many are missing; they are not dropped.

    Parameters
    ----------
    runs : SimulationResult
    measure : {"ttft", "tpot", "e2e"}
    policies : sequence of str, optional
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If `measure` is not one of the three.
    """
    check_choice("measure", measure, tuple(_LATENCIES))
    axes = _axes(ax)
    for name in policies or runs.policies:
        values, censored = runs.latencies(name, measure)
        total = values.size + censored
        if total == 0:
            continue
        # at most 2 000 points of the curve: a PNG shows no more
        grid = np.unique(np.linspace(0, values.size - 1, min(values.size, 2000)).astype(np.int64))
        ordered = np.sort(values)[grid] if values.size else values
        missing = f"{censored / total:.1%}" if censored >= 0.001 * total else "<0.1%"
        label = name if not censored else f"{name} ({missing} unfinished)"
        axes.step(ordered, (grid + 1) / total, where="post", label=label, **_look(runs.policies.index(name)))
    axes.set_xscale("log")
    axes.set_xlabel(_LATENCIES[measure])
    axes.set_ylabel("share of requests")
    axes.set_ylim(0.0, 1.02)
    if axes.get_legend_handles_labels()[0]:  # none where no request was measured
        axes.legend(loc="lower right", **_LEGEND)
    return axes


def load_curve(
    frame: pd.DataFrame,
    measure: str,
    *,
    ylabel: str,
    scale: str = "linear",
    critical_rate: float | None = None,
    reach: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A measure against the offered rate, one line a policy with 95 % intervals, the fluid boundary drawn.

    Hollow markers: the policy had fallen behind when a run ended, so a latency there is a lower bound.

    Parameters
    ----------
    frame : pandas.DataFrame
        Columns policy, measure, arrival_rate (req/s), estimate, low, high, behind.
    measure : str
        Which rows of the frame.
    ylabel : str
        Label of the vertical axis, with its unit.
    scale : {"linear", "log"}
        Of the vertical axis.
    critical_rate : float, optional
        The fluid boundary on this mix (req/s).
    reach : tuple of two floats, optional
        Rates (req/s) up to which the recommended policy keeps up, and from which it does not: shaded between.
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If the frame has no row of `measure`.
    """
    rows = frame[frame["measure"] == measure]
    if rows.empty:
        raise InputError("measure", measure, f"be one of {sorted(set(frame['measure']))}")
    axes = _axes(ax)
    for position, (name, line) in enumerate(rows.groupby("policy", sort=False)):
        ordered = line.sort_values("arrival_rate")
        look = _look(position)
        rate = ordered["arrival_rate"].to_numpy()
        estimate = ordered["estimate"].to_numpy()
        axes.plot(rate, estimate, label=str(name), **look)
        axes.fill_between(
            rate, ordered["low"].to_numpy(), ordered["high"].to_numpy(), color=look["color"], alpha=0.15, lw=0
        )
        hollow = ordered["behind"].to_numpy(dtype=bool)
        axes.plot(rate[~hollow], estimate[~hollow], "o", ms=3.5, color=look["color"])
        axes.plot(rate[hollow], estimate[hollow], "o", ms=4.5, mfc="white", color=look["color"])
    if rows["behind"].any():
        axes.plot([], [], "o", ms=4.5, mfc="white", color="black", label="behind: latency ≥")
    axes.set_yscale(scale)
    if scale == "log":  # an interval may reach below 0: the band then runs off the axis
        axes.set_ylim(bottom=0.6 * float(rows["estimate"].min()))
    if critical_rate is not None:
        axes.axvline(critical_rate, color="black", linewidth=1.0, linestyle=":")
        axes.annotate(
            f"fluid boundary {critical_rate:.2f} req/s",
            xy=(critical_rate, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            fontsize=8,
        )
    if reach is not None:
        axes.axvspan(*reach, color="black", alpha=0.10, lw=0, label="keeps up no further")
    axes.set_xlabel("offered rate (req/s)")
    axes.set_ylabel(ylabel)
    axes.legend(loc="upper left", **_LEGEND)
    return axes


def gains(recommendation: Recommendation, measure: str = "mean_ttft", *, ax: Axes | None = None) -> Axes:
    """What the recommended policy gains over the engines as they come, in per cent of theirs, against the load.

    Paired differences with 95 % intervals; above zero is better. Hollow markers: within noise.

    Parameters
    ----------
    recommendation : Recommendation
    measure : str
        One of those that gains are stated for: "request_throughput", "mean_ttft", "p99_ttft", "mean_e2e".
    ax : matplotlib.axes.Axes, optional

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If there is no gain in `measure`.
    """
    rows = [gain for gain in recommendation.gains if gain.measure == measure and gain.of_engine > 0.0]
    if not rows:
        known = sorted({gain.measure for gain in recommendation.gains})
        raise InputError("measure", measure, f"be one of {known}")
    axes = _axes(ax)
    for position, engine in enumerate(dict.fromkeys(gain.engine for gain in rows)):
        line = sorted((gain for gain in rows if gain.engine == engine), key=lambda gain: gain.load)
        look = _look(position)
        load = np.array([gain.load for gain in line])
        percent = np.array([[gain.gain, gain.low, gain.high] for gain in line])
        percent *= 100.0 / np.array([gain.of_engine for gain in line])[:, None]
        axes.plot(load, percent[:, 0], label=f"over {engine}", **look)
        if not np.isnan(percent[:, 1]).any():
            axes.fill_between(load, percent[:, 1], percent[:, 2], color=look["color"], alpha=0.15, lw=0)
        noise = np.array([gain.verdict == "within noise" for gain in line])
        axes.plot(load[~noise], percent[~noise, 0], "o", ms=3.5, color=look["color"])
        axes.plot(load[noise], percent[noise, 0], "o", ms=4.5, mfc="white", color=look["color"])
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.axvline(1.0, color="black", linewidth=1.0, linestyle=":")
    # a wide interval of one load must not flatten the others: the axis follows the estimates, bands may run off
    shown = np.array([100.0 * gain.gain / gain.of_engine for gain in rows])
    room = max(0.25 * float(np.ptp(shown)), 1.0)
    axes.set_ylim(min(float(shown.min()), 0.0) - room, max(float(shown.max()), 0.0) + room)
    axes.set_xlabel("load (share of the fluid boundary)")
    axes.set_ylabel(f"gain in {_GAIN_NAMES.get(measure, measure)} (%)")
    axes.legend(loc="best", **_LEGEND)
    return axes


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
    axes = _axes(ax)
    unit, name = (3600.0, "h") if solution.time[-1] >= 7200.0 else (60.0, "min")
    time = solution.time / unit
    offered = solution.problem.arrival_rate.sum(axis=1)
    possible = np.divide(offered, solution.load, out=np.full_like(offered, np.nan), where=solution.load > 0.0)
    with style():
        behind = axes.twinx()
        behind.set_ylabel("backlog, shaded (requests)")
    behind.fill_between(time, solution.backlog.sum(axis=1), color=COLOURS[5], alpha=0.3, lw=0)
    behind.set_ylim(bottom=0.0)
    behind.yaxis.set_major_formatter("{x:,.0f}")
    behind.grid(visible=False)
    behind.spines["right"].set_visible(True)
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    lines = {
        "offered": offered,
        "admitted": solution.admitted_rate.sum(axis=1),
        "possible": possible,
    }
    for position, (label, rate) in enumerate(lines.items()):
        axes.stairs(rate, time, baseline=None, label=label, **_look(position))
    axes.set_xlabel(f"time ({name})")
    axes.set_ylabel("rate (req/s)")
    axes.set_ylim(bottom=0.0)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, **_LEGEND)
    return axes


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
    kinds = {solution.fluid.workload.type_names for solution in solutions}
    if len(kinds) != 1:
        raise InputError(
            "solutions", f"{len(kinds)} sets of types", "be of one workload, at least one solution"
        )
    (names,) = kinds
    axes = _axes(ax)
    place, width = np.arange(len(names)), 0.8 / len(solutions)
    offered = solutions[0].fluid.arrival_rate
    axes.bar(place, offered, 0.86, fill=False, edgecolor="black", linewidth=0.8, label="offered")
    for position, solution in enumerate(solutions):
        alpha = "∞" if np.isinf(solution.alpha) else f"{solution.alpha:g}"
        left = place - 0.4 + (position + 0.5) * width
        colour = COLOURS[position % len(COLOURS)]
        axes.bar(left, solution.admitted_rate, width, color=colour, label=f"α = {alpha}")
    axes.set_xticks(
        place, names, rotation=45 if len(names) > 4 else 0, ha="right" if len(names) > 4 else "center"
    )
    axes.set_ylabel("rate (req/s)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=6, **_LEGEND)
    return axes


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
    kinds = {solution.fluid.workload.type_names for solution in solutions}
    if len(kinds) != 1:
        raise InputError(
            "solutions", f"{len(kinds)} sets of types", "be of one workload, at least one solution"
        )
    (names,) = kinds
    ordered = sorted(solutions, key=lambda solution: solution.alpha)
    place = [1.0 if np.isinf(one.alpha) else one.alpha / (1.0 + one.alpha) for one in ordered]
    share = np.stack([solution.share for solution in ordered])
    axes = _axes(ax)
    for position, name in enumerate(names):
        axes.plot(place, share[:, position], marker=".", label=name, **_look(position))
    axes.set_xticks([0.0, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1.0], ["0", "½", "1", "2", "5", "∞"])
    axes.set_xlabel("degree of fairness α (0: total, 1: proportional, ∞: max-min)")
    axes.set_ylabel("share (per second)")
    axes.set_ylim(bottom=0.0)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, **_LEGEND)
    return axes


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
    axes = _axes(ax)
    place, below = np.arange(len(used)), np.zeros(len(used))
    names = model.workload.type_names
    busiest = np.argsort(-solution.routed_rate.sum(axis=0), kind="stable")
    shown = busiest[: len(COLOURS) - 1]
    parts = [(names[j], solution.routed_rate[used, j]) for j in shown.tolist()]
    if len(busiest) > len(shown):
        rest = busiest[len(shown) :]
        parts.append((f"{len(rest)} more types", solution.routed_rate[np.ix_(used, rest)].sum(axis=1)))
    for position, (name, rate) in enumerate(parts):
        axes.bar(place, rate, 0.7, bottom=below, color=COLOURS[position % len(COLOURS)], label=name)
        below = below + rate
    for x, k in enumerate(used.tolist()):
        axes.annotate(
            f"load {solution.load[k]:.2f}",
            (x, below[x]),
            (0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )
    labels = [_pool_label(model.pools[k].name, model.pools[k].replicas) for k in used.tolist()]
    axes.set_xticks(place, labels)
    axes.set_ylabel("routed rate (req/s)")
    axes.margins(y=0.12)
    axes.grid(visible=False, axis="x")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, **_LEGEND)
    return axes


def _pool_label(name: str, replicas: float | None = None) -> str:
    """A pool's name broken into lines, at the commas of the catalog's long names."""
    from textwrap import fill

    lines = [fill(part.strip(), 24) for part in name.partition(" (")[0].split(",")]
    head = "" if replicas is None else f"{replicas:g} × "
    return head + "\n".join(lines)


def capacity_curve(plans: Sequence[CapacityPlan], *, ax: Axes | None = None) -> Axes:
    """Cost of the cheapest fleet against the load it carries, with the replicas of each server beneath.

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
    axes = _axes(ax)
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
    with style():
        dear = axes.twinx()
    dear.step(load, [plan.total_cost for plan in ordered], where="pre", color="black", label="cost (right)")
    dear.set_ylim(bottom=0.0)
    dear.set_ylabel("cost of the fleet (unit of the costs given)")
    dear.grid(visible=False)
    dear.spines["right"].set_visible(True)
    axes.set_xlabel("load carried (req/s)")
    axes.set_ylabel("replicas, shaded")
    axes.set_ylim(bottom=0.0)
    handles, labels = axes.get_legend_handles_labels()
    more, names_more = dear.get_legend_handles_labels()
    axes.legend(
        [*handles, *more],
        [*labels, *names_more],
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
        **_LEGEND,
    )
    return axes


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

    axes = _axes(ax)
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
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("replicas of the pool")
    axes.set_ylabel("measure / target")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=1 if several else 2, **_LEGEND)
    return axes


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
    axes = _axes(ax)
    names = sweep.solutions[0].model.workload.type_names
    for position, name in enumerate(names):
        axes.plot(
            sweep.parameter, sweep.admitted_rate[:, position], ".", ls="", color=_look(position)["color"]
        )
        axes.plot(sweep.parameter, sweep.admitted_rate[:, position], label=name, **_look(position))
    is_load = sweep.parameter_name == "load"
    if is_load:
        axes.axvline(1.0, color="black", lw=0.8, ls=":")
    axes.set_xlabel("load (1: the fluid boundary)" if is_load else "position on the line of offered rates")
    axes.set_ylabel("admitted rate (req/s)")
    axes.set_ylim(bottom=0.0)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, **_LEGEND)
    return axes


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
    axes = _axes(ax)
    axes.fill(*np.vstack([outline, [0.0, 0.0]]).T, color=COLOURS[0], alpha=0.2, lw=0)
    axes.plot(*outline.T, color=COLOURS[0], marker=".")
    axes.set_xlabel(f"{first} (req/s)")
    axes.set_ylabel(f"{second} (req/s)")
    axes.set_xlim(left=0.0)
    axes.set_ylim(bottom=0.0)
    return axes


def calibration(fitted: Calibration, *, ax: Axes | None = None) -> Axes:
    """Measured iteration times against fitted ones, by what the batch did; exact fits lie on the diagonal.

    Hollow markers: points the fit did not use.

    Parameters
    ----------
    fitted : Calibration
        From `calibrate`.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    axes = _axes(ax, (4.6, 4.2))
    points, predicted = fitted.points, fitted.predicted
    decodes = points.decode_tokens == points.batch_tokens
    prefills = points.decode_tokens == 0
    kinds = (("decode", decodes, "o"), ("prefill", prefills, "s"), ("mixed", ~decodes & ~prefills, "^"))
    for position, (label, kind, marker) in enumerate(kinds):
        for used, face in ((fitted.is_fitted, COLOURS[position]), (~fitted.is_fitted, "none")):
            shown = kind & used
            if shown.any():
                name = label if face != "none" else f"{label} (not fitted)"
                axes.scatter(
                    predicted[shown],
                    points.time[shown],
                    s=14,
                    marker=marker,
                    facecolors=face,
                    edgecolors=COLOURS[position],
                    linewidths=0.8,
                    label=name,
                )
    ends = [min(predicted.min(), points.time.min()), max(predicted.max(), points.time.max())]
    axes.plot(ends, ends, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("fitted iteration time (s)")
    axes.set_ylabel("measured iteration time (s)")
    axes.set_title(
        f"{fitted.form}: mean error {fitted.mean_error:.1%}, largest {fitted.largest_error:.1%}", fontsize=9
    )
    axes.legend(loc="upper left")
    return axes


def trajectory(run: FluidTrajectory, *, capacity: float | None = None, ax: Axes | None = None) -> Axes:
    """KV tokens that a fluid holds over time, iteration by iteration, with the verdict as title.

    Parameters
    ----------
    run : FluidTrajectory
    capacity : float, optional
        Adds a line at the KV capacity C, tokens.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    axes = _axes(ax)
    axes.step(run.time_s, run.resident_kv, where="post", label=run.policy, **_look(0))
    if capacity is not None:
        axes.axhline(capacity, color="black", linewidth=1.2, label=f"capacity C = {capacity:,.0f}")
    axes.set_title(run.verdict)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("KV cache held (tokens)")
    axes.set_ylim(bottom=0.0)
    axes.legend(loc="lower right")
    return axes


def wait_curve(curve: WaitCurve, *, ax: Axes | None = None) -> Axes:
    """Memory that a WAIT table needs, and the wait it adds, against the iterations per block.

    Lines break where no table exists.

    Parameters
    ----------
    curve : WaitCurve
        From `fluidsched.policy.wait_curve`.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
        The left one; the right one shares its horizontal axis.
    """
    axes = _axes(ax)
    blocks = curve.block_iterations
    [memory] = axes.plot(blocks, curve.kv, label="KV memory bound (left)", marker=".", **_look(0))
    handles = [memory]
    if np.isfinite(curve.capacity):
        name = f"capacity C = {curve.capacity:,.0f}"
        handles.append(axes.axhline(curve.capacity, color="black", linewidth=1.2, linestyle=":", label=name))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("block length k (iterations)")
    axes.set_ylabel("KV cache bound (tokens)")
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    right.grid(visible=False)
    handles += right.plot(blocks, curve.wait, label="mean wait (right)", marker=".", **_look(1))
    right.set_ylabel("mean wait until admission (s)")
    right.set_ylim(bottom=0.0)
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, **_LEGEND)
    return axes


def reach_curve(curve: ReachCurve, *, ax: Axes | None = None) -> Axes:
    """Largest share of the fluid boundary at which a table exists against the number of request types.

    One line a kind of table; the markers say what forbids a table above.

    Parameters
    ----------
    curve : ReachCurve
        From `fluidsched.policy.reach_curve`.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    axes = _axes(ax)
    for position, kind in enumerate(dict.fromkeys(curve.kind)):
        lines = [i for i, name in enumerate(curve.kind) if name == kind]
        look = _look(position)
        axes.plot(curve.types[lines], curve.share[lines], label=kind, **look)
        for i in lines:
            marker = _REASON_MARKERS[curve.reason[i]]
            axes.plot(curve.types[i], curve.share[i], marker=marker, markersize=5, color=look["color"])
    for reason, marker in _REASON_MARKERS.items():
        if reason in curve.reason:
            name = f"ends by {reason}" if reason else "up to the boundary"
            axes.plot([], [], color="0.3", marker=marker, markersize=5, linestyle="none", label=name)
    axes.set_xscale("log")
    numbers = sorted(set(curve.types.tolist()))
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel("request types")
    axes.set_ylabel("largest share of the fluid boundary")
    low = float(curve.share.min())
    axes.set_ylim(max(0.0, low - 0.15 * (1.02 - low)), 1.02)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, **_LEGEND)
    return axes
