"""Servers: measured against fitted iteration times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluidsched.plots.frame import COLOURS, legend_inside, new_axes, picture, plain_logarithms

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fluidsched.server import Calibration


@picture
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
    axes = new_axes(ax, (3.4, 3.0))
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
                    s=9,
                    marker=marker,
                    facecolors=face,
                    edgecolors=COLOURS[position],
                    linewidths=0.8,
                    label=name,
                )
    ends = [min(predicted.min(), points.time.min()), max(predicted.max(), points.time.max())]
    axes.plot(ends, ends, color="black", linewidth=0.8, linestyle=":")
    plain_logarithms(axes, "x")
    plain_logarithms(axes, "y")
    axes.set_xlabel("fitted iteration time (s)")
    axes.set_ylabel("measured iteration time (s)")
    axes.set_title(f"{fitted.form}: mean error {fitted.mean_error:.1%}, largest {fitted.largest_error:.1%}")
    legend_inside(axes, "upper left")
    return axes
