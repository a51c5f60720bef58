"""Iteration time fitted to measured iterations.

A point is one measured iteration: n tokens in the batch (prefilled and decoded), K KV tokens read by its
decodes, A units of prefill attention work, and the time t. Three forms are fitted,

    affine       T = c0 + c1·n + c2·K                                 on all points (or on n ≤ max_batch_tokens)
    two-piece    T = c0 + c1·n + c2·max(0, n − m) + c3·K + c4·A       on all points (likewise)
    paper        T = d0 + d1·K                                        on pure decodes

by non-negative least squares on relative residuals, Σ (T/t − 1)², so that short iterations count as much as
long ones and the time is convex and increasing. The knee m is searched: on a grid of the distinct token counts
and eighths between them, then continuously around the best; at least two distinct counts lie on either side,
the knee included.

What the points cannot tell is refused, not guessed: a column without spread, or that follows from the others,
leaves its coefficient undetermined; a slope that wants to be negative, or a large error, says that the points
are not iterations of this form.

Times of whole generations are as many times too long as these have iterations, and of one length they fit as well as
iterations do. They show by what an iteration cannot do: a decode reads the weights once, as an iteration that prefills
does too, and so does not take several times as long as the shortest of those; and the weights in a GPU's memory are
read in tens of milliseconds. What the points cannot show, a server like the one measured (`like`) does. Generations of
several lengths do not fit; if dividing the times by a further column of the table mends that, the refusal names it.

The errors of a fit say nothing beyond the measured range; `remarks` says where the
server reaches beyond it.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched import _files
from fluidsched._checks import LARGEST, SMALLEST, check_choice, check_count, check_fields, check_real
from fluidsched._display import Tabular
from fluidsched.errors import InputError
from fluidsched.server.iteration import IterationTime
from fluidsched.server.server import Server

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Calibration", "Form", "IterationPoints", "calibrate"]

Form = Literal["two-piece", "affine", "paper"]
FORMS: tuple[str, ...] = get_args(Form)

SCHEMA = "fluidsched.calibration/1"

#: Columns read from a table, in the order of `IterationPoints`; others are ignored.
COLUMNS = ("n_tok", "batch_decode", "kv_tok", "pre_attn", "t_s")

SHORTEST_DECODE = (
    1e-4  # s; launching an iteration takes longer; 2 ms in the fastest of the catalog's 153 profiles
)
SLOWEST_SHORT_DECODE = 0.085  # s; the shortest decode of the slowest of them
LARGEST_DECODE_RATIO = (
    4.0  # shortest decode over shortest iteration with a prefill; at most 1.03 in the profiles
)
LARGEST_RATIO_TO_LIKE = 5.0  # of the times to those of a server like this one, in the median and either way
LARGEST_LOSS = 1.05  # root mean square with slopes kept from being negative, over that without
SMALLEST_SINGULAR_VALUE = (
    1e-6  # of the columns scaled to length one; at least 1.2e-3 in the catalog's profiles
)

GRID = 8  # places for a knee tried between two token counts: their squared error can have several minima

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class IterationPoints:
    """Measured iterations, one entry each; N points.

    Parameters
    ----------
    batch_tokens : array_like of shape (N,)
        Tokens in the iteration, prefilled and decoded.
    decode_tokens : array_like of shape (N,)
        Decoding requests among them, one token each.
    kv_tokens : array_like of shape (N,)
        KV tokens those decodes read.
    prefill_attention : array_like of shape (N,)
        Σ over prefill chunks of chunk·(tokens already computed + chunk/2), tokens².
    time : array_like of shape (N,)
        Duration of the iteration, s.

    Raises
    ------
    InputError
        Naming the column and the row at fault, counted from 1 without the header.
    """

    batch_tokens: Array
    decode_tokens: Array
    kv_tokens: Array
    prefill_attention: Array
    time: Array

    def __post_init__(self) -> None:
        size: int | None = None
        for field, column in zip(fields(self), COLUMNS, strict=True):
            values = _numbers(column, getattr(self, field.name))
            if size is not None and values.size != size:
                raise InputError(column, f"{values.size} rows", f"have {size} rows, as the other columns")
            size = values.size
            values.setflags(write=False)
            object.__setattr__(self, field.name, values)
        prefill = self.batch_tokens - self.decode_tokens
        for bad, argument, values, required in (
            (self.batch_tokens < 1, "n_tok", self.batch_tokens, "be at least one token"),
            (self.batch_tokens % 1 != 0, "n_tok", self.batch_tokens, "be a whole number"),
            (self.decode_tokens % 1 != 0, "batch_decode", self.decode_tokens, "be a whole number"),
            (self.time <= 0, "t_s", self.time, "be positive"),
            (prefill < 0, "batch_decode", self.decode_tokens, "not exceed n_tok: a decode is one token"),
            (
                self.kv_tokens < self.decode_tokens,
                "kv_tok",
                self.kv_tokens,
                "be at least one token per decode",
            ),
            (
                (self.kv_tokens > 0) & (self.decode_tokens == 0),
                "kv_tok",
                self.kv_tokens,
                "be 0 where nothing decodes (the context of a prefill belongs to pre_attn)",
            ),
            (
                (self.prefill_attention > 0) != (prefill > 0),
                "pre_attn",
                self.prefill_attention,
                "be positive exactly where prompt tokens are prefilled: chunk·(chunk_ctx + chunk/2)",
            ),
        ):
            if bad.any():
                row = int(np.argmax(bad))
                raise InputError(f"{argument}, row {row + 1}", float(values[row]), required)

    def __len__(self) -> int:
        return int(self.time.size)

    @classmethod
    def read(cls, table: str | os.PathLike[str] | Mapping[str, ArrayLike] | pd.DataFrame) -> IterationPoints:
        """Points from a CSV or CSV.gz file, a frame, or arrays by column name.

        Needed are the columns n_tok, batch_decode, kv_tok, pre_attn (tokens, tokens²) and t_s (seconds).

        Raises
        ------
        InputError
            If the file cannot be read, or a column is missing or holds something else than numbers.
        """
        columns = _columns(table)
        for name in COLUMNS:
            if name not in columns:
                raise InputError(
                    "points",
                    f"columns {', '.join(map(str, columns))}",
                    f"have a column {name!r}",
                    f"Needed are {', '.join(COLUMNS)}.",
                )
        return cls(*(columns[name] for name in COLUMNS))


@dataclass(frozen=True, eq=False, repr=False)
class Calibration(Tabular):
    """A server whose iteration time was fitted to measured iterations; made by `calibrate`.

    Attributes
    ----------
    form : {"two-piece", "affine", "paper"}
        What was fitted.
    server : Server
        With the fitted iteration time.
    points : IterationPoints
        All points given, N of them.
    max_batch_tokens : int or None
        Points with more tokens were left out of the fit.
    """

    form: Form
    server: Server
    points: IterationPoints
    max_batch_tokens: int | None = None

    @property
    def iteration_time(self) -> IterationTime:
        """The fitted iteration time, also `server.iteration_time`."""
        return self.server.iteration_time

    @cached_property
    def is_fitted(self) -> NDArray[np.bool_]:
        """Which points the fit used, shape (N,)."""
        return _used(self.points, self.form, self.max_batch_tokens)

    @cached_property
    def predicted(self) -> Array:
        """Fitted time of every point, shape (N,), s."""
        return _predict(self.iteration_time, self.points)

    @cached_property
    def relative_error(self) -> Array:
        """Fitted over measured time, minus 1, shape (N,)."""
        return np.asarray(self.predicted / self.points.time - 1.0)

    @property
    def mean_error(self) -> float:
        """Mean absolute relative error over the points fitted."""
        return float(np.abs(self.relative_error[self.is_fitted]).mean())

    @property
    def largest_error(self) -> float:
        """Largest absolute relative error over the points fitted."""
        return float(np.abs(self.relative_error[self.is_fitted]).max())

    @property
    def r_squared(self) -> float:
        """1 − Σ(T − t)²/Σ(t − mean t)² over the points fitted, in seconds; NaN if all took the same time."""
        time, predicted = self.points.time[self.is_fitted], self.predicted[self.is_fitted]
        spread = float(((time - time.mean()) ** 2).sum())
        return 1.0 - float(((predicted - time) ** 2).sum()) / spread if spread > 0.0 else math.nan

    @property
    def knee_tokens(self) -> float | None:
        """Where the second slope begins, tokens; None if the form has no knee or the fit found none."""
        rows = self.iteration_time.require_coefficients("the knee of a calibration")
        if len(rows) == 1 or rows[1, 1] == rows[0, 1]:
            return None
        return float((rows[0, 0] - rows[1, 0]) / (rows[1, 1] - rows[0, 1]))

    @cached_property
    def measured_range(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest value of each column among the points fitted."""
        return {
            field.name: (float(values.min()), float(values.max()))
            for field in fields(self.points)
            for values in (getattr(self.points, field.name)[self.is_fitted],)
        }

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """What to know before trusting the server: slopes the fit left at zero, use beyond the measured range."""
        found = []
        rows = self.iteration_time.require_coefficients("the remarks of a calibration")
        if self.form == "two-piece" and self.knee_tokens is None:
            found.append("no knee: the second slope is not steeper than the first")
        for column, name in ((2, "per decoded or prefilled token"), (3, "per KV token")):
            if (column == 3 or self.form != "paper") and not rows[:, column].any():
                found.append(f"the time {name} came out as 0")
        if self.form == "two-piece" and not rows[:, 4].any():
            found.append("the time per unit of prefill attention came out as 0")
        if not (self.points.decode_tokens < self.points.batch_tokens)[self.is_fitted].any():
            found.append("prefills are extrapolated: the points fitted are pure decodes")
        decodes = self.points.time[self.points.decode_tokens == self.points.batch_tokens]
        if decodes.size and decodes.min() > SLOWEST_SHORT_DECODE:
            found.append(
                f"the shortest decode, {decodes.min():.3g} s, is longer than on any server of the catalog "
                f"({SLOWEST_SHORT_DECODE:g} s): of several iterations?"
            )
        for limit, given, measured, unit in self._reached():
            if given is not None and given > measured:
                found.append(
                    f"beyond {measured:,.0f} {unit} the time is extrapolated ({limit} is {given:,.0f})"
                )
        return tuple(found)

    def _reached(self) -> tuple[tuple[str, float | None, float, str], ...]:
        """Limits of the server beside the largest values measured: name, limit, measured, unit."""
        return (
            ("kv_capacity", self.server.kv_capacity, self.measured_range["kv_tokens"][1], "KV tokens"),
            (
                "max_batch_size",
                self.server.max_batch_size,
                self.measured_range["decode_tokens"][1],
                "decodes",
            ),
            (
                "token_budget",
                self.server.token_budget,
                self.measured_range["batch_tokens"][1],
                "tokens in a batch",
            ),
        )

    def __repr__(self) -> str:
        lines = [
            f"Calibration({self.form}, {int(self.is_fitted.sum()):,} of {len(self.points):,} points: "
            f"mean error {self.mean_error:.1%}, largest {self.largest_error:.1%}, R² {self.r_squared:.4f})"
        ]
        if self.knee_tokens is not None:
            lines.append(f"  knee at {self.knee_tokens:,.0f} tokens")
        for name, unit in (
            ("batch_tokens", "tokens in a batch"),
            ("kv_tokens", "KV tokens"),
            ("time", "s"),
        ):
            low, high = self.measured_range[name]
            shown = f"{low:.4g} to {high:.4g}" if name == "time" else f"{low:,.0f} to {high:,.0f}"
            lines.append(f"  measured: {shown} {unit}")
        lines.extend(f"  remark: {remark}" for remark in self.remarks)
        lines.append("  " + repr(self.server).replace("\n", "\n  "))
        return "\n".join(lines)

    def to_frame(self) -> pd.DataFrame:
        """One row per point: its columns, the fitted time, the relative error, and whether the fit used it."""
        import pandas as pd

        columns = {
            name: getattr(self.points, field.name)
            for name, field in zip(COLUMNS, fields(self.points), strict=True)
        }
        return pd.DataFrame(
            {
                **columns,
                "fitted_s": self.predicted,
                "relative_error": self.relative_error,
                "is_fitted": self.is_fitted,
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw measured against fitted times; see `fluidsched.plots.calibration`."""
        from fluidsched import plots

        return plots.calibration(self, ax=ax)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, schema first; the errors and remarks are there for readers and follow from the rest."""
        return {
            "schema": SCHEMA,
            "form": self.form,
            "max_batch_tokens": self.max_batch_tokens,
            "mean_error": self.mean_error,
            "largest_error": self.largest_error,
            "r_squared": _files.to_jsonable(self.r_squared),
            "knee_tokens": self.knee_tokens,
            "remarks": list(self.remarks),
            "server": self.server.to_dict(),
            "points": {
                name: getattr(self.points, field.name).tolist()
                for name, field in zip(COLUMNS, fields(self.points), strict=True)
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """Read what `to_dict` wrote; anything else is an `InputError` naming the field."""
        derived = ("mean_error", "largest_error", "r_squared", "knee_tokens", "remarks")
        names = ("form", "max_batch_tokens", "server", "points")
        form, most, server, points = check_fields("calibration", data, SCHEMA, (*names, *derived))[:4]
        check_choice("calibration.form", form, FORMS)
        if most is not None:
            check_count("calibration.max_batch_tokens", most, minimum=1)
        columns = check_fields("calibration.points", points, None, COLUMNS)
        table = IterationPoints(*columns)
        if not _used(table, form, most).any():
            raise InputError("calibration.points", f"{len(table)} rows", f"hold a point of the form {form!r}")
        return cls(form, Server.from_dict(server, "calibration.server"), table, most)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the JSON text, and write it to `path` (whole or not at all) if one is given."""
        text = _files.dumps(self.to_dict())
        if path is not None:
            _files.write_whole(path, text)
        return text

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read the file `to_json` wrote."""
        return cls.from_dict(_files.loads(str(path), _files.read_text("calibration", path)))


def calibrate(
    points: str | os.PathLike[str] | Mapping[str, ArrayLike] | pd.DataFrame | IterationPoints,
    form: Form = "two-piece",
    *,
    kv_capacity: float,
    max_batch_size: int | None = None,
    token_budget: int | None = None,
    block_size: int | None = None,
    knee_tokens: float | None = None,
    max_batch_tokens: int | None = None,
    largest_mean_error: float = 0.25,
    largest_extrapolation: float = 100.0,
    longest_decode: float = 0.25,
    like: Server | None = None,
    name: str = "server",
    source: str | None = None,
) -> Calibration:
    """Fit the iteration time of a server to measured iterations.

    Parameters
    ----------
    points : path, frame, mapping of arrays, or IterationPoints
        Columns n_tok, batch_decode, kv_tok, pre_attn and t_s; see `IterationPoints`.
    form : {"two-piece", "affine", "paper"}
        See the module's mathematics.
    kv_capacity, max_batch_size, token_budget, block_size, name
        Of the server, as for `Server`; they take no part in the fit.
    knee_tokens : float, optional
        Fix the knee of "two-piece" here instead of searching it.
    max_batch_tokens : int, optional
        Leave points with more tokens than this out of the fit: a smaller error over a smaller range.
    largest_mean_error : float
        A fit with a larger mean relative error is refused.
    largest_extrapolation : float
        A server whose limits lie beyond this many times the largest measured batch or KV is refused; between once and
        this many times it is a remark.
    longest_decode : float
        s; a table whose shortest pure decode takes longer is refused as times of whole generations. In the catalog's
        profiles it takes 2 to 85 ms; a machine without a GPU may need more.
    like : Server, optional
        A server of the same GPU and model, such as one of the catalog: times that are, in the median, more than 5 times
        as long or as short as its at the same batches are refused.
    source : str, optional
        Where the points come from; by default the file's name.

    Returns
    -------
    Calibration

    Raises
    ------
    InputError
        If the points are too few, do not determine a coefficient, look like times of whole generations, get
        shorter as tokens are added, or are not described by the form.

    Examples
    --------
    >>> batch, kv = np.meshgrid([1, 8, 64], [100, 1000, 4000])
    >>> table = {"n_tok": batch.ravel(), "batch_decode": batch.ravel(), "kv_tok": (batch * kv).ravel(),
    ...          "pre_attn": np.zeros(9), "t_s": 0.01 + 3e-7 * (batch * kv).ravel()}
    >>> fitted = calibrate(table, "paper", kv_capacity=100_000)
    >>> fitted.iteration_time.coefficients.round(10).tolist()
    [[0.01, 3e-07, 0.0, 3e-07, 0.0]]
    >>> fitted.remarks
    ('prefills are extrapolated: the points fitted are pure decodes',)
    """
    check_choice("form", form, FORMS)
    if knee_tokens is not None:
        check_real("knee_tokens", knee_tokens, above=0.0)
        if form != "two-piece":
            raise InputError("knee_tokens", knee_tokens, f"be left out: the form {form!r} has no knee")
    if max_batch_tokens is not None:
        max_batch_tokens = check_count("max_batch_tokens", max_batch_tokens, minimum=1)
    check_real("largest_mean_error", largest_mean_error, above=0.0)
    check_real("largest_extrapolation", largest_extrapolation, minimum=1.0)
    check_real("longest_decode", longest_decode, above=0.0)
    columns = {} if isinstance(points, IterationPoints) else _columns(points)
    table = points if isinstance(points, IterationPoints) else IterationPoints.read(columns)
    _check_iterations(table, longest_decode)
    if like is not None:
        _check_like(table, like)
    iteration_time = _fit(table, form, _used(table, form, max_batch_tokens), knee_tokens)
    if source is None:
        source = Path(points).name if isinstance(points, (str, os.PathLike)) else ""
    server = Server(
        kv_capacity, iteration_time, max_batch_size, token_budget, block_size, name=name, source=source
    )
    result = Calibration(form, server, table, max_batch_tokens)
    if result.mean_error > largest_mean_error:
        worst = int(np.argmax(np.where(result.is_fitted, np.abs(result.relative_error), -1.0)))
        raise InputError(
            "points",
            f"a mean error of {result.mean_error:.1%} (row {worst + 1} is fitted as "
            f"{result.predicted[worst]:.4g} s and measured as {table.time[worst]:.4g} s)",
            f"be described by the form {form!r} within {largest_mean_error:.1%} on average",
            f"{_generations(columns, result, longest_decode, knee_tokens)}Try another form, restrict max_batch_tokens, "
            "or accept the error by largest_mean_error.",
        )
    for limit, given, measured, unit in result._reached():
        if given is not None and math.isfinite(given) and given > largest_extrapolation * measured:
            raise InputError(
                limit,
                f"{given:,.0f} with {measured:,.0f} {unit} measured",
                f"lie within {largest_extrapolation:g} times what was measured: times beyond are extrapolated",
                "Measure larger iterations, or accept it by largest_extrapolation.",
            )
    return result


def _used(points: IterationPoints, form: str, max_batch_tokens: int | None) -> NDArray[np.bool_]:
    used = np.ones(len(points), dtype=np.bool_)
    if form == "paper":
        used &= points.decode_tokens == points.batch_tokens
    if max_batch_tokens is not None:
        used &= points.batch_tokens <= max_batch_tokens
    return used


def _predict(iteration_time: IterationTime, points: IterationPoints) -> Array:
    prefill = points.batch_tokens - points.decode_tokens
    return iteration_time(prefill, points.decode_tokens, points.kv_tokens, points.prefill_attention)


def _columns(table: Any) -> Any:
    """All columns of a table by name, further ones too."""
    columns: Any = _read_csv(Path(table)) if isinstance(table, (str, os.PathLike)) else table
    if not (isinstance(columns, Mapping) or hasattr(columns, "columns")):
        raise InputError("points", columns, "be a CSV file, a frame, or arrays by column name")
    return columns


def _check_like(points: IterationPoints, like: Server) -> None:
    """Refuse times of another order than those of a server of the same kind."""
    ratio = float(np.median(points.time / _predict(like.iteration_time, points)))
    if 1.0 / LARGEST_RATIO_TO_LIKE <= ratio <= LARGEST_RATIO_TO_LIKE:
        return
    raise InputError(
        "t_s",
        f"times {ratio:.3g} times those of {like.name!r} at the same batches, in the median",
        f"be the time of one iteration in seconds, within a factor of {LARGEST_RATIO_TO_LIKE:g} of those of `like`",
        f"Times of whole generations, of about {ratio:.0f} iterations, have to be divided by that number."
        if ratio > 1.0
        else "Check the unit, and that it is not the time per token of a batch.",
    )


def _generations(columns: Any, result: Calibration, longest_decode: float, knee_tokens: float | None) -> str:
    """What says that points that fit badly are times of generations of several lengths; empty if nothing does."""
    points = result.points
    nearest, error = "", result.mean_error / 2
    for name in columns:
        if name in COLUMNS:
            continue
        try:
            steps = _numbers(str(name), columns[name])
            if steps.min() < 1.0:
                continue
            divided = dataclasses.replace(points, time=points.time / steps)
            time = _fit(divided, result.form, result.is_fitted, knee_tokens)
        except InputError:
            continue
        left = dataclasses.replace(
            result, server=dataclasses.replace(result.server, iteration_time=time), points=divided
        )
        if left.mean_error < error:
            nearest, error = str(name), left.mean_error
    if nearest:
        return (
            f"Divided by the column {nearest!r} they are within {error:.1%}: they look like times of so many "
            "iterations each, as whole generations are, so divide them. "
        )
    decodes = points.time[points.decode_tokens == points.batch_tokens]
    if decodes.size and np.median(decodes) > longest_decode:
        return (
            f"Half of the decodes take more than {longest_decode:g} s: if these are whole generations of several "
            "lengths, divide each time by its number of iterations. "
        )
    return ""


def _check_iterations(points: IterationPoints, longest_decode: float) -> None:
    """Refuse tables whose decodes take far too long, or too short, to be single iterations."""
    decodes = points.time[points.decode_tokens == points.batch_tokens]
    prefills = points.time[points.decode_tokens < points.batch_tokens]
    if not decodes.size:
        return
    remedy = "Divide the time of a generation by its number of iterations; times are in seconds."
    if prefills.size and decodes.min() > LARGEST_DECODE_RATIO * prefills.min():
        raise InputError(
            "t_s",
            f"{decodes.min():.4g} s for the shortest decode and {prefills.min():.4g} s for the shortest iteration "
            "with a prefill, which reads the same weights",
            f"be the time of one iteration, not of a whole generation (ratio at most {LARGEST_DECODE_RATIO:g})",
            remedy,
        )
    if decodes.min() < SHORTEST_DECODE:
        raise InputError(
            "t_s",
            f"{decodes.min():.4g} s for the shortest decode",
            "be the time of one iteration in seconds, not of a token or in another unit "
            f"(the shortest decode at least {SHORTEST_DECODE:g} s)",
        )
    if decodes.min() > longest_decode:
        raise InputError(
            "t_s",
            f"{decodes.min():.4g} s for the shortest decode",
            f"be the time of one iteration in seconds, not of a whole generation or in milliseconds "
            f"(the shortest decode at most {longest_decode:g} s)",
            f"{remedy} A machine as slow as that is accepted by longest_decode.",
        )


def _fit(
    points: IterationPoints, form: str, used: NDArray[np.bool_], knee_tokens: float | None
) -> IterationTime:
    tokens, kv, work, time = (
        values[used]
        for values in (points.batch_tokens, points.kv_tokens, points.prefill_attention, points.time)
    )
    columns: dict[str, Array] = {"base": np.ones_like(time)}
    if form != "paper":
        columns["per_token"] = tokens
    columns["per_kv_token"] = kv
    if form == "two-piece":
        columns["per_prefill_attention"] = work
    needed = 2 * (len(columns) + (2 if form == "two-piece" else 0))
    if time.size < needed:
        what = "pure decodes" if form == "paper" else "points"
        raise InputError(
            "points",
            f"{time.size} of them",
            f"hold at least {needed} {what} for the form {form!r}",
            "Measure more batches, or use a form with fewer coefficients.",
        )
    _check_spread(columns, time)
    if form != "two-piece":
        best, _ = _least_squares(columns, time)
        _check_slopes(columns, time, best, form)
        if form == "paper":
            return IterationTime.paper(best["base"], best["per_kv_token"])
        return IterationTime.affine(best["base"], best["per_token"], best["per_token"], best["per_kv_token"])
    counts = np.unique(tokens)
    if counts.size < 4:
        raise InputError(
            "n_tok",
            f"{counts.size} distinct token counts",
            "have at least four, two on either side of the knee",
            'Measure more batch sizes, or use the form "affine".',
        )
    low, high = float(counts[1]), float(counts[-2])
    if knee_tokens is not None and not low <= knee_tokens <= high:
        raise InputError(
            "knee_tokens",
            knee_tokens,
            f"have two measured token counts on either side: lie within {low:g} and {high:g}",
        )

    def with_knee(knee: float) -> dict[str, Array]:
        return {**columns, "per_token_beyond": np.maximum(0.0, tokens - knee)}

    knee = _search_knee(counts[1:-1], with_knee, time) if knee_tokens is None else float(knee_tokens)
    all_columns = with_knee(knee)
    best, _ = _least_squares(all_columns, time)
    _check_slopes(all_columns, time, best, form)
    return IterationTime.two_piece(
        best["base"],
        best["per_token"],
        knee,
        best["per_token_beyond"],
        best["per_kv_token"],
        best["per_prefill_attention"],
    )


def _search_knee(inner: Array, with_knee: Any, time: Array) -> float:
    """The knee of least squared error: best of a grid, then continuously between its neighbours."""
    from scipy.optimize import minimize_scalar

    places = np.arange((inner.size - 1) * GRID + 1) / GRID
    grid = np.interp(places, np.arange(inner.size), inner)
    errors = [_least_squares(with_knee(knee), time)[1] for knee in grid]
    best = int(np.argmin(errors))
    bracket = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, grid.size - 1)])
    if bracket[0] == bracket[1]:
        return float(grid[best])
    finer = minimize_scalar(
        lambda knee: _least_squares(with_knee(knee), time)[1],
        bounds=bracket,
        method="bounded",
        options={"xatol": 1e-6 * bracket[1]},
    )
    return float(finer.x) if finer.fun < errors[best] else float(grid[best])


def _relative(columns: Mapping[str, Array], time: Array) -> tuple[Array, Array]:
    """Columns over the measured time, scaled to length one, and the scales; the right-hand side is all ones."""
    matrix = np.stack(list(columns.values()), axis=1) / time[:, None]
    scale = np.linalg.norm(matrix, axis=0)
    return matrix / np.where(scale > 0.0, scale, 1.0), np.where(scale > 0.0, scale, 1.0)


def _least_squares(columns: Mapping[str, Array], time: Array) -> tuple[dict[str, float], float]:
    """Non-negative coefficients by name, and the root of the summed squared relative residuals."""
    from scipy.optimize import nnls

    matrix, scale = _relative(columns, time)
    solution, error = nnls(matrix, np.ones(time.size))
    return dict(zip(columns, (solution / scale).tolist(), strict=True)), float(error)


_MEASURED_AS = {"per_token": "n_tok", "per_kv_token": "kv_tok", "per_prefill_attention": "pre_attn"}


def _check_spread(columns: Mapping[str, Array], time: Array) -> None:
    if np.ptp(time) == 0.0:
        raise InputError("t_s", f"{time[0]:g} s in every point fitted", "vary: no slope is determined")
    for name, column in _MEASURED_AS.items():
        if name in columns and np.ptp(columns[name]) == 0.0:
            raise InputError(
                column,
                f"{columns[name][0]:g} in every point fitted",
                f"vary: without spread the coefficient {name} is not determined",
                "Measure more batches, or use a form without it.",
            )
    matrix, _ = _relative(columns, time)
    _, singular, right = np.linalg.svd(matrix, full_matrices=False)
    if singular[-1] < SMALLEST_SINGULAR_VALUE:
        joint = [name for name, weight in zip(columns, right[-1], strict=True) if abs(weight) > 0.1]
        raise InputError(
            "points",
            f"columns of {', '.join(joint)} that follow from each other",
            "vary independently: these coefficients cannot be told apart",
            "Measure several KV lengths per batch size and several chunks.",
        )


def _check_slopes(columns: Mapping[str, Array], time: Array, best: Mapping[str, float], form: str) -> None:
    """Refuse a time that falls in the tokens or the KV: a slope at zero that would be negative, and costs accuracy."""
    if best["base"] <= 0.0:
        raise InputError(
            "points",
            "a base of 0 s",
            "leave a positive time for an empty batch: measure small batches too",
        )
    total = {
        "per_token": best.get("per_token", math.inf) + best.get("per_token_beyond", 0.0),
        "per_kv_token": best["per_kv_token"],
    }
    for name, slope in total.items():
        if slope > 0.0:
            continue
        matrix, scale = _relative({n: c for n, c in columns.items() if n != "per_token_beyond"}, time)
        free, *_ = np.linalg.lstsq(matrix, np.ones(time.size), rcond=None)
        held = _least_squares(dict(columns), time)[1]
        wanted = float((free / scale)[[n for n in columns if n != "per_token_beyond"].index(name)])
        if wanted < 0.0 and held > LARGEST_LOSS * float(np.linalg.norm(matrix @ free - 1.0)):
            raise InputError(
                _MEASURED_AS[name],
                f"a time that falls by {-wanted:.3g} s per token",
                f"give a non-negative {name}: iterations do not get shorter with more tokens",
                f"Check the columns' order and units, or try another form than {form!r}.",
            )


def _numbers(column: str, given: Any) -> Array:
    try:
        values = np.array(given, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        for row, value in enumerate(np.ravel(np.asarray(given, dtype=object))):
            try:
                float(value)
            except (TypeError, ValueError, OverflowError):
                raise InputError(f"{column}, row {row + 1}", value, "be a number") from None
        raise InputError(column, type(given).__name__, "be an array of numbers") from None
    if values.ndim != 1 or values.size == 0:
        raise InputError(column, f"shape {values.shape}", "be one column with at least one row")
    bad = ~((values == 0.0) | (values >= SMALLEST) & (values <= LARGEST))
    if bad.any():
        row = int(np.argmax(bad))
        required = f"be 0 or between {SMALLEST:g} and {LARGEST:g}"
        raise InputError(f"{column}, row {row + 1}", float(values[row]), required, "Check its unit.")
    return values


#: Unpacked size of a compressed table, millions of points: a small file may unpack to any size.
_MOST_BYTES = 1 << 28


def _read_csv(path: Path) -> dict[str, list[str]]:
    if path.suffix.lower() == ".gz":
        try:
            with gzip.open(path) as stream:
                content = stream.read(_MOST_BYTES + 1)
            text = content.decode("utf-8-sig")
        except FileNotFoundError:
            raise InputError("points", str(path), "name an existing file", "Check the path.") from None
        except (OSError, EOFError, zlib.error, ValueError) as error:  # not UTF-8, or a null in the path
            raise InputError("points", f"{path} ({error})", "be gzip-compressed UTF-8 text") from None
        if len(content) > _MOST_BYTES:
            raise InputError("points", str(path), f"unpack to at most {_MOST_BYTES:,} bytes")
    else:
        text = _files.read_text("points", path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header, *rows = [row for row in reader if row] or [[]]
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}", str(error), "be valid CSV") from None
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise InputError(f"{path}, row {number}", f"{len(row)} fields", f"have {len(header)} fields")
    if not rows:
        raise InputError("points", f"{path} without rows", "have a header and at least one row")
    names = [name.strip() for name in header]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError("points", f"{path} with column {twice[0]!r} twice", "name each column once")
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}
