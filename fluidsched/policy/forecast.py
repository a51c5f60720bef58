r"""Look-ahead admission for an engine: what is forecast for those in service, from what the engine knows of them.

Rules 31 to 33 of `fluidsched.simulation.reference`. A request that has k output tokens, holds h tokens of KV after the
iteration now planned and is believed to be o long is forecast to hold

    units(h + u)    for 1 ≤ u ≤ o − k − 1,    u iterations after this one, and nothing later,

units(m) = ⌈m/b⌉ with blocks of b tokens; with a law it is the mean over those of its lengths above k. One whose prompt
stays incomplete is forecast its peak for all u. Between two ends memory only grows, so ends are where it is looked at:
with h = b q + r, memory at the end u is Σ (q + ⌈(r + u)/b⌉) over all ends at or after u, so it follows from the numbers
and Σ q of each r, added up from the latest end to the earliest: b sums over the ends, however many are in service.
A check costs the residents. Its refusal names a *witness*, an end u at which memory is too much: while the same ones
run on, one token each, they hold there what they held, and only the newcomer holds one token less with each iteration
it waits. So with known lengths a refusal is repeated by one look at the witness, until somebody enters or leaves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fluidsched.policy.table import Lookahead

__all__ = ["Forecast", "Served", "Witness"]

Integers = NDArray[np.int64]


class Served(NamedTuple):
    """A request as a forecast sees it.

    Attributes
    ----------
    prompt : int
        Prompt tokens.
    produced : int
        Output tokens so far, k.
    after : int
        KV tokens it holds after the iteration now planned.
    believed : int
        Output tokens it is believed to have in all; used with mode "known".
    """

    prompt: int
    produced: int
    after: int
    believed: int


class Witness(NamedTuple):
    """Where the forecast for those in service and a newcomer goes beyond the limit.

    Attributes
    ----------
    ahead : int
        u, iterations after the one now planned.
    others : int
        Blocks that those in service hold there.
    """

    ahead: int
    others: int


class Forecast:
    """What is ahead of those in service in one iteration; see the module's docstring.

    Parameters
    ----------
    lookahead : Lookahead
        Of the table; its mode is not "none".
    block : int
        Tokens per block of KV.
    limit : int
        Blocks that the forecast may reach, the headroom of "known" and "law" already taken off.
    served : iterable of Served
        Those in service.

    Examples
    --------
    One token per block and a limit of 7: a request that is to hold 2, 3, 4, 5 from now on, and one of 2 prompt and
    3 output tokens that would hold 2, 3, 4: in two iterations 4 + 4 are too many, so it has to wait.

    >>> from fluidsched.policy.table import Lookahead
    >>> ahead = Forecast(Lookahead("known"), 1, 7, [Served(1, 1, 2, 5)])
    >>> newcomer = Served(prompt=2, produced=0, after=2, believed=3)
    >>> ahead.fits(newcomer)
    False
    >>> Forecast(Lookahead("known"), 1, 7, [Served(1, 4, 5, 5)]).fits(newcomer)
    True
    """

    def __init__(self, lookahead: Lookahead, block: int, limit: int, served: Iterable[Served]):
        self._reserve = math.ceil(lookahead.headroom_tokens) if lookahead.mode == "reserve" else 0
        self._lengths = np.array(lookahead.lengths, dtype=np.int64)
        self._shares = math.lcm(*range(1, len(lookahead.lengths) + 1))
        self._block = block
        self._limit = limit
        self._served = list(served)
        self.witness: Witness | None = None
        self._reserved = sum(self._set_aside(request) for request in self._served) if self._reserve else 0

    def fits(self, newcomer: Served) -> bool:
        """Whether the forecast for those in service and the newcomer is within the limit.

        If not, `witness` says where, with known lengths and every prompt complete.
        """
        self.witness = None
        if self._reserve:
            return self._reserved + self._set_aside(newcomer) <= self._limit
        peak, ahead = self._peak([*self._served, newcomer])
        if peak <= self._limit * self._shares:
            return True
        if ahead and not self._lengths.size:
            self.witness = Witness(ahead, peak - self._held(newcomer, ahead))
        return False

    def refuses_still(self, newcomer: Served, before: Witness) -> bool:
        """Whether the witness of the iteration before is one again, all in service being one token further.

        `witness` is then the same place, one iteration nearer.
        """
        ahead = before.ahead - 1
        refused = ahead >= 1 and before.others + self._held(newcomer, ahead) > self._limit
        self.witness = Witness(ahead, before.others) if refused else None
        return refused

    def _held(self, request: Served, ahead: int) -> int:
        """Blocks that a request of known length with its prompt complete holds `ahead` iterations from now."""
        lasts = ahead <= request.believed - request.produced - 1
        return -(-(request.after + ahead) // self._block) if lasts else 0

    def add(self, newcomer: Served) -> None:
        """The newcomer has entered."""
        self._served.append(newcomer)
        if self._reserve:
            self._reserved += self._set_aside(newcomer)

    def _set_aside(self, request: Served) -> int:
        return -(-(request.prompt + self._reserve - 1) // self._block)

    def _peak(self, served: Sequence[Served]) -> tuple[int, int]:
        """The largest memory forecast, in blocks / shares; iterations until then, 0 if some prompts stay incomplete."""
        prompt, produced, after, believed = np.array(served, dtype=np.int64).T
        lengths = self._lengths if self._lengths.size else believed[:, None]
        ends = lengths - produced[:, None] - 1  # (N, m), of those that may be true at least 0
        possible = (ends >= 0).sum(axis=1)
        weight = self._shares // np.maximum(possible, 1)
        target = prompt + produced

        partly = after < target
        peaks = -(-(target[partly, None] + ends[partly]) // self._block) * (ends[partly] >= 0)
        refuted = -(-target[partly] // self._block) * (possible[partly] == 0)
        incomplete = int((weight[partly] * (peaks.sum(axis=1) + refuted)).sum())

        request, column = np.nonzero((ends >= 1) & ~partly[:, None])
        if not request.size:
            return incomplete, 0
        at, place = np.unique(ends[request, column], return_inverse=True)
        blocks, rest = np.divmod(after[request], self._block)
        share = weight[request]
        shape = (self._block, at.size)
        where = (rest, place)
        count, whole = np.zeros(shape, dtype=np.int64), np.zeros(at.size, dtype=np.int64)
        np.add.at(count, where, share)
        np.add.at(whole, place, share * blocks)
        count, whole = _from_the_end(count), _from_the_end(whole)
        started = -(-(np.arange(self._block)[:, None] + at) // self._block)
        memory = whole + (count * started).sum(axis=0)
        last = int(memory.argmax())
        return incomplete + int(memory[last]), 0 if partly.any() else int(at[last])


def _from_the_end(values: Integers) -> Integers:
    """Sums from each place to the last."""
    return np.cumsum(values[..., ::-1], axis=-1)[..., ::-1]
