r"""Policies side by side: paired differences under common paths, and the distance to every bound.

Every policy ran on the same R paths, so for a measure m the differences D_r = m_r(policy) - m_r(baseline)
are independent across r, and their mean has the interval mean(D) ± t_{R-1, 0.975}·s_D/√R. Where paths make
policies rise and fall together it is much narrower than the two policies' own intervals.

The *share of the bound* is a throughput over the fluid program's optimum for it: requests over Σ_j a_j,
output tokens over Σ_j a_j E[o_j], all tokens over Σ_j a_j E[p_j + o_j], whichever the program maximised
(under other rewards none is a bound and no share is given). The optimum bounds the long-run rate at the
offered λ: a finite run from an empty server, whose realised arrivals differ from λ, may come out above 1 by
that much.

Beside the measures stand the bounds: what the given solution (or hindsight optimum) says of each policy, and whether
the policy respects it; `fluidsched.bounds.verdicts` has the rules.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidsched._checks import check_choice, check_count, check_fields, check_real
from fluidsched._display import Tabular
from fluidsched._files import dumps, loads, read_text, write_whole
from fluidsched.bounds.hindsight import Hindsight
from fluidsched.bounds.verdicts import BOUNDED, VERDICTS, BoundRow, judge
from fluidsched.errors import InputError
from fluidsched.simulation.measures import UNITS, interval
from fluidsched.simulation.result import SimulationResult, aligned, plus_minus

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.fluid import FluidSolution
    from fluidsched.policy import PolicyTable

__all__ = ["BoundRow", "Comparison", "ComparisonRow", "compare"]

SCHEMA = "fluidsched.comparison/1"

WIDTH = 100
"""Columns of a printed comparison."""


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
_FIELDS = tuple(field.name for field in fields(ComparisonRow))
_BOUND_NUMBERS = ("estimate", "low", "high", "value", "ratio")
_BOUND_FIELDS = tuple(field.name for field in fields(BoundRow))


@dataclass(frozen=True, repr=False)
class Comparison(Tabular):
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
    bounds : tuple of BoundRow
        Policies against bounds, grouped by bound; empty where none was given.
    """

    rows: tuple[ComparisonRow, ...]
    baseline: str
    replications: int
    title: str
    bounds: tuple[BoundRow, ...] = ()

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

    def bounds_frame(self) -> pd.DataFrame:
        """Tidy frame of policies × bounds, with the fields of `BoundRow` as columns."""
        import pandas as pd

        return pd.DataFrame(
            [[getattr(row, name) for name in _BOUND_FIELDS] for row in self.bounds], columns=[*_BOUND_FIELDS]
        )

    @property
    def violations(self) -> tuple[BoundRow, ...]:
        """The rows of policies beyond a bound."""
        return tuple(row for row in self.bounds if row.verdict == "violates")

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
            "rows": [_plain(row, _FIELDS) for row in self.rows],
            "bounds": [_plain(row, _BOUND_FIELDS) for row in self.bounds],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], argument: str = "comparison") -> Comparison:
        """Read what `to_dict` wrote; anything else is an `InputError` naming the field."""
        title, baseline, replications, rows, bounds = check_fields(
            argument, data, SCHEMA, ("title", "baseline", "replications", "rows", "bounds")
        )
        if not isinstance(rows, list) or not rows:
            raise InputError(f"{argument}.rows", rows, "be a non-empty list")
        if not isinstance(bounds, list):
            raise InputError(f"{argument}.bounds", bounds, "be a list")
        for name, text in (("title", title), ("baseline", baseline)):
            if not isinstance(text, str):
                raise InputError(f"{argument}.{name}", text, "be a string")
        read = tuple(_read_row(f"{argument}.rows[{k}]", row) for k, row in enumerate(rows))
        policies = tuple({row.policy for row in read})
        check_choice(f"{argument}.baseline", baseline, policies)
        count = check_count(f"{argument}.replications", replications, minimum=1)
        of_bounds = (_read_bound(f"{argument}.bounds[{k}]", row, policies) for k, row in enumerate(bounds))
        return cls(read, baseline, count, title, tuple(of_bounds))

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

    def _estimate(self, policy: str, measure: str, factor: float = 1.0) -> str:
        row = self.row(policy, measure)
        return plus_minus(factor * row.estimate, factor * (row.high - row.low) / 2, row.lower_bound)

    def _rates(self, policy: str) -> list[str]:
        shares = [self.row(policy, measure).share_of_bound for measure in BOUNDED.values()]
        share = next((f"{share:.1%}" for share in shares if not math.isnan(share)), "–")
        estimates = (self._estimate(policy, name) for name in ("preemptions", "request_throughput"))
        preemptions, throughput = estimates
        return [policy, throughput, share, preemptions, self.row(policy, "mean_ttft").verdict]

    def _latencies(self, policy: str) -> list[str]:
        ttft = self.row(policy, "mean_ttft")
        uncertain = ttft.lower_bound or self.row(self.baseline, "mean_ttft").lower_bound
        difference = plus_minus(ttft.difference, (ttft.difference_high - ttft.difference_low) / 2)
        return [
            policy,
            self._estimate(policy, "mean_ttft"),
            self._estimate(policy, "p99_ttft"),
            self._estimate(policy, "mean_tpot", 1e3),
            self._estimate(policy, "mean_e2e"),
            f"~ {difference}" if uncertain and policy != self.baseline else difference,
        ]

    def tables(self) -> tuple[list[list[str]], list[list[str]]]:
        """Rates and latencies as they are printed: rows of cells, the header first."""
        rates = ["policy", "req/s", "of bound", "preemptions", "verdict"]
        latencies = ["policy", "TTFT [s]", "p99 TTFT [s]", "TPOT [ms]", "E2E [s]", "TTFT − baseline's [s]"]
        return (
            [rates, *map(self._rates, self.policies)],
            [latencies, *map(self._latencies, self.policies)],
        )

    def notes(self) -> str:
        """What the signs in `tables` mean."""
        cells = [cell for table in self.tables() for row in table for cell in row]
        notes = (
            "± half width of the 95 % interval" if self.replications > 1 else "one replication: no intervals"
        )
        notes += f"; baseline {self.baseline}, differences paired by path"
        if any("≥ " in cell for cell in cells):
            notes += "; ≥ at least: some requests were still without the event at the end"
        if any("~" in cell for cell in cells):
            notes += "; ~ difference of such an estimate"
        return notes

    def __repr__(self) -> str:
        rates, latencies = self.tables()
        parts = [self.title, aligned(rates), "", aligned(latencies, last_is_number=True)]
        if self.bounds:
            parts += ["", bounds_text(self.bounds)]
        return "\n".join([*parts, textwrap.fill(self.notes(), WIDTH)])

    def _summary(self) -> list[tuple[str, str]]:
        return [("simulated", self.title), ("baseline", self.baseline)]

    def _shown_frame(self) -> pd.DataFrame:
        wide = self.to_frame().pivot(index="measure", columns="policy", values=["estimate", "difference"])
        return wide.reindex(index=[measure for measure in UNITS if measure in wide.index])

    def plot(self, measure: str = "mean_ttft", ax: Axes | None = None) -> Axes:
        """Draw a measure of every policy with its interval; see `fluidsched.plots.estimates`."""
        from fluidsched import plots

        return plots.estimates(self, measure, ax=ax)


def bounds_text(bounds: Sequence[BoundRow]) -> str:
    """Lay out policies × bounds: a block per bound, those of single types counted, what does not apply last."""
    blocks: dict[tuple[str, str], list[BoundRow]] = {}
    counted: dict[tuple[str, str], int] = {}
    reasons: dict[tuple[str, str], dict[str, None]] = {}  # (bound, why) → policies, in order
    other_kinds: dict[str, None] = {}
    for row in bounds:
        if row.verdict == "not applicable" and row.why.startswith("the table is of kind"):
            other_kinds[row.bound] = None
        elif row.verdict == "not applicable":
            reasons.setdefault((row.bound, row.why), {})[row.policy] = None
        elif "[" in row.measure and row.verdict == "respects":
            counted[row.policy, row.bound] = counted.get((row.policy, row.bound), 0) + 1
        else:
            blocks.setdefault((row.bound, row.measure), []).append(row)
    lines = []
    table = [["bound", "policy", "estimate", "bound", "ratio", "verdict"]]
    for (bound, measure), rows in blocks.items():
        for row in rows:
            half = (row.high - row.low) / 2
            sign = "≤" if row.direction == "upper" else "≥"
            label = f"{bound}: {measure}"
            table.append(
                [
                    label if row is rows[0] else "",
                    row.policy,
                    plus_minus(row.estimate, half, row.lower_bound),
                    f"{sign} {row.value:,.4g}" if abs(row.value) < 1e4 else f"{sign} {row.value:,.0f}",
                    f"{row.ratio:.4g}",
                    row.verdict,
                ]
            )
    if len(table) > 1:
        lines.append(aligned(table, left=2))
    for (policy, bound), count in counted.items():
        types = "type" if count == 1 else "types"
        lines.append(f"{bound}, {policy}: {count} bounds of single {types} respected")
    everybody = {row.policy for row in bounds}
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (bound, why), policies in reasons.items():
        merged.setdefault((why, tuple(policies)), []).append(bound)
    notes = [
        f"{', '.join(names)}: not applicable{'' if set(whom) == everybody else ' to ' + ', '.join(whom)}: {why}"
        for (why, whom), names in merged.items()
    ]
    if other_kinds:
        notes.append(f"{', '.join(other_kinds)}: for tables of that kind only")
    lines += [textwrap.fill(note, WIDTH, subsequent_indent="    ") for note in notes]
    return "\n".join(lines)


def compare(
    runs: SimulationResult,
    bound: FluidSolution | Hindsight | Sequence[FluidSolution | Hindsight] | None = None,
    baseline: str | None = None,
    *,
    tables: Sequence[PolicyTable] | None = None,
    confidence: float = 0.95,
) -> Comparison:
    """Set policies side by side, and each against every bound.

    Parameters
    ----------
    runs : SimulationResult
        Their runs on common paths.
    bound : FluidSolution, Hindsight, or a sequence of them, optional
        A solution, for the same offered rates and server, stands for all bounds that follow from these: its optimum
        (of which a share is added too), stability conditions, the no-wait floor, and for WAIT and Nested WAIT tables
        the theorem constants, queues and overflow. A hindsight optimum bounds the latency of the path that was run.
    baseline : str, optional
        Policy that paired differences are taken against; default: the one named "vllm", else the first.
    tables : sequence of PolicyTable, optional
        The policies by name, where `runs` was read from a file, which holds none; bounds on tables need them.
    confidence : float
        Of the intervals that bounds are judged by; a policy that attains a bound in the mean is called a violator with
        probability (1 − confidence)/2.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        For an unknown baseline, a confidence outside (0, 1), a bound of another kind or for another server.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 4.0, prompt_tokens=512, output_tokens=128)])
    >>> server = fs.Server(137_000, fs.IterationTime.paper(d0=0.01, d1=3.3e-7))
    >>> policies = [fs.baselines.vllm(), fs.baselines.sarathi()]
    >>> runs = fs.simulate(workload, server, policies, horizon=30.0, replications=2, seed=7)
    >>> comparison = fs.compare(runs, bound=fs.solve_fluid(workload, server))
    >>> comparison.baseline, comparison.row("sarathi", "mean_ttft").difference > 0
    ('vllm', True)
    >>> comparison.violations
    ()
    >>> comparison.bounds[0].bound, comparison.bounds[0].measure, comparison.bounds[0].value
    ('fluid optimum', 'request_throughput', 4.0)
    """
    from fluidsched.fluid import FluidSolution

    if not isinstance(runs, SimulationResult):
        raise InputError("runs", runs, "be a SimulationResult")
    if baseline is None:
        baseline = "vllm" if "vllm" in runs.policies else runs.policies[0]
    check_choice("baseline", baseline, runs.policies)
    check_real("confidence", confidence, above=0.0, below=1.0)
    given = [] if bound is None else [bound] if isinstance(bound, FluidSolution | Hindsight) else [*bound]
    for one in given:
        if not isinstance(one, FluidSolution | Hindsight):
            raise InputError("bound", one, "be a FluidSolution, a Hindsight, or a sequence of these")
    solution = next((one for one in given if isinstance(one, FluidSolution)), None)
    bounds = {} if solution is None else _bounds(solution)
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
    judged = judge(runs, given, runs.tables if tables is None else tables, confidence)
    return Comparison(tuple(rows), baseline, runs.replications, runs.title, judged)


def _bounds(bound: FluidSolution) -> dict[str, float]:
    """Measure → the optimum that bounds it."""
    measure = BOUNDED.get(bound.objective)
    return {measure: bound.upper_bound} if measure is not None and bound.upper_bound > 0.0 else {}


def _plain(row: ComparisonRow | BoundRow, names: Sequence[str]) -> dict[str, Any]:
    """Fields of a row as JSON values; what is not finite is null, since JSON has no number for it."""
    values = {name: getattr(row, name) for name in names}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _read_bound(place: str, data: Any, policies: Sequence[str]) -> BoundRow:
    values = dict(zip(_BOUND_FIELDS, check_fields(place, data, None, _BOUND_FIELDS), strict=True))
    check_choice(f"{place}.policy", values["policy"], policies)
    check_choice(f"{place}.verdict", values["verdict"], VERDICTS)
    check_choice(f"{place}.direction", values["direction"], ("upper", "lower"))
    for name in _BOUND_NUMBERS:
        values[name] = math.nan if values[name] is None else check_real(f"{place}.{name}", values[name])
    if not isinstance(values["lower_bound"], bool):
        raise InputError(f"{place}.lower_bound", values["lower_bound"], "be true or false")
    for name in _BOUND_FIELDS:
        if name not in (*_BOUND_NUMBERS, "lower_bound") and not isinstance(values[name], str):
            raise InputError(f"{place}.{name}", values[name], "be a string")
    return BoundRow(**values)


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
