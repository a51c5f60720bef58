"""Predictions of output lengths: what a scheduler believes before a request has run.

A policy that sorts by length, looks ahead, or recognises types by output length sees a prediction, seldom the
truth. Predictions are columns of the arrival path, drawn outside the simulator from the true length o, so every
policy compared on a path believes the same:

============  =====================================  ======================================
prediction    `predicted_output_tokens`              `predicted_output_minimum`
============  =====================================  ======================================
`exact`       o                                      –
`lognormal`   o·(lognormal error), rounded           –
`interval`    u, upper end of an interval with o     ℓ, its lower end
`bucketed`    upper end of o's bucket                lower end of the bucket
============  =====================================  ======================================

Where a prediction is an interval [ℓ, u], its *upper* end is the prediction proper: memory reserved for it
suffices, which is what the rule `a_max` and look-ahead need; the rule `a_min`, which starts from ℓ and raises it
as tokens come, needs the lower end too (Chen, Ye, Zhou, arXiv 2508.14544). Both columns are there so that one
path serves both.

One random number is drawn per request, in order, so the first predictions do not depend on how many follow, and
with one seed a larger error is the same error, scaled.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fluidsched._checks import check_count, check_real
from fluidsched.errors import InputError
from fluidsched.workload.lengths import MAX_TOKENS, FloatArray, IntArray
from fluidsched.workload.recipes import Makers, read_recipe

__all__ = ["Prediction", "bucketed", "exact", "from_dict", "interval", "lognormal"]


class Prediction(abc.ABC):
    """How output lengths are predicted; made by the functions of `fluidsched.predictions`."""

    @abc.abstractmethod
    def predict(self, output_tokens: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray | None]:
        """Predict true lengths.

        Parameters
        ----------
        output_tokens : int64[N]
            True output lengths, tokens, at least 1 each.
        rng : numpy.random.Generator
            Stream to draw from.

        Returns
        -------
        predicted : int64[N]
            Predicted length, or the upper end of a predicted interval; at least 1.
        minimum : int64[N] or None
            Lower end of the predicted interval, at most `predicted`; None where a single length is predicted.
        """

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The arguments it was made with, as plain data with the maker's name; read back by `from_dict`."""


@dataclass(frozen=True)
class _Exact(Prediction):
    def predict(self, output_tokens: IntArray, rng: np.random.Generator) -> tuple[IntArray, None]:
        return output_tokens.copy(), None

    def to_dict(self) -> dict[str, Any]:
        return {"prediction": "exact"}

    def __repr__(self) -> str:
        return "exact()"


def exact() -> Prediction:
    """The true length.

    Examples
    --------
    >>> exact().predict(np.array([3, 5]), np.random.default_rng(1))[0]
    array([3, 5])
    """
    return _Exact()


@dataclass(frozen=True)
class _Lognormal(Prediction):
    cv: float
    bias: float

    def predict(self, output_tokens: IntArray, rng: np.random.Generator) -> tuple[IntArray, None]:
        sigma = math.sqrt(math.log1p(self.cv**2))
        error = np.exp(sigma * rng.standard_normal(len(output_tokens)) - sigma**2 / 2)
        return _tokens(np.rint(self.bias * error * output_tokens)), None

    def to_dict(self) -> dict[str, Any]:
        return {"prediction": "lognormal", "cv": self.cv, "bias": self.bias}

    def __repr__(self) -> str:
        return f"lognormal(cv={self.cv:g}, bias={self.bias:g})"


def lognormal(cv: float, bias: float = 1.0) -> Prediction:
    """The true length times a lognormal error of mean `bias`, rounded to whole tokens, at least 1.

    Parameters
    ----------
    cv : float
        Standard deviation of the error over its mean, 0 to 100.
    bias : float, optional
        Mean of the error, positive: 1 is right on average, below 1 underestimates. (Rounding up to 1 token adds
        to the mean of very short requests.)

    Examples
    --------
    >>> lognormal(cv=0.3).predict(np.array([100, 100, 100]), np.random.default_rng(1))[0]
    array([106, 122, 106])
    """
    return _Lognormal(
        check_real("cv", cv, minimum=0, maximum=100), check_real("bias", bias, above=0, maximum=1e6)
    )


@dataclass(frozen=True)
class _Interval(Prediction):
    ratio: float

    def predict(self, output_tokens: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        place = rng.random(len(output_tokens))
        lower = np.minimum(np.floor(output_tokens * self.ratio**-place), output_tokens)
        upper = np.maximum(np.ceil(output_tokens * self.ratio ** (1 - place)), output_tokens)
        return _tokens(upper), _tokens(lower)

    def to_dict(self) -> dict[str, Any]:
        return {"prediction": "interval", "ratio": self.ratio}

    def __repr__(self) -> str:
        return f"interval(ratio={self.ratio:g})"


def interval(ratio: float) -> Prediction:
    """An interval [ℓ, u] that holds the true length, with u/ℓ = `ratio` before rounding outwards.

    ln o lies uniformly within [ln ℓ, ln u]: ℓ = ⌊o·ratio^(−V)⌋ (at least 1), u = ⌈o·ratio^(1 − V)⌉, V uniform on
    [0, 1).

    Parameters
    ----------
    ratio : float
        u/ℓ, at least 1.

    Examples
    --------
    >>> interval(ratio=4).predict(np.array([100, 100]), np.random.default_rng(1))
    (array([197, 108]), array([49, 26]))
    """
    return _Interval(check_real("ratio", ratio, minimum=1, maximum=1e6))


@dataclass(frozen=True)
class _Bucketed(Prediction):
    upper_ends: tuple[int, ...]
    accuracy: float

    def predict(self, output_tokens: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
        ends = np.array(self.upper_ends, dtype=np.int64)
        beyond = output_tokens > ends[-1]
        if beyond.any():
            raise InputError(
                "upper_ends",
                f"{ends[-1]} as the last, but request {int(np.argmax(beyond))} has "
                f"{int(output_tokens[np.argmax(beyond)])} output tokens",
                "cover every output length",
                "Add a larger last end, e.g. the longest output the server allows.",
            )
        bucket = np.searchsorted(ends, output_tokens, side="left")
        last = len(ends) - 1
        if last:
            uniform = rng.random(len(output_tokens))
            up = uniform >= (1 + self.accuracy) / 2
            neighbour = np.where(
                bucket == 0, 1, np.where(bucket == last, last - 1, bucket + np.where(up, 1, -1))
            )
            bucket = np.where(uniform < self.accuracy, bucket, neighbour)
        return ends[bucket], np.concatenate([[1], ends[:-1] + 1])[bucket]

    def to_dict(self) -> dict[str, Any]:
        return {"prediction": "bucketed", "upper_ends": list(self.upper_ends), "accuracy": self.accuracy}

    def __repr__(self) -> str:
        ends = ", ".join(map(str, self.upper_ends))
        return f"bucketed([{ends}], accuracy={self.accuracy:g})"


def bucketed(upper_ends: ArrayLike, accuracy: float = 1.0) -> Prediction:
    """The bucket of lengths a classifier would name: 1..e_1, e_1 + 1..e_2, ..., e_{K−1} + 1..e_K.

    With probability `accuracy` it is the bucket of the true length, else a neighbouring one, either side equally
    likely (the only neighbour at an end). The interval of a wrong bucket does not hold the true length.

    Parameters
    ----------
    upper_ends : int[K]
        e_1 < ... < e_K, tokens; the last at least the longest output of the path.
    accuracy : float, optional
        Probability of the right bucket, 0 to 1; must be 1 with a single bucket.

    Examples
    --------
    >>> bucketed([10, 100, 1000]).predict(np.array([10, 11, 500]), np.random.default_rng(1))
    (array([  10,  100, 1000]), array([  1,  11, 101]))
    """
    if (
        not isinstance(upper_ends, (Sequence, np.ndarray))
        or isinstance(upper_ends, str)
        or not len(upper_ends)
    ):
        raise InputError("upper_ends", upper_ends, "be a list of at least one length")
    ends: list[int] = []
    for index, end in enumerate(upper_ends):
        least = ends[-1] + 1 if ends else 1
        ends.append(check_count(f"upper_ends[{index}]", end, minimum=least, maximum=MAX_TOKENS))
    accuracy = check_real("accuracy", accuracy, minimum=0, maximum=1)
    if len(ends) == 1 and accuracy < 1:
        raise InputError("accuracy", accuracy, "be 1 when there is only one bucket")
    return _Bucketed(tuple(ends), accuracy)


_MAKERS: Makers[Prediction] = {
    "exact": (exact, (), ()),
    "lognormal": (lognormal, ("cv",), ("bias",)),
    "interval": (interval, ("ratio",), ()),
    "bucketed": (bucketed, ("upper_ends",), ("accuracy",)),
}


def from_dict(argument: str, data: object) -> Prediction:
    """Read a prediction from plain data, ``{"prediction": "lognormal", "cv": 0.5}``; errors name the field.

    Examples
    --------
    >>> from_dict("predictions", {"prediction": "lognormal", "cv": 0.5})
    lognormal(cv=0.5, bias=1)
    """
    return read_recipe(argument, data, "prediction", _MAKERS)


def _tokens(lengths: FloatArray) -> IntArray:
    """Whole-numbered floats as token counts, at least 1 and at most the largest length accepted."""
    return np.clip(lengths, 1, MAX_TOKENS).astype(np.int64)
