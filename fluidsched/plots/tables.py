"""Policy tables: what is in them, what they need, how far they reach."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fluidsched.errors import InputError
from fluidsched.plots.frame import (
    COLOURS,
    SMALL,
    legend_above,
    look,
    new_axes,
    picture,
    plain_logarithms,
    second_scale,
    type_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fluidsched.policy import PolicyTable, ReachCurve, SegmentCurve, WaitCurve


_REASON_MARKERS = {"rounding": "o", "tokens": "^", "batch": "s", "memory": "D", "time": "v", None: "*"}


@picture
def thresholds(table: PolicyTable, *, ax: Axes | None = None) -> Axes:
    """What a table lets in: thresholds by type with gates and periods, or by segment of Nested WAIT with buffers.

    Parameters
    ----------
    table : PolicyTable
        With thresholds or segments; a cap alone is one number and no picture, plain_logarithms.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    InputError
        If the table has neither thresholds nor segments.
    """
    if table.segments:
        return _segments(table, new_axes(ax))
    rows = [row for row in table.types if row.threshold is not None]
    if not rows:
        raise InputError("table", f"{table.name!r} of kind {table.kind}", "have thresholds or segments")
    axes = new_axes(ax)
    place = np.arange(len(rows))
    limits = [row.threshold or 0 for row in rows]
    axes.bar(place, limits, 0.7, color=COLOURS[0], alpha=0.8, label="threshold")
    if any(row.gate for row in rows):
        axes.hlines(
            [row.gate for row in rows],
            place - 0.35,
            place + 0.35,
            color=COLOURS[1],
            linestyle="--",
            label="gate: so many must wait",
        )
    for x, row in enumerate(rows):
        if row.period is not None:
            note = f"in {row.period:,}\niterations" if x == 0 else f"{row.period:,}"
            axes.annotate(
                note, (x, limits[x]), (0, 2), textcoords="offset points", ha="center", fontsize=SMALL - 1
            )
    type_ticks(axes, [row.name for row in rows])
    axes.set_ylabel("requests admitted at a time")
    axes.margins(y=0.2)
    legend_above(axes)
    return axes


def _segments(table: PolicyTable, axes: Axes) -> Axes:
    """Requests served at each position, and what the memory bound allows for in the queues before segments."""
    ends = np.array([0, *(segment.boundary + 1 for segment in table.segments)])
    served = [segment.threshold for segment in table.segments]
    axes.stairs(served, ends, fill=True, color=COLOURS[0], alpha=0.35, label="served at each position")
    queues = table.segments[1:]
    if queues:
        axes.errorbar(
            ends[1:-1],
            [segment.threshold for segment in queues],
            yerr=[[0.0] * len(queues), [segment.buffer for segment in queues]],
            fmt=".",
            color=COLOURS[1],
            capsize=2,
            label="boundary queue: threshold and buffer",
        )
    axes.set_xlabel("position (iterations served)")
    axes.set_ylabel("requests")
    axes.set_ylim(bottom=0.0)
    legend_above(axes)
    return axes


@picture
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
    axes = new_axes(ax)
    blocks = curve.block_iterations
    [memory] = axes.plot(blocks, curve.kv, label="KV bound (left)", marker=".", **look(0))
    handles = [memory]
    if np.isfinite(curve.capacity):
        name = "capacity C"
        handles.append(axes.axhline(curve.capacity, color="black", linewidth=1.2, linestyle=":", label=name))
    axes.set_xlabel("block length k (iterations)")
    axes.set_ylabel("KV cache bound (tokens)")
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    right = second_scale(axes, "mean wait until admission (s)")
    handles += right.plot(blocks, curve.wait, label="mean wait (right)", marker=".", **look(1))
    right.set_ylim(bottom=0.0)
    plain_logarithms(axes, "x")
    legend_above(axes, handles)
    return axes


@picture
def segment_curve(curve: SegmentCurve, *, ax: Axes | None = None) -> Axes:
    """Memory that a Nested WAIT table needs against the number of segments: places, and buffers on top.

    Few segments waste places on the longest outputs, many pay a buffer each. Lines break where no table exists.

    Parameters
    ----------
    curve : SegmentCurve
        From `fluidsched.policy.segment_curve`.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    from matplotlib.ticker import MaxNLocator

    axes = new_axes(ax)
    segments = curve.segments
    axes.plot(segments, curve.memory, label="needed in all", marker=".", **look(0))
    axes.plot(segments, curve.base, label="places alone", marker=".", **look(1))
    if np.isfinite(curve.capacity):
        axes.axhline(curve.capacity, color="black", linewidth=1.2, linestyle=":", label="capacity C")
    if curve.best is not None:
        axes.plot(
            curve.best,
            curve.memory[segments == curve.best],
            marker="o",
            markersize=8,
            fillstyle="none",
            linestyle="none",
            color="black",
            label=f"least: L = {curve.best}",
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"segments L (blocks of {curve.block_iterations} iterations)")
    axes.set_ylabel("KV cache bound (tokens)")
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    legend_above(axes)
    return axes


@picture
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
    axes = new_axes(ax)
    for position, kind in enumerate(dict.fromkeys(curve.kind)):
        lines = [i for i, name in enumerate(curve.kind) if name == kind]
        line = look(position)
        axes.plot(curve.types[lines], curve.share[lines], label=kind, **line)
        for i in lines:
            marker = _REASON_MARKERS[curve.reason[i]]
            axes.plot(curve.types[i], curve.share[i], marker=marker, markersize=5, color=line["color"])
    for reason, marker in _REASON_MARKERS.items():
        if reason in curve.reason:
            name = f"ends by {reason}" if reason else "up to the boundary"
            axes.plot([], [], color="0.3", marker=marker, markersize=5, linestyle="none", label=name)
    axes.set_xscale("log")
    numbers = sorted(set(curve.types.tolist()))
    axes.set_xticks(numbers, [f"{number:,}" for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel("request types")
    axes.set_ylabel("share of the boundary")
    low = float(curve.share.min())
    axes.set_ylim(max(0.0, low - 0.15 * (1.02 - low)), 1.02)
    legend_above(axes)
    return axes
