r"""Sorted-F: batches that are large for what they take, as a rule of one's own.

Wang, Ye, Zhou, *LLM Serving Optimization with Variable Prefill and Decode Lengths*, arXiv 2508.06133, for a backlog of
requests with known prompts s_i and outputs o_i on a server of C tokens of KV. Shortest first is far from optimal
where prompts differ, since a short answer may belong to a prompt that fills the memory. Of all batches X that could
run together,

    Σ_{i ∈ X, o_i ≥ t} (s_i + t − 1) ≤ C    for every iteration t = 1, 2, … of the batch,

the rule picks one with the smallest

    F(X) = Σ_{i ∈ X} o_i / |X|²,

the larger where two are equal, then one of the remaining requests, and so on. The batches one after another, each from
the shortest output to the longest, are the *line*. Nobody waits for a batch to end: at every decision those at
the front of the line enter while the memory of all in service, each growing by a token per iteration until it ends,
stays within C at every later iteration, as under `baselines.mc_sf`; the first that does not fit ends the scan.

Sources. The paper's text was not at hand: the problem, the metric F and the rule of taking batch after batch are those
its abstract and descriptions by others give, and how batches are joined into a line and who enters from it was chosen
here. So nothing the paper proves is claimed for this rule.

Choices made here. F is minimised exactly, over all subsets, up to `exact` waiting requests; above, over the prefixes
of three greedy batches, which take whoever still fits in the order of o_i, of s_i + o_i and of s_i (to minimise F is
NP-hard; with equal prompts the first order contains the minimum). The paper's requests are there from the
beginning; here the line is made anew from all who wait whenever somebody has arrived since. No table can say this,
so the rule is for the reference engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from fluidsched._checks import check_count
from fluidsched.errors import SimulationError
from fluidsched.policy.forecast import Forecast, Served
from fluidsched.policy.table import Lookahead
from fluidsched.simulation.rules import Decision, RequestView, UserRule, View

__all__ = ["sorted_f"]

_Lengths = tuple[int, int]


def sorted_f(kv_capacity: int, name: str = "sorted_f", *, exact: int = 8) -> UserRule:
    """Return the rule Sorted-F for a server of C tokens of KV; see the module.

    Parameters
    ----------
    kv_capacity : int
        C, tokens; the server's, without blocks.
    name : str
        Name of the rule.
    exact : int
        Most waiting requests for which all subsets are tried; time grows as 2^exact.

    Raises
    ------
    SimulationError
        In a run, if a request needs more than C.

    References
    ----------
    Wang, Ye, Zhou, arXiv 2508.06133, the algorithm Sorted-F.

    Examples
    --------
    A prompt of 8 tokens with one output token, and six prompts of 1 with two. Shortest first begins with the large
    one, alone in memory; here the six run together before it.

    >>> import fluidsched as fs
    >>> path = fs.ArrivalPath.from_arrays([0.0] * 7, [8] + [1] * 6, [1] + [2] * 6)
    >>> server = fs.Server(12, fs.IterationTime.affine(1.0, 0.0, 0.0, 0.0))
    >>> runs = fs.simulate(path, server, sorted_f(12), engine="reference")
    >>> runs.requests("sorted_f")["finish_s"].tolist()
    [3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """
    capacity = check_count("kv_capacity", kv_capacity, minimum=1)
    exact = check_count("exact", exact, minimum=0)
    line: dict[RequestView, None] = {}  # in order

    def decide(view: View) -> Decision:
        nonlocal line
        waiting = {request.index: request for request in view.waiting}
        if not all(request in line for request in waiting.values()):  # somebody arrived, or another run began
            lengths = {i: _lengths(request, capacity, name) for i, request in waiting.items()}
            line = {waiting[i]: None for i in _line(lengths, capacity, exact)}
        residents = view.residents
        ahead = Forecast(Lookahead("known"), 1, capacity, map(_served, residents))
        held = sum(request.computed + request.next_tokens for request in residents)
        newcomers: list[RequestView] = []
        for request in line:
            if request.index not in waiting:
                continue
            if held + request.next_tokens > capacity or not ahead.fits(_served(request)):
                break
            ahead.add(_served(request))
            held += request.next_tokens
            newcomers.append(request)
        serve = {request.index: request.next_tokens for request in (*residents, *newcomers)}
        return Decision(serve, admit=[request.index for request in newcomers])

    return UserRule(name, decide)


def _lengths(request: RequestView, capacity: int, name: str) -> _Lengths:
    if request.prompt_tokens + request.output_tokens - 1 > capacity:
        raise SimulationError(
            f"rule {name!r} was made for {capacity:,} tokens of KV, and request {request.index} needs "
            f"{request.prompt_tokens + request.output_tokens - 1:,}; give it the server's kv_capacity"
        )
    return request.prompt_tokens, request.output_tokens


def _served(request: RequestView) -> Served:
    after = request.prompt_tokens + request.produced  # it holds one less, or nothing
    return Served(request.prompt_tokens, request.produced, after, request.output_tokens)


def _line(lengths: dict[int, _Lengths], capacity: int, exact: int) -> Iterator[int]:
    """The requests, batch after batch of the least F, each batch from the shortest output to the longest."""
    left = dict(lengths)
    while left:
        batch = _best_batch(left, capacity, exact)
        yield from sorted(batch, key=lambda i: (left[i][1], i))
        for i in batch:
            del left[i]


def _best_batch(lengths: dict[int, _Lengths], capacity: int, exact: int) -> Sequence[int]:
    """A batch of least F, the larger of equals: of all subsets, or of the prefixes of three greedy ones."""
    if len(lengths) <= exact:
        candidates: Iterator[Sequence[int]] = (
            subset
            for size in range(len(lengths), 0, -1)
            for subset in combinations(lengths, size)
            if _runs_together([lengths[i] for i in subset], capacity)
        )
    else:
        candidates = _greedy_batches(lengths, capacity)
    return min(candidates, key=lambda batch: (_metric([lengths[i] for i in batch]), -len(batch)))


def _greedy_batches(lengths: dict[int, _Lengths], capacity: int) -> Iterator[Sequence[int]]:
    orders = (
        lambda i: (lengths[i][1], lengths[i][0]),
        lambda i: (sum(lengths[i]), lengths[i][1]),
        lambda i: lengths[i],
    )
    for order in orders:
        batch: list[int] = []
        for i in sorted(lengths, key=order):
            if _runs_together([lengths[j] for j in (*batch, i)], capacity):
                batch.append(i)
                yield tuple(batch)


def _metric(batch: Sequence[_Lengths]) -> float:
    """F of a batch of (s, o)."""
    return sum(output for _, output in batch) / len(batch) ** 2


def _runs_together(batch: Sequence[_Lengths], capacity: int) -> bool:
    """Whether a batch of (s, o), started together on an empty server, stays within C."""
    prompts = 0
    longest_first = sorted(batch, key=lambda request: -request[1])
    for count, (prompt, output) in enumerate(longest_first, start=1):
        prompts += prompt  # of all who are in service when this one ends
        if prompts + count * (output - 1) > capacity:
            return False
    return True
