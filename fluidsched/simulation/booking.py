r"""Booking limits: the two rules that the published experiments on WAIT ran, as rules of one's own.

The code published with Ao, Luo, Simchi-Levi and Wang (arXiv 2504.11320) does not run the paper's Algorithms 1
and 2 under the names WAIT and Nested WAIT, but *booking limits*: shares of a total number of places, set aside
per type or per segment of stages. To compare with those experiments one needs the rules they ran, so here they
are, without the deletion of requests that their code performs when its gate fails after the last arrival.

A type is an output length o, known at arrival, with rate λ_o. A request is at *stage* s when it has produced s
output tokens, so an iteration takes it from stage s to s + 1, and it leaves after stage o − 1. With B places:

**Per type** (`booking_limit`).

    L_o = B λ_o (o + 1) / Σ_i λ_i (i + 1),      n_o = max(1, ⌊L_o/(o + 1)⌋),

and at every decision q_o = min(n_o, ⌊L_o − in service_o⌋). If at least q_o requests wait for some type, the
batch is everybody in service and, of every type, up to q_o of those who wait, oldest first; otherwise nothing
runs until the next arrival. The gate is open by itself while q_o ≤ 0 for some o, i.e. while a type is full.

**Per stage** (`nested_booking_limit`), without looking at types. Segment k is the stages
o_{k−1} … o_k − 1 between consecutive lengths (o_0 = 0), its weight w_k = (o_k − o_{k−1}) Σ_{o ≥ o_k} λ_o, its
places S_k = ⌊B w_k/Σ w⌋, and the limit per stage c_k = ⌈B w_k/Σ w/(o_k − o_{k−1})⌉. Segments are visited in
order. One opens if at least q_k = min(c_k, S_k − requests at its other stages) requests are at its first stage;
else it and all later ones stay shut. From the first stage of an open segment up to q_k requests are served,
from each other stage up to c_k, oldest first; all others pause with their KV kept.

Neither looks at memory: on a server whose memory binds the engine refuses their decisions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, pairwise

import numpy as np

from fluidsched._checks import check_count, check_real
from fluidsched.errors import InputError, SimulationError
from fluidsched.simulation.rules import Decision, RequestView, UserRule, View

__all__ = ["booking_limit", "nested_booking_limit"]


def booking_limit(places: int, arrival_rate: Mapping[int, float], name: str = "booking_limit") -> UserRule:
    """Return the rule that sets places aside per output length; see the module.

    Parameters
    ----------
    places : int
        B, requests in service in all.
    arrival_rate : mapping of int to float
        Output length o, tokens → λ_o, requests/s. Every request of the path must have one of these lengths.
    name : str
        Name of the rule.

    Raises
    ------
    InputError
        If there is no place, no type, or a rate that is not positive.

    Examples
    --------
    Four places, two started at a time; the last of five waits for a companion who never comes:

    >>> import fluidsched as fs
    >>> rule = booking_limit(4, {1: 2.0})
    >>> path = fs.ArrivalPath.from_arrays([0.0] * 5, [9] * 5, [1] * 5)
    >>> server = fs.Server(100, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    >>> fs.simulate(path, server, rule, engine="reference").requests("booking_limit")["finish_s"].tolist()
    [1.0, 1.0, 2.0, 2.0, nan]
    """
    places, rates = _check(places, arrival_rate)
    total = sum(rate * (length + 1) for length, rate in rates.items())
    booked = {length: places * rate * (length + 1) / total for length, rate in rates.items()}
    starts = {length: max(1, math.floor(limit / (length + 1))) for length, limit in booked.items()}

    def decide(view: View) -> Decision:
        in_service = dict.fromkeys(rates, 0)
        for request in view.residents:
            in_service[_length_of(request, rates, name)] += 1
        quota = {o: min(starts[o], math.floor(booked[o] - in_service[o])) for o in rates}
        waiting = _oldest(view, starts, name)
        if all(len(waiting[o]) < quota[o] for o in rates):
            return Decision({})
        newcomers = [request for o in rates for request in waiting[o][: max(quota[o], 0)]]
        return _serve([*view.residents, *newcomers], newcomers)

    return UserRule(name, decide)


def _oldest(view: View, most: Mapping[int, int], name: str) -> dict[int, list[RequestView]]:
    """The oldest waiting requests per length, no more of each than a decision may take."""
    waiting: dict[int, list[RequestView]] = {length: [] for length in most}
    missing = len(most)
    for request in view.waiting:
        length = _length_of(request, most, name)
        if len(waiting[length]) < most[length]:
            waiting[length].append(request)
            missing -= len(waiting[length]) == most[length]
        if missing == 0:
            break
    return waiting


def nested_booking_limit(
    places: int, arrival_rate: Mapping[int, float], name: str = "nested_booking_limit"
) -> UserRule:
    """Return the rule that sets places aside per segment of stages; see the module.

    Parameters
    ----------
    places : int
        B, requests in service in all.
    arrival_rate : mapping of int to float
        Output length o, tokens → λ_o, requests/s. No request of the path may be longer than the longest.
    name : str
        Name of the rule.

    Raises
    ------
    InputError
        If there is no place, no type, or a rate that is not positive.

    Examples
    --------
    Stage 0 and stages 1–2 have five places each; nobody runs unless five wait.

    >>> import fluidsched as fs
    >>> rule = nested_booking_limit(10, {1: 1.0, 3: 1.0})
    >>> path = fs.ArrivalPath.from_arrays([0.0] * 6 + [4.0] * 5, [9] * 11, [1] * 11)
    >>> server = fs.Server(100, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    >>> runs = fs.simulate(path, server, rule, engine="reference")
    >>> runs.requests(rule.name)["finish_s"].tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 5.0, 5.0, 5.0, 5.0, 5.0, nan]
    """
    places, rates = _check(places, arrival_rate)
    ends = sorted(rates)
    stages = np.diff([0, *ends])
    passing = np.cumsum([rates[o] for o in reversed(ends)])[::-1]
    shares = places * stages * passing / float(stages @ passing)
    booked = [math.floor(share) for share in shares]
    limits = [math.ceil(share / count) for share, count in zip(shares, stages, strict=True)]

    def selected(view: View) -> Iterator[RequestView]:
        at_stage: dict[int, list[RequestView]] = {}
        for request in sorted(view.residents, key=lambda r: (r.arrival_s, r.index)):
            if request.output_tokens > ends[-1]:
                _refuse(request, ends, name)
            at_stage.setdefault(request.produced, []).append(request)
        # nothing is ever preempted, so nobody resident is at stage 0 and all who wait are
        at_stage[0] = list(islice(view.waiting, limits[0]))
        for (first, end), limit, total in zip(pairwise([0, *ends]), limits, booked, strict=True):
            inside = [at_stage.get(stage, []) for stage in range(first + 1, end)]
            quota = min(limit, total - sum(map(len, inside)))
            entry = at_stage.get(first, [])
            if len(entry) < quota:
                return
            yield from entry[: max(quota, 0)]
            for there in inside:
                yield from there[:limit]

    def decide(view: View) -> Decision:
        served = list(selected(view))
        return _serve(served, [request for request in served if request.computed == 0])

    return UserRule(name, decide)


def _serve(served: Iterable[RequestView], newcomers: Iterable[RequestView]) -> Decision:
    return Decision({r.index: r.next_tokens for r in served}, admit=[r.index for r in newcomers])


def _check(places: int, arrival_rate: Mapping[int, float]) -> tuple[int, dict[int, float]]:
    places = check_count("places", places, minimum=1)
    if not isinstance(arrival_rate, Mapping) or not arrival_rate:
        raise InputError("arrival_rate", arrival_rate, "map output lengths to rates", "E.g. {100: 2.0}.")
    rates = {
        check_count("a length of arrival_rate", length, minimum=1): check_real(
            f"arrival_rate[{length!r}]", rate, above=0.0
        )
        for length, rate in arrival_rate.items()
    }
    return places, rates


def _length_of(request: RequestView, lengths: Mapping[int, object], name: str) -> int:
    if request.output_tokens not in lengths:
        _refuse(request, lengths, name)
    return request.output_tokens


def _refuse(request: RequestView, lengths: Iterable[int], name: str) -> None:
    raise SimulationError(
        f"rule {name!r} has no rate for request {request.index} of {request.output_tokens:,} output tokens; "
        f"it was made for {', '.join(map(str, lengths))}"
    )
