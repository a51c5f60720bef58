r"""Search over a table's numbers by simulation, and an honest answer whether anything was found.

Candidates are the table one starts from and tables that differ from it in a few *knobs* (a cap, a budget, a
factor on all thresholds, …), placed by a scrambled Sobol sequence in the knobs' ranges. A score is a mean over
replications, and every candidate meets the same arrival paths, so what two candidates differ by is not the
luck of their arrivals.

**Successive halving** (Karnin, Koren, Somekh, ICML 2013). In rung q = 0, 1, … every candidate left has
r 2^q replications behind it, of which only the new ones are simulated; the better half goes on, the start
always among them. So the work is about the same in every rung, and is spent on those that matter.

**Confirmation.** The mean of the best of many is too good: it was chosen for its luck, too. Winner and start
therefore meet again on fresh paths that no candidate has seen (for a trace: made from its second half), R of
them, and the answer is the interval of the paired difference there,

    D ± t_{R-1, (1 + confidence)/2} s_D / √R.

If it holds zero the start is kept and the result says "no significant difference": a table that means
something is worth more than one that was lucky. If start and winner do not differ, that is said in at most a
share 1 - confidence of searches wrongly, whatever the search did. A winner that gets stuck on a fresh path is
not confirmed; a start that does, where the winner does not, is given up for it without an interval.

A share of requests that must meet the SLOs is a target, and the search picks those that met it, lucky ones too. So it
is tested again on the fresh paths: by the interval of the share there it *holds* (all of it at or above the target), is
*missed* (all below) or *cannot be told*. A winner that misses it where the start does not is not taken, and a start
that misses it is given up for a winner that does not.

Aims: ``"goodput"`` (requests per second, of those that arrive, that meet every SLO), a latency such as
``"mean_ttft"`` or ``"p99_e2e"`` at the workload's own rate, and ``"stable_rate"``, the largest rate of the same
mix at which the backlog does not grow: from the middle to the end of the measured time by no more than 1 % of what
arrives in it, and chance, 2 √(2 X) requests of a mean number X in the system (the difference of two Poisson counts, as
of a system with no queue). A longer horizon makes chance count for less. For the first two every path starts from an
empty server and is served until it is empty again, so nothing is censored; a table that gets stuck is out.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_choice, check_count, check_real
from fluidsched._display import Tabular
from fluidsched._files import make_directory, to_jsonable, write_whole
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.policy.table import PolicyTable, Segment
from fluidsched.server import Server
from fluidsched.simulation import simulate
from fluidsched.simulation.measures import LATENCIES, QUANTILES, Requests, check_slo, interval, meets
from fluidsched.sweeps import sweep
from fluidsched.workload import ArrivalPath, Workload, read_trace

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AIMS", "KNOBS", "Candidate", "Tuning", "knobs_of", "tune", "tuning_cell"]

AIMS = (
    "goodput",
    "stable_rate",
    *(f"{statistic}_{name}" for statistic in ("mean", *QUANTILES) for name in LATENCIES),
)
"""What `tune` can aim at; the first two are made large, latencies small."""

GROWTH = 0.01
"""Backlog growth, as a share of the rate, from which on a rate counts as not carried."""

CHANCE = 2.0
"""Standard deviations of a Poisson backlog's growth that are taken for chance."""

BISECTIONS = 8

# ------------------------------------------------------------------ knobs

COUNTS = ("max_in_service", "token_budget", "prefill_interval", "block_iterations")
"""Knobs that are whole numbers of requests, tokens or iterations."""


def _threshold(table: PolicyTable, factor: float) -> PolicyTable:
    """All thresholds times a factor, gates in proportion; at least 1 where they were."""

    def scaled(count: int) -> int:
        return max(1, round(count * factor)) if count else 0

    segments = tuple(
        dataclasses.replace(segment, threshold=scaled(segment.threshold)) for segment in table.segments
    )
    rows = tuple(
        dataclasses.replace(
            row, threshold=scaled(row.threshold or 0), gate=min(scaled(row.gate), scaled(row.threshold or 0))
        )
        for row in table.types
    )
    return dataclasses.replace(table, types=rows, segments=segments)


def _gate(table: PolicyTable, share: float) -> PolicyTable:
    """Gates as a share of the thresholds: 0 never waits, 1 is the full threshold."""
    rows = tuple(dataclasses.replace(row, gate=round(share * (row.threshold or 0))) for row in table.types)
    return dataclasses.replace(table, types=rows)


def _period(table: PolicyTable, factor: float) -> PolicyTable:
    """All periods times a factor."""
    rows = tuple(
        dataclasses.replace(row, period=max(1, round((row.period or 1) * factor))) for row in table.types
    )
    return dataclasses.replace(table, types=rows)


def _hold(table: PolicyTable, seconds: float) -> PolicyTable:
    """The longest hold of every row, s."""
    return dataclasses.replace(
        table, types=tuple(dataclasses.replace(row, max_hold_s=seconds) for row in table.types)
    )


def _boundary(table: PolicyTable, factor: float) -> PolicyTable:
    """The segments' cuts but the last times a factor, on the grid of blocks; cuts that meet merge."""
    if not table.segments:
        return table
    block = table.block_iterations or 1
    last = table.segments[-1]
    kept: list[Segment] = []
    for segment in table.segments[:-1]:
        cut = max(1, round((segment.boundary + 1) * factor / block)) * block - 1
        if (not kept or cut > kept[-1].boundary) and cut < last.boundary:
            kept.append(dataclasses.replace(segment, boundary=cut))
    segments = (*kept, last)
    threshold = segments[0].threshold
    row = dataclasses.replace(table.types[0], threshold=threshold, gate=threshold)
    return dataclasses.replace(table, types=(row,), segments=segments)


def _headroom(table: PolicyTable, tokens: float) -> PolicyTable:
    """Tokens that look-ahead admission keeps free."""
    return dataclasses.replace(table, lookahead=dataclasses.replace(table.lookahead, headroom_tokens=tokens))


def _field(name: str) -> Callable[[PolicyTable, float], PolicyTable]:
    def set_field(table: PolicyTable, value: float) -> PolicyTable:
        number: Any = round(value) if name in COUNTS else value
        return dataclasses.replace(table, **{name: number})

    return set_field


def _settings(knobs: Mapping[str, float]) -> str:
    """Values as the table has them: fields that count are whole."""
    return ", ".join(
        f"{name} {round(value) if name in COUNTS else f'{value:.4g}'}" for name, value in knobs.items()
    )


KNOBS: dict[str, Callable[[PolicyTable, float], PolicyTable]] = {
    "max_in_service": _field("max_in_service"),
    "token_budget": _field("token_budget"),
    "prefill_interval": _field("prefill_interval"),
    "block_iterations": _field("block_iterations"),
    "watermark": _field("watermark"),
    "threshold": _threshold,
    "gate": _gate,
    "period": _period,
    "max_hold_s": _hold,
    "boundary": _boundary,
    "headroom_tokens": _headroom,
}
"""Name of a knob → what its value does to a table. Factors: threshold, period, boundary; a share: gate."""

_LINEAR = ("watermark", "gate", "headroom_tokens")


def knobs_of(table: PolicyTable, server: Server) -> dict[str, tuple[float, float]]:
    """Return the knobs of a table and the ranges `tune` searches by default, around the table's own values.

    Parameters
    ----------
    table : PolicyTable
    server : Server

    Returns
    -------
    dict
        Name → (lowest, highest).

    Examples
    --------
    >>> from fluidsched import IterationTime, Server, baselines
    >>> server = Server(10_000, IterationTime.paper(d0=0.01, d1=1e-6), max_batch_size=64)
    >>> knobs_of(baselines.vllm(max_in_service=40), server)
    {'max_in_service': (20.0, 64.0), 'token_budget': (512.0, 8192.0), 'watermark': (0.0, 0.2)}
    """
    ranges: dict[str, tuple[float, float]] = {}
    most = float(server.max_batch_size or 1024)
    if table.kind in ("capped", "vllm", "sarathi"):
        cap = float(table.max_in_service or most)
        ranges["max_in_service"] = (max(1.0, cap / 2), min(2 * cap, most))
    if table.kind in ("capped", "vllm", "sarathi", "gated"):
        budget = float(table.token_budget or 2048)
        ranges["token_budget"] = (max(1.0, budget / 4), 4 * budget)
        ranges["watermark"] = (0.0, 0.2)
    if table.kind in ("wait", "gated", "nested-wait"):
        ranges["threshold"] = (0.5, 2.0)
    if table.kind == "gated":
        ranges["gate"] = (0.0, 1.0)
        ranges["period"] = (0.5, 2.0)
    if table.kind == "wait":
        block = float(table.block_iterations or 1)
        ranges["block_iterations"] = (max(1.0, block / 2), 2 * block)
    if (
        table.freeze or table.kind == "gated"
    ):  # without a hold a gate leaves the last of a path waiting for ever
        ranges["max_hold_s"] = (0.1, 100.0)
    if len(table.segments) > 1:
        ranges["boundary"] = (0.5, 2.0)
    if table.lookahead.mode in ("known", "law") and math.isfinite(server.kv_capacity):
        ranges["headroom_tokens"] = (0.0, 0.2 * server.kv_capacity)
    return ranges


def _design(
    table: PolicyTable, ranges: Mapping[str, tuple[float, float]], count: int, seed: int
) -> list[tuple[dict[str, float], PolicyTable]]:
    """`count` points of a scrambled Sobol sequence, each with its table; tables that come out equal once."""
    from scipy.stats import qmc

    names = list(ranges)
    power = max(1, math.ceil(math.log2(count)))
    # `seed`: scipy calls it `rng` from 1.15 on, and takes both
    unit = qmc.Sobol(len(names), seed=np.random.default_rng(seed)).random_base2(power)[:count]
    origin = {"tuned_from": table.fingerprint}
    found: dict[str, tuple[dict[str, float], PolicyTable]] = {}
    for point in unit:
        knobs = {}
        for name, place in zip(names, point.tolist(), strict=True):
            low, high = ranges[name]
            if name in _LINEAR or low <= 0.0:
                knobs[name] = low + place * (high - low)
            else:
                knobs[name] = low * (high / low) ** place
        tuned = table
        for name, value in knobs.items():
            tuned = KNOBS[name](tuned, value)
        if tuned == table:
            continue
        # what was certified is another table
        tuned = dataclasses.replace(tuned, certificate={}, provenance={**table.provenance, **origin})
        found.setdefault(tuned.fingerprint, (knobs, tuned))
    return list(found.values())


# ------------------------------------------------------------------ one cell: a candidate on one path


def tuning_cell(parameters: Mapping[str, Any], seed: np.random.SeedSequence) -> dict[str, Any]:
    """Score one candidate on one path; the cell function of the sweeps `tune` runs.

    Parameters
    ----------
    parameters : mapping
        policy (a table), server, workload or trace (a file) and fold ("search" or "held_out"), aim,
        slo.<latency>, horizon, replication.
    seed : SeedSequence
        Of the path.

    Returns
    -------
    dict
        score; with SLOs: met (share of the requests that met all), and the mean of each limited latency.
        `stuck` is 1 where the table ended stuck, its score then being NaN.
    """
    table = _table(json.dumps(parameters["policy"]))
    server = _server(json.dumps(parameters["server"]))
    horizon, aim = float(parameters["horizon"]), str(parameters["aim"])
    draw = _source(parameters)
    if aim == "stable_rate":
        return {"score": _stable_rate(draw, table, server, horizon, seed, parameters["rates"]), "stuck": 0}
    path = dataclasses.replace(draw(1.0, seed), horizon=None)  # served until empty
    runs = simulate(path, server, table, oversize="reject")
    run = runs.run(table.name)
    if run.verdict == "stuck":
        return {"score": math.nan, "stuck": 1}
    slo = {name.partition(".")[2]: limit for name, limit in parameters.items() if name.startswith("slo.")}
    row: dict[str, Any] = {"stuck": 0}
    values = {name: float(column[0]) for name, column in runs.measures(table.name).items()}
    if slo:
        met = np.count_nonzero(meets(Requests.of(path, run), slo))
        row["met"] = met / max(len(path), 1)
        row.update({f"mean_{name}": values[f"mean_{name}"] for name in slo})
        values["goodput"] = met / horizon
    row["score"] = values[aim]
    return row


@lru_cache(maxsize=64)
def _table(text: str) -> PolicyTable:
    return PolicyTable.from_dict(json.loads(text))


@lru_cache(maxsize=4)
def _server(text: str) -> Server:
    return Server.from_dict(json.loads(text))


@lru_cache(maxsize=4)
def _workload(text: str) -> Workload:
    return Workload.from_dict(json.loads(text))


@lru_cache(maxsize=4)
def _half(file: str, second: bool) -> ArrivalPath:
    path = read_trace(file)
    middle = int(np.searchsorted(path.arrival_s, path.arrival_s[0] + path.duration / 2))
    half = path.selected(slice(middle, None) if second else slice(0, middle))
    return dataclasses.replace(half, arrival_s=half.arrival_s - half.arrival_s[0], horizon=None)


def _source(parameters: Mapping[str, Any]) -> Callable[[float, np.random.SeedSequence], ArrivalPath]:
    """Function of (factor on the rate, seed) that draws a path of the wanted length."""
    horizon = float(parameters["horizon"])
    if parameters.get("trace") is not None:
        half = _half(str(parameters["trace"]), parameters["fold"] == "held_out")
        return lambda factor, seed: half.accelerated(factor).bootstrapped(horizon, seed)
    workload = _workload(json.dumps(parameters["workload"]))
    return lambda factor, seed: workload.scaled(factor).sample(horizon, seed)


def _stable_rate(
    draw: Callable[[float, np.random.SeedSequence], ArrivalPath],
    table: PolicyTable,
    server: Server,
    horizon: float,
    seed: np.random.SeedSequence,
    rates: Sequence[float],
) -> float:
    """Bisection for the largest factor on the rate with a backlog that does not grow; returned in req/s.

    The backlog's growth is measured over the second half of what follows the first fifth.
    """
    low, high, unit = rates

    def carried(factor: float) -> bool:
        path = draw(factor, seed)
        runs = simulate(path, server, table, horizon=horizon, warmup=0.2 * horizon, oversize="reject")
        values = runs.measures(table.name)
        growth, rate = float(values["backlog_growth"][0]), len(path) / horizon
        number = float(values["mean_residents"][0] + values["mean_waiting"][0])
        return growth <= GROWTH * rate + CHANCE * math.sqrt(2 * number) / (0.4 * horizon)

    if not carried(low):
        low, high = 0.0, low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if carried(middle) else (low, middle)
    return low * unit


# ------------------------------------------------------------------ the search


@dataclass(frozen=True)
class Candidate:
    """One table that was tried.

    Attributes
    ----------
    knobs : mapping
        What was changed, name → value; empty for the table the search started from.
    table : PolicyTable
    scores : float array
        One per replication simulated, shape (R,), R growing with the rungs it reached; NaN where it got stuck.
    rungs : int
        Rungs it took part in.
    met : float
        Share of requests that met all SLOs, mean over its replications; NaN without SLOs.
    """

    knobs: Mapping[str, float]
    table: PolicyTable
    scores: NDArray[np.float64]
    rungs: int
    met: float = math.nan


@dataclass(frozen=True, repr=False)
class Tuning(Tabular):
    """What `tune` found.

    Attributes
    ----------
    best : PolicyTable
        The winner if the confirmation shows it better than the start, else the start itself.
    start, winner : PolicyTable
        Where the search began, and the best of the search.
    aim : str
    slo : mapping
        Latency name → limit per request, s.
    margin, low, high : float
        Winner minus start on fresh paths (for latencies start minus winner, so that positive is better), and
        its interval; 0 and NaN where the start won the search itself.
    score_start, score_winner : float
        Their means on the fresh paths; NaN where nothing was confirmed.
    confidence : float
    replications : int
        Fresh paths.
    candidates : tuple of Candidate
        All that were tried, best first, the start among them.
    seed : int
    stuck : tuple of two int
        Fresh paths on which start and winner got stuck; there is no interval then.
    attainment : float
        Share of requests that was to meet every SLO; 0: none was asked for.
    attained_start, attained_winner : tuple of three float
        That share on the fresh paths, mean and interval; NaN without SLOs, or where nothing was run on fresh paths.
    """

    best: PolicyTable
    start: PolicyTable
    winner: PolicyTable
    aim: str
    slo: Mapping[str, float]
    margin: float
    low: float
    high: float
    score_start: float
    score_winner: float
    confidence: float
    replications: int
    candidates: tuple[Candidate, ...]
    seed: int
    stuck: tuple[int, int] = (0, 0)
    attainment: float = 0.0
    attained_start: tuple[float, float, float] = (math.nan, math.nan, math.nan)
    attained_winner: tuple[float, float, float] = (math.nan, math.nan, math.nan)

    @property
    def is_better(self) -> bool:
        """Whether the confirmation shows the winner to be better than the start, in the aim or the share attained."""
        return self.best != self.start

    @property
    def attained(self) -> tuple[float, float, float]:
        """Share of requests that met every SLO with the best table on the fresh paths, mean and interval."""
        return self.attained_winner if self.is_better else self.attained_start

    @property
    def attainment_verdict(self) -> str | None:
        """Whether the best table attains the share asked for: "holds", "missed", "cannot be told"; None: not asked."""
        return _attains(self.attained, self.attainment) if self.attainment else None

    @property
    def unit(self) -> str:
        """Unit of the aim."""
        return "req/s" if self.aim in ("goodput", "stable_rate") else "s"

    def to_frame(self) -> pd.DataFrame:
        """One row per candidate, best first: its knobs, rungs, replications, mean score and SLO share."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "start": candidate.table == self.start,
                    **candidate.knobs,
                    "rungs": candidate.rungs,
                    "replications": len(candidate.scores),
                    f"{self.aim}_{self.unit.replace('/', '_per_')}": _mean(candidate.scores),
                    "met": candidate.met,
                }
                for candidate in self.candidates
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        plain: dict[str, Any] = to_jsonable(self)
        return {"schema": "fluidsched.tuning/1", "is_better": self.is_better, **plain}

    def summary(self) -> str:
        """The answer in a sentence, and in another whether the share asked for is attained."""
        if self.attainment_verdict is None:
            return self._difference()
        share, low, high = self.attained
        asked = f"{100 * self.attainment:.4g}%"
        verdict = {
            "holds": f"the {asked} asked for are attained",
            "missed": f"the {asked} asked for are missed",
            "cannot be told": f"whether the {asked} asked for are attained cannot be told from so few, short paths",
        }[self.attainment_verdict]
        return (
            f"{self._difference()} Of the requests on fresh paths {share:.1%} [{low:.1%}, {high:.1%}] meet every SLO "
            f"with the table kept: {verdict}."
        )

    def _difference(self) -> str:
        if self.winner == self.start:
            return f"No candidate beat the start in {self.aim}; it is kept."
        interval_text = f"{self.margin:.4g} {self.unit} [{self.low:.4g}, {self.high:.4g}]"
        tail = f"on {self.replications} fresh paths, {self.confidence:.0%} interval, start {self.score_start:.4g}"
        if self.stuck[0]:
            return (
                f"The start gets stuck on {self.stuck[0]} of {self.replications} fresh paths and the winner on none, "
                f"with {self.aim} {self.score_winner:.4g} {self.unit}: the winner is kept."
            )
        if self.stuck[1]:
            return (
                f"The winner of the search gets stuck on {self.stuck[1]} of {self.replications} fresh paths; the "
                "start is kept."
            )
        if self.low > 0.0:
            kept = (
                ""
                if self.is_better
                else "; but it misses the share of requests asked for, and the start is kept"
            )
            return f"Better in {self.aim} by {interval_text} {tail}{kept}."
        if self.is_better:
            return (
                f"The start misses the share of requests asked for and the winner does not: it is kept. Difference in "
                f"{self.aim}: {interval_text} {tail}."
            )
        return f"No significant difference in {self.aim}: {interval_text} {tail}; the start is kept."

    def __repr__(self) -> str:
        knobs = next(c.knobs for c in self.candidates if c.table == self.winner)
        changed = _settings(knobs) or "nothing"
        return (
            f"Tuning of {self.start.name!r}: {len(self.candidates)} candidates, aim {self.aim}\n"
            f"  {self.summary()}\n  winner changes {changed}"
        )

    def _shown_frame(self) -> pd.DataFrame:
        return self.to_frame().head(10)


def _mean(scores: NDArray[np.float64]) -> float:
    return float(scores.mean()) if len(scores) else math.nan


def tune(
    workload: Workload | ArrivalPath,
    server: Server,
    table: PolicyTable,
    *,
    aim: str,
    slo: Mapping[str, float] | None = None,
    attainment: float = 0.0,
    knobs: Mapping[str, tuple[float, float]] | None = None,
    candidates: int = 32,
    replications: int = 2,
    horizon: float = 1800.0,
    confirmations: int = 16,
    confidence: float = 0.95,
    seed: int = 7,
    directory: str | Path | None = None,
    executor: Executor | None = None,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Tuning:
    """Search for a better table of the same kind, and confirm what is found on paths the search never saw.

    Parameters
    ----------
    workload : Workload or ArrivalPath
        Of a path (a trace), the search sees pieces of the first half only, the confirmation pieces of the
        second (`ArrivalPath.bootstrapped` keeps bursts).
    server : Server
    table : PolicyTable
        Where to start: as a rule a compiled table.
    aim : str
        One of `AIMS`.
    slo : mapping, optional
        Latency name → limit per request, s; needed for "goodput".
    attainment : float
        Share of requests that must meet every SLO, in [0, 1]; candidates that do not are out.
    knobs : mapping, optional
        Knob → (lowest, highest), which changes the table; default `knobs_of(table, server)`.
    candidates : int
        Tables tried beside the start.
    replications : int
        Paths per candidate in the first rung; doubled from rung to rung.
    horizon : float
        Length of a path, s.
    confirmations : int
        R, fresh paths for winner and start, at least 2.
    confidence : float
        Of the interval of their difference.
    seed : int
    directory : path-like, optional
        Where the sweeps keep their journals; a search that was stopped goes on there. None: a temporary one.
    executor, workers
        As in `fluidsched.sweep`.
    progress : callable, optional
        Called as progress(step, done, total).

    Returns
    -------
    Tuning

    Raises
    ------
    InputError
        If an argument is wrong.
    InfeasibleError
        If every candidate gets stuck or fails (the first diagnosis is given), or none meets the SLOs for the
        share asked (the nearest is named).

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("a", arrival_rate=4.0, prompt_tokens=64, output_tokens=16)])
    >>> server = fs.Server(2_000, fs.IterationTime.affine(0.05, 1e-4, 1e-4, 0.0), max_batch_size=64)
    >>> found = fs.tune(workload, server, fs.baselines.vllm(max_in_service=2), aim="mean_e2e",
    ...                 knobs={"max_in_service": (2, 32)}, candidates=4, horizon=60.0, confirmations=4)
    >>> found.is_better
    True
    """
    check_choice("aim", aim, AIMS)
    limits = check_slo(slo)
    if aim == "goodput" and not limits:
        raise InputError("slo", slo, 'be given for the aim "goodput", such as {"ttft": 1.0, "tpot": 0.1}')
    if attainment and not limits:
        raise InputError("attainment", attainment, "come with `slo`")
    attainment = check_real("attainment", attainment, minimum=0.0, maximum=1.0)
    count = check_count("candidates", candidates, minimum=1, maximum=2**16)
    first = check_count("replications", replications, minimum=1)
    fresh = check_count("confirmations", confirmations, minimum=2)
    horizon = check_real("horizon", horizon, above=0.0)
    confidence = check_real("confidence", confidence, above=0.0)
    if confidence >= 1.0:
        raise InputError("confidence", confidence, "be below 1")
    default = knobs_of(table, server)
    ranges = _check_ranges(table, default if knobs is None else knobs, default)
    tried = [({}, table), *_design(table, ranges, count, seed)]
    with tempfile.TemporaryDirectory() as scratch:
        place = make_directory("directory", scratch if directory is None else directory)
        base: dict[str, Any] = {
            "server": server.to_dict(), "aim": aim, "slo": limits, "horizon": horizon,
        }  # fmt: skip
        if isinstance(workload, ArrivalPath):
            trace = place / "trace.csv"
            write_whole(trace, workload.to_csv())
            base |= {"trace": str(trace.absolute()), "workload": None}
        else:
            base |= {"workload": workload.to_dict(), "trace": None}
        if aim == "stable_rate":
            base["rates"] = _rate_bracket(workload, server)
        run = _Search(place, base, seed, executor, workers, progress)
        found = run.halve(tried, first, attainment)
        winner = found[0]
        if winner.table == table:
            attained = _NOTHING
            if attainment:
                run.score("confirmation", [table], range(fresh), "held_out")
                attained = run.attained(table, fresh, confidence)
            return Tuning(
                table, table, table, aim, limits, 0.0, math.nan, math.nan, math.nan, math.nan, confidence,
                fresh if attainment else 0, tuple(found), seed, (0, 0), attainment, attained, attained,
            )  # fmt: skip
        scores = run.score("confirmation", [table, winner.table], range(fresh), "held_out")
        stuck = (int(np.isnan(scores[0]).sum()), int(np.isnan(scores[1]).sum()))
        if all(stuck):
            raise InfeasibleError(
                f"start and winner get stuck on {stuck[0]} and {stuck[1]} of {fresh} fresh paths: requests wait for "
                "a gate that is never met. Give the table a max_hold_s, or other ranges of knobs.",
                "stuck",
            )
        margin, low, high = math.nan, math.nan, math.nan
        if not any(stuck):
            margin, low, high = interval(run.sign * (scores[1] - scores[0]), confidence)
        shares = [run.attained(tried, fresh, confidence) for tried in (table, winner.table)]
        misses = [bool(attainment) and _attains(share, attainment) == "missed" for share in shares]
        better = low > 0.0 or stuck[0] > 0
        if misses[0] != misses[1]:
            better = misses[0] and not stuck[1]
        return Tuning(
            winner.table if better else table, table, winner.table, aim, limits, margin, low, high,
            float(scores[0].mean()), float(scores[1].mean()), confidence, fresh, tuple(found), seed, stuck,
            attainment, *shares,
        )  # fmt: skip


_NOTHING = (math.nan, math.nan, math.nan)


def _attains(share: tuple[float, float, float], target: float) -> str:
    """What an interval of the share attained says of the target; a table that gets stuck has none and misses it."""
    _, low, high = share
    if math.isnan(low):
        return "missed"
    return "holds" if low >= target else "missed" if high < target else "cannot be told"


def _check_ranges(
    table: PolicyTable, knobs: Mapping[str, tuple[float, float]], default: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    if not knobs:
        raise InputError("knobs", knobs, f"name at least one of {', '.join(KNOBS)}")
    ranges = {}
    for name, given in knobs.items():
        check_choice("knobs", name, tuple(KNOBS))
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise InputError(f"knobs[{name!r}]", given, "be a pair (lowest, highest)")
        low, high = (check_real(f"knobs[{name!r}]", end) for end in given)
        if low > high:
            raise InputError(
                f"knobs[{name!r}]", f"{low:g} and {high:g}", "be a range, the lowest value first"
            )
        changed = False
        for end in (low, high):
            try:
                changed |= KNOBS[name](table, end) != table
            except InputError as error:
                raise InputError(
                    f"knobs[{name!r}]",
                    end,
                    f"suit a table of kind {table.kind!r}: {error.argument} must {error.required}",
                ) from None
        if not changed and knobs is not default:
            raise InputError(
                f"knobs[{name!r}]",
                f"{low:g} to {high:g}",
                f"change the table {table.name!r} at one of its ends",
                f"The knobs of such a table are {', '.join(default)}." if default else "",
            )
        ranges[name] = (low, high)
    return ranges


def _rate_bracket(workload: Workload | ArrivalPath, server: Server) -> list[float]:
    """Lowest and highest factor on the rate to look at, around the fluid boundary, and the rate of factor 1."""
    from fluidsched.fluid import solve_fluid

    typed = workload.to_workload(types=1) if isinstance(workload, ArrivalPath) else workload
    boundary = 1.0 / float(solve_fluid(typed, server).load.max())
    return [0.3 * boundary, 1.2 * boundary, typed.total_arrival_rate]


class _Search:
    """Runs candidates as sweeps in one directory, a journal per rung."""

    def __init__(
        self,
        place: Path,
        base: dict[str, Any],
        seed: int,
        executor: Executor | None,
        workers: int | None,
        progress: Callable[[str, int, int], None] | None,
    ):
        self.place, self.base, self.seed = place, base, seed
        self.executor, self.workers, self.progress = executor, workers, progress
        self.sign = 1.0 if base["aim"] in ("goodput", "stable_rate") else -1.0
        self.met: dict[str, list[float]] = {}
        self.latencies: dict[str, list[dict[str, float]]] = {}
        self.failure = ""

    def score(
        self, step: str, tables: Sequence[PolicyTable], paths: range, fold: str
    ) -> list[NDArray[np.float64]]:
        """Scores of each table on the paths of these numbers, the same for all; NaN where one failed."""

        def report(_: str, done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(step, done, total)

        spec = {
            "function": "fluidsched.tuning:tuning_cell",
            "seed": self.seed,
            "base": {**self.base, "fold": fold},
            "cells": [{"policy": table.to_dict()} for table in tables],
            "grid": {"replication": list(paths)},
        }
        frame = sweep(
            spec,
            self.place / step,
            executor=self.executor,
            workers=self.workers,
            format="csv",
            progress=report,
        ).to_frame()
        failed = frame["status"] == "failed"
        if failed.any():
            self.failure = self.failure or str(frame.loc[failed, "diagnosis"].iloc[0])
        scores = (
            frame["score"].to_numpy(dtype=np.float64) if "score" in frame else np.full(len(frame), np.nan)
        )
        for k, table in enumerate(tables):
            mine = frame.iloc[k * len(paths) : (k + 1) * len(paths)]
            if "met" in frame:
                self.met.setdefault(table.fingerprint, []).extend(mine["met"].tolist())
                names = [name for name in mine.columns if name.startswith("mean_")]
                rows: list[Any] = mine[names].to_dict("records")
                self.latencies.setdefault(table.fingerprint, []).extend(rows)
        return [scores[k * len(paths) : (k + 1) * len(paths)] for k in range(len(tables))]

    def halve(
        self, tried: Sequence[tuple[dict[str, float], PolicyTable]], first: int, attainment: float
    ) -> list[Candidate]:
        """Successive halving; return all candidates, best first."""
        left = list(range(len(tried)))
        scores = [np.empty(0) for _ in tried]
        rungs = [0] * len(tried)
        rung = 0
        while True:
            start, stop = (0, first) if rung == 0 else (first * 2 ** (rung - 1), first * 2**rung)
            new = self.score(f"rung-{rung + 1}", [tried[i][1] for i in left], range(start, stop), "search")
            for i, values in zip(left, new, strict=True):
                scores[i] = np.concatenate([scores[i], values])
                rungs[i] += 1
            left = self._ranked(left, tried, scores, attainment)
            if len(left) <= 2:
                break
            half = left[: max(2, (len(left) + 1) // 2)]
            if 0 in left and 0 not in half:
                half[-1] = 0
            left = half
            rung += 1
        rest = [i for i in range(len(tried)) if i not in left]
        rest.sort(
            key=lambda i: (-rungs[i], -self.sign * np.nan_to_num(_mean(scores[i]), nan=-self.sign * math.inf))
        )
        return [
            Candidate(tried[i][0], tried[i][1], scores[i], rungs[i], self._met(tried[i][1]))
            for i in [*left, *rest]
        ]

    def attained(self, table: PolicyTable, paths: int, confidence: float) -> tuple[float, float, float]:
        """Share of requests that met every SLO on the last so many paths scored, mean and interval."""
        shares = self.met.get(table.fingerprint, [])[-paths:]
        return interval(np.array(shares), confidence) if shares else _NOTHING

    def _met(self, table: PolicyTable) -> float:
        shares = self.met.get(table.fingerprint, [])
        return float(np.mean(shares)) if shares else math.nan

    def _ranked(
        self,
        left: Sequence[int],
        tried: Sequence[tuple[dict[str, float], PolicyTable]],
        scores: Sequence[NDArray[np.float64]],
        attainment: float,
    ) -> list[int]:
        """Those that ran and meet the SLOs, best first; the start first among equals."""
        ran = [i for i in left if not np.isnan(scores[i]).any()]
        if not ran:
            reason = self.failure or "each gets stuck: requests wait for a gate that is never met"
            raise InfeasibleError(
                f"none of the {len(left)} candidates serves the workload; {reason}. "
                "Give the table a max_hold_s, or other ranges of knobs.",
                "stuck",
            )
        slo = self.base["slo"]
        if slo:
            shares = {i: self._met(tried[i][1]) for i in ran}
            able = [i for i in ran if shares[i] >= attainment and shares[i] > 0.0]
            if not able:
                raise InfeasibleError(self._miss(ran, tried, shares, attainment), "slo")
            ran = able
        return sorted(ran, key=lambda i: (-self.sign * _mean(scores[i]), i))

    def _miss(
        self,
        ran: Sequence[int],
        tried: Sequence[tuple[dict[str, float], PolicyTable]],
        shares: Mapping[int, float],
        attainment: float,
    ) -> str:
        """What the nearest candidate reaches of SLOs that none meets."""
        slo = self.base["slo"]
        means = {
            i: {
                name: float(np.mean([row[f"mean_{name}"] for row in self.latencies[tried[i][1].fingerprint]]))
                for name in slo
            }
            for i in ran
        }
        nearest = min(
            ran, key=lambda i: (-shares[i], max(means[i][name] / max(slo[name], 1e-12) for name in slo))
        )
        wanted = f"{100 * attainment:.4g}% of the requests" if attainment else "a single request"
        reached = " and ".join(
            f"mean {name.upper().replace('_', ' ')} {means[nearest][name]:.4g} s, "
            f"{means[nearest][name] / max(slo[name], 1e-12):.3g} times the {slo[name]:.4g} s that a request may take"
            for name in slo
        )
        knobs = _settings(tried[nearest][0]) or "the start itself"
        share = (
            f"meets them for {100 * shares[nearest]:.3g}%, the largest share"
            if shares[nearest] > 0.0
            else "meets them for none, like all others, and is nearest by its means"
        )
        return (
            f"no candidate meets the SLOs for {wanted}; the nearest ({knobs}) {share}: {reached}. "
            "Loosen the SLOs, lower the load, or add servers."
        )
