r"""Look-ahead admission for an engine: what is forecast for those in service, from what the engine knows of them.

Rules 31 to 33 of `fluidsched.simulation.reference`. A request that has k output tokens, holds h tokens of KV after the
iteration now planned and is believed to be o long is forecast to hold

    units(h + u)    for 1 ≤ u ≤ o − k − 1,    u iterations after this one, and nothing later,

units(m) = ⌈m/b⌉ with blocks of b tokens; with a law it is the mean over those of its lengths above k. One whose prompt
stays incomplete is forecast its peak for all u. Between two ends memory only grows, so ends are where it is looked at.

A check goes through the ends in order; it is compiled (`fluidsched.policy._ahead`), since an engine asks between steps
of its own, when little of what is needed is in the processor's caches.

A refusal has a *witness*, an end u at which memory is too much. When somebody asks again it is looked at first, one
iteration nearer in the next iteration, and where it was, which is where it is when others have entered since. Whatever
has happened, too much memory at any one u is a refusal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched.policy.table import Lookahead

__all__ = ["Forecast", "Served"]

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


class Forecast:
    """What is ahead of those in service, iteration after iteration; see the module's docstring.

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

    def __init__(self, lookahead: Lookahead, block: int, limit: int, served: Iterable[Served] = ()):
        from fluidsched.policy import _ahead  # here: numba loads when somebody looks ahead

        self._first_beyond = _ahead.first_beyond
        self._reserve = math.ceil(lookahead.headroom_tokens) if lookahead.mode == "reserve" else 0
        self._lengths = np.array(lookahead.lengths, dtype=np.int64)
        self._shares = math.lcm(*range(1, len(lookahead.lengths) + 1))
        self._block = block
        self._limit = limit
        self._witness = 0  # iterations ahead; 0: none
        self._columns = np.empty((len(Served._fields), 0), dtype=np.int64)
        self._count = 0
        present = list(served)
        self.start(np.array(present, dtype=np.int64).reshape(-1, len(Served._fields)).T)

    def start(self, columns: ArrayLike) -> None:
        """Begin another iteration.

        Parameters
        ----------
        columns : int array
            Those in service: prompt, produced, after, believed, as of `Served`, shape (4, N).
        """
        present = np.asarray(columns, dtype=np.int64)
        self._count = present.shape[1]
        if self._columns.shape[1] <= self._count:
            self._columns = np.empty((len(present), 2 * self._count + 8), dtype=np.int64)
        self._columns[:, : self._count] = present
        self._witness -= 1

    def add(self, newcomer: Served) -> None:
        """The newcomer has entered."""
        if self._count + 1 >= self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.empty_like(self._columns)], axis=1)
        self._columns[:, self._count] = newcomer
        self._count += 1

    def fits(self, newcomer: Served) -> bool:
        """Whether the forecast for those in service and the newcomer is within the limit."""
        self._columns[:, self._count] = newcomer
        present = self._columns[:, : self._count + 1]
        if self._reserve:
            return int((-(-(present[0] + (self._reserve - 1)) // self._block)).sum()) <= self._limit
        found = self._first_beyond(
            present, self._lengths, self._shares, self._block, self._limit, self._witness
        )
        if found >= 1:
            self._witness = found  # kept when the newcomer fits: the next one is as likely refused there
        return bool(found < 0)
