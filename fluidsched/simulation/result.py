"""What happened: every policy's runs on the common paths, their measures, and how to look at them.

Letters: R replications, N_r requests of path r. The measures are those of
`fluidsched.simulation.measures`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_choice, check_count, check_fields, check_keys, check_real
from fluidsched._display import Tabular
from fluidsched._files import dumps, loads, read_text, write_whole
from fluidsched.errors import InputError
from fluidsched.server import Server
from fluidsched.simulation.deadlock import describe_deadlock
from fluidsched.simulation.limits import UNLIMITED, effective_limits
from fluidsched.simulation.measures import (
    OF_REQUESTS,
    QUANTILES,
    UNITS,
    Requests,
    alone_s,
    check_slo,
    interval,
    intervals,
    latencies,
    measure_requests,
    measure_run,
    measure_totals,
)
from fluidsched.simulation.records import STATUSES, VERDICTS, EngineRun
from fluidsched.simulation.steady import batch_means
from fluidsched.simulation.tally import Tally
from fluidsched.simulation.viewer import EVENTS, chrome_trace

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.policy.table import PolicyTable
    from fluidsched.workload import ArrivalPath

__all__ = ["Measured", "PolicyOutcome", "SimulationResult", "aligned", "plus_minus"]

SCHEMA = "fluidsched.simulation/1"

TOLERATED_GROWTH = 0.02
"""Backlog growth, as a share of the throughput, that a system called stable may still hide."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class PolicyOutcome:
    """One policy's outcome: what survives without the request records.

    Attributes
    ----------
    name : str
    values : dict of str to (R,) float array
        Measure → its value in each replication; NaN where undefined.
    lower_bounds : dict of str to (R,) bool array
        Measure → whether the value is a lower bound only.
    verdicts : tuple of str
        How each replication ended: "finished", "horizon" or "stuck".
    starved_types : tuple of str
        Types left in a stuck replication, in the table's order.
    deadlock : str
        State of the first stuck replication: who waits before which gate, what is held; empty where none is.
    """

    name: str
    values: Mapping[str, FloatArray]
    lower_bounds: Mapping[str, NDArray[np.bool_]]
    verdicts: tuple[str, ...]
    starved_types: tuple[str, ...]
    deadlock: str = ""

    def __post_init__(self) -> None:
        for array in (*self.values.values(), *self.lower_bounds.values()):
            array.flags.writeable = False

    def intervals(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Means of all measures over replications and ends of their intervals, in the order of `values`."""
        return intervals(np.array(list(self.values.values())))


class Measured:
    """Runs measured as they come in, and then no longer needed.

    Parameters
    ----------
    tables : sequence of PolicyTable
    server : Server
    warmup : float
        Start of the measured window, s.
    slo : mapping, optional
        Latency name → limit per request, s.
    replicas : sequence of Server, optional
        `server` alone by default; none at all says that they follow different tables.
    """

    def __init__(
        self,
        tables: Sequence[PolicyTable],
        server: Server,
        *,
        warmup: float,
        slo: Mapping[str, float] | None = None,
        replicas: Sequence[Server] | None = None,
    ) -> None:
        self.tables = tuple(tables)
        self.server = server
        self.warmup = warmup
        self.slo = check_slo(slo)
        self.alike = replicas is None or len(replicas) > 0
        self.replicas = tuple(replicas or ()) or (server,)
        self.found: list[list[tuple[dict[str, float], set[str]]]] = [[] for _ in tables]
        self.ends: list[list[tuple[str, tuple[str, ...]]]] = [[] for _ in tables]
        self.deadlocks: list[tuple[int, str] | None] = [None for _ in tables]

    def add(self, k: int, paths: Sequence[ArrivalPath], runs: Sequence[EngineRun]) -> None:
        """Measure the next replications of table k."""
        table = self.tables[k]
        slots = sum(effective_limits(replica, table).slots for replica in self.replicas)
        for path, run in zip(paths, runs, strict=True):
            if run.verdict == "stuck" and self.deadlocks[k] is None:
                state = describe_deadlock(path, run, table if self.alike else None, self.server.kv_capacity)
                self.deadlocks[k] = len(self.found[k]), state
            self.ends[k].append((run.verdict, run.starved_types))
            self.found[k].append(
                measure_run(
                    path,
                    run,
                    warmup=self.warmup,
                    kv_capacity=self.server.kv_capacity,
                    slots=slots if slots < UNLIMITED else math.inf,
                    alone=_alone(path, self.replicas),
                    type_of=_types(path, table)[0],
                    slo=self.slo,
                )
            )

    def outcomes(self) -> tuple[PolicyOutcome, ...]:
        """The outcome of every table."""
        return tuple(
            _outcome(table, self.ends[k], self.found[k], self._deadlock(k))
            for k, table in enumerate(self.tables)
        )

    def _deadlock(self, k: int) -> str:
        """State of the first stuck replication."""
        stuck = self.deadlocks[k]
        if stuck is None:
            return ""
        r, state = stuck
        return state if len(self.found[k]) == 1 else f"in replication {r} {state}"


@dataclass(frozen=True, repr=False, eq=False)
class SimulationResult(Tabular):
    """Runs of several policies on the same R arrival paths.

    Made by `simulate`; read back from JSON it has the measures of every replication but no request
    records, so `requests`, `latencies`, `occupancy` and measures under other SLOs then raise `InputError`;
    so they do for replications that were not kept.

    Attributes
    ----------
    outcomes : tuple of PolicyOutcome
        One per policy, in the order given.
    replications : int
        R.
    horizon : float or None
        End of every run, s; None: run until empty.
    warmup : float
        Start of the measured window, s.
    seed : int or None
        Seed of the paths; None for a replayed path, or where it was not a plain number.
    engine : str
        "kernel" or "reference".
    workload : str
        Name of the workload or path.
    server : Server or None
        None where the iteration time is a function and the result was read from a file.
    slo : dict of str to float
        SLOs of `goodput`, s; empty where none were stated.
    tables : tuple of PolicyTable
        The policies; empty when read from a file.
    paths : tuple of ArrivalPath
        The common paths, all R or the first of them that were to be kept; empty when read from a file.
    replicas : tuple of Server
        Servers behind `server`: itself, or the replicas of a cluster; empty when read from a file.
    transients : dict of str to float
        Policy → end of its start as MSER-5 sees it, s, of which `warmup` is the latest; NaN where the first
        half of the run shows no end. Empty with a fixed warm-up.
    tallies : tuple of tuple of Tally
        ``[k][r]``: what runs without records counted; empty for others.
    """

    outcomes: tuple[PolicyOutcome, ...]
    replications: int
    horizon: float | None
    warmup: float
    seed: int | None
    engine: str
    workload: str
    server: Server | None
    slo: Mapping[str, float]
    tables: tuple[PolicyTable, ...] = ()
    paths: tuple[ArrivalPath, ...] = ()
    engine_runs: tuple[tuple[EngineRun, ...], ...] = ()
    replicas: tuple[Server, ...] = ()
    transients: Mapping[str, float] = field(default_factory=dict)
    tallies: tuple[tuple[Tally, ...], ...] = ()

    @classmethod
    def collect(
        cls,
        measured: Measured,
        paths: Sequence[ArrivalPath],
        engine_runs: Sequence[Sequence[EngineRun]],
        *,
        horizon: float | None,
        seed: int | None,
        engine: str,
        workload: str,
        transients: Mapping[str, float] | None = None,
    ) -> SimulationResult:
        """Put together what was measured and what is kept: `engine_runs[k][r]` is table k on path r."""
        outcomes = measured.outcomes()
        return cls(
            outcomes,
            len(outcomes[0].verdicts),
            horizon,
            measured.warmup,
            seed,
            engine,
            workload,
            measured.server,
            measured.slo,
            measured.tables,
            tuple(paths),
            tuple(map(tuple, engine_runs)) if paths else (),
            measured.replicas,
            dict(transients or {}),
        )

    @classmethod
    def collect_tallies(
        cls,
        tables: Sequence[PolicyTable],
        runs: Sequence[Sequence[tuple[EngineRun, Tally]]],
        *,
        horizon: float,
        warmup: float,
        seed: int | None,
        workload: str,
        server: Server,
        slo: Mapping[str, float],
    ) -> SimulationResult:
        """Measure runs whose requests were counted and not kept."""
        outcomes = []
        for table, of_table in zip(tables, runs, strict=True):
            slots = effective_limits(server, table).slots
            measured = []
            for run, tally in of_table:
                values, bounds = tally.measures()
                totals = measure_totals(
                    run,
                    warmup=warmup,
                    kv_capacity=server.kv_capacity,
                    slots=slots if slots < UNLIMITED else math.inf,
                )
                values = values | totals | tally.of_the_whole()
                measured.append(({name: values[name] for name in UNITS if name in values}, bounds))
            ends = [(run.verdict, run.starved_types) for run, _ in of_table]
            outcomes.append(_outcome(table, ends, measured))
        return cls(
            tuple(outcomes),
            len(runs[0]),
            horizon,
            warmup,
            seed,
            "kernel",
            workload,
            server,
            slo,
            tuple(tables),
            replicas=(server,),
            tallies=tuple(tuple(tally for _, tally in of_table) for of_table in runs),
        )

    # ------------------------------------------------------------------ by policy

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies, in the order given."""
        return tuple(outcome.name for outcome in self.outcomes)

    def outcome(self, policy: str) -> PolicyOutcome:
        """The outcome of one policy."""
        check_choice("policy", policy, self.policies)
        return self.outcomes[self.policies.index(policy)]

    def measures(self, policy: str) -> dict[str, FloatArray]:
        """Measure → its value in each replication, shape (R,)."""
        return dict(self.outcome(policy).values)

    def verdict(self, policy: str) -> str:
        """How the policy fared.

        "finished" for runs until empty; "stuck" with the starved types and how often; for runs to a horizon,
        by the 95 % interval of `backlog_growth` across replications: "unstable" if all of it is above zero
        (2.5 % of stable systems past their start are called so), "stable" if all of it is below 2 % of the
        throughput, else, and with one replication, "undecided".
        """
        outcome = self.outcome(policy)
        stuck = outcome.verdicts.count("stuck")
        if stuck:
            times = f", {stuck} of {self.replications} replications" if stuck < self.replications else ""
            return f"stuck ({', '.join(outcome.starved_types)}{times})"
        if "horizon" not in outcome.verdicts:
            return "finished"
        two = np.stack([outcome.values["backlog_growth"], outcome.values["request_throughput"]])
        (_, throughput), (low, _), (high, _) = intervals(two)
        if low > 0.0:
            return "unstable"
        return "stable" if high < TOLERATED_GROWTH * throughput else "undecided"

    def run(self, policy: str, replication: int = 0) -> EngineRun:
        """The engine's record of one run."""
        self._need_records()
        self.outcome(policy)
        check_count("replication", replication, maximum=self.replications - 1)
        if replication >= len(self.paths):
            raise InputError(
                "replication",
                replication,
                f"be one of the first {len(self.paths)}, whose records were kept",
                "Simulate with a larger kept_replications to have more.",
            )
        return self.engine_runs[self.policies.index(policy)][replication]

    def _tally(self, policy: str, replication: int) -> Tally:
        """What a run without records counted."""
        self.outcome(policy)
        check_count("replication", replication, maximum=self.replications - 1)
        return self.tallies[self.policies.index(policy)][replication]

    def requests(self, policy: str, replication: int = 0) -> pd.DataFrame:
        """One row per request of one run.

        Columns ``arrival_s prompt_tokens output_tokens type admitted_s first_token_s finish_s preemptions
        status``; times in seconds, NaN where the thing did not happen. Where anybody left unfinished, also
        ``left_s``, when the request left in whatever way. ``type`` is the path's label, or
        the name of the table's row where the path has none.
        """
        import pandas as pd

        run = self.run(policy, replication)
        path = self.paths[replication]
        of_request, names = _types(path, self.tables[self.policies.index(policy)])
        codes = np.zeros(len(path), dtype=np.int64) if of_request is None else of_request
        types = np.asarray(names, dtype=object)[codes]
        frame = pd.DataFrame(
            {
                "arrival_s": path.arrival_s,
                "prompt_tokens": path.prompt_tokens,
                "output_tokens": path.output_tokens,
                "type": types,
                "admitted_s": run.admitted_s,
                "first_token_s": run.first_token_s,
                "finish_s": run.finish_s,
                "preemptions": run.preemptions,
                "status": np.asarray(STATUSES, dtype=object)[run.status],
            }
        )
        if not np.array_equal(run.left_s, run.finish_s, equal_nan=True):
            frame["left_s"] = run.left_s
        return frame

    def write_requests(self, path: str | os.PathLike[str], policy: str, replication: int = 0) -> None:
        """Write the requests of one run with the columns of `requests`, as Parquet or CSV by the name's suffix.

        In CSV what did not happen is empty. Parquet needs pyarrow (``pip install fluidsched[parquet]``).
        """
        frame = self.requests(policy, replication)
        suffix = os.path.splitext(path)[1].lower()
        if suffix == ".parquet":
            from fluidsched.workload.trace_parquet import write_parquet

            write_parquet({name: frame[name].to_numpy() for name in frame.columns}, path)
        elif suffix == ".csv":
            write_whole(path, frame.to_csv(index=False, lineterminator="\n"))
        else:
            raise InputError("path", str(path), "end in .csv or .parquet")

    def chrome_trace(
        self,
        policy: str,
        replication: int = 0,
        *,
        start: float = 0.0,
        stop: float | None = None,
        iterations: bool = True,
        events: int = EVENTS,
        path: str | os.PathLike[str] | None = None,
    ) -> dict[str, Any]:
        """One run for a trace viewer (Perfetto, chrome://tracing); see `fluidsched.simulation.viewer`.

        Parameters
        ----------
        policy : str
        replication : int
        start, stop : float
            Window shown, s; None: to the end of the run.
        iterations : bool
            Show them too, for which the reference engine runs again up to `stop`, some hundred times slower than
            the kernel. A rule of the user's own is not kept in the result, so its iterations cannot be shown.
        events : int
            Most events in the file; of a longer window the beginning is shown.
        path : path, optional
            Where to write the JSON, whole.

        Returns
        -------
        dict
            What the JSON holds: ``traceEvents``, ``displayTimeUnit``, ``otherData`` (with the window shown).

        Examples
        --------
        >>> import fluidsched as fs
        >>> path = fs.ArrivalPath.from_arrays([0.0, 0.5], [4, 2], [2, 1])
        >>> server = fs.Server(10, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
        >>> trace = fs.simulate(path, server, fs.baselines.vllm()).chrome_trace("vllm")
        >>> [(event["name"], event["dur"]) for event in trace["traceEvents"] if event["ph"] == "X"]
        [('prefill', 1000000.0), ('prefill + decode', 1000000.0)]
        """
        run = self.run(policy, replication)
        start = check_real("start", start, minimum=0.0)
        stop = math.inf if stop is None else check_real("stop", stop, above=start)
        events = check_count("events", events, minimum=100)
        if len(self.replicas) != 1:
            raise InputError(
                "result", f"{len(self.replicas)} replicas", "be of one server: iterations are per server"
            )
        table = self.tables[self.policies.index(policy)]
        found = chrome_trace(
            self.paths[replication],
            run,
            self.replicas[0],
            table,
            horizon=self.horizon,
            start=start,
            stop=stop,
            iterations=iterations,
            events=events,
        )
        if path is not None:
            write_whole(path, dumps(found, indent=None))
        return found

    def latencies(self, policy: str, measure: str, replication: int = 0) -> tuple[FloatArray, int]:
        """A latency of every measured request of one run, s; and how many are censored."""
        run = self.run(policy, replication)
        observed, at_least = latencies(self.paths[replication], run, self.warmup, measure)
        return observed, len(at_least)

    def occupancy(self, policy: str, replication: int = 0) -> FloatArray:
        """The decimated series of one run, shape (K, 4): time (s), KV tokens, residents, waiting."""
        if self.tallies:
            series = self._tally(policy, replication).occupancy
        else:
            series = self.run(policy, replication).occupancy
        assert series is not None
        return series

    def occupancy_frame(self, policy: str, replication: int = 0) -> pd.DataFrame:
        """The decimated series of `occupancy` with columns ``time_s kv_tokens residents waiting``."""
        import pandas as pd

        series = self.occupancy(policy, replication)
        frame = pd.DataFrame(series, columns=["time_s", "kv_tokens", "residents", "waiting"])
        return frame.astype(dict.fromkeys(frame.columns[1:], np.int64))

    def _need_records(self, *, every: bool = False) -> None:
        """Refuse without records, or without those of every replication."""
        if not self.engine_runs:
            kind = "a run without records" if self.tallies else "a result read from a file"
            if self.tables and not self.tallies:
                kind = "a result of which no replication was kept"
            raise InputError("result", kind, "hold its request records", "Simulate again to have them.")
        if every and len(self.paths) < self.replications:
            raise InputError(
                "result",
                f"records of {len(self.paths):,} of {self.replications:,} replications",
                "hold those of all",
                "Simulate without kept_replications.",
            )

    # ------------------------------------------------------------------ all policies

    def summary(self) -> pd.DataFrame:
        """Tidy frame: policy, measure, unit, estimate, low, high, replications, lower_bound.

        `low` and `high` are the ends of the 95 % interval across replications, NaN with one. `lower_bound`
        says that requests without the event at the end made the estimate a lower bound.
        """
        import pandas as pd

        frames = []
        for outcome in self.outcomes:
            estimate, low, high = outcome.intervals()
            columns = {
                "policy": outcome.name,
                "measure": list(outcome.values),
                "unit": [UNITS[name] for name in outcome.values],
                "estimate": estimate,
                "low": low,
                "high": high,
                "replications": self.replications,
                "lower_bound": [bool(outcome.lower_bounds[name].any()) for name in outcome.values],
            }
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    def to_frame(self) -> pd.DataFrame:
        """The same as `summary`."""
        return self.summary()

    def by_type(self) -> pd.DataFrame:
        """Tidy frame of the measures of every request type's own requests; see `summary`.

        Columns policy, type, measure, unit, estimate, low, high, replications, lower_bound. Types are the path's
        labels, or the rows of each policy's table where the path has none. Measures are those that can be read
        off requests: latencies and slowdown, throughputs, goodput under the stated SLOs, counts.
        """
        import pandas as pd

        if not self.tallies:
            self._need_records(every=True)
        rows = []
        for k, table in enumerate(self.tables):
            measured: dict[str, list[tuple[dict[str, float], set[str]]]] = {}
            for r in range(self.replications):
                for name, found in self._by_type(k, r).items():
                    measured.setdefault(name, []).append(found)
            for name, runs in measured.items():
                for measure in OF_REQUESTS:
                    if measure not in runs[0][0]:
                        continue  # goodput without SLOs
                    estimate, low, high = interval(np.array([values[measure] for values, _ in runs]))
                    rows.append(
                        {
                            "policy": table.name,
                            "type": name,
                            "measure": measure,
                            "unit": UNITS[measure],
                            "estimate": estimate,
                            "low": low,
                            "high": high,
                            "replications": self.replications,
                            "lower_bound": any(measure in bounds for _, bounds in runs),
                        }
                    )
        return pd.DataFrame(rows)

    def _by_type(self, k: int, r: int) -> dict[str, tuple[dict[str, float], set[str]]]:
        """Type → measures of its own requests in one run, and which of them are lower bounds."""
        if self.tallies:
            return self.tallies[k][r].by_type()
        path, run = self.paths[r], self.engine_runs[k][r]
        of_request, names = _types(path, self.tables[k])
        requests = Requests.of(path, run, _alone(path, self.replicas))
        return {
            name: measure_requests(
                requests if of_request is None else requests.at(of_request == j),
                start=self.warmup,
                end=run.end_s,
                slo=self.slo,
            )
            for j, name in enumerate(names)
        }

    def batch_means(
        self,
        policy: str,
        *,
        replication: int = 0,
        baseline: str | None = None,
        confidence: float = 0.95,
    ) -> pd.DataFrame:
        """Intervals of one long run from its own batches; `fluidsched.simulation.steady` has the method.

        Parameters
        ----------
        policy : str
        replication : int
            Which run.
        baseline : str, optional
            Another policy: the frame is then of the differences to it, batch by batch. Both ran on the same
            path, so what batches of busy times add to both cancels.
        confidence : float
            Of the intervals, in (0, 1).

        Returns
        -------
        DataFrame
            Columns measure, unit, estimate, low, high, batches, independence (p-value of independent batches).
            `low` and `high` are NaN where the run is too short for batches that pass the test.

        Examples
        --------
        >>> import fluidsched as fs
        >>> workload = fs.Workload([fs.RequestType("chat", 4.0, prompt_tokens=512, output_tokens=128)])
        >>> server = fs.Server(137_000, fs.IterationTime.paper(d0=0.01, d1=3.3e-7))
        >>> runs = fs.simulate(workload, server, fs.baselines.vllm(), horizon=3600.0, replications=1, seed=7)
        >>> row = runs.batch_means("vllm").set_index("measure").loc["request_throughput"]
        >>> print(f"{row.low:.2f} to {row.high:.2f} from {row.batches} batches")
        3.95 to 4.10 from 64 batches
        """
        import pandas as pd

        check_real("confidence", confidence, above=0.0, below=1.0)
        names = [m for m in BATCHED if m != "goodput" or self.slo]
        whole, parts = self._batches(policy, replication, names)
        if baseline is not None:
            other, other_parts = self._batches(baseline, replication, names)
            mine = parts
            whole = whole - other
            parts = lambda count: mine(count) - other_parts(count)  # noqa: E731
        rows = []
        for m, name in enumerate(names):
            found = batch_means(float(whole[m]), lambda count, m=m: parts(count)[:, m], confidence)  # type: ignore[misc]
            rows.append({"measure": name, "unit": UNITS[name], **found._asdict()})
        return pd.DataFrame(rows)

    def _batches(
        self, policy: str, replication: int, names: Sequence[str]
    ) -> tuple[FloatArray, Callable[[int], FloatArray]]:
        """Measures of a run, (M,), and a function that gives them in each of K batches, (K, M)."""
        if self.tallies:
            tally = self._tally(policy, replication)

            @cache
            def counted(count: int) -> FloatArray:
                return np.array([[values[name] for name in names] for values in tally.parts(count)])

            return np.array([tally.measures()[0][name] for name in names]), counted
        run, path = self.run(policy, replication), self.paths[replication]
        requests = Requests.of(path, run, _alone(path, self.replicas))

        def measured(start: float, stop: float) -> list[float]:
            values, _ = measure_requests(requests, start=start, stop=stop, end=run.end_s, slo=self.slo)
            return [values[name] for name in names]

        @cache
        def parts(count: int) -> FloatArray:
            edges = np.linspace(self.warmup, run.end_s, count + 1)
            edges[-1] = math.inf
            return np.array([measured(*pair) for pair in pairwise(edges.tolist())])

        return np.array(measured(self.warmup, math.inf)), parts

    def with_slo(self, slo: Mapping[str, float]) -> SimulationResult:
        """The same runs measured under these SLOs: latency name → limit per request, s."""
        self._need_records(every=True)
        assert self.server is not None
        measured = Measured(self.tables, self.server, warmup=self.warmup, slo=slo, replicas=self.replicas)
        for k, runs in enumerate(self.engine_runs):
            measured.add(k, self.paths, runs)
        return SimulationResult.collect(
            measured,
            self.paths,
            self.engine_runs,
            horizon=self.horizon,
            seed=self.seed,
            engine=self.engine,
            workload=self.workload,
            transients=self.transients,
        )

    def to_serve_summary(self) -> list[dict[str, Any]]:
        """One row per policy in the field names of ``vllm bench serve``, means over replications.

        Times in ms, rates per second. `duration` is the measured window; ``request_goodput`` needs SLOs. Token
        totals are those of the requests completed.
        """
        rows = []
        for outcome in self.outcomes:
            mean = dict(zip(outcome.values, outcome.intervals()[0].tolist(), strict=True))
            row: dict[str, Any] = {"policy": outcome.name, "completed": mean["completed"]}
            row["failed"] = sum(mean.get(status, 0.0) for status in ("rejected", "abandoned", "aborted"))
            row["unfinished"] = mean["unfinished"]
            row["duration"] = (
                mean["completed"] / mean["request_throughput"] if mean["completed"] > 0 else math.nan
            )
            inputs = mean["total_token_throughput"] - mean["effective_throughput"]
            row["total_input_tokens"] = inputs * row["duration"]
            row["total_output_tokens"] = mean["effective_throughput"] * row["duration"]
            for name in ("request_throughput", "output_throughput", "total_token_throughput"):
                row[name] = mean[name]
            row["request_goodput"] = mean.get("goodput", math.nan)
            for ours in ("mean", *QUANTILES):
                word = "median" if ours == "p50" else ours
                for latency in ("ttft", "tpot", "itl", "e2e"):
                    field = f"{word}_{'e2el' if latency == 'e2e' else latency}_ms"
                    row[field] = 1000.0 * mean[f"{ours}_{latency}"]
            rows.append(row)
        return rows

    # ------------------------------------------------------------------ files

    def to_dict(self) -> dict[str, Any]:
        """Measures of every replication and how they were made, as plain JSON values; no request records."""
        function = self.server is not None and self.server.iteration_time.coefficients is None
        return {
            "schema": SCHEMA,
            "workload": self.workload,
            "server": None if self.server is None or function else self.server.to_dict(),
            "engine": self.engine,
            "replications": self.replications,
            "horizon_s": self.horizon,
            "warmup_s": self.warmup,
            "seed": self.seed,
            "slo_s": dict(self.slo),
            "transients_s": {name: None if math.isnan(end) else end for name, end in self.transients.items()},
            "policies": [
                {
                    "name": outcome.name,
                    "verdicts": list(outcome.verdicts),
                    "starved_types": list(outcome.starved_types),
                    **({"deadlock": outcome.deadlock} if outcome.deadlock else {}),
                    "measures": {
                        name: {
                            "unit": UNITS[name],
                            "values": [None if math.isnan(value) else value for value in values.tolist()],
                            "lower_bounds": outcome.lower_bounds[name].tolist(),
                        }
                        for name, values in outcome.values.items()
                    },
                }
                for outcome in self.outcomes
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], argument: str = "result") -> SimulationResult:
        """Read what `to_dict` wrote; anything else is an `InputError` naming the field."""
        fields = (
            "workload",
            "server",
            "engine",
            "replications",
            "horizon_s",
            "warmup_s",
            "seed",
            "slo_s",
            "transients_s",
            "policies",
        )
        values = dict(zip(fields, check_fields(argument, data, SCHEMA, fields), strict=True))
        replications = check_count(f"{argument}.replications", values["replications"], minimum=1)
        if not isinstance(values["policies"], list) or not values["policies"]:
            raise InputError(f"{argument}.policies", values["policies"], "be a non-empty list")
        for name in ("workload", "engine"):
            if not isinstance(values[name], str):
                raise InputError(f"{argument}.{name}", values[name], "be a string")
        for name in ("slo_s", "transients_s"):
            if not isinstance(values[name], Mapping):
                raise InputError(f"{argument}.{name}", values[name], "be an object of numbers")
        horizon, seed = values["horizon_s"], values["seed"]
        return cls(
            tuple(
                _read_outcome(f"{argument}.policies[{k}]", policy, replications)
                for k, policy in enumerate(values["policies"])
            ),
            replications,
            None if horizon is None else check_real(f"{argument}.horizon_s", horizon, above=0.0),
            check_real(f"{argument}.warmup_s", values["warmup_s"], minimum=0.0),
            None if seed is None else check_count(f"{argument}.seed", seed),
            values["engine"],
            values["workload"],
            None if values["server"] is None else Server.from_dict(values["server"], f"{argument}.server"),
            check_slo(values["slo_s"]),
            transients={
                name: math.nan
                if end is None
                else check_real(f"{argument}.transients_s.{name}", end, minimum=0.0)
                for name, end in values["transients_s"].items()
            },
        )

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the JSON text, and write it to `path` (whole or not at all) if one is given."""
        text = dumps(self.to_dict())
        if path is not None:
            write_whole(path, text)
        return text

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> SimulationResult:
        """Read the file `to_json` wrote."""
        return cls.from_dict(loads(str(path), read_text("result", path)))

    # ------------------------------------------------------------------ to look at

    @property
    def title(self) -> str:
        """What was simulated, in a line."""
        until = "until empty" if self.horizon is None else f"over {self.horizon:,.6g} s"
        count = f"{self.replications} replication{'s' if self.replications > 1 else ''}"
        rule = ""
        if self.transients:
            unseen = [name for name, end in self.transients.items() if math.isnan(end)]
            rule = f" (MSER-5{': no end of the start seen for ' + ', '.join(unseen) if unseen else ''})"
        return f"{self.workload} {until}, measured from {self.warmup:,.6g} s on{rule}, {count}, {self.engine} engine"

    @property
    def _shown(self) -> tuple[tuple[str, str, float, str], ...]:
        """The columns printed: how many were rejected, or left unfinished, only where anybody was or did."""
        leavers = (
            (status, status, 1.0, "")
            for status in ("rejected", "abandoned", "aborted")
            if any(outcome.values.get(status, np.zeros(1)).any() for outcome in self.outcomes)
        )
        return (*_SHOWN, *leavers)

    def _rows(self) -> list[list[str]]:
        rows = []
        for outcome in self.outcomes:
            cells = [outcome.name]
            for measure, _, factor, _ in self._shown:
                estimate, low, high = interval(outcome.values[measure])
                is_bound = bool(outcome.lower_bounds[measure].any())
                cells.append(plus_minus(factor * estimate, factor * (high - low) / 2, is_bound))
            rows.append([*cells, self.verdict(outcome.name)])
        return rows

    def __repr__(self) -> str:
        header = [
            "policy",
            *(f"{label} [{unit}]" if unit else label for _, label, _, unit in self._shown),
            "ended",
        ]
        stuck = [f"{o.name} is stuck {o.deadlock}" for o in self.outcomes if o.deadlock]
        return "\n".join([self.title, aligned([header, *self._rows()]), *stuck, FOOTNOTE])

    def _summary(self) -> list[tuple[str, str]]:
        return [("simulated", self.title)]

    def _shown_frame(self) -> pd.DataFrame:
        wide = self.summary().pivot(index="measure", columns="policy", values="estimate")
        return wide.reindex(index=[m for m in UNITS if m in wide.index], columns=list(self.policies))

    def plot(self, measure: str = "ttft", ax: Axes | None = None) -> Axes:
        """Draw the distribution of a latency; see `fluidsched.plots.latency_distribution`."""
        from fluidsched import plots

        return plots.latency_distribution(self, measure, ax=ax)


FOOTNOTE = (
    "± half width of the 95 % interval across replications; ≥ lower bound, requests still without the event"
)

_SHOWN = (
    ("request_throughput", "throughput", 1.0, "req/s"),
    ("output_throughput", "output", 1.0, "tokens/s"),
    ("mean_ttft", "mean TTFT", 1.0, "s"),
    ("p99_ttft", "p99 TTFT", 1.0, "s"),
    ("mean_tpot", "mean TPOT", 1e3, "ms"),
    ("kv_utilization", "KV used", 100.0, "%"),
    ("preemptions", "preemptions", 1.0, ""),
)
"""Columns of the printed table: measure, heading, factor, unit."""


BATCHED = tuple(name for name in OF_REQUESTS if name not in ("completed", "unfinished", "rejected"))
"""Measures that batches of a run have: those of requests that do not grow with its length."""


def _types(path: ArrivalPath, table: PolicyTable) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Type of every request and the types' names: the path's labels, else the table's rows (None: all its one)."""
    if path.type is not None:
        return path.type, path.type_names
    return table.classify(path) if len(table.types) > 1 else None, table.type_names


def _outcome(
    table: PolicyTable,
    ends: Sequence[tuple[str, tuple[str, ...]]],
    measured: Sequence[tuple[dict[str, float], set[str]]],
    deadlock: str = "",
) -> PolicyOutcome:
    names = list(measured[0][0])
    values = np.array([list(map(found.get, names)) for found, _ in measured], dtype=np.float64).T.copy()
    bounds = np.array(
        [[name in bounded for name in names] for _, bounded in measured], dtype=np.bool_
    ).T.copy()
    starved = {name for _, names in ends for name in names}
    return PolicyOutcome(
        table.name,
        dict(zip(names, values, strict=True)),
        dict(zip(names, bounds, strict=True)),
        tuple(verdict for verdict, _ in ends),
        tuple(name for name in table.type_names if name in starved),
        deadlock,
    )


def _alone(path: ArrivalPath, replicas: Sequence[Server]) -> FloatArray | None:
    """Time of every request alone on the quickest replica; equal replicas are one object."""
    return alone_s(path, list({id(server): server for server in replicas}.values()))


def plus_minus(estimate: float, half_width: float, lower_bound: bool = False) -> str:
    """Print an estimate with as many digits as its half width makes meaningful.

    Examples
    --------
    >>> plus_minus(5.53214, 0.0213), plus_minus(12.0, math.nan, True), plus_minus(math.nan, math.nan)
    ('5.532 ± 0.021', '≥ 12', '–')
    >>> plus_minus(5.53214, math.inf)
    '6 ± inf'
    """
    if math.isnan(estimate):
        return "–"
    mark = "≥ " if lower_bound else ""
    if math.isnan(half_width):
        return f"{mark}{estimate:,.4g}" if abs(estimate) < 1e4 else f"{mark}{estimate:,.0f}"
    reference = half_width or abs(estimate)
    digits = 1 - math.floor(math.log10(reference)) if 0.0 < reference < math.inf else 0
    digits = min(max(digits, 0), 6)
    return f"{mark}{estimate:,.{digits}f} ± {half_width:,.{digits}f}"


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1, last_is_number: bool = False) -> str:
    """Lay out rows of cells, the first one the header, as text columns.

    The first `left` columns and, unless it holds numbers, the last are set to the left, the others to the right.
    """
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    last = len(widths) - 1
    lines = [
        "  ".join(
            cell.ljust(width) if c < left or (c == last and not last_is_number) else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


def _read_outcome(place: str, data: Any, replications: int) -> PolicyOutcome:
    names = ("name", "verdicts", "starved_types", "measures")
    fields = check_keys(place, data, None, names, ("deadlock",))
    name, verdicts, starved, measures = (fields[field] for field in names)
    deadlock = fields.get("deadlock", "")
    if not isinstance(deadlock, str):
        raise InputError(f"{place}.deadlock", deadlock, "be a string")
    if not isinstance(name, str) or not name:
        raise InputError(f"{place}.name", name, "be a non-empty string")
    if not isinstance(verdicts, list) or len(verdicts) != replications:
        raise InputError(f"{place}.verdicts", verdicts, f"have {replications} words, one per replication")
    for r, word in enumerate(verdicts):
        check_choice(f"{place}.verdicts[{r}]", word, VERDICTS)
    if not isinstance(starved, list) or not all(isinstance(word, str) for word in starved):
        raise InputError(f"{place}.starved_types", starved, "be a list of names")
    if not isinstance(measures, Mapping):
        raise InputError(f"{place}.measures", measures, "be an object with one entry per measure")
    values: dict[str, FloatArray] = {}
    lower_bounds: dict[str, NDArray[np.bool_]] = {}
    for measure, entry in measures.items():
        where = f"{place}.measures.{measure}"
        check_choice(where, measure, tuple(UNITS))
        _, numbers, bounds = check_fields(where, entry, None, ("unit", "values", "lower_bounds"))
        for entries, items in (("values", numbers), ("lower_bounds", bounds)):
            if not isinstance(items, list) or len(items) != replications:
                raise InputError(f"{where}.{entries}", items, f"have {replications} entries")
        if not all(isinstance(flag, bool) for flag in bounds):
            raise InputError(f"{where}.lower_bounds", bounds, "hold true or false")
        values[measure] = np.array(
            [math.nan if v is None else check_real(f"{where}.values[{r}]", v) for r, v in enumerate(numbers)]
        )
        lower_bounds[measure] = np.array(bounds, dtype=np.bool_)
    for measure in (*(measure for measure, *_ in _SHOWN), "backlog_growth"):
        if measure not in values:
            raise InputError(f"{place}.measures.{measure}", "nothing", "be present")
    return PolicyOutcome(name, values, lower_bounds, tuple(verdicts), tuple(starved), deadlock)
