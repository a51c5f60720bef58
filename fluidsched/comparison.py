r"""Policies side by side: paired differences under common paths, and the distance to the fluid bound.

Every policy ran on the same R paths, so for a measure m the differences D_r = m_r(policy) - m_r(baseline)
are independent across r, and their mean has the interval mean(D) ± t_{R-1, 0.975}·s_D/√R. Where paths make
policies rise and fall together it is much narrower than the two policies' own intervals.

The *share of the bound* is a throughput over the fluid program's optimum for it: requests over Σ_j a_j,
output tokens over Σ_j a_j E[o_j], all tokens over Σ_j a_j E[p_j + o_j], whichever the program maximised
(under other rewards none is a bound and no share is given). The optimum bounds the long-run rate at the
offered λ: a finite run from an empty server, whose realised arrivals differ from λ, may come out above 1 by
that much.

Nothing here looks inside a policy.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidsched._checks import check_choice, check_count, check_fields, check_real
from fluidsched._files import dumps, loads, read_text, write_whole
from fluidsched.errors import InputError
from fluidsched.simulation.measures import UNITS, interval
from fluidsched.simulation.result import SimulationResult, aligned, plus_minus

if TYPE_CHECKING:
    import pandas as pd

    from fluidsched.fluid import FluidSolution

__all__ = ["Comparison", "ComparisonRow", "compare"]

SCHEMA = "fluidsched.comparison/1"

BOUNDED = {
    "requests": "request_throughput",
    "output_tokens": "output_throughput",
    "total_tokens": "total_token_throughput",
}
"""Objective of the fluid program → the measure its optimum bounds."""


@dataclass(frozen=True)
class ComparisonRow:
    """One measure of one policy; NaN where something does not apply.

    Attributes
    ----------
    policy, measure, unit : str
    estimate, low, high : float
        Mean over replications and its 95 % interval.
    lower_bound : bool
        Requests without the event at the end make the estimate a lower bound.
    difference, difference_low, difference_high : float
        Paired difference against the baseline and its 95 % interval; NaN on the baseline's own rows.
    share_of_bound : float
        Estimate over the fluid bound.
    verdict : str
        How the policy fared, as `SimulationResult.verdict` says.
    """

    policy: str
    measure: str
    unit: str
    estimate: float
    low: float
    high: float
    lower_bound: bool
    difference: float
    difference_low: float
    difference_high: float
    share_of_bound: float
    verdict: str


_NUMBERS = ("estimate", "low", "high", "difference", "difference_low", "difference_high", "share_of_bound")
_TEXTS = ("policy", "measure", "unit", "verdict")
_FIELDS = tuple(ComparisonRow.__dataclass_fields__)


@dataclass(frozen=True, repr=False)
class Comparison:
    """What `compare` returns.

    Attributes
    ----------
    rows : tuple of ComparisonRow
        Policies in the order of the runs, measures in the order of `fluidsched.simulation.measures.UNITS`.
    baseline : str
        Policy the differences are taken against.
    replications : int
        R.
    title : str
        What was simulated.
    """

    rows: tuple[ComparisonRow, ...]
    baseline: str
    replications: int
    title: str

    @property
    def policies(self) -> tuple[str, ...]:
        """Names, in the order of the runs."""
        return tuple(dict.fromkeys(row.policy for row in self.rows))

    def row(self, policy: str, measure: str) -> ComparisonRow:
        """One row by its names."""
        check_choice("policy", policy, self.policies)
        check_choice("measure", measure, tuple(row.measure for row in self.rows if row.policy == policy))
        return next(row for row in self.rows if (row.policy, row.measure) == (policy, measure))

    def to_frame(self) -> pd.DataFrame:
        """Tidy frame with the fields of `ComparisonRow` as columns."""
        import pandas as pd

        return pd.DataFrame(
            [[getattr(row, name) for name in _FIELDS] for row in self.rows], columns=[*_FIELDS]
        )

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """The frame as CSV text, written whole to `path` if given."""
        text = str(self.to_frame().to_csv(index=False))
        if path is not None:
            write_whole(path, text)
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; NaN is null."""
        return {
            "schema": SCHEMA,
            "title": self.title,
            "baseline": self.baseline,
            "replications": self.replications,
            "rows": [
                {
                    name: None if name in _NUMBERS and math.isnan(getattr(row, name)) else getattr(row, name)
                    for name in _FIELDS
                }
                for row in self.rows
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], argument: str = "comparison") -> Comparison:
        """Read what `to_dict` wrote; anything else is an `InputError` naming the field."""
        title, baseline, replications, rows = check_fields(
            argument, data, SCHEMA, ("title", "baseline", "replications", "rows")
        )
        if not isinstance(rows, list) or not rows:
            raise InputError(f"{argument}.rows", rows, "be a non-empty list")
        for name, text in (("title", title), ("baseline", baseline)):
            if not isinstance(text, str):
                raise InputError(f"{argument}.{name}", text, "be a string")
        read = tuple(_read_row(f"{argument}.rows[{k}]", row) for k, row in enumerate(rows))
        check_choice(f"{argument}.baseline", baseline, tuple({row.policy for row in read}))
        return cls(read, baseline, check_count(f"{argument}.replications", replications, minimum=1), title)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the JSON text, and write it to `path` (whole or not at all) if one is given."""
        text = dumps(self.to_dict())
        if path is not None:
            write_whole(path, text)
        return text

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read the file `to_json` wrote."""
        return cls.from_dict(loads(str(path), read_text("comparison", path)))

    def _cells(self, policy: str) -> list[str]:
        def estimate(measure: str, factor: float = 1.0) -> str:
            row = self.row(policy, measure)
            return plus_minus(factor * row.estimate, factor * (row.high - row.low) / 2, row.lower_bound)

        ttft = self.row(policy, "mean_ttft")
        uncertain = ttft.lower_bound or self.row(self.baseline, "mean_ttft").lower_bound
        difference = plus_minus(ttft.difference, (ttft.difference_high - ttft.difference_low) / 2)
        shares = [self.row(policy, measure).share_of_bound for measure in BOUNDED.values()]
        share = next((f"{share:.1%}" for share in shares if not math.isnan(share)), "–")
        return [
            policy,
            estimate("request_throughput"),
            share,
            estimate("mean_ttft"),
            estimate("p99_ttft"),
            estimate("mean_tpot", 1e3),
            estimate("preemptions"),
            f"~ {difference}" if uncertain and policy != self.baseline else difference,
            ttft.verdict,
        ]

    def __repr__(self) -> str:
        header = [
            "policy",
            "req/s",
            "of bound",
            "mean TTFT [s]",
            "p99 TTFT [s]",
            "mean TPOT [ms]",
            "preemptions",
            f"mean TTFT - {self.baseline}'s [s]",
            "verdict",
        ]
        table = aligned([header, *map(self._cells, self.policies)])
        notes = (
            "± half width of the 95 % interval" if self.replications > 1 else "one replication: no intervals"
        )
        notes += "; differences paired by path"
        if "≥" in table:
            notes += "; ≥ lower bound, requests still without the event"
        if "~" in table:
            notes += "; ~ difference of a lower bound"
        return f"{self.title}\n{table}\n{notes}"

    def _repr_html_(self) -> str:
        frame = self.to_frame()
        wide = frame.pivot(index="measure", columns="policy", values=["estimate", "difference"])
        wide = wide.reindex(index=[measure for measure in UNITS if measure in wide.index])
        return f"<p>{html.escape(self.title)}; baseline {html.escape(self.baseline)}</p>{wide.to_html()}"


def compare(
    runs: SimulationResult, bound: FluidSolution | None = None, baseline: str | None = None
) -> Comparison:
    """Set policies side by side.

    Parameters
    ----------
    runs : SimulationResult
        Their runs on common paths.
    bound : FluidSolution, optional
        Adds the share of its optimum; solved for the same offered rates and server.
    baseline : str, optional
        Policy that paired differences are taken against; default: the one named "vllm", else the first.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        For an unknown baseline.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 4.0, prompt_tokens=512, output_tokens=128)])
    >>> server = fs.Server(137_000, fs.IterationTime.paper(d0=0.01, d1=3.3e-7))
    >>> policies = [fs.baselines.vllm(), fs.baselines.sarathi()]
    >>> runs = fs.simulate(workload, server, policies, horizon=30.0, replications=2, seed=7)
    >>> comparison = fs.compare(runs)
    >>> comparison.baseline, comparison.row("sarathi", "mean_ttft").difference > 0
    ('vllm', True)
    """
    if not isinstance(runs, SimulationResult):
        raise InputError("runs", runs, "be a SimulationResult")
    if baseline is None:
        baseline = "vllm" if "vllm" in runs.policies else runs.policies[0]
    check_choice("baseline", baseline, runs.policies)
    bounds = {} if bound is None else _bounds(bound)
    reference = runs.outcome(baseline).values
    rows = []
    for outcome in runs.outcomes:
        for measure, values in outcome.values.items():
            estimate, low, high = interval(values)
            difference = (math.nan, math.nan, math.nan)
            if outcome.name != baseline and measure in reference:
                difference = interval(values - reference[measure])
            rows.append(
                ComparisonRow(
                    outcome.name,
                    measure,
                    UNITS[measure],
                    estimate,
                    low,
                    high,
                    bool(outcome.lower_bounds[measure].any()),
                    *difference,
                    estimate / bounds.get(measure, math.nan),
                    runs.verdict(outcome.name),
                )
            )
    return Comparison(tuple(rows), baseline, runs.replications, runs.title)


def _bounds(bound: FluidSolution) -> dict[str, float]:
    """Measure → the optimum that bounds it."""
    measure = BOUNDED.get(bound.objective)
    return {measure: bound.upper_bound} if measure is not None and bound.upper_bound > 0.0 else {}


def _read_row(place: str, data: Any) -> ComparisonRow:
    values = dict(zip(_FIELDS, check_fields(place, data, None, _FIELDS), strict=True))
    for name in _TEXTS:
        if not isinstance(values[name], str):
            raise InputError(f"{place}.{name}", values[name], "be a string")
    check_choice(f"{place}.measure", values["measure"], tuple(UNITS))
    for name in _NUMBERS:
        values[name] = math.nan if values[name] is None else check_real(f"{place}.{name}", values[name])
    if not isinstance(values["lower_bound"], (bool, np.bool_)):
        raise InputError(f"{place}.lower_bound", values["lower_bound"], "be true or false")
    return ComparisonRow(**values)
