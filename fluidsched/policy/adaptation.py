r"""Adapting a table to what arrived recently: are its rates still right, what are they now, a new table.

**Is anything different?** Let a window of H seconds hold N_j arrivals of type j at times t. If they are Poisson at
the rate λ_j for which the table was compiled, then (1) N_j is Poisson with mean λ_j H, and (2) given N_j the times
are independent and uniform on (0, H), whatever the rate. (1) is tested by the exact two-sided Poisson test, (2) by
the exact Kolmogorov–Smirnov test, sensitive to a rate that changed within the window. With J types each of the 2J
tests has level α / (2J): whatever the rates, a table whose rates are right is changed with probability at most α.
(Bursty arrivals vary more than Poisson ones and are taken for changes more often.)

**Since when?** Where (2) rejects, the change is put at the time c_j that splits the window with the largest
likelihood of two constant rates, N₁ ln(N₁/c) + N₂ ln(N₂/(H − c)); what came before is not used. Elsewhere c_j = 0.

**What now?** Types for which a test rejects get the exponentially weighted rate

    ( ½ + Σ_{t > c} e^{−(H − t)/τ} ) / ( τ (1 − e^{−(H − c)/τ}) ),        τ = half-life / ln 2,

unbiased but for the ½, which keeps a silent type's rate above 0, so that it is not shut out for good. The others
keep the rate they had. The fluid program is solved for the new rates and the table compiled again: a function of
its arguments, without a clock or memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_count, check_real
from fluidsched._display import Tabular
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.policy.compiler import COMPILED_KINDS, compile_policy
from fluidsched.policy.problem import match_of, predictor_of
from fluidsched.policy.table import PolicyTable, TableType

if TYPE_CHECKING:
    import pandas as pd

    from fluidsched.fluid import FluidSolution
    from fluidsched.workload import ArrivalPath, Workload

__all__ = ["Adaptation", "adapt"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class Adaptation(Tabular):
    """What `adapt` found and did. J types.

    Attributes
    ----------
    table : PolicyTable
        The new table, or the old one where `is_changed` is false.
    fluid : FluidSolution
        The solution that `table` goes with; pass it on with the table next time.
    is_changed : bool
    reason : str
        Why the table was changed or kept.
    type_names : tuple of str
    rate_before, rate : float64[J]
        Rates the old and the returned table are for, requests/s.
    p_value : float64[J]
        Smaller p-value of the type's two tests, times 2J, at most 1; NaN where nothing was tested.
    change_s : float64[J]
        Time in the window at which the type's rate changed, s; NaN where no change within it was found.
    """

    table: PolicyTable
    fluid: FluidSolution
    is_changed: bool
    reason: str
    type_names: tuple[str, ...]
    rate_before: FloatArray
    rate: FloatArray
    p_value: FloatArray
    change_s: FloatArray

    def __repr__(self) -> str:
        return f"Adaptation of {self.table.name!r}: {'changed' if self.is_changed else 'kept'}, {self.reason}"

    def to_frame(self) -> pd.DataFrame:
        """One row per type: rates before and after (requests/s), p-value, time of the change (s)."""
        import pandas as pd

        columns = {name: getattr(self, name) for name in ("rate_before", "rate", "p_value", "change_s")}
        return pd.DataFrame(columns, index=pd.Index(self.type_names, name="type"))


def adapt(
    table: PolicyTable,
    recent_path: ArrivalPath,
    fluid: FluidSolution,
    *,
    window: float | None = None,
    half_life: float | None = None,
    error_rate: float = 0.01,
    minimum_requests: int = 30,
    options: Mapping[str, Any] | None = None,
) -> Adaptation:
    """Compile a table anew for the rates of recent arrivals, if these are no longer those it was made for.

    Parameters
    ----------
    table : PolicyTable
        Compiled: kind "capped", "wait", "gated" or "nested-wait".
    recent_path : ArrivalPath
        The arrivals of the last H seconds, times counted from the start of the window.
    fluid : FluidSolution
        What `table` was compiled from: workload (rates, lengths), server and objective.
    window : float, optional
        H, seconds; default the path's horizon. A path without one needs it: after its last arrival nobody knows
        how long nothing came.
    half_life : float, optional
        Seconds after which an arrival counts half; default H, so that estimates lean a little to the present.
    error_rate : float
        α in (0, 1): probability at most, for Poisson arrivals, that a table is changed whose rates are right.
    minimum_requests : int
        With fewer, both arrived and expected in the window, the table is kept.
    options : mapping, optional
        Arguments of `compile_policy` for the new table, such as ``{"slack": 0.1}``.

    Returns
    -------
    Adaptation
        With the old table and the reason where it is kept: nothing changed, too little data, a request of no
        known type, or no table exists at the new rates.

    Raises
    ------
    InputError
        An argument is out of range, the table's kind is not compiled, or its rates are not those of `fluid`.

    Examples
    --------
    >>> import fluidsched as fs
    >>> server = fs.catalog.server("a100-80gb", "llama-2-7b")
    >>> workload = fs.Workload([fs.RequestType("chat", 2.0, prompt_tokens=512, output_tokens=100)])
    >>> fluid = fs.solve_fluid(workload, server)
    >>> table = fs.compile_policy(fluid, "gated")
    >>> busier = workload.with_rates([3.0]).sample(600.0, 1)
    >>> adapted = fs.adapt(table, busier, fluid)
    >>> adapted.is_changed, bool(abs(adapted.rate[0] - 3.0) < 0.3)
    (True, True)
    """
    before = _checked_rates(table, fluid)
    workload = fluid.workload
    names = tuple(t.name for t in workload.types)
    count = check_count("minimum_requests", minimum_requests, minimum=1)
    level = check_real("error_rate", error_rate, above=0.0)
    if level >= 1.0:
        raise InputError("error_rate", error_rate, "be a probability in (0, 1)")
    if window is None:
        window = recent_path.horizon
    if window is None:
        raise InputError(
            "window",
            "nothing",
            "be given for a path without a horizon",
            "It is the time observed, in seconds.",
        )
    seconds = check_real("window", window, above=0.0)
    if len(recent_path) and float(recent_path.arrival_s[-1]) > seconds:
        raise InputError(
            "window", window, f"reach to the path's last arrival, {float(recent_path.arrival_s[-1]):g} s"
        )
    decay = check_real("half_life", seconds if half_life is None else half_life, above=0.0) / math.log(2.0)
    untested = np.full(len(names), math.nan)

    def kept(reason: str, p_value: FloatArray = untested, change: FloatArray = untested) -> Adaptation:
        return Adaptation(table, fluid, False, reason, names, before, before, p_value, change)

    expected = float(before.sum()) * seconds
    if max(len(recent_path), expected) < count:
        return kept(
            f"too little data: {len(recent_path):,} requests in {seconds:g} s, {expected:.1f} expected, and "
            f"{count:,} asked for"
        )
    try:
        rows = _types_of(workload, recent_path)
    except InputError as error:
        return kept(f"a request is of no known type: {error}")
    times = [recent_path.arrival_s[rows == j] for j in range(len(names))]
    tests = np.array([_p_values(t, seconds, r) for t, r in zip(times, before.tolist(), strict=True)])
    adjusted = np.minimum(tests * tests.size, 1.0)
    p_value, rejected = adjusted.min(axis=1), adjusted <= level
    if not rejected.any():
        return kept(
            f"no change found at error rate {level:g} (smallest p-value {p_value.min():.2g})", p_value
        )
    change = np.array(
        [
            _change_point(t, seconds) if moved else math.nan
            for t, moved in zip(times, rejected[:, 1], strict=True)
        ]
    )
    changed = rejected.any(axis=1)
    rate = np.where(
        changed,
        [
            _weighted_rate(t, since, seconds, decay)
            for t, since in zip(times, np.nan_to_num(change), strict=True)
        ],
        before,
    )
    from fluidsched.fluid import solve_fluid

    solution = solve_fluid(workload.with_rates(rate), fluid.server, objective=fluid.objective)
    try:
        adapted = compile_policy(solution, table.kind, **dict(options or {})).renamed(table.name)
    except InfeasibleError as error:
        return kept(f"the rates changed, but {error}", p_value, change)
    listed = ", ".join(f"{names[j]} {before[j]:.3g} → {rate[j]:.3g}" for j in np.flatnonzero(changed)[:4])
    more = f" and {changed.sum() - 4} more" if changed.sum() > 4 else ""
    reason = f"rates changed at error rate {level:g} (req/s): {listed}{more}"
    return Adaptation(adapted, solution, True, reason, names, before, rate, p_value, change)


def _checked_rates(table: PolicyTable, fluid: FluidSolution) -> FloatArray:
    """The offered rates the table was compiled for, (J,), which have to be those of `fluid`."""
    if table.kind not in COMPILED_KINDS:
        raise InputError(
            "table",
            f"of kind {table.kind!r}",
            "be of kind " + ", ".join(repr(k) for k in COMPILED_KINDS),
            "Rules of engines look at no rates.",
        )
    rates = np.asarray(fluid.workload.arrival_rate, dtype=np.float64)
    mine = np.array([math.nan if row.arrival_rate is None else row.arrival_rate for row in table.types])
    theirs = rates if table.kind != "capped" else np.array([rates.sum()])
    if mine.shape != theirs.shape or not np.allclose(mine, theirs, rtol=1e-9):
        raise InputError(
            "fluid",
            f"rates {np.round(theirs, 6).tolist()}",
            f"be what the table was compiled from: its rates are {np.round(mine, 6).tolist()}",
            "Pass the `fluid` of the last Adaptation with its table.",
        )
    return rates


def _types_of(workload: Workload, path: ArrivalPath) -> NDArray[np.int64]:
    """Type of each request, (N,), recognised as the rows of a compiled table recognise it."""
    rows = tuple(TableType(t.name, match_of(t), threshold=1, gate=0, period=1) for t in workload.types)
    return PolicyTable(workload.name, "gated", rows, predictor=predictor_of(rows)).classify(path)


def _p_values(times: FloatArray, window: float, rate: float) -> tuple[float, float]:
    """Of the number given the rate (exact, two-sided) and of the times given the number (exact)."""
    from scipy.stats import kstest, poisson

    number, mean = len(times), rate * window
    one_sided = min(float(poisson.cdf(number, mean)), float(poisson.sf(number - 1, mean)))
    uniform = float(kstest(times / window, "uniform").pvalue) if number else 1.0
    return min(2.0 * one_sided, 1.0), uniform


def _change_point(times: FloatArray, window: float) -> float:
    """The split into two constant rates with the largest likelihood, s; just before or after an arrival."""
    number = len(times)
    split = np.concatenate([times, times])
    first = np.concatenate([np.arange(number), np.arange(1, number + 1)]).astype(np.float64)  # before, after
    inside = (split > 0.0) & (split < window)
    if not inside.any():
        return 0.0
    split, first = split[inside], first[inside]
    second = number - first
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = np.where(first > 0, first * np.log(first / split), 0.0)
        likelihood += np.where(second > 0, second * np.log(second / (window - split)), 0.0)
    return float(split[int(likelihood.argmax())])


def _weighted_rate(times: FloatArray, since: float, window: float, decay: float) -> float:
    weights = np.exp(-(window - times[times > since]) / decay)
    return (0.5 + float(weights.sum())) / (decay * -math.expm1(-(window - since) / decay))
