"""How many servers of which kind: the cheapest fleet for a workload, and the largest load for a budget.

With N_k replicas of server k at cost c_k each, the constraints of `fluidsched.fluid.pools` are linear in
N_k too:

    cheapest fleet     min Σ c_k N_k     s.t. pools,  Σ_k a_jk = (1 + headroom) λ_j,  N_k = 0, 1, 2, …
    largest load       max x             s.t. pools,  Σ_k a_jk = x λ_j,  Σ c_k N_k ≤ budget,  N_k = 0, 1,
    2, …

Both are small mixed-integer programs, solved by HiGHS. The library ships no prices: costs are an argument,
in any unit per replica. The fluid model says what load a fleet can carry, not how long requests wait: near
its boundary queues are long, which is what headroom is for, and simulation the judge of percentiles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched import _files
from fluidsched._checks import check_real
from fluidsched._display import Tabular
from fluidsched.errors import InfeasibleError, InputError, SolverError
from fluidsched.fluid._assembly import Assembly
from fluidsched.fluid.pools import (
    Pool,
    PoolBlocks,
    PoolsModel,
    PoolsSolution,
    largest_factor,
    pool_blocks,
    pools_model,
    solve_pools,
)
from fluidsched.server import Server
from fluidsched.server.catalog import CatalogEntry
from fluidsched.workload import Workload

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["CapacityPlan", "plan_capacity", "plan_load"]

SCHEMA = "fluidsched.capacity-plan/1"

#: Relative slack by which integer replicas may miss the demand, from the solver's integrality tolerance.
_MISSED = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class CapacityPlan(Tabular):
    """Integer replicas of each server, with the demand they carry. P servers, J types.

    Attributes
    ----------
    workload : Workload
        The demand the fleet was planned for: with headroom (`plan_capacity`), or the largest load
        (`plan_load`).
    pools : tuple of Pool
        Every server offered, with its replicas; some may be 0.
    cost : ndarray of shape (P,)
        Of one replica of each.
    bound : float
        Proved by the solver: no fleet costs less (`plan_capacity`), or no load is larger, req/s
        (`plan_load`).
    gap : float
        Relative distance of the plan to that bound.
    """

    workload: Workload
    pools: tuple[Pool, ...]
    cost: NDArray[np.float64]
    bound: float
    gap: float
    chunk_tokens: int | None = None

    @cached_property
    def replicas(self) -> NDArray[np.int64]:
        """N, shape (P,)."""
        return np.array([round(pool.replicas) for pool in self.pools])

    @property
    def total_cost(self) -> float:
        """Σ c_k N_k."""
        return float(self.cost @ self.replicas)

    @cached_property
    def routing(self) -> PoolsSolution:
        """How the planned demand is routed over the fleet, with iteration times, loads and prices."""
        return solve_pools(self.workload, self.pools, chunk_tokens=self.chunk_tokens)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per server: replicas, cost, load, iteration time, routed rate."""
        frame = self.routing.pool_frame()
        frame.insert(3, "cost", self.cost * self.replicas)
        return frame

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, schema first: replicas and cost of each server, and the routing."""
        answer: dict[str, Any] = _files.to_jsonable(
            {
                "schema": SCHEMA,
                "chunk_tokens": self.chunk_tokens,
                "replicas": dict(
                    zip((pool.name for pool in self.pools), self.replicas.tolist(), strict=True)
                ),
                "cost": dict(zip((pool.name for pool in self.pools), self.cost.tolist(), strict=True)),
                "total_cost": self.total_cost,
                "carried_rate": self.workload.total_arrival_rate,
                "bound": self.bound,
                "gap": self.gap,
                "routing": self.routing.to_dict(),
            }
        )
        return answer

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw who is served where; see `fluidsched.plots.routing`."""
        return self.routing.plot(ax=ax)

    def __repr__(self) -> str:
        lines = [
            "CapacityPlan",
            f"  carries         {self.workload.total_arrival_rate:.4g} req/s in {len(self.workload)} types",
            f"  total cost      {self.total_cost:.6g} (gap {self.gap:.2g})",
        ]
        for pool, cost in zip(self.pools, self.cost.tolist(), strict=True):
            if pool.replicas:
                lines.append(f"  {pool.replicas:g} × {pool.name} ({pool.stage}) at {cost:g}")
        return "\n".join(lines)


def plan_capacity(
    workload: Workload,
    servers: Sequence[Server | CatalogEntry | Pool],
    cost: ArrayLike,
    *,
    headroom: float = 0.0,
    itl_target: float | None = None,
    chunk_tokens: int | None = None,
) -> CapacityPlan:
    """Return the cheapest fleet that carries a workload.

    Parameters
    ----------
    workload : Workload
        J types with their offered rates.
    servers : sequence of Server, CatalogEntry or Pool
        What can be bought; a Pool says its stage (its replicas do not matter).
    cost : array_like of shape (P,)
        Cost of one replica of each, positive, in any unit.
    headroom : float
        Carry 1 + headroom times the demand. With 0 the fleet may be exactly critical.
    itl_target : float, optional
        Upper limit on the mean iteration time of every server, s: the mean time between tokens.
    chunk_tokens : int, optional
        As for `FluidProgram`.

    Raises
    ------
    InputError
        If an argument is wrong.
    InfeasibleError
        If no fleet will do: no server holds the longest request of a type with demand, or `itl_target` is
        below a server's empty iteration.
    SolverError
        If HiGHS fails.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 60.0, prompt_tokens=500, output_tokens=200)])
    >>> servers = [fs.catalog.server(gpu, "llama-3-8b") for gpu in ("l40s", "h100")]
    >>> plan = plan_capacity(workload, servers, cost=[1.0, 2.5], headroom=0.2)
    >>> plan.replicas.tolist(), plan.total_cost
    ([2, 1], 4.5)
    """
    room = check_real("headroom", headroom, minimum=0.0)
    demand = workload.scaled(1.0 + room)
    model, prices = _offers(demand, servers, cost, itl_target, chunk_tokens)
    rate = demand.arrival_rate
    if not rate.any():
        return _plan(model, prices, np.zeros(len(prices)), 0.0, 0.0, chunk_tokens)
    alone = np.array(
        [one.load(rate * routable).max() for one, routable in zip(model.models, model.routable, strict=True)]
    )
    lp = Assembly()
    blocks = pool_blocks(
        lp, model, np.where(rate > 0.0, rate, 1.0), 0.0, prices, np.ceil(alone * (1 + _MISSED))
    )
    _meet(lp, model, blocks, (rate > 0.0).astype(np.float64))
    answer = lp.minimise("the capacity plan", presolve=True)
    replicas = np.round(answer.value[blocks.replicas])
    total = float(prices @ replicas)
    plan = _plan(model, prices, replicas, answer.bound, 1.0 - min(answer.bound / total, 1.0), chunk_tokens)
    carried = largest_factor(dataclasses.replace(model, pools=plan.pools), rate)
    if carried < 1.0 - _MISSED:
        raise SolverError(f"HiGHS's integer replicas carry only {carried:.9g} of the demand")
    return plan


def plan_load(
    workload: Workload,
    servers: Sequence[Server | CatalogEntry | Pool],
    cost: ArrayLike,
    budget: float,
    *,
    itl_target: float | None = None,
    chunk_tokens: int | None = None,
) -> CapacityPlan:
    """Return the fleet within a budget that carries the most of a workload's mix.

    Parameters
    ----------
    workload : Workload
        J types; only the proportions of their rates matter.
    servers, cost, itl_target, chunk_tokens
        As for `plan_capacity`.
    budget : float
        In the unit of `cost`.

    Raises
    ------
    InputError
        If an argument is wrong.
    InfeasibleError
        As `plan_capacity`, or if the budget buys nothing that serves the workload.
    SolverError
        If HiGHS fails.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 1.0, prompt_tokens=500, output_tokens=200)])
    >>> servers = [fs.catalog.server(gpu, "llama-3-8b") for gpu in ("l40s", "h100")]
    >>> plan = plan_load(workload, servers, cost=[1.0, 2.5], budget=6.0)
    >>> plan.replicas.tolist(), round(plan.workload.total_arrival_rate, 1)
    ([1, 2], 112.6)
    """
    limit = check_real("budget", budget, above=0.0)
    model, prices = _offers(workload, servers, cost, itl_target, chunk_tokens)
    rate = workload.arrival_rate
    if not rate.any():
        raise InputError("workload", "no demand", "have a positive rate", "Only the mix matters.")
    most = np.floor(limit / prices * (1.0 + 1e-12))
    guess = largest_factor(_with_replicas(model, most), rate)
    if guess == 0.0:
        raise InfeasibleError(
            f"a budget of {limit:g} buys no server. The cheapest costs {prices.min():g}.", "budget"
        )
    if not math.isfinite(guess):
        raise InputError("workload", "a mix that uses nothing", "use the servers")
    lp = Assembly()
    blocks = pool_blocks(lp, model, np.where(rate > 0.0, rate * guess, 1.0), 0.0, 0.0, most)
    factor = lp.columns(1, 0.0, 1.0, -1.0)
    spend = lp.rows(np.full(1, -np.inf), np.ones(1), lambda _: "budget")
    lp.add(np.full_like(blocks.replicas, spend[0]), blocks.replicas, prices / limit)
    demand = _meet(lp, model, blocks, np.zeros(len(rate)))
    offered = rate > 0.0
    lp.add(demand[offered], np.full(int(offered.sum()), factor[0]), -1.0)
    answer = lp.minimise("the largest load for the budget", presolve=True)
    replicas = np.round(answer.value[blocks.replicas])
    carried = largest_factor(_with_replicas(model, replicas), rate)
    if carried == 0.0:
        raise InfeasibleError(
            f"a budget of {limit:g} buys no servers that together serve every type: prefill needs decode, and"
            " every type a server that holds its longest request. Raise the budget.",
            "budget",
        )
    proved = max(-answer.bound * guess, carried)
    scaled = dataclasses.replace(model, workload=workload.scaled(carried))
    total = float(rate.sum())
    return _plan(scaled, prices, replicas, proved * total, 1.0 - carried / proved, chunk_tokens)


def _offers(
    workload: Workload,
    servers: Sequence[Server | CatalogEntry | Pool],
    cost: ArrayLike,
    itl_target: float | None,
    chunk_tokens: int | None,
) -> tuple[PoolsModel, NDArray[np.float64]]:
    target = None if itl_target is None else check_real("itl_target", itl_target, above=0.0)
    pools = []
    for position, offer in enumerate(servers):
        server = offer.server() if isinstance(offer, CatalogEntry) else offer
        if isinstance(server, Server):
            server = Pool(server)
        if not isinstance(server, Pool):
            raise InputError(f"servers[{position}]", offer, "be a Server, a CatalogEntry or a Pool")
        limit = server.max_iteration_time if target is None else target
        empty = server.server.iteration_time.empty
        if target is not None and target <= empty:
            raise InfeasibleError(
                f"itl_target of {target:.4g} s cannot be kept by {server.name!r}, whose empty iteration alone takes"
                f" {empty:.4g} s. Leave that server out, or allow more.",
                "itl_target",
            )
        pools.append(dataclasses.replace(server, replicas=1.0, max_iteration_time=limit))
    model = pools_model(workload, pools, chunk_tokens=chunk_tokens)
    prices = np.array(cost, dtype=np.float64)
    if prices.shape != (len(pools),):
        raise InputError("cost", f"shape {prices.shape}", f"have one number per server, {len(pools)}")
    for pool, price in zip(pools, prices.tolist(), strict=True):
        check_real(f"cost of {pool.name!r}", price, above=0.0)
    return model, prices


def _meet(
    lp: Assembly, model: PoolsModel, blocks: PoolBlocks, demand: NDArray[np.float64]
) -> NDArray[np.intp]:
    """Add the rows Σ_k a_jk = demand, in the units of the blocks; return them."""
    rows = lp.rows(demand, demand, lambda j: f"demand[{model.workload.type_names[j]}]")
    starts = blocks.routed[model.stage("whole", "prefill")]
    lp.add(np.broadcast_to(rows, starts.shape), starts, 1.0)
    return rows


def _with_replicas(model: PoolsModel, replicas: NDArray[np.float64]) -> PoolsModel:
    pairs = zip(model.pools, replicas.tolist(), strict=True)
    return dataclasses.replace(
        model, pools=tuple(dataclasses.replace(pool, replicas=count) for pool, count in pairs)
    )


def _plan(
    model: PoolsModel,
    prices: NDArray[np.float64],
    replicas: NDArray[np.float64],
    bound: float,
    gap: float,
    chunk_tokens: int | None,
) -> CapacityPlan:
    prices.setflags(write=False)
    pools = _with_replicas(model, replicas).pools
    return CapacityPlan(model.workload, pools, prices, bound, gap, chunk_tokens)
