"""What the multi-period program answers, with the proof of its optimality.

Notation of `fluidsched.fluid.transient`. The solution keeps admissions, backlogs, replicas, one multiplier
μ_{t,r} ≥ 0 per resource row and period (cost per second and unit of the row) and one of each ramp, ν_t,
positive where growth binds and negative where fall does. The *bid price* of type j in period t is Σ_r μ_{t,r}·(its
use of r). The *arrival price* is what one more arrival costs: it is served at the cheapest moment, or waits
until the end,

    π_{t,j} = min( min_{s ≥ t} bid_{s,j} − r_j + g_j h (s − t),  g_j h (T − t − 1/2) ),

the largest prices with π_t ≤ bid_t − r and π_t ≤ π_{t+1} + h g (half a step in the last period), so the
balance rows' duals are computed, not taken from the solver. With η_t = Σ_r μ_{t,r}·(coefficient of U) ≥ 0,
the worth of one more iteration per second, and the marginal cost of a replica in period t

    γ_t = h ( b − Σ_time μ_t + η_t/T_max ) + ν_t − ν_{t+1},

every feasible plan costs at least (weak duality, for any μ ≥ 0 and ν with η ≥ 0)

    Σ_j ( g_j h/2 + π_{0,j} ) q_{j,0} + Σ_{t,j} π_{t,j} h λ_{j,t} + Σ_t ( γ_t⁺ low_t − γ_t⁻ high_t )
        − Σ_t ( ν_t⁺ h·ramp_up + ν_t⁻ h·ramp_down ) − ν_0 N_{−1}.

The certificate checks, without the solver: every row and bound in the units of the problem, the signs of μ
and η, that each multiplier times its row's slack and each reduced cost times its variable vanish, and that
the plan's cost equals the bound; the last three relative to the largest of the costs in play.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fluidsched import _files
from fluidsched._display import Tabular
from fluidsched.fluid.model import TOLERANCE, FluidModel
from fluidsched.fluid.solution import Certificate

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["TransientModel", "TransientSolution"]

SCHEMA = "fluidsched.transient-solution/1"


@dataclass(frozen=True, eq=False)
class TransientModel:
    """What was asked. J types, T periods.

    Attributes
    ----------
    model : FluidModel
        One replica: types, server, rewards, labelled rows.
    step : float
        h, length of a period, s.
    arrival_rate : ndarray of shape (T, J)
        λ, req/s.
    initial_backlog : ndarray of shape (J,)
        Requests waiting at the start.
    holding_cost : ndarray of shape (J,)
        g, cost per waiting request and second.
    min_replicas, max_replicas : ndarray of shape (T,)
        Limits on N; equal where the number is given.
    replica_cost : float
        b, cost per replica and second.
    ramp_up, ramp_down : float
        Largest growth and fall of N, replicas per second; inf for no limit.
    initial_replicas : float or None
        N before the first period; None for a free start.
    """

    model: FluidModel
    step: float
    arrival_rate: NDArray[np.float64]
    initial_backlog: NDArray[np.float64]
    holding_cost: NDArray[np.float64]
    min_replicas: NDArray[np.float64]
    max_replicas: NDArray[np.float64]
    replica_cost: float
    ramp_up: float
    ramp_down: float
    initial_replicas: float | None

    def __post_init__(self) -> None:
        for array in (
            self.arrival_rate,
            self.initial_backlog,
            self.holding_cost,
            self.min_replicas,
            self.max_replicas,
        ):
            array.setflags(write=False)

    @property
    def periods(self) -> int:
        """T."""
        return len(self.arrival_rate)

    @cached_property
    def ramp_limits(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Least and greatest N_t − N_{t−1}, shape (T,) each; in the first period on N itself."""
        fall = np.full(self.periods, -self.step * self.ramp_down)
        rise = np.full(self.periods, self.step * self.ramp_up)
        if self.initial_replicas is None:
            fall[0], rise[0] = -math.inf, math.inf
        else:
            fall[0] += self.initial_replicas
            rise[0] += self.initial_replicas
        return fall, rise


@dataclass(frozen=True, eq=False, repr=False)
class TransientSolution(Tabular):
    """The cheapest plan against demand that varies in time. J types, T periods, R rows.

    Attributes
    ----------
    problem : TransientModel
        What was asked.
    admitted_rate : ndarray of shape (T, J)
        a, req/s, mean over each period.
    backlog : ndarray of shape (T+1, J)
        q, requests waiting at the periods' ends, the first at the start.
    replicas : ndarray of shape (T,)
        N.
    iteration_rate : ndarray of shape (T,)
        U, iterations per second of all replicas: the largest the time rows allow.
    row_dual : ndarray of shape (T, R)
        μ of the rows in `problem.model.row_names`, cost/s per unit of the row.
    ramp_dual : ndarray of shape (T,)
        ν, cost per replica of ramp: > 0 where growth binds, < 0 where fall does.
    effort : int
        Simplex iterations.
    """

    problem: TransientModel
    admitted_rate: NDArray[np.float64]
    backlog: NDArray[np.float64]
    replicas: NDArray[np.float64]
    iteration_rate: NDArray[np.float64]
    row_dual: NDArray[np.float64]
    ramp_dual: NDArray[np.float64]
    effort: int

    def __post_init__(self) -> None:
        for array in (
            self.admitted_rate,
            self.backlog,
            self.replicas,
            self.iteration_rate,
            self.row_dual,
            self.ramp_dual,
        ):
            array.setflags(write=False)

    @property
    def status(self) -> Literal["optimal", "imprecise"]:
        """Whether the certificate holds; it does not where the numbers span more than floats carry."""
        return "optimal" if self.certificate.ok else "imprecise"

    @cached_property
    def time(self) -> NDArray[np.float64]:
        """Ends of the periods, s, the start 0 first, shape (T+1,): the times of `backlog`."""
        edges: NDArray[np.float64] = self.problem.step * np.arange(self.problem.periods + 1.0)
        edges.setflags(write=False)
        return edges

    # What it costs.

    @cached_property
    def request_seconds(self) -> NDArray[np.float64]:
        """∫ q_j dt, shape (J,), request·s: the backlog integrated exactly."""
        middle = (self.backlog[:-1] + self.backlog[1:]) / 2
        return np.asarray(self.problem.step * middle.sum(axis=0))

    @property
    def cost(self) -> float:
        """Holding cost less rewards plus cost of replicas, over all periods."""
        return self._holding - self._reward + self._rent

    @property
    def _holding(self) -> float:
        return float(self.problem.holding_cost @ self.request_seconds)

    @property
    def _reward(self) -> float:
        return float(self.problem.step * (self.admitted_rate @ self.problem.model.reward).sum())

    @property
    def _rent(self) -> float:
        return float(self.problem.step * self.problem.replica_cost * self.replicas.sum())

    @cached_property
    def mean_wait(self) -> NDArray[np.float64]:
        """Mean time a request of each type waits within the horizon, shape (J,), s; 0 without requests."""
        asked = self._requests
        wait = np.zeros_like(asked)
        np.divide(self.request_seconds, asked, out=wait, where=asked > 0.0)
        return wait

    @property
    def peak_backlog(self) -> float:
        """Largest number of requests waiting, all types together."""
        return float(self.backlog.sum(axis=1).max())

    @cached_property
    def _requests(self) -> NDArray[np.float64]:
        """Requests of each type there ever are, shape (J,)."""
        arrived = self.problem.step * self.problem.arrival_rate.sum(axis=0)
        return np.asarray(self.problem.initial_backlog + arrived)

    # How loaded the servers are.

    @cached_property
    def load(self) -> NDArray[np.float64]:
        """Load of the busiest resource by each period's arrivals on its replicas, shape (T,).

        Above 1 a backlog grows; NaN without replicas.
        """
        load = self.problem.model.load(self.problem.arrival_rate).max(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.replicas > 0.0, load / self.replicas, np.nan)

    @cached_property
    def iteration_time(self) -> NDArray[np.float64]:
        """Mean iteration time of a replica in each period, shape (T,), s; NaN without replicas."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.replicas / self.iteration_rate

    @cached_property
    def resident_kv(self) -> NDArray[np.float64]:
        """Mean resident KV of all replicas in each period, shape (T,), tokens."""
        flow = self.admitted_rate @ self.problem.model.kv_work
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(flow > 0.0, flow / self.iteration_rate, 0.0)

    # What things are worth.

    @cached_property
    def bid_price(self) -> NDArray[np.float64]:
        """What admitting one request in each period costs the others, shape (T, J)."""
        price: NDArray[np.float64] = self.row_dual @ self.problem.model.matrix
        price.setflags(write=False)
        return price

    @cached_property
    def arrival_price(self) -> NDArray[np.float64]:
        """What one more arrival in each period adds to the cost, shape (T, J); see the module's mathematics."""
        problem = self.problem
        waited = problem.step * np.arange(problem.periods)[:, None] * problem.holding_cost
        served = self.bid_price - problem.model.reward + waited
        cheapest = np.minimum.accumulate(served[::-1], axis=0)[::-1]
        never = problem.step * (problem.periods - 0.5) * problem.holding_cost
        price = np.minimum(cheapest, never) - waited
        price.setflags(write=False)
        return price

    @cached_property
    def replica_price(self) -> NDArray[np.float64]:
        """γ, what one more replica in each period adds to the cost, shape (T,); negative where it pays."""
        problem = self.problem
        time = self.row_dual[:, : problem.model.pieces].sum(axis=1)
        slowest = self._rate_price / problem.model.max_iteration_time
        ramp = self.ramp_dual - np.append(self.ramp_dual[1:], 0.0)
        price: NDArray[np.float64] = problem.step * (problem.replica_cost - time + slowest) + ramp
        price.setflags(write=False)
        return price

    @cached_property
    def lower_bound(self) -> float:
        """Cost no feasible plan falls below, from the multipliers alone (weak duality)."""
        problem, price = self.problem, self.arrival_price
        start = problem.holding_cost * problem.step / 2 + price[0]
        arrivals = problem.step * float((price * problem.arrival_rate).sum())
        gamma = self.replica_price
        replicas = np.where(gamma > 0.0, problem.min_replicas, problem.max_replicas)
        return float(start @ problem.initial_backlog + arrivals + gamma @ replicas) - self._ramp_worth

    @cached_property
    def _rate_price(self) -> NDArray[np.float64]:
        """η = Σ_r μ_r·(coefficient of U), shape (T,)."""
        return np.asarray(self.row_dual @ self.problem.model.rate_coefficient)

    @cached_property
    def _ramp_worth(self) -> float:
        fall, rise = self.problem.ramp_limits
        binding = np.where(self.ramp_dual > 0.0, rise, fall)
        return float(self.ramp_dual @ np.where(self.ramp_dual != 0.0, binding, 0.0))

    @cached_property
    def certificate(self) -> Certificate:
        """Optimality checked from the numbers alone, without the solver."""
        problem, model, h = self.problem, self.problem.model, self.problem.step
        admitted, replicas, speed = self.admitted_rate, self.replicas, self.iteration_rate

        present = self.backlog[:-1] + h * problem.arrival_rate
        balance = np.abs(self.backlog[1:] - (present - h * admitted)) / np.where(present > 0.0, present, 1.0)
        use = admitted @ model.matrix.T
        by_rate = model.rate_coefficient * speed[:, None]
        right = model.limit * replicas[:, None]
        row_size = np.maximum(use, np.maximum(np.abs(by_rate), right))
        row_slack = right - by_rate - use
        beyond_least = speed - replicas / model.max_iteration_time
        change = np.diff(replicas, prepend=0.0)
        fall, rise = problem.ramp_limits
        most = float(problem.max_replicas.max())
        fastest = most / float(model.base.max())
        primal = max(
            float(balance.max()),
            -float(min(self.backlog.min(), admitted.min())),
            float((-row_slack / np.where(row_size > 0.0, row_size, 1.0)).max()),
            -float(beyond_least.min()) / fastest,
            float(np.maximum(problem.min_replicas - replicas, replicas - problem.max_replicas).max()) / most,
            float(np.maximum(fall - change, change - rise).max()) / most,
            0.0,
        )

        asked = float(self._requests @ (problem.holding_cost * h + model.reward))
        rent = h * problem.replica_cost * float(problem.max_replicas.sum())
        worth = h * float((self.row_dual * row_size).sum())
        total = max(asked, rent, worth, self._holding, 1e-300)
        eta = self._rate_price
        dual = max(
            -h * float(self.row_dual.min()) * float(row_size.max()) / total,
            -h * float(eta.min()) * fastest / total,
            0.0,
        )

        reduced = self.bid_price - model.reward - self.arrival_price
        following = np.vstack([self.arrival_price[1:], np.zeros_like(problem.holding_cost)])
        held = np.repeat([h, h / 2], [problem.periods - 1, 1])[:, None] * problem.holding_cost
        gamma = self.replica_price
        room = np.where(gamma > 0.0, replicas - problem.min_replicas, replicas - problem.max_replicas)
        bound = np.where(self.ramp_dual > 0.0, rise, fall)
        ramp_room = np.where(self.ramp_dual != 0.0, bound - change, 0.0)
        products = (
            h * self.row_dual * row_slack,
            h * admitted * reduced,
            self.backlog[1:] * (following + held - self.arrival_price),
            h * eta * beyond_least,
            gamma * room,
            self.ramp_dual * ramp_room,
        )
        slackness = max(float(np.abs(product).max()) for product in products) / total
        gap = abs(self.cost - self.lower_bound) / total
        return Certificate(primal, dual, slackness, gap)

    # How it is shown.

    def to_frame(self) -> pd.DataFrame:
        """Return one row per period and type: times in s, rates in req/s, requests waiting, prices."""
        import pandas as pd

        problem = self.problem
        names, periods = problem.model.workload.type_names, problem.periods
        start = np.repeat(self.time[:-1], len(names))
        return pd.DataFrame(
            {
                "start_s": start,
                "end_s": start + problem.step,
                "type": np.tile(np.array(names, dtype=object), periods),
                "arrival_rate": problem.arrival_rate.ravel(),
                "admitted_rate": self.admitted_rate.ravel(),
                "backlog": self.backlog[1:].ravel(),
                "bid_price": self.bid_price.ravel(),
                "arrival_price": self.arrival_price.ravel(),
                "replicas": np.repeat(self.replicas, len(names)),
                "load": np.repeat(self.load, len(names)),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, schema first: the question, then admissions (T, J), backlogs (T+1, J), prices."""
        problem = self.problem
        answer: dict[str, Any] = _files.to_jsonable(
            {
                "schema": SCHEMA,
                "workload": problem.model.workload.to_dict(),
                "server": problem.model.server.to_dict(),
                "step_s": problem.step,
                "arrival_rate": problem.arrival_rate,
                "initial_backlog": problem.initial_backlog,
                "holding_cost": problem.holding_cost,
                "reward": problem.model.reward,
                "min_replicas": problem.min_replicas,
                "max_replicas": problem.max_replicas,
                "replica_cost": problem.replica_cost,
                "ramp_up": problem.ramp_up,
                "ramp_down": problem.ramp_down,
                "initial_replicas": problem.initial_replicas,
                "max_iteration_time_s": problem.model.max_iteration_time,
                "chunk_tokens": problem.model.chunk_tokens,
                "time_s": self.time,
                "admitted_rate": self.admitted_rate,
                "backlog": self.backlog,
                "replicas": self.replicas,
                "load": self.load,
                "bid_price": self.bid_price,
                "arrival_price": self.arrival_price,
                "cost": self.cost,
                "lower_bound": self.lower_bound,
                "status": self.status,
                "certificate": {**dataclasses.asdict(self.certificate), "ok": self.certificate.ok},
            }
        )
        return answer

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw arrivals, admissions and backlog over time; see `fluidsched.plots.transient`."""
        from fluidsched import plots

        return plots.transient(self, ax=ax)

    def _summary(self) -> list[tuple[str, str]]:
        problem = self.problem
        arrived = problem.step * float(problem.arrival_rate.sum())
        served = problem.step * float(self.admitted_rate.sum())
        over = int(np.count_nonzero(self.load > 1.0 + TOLERANCE))
        worst = int(np.argmax(self.backlog.sum(axis=1)))
        requests = float(self._requests.sum())
        wait = float(self.request_seconds.sum()) / requests if requests > 0.0 else 0.0
        low, high = float(self.replicas.min()), float(self.replicas.max())
        rows = [
            ("server", problem.model.server.name),
            ("periods", f"{problem.periods} of {problem.step:g} s"),
            ("replicas", f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"),
            ("arrivals", f"{arrived:,.4g} requests, {over} periods above load 1"),
            ("admitted", f"{served:,.4g} requests"),
            ("backlog", f"at most {self.peak_backlog:,.4g} requests, at {self.time[worst]:g} s"),
            ("left waiting", f"{float(self.backlog[-1].sum()):,.4g} requests at the end"),
            ("mean wait", f"{wait:.4g} s"),
            ("cost", f"{self.cost:.6g}"),
        ]
        if self.status != "optimal":
            rows.append(("status", "imprecise: the certificate fails, do not rely on these numbers"))
        return rows

    def __repr__(self) -> str:
        return "\n".join(["TransientSolution", *(f"  {name:<15} {value}" for name, value in self._summary())])
