"""A prefix cache in the residents' own memory: rules 39 to 42 of `fluidsched.simulation.reference`.

A block of b tokens is in the cache from the end of the iteration that computed it. Residents *use* blocks: they found
them at admission, or computed them first. A block nobody uses stays where it is as long as nobody needs the room, and
the one least recently used is dropped first; so with U blocks in use, I idle ones, and private memory of P units,

    P + u U ≤ capacity,        P + u (U + I) ≤ capacity,        u = b / (tokens per unit),

the first by admission and preemption, the second by dropping.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

__all__ = ["PrefixCache"]


class PrefixCache:
    """The blocks of one server, by name.

    Parameters
    ----------
    block_tokens : int
        b, tokens of a block.
    units : int
        u, memory that a block takes.
    capacity : int
        Memory of the server, units.

    Examples
    --------
    >>> cache = PrefixCache(block_tokens=16, units=1, capacity=2)
    >>> [cache.enter(name) for name in (7, 8, 7)], cache.find([7, 8, 9])
    ([True, True, False], 2)
    >>> cache.release([8, 7]), cache.find([7, 8]), cache.in_use([7, 8])  # the last block first
    (2, 2, 0)
    >>> cache.make_room(used=1)
    >>> cache.find([7, 8])
    1
    """

    def __init__(self, block_tokens: int, units: int, capacity: int):
        self.block_tokens = block_tokens
        self.units = units
        self.capacity = capacity
        self.users: dict[int, int] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()

    def find(self, names: Sequence[int]) -> int:
        """How many of these blocks, from the first on, are in the cache."""
        for place, name in enumerate(names):
            if name not in self.users and name not in self.idle:
                return place
        return len(names)

    def in_use(self, names: Iterable[int]) -> int:
        """How many of these blocks some resident uses."""
        return sum(name in self.users for name in names)

    def take(self, names: Iterable[int]) -> int:
        """A resident uses these blocks, which are in the cache, from now on; how many were idle."""
        woken = 0
        for name in names:
            if name in self.idle:
                del self.idle[name]
                woken += 1
            self.users[name] = self.users.get(name, 0) + 1
        return woken

    def enter(self, name: int) -> bool:
        """A resident has computed this block; whether it is the cache's from now on, and not one there twice."""
        if name in self.users or name in self.idle:
            return False
        self.users[name] = 1
        return True

    def release(self, names: Iterable[int]) -> int:
        """A resident uses these blocks no more, in this order; how many nobody uses now."""
        idle = 0
        for name in names:
            self.users[name] -= 1
            if self.users[name] == 0:
                del self.users[name]
                self.idle[name] = None
                idle += 1
        return idle

    def make_room(self, used: int) -> None:
        """Drop idle blocks, the least recently used first, until they fit beside `used` units."""
        while self.idle and used + self.units * len(self.idle) > self.capacity:
            self.idle.popitem(last=False)
