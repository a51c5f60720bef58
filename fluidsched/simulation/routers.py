"""Routers: which replica of a cluster serves a request.

A router is a rule and, for `split`, the shares of every pool; it holds no state. `fluidsched.simulation.cluster`
says exactly what each rule does.

Examples
--------
>>> from fluidsched import routers
>>> [router.name for router in (routers.round_robin(), routers.join_shortest_queue())]
['round-robin', 'join-shortest-queue']
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike

from fluidsched._checks import check_choice
from fluidsched.errors import InputError

__all__ = ["Router", "join_shortest_queue", "least_kv", "power_of_two", "random", "round_robin", "split"]

Rule = Literal["round_robin", "random", "split", "join_shortest_queue", "least_kv", "power_of_two"]


@dataclass(frozen=True)
class Router:
    """How requests find their replica.

    Parameters
    ----------
    name : str
        Unique in a run.
    rule : str
        "round_robin", "random", "split", "join_shortest_queue", "least_kv" or "power_of_two".
    routed_rate : tuple of tuple of float, optional
        `split`: rate of each type (columns) to each pool (rows), req/s; only the proportions matter.
    """

    name: str
    rule: Rule
    routed_rate: tuple[tuple[float, ...], ...] | None = None

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, get_args(Rule))
        if not isinstance(self.name, str) or not self.name:
            raise InputError("name", self.name, "be a non-empty string")
        if (self.rule == "split") != (self.routed_rate is not None):
            raise InputError("routed_rate", self.routed_rate, "be given with rule 'split', and only then")

    @property
    def looks(self) -> bool:
        """Whether the rule looks at the replicas."""
        return self.rule in ("join_shortest_queue", "least_kv", "power_of_two")


def round_robin(name: str = "round-robin") -> Router:
    """Return the router that takes the replicas in turn."""
    return Router(name, "round_robin")


def random(name: str = "random") -> Router:
    """Return the router that takes every replica with the same probability."""
    return Router(name, "random")


def join_shortest_queue(name: str = "join-shortest-queue") -> Router:
    """Return the router that takes the replica with the fewest requests, waiting or resident."""
    return Router(name, "join_shortest_queue")


def least_kv(name: str = "least-kv") -> Router:
    """Return the router that takes the replica with the fewest KV tokens held and asked for by those waiting."""
    return Router(name, "least_kv")


def power_of_two(name: str = "power-of-two") -> Router:
    """Return the router that draws two replicas and takes the one with fewer requests."""
    return Router(name, "power_of_two")


def split(routed_rate: ArrayLike, name: str = "split") -> Router:
    """Return the router that gives every pool its share of every type, as a linear program has set it.

    Parameters
    ----------
    routed_rate : array of shape (K, J)
        Rate of type j to pool k, req/s, such as `fs.fluid.solve_pools(...).routed_rate`; only each type's
        proportions matter.
    name : str

    Raises
    ------
    InputError
        For rates that are negative, not finite or not a matrix.

    Examples
    --------
    >>> split([[3.0, 0.0], [1.0, 2.0]]).routed_rate
    ((3.0, 0.0), (1.0, 2.0))
    """
    rates = np.asarray(routed_rate, dtype=np.float64)
    if rates.ndim != 2 or rates.size == 0:
        raise InputError(
            "routed_rate", f"shape {rates.shape}", "have one row per pool and one column per type"
        )
    if not np.all(np.isfinite(rates) & (rates >= 0.0)):
        raise InputError("routed_rate", rates, "hold finite rates of at least 0")
    return Router(name, "split", tuple(map(tuple, rates.tolist())))
