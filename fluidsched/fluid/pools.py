"""Several pools of servers: routing, and prefill and decode on different machines, as one linear program.

Pool k has N_k replicas of one server; a_jk is the rate at which type j is routed to it and U_k the
iterations per second of all its replicas together. With the coefficients of `fluidsched.fluid.model` for
each pool,

    max   Σ_jk r_j a_jk                              over the pools that finish requests
    s.t.  c_k^(i) U_k + Σ_j w_jk^(i) a_jk ≤ N_k      every piece of pool k               time
          Σ_j (use of r)_jk a_jk ≤ K_rk U_k          kv, batch, tokens of pool k
          U_k ≥ N_k/T_max                            mean iteration time of pool k
          f_j λ_j ≤ Σ_k a_jk ≤ λ_j                   over the pools that start requests
          Σ_{prefill k} a_jk = Σ_{decode k} a_jk     disaggregated pools

Where demand fits many routings are equally good and one of them is returned. A pool serves requests
"whole", or does only their "prefill" or only their "decode" (the KV is moved between; the move itself is
not charged). A type is not routed to a pool whose memory could not hold its longest request.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched import _files
from fluidsched._display import Tabular
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.fluid._assembly import ASSEMBLY_TOLERANCE, Assembly
from fluidsched.fluid.certificate import Certificate
from fluidsched.fluid.coefficients import Stage
from fluidsched.fluid.model import FluidModel, Objective, build_model
from fluidsched.server import Pool
from fluidsched.workload import Workload

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = [
    "Pool",
    "PoolsModel",
    "PoolsSolution",
    "largest_factor",
    "pool_blocks",
    "pools_model",
    "solve_pools",
]


SCHEMA = "fluidsched.pools-solution/1"


@dataclass(frozen=True, eq=False)
class PoolsModel:
    """The program's data. P pools, J types.

    Attributes
    ----------
    workload : Workload
        Types and offered rates.
    pools : tuple of Pool
        In order, with unique names.
    models : tuple of FluidModel
        Coefficients of one replica of each pool.
    objective : str
        What is maximised.
    reward : ndarray of shape (J,)
        Per request finished.
    fairness_floor : ndarray of shape (J,)
        Fraction of each type's demand that must be admitted.
    routable : ndarray of bool, shape (P, J)
        Whether the pool's memory holds the type's longest request.
    """

    workload: Workload
    pools: tuple[Pool, ...]
    models: tuple[FluidModel, ...]
    objective: Objective
    reward: NDArray[np.float64]
    fairness_floor: NDArray[np.float64]
    routable: NDArray[np.bool_]

    def stage(self, *stages: Stage) -> NDArray[np.bool_]:
        """Return which pools do one of these stages, shape (P,)."""
        return np.array([pool.stage in stages for pool in self.pools])

    @cached_property
    def replicas(self) -> NDArray[np.float64]:
        """N, shape (P,)."""
        return np.array([pool.replicas for pool in self.pools])


@dataclass(frozen=True, eq=False, repr=False)
class PoolsSolution(Tabular):
    """The optimum over several pools. P pools, J types.

    Attributes
    ----------
    model : PoolsModel
        The program.
    routed_rate : ndarray of shape (P, J)
        a_jk, req/s.
    iteration_rate : ndarray of shape (P,)
        Iterations per second of *one* replica: the largest its time rows allow. 0 without replicas.
    row_dual : tuple of ndarray
        Multipliers ≥ 0 of each pool's rows, in the order of its model's `row_names`.
    critical_rate : float
        Total rate on the workload's mix up to which the pools together carry everything, req/s.
    upper_bound : float
        Reward/s that no routing exceeds, from the multipliers alone.
    certificate : Certificate
        Optimality of the scaled program, checked without the solver.
    effort : int
        Simplex iterations.
    """

    model: PoolsModel
    routed_rate: NDArray[np.float64]
    iteration_rate: NDArray[np.float64]
    row_dual: tuple[NDArray[np.float64], ...]
    critical_rate: float
    upper_bound: float
    certificate: Certificate
    effort: int

    def __post_init__(self) -> None:
        for array in (self.routed_rate, self.iteration_rate, *self.row_dual):
            array.setflags(write=False)

    @cached_property
    def admitted_rate(self) -> NDArray[np.float64]:
        """Requests of each type that are admitted, shape (J,), req/s."""
        return np.asarray(self.routed_rate[self.model.stage("whole", "prefill")].sum(axis=0))

    @cached_property
    def admitted_fraction(self) -> NDArray[np.float64]:
        """admitted/offered, shape (J,); 1 for a type without arrivals."""
        offered = self.model.workload.arrival_rate
        fraction = np.ones_like(offered)
        np.divide(self.admitted_rate, offered, out=fraction, where=offered > 0.0)
        return fraction

    @property
    def objective_value(self) -> float:
        """Σ_j r_j·(admitted rate), reward/s."""
        return float(self.model.reward @ self.admitted_rate)

    @property
    def is_stable(self) -> bool:
        """Whether the pools together carry all offered demand."""
        total = self.model.workload.total_arrival_rate
        return total == 0.0 or total <= self.critical_rate * (1.0 + ASSEMBLY_TOLERANCE)

    @property
    def iteration_time(self) -> NDArray[np.float64]:
        """Mean iteration time of each pool, shape (P,), s; inf without replicas or end."""
        with np.errstate(divide="ignore"):
            return np.asarray(1.0 / self.iteration_rate)

    @cached_property
    def load(self) -> NDArray[np.float64]:
        """Load of each pool at the rates routed to it, shape (P,), at most 1; 0 without replicas."""
        return np.array(
            [
                float(model.load(rate / pool.replicas).max()) if pool.replicas > 0.0 else 0.0
                for model, rate, pool in zip(
                    self.model.models, self.routed_rate, self.model.pools, strict=True
                )
            ]
        )

    @property
    def resident_kv(self) -> NDArray[np.float64]:
        """Mean resident KV of one replica of each pool, shape (P,), tokens."""
        return self._in_batch("kv_work")

    @property
    def batch_size(self) -> NDArray[np.float64]:
        """Mean requests in an iteration of one replica of each pool, shape (P,)."""
        return self._in_batch("iterations")

    def _in_batch(self, use: str) -> NDArray[np.float64]:
        pairs = zip(self.routed_rate, self.model.models, strict=True)
        flow = np.array([float(rate @ getattr(model, use)) for rate, model in pairs])
        with np.errstate(divide="ignore", invalid="ignore"):
            held = flow / (self.iteration_rate * self.model.replicas)
        return np.where(flow > 0.0, held, 0.0)

    @cached_property
    def replica_price(self) -> NDArray[np.float64]:
        """What one more replica of each pool is worth, shape (P,), reward/s."""
        return np.array(
            [
                float(dual @ model.limit) - float(dual @ model.rate_coefficient) / model.max_iteration_time
                for model, dual in zip(self.model.models, self.row_dual, strict=True)
            ]
        )

    @cached_property
    def bid_price(self) -> NDArray[np.float64]:
        """What one more request of each type costs in each pool, shape (P, J); inf where it cannot go."""
        pairs = zip(self.model.models, self.row_dual, strict=True)
        prices = np.array([dual @ model.matrix for model, dual in pairs])
        return np.where(self.model.routable, prices, np.inf)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per pool and type: routed rate in req/s, share of the type's admissions, bid price."""
        import pandas as pd

        model = self.model
        pools, types = len(model.pools), len(model.workload)
        starts = model.stage("whole", "prefill")[:, None]
        admitted = np.where(self.admitted_rate > 0.0, self.admitted_rate, 1.0)
        return pd.DataFrame(
            {
                "pool": np.repeat([pool.name for pool in model.pools], types),
                "stage": np.repeat([pool.stage for pool in model.pools], types),
                "type": np.tile(model.workload.type_names, pools),
                "routed_rate": self.routed_rate.ravel(),
                "share": (self.routed_rate / admitted).ravel(),
                "admits": np.broadcast_to(starts, (pools, types)).ravel(),
                "bid_price": self.bid_price.ravel(),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, schema first: pools with their servers, routing (P, J), prices, certificate."""
        pools = [
            {"server": pool.server.to_dict(), "max_iteration_time_s": pool.max_iteration_time, **row}
            for pool, row in zip(self.model.pools, self.pool_frame().to_dict("records"), strict=True)
        ]
        answer: dict[str, Any] = _files.to_jsonable(
            {
                "schema": SCHEMA,
                "workload": self.model.workload.to_dict(),
                "objective": self.model.objective,
                "reward": self.model.reward,
                "fairness_floor": self.model.fairness_floor,
                "pools": pools,
                "routed_rate": self.routed_rate,
                "admitted_rate": self.admitted_rate,
                "bid_price": self.bid_price,
                "stable": self.is_stable,
                "critical_rate": self.critical_rate,
                "objective_value": self.objective_value,
                "upper_bound": self.upper_bound,
                "certificate": {**dataclasses.asdict(self.certificate), "ok": self.certificate.ok},
            }
        )
        return answer

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw who is served where; see `fluidsched.plots.routing`."""
        from fluidsched import plots

        return plots.routing(self, ax=ax)

    def pool_frame(self) -> pd.DataFrame:
        """Return one row per pool: replicas, load, iteration time, resident KV and batch of one replica, price."""
        import pandas as pd

        return pd.DataFrame(
            {
                "pool": [pool.name for pool in self.model.pools],
                "stage": [pool.stage for pool in self.model.pools],
                "replicas": self.model.replicas,
                "load": self.load,
                "iteration_time_s": self.iteration_time,
                "resident_kv_tokens": self.resident_kv,
                "batch_size": self.batch_size,
                "routed_rate": self.routed_rate.sum(axis=1),
                "replica_price": self.replica_price,
            }
        )

    def __repr__(self) -> str:
        offered = self.model.workload.total_arrival_rate
        admitted = float(self.admitted_rate.sum())
        lines = [
            "PoolsSolution",
            f"  offered         {offered:.4g} req/s in {len(self.model.workload)} types",
            f"  admitted        {admitted:.4g} req/s",
            f"  stable          {'yes' if self.is_stable else 'no'}, critical rate {self.critical_rate:.4g} req/s",
            f"  objective       {self.objective_value:.6g} {self.model.objective}/s",
        ]
        for position, pool in enumerate(self.model.pools):
            lines.append(
                f"  {pool.replicas:g} × {pool.name} ({pool.stage}): {self.routed_rate[position].sum():.4g} req/s,"
                f" load {self.load[position]:.3g}, {self.iteration_time[position] * 1e3:.4g} ms"
            )
        return "\n".join(lines)


def solve_pools(
    workload: Workload,
    pools: Sequence[Pool],
    objective: str | ArrayLike = "requests",
    *,
    fairness_floor: ArrayLike | None = None,
    chunk_tokens: int | None = None,
) -> PoolsSolution:
    """Route a workload over pools of servers so that the reward is largest.

    Parameters
    ----------
    workload : Workload
        J types with their offered rates.
    pools : sequence of Pool
        With unique names. Prefill pools need decode pools and the other way round.
    objective, fairness_floor, chunk_tokens
        As for `FluidProgram`.

    Raises
    ------
    InputError
        If an argument is wrong.
    InfeasibleError
        If the fairness floors cannot be met (the message names an irreducible set of constraints), a pool's
        iteration time cannot be kept, or no pool can hold the longest request of a type with demand.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 20.0, 500, 100), fs.RequestType("long", 1.0, 6000, 100)])
    >>> small, large = fs.catalog.server("l40s", "llama-3-8b"), fs.catalog.server("h100", "llama-3-8b")
    >>> solution = solve_pools(workload, [Pool(small, 4), Pool(large, 1)])
    >>> solution.is_stable, solution.certificate.ok
    (True, True)
    """
    model = pools_model(workload, pools, objective, fairness_floor, chunk_tokens)
    offered = workload.arrival_rate
    floors = model.fairness_floor * offered
    if floors.any():
        factor = largest_factor(model, floors)
        if factor < 1.0 - ASSEMBLY_TOLERANCE:
            raise _floors_beyond(model, floors, factor)
    able = model.replicas @ np.where(model.routable, [m.rate_alone for m in model.models], 0.0)
    unit = np.where(offered > 0.0, np.minimum(offered, np.where(able > 0.0, able, offered)), 1.0)
    starts = model.stage("whole", "prefill")
    lp = Assembly()
    # Rewards are earned where requests are admitted; flow balance makes every prefill finish.
    blocks = pool_blocks(lp, model, unit, np.where(starts[:, None], -model.reward * unit, 0.0))
    lp.fix(blocks.replicas, model.replicas)
    demand = lp.rows(floors / unit, offered / unit, _type_names("demand", model))
    lp.add(np.broadcast_to(demand, blocks.routed[starts].shape), blocks.routed[starts], 1.0)
    answer = lp.minimise("the program of the pools", presolve=True)
    assert answer.certificate is not None
    rate = np.maximum(answer.value[blocks.routed], 0.0) * unit
    duals = [
        np.maximum(-answer.row_dual[rows], 0.0) * answer.cost_scale / _row_size(one)
        for one, rows in zip(model.models, blocks.rows, strict=True)
    ]
    return PoolsSolution(
        model=model,
        routed_rate=rate,
        iteration_rate=_speeds(model, rate),
        row_dual=tuple(duals),
        critical_rate=largest_factor(model, offered) * float(offered.sum()) if offered.any() else math.nan,
        upper_bound=-answer.bound,
        certificate=answer.certificate,
        effort=answer.effort,
    )


def _floors_beyond(model: PoolsModel, floors: NDArray[np.float64], factor: float) -> InfeasibleError:
    """The error for floors (J,), req/s, of which the pools carry only `factor` times."""
    lp = Assembly()
    unit = np.where(floors > 0.0, floors, 1.0)
    blocks = pool_blocks(lp, model, unit)
    lp.fix(blocks.replicas, model.replicas)
    # Without an upper end, so that the set names what must be admitted, not what may.
    floor = lp.rows(floors / unit, np.full(len(floors), np.inf), _type_names("fairness_floor", model))
    starts = blocks.routed[model.stage("whole", "prefill")]
    lp.add(np.broadcast_to(floor, starts.shape), starts, 1.0)
    names = lp.contradiction()
    together = f" These contradict each other, and no fewer of them do: {', '.join(names)}." if names else ""
    return InfeasibleError(
        f"the fairness floors alone exceed what the pools carry.{together} The floors become feasible when"
        f" multiplied by {factor:.3g} or less, or with {1.0 / factor if factor else math.inf:.3g} times the"
        " replicas.",
        "fairness_floor",
    )


def _type_names(what: str, model: PoolsModel) -> Callable[[int], str]:
    return lambda j: f"{what}[{model.workload.type_names[j]}]"


def _pool_names(pool: Pool, model: FluidModel) -> Callable[[int], str]:
    def name(row: int) -> str:
        return f"{'time' if row < model.pieces else model.row_names[row]} of {pool.name}"

    return name


class PoolBlocks(NamedTuple):
    """Where the pools' columns and rows lie in an assembled program.

    Attributes
    ----------
    routed : ndarray of int, shape (P, J)
        Columns a_jk in units of `unit`.
    replicas : ndarray of int, shape (P,)
        Columns N_k.
    rows : list of ndarray of int
        Rows of each pool, in the order of its model's `row_names`.
    """

    routed: NDArray[np.intp]
    replicas: NDArray[np.intp]
    rows: list[NDArray[np.intp]]


def pool_blocks(
    lp: Assembly,
    model: PoolsModel,
    unit: NDArray[np.float64],
    cost: ArrayLike = 0.0,
    replica_cost: ArrayLike = 0.0,
    most_replicas: ArrayLike | None = None,
) -> PoolBlocks:
    """Add all pools to a program; the rates in units of `unit` (req/s), shape (J,).

    `cost` (P, J) is per unit of routed rate, `replica_cost` (P,) per replica. With `most_replicas` (P,)
    the numbers of replicas are integers between 0 and these.
    """
    pools, types = model.routable.shape
    most = np.where(model.routable, np.inf, 0.0).ravel()
    price = np.broadcast_to(np.asarray(cost, dtype=np.float64), (pools, types)).ravel()
    routed = lp.columns(pools * types, 0.0, most, price).reshape(pools, types)
    speeds = lp.columns(pools, 0.0, np.inf, 0.0)
    limit = np.inf if most_replicas is None else most_replicas
    replicas = lp.columns(pools, 0.0, limit, replica_cost, integer=most_replicas is not None)
    blocks = []
    for k, one in enumerate(model.models):
        size, fastest = _row_size(one), 1.0 / float(one.base.max())
        rows = lp.rows(np.full(len(size), -np.inf), np.zeros(len(size)), _pool_names(model.pools[k], one))
        lp.add(*np.broadcast_arrays(rows[:, None], routed[k], one.matrix * unit / size[:, None]))
        lp.add(rows, np.full_like(rows, speeds[k]), one.rate_coefficient * fastest / size)
        lp.add(rows, np.full_like(rows, replicas[k]), -one.limit)
        blocks.append(rows)
        if math.isfinite(one.max_iteration_time):
            label = f"iteration_time of {model.pools[k].name}"
            slowest = lp.rows(np.full(1, -np.inf), np.zeros(1), lambda _, label=label: label)  # type: ignore[misc]
            lp.add(slowest, speeds[k : k + 1], -1.0)
            lp.add(slowest, replicas[k : k + 1], 1.0 / (one.max_iteration_time * fastest))
    prefill, decode = model.stage("prefill"), model.stage("decode")
    if prefill.any():
        balance = lp.rows(np.zeros(types), np.zeros(types), _type_names("prefill = decode", model))
        for stage, sign in ((prefill, 1.0), (decode, -1.0)):
            lp.add(np.broadcast_to(balance, routed[stage].shape), routed[stage], sign)
    return PoolBlocks(routed, replicas, blocks)


def largest_factor(model: PoolsModel, rate: NDArray[np.float64]) -> float:
    """Return the largest x such that the pools carry x·`rate` in full; inf where that uses nothing."""
    alone = np.array([one.load(rate).max() for one in model.models])
    if not (alone > 0.0).all():
        return math.inf
    # The rates are put in units of what the pools carry each for itself, so that x is of order one.
    guess = float((model.replicas / alone).sum())
    if guess == 0.0:
        return 0.0
    offered = rate > 0.0
    lp = Assembly()
    blocks = pool_blocks(lp, model, np.where(offered, rate * guess, 1.0))
    lp.fix(blocks.replicas, model.replicas)
    factor = lp.columns(1, 0.0, np.inf, -1.0)
    starts = model.stage("whole", "prefill")
    demand = lp.rows(np.zeros(len(rate)), np.zeros(len(rate)), _type_names("demand", model))
    lp.add(np.broadcast_to(demand, blocks.routed[starts].shape), blocks.routed[starts], 1.0)
    lp.add(demand[offered], np.full(int(offered.sum()), factor[0]), -1.0)
    answer = lp.minimise("the largest load of the pools", presolve=True)
    return float(answer.value[factor[0]]) * guess


def pools_model(
    workload: Workload,
    pools: Sequence[Pool],
    objective: str | ArrayLike = "requests",
    fairness_floor: ArrayLike | None = None,
    chunk_tokens: int | None = None,
) -> PoolsModel:
    """Assemble the data of all pools; arguments and errors as for `solve_pools`."""
    members = tuple(pools)
    if not members:
        raise InputError("pools", "none", "hold at least one Pool")
    for position, pool in enumerate(members):
        if not isinstance(pool, Pool):
            raise InputError(f"pools[{position}]", pool, "be a Pool")
        if pool.name in (earlier.name for earlier in members[:position]):
            raise InputError(f"pools[{position}].name", pool.name, "be unique", "Give the pools names.")
    stages = {pool.stage for pool in members}
    if ("prefill" in stages) != ("decode" in stages):
        missing = "decode" if "prefill" in stages else "prefill"
        raise InputError("pools", f"no {missing} pool", "pair prefill pools with decode pools")
    models = tuple(
        build_model(
            workload,
            pool.server,
            objective,
            fairness_floor=fairness_floor,
            max_iteration_time=pool.max_iteration_time,
            chunk_tokens=chunk_tokens,
            stage=pool.stage,
        )
        for pool in members
    )
    routable = _routable(workload, members)
    routable.setflags(write=False)
    return PoolsModel(
        workload=workload,
        pools=members,
        models=models,
        objective=models[0].objective,
        reward=models[0].reward,
        fairness_floor=models[0].fairness_floor,
        routable=routable,
    )


def _routable(workload: Workload, pools: tuple[Pool, ...]) -> NDArray[np.bool_]:
    rows, largest = [], 0.0
    for pool in pools:
        held = workload.max_prompt_tokens if pool.stage == "prefill" else workload.max_total_tokens - 1
        needed = pool.server.block_rounded(held)
        rows.append((needed <= pool.server.usable_kv_capacity) | ~workload.is_bounded)
        largest = max(largest, pool.server.usable_kv_capacity)
    routable = np.array(rows)
    whole, prefill, decode = (
        np.array([pool.stage == stage for pool in pools]) for stage in ("whole", "prefill", "decode")
    )
    split = routable[prefill].any(axis=0) & routable[decode].any(axis=0)
    served = routable[whole].any(axis=0) | split | (workload.arrival_rate == 0.0)
    if not served.all():
        j = int(np.argmin(served))
        needs = int(workload.max_total_tokens[j] - 1)
        raise InfeasibleError(
            f"no pool can hold the longest request of type {workload.type_names[j]!r}: it needs {needs:,} tokens"
            f" of KV, the pools hold at most {largest:,.0f} per replica. Add a pool with more memory, or cap the"
            " type's lengths.",
            "longest_request",
        )
    return routable


def _speeds(model: PoolsModel, rate: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array(
        [
            one.iteration_rate(a / pool.replicas) if pool.replicas > 0.0 else 0.0
            for one, a, pool in zip(model.models, rate, model.pools, strict=True)
        ]
    )


def _row_size(model: FluidModel) -> NDArray[np.float64]:
    """What each row is divided by: 1 for time, else the use at full capacity and the empty batch's speed."""
    return np.where(model.limit > 0.0, 1.0, -model.rate_coefficient / float(model.base.max()))
