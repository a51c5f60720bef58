"""Offered rates over time, on a grid of equal periods.

A demand is given as rates of every type in every period, as total rates to be split in the workload's mix,
or as an arrival path, whose requests are counted by type and period: a count over `step` is the mean rate
of the period, so requests are conserved (the last period of a path may be partly empty).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched._checks import check_count, check_real
from fluidsched.errors import InputError
from fluidsched.workload import ArrivalPath, Workload

__all__ = ["demand_rates", "sinusoidal_rates"]


def demand_rates(demand: ArrayLike | ArrivalPath, workload: Workload, step: float) -> NDArray[np.float64]:
    """Return the offered rate of every type in every period, shape (T, J), req/s.

    Parameters
    ----------
    demand : array_like of shape (T, J) or (T,), or ArrivalPath
        Rates of each type; or total rates, split in proportion to the workload's rates; or requests, whose
        types are those of the path where it names them as the workload does, else found by their lengths.
    workload : Workload
        J types.
    step : float
        Length of a period, s; used for a path alone.

    Raises
    ------
    InputError
        If a rate is not finite and non-negative, the shape is another, or a request has no type.

    Examples
    --------
    >>> import fluidsched as fs
    >>> chat = fs.RequestType("chat", 3.0, prompt_tokens=500, output_tokens=20)
    >>> code = fs.RequestType("code", 1.0, prompt_tokens=900, output_tokens=10)
    >>> demand_rates([8.0, 2.0], fs.Workload([chat, code]), step=60.0).tolist()
    [[6.0, 2.0], [1.5, 0.5]]
    """
    if isinstance(demand, ArrivalPath):
        return _path_rates(demand, workload, step)
    try:
        rates = np.array(demand, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError("demand", demand, "be rates per period, or an ArrivalPath") from None
    if rates.ndim == 1 and len(rates):
        total = workload.total_arrival_rate
        if total <= 0.0:
            raise InputError(
                "demand",
                f"shape {rates.shape}",
                "have one rate per period and type where the workload's own rates are all 0",
            )
        share = workload.arrival_rate / total
        rates = rates[:, None] * share
    if rates.ndim != 2 or rates.shape[0] == 0 or rates.shape[1] != len(workload):
        raise InputError(
            "demand", f"shape {rates.shape}", f"have shape (periods,) or (periods, types = {len(workload)})"
        )
    wrong = ~(np.isfinite(rates) & (rates >= 0.0))
    if wrong.any():
        period, member = (int(i) for i in np.argwhere(wrong)[0])
        raise InputError(
            f"demand of type {workload.type_names[member]!r} in period {period}",
            float(rates[period, member]),
            "be finite and non-negative",
        )
    return rates


def _path_rates(path: ArrivalPath, workload: Workload, step: float) -> NDArray[np.float64]:
    if path.type is None or path.type_names != workload.type_names:
        path = path.labelled(workload)
    assert path.type is not None
    if len(path) == 0:
        raise InputError("demand", "a path without requests", "hold at least one request")
    last = float(path.arrival_s[-1])
    window = last if path.horizon is None else path.horizon
    # An arrival at the very end of the last whole period opens the next one.
    periods = max(math.ceil(window / step), math.floor(last / step) + 1)
    place = np.minimum((path.arrival_s / step).astype(np.int64), periods - 1)
    counts = np.bincount(place * len(workload) + path.type, minlength=periods * len(workload))
    return counts.reshape(periods, len(workload)) / step


def sinusoidal_rates(
    mean: float, *, amplitude: float, periods: int, peak: float = 0.5, cycles: float = 1.0
) -> NDArray[np.float64]:
    """Return a made-up smooth profile: mean·(1 + amplitude·cos 2π·cycles·(x − peak)), averaged per period.

    An illustration of a day, not data: real days have weekday shapes, steps and bursts.

    Parameters
    ----------
    mean : float
        Mean rate, req/s.
    amplitude : float
        Relative swing, in [0, 1].
    periods : int
        Number T of equal periods the profile is cut into.
    peak : float
        Where the rate is largest, as a fraction of the profile.
    cycles : float
        Full swings over the profile.

    Returns
    -------
    ndarray of shape (T,)
        Exact averages over the periods, req/s.

    Examples
    --------
    >>> sinusoidal_rates(4.0, amplitude=0.5, periods=4).round(3).tolist()
    [2.727, 5.273, 5.273, 2.727]
    """
    mean = check_real("mean", mean, minimum=0.0)
    amplitude = check_real("amplitude", amplitude, minimum=0.0, maximum=1.0)
    periods = check_count("periods", periods, minimum=1)
    cycles = check_real("cycles", cycles, above=0.0)
    turn = 2.0 * np.pi * cycles
    edge = np.sin(turn * (np.arange(periods + 1) / periods - check_real("peak", peak)))
    rates = mean * (1.0 + amplitude * np.diff(edge) * periods / turn)
    return np.asarray(np.maximum(rates, 0.0))
