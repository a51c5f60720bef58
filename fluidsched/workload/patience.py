r"""How long clients stay: laws of the time after which one gives up or hangs up.

A client is willing to wait X seconds for its service to begin (*patience*; it abandons the queue if nothing has
begun by then), and may hang up Y seconds after it came whatever has happened (an *abort*). Both are drawn outside
the simulator as columns of the arrival path, `patience_s` and `abort_after_s`, seconds from the arrival, so every
policy compared meets the same clients:

==============  ================================  ==========================
law             P(X > x)                          mean
==============  ================================  ==========================
`fixed`         1 for x < s, else 0               s
`exponential`   exp(−x/m)                         m, rate of abandonment 1/m
`lognormal`     Φ((μ − ln x)/σ)                   m, coefficient of variation c
==============  ================================  ==========================

with σ² = ln(1 + c²), μ = ln m − σ²/2. Patience shorter than its mean is common (c > 1) where some clients give up
at once and others never do. One random number is drawn per request, in order, so the first draws do not depend on
how many follow, and with one seed a larger mean is the same patience, scaled.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluidsched._checks import check_scale
from fluidsched.workload.lengths import FloatArray
from fluidsched.workload.recipes import Makers, read_recipe

__all__ = ["Patience", "exponential", "fixed", "from_dict", "lognormal"]


class Patience(abc.ABC):
    """Law of a time that a client stays; made by the functions of `fluidsched.patience`."""

    @abc.abstractmethod
    def sample(self, rng: np.random.Generator, count: int) -> FloatArray:
        """Draw the times of `count` requests, s, float64[count]."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The arguments it was made with, as plain data with the maker's name; read back by `from_dict`."""


@dataclass(frozen=True)
class _Fixed(Patience):
    seconds: float

    def sample(self, rng: np.random.Generator, count: int) -> FloatArray:
        return np.full(count, self.seconds)

    def to_dict(self) -> dict[str, Any]:
        return {"law": "fixed", "seconds": self.seconds}

    def __repr__(self) -> str:
        return f"fixed({self.seconds:g})"


def fixed(seconds: float) -> Patience:
    """Every client stays as long.

    Parameters
    ----------
    seconds : float
        At least 0.

    Examples
    --------
    >>> fixed(2.5).sample(np.random.default_rng(1), 2)
    array([2.5, 2.5])
    """
    return _Fixed(check_scale("seconds", seconds))


@dataclass(frozen=True)
class _Exponential(Patience):
    mean: float

    def sample(self, rng: np.random.Generator, count: int) -> FloatArray:
        return -self.mean * np.log1p(-rng.random(count))

    def to_dict(self) -> dict[str, Any]:
        return {"law": "exponential", "mean": self.mean}

    def __repr__(self) -> str:
        return f"exponential(mean={self.mean:g})"


def exponential(mean: float) -> Patience:
    """Clients that have waited long are no more likely to give up: θ = 1/mean per second and client.

    Parameters
    ----------
    mean : float
        Seconds, above 0.

    Examples
    --------
    >>> exponential(mean=10.0).sample(np.random.default_rng(1), 100_000).mean().round(1)
    np.float64(10.0)
    """
    return _Exponential(check_scale("mean", mean, zero=False))


@dataclass(frozen=True)
class _Lognormal(Patience):
    mean: float
    cv: float

    def sample(self, rng: np.random.Generator, count: int) -> FloatArray:
        sigma = math.sqrt(math.log1p(self.cv**2))
        return self.mean * np.exp(sigma * rng.standard_normal(count) - sigma**2 / 2)

    def to_dict(self) -> dict[str, Any]:
        return {"law": "lognormal", "mean": self.mean, "cv": self.cv}

    def __repr__(self) -> str:
        return f"lognormal(mean={self.mean:g}, cv={self.cv:g})"


def lognormal(mean: float, cv: float) -> Patience:
    """Many clients of little patience beside few of much.

    Parameters
    ----------
    mean : float
        Seconds, above 0.
    cv : float
        Standard deviation over mean, at least 0.

    Examples
    --------
    >>> lognormal(mean=10.0, cv=2.0).sample(np.random.default_rng(1), 4).round(1)
    array([ 6.9, 12.7,  6.8,  0.9])
    """
    return _Lognormal(check_scale("mean", mean, zero=False), check_scale("cv", cv))


_MAKERS: Makers[Patience] = {
    "fixed": (fixed, ("seconds",), ()),
    "exponential": (exponential, ("mean",), ()),
    "lognormal": (lognormal, ("mean", "cv"), ()),
}


def from_dict(argument: str, data: object) -> Patience:
    """Read a law from plain data, ``{"law": "exponential", "mean": 20}``; errors name the field.

    Examples
    --------
    >>> from_dict("patience", {"law": "exponential", "mean": 20})
    exponential(mean=20)
    """
    return read_recipe(argument, data, "law", _MAKERS)
