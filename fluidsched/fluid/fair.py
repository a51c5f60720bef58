"""Fair sharing of a server that cannot carry everything: α-fair admission.

With share s_j = r_j a_j of type j (requests, tokens or reward per second) and weights ω_j > 0,

    max   Σ_j ω_j U_α(s_j),     U_α(s) = s^{1−α}/(1 − α),  U_1 = log

over the rates the fluid program admits. α = 0 is the program itself; α = 1 proportional fairness (no other
admission raises the sum of relative changes); α = 2 minimises Σ ω_j/s_j, potential delay; α → ∞ is
max-min fairness: no share can grow but at the cost of one no larger. Weights do not matter in that limit.
Types without demand are left out. Fairness in *admitted fractions* is the share with r_j = 1/λ_j.

Once u is eliminated (`FluidModel.halfspaces`) the admissible rates are G a ≤ 1, f_j λ_j ≤ a_j ≤ λ_j with G
≥ 0, and with multipliers y ≥ 0 of its few rows the optimum for 0 < α < ∞ is explicit,

    a_j(y) = [ ( ω_j r_j^{1−α} / p_j )^{1/α} ],  p = Gᵀ y, cut to f_j λ_j … λ_j.

So only y is sought. Raising y_h lowers the load Σ_j G_hj a_j(y) of its own row, so each y_h in turn solves a
scalar equation (dual coordinate ascent, which always converges); dropping rows left slack and Newton's
method on the others are tried after each sweep. Everything is in logarithms, so sizes do not matter. With
one row the solution is the weighted fair knapsack, s_j ∝ (ω_j r_j/G_j)^{1/α} where demand does not bind.

At α = ∞ shares are filled alike until a row is full, its types are frozen, and the rest go on: at most one
stage a row, each a search over the breakpoints of a piecewise-linear load (`progressive_filling`).

*Certificate.* A concave objective is at its optimum over a polyhedron exactly where the point maximises the
objective linearised there. So the solution carries the `FluidSolution` whose rewards are the bid prices:
its certificate says that rows are met and that priced rows are full. What remains is stationarity: the
marginal utility ω_j r_j s_j^{−α} of a type is at least its bid price if it is above its floor, at most that
if it is below its demand. At α = ∞ it is the bottleneck condition, necessary
and sufficient since G ≥ 0: a type below its demand has a full row in which no share above its floor is
larger.

Sources: Mo and Walrand, IEEE/ACM Trans. Networking 8 (2000); Bertsekas and Gallager, Data Networks, 6.5.2.
The elimination of u and the solution by rows are ours.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched import _files
from fluidsched._checks import check_real
from fluidsched._display import Tabular
from fluidsched.errors import InputError, SolverError
from fluidsched.fluid.certificate import TOLERANCE, Certificate
from fluidsched.fluid.model import FluidModel, build_model
from fluidsched.fluid.program import solve_model
from fluidsched.fluid.solution import FluidSolution
from fluidsched.server import Server
from fluidsched.workload import Workload

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["FairSolution", "progressive_filling", "solve_fair"]

SCHEMA = "fluidsched.fair-solution/1"

#: Load a row may miss 1 by where its multiplier is positive.
_PRECISION = 1e-13
_MAX_SWEEPS = 2000
#: Load a row may miss 1 by and still count as full in progressive filling.
_FULL = 1e-12
#: Logarithms of multipliers are sought within this distance of the last value.
_WIDEST = 1e4


@dataclass(frozen=True, eq=False, repr=False)
class FairSolution(Tabular):
    """An α-fair admission. J types.

    Attributes
    ----------
    alpha : float
        Degree of fairness, 0 … inf.
    weights : ndarray of shape (J,)
        ω.
    share_per_request : ndarray of shape (J,)
        r: the share of a type is r_j a_j.
    fluid : FluidSolution
        The same rates as optimum of the linear program with the bid prices, relative to the largest, as
        rewards, for all that takes a `FluidSolution`.
    log_price_scale : float
        Logarithm of the factor that turns these relative prices into marginal utilities; 0 at α = 0 and ∞.
    """

    alpha: float
    weights: NDArray[np.float64]
    share_per_request: NDArray[np.float64]
    fluid: FluidSolution
    log_price_scale: float

    def __post_init__(self) -> None:
        self.weights.setflags(write=False)
        self.share_per_request.setflags(write=False)

    @property
    def admitted_rate(self) -> NDArray[np.float64]:
        """a, shape (J,), req/s."""
        return self.fluid.admitted_rate

    @cached_property
    def share(self) -> NDArray[np.float64]:
        """r_j a_j, shape (J,), per second."""
        share = self.share_per_request * self.admitted_rate
        share.setflags(write=False)
        return share

    @property
    def total(self) -> float:
        """Σ_j ω_j r_j a_j: what the linear program (α = 0) maximises, so fairness costs the difference."""
        return float(self.weights @ self.share)

    @property
    def bid_price(self) -> NDArray[np.float64]:
        """What one more request of each type per second costs the others, shape (J,), in utility.

        At α = ∞, where no prices exist, relative to the largest of prices that support the rates.
        """
        with np.errstate(over="ignore"):
            return np.asarray(self.fluid.bid_price * np.exp(self.log_price_scale))

    @cached_property
    def utility(self) -> float:
        """Σ_j ω_j U_α(s_j) over the types with demand; at α = ∞ their least share."""
        active = self.fluid.arrival_rate > 0.0
        share, weights = self.share[active], self.weights[active]
        if math.isinf(self.alpha):
            return float(share.min(initial=math.inf))
        with np.errstate(divide="ignore", over="ignore"):
            if self.alpha == 1.0:
                return float(weights @ np.log(share))
            return float(weights @ share ** (1.0 - self.alpha)) / (1.0 - self.alpha)

    @property
    def status(self) -> Literal["optimal", "imprecise"]:
        """Whether the certificate holds."""
        return "optimal" if self.certificate.ok else "imprecise"

    @cached_property
    def certificate(self) -> Certificate:
        """Optimality checked from the numbers alone; see the module's mathematics.

        `complementary_slackness` covers stationarity too: the relative difference of marginal utility and
        price where a rate is between its limits, its excess with the wrong sign at a limit. At α = ∞ it
        covers the bottleneck condition, relative to the largest share.
        """
        linear = self.fluid.certificate
        if self.alpha == 0.0:
            return linear
        error = self._bottleneck_violation() if math.isinf(self.alpha) else self._stationarity_violation()
        return dataclasses.replace(linear, complementary_slackness=max(linear.complementary_slackness, error))

    def _stationarity_violation(self) -> float:
        active = self.fluid.arrival_rate > 0.0
        fraction, floor = self.fluid.admitted_fraction[active], self.fluid.model.fairness_floor[active]
        marginal = _log(self.weights * self.share_per_request) - self.alpha * _log(self.share)
        excess = marginal[active] - _log(self.fluid.bid_price[active]) - self.log_price_scale
        at_floor, at_demand = fraction <= floor * (1.0 + TOLERANCE), fraction >= 1.0 - TOLERANCE
        too_low = np.where(at_floor, 0.0, -excess)
        too_high = np.where(at_demand, 0.0, excess)
        return float(np.maximum(too_low, too_high).max(initial=0.0))

    def _bottleneck_violation(self) -> float:
        """Largest over types of the least over rows: how far the row is from full, and the share from largest."""
        model, rate = self.fluid.model, self.fluid.arrival_rate
        admitted, share = self.admitted_rate, self.share
        largest = float(share.max())
        if largest == 0.0:
            return 0.0
        rows = model.halfspaces
        uses = rows > 0.0
        above_floor = admitted > model.fairness_floor * rate
        rival = np.where(uses & above_floor, share, 0.0).max(axis=1)
        missing = np.maximum((1.0 - rows @ admitted)[:, None], (rival[:, None] - share) / largest)
        least = np.where(uses, missing, math.inf).min(axis=0)
        refused = 1.0 - self.fluid.admitted_fraction
        return float(np.minimum(least, refused).max())

    # How it is shown.

    def to_frame(self) -> pd.DataFrame:
        """Return one row per type: rates in req/s, shares, and the bid price relative to the marginal utility."""
        frame = self.fluid.to_frame()[
            ["type", "arrival_rate", "admitted_rate", "admitted_fraction", "decision"]
        ]
        frame["share"] = self.share
        frame["weight"] = self.weights
        return frame

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, schema first; `fluid` is the embedded solution (`FluidSolution.to_dict`)."""
        answer: dict[str, Any] = _files.to_jsonable(
            {
                "schema": SCHEMA,
                "alpha": self.alpha,
                "weights": self.weights,
                "share_per_request": self.share_per_request,
                "admitted_rate": self.admitted_rate,
                "share": self.share,
                "total": self.total,
                "utility": self.utility,
                "status": self.status,
                "certificate": {**dataclasses.asdict(self.certificate), "ok": self.certificate.ok},
                "log_price_scale": self.log_price_scale,
                "fluid": self.fluid.to_dict(),
            }
        )
        return answer

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw offered and admitted rates by type; see `fluidsched.plots.fair_shares`."""
        from fluidsched import plots

        return plots.fair_shares([self], ax=ax)

    def _summary(self) -> list[tuple[str, str]]:
        names = {0.0: " (total)", 1.0: " (proportional)", 2.0: " (potential delay)", math.inf: " (max-min)"}
        active = self.fluid.arrival_rate > 0.0
        share = self.share[active]
        spread = f"{share.min():.4g} to {share.max():.4g} per second" if active.any() else "no demand"
        offered, admitted = float(self.fluid.arrival_rate.sum()), float(self.admitted_rate.sum())
        rows = [
            ("alpha", f"{self.alpha:g}{names.get(self.alpha, '')}"),
            ("offered", f"{offered:.4g} req/s in {len(active)} types"),
            ("admitted", f"{admitted:.4g} req/s"),
            ("shares", spread),
            ("binding", ", ".join(self.fluid.binding_constraints) or "demand alone"),
        ]
        if self.status != "optimal":
            rows.append(("status", "imprecise: the certificate fails, do not rely on these numbers"))
        return rows

    def __repr__(self) -> str:
        lines = ["FairSolution", *(f"  {name:<10} {value}" for name, value in self._summary())]
        names = self.fluid.model.workload.type_names
        shown = min(len(names), 20)
        width = max(len("type"), *(len(name) for name in names[:shown]))
        lines.append(f"  {'type':<{width}}   offered  admitted  [req/s]       share")
        for j in range(shown):
            lines.append(
                f"  {names[j]:<{width}} {self.fluid.arrival_rate[j]:>9.4g} {self.admitted_rate[j]:>9.4g}"
                f"  {self.fluid.decision[j]:<9} {self.share[j]:>9.4g}"
            )
        if shown < len(names):
            lines.append(f"  … and {len(names) - shown} more types: see to_frame()")
        return "\n".join(lines)


def solve_fair(
    workload: Workload,
    server: Server,
    alpha: float = 1.0,
    share: str | ArrayLike = "requests",
    *,
    weights: ArrayLike = 1.0,
    fairness_floor: ArrayLike | None = None,
    max_iteration_time: float | None = None,
    chunk_tokens: int | None = None,
) -> FairSolution:
    """Share the server α-fairly among the request types.

    Parameters
    ----------
    workload : Workload
        J request types with their offered rates; those without demand take no part.
    server : Server
        With a piecewise-affine iteration time.
    alpha : float
        0: the largest total; 1: proportional fairness; inf: max-min fairness.
    share : {"requests", "output_tokens", "total_tokens"} or array_like of shape (J,)
        What is shared, per request: the share of type j is r_j a_j. With 1/λ_j, fractions of demand.
    weights : float or array_like of shape (J,)
        ω_j > 0.
    fairness_floor, max_iteration_time, chunk_tokens : optional
        As for `FluidProgram`.

    Raises
    ------
    InputError
        If an argument is wrong; with α > 0 every r_j must be positive.
    InfeasibleError
        If the fairness floors cannot be met.
    SolverError
        If the multipliers do not converge.

    Examples
    --------
    Two types, one with four times the work of the other, on a server that could serve 8 req/s of the first
    alone. The total is largest without the second; proportionally fair, each takes half the server; max-min
    fair, each gets the same rate.

    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("a", 9.0, 125, 1), fs.RequestType("b", 9.0, 500, 1)])
    >>> server = fs.Server(float("inf"), fs.IterationTime.affine(1e-9, 1e-3, 0.0, 0.0))
    >>> for alpha in (0.0, 1.0, float("inf")):
    ...     print(fs.solve_fair(workload, server, alpha).admitted_rate.round(6))
    [8. 0.]
    [4. 1.]
    [1.6 1.6]
    """
    alpha = check_real("alpha", alpha, minimum=0.0, allow_inf=True)
    model = build_model(
        workload,
        server,
        share,
        fairness_floor=fairness_floor,
        max_iteration_time=max_iteration_time,
        chunk_tokens=chunk_tokens,
    )
    weight = _positive_weights(workload, weights)
    rate, worth = workload.arrival_rate, model.reward
    if alpha == 0.0:
        linear = dataclasses.replace(model, objective="rewards", reward=_frozen(weight * worth))
        return FairSolution(alpha, weight, np.array(worth), solve_model(linear, rate), 0.0)
    active = rate > 0.0
    if np.any(active & (worth == 0.0)):
        name = workload.type_names[int(np.argmax(active & (worth == 0.0)))]
        raise InputError(
            f"share of type {name!r}",
            0.0,
            "be positive for alpha > 0",
            "Set the type's arrival rate to 0 to leave it out.",
        )
    model.check_floors(rate)
    rows, lift = _rows(model)
    rows = rows[:, active]
    floor = (model.fairness_floor * rate)[active]
    price, shift, effort = np.zeros(len(rows)), 0.0, 0
    admitted = np.zeros_like(rate)
    if math.isinf(alpha):
        admitted[active] = progressive_filling(rows, worth[active], floor, rate[active])
        # Any positive multipliers of full rows support the point; each row's types get prices of one size.
        full = rows @ admitted[active] >= 1.0 - _FULL
        price[full] = 1.0 / rows[full].max(axis=1, initial=0.0)
    elif active.any():
        log_scale = _log(weight[active]) + (1.0 - alpha) * _log(worth[active])
        allocation = _Allocation(rows, alpha, log_scale, floor, rate[active])
        admitted[active], price, shift, effort = allocation.solve()
    row_dual = price @ lift
    bid = row_dual @ model.matrix
    largest = float(bid.max()) or 1.0
    fluid = FluidSolution(
        model=dataclasses.replace(model, objective="rewards", reward=_frozen(bid / largest)),
        arrival_rate=rate,
        admitted_rate=admitted,
        iteration_rate=model.iteration_rate(admitted),
        row_dual=row_dual / largest,
        effort=effort,
    )
    scale = 0.0 if math.isinf(alpha) else shift + math.log(largest)
    return FairSolution(alpha, weight, np.array(worth), fluid, scale)


def progressive_filling(
    rows: NDArray[np.float64],
    worth: NDArray[np.float64],
    floor: NDArray[np.float64],
    cap: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the max-min fair rates of a packing polytope.

    Parameters
    ----------
    rows : ndarray of shape (M, J)
        G ≥ 0 of G a ≤ 1.
    worth : ndarray of shape (J,)
        Share per unit of rate, positive.
    floor, cap : ndarray of shape (J,)
        Limits on the rates; the floors must be feasible.

    Examples
    --------
    Both types share the first row alike until it is full; the third has the second row's rest.

    >>> rows = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    >>> progressive_filling(rows, np.ones(3), np.zeros(3), np.full(3, 9.0)).tolist()
    [0.5, 0.5, 0.5]
    >>> rows[1] /= 2.0
    >>> progressive_filling(rows, np.ones(3), np.zeros(3), np.full(3, 9.0)).tolist()
    [0.5, 0.5, 1.5]
    """
    rates, free = floor.copy(), np.ones(len(cap), dtype=bool)

    def at(level: float) -> NDArray[np.float64]:
        return np.where(free, np.clip(level / worth, floor, cap), rates)

    while free.any():
        # Between two breakpoints the load of every row is linear in the level.
        levels = np.unique(np.concatenate([[0.0], (worth * floor)[free], (worth * cap)[free]]))
        low, high = 0, len(levels) - 1
        if (rows @ at(levels[high]) <= 1.0).all():
            return at(levels[high])
        while high - low > 1:
            middle = (low + high) // 2
            if (rows @ at(levels[middle]) <= 1.0).all():
                low = middle
            else:
                high = middle
        before, after = rows @ at(levels[low]), rows @ at(levels[high])
        crossing, gain = after > 1.0, after - before
        part = np.where(crossing, 0.0, 1.0)  # 0 for rows that floors alone fill, to rounding
        np.divide(np.maximum(1.0 - before, 0.0), gain, out=part, where=crossing & (gain > 0.0))
        first = int(np.argmin(part))
        rates = at(levels[low] + part[first] * (levels[high] - levels[low]))
        full = rows @ rates >= 1.0 - _FULL
        full[first] = True
        free &= (rates < cap) & ~(rows[full] > 0.0).any(axis=0)
    return rates


class _Allocation:
    """The explicit allocation of 0 < α < ∞ as a function of the rows' multipliers, and the search for these."""

    def __init__(
        self,
        rows: NDArray[np.float64],
        alpha: float,
        log_scale: NDArray[np.float64],
        floor: NDArray[np.float64],
        cap: NDArray[np.float64],
    ) -> None:
        self._rows, self._alpha, self._log_scale = rows, alpha, log_scale
        self._floor, self._cap = floor, cap
        self._log_floor, self._log_cap = _log(floor), _log(cap)
        # A rounding of the multiplier's logarithm moves the rates by that over α.
        self._precision = _PRECISION * max(1.0, 1.0 / alpha)

    def solve(self) -> tuple[NDArray[np.float64], NDArray[np.float64], float, int]:
        """Return the rates, the multipliers relative to the largest, the logarithm of that, and sweeps taken."""
        log_price = np.full(len(self._rows), -np.inf)
        sweeps, residual = 0, math.inf
        while residual > self._precision:
            if sweeps == _MAX_SWEEPS:
                raise SolverError(
                    f"the multipliers of the {self._alpha:g}-fair allocation did not converge in {sweeps} sweeps:"
                    f" a row is {residual:.2g} from full"
                )
            for row in range(len(self._rows)):
                log_price[row] = self._fill(log_price, row)
            log_price = self._shed(log_price)
            log_price, residual = self._newton(log_price)
            sweeps += 1
        rates = self._rates(log_price)[0]
        shift = float(log_price.max())
        if math.isinf(shift):  # no row is full
            return rates, np.zeros_like(log_price), 0.0, sweeps
        return rates, np.exp(log_price - shift), shift, sweeps

    def _rates(self, log_price: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the rates and the logarithms of the types' prices."""
        shift = float(log_price.max())
        if math.isinf(shift):
            return self._cap, np.full_like(self._log_cap, -np.inf)
        log_bid = shift + _log(np.exp(log_price - shift) @ self._rows)
        log_rate = (self._log_scale - log_bid) / self._alpha
        rate = np.exp(np.clip(log_rate, self._log_floor, self._log_cap))
        return np.clip(np.where(log_rate >= self._log_cap, self._cap, rate), self._floor, self._cap), log_bid

    def _fill(self, log_price: NDArray[np.float64], row: int) -> float:
        """Return the row's log multiplier, given the others: −inf if not full, else where its load is 1."""
        from scipy.optimize import brentq

        trial = log_price.copy()

        def excess(value: float) -> float:
            trial[row] = value
            load = float(self._rows[row] @ self._rates(trial)[0])
            return load - 1.0

        if excess(-math.inf) <= 0.0:
            return -math.inf
        use = self._rows[row]
        start = float(log_price[row])
        if math.isinf(start):  # where the type that wants most takes the whole row
            taking = use > 0.0
            wants = self._log_scale[taking] + (self._alpha - 1.0) * _log(use[taking])
            start = float(wants.max())
        low = high = start
        step = 1.0
        while excess(high) > 0.0:
            low, high = high, high + step
            step *= 2.0
            if step > _WIDEST:  # the floors alone fill the row
                return high
        step = 1.0
        while excess(low) <= 0.0:
            low, step = low - step, 2.0 * step
        return float(brentq(excess, low, high, xtol=1e-15, rtol=4.0 * np.finfo(float).eps))

    def _shed(self, log_price: NDArray[np.float64]) -> NDArray[np.float64]:
        """Drop the multipliers of rows that a sweep has left slack, if that halves the residual.

        Of two nearly parallel rows one must go, which ascent by coordinates does in very small steps.
        """
        load = self._rows @ self._rates(log_price)[0]
        slack = np.isfinite(log_price) & (load < 1.0 - self._precision)
        if not slack.any():
            return log_price
        trial = self._without(log_price, slack)
        return trial if self._residual(trial) < self._residual(log_price) / 2 else log_price

    def _without(self, log_price: NDArray[np.float64], dropped: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Set some multipliers to 0 and fill the other priced rows again."""
        trial = np.where(dropped, -np.inf, log_price)
        for row in np.flatnonzero(np.isfinite(trial)).tolist():
            trial[row] = self._fill(trial, row)
        return trial

    def _newton(self, log_price: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        """Newton's method on the rows with multipliers, while it halves the residual."""
        residual = self._residual(log_price)
        while residual > self._precision:
            priced = np.isfinite(log_price)
            rates, log_bid = self._rates(log_price)
            inside = (rates > self._floor) & (rates < self._cap)
            rows = self._rows[priced]
            part = np.exp(log_price[priced][:, None] - log_bid) * rows * inside
            slope = (rows * rates) @ part.T / self._alpha
            step = np.linalg.lstsq(slope, rows @ rates - 1.0, rcond=None)[0]
            trial = log_price.copy()
            # The relative change of each multiplier: one that would be negative becomes 0.
            kept = step > -1.0
            trial[priced] = np.where(kept, trial[priced] + np.log1p(np.where(kept, step, 0.0)), -np.inf)
            if not kept.all():
                trial = self._without(trial, np.isinf(trial))
            achieved = self._residual(trial)
            if not achieved < residual / 2:
                break
            log_price, residual = trial, achieved
        return log_price, residual

    def _residual(self, log_price: NDArray[np.float64]) -> float:
        excess = self._rows @ self._rates(log_price)[0] - 1.0
        return float(np.where(np.isfinite(log_price), np.abs(excess), np.maximum(excess, 0.0)).max())


def _rows(model: FluidModel) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return G without rows that another makes superfluous, and what turns its multipliers into the model's."""
    # The half-spaces are linear in the columns of the program: unit columns give the combinations of rows.
    lift = dataclasses.replace(model, matrix=np.eye(len(model.row_names))).halfspaces
    rows = model.halfspaces
    kept: list[int] = []
    for h, row in enumerate(rows):
        below = (rows >= row).all(axis=1)
        equal = (rows == row).all(axis=1)
        if not (below & ~equal).any() and not equal[:h].any():
            kept.append(h)
    return rows[kept], lift[kept]


def _positive_weights(workload: Workload, weights: ArrayLike) -> NDArray[np.float64]:
    try:
        array = np.array(np.broadcast_to(np.asarray(weights, dtype=np.float64), len(workload)))
    except (TypeError, ValueError):
        raise InputError("weights", weights, f"be a number, or one per type, {len(workload)}") from None
    for name, value in zip(workload.type_names, array.tolist(), strict=True):
        check_real(f"weights of type {name!r}", value, above=0.0)
    return array


def _log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(values))


def _frozen(array: NDArray[np.float64]) -> NDArray[np.float64]:
    array.setflags(write=False)
    return array
