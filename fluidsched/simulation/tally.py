r"""Requests counted and forgotten: the measures of runs too long to keep their records.

A tally holds sums, counts and logarithmic histograms (`fluidsched.simulation.histogram`) of the requests folded into
it, each once: when it has finished, or, if it never does, at the end. Its memory does not grow with their number.
Means, rates and counts are those of `fluidsched.simulation.measures` up to rounding; quantiles of latencies and
slowdown are within `histogram.RELATIVE_ERROR`, 0.8 %, of the exact ones (latencies below a microsecond count as 0).

Everything is kept for `PARTS` equal parts of the window: latencies in the part a request arrived in, rates in the part
it finished in. So the parts of one long run give its batch means (`fluidsched.simulation.steady`) too. It is kept for
every request type as well, over the whole window: 113 kB a type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fluidsched.simulation import histogram
from fluidsched.simulation.measures import LATENCIES, QUANTILES, Requests, jain_index, meets
from fluidsched.simulation.records import STATUSES
from fluidsched.simulation.steady import BATCHES

__all__ = ["PARTS", "Tally"]

PARTS = BATCHES[0]
"""Parts of the window."""

_FINISHED, _REJECTED = STATUSES.index("finished"), STATUSES.index("rejected")
_NAMES = (*LATENCIES, "slowdown")
_LEFT = ("completed", "prompt_tokens", "output_tokens", "good")

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class _Sums:
    """Counts and sums of requests in M groups: parts of the window, or types."""

    def __init__(self, groups: int) -> None:
        shape = (len(_NAMES), groups)
        self.counts = np.zeros((2, *shape, histogram.BUCKETS), dtype=np.int64)  # observed, censored
        self.sums = np.zeros(shape)
        self.left = np.zeros((len(_LEFT), groups), dtype=np.int64)
        self.rejected = np.zeros(groups, dtype=np.int64)
        self.unfinished = np.zeros(groups, dtype=np.int64)

    def measures(self, groups: slice, window: float, slo: bool) -> tuple[dict[str, float], set[str]]:
        """What `measures.measure_requests` says of the groups together, over a window of so many seconds."""
        values: dict[str, float] = {}
        lower_bounds: set[str] = set()
        for k, name in enumerate(_NAMES):
            observed, censored = self.counts[:, k, groups].sum(axis=1)
            seen, unseen = int(observed.sum()), int(censored.sum())
            count = seen + unseen
            values[f"mean_{name}"] = float(self.sums[k, groups].sum()) / count if count else math.nan
            if unseen:
                lower_bounds.add(f"mean_{name}")
            for word, level in QUANTILES.items():
                rank = (count - 1) * level
                is_bound = count > 0 and rank > seen - 1
                sample = observed + censored if is_bound else observed
                values[f"{word}_{name}"] = histogram.at_rank(sample, rank)
                if is_bound:
                    lower_bounds.add(f"{word}_{name}")
        completed, prompt, output, good = (int(total) for total in self.left[:, groups].sum(axis=1))
        rates = {
            "request_throughput": completed,
            "effective_throughput": output,
            "total_token_throughput": prompt + output,
            **({"goodput": good} if slo else {}),
        }
        values.update({name: amount / window for name, amount in rates.items()})
        values["completed"] = float(completed)
        values["rejected"] = float(self.rejected[groups].sum())
        values["unfinished"] = float(self.unfinished[groups].sum())
        values["abandoned"] = values["aborted"] = 0.0  # runs in pieces know no deadlines
        return values, lower_bounds


class Tally:
    """Sums of one run over the window [warmup, end], J types.

    Parameters
    ----------
    warmup, end : float
        The window, s.
    types : sequence of str
        Names of the J types.
    slo : mapping
        Latency name → limit, s; counts what goodput needs if not empty.

    Attributes
    ----------
    occupancy : (K, 4) float array or None
        The run's decimated series, once it is over; see `EngineRun.occupancy`.
    """

    def __init__(self, warmup: float, end: float, types: Sequence[str], slo: Mapping[str, float]) -> None:
        self.edges = np.linspace(warmup, end, PARTS + 1)
        self.types = tuple(types)
        self.slo = dict(slo)
        self.of_part = _Sums(PARTS)
        self.of_type = _Sums(len(self.types))
        count = len(self.types)
        self.asked, self.served = np.zeros(count), np.zeros(count)
        self.slowdown, self.slowed = np.zeros(count), np.zeros(count)
        self.at_middle = self.at_end = 0
        self.occupancy: FloatArray | None = None

    def fold(self, requests: Requests, type_of: IntArray, end: float) -> None:
        """Count requests, in order of arrival, that will not change any more; `end` is the end of the run, s."""
        edges, warmup = self.edges, self.edges[0]
        middle = 0.5 * (edges[0] + edges[-1])
        rejected = requests.status == _REJECTED
        finished = requests.status == _FINISHED
        for name, instant in (("at_middle", middle), ("at_end", edges[-1])):
            here = (requests.arrival <= instant) & ~rejected & ~(requests.finish <= instant)
            setattr(self, name, getattr(self, name) + int(np.count_nonzero(here)))

        left = finished & (requests.finish > warmup)
        done = requests.at(left)
        part = np.clip(np.searchsorted(edges, done.finish, side="left") - 1, 0, PARTS - 1)
        tokens = (done.prompt + done.output).astype(np.float64)
        weights = [None, done.prompt, done.output, meets(done, self.slo) if self.slo else np.zeros(len(part))]
        count = len(self.types)
        of_left = type_of[left]
        for k, weight in enumerate(weights):
            self.of_part.left[k] += np.bincount(part, weight, PARTS).astype(np.int64)
            self.of_type.left[k] += np.bincount(of_left, weight, count).astype(np.int64)
        self.served += np.bincount(of_left, tokens, count)

        first = int(np.searchsorted(requests.arrival, warmup))
        own, types = requests.at(slice(first, None)), type_of[first:]
        part = np.clip(np.searchsorted(edges, own.arrival, side="right") - 1, 0, PARTS - 1)
        self.of_part.rejected += np.bincount(part[rejected[first:]], minlength=PARTS)
        self.of_type.rejected += np.bincount(types[rejected[first:]], minlength=count)
        accepted = ~rejected[first:]
        if not accepted.all():
            own, types, part = own.at(accepted), types[accepted], part[accepted]
        waits = own.status != _FINISHED
        self.of_part.unfinished += np.bincount(part[waits], minlength=PARTS)
        self.of_type.unfinished += np.bincount(types[waits], minlength=count)
        asked = (own.prompt + own.output).astype(np.float64)
        self.asked += np.bincount(types, asked, count)
        if own.alone is not None:
            events = np.where(np.isnan(own.finish), end, own.finish)
            times = np.maximum(events - own.arrival, 0.0) / own.alone
            self.slowdown += np.bincount(types, times, count)
            self.slowed += np.bincount(types, minlength=count)
        for p in np.unique(part).tolist():  # in order of arrival: each part is a slice
            low, high = np.searchsorted(part, [p, p + 1]).tolist()
            self._observe(p, own.at(slice(low, high)), types[low:high], end)

    def _observe(self, part: int, requests: Requests, types: IntArray, end: float) -> None:
        """Count the latencies of requests that arrived in a part, type by type."""
        present = np.flatnonzero(np.bincount(types, minlength=len(self.types))).tolist()
        if len(present) > 1:
            order = np.argsort(types, kind="stable")
            requests, types = requests.at(order), types[order]
        for j in present:
            low, high = np.searchsorted(types, [j, j + 1]).tolist()
            inside = requests.at(slice(low, high))
            for k, name in enumerate(_NAMES):
                for c, values in enumerate(inside.values(name, end)):
                    if len(values):
                        counted, total = histogram.count(values), values.sum()
                        for sums, group in ((self.of_part, part), (self.of_type, j)):
                            sums.counts[c, k, group] += counted
                            sums.sums[k, group] += total

    def parts(self, count: int) -> list[dict[str, float]]:
        """Measures of requests in each of `count` equal batches, a divisor of `PARTS`."""
        size = PARTS // count
        return [self.measures(slice(size * i, size * (i + 1)))[0] for i in range(count)]

    def measures(self, parts: slice = slice(None)) -> tuple[dict[str, float], set[str]]:
        """What `measures.measure_requests` says of the whole or of some parts of the window."""
        edges = np.append(self.edges[:-1][parts], self.edges[1:][parts][-1])
        return self.of_part.measures(parts, float(edges[-1] - edges[0]), bool(self.slo))

    def by_type(self) -> dict[str, tuple[dict[str, float], set[str]]]:
        """The same of every type's own requests, over the whole window."""
        window = float(self.edges[-1] - self.edges[0])
        return {
            name: self.of_type.measures(slice(j, j + 1), window, bool(self.slo))
            for j, name in enumerate(self.types)
        }

    def of_the_whole(self) -> dict[str, float]:
        """Growth of the backlog and fairness."""
        half = float(self.edges[-1] - self.edges[0]) / 2.0
        fair = {"service_fairness": math.nan, "slowdown_fairness": math.nan}
        with np.errstate(invalid="ignore", divide="ignore"):
            fair["service_fairness"] = jain_index(
                np.where(self.asked > 0, self.served / self.asked, math.nan)
            )
            fair["slowdown_fairness"] = jain_index(self.slowdown / self.slowed)
        return {"backlog_growth": (self.at_end - self.at_middle) / half, **fair}
