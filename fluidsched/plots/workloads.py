"""Workloads: what types of requests ask for, and how a path arrives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fluidsched.plots.frame import COLOURS, SMALL, new_axes, picture, plain_logarithms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fluidsched.workload import ArrivalPath, Workload


@picture
def request_types(workload: Workload, *, ax: Axes | None = None) -> Axes:
    """Mean lengths of each type, the area of its disc in proportion to its rate.

    Parameters
    ----------
    workload : Workload
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    axes = new_axes(ax)
    frame = workload.to_frame()
    rate = frame["arrival_rate"].to_numpy(dtype=float)
    prompt = frame["mean_prompt_tokens"].to_numpy(dtype=float)
    output = frame["mean_output_tokens"].to_numpy(dtype=float)
    largest = rate.max() if rate.size and rate.max() > 0.0 else 1.0
    axes.scatter(prompt, output, s=150.0 * rate / largest + 4.0, color=COLOURS[0], alpha=0.5, lw=0)
    if len(prompt) <= 6:
        for name, x, y in zip(workload.type_names, prompt, output, strict=True):
            axes.annotate(name, (x, y), (0, 6), textcoords="offset points", ha="center", fontsize=SMALL)
    axes.margins(0.2)
    axes.set_xlabel("mean prompt (tokens)")
    axes.set_ylabel("mean output (tokens)")
    plain_logarithms(axes, "x")
    plain_logarithms(axes, "y")
    axes.set_title(f"{workload.name or 'workload'}: {rate.sum():.3g} req/s, area by rate")
    return axes


@picture
def arrivals(path: ArrivalPath, *, bins: int = 60, ax: Axes | None = None) -> Axes:
    """Arrival rate of a path over time, in even intervals, with its mean.

    Parameters
    ----------
    path : ArrivalPath
        At least one request.
    bins : int
        Intervals from time 0 to the last arrival.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    axes = new_axes(ax)
    end = float(path.arrival_s[-1]) if len(path) else 0.0
    counts, edges = np.histogram(path.arrival_s, bins=bins, range=(0.0, end if end > 0.0 else 1.0))
    width = float(edges[1] - edges[0])
    axes.stairs(counts / width, edges, fill=True, color=COLOURS[0], alpha=0.4)
    axes.axhline(counts.sum() / (bins * width), color="black", lw=0.8, ls=":")
    axes.set_xlabel("time (s)")
    axes.set_ylabel("arrivals (req/s)")
    axes.set_ylim(bottom=0.0)
    axes.set_title(f"{len(path):,} requests, intervals of {width:.3g} s")
    return axes
