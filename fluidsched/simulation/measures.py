r"""Measures of a run: latencies, throughputs, occupancy, over the window after the warm-up.

The window is [w, e]: w the warm-up, e the end of the run, L = e - w. Of request i with arrival A, first
admission D, first token F, finish E and o output tokens:

    scheduling delay = D - A,   TTFT = F - A,   TPOT = (E - F)/(o - 1) for o ≥ 2,   E2E = E - A.

*Latencies* are taken over the requests that arrived at or after w and were not rejected (TPOT: of these,
the ones with a first token and o ≥ 2). One without its event by e is *right-censored*: all that is known
is that its value is at least what it would be had the event happened at e. The mean uses that value, and
is a lower bound whenever anything is censored. A quantile counts censored requests as later than every
observed one; if its rank then falls among the observed it is reported as it is, else it is the quantile
with the censored requests at their least values, a lower bound. Quantiles interpolate linearly between
order statistics.

*Rates* count what happened in (w, e], whenever the requests arrived: `request_throughput` finishes,
`output_throughput` tokens emitted, `effective_throughput` output tokens and `total_token_throughput`
prompt and output tokens of the requests that finished; `goodput` finishes of requests that met every
stated SLO, each a limit on one latency of the request itself. A request with a single token meets any
limit on TPOT.

*Occupancy* is the time average over the window. `backlog_growth` is (X(e) - X(m))/(e - m), X the number in
the system and m the middle of the window: zero on average in a stable system past its start, the excess of
arrivals over capacity in an overloaded one. `preemptions`, `wasted_tokens`, `mean_batch_size` (requests
per iteration) and `peak_kv` are over the whole run.

An interval across R ≥ 2 replications is estimate ± t_{R-1, 0.975}·s/√R (Student; replications where the
measure is undefined are left out); with one replication it is NaN: a single run has no independent parts
to measure its own error by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_choice, check_real
from fluidsched.errors import InputError
from fluidsched.simulation.records import STATUSES, EngineRun

if TYPE_CHECKING:
    from fluidsched.workload import ArrivalPath

__all__ = [
    "LATENCIES",
    "UNITS",
    "check_slo",
    "check_targets",
    "interval",
    "latencies",
    "measure_run",
    "meets",
    "quantile",
]

FloatArray = NDArray[np.float64]

LATENCIES = ("ttft", "tpot", "e2e", "scheduling_delay")
"""Latencies measured per request, s."""

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

UNITS = {
    **{f"{statistic}_{name}": "s" for name in LATENCIES for statistic in ("mean", *QUANTILES)},
    "request_throughput": "req/s",
    "output_throughput": "tokens/s",
    "effective_throughput": "tokens/s",
    "total_token_throughput": "tokens/s",
    "mean_kv": "tokens",
    "kv_utilization": "",
    "peak_kv": "tokens",
    "mean_residents": "req",
    "mean_waiting": "req",
    "backlog_growth": "req/s",
    "busy_fraction": "",
    "mean_batch_size": "req",
    "preemptions": "",
    "wasted_tokens": "tokens",
    "completed": "req",
    "unfinished": "req",
    "rejected": "req",
    "goodput": "req/s",
}
"""Every measure and its unit, in the order of reports; `goodput` only where SLOs are stated."""

_FINISHED = STATUSES.index("finished")
_REJECTED = STATUSES.index("rejected")


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
    measured = (path.arrival_s >= warmup) & (path.arrival_s < until) & (run.status != _REJECTED)
    start, event = path.arrival_s, run.finish_s
    tokens = np.ones(len(path))
    if measure == "tpot":
        measured &= ~np.isnan(run.first_token_s) & (path.output_tokens > 1)
        start = run.first_token_s
        tokens = np.maximum(path.output_tokens - 1, 1).astype(np.float64)
    elif measure == "ttft":
        event = run.first_token_s
    elif measure == "scheduling_delay":
        event = run.admitted_s
    happened = ~np.isnan(event)
    seen, censored = measured & happened, measured & ~happened
    observed = (event[seen] - start[seen]) / tokens[seen]
    at_least = np.maximum(run.end_s - start[censored], 0.0) / tokens[censored]
    return observed, at_least


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
    return float(np.quantile(np.concatenate([ordered, at_least]), level)), True


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


def measure_run(
    path: ArrivalPath,
    run: EngineRun,
    *,
    warmup: float,
    kv_capacity: float,
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
    slo : mapping, optional
        Latency name → limit, s; adds `goodput`.
    """
    if len(run) != len(path):
        raise InputError("run", f"{len(run)} requests", f"have the {len(path)} requests of the path")
    values: dict[str, float] = {}
    lower_bounds: set[str] = set()
    for name in LATENCIES:
        observed, at_least = latencies(path, run, warmup, name)
        count = len(observed) + len(at_least)
        values[f"mean_{name}"] = float(observed.sum() + at_least.sum()) / count if count else math.nan
        if len(at_least):
            lower_bounds.add(f"mean_{name}")
        ordered = np.sort(observed)
        for word, level in QUANTILES.items():
            values[f"{word}_{name}"], is_bound = quantile(ordered, at_least, level)
            if is_bound:
                lower_bounds.add(f"{word}_{name}")

    window = run.end_s - warmup
    left = (run.status == _FINISHED) & (run.finish_s > warmup)
    prompt, output = path.prompt_tokens[left].sum(), path.output_tokens[left].sum()
    counts = {
        "request_throughput": np.count_nonzero(left),
        "output_throughput": run.emitted_tokens,
        "effective_throughput": output,
        "total_token_throughput": prompt + output,
        "mean_kv": run.kv_token_s,
        "kv_utilization": run.kv_token_s / kv_capacity,
        "mean_residents": run.resident_s,
        "mean_waiting": run.waiting_s,
        "busy_fraction": run.busy_s,
    }
    if slo:
        counts["goodput"] = np.count_nonzero(left & meets(path, run, slo))
    for name, total in counts.items():
        values[name] = float(total) / window if window > 0.0 else math.nan
    middle = warmup + window / 2
    grown = _in_system(path, run, run.end_s) - _in_system(path, run, middle)
    values["backlog_growth"] = grown / (window / 2) if window > 0.0 else math.nan
    measured = path.arrival_s >= warmup
    values["mean_batch_size"] = run.batch_size_sum / run.iterations if run.iterations else math.nan
    values["peak_kv"] = float(run.peak_kv)
    values["preemptions"] = float(run.preempted)
    values["wasted_tokens"] = float(run.wasted_tokens)
    values["completed"] = float(np.count_nonzero(left))
    values["rejected"] = float(np.count_nonzero(measured & (run.status == _REJECTED)))
    values["unfinished"] = float(
        np.count_nonzero(measured & (run.status != _REJECTED) & (run.status != _FINISHED))
    )
    return {name: values[name] for name in UNITS if name in values}, lower_bounds


def _in_system(path: ArrivalPath, run: EngineRun, instant: float) -> int:
    """Requests that have arrived and not left by `instant`."""
    here = (path.arrival_s <= instant) & (run.status != _REJECTED) & ~(run.finish_s <= instant)
    return int(np.count_nonzero(here))


def meets(path: ArrivalPath, run: EngineRun, slo: Mapping[str, float]) -> NDArray[np.bool_]:
    """Which requests met every limit, shape (N,); one whose event did not happen did not."""
    tokens = np.maximum(path.output_tokens - 1, 1)
    of_each = {
        "ttft": run.first_token_s - path.arrival_s,
        "tpot": (run.finish_s - run.first_token_s) / tokens,
        "e2e": run.finish_s - path.arrival_s,
        "scheduling_delay": run.admitted_s - path.arrival_s,
    }
    met = np.ones(len(path), dtype=np.bool_)
    for name, limit in slo.items():
        met &= of_each[name] <= limit
    return met


def interval(values: FloatArray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of R replications and its interval (Student t); NaN ends with one replication.

    Examples
    --------
    >>> tuple(round(x, 3) for x in interval(np.array([1.0, 2.0, 3.0])))
    (2.0, -0.484, 4.484)
    """
    from scipy.special import stdtrit

    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if known.size == 0:
        return math.nan, math.nan, math.nan
    mean = float(known.mean())
    if known.size == 1:
        return mean, math.nan, math.nan
    half = float(stdtrit(known.size - 1, 0.5 + confidence / 2.0) * known.std(ddof=1) / math.sqrt(known.size))
    return mean, mean - half, mean + half
