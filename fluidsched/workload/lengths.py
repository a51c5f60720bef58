"""Laws of prompt and output lengths, in tokens.

A length is a random integer n >= 1. Every law here is *discrete with finitely many atoms*: values n_1 < ... <
n_K and weights w_1, ..., w_K > 0 with sum 1, so that every expectation the library needs is a finite sum,

    E[n^i] = Σ_k w_k n_k^i.

A law whose support is infinite (geometric, lognormal without `maximum`) is cut where its upper tail has mass
1e-12 and says so: `is_bounded` is False, and certificates that need the largest possible length must not rely
on `maximum`.

The two lengths (p, o) of a request have a *joint* law: weighted points (`joint`), or the product of two
marginals. All the fluid model needs of it are the mixed moments E[p^i o^j] and, per output length, its
weight, E[p | o] and E[p² | o] (`output_profile`).

Laws are made by the functions of this module, e.g. ``fs.lengths.geometric(mean=200, maximum=2048)``.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched._checks import check_count, check_real
from fluidsched.errors import InputError
from fluidsched.workload.recipes import Makers, read_recipe

__all__ = [
    "IndependentLengths",
    "JointAtoms",
    "JointLaw",
    "LengthLaw",
    "empirical",
    "fixed",
    "geometric",
    "joint",
    "lognormal",
    "truncated",
    "uniform",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

TAIL_MASS = 1e-12
"""Mass of the upper tail at which a law of infinite support is cut."""

MAX_ATOMS = 2**20
"""Largest number of atoms a law may have, and of points a product law is expanded to."""

FEW_POINTS = 64
"""Points of a joint law up to which many laws are treated together."""

MAX_TOKENS = 2**31 - 1
"""Largest length accepted: products of two lengths then fit a 64-bit integer."""


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """Return `array` after making it read-only."""
    array.setflags(write=False)
    return array


def _plain_array(argument: str, values: ArrayLike) -> NDArray[Any]:
    try:
        return np.asarray(values)
    except ValueError:  # lists of unequal depth or length
        raise InputError(argument, "a list of unequal lists", "be a list of numbers") from None


def token_array(argument: str, values: ArrayLike, *, minimum: int = 1) -> IntArray:
    """Return `values` as a new int64[N] of whole numbers in `minimum`..2^31 − 1, or name the first offender."""
    array = _plain_array(argument, values)
    if array.ndim != 1:
        raise InputError(argument, f"an array of shape {array.shape}", "be one-dimensional")
    if array.dtype.kind not in "iuf" and array.size:
        raise InputError(argument, f"values of type {array.dtype}", "be whole numbers of tokens")
    if array.dtype.kind in "iu" and (not array.size or (array.min() >= 1 and array.max() <= MAX_TOKENS)):
        return array.astype(np.int64)
    with np.errstate(invalid="ignore"):
        bad = ~((array >= minimum) & (array <= MAX_TOKENS) & (array == np.floor(array)))
    if bad.any():
        index = int(np.argmax(bad))
        raise InputError(
            f"{argument}[{index}]", array[index].item(), f"be a whole number in {minimum}..{MAX_TOKENS:,}"
        )
    return array.astype(np.int64)


def _weight_array(argument: str, weights: ArrayLike | None, size: int) -> FloatArray:
    """Return `weights` as a new float64[size], finite, non-negative and not all zero; None means all one."""
    if size == 0:
        raise InputError("values", "no lengths", "hold at least one length")
    if weights is None:
        return np.ones(size)
    array = _plain_array(argument, weights)
    if array.shape != (size,) or array.dtype.kind not in "iuf":
        raise InputError(
            argument, f"shape {array.shape}, {array.dtype}", f"be {size} numbers, one per length"
        )
    array = array.astype(np.float64)
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        index = int(np.argmax(bad))
        raise InputError(f"{argument}[{index}]", array[index].item(), "be finite and non-negative")
    with np.errstate(over="ignore"):
        total = float(array.sum())
    if not 0 < total < math.inf:
        raise InputError(argument, total, "have a positive, finite sum")
    return array


def _normalised(weights: FloatArray) -> FloatArray:
    return weights / math.fsum(weights.tolist())


class _Inversion:
    """Inversion of K weights: the index k with F_k ≤ u < F_{k+1}, F the cumulative weights.

    A guide (Chen and Asmussen, 1974) says for each of G equal cells of [0, 1) the index at its lower end; from there it
    is mostly no step or one. G is a power of two, so u·G and the cells' ends are exact and the index is the
    one a binary search finds.
    """

    def __init__(self, weights: FloatArray) -> None:
        cumulative = np.cumsum(weights)
        self.cumulative = cumulative / cumulative[-1]
        self._guide: NDArray[np.intp] | None = None

    def __call__(self, uniforms: FloatArray) -> NDArray[np.intp]:
        """Index of the atom for each uniform number in [0, 1)."""
        if self._guide is None:
            if len(uniforms) < GUIDED:  # not worth building one
                return np.searchsorted(self.cumulative, uniforms, side="right")
            cells = 1 << (4 * len(self.cumulative)).bit_length()
            self._guide = np.searchsorted(self.cumulative, np.arange(cells) / cells, side="right")
        index = self._guide[(uniforms * len(self._guide)).astype(np.intp)]
        for _ in range(3):
            behind = self.cumulative[index] <= uniforms
            if not behind.any():
                return index
            index += behind
        rest = np.flatnonzero(self.cumulative[index] <= uniforms)
        index[rest] = np.searchsorted(self.cumulative, uniforms[rest], side="right")
        return index


GUIDED = 256
"""Draws at once from which on a guide to the cumulative weights pays."""


@dataclass(frozen=True, eq=False, repr=False)
class LengthLaw:
    """Law of one length: finitely many values with weights. Made by the functions of `fluidsched.lengths`.

    Attributes
    ----------
    values : int64[K]
        Possible lengths in tokens, ascending, each at least 1.
    weights : float64[K]
        Their probabilities, positive, sum 1.
    is_bounded : bool
        False when the law was cut from one of infinite support at an upper tail of mass 1e-12.
    recipe : mapping
        How the law was made, as written to JSON.
    """

    values: IntArray
    weights: FloatArray
    is_bounded: bool
    recipe: Mapping[str, Any]
    _moments: dict[int, float] = field(default_factory=dict, init=False)

    @property
    def mean(self) -> float:
        """E[n], tokens."""
        return self.moment(1)

    @property
    def minimum(self) -> int:
        """Smallest length, tokens."""
        return int(self.values[0])

    @property
    def maximum(self) -> int:
        """Largest length, tokens; where `is_bounded` is False the law continues above with mass 1e-12."""
        return int(self.values[-1])

    @property
    def is_fixed(self) -> bool:
        """Whether there is only one length."""
        return len(self.values) == 1

    def moment(self, k: int) -> float:
        """E[n^k], tokens^k."""
        if k not in self._moments:
            self._moments[k] = float(self.weights @ self.values.astype(np.float64) ** k)
        return self._moments[k]

    @cached_property
    def inversion(self) -> _Inversion:
        """Uniform numbers to indices of `values`."""
        return _Inversion(self.weights)

    def sample(self, rng: np.random.Generator, size: int) -> IntArray:
        """Draw int64[size] lengths by inversion, one uniform number each."""
        return self.values[self.inversion(rng.random(size))]

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain data, read back by `from_dict`."""
        return dict(self.recipe)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LengthLaw):
            return NotImplemented
        return (
            self.is_bounded == other.is_bounded
            and np.array_equal(self.values, other.values)
            and np.array_equal(self.weights, other.weights)
        )

    def __hash__(self) -> int:
        return hash((self.is_bounded, self.values.tobytes(), self.weights.tobytes()))

    def __repr__(self) -> str:
        arguments = {k: v for k, v in self.recipe.items() if k != "law" and v is not None}
        if "values" in arguments:
            shown = f"{len(self.values)} values in {self.minimum}..{self.maximum}"
        else:
            shown = ", ".join(
                f"{k}={from_dict(k, v)!r}" if isinstance(v, Mapping) else f"{k}={v:g}"
                for k, v in arguments.items()
            )
        return f"{self.recipe['law']}({shown})"


def _law(values: IntArray, weights: FloatArray, is_bounded: bool, recipe: Mapping[str, Any]) -> LengthLaw:
    """Law of `values` (ascending, distinct) with unnormalised `weights`; atoms without weight are dropped."""
    kept = weights > 0
    return LengthLaw(read_only(values[kept]), read_only(_normalised(weights[kept])), is_bounded, recipe)


def _check_atoms(count: float, remedy: str) -> None:
    if count > MAX_ATOMS:
        raise InputError(
            "the length law", f"{count:,.0f} possible lengths", f"have at most {MAX_ATOMS:,}", remedy
        )


_GIVE_MAXIMUM = "Give `maximum`, e.g. the longest context the model accepts."


def fixed(tokens: int) -> LengthLaw:
    """Every request has the same length.

    Examples
    --------
    >>> fixed(512).moment(2)
    262144.0
    """
    tokens = check_count("tokens", tokens, minimum=1, maximum=MAX_TOKENS)
    return _law(np.array([tokens], dtype=np.int64), np.ones(1), True, {"law": "fixed", "tokens": tokens})


def empirical(values: ArrayLike, weights: ArrayLike | None = None) -> LengthLaw:
    """Law of observed lengths, equally weighted or with the given weights (counts or probabilities).

    Parameters
    ----------
    values : int[N]
        Lengths in tokens, each at least 1; repeated ones add up.
    weights : float[N], optional
        Non-negative, not all zero; need not sum to 1. Values of weight 0 are left out.

    Examples
    --------
    >>> empirical([5, 40, 40]).mean
    28.333333333333332
    """
    raw = token_array("values", values)
    mass = _weight_array("weights", weights, len(raw))
    distinct, inverse = np.unique(raw, return_inverse=True)
    _check_atoms(len(distinct), "Group the lengths.")
    total: FloatArray = np.bincount(inverse, mass).astype(np.float64)
    distinct, total = read_only(distinct[total > 0]), read_only(total[total > 0])
    return _law(distinct, total, True, {"law": "empirical", "values": distinct, "weights": total})


def uniform(lo: int, hi: int) -> LengthLaw:
    """Every length from `lo` to `hi` tokens, both included, equally likely.

    Examples
    --------
    >>> uniform(1, 5).mean
    3.0
    """
    lo = check_count("lo", lo, minimum=1, maximum=MAX_TOKENS)
    hi = check_count("hi", hi, minimum=lo, maximum=MAX_TOKENS)
    _check_atoms(hi - lo + 1, "Use a narrower range.")
    values = np.arange(lo, hi + 1, dtype=np.int64)
    return _law(values, np.ones(len(values)), True, {"law": "uniform", "lo": lo, "hi": hi})


def geometric(mean: float, maximum: int | None = None, minimum: int = 1) -> LengthLaw:
    """Geometric law: from `minimum` on, the request goes on with the same probability after every token.

    P(n) ∝ q^(n − minimum) for minimum ≤ n ≤ maximum, with q such that the law *as cut at `maximum`* has the
    mean asked for. Without `maximum` q = 1 − 1/(mean − minimum + 1), and the law is cut where q^K ≤ 1e-12
    (`is_bounded` False).

    Parameters
    ----------
    mean : float
        E[n], tokens; above `minimum`, and below the midpoint of `minimum` and `maximum`.
    maximum, minimum : int, optional
        Largest and smallest length, tokens.

    Examples
    --------
    >>> law = geometric(mean=200, maximum=2048)
    >>> round(law.mean, 9), law.maximum, law.is_bounded
    (200.0, 2048, True)
    """
    minimum = check_count("minimum", minimum, minimum=1, maximum=MAX_TOKENS)
    mean = check_real(
        "mean", mean, above=minimum, maximum=MAX_TOKENS, remedy="Use lengths.fixed for a constant length."
    )
    excess = mean - minimum
    decay = math.log1p(1 / excess)  # −ln q of the uncut law
    if maximum is None:
        atoms = math.ceil(-math.log(TAIL_MASS) / decay)
        _check_atoms(atoms, _GIVE_MAXIMUM)
    else:
        maximum = check_count("maximum", maximum, minimum=minimum + 1, maximum=MAX_TOKENS)
        atoms = maximum - minimum + 1
        _check_atoms(atoms, "Use a smaller `maximum`.")
        midpoint = (minimum + maximum) / 2
        check_real("mean", mean, maximum=math.nextafter(midpoint, 0), remedy="Raise `maximum`.")
    steps = np.arange(atoms, dtype=np.float64)

    def weights_at(decay: float) -> FloatArray:
        return np.exp(-decay * steps)

    if maximum is not None:
        decay = _root(
            lambda d: float(weights_at(d) @ steps / weights_at(d).sum()) - excess, 0.0, 1.001 * decay
        )
    values = minimum + np.arange(atoms, dtype=np.int64)
    recipe = {"law": "geometric", "mean": mean, "maximum": maximum, "minimum": minimum}
    return _law(values, weights_at(decay), maximum is not None, recipe)


def lognormal(mean: float, cv: float, maximum: int | None = None) -> LengthLaw:
    """Lognormal law rounded to whole tokens, at least 1, with the mean asked for.

    n = max(1, round(exp(μ + σ Z))), Z standard normal, conditioned on n ≤ `maximum`. σ² = ln(1 + cv²); μ is
    such that the law *as rounded and cut* has mean `mean`. `cv` is the coefficient of variation of the
    continuous law: rounding hardly changes it, a `maximum` that cuts a sizeable tail lowers it.

    Parameters
    ----------
    mean : float
        E[n], tokens, above 1; with `maximum` at most half of it.
    cv : float
        Standard deviation over mean of exp(μ + σ Z), in [1e-6, 100].
    maximum : int, optional
        Largest length, tokens. Without it the law is cut at an upper tail of mass 1e-12 (`is_bounded` False).

    Examples
    --------
    >>> law = lognormal(mean=300, cv=1.0, maximum=8192)
    >>> round(law.mean, 9)
    300.0
    """
    from scipy.special import ndtr, ndtri

    mean = check_real("mean", mean, above=1, remedy="Use lengths.fixed for a constant length.")
    cv = check_real("cv", cv, minimum=1e-6, maximum=100, remedy="Use lengths.fixed for a constant length.")
    sigma = math.sqrt(math.log1p(cv * cv))
    mu = math.log(mean) - sigma * sigma / 2
    if maximum is None:
        log_largest = mu + sigma * float(-ndtri(TAIL_MASS))
        _check_atoms(math.exp(min(log_largest, 700.0)), _GIVE_MAXIMUM)
        atoms = math.ceil(math.exp(log_largest))
    else:
        atoms = check_count("maximum", maximum, minimum=2, maximum=MAX_TOKENS)
        _check_atoms(atoms, "Use a smaller `maximum`.")
        check_real("mean", mean, maximum=atoms / 2, remedy="Raise `maximum`.")
    values = np.arange(1, atoms + 1, dtype=np.int64)
    edges = np.log(values + 0.5)

    def weights_at(mu: float) -> FloatArray:
        z = (edges - mu) / sigma
        below, above = np.asarray(ndtr(z)), np.asarray(ndtr(-z))
        # Differences of the smaller of the two tails keep their relative precision.
        cells = np.where(z[1:] > 0, above[:-1] - above[1:], below[1:] - below[:-1])
        return np.concatenate([below[:1], np.maximum(cells, 0.0)])

    def excess(mu: float) -> float:
        weights = weights_at(mu)
        return float(weights @ values / weights.sum()) - mean

    low, high = mu - 1.0, mu + 1.0
    while excess(low) > 0:
        low -= 1.0
    while excess(high) < 0:
        high += 1.0
    recipe = {"law": "lognormal", "mean": mean, "cv": cv, "maximum": maximum}
    return _law(values, weights_at(_root(excess, low, high)), maximum is not None, recipe)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    from scipy.optimize import brentq

    return float(brentq(function, low, high, xtol=1e-16, rtol=4 * np.finfo(float).eps))


def truncated(law: LengthLaw, lo: int | None = None, hi: int | None = None) -> LengthLaw:
    """The law of a length given that it lies in lo..hi (both included; None: no limit on that side).

    Examples
    --------
    >>> truncated(uniform(1, 9), hi=5).mean
    3.0
    """
    if not isinstance(law, LengthLaw):
        raise InputError("law", law, "be a length law", "Make one with e.g. lengths.geometric(mean=200).")
    low = law.minimum if lo is None else check_count("lo", lo, minimum=1, maximum=MAX_TOKENS)
    high = law.maximum if hi is None else check_count("hi", hi, minimum=low, maximum=MAX_TOKENS)
    kept = (law.values >= low) & (law.values <= high)
    if not kept.any():
        raise InputError("lo, hi", f"{low}..{high}", f"meet the law's range {law.minimum}..{law.maximum}")
    bounded = law.is_bounded or hi is not None
    recipe = {"law": "truncated", "of": law.to_dict(), "lo": lo, "hi": hi}
    return _law(law.values[kept], law.weights[kept], bounded, recipe)


class JointLaw(abc.ABC):
    """Law of a request's prompt and output length (p, o) together: `JointAtoms` or `IndependentLengths`."""

    @property
    @abc.abstractmethod
    def prompt_law(self) -> LengthLaw:
        """Marginal law of p."""

    @property
    @abc.abstractmethod
    def output_law(self) -> LengthLaw:
        """Marginal law of o."""

    @abc.abstractmethod
    def moment(self, i: int, j: int) -> float:
        """E[p^i o^j], tokens^(i + j)."""

    @abc.abstractmethod
    def output_profile(self) -> tuple[IntArray, FloatArray, FloatArray, FloatArray]:
        """The law of o with the prompt's conditional moments.

        Returns
        -------
        output_tokens : int64[K]
            Possible output lengths, ascending.
        weight : float64[K]
            Their probabilities.
        mean_prompt, mean_square_prompt : float64[K]
            E[p | o] (tokens) and E[p² | o] (tokens²).
        """

    @abc.abstractmethod
    def atoms(self) -> tuple[IntArray, IntArray, FloatArray]:
        """All points (p, o) with their weights; a product is expanded, up to 2^20 points."""

    @abc.abstractmethod
    def sample(self, rng: np.random.Generator, size: int) -> tuple[IntArray, IntArray]:
        """Draw (p, o), int64[size] each; the first draws do not depend on `size`."""

    @property
    def minimum_prompt(self) -> int:
        """Smallest prompt length, tokens."""
        return self.prompt_law.minimum

    @property
    def maximum_prompt(self) -> int:
        """Largest prompt length, tokens."""
        return self.prompt_law.maximum

    @property
    def minimum_output(self) -> int:
        """Smallest output length, tokens."""
        return self.output_law.minimum

    @property
    def maximum_output(self) -> int:
        """Largest output length, tokens."""
        return self.output_law.maximum

    @property
    @abc.abstractmethod
    def maximum_total(self) -> int:
        """Largest p + o, tokens."""

    @property
    def is_fixed(self) -> bool:
        """Whether all requests have the same (p, o)."""
        return self.prompt_law.is_fixed and self.output_law.is_fixed

    @property
    def is_bounded(self) -> bool:
        """Whether `maximum_prompt`, `maximum_output` and `maximum_total` hold with certainty."""
        return self.prompt_law.is_bounded and self.output_law.is_bounded


@dataclass(frozen=True, eq=False, repr=False)
class JointAtoms(JointLaw):
    """Joint law on finitely many points; made by `joint`.

    Attributes
    ----------
    prompt_tokens, output_tokens : int64[K]
        The points, distinct, sorted by (p, o).
    weights : float64[K]
        Their probabilities, positive, sum 1.
    given_weights : float64[K]
        The weights as given (e.g. counts), before normalisation; what JSON holds.
    """

    prompt_tokens: IntArray
    output_tokens: IntArray
    weights: FloatArray
    given_weights: FloatArray
    _moments: dict[tuple[int, int], float] = field(default_factory=dict, init=False)

    @cached_property
    def prompt_law(self) -> LengthLaw:
        """Marginal law of p."""
        return empirical(self.prompt_tokens, self.given_weights)

    @cached_property
    def output_law(self) -> LengthLaw:
        """Marginal law of o."""
        return empirical(self.output_tokens, self.given_weights)

    @property
    def minimum_prompt(self) -> int:
        """Smallest prompt length, tokens."""
        return int(self.prompt_tokens.min())

    @property
    def maximum_prompt(self) -> int:
        """Largest prompt length, tokens."""
        return int(self.prompt_tokens.max())

    @property
    def minimum_output(self) -> int:
        """Smallest output length, tokens."""
        return int(self.output_tokens.min())

    @property
    def maximum_output(self) -> int:
        """Largest output length, tokens."""
        return int(self.output_tokens.max())

    @property
    def maximum_total(self) -> int:
        """Largest p + o, tokens."""
        return int((self.prompt_tokens + self.output_tokens).max())

    @property
    def is_fixed(self) -> bool:
        """Whether all requests have the same (p, o)."""
        return len(self.weights) == 1

    @property
    def is_bounded(self) -> bool:
        """True: the points are all there is."""
        return True

    def moment(self, i: int, j: int) -> float:
        """E[p^i o^j], tokens^(i + j)."""
        if (i, j) not in self._moments:
            powers = self.prompt_tokens.astype(np.float64) ** i * self.output_tokens.astype(np.float64) ** j
            self._moments[i, j] = float(self.weights @ powers)
        return self._moments[i, j]

    def output_profile(self) -> tuple[IntArray, FloatArray, FloatArray, FloatArray]:
        """Output lengths, weights, E[p | o], E[p² | o]; see `JointLaw.output_profile`."""
        return self._output_profile

    @cached_property
    def _output_profile(self) -> tuple[IntArray, FloatArray, FloatArray, FloatArray]:
        outputs, inverse = np.unique(self.output_tokens, return_inverse=True)
        prompts = self.prompt_tokens.astype(np.float64)
        weight = np.bincount(inverse, self.weights)
        mean = np.bincount(inverse, self.weights * prompts) / weight
        mean_square = np.bincount(inverse, self.weights * prompts**2) / weight
        return read_only(outputs), read_only(weight), read_only(mean), read_only(mean_square)

    def atoms(self) -> tuple[IntArray, IntArray, FloatArray]:
        """Points and weights."""
        return self.prompt_tokens, self.output_tokens, self.weights

    @cached_property
    def _inversion(self) -> _Inversion:
        return _Inversion(self.weights)

    def sample(self, rng: np.random.Generator, size: int) -> tuple[IntArray, IntArray]:
        """Draw (p, o) by inversion, one uniform number per request."""
        index = self._inversion(rng.random(size))
        return self.prompt_tokens[index], self.output_tokens[index]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, read back by `joint(**data)`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "weights": self.given_weights,
        }

    def __repr__(self) -> str:
        return (
            f"joint({len(self.weights)} points, prompt {self.minimum_prompt}..{self.maximum_prompt}, "
            f"output {self.minimum_output}..{self.maximum_output})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class IndependentLengths(JointLaw):
    """Prompt and output length independent of each other: the product of two marginal laws."""

    prompt: LengthLaw
    output: LengthLaw

    @property
    def prompt_law(self) -> LengthLaw:
        """Marginal law of p."""
        return self.prompt

    @property
    def output_law(self) -> LengthLaw:
        """Marginal law of o."""
        return self.output

    @property
    def maximum_total(self) -> int:
        """Largest p + o, tokens."""
        return self.prompt.maximum + self.output.maximum

    def moment(self, i: int, j: int) -> float:
        """E[p^i o^j] = E[p^i] E[o^j]."""
        return self.prompt.moment(i) * self.output.moment(j)

    def output_profile(self) -> tuple[IntArray, FloatArray, FloatArray, FloatArray]:
        """Output lengths, weights, E[p | o] = E[p], E[p² | o] = E[p²]."""
        count = len(self.output.values)
        mean, mean_square = (np.broadcast_to(self.prompt.moment(k), count) for k in (1, 2))
        return self.output.values, self.output.weights, mean, mean_square

    def atoms(self) -> tuple[IntArray, IntArray, FloatArray]:
        """All pairs, sorted by (p, o), with the products of their weights."""
        prompts, outputs = self.prompt.values, self.output.values
        _check_atoms(len(prompts) * len(outputs), "Use laws with fewer values.")
        weights = np.outer(self.prompt.weights, self.output.weights).ravel()
        return np.repeat(prompts, len(outputs)), np.tile(outputs, len(prompts)), weights

    def sample(self, rng: np.random.Generator, size: int) -> tuple[IntArray, IntArray]:
        """Draw (p, o) by inversion, two uniform numbers per request."""
        uniforms = rng.random((size, 2))
        return (
            self.prompt.values[self.prompt.inversion(uniforms[:, 0])],
            self.output.values[self.output.inversion(uniforms[:, 1])],
        )

    def __repr__(self) -> str:
        return f"prompt {self.prompt!r}, output {self.output!r}"


def joint(prompt_tokens: ArrayLike, output_tokens: ArrayLike, weights: ArrayLike | None = None) -> JointAtoms:
    """Joint law of weighted points (p, o).

    Parameters
    ----------
    prompt_tokens, output_tokens : int[N]
        Lengths in tokens, each at least 1; repeated points add up.
    weights : float[N], optional
        Non-negative, not all zero; need not sum to 1. Points of weight 0 are left out.

    Examples
    --------
    >>> law = joint([100, 100, 900], [10, 30, 50], weights=[1, 1, 2])
    >>> law.moment(1, 1)
    23500.0
    >>> law.output_profile()[2]
    array([100., 100., 900.])
    """
    prompts = token_array("prompt_tokens", prompt_tokens)
    outputs = token_array("output_tokens", output_tokens)
    if len(prompts) != len(outputs):
        raise InputError("output_tokens", f"{len(outputs)} lengths", f"have one per prompt ({len(prompts)})")
    mass = _weight_array("weights", weights, len(prompts))
    keys, inverse = np.unique((prompts << 32) | outputs, return_inverse=True)
    _check_atoms(len(keys), "Group the lengths.")
    total: FloatArray = np.bincount(inverse, mass).astype(np.float64)
    keys, total = keys[total > 0], total[total > 0]
    arrays = keys >> 32, keys & 0xFFFFFFFF, _normalised(total), total
    return JointAtoms(*(read_only(array) for array in arrays))


class StackedPoints(NamedTuple):
    """Points of many joint laws of few points each, law after law; L laws, N points."""

    law: IntArray  # (L,), which laws: positions in what was given
    first: IntArray  # (L,), where their points begin
    prompt_tokens: IntArray  # (N,)
    output_tokens: IntArray
    weights: FloatArray

    @property
    def law_of_point(self) -> IntArray:
        """The law that each point is of, (N,)."""
        return np.repeat(self.law, np.diff(self.first, append=len(self.weights)))

    def sums(self, values: FloatArray) -> FloatArray:
        """Sums over each law's points, (N,) → (L,)."""
        return np.asarray(np.add.reduceat(values, self.first)) if len(self.law) else np.zeros(0)


def stacked_points(laws: Sequence[JointLaw]) -> StackedPoints:
    """Points of those of the laws that are given by at most 64: so many laws cost a few array operations.

    Examples
    --------
    >>> stack = stacked_points([joint([1, 2], [3, 4]), IndependentLengths(fixed(5), fixed(6)), joint([7], [8])])
    >>> stack.law, stack.first, stack.prompt_tokens
    (array([0, 2]), array([0, 2]), array([1, 2, 7]))
    """
    few = [
        (i, law)
        for i, law in enumerate(laws)
        if isinstance(law, JointAtoms) and len(law.weights) <= FEW_POINTS
    ]
    if not few:
        none = np.zeros(0, dtype=np.int64)
        return StackedPoints(none, none, none, none, np.zeros(0))
    counts = [len(law.weights) for _, law in few]
    return StackedPoints(
        np.array([i for i, _ in few], dtype=np.int64),
        np.append(0, np.cumsum(counts[:-1])).astype(np.int64),
        np.concatenate([law.prompt_tokens for _, law in few]),
        np.concatenate([law.output_tokens for _, law in few]),
        np.concatenate([law.weights for _, law in few]),
    )


_MAKERS: Makers[LengthLaw] = {
    "fixed": (fixed, ("tokens",), ()),
    "empirical": (empirical, ("values",), ("weights",)),
    "uniform": (uniform, ("lo", "hi"), ()),
    "geometric": (geometric, ("mean",), ("maximum", "minimum")),
    "lognormal": (lognormal, ("mean", "cv"), ("maximum",)),
    "truncated": (lambda of, lo=None, hi=None: truncated(of, lo, hi), ("of",), ("lo", "hi")),
}


def from_dict(argument: str, data: object) -> LengthLaw:
    """Read a law from plain data: a number of tokens, or ``{"law": "geometric", "mean": 200, ...}``.

    Examples
    --------
    >>> from_dict("output_tokens", {"law": "uniform", "lo": 1, "hi": 5})
    uniform(lo=1, hi=5)
    """
    if not isinstance(data, Mapping):
        return fixed(check_count(argument, data, minimum=1, maximum=MAX_TOKENS))
    return read_recipe(argument, data, "law", _MAKERS, {"of": from_dict})
