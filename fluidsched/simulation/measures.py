r"""Measures of a run: latencies, throughputs, occupancy, fairness, over the window after the warm-up.

The window is [w, e]: w the warm-up, e the end of the run, L = e - w. Of request i with arrival A, first
admission D, first token F, finish E and o output tokens:

    scheduling delay = D - A,   TTFT = F - A,   TPOT = (E - F)/(o - 1) for o ≥ 2,   E2E = E - A,
    slowdown = (E - A)/(time alone),

where the time alone is the least any scheduler could give it on an empty server that computes the whole prompt
(`server.alone`; of several replicas the quickest). So a slowdown is at least 1, unless a prefix cache saves work.
It is undefined where the iteration time is a function.

*Latencies* are taken over the requests that arrived at or after w and were not rejected (TPOT: of these,
the ones with a first token and o ≥ 2). Those who abandoned the queue or were aborted count where the event had
happened before, and else not at all: they are latencies of the served, to be read beside `abandoned` and
`aborted`, how many of the requests that arrived from w on left so. Of the others one without its event by e is
*right-censored*: all that is known is that its value is at least what it would be had the event happened at e.
The mean uses that value, and is a lower bound whenever anything is censored. A quantile counts censored requests
as later than every observed one; if its rank then falls among the observed it is reported as it is, else it is
the quantile with the censored requests at their least values, a lower bound. Quantiles interpolate linearly
between order statistics.

*ITL* has one sample per gap between consecutive tokens of a request that ended in (w, e]. Runs count gaps in
a histogram, so its mean is exact and its quantiles are within `histogram.RELATIVE_ERROR`, 0.8 %. A gap still
open at e is no sample.

*Rates* count what happened in (w, e], whenever the requests arrived: `request_throughput` finishes,
`output_throughput` tokens emitted, `effective_throughput` output tokens and `total_token_throughput`
prompt and output tokens of the requests that finished; `goodput` finishes of requests that met every
stated SLO, each a limit on one latency of the request itself. A request with a single token meets any
limit on TPOT.

*Occupancy* is the time average over the window; `slot_utilization` is the mean number of residents over the
most there may be. `backlog_growth` is (X(e) - X(m))/(e - m), X the number in the system and m the middle of
the window: zero on average in a stable system past its start, the excess of arrivals over capacity in an
overloaded one. `preemptions`, `wasted_tokens`, `mean_batch_size` (requests per iteration) and `peak_kv` are
over the whole run.

*Fairness* between request types is Jain's index (Σ x_j)²/(J Σ x_j²) of the J types that have requests in the
window: 1 if all x_j are equal, k/J if k types share alike and the rest has nothing. Types ask for different
amounts, so x_j is never an amount of service but service relative to what was asked for:
`service_fairness` takes x_j = tokens (prompt and output) of the requests that finished over those of the
requests that arrived: below 1 only where demand is not met, that is in overload or starvation.
`slowdown_fairness` takes x_j = mean slowdown: it says in stable systems too whether some types pay the
waiting of others. Both are undefined with fewer than two types.

An interval across R ≥ 2 replications is estimate ± t_{R-1, 0.975}·s/√R (Student; replications where the
measure is undefined are left out); with one replication it is NaN. `fluidsched.simulation.steady` finds an
interval from the parts of one long run.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_choice, check_real
from fluidsched.errors import InputError
from fluidsched.server import Server
from fluidsched.server.alone import times_alone
from fluidsched.simulation import histogram
from fluidsched.simulation.records import STATUSES, EngineRun

if TYPE_CHECKING:
    from fluidsched.workload import ArrivalPath

__all__ = [
    "DISTRIBUTIONS",
    "LATENCIES",
    "OF_REQUESTS",
    "QUANTILES",
    "UNITS",
    "Requests",
    "Settled",
    "alone_s",
    "check_slo",
    "check_targets",
    "in_words",
    "interval",
    "intervals",
    "jain_index",
    "latencies",
    "measure_requests",
    "measure_run",
    "measure_totals",
    "meets",
    "quantile",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LATENCIES = ("ttft", "tpot", "e2e", "scheduling_delay")
"""Latencies measured per request, s."""

DISTRIBUTIONS = {**dict.fromkeys(LATENCIES, "s"), "slowdown": "", "itl": "s"}
"""What has a mean and quantiles, and its unit; all but ITL with one value per request."""

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}

UNITS = {
    **{f"{stat}_{name}": unit for name, unit in DISTRIBUTIONS.items() for stat in ("mean", *QUANTILES)},
    "request_throughput": "req/s",
    "output_throughput": "tokens/s",
    "effective_throughput": "tokens/s",
    "total_token_throughput": "tokens/s",
    "mean_kv": "tokens",
    "kv_utilization": "",
    "peak_kv": "tokens",
    "mean_residents": "req",
    "slot_utilization": "",
    "mean_waiting": "req",
    "backlog_growth": "req/s",
    "busy_fraction": "",
    "mean_batch_size": "req",
    "preemptions": "",
    "wasted_tokens": "tokens",
    "dropped_tokens": "tokens",
    "service_fairness": "",
    "slowdown_fairness": "",
    "completed": "req",
    "unfinished": "req",
    "rejected": "req",
    "abandoned": "req",
    "aborted": "req",
    "goodput": "req/s",
}
"""Every measure and its unit, in the order of reports; `goodput` only where SLOs are stated."""


def in_words(measure: str) -> str:
    """The name of a measure for people.

    Examples
    --------
    >>> in_words("p99_ttft"), in_words("request_throughput")
    ('p99 TTFT', 'request throughput')
    """
    statistic, _, name = measure.partition("_")
    return (
        f"{statistic} {name.upper()}" if name in ("ttft", "tpot", "e2e", "itl") else measure.replace("_", " ")
    )


OF_REQUESTS = (
    *(f"{stat}_{name}" for name in (*LATENCIES, "slowdown") for stat in ("mean", *QUANTILES)),
    "request_throughput",
    "effective_throughput",
    "total_token_throughput",
    "completed",
    "unfinished",
    "rejected",
    "abandoned",
    "aborted",
    "goodput",
)
"""Measures read off the requests alone, which types, and pieces of a run, have too."""

_FINISHED = STATUSES.index("finished")
_REJECTED = STATUSES.index("rejected")
_UNFINISHED = STATUSES.index("unfinished")


class Requests(NamedTuple):
    """Columns of some requests of one run in order of arrival, (N,) each; `alone`: times alone, s, if known."""

    arrival: FloatArray
    prompt: IntArray
    output: IntArray
    admitted: FloatArray
    first_token: FloatArray
    finish: FloatArray
    left: FloatArray
    status: NDArray[np.int8]
    alone: FloatArray | None

    @classmethod
    def of(cls, path: ArrivalPath, run: EngineRun, alone: FloatArray | None = None) -> Requests:
        """All requests of a run."""
        if len(run) != len(path):
            raise InputError("run", f"{len(run)} requests", f"have the {len(path)} requests of the path")
        return cls(
            path.arrival_s,
            path.prompt_tokens,
            path.output_tokens,
            run.admitted_s,
            run.first_token_s,
            run.finish_s,
            run.left_s,
            run.status,
            alone,
        )

    def at(self, index: slice | NDArray[np.bool_] | NDArray[np.intp]) -> Requests:
        """Those of a slice or mask, or at places."""
        return Requests(*(None if column is None else column[index] for column in self))  # type: ignore[arg-type]

    def arrived(self, start: float, stop: float = math.inf) -> Requests:
        """Those that arrived in [start, stop)."""
        first = int(np.searchsorted(self.arrival, start)) if start > 0.0 else 0
        last = None if stop == math.inf else int(np.searchsorted(self.arrival, stop))
        return self.at(slice(first, last))

    def accepted(self) -> Requests:
        """Those that were not rejected."""
        kept = self.status != _REJECTED
        return self if kept.all() else self.at(kept)

    def values(self, measure: str, end: float) -> tuple[FloatArray, FloatArray]:
        """Observed values of a latency or slowdown, and the least values of those censored at `end`.

        In order of arrival; together one value per request, but for those who left without the event.
        """
        start, event, divisor = self.arrival, self.finish, None
        if measure == "tpot":
            start, divisor = self.first_token, self.output - 1.0
            divisor[divisor == 0.0] = math.nan
        elif measure == "ttft":
            event = self.first_token
        elif measure == "scheduling_delay":
            event = self.admitted
        elif measure == "slowdown":
            if self.alone is None:
                return np.empty(0), np.empty(0)
            divisor = self.alone
        observed = event - start
        if divisor is not None:
            observed /= divisor
        undefined = np.isnan(observed)
        at = np.flatnonzero(undefined)
        if not at.size:
            return observed, np.empty(0)
        staying = at[self.status[at] == _UNFINISHED]
        at_least = np.maximum(end - start[staying], 0.0)
        if divisor is not None:
            at_least /= divisor[staying]
        return observed[~undefined], at_least[~np.isnan(at_least)]


def latencies(
    path: ArrivalPath, run: EngineRun, warmup: float, measure: str, until: float = math.inf
) -> tuple[FloatArray, FloatArray]:
    """Return the observed values of a latency and the least values of the censored requests, s.

    Parameters
    ----------
    path : ArrivalPath
        The N requests of the run.
    run : EngineRun
    warmup : float
        Requests that arrived earlier are left out, s.
    measure : {"ttft", "tpot", "e2e", "scheduling_delay"}
    until : float
        Requests that arrived at or after it are left out, s.

    Returns
    -------
    observed, at_least : float arrays
        In order of arrival; together one value per request measured.
    """
    check_choice("measure", measure, LATENCIES)
    return Requests.of(path, run).arrived(warmup, until).accepted().values(measure, run.end_s)


def quantile(ordered: FloatArray, at_least: FloatArray, level: float) -> tuple[float, bool]:
    """Return a quantile of a right-censored sample and whether it is a lower bound.

    Parameters
    ----------
    ordered : float array
        Observed values in increasing order.
    at_least : float array
        Least values of the censored ones.
    level : float
        In [0, 1].

    Examples
    --------
    >>> quantile(np.array([1.0, 2.0, 3.0]), np.array([0.5]), 0.5)
    (2.5, False)
    >>> quantile(np.array([1.0, 2.0, 3.0]), np.array([0.5]), 1.0)
    (3.0, True)
    """
    count = len(ordered) + len(at_least)
    if count == 0:
        return math.nan, False
    rank = (count - 1) * level
    below, above = math.floor(rank), math.ceil(rank)
    if above < len(ordered):
        low, high = float(ordered[below]), float(ordered[above])
        return low + (rank - below) * (high - low), False
    merged = np.sort(np.concatenate([ordered, at_least]))
    return quantile(merged, merged[:0], level)[0], True


def _at_ranks(sample: FloatArray, ranks: Sequence[float]) -> list[float]:
    """Values at ascending ranks (0 … n - 1, interpolated) of a sample, which is reordered.

    A rank needs its neighbours only: the sample is split there and its upper part split on, instead of sorted.
    """
    found = []
    start = 0  # nothing from here on is below what lies before
    for rank in ranks:
        below = math.floor(rank)
        sample[start:].partition(below - start)
        start = below
        low = float(sample[below])
        high = float(sample[below + 1 :].min()) if rank > below else low
        found.append(low + (rank - below) * (high - low))
    return found


def latency_statistic(
    path: ArrivalPath, run: EngineRun, warmup: float, until: float, measure: str
) -> tuple[float, bool]:
    """Return one statistic of a latency, s, and whether it is a lower bound.

    Parameters
    ----------
    path, run, warmup, until
        As for `latencies`.
    measure : str
        Statistic and latency, such as "p99_ttft" or "mean_e2e".
    """
    word, latency = measure.split("_", 1)
    observed, at_least = latencies(path, run, warmup, latency, until)
    if word != "mean":
        return quantile(np.sort(observed), at_least, QUANTILES[word])
    together = np.concatenate([observed, at_least])
    return (float(together.mean()) if len(together) else math.nan), len(at_least) > 0


class Settled:
    """Statistics of latencies of every run, kept when the run is forgotten: `seen` is an `on_run` of `simulate`.

    Parameters
    ----------
    measures : iterable of str
        Statistics of latencies, such as "p99_ttft".
    start, until : float
        Of the requests that arrived in [start, until), s.
    """

    def __init__(self, measures: Iterable[str], start: float, until: float) -> None:
        self.measures = tuple(measures)
        self.start, self.until = start, until
        self._found: dict[tuple[str, str], list[tuple[float, bool]]] = {}

    def seen(self, policy: str, replication: int, path: ArrivalPath, run: EngineRun) -> None:
        """Measure one run."""
        for measure in self.measures:
            found = latency_statistic(path, run, self.start, self.until, measure)
            self._found.setdefault((policy, measure), []).append(found)

    def of(self, policy: str, measure: str) -> list[tuple[float, bool]]:
        """Value in each replication, s, and whether it is a lower bound."""
        return self._found[policy, measure]


def check_slo(slo: Mapping[str, float] | None) -> dict[str, float]:
    """Return the SLOs as a plain dict: latency name → limit per request, s."""
    checked = {}
    for name, limit in (slo or {}).items():
        check_choice("slo", name, LATENCIES)
        checked[name] = check_real(f"slo[{name!r}]", limit, minimum=0.0)
    return checked


def check_targets(targets: Mapping[str, float]) -> dict[str, float]:
    """Return targets as a plain dict: measure of a latency, such as "p99_ttft" → what it may be at most, s."""
    if not isinstance(targets, Mapping) or not targets:
        raise InputError("targets", targets, "map at least one measure to its limit in s")
    known = [f"{statistic}_{name}" for name in LATENCIES for statistic in ("mean", *QUANTILES)]
    for measure in targets:
        if measure not in known:
            raise InputError("targets", f"measure {measure!r}", f"name measures among {', '.join(known)}")
    return {
        measure: check_real(f"targets[{measure!r}]", limit, above=0.0) for measure, limit in targets.items()
    }


_alone_on: WeakKeyDictionary[ArrivalPath, tuple[tuple[Server, ...], FloatArray]] = WeakKeyDictionary()
"""What `alone_s` last found for a path: other policies, other SLOs and batches ask for the same times again."""


def alone_s(path: ArrivalPath, servers: Sequence[Server]) -> FloatArray | None:
    """Least time of every request alone on the quickest of the servers, s, (N,); None if one has no pieces."""
    if any(server.iteration_time.coefficients is None for server in servers):
        return None
    known, fastest = _alone_on.get(path, ((), None))
    if fastest is not None and len(known) == len(servers) and all(map(operator.is_, known, servers)):
        return fastest
    lengths = path.prompt_tokens, path.output_tokens
    times = [times_alone(*lengths, server, path.cached_prompt_tokens)[1] for server in servers]
    fastest = np.min(times, axis=0) if len(times) > 1 else times[0]
    fastest.flags.writeable = False
    _alone_on[path] = tuple(servers), fastest
    return fastest


def measure_requests(
    requests: Requests,
    *,
    start: float,
    end: float,
    stop: float = math.inf,
    slo: Mapping[str, float] | None = None,
) -> tuple[dict[str, float], set[str]]:
    """Return the measures `OF_REQUESTS` of some requests, and the names of those that are lower bounds.

    Parameters
    ----------
    requests : Requests
    start, stop : float
        Latencies are of those that arrived in [start, stop), rates of those that finished in (start, stop],
        s; infinity stands for the end of the run and includes it.
    end : float
        End of the run, s.
    slo : mapping, optional
        Latency name → limit, s; adds `goodput`.
    """
    values: dict[str, float] = {}
    lower_bounds: set[str] = set()
    joined = requests.arrived(start, stop)
    accepted = joined.accepted()
    for name in (*LATENCIES, "slowdown"):
        observed, at_least = accepted.values(name, end)
        count = len(observed) + len(at_least)
        total = float(observed.sum())
        if len(at_least):
            total += float(at_least.sum())
            lower_bounds.add(f"mean_{name}")
        values[f"mean_{name}"] = total / count if count else math.nan
        ranks = {f"{word}_{name}": (count - 1) * level for word, level in QUANTILES.items()}
        if count == 0:
            values |= dict.fromkeys(ranks, math.nan)
            continue
        beyond = [word for word, rank in ranks.items() if rank > len(observed) - 1]
        within = [word for word in ranks if word not in beyond]
        values.update(zip(within, _at_ranks(observed, [ranks[word] for word in within]), strict=True))
        if beyond:
            merged = np.concatenate([observed, at_least])
            values.update(zip(beyond, _at_ranks(merged, [ranks[word] for word in beyond]), strict=True))
            lower_bounds.update(beyond)

    left = (requests.finish > start) & (requests.status == _FINISHED)
    if stop < math.inf:
        left &= requests.finish <= stop
    prompt, output = requests.prompt[left].sum(), requests.output[left].sum()
    completed = np.count_nonzero(left)
    rates = {
        "request_throughput": completed,
        "effective_throughput": output,
        "total_token_throughput": prompt + output,
    }
    if slo:
        rates["goodput"] = np.count_nonzero(left & meets(requests, slo))
    window = min(stop, end) - start
    for name, amount in rates.items():
        values[name] = float(amount) / window if window > 0.0 else math.nan
    values["completed"] = float(completed)
    values["rejected"] = float(len(joined.status) - len(accepted.status))
    for status in ("unfinished", "abandoned", "aborted"):
        values[status] = float(np.count_nonzero(accepted.status == STATUSES.index(status)))
    return values, lower_bounds


def measure_run(
    path: ArrivalPath,
    run: EngineRun,
    *,
    warmup: float,
    kv_capacity: float,
    slots: float = math.inf,
    alone: FloatArray | None = None,
    type_of: IntArray | None = None,
    slo: Mapping[str, float] | None = None,
) -> tuple[dict[str, float], set[str]]:
    """Return all measures of one run, and the names of those that are lower bounds.

    Parameters
    ----------
    path : ArrivalPath
    run : EngineRun
        Made with the same `warmup`.
    warmup : float
        Start of the window, s.
    kv_capacity : float
        C, tokens.
    slots : float
        Most residents; infinite: no limit, and no `slot_utilization`.
    alone : (N,) float array, optional
        Time of every request alone, s; without it slowdowns are undefined.
    type_of : (N,) int64 array, optional
        Type of every request; without it fairness is undefined.
    slo : mapping, optional
        Latency name → limit, s; adds `goodput`.
    """
    requests = Requests.of(path, run, alone)
    values, lower_bounds = measure_requests(requests, start=warmup, end=run.end_s, slo=slo)
    values |= measure_totals(run, warmup=warmup, kv_capacity=kv_capacity, slots=slots)
    window = run.end_s - warmup
    grown = _in_system(requests, run.end_s) - _in_system(requests, warmup + window / 2)
    values["backlog_growth"] = grown / (window / 2) if window > 0.0 else math.nan
    values["service_fairness"], values["slowdown_fairness"] = _fairness(requests, warmup, run.end_s, type_of)
    return {name: values[name] for name in UNITS if name in values}, lower_bounds


def measure_totals(
    run: EngineRun, *, warmup: float, kv_capacity: float, slots: float = math.inf
) -> dict[str, float]:
    """Return the measures that are read off a run's counters and integrals; arguments as for `measure_run`."""
    values: dict[str, float] = {}
    gaps = int(run.gap_counts.sum())
    values["mean_itl"] = run.gap_s / gaps if gaps else math.nan
    of_gaps = histogram.quantiles(run.gap_counts, tuple(QUANTILES.values()))
    for word, value in zip(QUANTILES, of_gaps, strict=True):
        values[f"{word}_itl"] = value

    window = run.end_s - warmup
    totals = {
        "output_throughput": run.emitted_tokens,
        "mean_kv": run.kv_token_s,
        "kv_utilization": run.kv_token_s / kv_capacity,
        "mean_residents": run.resident_s,
        "slot_utilization": run.resident_s / slots if slots < math.inf else math.nan,
        "mean_waiting": run.waiting_s,
        "busy_fraction": run.busy_s,
    }
    for name, total in totals.items():
        values[name] = float(total) / window if window > 0.0 else math.nan
    values["mean_batch_size"] = run.batch_size_sum / run.iterations if run.iterations else math.nan
    values["peak_kv"] = float(run.peak_kv)
    values["preemptions"] = float(run.preempted)
    values["wasted_tokens"] = float(run.wasted_tokens)
    values["dropped_tokens"] = float(run.dropped_tokens)
    return values


def jain_index(shares: FloatArray) -> float:
    """Return Jain's index of the finite ones among J non-negative shares; NaN with fewer than two of them.

    Examples
    --------
    >>> jain_index(np.array([2.0, 2.0, 2.0])), jain_index(np.array([3.0, 3.0, 0.0, 0.0]))
    (1.0, 0.5)
    """
    known = shares[np.isfinite(shares)]
    if len(known) < 2:
        return math.nan
    squares = float(known @ known)
    return float(known.sum()) ** 2 / (len(known) * squares) if squares > 0.0 else math.nan


def _fairness(requests: Requests, warmup: float, end: float, type_of: IntArray | None) -> tuple[float, float]:
    """`service_fairness` and `slowdown_fairness`."""
    if type_of is None or len(type_of) == 0:
        return math.nan, math.nan
    types = int(type_of.max()) + 1
    tokens = (requests.prompt + requests.output).astype(np.float64)
    total = np.bincount(type_of, tokens, types)  # whole numbers: what is taken off leaves the exact rest

    def without(others: NDArray[np.intp]) -> FloatArray:
        return np.asarray(total - np.bincount(type_of[others], tokens[others], types), dtype=np.float64)

    served = without(np.flatnonzero(~((requests.finish > warmup) & (requests.status == _FINISHED))))
    first = int(np.searchsorted(requests.arrival, warmup))
    rejected = requests.status == _REJECTED
    own, of_type = requests.at(slice(first, None)), type_of[first:]
    if rejected.any():
        kept = ~rejected[first:]
        own, of_type = own.at(kept), of_type[kept]
    rejected[:first] = True  # nor do these count as asking in the window
    asked = without(np.flatnonzero(rejected))
    slowdowns = np.full(types, math.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = np.where(asked > 0.0, served / asked, math.nan)
        if own.alone is not None:
            times = np.fmin(own.left, end)  # NaN: still there
            times -= own.arrival
            np.maximum(times, 0.0, out=times)
            times /= own.alone
            slowdowns = np.bincount(of_type, times, types) / np.bincount(of_type, minlength=types)
    return jain_index(shares), jain_index(slowdowns)


def _in_system(requests: Requests, instant: float) -> int:
    """Requests that have arrived and not left by `instant`."""
    arrived = int(np.searchsorted(requests.arrival, instant, side="right"))
    gone = (requests.left[:arrived] <= instant) | (requests.status[:arrived] == _REJECTED)
    return arrived - int(np.count_nonzero(gone))


def meets(requests: Requests, slo: Mapping[str, float]) -> NDArray[np.bool_]:
    """Which requests met every limit, shape (N,); one whose event did not happen did not."""
    met = np.ones(len(requests.arrival), dtype=np.bool_)
    for name, limit in slo.items():
        if name == "tpot":
            time = (requests.finish - requests.first_token) / np.maximum(requests.output - 1, 1)
        else:
            events = {"ttft": requests.first_token, "e2e": requests.finish}
            time = events.get(name, requests.admitted) - requests.arrival
        met &= time <= limit
    return met


def interval(values: FloatArray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of R replications and its interval (Student t); NaN ends with one replication.

    Examples
    --------
    >>> tuple(round(x, 3) for x in interval(np.array([1.0, 2.0, 3.0])))
    (2.0, -0.484, 4.484)
    """
    estimate, low, high = intervals(np.asarray(values, dtype=np.float64)[None, :], confidence)
    return float(estimate[0]), float(low[0]), float(high[0])


def intervals(values: FloatArray, confidence: float = 0.95) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return means and interval ends of M measures at once, (M,) each, from (M, R) values; see `interval`."""
    from scipy.special import stdtrit

    known = ~np.isnan(values)
    count = known.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0.0).sum(axis=1) / count
        squares = (np.where(known, values - mean[:, None], 0.0) ** 2).sum(axis=1)
        deviation = np.sqrt(squares / (count - 1) / count)
    some = count > 1
    half = np.full(len(values), math.nan)
    half[some] = stdtrit(count[some] - 1, 0.5 + confidence / 2.0) * deviation[some]
    return mean, mean - half, mean + half
