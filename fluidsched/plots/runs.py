"""Simulated runs: memory, latencies, policies along the load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fluidsched._checks import check_choice
from fluidsched.errors import InputError
from fluidsched.plots.frame import (
    COLOURS,
    COLUMN,
    SMALL,
    legend_above,
    legend_inside,
    look,
    new_axes,
    picture,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.comparison import Comparison
    from fluidsched.fluid import (
        FluidSolution,
    )
    from fluidsched.recommendation import Recommendation
    from fluidsched.simulation import FluidTrajectory, PolicyTimeline, SimulationResult


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


@picture
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
    axes = new_axes(ax)
    for name in policies or runs.policies:
        series = runs.occupancy(name)
        axes.plot(series[:, 0], series[:, 1], label=name, alpha=0.85, **look(runs.policies.index(name)))
    assert runs.server is not None  # a result that has occupancy series has its server
    capacity = runs.server.kv_capacity
    if np.isfinite(capacity):
        axes.axhline(capacity, color="black", linewidth=1.2, label="capacity C")
    if bound is not None:
        axes.axhline(
            bound.resident_kv, color="black", linewidth=1.2, linestyle=":", label="fluid equilibrium M*"
        )
    axes.set_xlabel("time (s)")
    axes.set_ylabel("KV cache held (tokens)")
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    legend_above(axes)
    return axes


@picture
def latency_distribution(
    runs: SimulationResult,
    measure: str = "ttft",
    *,
    policies: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Empirical distribution of a latency after the warm-up, all replications pooled, one line a policy.

    The band is the 95 % interval of the share at each latency, from the replications (those whose records were kept);
    there is none with one replication. Requests still without the event at the horizon are counted in the denominator,
    so a curve that ends below 1 shows how many are missing (the legend says so from 0.1 % on); they are not dropped.

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
    from scipy.special import stdtrit

    check_choice("measure", measure, tuple(_LATENCIES))
    axes = new_axes(ax)
    for name in policies or runs.policies:
        parts = [runs.latencies(name, measure, replication) for replication in range(len(runs.paths))]
        values = np.sort(np.concatenate([observed for observed, _ in parts]))
        censored = sum(missing for _, missing in parts)
        total = values.size + censored
        if total == 0:
            continue
        line = look(runs.policies.index(name))
        # at most 2 000 points of the curve: a PNG shows no more
        grid = np.unique(np.linspace(0, values.size - 1, min(values.size, 2000)).astype(np.int64))
        ordered = values[grid] if values.size else values
        label = f"{name} ({censored / total:.1%} missing)" if censored >= 0.001 * total else name
        axes.step(ordered, (grid + 1) / total, where="post", label=label, **line)
        if values.size and sum(observed.size + missing > 0 for observed, missing in parts) > 1:
            points = ordered[:: max(1, ordered.size // 200)]
            shares = np.array(
                [
                    np.searchsorted(np.sort(observed), points, side="right") / (observed.size + missing)
                    for observed, missing in parts
                    if observed.size + missing > 0
                ]
            )
            half = stdtrit(len(shares) - 1, 0.975) * shares.std(axis=0, ddof=1) / np.sqrt(len(shares))
            middle = shares.mean(axis=0)
            axes.fill_between(
                points,
                np.maximum(middle - half, 0.0),
                np.minimum(middle + half, 1.0),
                step="post",
                color=line["color"],
                alpha=0.2,
                lw=0,
            )
    axes.set_xscale("log")
    axes.set_xlabel(_LATENCIES[measure])
    axes.set_ylabel("share of requests")
    axes.set_ylim(0.0, 1.02)
    legend_above(axes)
    return axes


@picture
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
    axes = _curves(frame, measure, "offered rate (req/s)", ylabel, scale, critical_rate, ax)
    if reach is not None:
        axes.axvspan(*reach, color="black", alpha=0.10, lw=0, label="keeps up no further")
        legend_above(axes)
    return axes


@picture
def throughput_latency(
    frame: pd.DataFrame,
    measure: str,
    *,
    ylabel: str,
    scale: str = "log",
    critical_rate: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A latency against the throughput reached, one line a policy: how far right it goes before it rises.

    Beyond its stable range a policy's throughput stands still, or falls, while its latency grows. Drawn as
    `load_curve`, with its parameters; the frame also holds the measure "request_throughput" (req/s).
    """
    through = frame[frame["measure"] == "request_throughput"]
    if through.empty:
        raise InputError("frame", "no throughput", 'have rows of the measure "request_throughput"')
    reached = through.set_index(["policy", "arrival_rate"])["estimate"]
    rows = frame[frame["measure"] == measure]
    keys = list(zip(rows["policy"], rows["arrival_rate"], strict=True))
    placed = rows.assign(throughput=reached.loc[keys].to_numpy())
    return _curves(placed, measure, "throughput (req/s)", ylabel, scale, critical_rate, ax, "throughput")


def _curves(
    frame: pd.DataFrame,
    measure: str,
    xlabel: str,
    ylabel: str,
    scale: str,
    critical_rate: float | None,
    ax: Axes | None,
    across: str = "arrival_rate",
) -> Axes:
    """One line a policy through its rows in order of the offered rate, at the column `across`."""
    rows = frame[frame["measure"] == measure]
    if rows.empty:
        raise InputError("measure", measure, f"be one of {sorted(set(frame['measure']))}")
    axes = new_axes(ax)
    for position, (name, line) in enumerate(rows.groupby("policy", sort=False)):
        ordered = line.sort_values("arrival_rate")
        style_of = look(position)
        colour = style_of["color"]
        x = ordered[across].to_numpy()
        estimate = ordered["estimate"].to_numpy()
        axes.plot(x, estimate, label=str(name), **style_of)
        axes.fill_between(
            x, ordered["low"].to_numpy(), ordered["high"].to_numpy(), color=colour, alpha=0.15, lw=0
        )
        hollow = ordered["behind"].to_numpy(dtype=bool)
        axes.plot(x[~hollow], estimate[~hollow], "o", ms=2.8, color=colour)
        axes.plot(x[hollow], estimate[hollow], "o", ms=3.6, mfc="white", color=colour)
    if rows["behind"].any():
        axes.plot([], [], "o", ms=3.6, mfc="white", color="black", label="behind: latency ≥")
    axes.set_yscale(scale)
    if scale == "log":  # an interval may reach below 0: the band then runs off the axis
        axes.set_ylim(bottom=0.6 * float(rows["estimate"].min()))
    if critical_rate is not None:
        axes.axvline(critical_rate, color="black", linewidth=1.0, linestyle=":")
        axes.annotate(
            f"fluid boundary {critical_rate:.2f}",
            xy=(critical_rate, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(-3, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            fontsize=SMALL,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0.0, "pad": 0.5},
        )
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    legend_above(axes)
    return axes


@picture
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
    axes = new_axes(ax)
    for position, engine in enumerate(dict.fromkeys(gain.engine for gain in rows)):
        line = sorted((gain for gain in rows if gain.engine == engine), key=lambda gain: gain.load)
        line_style = look(position)
        load = np.array([gain.load for gain in line])
        percent = np.array([[gain.gain, gain.low, gain.high] for gain in line])
        percent *= 100.0 / np.array([gain.of_engine for gain in line])[:, None]
        axes.plot(load, percent[:, 0], label=f"over {engine}", **line_style)
        if not np.isnan(percent[:, 1]).any():
            axes.fill_between(load, percent[:, 1], percent[:, 2], color=line_style["color"], alpha=0.15, lw=0)
        noise = np.array([gain.verdict == "within noise" for gain in line])
        axes.plot(load[~noise], percent[~noise, 0], "o", ms=2.8, color=line_style["color"])
        axes.plot(load[noise], percent[noise, 0], "o", ms=3.6, mfc="white", color=line_style["color"])
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.axvline(1.0, color="black", linewidth=1.0, linestyle=":")
    # a wide interval of one load must not flatten the others: the axis follows the estimates, bands may run off
    shown = np.array([100.0 * gain.gain / gain.of_engine for gain in rows])
    room = max(0.25 * float(np.ptp(shown)), 1.0)
    axes.set_ylim(min(float(shown.min()), 0.0) - room, max(float(shown.max()), 0.0) + room)
    axes.set_xlabel("load (share of the fluid boundary)")
    axes.set_ylabel(f"gain in {_GAIN_NAMES.get(measure, measure)} (%)")
    legend_above(axes)
    return axes


@picture
def estimates(compared: Comparison, measure: str = "mean_ttft", *, ax: Axes | None = None) -> Axes:
    """A measure of every policy with its 95 % interval, one row each.

    An arrow to the right: requests without the event make the estimate a lower bound.

    Parameters
    ----------
    compared : Comparison
        From `compare`.
    measure : str
        A measure of the comparison.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If the comparison has no such measure.
    """
    rows = [compared.row(policy, measure) for policy in compared.policies]
    axes = new_axes(ax, (COLUMN[0], 0.8 + 0.22 * len(rows)))
    for position, row in enumerate(rows):
        colour = COLOURS[position % len(COLOURS)]
        axes.plot(row.estimate, position, ">" if row.lower_bound else "o", color=colour)
        if np.isfinite(row.low) and np.isfinite(row.high):
            axes.plot([row.low, row.high], [position, position], color=colour)
    axes.set_yticks(range(len(rows)), [row.policy for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(left=0.0)
    unit = f" ({rows[0].unit})" if rows[0].unit else ""
    words = (word.upper() if word in ("ttft", "tpot", "itl", "e2e") else word for word in measure.split("_"))
    axes.set_xlabel(" ".join(words) + unit)
    return axes


@picture
def policy_timeline(timeline: PolicyTimeline, *, ax: Axes | None = None) -> Axes:
    """Residents by stage over time: dark where many requests of one age are served together.

    Requests climb as they are served, so a rule that always works leaves an even weave, WAIT leaves the steps of
    its cohorts, a pause a level line, and a preemption a gap.

    Parameters
    ----------
    timeline : PolicyTimeline
        From `fluidsched.simulation.policy_timeline`.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    axes = new_axes(ax)
    mesh = axes.pcolormesh(
        timeline.time_s,
        timeline.stage,
        timeline.residents.T,
        cmap="Blues",
        shading="flat",
        rasterized=True,
    )
    axes.grid(visible=False)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("stage (output tokens)")
    axes.set_title(timeline.policy)
    figure = axes.figure.canvas.figure  # the whole one, also where the axes are in a part of it
    bar = figure.colorbar(mesh, ax=axes, pad=0.02)
    bar.set_label("residents (req)", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)
    return axes


@picture
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
    axes = new_axes(ax)
    axes.step(run.time_s, run.resident_kv, where="post", label=run.policy, **look(0))
    if capacity is not None:
        axes.axhline(capacity, color="black", linewidth=1.2, label="capacity C")
    axes.set_title(run.verdict)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("KV cache held (tokens)")
    axes.set_ylim(bottom=0.0)
    legend_inside(axes, "lower right")
    return axes
