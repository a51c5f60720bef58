"""Embedded workloads: public traces as 12 request types each, ready to use.

Each type carries the trace's own rate and a joint law on at most 40 weighted points (prompt, output) with the
extreme lengths and, to rounding, all moments E[p^i o^j] up to i + j = 3 of the trace's requests of that type.
So the fluid program, which needs moments up to degree 2, and the mean and variance of KV held by a resident
request are those of the trace; the marginal distribution functions differ from the trace's by at most 0.025.
What a Poisson sample of them does not have is the trace's order: its bursts, its drift, its correlation
between neighbours.

The laws are figures computed from the traces; the traces themselves are not included. Each workload's
`source` names the trace, its licence and the paper to cite.

Examples
--------
>>> from fluidsched import workloads
>>> workloads.names()
('azure_code', 'azure_conv', 'mooncake_synthetic')
>>> round(workloads.azure_conv().total_arrival_rate, 3)
5.53
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from fluidsched._checks import check_choice
from fluidsched.workload.model import Workload

__all__ = ["azure_code", "azure_conv", "get", "mooncake_synthetic", "names"]

_FOLDER = Path(__file__).parent / "embedded"


def names() -> tuple[str, ...]:
    """Names of the embedded workloads."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.json")))


def get(name: str) -> Workload:
    """The embedded workload of that name; ``-`` and ``_`` are the same.

    Raises
    ------
    InputError
        No such workload; the nearest names are suggested.
    """
    return _load(check_choice("workload", name.replace("-", "_") if isinstance(name, str) else name, names()))


@cache
def _load(name: str) -> Workload:
    return Workload.from_json(_FOLDER / f"{name}.json")


def azure_conv() -> Workload:
    """Azure LLM inference trace 2023, conversations: 5.530 req/s, mean prompt 1155, mean output 211."""
    return _load("azure_conv")


def azure_code() -> Workload:
    """Azure LLM inference trace 2023, code completions: 2.567 req/s, mean prompt 2048, mean output 27.9."""
    return _load("azure_code")


def mooncake_synthetic() -> Workload:
    """Mooncake synthetic trace, prefixes not shared: 3.907 req/s, mean prompt 15325, mean output 149."""
    return _load("mooncake_synthetic")
