"""What the experiments share: the command, the files, stability brackets.

Every experiment is a script of its own with three functions: `measure(smoke)` simulates and returns plain JSON values,
`draw(found)` makes the figure, `text(found)` says in words what was found. The command writes the three files

    python benchmarks/experiments/NAME.py [--smoke] [--out DIRECTORY]

beside the script (NAME.json, NAME.png, NAME.md) unless `--out` says where. `--smoke` takes seconds and only shows that
the experiment still runs: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import fluidsched as fs
from fluidsched import plots
from fluidsched._files import dumps, write_whole
from fluidsched.errors import InfeasibleError
from fluidsched.simulation.measures import interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent

Found = dict[str, Any]
Tables = Callable[[fs.FluidSolution], fs.PolicyTable]


def run(
    name: str,
    measure: Callable[[bool], Found],
    draw: Callable[[Found], Figure],
    text: Callable[[Found], str],
    arguments: list[str] | None = None,
) -> Found:
    """Measure, draw, and write the three files."""
    parser = argparse.ArgumentParser(prog=f"{name}.py")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument("--out", type=Path, default=HERE, help="directory of the files")
    given = parser.parse_args(arguments)
    cpu = time.process_time()
    found = measure(given.smoke)
    found = {
        "experiment": name,
        "smoke": given.smoke,
        "fluidsched": fs.__version__,
        "python": platform.python_version(),
        "processor_s": round(time.process_time() - cpu, 1),
        **found,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    write_whole(given.out / f"{name}.json", dumps(found))
    with plots.style():
        figure = draw(found)
        figure.savefig(given.out / f"{name}.png", dpi=110)
    write_whole(given.out / f"{name}.md", text(found).strip() + "\n")
    return found


def new_figure(columns: int = 1, width: float = 4.6, height: float = 3.6, rows: int = 1) -> tuple[Any, Any]:
    """A figure of panels side by side, and its axes as a flat list."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.ravel())


def look(position: int) -> dict[str, Any]:
    """Colour and line of the k-th policy, the library's own."""
    return {
        "color": plots.COLOURS[position % len(plots.COLOURS)],
        "linestyle": plots.LINES[position % len(plots.LINES)],
    }


def estimate(values: Any) -> dict[str, float | None]:
    """Mean and 95 % interval across replications, as JSON values."""
    mean, low, high = (None if np.isnan(x) else float(x) for x in interval(np.asarray(values, dtype=float)))
    return {"estimate": mean, "low": low, "high": high}


def say(*words: object) -> None:
    """Progress, on standard error."""
    print(*words, file=sys.stderr, flush=True)


# ---- stability ------------------------------------------------------------------------------------------------------


def is_stable(
    workload: fs.Workload,
    server: fs.Server,
    table: fs.PolicyTable,
    *,
    requests: int,
    replications: int,
    seed: int,
) -> tuple[bool, float]:
    """Whether the backlog keeps still, and its growth as a share of the arrivals.

    Over the second half of a run of `requests` requests from empty, the backlog of a stable server stays, that of one
    overloaded by x grows by x of the arrivals. The line is drawn at 1 % (the bracket is 2 % wide): a growth that is above
    with its whole 95 % interval is unstable, below with all of it stable; where the interval holds the line the run is
    made four times as long, once, and then the estimate decides.
    """
    for length in (requests, 4 * requests):
        horizon = length / workload.total_arrival_rate
        runs = fs.simulate(
            workload, server, table, horizon=horizon, warmup=horizon / 6, replications=replications, seed=seed
        )
        growth = runs.measures(table.name)["backlog_growth"] / workload.total_arrival_rate
        mean, low, high = interval(growth)
        if low > 0.01 or high < 0.01:
            break
    return mean < 0.01, mean


def boundary(
    workload: fs.Workload,
    server: fs.Server,
    table_at: Tables,
    *,
    requests: int,
    replications: int,
    seed: int,
    width: float = 0.02,
    low: float = 0.3,
    high: float = 1.04,
) -> dict[str, Any]:
    """Bracket the load (share of the fluid boundary) at which a policy stops being stable, to a ratio of 1 + `width`.

    `table_at` makes the policy's table for the solution at the probed load; a load without a table counts as beyond,
    and `reason` then says that the tables end there, not the server.
    """
    stable_to, unstable_from, reason = None, None, "backlog grows"

    def probe(load: float) -> bool:
        nonlocal reason
        offered = workload.at_load(load, server)
        try:
            table = table_at(fs.solve_fluid(offered, server))
        except InfeasibleError as error:
            reason = f"no table: {error.reason}" if hasattr(error, "reason") else "no table"
            return False
        stable, growth = is_stable(
            offered, server, table, requests=requests, replications=replications, seed=seed
        )
        if not stable:
            reason = f"backlog grows by {growth:.1%} of the arrivals"
        return stable

    if not probe(low):
        return {"stable_to": None, "unstable_from": low, "reason": reason}
    stable_to = low
    if probe(high):
        return {"stable_to": high, "unstable_from": None, "reason": "stable as far as was tried"}
    unstable_from = high
    while unstable_from / stable_to > 1.0 + width:
        middle = float(np.sqrt(stable_to * unstable_from))
        if probe(middle):
            stable_to = middle
        else:
            unstable_from = middle
    return {"stable_to": stable_to, "unstable_from": unstable_from, "reason": reason}


def bracket_text(found: dict[str, Any]) -> str:
    """A bracket as words: "0.93 to 0.95"."""
    if found["stable_to"] is None:
        return f"below {found['unstable_from']:.2f}"
    if found["unstable_from"] is None:
        return f"above {found['stable_to']:.2f}"
    return f"{found['stable_to']:.3f}–{found['unstable_from']:.3f}"


def table_text(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
