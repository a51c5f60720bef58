"""Who is served when, by stage: a run of the reference engine counted over time and output tokens.

A resident that has produced m tokens stands at *stage* m; stage 0 is a prompt not yet finished. During an
iteration the residents stand where the iteration found them. With time cut into even cells and stages into
even bins, a cell holds the mean number of residents in its bin over its time,

    ( Σ over iterations of (residents in the bin) · (overlap of iteration and cell) ) / (length of the cell),

so that the sum over bins is the mean number of residents, and idle time counts as what stood still then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_count, check_real
from fluidsched._display import Tabular
from fluidsched.simulation.limits import within_model_length
from fluidsched.simulation.reference import run_reference

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.policy import PolicyTable
    from fluidsched.server import Server
    from fluidsched.simulation.records import IterationSummary
    from fluidsched.workload import ArrivalPath

__all__ = ["PolicyTimeline", "policy_timeline"]


@dataclass(frozen=True, repr=False, eq=False)
class PolicyTimeline(Tabular):
    """What `policy_timeline` returns. T cells of time, M bins of stages.

    Attributes
    ----------
    policy : str
        Name of the table.
    time_s : float64[T + 1]
        Edges of the cells, s.
    stage : float64[M + 1]
        Edges of the bins, output tokens.
    residents : float64[T, M]
        Mean number of residents in each bin during each cell.
    """

    policy: str
    time_s: NDArray[np.float64]
    stage: NDArray[np.float64]
    residents: NDArray[np.float64]

    def __post_init__(self) -> None:
        for array in (self.time_s, self.stage, self.residents):
            array.flags.writeable = False

    def to_frame(self) -> pd.DataFrame:
        """One row per cell and bin: start (s), lowest stage (tokens), mean residents."""
        import pandas as pd

        cells, bins = self.residents.shape
        return pd.DataFrame(
            {
                "start_s": np.repeat(self.time_s[:-1], bins),
                "stage_tokens": np.tile(self.stage[:-1], cells),
                "residents": self.residents.ravel(),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw it as a heat map; see `fluidsched.plots.policy_timeline`."""
        from fluidsched import plots

        return plots.policy_timeline(self, ax=ax)

    def __repr__(self) -> str:
        cells, bins = self.residents.shape
        return (
            f"PolicyTimeline of {self.policy!r}, {self.time_s[0]:g} to {self.time_s[-1]:g} s: {cells} cells of time, "
            f"{bins} bins of stages up to {self.stage[-1]:,.0f} tokens, "
            f"{self.residents.sum(axis=1).mean():.3g} residents in the mean"
        )


def policy_timeline(
    path: ArrivalPath,
    server: Server,
    table: PolicyTable,
    *,
    horizon: float,
    start: float = 0.0,
    cells: int = 240,
    bins: int = 60,
) -> PolicyTimeline:
    """Run a table on the reference engine and count the residents by stage over time.

    Parameters
    ----------
    path : ArrivalPath
    server : Server
    table : PolicyTable
    horizon : float
        End of the run and of the picture, s.
    start : float
        Where the picture begins, s.
    cells, bins : int
        T and M.

    Returns
    -------
    PolicyTimeline

    Raises
    ------
    InputError
        If `start` is not before `horizon`, or the engine refuses the run.

    Examples
    --------
    Two requests of two and one tokens, iterations of one second:

    >>> from fluidsched import ArrivalPath, IterationTime, Server, baselines
    >>> path = ArrivalPath.from_arrays([0.0, 0.0], [4, 2], [2, 1])
    >>> server = Server(10, IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    >>> policy_timeline(path, server, baselines.vllm(), horizon=2.0, cells=2, bins=2).residents.tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    horizon = check_real("horizon", horizon, above=0.0)
    start = check_real("start", start, minimum=0.0, below=horizon)
    cells, bins = check_count("cells", cells, minimum=1), check_count("bins", bins, minimum=1)
    path = within_model_length(path, server)
    longest = int(path.output_tokens.max()) if len(path) else 1
    time_s = np.linspace(start, horizon, cells + 1)
    stage = np.linspace(0.0, float(max(longest, bins)), bins + 1)
    cell, width = (horizon - start) / cells, stage[1]
    held = np.zeros((cells, bins))
    produced = np.zeros(len(path), dtype=np.int64)
    left = path.prompt_tokens.copy()  # prompt tokens, and tokens to recompute, still to do by who is inside
    inside: set[int] = set()
    ended = 0.0

    def count(begin: float, end: float) -> None:
        """Add who is inside, as they stand now, from `begin` to `end`."""
        begin, end = max(begin, start), min(end, horizon)
        if begin >= end or not inside:
            return
        places = np.minimum((produced[list(inside)] / width).astype(np.int64), bins - 1)
        first, last = int((begin - start) / cell), min(int((end - start) / cell), cells - 1)
        overlap = np.minimum(time_s[first + 1 : last + 2], end) - np.maximum(time_s[first : last + 1], begin)
        held[first : last + 1] += (
            np.maximum(overlap, 0.0)[:, None] * np.bincount(places, minlength=bins) / cell
        )

    def decide(
        now: float,
        admitted: tuple[int, ...],
        preempted: tuple[int, ...],
        departed: tuple[tuple[int, float], ...],
    ) -> None:
        """What a decision did, whether an iteration follows or the server idles."""
        nonlocal ended
        for i, left_s in departed:
            if i in inside:
                count(ended, left_s)
                ended = left_s
                inside.discard(i)
        count(ended, now)
        ended = now
        for i in {*preempted, *admitted}:  # a newcomer may be preempted by the very decision that admitted it
            if (i in inside) + admitted.count(i) > preempted.count(i):
                inside.add(i)
            else:
                inside.discard(i)
        if table.preemption == "restart":
            produced[list(preempted)] = 0

    def observe(iteration: IterationSummary) -> None:
        nonlocal ended
        decide(iteration.start_s, iteration.admitted, iteration.preempted, iteration.departed)
        for i, found in zip(iteration.admitted, iteration.found, strict=True):
            left[i] = path.prompt_tokens[i] + produced[i] - found
        count(iteration.start_s, iteration.end_s)
        ended = iteration.end_s
        for i, tokens in iteration.prefill:
            left[i] -= tokens
        for i in (*iteration.decode, *(i for i, _ in iteration.prefill if left[i] == 0)):
            produced[i] += 1
            if produced[i] == path.output_tokens[i]:
                inside.discard(i)

    run = run_reference(path, server, table, horizon=horizon, on_iteration=observe, on_idle=decide)
    for i in sorted(inside, key=lambda i: float(run.left_s[i])):
        if run.left_s[i] <= horizon:
            count(ended, float(run.left_s[i]))
            ended = float(run.left_s[i])
            inside.discard(i)
    count(ended, horizon)
    done = run.finish_s <= horizon
    assert np.array_equal(produced[done], path.output_tokens[done]), (
        "tokens are counted as the engine counts them"
    )
    return PolicyTimeline(table.name, time_s, stage, held)
