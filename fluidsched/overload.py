r"""Whom to turn away when more comes than a server carries, and which table to run for those who are let in.

The linear program says which share f_j = a_j/λ_j of each type its optimum admits. At these rates the server is exactly
full, and no table has slack; a table compiled with ``admitted_share="auto"`` is one for s a_j, s as little below 1 as
its slack needs. So the door lets a request of type j in with probability s f_j, independently of all else, and the
table serves the stream that is left, which it can: independent thinning of Poisson arrivals is Poisson arrivals at the
rates it was compiled for, and a trace keeps its bursts.

`offer` simulates each table on its own stream, with the engines as they come beside it on the same requests. Of the
tables that keep up (`fluidsched.recommendation.keeps_up`) and meet the targets, those within 1 % of the highest
throughput are as good as each other, and the simplest to deploy is taken (`fluidsched.recommendation.PREFERENCE`).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidsched._display import Tabular
from fluidsched._files import to_jsonable
from fluidsched.comparison import WIDTH
from fluidsched.fluid import FluidSolution
from fluidsched.policy import PolicyTable, baselines
from fluidsched.recommendation import PRACTICAL, PREFERENCE, keeps_up
from fluidsched.simulation import simulate
from fluidsched.simulation.measures import interval
from fluidsched.simulation.result import aligned
from fluidsched.workload import ArrivalPath
from fluidsched.workload.path import DrawnPaths

if TYPE_CHECKING:
    import pandas as pd

    from fluidsched.simulation import SimulationResult

__all__ = ["Admission", "offer"]

MEASURES = {
    "request_throughput": "req/s",
    "mean_ttft": "TTFT [s]",
    "p99_ttft": "p99 TTFT [s]",
    "mean_e2e": "E2E [s]",
}
"""What is shown of each policy behind the door, with a header for people."""

NOTE = (
    "The door lets each request in by chance, whatever the server does; where types go by output length it needs a "
    "prediction."
)
"""What has to be said beside the figures."""


@dataclass(frozen=True, repr=False)
class Admission(Tabular):
    """Whom to let in under overload, and what serves them.

    Attributes
    ----------
    table : PolicyTable
        Compiled for the stream that is let in.
    share : float
        s, of the program's admitted rates.
    type_names : tuple of str
        J types.
    offered_rate : float64[J]
        λ_j, requests/s.
    admitted_rate : float64[J]
        s a_j, requests/s; the door lets in the fraction `admitted_fraction` of each type.
    runs : SimulationResult
        The table, and vLLM and Sarathi as they come, on the stream that is let in.
    """

    table: PolicyTable
    share: float
    type_names: tuple[str, ...]
    offered_rate: NDArray[np.float64]
    admitted_rate: NDArray[np.float64]
    runs: SimulationResult

    @property
    def admitted_fraction(self) -> NDArray[np.float64]:
        """Probability with which the door lets each type in, (J,)."""
        return self.admitted_rate / self.offered_rate

    @property
    def turned_away(self) -> float:
        """Requests/s that the door turns away."""
        return float((self.offered_rate - self.admitted_rate).sum())

    def to_frame(self) -> pd.DataFrame:
        """One row per type: offered and admitted rate, requests/s, and the admitted fraction."""
        import pandas as pd

        return pd.DataFrame(
            {
                "type": self.type_names,
                "offered_rate": self.offered_rate,
                "admitted_rate": self.admitted_rate,
                "admitted_fraction": self.admitted_fraction,
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the table by name, the runs as `SimulationResult.to_serve_summary` has them."""
        plain: dict[str, Any] = to_jsonable(
            {
                "table": self.table.name,
                "share": self.share,
                "turned_away": self.turned_away,
                "types": self.to_frame().to_dict("records"),
                "policies": self.runs.to_serve_summary(),
            }
        )
        return plain

    def sentence(self) -> str:
        """The advice in sentences."""
        away = self.turned_away / float(self.offered_rate.sum())
        rationed = [
            f"{name} ({fraction:.0%} in)"
            for name, fraction in zip(self.type_names, self.admitted_fraction.tolist(), strict=True)
            if fraction < self.share - 1e-9
        ]
        others = f", {self.share:.1%} of each other type" if len(rationed) < len(self.type_names) else ""
        values = self.runs.measures(self.table.name)
        throughput, ttft, e2e = (
            interval(values[measure])[0] for measure in ("request_throughput", "mean_ttft", "mean_e2e")
        )
        return (
            f"Turn away {self.turned_away:.2f} req/s ({away:.0%}) at the door, by type as the optimum does: "
            f"{', '.join(rationed)}{others}. For what is left {self.table.name} keeps up: {throughput:.2f} req/s with "
            f"mean TTFT {ttft:.3g} s and mean end-to-end latency {e2e:.3g} s."
        )

    def type_rows(self) -> list[list[str]]:
        """Whom the door lets in, as it is printed: rows of cells, the header first."""
        rows = [["type", "offered [req/s]", "let in [req/s]", "let in"]]
        columns = (self.offered_rate, self.admitted_rate, self.admitted_fraction)
        for name, offered, admitted, fraction in zip(
            self.type_names, *(c.tolist() for c in columns), strict=True
        ):
            rows.append([name, f"{offered:.4g}", f"{admitted:.4g}", f"{fraction:.1%}"])
        return rows

    def policy_rows(self) -> list[list[str]]:
        """How the policies fare behind the door: rows of cells, the header first."""
        rows = [["behind the door", *MEASURES.values(), "keeps up"]]
        for name in self.runs.policies:
            outcome = self.runs.outcome(name)
            cells = []
            for measure in MEASURES:
                estimate, low, high = interval(outcome.values[measure])
                half = "" if math.isnan(low) else f" ± {(high - low) / 2:.2g}"
                bound = "≥ " if outcome.lower_bounds[measure].any() else ""
                cells.append(f"{bound}{estimate:.4g}{half}")
            rows.append([name, *cells, "yes" if keeps_up(self.runs, name) else "no"])
        return rows

    def __repr__(self) -> str:
        tables = aligned(self.type_rows(), last_is_number=True), aligned(self.policy_rows())
        return "\n\n".join((*tables, textwrap.fill(NOTE, WIDTH)))


def offer(
    fluid: FluidSolution,
    tables: Sequence[PolicyTable],
    paths: Sequence[ArrivalPath],
    *,
    seed: int,
    horizon: float | None = None,
    warmup: float | None = None,
    targets: Mapping[str, float] | None = None,
    kept_replications: int | None = None,
) -> Admission | None:
    """Find the table to run behind a door that turns away what the fluid optimum does.

    Parameters
    ----------
    fluid : FluidSolution
        Of a workload that offers more than the server carries.
    tables : sequence of PolicyTable
        Candidates; those whose certificate has no "admitted_share" are not looked at.
    paths : sequence of ArrivalPath
        The requests that come, labelled with the types of `fluid.workload`; one per replication.
    seed : int
        Of the door's choices, the same for all tables: who is let in at a small share is at every larger one.
    horizon, warmup : float, optional
        As in `fluidsched.simulate`.
    targets : mapping, optional
        Measure → what it may be at most, s.
    kept_replications : int, optional
        As in `fluidsched.simulate`.

    Returns
    -------
    Admission or None
        None where no table keeps up and meets the targets.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("short", 2.0, 50, 10), fs.RequestType("long", 1.0, 200, 80)])
    >>> server = fs.Server(40_000, fs.IterationTime.affine(0.02, 1e-5, 2e-4, 1e-7))
    >>> fluid = fs.solve_fluid(workload.at_load(1.5, server), server)
    >>> table = fs.compile_policy(fluid, "capped", admitted_share="auto")
    >>> found = offer(fluid, [table], [fluid.workload.sample(200.0, seed=3)], seed=4, horizon=200.0)
    >>> bool(found.turned_away > 0.9 * (fluid.workload.arrival_rate - fluid.admitted_rate).sum())
    True
    """
    offered = np.asarray(fluid.workload.arrival_rate, dtype=np.float64)
    doors = np.random.SeedSequence([seed, len(paths)]).spawn(len(paths))  # not those that drew the paths
    found: list[Admission] = []
    for table in tables:
        share = table.certified("admitted_share")
        if share is None:
            continue
        admitted = share * np.asarray(fluid.admitted_rate, dtype=np.float64)
        let_in = admitted / offered
        runs = simulate(
            DrawnPaths(len(paths), lambda r, let_in=let_in: paths[r].thinned(let_in, doors[r])),  # type: ignore[misc]
            fluid.server,
            [table, baselines.vllm(), baselines.sarathi()],
            horizon=horizon,
            warmup=warmup,
            oversize="reject",
            kept_replications=kept_replications,
        )
        found.append(Admission(table, share, fluid.workload.type_names, offered, admitted, runs))
    able = [one for one in found if keeps_up(one.runs, one.table.name) and _meets(one, targets or {})]
    if not able:
        return None
    throughput = [float(np.mean(one.runs.measures(one.table.name)["request_throughput"])) for one in able]
    best = [
        one for one, rate in zip(able, throughput, strict=True) if rate >= (1.0 - PRACTICAL) * max(throughput)
    ]
    return min(best, key=lambda one: PREFERENCE.index(one.table.kind))


def _meets(one: Admission, targets: Mapping[str, float]) -> bool:
    values = one.runs.measures(one.table.name)
    return all(float(np.mean(values[measure])) <= limit for measure, limit in targets.items())
