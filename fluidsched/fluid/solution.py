"""What the fluid program answers, with the proof of its optimality.

A `FluidSolution` keeps the admitted rates a, the iteration rate u and one multiplier μ ≥ 0 per row; all
else is computed from these and the program's data when first asked for. The *bid price* of type j, what
one more request of it costs the server, is Σ_rows μ·(its use of the row); an optimum admits a type in full
where its reward exceeds the bid price, refuses it (down to its floor) where it falls short, and rations at
equality.

The certificate repeats no solver step. With the reduced rewards d_j = r_j − bid price and h = Σ
μ·(coefficient of u) it asks, each relative to the numbers involved,

    primal feasibility     rows met, f_j λ_j ≤ a_j ≤ λ_j, u ≥ 1/T_max
    dual feasibility       μ ≥ 0, h ≥ 0
    slackness              one is zero of μ and its row's slack, of d_j⁺ and λ_j − a_j, of d_j⁻ and
                           a_j − f_j λ_j, of h and u − 1/T_max
    gap                    Σ_j r_j a_j = Σ μ·limit − h/T_max + Σ_j (λ_j d_j⁺ − f_j λ_j d_j⁻)

The right-hand side of the last line bounds the reward of every feasible point for any μ, h ≥ 0, optimal or
not: it is `upper_bound`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from fluidsched import _files
from fluidsched._checks import check_choice, check_count, check_fields, check_real
from fluidsched._display import Tabular
from fluidsched.errors import InputError
from fluidsched.fluid.certificate import Certificate
from fluidsched.fluid.model import TOLERANCE, FluidModel, Objective, build_model
from fluidsched.server import Server
from fluidsched.workload import Workload

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["Certificate", "FluidSolution"]

SCHEMA = "fluidsched.fluid-solution/1"

_REWARD_UNITS = {
    "requests": "requests/s",
    "output_tokens": "output tokens/s",
    "total_tokens": "tokens/s",
    "rewards": "reward/s",
}


@dataclass(frozen=True, eq=False, repr=False)
class FluidSolution(Tabular):
    """The optimum of a fluid program. J types, R rows.

    Attributes
    ----------
    model : FluidModel
        The program: workload, server, objective and labelled arrays.
    arrival_rate : ndarray of shape (J,)
        Offered rates λ, req/s.
    admitted_rate : ndarray of shape (J,)
        a, req/s.
    iteration_rate : float
        u, 1/s: the largest the time rows allow, so that the server never idles between iterations.
    row_dual : ndarray of shape (R,)
        μ of the rows in `model.row_names`, reward/s per unit of the row.
    effort : int
        Simplex iterations of this solve.
    """

    model: FluidModel
    arrival_rate: NDArray[np.float64]
    admitted_rate: NDArray[np.float64]
    iteration_rate: float
    row_dual: NDArray[np.float64]
    effort: int

    def __post_init__(self) -> None:
        for array in (self.arrival_rate, self.admitted_rate, self.row_dual):
            array.setflags(write=False)

    @property
    def status(self) -> Literal["optimal", "imprecise"]:
        """Whether the certificate holds.

        It does not where rates, rewards and uses span more orders of magnitude than floating point
        carries.
        """
        return "optimal" if self.certificate.ok else "imprecise"

    # What was asked.

    @cached_property
    def workload(self) -> Workload:
        """The types, with the offered rates of this solve."""
        workload = self.model.workload
        if np.array_equal(workload.arrival_rate, self.arrival_rate):
            return workload
        return workload.with_rates(self.arrival_rate)

    @property
    def server(self) -> Server:
        """Where the requests are served."""
        return self.model.server

    @property
    def objective(self) -> Objective:
        """What was maximised: "requests", "output_tokens", "total_tokens" (per second) or "rewards"."""
        return self.model.objective

    @property
    def reward(self) -> NDArray[np.float64]:
        """r, shape (J,): reward of one request."""
        return self.model.reward

    @property
    def resources(self) -> tuple[str, ...]:
        """What can run out, in the order of `load`: "time", and where limited "kv", "batch", "tokens"."""
        return self.model.resources

    # What is ideal.

    @cached_property
    def admitted_fraction(self) -> NDArray[np.float64]:
        """a/λ, shape (J,); 1 for a type without arrivals, of which nothing is refused."""
        fraction = np.ones_like(self.admitted_rate)
        np.divide(self.admitted_rate, self.arrival_rate, out=fraction, where=self.arrival_rate > 0.0)
        fraction.setflags(write=False)
        return fraction

    @property
    def objective_value(self) -> float:
        """Σ r_j a_j, reward/s."""
        return float(self.reward @ self.admitted_rate)

    @property
    def iteration_time(self) -> float:
        """Mean iteration time 1/u, s; inf where unlimited memory is filled without end."""
        return math.inf if self.iteration_rate == 0.0 else 1.0 / self.iteration_rate

    @property
    def resident_kv(self) -> float:
        """Mean resident KV Σ a_j W_j / u, tokens (whole blocks where the server pages)."""
        return self._in_batch(self.model.kv_work)

    @property
    def batch_size(self) -> float:
        """Mean requests in an iteration, Σ a_j S_j / u."""
        return self._in_batch(self.model.iterations)

    @property
    def batch_tokens(self) -> float:
        """Mean tokens processed in an iteration, Σ a_j τ_j / u."""
        return self._in_batch(self.model.workload.processed_tokens)

    # How loaded the server is by what is offered.

    @cached_property
    def load(self) -> NDArray[np.float64]:
        """Load of each of `resources` by all *offered* demand.

        1/(the largest factor on all offered rates that the resource together with time allows): above 1
        the offered demand does not fit. `load.max()` is the x of `Workload.at_load`.
        """
        load = self.model.load(self.arrival_rate)
        load.setflags(write=False)
        return load

    @property
    def critical_rate(self) -> float:
        """Total offered rate at which `load.max()` is 1 on the same mix, req/s.

        NaN without demand; inf for a mix that uses nothing.
        """
        worst, total = float(self.load.max()), float(self.arrival_rate.sum())
        if worst > 0.0:
            return total / worst
        return math.inf if total > 0.0 else math.nan

    @property
    def is_stable(self) -> bool:
        """Whether all offered demand fits every resource."""
        return bool(self.load.max() <= 1.0 + TOLERANCE)

    @cached_property
    def binding_constraints(self) -> tuple[str, ...]:
        """Names of what limits the admitted rates: resources at load 1, with "time", and floors that bite.

        Empty when demand is all that limits them.
        """
        load = self.model.load(self.admitted_rate)
        full = [name for name, value in zip(self.resources, load, strict=True) if value >= 1.0 - TOLERANCE]
        binding = ["time", *full] if full and full[0] != "time" else full
        bites = (self.model.fairness_floor > 0.0) & (self._reduced < -TOLERANCE * self.bid_price)
        for name, bite in zip(self.model.workload.type_names, bites.tolist(), strict=True):
            if bite:
                binding.append(f"fairness_floor[{name}]")
        return tuple(binding)

    @cached_property
    def holds_longest(self) -> NDArray[np.bool_]:
        """Whether the KV cache holds the longest request of each type, shape (J,); true where lengths are unbounded.

        Where it does not, no scheduler serves such requests: they are turned away, and what is admitted here is
        still an upper bound.
        """
        workload, server = self.model.workload, self.server
        needed = server.block_rounded(workload.max_total_tokens - 1)
        return np.asarray((needed <= server.usable_kv_capacity) | ~workload.is_bounded)

    # What things are worth.

    @cached_property
    def bid_price(self) -> NDArray[np.float64]:
        """What one more request of each type per second costs the server, shape (J,), in rewards."""
        price = self.row_dual @ self.model.matrix
        price.setflags(write=False)
        return price

    @property
    def dual(self) -> dict[str, float]:
        """μ by row name, ≥ 0: d objective/d right-hand side of the row as the module `model` writes it."""
        return dict(zip(self.model.row_names, self.row_dual.tolist(), strict=True))

    @cached_property
    def shadow_price(self) -> dict[str, float]:
        """What one more unit of each resource is worth, ≥ 0, in reward per second.

        Per second of iteration time available each second (time; all pieces together), KV token (kv),
        request in a batch (batch), token in an iteration (tokens), second of allowed iteration time
        (iteration_time).
        """
        pieces = self.model.pieces
        prices = {"time": float(self.row_dual[:pieces].sum())}
        for name, dual in zip(self.model.row_names[pieces:], self.row_dual[pieces:].tolist(), strict=True):
            prices[name] = dual * self.iteration_rate
        if "iteration_time" in self.resources:
            prices["iteration_time"] = max(self._rate_price, 0.0) / self.model.max_iteration_time**2
        return prices

    @cached_property
    def upper_bound(self) -> float:
        """Reward/s that no feasible rates exceed, from the duals alone (weak duality).

        Demand beyond what the server carries of a type alone is left out: it would only magnify rounding. A
        type that uses nothing is carried at any rate.
        """
        reduced, rate = self._reduced, self.arrival_rate
        uses = self.model.halfspaces.any(axis=0)
        most = np.where(uses, np.minimum(rate, self.model.rate_alone), rate)
        demand = np.where(reduced > 0.0, most, self.model.fairness_floor * rate)
        return float(
            self.row_dual @ self.model.limit - self._rate_price * self._least_rate + reduced @ demand
        )

    @cached_property
    def certificate(self) -> Certificate:
        """Optimality checked from the numbers alone, without the solver."""
        model, rate, admitted = self.model, self.arrival_rate, self.admitted_rate
        price, reduced, floor = self.bid_price, self._reduced, model.fairness_floor * self.arrival_rate
        least = self._least_rate

        use = model.matrix @ admitted
        by_rate = model.rate_coefficient * self.iteration_rate
        row_size = np.maximum(use, np.maximum(np.abs(by_rate), model.limit))
        slack = (model.limit - by_rate - use) / np.where(row_size > 0.0, row_size, 1.0)
        demand = np.where(rate > 0.0, rate, 1.0)
        refused, beyond_floor = (rate - admitted) / demand, (admitted - floor) / demand
        speed = (self.iteration_rate - least) * float(model.base.max())
        primal = max(-slack.min(), -refused.min(), -beyond_floor.min(), -speed, 0.0)

        worth = self.row_dual * row_size
        total = max(float(worth.max()), self.objective_value, 1e-300)
        rate_worth = float(self.row_dual @ np.abs(model.rate_coefficient))
        rate_price = self._rate_price / rate_worth if rate_worth > 0.0 else 0.0
        dual = max(-float(worth.min()) / total, -rate_price, 0.0)

        size = np.maximum(model.reward, price)
        relative = reduced / np.where(size > 0.0, size, 1.0)
        slackness = max(
            float(np.minimum(worth / total, slack).max()),
            float(np.minimum(relative, refused).max()),
            float(np.minimum(-relative, beyond_floor).max()),
            min(rate_price, speed),
            0.0,
        )
        gap = abs(self.upper_bound - self.objective_value) / total
        return Certificate(float(primal), dual, slackness, gap, TOLERANCE)

    @cached_property
    def _reduced(self) -> NDArray[np.float64]:
        return self.reward - self.bid_price

    @cached_property
    def _rate_price(self) -> float:
        """h = Σ μ·(coefficient of u)."""
        return float(self.row_dual @ self.model.rate_coefficient)

    @property
    def _least_rate(self) -> float:
        return 1.0 / self.model.max_iteration_time

    def _in_batch(self, per_request: NDArray[np.float64]) -> float:
        flow = float(self.admitted_rate @ per_request)
        return flow * self.iteration_time if flow > 0.0 else 0.0

    # How it is shown and stored.

    @property
    def decision(self) -> tuple[str, ...]:
        """Per type: "admitted" in full, "rationed", "refused", held at its "floor", or "no demand"."""
        words = []
        floors = self.model.fairness_floor
        for rate, fraction, floor in zip(
            self.arrival_rate.tolist(), self.admitted_fraction.tolist(), floors.tolist(), strict=True
        ):
            if rate == 0.0:
                words.append("no demand")
            elif fraction >= 1.0 - TOLERANCE:
                words.append("admitted")
            elif fraction <= TOLERANCE:
                words.append("refused")
            else:
                words.append("floor" if fraction <= floor * (1.0 + TOLERANCE) else "rationed")
        return tuple(words)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per type: rates in req/s, reward and price per request."""
        import pandas as pd

        workload = self.model.workload
        return pd.DataFrame(
            {
                "type": workload.type_names,
                "arrival_rate": self.arrival_rate,
                "admitted_rate": self.admitted_rate,
                "admitted_fraction": self.admitted_fraction,
                "decision": self.decision,
                "reward": self.reward,
                "bid_price": self.bid_price,
                "mean_prompt_tokens": workload.mean_prompt_tokens,
                "mean_output_tokens": workload.mean_output_tokens,
                "kv_work": self.model.kv_work,
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw admitted beside offered rates; see `fluidsched.plots.admitted_rates`."""
        from fluidsched import plots

        return plots.admitted_rates(self, ax=ax)

    def _summary(self) -> list[tuple[str, str]]:
        offered, admitted = float(self.arrival_rate.sum()), float(self.admitted_rate.sum())
        count = len(self.arrival_rate)
        share = f" ({admitted / offered:.1%})" if offered > 0.0 else ""
        capacity = self.server.usable_kv_capacity
        loads = ", ".join(f"{n} {x:.3g}" for n, x in zip(self.resources, self.load.tolist(), strict=True))
        prices = ", ".join(f"{name} {price:.3g}" for name, price in self.shadow_price.items() if price > 0.0)
        unit = _REWARD_UNITS[self.objective]
        rows = [
            ("server", self.server.name),
            ("offered", f"{offered:.4g} req/s in {count} type{'s' if count > 1 else ''}"),
            ("admitted", f"{admitted:.4g} req/s{share}"),
            ("stable", f"{'yes' if self.is_stable else 'no'}, critical rate {self.critical_rate:.4g} req/s"),
            ("load", loads),
            ("iteration time", f"{self.iteration_time * 1e3:.4g} ms"),
            ("resident KV", f"{self.resident_kv:,.0f} of {capacity:,.0f} tokens"),
            ("batch", f"{self.batch_size:.4g} requests, {self.batch_tokens:.4g} tokens"),
            ("objective", f"{self.objective_value:.6g} {unit}"),
            ("binding", ", ".join(self.binding_constraints) or "demand alone"),
        ]
        if prices:
            rows.append(("shadow prices", f"{prices} [{unit} per unit]"))
        if not self.holds_longest.all():
            j = int(np.argmin(self.holds_longest))
            others = np.count_nonzero(~self.holds_longest) - 1
            names = self.model.workload.type_names[j] + (f" and {others} more" if others else "")
            needs = int(self.model.workload.max_total_tokens[j]) - 1
            rows.append(("too long", f"requests of {names}: up to {needs:,} tokens of KV, to be turned away"))
        if self.status != "optimal":
            rows.append(("status", "imprecise: the certificate fails, do not rely on these numbers"))
        return rows

    def __repr__(self) -> str:
        lines = ["FluidSolution", *(f"  {name:<15} {value}" for name, value in self._summary())]
        shown = min(len(self.arrival_rate), 20)
        names = self.model.workload.type_names
        width = max(len("type"), *(len(name) for name in names[:shown]))
        lines.append(f"  {'type':<{width}}   offered  admitted  [req/s]     reward  bid price")
        decisions = self.decision
        for j in range(shown):
            lines.append(
                f"  {names[j]:<{width}} {self.arrival_rate[j]:>9.4g} {self.admitted_rate[j]:>9.4g}"
                f"  {decisions[j]:<9} {self.reward[j]:>8.4g} {self.bid_price[j]:>10.4g}"
            )
        if shown < len(names):
            lines.append(f"  … and {len(names) - shown} more types: see to_frame()")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, schema first; what can be computed from the rest stands under "derived"."""
        floors = self.model.fairness_floor
        return {
            "schema": SCHEMA,
            "workload": self.workload.to_dict(),
            "server": self.server.to_dict(),
            "objective": self.objective,
            "reward": self.reward.tolist(),
            "fairness_floor": floors.tolist(),
            "max_iteration_time": _files.to_jsonable(self.model.max_iteration_time),
            "chunk_tokens": self.model.chunk_tokens,
            "admitted_rate": self.admitted_rate.tolist(),
            "iteration_rate": self.iteration_rate,
            "row_dual": self.row_dual.tolist(),
            "effort": self.effort,
            "derived": self._derived(),
        }

    def _derived(self) -> dict[str, Any]:
        loads = dict(zip(self.resources, self.load.tolist(), strict=True))
        derived = {
            "status": self.status,
            "stable": self.is_stable,
            "objective_value": self.objective_value,
            "upper_bound": self.upper_bound,
            "critical_rate": self.critical_rate,
            "load": loads,
            "iteration_time_s": self.iteration_time,
            "resident_kv_tokens": self.resident_kv,
            "batch_size": self.batch_size,
            "batch_tokens": self.batch_tokens,
            "admitted_fraction": self.admitted_fraction.tolist(),
            "bid_price": self.bid_price.tolist(),
            "shadow_price": self.shadow_price,
            "binding_constraints": list(self.binding_constraints),
            "certificate": {**dataclasses.asdict(self.certificate), "ok": self.certificate.ok},
        }
        jsonable: dict[str, Any] = _files.to_jsonable(derived)
        return jsonable

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FluidSolution:
        """Read what `to_dict` wrote; "derived" is computed again, the rest is checked field by field."""
        names = (
            "workload",
            "server",
            "objective",
            "reward",
            "fairness_floor",
            "max_iteration_time",
            "chunk_tokens",
            "admitted_rate",
            "iteration_rate",
            "row_dual",
            "effort",
            "derived",
        )
        field = dict(zip(names, check_fields("fluid", data, SCHEMA, names), strict=True))
        slowest = field["max_iteration_time"]
        check_choice("fluid.objective", field["objective"], tuple(_REWARD_UNITS))
        model = build_model(
            Workload.from_dict(field["workload"]),
            Server.from_dict(field["server"], "fluid.server"),
            field["reward"] if field["objective"] == "rewards" else field["objective"],
            fairness_floor=field["fairness_floor"],
            max_iteration_time=None if slowest == "inf" else slowest,
            chunk_tokens=field["chunk_tokens"],
        )
        reward = _numbers("fluid.reward", field["reward"], len(model.workload))
        if not np.allclose(model.reward, reward, rtol=TOLERANCE, atol=0.0):
            raise InputError("fluid.reward", field["reward"], f"be what {field['objective']!r} means")
        return cls(
            model=model,
            arrival_rate=model.workload.arrival_rate,
            admitted_rate=_numbers("fluid.admitted_rate", field["admitted_rate"], len(model.workload)),
            iteration_rate=check_real("fluid.iteration_rate", field["iteration_rate"], minimum=0.0),
            row_dual=_numbers("fluid.row_dual", field["row_dual"], len(model.row_names)),
            effort=check_count("fluid.effort", field["effort"]),
        )

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the JSON text, and write it to `path` (whole or not at all) if one is given."""
        text = _files.dumps(self.to_dict())
        if path is not None:
            _files.write_whole(path, text)
        return text

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> FluidSolution:
        """Read the file `to_json` wrote."""
        return cls.from_dict(_files.loads(str(path), _files.read_text("fluid", path)))


def _numbers(argument: str, given: Any, count: int) -> NDArray[np.float64]:
    if not isinstance(given, list) or len(given) != count:
        raise InputError(argument, given, f"be a list of {count} numbers")
    return np.array([check_real(f"{argument}[{i}]", value, minimum=0.0) for i, value in enumerate(given)])
