"""Queues: exact laws against what was counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from fluidsched.plots.frame import COLOURS, legend_inside, new_axes, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@picture
def queue_law(
    threshold: int,
    mean_arrivals: float,
    *,
    trials: int | None = None,
    wait: bool = True,
    observed: ArrayLike | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The exact law of the queue embedded in a threshold rule, over what was counted.

    Parameters
    ----------
    threshold, mean_arrivals, trials, wait
        n, m and the law of arrivals, as for `fluidsched.bounds.embedded_queue_pmf`.
    observed : array_like of int, optional
        Queue lengths counted just after decisions; drawn as shares.
    ax : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes
    """
    from fluidsched.queues import embedded_queue_pmf

    law = embedded_queue_pmf(threshold, mean_arrivals, trials=trials, wait=wait)
    shown = int(np.searchsorted(np.cumsum(law), 0.999)) + 1
    axes = new_axes(ax)
    if observed is not None:
        counts = np.bincount(np.asarray(observed, dtype=np.int64))
        shares = counts / counts.sum()
        shares = np.pad(shares, (0, max(0, shown - shares.size)))[:shown]
        axes.bar(np.arange(shown), shares, color=COLOURS[0], alpha=0.5, label="counted")
    axes.plot(np.arange(shown), law[:shown], ".", color="black", label="exact law")
    axes.axvline(float(np.arange(law.size) @ law), color="black", lw=0.8, ls=":", label="exact mean")
    axes.set_xlabel("requests left waiting after a decision")
    axes.set_ylabel("probability")
    axes.set_ylim(bottom=0.0)
    legend_inside(axes, "upper right")
    return axes
