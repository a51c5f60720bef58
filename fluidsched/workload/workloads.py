"""Embedded workloads: public traces as 12 request types each, ready to use.

Each type carries the trace's own rate and a joint law on at most 40 weighted points (prompt, output) with the
extreme lengths and, to rounding, all moments E[p^i o^j] up to i + j = 3 of the trace's requests of that type.
So the fluid program, which needs moments up to degree 2, and the mean and variance of KV held by a resident
request are those of the trace; the marginal distribution functions differ from the trace's by at most 0.025.
What a Poisson sample of them does not have is the trace's order: its bursts, its drift, its correlation
between neighbours. The drift can be had: with ``profile=True`` all types follow the trace's rate in steps of five
minutes (`rate_profile`), repeated after the trace's end. `Workload.at_load` and `scaled` speed the profile up with
the rates; `with_rates` keeps its five minutes.

The laws are figures computed from the traces; the traces themselves are not included. Each workload's
`source` names the trace, its licence and the paper to cite.

Examples
--------
>>> from fluidsched import workloads
>>> workloads.names()
('azure_code', 'azure_conv', 'mooncake_synthetic')
>>> round(workloads.azure_conv().total_arrival_rate, 3)
5.53
>>> workloads.azure_conv(profile=True).types[0].arrivals
time_varying(12 steps, period 3501.72 s)
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fluidsched import _files
from fluidsched._checks import check_choice
from fluidsched.workload import arrivals
from fluidsched.workload.model import Workload

__all__ = ["azure_code", "azure_conv", "get", "mooncake_synthetic", "names", "rate_profile"]

_FOLDER = Path(__file__).parent / "embedded"


def names() -> tuple[str, ...]:
    """Names of the embedded workloads."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.json")))


def get(name: str, *, profile: bool = False) -> Workload:
    """The embedded workload of that name; ``-`` and ``_`` are the same.

    Parameters
    ----------
    name : str
        One of `names`.
    profile : bool, optional
        Whether requests follow the trace's rate in steps of five minutes; a constant rate by default.

    Raises
    ------
    InputError
        No such workload; the nearest names are suggested.
    """
    workload = _load(_known(name))
    return workload.with_arrivals(rate_profile(name)) if profile else workload


def rate_profile(name: str) -> arrivals.ArrivalProcess:
    """The rate of the embedded workload's trace in steps of five minutes, as an arrival process.

    The last step is what is left of the trace, shorter or longer.

    Examples
    --------
    >>> [round(rate, 1) for rate in rate_profile("azure_conv").to_dict()["relative_rate"]]
    [4.8, 4.7, 5.2, 5.2, 6.3, 7.5, 7.4, 6.1, 5.7, 4.7, 4.3, 3.8]
    """
    file = _FOLDER / "profiles" / f"{_known(name)}.json"
    return arrivals.from_dict("profile", _files.loads(str(file), _files.read_text("profile", file)))


def _known(name: str) -> str:
    return check_choice("workload", name.replace("-", "_") if isinstance(name, str) else name, names())


@cache
def _load(name: str) -> Workload:
    return Workload.from_json(_FOLDER / f"{name}.json")


def azure_conv(*, profile: bool = False) -> Workload:
    """Azure LLM inference trace 2023, conversations: 5.530 req/s, mean prompt 1155, mean output 211."""
    return get("azure_conv", profile=profile)


def azure_code(*, profile: bool = False) -> Workload:
    """Azure LLM inference trace 2023, code completions: 2.567 req/s, mean prompt 2048, mean output 27.9."""
    return get("azure_code", profile=profile)


def mooncake_synthetic(*, profile: bool = False) -> Workload:
    """Mooncake synthetic trace, prefixes not shared: 3.907 req/s, mean prompt 15325, mean output 149."""
    return get("mooncake_synthetic", profile=profile)
