"""Request types and workloads: the demand side of the fluid model.

Type j = 1..J brings λ_j requests per second; a request of the type needs p prompt tokens and o ≥ 1 output
tokens, drawn from the type's joint law. The iteration that finishes the prompt emits output token 1, and
iteration k = 1..o of a request holds p + k − 1 KV tokens, so over its lifetime a request takes

    S = o                                     iterations                               (`iterations`)
    τ = p + o − 1                             tokens through the model                 (`processed_tokens`)
    W = Σ_{k=1..o} (p + k − 1) = op + o(o−1)/2   token·iterations of KV memory         (`kv_work`)

and p²/2 of prefill attention. Rates and the fluid program use expectations over the joint law; bounds that
hold with certainty use the type's largest lengths, W^max = o_max p_max + o_max (o_max − 1)/2.

**Cached prefixes.** A type may state which fraction f in [0, 1) of a prompt its server finds in the prefix
cache. Of a prompt of p tokens c are then not computed again: a whole number with mean

    E[c | p] = x = min(f p, p − 1),       c = ⌊x⌋ or ⌊x⌋ + 1, so E[c² | p] = x² + φ(1 − φ), φ = x − ⌊x⌋,

as at least one token must be computed to produce an output token. The prefill takes p − c tokens, each of
which attends to the prefix too, so

    E[p − c]                     tokens are prefilled                                  (`mean_prefill_tokens`)
    τ = p − c + o − 1            tokens go through the model                           (`processed_tokens`)
    (p − c)(c + (p − c)/2) = (p² − c²)/2   is the attention of the prefill             (`prefill_attention`)

Memory stays as it is: every resident holds its whole prompt, and W and S do not change. How many residents
share the blocks of a prefix depends on who is in service together, which rates do not say; a server that
shares them needs less, so what fits here fits there. Blocks that no resident holds give way to those that
some do, and cost nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched import _files
from fluidsched._checks import check_count, check_keys, check_real, check_scale, check_text
from fluidsched._display import Tabular
from fluidsched.errors import InputError
from fluidsched.workload import arrivals as processes
from fluidsched.workload.arrivals import ArrivalProcess
from fluidsched.workload.lengths import (
    FloatArray,
    IndependentLengths,
    IntArray,
    JointLaw,
    LengthLaw,
    StackedPoints,
    fixed,
    from_dict,
    joint,
    read_only,
    stacked_points,
    token_array,
)
from fluidsched.workload.path import ArrivalPath, Seed, seed_sequence
from fluidsched.workload.patience import Patience
from fluidsched.workload.patience import fixed as fixed_patience
from fluidsched.workload.patience import from_dict as patience_from_dict
from fluidsched.workload.predictions import Prediction
from fluidsched.workload.predictions import from_dict as prediction_from_dict

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.server import Server

__all__ = ["Range", "RequestType", "Workload"]

PIECE = 1 << 18
"""Mean number of requests of a piece of a path."""

Range = tuple[int, int | None]
"""Closed interval of token counts; None: no upper end."""

SCHEMA = "fluidsched.workload/1"

_STAYS = {"patience_s": "patience", "abort_after_s": "abort_after"}
"""Column of a path -> the argument of a type whose law it is drawn from."""


@dataclass(frozen=True, eq=False, repr=False)
class RequestType:
    """One kind of request: how often it comes and how long it is.

    Parameters
    ----------
    name : str
        Label, unique in its workload.
    arrival_rate : float
        Requests per second offered, at least 0.
    prompt_tokens, output_tokens : int or LengthLaw
        Lengths in tokens, independent of each other; or leave both out and give `lengths`.
    lengths : JointLaw, optional
        Joint law of (prompt, output), e.g. ``fs.lengths.joint(prompts, outputs, weights)``.
    prompt_range, output_range : (int, int or None), optional
        The closed ranges of lengths by which a request is recognised as this type, given both or neither
        (None as upper end: no limit). `ArrivalPath.to_workload` sets them. Without them the type is
        recognised by its name as label.
    priority : float, optional
        Smaller goes first, where a policy looks at it.
    arrivals : ArrivalProcess, optional
        How the requests are spread over time, from `fluidsched.arrivals`; Poisson by default. The fluid program
        sees only the mean rate.
    patience : Patience or float, optional
        Law of the seconds that a request waits for its first admission before it abandons the queue, from
        `fluidsched.patience`; a number: always so long; None: for ever.
    abort_after : Patience or float, optional
        Law of the seconds after its arrival at which a client hangs up, waiting or served; None: never. The
        fluid program knows neither: it takes all who come as staying, so its optimum bounds what is served.
    cached_prefix_fraction : float
        f in [0, 1), the share of every prompt that the prefix cache already holds. Sampled paths carry it as
        `ArrivalPath.cached_prompt_tokens`.

    Attributes
    ----------
    law : JointLaw
        Joint law of prompt and output length.

    Examples
    --------
    >>> chat = RequestType("chat", arrival_rate=12.0, prompt_tokens=512, output_tokens=21)
    >>> chat.law.moment(1, 1)
    10752.0
    """

    name: str
    arrival_rate: float
    prompt_tokens: int | LengthLaw | None = None
    output_tokens: int | LengthLaw | None = None
    _: KW_ONLY
    lengths: JointLaw | None = None
    prompt_range: Range | None = None
    output_range: Range | None = None
    priority: float | None = None
    arrivals: ArrivalProcess = field(default_factory=processes.poisson)
    patience: Patience | float | None = None
    abort_after: Patience | float | None = None
    cached_prefix_fraction: float = 0.0
    law: JointLaw = field(init=False)

    def __post_init__(self) -> None:
        check_text("name", self.name)
        store: dict[str, Any] = {}
        store["arrival_rate"] = check_scale(
            f"arrival_rate of type {self.name!r}", self.arrival_rate, remedy="Use 0 to switch a type off."
        )
        marginals = (self.prompt_tokens, self.output_tokens)
        if self.lengths is not None:
            if marginals != (None, None):
                raise InputError(
                    f"lengths of type {self.name!r}",
                    "prompt_tokens or output_tokens as well",
                    "be given alone",
                    "Give either a joint law or the two marginals.",
                )
            if not isinstance(self.lengths, JointLaw):
                raise InputError(
                    f"lengths of type {self.name!r}", self.lengths, "be a joint law", "Use lengths.joint."
                )
            store["law"] = self.lengths
        else:
            store["law"] = IndependentLengths(
                *(
                    _marginal(f"{argument} of type {self.name!r}", given)
                    for argument, given in zip(("prompt_tokens", "output_tokens"), marginals, strict=True)
                )
            )
        if (self.prompt_range is None) != (self.output_range is None):
            raise InputError(
                f"ranges of type {self.name!r}", "only one of them", "be given for prompt and output"
            )
        if self.prompt_range is not None:
            law: JointLaw = store["law"]
            supports = {"prompt_range": law.prompt_law, "output_range": law.output_law}
            for argument, support in supports.items():
                store[argument] = _check_range(
                    f"{argument} of type {self.name!r}", getattr(self, argument), support
                )
        if self.priority is not None:
            store["priority"] = check_real(f"priority of type {self.name!r}", self.priority)
        if not isinstance(self.arrivals, ArrivalProcess):
            raise InputError(
                f"arrivals of type {self.name!r}",
                self.arrivals,
                "be an arrival process",
                "Make one with e.g. arrivals.renewal(cv=2).",
            )
        for argument in ("patience", "abort_after"):
            given = getattr(self, argument)
            if given is not None and not isinstance(given, Patience):
                remedy = "Or give a law from fluidsched.patience."
                seconds = check_scale(f"{argument} of type {self.name!r}", given, remedy=remedy)
                store[argument] = fixed_patience(seconds)
        store["cached_prefix_fraction"] = check_real(
            f"cached_prefix_fraction of type {self.name!r}",
            self.cached_prefix_fraction,
            minimum=0,
            below=1,
            remedy="At least the last prompt token is always computed.",
        )
        for attribute, value in store.items():
            object.__setattr__(self, attribute, value)

    def cached_tokens(self) -> tuple[IntArray, FloatArray]:
        """The cached tokens c of every prompt length: at least how many, and the probability of one more.

        Returns
        -------
        tokens : int64[K]
            ⌊x⌋, x = min(f p, p − 1), for every value p of the prompt law.
        one_more : float64[K]
            φ = x − ⌊x⌋.

        Examples
        --------
        >>> RequestType("chat", 1.0, 10, 5, cached_prefix_fraction=0.25).cached_tokens()
        (array([2]), array([0.5]))
        """
        mean = _mean_cached(self.cached_prefix_fraction, self.law.prompt_law.values)
        tokens = np.floor(mean)
        return read_only(tokens.astype(np.int64)), read_only(mean - tokens)

    def cached_moments(self) -> FloatArray:
        """E[c | p] and E[c² | p] for every prompt length, float64[2, K]."""
        tokens, one_more = self.cached_tokens()
        square = tokens.astype(np.float64) ** 2 + (2.0 * tokens + 1.0) * one_more
        return np.stack([tokens + one_more, square])

    def to_dict(self) -> dict[str, Any]:
        """Plain data: only what was given."""
        data: dict[str, Any] = {"name": self.name, "arrival_rate": self.arrival_rate}
        for argument in ("prompt_tokens", "output_tokens"):
            given = getattr(self, argument)
            if given is not None:
                data[argument] = given.to_dict() if isinstance(given, LengthLaw) else int(given)
        if self.lengths is not None:
            data["lengths"] = _joint_to_dict(self.lengths)
        for argument in ("prompt_range", "output_range", "priority"):
            given = getattr(self, argument)
            if given is not None:
                data[argument] = list(given) if isinstance(given, tuple) else given
        if self.arrivals != processes.poisson():
            data["arrivals"] = self.arrivals.to_dict()
        for argument in ("patience", "abort_after"):
            law = getattr(self, argument)
            if law is not None:
                data[argument] = law.to_dict()
        if self.cached_prefix_fraction:
            data["cached_prefix_fraction"] = self.cached_prefix_fraction
        return data

    @classmethod
    def from_dict(cls, data: object) -> RequestType:
        """Read what `to_dict` writes; `lengths` holds weighted points or two marginal laws."""
        return _type_from_dict("type", data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RequestType):
            return NotImplemented
        return _files.fingerprint(self.to_dict()) == _files.fingerprint(other.to_dict())

    def __hash__(self) -> int:
        return hash(_files.fingerprint(self.to_dict()))

    def __repr__(self) -> str:
        spread = "" if self.arrivals == processes.poisson() else f", {self.arrivals!r}"
        stays = "".join(
            f", {argument}={law!r}"
            for argument in _STAYS.values()
            if (law := getattr(self, argument)) is not None
        )
        return (
            f"RequestType({self.name!r}, {self.arrival_rate:.4g} req/s{spread}, {self.law!r}"
            f"{stays}{_cached(self)})"
        )


def _mean_cached(fraction: float, prompts: IntArray) -> FloatArray:
    """x = min(f p, p − 1), the mean of what is cached of prompts of p tokens."""
    return np.asarray(np.minimum(fraction * prompts, prompts - 1.0))


def _cached(member: RequestType) -> str:
    fraction = member.cached_prefix_fraction
    return f", {fraction:.3g} of prompts cached" if fraction else ""


def _marginal(argument: str, given: object) -> LengthLaw:
    if isinstance(given, LengthLaw):
        return given
    if given is None:
        raise InputError(
            argument, "nothing", "be given", "Give both lengths, or `lengths=` with a joint law."
        )
    return fixed(check_count(argument, given, minimum=1, remedy="Or give a law from fluidsched.lengths."))


def _check_range(argument: str, given: Any, law: LengthLaw) -> Range:
    if not isinstance(given, Sequence) or len(given) != 2:
        raise InputError(argument, given, "be a pair (lo, hi), hi None for no limit")
    lo = check_count(argument, given[0], minimum=1)
    hi = None if given[1] is None else check_count(argument, given[1], minimum=lo)
    if law.minimum < lo or (hi is not None and law.maximum > hi):
        raise InputError(
            argument,
            f"{lo}..{'' if hi is None else hi}",
            f"hold the law's lengths, {law.minimum}..{law.maximum}",
        )
    return lo, hi


def _joint_to_dict(law: JointLaw) -> dict[str, Any]:
    if isinstance(law, IndependentLengths):
        return {"prompt": law.prompt.to_dict(), "output": law.output.to_dict()}
    prompts, outputs, weights = law.atoms()
    given = getattr(law, "given_weights", weights)
    return {"prompt_tokens": prompts, "output_tokens": outputs, "weights": given}


def _type_from_dict(place: str, data: object) -> RequestType:
    """Read a request type; errors say where, e.g. "types[2].output_tokens.mean"."""
    lengths = ("prompt_tokens", "output_tokens", "lengths", "prompt_range", "output_range")
    optional = (*lengths, "priority", "arrivals", "patience", "abort_after", "cached_prefix_fraction")
    given = check_keys(place, data, None, ("name", "arrival_rate"), optional)
    for argument in ("prompt_tokens", "output_tokens"):
        if isinstance(given.get(argument), Mapping):
            given[argument] = from_dict(f"{place}.{argument}", given[argument])
    if given.get("lengths") is not None:
        given["lengths"] = _joint_from_dict(f"{place}.lengths", given["lengths"])
    if "arrivals" in given:
        given["arrivals"] = processes.from_dict(f"{place}.arrivals", given["arrivals"])
    for argument in ("patience", "abort_after"):
        if isinstance(given.get(argument), Mapping):
            given[argument] = patience_from_dict(f"{place}.{argument}", given[argument])
    for argument in ("prompt_range", "output_range"):
        value = given.get(argument)
        if value is not None:
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                raise InputError(f"{place}.{argument}", value, "be a pair [lo, hi], hi null for no limit")
            given[argument] = (value[0], None if value[1] in ("inf", np.inf) else value[1])
    try:
        return RequestType(**given)
    except InputError as error:
        raise InputError(f"{place}: {error.argument}", error.received, error.required, error.remedy) from None


def _joint_from_dict(place: str, data: object) -> JointLaw:
    if isinstance(data, Mapping) and "prompt" in data:
        parts = check_keys(place, data, None, ("prompt", "output"))
        return IndependentLengths(*(from_dict(f"{place}.{key}", parts[key]) for key in ("prompt", "output")))
    points = check_keys(place, data, None, ("prompt_tokens", "output_tokens"), ("weights",))
    try:
        return joint(**points)
    except InputError as error:
        raise InputError(f"{place}.{error.argument}", error.received, error.required, error.remedy) from None


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Workload(Tabular):
    """The offered demand: J request types with their rates.

    Parameters
    ----------
    types : sequence of RequestType
        At least one, with unique names.
    name, description, source : str
        What it is, in words; `source` names the data and its licence where it comes from data.
    predictions : Prediction, optional
        How output lengths are predicted on sampled paths, from `fluidsched.predictions`; None: not at all.

    Examples
    --------
    >>> workload = Workload([RequestType("chat", 4.0, 512, 128), RequestType("summarise", 0.5, 4000, 200)])
    >>> workload.kv_work
    array([ 73664., 819900.])
    >>> workload.scaled(2.0).total_arrival_rate
    9.0
    """

    types: tuple[RequestType, ...]
    name: str = "workload"
    description: str = ""
    source: str = ""
    predictions: Prediction | None = None

    def __init__(
        self,
        types: Iterable[RequestType],
        name: str = "workload",
        description: str = "",
        source: str = "",
        predictions: Prediction | None = None,
    ) -> None:
        members = tuple(types)
        if not members:
            raise InputError("types", "none", "hold at least one RequestType")
        seen: set[str] = set()
        for index, member in enumerate(members):
            if not isinstance(member, RequestType):
                raise InputError(f"types[{index}]", member, "be a RequestType")
            if member.name in seen:
                raise InputError(f"types[{index}].name", member.name, "be unique in the workload")
            seen.add(member.name)
        texts = {"name": name, "description": description, "source": source}
        for argument, text in texts.items():
            if not isinstance(text, str):
                raise InputError(argument, text, "be a string")
        if predictions is not None and not isinstance(predictions, Prediction):
            raise InputError(
                "predictions", predictions, "be a prediction", "Make one with e.g. predictions.exact()."
            )
        for attribute, value in {"types": members, **texts, "predictions": predictions}.items():
            object.__setattr__(self, attribute, value)

    def __len__(self) -> int:
        return len(self.types)

    @cached_property
    def type_names(self) -> tuple[str, ...]:
        """Names of the types, in order."""
        return tuple(t.name for t in self.types)

    @cached_property
    def arrival_rate(self) -> FloatArray:
        """λ, float64[J], requests per second."""
        return read_only(np.array([t.arrival_rate for t in self.types]))

    @property
    def total_arrival_rate(self) -> float:
        """Σ λ_j, requests per second."""
        return float(self.arrival_rate.sum())

    def moment(self, i: int, j: int) -> FloatArray:
        """E[p^i o^j] of each type, float64[J], tokens^(i + j)."""
        if (i, j) not in self._moments:
            points = self.stacked_points
            powers = (
                points.prompt_tokens.astype(np.float64) ** i * points.output_tokens.astype(np.float64) ** j
            )
            moments = np.empty(len(self))
            moments[points.law] = points.sums(points.weights * powers)
            for k in np.setdiff1d(np.arange(len(self)), points.law).tolist():
                moments[k] = self.types[k].law.moment(i, j)
            self._moments[i, j] = read_only(moments)
        return self._moments[i, j]

    @cached_property
    def _moments(self) -> dict[tuple[int, int], FloatArray]:
        return {}

    @cached_property
    def stacked_points(self) -> StackedPoints:
        """Points of the types whose lengths have few, one type after the other."""
        return stacked_points([t.law for t in self.types])

    @cached_property
    def mean_prompt_tokens(self) -> FloatArray:
        """E[p], float64[J], tokens."""
        return self.moment(1, 0)

    @cached_property
    def mean_output_tokens(self) -> FloatArray:
        """E[o], float64[J], tokens."""
        return self.moment(0, 1)

    @property
    def iterations(self) -> FloatArray:
        """E[S] = E[o], float64[J], iterations a request is served in."""
        return self.mean_output_tokens

    @cached_property
    def cached_prefix_fraction(self) -> FloatArray:
        """f, float64[J], the share of prompts that the prefix cache holds."""
        return read_only(np.array([t.cached_prefix_fraction for t in self.types]))

    @cached_property
    def mean_prefill_tokens(self) -> FloatArray:
        """E[p − c], float64[J], prompt tokens computed, those not cached."""
        return read_only(self.mean_prompt_tokens - self._cached_moments[0])

    @cached_property
    def processed_tokens(self) -> FloatArray:
        """E[τ] = E[p − c + o − 1], float64[J], tokens pushed through the model per request."""
        return read_only(self.mean_prefill_tokens + self.mean_output_tokens - 1)

    @cached_property
    def kv_work(self) -> FloatArray:
        """E[W] = E[op + o(o − 1)/2], float64[J], KV tokens held, summed over the iterations served."""
        return read_only(self.moment(1, 1) + (self.moment(0, 2) - self.moment(0, 1)) / 2)

    @cached_property
    def prefill_attention(self) -> FloatArray:
        """E[p² − c²]/2, float64[J], tokens²: attention work of the prompt's computed tokens.

        Examples
        --------
        >>> chat = RequestType("chat", 1.0, 10, 5, cached_prefix_fraction=0.4)
        >>> Workload([chat]).prefill_attention  # 6 tokens attend to 4 cached ones and to 3 on average: 6·7
        array([42.])
        """
        return read_only((self.moment(2, 0) - self._cached_moments[1]) / 2)

    @cached_property
    def _cached_moments(self) -> FloatArray:
        """E[c] and E[c²], (2, J)."""
        moments = np.zeros((2, len(self)))
        for j in np.flatnonzero(self.cached_prefix_fraction):
            moments[:, j] = self.types[j].cached_moments() @ self.types[j].law.prompt_law.weights
        return read_only(moments)

    @cached_property
    def max_prompt_tokens(self) -> IntArray:
        """Largest p, int64[J], tokens (certain only where the law is bounded)."""
        return read_only(np.array([t.law.maximum_prompt for t in self.types], dtype=np.int64))

    @cached_property
    def max_prefill_tokens(self) -> IntArray:
        """Most prompt tokens computed, int64[J]: p − ⌊x⌋ of the largest p (certain only where the law is bounded)."""
        return read_only(self.max_prompt_tokens - self._cached_of_longest)

    @cached_property
    def max_prefill_attention(self) -> FloatArray:
        """(p² − ⌊x⌋²)/2 of the largest p, float64[J], tokens²: most attention work of a prompt's computed tokens."""
        prompts, cached = self.max_prompt_tokens.astype(np.float64), self._cached_of_longest
        return read_only((prompts**2 - cached.astype(np.float64) ** 2) / 2)

    @cached_property
    def _cached_of_longest(self) -> IntArray:
        """⌊x⌋ of the largest prompts, (J,)."""
        mean = [_mean_cached(t.cached_prefix_fraction, np.array(t.law.maximum_prompt)) for t in self.types]
        return np.floor(np.array(mean)).astype(np.int64)

    @cached_property
    def max_output_tokens(self) -> IntArray:
        """Largest o, int64[J], tokens (certain only where the law is bounded)."""
        return read_only(np.array([t.law.maximum_output for t in self.types], dtype=np.int64))

    @cached_property
    def max_total_tokens(self) -> IntArray:
        """Largest p + o, int64[J], tokens (certain only where the law is bounded)."""
        return read_only(np.array([t.law.maximum_total for t in self.types], dtype=np.int64))

    @cached_property
    def is_bounded(self) -> NDArray[np.bool_]:
        """Whether the type's largest lengths hold with certainty, bool[J]."""
        return read_only(np.array([t.law.is_bounded for t in self.types]))

    @cached_property
    def max_kv_work(self) -> FloatArray:
        """W^max = o_max p_max + o_max (o_max − 1)/2, float64[J], from the largest p and the largest o."""
        prompts, outputs = (
            self.max_prompt_tokens.astype(np.float64),
            self.max_output_tokens.astype(np.float64),
        )
        return read_only(outputs * prompts + outputs * (outputs - 1) / 2)

    def with_cached_prefixes(self, fraction: ArrayLike) -> Workload:
        """The same demand, with this share of prompts in the prefix cache: one number, or one per type.

        Examples
        --------
        >>> workload = Workload([RequestType("chat", 4.0, 512, 100)]).with_cached_prefixes(0.5)
        >>> workload.mean_prompt_tokens, workload.mean_prefill_tokens
        (array([512.]), array([256.]))
        """
        fractions = np.asarray(fraction)
        if fractions.shape not in ((), (len(self),)):
            raise InputError(
                "fraction", f"shape {fractions.shape}", f"be one number, or one per type ({len(self)})"
            )
        pairs = zip(self.types, np.broadcast_to(fractions, len(self)).tolist(), strict=True)
        return self.with_types(dataclasses.replace(t, cached_prefix_fraction=f) for t, f in pairs)

    def with_types(self, types: Iterable[RequestType]) -> Workload:
        """Other types under the same name, description, source and predictions."""
        return Workload(types, self.name, self.description, self.source, self.predictions)

    def with_predictions(self, predictions: Prediction | None) -> Workload:
        """The same demand, with output lengths of sampled paths predicted in this way (None: not at all).

        Examples
        --------
        >>> from fluidsched import predictions
        >>> workload = Workload([RequestType("chat", 4.0, 512, 100)])
        >>> path = workload.with_predictions(predictions.interval(ratio=2)).sample(horizon=1.0, seed=3)
        >>> path.predicted_output_minimum, path.predicted_output_tokens
        (array([94, 63, 51, 81, 61]), array([190, 128, 103, 164, 123]))
        """
        return Workload(self.types, self.name, self.description, self.source, predictions)

    def with_rates(self, arrival_rate: ArrayLike) -> Workload:
        """The same types with other rates, float[J], requests per second; arrival processes keep their clock."""
        rates = np.asarray(arrival_rate)
        if rates.shape != (len(self),):
            raise InputError("arrival_rate", f"shape {rates.shape}", f"have one rate per type ({len(self)})")
        types = [
            dataclasses.replace(t, arrival_rate=r) for t, r in zip(self.types, rates.tolist(), strict=True)
        ]
        return self.with_types(types)

    def scaled(self, zeta: float) -> Workload:
        """The same demand `zeta` ≥ 0 times as fast: rates times `zeta`, all times divided by `zeta`.

        With one seed the scaled workload brings the same requests, sooner, from clients as patient as before. So
        profiles and bursts that last a stated number of seconds get shorter too; to put more requests into the
        same profile use `with_rates`.
        """
        zeta = check_scale("zeta", zeta)
        types = [
            dataclasses.replace(
                t,
                arrival_rate=t.arrival_rate * zeta,
                arrivals=t.arrivals.accelerated(zeta) if zeta > 0 else t.arrivals,
            )
            for t in self.types
        ]
        return self.with_types(types)

    def with_arrivals(self, process: ArrivalProcess) -> Workload:
        """The same types and rates, every type with this arrival process (each type draws its own times).

        Examples
        --------
        >>> from fluidsched import arrivals
        >>> steady = Workload([RequestType("chat", 4.0, 512, 128)])
        >>> steady.with_arrivals(arrivals.renewal(cv=3)).types[0]
        RequestType('chat', 4 req/s, renewal(cv=3), prompt fixed(tokens=512), output fixed(tokens=128))
        """
        types = [dataclasses.replace(t, arrivals=process) for t in self.types]
        return self.with_types(types)

    def at_load(self, x: float, server: Server) -> Workload:
        """Rates scaled so that the largest load of the fluid solution on `server` is `x`.

        At x = 1 the mix is on the boundary of the region the server can carry in the fluid limit. As with
        `scaled`, arrival processes are sped up as a whole.
        """
        from fluidsched.fluid import solve_fluid

        x = check_real("x", x, above=0)
        if self.total_arrival_rate == 0:
            raise InputError(
                "arrival_rate", "0 for every type", "have a positive sum", "Only a mix can be scaled."
            )
        return self.scaled(x * solve_fluid(self, server).critical_rate / self.total_arrival_rate)

    def merged(self, types: int) -> Workload:
        """Fewer, larger types: neighbouring bins joined, laws mixed by rate, all moments of the whole
        conserved.

        Parameters
        ----------
        types : int
            One of `merge_sizes`: for 12 = 3 × 4 bins 1, 3 (the ranges of prompts), 6 or 12.
        """
        from fluidsched.workload.binning import merge

        return merge(self, types)

    @property
    def merge_sizes(self) -> tuple[int, ...]:
        """Numbers of types `merged` can give, ascending."""
        from fluidsched.workload.binning import merge_sizes

        return merge_sizes(self)

    def classify(self, prompt_tokens: ArrayLike, output_tokens: ArrayLike) -> IntArray:
        """Type of each request by the types' ranges: int64[N], the first type whose ranges hold it.

        Raises
        ------
        InputError
            A type has no ranges (it is recognised by label, not by length), or a request lies in no type's
            ranges.
        """
        prompts, outputs = (
            token_array("prompt_tokens", prompt_tokens),
            token_array("output_tokens", output_tokens),
        )
        result = np.full(len(prompts), -1, dtype=np.int64)
        for j in reversed(range(len(self))):
            member = self.types[j]
            if member.prompt_range is None or member.output_range is None:
                raise InputError(
                    f"type {member.name!r}",
                    "no ranges",
                    "have prompt and output ranges",
                    "It is recognised by label only.",
                )
            inside = np.ones(len(prompts), dtype=bool)
            for values, (lo, hi) in ((prompts, member.prompt_range), (outputs, member.output_range)):
                inside &= (values >= lo) & (values <= (np.inf if hi is None else hi))
            result[inside] = j
        if (result < 0).any():
            first = int(np.argmax(result < 0))
            raise InputError(
                f"request {first}",
                f"prompt {prompts[first]}, output {outputs[first]}",
                "lie in the ranges of a type",
            )
        return result

    def sample(self, horizon: float, seed: Seed) -> ArrivalPath:
        """Draw a path on [0, horizon): arrivals from each type's process, lengths from its law, independently.

        Each type has its own random streams (times, lengths, predictions, cached tokens, patience, aborts), derived
        from `seed` and the type's *name*. So with one seed a type's requests stay the same when other types are
        added, removed, reordered or change their rates, and a longer horizon only adds requests. Simultaneous
        arrivals are ordered by type index. Where a type states cached prefixes, the path says how many tokens of
        every prompt are cached: ⌊x⌋ of them, and with probability φ one more (see the module).

        Parameters
        ----------
        horizon : float
            Window length, seconds.
        seed : int, SeedSequence or Generator
            The same integer or sequence gives the same path; a generator is advanced.

        Examples
        --------
        >>> workload = Workload([RequestType("chat", 4.0, 512, 128)])
        >>> workload.sample(horizon=100.0, seed=7)
        ArrivalPath('workload': 397 requests in 100 s, 3.97 req/s)
        """
        stream = self._streams(seed)
        times, prompts, outputs, types = [], [], [], []
        predicted, minima, cached = [], [], []
        stays: dict[str, list[FloatArray]] = {
            column: []
            for column, argument in _STAYS.items()
            if any(getattr(member, argument) is not None for member in self.types)
        }
        for index, member in enumerate(self.types):
            key = int.from_bytes(hashlib.sha256(member.name.encode()).digest()[:8], "little")
            time_stream, length_stream = stream(key, 0), stream(key, 1)
            drawn = member.arrivals.sample(member.arrival_rate, horizon, time_stream)
            prompt, output = member.law.sample(length_stream, len(drawn))
            times.append(drawn)
            prompts.append(prompt)
            outputs.append(output)
            types.append(np.full(len(drawn), index, dtype=np.int64))
            if self.predictions is not None:
                prediction, minimum = self.predictions.predict(output, stream(key, 2))
                predicted.append(prediction)
                if minimum is not None:
                    minima.append(minimum)
            if self.cached_prefix_fraction.any():
                cached.append(_cached_of(member, prompt, stream(key, 3)))
            for purpose, (column, argument) in enumerate(_STAYS.items(), start=4):
                law = getattr(member, argument)
                if law is not None:
                    stays[column].append(law.sample(stream(key, purpose), len(drawn)))
                elif column in stays:
                    stays[column].append(np.full(len(drawn), np.inf))
        arrival = np.concatenate(times)
        order = _in_order(arrival)
        stay = {column: np.concatenate(drawn)[order] for column, drawn in stays.items()}
        return ArrivalPath(
            arrival[order],
            np.concatenate(prompts)[order],
            np.concatenate(outputs)[order],
            type=np.concatenate(types)[order],
            type_names=self.type_names,
            predicted_output_tokens=np.concatenate(predicted)[order] if predicted else None,
            horizon=horizon,
            name=self.name,
            predicted_output_minimum=np.concatenate(minima)[order] if minima else None,
            cached_prompt_tokens=np.concatenate(cached)[order] if cached else None,
            patience_s=stay.get("patience_s"),
            abort_after_s=stay.get("abort_after_s"),
        )

    def _streams(self, seed: Seed) -> Callable[[int, int], np.random.Generator]:
        """The random stream of a type's key for a purpose: 0 times, 1 lengths, 2 predictions, 3 cached tokens."""
        root = seed_sequence(seed)

        def stream(type_key: int, purpose: int) -> np.random.Generator:
            spawn_key = (*root.spawn_key, type_key, purpose)
            return np.random.default_rng(
                np.random.SeedSequence(root.entropy, spawn_key=spawn_key, pool_size=root.pool_size)
            )

        return stream

    def pieces(self, horizon: float, seed: Seed, *, requests: int = PIECE) -> Iterator[ArrivalPath]:
        """The path of `sample` in pieces of about so many requests: the same requests, however many are drawn at once.

        Each piece holds the requests of one stretch of time, in seconds since the start of the whole, and has the
        stretch's end as its horizon; the last one's is `horizon`.

        Parameters
        ----------
        horizon, seed
            As for `sample`, without its limit on the number of requests.
        requests : int
            Mean number of requests of a piece.

        Raises
        ------
        InputError
            When the first piece is asked for: types whose requests may leave unfinished, no request at all.

        Examples
        --------
        >>> workload = Workload([RequestType("chat", 4.0, 512, 128)])
        >>> [len(piece) for piece in workload.pieces(horizon=100.0, seed=7, requests=200)]
        [213, 184]
        """
        horizon = check_real("horizon", horizon, above=0)
        requests = check_count("requests", requests, minimum=1)
        for member in self.types:
            for argument in _STAYS.values():
                if getattr(member, argument) is not None:
                    raise InputError(
                        f"{argument} of type {member.name!r}",
                        getattr(member, argument),
                        "be None for paths drawn in pieces",
                        "Simulate with records.",
                    )
        total = self.total_arrival_rate
        if total == 0.0:
            raise InputError("arrival_rate", "0 for every type", "have a positive sum", "Nobody comes.")
        stream = self._streams(seed)
        sources = []
        for member in self.types:
            key = int.from_bytes(hashlib.sha256(member.name.encode()).digest()[:8], "little")
            size = max(int(requests * member.arrival_rate / total), 1024)
            times = (
                member.arrivals.pieces(member.arrival_rate, stream(key, 0), size)
                if member.arrival_rate > 0.0
                else iter([np.full(1, np.inf)])
            )
            sources.append((member, times, stream(key, 1), stream(key, 2), stream(key, 3)))
        ahead = [next(times) for _, times, *_ in sources]
        count = max(math.ceil(total * horizon / requests), 1)
        with_cache = bool(self.cached_prefix_fraction.any())
        for k in range(count):
            end = horizon if k == count - 1 else horizon * (k + 1) / count
            columns: list[dict[str, NDArray[Any]]] = []
            for index, (member, times, lengths, beliefs, cache) in enumerate(sources):
                taken = []
                while ahead[index][-1] < end:
                    taken.append(ahead[index])
                    ahead[index] = next(times)
                split = int(np.searchsorted(ahead[index], end))
                taken.append(ahead[index][:split])
                ahead[index] = ahead[index][split:]
                drawn = np.concatenate(taken)
                prompt, output = member.law.sample(lengths, len(drawn))
                own = {
                    "arrival_s": drawn,
                    "prompt_tokens": prompt,
                    "output_tokens": output,
                    "type": np.full(len(drawn), index, dtype=np.int64),
                }
                if self.predictions is not None:
                    predicted, minimum = self.predictions.predict(output, beliefs)
                    own["predicted_output_tokens"] = predicted
                    if minimum is not None:
                        own["predicted_output_minimum"] = minimum
                if with_cache:
                    own["cached_prompt_tokens"] = _cached_of(member, prompt, cache)
                columns.append(own)
            together: dict[str, Any] = {
                name: np.concatenate([own[name] for own in columns]) for name in columns[0]
            }
            order = _in_order(together["arrival_s"])
            yield ArrivalPath(
                **{name: column[order] for name, column in together.items()},
                type_names=self.type_names,
                horizon=end,
                name=self.name,
            )

    def to_frame(self) -> pd.DataFrame:
        """One row per type: rate, mean and largest lengths, KV work, share of the workload's KV work."""
        import pandas as pd

        work = self.arrival_rate * self.kv_work
        total = work.sum()
        return pd.DataFrame(
            {
                "arrival_rate": self.arrival_rate,
                "mean_prompt_tokens": self.mean_prompt_tokens,
                "max_prompt_tokens": self.max_prompt_tokens,
                "mean_output_tokens": self.mean_output_tokens,
                "max_output_tokens": self.max_output_tokens,
                "kv_work": self.kv_work,
                "kv_work_share": work / total if total > 0 else work,
            },
            index=pd.Index(self.type_names, name="type"),
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the lengths and rates of the types; see `fluidsched.plots.request_types`."""
        from fluidsched import plots

        return plots.request_types(self, ax=ax)

    def to_dict(self) -> dict[str, Any]:
        """Plain data in the schema ``fluidsched.workload/1``."""
        texts = {k: getattr(self, k) for k in ("name", "description", "source")}
        data = {"schema": SCHEMA, **texts, "types": [t.to_dict() for t in self.types]}
        if self.predictions is not None:
            data["predictions"] = self.predictions.to_dict()
        return data

    @classmethod
    def from_dict(cls, data: object) -> Workload:
        """Read what `to_dict` writes; a field missing, unknown or out of range is an `InputError`."""
        given = check_keys(
            "workload", data, SCHEMA, ("types",), ("name", "description", "source", "predictions")
        )
        members = given.pop("types")
        if not isinstance(members, (list, tuple)):
            raise InputError("types", members, "be a list")
        types = [_type_from_dict(f"types[{index}]", member) for index, member in enumerate(members)]
        if "predictions" in given:
            given["predictions"] = prediction_from_dict("predictions", given["predictions"])
        return cls(types, **given)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The workload as JSON text, written whole to `path` if given."""
        text = _files.dumps(self.to_dict())
        if path is not None:
            _files.write_whole(path, text)
        return text

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Workload:
        """Read a workload from a JSON file."""
        return cls.from_dict(_files.loads(str(path), _files.read_text("path", path)))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the workload's JSON: equal workloads, equal fingerprints."""
        return _files.fingerprint(self.to_dict())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Workload):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        width = max(len(name) for name in self.type_names)
        count = f"{len(self)} type{'s' if len(self) > 1 else ''}"
        common = self.types[0].arrivals if len({t.arrivals for t in self.types}) == 1 else None
        spread = "" if common in (None, processes.poisson()) else f", {common!r}"
        predicted = "" if self.predictions is None else f", outputs predicted {self.predictions!r}"
        lines = [f"Workload {self.name!r}: {count}, {self.total_arrival_rate:.4g} req/s{spread}{predicted}"]
        for member, work in zip(self.types, self.kv_work.tolist(), strict=True):
            prompt, output = member.law.moment(1, 0), member.law.moment(0, 1)
            own = f"  {member.arrivals!r}" if common is None else ""
            lines.append(
                f"  {member.name:{width}}  {member.arrival_rate:8.4g} req/s  prompt {prompt:8.6g}  "
                f"output {output:8.6g}  KV work {work:10.6g}{own}{_cached(member)}"
            )
        return "\n".join(lines)


def _in_order(arrival: FloatArray) -> NDArray[np.intp]:
    """Indices that sort the times; of several at one instant the earlier stays first."""
    order = np.argsort(arrival)  # faster than a stable sort, and the same without ties
    if (np.diff(arrival[order]) == 0.0).any():
        order = np.argsort(arrival, kind="stable")
    return order


def _cached_of(member: RequestType, prompt: IntArray, stream: np.random.Generator) -> IntArray:
    """Cached tokens of each prompt: ⌊x⌋, and with probability x - ⌊x⌋ one more."""
    mean = _mean_cached(member.cached_prefix_fraction, prompt)
    least = np.floor(mean)
    more: IntArray = (least + (stream.random(len(prompt)) < mean - least)).astype(np.int64)
    return more
