"""What every picture shares: colours and lines, the size of one column, legends, new axes in the library's style."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The Okabe-Ito set, told apart with any common colour vision."""

LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 1, 1, 1)), "-")
"""Line styles that go with the colours, so that a picture survives a grey print."""

COLUMN = (3.4, 2.4)
"""Width of one column of a two-column page, and the height that goes with it, inches."""

SMALL = 7.0
"""Size of legends and notes, points; stated with each, since axes made by others bring larger type."""

_STYLE: dict[Any, Any] = {  # Matplotlib types its keys as one long literal
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.linewidth": 0.6,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": SMALL,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.0,
    "figure.dpi": 180.0,
    "savefig.dpi": 300.0,
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


Arguments = ParamSpec("Arguments")


def picture(draw: Callable[Arguments, Axes]) -> Callable[Arguments, Axes]:
    """Draw all of a picture in the library's style, whoever made the axes."""

    @wraps(draw)
    def styled(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Axes:
        with style():
            return draw(*args, **kwargs)

    return styled


def new_axes(ax: Axes | None, size: tuple[float, float] = COLUMN) -> Axes:
    """The axes given, or those of a new figure, one column wide."""
    if ax is not None:
        return ax
    from matplotlib import pyplot

    _, new = pyplot.subplots(figsize=size, layout="constrained")
    return new


def look(position: int) -> dict[str, Any]:
    """Colour and dashes of the line at this position."""
    return {"color": COLOURS[position % len(COLOURS)], "linestyle": LINES[position % len(LINES)]}


def second_scale(axes: Axes, label: str) -> Axes:
    """A twin with its own vertical scale on the right."""
    twin = axes.twinx()
    twin.set_ylabel(label)
    twin.grid(visible=False)
    twin.spines["right"].set_visible(True)
    return twin


def plain_logarithms(axes: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic scale labelled 1, 2, 5, 10, … in plain numbers; over many decades by powers of ten.

    Called when everything is drawn, since the labels depend on the range.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    decades = float(np.log10(high / low))
    if decades < 2.5:
        subs = (1.0, 2.0, 5.0) if decades > 0.8 else tuple(float(k) for k in range(1, 10))
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}")
        )
    axis.set_minor_formatter(NullFormatter())


def legend_above(axes: Axes, handles: Sequence[Any] | None = None) -> None:
    """A legend above the axes in as many columns as the axes are wide enough for."""
    if handles is None:
        handles, _ = axes.get_legend_handles_labels()
    figure = axes.figure.canvas.figure  # the whole one, also where the axes are in a part of it
    # the labels left of the axes are not laid out yet; what they take is taken off on both sides
    room = min(figure.bbox.width - figure.dpi * 0.55, figure.bbox.width * axes.get_position().width * 1.15)
    for columns in range(max(1, len(handles)), 0, -1):
        legend = axes.legend(
            handles=handles,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=columns,
            frameon=False,
            fontsize=SMALL,
            columnspacing=1.2,
            handlelength=1.8,
            borderaxespad=0.2,
        )
        if legend.get_window_extent().width <= room:
            return


def legend_inside(axes: Axes, place: Literal["upper left", "upper right", "lower right"]) -> None:
    """A legend in a corner, if anything has a label."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place, frameon=False, fontsize=SMALL, handlelength=1.8)


def type_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Names of types along the horizontal axis, slanted where they are many or long."""
    slanted = len(names) > 4 or max(map(len, names)) > 12
    axes.set_xticks(
        range(len(names)), names, rotation=45 if slanted else 0, ha="right" if slanted else "center"
    )
    axes.grid(visible=False, axis="x")
