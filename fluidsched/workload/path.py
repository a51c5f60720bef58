"""Arrival paths: who came when, wanting what.

A path is the realised input of one run: N requests sorted by arrival time, each with its prompt and output
length. It is drawn from a `Workload` or read from a trace, and the same path serves every policy that is
compared. Times are seconds since the start of the run.

Resampling a path, `ArrivalPath.bootstrapped`, is the *stationary bootstrap* (Politis and Romano, 1994) over time:
the observed window of D seconds is bent to a circle, and the new path is a sequence of arcs of it, each from a
uniform point, of independent exponential lengths of mean b; requests keep everything but their time, and within an
arc their distances. Every instant of the circle is equally likely to be seen, so a window of h seconds has N h/D
requests on average, and with the circular pair density m(τ), Σ over ordered pairs of requests τ apart per second,

    Var N*(h) = λh + 2 ∫_0^h (h − τ) e^{−τ/b} (m(τ) − λ²) dτ,       λ = N/D:

the observed covariance of rates at distance τ is kept up to the factor e^{−τ/b}. So bursts and drift much shorter
than b survive, longer ones do not, and bootstrapped paths are as independent as the arcs are many. Exponential
lengths are chosen over blocks of fixed length because the result is stationary and this formula exact.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched._checks import check_real
from fluidsched._display import Tabular
from fluidsched._files import fingerprint, write_whole
from fluidsched.errors import InputError
from fluidsched.workload.lengths import FloatArray, IntArray, read_only, token_array
from fluidsched.workload.prefix_cache import PromptBlocks

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.workload.model import Workload
    from fluidsched.workload.predictions import Prediction

__all__ = ["ArrivalPath", "DrawnPaths", "Seed", "generator", "seed_sequence"]

MAX_REQUESTS = 10**8
"""Largest number of requests in a file of columns; expected one, or of blocks, of one bootstrapped path."""

Seed = int | np.random.SeedSequence | np.random.Generator

TOKEN_COLUMNS = (
    "prompt_tokens",
    "output_tokens",
    "predicted_output_tokens",
    "predicted_output_minimum",
    "cached_prompt_tokens",
)
LEAST_TOKENS = {"cached_prompt_tokens": 0}
"""Smallest number of tokens a column may hold, where it is not 1."""

STAY_COLUMNS = ("patience_s", "abort_after_s")
COLUMNS = ("arrival_s", *TOKEN_COLUMNS, *STAY_COLUMNS, "type")
"""The columns a request may have, in the order of exported tables."""

PARTS = (*COLUMNS, "prompt_blocks")
"""All that a path has one of per request; names of blocks are not exported."""


def generator(seed: Seed) -> np.random.Generator:
    """A generator from a seed; a generator is returned as it is."""
    if isinstance(seed, np.random.Generator):
        return seed
    return np.random.default_rng(seed_sequence(seed))


def seed_sequence(seed: Seed) -> np.random.SeedSequence:
    """A seed sequence from a seed; a generator gives 128 bits, so another sequence at each call."""
    if isinstance(seed, np.random.SeedSequence):
        return seed
    if isinstance(seed, np.random.Generator):
        return np.random.SeedSequence(seed.integers(0, 2**32, size=4, dtype=np.uint32).tolist())
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise InputError("seed", seed, "be a whole number of at least 0, a SeedSequence or a Generator")
    return np.random.SeedSequence(int(seed))


@dataclass(frozen=True, eq=False, repr=False)
class ArrivalPath(Tabular):
    """N requests in order of arrival.

    Parameters
    ----------
    arrival_s : float64[N]
        Arrival times, seconds since the start of the run, non-decreasing, at least 0. Equal times keep their
        order.
    prompt_tokens, output_tokens : int64[N]
        Lengths, each at least 1 token.
    type : int64[N], optional
        Index into `type_names`, when requests carry a label.
    type_names : tuple of str
        Labels; empty when requests carry none.
    predicted_output_tokens : int64[N], optional
        What a scheduler believes the output length to be; the upper end where it believes in an interval.
    horizon : float, optional
        End of the window the path was drawn for, seconds; None for a replayed trace, which ends when it is
        empty.
    name : str
        Where the path comes from.
    predicted_output_minimum : int64[N], optional
        Lower end of the predicted interval, at most `predicted_output_tokens`; with it only.
    cached_prompt_tokens : int64[N], optional
        c, how many tokens of the prompt, from its beginning, the server finds in its prefix cache, 0 to
        prompt_tokens - 1 (the last token is always computed). None: nothing is cached.
    patience_s : float64[N], optional
        Seconds from its arrival that a request waits for its first admission before it abandons the queue, at
        least 0; infinite: for ever. None: for ever, all.
    abort_after_s : float64[N], optional
        Seconds from its arrival after which the client hangs up, waiting or served, at least 0; infinite: never.
    prompt_blocks : PromptBlocks, optional
        Names of the whole blocks that each of the N prompts begins with, for a prefix cache that fills with the run
        (rules 39 to 42 of `fluidsched.simulation.reference`); without cached_prompt_tokens only. None: no cache.

    Examples
    --------
    >>> ArrivalPath.from_arrays([0.0, 0.5, 2.0], [100, 900, 40], [10, 50, 7], name="three")
    ArrivalPath('three': 3 requests in 2 s, 1.5 req/s)
    """

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    type: IntArray | None = None
    type_names: tuple[str, ...] = ()
    predicted_output_tokens: IntArray | None = None
    horizon: float | None = None
    name: str = "path"
    predicted_output_minimum: IntArray | None = None
    cached_prompt_tokens: IntArray | None = None
    patience_s: FloatArray | None = None
    abort_after_s: FloatArray | None = None
    prompt_blocks: PromptBlocks | None = None

    def __post_init__(self) -> None:
        arrivals = _time_array(self.arrival_s)
        store: dict[str, Any] = {"arrival_s": arrivals}
        for field in TOKEN_COLUMNS:
            given = getattr(self, field)
            if given is not None:
                store[field] = token_array(field, given, minimum=LEAST_TOKENS.get(field, 1))
        for field in STAY_COLUMNS:
            given = getattr(self, field)
            if given is not None:
                store[field] = _seconds_array(field, given, allow_inf=True)
        names = tuple(self.type_names)
        for name in names:
            if not isinstance(name, str) or not name:
                raise InputError("type_names", name, "hold non-empty strings")
        if len(set(names)) != len(names):
            raise InputError("type_names", ", ".join(names), "be unique")
        store["type_names"] = names
        if self.type is not None:
            store["type"] = _index_array(self.type, len(names))
        for field, array in store.items():
            if isinstance(array, np.ndarray):
                if len(array) != len(arrivals):
                    raise InputError(
                        field, f"{len(array)} values", f"have one per request ({len(arrivals)} in arrival_s)"
                    )
                read_only(array)
        if self.predicted_output_minimum is not None:
            _check_interval(store["predicted_output_minimum"], store.get("predicted_output_tokens"))
        if self.cached_prompt_tokens is not None:
            _check_cached(store["cached_prompt_tokens"], store["prompt_tokens"])
        if self.prompt_blocks is not None:
            _check_blocks(self.prompt_blocks, store["prompt_tokens"], self.cached_prompt_tokens)
        if self.horizon is not None:
            last = float(arrivals[-1]) if len(arrivals) else 0.0
            remedy = "It is the end of the window, not before the last arrival."
            store["horizon"] = check_real("horizon", self.horizon, above=0, minimum=last, remedy=remedy)
        for field, value in store.items():
            object.__setattr__(self, field, value)

    @classmethod
    def from_arrays(
        cls,
        arrival_s: ArrayLike,
        prompt_tokens: ArrayLike,
        output_tokens: ArrayLike,
        type: ArrayLike | None = None,
        predicted_output_tokens: ArrayLike | None = None,
        *,
        predicted_output_minimum: ArrayLike | None = None,
        cached_prompt_tokens: ArrayLike | None = None,
        patience_s: ArrayLike | None = None,
        abort_after_s: ArrayLike | None = None,
        prompt_blocks: PromptBlocks | None = None,
        type_names: Sequence[str] = (),
        horizon: float | None = None,
        name: str = "path",
    ) -> ArrivalPath:
        """Build a path from any array-likes (copied); see the class for shapes and units.

        Raises
        ------
        InputError
            Times that are not finite, negative or decreasing; lengths that are not whole numbers of at least
            1; types outside `type_names`; columns of different lengths. The message names the first offender.
        """
        return cls(
            arrival_s,  # type: ignore[arg-type]  # __post_init__ converts
            prompt_tokens,  # type: ignore[arg-type]
            output_tokens,  # type: ignore[arg-type]
            type,  # type: ignore[arg-type]
            tuple(type_names),
            predicted_output_tokens,  # type: ignore[arg-type]
            horizon,
            name,
            predicted_output_minimum,  # type: ignore[arg-type]
            cached_prompt_tokens,  # type: ignore[arg-type]
            patience_s,  # type: ignore[arg-type]
            abort_after_s,  # type: ignore[arg-type]
            prompt_blocks,
        )

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration(self) -> float:
        """Seconds observed: the horizon of a sampled path, last minus first arrival of a replayed one."""
        if self.horizon is not None:
            return self.horizon
        return float(self.arrival_s[-1] - self.arrival_s[0]) if len(self) else 0.0

    @property
    def rate(self) -> float:
        """Requests per second, N / `duration`; infinite when all come at once."""
        if len(self) == 0:
            return 0.0
        return len(self) / self.duration if self.duration > 0 else math.inf

    def label(self, index: int) -> str | None:
        """Type name of a request; None when the path carries no types."""
        return None if self.type is None else self.type_names[self.type[index]]

    def to_workload(self, types: int = 12, name: str | None = None) -> Workload:
        """Workload of this path: `types` bins of (prompt, output), each with its empirical joint law.

        See `fluidsched.workload.binning` for the bins. Each type's rate is its number of requests over
        `duration`, so the total rate and every moment of the path are conserved. Of its prompts the share of
        tokens that the path has cached is cached (`RequestType.cached_prefix_fraction`).

        Parameters
        ----------
        types : int
            Number of bins k = a·b: `a` ranges of prompts times `b` ranges of outputs each, a ≤ b as equal as
            possible.
        name : str, optional
            Name of the workload; the path's by default.

        Raises
        ------
        InputError
            The path has no duration, or too few distinct lengths for so many bins.

        Examples
        --------
        >>> path = ArrivalPath.from_arrays([0, 1, 2, 4], [10, 10, 900, 900], [5, 80, 5, 80])
        >>> path.to_workload(types=4).type_names
        ('p1-10/o1-5', 'p1-10/o6+', 'p11+/o1-5', 'p11+/o6+')
        """
        from fluidsched.workload.binning import bin_path

        return bin_path(self, types, self.name if name is None else name)

    def labelled(self, workload: Workload) -> ArrivalPath:
        """This path with the type of each request, found from the ranges of the types of `workload`."""
        return dataclasses.replace(
            self,
            type=workload.classify(self.prompt_tokens, self.output_tokens),
            type_names=workload.type_names,
        )

    def selected(self, index: NDArray[Any] | slice) -> ArrivalPath:
        """The requests at `index` (a mask, a slice, or ascending indices); horizon and name stay."""
        columns = {c: getattr(self, c) for c in PARTS}
        return dataclasses.replace(self, **{c: a[index] for c, a in columns.items() if a is not None})

    def accelerated(self, zeta: float) -> ArrivalPath:
        """The same requests `zeta` > 0 times as fast: all arrivals, and the horizon, divided by `zeta`.

        Clients do not change with the traffic: how long they stay is kept, in seconds.

        Examples
        --------
        >>> path = ArrivalPath.from_arrays([0.0, 1.0, 4.0], [9, 9, 9], [5, 5, 5])
        >>> path.accelerated(2.0).arrival_s
        array([0. , 0.5, 2. ])
        """
        zeta = check_real("zeta", zeta, above=0)
        horizon = None if self.horizon is None else self.horizon / zeta
        return dataclasses.replace(self, arrival_s=self.arrival_s / zeta, horizon=horizon)

    def at_rate(self, arrival_rate: float) -> ArrivalPath:
        """The same requests faster or slower, at `arrival_rate` requests per second (of `duration`).

        Bursts and drift are kept in the number of requests, and get shorter or longer in seconds.

        Examples
        --------
        >>> path = ArrivalPath.from_arrays([0.0, 1.0, 4.0], [9, 9, 9], [5, 5, 5])
        >>> path.at_rate(3.0)
        ArrivalPath('path': 3 requests in 1 s, 3 req/s)
        """
        arrival_rate = check_real("arrival_rate", arrival_rate, above=0)
        if not 0 < self.rate < math.inf:
            raise InputError(
                f"path {self.name!r}",
                f"{len(self)} requests in {self.duration:g} s",
                "have requests at different times",
                "Only then does it have a rate to change.",
            )
        return self.accelerated(arrival_rate / self.rate)

    def dispersion(self, window: float) -> float:
        """Measured index of dispersion of counts: variance over mean of the numbers in consecutive windows.

        Parameters
        ----------
        window : float
            Length of a window, seconds; at least two must fit in `duration`. What is left at the end is left
            out.

        Returns
        -------
        float
            Σ (n_i − n̄)² / (M n̄) over M windows; NaN without requests. Near 1 for Poisson arrivals.

        Examples
        --------
        >>> path = ArrivalPath.from_arrays([0.1, 0.2, 0.3, 3.5], [9] * 4, [5] * 4, horizon=4.0)
        >>> path.dispersion(window=1.0)
        1.5
        """
        window = check_real("window", window, above=0, maximum=self.duration / 2)
        edges = self._start + window * np.arange(math.floor(self.duration / window) + 1)
        counts = np.diff(np.searchsorted(self.arrival_s, edges))
        mean = counts.mean()
        return float(counts.var() / mean) if mean > 0 else math.nan

    @property
    def _start(self) -> float:
        """Start of the observed window of `duration` seconds."""
        return 0.0 if self.horizon is not None or len(self) == 0 else float(self.arrival_s[0])

    def bootstrapped(self, horizon: float, seed: Seed, *, mean_block: float | None = None) -> ArrivalPath:
        """A new path made of random pieces of this one, so that its bursts are kept.

        The stationary bootstrap over time; the module says how and what it keeps. Requests keep lengths, types
        and predictions; a longer horizon only adds requests. Resampling the requests one by one, or sampling
        `to_workload()`, would lose the order: bursts, drift, neighbours of similar length.

        Parameters
        ----------
        horizon : float
            Length of the new path, seconds; may exceed this path's.
        seed : int, SeedSequence or Generator
            Source of randomness.
        mean_block : float, optional
            b, mean length of a piece, seconds: well above the time over which bursts last. A tenth of
            `duration` by default.

        Examples
        --------
        >>> path = ArrivalPath.from_arrays([0, 1, 1, 1, 9], [9] * 5, [5] * 5, horizon=10.0)
        >>> path.bootstrapped(1000.0, seed=1)
        ArrivalPath('path': 439 requests in 1,000 s, 0.439 req/s)
        """
        horizon = check_real("horizon", horizon, above=0)
        if len(self) == 0 or self.duration <= 0:
            raise InputError(
                f"path {self.name!r}",
                f"{len(self)} requests in {self.duration:g} s",
                "have requests and a duration",
                "There is nothing to cut pieces from.",
            )
        if mean_block is None:
            mean_block = self.duration / 10
        mean_block = check_real("mean_block", mean_block, above=0)
        if max(horizon / mean_block, horizon * self.rate) > MAX_REQUESTS:
            raise InputError(
                "horizon",
                f"{horizon:g} s",
                f"give at most {MAX_REQUESTS:,} requests and pieces",
                "Use a shorter horizon.",
            )
        if self.prompt_blocks is not None:
            raise InputError(
                f"path {self.name!r}",
                "requests that name their blocks",
                "name none: pieces drawn again would find all their prompts in the cache",
                "Read the trace with prefix_cache_tokens, which states what is cached of each prompt.",
            )
        rng = generator(seed)
        uniforms = rng.random((int(horizon / mean_block) + 8, 2))
        ends = np.cumsum(-np.log1p(-uniforms[:, 1])) * mean_block
        while ends[-1] <= horizon:
            uniforms = np.concatenate([uniforms, rng.random((len(uniforms) // 4 + 8, 2))])
            ends = np.cumsum(-np.log1p(-uniforms[:, 1])) * mean_block
        begins = np.concatenate([[0.0], ends[:-1]])
        used = begins < horizon
        begins, ends = begins[used], np.minimum(ends[used], horizon)
        points = uniforms[used, 0] * self.duration  # where on the circle each piece begins
        circle = self.arrival_s - self._start

        def arrivals_before(place: FloatArray) -> IntArray:
            """Arrivals before a point of the circle unrolled, where every turn brings all requests again."""
            turns, rest = np.divmod(place, self.duration)
            before: IntArray = turns.astype(np.int64) * len(self) + np.searchsorted(circle, rest)
            return before

        first, last = arrivals_before(points), arrivals_before(points + (ends - begins))
        counts = last - first
        piece = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
        turn, request = np.divmod(first[piece] + within, len(self))
        times = begins[piece] + (circle[request] + turn * self.duration - points[piece])
        # Rounding may put a time an ulp outside its piece.
        times = np.clip(np.maximum.accumulate(times), 0.0, math.nextafter(horizon, 0.0))
        drawn = {c: getattr(self, c)[request] for c in COLUMNS if getattr(self, c) is not None}
        return dataclasses.replace(self, **(drawn | {"arrival_s": times, "horizon": horizon}))

    def with_predictions(self, prediction: Prediction, seed: Seed) -> ArrivalPath:
        """This path with predicted output lengths, drawn from the true ones.

        Parameters
        ----------
        prediction : Prediction
            From `fluidsched.predictions`, e.g. ``predictions.lognormal(cv=0.5)``.
        seed : int, SeedSequence or Generator
            Source of randomness.

        Examples
        --------
        >>> from fluidsched import predictions
        >>> path = ArrivalPath.from_arrays([0, 1], [9, 9], [5, 50])
        >>> path.with_predictions(predictions.bucketed([16, 64]), seed=1).predicted_output_tokens
        array([16, 64])
        """
        predicted, minimum = prediction.predict(self.output_tokens, generator(seed))
        return dataclasses.replace(self, predicted_output_tokens=predicted, predicted_output_minimum=minimum)

    def thinned(self, fraction_per_type: ArrayLike, seed: Seed) -> ArrivalPath:
        """Keep each request of type j with probability f_j, independently.

        One uniform number is drawn per request and the request is kept if it is below f_j, so with the same
        seed a larger fraction keeps a superset.

        Parameters
        ----------
        fraction_per_type : float or float[J]
            f_j in [0, 1], one per entry of `type_names`, or one number for all requests.
        seed : int, SeedSequence or Generator
            Source of randomness.

        Examples
        --------
        >>> path = ArrivalPath.from_arrays([0, 1, 2], [9, 9, 9], [5, 5, 5], [0, 1, 0], type_names=("a", "b"))
        >>> len(path.thinned([1.0, 0.0], seed=1))
        2
        """
        fractions = np.asarray(fraction_per_type, dtype=np.float64)
        if not np.all((fractions >= 0) & (fractions <= 1)):
            raise InputError("fraction_per_type", fraction_per_type, "lie between 0 and 1")
        if fractions.ndim:
            if self.type is None:
                remedy = "Label the path first: path.labelled(workload)."
                raise InputError(
                    "fraction_per_type",
                    f"{fractions.size} values",
                    "be one number for a path without types",
                    remedy,
                )
            if fractions.shape != (len(self.type_names),):
                raise InputError(
                    "fraction_per_type",
                    f"shape {fractions.shape}",
                    f"have one value per type ({len(self.type_names)})",
                )
            fractions = fractions[self.type]
        kept = generator(seed).random(len(self)) < fractions
        return self.selected(kept)

    def _columns(self) -> dict[str, NDArray[Any]]:
        """The columns of the exported table, in order; types by name."""
        columns: dict[str, NDArray[Any]] = {
            c: getattr(self, c) for c in COLUMNS if c != "type" and getattr(self, c) is not None
        }
        if self.type is not None:
            columns["type"] = np.asarray(self.type_names, dtype=object)[self.type]
        return columns

    def to_frame(self) -> pd.DataFrame:
        """One row per request, with the columns of `to_csv`."""
        import pandas as pd

        return pd.DataFrame(self._columns())

    def plot(self, ax: Axes | None = None, *, bins: int = 60) -> Axes:
        """Draw the arrival rate over time; see `fluidsched.plots.arrivals`."""
        from fluidsched import plots

        return plots.arrivals(self, bins=bins, ax=ax)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """The path as CSV text, written whole to `path` if given.

        `read_trace` reads it back with the same times to the last bit, lengths and type labels. The horizon,
        the name and the names of blocks are not part of the file: a path read back is a replayed one.
        """
        import csv

        columns = self._columns()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
        if path is not None:
            write_whole(path, text.getvalue())
        return text.getvalue()

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the path as a Parquet file, whole, with the columns of `to_csv`; `read_trace` reads it back.

        Needs pyarrow (``pip install fluidsched[parquet]``).
        """
        from fluidsched.workload.trace_parquet import write_parquet

        write_parquet(self._columns(), path)

    @property
    def most_cached_tokens(self) -> IntArray | None:
        """The most of each prompt that any run can find in a prefix cache, int64[N]; None: nothing."""
        if self.prompt_blocks is None:
            return self.cached_prompt_tokens
        tokens = self.prompt_blocks.block_tokens
        return (self.prompt_tokens - 1) // tokens * tokens

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything but the name: equal requests, equal fingerprints."""
        arrays = [
            self.arrival_s,
            self.prompt_tokens,
            self.output_tokens,
            self.type,
            self.predicted_output_tokens,
            *([] if self.predicted_output_minimum is None else [self.predicted_output_minimum]),
        ]
        cached = self.cached_prompt_tokens
        return fingerprint(
            {
                **({} if cached is None else {"cached": fingerprint(cached.astype("<i8").tobytes())}),
                **({} if self.prompt_blocks is None else {"blocks": self.prompt_blocks.fingerprint}),
                "columns": [
                    None if a is None else fingerprint(a.astype(a.dtype.newbyteorder("<")).tobytes())
                    for a in arrays
                ],
                "type_names": self.type_names,
                "horizon": self.horizon,
            }
            | {
                field: fingerprint(given.astype("<f8").tobytes())
                for field in STAY_COLUMNS
                if (given := getattr(self, field)) is not None
            }
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ArrivalPath):
            return NotImplemented
        return self.name == other.name and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash((self.name, self.fingerprint))

    def __repr__(self) -> str:
        rate = "all at once" if math.isinf(self.rate) else f"{self.rate:.4g} req/s"
        return f"ArrivalPath({self.name!r}: {len(self):,} requests in {self.duration:,.6g} s, {rate})"


def _seconds_array(field: str, times: ArrayLike, *, allow_inf: bool = False) -> FloatArray:
    try:
        array = np.array(times, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(field, times, "be numbers (seconds)") from None
    if array.ndim != 1:
        raise InputError(field, f"an array of shape {array.shape}", "be one-dimensional")
    most = math.inf if allow_inf else math.nextafter(math.inf, 0.0)
    if array.size and not (array.min() >= 0 and array.max() <= most):  # NaN fails too
        index = int(np.argmax(~((array >= 0) & (array <= most))))
        required = (
            "be at least 0 (seconds from the arrival) or infinite"
            if allow_inf
            else "be finite and at least 0 (seconds from the start)"
        )
        raise InputError(f"{field}[{index}]", array[index].item(), required)
    return array


def _time_array(times: ArrayLike) -> FloatArray:
    array = _seconds_array("arrival_s", times)
    falls = array[1:] < array[:-1]
    if falls.any():
        index = int(np.argmax(falls)) + 1
        raise InputError(
            f"arrival_s[{index}]",
            f"{array[index].item():g} after {array[index - 1].item():g}",
            "not be before the arrival it follows",
            "Sort the requests by arrival time.",
        )
    return array


def _check_interval(minimum: IntArray, predicted: IntArray | None) -> None:
    if predicted is None:
        raise InputError(
            "predicted_output_tokens",
            "nothing",
            "be given with predicted_output_minimum",
            "It is the upper end of the interval.",
        )
    above = minimum > predicted
    if above.any():
        index = int(np.argmax(above))
        raise InputError(
            f"predicted_output_minimum[{index}]",
            int(minimum[index]),
            f"be at most predicted_output_tokens, {int(predicted[index])}",
        )


def _check_cached(cached: IntArray, prompt: IntArray) -> None:
    above = cached >= prompt
    if above.any():
        index = int(np.argmax(above))
        raise InputError(
            f"cached_prompt_tokens[{index}]",
            int(cached[index]),
            f"be below prompt_tokens, {int(prompt[index])}",
            "The last token of a prompt is always computed.",
        )


def _check_blocks(blocks: PromptBlocks, prompt: IntArray, cached: IntArray | None) -> None:
    if not isinstance(blocks, PromptBlocks):
        raise InputError("prompt_blocks", blocks, "be PromptBlocks")
    if cached is not None:
        raise InputError(
            "cached_prompt_tokens",
            f"{len(cached)} values",
            "be None with prompt_blocks",
            "What is cached then follows from the run.",
        )
    if len(blocks) != len(prompt):
        raise InputError(
            "prompt_blocks", f"those of {len(blocks)}", f"be of the path's {len(prompt)} requests"
        )
    counts = np.diff(blocks.first)
    missing = counts < prompt // blocks.block_tokens
    if missing.any():
        index = int(np.argmax(missing))
        raise InputError(
            f"prompt_blocks, request {index}",
            f"{int(counts[index])} names",
            f"name the {int(prompt[index]) // blocks.block_tokens} whole blocks of {blocks.block_tokens} tokens of its "
            f"{int(prompt[index]):,} prompt tokens",
        )


def _index_array(types: ArrayLike, count: int) -> IntArray:
    array = np.asarray(types)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise InputError(
            "type", f"an array of {array.dtype}, shape {array.shape}", "be whole numbers, one per request"
        )
    if array.size and (array.min() < 0 or array.max() >= count):
        index = int(np.argmax((array < 0) | (array >= count)))
        raise InputError(f"type[{index}]", array[index].item(), f"index one of the {count} type_names")
    return array.astype(np.int64)


class DrawnPaths(Sequence[ArrivalPath]):
    """R paths of which each is drawn when it is asked for, and not kept.

    Parameters
    ----------
    count : int
        R.
    draw : callable
        The path of a replication 0 … R - 1; the same one whenever it is asked for.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 4.0, prompt_tokens=512, output_tokens=128)])
    >>> paths = DrawnPaths(1000, lambda r: workload.sample(60.0, seed=r))
    >>> len(paths), paths[999].horizon, len(paths[:3])
    (1000, 60.0, 3)
    """

    def __init__(self, count: int, draw: Callable[[int], ArrivalPath]) -> None:
        self._range = range(count)
        self._draw = draw

    def __len__(self) -> int:
        return len(self._range)

    @overload
    def __getitem__(self, index: int) -> ArrivalPath: ...

    @overload
    def __getitem__(self, index: slice) -> list[ArrivalPath]: ...

    def __getitem__(self, index: int | slice) -> ArrivalPath | list[ArrivalPath]:
        if isinstance(index, slice):
            return [self._draw(r) for r in self._range[index]]
        return self._draw(self._range[index])
